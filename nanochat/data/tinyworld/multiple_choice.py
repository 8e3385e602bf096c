"""Questions with four choices, in the frame that every multiple-choice task here uses."""

from __future__ import annotations

import functools
import random

from nanochat.data.tinyworld.phrases import Relation, fill, question_templates, wants_one_word
from nanochat.data.tinyworld.relations import relations

LETTERS = ("A", "B", "C", "D")
# Questions that name their answer: they teach to find a choice and to give its letter, before any knowledge.
FINDING = (
    "Which choice says {o}?",
    "Which of these is {o}?",
    "Find {o}.",
    "Which letter stands for {o}?",
    "Which line says {o}?",
)


def frame(question: str, choices: tuple[str, ...] | list[str]) -> str:
    """The prompt: the letter follows its choice with no space before it, so its token is the bare answer's."""
    lines = "".join(f"- {choice}={letter}\n" for choice, letter in zip(choices, LETTERS, strict=True))
    return f"Multiple Choice question: {question}\n{lines}\nRespond only with the letter of the correct answer."


@functools.cache
def choosable() -> tuple[Relation, ...]:
    """The relations with at least four different answers."""
    return tuple(r for r in relations() if len(r.pool) >= len(LETTERS))


@functools.cache
def _cumulative_weights() -> list[float]:
    total, result = 0.0, []
    for r in choosable():
        total += r.weight
        result.append(total)
    return result


@functools.cache
def _templates(relation: Relation, split: str) -> tuple[str, ...]:
    return tuple(t for t in question_templates(relation, split) if t.endswith("?") and not wants_one_word(t))


def question(
    rng: random.Random, split: str, finding: float = 0.0, relation: Relation | None = None
) -> tuple[str, list[str], int]:
    """(question, four choices, index of the right one), choices of one relation in random order.

    Args:
        split: "train" or "test": which phrasings.
        finding: how often the question names its answer ("Which choice says Paris?").
    """
    relation = relation or rng.choices(choosable(), cum_weights=_cumulative_weights())[0]
    subject, answer = rng.choice(relation.facts)
    pool = relation.pool
    choices = [answer]
    while len(choices) < len(LETTERS):
        other = rng.choice(pool)
        if other not in choices:
            choices.append(other)
    rng.shuffle(choices)
    if rng.random() < finding:
        text = rng.choice(FINDING).replace("{o}", answer)
    else:
        text = fill(rng.choice(_templates(relation, split)), subject)
    return text, choices, choices.index(answer)
