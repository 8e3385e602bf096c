"""Every stage, one after the other, on the embedded corpus at toy size: each reads what the one before wrote."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest

from bench import post_training, rollouts
from nanochat import checkpoint, report
from scripts import base_eval, base_loss, base_train, chat_eval, chat_rl, chat_sft, mid_train, tok_eval, tok_train
from tasks import registry
from tasks.tinyworld import TinyAQUA

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of matplotlib's own imports

BASE = [
    *("--dataset=tinyworld", "--arch=modern", "--depth=2", "--aspect_ratio=16", "--head_dim=16", "--max_seq_len=128"),
    *("--device_batch_size=4", "--total_batch_size=1024", "--num_iterations=4", "--eval_tokens=1024"),
    *("--core_metric_max_per_task=2", "--sample_every=-1", "--core_metric_every=-1"),
]
MID = [
    *("--max_seq_len=128", "--device_batch_size=4", "--total_batch_size=1024", "--num_iterations=4"),
    *("--eval_tokens=1024",),
]
SFT = [
    *("--device_batch_size=4", "--target_examples_per_step=8", "--num_iterations=4", "--eval_steps=2"),
    *("--eval_metrics_every=-1",),
]
# by a reward that differs from answer to answer: this toy gets no sum right, and equal rewards teach nothing
REWARD = """
def distinct(conversation, answer):
    return len(set(answer)) / 10
