"""CORE in large batches: each token is computed once, and only the logits that decide.

What the options of an item share goes through the model once, and then each option's rest on the keys and values that
it left. Rows of like length are batched across examples and tasks. Sums in another order give slightly other scores, so
what is too close to call is scored again as core_identity.py does; see `evaluate`.

# B rows, T positions, C width, V vocabulary, N scored tokens
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import zip_longest
from typing import Any, NamedTuple

import numpy as np
import torch

from nanochat.environment import print0
from nanochat.evals.core_identity import score_example
from nanochat.evals.core_requests import Requests
from nanochat.evals.core_rules import Example, Ids, Score, choose, common_prefix, difference, margin
from nanochat.ranks import together
from nanochat.runtime import Runtime, all_reduce

# Tokens of a forward pass. On a CPU more would leave its cache (measured: bench/evals.py); a GPU wants many.
MAX_TOKENS = {"cuda": 2**16}
MAX_TOKENS_ELSEWHERE = 2**12
MAX_CACHE_BYTES = {"cuda": 4 << 30}
MAX_CACHE_BYTES_ELSEWHERE = 256 << 20
MIN_SAVED_TOKENS = 32  # an example with fewer to share than this is not worth a cache
LOGITS_AT_ONCE = 2**25  # elements
NEAREST = 2  # examples of each task that are scored both ways to see how far the two differ; then twice as many, ...
PRIOR = 8.0  # examples that what is seen in all tasks of a kind counts for beside those of the task itself
SAFETY = 6.0  # a margin so many times the typical difference (root mean square) is not in doubt
LINE_SECONDS = 30.0


class Span(NamedTuple):
    """Scored tokens of one option in a row: the feature at `first` + i predicts targets[i]."""

    option: int
    first: int
    targets: Ids


class Row(NamedTuple):
    ids: Ids
    spans: list[Span]


@dataclass(frozen=True)
class Plan:
    """How an example is computed: rows by themselves, or one row and then, on its cache, a rest of each option."""

    rows: list[Row]
    rests: list[Row] = field(default_factory=list)  # longest first

    @property
    def num_tokens(self) -> int:
        return sum(len(row.ids) for row in self.rows + self.rests)


def plan(example: Example) -> Plan:
    """The last token of a prompt is no input: nothing comes after it."""
    prompts = example.prompts
    if len(prompts) > 1:
        shared = min(common_prefix([p.ids for p in prompts]), *(p.start for p in prompts))
        longest = max(len(p.ids) for p in prompts)
        if longest == shared + 1:  # one token decides
            return Plan(
                [Row(prompts[0].ids[:shared], [Span(i, shared - 1, p.ids[-1:]) for i, p in enumerate(prompts)])]
            )
        if shared * (len(prompts) - 1) >= MIN_SAVED_TOKENS:
            return _split(example, shared)
    return Plan([Row(p.ids[:-1], [Span(i, p.start - 1, p.ids[p.start :])]) for i, p in enumerate(prompts)])


def _split(example: Example, shared: int) -> Plan:
    head = Row(example.prompts[0].ids[:shared], [])
    rests = []
    for i, p in enumerate(example.prompts):
        targets, first = p.ids[p.start :], p.start - 1 - shared
        if first < 0:  # the first one is predicted by the last of the shared tokens
            head.spans.append(Span(i, shared - 1, targets[:1]))
            targets, first = targets[1:], 0
        if len(p.ids) > shared + 1:
            rests.append(Row(p.ids[shared:-1], [Span(i, first, targets)]))
    return Plan([head], sorted(rests, key=lambda row: len(row.ids), reverse=True))


class Sums:
    """What an example's kind is decided by, of each option, as its tokens come in: losses, or leads."""

    def __init__(self, example: Example) -> None:
        n = len(example.prompts)
        self.wants_lead = example.kind == "language_modeling"
        self.total, self.count = np.zeros(n), np.zeros(n)
        self.least = np.full(n, np.inf)

    def add(self, option: int, values: np.ndarray) -> None:
        self.total[option] += values.sum()
        self.count[option] += len(values)
        self.least[option] = min(self.least[option], values.min()) if not np.isnan(values).any() else np.nan

    def scores(self) -> list[Score]:
        if self.wants_lead:
            return [Score(np.nan, lead > 0, lead) for lead in self.least.tolist()]
        return [Score(loss, False, np.nan) for loss in (self.total / self.count).tolist()]


