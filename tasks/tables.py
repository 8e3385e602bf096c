"""Mixtures as tables: which tasks to train on, how many rows of each, how often.

    # task          split       rows    epochs  from
    SmolTalk        train       10000
    GSM8K           train       -       4             # all rows, each four times
    mine.jsonl      -           -       3             # your own conversations
    validation                                        # what follows is for validation
    SmolTalk        test        2000

Only the task must be given; `-` stands for what is left out: the split train, all rows, one epoch, from row 0 on.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from nanochat.config import InputError
from tasks import tinyworld
from tasks.aqua import AQUA
from tasks.arc import ARC
from tasks.common import Task
from tasks.customjson import CustomJSON
from tasks.gsm8k import GSM8K
from tasks.mmlu import MMLU
from tasks.smoltalk import SmolTalk
from tasks.spellingbee import SimpleSpelling, SpellingBee


def _generated(task: Callable[..., Task]) -> Callable[..., Task]:
    """A task that makes as many examples as it is asked for."""

    def make(split: str, start: int, stop: int | None) -> Task:
        if stop is None:
            raise InputError("its examples are made when asked for; say how many rows")
        return task(split=split, size=stop, start=start)

    return make


def _mmlu(split: str, **cut: int | None) -> Task:
    return MMLU("auxiliary_train", "train", **cut) if split == "train" else MMLU("all", split, **cut)


TASKS: dict[str, Callable[..., Task]] = {
    "SmolTalk": SmolTalk,
    "MMLU": _mmlu,
    "ARC-Easy": partial(ARC, "ARC-Easy"),
    "ARC-Challenge": partial(ARC, "ARC-Challenge"),
    "GSM8K": partial(GSM8K, "main"),
    "AQUA": AQUA,
}
MADE: tuple[type[Task], ...] = (SimpleSpelling, SpellingBee, *tinyworld.TASKS, tinyworld.TinyAQUA)
GENERATED = {task.__name__: _generated(task) for task in MADE}
TASKS |= GENERATED


@dataclass(frozen=True)
class Row:
    """A line of a table."""

    task: str  # of TASKS, or a .jsonl file
    split: str = "train"
    rows: int | None = None  # None = all
    epochs: int = 1  # how often each conversation is shown in a pass
    first: int = 0  # of the split's rows, the first that is taken

    @property
    def name(self) -> str:
        split = "" if self.is_own else f" {self.split}"
        return self.task + split + (f" from {self.first:,}" if self.first else "")

    @property
    def is_own(self) -> bool:
        return self.task.endswith(".jsonl")

    def fresh(self) -> Row:
        """As many examples that this row does not have, where they are made when asked for; else the row itself."""
        return dataclasses.replace(self, first=self.first + (self.rows or 0)) if self.task in GENERATED else self

    @property
    def cut(self) -> dict[str, Any]:
        """The slice of the task, as its arguments."""
        return {"start": self.first, "stop": None if self.rows is None else self.first + self.rows}

    def open(self) -> Task:
        """
        Raises:
            InputError: no such task or split, or its data cannot be had.
        """
        if self.is_own:
            return CustomJSON(self.task, **self.cut)
        try:
            return TASKS[self.task](split=self.split, **self.cut)
        except InputError as error:
            raise InputError(f"{self.task}: {error}") from None


@dataclass(frozen=True)
class Table:
    train: tuple[Row, ...]
    validation: tuple[Row, ...]


def _number(text: str, where: str) -> int | None:
    if text in ("", "-"):
        return None
    if not text.replace("_", "").isdigit():
        raise InputError(f"{where}: {text!r} is no whole number; rows, epochs and from are, or `-`")
    return int(text)


def _row(fields: Sequence[str], where: str) -> Row:
    """A row from task, split, rows, epochs and from, of which all but the first may be missing."""
    task, split, rows, epochs, first = (*fields, *[""] * (5 - len(fields)))
    if task not in TASKS and not task.endswith(".jsonl"):
        raise InputError(
            f"{where}: no task {task!r} to train on; use a .jsonl file of conversations or {', '.join(TASKS)}"
        )
    row = Row(
        task,
        "train" if split in ("", "-") else split,
        _number(rows, where),
        1 if (times := _number(epochs, where)) is None else times,
        _number(first, where) or 0,
    )
    if row.epochs < 1:
        raise InputError(f"{where}: {task} is to be shown {row.epochs} times; take the line out instead")
    return row


def parse_table(text: str, where: str) -> Table:
    """The table in a text, `where` naming it in errors.

    Raises:
        InputError: a line that is none, named by its number.
    """
    parts: list[list[Row]] = [[]]
    for number, line in enumerate(text.splitlines(), start=1):
        fields = line.partition("#")[0].split()
        if fields == ["validation"] and len(parts) == 1:
            parts.append([])
        elif len(fields) > 5:
            raise InputError(f"{where} line {number}: {len(fields)} columns; there are task, split, rows, epochs, from")
        elif fields:
            parts[-1].append(_row(fields, f"{where} line {number}"))
    return Table(tuple(parts[0]), tuple(parts[1]) if len(parts) > 1 else ())


def with_task(rows: Sequence[Row], spec: str) -> list[Row]:
    """`NAME[:rows[:epochs]]` changes that task's row, or adds one; 0 rows take it out.

    Raises:
        InputError: it is malformed.
    """
    name, *numbers = spec.split(":")
    if len(numbers) > 2:
        raise InputError(f"--task {spec}: it is NAME, NAME:rows or NAME:rows:epochs")
    wanted = _row([name, "-", *numbers], f"--task {spec}")
    old = next((row for row in rows if row.task == name), None)
    if wanted.rows != 0:
        if old is None:
            return [*rows, wanted]
        wanted = dataclasses.replace(old, rows=wanted.rows, epochs=wanted.epochs)
        return [wanted if row is old else row for row in rows]
    return [row for row in rows if row.task != name]


def own_row(spec: str, epochs: int) -> Row:
    """The row of `FILE[:epochs]`.

    Raises:
        InputError: the file is no .jsonl file.
    """
    path, colon, times = spec.rpartition(":")
    if not colon or not times.isdigit():
        path, times = spec, str(epochs)
    if not path.endswith(".jsonl"):
        raise InputError(f"--conversations {spec}: not FILE.jsonl or FILE.jsonl:EPOCHS")
    return _row([path, "-", "-", times], f"--conversations {spec}")
