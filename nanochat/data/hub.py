"""Task data as rows: from a hub mirror on disk, the base dir, or the network."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from nanochat.config import InputError
from nanochat.environment import base_dir, hub_dir


class Rows(Sequence[dict[str, Any]]):
    """The rows of an Arrow table, made into dicts one at a time as they are asked for."""

    def __init__(self, table: pa.Table) -> None:
        self._table = table.combine_chunks()  # finding a row among many chunks is slow

    def __len__(self) -> int:
        return self._table.num_rows

    def __getitem__(self, i: Any) -> Any:
        if isinstance(i, slice):
            return [self[j] for j in range(*i.indices(len(self)))]
        if not -len(self) <= i < len(self):
            raise IndexError(f"row {i} of {len(self)}")
        return self._table.slice(i % len(self), 1).to_pylist()[0]

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for batch in self._table.to_batches(max_chunksize=1024):
            yield from batch.to_pylist()


def _folders(repo: str) -> list[Path]:
    """Where a copy of a data set may lie, first choice first."""
    hub = hub_dir()
    mirror = [] if hub is None else [hub / "datasets" / repo]
    return [*mirror, base_dir() / "task_data" / repo.replace("/", "--")]


def _split_files(folder: Path, config: str, split: str) -> list[Path]:
    """The parquet files of a split: CONFIG/SPLIT-00000-of-00002.parquet and so on, or CONFIG/SPLIT/*.parquet.

    A data set of one configuration, "default", may have them in data/.

    Raises:
        InputError: some of the numbered files are missing.
    """
    numbered = re.compile(re.escape(split) + r"-\d+-of-(\d+)\.parquet")
    for inner in (config, "data") if config == "default" else (config,):
        files = sorted((folder / inner).glob("*.parquet"))
        found = [(path, m) for path in files if (m := numbered.fullmatch(path.name))]
        if found:
            wanted = int(found[0][1][1])
            if len(found) != wanted:
                raise InputError(
                    f"{folder / inner} has {len(found)} of {wanted} files of split {split}; fetch the others"
                )
            return [path for path, _ in found]
        if whole := sorted((folder / inner / split).glob("*.parquet")):
            return whole
    return []


def has(repo: str) -> bool:
    """Is there a copy of the data set on disk, so that no network is needed?"""
    return any(next(folder.rglob("*.parquet"), None) for folder in _folders(repo) if folder.is_dir())


def load_rows(repo: str, config: str, split: str) -> Sequence[dict[str, Any]]:
    """The rows of a split in the hub's file order, each made a dict when it is asked for.

    Rows on disk are held as one Arrow table (about the size of their text); from the network they are a
    `datasets.Dataset`, which stays on disk.

    Args:
        repo: OWNER/NAME of the data set, as on the hub.
        config: its configuration; "default" where it has one only.

    Raises:
        InputError: a file is damaged or missing, or no copy is on disk and the network has none.
    """
    for folder in _folders(repo):
        if files := _split_files(folder, config, split):
            return Rows(pa.concat_tables([_read(path) for path in files]))
    return _from_network(repo, config, split)


def _read(path: Path) -> pa.Table:
    try:
        with pq.ParquetFile(path) as file:
            return file.read()
    except (pa.ArrowException, OSError) as error:
        reason = str(error).splitlines()[0][:200]
        raise InputError(f"{path} is damaged ({reason}); delete it and fetch it again") from None


def _from_network(repo: str, config: str, split: str) -> Sequence[dict[str, Any]]:
    wayout = "set NANOCHAT_HUB_DIR to a folder that has it under datasets/" + repo
    try:
        import datasets  # heavy, and of no use where the rows are on disk
    except ImportError as error:
        raise InputError(f"{repo} is not on disk and `datasets` cannot be imported ({error}); {wayout}") from None
    try:
        return datasets.load_dataset(repo, config, split=split)
    except Exception as error:  # its network, hub and parsing layers raise unrelated kinds, all of them fatal here
        reason = (str(error).splitlines() or [""])[0][:200]
        raise InputError(
            f"cannot load {repo} ({config}, {split}): {type(error).__name__}: {reason}; {wayout}"
        ) from error


def shuffled_order(n: int, seed: int = 42) -> np.ndarray:
    """(n,) int64: row numbers in the order of the hub library's `.shuffle(seed)`."""
    return np.random.default_rng(seed).permutation(n)
