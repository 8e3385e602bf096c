"""CORE: the mean over in-context tasks of accuracy centered on guessing (Li et al. 2024, "DataComp-LM").

core_rules.py says what is asked and what decides; core_identity.py asks one example at a time, core_fast.py in batches.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch

from nanochat.environment import print0
from nanochat.evals import core_fast
from nanochat.evals.bundle import Bundle, CoreTask
from nanochat.evals.core_identity import make_example, score_example
from nanochat.evals.core_requests import get_requests
from nanochat.evals.core_rules import (
    UNSCORED,
    Item,
    choose,
    guess_accuracy,
    majority_accuracy,
    right_answer,
    select_items,
)
from nanochat.evals.stats import Z95, wilson
from nanochat.ranks import together
from nanochat.runtime import Runtime, all_reduce

MODES = ("fast", "identity")


@dataclass(frozen=True)
class TaskScore:
    label: str
    num_correct: int
    num_examples: int
    baseline: float  # accuracy of guessing by the bundle's table, 0 to 1
    guess: float = 0.0  # expected accuracy of choosing at random among the options of these examples
    majority: float = 0.0  # accuracy of the best constant answer to these examples
    num_cropped: int = 0  # longer than the model's context: they lost their beginning
    num_cut: int = 0  # of these, whose answer alone is longer: only its end was scored
    num_unscored: int = 0  # the model gave no number; counted as wrong
    predictions: tuple[int, ...] = field(default=(), repr=False)
    right: tuple[int, ...] = field(default=(), repr=False)  # what they should have been
    seconds: float = field(default=0.0, compare=False)  # of a rank

    @property
    def accuracy(self) -> float:
        return self.num_correct / self.num_examples

    def center(self, accuracy: float) -> float:
        """0 = guessing, 1 = all right."""
        return (accuracy - self.baseline) / (1 - self.baseline)

    @property
    def centered(self) -> float:
        return self.center(self.accuracy)

    @property
    def stderr(self) -> float:
        """Standard error of `centered`, from sampling the examples."""
        a = self.accuracy
        return math.sqrt(a * (1 - a) / self.num_examples) / (1 - self.baseline)

    @property
    def interval(self) -> tuple[float, float]:
        """95% interval of the accuracy: it holds for few examples and for none right, too."""
        return wilson(self.num_correct, self.num_examples)

    @property
    def remarks(self) -> list[str]:
        counts = {
            "longer than the context": self.num_cropped,
            "with an answer longer than the context": self.num_cut,
            "without a score, counted as wrong": self.num_unscored,
        }
        return [f"{count} {what}" for what, count in counts.items() if count]


@dataclass(frozen=True)
class CoreResult:
    metric_name: str  # "CORE metric" only for all 22 tasks; see Bundle.metric_name
    tasks: tuple[TaskScore, ...]

    @property
    def core_metric(self) -> float:
        """Plain mean of the centered accuracies."""
        return sum(task.centered for task in self.tasks) / len(self.tasks)

    @property
    def stderr(self) -> float:
        return math.sqrt(sum(task.stderr**2 for task in self.tasks)) / len(self.tasks)

    @property
    def interval(self) -> tuple[float, float]:
        """95%, normal."""
        return self.core_metric - Z95 * self.stderr, self.core_metric + Z95 * self.stderr

    @property
    def centered_results(self) -> dict[str, float]:
        return {task.label: task.centered for task in self.tasks}

    def control(self, name: str) -> float:
        """The metric of answers that need no model: `guess` or `majority`."""
        return sum(task.center(getattr(task, name)) for task in self.tasks) / len(self.tasks)


def max_context(model: Any) -> int:
    """The longest prompt that the model takes, in tokens."""
    return getattr(model, "max_context", None) or model.config.max_positions


def evaluate_core(
    model: Any,
    tokenizer: Any,
    rt: Runtime,
    bundle: Bundle,
    max_per_task: int | None = None,
    device_batch_size: int = 32,
    mode: str = "fast",
) -> CoreResult:
    """Evaluate every task of the bundle, one console line each.

    Args:
        model: idx (B, T) -> logits (B, T, V), not compiled (each batch has another shape); for the fast mode with
            features, logits and new_cache, or it is the identity mode. Its `max_context` if it has one, else
            config.max_positions, is the longest prompt; longer ones lose their beginning.
        max_per_task: examples a task; None = all.
        device_batch_size: prompts of 1,024 tokens a forward pass, at most; of shorter ones more.
        mode: one of MODES; both give the same predictions.

    Raises:
        RankError: a task failed on some rank; on every rank.
    """
    assert mode in MODES
    items = together(lambda: [select_items(task.read(), max_per_task) for task in bundle.tasks])
    if mode == "fast" and hasattr(model, "new_cache"):
        return _fast(model, tokenizer, rt, bundle, items, device_batch_size)
    return _identity(model, tokenizer, rt, bundle, items)


def answer_one(
    model: Any, tokenizer: Any, rt: Runtime, task: CoreTask, shuffled: list[Item], num_examples: int, i: int
) -> tuple[int, int, int]:
    """Item i by the plain rule: (prediction, tokens of its longest prompt, of its longest answer)."""
    example = make_example(task, shuffled, i, num_examples, tokenizer)
    longest = max(len(p.ids) for p in example.prompts)
    answer = max(len(p.ids) - p.start for p in example.prompts)
    scores = score_example(model, example.crop(max_context(model)), rt.device)
    return choose(task.kind, scores), longest, answer


def _identity(
    model: Any, tokenizer: Any, rt: Runtime, bundle: Bundle, items: Sequence[tuple[list[Item], int]]
) -> CoreResult:
    tasks, limit = [], max_context(model)
    for task, (shuffled, num_examples) in zip(bundle.tasks, items, strict=True):

        def answer_mine(task: CoreTask = task, shuffled: list[Item] = shuffled, n: int = num_examples) -> torch.Tensor:
            found = torch.zeros(3, n, dtype=torch.int64)  # prediction, length of the longest prompt, of an answer
            for i in range(rt.rank, n, rt.world_size):
                found[:, i] = torch.tensor(answer_one(model, tokenizer, rt, task, shuffled, n, i))
            return found.to(rt.device)

        t0 = time.perf_counter()
        predictions, longest, answer = all_reduce(together(answer_mine)).cpu().numpy()
        score = _judge(task, shuffled[:num_examples], predictions, longest > limit, answer >= limit)
        tasks.append(_told(task, replace(score, seconds=time.perf_counter() - t0)))
    return CoreResult(bundle.metric_name, tuple(tasks))


def _fast(
    model: Any,
    tokenizer: Any,
    rt: Runtime,
    bundle: Bundle,
    items: Sequence[tuple[list[Item], int]],
    device_batch_size: int,
) -> CoreResult:
    whole = list(zip(bundle.tasks, items, strict=True))
    # each rank makes some tasks' requests first, then all read all (and make what another node's disk has kept)
    together(lambda: [get_requests(t, *x, tokenizer) for t, x in whole[rt.rank :: rt.world_size]] and None)
    requests = together(lambda: [get_requests(t, *x, tokenizer) for t, x in whole])
    limit = max_context(model)
    outcome = core_fast.evaluate(model, rt, requests, limit, device_batch_size)
    tasks, first = [], 0
    for (task, (shuffled, num_examples)), of_task, seconds in zip(whole, requests, outcome.seconds, strict=True):
        predictions = outcome.predictions[first : first + num_examples]
        first += num_examples
        longest, answer = of_task.sizes()
        score = _judge(task, shuffled[:num_examples], predictions, longest > limit, answer >= limit)
        tasks.append(_told(task, replace(score, seconds=float(seconds))))
    print0(f"CORE: {outcome.num_rescored} of {first} examples were too close to call and scored one at a time")
    return CoreResult(bundle.metric_name, tuple(tasks))


def _judge(
    task: CoreTask, items: Sequence[Item], predictions: np.ndarray, is_cropped: np.ndarray, is_cut: np.ndarray
) -> TaskScore:
    right = np.array([right_answer(task.kind, item) for item in items])
    score = TaskScore(task.label, int((predictions == right).sum()), len(items), task.baseline)
    return replace(
        score,
        guess=guess_accuracy(task.kind, items),
        majority=majority_accuracy(task.kind, items),
        num_cropped=int(is_cropped.sum()),
        num_cut=int(is_cut.sum()),
        num_unscored=int((predictions == UNSCORED).sum()),
        predictions=tuple(predictions.tolist()),
        right=tuple(right.tolist()),
    )


def _told(task: CoreTask, score: TaskScore) -> TaskScore:
    """The score, printed."""
    fields = [
        f"{task.label} ({task.num_fewshot}-shot, {task.kind})",
        f"accuracy: {score.accuracy:.4f}",
        f"centered: {score.centered:.4f} +- {score.stderr:.4f}",
        f"examples: {score.num_examples}",
        f"time: {score.seconds:.2f}s",
        *score.remarks,
    ]
    print0(" | ".join(fields))
    return score
