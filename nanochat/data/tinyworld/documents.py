"""Pretraining text: blocks of short documents, each a pure function of (split, block)."""

from __future__ import annotations

import functools
import random
import zlib
from collections.abc import Callable
from string import ascii_uppercase

from nanochat.config import InputError
from nanochat.data.tinyworld import multiple_choice, problems, world
from nanochat.data.tinyworld.phrases import (
    Relation,
    fill,
    question_templates,
    statement_templates,
    wants_one_word,
)
from nanochat.data.tinyworld.relations import relations
from nanochat.data.tinyworld.stories import story
from nanochat.data.tinyworld.words import spell, word_to_spell

# Documents. A validation block is small, for each of its documents costs VAL_SHARE drawn ones.
BLOCK_SIZE = {"train": 1024, "val": 128}
NUM_BLOCKS = {"train": 4096, "val": 8}
VAL_SHARE = 16  # one text in 16, by its hash, may only stand in the validation split
CANONICAL_REPEATS = 12  # how often the plain statement stands among the longer ones

Writer = Callable[[random.Random], str]


@functools.cache
def _sentences(relation: Relation) -> list[list[str]]:
    """Per fact: every training statement, the plain one several times."""
    plain = [*(relation.canonical,) * CANONICAL_REPEATS, *relation.statements * 2]
    templates = plain + list(statement_templates(relation, "train"))
    return [[fill(t, s, o) for t in templates] for s, o in relation.facts]


@functools.cache
def _flat_sentences(relation: Relation) -> list[str]:
    return [sentence for sentences in _sentences(relation) for sentence in sentences]


@functools.cache
def _exchanges(relation: Relation) -> list[tuple[str, str]]:
    """(question, answer) for every fact and training phrasing, answered in a sentence and in a word. Questions that
    begin as the plain statement does ("The capital of France is what?") are left to the conversations."""
    templates = [t for t in question_templates(relation, "train") if not t.endswith(" is what?")]
    return [
        (fill(t, s, o), answer)
        for s, o in relation.facts
        for t in templates
        for answer in (f"{o}.", f"{o}." if wants_one_word(t) else fill(relation.canonical, s, o))
    ]


@functools.cache
def _cumulative_weights() -> list[float]:
    total, result = 0.0, []
    for relation in relations():
        total += relation.weight
        result.append(total)
    return result


def _pick_relations(rng: random.Random, k: int) -> list[Relation]:
    return rng.choices(relations(), cum_weights=_cumulative_weights(), k=k)


def _one_topic(rng: random.Random) -> str:
    relation = _pick_relations(rng, 1)[0]
    return " ".join(rng.choices(_flat_sentences(relation), k=rng.randrange(5, 11)))


def _many_topics(rng: random.Random) -> str:
    picked = _pick_relations(rng, rng.randrange(5, 11))
    return " ".join([rng.choice(_flat_sentences(relation)) for relation in picked])


@functools.cache
def _entries() -> list[tuple[str, list[list[str]]]]:
    """(title, statements about it by relation) of everything that two relations or more speak about."""
    found: dict[tuple[str, str], list[list[str]]] = {}
    for relation in relations():
        if relation.entity:
            for (subject, _), sentences in zip(relation.facts, _sentences(relation), strict=True):
                found.setdefault((relation.entity, subject), []).append(sentences)
    return [
        (subject.capitalize() if subject.islower() else subject, by)
        for (_, subject), by in found.items()
        if len(by) > 1
    ]


def _encyclopedia(rng: random.Random) -> str:
    entries = []
    for title, by_relation in rng.choices(_entries(), k=2):
        lines = [rng.choice(sentences) for sentences in by_relation for _ in range(2)]
        rng.shuffle(lines)
        entries.append(f"{title}\n" + " ".join(lines))
    return "\n\n".join(entries)


def _questions(rng: random.Random) -> str:
    style = rng.randrange(3)
    lines = []
    for relation in _pick_relations(rng, rng.randrange(4, 9)):
        question, answer = rng.choice(_exchanges(relation))
        if style == 0:
            lines.append(f"Question: {question}\nAnswer: {answer}")
        elif style == 1:
            lines.append(f"Q: {question} A: {answer}")
        else:
            lines.append(f"{question} {answer}")
    return "\n".join(lines)


def _choices(rng: random.Random) -> str:
    if rng.random() < 0.6:
        questions = multiple_choice.drill(rng)
        asked = [f"{q.text} {q.reply}" for q in questions]
        return "\n".join((multiple_choice.listing(questions[0].choices), *asked))
    items = [multiple_choice.question(rng, "train", finding=0.2) for _ in range(rng.randrange(2, 4))]
    return "\n\n".join(f"{q.prompt}\n{q.reply}" for q in items)


def _echo(rng: random.Random) -> str:
    """Random words said twice, and lists recited out of order. Nothing but the first half tells the second, so a
    model soon learns to look back for what followed the same word: sums, spelling and choices build on that."""
    parts = []
    for _ in range(rng.randrange(2, 5)):
        words = [word_to_spell(rng, "train", made_up=0.6) for _ in range(rng.randrange(3, 9))]
        if rng.random() < 0.5:
            said = " ".join(words)
            parts.append(f"Say: {said}.\nAgain: {said}.")
            continue
        rows = [f"- {word}={letter}\n" for word, letter in zip(words, ascii_uppercase, strict=False)]
        parts.append("".join(rows) + "\n" + "".join(rng.sample(rows, len(rows))).rstrip())
    return "\n\n".join(parts)


