"""What is done to a life. Inside: patches of that process alone, never of the product's files. Between two: damage."""

from __future__ import annotations

import contextlib
import errno
import functools
import hashlib
import os
import random
import shutil
import signal
import stat
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from nanochat.data.loader import PackingLoader
from nanochat.gpt import GPT
from nanochat.optim import MuonAdamW
from nanochat.tracking import Tracker
from tests.chaos.lives import kill_after_cpu_seconds

STAGING_LITTER = ".chaos"  # the end of the name of a staging directory that litter() left
MAX_SLEEP = 0.05  # seconds that an injected delay takes at most
SPIKE = 1e4  # times the loss


@dataclass(frozen=True)
class Strike:
    """What happens to a life.

    kind:
        "none"
        "cpu"     kill -9 after `at` seconds of its own CPU time: a random instant, whatever else the machine does
        "wall"    kill -9 after `at` seconds
        "point"   kill -9 at the `at`-th point of a kind, `where`:
                      "save"   before or after a write, an fsync, a rename, a removal
                      "train"  around a batch, a forward pass, an optimizer step, a log line
                      "eval"   around a forward pass of an evaluation
        "raise"   an exception at such a point
        "signal"  `signal` at such a point; "twice" two of them
        "full"    no room for another checkpoint
    rank: who is struck; whole: the others too.
    power: the machine loses power: files and renames that were not fsynced may be lost.
    lie: the file system says that there is room.
    injected: the disk is not really full: a write fails as if it were.
    delay: mean seconds slept at each point of a save.
    """

    kind: str = "none"
    at: float = 0
    where: str = "train"
    rank: int = 0
    whole: bool = True
    power: bool = False
    signal: str = "SIGINT"
    lie: bool = False
    injected: bool = False
    delay: float = 0.0
    seed: int = 0

    @property
    def is_kill(self) -> bool:
        return self.kind in ("cpu", "wall", "point")

    def told(self) -> str:
        parts = {k: v for k, v in vars(self).items() if k not in ("kind", "seed") and v != getattr(Strike, k)}
        return " ".join([self.kind, *(f"{k}={v if isinstance(v, str) else round(v, 3)}" for k, v in parts.items())])


@dataclass(frozen=True)
class BatchFaults:
    """Batches by digest, so that they are the same ones in every life and on any number of ranks."""

    masked: frozenset[str] = frozenset()  # no target
    poisoned: frozenset[str] = frozenset()  # a loss that is not a number
    spiked: frozenset[str] = frozenset()  # a loss that is SPIKE times as large


def digest(inputs: torch.Tensor) -> str:
    return hashlib.blake2b(inputs.contiguous().numpy().tobytes(), digest_size=8).hexdigest()


@dataclass
class Disk:
    """What would survive a loss of power, of the files below a directory."""

    root: Path
    rng: random.Random
    safe: dict[tuple[int, int], tuple[int, int]] = field(default_factory=dict)  # (device, inode): (mtime, bytes)
    renames: list[tuple[str, str]] = field(default_factory=list)  # not yet fsynced, oldest first

    def __post_init__(self) -> None:
        self.rename = os.rename  # before it is patched
        for path in self._files():
            self._is_safe(os.stat(path))

    def _files(self) -> list[Path]:
        return [p for p in self.root.rglob("*") if p.is_file()]

    def _is_safe(self, s: os.stat_result) -> None:
        self.safe[s.st_dev, s.st_ino] = (s.st_mtime_ns, s.st_size)

    def synced(self, fd: int) -> None:
        s = os.fstat(fd)
        self._is_safe(s)
        if stat.S_ISDIR(s.st_mode):
            self.renames = [(a, b) for a, b in self.renames if os.stat(os.path.dirname(b)).st_ino != s.st_ino]

    def renamed(self, source: Any, target: Any) -> None:
        pair = (os.path.abspath(source), os.path.abspath(target))
        if self.root in Path(pair[1]).parents and pair not in self.renames[-1:]:  # Path.rename calls os.rename
            self.renames.append(pair)

    def cut_power(self) -> None:
        """Cut files that were not fsynced at random, and take back the last renames that were not."""
        kept = self.rng.randint(0, len(self.renames))
        for source, target in reversed(self.renames[kept:]):
            if os.path.exists(target) and not os.path.exists(source):
                self.rename(target, source)
        for path in self._files():
            s = os.stat(path)
            if self.safe.get((s.st_dev, s.st_ino)) != (s.st_mtime_ns, s.st_size):
                os.truncate(path, self.rng.randint(0, s.st_size))


class Points:
    """Counts the instants that a life passes, and strikes at the chosen one."""

    def __init__(self, strike: Strike, rank: int, disk: Disk) -> None:
        self.strike, self.rank, self.disk = strike, rank, disk
        self.counts = {"save": 0, "train": 0, "eval": 0}
        self.rng = random.Random(strike.seed)
        self.io = threading.RLock()  # what reaches the disk, by any thread, does so before or after a power cut

    def reach(self, where: str) -> None:
        strike = self.strike
        if where == "save" and strike.delay:
            time.sleep(min(self.rng.expovariate(1 / strike.delay), MAX_SLEEP))
        self.counts[where] += 1
        if where != strike.where or self.counts[where] != strike.at:
            return
        is_mine = self.rank == strike.rank
        if strike.kind == "raise" and (is_mine or strike.whole):
            raise RuntimeError("chaos: this rank fails")
        if not is_mine:
            return
        if strike.kind == "point":
            if strike.power:
                self.io.acquire()
                self.disk.cut_power()
            os.killpg(0, signal.SIGKILL) if strike.whole else os.kill(os.getpid(), signal.SIGKILL)
            signal.pause()
        elif strike.kind in ("signal", "twice"):
            number = getattr(signal, strike.signal)
            for pid in _group_but_me() if strike.whole else []:
                os.kill(pid, number)
            try:
                os.kill(os.getpid(), number)  # raises in an evaluation, to cut it short
            finally:
                if strike.kind == "twice":
                    os.kill(os.getpid(), number)

    def around(self, owner: Any, name: str, where: str, then: Callable[..., None] | None = None) -> None:
        """Make a call of owner.name two points; `then` hears of its arguments."""
        original = getattr(owner, name)

        @functools.wraps(original)
        def struck(*args: Any, **kwargs: Any) -> Any:
            self.reach(where)
            with self.io if where == "save" else contextlib.nullcontext():
                result = original(*args, **kwargs)
                if then is not None:
                    then(*args)
            self.reach(where)
            return result

        setattr(owner, name, struck)


