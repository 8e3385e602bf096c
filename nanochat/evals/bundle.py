"""The CORE evaluation bundle: which tasks, with which shots, delimiters, data and random baselines.

A bundle is a folder or a .zip with core.yaml, eval_meta_data.csv and eval_data/*.jsonl. The 22 CORE tasks are
the "low variance" list of DCLM (Li et al. 2024, arXiv 2406.11794) with its first table of baselines.
"""

from __future__ import annotations

import csv
import io
import json
import shutil
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch.distributed as dist
import yaml
from filelock import FileLock

from nanochat.config import InputError
from nanochat.environment import base_dir, hub_dir, print0
from nanochat.runtime import barrier

BUNDLE_URL = "https://karpathy-public.s3.us-west-2.amazonaws.com/eval_bundle.zip"  # about 162 MB
CORE_LABELS = (
    "hellaswag_zeroshot",
    "jeopardy",
    "bigbench_qa_wikidata",
    "arc_easy",
    "arc_challenge",
    "copa",
    "commonsense_qa",
    "piqa",
    "openbook_qa",
    "lambada_openai",
    "hellaswag",
    "winograd",
    "winogrande",
    "bigbench_dyck_languages",
    "agi_eval_lsat_ar",
    "bigbench_cs_algorithms",
    "bigbench_operators",
    "bigbench_repeat_copy_logic",
    "squad",
    "coqa",
    "boolq",
    "bigbench_language_identification",
)
KINDS = ("multiple_choice", "schema", "language_modeling")
OPTIONS = {"multiple_choice": "choices", "schema": "context_options"}  # the field of a kind's options


@dataclass(frozen=True)
class CoreTask:
    """One task of a bundle. `baseline` is the accuracy of guessing, 0 to 1."""

    label: str
    kind: str  # one of KINDS
    num_fewshot: int
    delimiter: str  # between a question and its answer
    baseline: float
    read: Callable[[], list[dict[str, Any]]]  # the items, in file order


@dataclass(frozen=True)
class Bundle:
    name: str  # "tinyworld" or the name of the folder or file
    tasks: tuple[CoreTask, ...]

    @property
    def metric_name(self) -> str:
        """Under which name the mean is printed: only all 22 tasks are CORE, and tinyworld never is."""
        labels = {task.label for task in self.tasks}
        if self.name == "tinyworld":
            return "CORE tinyworld"
        if not labels <= set(CORE_LABELS):
            return f"CORE custom ({self.name})"
        if len(labels) < len(CORE_LABELS):
            return f"CORE metric ({len(labels)} of {len(CORE_LABELS)} tasks)"
        return "CORE metric"


def _reader(path: Path) -> tuple[Callable[[str], str], Callable[[str], bool]]:
    """(read the text of a file, does a file exist) by its name inside a bundle folder or zip."""
    if path.is_dir():
        return lambda name: (path / name).read_text(encoding="utf-8"), lambda name: (path / name).is_file()
    try:
        names = set(zipfile.ZipFile(path).namelist())
    except (OSError, zipfile.BadZipFile):
        raise InputError(f"--bundle {path} is neither a folder nor a zip file") from None
    tops = [name.removesuffix("core.yaml") for name in names if name.split("/")[-1] == "core.yaml"]
    top = min(tops, key=len, default="")

    def read(name: str) -> str:
        with zipfile.ZipFile(path) as archive:
            return archive.read(top + name).decode("utf-8")

    return read, lambda name: top + name in names


def _read_items(read: Callable[[str], str], name: str, kind: str, where: str) -> list[dict[str, Any]]:
    items = []
    # split at \n only: the texts hold other line separators, such as U+2028
    for number, line in enumerate(read(name).split("\n"), 1):
        if line.strip():
            try:
                item = json.loads(line)
                check_item(kind, item)
            except ValueError as error:  # an InputError is one
                what = error if isinstance(error, InputError) else "no JSON"
                raise InputError(f"line {number} of {name} ({where}): {what}; mend or remove it") from None
            items.append(item)
    if not items:
        raise InputError(f"{name} ({where}) has no line; fetch it again or remove the task from core.yaml")
    return items


def check_item(kind: str, item: Any) -> None:
    """
    Raises:
        InputError: the item lacks what its kind of task is scored by.
    """
    if not isinstance(item, dict):
        raise InputError("no JSON object")
    options = OPTIONS.get(kind)
    texts = {"multiple_choice": ("query",), "schema": ("continuation",)}.get(kind, ("context", "continuation"))
    for field in texts:
        if not isinstance(item.get(field), str) or (field == "continuation" and not item[field]):
            raise InputError(f"no text {field!r}")
    if options is not None:
        found, gold = item.get(options), item.get("gold")
        if not isinstance(found, list) or len(found) < 2 or not all(isinstance(text, str) for text in found):
            raise InputError(f"{options!r} is no list of two texts or more")
        if type(gold) is not int or not 0 <= gold < len(found):
            raise InputError(f"'gold' {gold} is no number from 0 to {len(found) - 1}")


def _entries(text: str, path: Path) -> list[dict[str, Any]]:
    """The tasks of core.yaml."""
    try:
        entries = (yaml.safe_load(text) or {}).get("icl_tasks")
    except (yaml.YAMLError, AttributeError):
        raise InputError(f"core.yaml in {path} is no YAML table; fetch the bundle again") from None
    if not isinstance(entries, list) or not entries:
        raise InputError(f"core.yaml in {path} has no list icl_tasks; fetch the bundle again")
    for number, entry in enumerate(entries, 1):
        for field in ("label", "dataset_uri", "icl_task_type", "num_fewshot"):
            if not isinstance(entry, dict) or field not in entry:
                raise InputError(f"task {number} in core.yaml of {path} has no {field}; add it or remove the task")
    return entries


