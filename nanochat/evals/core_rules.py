"""The rules of CORE that do not depend on how the model is run: prompts, shots, scored tokens, decisions.

Multiple choice and schema items take the option whose tokens have the lowest mean loss; a language modeling
item counts when the greedy choice equals every token of the continuation.
"""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from nanochat.evals.bundle import OPTIONS, CoreTask

Item = dict[str, Any]
Ids = Sequence[int] | np.ndarray
SHUFFLE_SEED, SHOTS_SEED = 1337, 1234  # the published evaluation's
UNSCORED = -1  # the prediction where the model gave no finite loss


class Prompt(NamedTuple):
    """A token sequence, BOS first, of which ids[start:] is scored."""

    ids: Ids
    start: int


@dataclass(frozen=True)
class Example:
    """An item with its shots, as tokens: a prompt an option, or the one of a language modeling item.

    `gold` is the prediction that is right: an option's index, or 1 = every token is the greedy one.
    """

    kind: str
    prompts: tuple[Prompt, ...]
    gold: int

    def crop(self, limit: int) -> Example:
        """Each prompt's last `limit` tokens, the first of them BOS."""
        if all(len(p.ids) <= limit for p in self.prompts):
            return self
        return Example(self.kind, tuple(crop_left(p, limit) for p in self.prompts), self.gold)


class Score(NamedTuple):
    """Of one option. Batches leave out, as NaN, what decides nothing for the kind."""

    loss: float  # mean of its scored tokens, nats
    greedy: bool  # whether each of them is the first of the most likely tokens
    lead: float  # the least by which one of them is ahead of the best other token, in logits; < 0 = behind


def select_items(items: Sequence[Item], max_per_task: int | None) -> tuple[list[Item], int]:
    """(all items, shuffled; how many of the first are evaluated)."""
    shuffled = list(items)
    random.Random(SHUFFLE_SEED).shuffle(shuffled)
    return shuffled, min(len(shuffled), max_per_task or len(shuffled))


def fewshot_indices(index: int, num_fewshot: int, num_examples: int, num_items: int) -> list[int]:
    """Which items stand before item `index`: drawn from the evaluated examples, so that figures compare with
    published ones; where these are too few, from the whole data set."""
    pool = num_examples if num_examples > num_fewshot else num_items
    others = [i for i in range(pool) if i != index]
    return random.Random(SHOTS_SEED + index).sample(others, min(num_fewshot, len(others)))


def render_prompts(task: CoreTask, item: Item, shots: Sequence[Item]) -> list[str]:
    """The texts of one item: one an option, or (language modeling) without and with the continuation."""
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


def common_prefix(sequences: Sequence[Ids]) -> int:
    """How many leading tokens all sequences share."""
    shortest = min(map(len, sequences))
    rows = np.stack([np.asarray(ids[:shortest]) for ids in sequences])
    differs = (rows != rows[0]).any(axis=0)
    return int(differs.argmax()) if differs.any() else shortest


def scored_spans(kind: str, sequences: Sequence[Ids]) -> list[Prompt]:
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
    ids, cut = prompt.ids, len(prompt.ids) - limit
    if cut <= 0:
        return prompt
    kept = np.concatenate([ids[:1], ids[cut + 1 :]]) if isinstance(ids, np.ndarray) else [ids[0], *ids[cut + 1 :]]
    return Prompt(kept, max(1, prompt.start - cut))


def right_answer(kind: str, item: Item) -> int:
    return 1 if kind == "language_modeling" else item["gold"]


def choose(kind: str, scores: Sequence[Score]) -> int:
    """The prediction. Of equal losses the first is taken; UNSCORED where one is NaN."""
    if kind == "language_modeling":
        return UNSCORED if math.isnan(scores[0].lead) else int(scores[0].greedy)
    losses = [score.loss for score in scores]
    if any(map(math.isnan, losses)):
        return UNSCORED  # min() would take the first option
    return losses.index(min(losses))


def margin(kind: str, scores: Sequence[Score]) -> float:
    """By how much the scores must change before the prediction can, in logits or nats; NaN where there is none."""
    if kind == "language_modeling":
        return abs(scores[0].lead)
    losses = sorted(score.loss for score in scores)
    return losses[1] - losses[0] if len(losses) > 1 else math.inf


def difference(kind: str, a: Sequence[Score], b: Sequence[Score]) -> float:
    """By how much two scorings of an example differ, in the unit of `margin`."""
    if kind == "language_modeling":
        return abs(a[0].lead - b[0].lead)
    best = min(range(len(a)), key=lambda i: a[i].loss)
    return max(abs((x.loss - a[best].loss) - (y.loss - b[best].loss)) for x, y in zip(a, b, strict=True))


def guess_accuracy(kind: str, items: Sequence[Item]) -> float:
    """Expected accuracy of a uniform choice among the options; 0 where the answer is free."""
    if kind == "language_modeling":
        return 0.0
    return sum(1 / len(item[OPTIONS[kind]]) for item in items) / len(items)


def majority_accuracy(kind: str, items: Sequence[Item]) -> float:
    """Accuracy of one answer to all items, the best there is: an option's place, or a continuation."""
    answers = Counter(item["continuation" if kind == "language_modeling" else "gold"] for item in items)
    return answers.most_common(1)[0][1] / len(items)
