"""Questions with four choices, answered by the answer and then its letter."""

from __future__ import annotations

import functools
import random
from collections.abc import Sequence
from dataclasses import dataclass

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
    """The prompt: the frame of every multiple-choice task here, but for its last line. A small model that knows the
    answer cannot name its letter at once; when it may say the answer first, it can (docs/EXPERIMENTS.md)."""
    return f"Multiple Choice question: {question}\n{listing(choices)}\nSay the answer, then its letter."


@dataclass(frozen=True)
class Question:
    """A question with four choices. `reason` is the sentence that answers it; "" where the question does so itself."""

    text: str
    reason: str
    choices: tuple[str, ...]
    gold: int

    @property
    def letter(self) -> str:
        return LETTERS[self.gold]

    @property
    def prompt(self) -> str:
        return frame(self.text, self.choices)

    @property
    def reply(self) -> str:
        """'The capital of France is Paris. It is Paris=C': the answer, then its line of the list."""
        return f"{self.reason} It is {self.choices[self.gold]}={self.letter}".strip()


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


def _pick_relation(rng: random.Random) -> Relation:
    return rng.choices(choosable(), cum_weights=_cumulative_weights())[0]


@functools.cache
def _templates(relation: Relation, split: str) -> tuple[str, ...]:
    return tuple(t for t in question_templates(relation, split) if t.endswith("?") and not wants_one_word(t))


def _ask(
    rng: random.Random, split: str, relation: Relation, subject: str, choices: Sequence[str], gold: int, finding: float
) -> Question:
    """A question to these choices; with probability `finding` one that names its answer."""
    if rng.random() < finding:
        return Question(rng.choice(FINDING).replace("{o}", choices[gold]), "", tuple(choices), gold)
    text = fill(rng.choice(_templates(relation, split)), subject)
    return Question(text, fill(relation.canonical, subject, choices[gold]), tuple(choices), gold)


def question(rng: random.Random, split: str, finding: float = 0.0, relation: Relation | None = None) -> Question:
    """A question with choices of one relation in random order.

    Args:
        split: which phrasings, one of SPLITS.
        finding: how often the question names its answer ("Which choice says Paris?").
    """
    relation = relation or _pick_relation(rng)
    subject, answer = rng.choice(relation.facts)
    choices = [answer]
    while len(choices) < len(LETTERS):
        other = rng.choice(relation.pool)
        if other not in choices:
            choices.append(other)
    rng.shuffle(choices)
    return _ask(rng, split, relation, subject, choices, choices.index(answer), finding)


def drill(rng: random.Random) -> list[Question]:
    """Six training questions to one list: three that name their answer, then three to know.

    A single framed question shows in some 90 tokens only once how an answer, a choice and its letter hang together.
    """
    relation = _pick_relation(rng)
    subjects: dict[str, str] = {}  # by answer
    while len(subjects) < len(LETTERS):
        subject, answer = rng.choice(relation.facts)
        subjects.setdefault(answer, subject)
    choices = list(subjects)
    rng.shuffle(choices)
    return [
        _ask(rng, "train", relation, subjects[choices[i]], choices, i, finding)
        for finding in (1.0, 0.0)
        for i in rng.sample(range(len(choices)), 3)
    ]
