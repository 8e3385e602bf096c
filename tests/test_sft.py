"""Supervised fine-tuning on conversations of one's own: how many steps, what is measured, and going on from SFT."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from nanochat import checkpoint
from nanochat.config import InputError, parse_config
from nanochat.tokenizer import Tokenizer
from scripts import chat_sft, mid_train
from scripts.chat_sft import ChatSFTConfig, loss_sums, settled, tags
from tests.tiny_stages import cat_tokenizer, save_d2

SMALL = ["--eval_every=-1", "--eval_metrics_every=-1", "--device_batch_size=2", "--mixture=none"]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return cat_tokenizer()


@pytest.fixture
def base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """With models d2 of all stages, the SFT one made with settings of its own."""
    monkeypatch.chdir(tmp_path)
    for stage, settings in (("base", {}), ("mid", {}), ("sft", {"matrix_lr": 0.5, "mixture": "none"})):
        save_d2(tmp_path, stage, settings, sequence_len=32)
    return tmp_path


def write(path: Path, number: int, answer: str = "the cat {i}") -> str:
    lines = [
        [{"role": "user", "content": f"who sat {i}?"}, {"role": "assistant", "content": answer.format(i=i)}]
        for i in range(number)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(path)


def section(base: Path, name: str) -> dict[str, str]:
    lines = (base / "report" / name).read_text().splitlines()
    return dict(line[2:].split(": ", 1) for line in lines if line.startswith("- "))


@pytest.mark.parametrize(
    ("rows", "epochs", "examples", "steps"), [(10, 1, 4, 3), (10, 2, 4, 5), (3, 1, 8, 1), (8, 3, 8, 3), (10, 1, 3, 4)]
)
def test_a_run_is_as_many_steps_as_show_every_conversation_the_right_number_of_times(
    base: Path, rows: int, epochs: int, examples: int, steps: int
):
    mine = write(base / "mine.jsonl", rows)
    flags = [f"--conversations={mine}", f"--num_epochs={epochs}", f"--target_examples_per_step={examples}"]
    chat_sft.main([*SMALL, *flags])
    saved = checkpoint.read_manifest(checkpoint.find("sft", "d2"))
    assert saved["step"] == steps and saved["loader_cursor"] == rows * epochs
    facts = section(base, "chat-sft.md")
    assert facts["Number of iterations"] == str(steps) and facts["Training rows"] == str(rows)
    assert facts[mine] == f"{rows} rows"


def test_validation_is_nats_a_token_and_bits_a_byte_of_the_answers_alone(tokenizer: Tokenizer):
    ids = tokenizer.encode("the cat sat")
    end = tokenizer.encode_special("<|assistant_end|>")
    targets = torch.tensor([[-1, -1, *ids, end]])

    def model(inputs: torch.Tensor, targets: torch.Tensor, reduction: str) -> torch.Tensor:
        assert reduction == "none"
        return torch.where(targets == end, 7.0, 2.0).masked_fill(targets == -1, 0).view(-1)

    sums = loss_sums(model, [(targets, targets)] * 3, tokenizer.token_bytes())
    assert sums.tolist() == [3 * (2 * len(ids) + 7), 3 * (len(ids) + 1), 3 * 2 * len(ids), 3 * len("the cat sat")]


def test_the_report_has_validation_bpb_after_the_references_keys(base: Path, capsys: Any):
    chat_sft.main([*SMALL[1:], f"--conversations={write(base / 'mine.jsonl', 4)}", "--eval_steps=1"])
    facts = section(base, "chat-sft.md")
    bpb = float(facts["Validation bpb"])
    assert 0 < bpb < math.inf and list(facts).index("Validation bpb") > list(facts).index("Validation loss")
    assert f"| Validation bpb: {bpb:.4f}" in capsys.readouterr().out


def test_midtraining_takes_tasks_and_conversations_and_reports_them(base: Path):
    mine = write(base / "mine.jsonl", 40)
    sizes = ["--max_seq_len=16", "--device_batch_size=2", "--total_batch_size=32", "--num_iterations=1"]
    flags = ["--mixture=none", "--task=TinySums:5", f"--conversations={mine}:3", "--eval_every=-1"]
    mid_train.main([*sizes, *flags])
    facts = section(base, "midtraining.md")
    assert facts["TinySums train"] == "5 rows" and facts[mine] == "40 rows x 3" and facts["Training rows"] == "125"
    assert facts["task"] == "TinySums:5" and facts["mixture"] == "none"


def test_conversations_that_are_cut_are_named_and_a_malformed_file_ends_the_run(base: Path, capsys: Any):
    mine = write(base / "mine.jsonl", 2, "the cat sat on the mat and on " * 20)
    chat_sft.main([*SMALL, f"--conversations={mine}"])
    assert "warning: 2 of 2 conversations of" in capsys.readouterr().out
    Path(mine).write_text("[]\n")
    with pytest.raises(SystemExit):
        chat_sft.main([*SMALL, f"--conversations={mine}"])
    assert "line 1:" in capsys.readouterr().err


def test_going_on_from_sft_leaves_the_model_writes_another_and_takes_its_settings(base: Path, capsys: Any):
    mine = write(base / "mine.jsonl", 10)
    command = [*SMALL[:3], "--source=sft", f"--conversations={mine}:2", "--replay=0"]
    before = checkpoint.find("sft", "d2")
    chat_sft.main(command)
    taught = checkpoint.read_manifest(checkpoint.find("sft", "d2-own"))
    assert taught["user_config"]["matrix_lr"] == 0.5 and taught["loader_cursor"] == 20
    printed = capsys.readouterr().out
    assert "As in the run before: --matrix_lr=0.5, --mixture=none" in printed
    assert "Talk to it: python -m scripts.chat_cli -g d2-own" in printed
    assert checkpoint.find("sft", "d2") == checkpoint.find("sft") == before
    chat_sft.main([*command, "--matrix_lr=0.1"])  # the same command starts from the same model
    assert checkpoint.read_manifest(checkpoint.find("sft", "d2-own"))["user_config"]["matrix_lr"] == 0.1


def test_what_is_read_and_what_is_written(base: Path):
    def names(**settings: Any) -> tuple[str, str]:
        return tags(ChatSFTConfig(**settings))

    assert names() == ("d2", "d2") and names(save_tag="x") == ("d2", "x")
    assert names(source="sft") == ("d2", "d2-own") and names(source="sft", save_tag="x") == ("d2", "x")
    (base / "chatsft_checkpoints" / "d2").rename(base / "chatsft_checkpoints" / "d2-own")
    with pytest.raises(InputError, match="d2-own would be written over; name what comes out"):
        names(source="sft")
    assert names(source="sft", model_tag="d2-own", save_tag="y") == ("d2-own", "y")


def test_settings_of_the_run_before_stand_where_the_command_gives_none():
    cfg = ChatSFTConfig(matrix_lr=0.3, conversations=("a.jsonl",))
    before = {"matrix_lr": 0.1, "embedding_lr": 0.7, "task": "TinySums:5, TinyMC:3", "eval_metrics_every": -1}
    before |= {"conversations": "b.jsonl", "mixture": "None", "num_epochs": 9, "aqua_train_examples": 0}
    assert settled(cfg, before) == dataclasses.replace(
        cfg, embedding_lr=0.7, task=("TinySums:5", "TinyMC:3"), eval_metrics_every=None, aqua_train_examples=0
    )
    assert settled(cfg, {"task": "None"}) == cfg
    default = parse_config(ChatSFTConfig, [f"--matrix_lr={ChatSFTConfig.matrix_lr}", "--eval-metrics-every=200"])
    assert settled(default, before | {"eval_metrics_every": 7}).matrix_lr == ChatSFTConfig.matrix_lr
    assert settled(default, before | {"eval_metrics_every": 7}).eval_metrics_every == 200


def test_learning_rates_of_what_comes_after_sft_are_parts_of_sfts_however_many_runs_came_between():
    teach, prefer, go_on = (
        ChatSFTConfig(source="sft", **more) for more in ({"conversations": ("a.jsonl",)}, {"dpo": "b.jsonl"}, {})
    )
    sft = {"source": "mid", "init_lr_frac": 0.4, "dpo": "None", "conversations": "own.jsonl"}
    taught = {"source": "sft", "init_lr_frac": 0.5, "dpo": "None", "conversations": "a.jsonl"}
    prefers = {"source": "sft", "init_lr_frac": 0.1, "dpo": "b.jsonl", "conversations": "None"}
    for before in (sft, taught, prefers):
        rates = [settled(cfg, before).init_lr_frac for cfg in (teach, prefer, go_on)]
        assert rates == pytest.approx([0.5, 0.1, 0.4])
    told = parse_config(ChatSFTConfig, ["--source=sft", "--conversations=a.jsonl", "--init_lr_frac=0.02"])
    assert settled(told, sft).init_lr_frac == 0.02


def test_a_warm_start_takes_the_optimizers_state_and_says_where_there_is_none(base: Path, capsys: Any):
    mine = write(base / "mine.jsonl", 4)
    with pytest.raises(SystemExit):
        chat_sft.main([*SMALL, f"--conversations={mine}", "--warm_start"])
    assert "holds no optim.safetensors" in capsys.readouterr().err
    chat_sft.main([*SMALL, f"--conversations={mine}"])
    first = checkpoint.load(checkpoint.find("sft", "d2"), with_optimizer=True).optimizer
    chat_sft.main([*SMALL, "--source=sft", f"--conversations={mine}:1", "--replay=0", "--warm_start"])
    second = checkpoint.load(checkpoint.find("sft", "d2-own"), with_optimizer=True).optimizer
    assert first is not None and second is not None
    assert (int(first["step"]), int(second["step"])) == (1, 2)
