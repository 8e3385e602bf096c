"""The stage that evaluates chat models: its flags, its report, and how it compares stages."""

from __future__ import annotations

import dataclasses
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from nanochat import checkpoint
from nanochat.config import InputError, parse_config
from nanochat.evals import records
from nanochat.evals.chat import ChatResult
from nanochat.tokenizer import Tokenizer
from scripts import chat_eval
from tasks.registry import BASELINES, EVAL_TASKS, REAL, TINYWORLD, eval_task, rl_tasks
from tasks.tinyworld import TinyFacts
from tests.conftest import save_checkpoint
from tests.tiny_stages import cat_tokenizer, tiny_chat_model, write_aqua


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return cat_tokenizer()


def test_flags_have_the_references_order_names_and_letters():
    argv = "-i rl -a GSM8K|MMLU -d float32 -t 0.5 -m 64 -n 4 -k 0 -b 2 -g d4 -s 60 -x 10 --device-type cpu".split()
    cfg = parse_config(chat_eval.ChatEvalConfig, argv)
    assert list(dataclasses.asdict(cfg).items()) == [
        ("source", "rl"),
        ("task_name", "GSM8K|MMLU"),
        ("dtype", "float32"),
        ("temperature", 0.5),
        ("max_new_tokens", 64),
        ("num_samples", 4),
        ("top_k", None),
        ("batch_size", 2),
        ("model_tag", "d4"),
        ("step", 60),
        ("max_problems", 10),
        ("device_type", "cpu"),
        ("against", None),  # new ones last
        ("show", 0),
    ]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["-i", "sft", "-a", "GSM8K|GMS8K"], "no task 'GMS8K'; there are ARC-Easy"),
        (["-i", "sft", "-a", ""], "no task ''"),
        (["-i", "nowhere"], "invalid choice"),
        ([], "required"),
        (["-i", "sft", "-x", "0"], "--max_problems 0 must be at least 1"),
        (["-i", "sft", "-t", "-1"], "--temperature -1.0 must be at least 0"),
        (["-i", "sft", "--against", "sft"], "--against sft is the stage evaluated"),
        (["-i", "sft", "--show", "-1"], "--show -1 must be at least 0"),
    ],
)
def test_wrong_input_ends_in_one_line_and_exit_code_2(capsys, argv, message):
    with pytest.raises(SystemExit) as exit_info:
        chat_eval.main(argv)
    error = capsys.readouterr().err
    assert exit_info.value.code == 2 and message in error and error.count("\n") == 1


def test_only_a_complete_default_set_gets_a_mean_and_tinyworlds_has_its_own_name():
    results = {name: ChatResult(1, 2, majority=0.5) for name in REAL}
    scores, _ = chat_eval.report_items(results)
    # centered: three times (0.5 - 0.25) / 0.75 = 1/3, three times 0.5
    assert list(scores) == [*REAL, "ChatCORE metric"] and scores["ChatCORE metric"] == pytest.approx(2.5 / 6)
    results["AQUA"] = ChatResult(0, 2)  # no member: the mean is the same
    assert chat_eval.report_items(results)[0]["ChatCORE metric"] == pytest.approx(2.5 / 6)
    del results["MMLU"]
    scores, behind = chat_eval.report_items(results)
    assert "ChatCORE metric" not in scores
    name = "centered mean of ARC-Easy + ARC-Challenge + GSM8K + HumanEval + SpellingBee + AQUA (not ChatCORE)"
    assert next(iter(behind)) == name and behind[name] == pytest.approx((2 / 3 + 1.5 - 0.25) / 6)
    scores, _ = chat_eval.report_items({name: ChatResult(1, 2) for name in TINYWORLD})
    assert list(scores) == [*TINYWORLD, "ChatCORE tinyworld"]


def test_every_name_has_a_task_and_unknown_ones_list_what_there_is():
    assert set(REAL) | set(TINYWORLD) | {"AQUA", "TinyAQUA"} == set(EVAL_TASKS)
    assert set(BASELINES) < set(EVAL_TASKS)
    for look_up in (eval_task, rl_tasks):
        with pytest.raises(InputError, match=r"there are .*GSM8K"):
            look_up("GSM9K")


@pytest.fixture
def base(tmp_path, monkeypatch, tokenizer):
    """A base directory with a chat checkpoint, a word list and AQuA's validation split."""
    base = tmp_path / "base"
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(base))
    monkeypatch.chdir(tmp_path)
    write_aqua(base)
    (base / "words_alpha.txt").write_text("cat\ndog\n")
    tokenizer.save(base / "tokenizer")
    return base


def save_model(tokenizer: Tokenizer, stage: str = "sft", **user_config: Any) -> None:
    model = tiny_chat_model(tokenizer, sequence_len=512)
    meta = {"model_config": model.config.to_dict(), "user_config": user_config, "tokenizer": tokenizer.fingerprint}
    save_checkpoint(checkpoint.tag_directory(stage, "d2"), 7, model, None, meta)


