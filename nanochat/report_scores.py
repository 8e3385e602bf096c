"""What the report says after its Summary in our own runs: which chat scores beat guessing, and which gains are real."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

SURE = " 95% interval"  # the key of an interval ends so; what stands before it is the task
INTERVAL = re.compile(r"([\d.]+) to ([\d.]+) \(\d+ of \d+\)")
EXPLAINED = """\
±: half of the 95% interval (Wilson). Random, majority: what guessing, and always giving the commonest right answer,
score on these questions. One stage over another: tested question by question (exact McNemar test, two-sided);
real = better, p < 0.05; worse = the same the other way; not shown = it may be chance."""

Columns = Mapping[str, Mapping[str, str]]  # column of the Summary (MID, SFT, RL) -> items of its chat evaluation


def format_scores(sections: Columns) -> str:
    """A table of scores, controls and gains, then the scores that are no better than guessing. "" where no chat
    evaluation says how sure its scores are."""
    columns = {name: items for name, items in sections.items() if any(key.endswith(SURE) for key in items)}
    tasks = sorted({k.removesuffix(SURE) for items in columns.values() for k in items if k.endswith(SURE)})
    if not tasks:
        return ""
    head = ["Task", "Random", "Majority"]
    for column, items in columns.items():
        earlier = _earlier(items)
        head += [column, f"{column} over {earlier.upper()}"] if earlier else [column]
    rows = [_row(task, columns) for task in tasks]
    table = "".join(f"| {' | '.join(cells)} |\n" for cells in (head, ["---"] * len(head), *rows))
    text = f"\n### Which gains are real\n\n{table}\n{EXPLAINED}"
    num_tests = sum("(p " in cell for row in rows for cell in row)
    if num_tests > 1:
        text += f" Chance alone\nshows a difference in up to 1 of 20 such tests; here are {num_tests}."
    return f"{text}\n{_near_chance(tasks, columns)}"


def _row(task: str, columns: Columns) -> list[str]:
    every = {key: value for items in columns.values() for key, value in items.items()}  # the latest stage's last
    majority = every.get(f"{task} always the commonest letter") or every.get(f"{task} always the commonest answer", "-")
    cells = [task, every.get(f"{task} random guess", "-"), majority]
    for items in columns.values():
        match = INTERVAL.fullmatch(items.get(task + SURE, ""))
        cells.append(f"{items[task]} ± {(float(match[2]) - float(match[1])) / 2:.4f}" if match else "-")
        if earlier := _earlier(items):
            line = items.get(f"{task} against {earlier}", "-")
            cells.append("not compared" if line.startswith("not compared") else line.rpartition("; ")[2])
    return cells


def _earlier(items: Mapping[str, str]) -> str | None:
    """The stage that an evaluation is compared with."""
    return next((key.rpartition(" against ")[2] for key in items if " against " in key), None)


def _near_chance(tasks: Sequence[str], columns: Columns) -> str:
    lines = []
    for task in tasks:
        for column, items in columns.items():
            word, _, why = items.get(f"{task} better than guessing", "").partition(": ")
            if word == "no":
                lines.append(f"- {task} after {column}: {items.get(task)} is {why}\n")
    if not lines:
        return ""
    return "\nNear chance or below it: these scores show no skill at the task.\n\n" + "".join(lines)
