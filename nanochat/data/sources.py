"""Where pretraining text comes from: climbmix, fineweb-edu, tinyworld, or a folder of your own text.

A source is a list of blocks per split; a block is a list of about 1,024 documents (a parquet row group). The
validation split is pinned: it never depends on how many shards were fetched nor on the order of files.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from nanochat.config import InputError
from nanochat.data.listing import fault, read_listing
from nanochat.data.parquet import Damaged, num_rows, read_row_group, row_groups, tail_hash
from nanochat.data.shards import SHARD_SETS, ShardSet
from nanochat.data.textfiles import BLOCK_DOCUMENTS, TEXT_SUFFIXES, TextFiles, hash_cut, text_hash
from nanochat.environment import hub_dir, print0

SPLITS = ("train", "val")
BAD_SHARDS = ("stop", "skip")
VERIFY_THREADS = 4


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


class ParquetSource(Source):
    """Files with a column `text`: some for training, others for validation. A block is a row group.

    Args:
        shards: the published set that the files are of. They are then held against listing.json beside them: their
            hashes when they are first read. A damaged one is fetched again, where there is somewhere to fetch it from.
    """

    def __init__(self, name: str, train: Sequence[Path], val: Sequence[Path], shards: ShardSet | None = None) -> None:
        self.name = name
        self.files = {"train": list(train), "val": list(val)}
        self.shards = shards
        self.listing = read_listing(val[0].parent) if shards else {}

    @cached_property
    def blocks(self) -> dict[str, list[tuple[Path, int]]]:
        """(file, row group) of each block; opens every footer once."""
        return {
            split: [(path, g) for path in paths for g in range(self._row_groups(path))]
            for split, paths in self.files.items()
        }

    def _row_groups(self, path: Path) -> int:
        try:
            return row_groups(path, self.way_out(path))
        except Damaged:
            self._make_whole(path)
            return row_groups(path, self.way_out(path))

    def num_blocks(self, split: str) -> int:
        _check_split(split)
        return len(self.blocks[split])

    def read_block(self, split: str, i: int) -> list[str]:
        _check_split(split)
        path, group = self.blocks[split][i]
        self._make_whole(path)
        return read_row_group(path, group, self.way_out(path))

    def way_out(self, path: Path) -> str:
        return self.shards.way_out(path) if self.shards else "write it again"

    def fault(self, path: Path, thorough: bool) -> str | None:
        """What is wrong with a file by its size; thorough: by its hash or, where none is listed, by decoding it all."""
        if (listed := self.listing.get(path.name)) is not None:
            return fault(path, listed, thorough)
        try:
            for group in range(row_groups(path) if thorough else 0):
                read_row_group(path, group)
        except Damaged as error:
            return error.reason
        return None

    def mend(self, faults: Mapping[Path, str]) -> dict[Path, str]:
        """Fetch listed files again; what is wrong with the files that stay damaged."""
        listed = {path: why for path, why in faults.items() if path.name in self.listing}
        left = self.shards.mend(listed) if self.shards else {}
        return {path: left.get(path, why) for path, why in faults.items() if path in left or path not in listed}

    def _make_whole(self, path: Path) -> None:
        """See that a listed file has its hash; looks once a process.

        Raises:
            Damaged: it has not, and cannot be fetched again.
        """
        if (listed := self.listing.get(path.name)) is None or (why := fault(path, listed)) is None:
            return
        if left := self.mend({path: why}):
            raise Damaged(path, left[path], self.way_out(path))

    def fingerprint(self) -> str:
        parts = {s: [(p.name, p.stat().st_size, tail_hash(p)) for p in paths] for s, paths in self.files.items()}
        return _digest(parts)


# (files, what is left out of them): decided once a process, as each opening of a source must find the same documents
_left_out: dict[tuple[Path, ...], dict[Path, str]] = {}


def sift(source: ParquetSource, bad_shards: str) -> ParquetSource:
    """Look at all files before one is read: fetch damaged ones again, and refuse or leave out what stays damaged.

    "stop" compares sizes only; hashes follow when a file is first read. "skip" verifies all hashes now, or decodes
    files that have none listed, so that what is left out depends on the files alone, and the fingerprint with it: it
    differs between ranks that do not see the same files.

    Raises:
        Damaged: "stop", and a file is; "skip", and all of a split are.
    """
    files = tuple(path for paths in source.files.values() for path in paths)
    skips = bad_shards == "skip"
    if skips and files in _left_out:
        bad = _left_out[files]
    else:
        bad = _damaged_files(source, files, thorough=skips)
    good = {split: [path for path in paths if path not in bad] for split, paths in source.files.items()}
    emptied = [split for split in SPLITS if not good[split]]
    if bad and (emptied or not skips):
        path = next(path for path in bad if not emptied or path in source.files[emptied[0]])
        more = f" ({len(bad) - 1} more are damaged too)" if len(bad) > 1 else ""
        skip = "" if emptied else ", or train without it: base_train --bad_shards=skip"
        raise Damaged(path, bad[path], source.way_out(path) + skip + more)
    if bad and files not in _left_out:
        _tell_left_out(source, bad, good["train"])
    if skips:
        _left_out[files] = bad
    return ParquetSource(source.name, good["train"], good["val"], source.shards) if bad else source


def _damaged_files(source: ParquetSource, files: Sequence[Path], thorough: bool) -> dict[Path, str]:
    """What is wrong with files that stay damaged."""
    t0 = time.perf_counter()
    with ThreadPoolExecutor(VERIFY_THREADS) as pool:
        found = list(pool.map(lambda path: source.fault(path, thorough), files))
    if thorough:
        gigabytes = sum(path.stat().st_size for path in files if path.exists()) / 1e9
        seconds = time.perf_counter() - t0
        print0(f"Verified {len(files)} files of {source.name}, {gigabytes:.1f} GB, in {seconds:.1f} s")
    return source.mend({path: why for path, why in zip(files, found, strict=True) if why})


def _tell_left_out(source: ParquetSource, bad: Mapping[Path, str], good: Sequence[Path]) -> None:
    """Print what is left out, one line a file and one in all; documents as the others have them for their size."""
    for path, why in bad.items():
        print0(f"Left out: {path} ({why})")
    sizes = [source.listing[p.name].num_bytes if p.name in source.listing else p.stat().st_size for p in bad]
    documents = sum(map(num_rows, good)) / sum(path.stat().st_size for path in good) * sum(sizes)
    print0(
        f"{len(bad)} of {len(bad) + len(good)} training files of {source.name} are left out: {sum(sizes):,} bytes, "
        f"about {documents:,.0f} documents"
    )


class SingleParquet(Source):
    """One parquet file: documents go to validation by the hash of their text (see `hash_cut`)."""

    def __init__(self, name: str, path: Path) -> None:
        self.name = name
        self.path = path
        refetch = "write it again"
        self.groups = range(row_groups(path, refetch))
        hashes = [[text_hash(t) for t in read_row_group(path, g, refetch)] for g in self.groups]
        flat = np.array([h for group in hashes for h in group], np.uint64)
        self.cut = hash_cut(flat, str(path))
        self._content = [[len(group) for group in hashes], hashlib.sha256(flat.tobytes()).hexdigest()]
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
        return _digest([self.path.name, self._content])


def open_shards(shards: ShardSet, num_shards: int | None = None, bad_shards: str = "stop") -> ParquetSource:
    """A published data set from disk: the training shards that are there or listed; validation is always the last.

    Args:
        num_shards: train on shards 0 .. num_shards-1, all of which must be there or listed; None = on all that are.
    """
    directory = shards.path()
    listing = read_listing(directory)
    val = directory / shards.file_name(shards.val_shard)
    if num_shards is not None:
        if not 1 <= num_shards <= shards.val_shard:
            raise InputError(f"{num_shards} shards of {shards.name}; it has 1 to {shards.val_shard} for training")
        train = [directory / shards.file_name(i) for i in range(num_shards)]
    else:
        # a listed one that is gone is a fault to mend or to tell of, not less to train on
        found = {path.name for path in directory.glob("shard_*.parquet")} | listing.keys()
        train = [directory / name for name in map(shards.file_name, range(shards.val_shard)) if name in found]
    missing = [path.name for path in train if path.name not in listing and not path.is_file()]
    if not train:
        missing.append("all training shards")
    if val.name not in listing and not val.is_file():
        missing.append(f"{val.name} (validation)")
    if missing:
        shown = ", ".join(missing[:3]) + (f" and {len(missing) - 3} more" if len(missing) > 3 else "")
        command = shards.command(num_shards or 8)
        raise InputError(f"{shards.name} is not complete in {directory}: no {shown}; run {command}")
    return sift(ParquetSource(shards.name, train, [val], shards), bad_shards)


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


def open_folder(name: str, path: Path, num_shards: int | None = None, bad_shards: str = "stop") -> Source:
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
    return sift(ParquetSource(name, train[:num_shards], files[-1:]), bad_shards)


def open_source(name: str, *, num_shards: int | None = None, bad_shards: str = "stop") -> Source:
    """Open a source of pretraining text by name.

    Args:
        name: climbmix, fineweb-edu, tinyworld, a folder of .parquet, .jsonl, .txt or .md files, one such
            file, or OWNER/NAME of a data set in the hub mirror.
        num_shards: how many training shards to use; None = all that are there.
        bad_shards: what becomes of files (of several of parquet) that are damaged and cannot be fetched again:
            "stop", or "skip" to train without them. The latter verifies all hashes at once: 0.7 s a GB and core.

    Raises:
        InputError: no such source, missing or damaged shards, a folder without usable text.
    """
    if bad_shards not in BAD_SHARDS:
        raise InputError(f"bad_shards {bad_shards!r} is not one of {', '.join(BAD_SHARDS)}")
    if name in SHARD_SETS:
        return open_shards(SHARD_SETS[name], num_shards, bad_shards)
    if name == "tinyworld":
        return TinyWorld()
    candidates = [Path(name).expanduser()]
    hub = hub_dir()
    if hub is not None and not candidates[0].is_absolute():
        candidates.append(hub / "datasets" / name)
    for path in candidates:
        if name and path.exists():
            return open_folder(name, path, num_shards, bad_shards)
    raise InputError(f"no data source {name!r}; use {', '.join(SHARD_SETS)}, tinyworld or a folder of text files")
