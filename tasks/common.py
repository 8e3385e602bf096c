"""What every task shares: slicing, mixing, the multiple-choice prompt and the `####` answer.

A task is a numbered list of conversations (dicts with `messages` and, where it is scored, the facts that the
scorer needs) and a rule that says whether a response is right.
"""

from __future__ import annotations

import hashlib
import json
import random
import re
from array import array
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import numpy as np

from nanochat.config import InputError
from nanochat.data import hub

Conversation = dict[str, Any]

# The wire format of scored answers; the reference's pattern, kept so that scores compare.
FINAL_ANSWER = re.compile(r"#### (\-?[0-9\.\,]+)")


class Task:
    """A view of `num_examples()` conversations: from `start` to `stop`, every `step`-th.

    A `stop` beyond the last example means "to the end".

    Raises:
        InputError: a negative start or stop, or a step below 1.
    """

    # "categorical": the letter whose logit is highest right after the prompt; "generative": sampled text
    eval_type: Literal["categorical", "generative"] = "generative"
    # whether evaluate() waits for a process of its own, so that several answers may well be judged at once
    waits_to_judge = False

    def __init__(self, start: int = 0, stop: int | None = None, step: int = 1) -> None:
        if start < 0 or (stop is not None and stop < 0) or step < 1:
            raise InputError(
                f"a task cannot be cut to start={start} stop={stop} step={step}; "
                "start and stop count from 0, step from 1"
            )
        self.start, self.stop, self.step = start, stop, step

    def num_examples(self) -> int:
        """Examples of the whole task, before slicing."""
        raise NotImplementedError

    def get_example(self, index: int) -> Conversation:
        """The conversation at `index` of the whole task, before slicing."""
        raise NotImplementedError

    def evaluate(self, conversation: Conversation, response: str) -> bool:
        """Whether `response` is right. Any text may come: what a model wrote is never an error."""
        raise NotImplementedError

    def evaluate_lenient(self, conversation: Conversation, response: str) -> bool:
        """A kinder rule, where a task has one; reported beside the headline figure, never in its place."""
        return self.evaluate(conversation, response)

    @property
    def has_lenient_rule(self) -> bool:
        return type(self).evaluate_lenient is not Task.evaluate_lenient

    def reward(self, conversation: Conversation, response: str) -> float:
        """What reinforcement learning maximises."""
        return float(self.evaluate(conversation, response))

    def parsed(self, response: str) -> bool | None:
        """Whether an answer, right or wrong, can be read out of a response; None: the task asks for no format."""
        return None

    def __len__(self) -> int:
        stop = self.num_examples() if self.stop is None else min(self.stop, self.num_examples())
        return max(0, -(-(stop - self.start) // self.step))

    def __getitem__(self, index: int) -> Conversation:
        if not 0 <= index < len(self):
            raise IndexError(f"example {index} of a task of {len(self)}")
        return self.get_example(self.start + index * self.step)

    def __iter__(self) -> Iterator[Conversation]:
        return (self[i] for i in range(len(self)))


class HubTask(Task):
    """A split of a data set from the hub, in the hub's order for shuffle seed 42.

    Raises:
        InputError: the split is not here and cannot be fetched.
    """

    def __init__(self, repo: str, config: str, split: str, **slicing: Any) -> None:
        super().__init__(**slicing)
        self.rows = hub.load_rows(repo, config, split)
        self.order = hub.shuffled_order(len(self.rows))

    def num_examples(self) -> int:
        return len(self.rows)

    def row(self, index: int) -> dict[str, Any]:
        """Row `index` of the shuffled split, as the hub has it."""
        return self.rows[int(self.order[index])]


class TaskSequence(Task):
    """Tasks one after the other, in the given order."""

    def __init__(self, tasks: Sequence[Task], **slicing: Any) -> None:
        super().__init__(**slicing)
        self.tasks = list(tasks)
        self.ends = np.cumsum([len(task) for task in self.tasks], dtype=np.int64)

    def num_examples(self) -> int:
        return int(self.ends[-1]) if self.tasks else 0

    def get_example(self, index: int) -> Conversation:
        which = int(np.searchsorted(self.ends, index, side="right"))
        begin = int(self.ends[which - 1]) if which else 0
        return self.tasks[which][index - begin]


FINGERPRINT_ROWS = 1024


def fingerprint(task: Task) -> str:
    """sha256 (hex) of what a task holds: its length, and its conversations, of many 1,024 spread over all."""
    n = len(task)
    rows = range(n) if n <= FINGERPRINT_ROWS else [i * n // FINGERPRINT_ROWS for i in range(FINGERPRINT_ROWS)]
    digest = hashlib.sha256(str(n).encode())
    for i in rows:
        digest.update(json.dumps(task[i], sort_keys=True, default=str).encode())
    return digest.hexdigest()


class TaskMixture(TaskSequence):
    """The same examples in one fixed shuffle; a task listed twice is seen twice.

    The order is that of Python's Random(42).shuffle over the list of (task, local index) pairs built task by
    task. A shuffle only moves places, so shuffling the places gives that order in 8 bytes an example.
    """

    def __init__(self, tasks: Sequence[Task], **slicing: Any) -> None:
        super().__init__(tasks, **slicing)
        places = array("q", range(super().num_examples()))
        random.Random(42).shuffle(places)
        self.order = np.array(places, dtype=np.int64)

    def get_example(self, index: int) -> Conversation:
        return super().get_example(int(self.order[index]))


def render_choices(question: str, letters: Sequence[str], choices: Sequence[str]) -> str:
    """The question and its options. The letter follows the choice, with no space before it, so that its token
    is the one that the bare answer has."""
    lines = [f"Multiple Choice question: {question}\n"]
    lines += [f"- {choice}={letter}\n" for letter, choice in zip(letters, choices, strict=True)]
    return "".join(lines)


def render_mc(question: str, letters: Sequence[str], choices: Sequence[str]) -> str:
    """The multiple-choice prompt: question, options, and the wish for nothing but a letter."""
    return render_choices(question, letters, choices) + "\nRespond only with the letter of the correct answer."


def mc_conversation(
    question: str, letters: Sequence[str], choices: Sequence[str], answer: str, **extras: Any
) -> Conversation:
    """A multiple-choice conversation whose answer is the bare letter."""
    messages = [
        {"role": "user", "content": render_mc(question, letters, choices)},
        {"role": "assistant", "content": answer},
    ]
    return {"messages": messages, "letters": list(letters), **extras}


def gold_letter(conversation: Conversation) -> str:
    """The right letter of a multiple-choice conversation."""
    answer = conversation.get("answer_letter")
    return answer if answer is not None else conversation["messages"][-1]["content"]


def final_answer(text: str) -> str | None:
    """The number after the first `#### `, without commas; None when there is none."""
    match = FINAL_ANSWER.search(text)
    return match.group(1).strip().replace(",", "") if match else None


def reference_text(conversation: Conversation) -> str:
    """What the conversation's own last message says, tool calls left out."""
    content = conversation["messages"][-1]["content"]
    if isinstance(content, str):
        return content
    return "".join(part["text"] for part in content if part["type"] == "text")


def reference_answer(conversation: Conversation) -> str:
    """The final answer in a conversation's own last message (text, or a list of parts).

    Raises:
        ValueError: the reference has none, so nothing could be scored against it.
    """
    text = reference_text(conversation)
    answer = final_answer(text)
    if answer is None:
        raise ValueError(f"no `#### number` in the reference answer {text!r}")
    return answer


def same_number(a: str | None, b: str | None) -> bool:
    """Whether two extracted answers are the same number: "10." = "10.0" = "10"; None equals nothing."""
    try:
        return a is not None and b is not None and float(a) == float(b)
    except ValueError:
        return False


def has_final_answer(response: str) -> bool:
    """Whether there is a number after `#### `."""
    return final_answer(response) is not None


def evaluate_letter(conversation: Conversation, response: str) -> bool:
    """Whether the response is the right letter and nothing else."""
    return response.strip() == gold_letter(conversation)


def evaluate_final_answer(conversation: Conversation, response: str) -> bool:
    """Whether the text after `#### ` is the reference's, letter by letter ("10." is not "10")."""
    return final_answer(response) == reference_answer(conversation)


def evaluate_final_number(conversation: Conversation, response: str) -> bool:
    """Whether the number after `#### ` is the reference's ("10." is 10)."""
    return same_number(final_answer(response), reference_answer(conversation))
