"""Where pretraining text comes from: climbmix, fineweb-edu, tinyworld, or a folder of your own text.

A source is a list of blocks per split; a block is a list of about 1,024 documents (a parquet row group). The
validation split is pinned: it never depends on how many shards were fetched nor on the order of files.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from nanochat.config import InputError
from nanochat.data.textfiles import BLOCK_DOCUMENTS, TEXT_SUFFIXES, TextFiles, hash_cut, text_hash
from nanochat.environment import base_dir, hub_dir

SPLITS = ("train", "val")


class Source(Protocol):
    """Text of two splits, "train" and "val", in blocks that any rank can read at random."""

    name: str

    def num_blocks(self, split: str) -> int: ...
    def read_block(self, split: str, i: int) -> list[str]:
        """The documents of block i, none of them empty (the list may be)."""
        ...

    def texts(self, split: str) -> Iterator[str]:
        for i in range(self.num_blocks(split)):
            yield from self.read_block(split, i)

    def fingerprint(self) -> str:
        """sha256 (hex) of what the source is made of; equal where a cursor finds the same documents."""
        ...


def _digest(parts: Any) -> str:
    return hashlib.sha256(json.dumps(parts).encode("utf-8")).hexdigest()


def _check_split(split: str) -> None:
    if split not in SPLITS:
        raise ValueError(f"split {split!r} is not one of {SPLITS}")


def _damaged(path: Path, error: Exception, refetch: str) -> InputError:
    reason = str(error).splitlines()[0][:200]
    return InputError(f"{path} is damaged ({reason}); delete it and {refetch}")


def row_groups(path: Path, refetch: str = "fetch it again") -> int:
    """The number of row groups, from the footer.

    Raises:
        InputError: the footer cannot be read, or there is no string column `text`.
    """
    try:
        with pq.ParquetFile(path) as file:
            schema, n = file.schema_arrow, file.num_row_groups
    except (pa.ArrowException, OSError) as error:
        raise _damaged(path, error, refetch) from None
    if "text" not in schema.names:
        raise InputError(f"{path} has no column 'text' (it has {', '.join(schema.names)}); rename the text column")
    kind = schema.field("text").type
    if not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
        raise InputError(f"column 'text' of {path} holds {kind}, not strings; convert it")
    return n


def read_row_group(path: Path, group: int, refetch: str = "fetch it again") -> list[str]:
    """The documents of one row group; empty ones are left out."""
    try:
        # opened each time: a footer costs about a millisecond, and no state is shared between threads
        with pq.ParquetFile(path) as file:
            column = file.read_row_group(group, columns=["text"], use_threads=False).column("text")
    except (pa.ArrowException, OSError) as error:
        raise _damaged(path, error, refetch) from None
    return [text for text in column.to_pylist() if text]


class ParquetSource(Source):
    """Shards with a column `text`: some for training, others for validation. A block is a row group."""

    def __init__(self, name: str, train: Sequence[Path], val: Sequence[Path], refetch: str) -> None:
        self.name = name
        self.files = {"train": list(train), "val": list(val)}
        self.refetch = refetch

    @cached_property
    def blocks(self) -> dict[str, list[tuple[Path, int]]]:
        """(file, row group) of each block; opens every footer once."""
        return {
            split: [(path, g) for path in paths for g in range(row_groups(path, self.refetch))]
            for split, paths in self.files.items()
        }

    def num_blocks(self, split: str) -> int:
        _check_split(split)
        return len(self.blocks[split])

    def read_block(self, split: str, i: int) -> list[str]:
        _check_split(split)
        path, group = self.blocks[split][i]
        return read_row_group(path, group, self.refetch)

    def fingerprint(self) -> str:
        sizes = {s: [(p.name, p.stat().st_size) for p in paths] for s, paths in self.files.items()}
        return _digest(sizes)


class SingleParquet(Source):
    """One parquet file: documents go to validation by the hash of their text (see `hash_cut`)."""

    def __init__(self, name: str, path: Path) -> None:
        self.name = name
        self.path = path
        refetch = "write it again"
        self.groups = range(row_groups(path, refetch))
        hashes = [[text_hash(t) for t in read_row_group(path, g, refetch)] for g in self.groups]
        self.cut = hash_cut(np.array([h for group in hashes for h in group], np.uint64), str(path))
        self._val_blocks = self._join_groups([sum(h <= self.cut for h in group) for group in hashes])

    @staticmethod
    def _join_groups(val_counts: Sequence[int]) -> list[range]:
        """Runs of row groups that hold about 1,024 validation documents each."""
        runs, start, count = [], 0, 0
        for g, n in enumerate(val_counts):
            count += n
            if count >= BLOCK_DOCUMENTS or (g == len(val_counts) - 1 and count):
                runs.append(range(start, g + 1))
                start, count = g + 1, 0
        return runs

    def num_blocks(self, split: str) -> int:
        _check_split(split)
        return len(self.groups) if split == "train" else len(self._val_blocks)

    def read_block(self, split: str, i: int) -> list[str]:
        _check_split(split)
        groups = [self.groups[i]] if split == "train" else self._val_blocks[i]
        texts = [text for g in groups for text in read_row_group(self.path, g, "write it again")]
        return [text for text in texts if (text_hash(text) <= self.cut) == (split == "val")]

    def fingerprint(self) -> str:
        return _digest([self.path.name, self.path.stat().st_size, self.cut])


@dataclass(frozen=True)
class ShardSet:
    """A published data set: `num_shards` files shard_00000.parquet and so on; the last is validation."""

    name: str
    repo: str  # owner/name on the hub
    directory: str  # under the base dir
    num_shards: int

    @property
    def val_shard(self) -> int:
        return self.num_shards - 1

    @staticmethod
    def file_name(index: int) -> str:
        return f"shard_{index:05d}.parquet"

    def command(self, n: int = 8) -> str:
        extra = "" if self.name == "climbmix" else f" --dataset={self.name}"
        return f"python -m nanochat.dataset -n {n}{extra}"

    def is_mirrored(self) -> bool:
        hub = hub_dir()
        return hub is not None and (hub / "datasets" / self.repo).is_dir()

    def path(self) -> Path:
        """The folder of the shards: the hub mirror's when it has one, else the base dir's."""
        hub = hub_dir()
        if hub is not None and self.is_mirrored():
            return hub / "datasets" / self.repo
        return base_dir() / self.directory


SHARD_SETS = {
    s.name: s
    for s in (
        ShardSet("climbmix", "karpathy/climbmix-400b-shuffle", "base_data_climbmix", 6543),
        ShardSet("fineweb-edu", "karpathy/fineweb-edu-100b-shuffle", "base_data", 1823),
    )
}


def open_shards(shards: ShardSet, num_shards: int | None = None) -> ParquetSource:
    """A published data set from disk: the training shards that are there now; validation is always the last.

    Args:
        num_shards: train on shards 0 .. num_shards-1, all of which must be there; None = on all that are.
    """
    directory = shards.path()
    val = directory / shards.file_name(shards.val_shard)
    command = shards.command(num_shards or 8)
    if num_shards is not None:
        if not 1 <= num_shards <= shards.val_shard:
            raise InputError(f"{num_shards} shards of {shards.name}; it has 1 to {shards.val_shard} for training")
        train = [directory / shards.file_name(i) for i in range(num_shards)]
        missing = [p.name for p in train if not p.is_file()]
    else:
        names = {shards.file_name(i) for i in range(shards.val_shard)}
        train = sorted(p for p in directory.glob("shard_*.parquet") if p.name in names)
        missing = [] if train else ["all training shards"]
    if not val.is_file():
        missing.append(f"{val.name} (validation)")
    if missing:
        shown = ", ".join(missing[:3]) + (f" and {len(missing) - 3} more" if len(missing) > 3 else "")
        raise InputError(f"{shards.name} is not complete in {directory}: no {shown}; run {command}")
    return ParquetSource(shards.name, train, [val], f"fetch it again: {command}")


class TinyWorld(Source):
    """The generated corpus (nanochat/data/tinyworld): nothing to fetch."""

    name = "tinyworld"

    def __init__(self) -> None:
        from nanochat.data import tinyworld  # its word lists are only needed here

        self._world = tinyworld

    def num_blocks(self, split: str) -> int:
        _check_split(split)
        return int(self._world.NUM_BLOCKS[split])

    def read_block(self, split: str, i: int) -> list[str]:
        _check_split(split)
        return [text for text in self._world.documents(split, i) if text]

    def fingerprint(self) -> str:
        counts = [self.num_blocks(split) for split in SPLITS]
        return _digest([counts, [self.read_block(split, 0) for split in SPLITS]])


def list_files(path: Path) -> list[Path]:
    """The data files of a folder and its subfolders by sorted relative name; hidden ones are left out.

    .md files beside .parquet or .jsonl files describe the data and are left out too.

    Raises:
        InputError: there are none, or they are of different kinds.
    """
    if path.is_file():
        found = [path]
    else:
        found = [p for p in path.rglob("*") if p.is_file()]
        found = [p for p in found if not any(part.startswith(".") for part in p.relative_to(path).parts)]
    kinds: dict[str, list[Path]] = {}
    for p in sorted(found, key=lambda p: p.as_posix()):
        suffix = p.suffix.lower()
        if suffix in (".parquet", ".jsonl", *TEXT_SUFFIXES):
            kinds.setdefault("text" if suffix in TEXT_SUFFIXES else suffix, []).append(p)
    data_kinds = [k for k in kinds if k != "text"]
    if data_kinds and all(p.suffix.lower() == ".md" for p in kinds.get("text", ())):
        kinds.pop("text", None)
    if not kinds:
        raise InputError(f"no .parquet, .jsonl, .txt or .md file in {path}; put your text there")
    if len(kinds) > 1:
        first = ", ".join(files[0].name for files in kinds.values())
        raise InputError(f"{path} mixes kinds of files ({first}); give each kind a folder of its own")
    return next(iter(kinds.values()))


def open_folder(name: str, path: Path, num_shards: int | None = None) -> Source:
    """A folder (or one file). Of several parquet files the last by name is validation; else see TextFiles."""
    files = list_files(path)
    if files[0].suffix.lower() != ".parquet":
        if num_shards is not None:
            raise InputError(f"{name} has no shards to choose {num_shards} from; leave that flag out")
        return TextFiles(name, path if path.is_dir() else path.parent, files)
    if len(files) == 1:
        return SingleParquet(name, files[0])
    train = files[:-1]
    if num_shards is not None and not 1 <= num_shards <= len(train):
        raise InputError(f"{num_shards} shards of {name}; it has 1 to {len(train)} for training")
    return ParquetSource(name, train[:num_shards], files[-1:], "write it again")


def open_source(name: str, *, num_shards: int | None = None) -> Source:
    """Open a source of pretraining text by name.

    Args:
        name: climbmix, fineweb-edu, tinyworld, a folder of .parquet, .jsonl, .txt or .md files, one such
            file, or OWNER/NAME of a data set in the hub mirror.
        num_shards: how many training shards to use; None = all that are there.

    Raises:
        InputError: no such source, missing or damaged shards, a folder without usable text.
    """
    if name in SHARD_SETS:
        return open_shards(SHARD_SETS[name], num_shards)
    if name == "tinyworld":
        return TinyWorld()
    candidates = [Path(name).expanduser()]
    hub = hub_dir()
    if hub is not None and not candidates[0].is_absolute():
        candidates.append(hub / "datasets" / name)
    for path in candidates:
        if name and path.exists():
            return open_folder(name, path, num_shards)
    raise InputError(f"no data source {name!r}; use {', '.join(SHARD_SETS)}, tinyworld or a folder of text files")
