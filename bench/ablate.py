"""Which parts and hyper-parameters pay: candidates x depths x seeds against one base, unattended.

    python -m bench.ablate --data=../shared/hub/datasets/local/edu-text-small --jobs=2     # CPU, one core a run
    python -m bench.ablate --candidates=extras --seeds=0,1,2
    python -m bench.ablate --candidates=none --add="hot: matrix_lr=0.04; slow: warmdown_ratio=0.6"
    python -m bench.ablate --data=packed.npz --depths=8,12 --widths=512,768 --tokens_per_step=131072 --steps=150   # GPU

Every run of a depth and seed sees the same text in the same order, and differences to the base are paired by (depth,
seed). Finished runs stay in the results file, and a rerun goes on behind them.

Equal wall-clock. A candidate whose step takes r times as long as the base's must not be compared with the base at equal
steps, but with a base that had r times the steps. We do not train that base: the base also runs half the steps (a
schedule of its own), and k = (bpb(N) - bpb(N/2)) / ln 2 is its gain per unit of log time at that depth. The candidate's
difference at equal wall-clock is its difference at equal steps minus k * ln r. bpb falls faster before N than behind
it, so this is a little too hard on slow candidates and too kind to fast ones; r is meant to be near 1. r comes from
steps of base and candidate that take turns in one process with no other run beside it, because two runs side by side,
or an hour apart, are not timed alike.

The ratio is measured once a depth and taken as exact: the p-value at equal wall-clock knows nothing of its error.

Verdict: in, when the mean difference at equal wall-clock lowers bpb at every depth (two at least) and its paired t-test
gives p < 0.05; out otherwise. Where a candidate is the base without a part, the verdict is the part's own: in, when the
removal costs as much. Of twenty useless candidates one passes at p < 0.05: confirm what goes in with fresh seeds.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from bench import common
from bench.common import Built, Override, Plan, Setting, run_task
from bench.packed import Text
from bench.results import Results, Task, default_results, finish, numbers, run_all, table, words
from nanochat.config import InputError, flag, run_cli

LEVEL = 0.05


@dataclass(frozen=True)
class Candidate:
    name: str
    overrides: dict[str, Override]
    why: str
    removes: str | None = None  # the part that the base has and this one lacks


@dataclass(frozen=True)
class AblateConfig:
    data: str = flag("../shared/hub/datasets/local/edu-text-small", "folder of text, source name, or packed .npz")
    arch: str = flag("modern", "the base's architecture")
    base: str = flag("", "the base's own hyper-parameters, e.g. matrix_lr=0.03")
    candidates: str = flag("all", "all, extras, recipe, none, or names from these")
    add: str = flag("", "further candidates: 'name: key=value, key=value; name: ...'")
    depths: str = flag("2,4", "layers")
    widths: str = flag("128,192", "width of each depth")
    head_dim: int = flag(64, "size of an attention head")
    seeds: str = flag("0,1", "of the weights and the order of the rows")
    steps: int = flag(160, "optimizer steps")
    vocab_size: int = flag(2048, "of the tokenizer that is trained on the data")
    sequence_len: int = flag(512, "context in tokens")
    tokens_per_step: int = flag(8192, "tokens of an optimizer step")
    device_batch_size: int = flag(16, "rows of a forward pass")
    dtype: str | None = flag(None, "of the activations; default: what this machine computes in")
    compile: bool = flag(True, "torch.compile")
    device: str | None = flag(None, "cuda or cpu; default: the best there is")
    threads: int = flag(1, "of the CPU, for each run")
    val_documents: int = flag(512, "documents of the validation")
    timing_rounds: int = flag(8, "pairs of steps that decide how much slower a candidate is")
    jobs: int = flag(1, "runs side by side; 0 = in this process")
    results: str | None = flag(None, "file of the finished runs; default: <base>/bench/ablate.jsonl")
    time_limit: float | None = flag(None, "minutes after which no run is started")
    fresh: bool = flag(False, "make results of other code again")

    def __post_init__(self) -> None:
        if self.steps < 2:
            raise InputError(f"--steps {self.steps} must be at least 2: the base also runs half of them")
        if self.timing_rounds < 1 or self.jobs < 0:
            raise InputError("--timing_rounds must be at least 1 and --jobs at least 0")
        depths, widths = numbers("depths", self.depths, 1), numbers("widths", self.widths)
        if len(depths) != len(widths) or any(w < 1 or w % d for d, w in zip(depths, widths, strict=True)):
            near = ",".join(str(d * max(2, self.head_dim)) for d in depths)
            raise InputError(
                f"--widths {self.widths}: one for each of --depths {self.depths}, a multiple of it; try --widths={near}"
            )
        numbers("seeds", self.seeds, 0)

    def plan(self, sequence_len: int) -> Plan:
        device = self.device or common.default_device()
        dtype = self.dtype or common.default_dtype(device)
        sizes = self.steps, self.tokens_per_step, sequence_len, self.device_batch_size
        return Plan(*sizes, dtype, self.compile, device, self.threads)

    def setting(self, overrides: dict[str, Override], depth: int, seed: int) -> Setting:
        width = dict(zip(numbers("depths", self.depths), numbers("widths", self.widths), strict=True))[depth]
        sizes: dict[str, Override] = {"aspect_ratio": width // depth, "head_dim": min(self.head_dim, width)}
        return Setting(depth, self.arch, seed, {**sizes, **common.parse_overrides(self.base), **overrides})


# ---- Candidates -------------------------------------------------------------------------------------------------


def leave_one_out(extras: Sequence[str]) -> list[Candidate]:
    """The base without each of its extras."""
    return [
        Candidate(f"-{extra}", {"extras": tuple(e for e in extras if e != extra)}, f"without {extra}", removes=extra)
        for extra in extras
    ]


def neighbours(recipe: Any) -> list[Candidate]:
    """Each number of the recipe a step down and a step up: times 0.7 and 1.4; what lives just below 1 (momentum,
    betas) by its distance to 1. Zeros are off, and stay off; tuples move one place at a time."""
    found = []
    for f in dataclasses.fields(recipe):
        value = getattr(recipe, f.name)
        values = value if isinstance(value, tuple) else (value,)
        for place, factor in itertools.product(range(len(values)), (0.7, 1.4)):
            old = values[place]
            if isinstance(old, bool) or not isinstance(old, float) or old <= 0:
                continue
            new = 1 - (1 - old) / factor if 0.75 <= old < 1 else old * factor
            moved = (*values[:place], new, *values[place + 1 :])
            name = f"{f.name}{f'[{place}]' if isinstance(value, tuple) else ''}={new:.4g}"
            why = f"{old:.4g} is the base's"
            found.append(Candidate(name, {f.name: moved if isinstance(value, tuple) else new}, why))
    return found


def parse_candidates(text: str) -> list[Candidate]:
    """ "hot: matrix_lr=0.04; slow: warmdown_ratio=0.6" """
    found = []
    for part in filter(str.strip, text.split(";")):
        name, colon, overrides = part.partition(":")
        if not colon or not name.strip():
            raise InputError(f"--add {part.strip()!r} is not of the form 'name: key=value, key=value'")
        found.append(Candidate(name.strip(), common.parse_overrides(overrides), "asked for"))
    return found


def choose(cfg: AblateConfig) -> list[Candidate]:
    """The candidates that the flags ask for."""
    base = common.parse_overrides(cfg.base)
    setting = Setting(1, cfg.arch, 0, {**base, "head_dim": 64})
    config, recipe = common.resolve(setting, cfg.vocab_size, cfg.sequence_len, cfg.tokens_per_step, cfg.steps)
    extras = leave_one_out(config.extras or ())
    known = {"extras": extras, "recipe": neighbours(recipe), "none": []}
    known["all"] = extras + known["recipe"]
    added = parse_candidates(cfg.add)
    if cfg.candidates in known:
        return known[cfg.candidates] + added
    by_name = {c.name: c for c in known["all"]}
    for name in words(cfg.candidates):
        if name not in by_name:
            raise InputError(f"--candidates {name!r} is none of {', '.join([*known, *by_name])}")
    return [by_name[name] for name in words(cfg.candidates)] + added


# ---- Statistics -------------------------------------------------------------------------------------------------


def t_two_sided(t: float, df: int) -> float:
    """P(|T| >= |t|) of Student's distribution, by its finite series for whole degrees of freedom (Abramowitz and
    Stegun 1964, 26.7.3 and 26.7.4)."""
    theta = math.atan2(abs(t), math.sqrt(df))
    cos2, term, total = math.cos(theta) ** 2, 1.0, 0.0
    if df % 2 == 0:
        for j in range(1, df // 2 + 1):
            total += term
            term *= cos2 * (2 * j - 1) / (2 * j)
        inside = math.sin(theta) * total
    else:
        term = math.cos(theta)
        for j in range(1, (df - 1) // 2 + 1):
            total += term
            term *= cos2 * (2 * j) / (2 * j + 1)
        inside = 2 / math.pi * (theta + math.sin(theta) * total)
    return min(1.0, max(0.0, 1 - inside))


def paired_p(differences: Sequence[float]) -> float | None:
    """Two-sided p of the mean difference being 0; None of fewer than two."""
    if len(differences) < 2:
        return None
    spread = statistics.stdev(differences)
    if spread == 0:
        return 1.0 if differences[0] == 0 else 0.0
    return t_two_sided(statistics.fmean(differences) / spread * math.sqrt(len(differences)), len(differences) - 1)


@dataclass
class Pairs:
    """One candidate's differences to the base at one depth. All lists are by seed."""

    bpb: list[float] = field(default_factory=list)
    equal_steps: list[float] = field(default_factory=list)
    equal_time: list[float] = field(default_factory=list)


