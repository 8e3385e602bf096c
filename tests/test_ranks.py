"""What becomes of the other ranks when one fails, in an eval or for good."""

from __future__ import annotations

import gc
import itertools
import json
import os
import subprocess
import sys
import threading
import time
import traceback
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from nanochat import config, ranks, runtime
from nanochat.config import InputError, flag, run_cli
from nanochat.data.loader import PackingLoader
from nanochat.evals.bpb import evaluate_bpb
from nanochat.evals.bundle import Bundle, CoreTask
from nanochat.evals.chat import evaluate_task
from nanochat.evals.core import evaluate_core
from nanochat.ranks import RankError, RankInputError, together
from nanochat.runtime import Runtime

ROOT = Path(__file__).parent.parent


# together, in one process


def test_in_one_process_it_gives_the_value_or_the_error_with_its_cause():
    assert together(lambda: 7) == 7
    with pytest.raises(RankError, match=r"^ZeroDivisionError: division by zero$") as caught:
        together(lambda: 1 / 0)
    assert type(caught.value) is RankError and caught.value.ranks == (0,)
    assert isinstance(caught.value.__cause__, ZeroDivisionError)


def test_an_input_error_stays_one_that_ends_a_stage_in_one_line():
    def refuse() -> None:
        raise InputError("no shard 7; fetch it")

    with pytest.raises(InputError, match=r"^no shard 7; fetch it$") as caught:
        together(refuse)
    assert type(caught.value) is RankInputError


def test_a_message_of_many_lines_becomes_one_that_is_not_endless():
    def fail() -> None:
        raise RuntimeError("first\n\n   second " + "x" * 10_000)

    with pytest.raises(RankError, match=r"^RuntimeError: first second x") as caught:
        together(fail)
    assert len(str(caught.value)) == ranks.ERROR_CHARS


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit])
def test_what_ends_a_process_is_not_held_back(error):
    def end() -> None:
        raise error

    with pytest.raises(error):
        together(end)


