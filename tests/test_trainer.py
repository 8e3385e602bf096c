"""The loop: accumulation, evaluations, two ranks against one."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from nanochat import checkpoint, environment, runtime
from nanochat.config import InputError
from nanochat.gpt import GPT
from nanochat.resume import LoopState
from nanochat.runtime import Runtime
from nanochat.trainer import accumulate, make_optimizer, train_loop
from tests.conftest import tiny_gpt
from tests.tiny_trainer import ROWS, T, assert_equal_to_the_bit, make_trainer, row, weights

# The bare loop -----------------------------------------------------------------------------------


def trace(steps: int, evals: dict[str, int | None], start: int = 0) -> str:
    """What ran, in order: an evaluation by its letter, a step by its number."""
    ran: list[str] = []
    train_loop(
        LoopState(step=start),
        lambda s: ran.append(str(s.step)),
        lambda s: s.step >= steps,
        [(every, lambda s, name=name: ran.append(name)) for name, every in evals.items()],
    )
    return " ".join(ran)


@pytest.mark.parametrize(
    ("evals", "expected"),
    [
        ({}, "0 1 2 3 4"),  # five steps are five steps
        ({"a": 2}, "a 0 1 a 2 3 a 4 a"),
        ({"a": 5}, "a 0 1 2 3 4 a"),  # once at the end, though the period falls there too
        ({"a": 1000}, "a 0 1 2 3 4 a"),
        ({"a": None, "b": 3}, "b 0 1 2 b 3 4 b"),
        ({"b": 4, "a": 2}, "b a 0 1 a 2 3 b a 4 b a"),  # in the order given
    ],
)
def test_evaluations_run_at_their_period_and_once_after_the_last_step(evals, expected):
    assert trace(5, evals) == expected


def test_no_step_is_left_when_all_are_done():
    assert trace(3, {"a": 2}, start=3) == "a"


def test_a_resumed_loop_begins_with_the_evaluations_of_its_step():
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


def test_without_a_number_of_steps_training_ends_with_the_data(tmp_path):
    trainer = make_trainer(tmp_path, steps=None, accum=2, end=10)  # 5 micro-batches of 2 rows
    assert trainer.run().step == 3  # the last step has one micro-batch


def test_data_that_ends_too_early_is_said(tmp_path):
    trainer = make_trainer(tmp_path, steps=5, end=8)
    with pytest.raises(InputError, match="the data ended before the training did; lower --num_iterations"):
        trainer.run()
    assert trainer.state.step == 2


def test_an_evaluation_that_fails_is_shown_and_counted_and_training_goes_on(tmp_path, capsys):
    trainer = make_trainer(tmp_path)

    def failing(state: LoopState) -> None:
        if state.step in (2, 4):
            raise RuntimeError("out of memory")

    undisturbed = make_trainer(tmp_path / "other")
    undisturbed.run()
    trainer.run([(2, failing)])
    assert_equal_to_the_bit(weights(trainer.model), weights(undisturbed.model))
    assert trainer.state.outcome == {"Evaluations that failed": {"failing": 2}}
    output = capsys.readouterr()
    assert "the evaluation 'failing' failed at step 4, training goes on: out of memory" in output.out
    assert 'raise RuntimeError("out of memory")' in output.err


def test_the_curve_holds_every_step_counted_from_1(tmp_path):
    make_trainer(tmp_path / "d2", steps=3).run()
    lines = (environment.base_dir() / "report" / "curves" / "base.jsonl").read_text(encoding="utf-8").splitlines()
    points = [json.loads(line) for line in lines]
    assert [p["step"] for p in points] == [1, 2, 3]
    assert {"loss", "lrm", "dt", "tok_per_sec", "mfu"} <= points[0].keys()


def test_the_console_line_has_its_fields_in_order(tmp_path, capsys):
    make_trainer(tmp_path, steps=2).run()
    line = capsys.readouterr().out.splitlines()[1]
    pattern = (
        r"step 00002/00002 \(100.00%\) \| loss: \d+\.\d{6} \| lrm: 1\.00 \| dt: [\d.]+ms \| tok/sec: [\d,]+"
        r" \| mfu: [\d.]+ \| total time: 0\.00m \| eta: 0\.0m"
    )
    assert re.fullmatch(pattern, line), line


def test_the_time_left_is_of_warm_steps_and_the_evaluations_between_them(tmp_path, capsys, monkeypatch):
    """A clock that only the model and the evaluations move: 100 s for the first step, which compiles, and for the
    first evaluation; then 6 s a step, and 12 s for the evaluation of each second step."""
    trainer, now = make_trainer(tmp_path, steps=20), [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    forward = trainer.forward

    def slow(*args, **kwargs):
        now[0] += 6 if now[0] > 100 else 100
        return forward(*args, **kwargs)

    def evaluation(state):
        now[0] += 12 if state.step else 100

    trainer.forward = slow
    trainer.run([(2, evaluation)])
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("step ")]
    etas = [line.partition(" | eta: ")[2] for line in lines]
    assert etas[0] == ""
    assert etas[1] == "1.8m"  # 18 steps of 6 s; how often an evaluation comes is not known yet
    assert etas[11] == "1.6m"  # since step 10: two steps and an evaluation, 24 s
    assert etas[19] == "0.0m"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_optimizer_has_the_rates_of_the_flags_and_muon_works_in_the_compute_dtype_on_a_cpu(dtype):
    flags = SimpleNamespace(unembedding_lr=0.1, embedding_lr=0.2, matrix_lr=0.3, weight_decay=0.4)
    rt = Runtime(torch.device("cpu"), dtype)
    whole, tenth = (
        make_optimizer(tiny_gpt(), f, rt) for f in (flags, SimpleNamespace(**vars(flags), init_lr_frac=0.1))
    )
    assert whole.muon_dtype == dtype
    assert {g.lr for g in whole.groups if g.kind == "muon"} == {0.3}
    assert {g.weight_decay for g in whole.groups} == {0.4, 0.0}
    assert [g.lr for g in tenth.groups] == pytest.approx([g.lr / 10 for g in whole.groups])


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

    trainer = make_trainer(folder / "two", rt, save_every=3)
    trainer.run()
    resumed = make_trainer(folder / "one", rt, resume="3")
    resumed.run()
    save_file(weights(trainer.model), folder / f"rank{rt.rank}.safetensors")


@pytest.fixture(scope="module")
def folder(two_ranks: Callable[..., None], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """two/: a run on two ranks. one/: begun by one process, its last steps by two ranks. alone/: one process."""
    folder = tmp_path_factory.mktemp("ranks")
    for name in ("alone", "one"):
        make_trainer(folder / name, save_every=3).run()
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