def test_the_stage_writes_the_references_keys_first_and_prints_each_accuracy(base, tokenizer, capsys):
    save_model(tokenizer)
    chat_eval.main("-i sft -a AQUA|SpellingBee -x 2 -m 4 -d float32 --device-type cpu".split())
    out = capsys.readouterr().out
    assert (
        "Final: 0/2 (0.00%)\nAQUA accuracy: 0.00%\nAQUA 95% interval 0.00% to 65.76%, always answering B 100.00%, "
        "random 50.00%: no better than always answering B (1.0000)\n"
    ) in out
    assert "Final: 0/2 (0.00%)\nSpellingBee accuracy: 0.00%\nSpellingBee 95% interval 0.00% to 65.76%, " in out
    assert "\nSpellingBee same number, other spelling too: 0.00%\n" in out
    lines = (base / "report" / "chat-evaluation-sft.md").read_text().splitlines()
    assert lines[0] == "## Chat evaluation sft"
    assert lines[3:17] == [
        "- source: sft",
        "- task_name: AQUA|SpellingBee",
        "- dtype: float32",
        "- temperature: 0.0000",
        "- max_new_tokens: 4",
        "- num_samples: 1",
        "- top_k: 50",
        "- batch_size: 8",
        "- model_tag: None",
        "- step: None",
        "- max_problems: 2",
        "- device_type: cpu",
        "- AQUA: 0.0000",
        "- SpellingBee: 0.0000",
    ]
    assert lines[17] == "- centered mean of AQUA + SpellingBee (not ChatCORE): -0.1250"  # AQUA's 0 is below its 0.2
    assert lines[18] == "- AQUA 95% interval: 0.0000 to 0.6576 (0 of 2)"
    for line in (
        "AQUA random guess: 0.5000",
        "AQUA always the commonest letter: 1.0000",
        "SpellingBee same number, other spelling too: 0.0000",
        "SpellingBee answers cut at the length limit (of 2): 2",
        "show: 0",
    ):
        assert f"- {line}" in lines


def test_the_stage_keeps_every_answer_and_a_part_does_not_replace_the_whole(base, tokenizer, capsys):
    save_model(tokenizer)
    for more in ("", "-x 2", "-t 0.7 -n 2 --show 1"):
        chat_eval.main(f"-i sft -a AQUA -m 4 --device-type cpu {more}".split())
    (folder,) = (base / "chat_eval").glob("sft_d2_000007_*")
    sizes = {p.name: len(records.read(p)) for p in folder.iterdir()}
    assert sizes == {"AQUA.jsonl": 3, "AQUA.first2.jsonl": 2, "AQUA.t0.7.n2.jsonl": 3}
    assert "Answer: <letter>" in records.read(folder / "AQUA.jsonl")[0].prompt
    out = capsys.readouterr().out
    assert out.count("--- AQUA 0: not solved") == 1 and "[reference] B" in out
    assert (
        "- AQUA pass@1: 0.0000 +- 0.0000 (of 2 samples)"
        in (base / "report" / "chat-evaluation-sft.md").read_text().splitlines()
    )


AQUA_ON_CPU = "-a AQUA -m 4 --device-type cpu".split()
AQUA_LOST_ONE = "1 -> 0 of 3; 0 only now, 1 only in mid; difference -0.8559 to +0.4559; not shown (p = 1.0000)"


def evaluate_mid(base: Path, tokenizer: Tokenizer) -> Path:
    """Two stages, the first evaluated, as if it had solved problem 0. Returns its records."""
    save_model(tokenizer, stage="mid")
    save_model(tokenizer)
    chat_eval.main(["-i", "mid", *AQUA_ON_CPU])
    (path,) = (base / "chat_eval").glob("mid_d2_000007_*/AQUA.jsonl")
    first, *others = records.read(path)
    records.write(path, [replace(first, passed=True), *others])
    return path


def test_each_stage_is_compared_with_the_stage_before_problem_by_problem(base, tokenizer, capsys):
    path = evaluate_mid(base, tokenizer)
    assert "against" not in capsys.readouterr().out  # there is no stage before mid
    chat_eval.main(["-i", "sft", *AQUA_ON_CPU])
    assert f"AQUA against mid: {AQUA_LOST_ONE}\n" in capsys.readouterr().out
    assert f"- AQUA against mid: {AQUA_LOST_ONE}\n" in (base / "report" / "chat-evaluation-sft.md").read_text()
    chat_eval.main(["-i", "sft", "-x", "2", *AQUA_ON_CPU])  # only some of the problems that mid was asked
    assert "AQUA against mid: 1 -> 0 of 2;" in capsys.readouterr().out
    path.rename(path.with_name("AQUA.first2.jsonl"))
    records.write(path.with_name("AQUA.first1.jsonl"), records.read(path.with_name("AQUA.first2.jsonl"))[:1])
    chat_eval.main(["-i", "sft", *AQUA_ON_CPU])  # mid was asked only some: the most that there are
    assert "AQUA against mid: 1 -> 0 of 3;" in capsys.readouterr().out


