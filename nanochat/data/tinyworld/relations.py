"""Every relation of the world: at least eight phrasings each in training, and held-out ones (phrases.py)."""

from __future__ import annotations

import functools

from nanochat.data.tinyworld import relations_nature as nature
from nanochat.data.tinyworld import relations_words as words
from nanochat.data.tinyworld.phrases import Relation


@functools.cache
def relations() -> tuple[Relation, ...]:
    """All relations, in a fixed order."""
    return (
        *(*nature.geography(), *nature.science(), *nature.animals()),
        *(*words.calendar(), *words.language(), *words.numbers()),
    )


@functools.cache
def relation(name: str) -> Relation:
    """The relation of this name; KeyError when there is none."""
    return {r.name: r for r in relations()}[name]
