"""CORE: the mean over in-context tasks of accuracy centered on guessing (Li et al. 2024, "DataComp-LM").

Multiple choice and schema items take the option whose tokens have the lowest mean loss; a language modeling
item counts when the greedy choice equals every token of the continuation.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from nanochat.environment import print0
from nanochat.evals.bundle import Bundle, CoreTask
from nanochat.runtime import Runtime, all_reduce, together

# logits of one batch, in elements: 1 GiB of fp32 on a GPU, 128 MiB elsewhere
MAX_LOGITS = {"cuda": 2**28}
MAX_LOGITS_ELSEWHERE = 2**25
EXAMPLES_AT_ONCE = 256  # tokenized and sorted by length together; all of a task would fill the memory

Item = dict[str, Any]


@dataclass(frozen=True)
class TaskScore:
    label: str
    num_correct: int
    num_examples: int
    baseline: float  # accuracy of guessing, 0 to 1

    @property
    def accuracy(self) -> float:
        return self.num_correct / self.num_examples

    @property
    def centered(self) -> float:
        """0 = guessing, 1 = all right."""
        return (self.accuracy - self.baseline) / (1 - self.baseline)

    @property
    def stderr(self) -> float:
        """Standard error of `centered`, from sampling the examples."""
        a = self.accuracy
        return math.sqrt(a * (1 - a) / self.num_examples) / (1 - self.baseline)


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
    def centered_results(self) -> dict[str, float]:
        return {task.label: task.centered for task in self.tasks}


@dataclass(frozen=True)
class Prompt:
    """A token sequence of which ids[start:] is scored."""

    ids: list[int]
    start: int


def render_prompts(task: CoreTask, item: Item, shots: Sequence[Item]) -> list[str]:
    """The texts of one item: one a choice, or (language modeling) without and with the continuation."""
    d = task.delimiter
    if task.kind == "multiple_choice":
        head = "".join(s["query"] + d + s["choices"][s["gold"]] + "\n\n" for s in shots)
        return [head + item["query"] + d + choice for choice in item["choices"]]
    if task.kind == "schema":
        head = "".join(s["context_options"][s["gold"]] + d + s["continuation"] + "\n\n" for s in shots)
        return [head + option + d + item["continuation"] for option in item["context_options"]]
    head = "".join(s["context"].strip() + d + s["continuation"] + "\n\n" for s in shots)
    without = head + item["context"].strip() + d
    # stripped, because a space at the end would belong to the first token of the continuation
    return [without.strip(), without + item["continuation"]]


def common_prefix(sequences: Sequence[Sequence[int]]) -> int:
    """How many leading tokens all sequences share."""
    for i, tokens in enumerate(zip(*sequences, strict=False)):
        if len(set(tokens)) > 1:
            return i
    return min(map(len, sequences))


def scored_spans(kind: str, sequences: Sequence[list[int]]) -> list[Prompt]:
    """Which tokens decide. At least one each: an option may be the beginning of all the others.

    Multiple choice: what follows the common prefix. Schema: the common suffix. Language modeling: what the
    continuation adds (one prompt).
    """
    shortest = min(map(len, sequences))
    if kind == "schema":
        suffix = common_prefix([ids[::-1] for ids in sequences])
        suffix = max(1, min(suffix, shortest - 1))
        return [Prompt(ids, len(ids) - suffix) for ids in sequences]
    start = common_prefix(sequences)
    if kind == "language_modeling":
        full = sequences[1]
        return [Prompt(full, min(start, len(full) - 1))]
    return [Prompt(ids, min(start, shortest - 1)) for ids in sequences]


def crop_left(prompt: Prompt, limit: int) -> Prompt:
    """The last `limit` tokens, the first of them still BOS."""
    cut = len(prompt.ids) - limit
    if cut <= 0:
        return prompt
    return Prompt([prompt.ids[0], *prompt.ids[cut + 1 :]], max(1, prompt.start - cut))


def fewshot_indices(index: int, num_fewshot: int, num_examples: int, num_items: int) -> list[int]:
    """Which items stand before item `index`: drawn from the evaluated examples, so that figures compare with
    published ones; where these are too few, from the whole data set."""
    pool = num_examples if num_examples > num_fewshot else num_items
    others = [i for i in range(pool) if i != index]
    return random.Random(1234 + index).sample(others, min(num_fewshot, len(others)))


def batches(lengths: Sequence[int], max_rows: int, max_tokens: int) -> Iterator[list[int]]:
    """Indices in groups of similar length: up to max_rows rows and, padded, max_tokens tokens; always one."""
    batch: list[int] = []
    for i in sorted(range(len(lengths)), key=lambda i: lengths[i], reverse=True):
        if batch and (len(batch) == max_rows or (len(batch) + 1) * lengths[batch[0]] > max_tokens):
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch


@torch.no_grad()
def score_prompts(
    model: Callable[[torch.Tensor], torch.Tensor], prompts: Sequence[Prompt], pad: int, device: torch.device
) -> list[tuple[float, bool]]:
    """(mean loss in nats of the scored tokens, is each the greedy choice) of every prompt, in one batch."""
    T = max(len(p.ids) for p in prompts)
    rows = [p.ids + [pad] * (T - len(p.ids)) for p in prompts]  # at the end: causal
    idx = torch.tensor(rows, dtype=torch.long, device=device)  # (B, T)
    logits = model(idx)  # (B, T, V)
    scores = []
    for i, p in enumerate(prompts):
        span = logits[i, p.start - 1 : len(p.ids) - 1].float()  # (S, V): position t - 1 predicts token t
        targets = idx[i, p.start : len(p.ids)]
        loss = F.cross_entropy(span, targets)
        scores.append(torch.stack([loss, (span.argmax(-1) == targets).all().float()]))
    return [(loss, bool(greedy)) for loss, greedy in torch.stack(scores).tolist()]  # one wait for the device


def is_correct(kind: str, scores: Sequence[tuple[float, bool]], gold: int | None) -> bool:
    if kind == "language_modeling":
        return scores[0][1]
    losses = [loss for loss, _ in scores]
    if any(math.isnan(loss) for loss in losses):
        return False  # min() would take the first option
    return losses.index(min(losses)) == gold


def max_context(model: Any) -> int:
    """The longest prompt that the model takes, in tokens."""
    return getattr(model, "max_context", None) or model.config.max_positions


@dataclass(frozen=True)
class Scorer:
    """What scores prompts: a model with its tokenizer and how much of a batch it takes."""

    model: Any
    tokenizer: Any
    device: torch.device
    device_batch_size: int

    def count_correct(self, task: CoreTask, examples: Sequence[tuple[Item, Sequence[Item]]]) -> int:
        """How many of the (item, its shots) are answered right."""
        bos, limit = self.tokenizer.get_bos_token_id(), max_context(self.model)
        prompts: list[Prompt] = []
        owners: list[int] = []  # which example each prompt is of
        for n, (item, shots) in enumerate(examples):
            sequences = self.tokenizer.encode(render_prompts(task, item, shots), prepend=bos)
            spans = scored_spans(task.kind, sequences)
            prompts += [crop_left(prompt, limit) for prompt in spans]
            owners += [n] * len(spans)
        max_logits = MAX_LOGITS.get(self.device.type, MAX_LOGITS_ELSEWHERE)
        max_tokens = max_logits // self.tokenizer.get_vocab_size()
        scores: list[Any] = [None] * len(prompts)
        for batch in batches([len(p.ids) for p in prompts], self.device_batch_size, max_tokens):
            scored = score_prompts(self.model, [prompts[i] for i in batch], bos, self.device)
            for i, score in zip(batch, scored, strict=True):
                scores[i] = score
        by_example: list[list[tuple[float, bool]]] = [[] for _ in examples]
        for owner, score in zip(owners, scores, strict=True):
            by_example[owner].append(score)
        pairs = zip(by_example, examples, strict=True)
        return sum(is_correct(task.kind, of_one, item.get("gold")) for of_one, (item, _) in pairs)


def evaluate_task(scorer: Scorer, rt: Runtime, task: CoreTask, max_examples: int | None) -> TaskScore:
    """Score the first `max_examples` items of the shuffled data, shared out over the ranks.

    Raises:
        RankError: it failed on some rank; on every rank.
    """
    correct, num_examples = together(lambda: _my_correct(scorer, rt, task, max_examples))
    total = all_reduce(torch.tensor([correct], dtype=torch.long, device=rt.device))
    return TaskScore(task.label, int(total.item()), num_examples, task.baseline)


def _my_correct(scorer: Scorer, rt: Runtime, task: CoreTask, max_examples: int | None) -> tuple[int, int]:
    """(right answers to this rank's examples, examples of all ranks)."""
    items = task.read()
    random.Random(1337).shuffle(items)
    num_examples = min(len(items), max_examples or len(items))
    mine = range(rt.rank, num_examples, rt.world_size)
    correct = 0
    for first in range(0, len(mine), EXAMPLES_AT_ONCE):
        examples = []
        for index in mine[first : first + EXAMPLES_AT_ONCE]:
            shots = fewshot_indices(index, task.num_fewshot, num_examples, len(items))
            examples.append((items[index], [items[i] for i in shots]))
        correct += scorer.count_correct(task, examples)
    return correct, num_examples


def evaluate_core(
    model: Any,
    tokenizer: Any,
    rt: Runtime,
    bundle: Bundle,
    max_per_task: int | None = None,
    device_batch_size: int = 32,
) -> CoreResult:
    """Evaluate every task of the bundle, one console line each.

    Args:
        model: idx (B, T) -> logits (B, T, V), not compiled (each batch has another shape). Its `max_context`
            if it has one, else config.max_positions, is the longest prompt; longer ones lose their beginning.
        max_per_task: examples a task; None = all.
        device_batch_size: prompts a forward pass, at most.

    Raises:
        RankError: a task failed on some rank; on every rank.
    """
    scorer = Scorer(model, tokenizer, rt.device, device_batch_size)
    scores = []
    for task in bundle.tasks:
        t0 = time.perf_counter()
        score = evaluate_task(scorer, rt, task, max_per_task)
        scores.append(score)
        print0(
            f"{task.label} ({task.num_fewshot}-shot, {task.kind}) | accuracy: {score.accuracy:.4f} | "
            f"centered: {score.centered:.4f} +- {score.stderr:.4f} | examples: {score.num_examples} | "
            f"time: {time.perf_counter() - t0:.2f}s"
        )
    return CoreResult(bundle.metric_name, tuple(scores))
