"""Saving beside the training: before evaluations, without losing the run to a full disk, the newest kept."""

from __future__ import annotations

import shutil
import threading
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest
import torch

from nanochat import checkpoint
from nanochat.config import InputError
from nanochat.resume import LoopState
from nanochat.runtime import Runtime
from tests.conftest import tiny_gpt
from tests.tiny_trainer import assert_equal_to_the_bit, make_trainer, weights


def names(directory: Path) -> list[str]:
    return sorted(p.name for p in directory.iterdir())


def full_disk(monkeypatch: pytest.MonkeyPatch, free: int) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(0, 0, free))


# When --------------------------------------------------------------------------------------------


def test_saves_at_its_period_and_at_the_end_and_nothing_at_step_0(tmp_path):
    make_trainer(tmp_path, steps=5, save_every=2).run()
    assert checkpoint.steps(tmp_path) == [2, 4, 5]
    make_trainer(tmp_path / "last", steps=5).run()
    assert checkpoint.steps(tmp_path / "last") == [5]


def test_the_checkpoint_of_a_step_is_on_the_disk_before_its_evaluations_begin(tmp_path):
    there: list[list[int]] = []
    make_trainer(tmp_path, steps=4, save_every=2).run([(2, lambda s: there.append(checkpoint.steps(tmp_path)))])
    assert there == [[], [2], [2, 4]]


def test_training_goes_on_while_a_checkpoint_is_written_and_does_not_change_it(tmp_path, monkeypatch):
    trainer = make_trainer(tmp_path, steps=3, save_every=1)
    at_1: list[dict[str, torch.Tensor]] = []
    stepped = threading.Event()
    save_file = checkpoint.save_file

    def slow(tensors: Any, path: Path) -> None:
        assert stepped.wait(60)  # until the next step is done, which a synchronous write would never see
        save_file(tensors, path)

    step = trainer._step

    def watched(state: LoopState) -> None:
        if state.step == 1:
            at_1.append(weights(trainer.model))
        step(state)
        if state.step == 1:
            stepped.set()

    monkeypatch.setattr(checkpoint, "save_file", slow)
    trainer._step = watched
    trainer.run()
    assert_equal_to_the_bit(checkpoint.load(tmp_path / "step_000001").model, at_1[0])
    assert checkpoint.steps(tmp_path) == [1, 2, 3]


def test_only_the_first_rank_writes(tmp_path):
    other = Runtime(torch.device("cpu"), torch.float32, rank=1)
    make_trainer(tmp_path / "d2", other, steps=1).run()
    assert not (tmp_path / "d2").exists()


# How many ----------------------------------------------------------------------------------------


def test_the_newest_are_kept_and_those_that_are_marked(tmp_path):
    def mark(state: LoopState) -> None:
        if state.step == 2:
            (tmp_path / "d2" / "step_000002" / "keep").touch()

    make_trainer(tmp_path / "d2", steps=6, save_every=1, keep_last=2).run([(1, mark)])
    assert checkpoint.steps(tmp_path / "d2") == [2, 5, 6]
    assert names(tmp_path / "d2") == ["step_000002", "step_000005", "step_000006"]


def test_none_is_removed_before_the_new_one_is_there(tmp_path, monkeypatch):
    def disk_fails(*args: Any) -> None:
        raise OSError(5, "Input/output error")

    trainer = make_trainer(tmp_path, steps=4, save_every=1, keep_last=1)

    def break_disk(state: LoopState) -> None:
        if state.step == 2:
            monkeypatch.setattr(checkpoint, "save_file", disk_fails)

    with pytest.raises(InputError, match=r"the last checkpoint is not saved: .*Input/output error; the last good one"):
        trainer.run([(1, break_disk)])
    assert checkpoint.steps(tmp_path) == [2]


@pytest.mark.parametrize("keep_last", [0, -3])
def test_to_keep_none_is_refused(tmp_path, keep_last):
    with pytest.raises(InputError, match=rf"--keep_last {keep_last} must be at least 1, or -1 for all"):
        make_trainer(tmp_path, keep_last=keep_last)


# The disk ----------------------------------------------------------------------------------------


def test_too_little_room_for_one_checkpoint_is_refused_before_the_first_step(tmp_path, monkeypatch):
    full_disk(monkeypatch, 1000)
    trainer = make_trainer(tmp_path / "d2")
    with pytest.raises(InputError, match=r"a checkpoint takes \d+ MiB and .*d2 has 0 MiB free; make room"):
        trainer.run()
    assert trainer.state.step == 0


