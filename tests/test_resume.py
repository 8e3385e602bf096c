"""Going on with a run: to the bit, from the right checkpoint, and not with another model, tokenizer or text."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from nanochat import checkpoint, resume, runtime
from nanochat.config import InputError
from nanochat.optim import build_optimizer
from nanochat.resume import LoopState
from nanochat.runtime import Runtime
from tests.conftest import tiny_gpt
from tests.tiny_trainer import RT, assert_equal_to_the_bit, make_trainer, weights


def trained(directory: Path, steps: int = 3, **settings: Any) -> None:
    make_trainer(directory, steps=steps, save_every=1, **settings).run()


def found(directory: Path, what: str) -> Path | None:
    saved = resume.find(RT, directory, what)
    return saved and saved.path


def edit_manifest(path: Path, **changes: Any) -> None:
    manifest = json.loads((path / "manifest.json").read_text())
    (path / "manifest.json").write_text(json.dumps({**manifest, **changes}))


# To the bit --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("saved_at", "accum"), [(2, 1), (3, 2)])
def test_an_interrupted_and_resumed_run_equals_an_uninterrupted_one_to_the_bit(tmp_path, saved_at, accum):
    def bpb(state: LoopState) -> None:
        state.record_val_bpb(10.0 - state.step if state.step < 4 else 10.0)

    whole = make_trainer(tmp_path / "whole", accum=accum, save_every=saved_at)
    whole.run([(1, bpb)])

    broken = make_trainer(tmp_path / "broken", accum=accum, save_every=saved_at)

    def power_cut(state: LoopState) -> None:
        if state.step == saved_at + 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        broken.run([(1, bpb), (1, power_cut)])
    resumed = make_trainer(tmp_path / "broken", resume="auto", accum=accum)
    assert resumed.state.step == saved_at
    resumed.run([(1, bpb)])

    assert_equal_to_the_bit(weights(resumed.model), weights(whole.model))
    assert_equal_to_the_bit(resumed.optimizer.state_dict(), whole.optimizer.state_dict())
    for name in ("step", "loss", "smooth_loss", "val_bpb", "min_val_bpb", "history"):
        assert getattr(resumed.state, name) == getattr(whole.state, name), name
    assert resumed.cursor == whole.cursor


def test_the_evaluations_of_a_checkpoints_step_run_again_on_resume(tmp_path):
    trained(tmp_path, steps=4)
    resumed = make_trainer(tmp_path, resume="auto")
    evaluated: list[int] = []
    resumed.run([(2, lambda s: evaluated.append(s.step))])
    assert evaluated == [4, 6]


def test_a_resumed_run_does_not_write_again_what_it_was_resumed_from(tmp_path):
    make_trainer(tmp_path).run()
    before = (tmp_path / "step_000006" / "manifest.json").stat().st_mtime_ns
    make_trainer(tmp_path, resume="auto").run()  # nothing is left to do
    assert (tmp_path / "step_000006" / "manifest.json").stat().st_mtime_ns == before


def test_torchs_generator_goes_on_where_it_was(tmp_path):
    def draw(state: LoopState) -> None:
        numbers.append(torch.rand(()).item())

    numbers: list[float] = []
    make_trainer(tmp_path / "whole", steps=4, save_every=2).run([(1, draw)])
    whole, numbers = numbers, []
    (tmp_path / "whole" / "step_000004" / "manifest.json").unlink()
    torch.manual_seed(1)
    make_trainer(tmp_path / "whole", steps=4, resume="auto").run([(1, draw)])
    assert numbers == whole[2:]


# Which checkpoint --------------------------------------------------------------------------------


def test_auto_takes_the_last_whole_checkpoint_and_none_takes_none(tmp_path, capsys):
    assert found(tmp_path, "auto") is None
    trained(tmp_path)
    assert found(tmp_path, "none") is None
    assert found(tmp_path, "auto") == tmp_path / "step_000003"
    (tmp_path / "step_000003" / "optim.safetensors").unlink()
    assert found(tmp_path, "auto") == tmp_path / "step_000002"
    assert "skipping: damaged checkpoint" in capsys.readouterr().out


def test_auto_does_not_begin_anew_where_all_that_is_there_is_damaged(tmp_path):
    trained(tmp_path, steps=1)
    (tmp_path / "step_000001" / "model.safetensors").write_bytes(b"")
    with pytest.raises(InputError, match=r"no checkpoint in .* is whole; --resume=none starts anew"):
        found(tmp_path, "auto")


def test_a_step_to_resume_from_is_taken_by_number_or_refused_with_those_there_are(tmp_path):
    trained(tmp_path, steps=2)
    assert found(tmp_path, "1") == tmp_path / "step_000001"
    for wrong in ("3", "last", "-1", ""):
        with pytest.raises(InputError, match=r"no such step in .* \(there are: 1, 2\); use auto or none"):
            found(tmp_path, wrong)


def test_a_damaged_step_that_was_asked_for_is_refused(tmp_path):
    trained(tmp_path, steps=2)
    (tmp_path / "step_000002" / "model.safetensors").write_bytes(b"")
    with pytest.raises(InputError, match="damaged checkpoint"):
        found(tmp_path, "2")


def test_a_checkpoint_of_a_later_version_is_not_skipped_but_refused(tmp_path):
    trained(tmp_path, steps=2)
    edit_manifest(tmp_path / "step_000002", format=9)
    with pytest.raises(InputError, match=r"has format 9; this version reads 1: use the version .* that wrote it"):
        found(tmp_path, "auto")


def test_what_is_not_ours_is_no_checkpoint(tmp_path):
    (tmp_path / "step_000007").mkdir()
    (tmp_path / "step_000007" / "thesis.txt").write_text("all of it")
    assert found(tmp_path, "auto") is None
    with pytest.raises(InputError, match="no such step"):
        found(tmp_path, "7")


# Does it fit -------------------------------------------------------------------------------------


def test_a_checkpoint_of_other_sizes_is_refused_by_what_differs(tmp_path):
    trained(tmp_path, steps=1)
    model = tiny_gpt(n_layer=3)
    optimizer = build_optimizer(model, unembedding_lr=0.1, embedding_lr=0.1, matrix_lr=0.1)
    with pytest.raises(InputError, match=r"step_000001 has {'n_layer': 2}, this run {'n_layer': 3}; resume with"):
        resume.restore(resume.find(RT, tmp_path, "auto"), model, optimizer, {})


@pytest.mark.parametrize(("key", "what"), [("tokenizer", "the tokenizer"), ("data", "the training data")])
def test_another_tokenizer_or_text_is_refused_unless_accepted(tmp_path, key, what, capsys):
    trained(tmp_path, steps=1, facts={key: "one"})
    saved = resume.find(RT, tmp_path, "auto")
    model = tiny_gpt()
    optimizer = build_optimizer(model, unembedding_lr=0.1, embedding_lr=0.1, matrix_lr=0.1)
    with pytest.raises(InputError, match=rf"^{what} changed since .*step_000001 was saved; .* --accept_changes"):
        resume.restore(saved, model, optimizer, {key: "other"})
    state, _ = resume.restore(saved, model, optimizer, {key: "other"}, accept_changes=True)
    assert state.step == 1
    assert f"warning: {what} changed" in capsys.readouterr().out


def test_settings_and_versions_that_changed_are_said(tmp_path, capsys):
    trained(tmp_path, steps=1, facts={"user_config": {"matrix_lr": 0.02, "run": "a", "depth": 2}})
    edit_manifest(tmp_path / "step_000001", versions={"torch": "1.13"})
    make_trainer(tmp_path, resume="auto", facts={"user_config": {"matrix_lr": 0.01, "run": "b", "depth": 2}})
    output = capsys.readouterr().out
    assert "Settings that changed: matrix_lr 0.02 -> 0.01\n" in output
    assert f"Versions that changed: torch 1.13 -> {torch.__version__}\n" in output


def test_a_run_goes_on_in_its_own_dtype_which_timing_chose(tmp_path, monkeypatch):
    monkeypatch.delenv("NANOCHAT_DTYPE")
    trained(tmp_path, steps=1)
    saved = resume.find(RT, tmp_path, "auto")
    bf16 = Runtime(torch.device("cpu"), torch.bfloat16)
    assert resume.same_dtype(bf16, saved).dtype == torch.float32
    assert resume.same_dtype(bf16, None).dtype == torch.bfloat16
    monkeypatch.setenv("NANOCHAT_DTYPE", "bfloat16")
    assert resume.same_dtype(bf16, saved).dtype == torch.bfloat16


# Deterministic -----------------------------------------------------------------------------------


def test_deterministic_takes_no_dtype_that_was_chosen_by_timing(monkeypatch):
    monkeypatch.delenv("NANOCHAT_DTYPE")
    monkeypatch.setattr(runtime, "bf16_gain", lambda: 4.0)
    try:
        assert runtime.start("cpu").dtype == torch.bfloat16
        assert not torch.are_deterministic_algorithms_enabled()
        assert runtime.start("cpu", deterministic=True).dtype == torch.float32
        assert torch.are_deterministic_algorithms_enabled()
    finally:
        torch.use_deterministic_algorithms(False)


def test_a_manifest_says_what_is_needed_to_go_on(tmp_path):
    trained(tmp_path, steps=1, facts={"tokenizer": "t", "data": "d", "user_config": {}})
    manifest = checkpoint.read_manifest(tmp_path / "step_000001")
    assert manifest.keys() >= {
        *("format", "step", "files", "model_config", "user_config", "tokenizer", "data", "loader_cursor", "rng"),
        *("loop_state", "versions", "world_size", "compute_dtype", "device_type"),
    }
