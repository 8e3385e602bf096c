"""Your own text: .jsonl, .txt and .md files as a source with a held-out split, even from one file."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from nanochat.config import InputError

TEXT_SUFFIXES = (".txt", ".md")
VAL_FRACTION = 0.02
BLOCK_DOCUMENTS = 1024  # what the published shards have in a row group
WHOLE_FILE_BYTES = 16_384  # a text file up to this size is one document
PIECE_BYTES = 4_096  # larger ones are cut at the first blank line after this many bytes: about 1,000 tokens
MAX_PIECE_BYTES = 4 * PIECE_BYTES  # where no blank line comes, the next line end; where none comes, anywhere

Piece = tuple[int, int]  # (offset, length) in bytes


def text_hash(text: str) -> int:
    """64 bits of the text alone, so that a document keeps its split wherever it is moved to."""
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "big")


def hash_cut(hashes: np.ndarray, where: str) -> int:
    """A document is validation if its hash is at most the returned one: about 2%, at least one, never all.

    Args:
        hashes: (N,) uint64, one per document.

    Raises:
        InputError: fewer than two different documents.
    """
    distinct = np.unique(hashes)
    if len(distinct) < 2:
        raise InputError(
            f"{where} has {len(distinct)} different documents; it takes 2: one to train on, one to hold out"
        )
    within = int(np.searchsorted(distinct, np.uint64(int(VAL_FRACTION * 2**64)), side="right"))
    return int(distinct[min(max(within, 1), len(distinct) - 1) - 1])


def jsonl_lines(path: Path) -> Iterator[tuple[Piece, str]]:
    """(place, text) of each line {"text": ...}; blank lines are skipped.

    Raises:
        InputError: a line that is no such object, by file and line number.
    """
    offset = 0
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                yield (offset, len(line)), _jsonl_text(line, f"{path}:{number}")
            offset += len(line)


def _jsonl_text(line: bytes, where: str) -> str:
    try:
        row = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError:
        raise InputError(f"{where} is not UTF-8; save the file as UTF-8") from None
    except json.JSONDecodeError as error:
        raise InputError(f"{where} is no JSON ({error.msg}, column {error.colno}); one object a line") from None
    text = row.get("text") if isinstance(row, dict) else None
    if not isinstance(text, str):
        found = f"keys {', '.join(row)}" if isinstance(row, dict) else type(row).__name__
        raise InputError(f'{where} has no string under "text" ({found}); write {{"text": "..."}}')
    # JSON may hold half a surrogate pair, which is no character: U+FFFD takes its place
    return text if text.isascii() else text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def cut_text(raw: bytes) -> list[Piece]:
    """Places of the documents in a text file: all of it, or pieces cut at blank lines (sizes above)."""
    if len(raw) <= WHOLE_FILE_BYTES:
        return [(0, len(raw))]
    pieces, start, position = [], 0, 0
    for line in raw.splitlines(keepends=True):
        position += len(line)
        size = position - start
        if size >= MAX_PIECE_BYTES or (size >= PIECE_BYTES and not line.strip()):
            pieces += _cut_hard(raw, start, position)
            start = position
    if start < len(raw):
        pieces += _cut_hard(raw, start, len(raw))
    return pieces


def _cut_hard(raw: bytes, start: int, stop: int) -> list[Piece]:
    """One piece, or several where a single line is longer than a piece may be; never inside a character."""
    pieces = []
    while stop - start > 2 * MAX_PIECE_BYTES:
        end = start + MAX_PIECE_BYTES
        while raw[end] & 0xC0 == 0x80 and end > start + MAX_PIECE_BYTES - 4:  # a UTF-8 continuation byte
            end -= 1
        pieces.append((start, end - start))
        start = end
    return [*pieces, (start, stop - start)]


def text_pieces(path: Path) -> Iterator[tuple[Piece, str]]:
    """(place, text) of each document of a .txt or .md file; those of white space only are skipped."""
    raw = path.read_bytes()
    for offset, length in cut_text(raw):
        try:
            text = _plain(raw[offset : offset + length])
        except UnicodeDecodeError as error:
            raise InputError(f"{path} is not UTF-8 at byte {offset + error.start}; save it as UTF-8") from None
        if text:
            yield (offset, length), text


def _plain(raw: bytes) -> str:
    """Text as it is trained on: no byte-order mark, \\n line ends, no blank lines around it."""
    text = raw.decode("utf-8-sig").replace("\r\n", "\n").replace("\r", "\n")
    return text.strip("\n") if text.strip() else ""


class TextFiles:
    """Documents of .jsonl (one a line, key "text") or of .txt and .md (one a file; large files are cut).

    All files are read once when opened, for an index of 40 bytes a document; the text stays on disk. About 2%
    of the documents are validation, chosen by the hash of their text alone. Training documents are shuffled
    with seed 42, since the files of a folder tend to come in runs of one subject.
    """

    def __init__(self, name: str, root: Path, files: Sequence[Path]) -> None:
        self.name = name
        self.root = root
        self.files = list(files)
        self.is_jsonl = files[0].suffix.lower() == ".jsonl"
        places: list[tuple[int, int, int]] = []
        hashes: list[int] = []
        for f, path in enumerate(self.files):
            for (offset, length), text in jsonl_lines(path) if self.is_jsonl else text_pieces(path):
                if text:
                    places.append((f, offset, length))
                    hashes.append(text_hash(text))
        self._hashes = np.array(hashes, np.uint64)
        is_val = self._hashes <= np.uint64(hash_cut(self._hashes, str(root)))
        number = np.arange(len(places))[:, None]
        index = np.hstack([np.array(places, np.int64), number])  # (N, 4): file, offset, length, number of the document
        train = index[~is_val]
        val = index[is_val][np.argsort(self._hashes[is_val], kind="stable")]
        self._index = {"train": train[np.random.default_rng(42).permutation(len(train))], "val": val}

    def num_blocks(self, split: str) -> int:
        return -(-len(self._index[split]) // BLOCK_DOCUMENTS)

    def read_block(self, split: str, i: int) -> list[str]:
        if not 0 <= i < self.num_blocks(split):
            raise IndexError(f"block {i} of {self.num_blocks(split)}")
        places = self._index[split][i * BLOCK_DOCUMENTS : (i + 1) * BLOCK_DOCUMENTS]
        texts = [""] * len(places)
        for f in np.unique(places[:, 0]):  # each file is opened once
            with self.files[f].open("rb") as file:
                for j in np.flatnonzero(places[:, 0] == f):
                    file.seek(places[j, 1])
                    raw = file.read(places[j, 2])
                    texts[j] = self._text(raw, self.files[f], self._hashes[places[j, 3]])
        return texts

    def origins(self, split: str, i: int) -> list[str]:
        """The file, within the folder, of each document of a block."""
        places = self._index[split][i * BLOCK_DOCUMENTS : (i + 1) * BLOCK_DOCUMENTS]
        return [self.files[f].relative_to(self.root).as_posix() for f in places[:, 0]]

    def _text(self, raw: bytes, path: Path, wanted: np.uint64) -> str:
        """The document, which has to be the one that was here at the beginning."""
        with contextlib.suppress(UnicodeDecodeError, InputError):
            text = _jsonl_text(raw, "") if self.is_jsonl else _plain(raw)
            if text_hash(text) == wanted:
                return text
        raise InputError(f"{path} has changed since it was opened; start again to train on what it holds now")

    def texts(self, split: str) -> Iterator[str]:
        for i in range(self.num_blocks(split)):
            yield from self.read_block(split, i)

    def fingerprint(self) -> str:
        names = "\n".join(path.relative_to(self.root).as_posix() for path in self.files)
        return hashlib.sha256(names.encode("utf-8", "surrogateescape") + self._hashes.tobytes()).hexdigest()
