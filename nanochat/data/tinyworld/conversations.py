"""Chats about the world: `conversation(kind, split, index)`, always the same for the same arguments.

Train, dev and test share no phrasing, no pair of operands and no spelled word (see phrases, problems and words).
"""

from __future__ import annotations

import functools
import random
import re
from collections.abc import Callable
from typing import Any

from nanochat.config import InputError
from nanochat.data.tinyworld import chitchat, multiple_choice, problems
from nanochat.data.tinyworld.phrases import SPLITS, fill, question_templates, split_of, wants_one_word
from nanochat.data.tinyworld.relations import relations
from nanochat.data.tinyworld.stories import story
from nanochat.data.tinyworld.words import spell, word_to_spell
from nanochat.data.tinyworld.world import BOYS, GIRLS, SOUNDS, UNITS, article

Conversation = dict[str, Any]

SPELLING_FRAMES = (
    "Spell {w}.",
    "How do you spell {w}?",
    "Please spell {w}.",
    "Can you spell {w}?",
    "What are the letters of {w}?",
    "Tell me the letters of {w}.",
    "Write the letters of {w}.",
    "Spell out {w}.",
    "How is {w} spelled?",
    "I want you to spell {w}.",
)
SPELLING_FORMS = ("{w}", "the word {w}", "this word: {w}", '"{w}"')


def _chat(*turns: Any, **extras: Any) -> Conversation:
    """User and assistant in turns."""
    roles = ("user", "assistant")
    return {"messages": [{"role": roles[i % 2], "content": text} for i, text in enumerate(turns)], **extras}


@functools.cache
def _relation_weights() -> list[float]:
    return [r.weight for r in relations()]


def _facts(rng: random.Random, split: str, index: int) -> Conversation:
    every = relations()
    if split != "train":  # every relation alike, so that a short test speaks about all of them
        relation = every[index % len(every)]
    else:
        relation = rng.choices(every, _relation_weights())[0]
    subject, answer = rng.choice(relation.facts)
    template = rng.choice(question_templates(relation, split))
    question = fill(template, subject, answer)
    sentence = fill(relation.canonical, subject, answer)
    accept = [answer, str(UNITS.index(answer))] if answer in UNITS else [answer]
    named = {w.lower() for w in re.findall(r"[\w-]+", f"{question} {sentence}")}
    candidates = [o for o in relation.pool if o.lower() not in named and o not in accept]
    reply = f"{answer}." if wants_one_word(template) else sentence
    return _chat(question, reply, answer=answer, accept=accept, candidates=candidates, relation=relation.name)


def _sums(rng: random.Random, split: str, index: int) -> Conversation:
    question, expression, result = problems.sum_question(rng, split)
    return _chat(question, problems.sum_parts(expression, result), answer=str(result), expression=expression)


def _word_problems(rng: random.Random, split: str, index: int) -> Conversation:
    question, parts, result = problems.word_problem(rng, split)
    return _chat(question, parts, answer=str(result))


def _choice_problems(rng: random.Random, split: str, index: int) -> Conversation:
    prompt, parts, letter = problems.choice_problem(rng, split)
    return _chat(prompt, parts, letters=list(problems.LETTERS), answer_letter=letter)


def spelling_templates(split: str) -> list[str]:
    """All ways to ask for a spelling, with {w} open. Documents ask by the first frame, so it is never held out."""
    return [
        frame.replace("{w}", form)
        for i, frame in enumerate(SPELLING_FRAMES)
        for j, form in enumerate(SPELLING_FORMS)
        if split_of(i, j) == split and (i > 0 or split == "train")
    ]


def _spelling(rng: random.Random, split: str, index: int) -> Conversation:
    word = word_to_spell(rng, split, made_up=0.8 if split == "train" else 0.0)
    template = rng.choice(spelling_templates(split))
    return _chat(template.replace("{w}", word), spell(word, '"' if '"' in template else ""), answer=word)


