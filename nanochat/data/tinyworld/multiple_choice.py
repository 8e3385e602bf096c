"""Questions with four choices, in the frame that every multiple-choice task here uses."""

from __future__ import annotations

import functools
import random
from collections.abc import Sequence

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


def listing(choices: Sequence[str]) -> str:
    """One line a choice. The letter follows its choice with no space before it."""
    return "".join(f"- {choice}={letter}\n" for choice, letter in zip(choices, LETTERS, strict=True))


def frame(question: str, choices: Sequence[str]) -> str:
    """The prompt that every multiple-choice task here uses."""
    return (
        f"Multiple Choice question: {question}\n{listing(choices)}\nRespond only with the letter of the correct answer."
    )


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


def drill(rng: random.Random) -> tuple[list[str], list[tuple[str, str]]]:
    """(four choices, questions about them with their letters): many questions to one list, training text only.

    A single framed question tells a model one letter in some 75 tokens, too little to find out from how a choice,
    its letter and an answer hang together. Here each of a dozen tokens is a letter, and the questions rise from
    finding a choice by its name to knowing the answer.
    """
    relation = rng.choices(choosable(), cum_weights=_cumulative_weights())[0]
    subjects: dict[str, str] = {}  # by answer
    while len(subjects) < len(LETTERS):
        subject, answer = rng.choice(relation.facts)
        subjects.setdefault(answer, subject)
    choices = list(subjects)
    rng.shuffle(choices)
    questions = []
    for round_ in range(2):
        for i in rng.sample(range(len(choices)), 3):
            if round_ == 0:
                text = rng.choice(FINDING).replace("{o}", choices[i])
            else:
                text = fill(rng.choice(_templates(relation, "train")), subjects[choices[i]])
            questions.append((text, LETTERS[i]))
    return choices, questions
