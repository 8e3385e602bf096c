"""Names to tasks: the test set behind each name of chat_eval, and what reinforcement learning trains on."""

from __future__ import annotations

from collections.abc import Callable

from nanochat.config import InputError
from tasks.aqua import AQUA
from tasks.arc import ARC
from tasks.common import Task
from tasks.gsm8k import GSM8K
from tasks.humaneval import HumanEval
from tasks.mmlu import MMLU
from tasks.spellingbee import SpellingBee
from tasks.tinyworld import TinyAQUA, TinyFacts, TinyMC, TinySpelling, TinySums, TinyWordProblems

EVAL_TASKS: dict[str, Callable[[], Task]] = {
    "ARC-Easy": lambda: ARC("ARC-Easy", "test"),
    "ARC-Challenge": lambda: ARC("ARC-Challenge", "test"),
    "MMLU": lambda: MMLU("all", "test"),
    "GSM8K": lambda: GSM8K("main", "test"),
    "HumanEval": lambda: HumanEval(),
    "SpellingBee": lambda: SpellingBee(256, "test"),
    "AQUA": lambda: AQUA("validation", shuffle=False),
    "TinyFacts": lambda: TinyFacts("test"),
    "TinySums": lambda: TinySums("test"),
    "TinyWordProblems": lambda: TinyWordProblems("test"),
    "TinySpelling": lambda: TinySpelling("test"),
    "TinyMC": lambda: TinyMC("test"),
    "TinyAQUA": lambda: TinyAQUA("test"),
}
RL_TASKS: dict[str, Callable[[], tuple[Task, Task]]] = {
    "GSM8K": lambda: (GSM8K("main", "train"), GSM8K("main", "test")),
    "AQUA": lambda: (AQUA("train"), AQUA("validation", shuffle=False)),
    "SpellingBee": lambda: (SpellingBee(80_000, "train"), SpellingBee(256, "test")),
    "ARC-Easy": lambda: (ARC("ARC-Easy", "train"), ARC("ARC-Easy", "validation")),
    "ARC-Challenge": lambda: (ARC("ARC-Challenge", "train"), ARC("ARC-Challenge", "validation")),
    "MMLU": lambda: (MMLU("auxiliary_train", "train"), MMLU("all", "validation")),
    "TinyFacts": lambda: (TinyFacts("train"), TinyFacts("dev")),
    "TinySums": lambda: (TinySums("train"), TinySums("dev")),
    "TinyWordProblems": lambda: (TinyWordProblems("train"), TinyWordProblems("dev")),
    "TinySpelling": lambda: (TinySpelling("train"), TinySpelling("dev")),
    "TinyMC": lambda: (TinyMC("train"), TinyMC("dev")),
    "TinyAQUA": lambda: (TinyAQUA("train"), TinyAQUA("dev")),
}
# What chat_eval evaluates when no task is named, in the report's order; ChatCORE needs all of them.
REAL = ("ARC-Easy", "ARC-Challenge", "MMLU", "GSM8K", "HumanEval", "SpellingBee")
TINYWORLD = ("TinyFacts", "TinySums", "TinyWordProblems", "TinySpelling", "TinyMC")
# Accuracy of guessing; 0 for what is not listed.
BASELINES = {"ARC-Easy": 0.25, "ARC-Challenge": 0.25, "MMLU": 0.25, "AQUA": 0.20, "TinyMC": 0.25, "TinyAQUA": 0.20}


def eval_task(name: str) -> Task:
    """The held-out examples that stand behind a name.

    Raises:
        InputError: no such name, or its data cannot be had.
    """
    if name not in EVAL_TASKS:
        raise InputError(f"no task {name!r} to evaluate; there are {', '.join(EVAL_TASKS)}")
    return EVAL_TASKS[name]()


def rl_tasks(name: str) -> tuple[Task, Task]:
    """(training task, held-out task) of a name with a reward.

    Raises:
        InputError: no such name, or its data cannot be had.
    """
    if name not in RL_TASKS:
        raise InputError(f"no task {name!r} to learn by reward; there are {', '.join(RL_TASKS)}")
    return RL_TASKS[name]()


def default_tasks(dataset: str | None) -> tuple[str, ...]:
    """What to evaluate a model on whose pretraining data was `dataset`."""
    return TINYWORLD if dataset == "tinyworld" else REAL
