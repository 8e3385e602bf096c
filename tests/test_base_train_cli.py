"""What base_train refuses, each in one line with the nearest value that works; and what it decides by itself."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from types import SimpleNamespace

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
        (["--num_iterations=0"], "--num_iterations 0 must be at least 1; try --num_iterations=1"),
        (["--head_dim=0"], "--head_dim 0 must be at least 2; try --head_dim=2"),
        (["--fp8"], "--fp8 takes layers at least 1280 wide, a multiple of 16, and these have 256; try --depth=20"),
        (["--fp8", "--aspect_ratio=325", "--head_dim=130"], "and these have 1300; try --depth=16"),
        (["--matrix_lr=nan"], "--matrix_lr nan must be a number from 0; try --matrix_lr=0.02"),
    ],
)
def test_impossible_sizes_end_in_one_line_and_code_2(capsys, arch, flags, message):
    assert message in refusal(["--plan", "--vocab_size=4096", "--depth=4", f"--arch={arch}", *flags], capsys)


@pytest.mark.parametrize(
    ("flag", "way_out"),
    [("--window_pattern=SX", "--window_pattern=S"), ("--num_iterations=0", "--num_iterations=1"), ("--depth=5", "")],
)
def test_what_needs_neither_text_nor_tokenizer_is_refused_before_they_are_looked_for(
    flag, way_out, capsys, tmp_path, monkeypatch
):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    error = refusal([flag], capsys)
    assert flag.partition("=")[0] in error and way_out in error


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
    found = re.search(r"try (--max_seq_len=\d+) (--device_batch_size=1) (--total_batch_size=\d+)$", error)
    assert found is not None
    base_train.main([*flags, *found.groups(), "--model_tag=short"])


def test_without_a_device_batch_a_run_takes_what_fits_and_reports_every_decision(at, capsys):
    base_train.main([*SIZES, f"--dataset={at / 'notes'}", "--num_iterations=1", "--total_batch_size=512"])
    out = capsys.readouterr().out
    assert "Device batch: 8 rows" in out
    assert "Tokens / micro-batch / rank: 8 x 64 = 512" in out
    section = (at / "report" / "base-model-training.md").read_text()
    for line in (
        "compile: False",
        "target_param_data_ratio: 20",
        "device_batch_size: 8",
        "total_batch_size: 512",
        "matrix_lr: 0.0200",
    ):
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


def test_out_of_memory_in_an_update_ends_alike_and_saves_no_half_of_it(at, capsys, monkeypatch):
    def too_much(*args: object) -> None:
        raise trainer.torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")

    monkeypatch.setattr(base_train.MuonAdamW, "step", too_much)
    flags = [*SIZES, f"--dataset={at / 'notes'}", "--num_iterations=1", "--total_batch_size=512"]
    error = refusal([*flags, "--device_batch_size=8", "--model_tag=oom2"], capsys)
    assert error == "error: out of memory with 8 rows a pass; try --device_batch_size=4"
    assert not list((at / "base_checkpoints").glob("oom2/step_*"))
    error = refusal([*flags, "--device_batch_size=1", "--model_tag=oom2"], capsys)
    assert error == "error: out of memory with 1 rows a pass; try --recompute"


@pytest.mark.parametrize(
    ("stage", "flag"),
    [("base", "--recompute"), ("mid", "--max_seq_len=32"), ("sft", "a base model of fewer layers")],
)
def test_what_is_advised_where_one_row_is_too_much_is_a_flag_of_the_stage(stage, flag):
    config = SimpleNamespace(sequence_len=64, n_layer=4)
    self = SimpleNamespace(stage=stage, model=SimpleNamespace(config=config, recompute=False))
    short = torch.zeros(4, 16)  # of SFT: as much as one row of full length
    with pytest.raises(base_train.InputError, match=f"with 1 rows a pass; try {flag}$"):
        with trainer.Trainer._memory_advice(self, [(short, short)]):
            raise MemoryError


def test_out_of_memory_while_the_model_is_made_ends_in_one_line(at, capsys, monkeypatch):
    def too_much(*args: object) -> None:
        raise trainer.torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")

    monkeypatch.setattr(checkpoint, "build_model", too_much)
    flags = [*SIZES, f"--dataset={at / 'notes'}", "--num_iterations=1", "--total_batch_size=512", "--depth=4"]
    error = refusal([*flags, "--device_batch_size=8", "--model_tag=oom3"], capsys)
    assert error == "error: out of memory; try --depth=2"


def test_rows_that_are_asked_for_are_held_against_the_free_memory(at, capsys, monkeypatch):
    monkeypatch.setattr(runtime, "available_memory", lambda rt: 2**21)
    flags = [*SIZES, f"--dataset={at / 'notes'}", "--num_iterations=1", "--total_batch_size=65536"]
    error = refusal([*flags, "--device_batch_size=1024", "--model_tag=oom4"], capsys)
    assert error.startswith("error: --device_batch_size 1024 takes about 0.")
    (fewer,) = re.findall(r"; try (--device_batch_size=\d+)$", error)
    base_train.main([*flags, fewer, "--model_tag=oom4", "--total_batch_size=512"])


# What is decided ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("device", "steps", "asked", "compile"),
    [
        *(("cpu", 2, None, False), ("cpu", 3, None, True), ("cpu", 3, False, False), ("cpu", 2, True, True)),
        *(("cuda", 2, None, True), ("cuda", 2, False, False), ("mps", 3, None, False)),
    ],
)
def test_a_long_training_compiles_on_a_cpu_and_any_on_a_gpu_unless_told_otherwise(
    device, steps, asked, compile, at, monkeypatch
):
    probed = []
    monkeypatch.setattr(base_train, "find_rows", lambda *args: probed.append(args[4]) or (8, False))
    sizes = dict(depth=2, aspect_ratio=16, head_dim=16, max_seq_len=64, total_batch_size=512)
    cfg = base_train.BaseTrainConfig(**sizes, num_iterations=steps, compile=asked)
    shape = base_train.shape_of(cfg, base_train.get_tokenizer().get_vocab_size())
    monkeypatch.setattr(base_train, "COMPILE_FLOPS", 3 * 512 * shape.flops_per_token)
    rt = runtime.Runtime(torch.device(device), torch.float32)
    assert base_train.decided(cfg, rt).compile is compile
    assert probed == [compile]


@pytest.mark.parametrize(("before", "compile"), [(True, True), (False, False), ("None", False)])
def test_a_resumed_run_compiles_as_it_did(before, compile, at, monkeypatch):
    monkeypatch.setattr(base_train, "COMPILE_FLOPS", 0)
    sizes = dict(depth=2, aspect_ratio=16, head_dim=16, max_seq_len=64, total_batch_size=512, device_batch_size=8)
    cfg = base_train.BaseTrainConfig(**sizes, num_iterations=1)
    rt = runtime.Runtime(torch.device("cpu"), torch.float32)
    config = {**vars(base_train.decided(cfg, rt)), "compile": before}
    saved = SimpleNamespace(meta={"user_config": config, "device_batch_size": 8})
    assert base_train.decided(cfg, rt, saved).compile is compile


@pytest.mark.parametrize("rows", [2, 32])
def test_a_validation_ends_after_one_pass_of_the_split(rows, at, capsys, monkeypatch):
    seen = []
    evaluate = base_train.evaluate_bpb

    def counted(model, loader, *args):
        def batches():
            for inputs, targets in loader:
                seen.append(int((targets >= 0).sum()))
                yield inputs, targets

        return evaluate(model, batches(), *args)

    monkeypatch.setattr(base_train, "evaluate_bpb", counted)
    flags = [
        *SIZES,
        f"--dataset={at / 'notes'}",
        "--num_iterations=1",
        f"--total_batch_size={64 * rows}",
        "--model_tag=val",
    ]
    base_train.main([*flags, f"--device_batch_size={rows}", "--eval_tokens=10485760", "--eval_every=1"])
    cfg = base_train.BaseTrainConfig(dataset=str(at / "notes"), max_seq_len=64, device_batch_size=rows)
    rt = runtime.Runtime(torch.device("cpu"), torch.float32)
    once = base_train.batches(cfg, rt, base_train.open_text(cfg, rt), "val")
    expected = [int((targets >= 0).sum()) for _, targets in once]
    assert seen == 2 * expected  # before and after the step
    assert len(expected) == 1 if rows == 32 else len(expected) > 1
    values = re.findall(r"Validation bpb: (\S+)", capsys.readouterr().out)
    assert len(values) == 2 and all(0 < float(value) < 20 for value in values)


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