def _multiple_choice(rng: random.Random, split: str, index: int) -> Conversation:
    if split == "train" and rng.random() < 0.3:
        questions = multiple_choice.drill(rng)
        prompts = [questions[0].prompt, *(f"The same choices. {q.text}" for q in questions[1:])]
        turns = [turn for prompt, q in zip(prompts, questions, strict=True) for turn in (prompt, q.reply)]
        return _chat(*turns, letters=list(multiple_choice.LETTERS), answer_letter=questions[-1].letter)
    every = multiple_choice.choosable()
    relation = every[index % len(every)] if split != "train" else None
    q = multiple_choice.question(rng, split, 0.15 if split == "train" else 0.0, relation)
    return _chat(q.prompt, q.reply, letters=list(multiple_choice.LETTERS), answer_letter=q.letter)


def _talk(intents: tuple[chitchat.Intent, ...], rng: random.Random, split: str, index: int) -> Conversation:
    intent = intents[index % len(intents)] if split != "train" else rng.choice(intents)
    return _chat(rng.choice(intent.of(split)), rng.choice(intent.answers), keywords=list(intent.keywords))


def _stories(rng: random.Random, split: str, index: int) -> Conversation:
    """Asked for with an animal or a child's name."""
    request = rng.choice(chitchat.of_split(chitchat.STORY_REQUESTS, split))
    if rng.random() < 0.3:
        name = rng.choice(BOYS + GIRLS)
        return _chat(request.replace("{a}", name), story(rng, name=name, short=True), keywords=[name])
    animal = rng.choice(SOUNDS)[0]
    return _chat(request.replace("{a}", article(animal)), story(rng, animal, short=True), keywords=[animal])


def _dialogue(rng: random.Random, split: str, index: int) -> Conversation:
    """Two to four exchanges of the other kinds in one chat; it often begins with a greeting."""
    kinds = rng.choices(("facts", "sums", "spelling", "identity", "smalltalk"), (5, 2, 2, 1, 2), k=rng.randrange(1, 4))
    messages: list[dict[str, Any]] = []
    for kind in (rng.choice(("smalltalk", "facts", "identity")), *kinds):
        messages += _MAKERS[kind](rng, split, rng.randrange(1 << 20))["messages"]
    return {"messages": messages}


_MAKERS: dict[str, Callable[[random.Random, str, int], Conversation]] = {
    "facts": _facts,
    "sums": _sums,
    "word_problems": _word_problems,
    "spelling": _spelling,
    "multiple_choice": _multiple_choice,
    "identity": functools.partial(_talk, chitchat.IDENTITY),
    "smalltalk": functools.partial(_talk, chitchat.SMALLTALK),
    "stories": _stories,
    "dialogue": _dialogue,
    "choice_problems": _choice_problems,
}
KINDS = tuple(_MAKERS)
NUMBERED = 9  # kinds that are seeded by their number; a later one must not change their conversations


def conversation(kind: str, split: str, index: int) -> Conversation:
    """One chat, {"messages": [...]} and what its scorer needs (answer, accept, candidates, letters, answer_letter,
    keywords).

    Args:
        kind: one of KINDS.
        split: "train", "dev" (held out, to choose recipes by) or "test" (held out, to report).
        index: any number from 0; every index is another draw.

    Raises:
        InputError: no such kind or split, or a negative index.
    """
    if kind not in _MAKERS:
        raise InputError(f"tinyworld has no conversations of kind {kind!r}; use {', '.join(KINDS)}")
    if split not in SPLITS or index < 0:
        raise InputError(f"tinyworld has no {kind} conversation {split!r} {index}; use {', '.join(SPLITS)}, from 0")
    number = KINDS.index(kind)
    seed: int | str = (index * NUMBERED + number) * len(SPLITS) + SPLITS.index(split)
    if number >= NUMBERED:
        seed = f"{kind}/{split}/{index}"
    return _MAKERS[kind](random.Random(seed), split, index)
