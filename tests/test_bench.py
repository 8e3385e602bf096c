"""The training benchmarks: what is computed from their runs by hand, resuming, and the whole GPU suite in small."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from bench import ablate, common, packed, results, serve, teach, time_to_bpb
from bench import checkpoint as saving_bench
from bench.ablate import Candidate, Pairs, judge, leave_one_out, neighbours, paired_p, t_two_sided
from bench.common import Built, Plan, Setting
from bench.packed import Text
from bench.results import Results, Task, run_all
from nanochat import checkpoint, scaling
from nanochat.config import InputError
from nanochat.evals.bpb import evaluate_bpb
from nanochat.optim import build_optimizer
from nanochat.runtime import Runtime
from nanochat.trainer import accumulate


def tiny_text(rows: int = 24) -> Text:
    """Rows of 8 tokens of 40 ids; the last validation row ends early."""
    rng = np.random.default_rng(0)
    train, val = rng.integers(1, 40, (rows, 9), np.int32), rng.integers(1, 40, (4, 9), np.int32)
    train[:, 0] = val[:, 0] = 0
    val[-1, 5:] = -1
    return Text("made up", train, val, np.r_[0, np.full(39, 3)].astype(np.int32), 0)


def tiny_plan(**changes: Any) -> Plan:
    sizes = dict(steps=3, tokens_per_step=32, sequence_len=8, device_batch_size=2, compile=False)
    return Plan(**{**sizes, **changes})


TINY = {"aspect_ratio": 16, "head_dim": 8}


# ---- Statistics


@pytest.mark.parametrize(
    ("t", "df", "p"),
    [(12.7062, 1, 0.05), (4.3027, 2, 0.05), (2.7764, 4, 0.05), (5.8409, 3, 0.01), (2.2281, 10, 0.05), (0, 7, 1)],
)
def test_t_distribution_agrees_with_the_printed_tables(t, df, p):
    assert t_two_sided(t, df) == pytest.approx(p, abs=1e-5)
    assert t_two_sided(-t, df) == t_two_sided(t, df)


@pytest.mark.parametrize("df", [1, 2, 3, 6, 9, 30])
def test_t_distribution_equals_the_integral_of_its_density(df):
    x = np.linspace(-1.7, 1.7, 20_001)
    scale = math.gamma((df + 1) / 2) / (math.sqrt(df * math.pi) * math.gamma(df / 2))
    inside = np.trapezoid(scale * (1 + x**2 / df) ** (-(df + 1) / 2), x)
    assert t_two_sided(1.7, df) == pytest.approx(1 - inside, abs=1e-7)


def test_paired_p_by_hand():
    # mean 2, standard deviation 1, t = 2 * sqrt(3) at 2 degrees: 1 - t / sqrt(t^2 + 2)
    assert paired_p([1.0, 2.0, 3.0]) == pytest.approx(1 - math.sqrt(12 / 14))
    assert paired_p([0.1]) is None
    assert paired_p([0.0, 0.0]) == 1.0


def test_verdict_asks_for_every_depth_and_for_the_t_test():
    good, bad = Pairs(equal_time=[-0.02, -0.021]), Pairs(equal_time=[0.02, 0.021])
    noisy = Pairs(equal_time=[-0.5, 0.4])
    assert judge({2: good, 4: good}, None)[0] == "in"
    assert judge({2: good}, None)[0] == "out"  # one depth is no evidence
    assert judge({2: good, 4: bad}, None)[0] == "out"
    assert judge({2: good, 4: noisy}, None)[0] == "out"
    assert judge({2: bad, 4: bad}, "smear")[0] == "in"  # leaving it out costs: the part stays
    assert judge({2: good, 4: good}, "smear")[0] == "out"
    assert judge({2: good, 4: Pairs(equal_time=[math.inf])}, None) == ("out", None)


def test_candidates_leave_each_part_out_and_move_each_number_both_ways():
    assert [c.overrides["extras"] for c in leave_one_out(("a", "b", "c"))] == [("b", "c"), ("a", "c"), ("a", "b")]
    found = {c.name: c.overrides for c in neighbours(scaling.PLAIN)}
    assert found["matrix_lr=0.014"] == {"matrix_lr": pytest.approx(0.014)}
    assert found["matrix_lr=0.028"] == {"matrix_lr": pytest.approx(0.028)}
    assert not any(name.startswith("weight_decay") for name in found)  # off stays off
    assert ablate.parse_candidates("hot: matrix_lr=0.04, parts=(a,b); n: x=1")[0].overrides == {
        "matrix_lr": 0.04,
        "parts": ("a", "b"),
    }


def test_seconds_between_two_horizons_lie_on_a_line_in_log_time():
    points = [(40.0, 1.8), (10.0, 2.2), (20.0, 2.0)]
    assert time_to_bpb.interpolated_seconds(points, 1.9) == pytest.approx(20 * math.sqrt(2))
    assert time_to_bpb.interpolated_seconds(points, 1.8) == pytest.approx(40)
    assert time_to_bpb.interpolated_seconds(points, 1.7) is None


def test_equal_wall_clock_charges_the_slow_candidate_by_the_bases_slope(tmp_path):
    def task(name: str) -> Task:
        return Task(name, {"kind": name}, dict)

    experiment = ablate.Experiment(
        [Candidate("c", {}, "")],
        {("", 2, 0): task("base"), ("c", 2, 0): task("cand")},
        {(2, 0): task("half")},
        {("c", 2): task("time")},
    )
    store = Results(tmp_path / "r.jsonl")
    for name, result in {
        "base": {"bpb": 2.0},
        "half": {"bpb": 2.3},
        "cand": {"bpb": 1.9},
        "time": {"ratio": 2.0},
    }.items():
        store.add(task(name), result)
    pairs = ablate.pairs_of(experiment, store, "c", 2)
    assert pairs.equal_steps == [pytest.approx(-0.1)]
    assert pairs.equal_time == [pytest.approx(-0.1 + 0.3)]  # twice the time is worth a doubling of the base's steps


# ---- Results


def counted(path: Path, value: float) -> dict[str, Any]:
    with path.open("a") as file:
        file.write("x")
    return {"bpb": value}


def failing() -> dict[str, Any]:
    raise RuntimeError("out of memory")


def test_a_rerun_takes_what_is_finished_and_does_the_rest(tmp_path, capsys):
    calls, path = tmp_path / "calls", tmp_path / "r.jsonl"
    tasks = [Task(f"t{i}", {"kind": "run", "i": i}, partial(counted, calls, float(i))) for i in range(3)]
    broken = Task("broken", {"kind": "run", "i": 9}, failing)
    assert run_all([tasks[0], broken, tasks[0]], Results(path), jobs=0) == 1
    assert "FAILED broken" in capsys.readouterr().out
    path.write_bytes(path.read_bytes() + b'{"key": "cut o')  # killed while it wrote
    store = Results(path)
    assert run_all(tasks, store, jobs=0) == 0
    assert calls.read_text() == "xxx"
    assert [Results(path).get(t) for t in (*tasks, broken)] == [{"bpb": 0.0}, {"bpb": 1.0}, {"bpb": 2.0}, None]


def test_a_child_process_gives_the_same_answer(tmp_path):
    task = Task("t", {"kind": "run"}, partial(counted, tmp_path / "calls", 1.5))
    store = Results(tmp_path / "r.jsonl")
    assert run_all([task], store, jobs=1) == 0
    assert store.get(task) == {"bpb": 1.5}


def test_nothing_starts_that_would_end_after_the_time_limit(tmp_path):
    calls = tmp_path / "calls"
    tasks = [Task(f"t{i}", {"kind": "run", "i": i}, partial(counted, calls, 0.0)) for i in range(2)]
    assert run_all(tasks, Results(tmp_path / "r.jsonl"), jobs=0, time_limit=-1) == 2
    assert not calls.exists()


def test_what_an_earlier_call_timed_decides_what_a_later_one_starts(tmp_path, capsys):
    calls, path = tmp_path / "calls", tmp_path / "r.jsonl"
    long, other, elsewhere = (
        Task(kind, {"kind": kind, "i": 1, "machine": machine}, partial(counted, calls, 0.0), cost=10.0)
        for kind, machine in (("run", "this"), ("timing", "this"), ("run", "another"))
    )
    Results(path).add(Task("old", {"kind": "run", "i": 0, "machine": "this"}, dict), {})  # of before seconds were kept
    assert run_all([dataclasses.replace(long, spec={**long.spec, "i": 2})], Results(path), jobs=0, time_limit=1) == 0
    Results(path).add(Task("t", {"kind": "run", "i": 3, "machine": "this"}, dict, cost=2.0), {}, seconds=20.0)
    capsys.readouterr()
    assert run_all([other], Results(path), jobs=0, time_limit=1) == 0
    assert run_all([elsewhere], Results(path), jobs=0, time_limit=1) == 0
    assert run_all([long], Results(path), jobs=0, time_limit=1) == 1  # 100 s do not fit in a minute
    assert "1 tasks not started, the next takes about 1.7 min" in capsys.readouterr().out
    assert run_all([long], Results(path), jobs=0, time_limit=2) == 0
    assert calls.read_text() == "xxxx"


def test_results_of_other_code_are_marked_and_made_again_only_when_asked(tmp_path, capsys):
    calls, path = tmp_path / "calls", tmp_path / "r.jsonl"
    task = Task("t", {"kind": "run"}, partial(counted, calls, 0.0))
    store = Results(path)
    store.code = "another"
    store.add(task, {"bpb": 9.0})
    now = Results(path)
    assert now.is_stale(task)
    run_all([task], now, jobs=0)
    assert "of other code" in capsys.readouterr().out and not calls.exists()
    run_all([task], now, jobs=0, fresh=True)
    assert now.get(task) == {"bpb": 0.0} and not Results(path).is_stale(task)


def test_the_digest_of_code_sees_statements_but_neither_comments_nor_docstrings(tmp_path):
    a, b, c = (tmp_path / name for name in "abc")
    a.write_text('"""One."""\ndef f(x):\n    """Two."""\n    return x + 1\n')
    b.write_text('"""Other."""\n\ndef f(x):  # why\n    return x + 1\n')
    c.write_text("def f(x):\n    return x + 2\n")
    assert results._code(a) == results._code(b) != results._code(c)


def test_a_key_holds_every_value_that_decides_a_run():
    text, plan = tiny_text(), tiny_plan()
    base = common.run_task(Setting(2, "plain", 0, TINY), plan, text, "")
    changed = [
        common.run_task(Setting(2, "modern", 0, TINY), plan, text, ""),
        common.run_task(Setting(2, "plain", 1, TINY), plan, text, ""),
        common.run_task(Setting(2, "plain", 0, {**TINY, "matrix_lr": 0.03}), plan, text, ""),
        common.run_task(Setting(2, "plain", 0, TINY), tiny_plan(steps=2), text, ""),
        common.run_task(Setting(2, "plain", 0, TINY), plan, Text(**{**vars(text), "val": text.val[:2]}), ""),
    ]
    assert len({task.key for task in (base, *changed)}) == 6
    assert common.run_task(Setting(2, "plain", 0, {**TINY, "matrix_lr": 0.02}), plan, text, "x").key == base.key


# ---- Text and runs


def test_packed_text_survives_its_file_and_fits_its_limit(tmp_path):
    text, path = tiny_text(400), tmp_path / "packed.npz"
    text.save(path)
    again = Text.load(path)
    assert np.array_equal(again.train, text.train) and np.array_equal(again.val, text.val)
    assert (again.bos, again.name, list(again.token_bytes)) == (text.bos, text.name, list(text.token_bytes))
    limit = path.stat().st_size // 2
    text.save(path, limit)
    assert path.stat().st_size <= limit
    kept = Text.load(path).train
    assert 100 < len(kept) < 200 and np.array_equal(kept, text.train[: len(kept)])


def test_validation_rows_are_bos_and_the_beginning_of_each_document(tmp_path):
    texts = [f"document {i} " + "word " * (i % 7) for i in range(40)]
    (tmp_path / "t.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    text = Text.pack(str(tmp_path), 300, 16, 4, val_documents=3)
    source = packed.open_source(str(tmp_path))
    tokenizer = packed.tokenizer_for(source, 300)
    for row, document in zip(text.val, list(source.texts("val"))[:3], strict=False):
        ids = [tokenizer.get_bos_token_id(), *tokenizer.encode(document)][:17]
        assert row.tolist() == ids + [-1] * (17 - len(ids))
    assert text.train.shape == (4, 17) and (text.train[:, 0] == text.bos).all()
    inputs, targets = packed.to_batch(text.val, text.bos, torch.device("cpu"))
    assert (targets == -1).any() and (inputs[:, 1:][targets[:, :-1] == -1] == text.bos).all()


def test_every_run_of_a_seed_sees_the_same_rows_and_a_horizon_takes_the_first():
    text, cpu = tiny_text(), torch.device("cpu")

    def seen(seed: int, steps: int) -> list[list[int]]:
        taken = [batch for step in text.batches(tiny_plan(steps=steps), seed, cpu) for batch in step]
        return torch.cat([inputs for inputs, _ in taken]).tolist()

    assert seen(0, 3) == seen(0, 3) != seen(1, 3)
    assert sorted(seen(0, 3)) == sorted(seen(1, 3)) == sorted(text.train[:12, :8].tolist())
    assert sorted(seen(0, 2)) == sorted(text.train[:8, :8].tolist())


def test_a_run_equals_a_plain_loop_that_never_warmed_up():
    text, plan = tiny_text(), tiny_plan()
    found = common.train_run(Setting(2, "plain", 5, TINY), plan, text, eval_every=1)
    rt = Runtime(torch.device("cpu"), torch.float32)
    torch.manual_seed(5)
    config, _ = common.resolve(Setting(2, "plain", 5, TINY), 40, 8, 16, 2)
    model = checkpoint.build_model(config, rt)
    optimizer = build_optimizer(model, unembedding_lr=0.004, embedding_lr=0.2, matrix_lr=0.02)
    for step, batches in enumerate(text.batches(plan, 5, rt.device)):
        optimizer.set_lr(scaling.lr_multiplier(step / 3, 0.0, 0.2, 0.0, 1 / 3), scaling.muon_momentum(step))
        accumulate(model, batches)
        optimizer.step(1.0)
    val = packed.to_batch(text.val, text.bos, rt.device)
    assert found["bpb"] == pytest.approx(evaluate_bpb(model, [val], torch.from_numpy(text.token_bytes)), rel=1e-6)
    assert [step for step, _, _ in found["curve"]] == [1, 2, 3]
    assert found["tokens"] == 96 and found["seconds"] == pytest.approx(found["curve"][-1][1])


def test_after_the_warm_up_the_optimizer_is_the_same_object_as_new():
    """Its compiled functions go with it, so that no timed step compiles."""
    built = Built(Setting(2, "modern", 5, TINY), tiny_plan(), 40)
    before, fresh = built.optimizer, Built(Setting(2, "modern", 5, TINY), tiny_plan(), 40)
    batches = next(tiny_text().batches(tiny_plan(), 0, built.rt.device))
    built.warm_up(batches)
    assert built.optimizer is before and list(built.optimizer.state_dict()) == ["step"]
    for step in range(2):
        assert built.timed_step(batches, step)[1] == fresh.timed_step(batches, step)[1]
    states = built.optimizer.state_dict(), fresh.optimizer.state_dict()
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])


@pytest.mark.parametrize(
    ("device", "compile", "expected"), [("cuda", True, True), ("cuda", False, False), ("cpu", True, False)]
)
def test_the_optimizer_is_compiled_where_base_train_compiles_it(monkeypatch, device, compile, expected):
    asked = []
    monkeypatch.setattr(common, "start", lambda *args: Runtime(torch.device(device), torch.bfloat16))
    monkeypatch.setattr(checkpoint, "build_model", lambda *args: torch.nn.Module())
    monkeypatch.setattr(common, "make_optimizer", lambda *args: asked.append(args[3]))
    Built(Setting(1, "plain", 0, TINY), tiny_plan(compile=compile), 40)
    assert asked == [expected]


def test_a_run_that_diverges_is_a_result_and_no_crash(monkeypatch):
    monkeypatch.setattr(common, "accumulate", lambda *args: torch.tensor(float("nan")))
    found = common.train_run(Setting(1, "plain", 0, TINY), tiny_plan(), tiny_text())
    assert found["bpb"] is None and json.dumps(found)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        (Setting(2, "plan"), "use one of plain, modern"),
        (Setting(2, "plain", 0, {"matrix_rl": 0.1}), "the nearest is 'matrix_lr'"),
        (Setting(3, "plain", 0, {"aspect_ratio": 25, "head_dim": 64}), "--depth 3"),
    ],
)
def test_a_wrong_setting_is_one_line(setting, message):
    with pytest.raises(InputError, match=message):
        common.resolve(setting, 256, 64, 64, 2)


def test_overrides_are_read_as_values():
    assert common.parse_overrides("lr=0.03, parts=(a,b), mode=fast, betas=(0.8,0.95)") == {
        "lr": 0.03,
        "parts": ("a", "b"),
        "mode": "fast",
        "betas": (0.8, 0.95),
    }
    with pytest.raises(InputError, match="name=value"):
        common.parse_overrides("lr")


# ---- Checkpoints


def test_the_cost_of_saving_is_the_difference_of_stretches_with_and_without_a_checkpoint(monkeypatch):
    clock = itertools.count()
    monkeypatch.setattr(Built, "timed_step", lambda self, batches, step: (self.step(batches, step), (2.0, 0.0))[1])
    monkeypatch.setattr(saving_bench.time, "perf_counter", lambda: float(next(clock)))  # a second goes by at each look
    found = saving_bench.saving(Setting(1, "plain", 0, TINY), tiny_plan(), 64, pairs=2)
    steps = tiny_plan().steps
    assert found["without"] == [2.0 * steps] * 2
    assert found["with"] == [2.0 * steps + copying for copying in found["copying"]]
    assert found["cost_percent"] == pytest.approx(100 * sum(found["copying"]) / (4.0 * steps))
    assert found["bytes"] > 0 and len(found["writing"]) == 2


@pytest.mark.slow
def test_the_server_under_load_makes_no_error_and_leaks_no_slot():
    result = serve.run(serve.ServeConfig(clients=8, seconds=6, cut=0.3, max_tokens=24, depth=2))
    assert result["errors"] == result["leaked_slots"] == 0
    assert result["answers"] > 0 and result["cuts"] > 0 and result["tokens_per_second"] > 0


def test_the_pairs_to_teach_are_a_hundred_and_asked_in_words_that_the_file_does_not_have():
    file, dev, test = (teach.Pairs(5, split) for split in ("file", "dev", "test"))
    assert (len(file), len(dev), len(test)) == (100, 800, 300)
    answers = {c["messages"][1]["content"] for c in file}
    assert len(answers) == 100 and {c["messages"][1]["content"] for c in test} == answers
    asked = {
        name: {c["messages"][0]["content"] for c in pairs} for name, pairs in (("f", file), ("d", dev), ("t", test))
    }
    assert not (asked["f"] & asked["d"] | asked["f"] & asked["t"] | asked["d"] & asked["t"])
    assert all(file.evaluate(c, c["messages"][1]["content"]) for c in file)
    assert not file.evaluate(file[0], file[0]["candidates"][0] + " " + file[0]["accept"][0])
    assert [c["messages"] for c in teach.Pairs(6, "file")] != [c["messages"] for c in file]