@pytest.fixture
def no_collector():
    """Memory that only the garbage collector would free is not free when it is needed."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def test_out_of_memory_frees_what_the_eval_held_while_the_error_is_still_told(no_collector):
    held: list[weakref.ref[Any]] = []

    def deep() -> None:
        activations = torch.zeros(1000)
        held.append(weakref.ref(activations))
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    def eval_with_cleanup() -> None:
        cache = torch.zeros(1000)
        held.append(weakref.ref(cache))
        try:
            deep()
        except torch.OutOfMemoryError as error:
            raise ValueError("no answer") from error  # the first error and its frames hang on the second

    with pytest.raises(RankError) as caught:
        together(eval_with_cleanup)
    assert len(held) == 2 and all(tensor() is None for tensor in held)
    told = "".join(traceback.format_exception(caught.value))
    assert "in deep" in told and "Tried to allocate 2.00 GiB" in told and "ValueError: no answer" in told


def test_memory_is_free_before_the_ranks_agree(no_collector, monkeypatch):
    held: list[weakref.ref[Any]] = []
    seen: list[bool] = []

    def fail() -> None:
        x = torch.zeros(1000)
        held.append(weakref.ref(x))
        raise torch.OutOfMemoryError("CUDA out of memory")

    plain = ranks._ranks_where
    monkeypatch.setattr(ranks, "_ranks_where", lambda is_true: seen.append(held[0]() is None) or plain(is_true))
    with pytest.raises(RankError):
        together(fail)
    assert seen == [True]


class Letters:
    def get_bos_token_id(self) -> int:
        return 0

    def encode_to_arrays(self, texts: list[str], prepend: int, num_threads: int) -> list[Any]:
        return [torch.tensor([prepend, *(ord(c) - 96 for c in text)], dtype=torch.int32).numpy() for text in texts]


def test_an_eval_that_fails_leaves_no_loader_thread_once_its_error_is_dealt_with(no_collector):
    source = SimpleNamespace(name="letters", num_blocks=lambda split: 50, read_block=lambda split, i: ["abcdefg"] * 8)
    before = set(threading.enumerate())

    def validate() -> float:
        loader = PackingLoader(source, "val", Letters(), batch_size=1, sequence_len=7, repeat=True)  # type: ignore
        return evaluate_bpb(out_of_memory, itertools.islice(loader, 3), torch.ones(30))

    try:
        validate()
    except RankError as error:
        assert str(error) == "OutOfMemoryError: CUDA out of memory"
        assert len(set(threading.enumerate()) - before) == 1
    assert set(threading.enumerate()) == before


def out_of_memory(*args: Any, **kwargs: Any) -> Any:
    raise torch.OutOfMemoryError("CUDA out of memory")


# evals that fail on one of two ranks


class Uniform:
    """A model without a preference, that fails on a rank."""

    device = torch.device("cpu")
    config = SimpleNamespace(max_positions=100, sequence_len=100)

    def __init__(self, fails: bool) -> None:
        self.fails = fails

    def __call__(self, idx: torch.Tensor, targets: torch.Tensor | None = None, reduction: str = "") -> torch.Tensor:
        if self.fails:
            out_of_memory()
        return torch.zeros(*idx.shape, 257) if targets is None else torch.zeros(targets.numel())

    def features(self, idx: torch.Tensor, cache: None = None, at: torch.Tensor | None = None) -> torch.Tensor:
        return self(idx if at is None else at)

    def logits(self, x: torch.Tensor) -> torch.Tensor:
        return x


class Bytes:
    def get_bos_token_id(self) -> int:
        return 256

    def get_vocab_size(self) -> int:
        return 257

    def encode(self, text: Any, prepend: int | None = None) -> Any:
        if isinstance(text, list):
            return [self.encode(one, prepend) for one in text]
        return ([] if prepend is None else [prepend]) + list(text.encode())

    def render_for_completion(self, conversation: Any, max_tokens: int) -> list[int]:
        return self.encode("?", 256)


class Choice:
    eval_type = "categorical"
    has_lenient_rule = False

    def __len__(self) -> int:
        return 2

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"letters": ["A", "B"], "messages": [{"content": "A"}]}

    def evaluate(self, conversation: Any, response: str) -> bool:
        return response == "A"


def damaged(fails: bool) -> None:
    if fails:
        raise InputError("test.jsonl: no JSON in line 3")


def evals(rt: Runtime, fails: bool) -> dict[str, Callable[[], Any]]:
    model, tokenizer = Uniform(fails), Bytes()
    batch = (torch.zeros(1, 2, dtype=torch.int64), torch.ones(1, 2, dtype=torch.int64))
    item = {"query": "?", "choices": ["a", "b"], "gold": 0}
    bundle = Bundle("t", tuple(CoreTask(n, "multiple_choice", 0, " ", 0.5, lambda: [item] * 4) for n in ("one", "two")))
    return {
        "bpb": lambda: evaluate_bpb(model, [batch], torch.ones(2)),
        "core": lambda: evaluate_core(model, tokenizer, rt, bundle).core_metric,
        "chat": lambda: evaluate_task(Choice(), model, tokenizer, rt, batch_size=1).num_passed,  # type: ignore
    }


def fails_on_the_second(rt: Runtime, folder: Path) -> None:
    told: dict[str, Any] = {"ended": {}}
    for fails in (rt.rank == 1, False):  # then again where nothing fails: each collective meets its own
        for name, evaluate in evals(rt, fails).items():
            try:
                told["ended"].setdefault(name, []).append(evaluate())
            except RankError as error:
                told["ended"].setdefault(name, []).append([str(error), error.ranks, type(error.__cause__).__name__])
    for name, fn in {
        "input": lambda: damaged(rt.rank == 1),
        "all": lambda: {}[rt.rank],  # type: ignore[index]
    }.items():
        try:
            together(fn)
        except RankError as error:
            told[name] = [type(error).__name__, str(error), error.ranks]
    told["values"] = together(lambda: rt.rank * 10)
    told["sum"] = runtime.all_reduce(torch.tensor([rt.rank + 1])).item()
    (folder / f"{rt.rank}.json").write_text(json.dumps(told))


def test_an_eval_that_fails_on_one_rank_is_survived_by_both(two_ranks, tmp_path):
    two_ranks(fails_on_the_second, tmp_path)
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))
    message = "rank 1 of 2: OutOfMemoryError: CUDA out of memory"
    for name, value in {"bpb": 0.0, "core": 1.0, "chat": 2}.items():
        assert first["ended"][name] == [[message, [1], "NoneType"], value]
        assert second["ended"][name] == [[message, [1], "OutOfMemoryError"], value]
    for rank, told in enumerate((first, second)):
        assert told["input"] == ["RankInputError", "rank 1 of 2: test.jsonl: no JSON in line 3", [1]]
        assert told["all"] == ["RankError", "ranks 0, 1 of 2: KeyError: 0", [0, 1]]
        assert (told["values"], told["sum"]) == (10 * rank, 3)


# a rank that is gone

GLOO = "[/x/third_party/gloo/gloo/transport/tcp/pair.cc:561] "
CLOSED = GLOO + "Connection closed by peer [127.0.0.1]:4031. This is typically caused by a remote worker."
REMOTE = "ncclRemoteError: A call failed possibly due to a network error or a remote process exiting prematurely."


@dataclass(frozen=True)
class Nothing:
    depth: int = flag(1, "nothing")


def after_its_own(error: Exception) -> Exception:
    error.__context__ = ZeroDivisionError("its own")
    return error


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (RuntimeError(CLOSED), "Connection closed by peer [127.0.0.1]:4031"),
        (
            RuntimeError(GLOO + "Read error [::1]:7: Connection reset by peer"),
            "Read error [::1]:7: Connection reset by",
        ),
        (RuntimeError(GLOO + "Timed out waiting 60000ms for recv"), "Timed out waiting 60000ms for recv"),
        (torch.distributed.DistBackendError(f"NCCL error in: x.cpp:1, remote error\n{REMOTE}\n"), "NCCL error in: x.c"),
        (torch.distributed.DistNetworkError("failed to recv, got 0 bytes"), "failed to recv, got 0 bytes"),
    ],
)
def test_the_loss_of_another_rank_is_one_line_and_exit_code_1(error, reason, monkeypatch, capsys):
    monkeypatch.setattr(config.time, "sleep", lambda seconds: None)

    def run(cfg: Nothing) -> None:
        raise error

    with pytest.raises(SystemExit) as ended:
        run_cli(Nothing, run, [])
    assert ended.value.code == 1
    err = capsys.readouterr().err
    assert err.startswith(f"error: lost another rank, whose error stands above or in its own log ({reason}")
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("Connection reset by peer"),  # of a download, say
        ConnectionResetError("[/x/gloo/y] Connection closed by peer"),
        RuntimeError("[enforce fail at /x/gloo/z.cc:83] ifa != nullptr. Unable to find address for: eth7"),
        torch.distributed.DistBackendError("NCCL error: Duplicate GPU detected : rank 0 and rank 1"),
        after_its_own(RuntimeError(CLOSED)),
    ],
)
def test_an_error_of_this_rank_keeps_its_traceback(error):
    def run(cfg: Nothing) -> None:
        raise error

    with pytest.raises(type(error)) as caught:
        run_cli(Nothing, run, [])
    assert caught.value is error


DYING = """
import os, signal, sys, time
from dataclasses import dataclass
from pathlib import Path
import torch
from nanochat import ranks, runtime
from nanochat.config import InputError, flag, run_cli

