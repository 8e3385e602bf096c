"""What midtraining and supervised fine-tuning train on: tables (see tasks/tables.py), ours or in a file of yours."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from nanochat.config import InputError
from nanochat.data.tinyworld.chitchat import IDENTITY
from nanochat.environment import print0
from tasks import tinyworld
from tasks.common import Task, TaskMixture
from tasks.customjson import CustomJSON
from tasks.reworded import Reworded, Wordings
from tasks.tables import Row, Table, own_row, parse_table, with_task

# The few rows that say who the model is must stick, so midtraining shows them twice; 996 has the reference's file.
TABLES = {
    ("mid", "real"): """
        SmolTalk        train
        MMLU            train
        GSM8K           train
        TinyIdentity    train       996     2
        SimpleSpelling  train       200000
        SpellingBee     train       80000
        validation
        SmolTalk        test
        MMLU            test        5200
        GSM8K           test        420
    """,
    ("sft", "real"): """
        ARC-Easy        train
        ARC-Challenge   train
        AQUA            train       20000
        GSM8K           train
        SmolTalk        train       10000
        TinyIdentity    train       996
        validation
        AQUA            validation  254
        SmolTalk        test        2000
    """,
    ("mid", "tinyworld"): """
        TinyFacts           train   14000
        TinySums            train   1500
        TinyWordProblems    train   2000
        TinySpelling        train   8000
        TinyMC              train   1500
        TinyIdentity        train   1200
        TinyStories         train   400
        TinyDialogue        train   1500
    """,
    # other conversations than midtraining's
    ("sft", "tinyworld"): """
        TinyFacts           train   6500    -   14000
        TinySums            train   500     -   1500
        TinyWordProblems    train   600     -   2000
        TinySpelling        train   5000    -   8000
        TinyMC              train   400     -   1500
        TinyIdentity        train   600     -   1200
        TinyStories         train   100     -   400
        TinyDialogue        train   300     -   1500
    """,
}
TINYWORLD_VALIDATION_ROWS = 100  # of each of its tasks, from the split dev
NAMES = ("real", "tinyworld")
NONE = "none"  # only what flags add
SFT_METRICS = {"real": ("MMLU", "ARC-Easy"), "tinyworld": ("TinyFacts", "TinyMC")}
OWN_EPOCHS = {"mid": 2, "sft": 1}
ABOUT_ITSELF = ("TinyIdentity", "TinyDialogue")  # tasks in which the model says who it is


@dataclass(frozen=True)
class Teach:
    """Your own conversations to a model that is through with the others."""

    replay: float = 4.0  # conversations as the mixture's, new ones where it can be, for each one of yours that is shown
    reword: bool = True  # a conversation's questions in other words each time, after the first

    @staticmethod
    def epochs(rows: int) -> int:
        """How often to show each of so many, where --conversations does not say: ten 120 times, a hundred 40."""
        return min(120, max(4, round(4000 / rows)))


@dataclass(frozen=True)
class Mixture:
    train: Task
    own: Sequence[CustomJSON]
    facts: dict[str, str]  # the table as it was used, for the report
    validation: tuple[Row, ...]

    def describe(self) -> str:
        return ", ".join(f"{name} {rows}" for name, rows in self.facts.items())

    def open_validation(self) -> TaskMixture:
        return TaskMixture([row.open() for row in self.validation for _ in range(row.epochs)])


def name_for(dataset: str | None) -> str:
    """The mixture that goes with a base model's data set."""
    return "tinyworld" if dataset == "tinyworld" else "real"


