"""The tokenizer: byte-level BPE, trained by rustbpe, run by tiktoken, kept as one JSON file.

Ids: 0 to 255 are the raw bytes, then merges in the order they were learned, then the nine special tokens.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any, overload

import tiktoken
import torch

import rustbpe
from nanochat import chat
from nanochat.config import InputError
from nanochat.runtime import base_dir, offer_tiktoken_cache

# GPT-4's pattern with digits by at most two instead of three, so that a small vocabulary does not spend
# a thousand ids on numbers.
SPLIT_PATTERN = (
    r"'(?i:[sdmt]|ll|ve|re)"
    r"|[^\r\n\p{L}\p{N}]?+\p{L}+"
    r"|\p{N}{1,2}"
    r"| ?[^\s\p{L}\p{N}]++[\r\n]*"
    r"|\s*[\r\n]"
    r"|\s+(?!\S)"
    r"|\s+"
)

SPECIAL_TOKENS = (
    "<|bos|>",  # starts every document and conversation
    "<|user_start|>",
    "<|user_end|>",
    "<|assistant_start|>",
    "<|assistant_end|>",  # ends the assistant's turn
    "<|python_start|>",  # the assistant calls the calculator
    "<|python_end|>",
    "<|output_start|>",  # the calculator answers
    "<|output_end|>",
)

MIN_VOCAB_SIZE = 256 + len(SPECIAL_TOKENS)
FILE_NAME = "nanochat_tokenizer.json"
FILE_FORMAT = "nanochat-tokenizer-1"

# The regex engine below tiktoken overflows its stack on about a million white-space characters in a row, so a
# text is cut inside such runs. Looking for 100 in a row first keeps the search linear.
MAX_SPACE = 100_000
_SPACE_RUN = re.compile(r"\s{100,}")


class Tokenizer:
    """Text to ids and back. `metadata` is a JSON-able note in the file: what the tokenizer was trained on."""

    def __init__(self, encoding: tiktoken.Encoding, bos_token: str, metadata: Mapping[str, Any] | None = None) -> None:
        self.encoding = encoding
        self.bos_token = bos_token
        self.metadata = dict(metadata or {})

    @classmethod
    def from_ranks(
        cls,
        tokens: Sequence[bytes],
        pattern: str = SPLIT_PATTERN,
        special_tokens: Sequence[str] = SPECIAL_TOKENS,
        metadata: Mapping[str, Any] | None = None,
    ) -> Tokenizer:
        """From the bytes of every ordinary token in id order; the special tokens follow them."""
        encoding = tiktoken.Encoding(
            name="nanochat",
            pat_str=pattern,
            mergeable_ranks={token: rank for rank, token in enumerate(tokens)},
            special_tokens={name: len(tokens) + i for i, name in enumerate(special_tokens)},
        )
        return cls(encoding, special_tokens[0], metadata)

    @classmethod
    def train_from_iterator(cls, texts: Iterable[str], vocab_size: int) -> Tokenizer:
        """Learn a vocabulary of `vocab_size` ids, special tokens included.

        A text with too few distinct pairs gives a smaller one: read the size from get_vocab_size().

        Raises:
            InputError: vocab_size leaves no room for the 256 bytes and the special tokens.
        """
        if vocab_size < MIN_VOCAB_SIZE:
            raise InputError(
                f"--vocab_size {vocab_size} is too small; {MIN_VOCAB_SIZE} is the least "
                f"(256 bytes and {len(SPECIAL_TOKENS)} special tokens)"
            )
        trainer = rustbpe.Tokenizer()
        trainer.train_from_iterator(texts, vocab_size - len(SPECIAL_TOKENS), pattern=SPLIT_PATTERN)
        return cls.from_ranks([token for token, _ in trainer.get_mergeable_ranks()])

    @classmethod
    def from_pretrained(cls, name: str) -> Tokenizer:
        """One of tiktoken's own ("gpt2", "cl100k_base", ...); its documents start with the end-of-text token.

        Its vocabulary comes from TIKTOKEN_CACHE_DIR (tiktoken_cache/ of a hub mirror if unset) or the network.

        Raises:
            InputError: unknown, or its vocabulary is neither cached nor to be fetched.
        """
        offer_tiktoken_cache()
        try:
            return cls(tiktoken.get_encoding(name), "<|endoftext|>")
        except OSError as error:  # requests' errors are OSErrors, several lines long
            raise InputError(
                f"tiktoken has no {name} in its cache and cannot fetch it ({type(error).__name__}); "
                "set TIKTOKEN_CACHE_DIR to a folder that holds it"
            ) from error
        except ValueError as error:
            raise InputError(f"tiktoken cannot give {name}: {str(error).splitlines()[0]}") from error

    @classmethod
    def from_directory(cls, directory: str | Path) -> Tokenizer:
        """Read what save() wrote.

        Raises:
            InputError: nothing there, or the file is damaged.
        """
        path = Path(directory) / FILE_NAME
        if not path.exists():
            raise InputError(f"no tokenizer at {path}; train one: python -m scripts.tok_train")
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
            if record["format"] != FILE_FORMAT:
                raise InputError(f"{path} has format {record['format']!r}, not {FILE_FORMAT}; train it again")
            if record.pop("sha256") != _digest(record):
                raise ValueError("its checksum does not match")
            tokens = [base64.b64decode(token, validate=True) for token in record["tokens"]]
            return cls.from_ranks(tokens, record["pattern"], record["special_tokens"], record["metadata"])
        except InputError:
            raise
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise InputError(
                f"the tokenizer at {path} is damaged ({error}); train it again: python -m scripts.tok_train"
            ) from error

    def save(self, directory: str | Path) -> Path:
        """Write the file, whole or not at all, and return its path."""
        path = Path(directory) / FILE_NAME
        path.parent.mkdir(parents=True, exist_ok=True)
        record = {"format": FILE_FORMAT, "metadata": self.metadata, **self._content()}
        record["sha256"] = _digest(record)
        temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
        try:
            with open(temporary, "w", encoding="utf-8") as f:
                json.dump(record, f, indent=0)
                f.flush()
                os.fsync(f.fileno())
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
        return path

    def _content(self) -> dict[str, Any]:
        """All that decides which ids a text gets."""
        encoding = self.encoding
        ranks = sorted(encoding._mergeable_ranks.items(), key=lambda item: item[1])
        specials = sorted(encoding._special_tokens.items(), key=lambda item: item[1])
        return {
            "pattern": encoding._pat_str,
            "special_tokens": [name for name, _ in specials],
            "tokens": [base64.b64encode(token).decode("ascii") for token, _ in ranks],
        }

    @cached_property
    def fingerprint(self) -> str:
        """sha256 (hex) of pattern, tokens and special tokens: equal if and only if all ids mean the same."""
        return _digest(self._content())

    def get_vocab_size(self) -> int:
        return self.encoding.n_vocab

    def get_special_tokens(self) -> set[str]:
        return self.encoding.special_tokens_set

    def get_bos_token_id(self) -> int:
        return self._special_ids[self.bos_token]

    @cached_property
    def _special_ids(self) -> dict[str, int]:
        return {name: self.encoding.encode_single_token(name) for name in self.get_special_tokens()}

    def encode_special(self, name: str) -> int:
        """The id of a special token.

        Raises:
            KeyError: there is none of that name.
        """
        return self._special_ids[name]

    @overload
    def encode(
        self,
        text: str,
        prepend: int | str | None = None,
        append: int | str | None = None,
        num_threads: int = 8,
    ) -> list[int]: ...
    @overload
    def encode(
        self,
        text: list[str],
        prepend: int | str | None = None,
        append: int | str | None = None,
        num_threads: int = 8,
    ) -> list[list[int]]: ...
    def encode(
        self,
        text: str | list[str],
        prepend: int | str | None = None,
        append: int | str | None = None,
        num_threads: int = 8,
    ) -> list[int] | list[list[int]]:
        """Ids of one text, or of each of many on several threads.

        Special-token strings inside a text are plain text. `prepend` and `append` add one token to each text,
        by id or by the name of a special token.
        """
        texts = [text] if isinstance(text, str) else list(text)
        pieces = [_pieces(t) for t in texts]
        if all(len(p) == 1 for p in pieces) and len(texts) > 1:
            rows = self.encoding.encode_ordinary_batch(texts, num_threads=num_threads)
        else:
            rows = [[i for piece in p for i in self.encoding.encode_ordinary(piece)] for p in pieces]
        before, after = self._extra(prepend), self._extra(append)
        if before or after:
            rows = [[*before, *row, *after] for row in rows]
        return rows[0] if isinstance(text, str) else rows

    __call__ = encode

    def _extra(self, token: int | str | None) -> list[int]:
        if token is None:
            return []
        return [token if isinstance(token, int) else self.encode_special(token)]

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """The raw bytes of ids, which may end in the middle of a character.

        Raises:
            KeyError: an id is not in the vocabulary.
        """
        return self.encoding.decode_bytes(list(ids))

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids; bytes that are no UTF-8 become U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def id_to_token(self, token_id: int) -> str:
        return self.decode([token_id])

    def token_bytes(self) -> torch.Tensor:
        """(V,) int32: bytes of text that each id stands for, from the raw bytes; 0 for special tokens."""
        num_bytes = torch.zeros(self.get_vocab_size(), dtype=torch.int32)
        for token, rank in self.encoding._mergeable_ranks.items():
            num_bytes[rank] = len(token)
        return num_bytes

    def render_conversation(
        self, conversation: chat.Conversation, max_tokens: int = 2048
    ) -> tuple[list[int], list[int]]:
        return chat.render_conversation(self, conversation, max_tokens)

    def render_for_completion(self, conversation: chat.Conversation, max_tokens: int = 2048) -> list[int]:
        return chat.render_for_completion(self, conversation, max_tokens)

    def visualize_tokenization(self, ids: Iterable[int], mask: Iterable[int], with_token_id: bool = False) -> str:
        return chat.visualize_tokenization(self, ids, mask, with_token_id)


def get_tokenizer(directory: str | Path | None = None) -> Tokenizer:
    """The tokenizer in `directory`; None = the base directory's.

    Raises:
        InputError: there is none, or it is damaged.
    """
    return Tokenizer.from_directory(base_dir() / "tokenizer" if directory is None else directory)


def _pieces(text: str) -> list[str]:
    """`text`, cut every MAX_SPACE characters inside runs of white space."""
    if len(text) <= MAX_SPACE:
        return [text]
    cuts = [0]
    for run in _SPACE_RUN.finditer(text):
        cuts += range(run.start() + MAX_SPACE, run.end(), MAX_SPACE)
    return [text[a:b] for a, b in pairwise([*cuts, len(text)])]


def _digest(record: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()
