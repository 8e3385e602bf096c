"""Numerical guards: a bad step changes nothing, is counted, and too many of them end the run."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from nanochat import checkpoint, guards
from nanochat.config import InputError
from nanochat.guards import History
from nanochat.optim import MuonAdamW, build_optimizer
from nanochat.resume import LoopState
from nanochat.trainer import Trainer
from tests.conftest import tiny_gpt
from tests.tiny_trainer import assert_equal_to_the_bit, make_trainer, weights

NAN, INF = float("nan"), float("inf")
ANY = (guards.LARGEST, guards.LARGEST)


def history(losses: list[float], norms: list[float] | None = None) -> History:
    return History(list(losses), list(norms or losses))


# Limits ------------------------------------------------------------------------------------------


def test_the_limit_is_so_many_sigma_above_the_mean_of_the_last_128_steps():
    values = [4.0, 6.0] * 64  # mean 5, standard deviation 1
    past = history(values, [2 * v for v in values])
    assert past.limits(6.0) == (11.0, 22.0)
    assert past.limits(2.0) == (7.0, 14.0)
    assert past.limits(None) == ANY


def test_there_is_no_limit_before_64_steps():
    assert history([1.0] * 63).limits(6.0) == ANY
    assert history([1.0] * 64).limits(6.0) == (1.0, 1.0)


def test_only_taken_steps_count_and_the_oldest_are_forgotten():
    past = History()
    for i in range(200):
        past.take(float(i), 1.0)
        past.skip(1.0)
    assert past.losses == [float(i) for i in range(72, 200)]
    assert past.skipped == 200 and past.in_a_row == 1


def test_a_step_without_gradient_is_skipped_but_is_no_error():
    past = History()
    past.skip(0.0)
    assert (past.skipped, past.in_a_row) == (1, 0)


# The optimizer -----------------------------------------------------------------------------------


def after_steps(arch: str, compile: bool = False, steps: int = 2) -> tuple[object, MuonAdamW]:
    model = tiny_gpt(arch=arch)
    optimizer = build_optimizer(
        model, unembedding_lr=0.004, embedding_lr=0.2, matrix_lr=0.02, weight_decay=0.1, compile=compile
    )
    for step in range(steps):
        backward(model, step)
        optimizer.step(1.0, torch.tensor(1.0), ANY)
    return model, optimizer


def backward(model: object, seed: int) -> None:
    idx = torch.randint(0, 50, (2, 8), generator=torch.Generator().manual_seed(seed))
    model(idx, idx).backward()


@pytest.mark.parametrize("arch", ["plain", "modern"])
@pytest.mark.parametrize(
    ("loss", "limits", "broken"),
    [
        (NAN, ANY, None),
        (INF, ANY, None),
        (2.0, (1.9, guards.LARGEST), None),
        (2.0, (guards.LARGEST, 1e-6), None),
        (2.0, ANY, NAN),
        (2.0, ANY, INF),
        (2.0, ANY, 0.0),
    ],
)
def test_a_step_that_is_not_taken_leaves_weights_and_state_to_the_bit(arch, loss, limits, broken):
    model, optimizer = after_steps(arch)
    before, state = weights(model), optimizer.state_dict()
    backward(model, 9)
    if broken is not None:
        for p in model.parameters():
            p.grad = torch.zeros_like(p) if broken == 0 else p.grad
        model.lm_head.weight.grad[0, 0] = broken
    optimizer.step(1.0, torch.tensor(loss), limits)
    assert not optimizer.taken
    optimizer.step_count -= 1  # as who reads that must
    assert_equal_to_the_bit(weights(model), before)
    assert_equal_to_the_bit(optimizer.state_dict(), state)
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("arch", ["plain", "modern"])
def test_a_guarded_step_that_is_taken_is_the_step(arch):
    guarded, one = after_steps(arch)
    free, other = after_steps(arch)
    for model, optimizer, limits in ((guarded, one, ANY), (free, other, None)):
        backward(model, 9)
        optimizer.step(1.0, torch.tensor(1.0), limits)
    assert one.taken and other.taken is None
    for name, w in weights(guarded).items():
        # the hyper-parameters are rounded to fp32 here; Halley's steps enlarge that, and a decay's mask may flip
        difference = w - dict(free.named_parameters())[name].detach()
        assert difference.norm() < 1e-3 * w.norm(), name


# The loop ----------------------------------------------------------------------------------------


def disturb(trainer: Trainer, step: int, what: str, times: int = 1) -> None:
    """Break so many steps: their losses, or their targets away."""
    run, forward, steps = trainer._step, trainer.forward, range(step, step + times)

    def broken(*args: Tensor, **kwargs: str) -> Tensor:
        return forward(*args, **kwargs) * float("nan")

    def watched(state: LoopState) -> None:
        is_broken = state.step in steps
        if is_broken and what == "masked":
            if trainer.pending is None:
                trainer._prefetch()
            trainer.pending = [(x, torch.full_like(y, -1)) for x, y in trainer.pending]
        trainer.forward = broken if is_broken and what == "nan" else forward
        run(state)

    trainer._step = watched


@pytest.mark.parametrize("what", ["nan", "masked"])
def test_a_bad_batch_is_skipped_counted_and_said(tmp_path, capsys, what):
    trainer = make_trainer(tmp_path, steps=5, save_every=1)
    disturb(trainer, 2, what)
    seen: list[dict[str, Tensor]] = []
    trainer.run([(1, lambda s: seen.append(weights(trainer.model)))])
    assert_equal_to_the_bit(seen[3], seen[2])
    assert any(not torch.equal(seen[4][n], seen[3][n]) for n in seen[3])
    assert trainer.state.history.skipped == 1 and trainer.state.history.in_a_row == 0
    assert math.isfinite(trainer.state.debiased())
    assert trainer.optimizer.step_count == 4
    why = "loss nan, gradient norm nan" if what == "nan" else "no gradient"
    assert f"step 00003 skipped: {why}; 1 in all" in capsys.readouterr().out
    assert checkpoint.steps(tmp_path) == [1, 2, 3, 4, 5]


def test_a_resumed_run_skips_what_the_whole_one_skips(tmp_path):
    whole = make_trainer(tmp_path / "whole", steps=5)
    disturb(whole, 3, "nan")
    whole.run()
    make_trainer(tmp_path / "two", steps=2).run()
    resumed = make_trainer(tmp_path / "two", steps=5, resume="auto")
    resumed.schedule = whole.schedule
    disturb(resumed, 3, "nan")
    resumed.run()
    assert resumed.state.history.skipped == whole.state.history.skipped == 1


def test_ten_in_a_row_end_the_run_with_the_last_good_checkpoint_named(tmp_path):
    trainer = make_trainer(tmp_path, steps=30, save_every=4)
    disturb(trainer, 5, "nan", times=99)
    with pytest.raises(
        InputError,
        match=r"^step 15: 10 steps in a row were skipped, the last for loss nan, .*; lower the learning rates; "
        r"the last good one is .*step_0000\d\d: --resume=auto goes on from it$",
    ):
        trainer.run()
    assert all(torch.isfinite(p).all() for p in checkpoint.load(tmp_path / "step_000012").model.values())


def test_a_spike_is_skipped_and_can_be_let_through(tmp_path, capsys):
    for sigma, skipped in ((6.0, 1), (None, 0)):
        trainer = make_trainer(tmp_path / str(sigma), steps=4, guard_sigma=sigma)
        trainer.state.history = History([4.0, 4.01] * 40, [1.0, 1.01] * 40)
        run, forward = trainer._step, trainer.forward

        def watched(state: LoopState, run=run, forward=forward, trainer=trainer) -> None:
            scale = 1e-3 if state.step != 2 else 10.0
            trainer.forward = lambda *args, **kwargs: forward(*args, **kwargs) * scale
            run(state)

        trainer._step = watched
        trainer.run()
        assert trainer.state.history.skipped == skipped
    assert "skipped: loss" in capsys.readouterr().out
