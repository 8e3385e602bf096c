"""Tasks, results that outlast them, and what the benchmarks print."""

from __future__ import annotations

import ast
import hashlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, ThreadPoolExecutor, wait
from dataclasses import dataclass
from functools import cache
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from nanochat.config import InputError
from nanochat.environment import base_dir

ROOT = Path(__file__).parents[1]


@dataclass(frozen=True)
class Task:
    """Work whose result is kept. `spec` is all that decides it, JSON-able; `cost` is in any unit of time."""

    label: str
    spec: dict[str, Any]
    work: Callable[[], dict[str, Any]]
    cost: float = 1.0

    @property
    def kind(self) -> str:
        return str(self.spec["kind"])

    @property
    def key(self) -> str:
        """Of the spec alone, not of the code: a comment must not throw hours away. See `code_digest`."""
        return hashlib.sha256(json.dumps(self.spec, sort_keys=True).encode()).hexdigest()[:16]


class Results:
    """A file of one JSON line per finished task; the last line of a key counts, and half a line is no line."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        self.code = code_digest()
        self.lines: dict[str, dict[str, Any]] = {}
        for line in path.read_bytes().splitlines() if path.exists() else ():
            try:
                record = json.loads(line)
                self.lines[record["key"]] = record
            except (ValueError, KeyError, TypeError):
                continue  # cut off by a kill

    def get(self, task: Task) -> dict[str, Any] | None:
        found = self.lines.get(task.key)
        return None if found is None else found["result"]

    def is_stale(self, task: Task) -> bool:
        """Whether the result was made by other code than today's."""
        return task.key in self.lines and self.lines[task.key]["code"] != self.code

    def slowest(self, tasks: Sequence[Task]) -> dict[str, float]:
        """Most seconds for a unit of cost that a finished task of their kind took on their machine, by kind."""
        known: dict[str, float] = {}
        alike = {(task.kind, task.spec.get("machine")) for task in tasks}
        for record in self.lines.values():
            kind = record["spec"]["kind"]
            if "seconds" in record and (kind, record["spec"].get("machine")) in alike:  # older records have none
                known[kind] = max(known.get(kind, 0.0), record["seconds"] / record["cost"])
        return known

    def add(self, task: Task, result: dict[str, Any], seconds: float | None = None) -> None:
        now = time.strftime("%Y-%m-%d %H:%M:%S")
        record: dict[str, Any] = {"key": task.key, "code": self.code, "time": now, "label": task.label}
        record |= {"spec": task.spec, "result": result}
        if seconds is not None:
            record |= {"seconds": seconds, "cost": task.cost}
        torn = self.path.exists() and not self.path.read_bytes().endswith(b"\n") and self.path.stat().st_size > 0
        with self.path.open("ab") as file:
            file.write(b"\n" * torn + json.dumps(record).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())
        self.lines[task.key] = record


@cache
def code_digest() -> str:
    """Of the code that a training run consists of, without comments, docstrings and layout: the modules that model,
    optimizer, loop, loader and bpb import, and bench/common.py and packed.py."""
    todo = ["gpt", "optim", "trainer", "data.loader", "evals.bpb"]
    seen = {f"bench.{name}": _code(ROOT / "bench" / f"{name}.py") for name in ("common", "packed")}
    while todo:
        name = todo.pop()
        path = ROOT / "nanochat" / (name.replace(".", "/") + ".py")
        if name in seen or not path.is_file():
            continue
        seen[name] = _code(path)
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "nanochat":
                inner = node.module.removeprefix("nanochat").lstrip(".")
                todo += [inner, *(f"{inner}.{alias.name}".lstrip(".") for alias in node.names)]
    return hashlib.sha256("".join(seen[name] for name in sorted(seen)).encode()).hexdigest()[:12]


def _code(path: Path) -> str:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if (
            isinstance(body, list)
            and body
            and isinstance(body[0], ast.Expr)
            and isinstance(body[0].value, ast.Constant)
        ):
            node.body = body[1:]  # type: ignore[attr-defined]
    return ast.dump(tree)