def _group_but_me() -> list[int]:
    """The other ranks: processes of this group."""
    mine, found = os.getpgid(0), []
    for name in os.listdir("/proc"):
        if name.isdigit() and int(name) != os.getpid():
            try:
                if os.getpgid(int(name)) == mine:
                    found.append(int(name))
            except ProcessLookupError:
                pass
    return found


def install(strike: Strike, rank: int, root: Path, batches: BatchFaults) -> None:
    """Prepare this process, a life, to be struck. root: of its checkpoints."""
    points = Points(strike, rank, Disk(root, random.Random(strike.seed)))
    _patch_loader(points, batches)
    _patch_forward(points, batches)
    points.around(MuonAdamW, "step", "train")
    _patch_log(points)
    points.around(os, "fsync", "save", points.disk.synced)
    for owner, name in ((os, "rename"), (os, "replace"), (Path, "rename"), (Path, "replace")):
        points.around(owner, name, "save", points.disk.renamed)
    points.around(shutil, "rmtree", "save")
    for module in [m for n, m in sys.modules.items() if n.startswith("nanochat.") and hasattr(m, "save_file")]:
        if strike.injected:
            module.save_file = _no_room  # type: ignore[attr-defined]
        points.around(module, "save_file", "save")
    if strike.lie:
        plenty = shutil.disk_usage("/")._replace(free=1 << 50)
        shutil.disk_usage = lambda path: plenty
    if strike.kind == "cpu" and rank == strike.rank:
        kill_after_cpu_seconds(strike.at)


def _no_room(tensors: Any, path: Any, *args: Any, **kwargs: Any) -> None:
    Path(path).write_bytes(b"half a file")
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))


def _patch_loader(points: Points, batches: BatchFaults) -> None:
    init, take = PackingLoader.__init__, PackingLoader.__next__

    def __init__(self: Any, source: Any, split: str, *args: Any, **kwargs: Any) -> None:
        self.is_struck = split == "train"
        init(self, source, split, *args, **kwargs)

    def __next__(self: Any) -> Any:
        if not self.is_struck:
            return take(self)
        points.reach("train")
        inputs, targets = take(self)
        if digest(inputs) in batches.masked:
            targets.fill_(-1)
        points.reach("train")
        return inputs, targets

    PackingLoader.__init__, PackingLoader.__next__ = __init__, __next__  # type: ignore[method-assign]


def _patch_log(points: Points) -> None:
    log = Tracker.log

    def struck(self: Any, step: int, **values: float) -> None:
        if "lrm" not in values:  # of an evaluation
            return log(self, step, **values)
        points.reach("train")
        log(self, step, **values)
        points.reach("train")

    Tracker.log = struck  # type: ignore[method-assign]


def _patch_forward(points: Points, batches: BatchFaults) -> None:
    forward = GPT.forward

    def struck(self: Any, idx: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        where = "train" if self.training else "eval"
        points.reach(where)
        out = forward(self, idx, *args, **kwargs)
        points.reach(where)
        name = digest(idx) if self.training else ""
        return out * float("nan") if name in batches.poisoned else out * SPIKE if name in batches.spiked else out

    GPT.forward = struck  # type: ignore[method-assign]


# Between two lives -----------------------------------------------------------------------------------


def _cut(path: Path, rng: random.Random) -> None:
    os.truncate(path, rng.randrange(path.stat().st_size))


def _flip(path: Path, rng: random.Random) -> None:
    with path.open("r+b") as f:
        at = rng.randrange(path.stat().st_size)
        f.seek(at)
        byte = f.read(1)[0]
        f.seek(at)
        f.write(bytes([byte ^ (1 << rng.randrange(8))]))


def damage(checkpoint: Path, rng: random.Random) -> str:
    """Break one checkpoint; returns how."""
    files = sorted(p for p in checkpoint.iterdir() if p.suffix == ".safetensors")
    manifest, file = checkpoint / "manifest.json", rng.choice(files)
    how = rng.choice(["cut", "flip", "no manifest", "half a manifest", "no file", "empty file"])
    if how == "cut":
        _cut(file, rng)
    elif how == "flip":
        _flip(file, rng)
    elif how == "no manifest":
        manifest.unlink()
    elif how == "half a manifest":
        _cut(manifest, rng)
    elif how == "no file":
        file.unlink()
    else:
        file.write_bytes(b"")
    return f"{how}: {checkpoint.name}/{manifest.name if 'manifest' in how else file.name}"


def litter(directory: Path, good: Path, rng: random.Random) -> str:
    """Leave what a dead run, or a copy that was broken off, leaves behind. Never a whole checkpoint."""
    how = rng.choice([f".staging-dead{STAGING_LITTER}", "step_999999", "step_1000000.old"])
    target = directory / how
    if target.exists():
        return f"litter: {how} is there"
    target.mkdir()
    for path in good.glob("*.safetensors"):
        shutil.copy(path, target)
        _cut(target / path.name, rng)
    return f"litter: {how}"
