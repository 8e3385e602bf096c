"""Flags: both spellings, both forms, off values, and one line with exit code 2 for what is wrong."""

from __future__ import annotations

import importlib
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from nanochat.config import REQUIRED, InputError, flag, parse_config, report_config, run_cli


@dataclass(frozen=True)
class Config:
    run: str = flag("dummy", "run name")
    device_batch_size: int = flag(32, "rows")
    matrix_lr: float = flag(0.02, "learning rate, 2% by habit")
    num_iterations: int | None = flag(None, "steps", off=-1)
    target_flops: float | None = flag(None, "FLOPs", off=-1.0)
    model_tag: str | None = flag(None, "tag", off="")
    top_k: int | None = flag(50, "candidates", off=0)
    dry_run: bool = flag(False, "save nothing")
    arch: str = flag("plain", "architecture", choices=("plain", "other"), new=True)
    compile: bool | None = flag(None, "torch.compile", off="None", new=True)
    prompt: str = flag("", "what to say", short="-p", new=True)

    def __post_init__(self) -> None:
        if self.device_batch_size < 1:
            raise InputError(f"--device_batch_size {self.device_batch_size} must be at least 1")


def parse(*argv: str) -> Config:
    return parse_config(Config, argv)


def test_without_flags_the_defaults_stand():
    assert parse() == Config()


@pytest.mark.parametrize(
    "argv",
    [
        ["--device_batch_size=4"],
        ["--device-batch-size=4"],
        ["--device_batch_size", "4"],
        ["--device-batch-size", "4"],
        ["--", "--device_batch_size=4"],  # as behind torchrun
    ],
)
def test_both_spellings_and_both_forms_are_one_flag(argv):
    assert parse(*argv) == Config(device_batch_size=4)


def test_the_last_of_two_spellings_wins():
    assert parse("--device_batch_size=4", "--device-batch-size=8").device_batch_size == 8


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["--dry_run"], True),
        (["--dry-run"], True),
        (["--dry-run", "--no-dry-run"], False),
        (["--dry_run", "--no-dry_run"], False),
        ([], False),
    ],
)
def test_a_bool_has_its_no_twin(argv, expected):
    assert parse(*argv).dry_run is expected


@pytest.mark.parametrize(("argv", "expected"), [([], None), (["--compile"], True), (["--no-compile"], False)])
def test_a_bool_that_may_be_unset_has_three_values(argv, expected):
    assert parse(*argv).compile is expected


@pytest.mark.parametrize(
    ("argument", "field"),
    [
        ("--num_iterations=-1", "num_iterations"),
        ("--num_iterations=None", "num_iterations"),
        ("--target_flops=-1", "target_flops"),
        ("--target_flops=-1.0", "target_flops"),
        ("--model_tag=", "model_tag"),
        ("--top_k=0", "top_k"),
    ],
)
def test_the_off_value_and_none_mean_not_set(argument, field):
    assert getattr(parse(argument), field) is None


def test_an_off_value_may_stand_behind_a_space():
    assert parse("--num_iterations", "-1").num_iterations is None


@pytest.mark.parametrize(
    ("argument", "field", "expected"),
    [
        ("--num_iterations=1_000", "num_iterations", 1000),
        ("--target_flops=1", "target_flops", 1.0),
        ("--target_flops=4e19", "target_flops", 4e19),
        ("--run=a=b", "run", "a=b"),
        ("--run=None", "run", "None"),  # a string that cannot be unset
        ("--prompt=-1", "prompt", "-1"),
    ],
)
def test_values_are_read_as_their_fields_type(argument, field, expected):
    value = getattr(parse(argument), field)
    assert value == expected and type(value) is type(expected)


def test_a_short_spelling_works_beside_the_long_one():
    assert parse("-p", "hello there").prompt == parse("--prompt=hello there").prompt == "hello there"


@pytest.mark.parametrize(
    ("argv", "named"),
    [
        (["--depht=4"], "--depht=4"),
        (["--device_batch=4"], "--device_batch=4"),  # no abbreviations
        (["stray"], "stray"),
        (["--device_batch_size=many"], "'many' is no int"),
        (["--device_batch_size=1.5"], "'1.5' is no int"),
        (["--device_batch_size=None"], "'None' is no int"),
        (["--matrix_lr=fast"], "'fast' is no float"),
        (["--device_batch_size"], "expected one argument"),
        (["--arch=mamba"], "'mamba'"),
        (["--dry_run=maybe"], "dry"),
        (["--device_batch_size=0"], "--device_batch_size 0 must be at least 1"),
    ],
)
def test_wrong_input_is_one_line_on_stderr_and_exit_code_2(argv, named, capsys):
    with pytest.raises(InputError) as caught:
        parse(*argv)
    assert named in str(caught.value)

    def never(cfg: Config) -> None:
        raise AssertionError("it ran")

    with pytest.raises(SystemExit) as ended:
        run_cli(Config, never, argv)
    assert ended.value.code == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err == f"error: {caught.value}\n" and err.count("\n") == 1


