"""What a chat model was asked, what it answered, and what was made of it: one JSON line a problem.

The files are for people to read, and for joining two models' answers problem by problem.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from nanochat.config import InputError
from nanochat.evals.stats import Paired
from nanochat.tokenizer import write_text

# Nothing but RIGHT counts as solved. EMPTY: the model wrote nothing, so no rule was asked.
RIGHT, WRONG, EMPTY, GRADER_ERROR = "right", "wrong", "empty", "grader error"


@dataclass(frozen=True)
class Answer:
    """One answer, and what the task's rule said of it."""

    text: str
    verdict: str
    num_tokens: int = 0
    hit_limit: bool = False  # it had not ended when its tokens, or the model's positions, were used up
    beyond_context: bool = False  # with its prompt longer than the context that the model was trained with
    lenient: bool | None = None  # what the kinder rule said, where there is one
    letter: str | None = None  # the letter that was read out of it, where the task has letters
    error: str | None = None  # why there is no verdict
    letter_probs: dict[str, float] | None = None  # categorical: among the letters alone


@dataclass(frozen=True)
class Record:
    """One problem. (task, index) names it within a data set; `id` is a hash of the problem itself."""

    task: str
    index: int
    id: str
    passed: bool  # any of the answers is right
    gold: str
    answers: list[Answer]
    prompt: str = ""  # as text, special tokens by name; left out where no file is written
    num_prompt_tokens: int = 0
    cropped: bool = False  # the prompt was longer than the context and lost its beginning
    letters: list[str] = field(default_factory=list)
    subject: str | None = None

    @property
    def num_right(self) -> int:
        return sum(answer.verdict == RIGHT for answer in self.answers)

    @property
    def lenient(self) -> bool:
        return any(answer.lenient for answer in self.answers)


def problem_id(conversation: Mapping[str, Any]) -> str:
    """12 hex digits of the SHA-256 of a conversation, the same on every machine."""
    return hashlib.sha256(json.dumps(conversation, sort_keys=True, default=str).encode()).hexdigest()[:12]


def to_line(record: Record) -> str:
    """JSON without what is unset, so that a person sees what there is; prompt and answers last, as they are long."""
    values = {k: v for k, v in asdict(record).items() if v not in (None, [])}
    values["answers"] = [{k: v for k, v in asdict(a).items() if v is not None} for a in record.answers]
    for key in ("prompt", "answers"):
        values[key] = values.pop(key)
    return json.dumps(values, ensure_ascii=False, allow_nan=False)


def write(path: Path, records: Iterable[Record]) -> None:
    """One line a problem; the file is the old one or the whole new one.

    Raises:
        InputError: it cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, "".join(to_line(record) + "\n" for record in records))
    except OSError as error:
        raise InputError(
            f"cannot write the answers to {path}: {error.strerror}; make room or set NANOCHAT_BASE_DIR"
        ) from None


def read(path: Path) -> list[Record]:
    """
    Raises:
        InputError: no such file, or a line that is no record; it is named by its number.
    """
    try:
        lines = path.read_text(encoding="utf-8").split("\n")  # not splitlines: the texts hold U+2028 and the like
    except OSError as error:
        raise InputError(
            f"no answers to read at {path} ({error.strerror}); run scripts.chat_eval on that stage, with the same "
            "tasks and settings, first"
        ) from None
    known = {f.name for f in fields(Record)}
    records = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            values = json.loads(line)
            values["answers"] = [Answer(**answer) for answer in values["answers"]]
            records.append(Record(**{k: v for k, v in values.items() if k in known}))
        except (ValueError, TypeError, KeyError) as error:
            raise InputError(f"{path} line {number}: no record of chat_eval ({error})") from None
    return records


def join(first: Sequence[Record], second: Sequence[Record]) -> list[tuple[Record, Record]]:
    """The problems that both have, by task and index.

    Raises:
        InputError: they share none, or a number stands for different problems.
    """
    by_key = {(r.task, r.index): r for r in first}
    pairs = [(by_key[key], r) for r in second if (key := (r.task, r.index)) in by_key]
    if not pairs:
        raise InputError("the two evaluations share no problem; evaluate both on the same tasks")
    for a, b in pairs:
        if a.id != b.id:
            raise InputError(
                f"problem {b.index} of {b.task} is {a.id} in one evaluation and {b.id} in the other: their data "
                "differ; evaluate both again on the same data"
            )
    return pairs


def compare(first: Sequence[Record], second: Sequence[Record]) -> Paired:
    """How often each alone solves a problem that both were asked. Raises: see join()."""
    cells = Counter((a.passed, b.passed) for a, b in join(first, second))
    return Paired(cells[True, True], cells[True, False], cells[False, True], cells[False, False])


def show(records: Sequence[Record], num: int) -> str:
    """The first `num` solved problems and the first `num` others, for a terminal."""
    solved = [r for r in records if r.passed][:num]
    others = [r for r in records if not r.passed][:num]
    lines = []
    for r in solved + others:
        lines += [f"--- {r.task} {r.index}: {'solved' if r.passed else 'not solved'}", r.prompt]
        lines += [f"[{a.verdict}] {a.text}" for a in r.answers]
        lines += [f"[reference] {r.gold}"]
    return "\n".join(lines)