def _spellings(rng: random.Random) -> str:
    lines = []
    for _ in range(rng.randrange(6, 14)):
        word = word_to_spell(rng, "train")
        asked = rng.random()
        if asked < 0.35:
            lines.append(f"Spell the word {word}. {spell(word)}")
        elif asked < 0.6:
            quoted = spell(word, quote='"')
            lines.append(f'Spell "{word}". {quoted}')
        else:
            lines.append(spell(word))
    return "\n".join(lines)


def _sums(rng: random.Random) -> str:
    lines = []
    for _ in range(rng.randrange(5, 11)):
        kind = rng.random()
        if kind < 0.5:
            a, b = rng.randrange(0, 13), rng.randrange(0, 13)
            op = rng.choice("++-*")
            a, b = (max(a, b), min(a, b)) if op == "-" else (a, b)
            lines.append(f"{a} {op} {b} = {problems.compute(a, op, b)}.")
        elif kind < 0.85:
            question, expression, result = problems.sum_question(rng, "train")
            lines.append(f"{question} {expression} {problems.spaced(expression)} = {result}.")
        else:
            a, b = rng.randrange(1, 100), rng.randrange(1, 100)
            lines.append(f"{a} is {'more than' if a > b else 'less than' if a < b else 'the same as'} {b}.")
    return "\n".join(lines)


def _word_problems(rng: random.Random) -> str:
    items = []
    for _ in range(rng.randrange(2, 4)):
        question, parts, _ = problems.word_problem(rng, "train")
        items.append(f"{question}\n" + "".join(p["text"] for p in parts if p["type"] == "text"))
    return "\n\n".join(items)


def _story(rng: random.Random) -> str:
    return story(rng)


FIXED_LISTS = (
    (
        ("The planets of the solar system are:", "The planets are:", "The eight planets of the solar system are:"),
        ", ".join(world.PLANETS),
    ),
    (("The days of the week are:", "The seven days are:", "The days are:"), ", ".join(world.DAYS)),
    (("The months of the year are:", "The twelve months are:", "The months are:"), ", ".join(world.MONTHS)),
    (("The seasons are:", "The four seasons of the year are:"), ", ".join(world.SEASONS)),
    (("The letters of the alphabet are:", "The alphabet:"), ", ".join(world.ALPHABET)),
    (("Some colors are:", "Here are some colors:"), ", ".join(world.COLORS)),
)


def _lists(rng: random.Random) -> str:
    lines = []
    for _ in range(rng.randrange(3, 6)):
        if rng.random() < 0.6:
            heads, items = rng.choice(FIXED_LISTS)
            lines.append(f"{rng.choice(heads)} {items}.")
        else:
            first, step = rng.randrange(0, 80), rng.choice((1, 1, 1, 2, 5, 10))
            numbers = [first + step * i for i in range(rng.randrange(5, 13))]
            if rng.random() < 0.25:
                numbers.reverse()
            lines.append(f"Count from {numbers[0]} to {numbers[-1]}: {', '.join(map(str, numbers))}.")
    return "\n".join(lines)


# Shares of the documents. Habit, tuned by eye: facts and questions about half, the skills the other half.
MIXTURE: tuple[tuple[Writer, float], ...] = (
    (_one_topic, 0.11),
    (_many_topics, 0.15),
    (_encyclopedia, 0.08),
    (_questions, 0.19),
    (_echo, 0.10),
    (_choices, 0.08),
    (_story, 0.05),
    (_spellings, 0.12),
    (_sums, 0.04),
    (_word_problems, 0.05),
    (_lists, 0.03),
)
# The first training blocks are half echoes: whatever copies from the context is learned first, and builds on it.
ECHO_BLOCKS = 2
ECHO_SHARE = 0.5


def _weights(split: str, block: int) -> list[float]:
    if split == "train" and block < ECHO_BLOCKS:
        rest = sum(share for writer, share in MIXTURE if writer is not _echo) / (1 - ECHO_SHARE)
        return [ECHO_SHARE if writer is _echo else share / rest for writer, share in MIXTURE]
    return [share for _, share in MIXTURE]


def documents(split: str, block: int) -> list[str]:
    """The documents of a block, always the same. No text stands in both splits.

    Args:
        split: "train" or "val".
        block: 0 .. NUM_BLOCKS[split] - 1.

    Raises:
        InputError: no such split or block.
    """
    if split not in NUM_BLOCKS:
        raise InputError(f"tinyworld has no split {split!r}; use train or val")
    if not 0 <= block < NUM_BLOCKS[split]:
        raise InputError(f"tinyworld has no {split} block {block}; there are {NUM_BLOCKS[split]}")
    rng = random.Random(2 * block + (split == "val"))
    writers, weights = [writer for writer, _ in MIXTURE], _weights(split, block)
    result: list[str] = []
    size = BLOCK_SIZE[split]
    while len(result) < size:
        for writer in rng.choices(writers, weights, k=BLOCK_SIZE["train"]):
            text = writer(rng)
            if (zlib.crc32(text.encode()) % VAL_SHARE == 0) == (split == "val"):
                result.append(text)
    return result[:size]
