"""The command. See the package."""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import os
import pickle
import random
import shutil
import sys
import tempfile
import time
import traceback
from functools import partial
from pathlib import Path

import numpy.ma  # noqa: F401  # what a life would import late
import psutil  # noqa: F401
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from nanochat import guards, runtime
from nanochat.data.loader import PackingLoader
from nanochat.data.sources import open_source
from nanochat.tokenizer import get_tokenizer
from scripts import base_train, tok_train
from tests.chaos.campaign import CONTEXT, LONG, ROWS, SETTINGS, Campaign, Reference, Tally, Variant, directory, flags
from tests.chaos.checks import SKIPPED
from tests.chaos.faults import BatchFaults, Strike, digest, install
from tests.chaos.lives import fork, live

FOREIGN = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "NANOCHAT_HUB_DIR", "NANOCHAT_TIMEOUT_MINUTES")
DIGESTS = "digests"  # the file of the digests of all batches, in order
WORDS = "a the cat dog sea sun moon river of is was red old big small two three near runs sees in on paris rome".split()


def write_data(home: Path) -> Path:
    """A data set of two parquet files and its tokenizer, both in home. The training text is shorter than the run: it
    goes through several units of the loader, and into a second pass."""
    rng, data = random.Random(0), home / "text"
    data.mkdir()
    for name, count in (("a.parquet", 240), ("b.parquet", 40)):
        texts = [" ".join(rng.choices(WORDS, k=rng.randint(3, 40))).capitalize() + "." for _ in range(count)]
        pq.write_table(pa.table({"text": texts}), data / name, row_group_size=16)

    def main(rank: int) -> None:
        tok_train.main([f"--dataset={data}", "--vocab_size=300"])
        source, tokenizer = open_source(str(data)), get_tokenizer()
        passes = PackingLoader(source, "train", tokenizer, batch_size=ROWS, sequence_len=CONTEXT)
        digests = [digest(inputs) for inputs, _ in itertools.islice(passes, 2 * LONG)]
        (home / DIGESTS).write_text("\n".join(digests))

    death = live(main, 1, home, home / "data", rng)
    assert death.codes == [0], death.logs[0].read_text()
    return data


def faulty_batches(home: Path, rng: random.Random) -> BatchFaults:
    """One pass of a step, and both of another, without targets; one that is poisoned; one with a loss out of all
    measure, once the guards know measures."""
    digests = (home / DIGESTS).read_text().split()
    one, both, poisoned = rng.sample(range(2, guards.FEWEST), 3)
    spiked = rng.randrange(guards.FEWEST + 4, LONG - 2)
    masked = {digests[2 * one + rng.randrange(2)], digests[2 * both], digests[2 * both + 1]}
    return BatchFaults(frozenset(masked), frozenset([digests[2 * poisoned]]), frozenset([digests[2 * spiked]]))


def refer(home: Path, data: Path, variant: Variant, seed: int) -> Reference:
    """A run that nobody disturbs."""
    base = home / f"reference-{variant.told()}"
    base.mkdir()
    shutil.copytree(home / "tokenizer", base / "tokenizer")
    batches = faulty_batches(home, random.Random(seed)) if variant.has_batch_faults else BatchFaults()

    def main(rank: int) -> None:
        install(Strike(), rank, directory(base), batches)
        base_train.main(flags(data, variant, save_every=1))

    death = live(main, 1, base, base / "run", random.Random(str(base)))
    log = death.logs[0].read_text()
    assert death.codes == [0], log
    num_skipped = len(SKIPPED.findall(log))
    assert num_skipped == 3 * variant.has_batch_faults, f"{num_skipped} steps were skipped: {log}"
    return Reference(base, batches, death.seconds, death.cpu_seconds)


def refer_all(home: Path, data: Path, wanted: list[Variant], seed: int) -> dict[Variant, Reference]:
    """All at once, each in a process of its own."""
    answers = [home / f"reference-{variant.told()}.pickle" for variant in wanted]

    def work(variant: Variant, answer: Path) -> int:
        answer.write_bytes(pickle.dumps(refer(home, data, variant, seed)))
        return 0

    logs = [answer.with_suffix(".log") for answer in answers]
    pids = [fork(partial(work, v, a), log) for v, a, log in zip(wanted, answers, logs, strict=True)]
    failed = [log for pid, log in zip(pids, logs, strict=True) if os.waitpid(pid, 0)[1]]
    assert not failed, failed[0].read_text()
    return {v: pickle.loads(a.read_bytes()) for v, a in zip(wanted, answers, strict=True)}


