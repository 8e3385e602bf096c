"""The published data sets: their names, where their shards lie, and how a damaged one is fetched again."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from nanochat.data import download
from nanochat.environment import base_dir, hub_dir


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

    def way_out(self, path: Path) -> str:
        """What a user does about a damaged shard."""
        if self.is_mirrored():
            return f"copy it into {path.parent} again"
        index = int(path.stem.removeprefix("shard_"))
        return f"fetch it again: {self.command(8 if index == self.val_shard else max(8, index + 1))}"

    def is_mirrored(self) -> bool:
        hub = hub_dir()
        return hub is not None and (hub / "datasets" / self.repo).is_dir()

    def path(self) -> Path:
        """The folder of the shards: the hub mirror's when it has one, else the base dir's."""
        hub = hub_dir()
        if hub is not None and self.is_mirrored():
            return hub / "datasets" / self.repo
        return base_dir() / self.directory

    def job(self, path: Path, url: str | None = None) -> download.Job:
        """The download of one shard; url: with {repo} and {file}, None = the hub's."""
        url = (url or download.HUB_URL).format(repo=self.repo, file=path.name)
        return download.Job(url, path, download.check_parquet)

    def mend(self, faults: Mapping[Path, str]) -> dict[Path, str]:
        """Fetch damaged shards again, each by one process only; what is wrong with those that stay damaged."""
        if self.is_mirrored():  # not ours to write into
            return dict(faults)
        failed = download.fetch_all([self.job(path) for path in faults], quiet=True)
        return {path: f"{faults[path]}; {reason}" for path, reason in failed.items()}


SHARD_SETS = {
    s.name: s
    for s in (
        ShardSet("climbmix", "karpathy/climbmix-400b-shuffle", "base_data_climbmix", 6543),
        ShardSet("fineweb-edu", "karpathy/fineweb-edu-100b-shuffle", "base_data", 1823),
    )
}
