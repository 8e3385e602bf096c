"""A small evaluation bundle in the format of CORE: completions and choices in phrasings that training never has."""

from __future__ import annotations

import csv
import io
import json
import os
import random
import shutil
import tempfile
from pathlib import Path
from typing import Any

from nanochat.data.tinyworld import world
from nanochat.data.tinyworld.phrases import fill, statement_templates
from nanochat.data.tinyworld.relations import relation

NUM_ITEMS = 80
COLUMNS = (
    "Eval Task",
    "Task Category",
    "Task Type",
    "#shots",
    "#datapoints",
    "Random baseline",
    "Centered Metric?",
    "Description",
)
Item = dict[str, Any]

# label -> (item format, relations, random baseline in percent, what it asks)
TASKS: dict[str, tuple[str, tuple[str, ...], int, str]] = {
    "tinyworld_places": (
        "language_modeling",
        ("capital", "country", "continent"),
        0,
        "Complete a fact about a country.",
    ),
    "tinyworld_calendar": (
        "language_modeling",
        ("next_day", "previous_day", "next_month", "previous_month", "tomorrow_from_yesterday"),
        0,
        "Complete a fact about days and months.",
    ),
    "tinyworld_words": (
        "language_modeling",
        ("opposite", "plural", "past"),
        0,
        "Complete an opposite, a plural or a past tense.",
    ),
    "tinyworld_equations": ("language_modeling", ("equation",), 0, "Solve an equation that training does not have."),
    "tinyworld_science_mc": (
        "multiple_choice",
        ("symbol", "element", "planet_number", "color", "sides"),
        25,
        "Choose the end of a fact of science.",
    ),
    "tinyworld_animals_mc": (
        "multiple_choice",
        ("sound", "young", "home", "legs", "animal_class"),
        25,
        "Choose the end of a fact about an animal.",
    ),
    "tinyworld_subjects": (
        "schema",
        ("capital", "symbol", "opposite", "next_month"),
        50,
        "Choose the beginning that fits an end.",
    ),
}


def _draw(rng: random.Random, names: tuple[str, ...]) -> tuple[Any, str, str, str]:
    """(relation, subject, answer, held-out statement up to its answer)."""
    found = relation(rng.choice(names))
    subject, answer = rng.choice(world.HELD_OUT_EQUATIONS if found.name == "equation" else found.facts)
    template = rng.choice([t for t in statement_templates(found, "test") if t.endswith(("{o}.", "{ao}."))])
    ending = "{ao}." if template.endswith("{ao}.") else "{o}."
    prompt = fill(template[: -len(ending)], subject, answer).rstrip()
    return found, subject, answer, prompt


def _completion(rng: random.Random, names: tuple[str, ...]) -> Item:
    _, _, answer, prompt = _draw(rng, names)
    return {"context": prompt, "continuation": answer}


def _choice(rng: random.Random, names: tuple[str, ...]) -> Item:
    found, _, answer, prompt = _draw(rng, names)
    choices = [answer, *rng.sample([o for o in found.pool if o != answer], 3)]
    rng.shuffle(choices)
    gold = choices.index(answer)
    if "{ao}" in found.said:
        choices = [world.article(choice) for choice in choices]
    return {"query": prompt, "choices": choices, "gold": gold}


def _schema(rng: random.Random, names: tuple[str, ...]) -> Item:
    """Which of two beginnings goes with the end: "The capital of Italy" or "... of Spain" before "is Rome."?"""
    found = relation(rng.choice(names))
    (subject, answer), (other, _) = rng.sample(found.facts, 2)
    template = rng.choice([t for t in statement_templates(found, "test") if t.endswith(" is {o}.")])
    start = template.removesuffix(" is {o}.")
    gold = rng.randrange(2)
    subjects = (subject, other) if gold == 0 else (other, subject)
    options = [fill(start, s) for s in subjects]
    return {"context_options": options, "continuation": f"is {answer}.", "gold": gold}


_MAKERS = {"language_modeling": _completion, "multiple_choice": _choice, "schema": _schema}


def task_items(label: str) -> list[Item]:
    """The items of one task: all different, always the same."""
    kind, names, _, _ = TASKS[label]
    rng = random.Random(f"tinyworld bundle {label}")
    items: dict[str, Item] = {}
    for _ in range(100 * NUM_ITEMS):
        item = _MAKERS[kind](rng, names)
        items.setdefault(json.dumps(item, sort_keys=True), item)
        if len(items) == NUM_ITEMS:
            break
    return list(items.values())


def _files() -> dict[str, str]:
    """Every file of the bundle by its relative name."""
    yaml, table = ["icl_tasks:"], io.StringIO()
    writer = csv.writer(table, lineterminator="\n")
    writer.writerow(COLUMNS)
    files: dict[str, str] = {}
    for label, (kind, _, baseline, about) in TASKS.items():
        items = task_items(label)
        uri = f"tinyworld/{label}.jsonl"
        yaml += ["-", f"  label: {label}", f"  dataset_uri: {uri}", "  num_fewshot: [0]", f"  icl_task_type: {kind}"]
        writer.writerow((label, "tinyworld", kind.replace("_", " "), 0, len(items), baseline, "", about))
        files[f"eval_data/{uri}"] = "".join(json.dumps(item) + "\n" for item in items)
    return files | {"eval_meta_data.csv": table.getvalue(), "core.yaml": "\n".join(yaml) + "\n"}


def write_core_bundle(directory: str | Path) -> Path:
    """Write core.yaml, eval_meta_data.csv and eval_data/ into `directory`; it appears whole or not at all.

    A folder that already holds exactly these files stays as it is; another bundle of ours is replaced.
    """
    directory = Path(directory)
    files = _files()
    if all(
        (directory / name).is_file() and (directory / name).read_text(encoding="utf-8") == text
        for name, text in files.items()
    ):
        return directory
    directory.parent.mkdir(parents=True, exist_ok=True)
    fresh = Path(tempfile.mkdtemp(prefix=f".{directory.name}-", dir=directory.parent))
    try:
        fresh.chmod(0o755)  # mkdtemp makes it private
        for name, text in files.items():
            path = fresh / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
        if directory.exists():
            old = fresh.with_name(f"{fresh.name}-old")
            os.rename(directory, old)
            os.rename(fresh, directory)
            shutil.rmtree(old)
        else:
            os.rename(fresh, directory)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
    return directory
