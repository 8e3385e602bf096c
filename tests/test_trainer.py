"""The loop: accumulation, hooks, resume to the bit, two ranks against one."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from nanochat import checkpoint, environment, runtime
from nanochat.config import InputError
from nanochat.gpt import GPT
from nanochat.optim import build_optimizer
from nanochat.runtime import Runtime
from nanochat.scaling import lr_multiplier, muon_momentum
from nanochat.tracking import Tracker
from nanochat.trainer import LoopState, Trainer, accumulate, muon_dtype, restore, resume_path, train_loop
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
    **settings: Any,
) -> Trainer:
    model = tiny_gpt()
    optimizer = build_optimizer(model, unembedding_lr=0.004, embedding_lr=0.2, matrix_lr=0.02)
    saved = resume_path(directory, resume)
    state, cursor = restore(saved, model, optimizer) if saved else (LoopState(), None)
    rows = ROWS // rt.world_size // accum
    return Trainer(
        rt=rt,
        stage="base",
        model=model,
        optimizer=optimizer,
        loader=Batches(rt, rows, cursor, end),
        tracker=Tracker("base", "dummy", rt, {}),
        directory=directory,
        meta={"model_config": model.config.to_dict()},
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


# The bare loop -----------------------------------------------------------------------------------


def trace(steps: int, hooks: dict[str, int | None], start: int = 0) -> str:
    """What ran, in order: a hook by its letter, a step by its number."""
    ran: list[str] = []
    train_loop(
        LoopState(step=start),
        lambda s: ran.append(str(s.step)),
        lambda s: s.step >= steps,
        [(every, lambda s, name=name: ran.append(name)) for name, every in hooks.items()],
    )
    return " ".join(ran)


@pytest.mark.parametrize(
    ("hooks", "expected"),
    [
        ({}, "0 1 2 3 4"),  # five steps are five steps
        ({"a": 2}, "a 0 1 a 2 3 a 4 a"),
        ({"a": 5}, "a 0 1 2 3 4 a"),  # once at the end, though the period falls there too
        ({"a": 1000}, "a 0 1 2 3 4 a"),
        ({"a": None, "b": 3}, "b 0 1 2 b 3 4 b"),
        ({"b": 4, "a": 2}, "b a 0 1 a 2 3 b a 4 b a"),  # in the order given
    ],
)
def test_hooks_run_at_their_period_and_once_after_the_last_step(hooks, expected):
    assert trace(5, hooks) == expected


def test_no_step_is_left_when_all_are_done():
    assert trace(3, {"a": 2}, start=3) == "a"


def test_a_resumed_loop_begins_with_the_hooks_of_its_step():
    assert trace(5, {"a": 2}, start=2) == "a 2 3 a 4 a"
    assert trace(5, {"a": 2}, start=3) == "3 a 4 a"


# Accumulation ------------------------------------------------------------------------------------


def uneven_batch() -> tuple[Tensor, Tensor]:
    """8 rows of which pairs count 16, 5, 1 and 0 targets."""
    ids = torch.stack([row(seed) for seed in range(8)])
    targets = ids[:, 1:].clone()
    targets[2, 3:] = targets[3, 2:] = targets[4, 1:] = -1
    targets[5:] = -1
    assert [(pair != -1).sum().item() for pair in targets.split(2)] == [16, 5, 1, 0]
    return ids[:, :-1], targets


def gradients(model: GPT) -> dict[str, Tensor]:
    return {name: p.grad for name, p in model.named_parameters()}


def assert_close(one: dict[str, Tensor], other: dict[str, Tensor], atol: float = 1e-6) -> None:
    assert one.keys() == other.keys()
    for name in one:
        torch.testing.assert_close(
            one[name], other[name], rtol=1e-4, atol=atol, msg=lambda m, name=name: f"{name}: {m}"
        )


def test_micro_batches_with_unequal_numbers_of_targets_equal_one_big_batch():
    inputs, targets = uneven_batch()
    big, small = tiny_gpt(), tiny_gpt()
    expected = big(inputs, targets)
    expected.backward()
    loss = accumulate(small, zip(inputs.split(2), targets.split(2), strict=True))
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    assert_close(gradients(small), gradients(big))


def test_a_micro_batch_without_targets_contributes_nothing():
    inputs, targets = uneven_batch()
    with_it, without = tiny_gpt(), tiny_gpt()
    pairs = list(zip(inputs.split(2), targets.split(2), strict=True))
    assert accumulate(with_it, pairs).item() == accumulate(without, pairs[:3]).item()
    assert_equal_to_the_bit(gradients(with_it), gradients(without))


@pytest.mark.parametrize("batches", [[(torch.zeros(1, 4, dtype=torch.int64), torch.full((1, 4), -1))], []])
def test_no_target_at_all_is_a_loss_of_0_and_no_gradient(batches):
    model = tiny_gpt()
    assert accumulate(model, batches).item() == 0
    assert all(p.grad is None or not p.grad.any() for p in model.parameters())


def test_weights_multiply_each_targets_loss_and_not_the_count():
    inputs, targets = uneven_batch()
    advantages = torch.linspace(-1, 1, 64).view(8, 8)
    plain, ours = tiny_gpt(), tiny_gpt()
    losses = plain(inputs, targets, reduction="none").view(8, 8)
    expected = (losses * advantages).sum() / 22
    expected.backward()
    loss = accumulate(ours, zip(inputs.split(2), targets.split(2), advantages.split(2), strict=True))
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert_close(gradients(ours), gradients(plain))


# Whole runs --------------------------------------------------------------------------------------


def test_accumulation_over_micro_batches_trains_the_same_model(tmp_path):
    once, four = make_trainer(tmp_path, steps=4), make_trainer(tmp_path, steps=4, accum=4)
    once.run()
    four.run()
    assert_close(weights(four.model), weights(once.model), atol=1e-5)
    assert four.state.loss == pytest.approx(once.state.loss, rel=1e-5)


def test_training_time_and_tokens_leave_out_the_first_ten_steps(tmp_path):
    trainer = make_trainer(tmp_path, steps=15)
    trainer.run()
    assert trainer.state.timed_tokens == 5 * ROWS * T
    assert 0 < trainer.state.train_seconds < 60


def test_the_smooth_loss_is_a_debiased_moving_average(tmp_path):
    trainer = make_trainer(tmp_path, steps=3)
    losses = []
    trainer.run([(1, lambda s: losses.append(s.loss))])
    a, b, c = losses[1:]
    assert trainer.state.debiased() == pytest.approx((0.081 * a + 0.09 * b + 0.1 * c) / 0.271)


@pytest.mark.parametrize(("saved_at", "accum"), [(2, 1), (3, 2)])
def test_an_interrupted_and_resumed_run_equals_an_uninterrupted_one_to_the_bit(tmp_path, saved_at, accum):
    def bpb(state: LoopState) -> None:
        state.record_val_bpb(10.0 - state.step if state.step < 4 else 10.0)

    whole = make_trainer(tmp_path / "whole", accum=accum)
    whole.run([(saved_at, whole.save), (1, bpb)])

    broken = make_trainer(tmp_path / "broken", accum=accum)

    def power_cut(state: LoopState) -> None:
        if state.step == saved_at + 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        broken.run([(saved_at, broken.save), (1, bpb), (1, power_cut)])
    resumed = make_trainer(tmp_path / "broken", resume="auto", accum=accum)
    assert resumed.state.step == saved_at
    resumed.run([(saved_at, resumed.save), (1, bpb)])

    assert_equal_to_the_bit(weights(resumed.model), weights(whole.model))
    assert_equal_to_the_bit(resumed.optimizer.state_dict(), whole.optimizer.state_dict())
    for name in ("step", "loss", "smooth_loss", "val_bpb", "min_val_bpb"):
        assert getattr(resumed.state, name) == getattr(whole.state, name), name
    assert resumed.cursor == whole.cursor


def test_a_checkpoint_is_there_before_the_eval_of_its_step_fails_and_that_eval_runs_on_resume(tmp_path):
    trainer = make_trainer(tmp_path)

    def failing(state: LoopState) -> None:
        if state.step == 4:
            raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        trainer.run([(2, trainer.save), (2, failing)])
    assert checkpoint.steps(tmp_path) == [0, 2, 4]
    resumed = make_trainer(tmp_path, resume="auto")
    evaluated = []
    resumed.run([(2, resumed.save), (2, lambda s: evaluated.append(s.step))])
    assert evaluated == [4, 6]


def test_a_resumed_run_does_not_write_again_what_it_was_resumed_from(tmp_path):
    trainer = make_trainer(tmp_path)
    trainer.run([(3, trainer.save)])
    before = (tmp_path / "step_000006" / "manifest.json").stat().st_mtime_ns
    resumed = make_trainer(tmp_path, resume="auto")
    resumed.run([(3, resumed.save)])  # nothing is left to do
    assert (tmp_path / "step_000006" / "manifest.json").stat().st_mtime_ns == before


def test_without_a_number_of_steps_training_ends_with_the_data(tmp_path):
    trainer = make_trainer(tmp_path, steps=None, accum=2, end=10)  # 5 micro-batches of 2 rows
    assert trainer.run().step == 3  # the last step has one micro-batch


def test_data_that_ends_too_early_is_said(tmp_path):
    trainer = make_trainer(tmp_path, steps=5, end=8)
    with pytest.raises(InputError, match="the data ended before the training did; lower --num_iterations"):
        trainer.run()
    assert trainer.state.step == 2


def test_a_loss_that_is_no_number_ends_the_run_and_is_never_saved(tmp_path):
    trainer = make_trainer(tmp_path)

    def break_it(state: LoopState) -> None:
        if state.step == 3:
            trainer.model.lm_head.weight.data[0, 0] = float("nan")

    with pytest.raises(
        InputError, match=r"^step 3: loss nan, gradient norm nan; lower the learning rates.*--resume=auto"
    ):
        trainer.run([(1, trainer.save), (1, break_it)])
    assert checkpoint.steps(tmp_path) == [0, 1, 2, 3]
    assert all(torch.isfinite(p).all() for p in checkpoint.load(tmp_path / "step_000003").model.values())


def test_the_curve_holds_every_step_counted_from_1(tmp_path):
    make_trainer(tmp_path / "d2", steps=3).run()
    lines = (environment.base_dir() / "report" / "curves" / "base.jsonl").read_text(encoding="utf-8").splitlines()
    points = [json.loads(line) for line in lines]
    assert [p["step"] for p in points] == [1, 2, 3]
    assert {"loss", "lrm", "dt", "tok_per_sec", "mfu"} <= points[0].keys()


def test_the_console_line_has_its_fields_in_order(tmp_path, capsys):
    make_trainer(tmp_path, steps=1).run()
    line = capsys.readouterr().out.strip()
    pattern = (
        r"step 00001/00001 \(100.00%\) \| loss: \d+\.\d{6} \| lrm: 1\.00 \| dt: [\d.]+ms \| tok/sec: [\d,]+"
        r" \| mfu: [\d.]+ \| total time: 0\.00m \| eta: 0\.0m"
    )
    assert re.fullmatch(pattern, line), line


# Where to go on from -----------------------------------------------------------------------------


def test_auto_takes_the_last_whole_checkpoint_and_none_takes_none(tmp_path, capsys):
    assert resume_path(tmp_path, "auto") is None
    trainer = make_trainer(tmp_path, steps=3)
    trainer.run([(1, trainer.save)])
    assert resume_path(tmp_path, "none") is None
    assert resume_path(tmp_path, "auto") == tmp_path / "step_000003"
    (tmp_path / "step_000003" / "optim.safetensors").unlink()
    assert resume_path(tmp_path, "auto") == tmp_path / "step_000002"
    assert "skipping: damaged checkpoint" in capsys.readouterr().out


def test_a_step_to_resume_from_is_taken_by_number_or_refused_with_those_there_are(tmp_path):
    trainer = make_trainer(tmp_path, steps=2)
    trainer.run([(1, trainer.save)])
    assert resume_path(tmp_path, "1") == tmp_path / "step_000001"
    for wrong in ("3", "last", "-1", ""):
        with pytest.raises(InputError, match=r"no such step in .* \(there are: 0, 1, 2\); use auto or none"):
            resume_path(tmp_path, wrong)


def test_a_checkpoint_of_other_sizes_is_refused_by_what_differs(tmp_path):
    trainer = make_trainer(tmp_path, steps=1)
    trainer.run([(1, trainer.save)])
    model = tiny_gpt(n_layer=3)
    optimizer = build_optimizer(model, unembedding_lr=0.1, embedding_lr=0.1, matrix_lr=0.1)
    with pytest.raises(InputError, match=r"step_000001 has {'n_layer': 2}, this run {'n_layer': 3}; resume with"):
        restore(tmp_path / "step_000001", model, optimizer)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_muon_works_in_the_compute_dtype_on_a_cpu(dtype):
    assert muon_dtype(Runtime(torch.device("cpu"), dtype)) == dtype


# Two ranks ---------------------------------------------------------------------------------------


def on_rank(rt: Runtime, folder: Path) -> None:
    inputs, targets = uneven_batch()
    model = tiny_gpt()
    mine = list(zip(inputs.split(2), targets.split(2), strict=True))
    mine = mine[:3] if rt.rank == 0 else mine[3:]  # 3 micro-batches here, 1 with no target there
    loss = accumulate(model, mine, rt.world_size)
    grads = {name: runtime.all_reduce(g.clone(), "mean") for name, g in gradients(model).items()}
    if rt.is_master:
        save_file({**grads, "loss": loss}, folder / "accumulated.safetensors")

    trainer = make_trainer(folder / "two", rt)
    trainer.run([(3, trainer.save)])
    resumed = make_trainer(folder / "one", rt, resume="3")
    resumed.run([(1000, resumed.save)])
    save_file(weights(trainer.model), folder / f"rank{rt.rank}.safetensors")


@pytest.fixture(scope="module")
def folder(two_ranks: Callable[..., None], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """two/: a run on two ranks. one/: begun by one process, its last steps by two ranks. alone/: one process."""
    folder = tmp_path_factory.mktemp("ranks")
    for name in ("alone", "one"):
        trainer = make_trainer(folder / name)
        trainer.run([(3, trainer.save)])
    for path in folder.glob("one/step_000006/*"):
        path.unlink()
    two_ranks(on_rank, folder)
    return folder


def final(directory: Path) -> dict[str, Tensor]:
    return checkpoint.load(directory / "step_000006").model


def test_two_ranks_train_the_model_that_one_process_trains(folder):
    assert_close(final(folder / "two"), final(folder / "alone"), atol=1e-5)
    assert_equal_to_the_bit(load_file(folder / "rank0.safetensors"), load_file(folder / "rank1.safetensors"))


def test_a_run_begun_in_one_process_goes_on_in_two(folder):
    assert_close(final(folder / "one"), final(folder / "alone"), atol=1e-5)


def test_a_run_begun_in_two_goes_on_in_one_process(folder):
    trainer = make_trainer(folder / "two", resume="3")
    trainer.run()
    assert_close(weights(trainer.model), final(folder / "alone"), atol=1e-5)


def test_ranks_with_unequal_micro_batches_and_targets_equal_one_big_batch(folder):
    inputs, targets = uneven_batch()
    model = tiny_gpt()
    loss = model(inputs, targets)
    loss.backward()
    accumulated = load_file(folder / "accumulated.safetensors")
    assert accumulated.pop("loss").item() == pytest.approx(loss.item(), rel=1e-6)
    assert_close(accumulated, gradients(model))
