"""Checkpoints: whole or not there, verified when read, found by tag and step."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from nanochat import checkpoint, environment
from nanochat.config import InputError
from nanochat.gpt import GPT, GPTConfig
from nanochat.optim import MuonAdamW, build_optimizer
from nanochat.runtime import Runtime
from tests.conftest import save_checkpoint, tiny_gpt
from tests.tiny_engine import TEXT, tiny_tokenizer

RT = Runtime(torch.device("cpu"), torch.float32)


def trained(seed: int = 0) -> tuple[GPT, MuonAdamW]:
    """A model after one step."""
    model = tiny_gpt(seed)
    optimizer = build_optimizer(model, unembedding_lr=0.004, embedding_lr=0.2, matrix_lr=0.02)
    idx = torch.arange(8)[None]
    model(idx, idx).backward()
    optimizer.step()
    return model, optimizer


def save(directory: Path, step: int, seed: int = 0, **meta: Any) -> Path:
    model, optimizer = trained(seed)
    return save_checkpoint(directory, step, model, optimizer, meta)


def touch(path: Path, mtime: int | None = None) -> None:
    """A checkpoint directory, as far as find() looks."""
    path.mkdir(parents=True)
    (path / "manifest.json").write_text("{}", encoding="utf-8")
    if mtime is not None:
        os.utime(path.parent, (mtime, mtime))


def names(directory: Path) -> list[str]:
    return sorted(p.name for p in directory.iterdir())


# Save and load -----------------------------------------------------------------------------------


def test_what_is_loaded_is_what_was_saved_to_the_bit(tmp_path):
    model, optimizer = trained()
    meta = {"loop_state": {"step": 7}, "name": "déjà vu"}
    path = save_checkpoint(tmp_path / "d2", 7, model, optimizer, meta)
    assert path == tmp_path / "d2" / "step_000007"
    assert names(tmp_path / "d2") == ["step_000007"]
    assert names(path) == ["manifest.json", "model.safetensors", "optim.safetensors"]
    loaded = checkpoint.load(path, with_optimizer=True)
    for saved, read in ((model.state_dict(), loaded.model), (optimizer.state_dict(), loaded.optimizer)):
        assert saved.keys() == read.keys()
        assert all(torch.equal(saved[key], read[key]) for key in saved)
    assert loaded.meta["step"] == 7
    assert loaded.meta["loop_state"] == {"step": 7}
    assert loaded.meta["name"] == "déjà vu"


def test_a_checkpoint_without_optimizer_serves_but_cannot_be_resumed(tmp_path):
    path = save_checkpoint(tmp_path, 1, tiny_gpt(), None, {})
    assert checkpoint.load(path).optimizer is None
    with pytest.raises(InputError, match=r"holds no optim.safetensors; it cannot be resumed from"):
        checkpoint.load(path, with_optimizer=True)


# Damage ------------------------------------------------------------------------------------------


def flip_a_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


DAMAGE = {
    "cut short": lambda path: (path / "model.safetensors").write_bytes((path / "model.safetensors").read_bytes()[:-9]),
    "a byte flipped": lambda path: flip_a_byte(path / "model.safetensors"),
    "an optimizer byte flipped": lambda path: flip_a_byte(path / "optim.safetensors"),
    "weights missing": lambda path: (path / "model.safetensors").unlink(),
    "manifest cut short": lambda path: (path / "manifest.json").write_text('{"format": 1, "st'),
    "manifest not text": lambda path: (path / "manifest.json").write_bytes(b"\xff\xfe"),
    "manifest a list": lambda path: (path / "manifest.json").write_text("[]"),
    "manifest empty": lambda path: (path / "manifest.json").write_text("{}"),
    "manifest without files": lambda path: (path / "manifest.json").write_text('{"format": 1, "step": 3}'),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_checkpoint_is_refused_in_one_line_that_names_it(tmp_path, damage):
    path = save(tmp_path, 3)
    DAMAGE[damage](path)
    with pytest.raises(InputError, match=r"^damaged checkpoint .*step_000003.*delete the directory$") as caught:
        checkpoint.load(path, with_optimizer=True)
    assert "\n" not in str(caught.value)


def test_without_manifest_it_is_no_checkpoint(tmp_path):
    path = save(tmp_path, 3)
    (path / "manifest.json").unlink()
    assert checkpoint.steps(tmp_path) == []
    with pytest.raises(InputError, match=r"no checkpoint at .*step_000003: it has no manifest.json"):
        checkpoint.load(path)


def test_a_later_format_is_refused_by_number(tmp_path):
    path = save(tmp_path, 3)
    manifest = json.loads((path / "manifest.json").read_text())
    (path / "manifest.json").write_text(json.dumps({**manifest, "format": 2}))
    with pytest.raises(InputError, match=r"has format 2; this version reads 1"):
        checkpoint.load(path)


# Killed while saving -----------------------------------------------------------------------------


class Killed(BaseException):
    """Stands for kill -9: nothing is cleaned up behind it."""


def kill_at_rename(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """From the given rename on (0 = the first) nothing happens on disk any more."""
    renames = []
    rename, rmtree = Path.rename, shutil.rmtree

    def dying(self: Path, target: Path) -> Path:
        renames.append(target)
        if len(renames) > number:
            raise Killed
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", dying)
    monkeypatch.setattr(shutil, "rmtree", lambda *a, **kw: None if len(renames) > number else rmtree(*a, **kw))


def killed_save(directory: Path, step: int, at_rename: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        kill_at_rename(patch, at_rename)
        with pytest.raises(Killed):
            save(directory, step, seed=1)


def test_killed_before_the_rename_leaves_the_earlier_checkpoint_the_last(tmp_path):
    root = environment.base_dir() / "base_checkpoints" / "d2"
    save(root, 10)
    killed_save(root, 20, at_rename=0)
    assert any(name.startswith(".staging-") for name in names(root))
    assert checkpoint.find("base") == root / "step_000010"
    checkpoint.load(root / "step_000010", with_optimizer=True)


@pytest.mark.parametrize("at_rename", [0, 1])
def test_killed_while_replacing_the_same_step_leaves_the_old_one_loadable(tmp_path, at_rename):
    root = environment.base_dir() / "base_checkpoints" / "d2"
    save(root, 10, mark="old")
    killed_save(root, 10, at_rename)
    assert checkpoint.steps(root) == [10]
    assert checkpoint.load(checkpoint.find("base"), with_optimizer=True).meta["mark"] == "old"


@pytest.mark.parametrize("at_rename", [0, 1])
def test_the_next_save_clears_what_a_killed_one_left(tmp_path, at_rename):
    save(tmp_path, 10, mark="old")
    killed_save(tmp_path, 10, at_rename)
    save(tmp_path, 10, mark="new")
    assert names(tmp_path) == ["step_000010"]
    assert checkpoint.load(tmp_path / "step_000010").meta["mark"] == "new"


def test_a_failing_disk_leaves_nothing_behind(tmp_path, monkeypatch):
    def full(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(OSError, match="No space left"):
        save(tmp_path, 10)
    assert names(tmp_path) == []


# Tag and step ------------------------------------------------------------------------------------


def test_the_deepest_tag_wins_and_the_depth_is_a_number(tmp_path):
    root = environment.base_dir() / "base_checkpoints"
    for tag in ("d8", "d20", "d4-long", "e99"):
        touch(root / tag / "step_000001")
    assert checkpoint.find("base") == root / "d20" / "step_000001"


def test_a_tag_counts_by_the_depth_that_it_starts_with(tmp_path):
    root = environment.base_dir() / "base_checkpoints"
    for tag in ("d8", "d12_experiment", "old-d26"):
        touch(root / tag / "step_000001")
    assert checkpoint.find("base").parent.name == "d12_experiment"


def test_of_one_depth_the_plain_tag_comes_first_and_then_the_newest():
    root = environment.base_dir() / "chatsft_checkpoints"
    touch(root / "d4" / "step_000001", 1_000)
    for tag, mtime in (("d4-own", 3_000), ("d4-dpo", 4_000), ("d4-zebra", 2_000), ("d2", 5_000)):
        touch(root / tag / "step_000001", mtime)
    assert checkpoint.find("sft").parent.name == "d4"
    (root / "d4").rename(root / "x4")
    assert checkpoint.find("sft").parent.name == "d4-dpo"


def test_without_depths_the_newest_tag_wins(tmp_path):
    root = environment.base_dir() / "mid_checkpoints"
    for tag, mtime in (("zebra", 1_000), ("aqua", 3_000), ("rat", 2_000)):
        touch(root / tag / "step_000001", mtime)
    assert checkpoint.find("mid").parent.name == "aqua"


def test_the_last_step_is_the_largest_number_not_the_last_string(tmp_path):
    root = environment.base_dir() / "base_checkpoints" / "d4"
    for step in ("step_999999", "step_1000000", "step_000200"):
        touch(root / step)
    for odd in ("step_2", "step_final", "step_0000300x", ".staging-abc"):
        touch(root / odd)
    assert checkpoint.steps(root) == [200, 999_999, 1_000_000]
    assert checkpoint.find("base").name == "step_1000000"
    assert checkpoint.find("base", "d4", 200).name == "step_000200"


def test_a_tag_without_a_whole_checkpoint_does_not_count(tmp_path):
    root = environment.base_dir() / "base_checkpoints"
    touch(root / "d4" / "step_000001")
    (root / "d20" / "step_000009").mkdir(parents=True)  # no manifest
    assert checkpoint.find("base").parent.name == "d4"


@pytest.mark.parametrize(
    ("source", "command"),
    [("base", "base_train"), ("mid", "mid_train"), ("sft", "chat_sft"), ("rl", "chat_rl")],
)
def test_no_checkpoint_names_the_stage_that_makes_one(source, command):
    with pytest.raises(InputError, match=rf"no {source} checkpoint in .*; train one: python -m scripts.{command}$"):
        checkpoint.find(source)


def test_an_unknown_tag_or_step_is_refused_with_those_there_are(tmp_path):
    root = environment.base_dir() / "chatsft_checkpoints"
    for tag, step in (("d4", 5), ("d8", 100), ("d8", 200)):
        touch(root / tag / f"step_{step:06d}")
    with pytest.raises(InputError, match=r"no sft checkpoint with tag 'd9' in .*; there are: d4, d8$"):
        checkpoint.find("sft", "d9")
    with pytest.raises(InputError, match=r"no step 150 of sft checkpoint 'd8'; there are: 100, 200$"):
        checkpoint.find("sft", None, 150)


@pytest.mark.parametrize("tag", ["../d4", "a/b", "", ".hidden", "a b"])
def test_a_tag_that_is_no_plain_directory_name_is_refused(tag):
    with pytest.raises(InputError, match="is no plain directory name"):
        checkpoint.tag_directory("base", tag)


# A model from its checkpoint ---------------------------------------------------------------------


@pytest.fixture
def with_tokenizer(tmp_path: Path) -> Any:
    tokenizer = tiny_tokenizer()
    tokenizer.save(tmp_path / "tokenizer")
    return tokenizer


def save_model(tokenizer: Any, vocab_size: int | None = None) -> GPT:
    model = tiny_gpt(vocab_size=vocab_size or tokenizer.get_vocab_size())
    meta = {"model_config": model.config.to_dict(), "tokenizer": tokenizer.fingerprint}
    save_checkpoint(checkpoint.tag_directory("base", "d2"), 4, model, None, meta)
    return model


def test_a_loaded_model_gives_the_logits_of_the_saved_one(with_tokenizer):
    model = save_model(with_tokenizer)
    loaded, tokenizer, meta = checkpoint.load_model("base", RT)
    idx = torch.tensor([tokenizer.encode(TEXT[0])])
    assert torch.equal(loaded(idx), model(idx))
    assert (meta["tag"], meta["step"]) == ("d2", 4)


def test_a_bf16_checkpoint_loads_as_fp32_on_a_cpu(with_tokenizer):
    model = save_model(with_tokenizer).to(torch.bfloat16)
    meta = {"model_config": model.config.to_dict(), "tokenizer": with_tokenizer.fingerprint}
    save_checkpoint(checkpoint.tag_directory("base", "d2"), 5, model, None, meta)
    loaded, _, _ = checkpoint.load_model("base", RT, step=5)
    assert {p.dtype for p in loaded.parameters()} == {torch.float32}
    assert loaded(torch.arange(5)[None]).isfinite().all()


def test_another_tokenizer_than_the_one_of_training_is_refused(with_tokenizer):
    save_model(with_tokenizer)
    other = type(with_tokenizer).train_from_iterator(["a quite different text " * 20], 280)
    other.save(environment.base_dir() / "tokenizer")
    with pytest.raises(InputError, match=r"was trained with another tokenizer.*put that one back"):
        checkpoint.load_model("base", RT)


def test_a_fresh_model_has_the_sizes_and_the_compute_dtype_asked_for():
    rt = Runtime(torch.device("cpu"), torch.bfloat16)
    model = checkpoint.build_model(GPTConfig(8, 50, 1, 2, 2, 16), rt)
    assert model.features(torch.arange(4)[None]).dtype == torch.bfloat16
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert not model.lm_head.weight.any()