def in_child(work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """In a process of its own: peak memory and compiled code are that run's, and a crash ends that run only."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(work).result()


def run_all(
    tasks: Sequence[Task],
    results: Results,
    *,
    jobs: int = 1,
    time_limit: float | None = None,
    fresh: bool = False,
) -> int:
    """Run the tasks that have no result yet, in order, `jobs` at a time; 0 jobs = in this process.

    Args:
        time_limit: minutes; no task is started that would end later, by the speed of those of its kind before it, in
            this call or an earlier one.
        fresh: run again what other code than today's made.

    Returns:
        How many are left: not started in time, or crashed.
    """
    unique = {task.key: task for task in tasks}
    todo = [t for t in unique.values() if results.get(t) is None or (fresh and results.is_stale(t))]
    stale = sum(results.is_stale(t) for t in unique.values()) if not fresh else 0
    if stale:
        print(f"{stale} results in {results.path} are of other code, marked * (--fresh makes them again)", flush=True)
    begun, done_cost, done_seconds = time.perf_counter(), 0.0, 0.0
    left, queue = len(todo), list(todo)
    running: dict[Future[tuple[dict[str, Any], float]], Task] = {}
    slowest = results.slowest(todo)
    with ThreadPoolExecutor(max(1, jobs)) as pool:
        while queue or running:
            while queue and len(running) < max(1, jobs):
                expected = slowest.get(queue[0].kind, 0.0) * queue[0].cost
                if time_limit is not None and time.perf_counter() - begun + expected > 60 * time_limit:
                    print(f"time limit of {time_limit:.1f} min: {len(queue)} tasks not started, the next takes about "
                          f"{expected / 60:.1f} min; run it again", flush=True)  # fmt: skip
                    queue.clear()
                    break
                task = queue.pop(0)
                running[pool.submit(_timed, task, jobs > 0)] = task
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                task = running.pop(future)
                try:
                    result, seconds = future.result()
                except Exception as error:  # whatever one task dies of, the others of the night go on
                    print(f"FAILED {task.label}: {type(error).__name__} {str(error).splitlines()[:1]}", flush=True)
                    continue
                results.add(task, result, seconds)
                left, done_cost, done_seconds = left - 1, done_cost + task.cost, done_seconds + seconds
                slowest[task.kind] = max(slowest.get(task.kind, 0.0), seconds / task.cost)
                ahead = sum(t.cost for t in (*queue, *running.values())) * done_seconds / done_cost / max(1, jobs)
                shown = f"bpb {result['bpb']:.4f}, " if isinstance(result.get("bpb"), float) else ""
                done = f"[{len(todo) - left}/{len(todo)}] {task.label}"
                print(f"{done}: {shown}{seconds:.0f} s | eta {ahead / 60:.1f} min", flush=True)
    return left


def _timed(task: Task, isolated: bool) -> tuple[dict[str, Any], float]:
    t0 = time.perf_counter()
    if isolated:
        return in_child(task.work), time.perf_counter() - t0
    if "torch._dynamo" in sys.modules:  # else nothing was compiled, and importing it takes seconds
        torch.compiler.reset()  # many models in one process would use up the compiler's cache and fall back to eager
    return task.work(), time.perf_counter() - t0


def numbers(name: str, text: str, least: int | None = None) -> list[int]:
    """ "4,6" -> [4, 6]; with `least` there is one, and none is below it."""
    try:
        found = [int(part) for part in text.split(",") if part.strip()]
    except ValueError:
        raise InputError(f"--{name} {text!r} is no list of numbers; write it like --{name}=4,6") from None
    if least is not None and (not found or min(found) < least):
        near = ",".join(str(max(least, number)) for number in found) or least
        raise InputError(f"--{name} {text!r} must be numbers from {least} on; try --{name}={near}")
    return found


def words(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def default_results(name: str) -> Path:
    return base_dir() / "bench" / f"{name}.jsonl"


def table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """Markdown; numbers are set right."""
    body = [[str(cell) for cell in row] for row in rows]
    is_number = [
        all(row[i][:1] in "-+0123456789*" or not row[i] for row in body) and bool(body) for i in range(len(head))
    ]
    print("\n| " + " | ".join(head) + " |\n|" + "|".join("---:" if right else "---" for right in is_number) + "|")
    for row in body:
        print("| " + " | ".join(row) + " |")
    print(flush=True)


def finish(facts: dict[str, Any]) -> None:
    """The one JSON line, last."""
    print(json.dumps(facts), flush=True)