def padded(rows: Sequence[Row], device: torch.device) -> torch.Tensor:
    """(B, T) ids; what is behind a row's end comes after all that counts, and is causal."""
    ids = np.zeros((len(rows), max(len(row.ids) for row in rows)), np.int64)
    for line, row in zip(ids, rows, strict=True):
        line[: len(row.ids)] = row.ids
    return torch.from_numpy(ids).to(device)


@torch.inference_mode()
def score_rows(model: Any, rows: Sequence[Row], sums: Sequence[Sums], device: torch.device, cache: Any = None) -> None:
    """Run rows through the model and add what the scored tokens lose."""
    places = [sorted({span.first + i for span in row.spans for i in range(len(span.targets))}) or [0] for row in rows]
    at = np.array([line + line[-1:] * (max(map(len, places)) - len(line)) for line in places])  # (B, Q)
    x = model.features(padded(rows, device), cache, torch.from_numpy(at).to(device))  # (B, Q, C)
    spans = [(r, span, places[r].index(span.first)) for r, row in enumerate(rows) for span in row.spans]
    if not spans:
        return
    counts = [len(span.targets) for _, span, _ in spans]
    flat = np.concatenate(
        [r * at.shape[1] + first + np.arange(n) for (r, _, first), n in zip(spans, counts, strict=True)]
    )
    target = torch.from_numpy(np.concatenate([span.targets for _, span, _ in spans])).to(device)[:, None]
    scored = x.flatten(0, 1)[torch.from_numpy(flat).to(device)]  # (N, C)
    wants_lead = torch.from_numpy(np.repeat([sums[r].wants_lead for r, _, _ in spans], counts)).to(device)
    values = []
    chunk = max(1, LOGITS_AT_ONCE // model.config.vocab_size)
    for of_chunk, wanted, is_lead in zip(
        scored.split(chunk), target.split(chunk), wants_lead.split(chunk), strict=True
    ):
        logits = model.logits(of_chunk)  # (N, V)
        of_target = logits.gather(1, wanted).squeeze(1)
        value = logits.logsumexp(1) - of_target
        if is_lead.any():
            value[is_lead] = of_target[is_lead] - logits[is_lead].scatter(1, wanted[is_lead], -torch.inf).amax(1)
        values.append(value)
    found = torch.cat(values).cpu().double().numpy()
    for (r, span, _), some in zip(spans, np.split(found, np.cumsum(counts)[:-1]), strict=True):
        sums[r].add(span.option, some)


def score_shared(model: Any, plans: Sequence[Plan], sums: Sequence[Sums], device: torch.device) -> None:
    """A batch of plans with rests: the heads, then the first rest of each, then the second."""
    lengths = torch.tensor([len(p.rows[0].ids) for p in plans], device=device)
    cache = model.new_cache(len(plans), int(lengths.max()) + max(len(p.rests[0].ids) for p in plans))
    score_rows(model, [p.rows[0] for p in plans], sums, device, cache)
    nothing = Row(np.zeros(1, np.int64), [])
    for rests in zip_longest(*(p.rests for p in plans), fillvalue=nothing):
        cache.lengths = lengths  # each rest writes over the one before
        score_rows(model, rests, sums, device, cache)


@dataclass(frozen=True)
class Batch:
    """Examples that are computed together; `places` are theirs among all of the run."""

    places: list[int]
    shares: bool  # whether there are rests
    tokens: int  # padded


def batches(shapes: Sequence[tuple[int, int, int]], max_tokens: int, max_cached: int) -> list[Batch]:
    """Group examples of like size.

    Args:
        shapes: (rows or 0 for one with rests, the longest row, the longest rest) of each example.
        max_tokens: of the rows of a batch, padded; always one example.
        max_cached: the same with the rests, of those that have any.
    """
    found: list[Batch] = []
    places: list[int] = []
    width = rows = 0
    shares = False

    def close() -> None:
        if places:
            found.append(Batch(list(places), shares, rows * width))
            places.clear()

    for place in sorted(range(len(shapes)), key=lambda i: (shapes[i][0] == 0, shapes[i][1:]), reverse=True):
        num_rows, longest, rest = shapes[place]
        has_rests = num_rows == 0
        limit = min(max_tokens, max_cached) if has_rests else max_tokens
        needed = max(1, num_rows)
        total = longest + rest
        if places and (has_rests != shares or (rows + needed) * max(width, total) > limit):
            close()
        if not places:
            width = rows = 0
            shares = has_rests
        places.append(place)
        width, rows = max(width, total), rows + needed
    close()
    return found


def shares_of(costs: Sequence[float], world_size: int) -> list[list[int]]:
    """Deal out work to ranks so that their sums of cost are alike: the costliest first, each to the idlest rank."""
    loads, hands = [0.0] * world_size, [[] for _ in range(world_size)]  # type: tuple[list[float], list[list[int]]]
    for i in sorted(range(len(costs)), key=lambda i: costs[i], reverse=True):
        rank = loads.index(min(loads))
        loads[rank] += costs[i]
        hands[rank].append(i)
    return hands


class Outcome(NamedTuple):
    """Of all examples of a run, task after task; the same on every rank."""

    predictions: np.ndarray  # (E,) int64
    seconds: np.ndarray  # (tasks,) of a rank on average: its batches' time, shared out by tokens
    num_rescored: int


class FastRun:
    """The examples of all tasks on one rank, and what it finds. The model has features, logits and new_cache."""

    def __init__(self, model: Any, rt: Runtime, tasks: Sequence[Requests], limit: int, device_batch_size: int) -> None:
        self.model, self.rt, self.tasks, self.limit = model, rt, tasks, limit
        self.task_of = np.repeat(np.arange(len(tasks)), [len(t) for t in tasks])  # (E,)
        self.index_of = np.concatenate([np.arange(len(t)) for t in tasks])
        kind, c = rt.device.type, model.config
        self.max_tokens = min(1024 * device_batch_size, MAX_TOKENS.get(kind, MAX_TOKENS_ELSEWHERE))
        bytes_of_a_token = 2 * c.n_layer * c.n_kv_head * c.head_dim * torch.finfo(model.compute_dtype).bits // 8
        self.max_cached = MAX_CACHE_BYTES.get(kind, MAX_CACHE_BYTES_ELSEWHERE) // bytes_of_a_token
        self.scores: dict[int, list[Score]] = {}
        self.seconds = np.zeros(len(tasks))

    def example(self, place: int) -> Example:
        return self.tasks[self.task_of[place]].example(self.index_of[place]).crop(self.limit)

    def shape(self, place: int) -> tuple[int, int, int]:
        p = plan(self.example(place))
        longest = max(len(row.ids) for row in p.rows)
        return (0, longest, len(p.rests[0].ids)) if p.rests else (len(p.rows), longest, 0)

    def score_all(self) -> None:
        """This rank's share, the largest batches first, so that a lack of memory shows at once."""
        todo = batches([self.shape(place) for place in range(len(self.task_of))], self.max_tokens, self.max_cached)
        mine = shares_of([batch.tokens for batch in todo], self.rt.world_size)[self.rt.rank]
        total, done = sum(todo[i].tokens for i in mine), 0
        start = told = time.perf_counter()
        for i in mine:
            self.score_batch(todo[i])
            done, now = done + todo[i].tokens, time.perf_counter()
            if now - told >= LINE_SECONDS:
                told = now
                left = (now - start) * (total - done) / done
                print0(f"CORE: {100 * done / total:.0f}% of the tokens, {left / 60:.1f} minutes left")

    def score_batch(self, batch: Batch) -> None:
        t0 = time.perf_counter()
        examples = [self.example(place) for place in batch.places]
        plans, device = [plan(e) for e in examples], self.rt.device
        sums = [Sums(e) for e in examples]
        if batch.shares:
            score_shared(self.model, plans, sums, device)
        else:
            rows = [(row, s) for p, s in zip(plans, sums, strict=True) for row in p.rows]
            score_rows(self.model, [row for row, _ in rows], [s for _, s in rows], device)
        self.scores |= {place: s.scores() for place, s in zip(batch.places, sums, strict=True)}
        tokens = np.array([p.num_tokens for p in plans])
        np.add.at(self.seconds, self.task_of[batch.places], (time.perf_counter() - t0) * tokens / tokens.sum())

    def score_again(self, places: Sequence[int]) -> np.ndarray:
        """Score those that this rank scored the plain way, which is what then counts.

        Returns:
            (2, tasks): how many there were of each task, and the sum of the squared differences between the two ways.
        """
        found = np.zeros((2, len(self.tasks)))
        for place in places:
            if place in self.scores:
                t0 = time.perf_counter()
                example, task = self.example(place), self.task_of[place]
                scores = score_example(self.model, example, self.rt.device)
                squared = difference(example.kind, scores, self.scores[place]) ** 2
                if np.isfinite(squared):
                    found[:, task] += 1, squared
                self.scores[place] = scores
                self.seconds[task] += time.perf_counter() - t0
        return found

    def gather(self, of_one: Callable[[str, Sequence[Score]], float]) -> np.ndarray:
        """(E,) float64, a number of each example's kind and scores, from the rank that has them. A collective call."""
        mine = np.zeros(len(self.task_of))
        for place, scores in self.scores.items():
            mine[place] = of_one(self.tasks[self.task_of[place]].kind, scores)
        return self.reduce(mine)

    def reduce(self, mine: np.ndarray) -> np.ndarray:
        """The sum over ranks."""
        x = torch.from_numpy(mine)
        return all_reduce(x.to(self.rt.device) if self.rt.device.type == "cuda" else x).cpu().numpy()


def evaluate(model: Any, rt: Runtime, tasks: Sequence[Requests], limit: int, device_batch_size: int) -> Outcome:
    """The predictions that core_identity.py makes.

    Scores differ from its by the order of sums. How far is measured on the examples of each task that are closest to
    another prediction, and all that are closer than SAFETY times that are scored the plain way too, the closest first,
    while the measure grows better. So a tie, exact or within rounding, is decided as there: the first option, the token
    of the lower id. Batches do not depend on the number of ranks, nor does this.

    Raises:
        RankError: it failed on some rank; on every rank.
    """
    run = FastRun(model, rt, tasks, limit, device_batch_size)
    together(run.score_all)
    margins = run.gather(margin)
    is_open = np.isfinite(margins)  # scored one way only; what has no number has no margin, and no number the other way
    seen, reach, most = np.zeros((2, len(tasks))), np.full(len(tasks), np.inf), NEAREST
    while True:
        doubtful: list[int] = []
        for task in range(len(tasks)):
            close = np.flatnonzero(is_open & (run.task_of == task) & (margins <= reach[task]))
            doubtful += close[np.argsort(margins[close], kind="stable")][:most].tolist()
        if not doubtful:
            break
        is_open[doubtful] = False
        seen += run.reduce(together(partial(run.score_again, doubtful)))
        reach, most = SAFETY * typical_difference(seen, [t.kind == "language_modeling" for t in tasks]), 2 * most
    num_rescored = int(np.isfinite(margins).sum() - is_open.sum())
    return Outcome(run.gather(choose).astype(np.int64), run.reduce(run.seconds) / rt.world_size, num_rescored)


def typical_difference(seen: np.ndarray, has_leads: Sequence[bool]) -> np.ndarray:
    """(tasks,) root mean square: of the task's, and of all in the same unit for the weight of PRIOR examples.

    Args:
        seen: (2, tasks): numbers of differences, and sums of their squares.
        has_leads: whether a task's are of leads, else of losses.
    """
    is_lead = np.array(has_leads)
    typical = np.zeros(len(is_lead))
    for unit in (is_lead, ~is_lead):
        counts, squares = seen[:, unit]
        common = squares.sum() / max(1, counts.sum())
        typical[unit] = np.sqrt((squares + PRIOR * common) / (counts + PRIOR))
    return typical