def test_a_directory_that_cannot_be_written_to_is_refused_before_the_first_step(tmp_path, monkeypatch):
    def denied(self: Path, *args: Any, **kwargs: Any) -> None:
        raise PermissionError(13, "Permission denied")  # root is never denied, so a read-only folder would not do

    trainer = make_trainer(tmp_path / "d2")
    monkeypatch.setattr(Path, "mkdir", denied)
    with pytest.raises(InputError, match=r"cannot write to .*d2: Permission denied; make it writable, or set"):
        trainer.run()
    assert trainer.state.step == 0


def test_a_disk_that_fills_up_is_said_and_training_goes_on_to_the_next_save(tmp_path, monkeypatch, capsys):
    trainer = make_trainer(tmp_path, steps=6, save_every=2)

    def fill(state: LoopState) -> None:
        full_disk(monkeypatch, 1000 if state.step == 3 else 1 << 40)

    undisturbed = make_trainer(tmp_path / "other")
    undisturbed.run()
    trainer.run([(1, fill)])
    assert checkpoint.steps(tmp_path) == [2, 6]
    assert_equal_to_the_bit(weights(trainer.model), weights(undisturbed.model))
    said = capsys.readouterr().out
    assert "warning: step 4 is not saved: a checkpoint takes" in said
    assert "training goes on, the last good one is" in said


def test_two_runs_do_not_write_to_one_tag(tmp_path):
    first, second = make_trainer(tmp_path / "d2"), make_trainer(tmp_path / "d2")
    assert first.saver and second.saver
    first.saver.prepare()
    with pytest.raises(InputError, match=r"another run writes to .*d2; wait for its end, or give"):
        second.run()
    first.saver.close()
    second.run()


# Whose -------------------------------------------------------------------------------------------


def test_a_new_run_sets_the_last_ones_checkpoints_aside_when_it_has_its_own(tmp_path, capsys):
    directory = tmp_path / "base_checkpoints" / "d2"
    make_trainer(directory, steps=6, save_every=3).run()
    make_trainer(directory, steps=2).run([(1, lambda s: None)])
    assert checkpoint.steps(directory) == [2]
    assert checkpoint.steps(tmp_path / "previous" / "base_checkpoints" / "d2") == [3, 6]
    assert "Set aside 2 checkpoints of an earlier run" in capsys.readouterr().out


def test_going_on_from_an_earlier_step_sets_the_later_ones_aside(tmp_path):
    directory = tmp_path / "base_checkpoints" / "d2"
    make_trainer(directory, steps=6, save_every=2).run()
    make_trainer(directory, steps=3, resume="2").run()
    assert checkpoint.steps(directory) == [2, 3]
    assert checkpoint.steps(tmp_path / "previous" / "base_checkpoints" / "d2") == [4, 6]


def test_what_is_not_ours_is_never_deleted(tmp_path):
    theirs = tmp_path / "step_000003"
    theirs.mkdir()
    (theirs / "thesis.txt").write_text("all of it")
    make_trainer(tmp_path, steps=3).run()
    assert checkpoint.steps(tmp_path) == [3]
    assert (tmp_path / "step_000003.old" / "thesis.txt").read_text() == "all of it"


# What is never saved -----------------------------------------------------------------------------


def test_weights_that_are_not_finite_are_not_saved(tmp_path):
    model = tiny_gpt()
    copy = checkpoint.host_copy(model.state_dict())
    copy["lm_head.weight"][0, 0] = float("nan")
    with pytest.raises(InputError, match=r"lm_head.weight hold values that are not finite"):
        checkpoint.write(tmp_path, 1, copy, None, {})
    assert names(tmp_path) == []


def test_an_error_in_a_step_saves_what_was_reached_before(tmp_path):
    trainer = make_trainer(tmp_path, steps=5, end=8)  # text for two steps
    with pytest.raises(InputError, match="the data ended before"):
        trainer.run()
    assert checkpoint.steps(tmp_path) == [2]
    undisturbed = make_trainer(tmp_path / "other", steps=5)
    undisturbed.run()
    resumed = make_trainer(tmp_path, steps=5, resume="auto")
    resumed.run()
    assert_equal_to_the_bit(weights(resumed.model), weights(undisturbed.model))
