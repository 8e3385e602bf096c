"""The tokenizer: byte-level BPE by rustbpe, kept as one JSON file.

Ids: 0 to 255 are the raw bytes, then merges in the order they were learned, then the nine special tokens.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property
from itertools import accumulate, pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

import numpy as np

import rustbpe
from nanochat import chat
from nanochat.config import InputError
from nanochat.environment import base_dir, offer_tiktoken_cache

if TYPE_CHECKING:
    import tiktoken
    import torch

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
PATTERNS = {
    "ours": SPLIT_PATTERN,
    "gpt2": r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
    "gpt4": SPLIT_PATTERN.replace("{1,2}", "{1,3}"),
}

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
MAX_VOCAB_SIZE = 2**31
FILE_NAME = "nanochat_tokenizer.json"
FILE_FORMAT = "nanochat-tokenizer-2"

Progress = Callable[[int, int], None]


def check_vocab_size(vocab_size: int) -> None:
    """Raises InputError when there is no room for the 256 bytes and the special tokens, or too much."""
    if not MIN_VOCAB_SIZE <= vocab_size <= MAX_VOCAB_SIZE:
        raise InputError(
            f"--vocab_size {vocab_size} must lie between {MIN_VOCAB_SIZE} (256 bytes and {len(SPECIAL_TOKENS)} special "
            f"tokens) and {MAX_VOCAB_SIZE}"
        )


class Tokenizer:
    """Text to ids and back.

    Args:
        bpe: all ordinary tokens.
        special_tokens: name -> id; none of them is ever found in a text.
        bos_token: the one that starts a document.
        metadata: a JSON-able note in the file: what the tokenizer was trained on.
    """

    def __init__(
        self,
        bpe: rustbpe.Tokenizer,
        special_tokens: Mapping[str, int],
        bos_token: str,
        metadata: Mapping[str, Any] | None = None,
    ) -> None:
        self.bpe = bpe
        self.special_tokens = dict(special_tokens)
        self.bos_token = bos_token
        self.metadata = dict(metadata or {})
        if bos_token not in special_tokens:
            raise InputError(f"{bos_token!r} is not among the special tokens {', '.join(special_tokens)}")
        if min(special_tokens.values()) < bpe.vocab_size or len(set(special_tokens.values())) < len(special_tokens):
            raise InputError(f"special tokens need ids of their own from {bpe.vocab_size} on, not {special_tokens}")

    @classmethod
    def from_ranks(
        cls,
        tokens: Sequence[bytes],
        pattern: str = SPLIT_PATTERN,
        special_tokens: Sequence[str] | Mapping[str, int] = SPECIAL_TOKENS,
        bos_token: str = SPECIAL_TOKENS[0],
    ) -> Tokenizer:
        """From the bytes of every ordinary token in id order; special tokens without ids follow them.

        Raises:
            InputError: the tokens are not the 256 bytes and then what pairs of earlier ones make, or a bad pattern.
        """
        try:
            bpe = rustbpe.Tokenizer.from_tokens(pattern, tokens)
        except ValueError as error:
            raise InputError(str(error)) from None
        if not isinstance(special_tokens, Mapping):
            special_tokens = {name: len(tokens) + i for i, name in enumerate(special_tokens)}
        return cls(bpe, special_tokens, bos_token)

    @classmethod
    def train_from_iterator(
        cls, texts: Iterable[str], vocab_size: int, pattern: str = SPLIT_PATTERN, progress: Progress | None = None
    ) -> Tokenizer:
        """Learn a vocabulary of `vocab_size` ids, special tokens included.

        A text with too few distinct pairs gives a smaller one: read the size from get_vocab_size().

        Args:
            progress: called with (merges done, merges planned) now and then.

        Raises:
            InputError: vocab_size leaves no room for the 256 bytes and the special tokens, no text, a bad pattern.
        """
        check_vocab_size(vocab_size)
        bpe = rustbpe.Tokenizer()
        try:
            bpe.train_from_iterator(texts, vocab_size - len(SPECIAL_TOKENS), pattern=pattern, progress=progress)
        except InputError:
            raise
        except ValueError as error:
            raise InputError(str(error)) from None
        return cls(bpe, {name: bpe.vocab_size + i for i, name in enumerate(SPECIAL_TOKENS)}, SPECIAL_TOKENS[0])

    @classmethod
    def from_pretrained(cls, name: str) -> Tokenizer:
        """One of tiktoken's own ("gpt2", "cl100k_base", ...); its documents start with the end-of-text token.

        Raises:
            InputError: unknown, or its vocabulary is neither cached nor to be fetched.
        """
        encoding = get_tiktoken(name)
        ranks = sorted(encoding._mergeable_ranks, key=encoding._mergeable_ranks.__getitem__)
        return cls.from_ranks(ranks, encoding._pat_str, encoding._special_tokens, "<|endoftext|>")

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
            merges = np.frombuffer(base64.b64decode(record.pop("merges"), validate=True), "<u4").reshape(-1, 2)
            if record.pop("sha256") != _digest(record, merges):
                raise ValueError("its checksum does not match")
            bpe = rustbpe.Tokenizer.from_merges(
                record["pattern"], bytes(record["bytes"]), merges.astype(np.uint32).tobytes()
            )
            return cls(bpe, record["special_tokens"], record["bos_token"], record["metadata"])
        except InputError:
            raise
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
            raise InputError(
                f"the tokenizer at {path} is damaged ({error}); train it again: python -m scripts.tok_train"
            ) from error

    def save(self, directory: str | Path) -> Path:
        """Write the file, whole or not at all, and return its path."""
        path = Path(directory) / FILE_NAME
        path.parent.mkdir(parents=True, exist_ok=True)
        record = {"format": FILE_FORMAT, "metadata": self.metadata, **self._content}
        digest = _digest(record, self.merges)
        # a number for each id would take longer to read than all the rest of loading
        merges = base64.b64encode(self.merges.astype("<u4").tobytes()).decode("ascii")
        text = json.dumps({**record, "sha256": digest, "merges": merges}, indent=1)
        write_text(path, text)
        return path

    @cached_property
    def merges(self) -> np.ndarray:
        """(M, 2) uint32: left and right id of each merge in turn."""
        return np.frombuffer(self.bpe.get_merges(), np.uint32).reshape(-1, 2)

    @cached_property
    def _content(self) -> dict[str, Any]:
        """What decides, with the merges, which ids a text gets."""
        return {
            "pattern": self.bpe.get_pattern(),
            "special_tokens": self.special_tokens,
            "bos_token": self.bos_token,
            "bytes": [token[0] for token in self._tokens[:256]],
        }

    @cached_property
    def _tokens(self) -> list[bytes]:
        return [token for token, _ in self.bpe.get_mergeable_ranks()]

    @cached_property
    def fingerprint(self) -> str:
        """sha256 (hex) of pattern, tokens and special tokens: equal if and only if all ids mean the same."""
        return _digest(self._content, self.merges)

    def get_vocab_size(self) -> int:
        return max(self.special_tokens.values()) + 1

    def get_special_tokens(self) -> set[str]:
        return set(self.special_tokens)

    def get_bos_token_id(self) -> int:
        return self.special_tokens[self.bos_token]

    def encode_special(self, name: str) -> int:
        """The id of a special token.

        Raises:
            KeyError: there is none of that name.
        """
        return self.special_tokens[name]

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

        Raises:
            InputError: a text holds half a surrogate pair, which is no character.
        """
        texts = [text] if isinstance(text, str) else list(text)
        before, after = self._extra(prepend), self._extra(append)
        rows = [[*before, *ids, *after] for ids in self._encode(self.bpe.batch_encode, texts, num_threads)]
        return rows[0] if isinstance(text, str) else rows

    __call__ = encode

    def encode_to_arrays(
        self, texts: Sequence[str], prepend: int | None = None, num_threads: int = 0
    ) -> list[np.ndarray]:
        """encode() of many texts without a Python object for each token: (N_i,) int32 arrays, parts of one buffer.

        Args:
            num_threads: 0 = one a core.
        """
        buffer, lengths = self._encode(self.bpe.encode_to_buffer, texts, prepend, num_threads)
        ids = np.frombuffer(buffer, np.int32)
        return [ids[start:end] for start, end in pairwise(accumulate(lengths, initial=0))]

    @staticmethod
    def _encode(encode: Callable[..., Any], *args: Any) -> Any:
        try:
            return encode(*args)
        except ValueError as error:
            raise InputError(str(error)) from None

    def _extra(self, token: int | str | None) -> list[int]:
        if token is None:
            return []
        return [token if isinstance(token, int) else self.encode_special(token)]

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """The raw bytes of ids, which may end in the middle of a character.

        Raises:
            KeyError: an id is not in the vocabulary.
        """
        return b"".join([self._bytes_of(i) for i in ids])

    def _bytes_of(self, i: int) -> bytes:
        if 0 <= i < len(self._tokens):
            return self._tokens[i]
        try:
            return self._special_names[i].encode()
        except KeyError:
            last = self.get_vocab_size() - 1
            raise KeyError(
                f"token id {i} is not in the vocabulary (ids 0 to {last}); does it come from this tokenizer?"
            ) from None

    @cached_property
    def _special_names(self) -> dict[int, str]:
        return {i: name for name, i in self.special_tokens.items()}

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids; bytes that are no UTF-8 become U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def id_to_token(self, token_id: int) -> str:
        return self.decode([token_id])

    def num_bytes(self) -> np.ndarray:
        """(V,) int32: bytes of text that each id stands for, from the raw bytes; 0 for special tokens."""
        num_bytes = np.zeros(self.get_vocab_size(), np.int32)
        num_bytes[: len(self._tokens)] = [len(token) for token in self._tokens]
        return num_bytes

    def token_bytes(self) -> torch.Tensor:
        """num_bytes() as a tensor."""
        import torch  # takes seconds, and training a tokenizer needs none of it

        return torch.from_numpy(self.num_bytes())

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


def get_tiktoken(name: str) -> tiktoken.Encoding:
    """One of tiktoken's own encodings: the yardstick of tok_eval.

    Its vocabulary comes from TIKTOKEN_CACHE_DIR (tiktoken_cache/ of a hub mirror if unset) or the network.

    Raises:
        InputError: unknown, or its vocabulary is neither cached nor to be fetched.
    """
    import tiktoken

    offer_tiktoken_cache()
    try:
        return tiktoken.get_encoding(name)
    except OSError as error:  # requests' errors are OSErrors, several lines long
        raise InputError(
            f"tiktoken has no {name} in its cache and cannot fetch it ({type(error).__name__}); "
            "set TIKTOKEN_CACHE_DIR to a folder that holds it"
        ) from error
    except ValueError as error:
        raise InputError(f"tiktoken cannot give {name}: {str(error).splitlines()[0]}") from error


def write_text(path: Path, text: str) -> None:
    """Write a file, whole or not at all."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "w", encoding="utf-8") as f:
            f.write(text)
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _digest(record: Mapping[str, Any], merges: np.ndarray) -> str:
    digest = hashlib.sha256(json.dumps(record, sort_keys=True).encode())
    digest.update(merges.astype("<u4").tobytes())
    return digest.hexdigest()