def read_table(stage: str, mixture: str, default: str) -> Table:
    """The table of a name or in a file. Where it has no validation, that of the default's name is taken.

    Raises:
        InputError: neither a name nor a file, or a malformed one.
    """
    if mixture in NAMES:
        table = parse_table(TABLES[stage, mixture], mixture)
    elif mixture == NONE:
        table = Table((), ())
    else:
        if not Path(mixture).is_file():
            raise InputError(f"--mixture {mixture}: no such file, and there are {', '.join(NAMES)} and {NONE}")
        try:
            table = parse_table(Path(mixture).read_text(encoding="utf-8-sig"), mixture)
        except UnicodeDecodeError as error:
            raise InputError(f"--mixture {mixture}: no UTF-8 text ({error.reason} at byte {error.start})") from None
    if table.validation:
        return table
    if "tinyworld" in (mixture, default):
        rows = [Row(task.__name__, "dev", TINYWORLD_VALIDATION_ROWS) for task in tinyworld.TASKS]
        return Table(table.train, tuple(rows))
    return Table(table.train, parse_table(TABLES[stage, default], default).validation)


def says_who_it_is(task: Iterable[dict]) -> bool:
    """Whether someone asks in these conversations who the model is."""
    known = {saying.lower() for intent in IDENTITY for saying in intent.sayings}
    return any(m["role"] == "user" and m["content"].strip().lower() in known for c in task for m in c["messages"])


def _showings(task: Task, times: int, reword: bool) -> list[Task]:
    """The task as often as it is shown: the first time as it is."""
    if not reword or times < 2:
        return [task] * times
    wordings = Wordings(task)
    return [task, *(Reworded(task, wordings, number) for number in range(1, times))]


def open_mixture(
    stage: str,
    default: str,
    mixture: str | None = None,
    tasks: Sequence[str] = (),
    conversations: Sequence[str] = (),
    rows: dict[str, int] | None = None,
    teach: Teach | None = None,
) -> Mixture:
    """What a stage trains and validates on.

    Args:
        stage: "mid" or "sft".
        default: the name that goes with the base model's data.
        mixture: a name of NAMES, NONE or a file; None = the default.
        tasks, conversations: the flags --task and --conversations.
        rows: "task split" -> rows, of the tables of ours.
        teach: how your own conversations are shown; None = as they are, among all others.

    Raises:
        InputError: any of it is malformed, or data cannot be had.
    """
    table = read_table(stage, mixture or default, default)
    chosen, validation = [row.fresh() if teach else row for row in table.train], table.validation
    if (mixture or default) in NAMES and rows:

        def sized(some: Iterable[Row]) -> list[Row]:
            wanted = [dataclasses.replace(r, rows=rows.get(f"{r.task} {r.split}", r.rows)) for r in some]
            return [r for r in wanted if r.rows != 0]

        chosen, validation = sized(chosen), tuple(sized(validation))
    for spec in tasks:
        chosen = with_task(chosen, spec)
    for spec in conversations:
        row = own_row(spec, OWN_EPOCHS[stage])
        if teach and spec == row.task:  # it does not say how often
            row = dataclasses.replace(row, epochs=teach.epochs(len(row.open())))
        chosen.append(row)
    own = {row: CustomJSON(row.task, **row.cut) for row in chosen if row.is_own}
    if any(row.task in ABOUT_ITSELF for row in chosen) and any(map(says_who_it_is, own.values())):
        chosen = [row for row in chosen if row.task not in ABOUT_ITSELF]
        print0(f"Your conversations say who the model is, so {' and '.join(ABOUT_ITSELF)} are left out")
    opened = [(row, own[row] if row.is_own else row.open()) for row in chosen]
    if not any(len(task) for _, task in opened):
        raise InputError("the mixture is empty; add rows with --task or --conversations")
    facts = {row.name: f"{len(task):,} rows" + (f" x {row.epochs}" if row.epochs > 1 else "") for row, task in opened}
    yours = [(row, own[row]) for row in chosen if row.is_own]
    others = [task for row, task in opened if not row.is_own for _ in range(row.epochs)]
    shown = [one for row, task in yours for one in _showings(task, row.epochs, teach is not None and teach.reword)]
    if teach and shown:
        replayed = TaskMixture(others, stop=round(teach.replay * sum(map(len, shown))))
        others = [replayed]
        facts["Of the others together"] = f"{len(replayed):,} rows"
    return Mixture(TaskMixture([*others, *shown]), [task for _, task in yours], facts, validation)
