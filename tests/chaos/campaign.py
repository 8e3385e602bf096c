"""One campaign: a run that is struck again and again and must end as one that nobody disturbed."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import random
import re
import shutil
import signal
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from scripts import base_train
from tests.chaos import checks
from tests.chaos.checks import must, whole_lines
from tests.chaos.faults import STAGING_LITTER, BatchFaults, Strike, damage, install, litter
from tests.chaos.lives import EXIT_STOPPED, LIMIT, Death, live, small_disk

TAG = "chaos"
SAVE_EVERY = 3
ROWS, CONTEXT = 2, 32  # of a pass
SHORT, LONG = 30, 84  # steps of a run; with faulty batches, so many that the guards know what a usual loss is
SIZES = [
    *("--depth=2", "--aspect_ratio=16", "--head_dim=16", f"--max_seq_len={CONTEXT}", "--device_type=cpu"),
    # two passes a step: two of one rank add what one of each of two ranks adds, in the same order
    *(f"--device_batch_size={ROWS}", f"--total_batch_size={2 * ROWS * CONTEXT}"),
    *("--eval_every=8", "--eval_tokens=128", "--core_metric_every=-1", "--sample_every=-1"),
]
LIVES_A_CAMPAIGN = 16  # at most; a run that came to its end by itself sooner has fewer
POINTS_A_SAVE, POINTS_A_STEP, POINTS_AN_EVAL = 20, 12, 4  # about
NO_ROOM = re.compile(r"No space left on device|make room")
DISK_BYTES = 256 << 20


@dataclass(frozen=True)
class Variant:
    """What is trained."""

    arch: str
    has_batch_faults: bool = False

    @property
    def steps(self) -> int:
        return LONG if self.has_batch_faults else SHORT

    def told(self) -> str:
        return self.arch + "-faulty" * self.has_batch_faults


@dataclass(frozen=True)
class Setting:
    variant: Variant
    worlds: tuple[int, ...]  # the numbers of ranks that a life may have
    keep_last: int | None = None

    def told(self) -> str:
        ranks = " or ".join(map(str, self.worlds))
        return f"{self.variant.told()}, {ranks} rank{'s' * (self.worlds != (1,))}, keep_last {self.keep_last}"


SETTINGS = [
    Setting(Variant("plain"), (1, 2)),
    Setting(Variant("modern", has_batch_faults=True), (1, 2), 3),
    Setting(Variant("modern"), (2,), 2),
    Setting(Variant("plain"), (1,), 3),
    Setting(Variant("plain", has_batch_faults=True), (1, 2), 3),
    Setting(Variant("modern"), (1, 2)),
    Setting(Variant("plain"), (2,), 2),
    Setting(Variant("modern"), (1,)),
]


@dataclass(frozen=True)
class Reference:
    """The run that nobody disturbed, on one rank, with a checkpoint a step."""

    base: Path
    batches: BatchFaults
    seconds: float
    cpu_seconds: float

    def step(self, step: int) -> Path:
        return directory(self.base) / f"step_{step:06d}"


@dataclass
class Tally:
    """What was done, and what was lost. Fields in the order of the table."""

    campaigns: int = 0
    lives: int = 0
    kills: int = 0
    kills_in_a_save: int = 0
    power_cuts: int = 0
    one_rank_only: int = 0
    signals: int = 0
    exceptions: int = 0
    full_disks: int = 0
    damages: int = 0
    refused: int = 0  # checkpoints that a resume named as damaged and passed over
    world_changes: int = 0
    failed_evals: int = 0
    masked_batches: int = 0
    poisoned_batches: int = 0
    spiked_batches: int = 0
    steps_lost: int = 0  # beyond the last save that had been announced
    corrupt_loads: int = 0
    bit_equal_ends: int = 0
    longest_linger: float = 0.0  # seconds that a rank outlived one that died alone
    failures: list[str] = field(default_factory=list)

    def add(self, other: Tally) -> None:
        for f in dataclasses.fields(self):
            mine, theirs = getattr(self, f.name), getattr(other, f.name)
            setattr(self, f.name, max(mine, theirs) if isinstance(mine, float) else mine + theirs)


def directory(base: Path) -> Path:
    return base / "base_checkpoints" / TAG


def flags(data: Path, variant: Variant, save_every: int, keep_last: int | None = None) -> list[str]:
    return [
        *SIZES,
        *(f"--dataset={data}", f"--arch={variant.arch}", f"--num_iterations={variant.steps}", f"--model_tag={TAG}"),
        *(f"--save_every={save_every}", f"--keep_last={keep_last or -1}", "--resume=auto"),
    ]


class Campaign:
    def __init__(self, seed: int, number: int, home: Path, data: Path, references: dict[Variant, Reference]):
        self.number, self.data, self.tally = number, data, Tally(campaigns=1)
        self.setting = SETTINGS[number % len(SETTINGS)]
        self.name = f"{seed}/{number}"
        self.rng = random.Random(self.name)
        self.base = home / f"campaign-{number:03d}"  # on a disk of its own
        self.logs = home / f"campaign-{number:03d}-logs"
        self.variant = self.setting.variant
        self.reference = references[self.variant]
        self.last = self.variant.steps
        self.directory = directory(self.base)
        self.announced = 0  # the last step that a life said was saved, and nobody damaged since
        self.story: list[str] = [self.setting.told()]
        self.world = 0
        self.has_small_disk = False
        self.ignored: tuple[str, ...] = ()

    def run(self) -> Tally:
        """Live until the run is over.

        Raises:
            Broken: something that must hold does not.
        """
        self.logs.mkdir()
        with small_disk(self.base, DISK_BYTES) as self.has_small_disk, self._kept_on_failure():
            shutil.copytree(self.data.parent / "tokenizer", self.base / "tokenizer")
            self.directory.mkdir(parents=True)
            for life in range(LIVES_A_CAMPAIGN + 1):
                self.rng.seed(f"{self.name}/{life}")  # so that a fate does not depend on what came before
                is_over = self._live(life, Strike() if life == LIVES_A_CAMPAIGN else self._draw())
                if is_over:
                    break
                self._between()
            self._check_end()
        shutil.rmtree(self.base)
        shutil.rmtree(self.logs)
        return self.tally

    @contextlib.contextmanager
    def _kept_on_failure(self) -> Iterator[None]:
        """What lies on the small disk is gone when this process is."""
        try:
            yield
        except BaseException:
            shutil.copytree(self.base, self.logs / "base")
            raise

    # What happens -------------------------------------------------------------------------------

    def _draw(self) -> Strike:
        """The next life's fate."""
        rng, ref, longer = self.rng, self.reference, self.last // SHORT
        chances = {"cpu": 3, "wall": 2, "point": 7, "raise": 2, "full": 1, "signal": 3, "twice": 1}
        kind = rng.choices(list(chances), list(chances.values()))[0]
        where = "train"
        if kind in ("cpu", "wall"):
            at = rng.uniform(0.1, 0.6) * (ref.cpu_seconds if kind == "cpu" else ref.seconds)
        else:
            where = rng.choices(["save", "train", "eval"], [6 * (kind == "point"), 3, 1])[0]
            most = {"save": 2 * POINTS_A_SAVE, "train": 7 * POINTS_A_STEP, "eval": POINTS_AN_EVAL}[where]
            at = rng.randint(1, most * longer)
        power = kind == "point" and rng.random() < 0.5
        return Strike(
            kind,
            at,
            where,
            # in a save the first rank is the one that works, and so knows what reached the disk
            rank=0 if where == "save" or power else rng.randrange(2),
            whole=rng.random() < 0.5 or power,
            power=power,
            signal=rng.choice(["SIGTERM", "SIGINT", "SIGUSR1", "SIGHUP"]) if kind == "signal" else "SIGINT",
            lie=kind == "full" and rng.random() < 0.5,
            injected=kind == "full" and not self.has_small_disk,
            delay=rng.choice([0.0, 0.003, 0.01]),
            seed=rng.randrange(1 << 30),
        )

    def _between(self) -> None:
        """Perhaps damage a checkpoint, but never the last good one; perhaps leave rubbish."""
        good = checks.good(self.directory)
        if len(good) > 1 and self.rng.random() < 0.3:
            newest = max(good)
            step = newest if self.rng.random() < 0.6 else self.rng.choice(sorted(good))
            self.story.append(damage(good[step], self.rng))
            self.tally.damages += 1
            if step == newest and not checks.is_good(good[step]):
                self.announced = max(s for s in good if s != step)
        if good and self.rng.random() < 0.15:
            newest_good = checks.good(self.directory)
            self.story.append(litter(self.directory, newest_good[max(newest_good)], self.rng))

    def _live(self, number: int, strike: Strike) -> bool:
        """One life and what must hold after it; whether the run is over."""
        world = self.rng.choice(self.setting.worlds)
        self.tally.world_changes += self.world not in (0, world)
        self.world = world
        if world == 1 or strike.kind == "full":
            strike = dataclasses.replace(strike, rank=0, whole=True)
        before = checks.good(self.directory)
        expected = before[max(before)] if before else None
        passed_over = checks.damaged(self.directory, max(before, default=0))
        log = self.logs / f"life-{number:02d}"
        self.story.append(f"life {number}: from {expected and expected.name}, {world} rank(s), {strike.told()}")
        with self._filled(strike, expected):
            death = self._world_of(world, strike, log)
        self.story.append(f"  ended {death.codes} after {death.seconds:.1f} s")
        text = whole_lines(death.logs[0])
        self._count(strike, death, text)
        self._check_codes(strike, death, expected)
        self._check_resume(text, expected, passed_over)
        self._check_files(before, text)
        if death.codes[0] == EXIT_STOPPED:
            self._check_stop(strike, text)
        return death.codes[0] == 0

    def _world_of(self, world: int, strike: Strike, log: Path) -> Death:
        """Live; once more where another program took the port meanwhile."""
        argv = flags(self.data, self.variant, SAVE_EVERY, self.setting.keep_last)

        def main(rank: int) -> None:
            install(strike, rank, self.directory.parent, self.reference.batches)
            base_train.main(argv)

        while True:
            after = strike.at if strike.kind == "wall" else None
            death = live(main, world, self.base, log, self.rng, after, strike.whole and strike.is_kill, strike.rank)
            if "EADDRINUSE" not in whole_lines(death.logs[0]):
                return death
            for path in death.logs:
                path.unlink()

    @contextlib.contextmanager
    def _filled(self, strike: Strike, newest: Path | None) -> Iterator[None]:
        """Leave room for a part of a checkpoint only."""
        if strike.kind != "full" or not self.has_small_disk:
            yield
            return
        # the next save would clear or replace them, and so find more room than we left
        for dead in [*self.directory.glob(".staging-*"), self.base / "previous"]:
            shutil.rmtree(dead, ignore_errors=True)
        size = sum(p.stat().st_size for p in (newest or self.reference.step(1)).iterdir())
        disk = os.statvfs(self.directory)
        ballast = self.base / "ballast"
        room = int(size * random.Random(strike.seed).uniform(0.02, 0.9))
        with ballast.open("wb") as f:
            os.posix_fallocate(f.fileno(), 0, max(1, disk.f_bavail * disk.f_frsize - room))
        try:
            yield
        finally:
            ballast.unlink()

    # What must hold -----------------------------------------------------------------------------

    def _count(self, strike: Strike, death: Death, text: str) -> None:
        tally = self.tally
        if (strike.kind, strike.where) == ("raise", "eval") and checks.EVAL_FAILED.search(text):
            tally.failed_evals += 1
            tally.lives += not any(death.codes)
            self.ignored = checks.EVALUATED
        if strike.kind == "none" or not any(death.codes):
            return
        tally.lives += 1
        killed = -signal.SIGKILL in death.codes
        tally.kills += killed
        tally.kills_in_a_save += killed and bool(self._staging())
        tally.power_cuts += killed and strike.power
        tally.signals += strike.kind in ("signal", "twice")
        tally.exceptions += strike.kind == "raise"
        tally.full_disks += strike.kind == "full"
        tally.refused += len(checks.REFUSED.findall(text))
        if not strike.whole or strike.kind == "raise":
            tally.one_rank_only += len(death.codes) > 1
            tally.longest_linger = max(tally.longest_linger, death.lingered)

    def _check_codes(self, strike: Strike, death: Death, expected: Path | None) -> None:
        codes, told = death.codes, f"{strike.told()}: exit codes {death.codes}, see {death.logs[0].parent}"
        must(death.lingered < LIMIT, f"a rank outlived another by {death.lingered:.0f} s: {told}")
        if not any(codes):
            can_end = strike.kind != "full" or (expected is not None and expected.name == f"step_{self.last:06d}")
            must(can_end, f"a run with no room for its checkpoints ended well: {told}")
            return
        mine, others = codes[strike.rank], [c for rank, c in enumerate(codes) if rank != strike.rank]
        if strike.kind == "none" or (strike.kind, strike.where) == ("raise", "eval"):
            must(False, f"nothing in this life may end it: {told}")
        elif strike.is_kill:
            must(mine == -signal.SIGKILL or (mine == 0 and 0 not in others), f"it died before it was killed: {told}")
        elif strike.kind == "signal":
            must(set(codes) == {EXIT_STOPPED}, f"a signal must end all ranks with {EXIT_STOPPED}: {told}")
        elif strike.kind == "twice":
            must(mine == 128 + signal.SIGINT, f"a second SIGINT must end at once with 130: {told}")
        else:
            must(codes[0] != 0 and mine not in (0, -signal.SIGKILL), f"it must fail, and by itself: {told}")
        if strike.kind == "full":  # the first rank is the one that writes
            must(NO_ROOM.search(death.logs[0].read_text()) is not None, f"no word of the room that lacks: {told}")
            must(not self._staging(), f"a failed save left its files: {told}")

    def _check_resume(self, text: str, expected: Path | None, passed_over: list[str]) -> None:
        resumed = checks.RESUMED.findall(text)
        if resumed:
            must(len(resumed) == 1 and expected is not None, f"resumed from {resumed}, expected {expected}")
            must(resumed[0] == str(expected), f"resumed from {resumed[0]}, but the newest good one is {expected}")
            must(all(name in text for name in passed_over), f"no word of the damaged {passed_over}")
        elif checks.TRAINED.search(text):
            must(expected is None, f"trained anew, though {expected} is good")

    def _check_files(self, before: dict[int, Path], text: str) -> None:
        after = checks.good(self.directory)
        newest = max(after, default=0)
        self.announced = max([self.announced, *before, *map(int, checks.SAVED.findall(text))])
        self.tally.steps_lost += max(0, self.announced - newest)
        must(newest >= self.announced, f"step {self.announced} was saved, and the newest good checkpoint is {newest}")
        if newest:
            # a stop may come before or after the evaluation of its step, which a resumed run does again
            found = checks.differences(after[newest], self.reference.step(newest), checks.EVALUATED)
            self.tally.corrupt_loads += bool(found)
            must(not found, f"{after[newest]} is whole, but wrong: {'; '.join(found[:5])}")
        must(len(self._staging()) <= 1, f"directories of dead saves pile up: {self._staging()}")

    def _staging(self) -> list[str]:
        """What dead saves left; not what litter() did."""
        return [p.name for p in self.directory.glob(".staging-*") if p.suffix != STAGING_LITTER]

    def _check_stop(self, strike: Strike, text: str) -> None:
        """A run that a signal stopped has saved the last step that it trained."""
        newest = max(checks.good(self.directory), default=0)
        told = [int(step) for step in checks.STOPPED.findall(text)]
        must(told == [newest], f"stopped after step {told}, but the newest checkpoint is {newest}")
        if strike.where == "train":
            logged = max(point["step"] for point in checks.curve(self.base) if "lrm" in point)
            must(logged == newest, f"stopped after step {logged} was logged, but the newest checkpoint is {newest}")

    def _check_end(self) -> None:
        good = checks.good(self.directory)
        must(self.last in good, f"the run is over without a checkpoint of step {self.last}: {sorted(good)}")
        found = checks.differences(good[self.last], self.reference.step(self.last), self.ignored)
        found += checks.curve_differences(self.base, self.reference.base, self.ignored)
        must(not found, f"the end differs from an undisturbed run's: {'; '.join(found[:5])}")
        must(not self._staging(), f"left behind at the end: {self._staging()}")
        if self.setting.keep_last is not None:
            # one more where a life died between its last save and the removal
            must(len(good) <= self.setting.keep_last + 1, f"--keep_last={self.setting.keep_last} kept {sorted(good)}")
        self.tally.masked_batches += len(self.reference.batches.masked)
        self.tally.spiked_batches += len(self.reference.batches.spiked)
        self.tally.poisoned_batches += len(self.reference.batches.poisoned)
        self.tally.bit_equal_ends += 1