def run_one(seed: int, number: int, home: Path, data: Path, refs: dict[Variant, Reference]) -> Tally:
    """A campaign; a failure becomes a line of its tally, and its directory stays."""
    campaign = Campaign(seed, number, home, data, refs)
    try:
        campaign.run()
    except BaseException as error:
        if not isinstance(error, Exception):
            raise
        detail = str(error) if isinstance(error, AssertionError) else traceback.format_exc()
        again = f"python -m tests.chaos --seed={seed} --campaign={number}"
        story = "\n    ".join(campaign.story)
        campaign.tally.failures.append(f"{detail}\n    {story}\n  again: {again}\n  kept: {campaign.logs}")
    return campaign.tally


def run_all(args: argparse.Namespace, home: Path, data: Path, refs: dict[Variant, Reference]) -> Tally:
    """Campaigns side by side, each in a process of its own, until enough lives were disturbed."""
    total, number = Tally(), 0
    running: dict[int, Path] = {}  # by process: where its answer will be

    def work(number: int, answer: Path) -> int:
        answer.write_text(json.dumps(dataclasses.asdict(run_one(args.seed, number, home, data, refs))))
        return 0

    try:
        while True:
            enough = total.lives >= args.lives or total.failures
            while not enough and len(running) < args.jobs:
                answer = home / f"campaign-{number:03d}.json"

                running[fork(partial(work, number, answer), answer.with_suffix(".log"))] = answer
                number += 1
            if not running:
                return total
            pid, status = os.wait()
            answer = running.pop(pid)
            if status:
                log = answer.with_suffix(".log").read_text()
                total.failures.append(f"a campaign ended by itself ({status}): {log}")
                continue
            total.add(Tally(**json.loads(answer.read_text())))
            if args.verbose:
                print(f"{answer.stem}: {total.lives} lives", flush=True)
    finally:
        for pid in running:  # their lives die with them
            os.kill(pid, 9)
            os.waitpid(pid, 0)


def table(total: Tally, seconds: float) -> str:
    rows = {f.name: getattr(total, f.name) for f in dataclasses.fields(total) if f.name != "failures"}
    rows["bit_equal_ends"] = f"{total.bit_equal_ends} of {total.campaigns}"
    rows["longest_linger"] = f"{total.longest_linger:.1f} s"
    rows["seconds"] = f"{seconds:.0f}"
    return "\n".join(["| | |", "|---|---|", *(f"| {k.replace('_', ' ')} | {v} |" for k, v in rows.items())])


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.chaos", description=__doc__)
    parser.add_argument("--lives", type=int, default=200, help="lives to disturb, at least (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of everything that is drawn (default %(default)s)")
    parser.add_argument("--campaign", type=int, help="this one only")
    parser.add_argument(
        "--jobs", type=int, default=os.cpu_count() or 1, help="campaigns at a time (default: a core each)"
    )
    parser.add_argument("--dir", type=Path, help="where to work; kept (default: a temporary one, kept on failure)")
    parser.add_argument("--verbose", action="store_true", help="a line a campaign")
    args = parser.parse_args(argv)
    begun = time.monotonic()
    os.environ["NANOCHAT_DTYPE"] = "float32"
    for name in FOREIGN:
        os.environ.pop(name, None)
    torch.set_num_threads(1)
    # mfu is not our subject, and measuring it takes a second of each life
    vars(runtime)["_cpu_flops"] = lambda dtype: 1e11
    home = args.dir or Path(tempfile.mkdtemp(prefix="nanochat-chaos-"))
    home.mkdir(parents=True, exist_ok=True)
    data = write_data(home)
    some = SETTINGS if args.campaign is None else [SETTINGS[args.campaign % len(SETTINGS)]]
    refs = refer_all(home, data, list(dict.fromkeys(s.variant for s in some)), args.seed)
    if args.campaign is None:
        total = run_all(args, home, data, refs)
    else:
        total = run_one(args.seed, args.campaign, home, data, refs)
    print(table(total, time.monotonic() - begun))
    for failure in total.failures:
        print(f"FAILED (seed {args.seed}): {failure}")
    if not total.failures and args.dir is None:
        shutil.rmtree(home)
    return 1 if total.failures else 0


if __name__ == "__main__":
    sys.exit(main())
