"""What every test stands on: no home folder, fp32 on few threads, no launcher's or user's environment."""

from __future__ import annotations

import os
import socket
import traceback
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing

from nanochat import checkpoint, runtime
from nanochat.gpt import GPT, GPTConfig
from nanochat.optim import MuonAdamW

HUB = Path(__file__).parent.parent.parent / "shared" / "hub"
# Beside others on the same cores a second thread only makes the first one wait.
THREADS = 1 if "PYTEST_XDIST_WORKER" in os.environ else 2
RANK_SECONDS = 300  # mostly the import of torch, where many share the machine
FOREIGN = (
    *("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"),
    *("NANOCHAT_HUB_DIR", "NANOCHAT_AQUA_DIR", "AQUA_DATA_DIR"),
)


@pytest.fixture(scope="session", autouse=True)
def _no_foreign_settings(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """For the fixtures that live longer than a test."""
    torch.set_num_threads(THREADS)
    with pytest.MonkeyPatch.context() as patch:
        for name in FOREIGN:
            patch.delenv(name, raising=False)
        patch.setenv("NANOCHAT_DTYPE", "float32")
        patch.setenv("HF_HUB_OFFLINE", "1")  # what is not on disk is refused at once, not after five tries
        patch.setenv("OMP_NUM_THREADS", str(THREADS))  # of the processes that tests start
        patch.setenv("NANOCHAT_BASE_DIR", str(tmp_path_factory.mktemp("base")))
        yield


@pytest.fixture(autouse=True)
def _own_base_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))


@pytest.fixture
def hub() -> Path:
    """Real data, laid out like the hub."""
    if not HUB.is_dir():
        pytest.skip("needs the hub mirror at ../shared/hub")
    return HUB


def tiny_gpt(seed: int = 0, std: float | None = 0.2, **sizes: Any) -> GPT:
    """2 layers of width 32, 4 heads, vocabulary 50. Random in every weight unless std is None: with the model's own
    initialisation the blocks write nothing and all logits are 0, which hides most mistakes."""
    torch.manual_seed(seed)
    defaults = dict(sequence_len=16, vocab_size=50, n_layer=2, n_head=4, n_kv_head=4, n_embd=32)
    model = GPT(GPTConfig(**{**defaults, **sizes}))
    model.init_weights()
    if std is not None:
        for p in model.parameters():
            torch.nn.init.normal_(p, 0.0, std)
    return model


def save_checkpoint(directory: Path, step: int, model: GPT, optimizer: MuonAdamW | None, meta: dict[str, Any]) -> Path:
    state = None if optimizer is None else optimizer.state_dict()
    return checkpoint.write(directory, step, checkpoint.host_copy(model.state_dict()), state, meta)


@pytest.fixture(scope="session")
def two_ranks() -> Iterator[Callable[..., None]]:
    """`two_ranks(worker, *args)` calls worker(rt, *args) in two gloo processes on this machine, which live as long
    as the session. The worker must be importable: a function of a test file."""
    context = torch.multiprocessing.get_context("spawn")
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    pipes, processes = [], []
    for rank in range(2):
        ours, theirs = context.Pipe()
        processes.append(context.Process(target=_rank, args=(rank, port, theirs), daemon=True))
        processes[-1].start()
        theirs.close()  # so that a rank's death is an end of file here
        pipes.append(ours)

    def run(worker: Callable[..., None], *args: Any) -> None:
        if not all(process.is_alive() for process in processes):
            pytest.fail("a rank died in an earlier test")
        for pipe in pipes:
            pipe.send((os.environ["NANOCHAT_BASE_DIR"], worker, args))
        waiting = list(pipes)
        while waiting:
            ready = wait(waiting, timeout=RANK_SECONDS)
            errors = [error for pipe in ready if (error := _answer(pipe))]
            if errors or not ready:  # a rank may wait for the other one for ever
                for process in processes:
                    process.kill()
                pytest.fail("\n".join(errors) or f"no answer from a rank in {RANK_SECONDS} s")
            waiting = [pipe for pipe in waiting if pipe not in ready]

    yield run
    for pipe, process in zip(pipes, processes, strict=True):
        if process.is_alive():
            pipe.send(None)
    for process in processes:
        process.join(timeout=10)
        process.kill()


def _answer(pipe: Connection) -> str | None:
    """The error of a rank's task, if it had one."""
    try:
        return pipe.recv()
    except (EOFError, OSError):
        return "a rank died"


def _rank(rank: int, port: int, pipe: Connection) -> None:
    launcher = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in launcher.items()})
    torch.set_num_threads(1)
    rt = runtime.start("cpu")
    while (task := pipe.recv()) is not None:
        os.environ["NANOCHAT_BASE_DIR"], worker, args = task
        try:
            worker(rt, *args)
            pipe.send(None)
        except BaseException:
            pipe.send(f"rank {rank}:\n{traceback.format_exc()}")
    runtime.stop()
