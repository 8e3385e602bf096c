"""The examples of a CORE task as token arrays, made once and kept in <base>/core_requests/.

A file is named by what decides its content: the tokenizer, the items, how many of them are evaluated, and the rules.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from nanochat.environment import base_dir, print0
from nanochat.evals.bundle import CoreTask
from nanochat.evals.core_rules import (
    Example,
    Item,
    Prompt,
    common_prefix,
    fewshot_indices,
    render_prompts,
    right_answer,
    scored_spans,
)

VERSION = 1  # of the rules and of the file: a change makes all files anew
EXAMPLES_AT_ONCE = 512  # tokenized together; all of a task would fill the memory with its texts
FILES_KEPT = 4  # of a task, the last used: for other tokenizers and other numbers of examples


@dataclass(frozen=True)
class Requests:
    """A task's examples, each as the tokens that its E options share and what each has beyond them.

    tokens: (N,) of the smallest type that holds the vocabulary, example after example: shared, then each rest.
    num_options, shared: (E,) int64. rest, start: (M,) int64, a prompt each. gold: (E,) int64.
    """

    kind: str
    tokens: np.ndarray
    num_options: np.ndarray
    shared: np.ndarray
    rest: np.ndarray
    start: np.ndarray
    gold: np.ndarray

    def __len__(self) -> int:
        return len(self.gold)

    @cached_property
    def first_prompt(self) -> np.ndarray:
        """(E + 1,) where each example's prompts begin."""
        return np.concatenate([[0], np.cumsum(self.num_options)])

    @cached_property
    def first_token(self) -> np.ndarray:
        """(E + 1,) where each example's tokens begin."""
        sizes = self.shared + np.add.reduceat(self.rest, self.first_prompt[:-1])
        return np.concatenate([[0], np.cumsum(sizes)])

    def sizes(self) -> tuple[np.ndarray, np.ndarray]:
        """(E,) tokens of each example's longest prompt, and of its longest answer."""
        lengths = np.repeat(self.shared, self.num_options) + self.rest
        firsts = self.first_prompt[:-1]
        return np.maximum.reduceat(lengths, firsts), np.maximum.reduceat(lengths - self.start, firsts)

    def example(self, index: int) -> Example:
        first, last = self.first_prompt[index : index + 2]
        at, end = self.first_token[index : index + 2]
        ids = self.tokens[at:end].astype(np.int64)
        head, at, prompts = ids[: self.shared[index]], int(self.shared[index]), []
        for m in range(first, last):
            prompts.append(Prompt(np.concatenate([head, ids[at : at + self.rest[m]]]), int(self.start[m])))
            at += self.rest[m]
        return Example(self.kind, tuple(prompts), int(self.gold[index]))


def make_requests(task: CoreTask, items: Sequence[Item], num_examples: int, tokenizer: Any) -> Requests:
    """Tokenize the first `num_examples` of the shuffled items."""
    dtype = np.uint16 if tokenizer.get_vocab_size() <= 2**16 else np.int32
    bos = tokenizer.get_bos_token_id()
    tokens: list[np.ndarray] = []
    columns: dict[str, list[int]] = {name: [] for name in ("num_options", "shared", "rest", "start", "gold")}
    for first in range(0, num_examples, EXAMPLES_AT_ONCE):
        indices = range(first, min(first + EXAMPLES_AT_ONCE, num_examples))
        rendered = []
        for index in indices:
            shots = [items[i] for i in fewshot_indices(index, task.num_fewshot, num_examples, len(items))]
            rendered.append(render_prompts(task, items[index], shots))
        encoded = iter(tokenizer.encode_to_arrays([text for texts in rendered for text in texts], prepend=bos))
        for index, texts in zip(indices, rendered, strict=True):
            prompts = scored_spans(task.kind, [next(encoded) for _ in texts])
            shared = common_prefix([p.ids for p in prompts])
            tokens += [
                np.asarray(prompts[0].ids[:shared], dtype),
                *(np.asarray(p.ids[shared:], dtype) for p in prompts),
            ]
            columns["num_options"].append(len(prompts))
            columns["shared"].append(shared)
            columns["rest"] += [len(p.ids) - shared for p in prompts]
            columns["start"] += [p.start for p in prompts]
            columns["gold"].append(right_answer(task.kind, items[index]))
    arrays = {name: np.array(column, np.int64) for name, column in columns.items()}
    return Requests(task.kind, np.concatenate(tokens), **arrays)


def get_requests(task: CoreTask, items: Sequence[Item], num_examples: int, tokenizer: Any) -> Requests:
    """make_requests, from its file if there is a whole one; several processes may call it at once."""
    key = _key(task, items, num_examples, tokenizer)
    path = base_dir() / "core_requests" / f"{task.label}-{key[:20]}.safetensors"
    if (found := _load(path, task.kind)) is not None:
        return found
    requests = make_requests(task, items, num_examples, tokenizer)
    try:
        _save(path, requests)
        for old in sorted(path.parent.glob(f"{task.label}-*"), key=_last_use)[:-FILES_KEPT]:
            old.unlink(missing_ok=True)
    except (OSError, SafetensorError) as error:  # a full or read-only disk costs time, not the evaluation
        print0(f"The examples of {task.label} could not be kept in {path.parent}: {error}")
    return requests


def _key(task: CoreTask, items: Sequence[Item], num_examples: int, tokenizer: Any) -> str:
    rules = [VERSION, tokenizer.fingerprint, task.kind, task.num_fewshot, task.delimiter, num_examples]
    digest = hashlib.sha256(json.dumps(rules).encode())
    digest.update(json.dumps(items).encode())
    return digest.hexdigest()


def _columns(requests: Requests) -> dict[str, np.ndarray]:
    names = ("tokens", "num_options", "shared", "rest", "start", "gold")
    return {name: getattr(requests, name) for name in names}


def _digest(arrays: dict[str, np.ndarray]) -> str:
    digest = hashlib.sha256()
    for name in sorted(arrays):
        digest.update(np.ascontiguousarray(arrays[name]).data)
    return digest.hexdigest()


def _save(path: Path, requests: Requests) -> None:
    """The file appears whole or not at all."""
    arrays = _columns(requests)
    path.parent.mkdir(exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        save_file(arrays, temporary, metadata={"sha256": _digest(arrays)})
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _load(path: Path, kind: str) -> Requests | None:
    """None: not there, or damaged."""
    try:
        with safe_open(path, framework="numpy") as file:
            arrays = {name: file.get_tensor(name) for name in file.keys()}
            if _digest(arrays) != (file.metadata() or {}).get("sha256"):
                return None
        path.touch()  # see FILES_KEPT
    except (OSError, SafetensorError):
        return None
    return Requests(kind, **arrays)


def _last_use(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:  # another process removed it
        return 0.0