@dataclass(frozen=True)
class Config:
    end: str = flag("kill", "how rank 1 ends")
    when: str = flag("", "file for the time of it")

def run(cfg):
    if runtime.start("cpu").rank == 1:
        Path(cfg.when).write_text(str(time.time()))
        if cfg.end == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        raise {"input": InputError, "crash": ArithmeticError}[cfg.end]("no text in shard 7")
    runtime.all_reduce(torch.ones(1))
    print("went on")

run_cli(Config, run)
"""


def run_dying(folder: Path, end: str) -> tuple[float, int, str]:
    """(seconds from the death of rank 1 to the end of all, exit code, what was printed) under torchrun."""
    (folder / "dying.py").write_text(DYING)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    done = subprocess.run(
        [*command, str(folder / "dying.py"), f"--end={end}", f"--when={folder / 'when'}"],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=600,
    )
    return time.time() - float((folder / "when").read_text()), done.returncode, done.stdout


LOST = "error: rank 0: lost another rank, whose error stands above or in its own log (Connection closed by peer"


def test_a_killed_rank_takes_the_other_down_within_30_seconds_which_says_so_in_one_line(tmp_path):
    seconds, code, printed = run_dying(tmp_path, "kill")
    assert code != 0 and "went on" not in printed
    # no traceback of the survivor, and its line, unless torchrun, which ends it, was faster on a busy machine
    assert printed.count(LOST) <= 1 and "[rank0]" not in printed
    assert "Signal 9 (SIGKILL) received" in printed  # torchrun's word on the other
    assert seconds < 30


@pytest.mark.slow
@pytest.mark.parametrize(
    ("end", "shown"),
    [("input", "error: rank 1: no text in shard 7\n"), ("crash", "ArithmeticError: no text in shard 7\n")],
)
def test_a_rank_that_raises_takes_the_other_down_with_its_error_shown(tmp_path, end, shown):
    seconds, code, printed = run_dying(tmp_path, end)
    assert code != 0 and "went on" not in printed
    assert printed.count(shown) == 1 and printed.count(LOST) <= 1 and "[rank0]" not in printed
    assert seconds < 30
