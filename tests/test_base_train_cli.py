"""What base_train refuses, each in one line with the nearest value that works; and what it decides by itself."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
import torch

from nanochat import checkpoint, runtime, scaling, trainer
from scripts import base_train, tok_train

SIZES = [
    *("--depth=2", "--aspect_ratio=16", "--head_dim=16", "--max_seq_len=64", "--eval_tokens=64"),
    *("--core_metric_every=-1", "--sample_every=-1", "--eval_every=-1"),
]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base directory with a tokenizer, and a folder `notes` of 2,000 words or so."""
    path = tmp_path_factory.mktemp("base")
    (path / "notes").mkdir()
    for i in range(4):
        (path / "notes" / f"{i}.txt").write_text("\n\n".join(f"Note {j} of book {i}: all is well." for j in range(60)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NANOCHAT_BASE_DIR", str(path))
        tok_train.main([f"--dataset={path / 'notes'}", "--vocab_size=300"])
    return path


@pytest.fixture
def at(base: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(base))
    return base


def refusal(flags: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as stop:
        base_train.main(flags)
    lines = capsys.readouterr().err.strip().splitlines()
    assert stop.value.code == 2
    assert len(lines) == 1 and lines[0].startswith("error: ")
    return lines[0]


@pytest.mark.parametrize("arch", ["plain", "modern"])
@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--depth=0"], "--depth 0 must be at least 1; try --depth=1"),
        (["--depth=4.5"], "'4.5' is no int; try 4"),
        (["--depth=5"], "--depth 5 gives a width of 320 that 3 heads do not divide into even sizes; try --depth=4"),
        (["--depth=2", "--head_dim=3"], "try --depth=2 --head_dim=2"),
        (["--max_seq_len=0"], "--max_seq_len 0 must be at least 1; try --max_seq_len=1"),
        (["--short_window=4096"], "4096 is longer than the context of 2048 tokens; try --short_window=2048"),
        (["--short_window=0"], "--short_window 0 must be at least 1; try --short_window=1"),
        (["--window_pattern=512"], "--window_pattern '512' must be letters S (short window) and L"),
        (["--total_batch_size=100"], "is no multiple of the 2048 tokens of one pass"),
        (["--total_batch_size=100"], "try --total_batch_size=2048"),
        (["--total_batch_size=0"], "try --total_batch_size=2048"),
        (["--total_batch_size=4096", "--device_batch_size=3"], "try --total_batch_size=6144"),
        (["--device_batch_size=0"], "--device_batch_size 0 must be at least 1; try --device_batch_size=1"),
        (["--total_batch_size=8192", "--target_param_data_ratio=0"], "ratio 0.0 gives no step; the least that gives"),
        (["--total_batch_size=8192", "--target_param_data_ratio=-2"], "ratio -2.0 gives no step"),
        (["--total_batch_size=8192", "--target_param_data_ratio=nan"], "ratio nan gives no step"),
        (["--total_batch_size=8192", "--target_param_data_ratio=1e-9"], "ratio 1e-09 gives no step"),
        (["--target_flops=0"], "--target_flops 0 gives no step"),
        (["--num_iterations=0"], "--num_iterations 0 gives no step"),
        (["--matrix_lr=nan"], "--matrix_lr nan must be a number from 0; try --matrix_lr=0.02"),
    ],
)
def test_impossible_sizes_end_in_one_line_and_code_2(capsys, arch, flags, message):
    assert message in refusal(["--plan", "--vocab_size=4096", "--depth=4", f"--arch={arch}", *flags], capsys)


def test_the_ratio_that_a_refusal_offers_is_taken(capsys, monkeypatch):
    monkeypatch.setattr(runtime, "peak_flops", lambda rt: 1e11)
    flags = ["--plan", "--vocab_size=4096", "--depth=4", "--arch=modern"]
    error = refusal([*flags, "--target_param_data_ratio=0"], capsys)
    (least,) = re.findall(r"--target_param_data_ratio=\S+", error)
    base_train.main([*flags, least])
    assert "Number of iterations: 1\n" in capsys.readouterr().out


def test_a_folder_of_fewer_tokens_than_a_step_is_refused_with_a_step_that_it_has(at, capsys):
    flags = [*SIZES, f"--dataset={at / 'notes'}", "--num_iterations=1"]
    error = refusal([*flags, "--device_batch_size=2", "--total_batch_size=1048576"], capsys)
    found = re.search(r"has ([\d,]+) tokens to train on, fewer than the 1,048,576 of one step", error)
    assert found is not None
    num_tokens = int(found[1].replace(",", ""))
    nearest = num_tokens // 128 * 128
    assert nearest > 0 and error.endswith(f"try --total_batch_size={nearest}")
    assert base_train.check_text(*text_check(at, nearest)) is None


def text_check(at: Path, total_batch_size: int) -> tuple:
    cfg = base_train.BaseTrainConfig(
        dataset=str(at / "notes"), max_seq_len=64, device_batch_size=2, total_batch_size=total_batch_size
    )
    return cfg, base_train.open_source(cfg.dataset), base_train.get_tokenizer(), 1


def test_a_folder_of_less_than_one_pass_is_refused_with_fewer_rows_and_of_less_than_a_row_with_shorter_ones(at, capsys):
    flags = [*SIZES, f"--dataset={at / 'notes'}", "--num_iterations=1"]
    error = refusal([*flags, "--device_batch_size=2048", "--total_batch_size=131072"], capsys)
    found = re.search(r"try --total_batch_size=(\d+) --device_batch_size=(\d+)$", error)
    assert found is not None and int(found[1]) == 64 * int(found[2]) < 131_072
    error = refusal([*flags, "--max_seq_len=65536", "--device_batch_size=2", "--total_batch_size=131072"], capsys)
    assert error.endswith("try a smaller --max_seq_len, or add text")


def test_without_a_device_batch_a_run_takes_what_fits_and_reports_every_decision(at, capsys):
    base_train.main([*SIZES, f"--dataset={at / 'notes'}", "--num_iterations=1", "--total_batch_size=512"])
    out = capsys.readouterr().out
    assert "Device batch: 8 rows" in out
    assert "Tokens / micro-batch / rank: 8 x 64 = 512" in out
    section = (at / "report" / "base-model-training.md").read_text()
    for line in ("target_param_data_ratio: 20", "device_batch_size: 8", "total_batch_size: 512", "matrix_lr: 0.0200"):
        assert f"- {line}\n" in section


def test_modern_trains_with_the_batch_and_rates_of_its_depth(at, capsys):
    flags = [*SIZES, f"--dataset={at / 'notes'}", "--arch=modern", "--num_iterations=1", "--model_tag=m"]
    base_train.main([*flags, "--target_param_data_ratio=0.05"])
    section = (at / "report" / "base-model-training.md").read_text()
    (batch,) = re.findall(r"- total_batch_size: ([\d,]+)\n", section)
    (rate,) = re.findall(r"- matrix_lr: ([\d.]+)\n", section)
    batch = int(batch.replace(",", ""))
    assert batch % 64 == 0
    assert float(rate) == pytest.approx(0.02 * scaling.LR_MOST)  # one step is as short as a run can be


def test_out_of_memory_in_a_step_ends_in_one_line_with_the_rows_that_fit(at, capsys, monkeypatch):
    def too_much(*args: object) -> None:
        raise trainer.torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")

    monkeypatch.setattr(trainer, "accumulate", too_much)
    flags = [*SIZES, f"--dataset={at / 'notes'}", "--num_iterations=1", "--total_batch_size=512"]
    error = refusal([*flags, "--device_batch_size=8", "--model_tag=oom"], capsys)
    assert error == "error: out of memory with 8 rows a pass; try --device_batch_size=4"


# Going on ----------------------------------------------------------------------------------------


RUN = [*SIZES, "--total_batch_size=512", "--device_batch_size=4"]


def last(tag: str) -> checkpoint.Checkpoint:
    return checkpoint.load(checkpoint.find("base", tag), with_optimizer=True)


@pytest.mark.parametrize("more", [[], ["--deterministic"]])
def test_one_seed_gives_one_result_and_another_seed_another(at, more):
    flags = [*RUN, f"--dataset={at / 'notes'}", "--num_iterations=3", *more]
    for tag, seed in (("one", 1), ("again", 1), ("other", 2)):
        base_train.main([*flags, f"--model_tag={tag}", f"--seed={seed}"])
    torch.use_deterministic_algorithms(False)
    one, again, other = (last(tag).model for tag in ("one", "again", "other"))
    assert all(torch.equal(one[name], again[name]) for name in one)
    assert not all(torch.equal(one[name], other[name]) for name in one)


def test_deterministic_wants_the_rows_of_a_pass(capsys):
    assert "--deterministic needs --device_batch_size" in refusal(["--deterministic"], capsys)


def test_a_resumed_run_decides_nothing_anew(at, capsys, monkeypatch):
    """Rows follow from the free memory, batch and rates from the ranks and the horizon: all may differ by then."""
    flags = [*SIZES, f"--dataset={at / 'notes'}", "--arch=modern", "--model_tag=on", "--total_batch_size=512"]
    base_train.main([*flags, "--num_iterations=4"])
    before = last("on").meta["user_config"]
    monkeypatch.setattr(base_train, "find_rows", lambda *args: pytest.fail("rows were looked for again"))
    base_train.main([*flags, "--num_iterations=6", "--resume=4"])
    after = last("on").meta["user_config"]
    changed = {key for key in before if before[key] != after[key]}
    assert changed == {"num_iterations", "resume"}
    assert "Settings that changed: num_iterations 4 -> 6\n" in capsys.readouterr().out


def test_text_that_changed_is_refused_until_it_is_accepted(at, tmp_path, capsys):
    notes = tmp_path / "notes"
    shutil.copytree(at / "notes", notes)
    flags = [*RUN, f"--dataset={notes}", "--model_tag=changed"]
    base_train.main([*flags, "--num_iterations=1"])
    (notes / "0.txt").write_text((notes / "0.txt").read_text().replace("all is well", "all is lost"))
    capsys.readouterr()
    flags += ["--num_iterations=2", "--resume=auto"]
    assert "the training data changed since" in refusal(flags, capsys)
    base_train.main([*flags, "--accept_changes"])
    assert last("changed").meta["step"] == 2