def judge(by_depth: dict[int, Pairs], removes: str | None) -> tuple[str, float | None]:
    """(verdict, p at equal wall-clock). A removal speaks for its part with the sign turned."""
    sign = -1.0 if removes else 1.0
    everything = [d for pairs in by_depth.values() for d in pairs.equal_time]
    if any(math.isinf(d) for d in everything):  # a run without the candidate's change, or without the part, broke off
        return ("in" if removes else "out"), None
    p = paired_p(everything)
    helps = all(pairs.equal_time and sign * statistics.fmean(pairs.equal_time) < 0 for pairs in by_depth.values())
    return ("in" if helps and len(by_depth) >= 2 and p is not None and p < LEVEL else "out"), p


# ---- Runs -------------------------------------------------------------------------------------------------------


def time_pair(base: Setting, other: Setting, plan: Plan, text: Text, rounds: int) -> dict[str, Any]:
    """Seconds a step of base and candidate, taken in turns, and the median of their ratios."""
    pair = [Built(setting, plan, text.vocab_size) for setting in (base, other)]
    batches = next(text.batches(plan, 0, pair[0].rt.device))
    for built in pair:
        built.warm_up(batches)
    times = [[built.timed_step(batches, step)[0] for built in pair] for step in range(rounds)]
    return {
        "base": statistics.median(t[0] for t in times),
        "candidate": statistics.median(t[1] for t in times),
        "ratio": statistics.median(t[1] / t[0] for t in times),
    }


