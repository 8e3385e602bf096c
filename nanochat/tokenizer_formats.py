"""Tokenizers in other programs' files: Hugging Face's tokenizer.json, tiktoken's rank list.

Both ways keep every id. What cannot be kept (a normaliser, merges out of order, words instead of bytes) is refused.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from nanochat.config import InputError
from nanochat.tokenizer import FILE_NAME, PATTERNS, SPECIAL_TOKENS, SPLIT_PATTERN, Tokenizer, get_tokenizer, write_text

# chat.render_conversation as a Jinja template: a system message goes in front of the user's words.
CHAT_TEMPLATE = """\
{%- set system = "" -%}
{%- if messages[0].role == "system" -%}
    {%- set system = messages[0].content + "\\n\\n" -%}
    {%- set messages = messages[1:] -%}
{%- endif -%}
{{- bos_token -}}
{%- for message in messages -%}
    {%- if message.role == "user" -%}
        {{- "<|user_start|>" + (system if loop.first else "") + message.content + "<|user_end|>" -}}
    {%- elif message.role == "assistant" -%}
        {{- "<|assistant_start|>" -}}
        {%- if message.content is string -%}
            {{- message.content -}}
        {%- else -%}
            {%- for part in message.content -%}
                {%- if part.type == "python" -%}
                    {{- "<|python_start|>" + part.text + "<|python_end|>" -}}
                {%- elif part.type == "python_output" -%}
                    {{- "<|output_start|>" + part.text + "<|output_end|>" -}}
                {%- else -%}
                    {{- part.text -}}
                {%- endif -%}
            {%- endfor -%}
        {%- endif -%}
        {{- "<|assistant_end|>" -}}
    {%- else -%}
        {{- raise_exception("roles are user and assistant, and system for the first message") -}}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- "<|assistant_start|>" -}}
{%- endif -%}
"""


def byte_characters() -> list[str]:
    """A visible character for each byte, as GPT-2 writes them: itself where it is visible, else one from U+0100 on."""
    visible = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return [chr(byte if byte in visible else next(others)) for byte in range(256)]


def export_huggingface(tokenizer: Tokenizer, directory: str | Path) -> list[Path]:
    """Write tokenizer.json and tokenizer_config.json; returns their paths.

    `tokenizers` and `transformers` then give the same ids, and `apply_chat_template` those of render_conversation.
    Unlike us they read special tokens out of a user's text.
    """
    characters = byte_characters()
    tokens = [tokenizer.decode_bytes([i]) for i in range(tokenizer.bpe.vocab_size)]
    names = ["".join(characters[byte] for byte in token) for token in tokens]
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    special = sorted(tokenizer.special_tokens.items(), key=lambda item: item[1])
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    split = {
        "type": "Split",
        "pattern": {"Regex": tokenizer.bpe.get_pattern()},
        "behavior": "Isolated",
        "invert": False,
    }
    model = {
        **{"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None},
        **{"end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "ignore_merges": False},
        "vocab": {name: i for i, name in enumerate(names)},
        "merges": [[names[left], names[right]] for left, right in tokenizer.merges.tolist()],
    }
    content = {
        **{"version": "1.0", "truncation": None, "padding": None},
        "added_tokens": [{"id": i, "content": name, **flags} for name, i in special],
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, byte_level]},
        "post_processor": None,
        "decoder": byte_level,
        "model": model,
    }
    has_chat = set(SPECIAL_TOKENS) <= set(tokenizer.special_tokens)
    end = "<|assistant_end|>" if has_chat else tokenizer.bos_token
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **{"bos_token": tokenizer.bos_token, "eos_token": end, "pad_token": end},
        "additional_special_tokens": [name for name, _ in special if name not in (tokenizer.bos_token, end)],
        "clean_up_tokenization_spaces": False,
        **({"chat_template": CHAT_TEMPLATE} if has_chat else {}),
    }
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    paths = [directory / "tokenizer.json", directory / "tokenizer_config.json"]
    for path, value in zip(paths, (content, config), strict=True):
        write_text(path, json.dumps(value, ensure_ascii=False, indent=1) + "\n")
    return paths


def export_tiktoken(tokenizer: Tokenizer, directory: str | Path) -> list[Path]:
    """Write tokenizer.tiktoken (a line of base64 and id for each token) and tokenizer.tiktoken.json, which holds the
    other arguments of tiktoken.Encoding: pat_str and special_tokens. Returns their paths."""
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    tokens = [tokenizer.decode_bytes([i]) for i in range(tokenizer.bpe.vocab_size)]
    lines = [f"{base64.b64encode(token).decode('ascii')} {i}\n" for i, token in enumerate(tokens)]
    rest = {"pat_str": tokenizer.bpe.get_pattern(), "special_tokens": tokenizer.special_tokens}
    paths = [directory / "tokenizer.tiktoken", directory / "tokenizer.tiktoken.json"]
    for path, text in zip(paths, ("".join(lines), json.dumps(rest, ensure_ascii=False, indent=1) + "\n"), strict=True):
        write_text(path, text)
    return paths


def import_tokenizer(path: str | Path, pattern: str | None = None, special_tokens: str | None = None) -> Tokenizer:
    """Read a tokenizer.json, or ranks: tiktoken's lines of base64 and id, or a JSON list of [bytes as ints, id].

    Args:
        pattern: the split pattern of ranks, by name or as an expression; None = the one in the file beside them, else
            ours. A tokenizer.json has its own.
        special_tokens: those of ranks, by commas; they get the ids after the last rank. None as for `pattern`.

    Raises:
        InputError: not such a file, or a kind of tokenizer that byte-level merges cannot express.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8"
        raise InputError(f"cannot read the tokenizer {path}: {reason}") from None
    try:
        content = json.loads(text) if text.lstrip()[:1] in ("{", "[") else None
        if isinstance(content, dict):
            return _from_huggingface(content, path)
        if content is not None:
            ranks = {bytes(token): int(rank) for token, rank in content}
        else:
            ranks = {base64.b64decode(token): int(rank) for token, rank in map(str.split, text.splitlines())}
        beside = path.with_name(path.name + ".json")
        rest = json.loads(beside.read_text(encoding="utf-8")) if beside.exists() else {}
        chosen = pattern or rest.get("pat_str") or SPLIT_PATTERN
        special = special_tokens.split(",") if special_tokens else rest.get("special_tokens") or SPECIAL_TOKENS
        return Tokenizer.from_ranks(_in_order(ranks), PATTERNS.get(chosen, chosen), special, next(iter(special)))
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise InputError(f"{path} is neither a tokenizer.json nor a list of ranks ({error})") from None