def _baselines(text: str, path: Path) -> dict[str, float]:
    """The accuracy of guessing, 0 to 1, by task label."""
    rows = csv.DictReader(io.StringIO(text))
    if not {"Eval Task", "Random baseline"} <= set(rows.fieldnames or ()):
        raise InputError(f"eval_meta_data.csv in {path} has no columns Eval Task and Random baseline; fetch it again")
    found = {}
    for row in rows:
        try:
            percent = float(row["Random baseline"])
        except (TypeError, ValueError):
            percent = -1.0
        if not 0 <= percent < 100:
            raise InputError(
                f"the random baseline of {row['Eval Task']} in {path}/eval_meta_data.csv is "
                f"{row['Random baseline']!r}; give percent, 0 to below 100"
            )
        found[row["Eval Task"]] = percent / 100
    return found


def read_bundle(path: str | Path, name: str | None = None) -> Bundle:
    """The tasks that core.yaml lists, in its order; their data is read later.

    Raises:
        InputError: no bundle there, a task without a data file or a baseline, or of an unknown type.
    """
    path = Path(path)
    if not path.exists():
        raise InputError(f"--bundle {path} does not exist; give the folder or zip of an evaluation bundle")
    read, exists = _reader(path)
    for needed in ("core.yaml", "eval_meta_data.csv"):
        if not exists(needed):
            raise InputError(f"no {needed} in {path}; give the folder or zip of an evaluation bundle")
    baselines = _baselines(read("eval_meta_data.csv"), path)
    tasks = []
    for entry in _entries(read("core.yaml"), path):
        label, kind, file = entry["label"], entry["icl_task_type"], f"eval_data/{entry['dataset_uri']}"
        if kind not in KINDS:
            raise InputError(f"task {label} in {path} has type {kind}; known are {', '.join(KINDS)}")
        if label not in baselines:
            raise InputError(f"task {label} has no row in {path}/eval_meta_data.csv; add its random baseline")
        if not exists(file):
            raise InputError(
                f"task {label} has no data file {file} in {path}; add it or remove the task from core.yaml"
            )
        shots, delimiter = entry["num_fewshot"][0], entry.get("continuation_delimiter", " ")
        read_items = partial(_read_items, read, file, kind, f"task {label} in {path}")
        tasks.append(CoreTask(label, kind, shots, delimiter, baselines[label], read_items))
    return Bundle(name or path.stem.removesuffix("_bundle"), tuple(tasks))


def open_bundle(path: str | None = None, dataset: str | None = None) -> Bundle:
    """The bundle to evaluate with: the one at `path`; for a model of the tinyworld data set tinyworld's own;
    else <base>/eval_bundle, the hub folder's, or the published one, downloaded.

    Every rank must call it.

    Args:
        path: a folder, a zip file, or "tinyworld".
        dataset: what the model was trained on (its checkpoint's user_config).
    """
    if path == "tinyworld" or (path is None and dataset == "tinyworld"):
        from nanochat.data.tinyworld import write_core_bundle

        directory = base_dir() / "tinyworld_bundle"
        if not dist.is_initialized() or dist.get_rank() == 0:
            write_core_bundle(directory)
        barrier()  # the others read it only when it is whole
        return read_bundle(directory, name="tinyworld")
    if path is not None:
        return read_bundle(path)
    hub = hub_dir()
    for candidate in (base_dir() / "eval_bundle", hub / "eval_bundle" if hub else None):
        if candidate is not None and (candidate / "core.yaml").exists():
            return read_bundle(candidate)
    return read_bundle(download_bundle(base_dir() / "eval_bundle"))


def download_bundle(directory: Path, url: str = BUNDLE_URL) -> Path:
    """Fetch and unpack the published bundle: the folder appears whole, every file's CRC verified, or not at
    all. The other ranks wait for the first."""
    import requests

    with FileLock(directory.with_name(directory.name + ".lock")):
        if (directory / "core.yaml").exists():
            return directory
        print0(f"downloading the evaluation bundle from {url}")
        with tempfile.TemporaryDirectory(dir=directory.parent, prefix=".eval_bundle.") as temporary:
            archive = Path(temporary) / "bundle.zip"
            try:
                with requests.get(url, stream=True, timeout=60) as response, archive.open("wb") as f:
                    response.raise_for_status()
                    for chunk in response.iter_content(1 << 20):
                        f.write(chunk)
            except requests.RequestException as error:
                raise InputError(
                    f"could not download {url} ({type(error).__name__}); give a copy with --bundle=PATH"
                ) from None
            unpack_bundle(archive, directory)
    return directory


def unpack_bundle(archive: Path, directory: Path) -> None:
    """Unpack beside `directory`, then rename. zipfile checks each file's CRC as it unpacks."""
    with tempfile.TemporaryDirectory(dir=directory.parent, prefix=".eval_bundle.") as temporary:
        try:
            with zipfile.ZipFile(archive) as z:
                z.extractall(temporary)
        except zipfile.BadZipFile as error:
            raise InputError(f"{archive.name} is damaged ({error}); fetch it again") from None
        tops = [p.parent for p in Path(temporary).rglob("core.yaml")]
        if not tops:
            raise InputError(f"{archive.name} holds no core.yaml; it is no evaluation bundle")
        if directory.exists():  # the rest of an unpacking by hand that was cut short
            shutil.rmtree(directory)
        min(tops, key=lambda p: len(p.parts)).rename(directory)
