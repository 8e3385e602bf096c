"""Fetch pretraining shards.

    python -m nanochat.dataset -n 8         # shards 0 to 7 and the validation shard of climbmix, about 0.8 GB
    python -m nanochat.dataset -n 240 -w 8  # more; those that are there already are verified, and kept if whole

Writes base_data_climbmix/ (climbmix) or base_data/ (fineweb-edu) in the base dir, and listing.json there: the size
and the hash of each shard, by which damage is found when it is run again, and in training. Can be interrupted and
run again; ends with exit code 2 and the names of the missing or damaged shards if not all could be fetched.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

from nanochat.config import InputError, flag, run_cli
from nanochat.data.download import HUB_URL, fetch_all
from nanochat.data.shards import SHARD_SETS
from nanochat.data.sources import open_shards


@dataclass(frozen=True)
class DatasetConfig:
    num_files: int | None = flag(None, "training shards to fetch; -1 = all", off=-1, short="-n")
    num_workers: int = flag(4, "downloads at a time", short="-w")
    dataset: str = flag("climbmix", "which text", choices=tuple(SHARD_SETS), new=True)

    def __post_init__(self) -> None:
        most = SHARD_SETS[self.dataset].val_shard
        if self.num_files is not None and not 1 <= self.num_files <= most:
            raise InputError(f"--num_files {self.num_files} is not between 1 and {most}; or -1 for all")
        if self.num_workers < 1:
            raise InputError(f"--num_workers {self.num_workers} must be at least 1")


def run(cfg: DatasetConfig, url: str = HUB_URL, backoff: float = 2.0) -> None:
    """Fetch shards 0 .. num_files-1 and the validation shard; the latter first, as nothing works without it.

    Raises:
        InputError: some could not be fetched; names them.
    """
    shards = SHARD_SETS[cfg.dataset]
    directory = shards.path()
    n = cfg.num_files if cfg.num_files is not None else shards.val_shard
    if shards.is_mirrored():
        open_shards(shards, n)  # names what the mirror lacks
        print(f"{cfg.dataset} is read from {directory} (NANOCHAT_HUB_DIR); nothing to fetch")
        return
    directory.mkdir(parents=True, exist_ok=True)
    jobs = [shards.job(directory / shards.file_name(i), url) for i in (shards.val_shard, *range(n))]
    print(
        f"Fetching {len(jobs)} shards of {shards.repo} into {directory} with {cfg.num_workers} workers",
        flush=True,
    )
    t0 = time.perf_counter()
    failed = fetch_all(jobs, cfg.num_workers, backoff=backoff)
    if failed:
        names = sorted(path.name for path in failed)
        shown = ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
        reason = next(iter(failed.values()))
        raise InputError(f"{len(failed)} of {len(jobs)} shards are missing or damaged: {shown}; first reason: {reason}")
    print(f"{len(jobs)} shards are whole in {directory} ({time.perf_counter() - t0:.0f} s)")


def main(argv: Sequence[str] | None = None) -> None:
    run_cli(DatasetConfig, run, argv, about=__doc__)


if __name__ == "__main__":
    main()