@dataclass(frozen=True)
class Experiment:
    """All tasks of a table. The base is the candidate named ""."""

    candidates: list[Candidate]
    runs: dict[tuple[str, int, int], Task]  # by candidate, depth and seed
    half: dict[tuple[int, int], Task]  # the base at half the steps, by depth and seed
    timings: dict[tuple[str, int], Task]  # by candidate and depth


def design(cfg: AblateConfig, text: Text) -> Experiment:
    depths, seeds = numbers("depths", cfg.depths), numbers("seeds", cfg.seeds)
    plan, setting = cfg.plan(text.sequence_len), cfg.setting
    experiment = Experiment(choose(cfg), {}, {}, {})
    for depth, seed in itertools.product(depths, seeds):
        where = f"d{depth} seed {seed}"
        half = dataclasses.replace(plan, steps=plan.steps // 2)
        experiment.half[depth, seed] = run_task(setting({}, depth, seed), half, text, f"base, half the steps, {where}")
        for c in (Candidate("", {}, ""), *experiment.candidates):
            task = run_task(setting(c.overrides, depth, seed), plan, text, f"{c.name or 'base'} {where}")
            experiment.runs[c.name, depth, seed] = task
    for c, depth in itertools.product(experiment.candidates, depths):
        mine, other = setting({}, depth, 0), setting(c.overrides, depth, 0)
        spec = {"kind": "timing", "rounds": cfg.timing_rounds, "plan": asdict(plan), "machine": common.machine(plan)}
        for name, one in (("base", mine), ("candidate", other)):
            config, recipe = common.resolve(one, text.vocab_size, text.sequence_len, plan.tokens_per_step, plan.steps)
            spec[name] = {"config": config.to_dict(), "recipe": asdict(recipe)}
        work = partial(time_pair, mine, other, plan, text, cfg.timing_rounds)
        cost = 4 * cfg.timing_rounds / cfg.steps * experiment.runs[c.name, depth, seeds[0]].cost
        experiment.timings[c.name, depth] = Task(f"timing of {c.name} d{depth}", spec, work, cost)
    return experiment


def pairs_of(experiment: Experiment, results: Results, candidate: str, depth: int) -> Pairs:
    """Differences by seed, as far as the runs are finished. A run that broke off counts as infinitely bad."""
    pairs = Pairs()
    timing = results.get(experiment.timings[candidate, depth])
    slopes = []
    for (d, seed), task in experiment.half.items():
        whole, half = results.get(experiment.runs["", d, seed]), results.get(task)
        if d == depth and whole and half and whole["bpb"] is not None and half["bpb"] is not None:
            slopes.append((whole["bpb"] - half["bpb"]) / math.log(2))
    for (name, d, seed), task in experiment.runs.items():
        base, mine = results.get(experiment.runs["", d, seed]), results.get(task)
        if (name, d) != (candidate, depth) or not base or not mine or base["bpb"] is None:
            continue
        bpb = math.inf if mine["bpb"] is None else mine["bpb"]
        pairs.bpb.append(bpb)
        pairs.equal_steps.append(bpb - base["bpb"])
        if timing and slopes:
            pairs.equal_time.append(bpb - base["bpb"] - statistics.fmean(slopes) * math.log(timing["ratio"]))
    return pairs


def report(experiment: Experiment, results: Results, depths: Sequence[int]) -> list[dict[str, Any]]:
    """The table, and its records."""
    records, rows = [], []
    for depth in depths:
        done = [r for (n, d, _), t in experiment.runs.items() if (n, d) == ("", depth) and (r := results.get(t))]
        good = [r["bpb"] for r in done if r["bpb"] is not None]
        if good:
            print(f"base, depth {depth}: bpb {statistics.fmean(good):.4f}, {len(good)} seeds")
    for c in experiment.candidates:
        by_depth = {depth: pairs_of(experiment, results, c.name, depth) for depth in depths}
        if not all(pairs.equal_time for pairs in by_depth.values()):
            continue
        broke = any(math.isinf(b) for pairs in by_depth.values() for b in pairs.bpb)
        verdict, p = (
            ("out", None) if broke and not c.removes else judge(by_depth, c.removes) if not broke else ("in", None)
        )
        tasks = [t for (n, _, _), t in experiment.runs.items() if n == c.name]
        ratios = [results.get(experiment.timings[c.name, depth]) for depth in depths]
        record: dict[str, Any] = {"name": c.name, "why": c.why, "overrides": c.overrides, "verdict": verdict, "p": p}
        record["broke_off"] = broke
        record["ratio"] = [r["ratio"] for r in ratios if r]
        record["stale"] = any(results.is_stale(t) for t in (*tasks, *(experiment.timings[c.name, d] for d in depths)))
        row = [("*" if record["stale"] else "") + c.name]
        for depth, pairs in by_depth.items():
            means = [None if broke else statistics.fmean(v) for v in (pairs.bpb, pairs.equal_steps, pairs.equal_time)]
            record[f"d{depth}"] = dict(zip(("bpb", "equal_steps", "equal_time"), means, strict=True))
            record[f"d{depth}"]["seeds"] = len(pairs.bpb)
            row += ["broke off"] * 3 if broke else [f"{means[0]:.4f}", f"{means[1]:+.4f}", f"{means[2]:+.4f}"]
        same = paired_p([d for pairs in by_depth.values() for d in pairs.equal_steps]) if not broke else None
        record["p_equal_steps"] = same
        row += [" ".join(f"{r:.3f}" for r in record["ratio"])]
        row += ["" if value is None else f"{value:.3f}" for value in (same, p)]
        rows.append([*row, f"{c.removes} {verdict}" if c.removes else verdict])
        records.append(record)
    head = ["candidate"] + [f"d{d} {what}" for d in depths for what in ("bpb", "equal steps", "equal time")]
    table([*head, "s/step ratio", "p, steps", "p, time", "verdict"], rows)
    return records


def run(cfg: AblateConfig) -> dict[str, Any]:
    plan = cfg.plan(cfg.sequence_len)
    for c, depth in itertools.product((Candidate("", {}, ""), *choose(cfg)), numbers("depths", cfg.depths)):
        common.check(cfg.setting(c.overrides, depth, 0), plan, cfg.vocab_size)
    text = Text.open(cfg.data, cfg.vocab_size, cfg.sequence_len, plan.num_rows, cfg.val_documents)
    experiment = design(cfg, text)
    results = Results(Path(cfg.results) if cfg.results else default_results("ablate"))
    begun = time.perf_counter()
    # the base before the candidates, so that whatever is finished can be compared; timings alone on the machine
    runs = [*experiment.half.values(), *sorted(experiment.runs.values(), key=lambda t: not t.label.startswith("base "))]
    left = run_all(
        list(experiment.timings.values()), results, jobs=min(1, cfg.jobs), time_limit=cfg.time_limit, fresh=cfg.fresh
    )
    rest = None if cfg.time_limit is None else cfg.time_limit - (time.perf_counter() - begun) / 60
    left += run_all(runs, results, jobs=cfg.jobs, time_limit=rest, fresh=cfg.fresh)
    records = report(experiment, results, numbers("depths", cfg.depths))
    outcome = {"bench": "ablate", "left": left, "candidates": records}
    finish(outcome)
    return outcome


def main(argv: Sequence[str] | None = None) -> None:
    run_cli(AblateConfig, run, argv, about=__doc__)


if __name__ == "__main__":
    main()