"""
RL = [
    *(
        "--task=TinySums",
        "--reward=mine.py:distinct",
        "--examples_per_step=2",
        "--num_samples=2",
        "--device_batch_size=2",
        "--max_new_tokens=8",
    ),
    *("--num_iterations=2", "--eval_examples=2"),
]
OFF_POLICY = [*RL, "--kl=0.5", "--updates_per_batch=2", "--advantage=leave_one_out"]


def run_all(base: Path) -> None:
    report.get_report().reset()
    tok_train.main(["--dataset=tinyworld", "--max_chars=200000", "--vocab_size=512"])
    tok_eval.main([])
    base_train.main(BASE)
    base_loss.main(["--device_batch_size=2", "--split_tokens=512"])
    base_eval.main(["--max-per-task=2"])
    mid_train.main(MID)
    chat_eval.main(["-i", "mid", "-x", "2", "-m", "4"])
    chat_sft.main(SFT)
    chat_eval.main(["-i", "sft", "-x", "2", "-m", "4"])
    chat_rl.main(RL)
    chat_eval.main(["-i", "rl", "-a", "TinySums", "-x", "2", "-m", "4"])


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("pipeline")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NANOCHAT_BASE_DIR", str(path))
        patch.setenv("NANOCHAT_DTYPE", "float32")
        patch.chdir(path)
        (path / "mine.py").write_text(REWARD)
        run_all(path)
        report.get_report().generate()
    return path


@pytest.fixture
def at(base: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(base))
    monkeypatch.chdir(base)
    return base


def sections(text: str) -> dict[str, list[str]]:
    """Section title -> the keys of its list, in order."""
    parts = re.split(r"^## (.*)$", text, flags=re.M)[1:]
    return {
        title: re.findall(r"^- ([^:]+):", body, flags=re.M) for title, body in zip(parts[::2], parts[1::2], strict=True)
    }


def test_the_report_has_the_references_sections_and_keys_in_the_references_order(at: Path):
    reference = Path(__file__).parents[2] / "shared" / "reference" / "report.md"
    if not reference.exists():
        pytest.skip("../shared/reference/report.md is not here")
    wanted, ours = sections(reference.read_text()), sections((at / "report.md").read_text())
    assert [s for s in ours if s in wanted] == list(wanted)
    # CORE's own lines: a tinyworld bundle is never called CORE; AQUA's flags and score belong to that recipe
    not_here = {"CORE metric estimate", "GSM8K", "AQUA", "GPUs", "GPU Memory", "CUDA Version", "Hourly Rate"}
    for title in wanted.keys() - {"Base model evaluation", "Summary"}:
        expected = [k for k in wanted[title] if k not in not_here]
        assert [k for k in ours[title] if k in expected] == expected, title
        assert ours[title][0] == wanted[title][0] if wanted[title] else True


def test_each_stage_leaves_one_verified_checkpoint_that_names_its_tokenizer(at: Path):
    for source in ("base", "mid", "sft", "rl"):
        saved = checkpoint.load(checkpoint.find(source), with_optimizer=True)
        assert saved.meta["step"] == (2 if source == "rl" else 4)
        assert saved.meta["tokenizer"] and saved.meta["user_config"]["dataset"] == "tinyworld"


@pytest.mark.parametrize(
    ("source", "stage", "flags"),
    [("base", base_train, BASE), ("mid", mid_train, MID), ("sft", chat_sft, SFT), ("rl", chat_rl, RL)],
)
def test_a_run_stopped_halfway_and_resumed_equals_one_that_was_not(at: Path, source: str, stage, flags: list[str]):
    assert_resumes_exactly(source, stage, flags)


def test_rl_with_a_start_model_and_two_updates_a_batch_resumes_exactly(at: Path):
    """Its KL is to the start model, not to the checkpoint that it goes on from."""
    chat_rl.main(OFF_POLICY)
    assert_resumes_exactly("rl", chat_rl, OFF_POLICY)


def assert_resumes_exactly(source: str, stage, flags: list[str]) -> None:
    """Args: flags: those of the last run of the stage."""
    path = checkpoint.find(source)
    whole = checkpoint.load(path, with_optimizer=True)
    assert all(norm > 0 for norm in whole.meta["loop_state"]["history"]["norms"]), "nothing was learnt"
    half = whole.meta["step"] // 2
    stage.main([*flags, f"--save_every={half}"])
    stage.main([*flags, f"--resume={half}"])
    resumed = checkpoint.load(path, with_optimizer=True)
    assert all(whole.model[k].equal(resumed.model[k]) for k in whole.model)
    assert all(whole.optimizer[k].equal(resumed.optimizer[k]) for k in whole.optimizer)
    assert whole.meta["loader_cursor"] == resumed.meta["loader_cursor"]


def test_rl_does_not_go_on_with_another_reward_or_another_start_model(at: Path, capsys):
    chat_rl.main([*OFF_POLICY, "--save_every=1"])
    again = [*OFF_POLICY, "--resume=1"]
    (at / "mine.py").write_text(REWARD + "# changed")
    try:
        with pytest.raises(SystemExit):
            chat_rl.main(again)
    finally:
        (at / "mine.py").write_text(REWARD)
    assert "the training data changed" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        chat_rl.main([*again, "--source=mid"])
    assert "the start model has changed" in capsys.readouterr().err


def test_rl_leaves_a_page_of_rollouts_that_the_report_links(at: Path):
    assert "[Sampled rollouts](report/rollouts.md)" in (at / "report.md").read_text()
    text = (at / "report" / "rollouts.md").read_text()
    assert re.findall(r"^## (.*)$", text, re.M) == ["Step 0", "Step 2"] and "Best (reward" in text


def test_rl_on_prompts_and_a_reward_of_your_own(at: Path):
    lines = [[{"role": "user", "content": f"hi {i}"}, {"role": "assistant", "content": "yes"}] for i in range(6)]
    (at / "mine.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    flags = [flag for flag in RL if not flag.startswith("--task")]
    chat_rl.main([*flags, "--conversations=mine.jsonl", "--num_iterations=1"])
    section = (at / "report" / "chat-rl.md").read_text()
    assert "- task: mine.jsonl\n" in section and "Reward at the end" in section


@pytest.fixture
def copy_of_base(at: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """For what replaces checkpoints."""
    shutil.copytree(at, tmp_path / "base")
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / "base"))
    return tmp_path / "base"


def test_the_rollout_benchmark_counts_each_ways_answers(at: Path, capsys):
    flags = ["--task=TinySums", "--prompts=3", "--num_samples=2", "--max_new_tokens=4", "--singles=2", "--repeats=1"]
    rollouts.main(flags)
    out = capsys.readouterr().out
    assert re.search(r"3 prompts x 2 \| 6 ", out) and re.search(r"one answer at a time \| 2 ", out)


def test_the_post_training_benchmark_scores_before_and_after_rl(copy_of_base: Path, capsys, monkeypatch):
    monkeypatch.setitem(registry.EVAL_TASKS, "TinyAQUA", lambda: TinyAQUA("test", 8))
    sizes = ["--rows=8", "--sft_steps=1", "--rl_steps=1", "--examples_per_step=1", "--num_samples=2"]
    post_training.main(["--task=TinyAQUA", *sizes, "--max_new_tokens=4", "--seeds=0"])
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert [(s["seed"], s["problems"], s["p_value"]) for s in result["seeds"]] == [(0, 8, 1.0)]
    assert all(0.2 < s["majority"] < 0.7 for s in result["seeds"])


def test_an_altered_checkpoint_is_refused_by_the_next_stage_in_one_line(at: Path, capsys):
    path = checkpoint.find("rl") / "model.safetensors"
    original = path.read_bytes()
    path.write_bytes(original[:-1] + b"x")
    try:
        with pytest.raises(SystemExit) as stop:
            chat_eval.main(["-i", "rl", "-a", "TinySums", "-x", "1"])
    finally:
        path.write_bytes(original)
    error = capsys.readouterr().err.strip().splitlines()
    assert stop.value.code == 2 and "damaged checkpoint" in error[-1]


@pytest.mark.parametrize(
    ("stage", "flags", "message"),
    [
        (base_train, ["--depth=5"], "--depth=4"),
        (base_train, [*BASE, "--total_batch_size=1000"], "--total_batch_size=1024"),
        (base_train, ["--depht=4"], "--depht=4"),
        (base_train, ["--depth=four"], "'four' is no int"),
        (base_train, [*BASE, "--dataset=nowhere"], "nowhere"),
        (base_train, [*BASE, "--target_param_data_ratio=0", "--num_iterations=-1"], "--target_param_data_ratio"),
        (base_train, [*BASE, "--device_type=cuda"], "--device_type=cpu"),
        (mid_train, [*MID, "--model_tag=d9"], "there are: d2"),
        (chat_sft, [*SFT, "--step=77"], "there are: 2, 4"),
        (chat_sft, [*SFT, "--target_examples_per_step=0"], "at least 1"),
        (chat_sft, [*SFT, "--task=Chess:5"], "no task 'Chess'"),
        (chat_rl, [*RL, "--num_samples=1"], "--num_samples"),
        (chat_rl, [*RL, "--task=Chess"], "Chess"),
        (chat_rl, ["--conversations=mine.jsonl"], "--reward=FILE.py:function"),
        (chat_rl, [*RL, "--conversations=mine.jsonl"], "give one"),
        (chat_rl, [*RL, "--kl=0.1", "--source=rl"], "--source=rl"),
        (chat_rl, [*RL, "--clip=1.5"], "--clip"),
        (chat_rl, [*RL, "--reward=mine.py:other"], "has no function other"),
        (base_loss, ["--device_batch_size=2", "--split_tokens=500"], "512"),
        (chat_eval, ["-i", "sft", "-a", "Chess"], "Chess"),
    ],
)
def test_wrong_input_ends_in_one_line_with_the_way_out_and_code_2(at: Path, capsys, stage, flags, message):
    before = {p for p in at.rglob("*") if p.is_file()}
    with pytest.raises(SystemExit) as stop:
        stage.main(flags)
    error = capsys.readouterr().err.strip().splitlines()
    assert stop.value.code == 2
    assert len(error) == 1 and error[0].startswith("error: ") and message in error[0]
    assert {p for p in at.rglob("*") if p.is_file()} == before


@pytest.mark.parametrize("stage", [base_train, mid_train, chat_sft, chat_rl, chat_eval, base_loss, base_eval])
def test_without_tokenizer_or_checkpoint_the_stage_says_which_command_makes_it(tmp_path, monkeypatch, capsys, stage):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    with pytest.raises(SystemExit) as stop:
        stage.main(["-i", "sft"] if stage is chat_eval else [])
    assert stop.value.code == 2
    assert "python -m scripts." in capsys.readouterr().err


def test_the_plan_needs_neither_data_nor_tokenizer(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    base_train.main(["--plan", "--arch=plain", "--depth=8", "--vocab_size=65536"])
    out = capsys.readouterr().out
    assert "92,274,688" in out and "4.529848e+08" in out


def test_curves_are_json_lines_with_loss_and_validation(at: Path):
    lines = [json.loads(line) for line in (at / "report" / "curves" / "base.jsonl").read_text().splitlines()]
    assert any("loss" in line for line in lines) and any("val_bpb" in line for line in lines)
