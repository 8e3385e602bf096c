"""A model as a Hugging Face folder, and back: config.json, model.safetensors, tokenizer and chat template.

A model without extras and windows is transformers' own NanoChatForCausalLM: that one's rotary embedding turns the same
way, its QK norm comes after it and its soft cap is 15, so that only the weights' names differ. Any other model keeps
its names and brings its class along, modeling_nanochat_modern.py.
"""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from nanochat.config import InputError
from nanochat.gpt import GPT, LOGIT_CAP, ROPE_BASE, GPTConfig
from nanochat.scaling import GATE_CHANNELS
from nanochat.tokenizer import SPECIAL_TOKENS, Tokenizer
from nanochat.tokenizer_formats import export_huggingface, import_tokenizer

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
RECORD = "nanochat"  # key in config.json: which of our checkpoints the folder is
MODERN_FILE = Path(__file__).with_name("modeling_nanochat_modern.py")
PLAIN_TYPE, MODERN_TYPE = "nanochat", "nanochat_modern"
PLAIN_SIZES = {
    "sequence_len": "max_position_embeddings",
    "vocab_size": "vocab_size",
    "n_layer": "num_hidden_layers",
    "n_head": "num_attention_heads",
    "n_kv_head": "num_key_value_heads",
    "n_embd": "hidden_size",
}
# What our model has whatever its sizes; a folder that says otherwise holds another one. rms_norm_eps may differ: the
# usual 1e-6 in place of ours changes a norm in its seventh digit.
PLAIN_FACTS = {
    "hidden_act": "relu2",
    "final_logit_softcapping": LOGIT_CAP.cap,
    "attention_bias": False,
    "tie_word_embeddings": False,
}
PLAIN_NAMES = (  # ours, theirs
    (r"transformer\.wte\.", "model.embed_tokens."),
    (r"transformer\.h\.(\d+)\.attn\.c_proj\.", r"model.layers.\1.self_attn.o_proj."),
    (r"transformer\.h\.(\d+)\.attn\.c_([qkv])\.", r"model.layers.\1.self_attn.\2_proj."),
    (r"transformer\.h\.(\d+)\.mlp\.c_fc\.", r"model.layers.\1.mlp.fc1."),
    (r"transformer\.h\.(\d+)\.mlp\.c_proj\.", r"model.layers.\1.mlp.fc2."),
)


def is_plain(model: GPT) -> bool:
    """Whether transformers has this model."""
    return not model.config.extras and all(block.attn.window is None for block in model.blocks)


def plain_name(name: str) -> str:
    for ours, theirs in PLAIN_NAMES:
        name = re.sub(f"^{ours}", theirs, name)
    return name


def write_model(
    folder: Path, model: GPT, tokenizer: Tokenizer, record: Mapping[str, Any], dtype: str = "float32"
) -> None:
    """Write everything but the model card.

    Args:
        record: source, tag, step and dataset, as far as known; stands in config.json, comes back from `read_model`.
        dtype: of the weights in the file, a key of DTYPES.
    """
    plain, special, bos = is_plain(model), tokenizer.special_tokens, tokenizer.get_bos_token_id()
    end = special["<|assistant_end|>"] if set(SPECIAL_TOKENS) <= set(special) else bos
    ids = {"bos_token_id": bos, "eos_token_id": sorted({bos, end}), "pad_token_id": end}
    config = (_plain_config if plain else _modern_config)(model)
    _write_json(folder / "config.json", {**config, **ids, "dtype": dtype, RECORD: dict(record)})
    _write_json(folder / "generation_config.json", ids)
    export_huggingface(tokenizer, folder)
    if not plain:
        shutil.copyfile(MODERN_FILE, folder / MODERN_FILE.name)
    weights = {plain_name(k) if plain else k: v.to(DTYPES[dtype]).contiguous() for k, v in model.state_dict().items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "model.safetensors").chmod(0o644)  # safetensors makes it private


def _plain_config(model: GPT) -> dict[str, Any]:
    ours = model.config
    return {
        "architectures": ["NanoChatForCausalLM"],
        "model_type": PLAIN_TYPE,
        **{theirs: getattr(ours, name) for name, theirs in PLAIN_SIZES.items()},
        "intermediate_size": 4 * ours.n_embd,
        "rope_parameters": {"rope_type": "default", "rope_theta": ROPE_BASE},
        "rms_norm_eps": torch.finfo(torch.float32).eps,  # torch's own in rms_norm
        **PLAIN_FACTS,
    }


def _modern_config(model: GPT) -> dict[str, Any]:
    ours, module = model.config, MODERN_FILE.stem
    return {
        "architectures": ["NanoChatModernForCausalLM"],
        "model_type": MODERN_TYPE,
        "auto_map": {
            "AutoConfig": f"{module}.NanoChatModernConfig",
            "AutoModelForCausalLM": f"{module}.NanoChatModernForCausalLM",
        },
        **ours.to_dict(),
        "windows": [block.attn.window for block in model.blocks],
        "value_layers": ours.shape.value_layers,
        "gate_channels": min(GATE_CHANNELS, ours.n_embd),
        "tie_word_embeddings": False,
    }


