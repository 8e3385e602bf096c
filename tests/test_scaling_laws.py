"""The miniseries: its laws, its lines, and how it goes on after an interruption."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from nanochat import checkpoint, scaling
from nanochat.config import InputError
from scripts import base_train, tok_train

ROOT = Path(__file__).parents[1]
FLAGS = [
    *("--arch=modern", "--depth=2", "--aspect_ratio=16", "--head_dim=16", "--max_seq_len=64", "--dataset=tinyworld"),
    *("--num_iterations=2", "--total_batch_size=256", "--eval_tokens=64", "--eval_every=1000"),
    *("--core_metric_every=-1", "--sample_every=-1"),
]


@pytest.fixture(scope="module")
def laws() -> ModuleType:
    spec = importlib.util.spec_from_file_location("scaling_laws", ROOT / "bench" / "scaling_laws.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "path", list(sys.path))
        spec.loader.exec_module(module)
    return module


def a_run(depth: int, flops: float, bpb: float, batch: int = 1024, tokens: float = 1e6) -> dict:
    sizes = {"num_params": 1000, "total_batch_size": batch, "tokens": int(tokens), "arch": "modern", "flags": []}
    return {"depth": depth, "flops": flops, "bpb": bpb, **sizes}


def write(path: Path, *runs: dict) -> Path:
    path.write_text("".join(json.dumps(run) + "\n" for run in runs))
    return path


def test_a_power_law_is_found_again_and_its_error_told(laws):
    x = [1e15, 4e15, 1e16, 1e17]
    a, b, error = laws.power_law(x, [40 * v**-0.1 for v in x])
    assert (a, b, error) == (pytest.approx(40), pytest.approx(-0.1), pytest.approx(0, abs=1e-9))
    _, b, error = laws.power_law([1, 10], [5.0, 2.5])
    assert b == pytest.approx(math.log10(0.5)) and error == pytest.approx(0, abs=1e-9)
    _, _, error = laws.power_law([1, 2, 4], [1.0, 1.21, 1.0])  # log-mean 1.21^(1/3) through all
    assert error == pytest.approx(1 - 1.21 ** (-2 / 3))


def test_a_law_of_one_size_is_refused(laws):
    with pytest.raises(InputError, match="needs runs of two sizes or more, there are 1; train another depth"):
        laws.power_law([1e15, 1e15], [1.0, 1.1])


def test_the_law_goes_through_the_best_run_of_each_depth_and_the_best_batch_has_its_own(laws, tmp_path, capsys):
    runs = [
        *(a_run(4, 1e15, bpb, batch, 1e7) for bpb, batch in ((1.3, 512), (1.2, 1024), (1.25, 2048))),
        *(a_run(8, 1e17, bpb, batch, 1e9) for bpb, batch in ((0.95, 4096), (0.9, 8192))),
        a_run(8, 2e17, math.nan),  # diverged
    ]
    out, plot = write(tmp_path / "runs.jsonl", *runs), tmp_path / "bpb.png"
    laws.main(["fit", str(out), str(plot)])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[-1] for line in lines[1:3]] == ["1.2000", "0.9000"]
    assert f"FLOPs^{math.log(0.9 / 1.2) / math.log(100):.4f}, every point within 0.00%" in lines[3]
    assert f"best batch ~ tokens^{math.log(8) / math.log(100):.3f} over 2 depths" in lines[4]
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_a_series_with_one_batch_a_depth_says_nothing_of_batches(laws, tmp_path, capsys):
    laws.main(["fit", str(write(tmp_path / "runs.jsonl", a_run(4, 1e15, 1.2), a_run(8, 1e17, 0.9, 4096)))])
    assert "best batch" not in capsys.readouterr().out


def test_a_torn_line_is_named(laws, tmp_path, capsys):
    path = tmp_path / "runs.jsonl"
    path.write_text(json.dumps(a_run(4, 1e15, 1.2)) + '\n{"depth": 8, "fl')
    with pytest.raises(SystemExit) as stop:
        laws.main(["fit", str(path)])
    assert stop.value.code == 2
    assert "error: line 2 of" in capsys.readouterr().err


@pytest.mark.parametrize("words", [[], ["run"], ["fit"], ["fit", "a", "b", "c"], ["plot", "a"]])
def test_other_words_are_refused(laws, words, capsys):
    with pytest.raises(SystemExit) as stop:
        laws.main(words)
    assert stop.value.code == 2 and "error: say `run OUT.jsonl FLAGS`" in capsys.readouterr().err


def test_a_run_without_validation_is_refused(laws, tmp_path):
    with pytest.raises(InputError, match="--eval_every=-1 leaves the run without a result"):
        laws.run(tmp_path / "runs.jsonl", [*FLAGS, "--eval_every=-1"])


def test_a_model_is_trained_once_and_its_line_says_what_was_decided_for_it(laws, tmp_path, monkeypatch, capsys):
    tok_train.main(["--dataset=tinyworld", "--max_chars=50000", "--vocab_size=300"])
    out = tmp_path / "series" / "runs.jsonl"
    died = []

    def dies(*args: object) -> None:
        died.append(args)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:  # after its checkpoint, before its validation
        patch.setattr(base_train, "evaluate_bpb", lambda *args: dies() if any((tmp_path).rglob("step_*")) else 9.0)
        with pytest.raises(KeyboardInterrupt):
            laws.run(out, FLAGS)
    assert died and not out.exists()
    laws.run(out, FLAGS)
    assert "Resuming from" in capsys.readouterr().out
    (line,) = laws.read_runs(out)
    (step,) = tmp_path.rglob("step_*")
    decided = checkpoint.load(step).meta["user_config"]
    assert (line["depth"], line["steps"], line["tokens"], line["flags"]) == (2, 2, 512, FLAGS)
    assert line["matrix_lr"] == decided["matrix_lr"] == pytest.approx(0.02 * scaling.LR_MOST)  # two steps are few
    assert line["flops"] == 512 * (6 * line["num_scaling_params"] + 12 * 2 * 32 * 64)
    assert 1 < line["bpb"] < 9
    laws.run(out, FLAGS)
    assert "done before" in capsys.readouterr().out
    assert len(laws.read_runs(out)) == 1


@pytest.mark.parametrize(
    ("flags", "message"),
    [(["--dataset", "tinyworld"], "write --dataset=NAME"), (["--depth=4"], 'try DEPTHS="4"')],
)
def test_the_recipe_refuses_flags_that_it_decides(tmp_path, flags, message):
    env = {**os.environ, "VIRTUAL_ENV": sys.prefix, "NANOCHAT_BASE_DIR": str(tmp_path)}
    command = ["bash", str(ROOT / "runs" / "scaling_laws.sh"), *flags]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and message in done.stderr


@pytest.mark.slow
def test_the_recipe_trains_every_depth_and_draws_the_law(tmp_path):
    env = {k: v for k, v in os.environ.items() if k != "RANKS"}
    env |= {"VIRTUAL_ENV": sys.prefix, "NANOCHAT_BASE_DIR": str(tmp_path), "PATH": f"{sys.prefix}/bin:{env['PATH']}"}
    env |= {"DEPTHS": "2 3", "VOCAB": "300", "CHARS": "50000"}
    flags = [flag for flag in FLAGS if not flag.startswith(("--arch", "--depth"))]
    command = ["bash", str(ROOT / "runs" / "scaling_laws.sh"), *flags]
    for _ in range(2):  # the second time there is nothing left to train
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stderr
    assert done.stdout.count("done before") == 2
    runs = [json.loads(line) for line in (tmp_path / "scaling_laws" / "runs.jsonl").read_text().splitlines()]
    assert [run["depth"] for run in runs] == [2, 3]
    assert (tmp_path / "scaling_laws" / "bpb.png").exists()
