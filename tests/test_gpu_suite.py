"""The suite for a GPU in small on a CPU, and that its checks see what is wrong."""

from __future__ import annotations

import itertools
import json
from functools import partial

import pytest
import torch

from bench import common, gpu_suite, inference, kernels, packed
from nanochat import scaling


def test_relative_error_of_attention_and_model_shows_a_wrong_kernel(monkeypatch):
    assert kernels.check_attention("cpu", "float32", 16, 8)["error"] < 1e-5
    assert kernels.check_model("modern", "cpu", "float32", (1, 32, 64, 16))["error"] < 1e-4
    monkeypatch.setattr(kernels.attention, "causal_attention", lambda q, k, v, **kw: v + 0 * (q + k))
    assert kernels.check_attention("cpu", "float32", 16, 8)["error"] > 0.1


def test_a_kernel_that_is_wrong_in_its_window_or_its_groups_is_seen(monkeypatch):
    right = kernels.attention.causal_attention
    check = partial(kernels.check_attention, "cpu", "float32", 16, 8)
    assert check(4, 2)["error"] < 1e-5 and check(4, 2, "sdpa") == {
        "error": pytest.approx(0, abs=1e-5),
        "kernel": "SDPA",
    }
    monkeypatch.setattr(
        kernels.attention,
        "causal_attention",
        lambda q, k, v, window, kernel: right(q, k, v, None if window is None else window + 1),
    )
    assert check(4)["error"] > 0.1 and check(None)["error"] < 1e-5
    monkeypatch.setattr(
        kernels.attention,
        "causal_attention",
        lambda q, k, v, window, kernel: right(q, *(x.repeat(1, 1, q.size(2) // x.size(2), 1) for x in (k, v)), window),
    )
    assert check(None, 2)["error"] > 0.1 and check(None, 4)["error"] < 1e-5


def test_the_suite_checks_windows_and_groups_by_every_kernel_and_models_with_short_windows(monkeypatch):
    monkeypatch.setattr(common, "machine", lambda plan: "a GPU")
    tasks = kernels.tasks(tiny=False)
    asked = {(t.spec["dtype"], *t.work.args[4:]) for t in tasks if t.work.func is kernels.check_attention}
    for dtype, window, heads in itertools.product(("float32", "bfloat16"), (None, 512), (4, 2)):
        assert (dtype, window, heads, None) in asked
    assert {("bfloat16", 512, 2, "flex"), ("bfloat16", 512, 2, "sdpa")} < asked
    models = {(t.work.args[2], t.work.args[0], t.work.args[4]) for t in tasks if t.work.func is kernels.check_model}
    assert models == {*itertools.product(("float32", "bfloat16", "fp8"), scaling.ARCHS, ("L", "SL"))}
    used = []
    original = kernels.attention.causal_attention

    def watched(q, k, v, window=None):
        used.append(window)
        return original(q, k, v, window)

    monkeypatch.setattr("nanochat.gpt.causal_attention", watched)
    assert kernels.check_model("plain", "cpu", "float32", (2, 32, 64, 16), "SL")["error"] < 1e-4
    assert {*used} == {4, None}


def test_fp8_is_timed_at_each_width_and_stands_beside_the_rule(monkeypatch, capsys):
    """With the rounding emulated on a CPU."""
    monkeypatch.setattr(common, "machine", lambda plan: "a GPU")
    tasks = gpu_suite.fp8_tasks(gpu_suite.SuiteConfig(tiny=False, pack="p", data="tinyworld"))
    assert [t.work.args for t in tasks] == [(w, 16_384, "cuda") for w in (768, 1024, 1280, 1536, 2048)]
    found = gpu_suite.linear_seconds(32, 32, "cpu", many=1)
    assert found["ratio"] == found["bfloat16"] / found["fp8"] > 0
    result = {"bfloat16": 0.003, "fp8": 0.002, "ratio": 1.5}
    gpu_suite.show_fp8([(task, result) for task in tasks])
    lines = capsys.readouterr().out
    assert "| 1024 | 3.000 | 2.000 | 1.50 | no |" in lines and "| 1280 | 3.000 | 2.000 | 1.50 | yes |" in lines
    assert gpu_suite.fp8_tasks(gpu_suite.SuiteConfig(tiny=True)) == []


def test_without_text_the_small_suite_reads_little_of_tinyworld(tmp_path, monkeypatch):
    read = []
    learn = packed.Tokenizer.train_from_iterator
    monkeypatch.setattr(
        packed.Tokenizer, "train_from_iterator", lambda texts, size: learn((read.append(t) or t for t in texts), size)
    )
    cfg = gpu_suite.SuiteConfig(tiny=True, pieces="time", results=str(tmp_path / "suite.jsonl"))
    found = gpu_suite.run(cfg)
    assert found["left"] == 0 and {r["arch"] for r in found["time"]["runs"]} == {"plain", "modern"}
    assert 0 < len(read) <= 1024


def test_steps_that_replay_something_else_are_seen(monkeypatch):
    sizes = {"depth": 1, "vocab_size": 300, "sequence_len": 64, "prompt": 8, "new": 2, "weights": "float32"}
    cfg = inference.InferenceConfig(**sizes, device="cpu", threads=1)
    assert inference.check_graphs(cfg, 2)["error"] < 1e-5
    monkeypatch.setattr(inference.GraphDecoder, "step", lambda self, idx, cache: torch.ones(2, 1))
    assert inference.check_graphs(cfg, 2)["error"] > 0.1


def test_the_whole_suite_runs_in_small_and_then_has_nothing_left(tmp_path, capsys):
    (tmp_path / "text").mkdir()
    lines = (json.dumps({"text": f"the number {i} comes after {i - 1}. " * 6}) + "\n" for i in range(300))
    (tmp_path / "text" / "t.jsonl").write_text("".join(lines))
    cfg = gpu_suite.SuiteConfig(tiny=True, data=str(tmp_path / "text"), results=str(tmp_path / "suite.jsonl"))
    first = gpu_suite.run(cfg)
    lines_before = (tmp_path / "suite.jsonl").read_text()
    assert first is not None and first["left"] == 0
    assert all(r["ok"] for r in first["kernels"]) and {r["depth"] for r in first["speed"]} == {1, 2}
    assert [r["kind"] for r in first["decode"]] == ["graphs", "decode"] * 2
    assert all(r["ok"] for r in first["decode"] if r["kind"] == "graphs")
    assert {r["arch"] for r in first["time"]["runs"]} == {"plain", "modern"}
    assert [c["name"] for c in first["ablate"]["candidates"]] == ["hot"]
    capsys.readouterr()
    assert gpu_suite.run(cfg) == first
    assert (tmp_path / "suite.jsonl").read_text() == lines_before
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["bench"] == "gpu_suite"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_is_one_line_and_exit_code_2(capsys):
    with pytest.raises(SystemExit) as end:
        gpu_suite.main(["--data=packed.npz"])
    assert end.value.code == 2
    assert capsys.readouterr().err == "error: torch finds no GPU here; use --tiny to try the suite on a CPU\n"