def test_without_records_of_the_stage_before_the_report_says_so(base, tokenizer, capsys):
    path = evaluate_mid(base, tokenizer)
    save_model(tokenizer, stage="rl", source="mid")
    chat_eval.main(["-i", "rl", *AQUA_ON_CPU])  # the stage before is the one that it was trained from
    assert f"AQUA against mid: {AQUA_LOST_ONE}\n" in capsys.readouterr().out
    save_model(tokenizer, stage="rl")
    chat_eval.main(["-i", "rl", *AQUA_ON_CPU])
    assert "AQUA against sft: no record of the stage before\n" in capsys.readouterr().out
    path.write_text("{")
    chat_eval.main(["-i", "sft", *AQUA_ON_CPU])
    assert "AQUA against mid: not compared: " in capsys.readouterr().out


def test_records_of_a_model_that_was_trained_anew_are_not_the_stage_befores(base, tokenizer, capsys):
    evaluate_mid(base, tokenizer)
    model = tiny_chat_model(tokenizer, sequence_len=512)
    with torch.no_grad():
        model.lm_head.weight[0] += 1
    meta = {"model_config": model.config.to_dict(), "tokenizer": tokenizer.fingerprint}
    save_checkpoint(checkpoint.tag_directory("mid", "d2"), 7, model, None, meta)
    chat_eval.main(["-i", "sft", *AQUA_ON_CPU])
    assert "AQUA against mid: no record of the stage before\n" in capsys.readouterr().out


def test_against_names_another_stage_whose_records_must_be_there(base, tokenizer, capsys):
    path = evaluate_mid(base, tokenizer)
    save_model(tokenizer, stage="rl")
    chat_eval.main(["-i", "rl", "--against=mid", *AQUA_ON_CPU])
    assert f"AQUA against mid: {AQUA_LOST_ONE}\n" in capsys.readouterr().out
    first, *others = records.read(path)
    records.write(path, [replace(first, id="another"), *others])  # the data are not what they were
    chat_eval.main(["-i", "rl", "--against=mid", *AQUA_ON_CPU])
    assert "AQUA against mid: not compared: problem 0 of AQUA is another" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        chat_eval.main(["-i", "rl", "--against=sft", *AQUA_ON_CPU])
    out, error = capsys.readouterr()
    assert "no answers to read at" in error and "accuracy" not in out


def test_the_report_says_what_keeps_the_models_code_in(base, tokenizer, monkeypatch):
    save_model(tokenizer)
    monkeypatch.setattr(chat_eval, "eval_task", lambda name: TinyFacts("dev", size=1))
    monkeypatch.setattr(chat_eval, "isolation_level", lambda: "a strong box")
    chat_eval.main("-i sft -a HumanEval -m 2 --device-type cpu".split())
    assert "- HumanEval sandbox: a strong box\n" in (base / "report" / "chat-evaluation-sft.md").read_text()


def test_dtype_is_the_dtype_of_the_activations(base, tokenizer, monkeypatch):
    save_model(tokenizer)
    dtypes = []

    def record(task, model, *args, **kwargs):
        dtypes.append(model.compute_dtype)
        return ChatResult(0, 1)

    monkeypatch.setattr(chat_eval, "evaluate_task", record)
    for dtype in ("bfloat16", "float32"):
        chat_eval.main(["-i", "sft", "-a", "SpellingBee", "-d", dtype, "--device-type", "cpu"])
        assert f"- dtype: {dtype}\n" in (base / "report" / "chat-evaluation-sft.md").read_text()
    assert dtypes == [torch.bfloat16, torch.float32]


def test_a_tinyworld_model_gets_tinyworlds_tasks_by_default(base, tokenizer, monkeypatch, capsys):
    save_model(tokenizer, dataset="tinyworld")
    monkeypatch.setattr(chat_eval, "evaluate_task", lambda *args, **kwargs: ChatResult(1, 2))
    assert (
        tuple(chat_eval.run(parse_config(chat_eval.ChatEvalConfig, ["-i", "sft", "--device-type", "cpu"]))) == TINYWORLD
    )
    report = (base / "report" / "chat-evaluation-sft.md").read_text()
    assert "- ChatCORE tinyworld: 0.4667\n" in report and "ChatCORE metric" not in report
    assert "ChatCORE tinyworld: 0.4667" in capsys.readouterr().out
