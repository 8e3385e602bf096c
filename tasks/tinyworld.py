"""Tasks over the embedded corpus: facts, sums, word problems, spelling, multiple choice, who the model is.

Each has a "train" split of any size, "dev" to choose recipes by and "test" to report; they share no phrasing,
operand pair or spelled word. Their scores are tinyworld's own and compare with no other benchmark.
"""

from __future__ import annotations

from typing import Any, ClassVar

from nanochat.config import InputError
from nanochat.data.tinyworld import SPLITS, checks, conversation
from tasks.aqua import extract_letter
from tasks.common import (
    Conversation,
    Task,
    evaluate_final_answer,
    evaluate_final_number,
    gold_letter,
    has_final_answer,
)

TEST_SIZE = 200
TRAIN_SIZE = 4096  # conversations, unless a size is asked for


class TinyTask(Task):
    """Conversations of some kinds, taking turns.

    Args:
        split: "train", "dev" or "test".
        size: conversations; None = TRAIN_SIZE, or TEST_SIZE where held out.
        first: index of the first one: two training sets do not overlap when their ranges do not.

    Raises:
        InputError: no such split.
    """

    kinds: ClassVar[tuple[str, ...]]

    def __init__(self, split: str, size: int | None = None, first: int = 0, **slicing: Any) -> None:
        super().__init__(**slicing)
        if split not in SPLITS:
            raise InputError(f"{type(self).__name__} has no split {split!r}; use {', '.join(SPLITS)}")
        self.split, self.first = split, first
        self.size = size if size is not None else (TRAIN_SIZE if split == "train" else TEST_SIZE)

    def num_examples(self) -> int:
        return self.size

    def get_example(self, index: int) -> Conversation:
        turn, which = divmod(self.first + index, len(self.kinds))
        return conversation(self.kinds[which], self.split, turn)


class TinyFacts(TinyTask):
    """Questions about the world."""

    kinds = ("facts",)

    def evaluate(self, conversation: Conversation, response: str) -> bool:
        return checks.is_right_fact(conversation, response)


class TinySums(TinyTask):
    """Sums for the calculator."""

    kinds = ("sums",)

    def evaluate(self, conversation: Conversation, response: str) -> bool:
        return checks.is_right_sum(conversation, response)


class TinyWordProblems(TinyTask):
    """One or two steps of arithmetic in a little story, answered after `####`."""

    kinds = ("word_problems",)

    def evaluate(self, conversation: Conversation, response: str) -> bool:
        return evaluate_final_answer(conversation, response)

    def evaluate_lenient(self, conversation: Conversation, response: str) -> bool:
        return evaluate_final_number(conversation, response)

    def parsed(self, response: str) -> bool:
        return has_final_answer(response)


class TinySpelling(TinyTask):
    """Spell a word."""

    kinds = ("spelling",)

    def evaluate(self, conversation: Conversation, response: str) -> bool:
        return checks.is_right_spelling(conversation, response)


class TinyMC(TinyTask):
    """Choose one of four: say the answer, then its letter, and be judged by the letter."""

    kinds = ("multiple_choice",)

    def evaluate(self, conversation: Conversation, response: str) -> bool:
        return checks.is_right_choice(conversation, response)


class TinyAQUA(TinyTask):
    """A word problem with five options, reasoned about and then answered by a letter, as AQuA-RAT's are."""

    kinds = ("choice_problems",)

    def evaluate(self, conversation: Conversation, response: str) -> bool:
        return extract_letter(response) == gold_letter(conversation)

    def parsed(self, response: str) -> bool:
        return extract_letter(response) is not None


class TinyIdentity(TinyTask):
    """Who the model is, and small talk."""

    kinds = ("identity", "smalltalk")

    def evaluate(self, conversation: Conversation, response: str) -> bool:
        return checks.is_right_talk(conversation, response)


class TinyStories(TinyTask):
    """A story on demand; right when it has the animal or the child that was asked for."""

    kinds = ("stories",)

    def evaluate(self, conversation: Conversation, response: str) -> bool:
        return checks.is_right_talk(conversation, response)


class TinyDialogue(TinyTask):
    """Chats of several exchanges; training text only, so nothing counts as right."""

    kinds = ("dialogue",)

    def evaluate(self, conversation: Conversation, response: str) -> bool:
        return False


RL_TASK = TinyWordProblems
TASKS: tuple[type[TinyTask], ...] = (
    *(TinyFacts, TinySums, TinyWordProblems, TinySpelling, TinyMC, TinyIdentity, TinyStories, TinyDialogue),
)
