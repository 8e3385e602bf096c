"""A tiny run: a model, made-up batches and a trainer, for the tests of the loop and of what surrounds it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nanochat import resume as resuming
from nanochat.gpt import GPT
from nanochat.optim import build_optimizer
from nanochat.runtime import Runtime
from nanochat.saver import Saver
from nanochat.scaling import lr_multiplier, muon_momentum
from nanochat.tracking import Tracker
from nanochat.trainer import Trainer
from tests.conftest import tiny_gpt

RT = Runtime(torch.device("cpu"), torch.float32)
ROWS, T = 4, 8  # of a global batch


class Batches:
    """Row r of the data is made from seed r, with fewer targets if r is even; ranks share each global batch."""

    def __init__(self, rt: Runtime, rows: int = ROWS, cursor: int | None = None, end: int | None = None) -> None:
        self.rt, self.rows, self.end = rt, rows, end
        self.cursor = cursor or 0

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        while self.end is None or self.cursor < self.end:
            first = self.cursor + self.rt.rank * self.rows
            self.cursor += self.rows * self.rt.world_size
            ids = torch.stack([row(r) for r in range(first, first + self.rows)])
            targets = ids[:, 1:].clone()
            targets[first % 2 :: 2, : T // 2] = -1
            yield ids[:, :-1], targets


def row(seed: int) -> Tensor:
    return torch.randint(0, 50, (T + 1,), generator=torch.Generator().manual_seed(seed))


def make_trainer(
    directory: Path,
    rt: Runtime = RT,
    steps: int | None = 6,
    resume: str = "none",
    accum: int = 1,
    end: int | None = None,
    save_every: int | None = None,
    keep_last: int | None = None,
    facts: dict[str, Any] | None = None,
    **settings: Any,
) -> Trainer:
    """facts: more of the manifest."""
    model = tiny_gpt()
    optimizer = build_optimizer(model, unembedding_lr=0.004, embedding_lr=0.2, matrix_lr=0.02)
    meta = {"model_config": model.config.to_dict(), **(facts or {})}
    state, cursor = resuming.restore(resuming.find(rt, directory, resume), model, optimizer, meta)
    rows = ROWS // rt.world_size // accum
    return Trainer(
        rt=rt,
        stage="base",
        model=model,
        optimizer=optimizer,
        loader=Batches(rt, rows, cursor, end),
        tracker=Tracker("base", "dummy", rt, {}),
        saver=Saver(rt, directory, model, optimizer, meta, state, save_every, keep_last),
        tokens_per_step=ROWS * T,
        schedule=lambda s: (lr_multiplier(s.step / (steps or 6)), muon_momentum(s.step)),
        grad_accum_steps=accum,
        num_iterations=steps,
        grad_clip=1.0,
        flops_per_token=model.config.shape.flops_per_token,
        state=state,
        **settings,
    )


def weights(model: GPT) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def assert_equal_to_the_bit(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    assert [name for name in one if not torch.equal(one[name], other[name])] == []
