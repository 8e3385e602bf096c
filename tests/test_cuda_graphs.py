"""Decoding by recorded steps. A tape of operations on fixed addresses stands for a CUDA graph, which it is like."""

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from nanochat import cuda_graphs
from nanochat.cuda_graphs import GraphDecoder
from nanochat.engine import MAX_ROWS, Engine
from nanochat.sampling import Sampling
from tests.tiny_engine import TOKENIZER, tiny_gpt

READS_THE_DEVICE = {"aten::_local_scalar_dense", "aten::nonzero", "aten::equal"}  # a CUDA graph cannot hold them


class Tape(TorchDispatchMode):
    """Records operations with the very tensors that they read and wrote; Python's part in them is lost."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[tuple[Any, Any, Any, Any]] = []
        self.replays = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func.name().split(".")[0] not in READS_THE_DEVICE, func
        out = func(*args, **kwargs or {})
        self.operations.append((func, args, kwargs or {}, out))
        return out

    def replay(self) -> None:
        self.replays += 1
        for func, args, kwargs, out in self.operations:
            for old, new in zip(tree_leaves(out), tree_leaves(func(*args, **kwargs)), strict=True):
                if isinstance(old, torch.Tensor) and old is not new:
                    old.copy_(new)


class Recorder:
    """Given a refusal, it refuses."""

    def __init__(self, refusal: str = "") -> None:
        self.refusal = refusal
        self.tapes: list[Tape] = []

    def __call__(self, run: Callable[[], None]) -> Callable[[], object]:
        if self.refusal:
            raise RuntimeError(self.refusal)
        tape = Tape()
        with tape:
            run()
        self.tapes.append(tape)
        return tape.replay


@pytest.fixture(autouse=True)
def short_stretches(monkeypatch):
    monkeypatch.setattr(cuda_graphs, "END", 16)
    monkeypatch.setattr(cuda_graphs, "WARM_STEPS", 1)


def make(arch: str, record: Recorder | None = None) -> Engine:
    sizes = {"sequence_len": 96, "window_pattern": "SSL", "short_window": 10, "n_layer": 3}
    engine = Engine(tiny_gpt(TOKENIZER.get_vocab_size(), arch=arch, **sizes), TOKENIZER)
    engine.cpu_decoder = None
    if record is not None:
        engine.graphs = GraphDecoder(engine.model, MAX_ROWS, lambda: record)
    return engine


def answers(engine: Engine) -> list[list[int]]:
    """Of requests that come, grow, end and are given up at different steps."""
    greedy, drawn = Sampling(temperature=0.0), Sampling(temperature=1.0, seed=3)
    engine.terminal = set()
    requests = []
    for i in range(9):
        prompt = [TOKENIZER.get_bos_token_id(), *range(20 + i, 22 + 3 * i)]
        requests.append(engine.submit(prompt, max_tokens=8 + 5 * i, sampling=drawn if i % 3 == 2 else greedy))
        for _ in range(4):
            engine.step()
        if i == 5:
            engine.cancel(requests[4])
    while engine.busy:
        engine.step()
    return [request.ids for request in requests]


@pytest.mark.parametrize("arch", ["plain", "modern"])
def test_recorded_steps_write_the_same_answers(arch):
    record = Recorder()
    assert answers(make(arch, record)) == answers(make(arch))
    assert sum(tape.replays for tape in record.tapes) > 2 * len(record.tapes) > 20


def test_a_recording_sees_weights_that_changed_where_they_lie():
    recorded, plain = make("plain", Recorder()), make("plain")
    for engine in (recorded, plain):
        engine.terminal = set()
        engine.submit([TOKENIZER.get_bos_token_id()], max_tokens=60, sampling=Sampling(temperature=0.0))
        for step in range(40):
            engine.step()
            if step == 20:
                engine.model.lm_head.weight.data.mul_(-1)
    assert recorded.slots.running[0].ids == plain.slots.running[0].ids
    assert sum(tape.replays for tape in recorded.graphs.record.tapes) > 30


def test_release_and_reset_give_the_caches_memory_back():
    record = Recorder()
    engine = make("plain", record)
    for forget in (engine.release, engine.reset):
        answers(engine)
        assert engine.graphs.recordings
        memory = weakref.ref(engine.slots.cache.k[0])
        forget()
        record.tapes.clear()
        gc.collect()
        assert memory() is None


def test_what_cannot_be_recorded_is_said_once_and_computed(capsys):
    refusal = "operation not permitted when stream is capturing\nand more"
    assert answers(make("plain", Recorder(refusal))) == answers(make("plain"))
    assert capsys.readouterr().out == (
        "decoding goes on without CUDA graphs, more slowly: operation not permitted when stream is capturing\n"
    )


def test_old_recordings_go(monkeypatch):
    monkeypatch.setattr(cuda_graphs, "MAX_RECORDINGS", 2)
    engine = make("plain", Recorder())
    assert answers(engine) == answers(make("plain"))
    assert len(engine.graphs.recordings) == 2