def install(tokenizer: Tokenizer, directory: Path, origin: str) -> Path:
    """Save an imported tokenizer in a directory that has none, or the same; returns its path.

    Raises:
        InputError: there is another one.
    """
    if (directory / FILE_NAME).exists() and get_tokenizer(directory).fingerprint != tokenizer.fingerprint:
        raise InputError(
            f"{directory} has another tokenizer, which checkpoints may need; move it away, or choose another"
        )
    tokenizer.metadata["imported from"] = origin
    return tokenizer.save(directory)


def _in_order(ids: Mapping[bytes, int]) -> list[bytes]:
    tokens = sorted(ids, key=ids.__getitem__)
    if [ids[token] for token in tokens] != list(range(len(tokens))):
        raise InputError(f"the ids of its {len(tokens)} tokens do not run from 0 to {len(tokens) - 1}")
    return tokens


def _from_huggingface(content: Mapping[str, Any], path: Path) -> Tokenizer:
    model = content["model"]
    if model.get("type") != "BPE" or content.get("normalizer"):
        raise InputError(
            f"it is no plain byte-level BPE (model {model.get('type')}, normalizer {content.get('normalizer')})"
        )
    special = {token["content"]: token["id"] for token in content.get("added_tokens") or ()}
    if not special:
        raise InputError("it has no added tokens, so none that starts a document")
    bytes_of = {character: byte for byte, character in enumerate(byte_characters())}
    vocab = {name: i for name, i in model["vocab"].items() if name not in special}
    tokens = _in_order({bytes(bytes_of[c] for c in name): i for name, i in vocab.items()})
    config = path.with_name("tokenizer_config.json")
    bos = json.loads(config.read_text(encoding="utf-8")).get("bos_token") if config.exists() else None
    bos = bos.get("content") if isinstance(bos, dict) else bos
    tokenizer = Tokenizer.from_ranks(
        tokens, _pattern(content.get("pre_tokenizer")), special, bos or next(iter(special))
    )
    merges = [merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"]]
    if [[vocab[left], vocab[right]] for left, right in merges] != tokenizer.merges.tolist():
        raise InputError("its merges are not in the order of their ids")
    return tokenizer


def _pattern(pre_tokenizer: Mapping[str, Any] | None) -> str:
    """The split pattern of a byte-level pre-tokenizer."""
    steps: Sequence[Mapping[str, Any]] = (pre_tokenizer or {}).get("pretokenizers") or [pre_tokenizer or {}]
    *splits, last = steps
    if last.get("type") == "ByteLevel" and not last.get("add_prefix_space"):
        if not splits and last.get("use_regex", True):
            return PATTERNS["gpt2"]
        if len(splits) == 1 and splits[0].get("type") == "Split" and not last.get("use_regex", True):
            pattern, behavior = splits[0].get("pattern", {}).get("Regex"), splits[0].get("behavior")
            if pattern and (behavior == "Isolated" or (behavior == "Removed" and splits[0].get("invert"))):
                return str(pattern)
    raise InputError(f"its pre-tokenizer is not one pattern and then bytes: {json.dumps(pre_tokenizer)[:200]}")