def test_wrong_input_found_while_running_ends_the_same_way(capsys):
    def run(cfg: Config) -> None:
        raise InputError("no tokenizer at /x; train one: python -m scripts.tok_train")

    with pytest.raises(SystemExit) as ended:
        run_cli(Config, run, [])
    assert ended.value.code == 2
    assert capsys.readouterr().err == "error: no tokenizer at /x; train one: python -m scripts.tok_train\n"


def test_a_bug_keeps_its_traceback():
    def run(cfg: Config) -> None:
        raise ValueError("ours")

    with pytest.raises(ValueError, match="ours"):
        run_cli(Config, run, [])


def test_help_shows_the_page_each_flag_and_its_default(capsys):
    with pytest.raises(SystemExit) as ended:
        run_cli(Config, lambda cfg: None, ["--help"], about="Pretrain.\n\n    indented example")
    assert ended.value.code == 0
    text = capsys.readouterr().out
    assert "Pretrain.\n\n    indented example" in text
    assert "--device_batch_size" in text and "--device-batch-size" in text
    assert "(default -1)" in text and "2% by habit" in text


@dataclass(frozen=True)
class Needs:
    source: str = flag(REQUIRED, "base or mid", choices=("base", "mid"), short="-i")


def test_a_required_flag_is_asked_for_by_name():
    assert parse_config(Needs, ["-i", "mid"]) == Needs(source="mid")
    with pytest.raises(InputError, match=r"required: .*--source"):
        parse_config(Needs, [])


def test_the_report_prints_off_values_in_order_and_new_settings_apart():
    old, new = report_config(parse("--device_batch_size=4", "--top_k=0"))
    assert list(old.items()) == [
        ("run", "dummy"),
        ("device_batch_size", 4),
        ("matrix_lr", 0.02),
        ("num_iterations", -1),
        ("target_flops", -1.0),
        ("model_tag", ""),
        ("top_k", 0),
        ("dry_run", False),
    ]
    assert new == {"arch": "plain", "compile": "None", "prompt": ""}


STAGES = [
    *("tok_train", "tok_eval", "base_train", "base_loss", "base_eval", "mid_train"),
    *("chat_sft", "chat_rl", "chat_eval", "chat_cli", "chat_web", "make_identity", "export"),
]


def stage(name: str, argv: Sequence[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", f"scripts.{name}", *argv],
        cwd=Path(__file__).parent.parent,
        capture_output=True,
        text=True,
        encoding="utf-8",
        timeout=60,
    )


def test_a_stage_from_the_shell_ends_with_code_2_and_one_line():
    done = stage("base_train", ["--depht=4"])
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: unrecognized arguments: --depht=4 (see --help)\n"


@pytest.mark.parametrize("name", STAGES)
def test_every_stage_refuses_an_unknown_flag(name, capsys):
    needed = {"chat_eval": ["--source=base"], "make_identity": ["--about=me.yaml"]}
    argv = ["--no-such-flag=1", *needed.get(name, [])]
    with pytest.raises(SystemExit) as ended:
        importlib.import_module(f"scripts.{name}").main(argv)
    assert ended.value.code == 2
    assert capsys.readouterr().err == "error: unrecognized arguments: --no-such-flag=1 (see --help)\n"


@pytest.mark.parametrize("name", STAGES)
def test_every_stage_answers_help(name, capsys):
    with pytest.raises(SystemExit) as ended:
        importlib.import_module(f"scripts.{name}").main(["--help"])
    assert ended.value.code == 0
    assert f"python -m scripts.{name}" in capsys.readouterr().out


@dataclass(frozen=True)
class Repeats:
    task: tuple[str, ...] = flag((), "of 100%", off="None", new=True)


def test_a_flag_of_many_values_is_repeated_in_order_and_reported_as_one_line():
    assert parse_config(Repeats, []) == Repeats()
    cfg = parse_config(Repeats, ["--task=b", "--task", "a"])
    assert cfg == Repeats(("b", "a")) and parse_config(Repeats, ["--task=b"]) == Repeats(("b",))
    assert report_config(cfg) == ({}, {"task": "b, a"})
    assert report_config(Repeats()) == ({}, {"task": "None"})
    with pytest.raises(SystemExit):
        parse_config(Repeats, ["--help"])