def read_model(folder: Path) -> tuple[GPTConfig, dict[str, Tensor], Tokenizer, dict[str, Any]]:
    """(config, fp32 weights under our names, tokenizer, what is left of the record).

    Raises:
        InputError: the folder holds no such model, or a damaged one.
    """
    stored = _read_config(folder)
    kind = stored.get("model_type")
    if kind not in (PLAIN_TYPE, MODERN_TYPE):
        raise InputError(f"{folder} holds a model of type {kind!r}; nanochat reads {PLAIN_TYPE} and {MODERN_TYPE}")
    try:
        config = _read_plain(stored) if kind == PLAIN_TYPE else _read_modern(stored)
        with torch.device("meta"):
            expected = GPT(config).state_dict()
    except (KeyError, TypeError, ValueError, ArithmeticError, RuntimeError) as error:
        raise InputError(f"{folder}: config.json does not describe a model of nanochat: {_reason(error)}") from None
    try:
        found = load_file(folder / "model.safetensors")
    except (OSError, SafetensorError) as error:
        raise InputError(f"{folder}: cannot read model.safetensors: {_reason(error)}") from None
    names = {name: plain_name(name) if kind == PLAIN_TYPE else name for name in expected}
    wrong = sorted(found.keys() ^ set(names.values())) or [
        theirs for name, theirs in names.items() if found[theirs].shape != expected[name].shape
    ]
    if wrong:
        raise InputError(f"{folder}: model.safetensors does not fit config.json: {', '.join(wrong[:3])}")
    tokenizer = import_tokenizer(folder / "tokenizer.json")
    if (ids := tokenizer.get_vocab_size()) > config.vocab_size:
        raise InputError(f"{folder}: the tokenizer has {ids} ids and the model {config.vocab_size}")
    weights = {name: found[theirs].float() for name, theirs in names.items()}
    return config, weights, tokenizer, _read_record(stored)


def _read_config(folder: Path) -> dict[str, Any]:
    try:
        stored = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{folder} is no folder of a model: config.json: {_reason(error)}") from None
    if not isinstance(stored, dict):
        raise InputError(f"{folder} is no folder of a model: config.json holds no object")
    return stored


def _read_plain(stored: Mapping[str, Any]) -> GPTConfig:
    """What transformers leaves out when it saves is its own default, which is ours too."""
    config = GPTConfig(**{name: stored[theirs] for name, theirs in PLAIN_SIZES.items()})
    rope = stored.get("rope_parameters") or {}
    facts = {**PLAIN_FACTS, "intermediate_size": 4 * config.n_embd}
    wrong = [f"{key} {stored[key]!r}" for key, value in facts.items() if stored.get(key, value) != value]
    for key, value in {"rope_theta": ROPE_BASE, "rope_type": "default"}.items():
        if rope.get(key, value) != value:
            wrong.append(f"{key} {rope[key]!r}")
    if wrong:
        raise InputError(f"its {', '.join(wrong)}")
    return config


def _read_modern(stored: Mapping[str, Any]) -> GPTConfig:
    return GPTConfig(**{f.name: stored[f.name] for f in dataclasses.fields(GPTConfig) if f.name in stored})


def _read_record(stored: Mapping[str, Any]) -> dict[str, Any]:
    """Only what is as `write_model` was given it; the file may have been edited."""
    record = stored.get(RECORD)
    kinds = {"source": str, "tag": str, "step": int, "dataset": str}
    return {k: v for k, v in record.items() if isinstance(v, kinds.get(k, ()))} if isinstance(record, dict) else {}


def _reason(error: Exception) -> str:
    """One line."""
    if isinstance(error, KeyError):
        return f"it says no {error.args[0]}"
    return (getattr(error, "strerror", None) or str(error) or type(error).__name__).splitlines()[0]


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


@contextmanager
def staged(out: Path, force: bool = False) -> Iterator[Path]:
    """A folder to write to, which becomes `out` when all is written; before that there is nothing, or what was there.

    Args:
        force: replace an earlier export.

    Raises:
        InputError: `out` is there and not to be replaced, or the disk fails (it is full, ...).
    """
    out = out.absolute()
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        ours = out.is_dir() and (out / "config.json").exists() and RECORD in _read_config(out)
        if not (force and ours):
            way_out = "--force replaces it" if ours else "choose another --out"
            raise InputError(f"{out} exists and is {'an earlier export' if ours else 'no export of ours'}; {way_out}")
    staging, old = (out.with_name(f".{out.name}.{what}") for what in ("staging", "old"))
    try:
        for leftover in (staging, old):  # of a process that was killed
            shutil.rmtree(leftover, ignore_errors=True)
        staging.mkdir(parents=True)
        yield staging
        if out.exists():
            out.rename(old)
        staging.rename(out)
        shutil.rmtree(old, ignore_errors=True)
    except (OSError, SafetensorError) as error:
        raise InputError(f"cannot write {out}: {_reason(error)}") from None
    finally:
        shutil.rmtree(staging, ignore_errors=True)
