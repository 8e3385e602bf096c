"""The report: the reference run's values give the reference report, byte for byte."""

import re
from datetime import datetime, timedelta
from pathlib import Path

import pytest

from nanochat import curves, report, report_header
from nanochat.config import InputError
from nanochat.evals import stats
from nanochat.report import Report, format_section, get_report, parse_items, summary_rows

REFERENCE = Path(__file__).parents[2] / "shared" / "reference" / "report.md"
# (text, bytes, GPT-2 tokens, GPT-4 tokens, our tokens)
TEXTS = [
    ("news", 1819, 404, 387, 371),
    ("korean", 893, 745, 364, 723),
    ("code", 1259, 576, 309, 492),
    ("math", 1834, 936, 832, 966),
    ("science", 1112, 260, 249, 223),
    ("fwe-train", 4208518, 900364, 874799, 856938),
    ("fwe-val", 5028883, 1083776, 1054265, 1033017),
]
CHAT_EVAL = {
    "dtype": "bfloat16",
    "temperature": 0.0,
    "max_new_tokens": 512,
    "num_samples": 1,
    "top_k": 50,
    "batch_size": 8,
    "model_tag": None,
    "step": None,
    "max_problems": None,
    "device_type": "",
}
LRS = {"unembedding_lr": 0.004, "embedding_lr": 0.2, "matrix_lr": 0.02}


def comparison(name, column):
    lines = [
        f"### Comparison with {name}",
        "",
        f"| Text Type | Bytes | {name} Tokens | {name} Ratio | Ours Tokens | Ours Ratio | Relative Diff % |",
        "|" + "|".join("-" * n for n in (11, 7, 14, 14, 13, 12, 17)) + "|",
    ]
    for row in TEXTS:
        text, size, theirs, ours = row[0], row[1], row[column], row[4]
        ratios = size / theirs, size / ours
        diff = 100 * (theirs - ours) / theirs
        lines.append(f"| {text} | {size} | {theirs} | {ratios[0]:.2f} | {ours} | {ratios[1]:.2f} | {diff:+.1f}% |")
    return [*lines, ""]


TOKENIZER = {
    "max_chars": 10_000_000_000,
    "doc_cap": 10_000,
    "vocab_size": 65_536,
    "train_time": 167.3429,
    "num_special_tokens": 9,
    "token_bytes_min": 1,
    "token_bytes_max": 32,
    "token_bytes_mean": 6.9125,
    "token_bytes_std": 2.8738,
}
BASE_CONFIG = {
    "run": "aquarat-20251023-222655",
    "device_type": "",
    "depth": 8,
    "max_seq_len": 2048,
    "num_iterations": 200,
    "target_flops": -1.0,
    "target_param_data_ratio": 20,
    "device_batch_size": 32,
    "total_batch_size": 524288,
    "embedding_lr": 0.2,
    "unembedding_lr": 0.004,
    "weight_decay": 0.0,
    "matrix_lr": 0.02,
    "grad_clip": 1.0,
    "eval_every": 250,
    "eval_tokens": 10485760,
    "core_metric_every": 2000,
    "core_metric_max_per_task": 500,
    "sample_every": 2000,
    "model_tag": "",
}
BASE_FACTS = {
    "Number of parameters": 92274688,
    "Number of FLOPs per token": "4.529848e+08",
    "Calculated number of iterations": 200,
    "Number of training tokens": 104857600,
    "Tokens : Params ratio": 104857600 / 92274688,
    "DDP world size": 8,
    "warmup_ratio": 0.0,
    "warmdown_ratio": 0.2,
    "final_lr_frac": 0.0,
}
BASE_OUTCOME = {
    "Minimum validation bpb": 1.2992,
    "Final validation bpb": 1.2992,
    "CORE metric estimate": 0.0135,
    "MFU %": "21.07%",
    "Total training flops": "4.749890e+16",
    "Total training time": "0.39m",
    "Peak memory usage": "19176.26MiB",
}
SAMPLES = (
    "The capital of France is the capital of the city of the city of the city of the city of the",
    "The chemical symbol of gold is a symbol of the world’s most important symbol of the world’s most important symbol",
    "If yesterday was Friday, then tomorrow will be a bit more than a few years, and then the next day, the next",
    "The opposite of hot is the same as the one of the two of the same kind of cold weather.",
    "The planets of the solar system are: 1.5 billion years ago, and the 1.5 billion years",
    "My favorite color is the color of the color of the color of the color of the color of the",
    "If 5*x + 3 = 13, then x is 3.5.5.5.5.5.5.5",
)
BASE_LOSS = {
    "train bpb": 1.2967,
    "val bpb": 1.3001,
    **{f"sample {i}": "<|bos|>" + text for i, text in enumerate(SAMPLES)},
}
BASE_EVAL = {
    "Model": "base_model (step 200)",
    "CORE metric": 0.0155,
    "hellaswag_zeroshot": -0.0018,
    "jeopardy": 0.0,
    "bigbench_qa_wikidata": 0.0005,
    "arc_easy": 0.1246,
    "arc_challenge": -0.0364,
    "copa": -0.04,
    "commonsense_qa": -0.0053,
    "piqa": 0.0794,
    "openbook_qa": -0.0373,
    "lambada_openai": 0.019,
    "hellaswag": -0.0067,
    "winograd": 0.0842,
    "winogrande": 0.0024,
    "bigbench_dyck_languages": 0.008,
    "agi_eval_lsat_ar": 0.0326,
    "bigbench_cs_algorithms": 0.0235,
    "bigbench_operators": 0.0619,
    "bigbench_repeat_copy_logic": 0.0,
    "squad": 0.0004,
    "coqa": 0.0009,
    "boolq": -0.1468,
    "bigbench_language_identification": 0.177,
}
MID = {
    "run": "aquarat-20251023-222655",
    "device_type": "",
    "dtype": "bfloat16",
    "num_iterations": 200,
    "max_seq_len": 2048,
    "device_batch_size": 32,
    **LRS,
    "init_lr_frac": 1.0,
    "weight_decay": 0.0,
    "eval_every": 150,
    "eval_tokens": 10485760,
    "total_batch_size": 524288,
    "dry_run": 0,
    "Number of iterations": 199,
    "DDP world size": 8,
    "Minimum validation bpb": 0.6738,
}
SFT = {
    "run": "aquarat-20251023-224449",
    "source": "mid",
    "device_type": "",
    "dtype": "bfloat16",
    "device_batch_size": 4,
    "num_epochs": 1,
    "num_iterations": -1,
    "target_examples_per_step": 32,
    **LRS,
    "weight_decay": 0.0,
    "init_lr_frac": 0.02,
    "aqua_train_examples": 20000,
    "aqua_val_examples": 254,
    "eval_every": 100,
    "eval_steps": 100,
    "eval_metrics_every": 200,
    "eval_metrics_max_problems": 1024,
    "Training rows": 41839,
    "Number of iterations": 1307,
    "Training loss": 2.9144,
    "Validation loss": 1.912,
}
RL = {
    "run": "aquarat-20251023-224750-rl",
    "source": "sft",
    "dtype": "bfloat16",
    "device_batch_size": 1,
    "examples_per_step": 16,
    "num_samples": 4,
    "max_new_tokens": 64,
    "temperature": 0.7,
    "top_k": 50,
    **LRS,
    "weight_decay": 0.0,
    "init_lr_frac": 0.05,
    "num_epochs": 1,
    "save_every": 60,
    "eval_every": 60,
    "eval_examples": 400,
}
# (section, when it was logged, its items)
REFERENCE_SECTIONS = [
    ("Tokenizer training", "2025-10-24 01:20:23", [TOKENIZER]),
    (
        "Tokenizer evaluation",
        "2025-10-24 01:20:28",
        ["\n".join(comparison("GPT-2", 2) + comparison("GPT-4", 3))],
    ),
    ("Base model training", "2025-10-23 22:28:41", [BASE_CONFIG, BASE_FACTS, BASE_OUTCOME]),
    ("Base model loss", "2025-10-24 01:21:08", [BASE_LOSS]),
    ("Base model evaluation", "2025-10-24 01:32:41", [BASE_EVAL]),
    ("Midtraining", "2025-10-23 22:30:54", [MID]),
    (
        "Chat evaluation mid",
        "2025-10-24 01:52:32",
        [{"source": "mid", "task_name": "GSM8K", **CHAT_EVAL}, None, {"GSM8K": 3 / 1319}],
    ),
    ("Chat SFT", "2025-10-23 22:46:36", [SFT]),
    (
        "Chat evaluation sft",
        "2025-10-24 01:52:40",
        [{"source": "sft", "task_name": "AQUA", **CHAT_EVAL, "AQUA": 70 / 254}],
    ),
    ("Chat RL", "2025-10-24 01:01:09", [RL, {}, ""]),
    (
        "Chat evaluation rl",
        "2025-10-24 03:52:41",
        [{"source": "rl", "task_name": "AQUA", **CHAT_EVAL, "max_new_tokens": 64, "AQUA": 69 / 254}],
    ),
]
HEADER = "# nanochat training report\n\n### Bloat\n- Files: 57\n\nRun started: 2025-10-23 22:27:01\n\n---\n\n"


def at(text):
    return lambda: datetime.strptime(text, report.TIME_FORMAT)


@pytest.fixture
def base(tmp_path, monkeypatch):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / "base"))
    monkeypatch.chdir(tmp_path)
    return tmp_path / "base"


def test_the_reference_runs_values_give_the_reference_report_byte_for_byte(tmp_path):
    if not REFERENCE.exists():
        pytest.skip("no ../shared/reference/report.md beside the repository")
    expected = REFERENCE.read_bytes()
    header = expected[: expected.index(b"\n---\n\n") + len(b"\n---\n\n")]
    (tmp_path / "report").mkdir()
    (tmp_path / "report" / "header.md").write_bytes(header)
    for section, timestamp, items in reversed(REFERENCE_SECTIONS):  # the order of logging is not the report's
        Report(tmp_path / "report", clock=at(timestamp)).log(section, items)
    path = Report(tmp_path / "report", copy_to=tmp_path / "report.md").generate()
    assert path.read_bytes() == expected
    assert (tmp_path / "report.md").read_bytes() == expected


@pytest.mark.parametrize(
    ("value", "printed"),
    [
        (0.2, "0.2000"),
        (-1.0, "-1.0000"),
        (9999, "9999"),
        (10000, "10,000"),
        (-20000, "-20000"),
        (None, "None"),
        (True, "True"),
        ("", ""),
        ("4.5e+08", "4.5e+08"),
        ("two\nlines\r", "two\\nlines\\r"),
    ],
)
def test_values_are_printed_by_type_and_never_break_the_list(value, printed):
    assert format_section("S", "now", [{"k": value}]) == f"## S\ntimestamp: now\n\n- k: {printed}\n\n"


def test_a_string_stands_as_it_is_and_what_is_empty_is_left_out():
    assert format_section("S", "now", ["a\nb", None, {}, "", {"k": 1}]).endswith("now\n\na\nb\n- k: 1\n\n")


def test_logging_twice_keeps_the_second(tmp_path):
    r = Report(tmp_path)
    r.log("Chat SFT", [{"a": 1}])
    path = r.log("Chat SFT", [{"b": "größer"}])
    assert path == tmp_path / "chat-sft.md"
    assert parse_items(path.read_text(encoding="utf-8")) == {"b": "größer"}
    assert [p.name for p in tmp_path.iterdir()] == ["chat-sft.md"]  # no temporary file is left


def test_only_a_whole_key_with_a_number_is_a_score():
    sections = {
        "base-model-evaluation": "- CORE metric: not measured (tinyworld bundle)\n- CORE tinyworld: 0.5000\n",
        "chat-evaluation-mid": "- task_name: GSM8K\n- GSM8K: 0.0100\n- GSM8K errors: 3\n",
        "chat-evaluation-sft": "- task_name: MMLU\n",
    }
    assert summary_rows(sections, ours=False) == {"GSM8K": {"MID": "0.0100"}}
    assert summary_rows(sections, ours=True) == {
        "CORE tinyworld": {"BASE": "0.5000"},
        "GSM8K": {"MID": "0.0100"},
    }


def test_an_incomplete_core_has_a_row_of_its_own():
    sections = {"base-model-evaluation": "- CORE metric (21 of 22 tasks): 0.1000\n"}
    assert summary_rows(sections, ours=False) == {}
    assert summary_rows(sections, ours=True) == {"CORE (21 of 22)": {"BASE": "0.1000"}}


def test_our_own_runs_also_show_aqua_tinyworld_and_rl_scores():
    scores = "- AQUA: 0.2\n- SpellingBee: 0.9\n- TinyWordProblems: 0.7\n- ChatCORE tinyworld: 0.5\n- MMLU: 0.3\n"
    sections = {"chat-evaluation-rl": scores, "base-model-loss": "- val bpb: 1.2\n"}
    assert list(summary_rows(sections, ours=True)) == [
        "val bpb",
        "AQUA",
        "MMLU",
        "SpellingBee",
        "TinyWordProblems",
        "ChatCORE tinyworld",
    ]
    assert summary_rows(sections, ours=False) == {}


def logged_run(directory, sections):
    directory.mkdir(exist_ok=True)
    (directory / "header.md").write_text(HEADER)
    for section, time in sections:
        Report(directory, clock=at(time)).log(section, [{"GSM8K": 0.5}])
    return Report(directory)


def test_the_wall_clock_ends_with_the_latest_section_not_the_last_listed(tmp_path):
    r = logged_run(tmp_path, [("Midtraining", "2025-10-24 00:30:01"), ("Chat SFT", "2025-10-23 23:00:00")])
    assert r.generate().read_text().endswith("\nTotal wall clock time: 2h3m\n")


def test_rl_counts_in_our_own_runs_on_a_line_after_the_references(tmp_path):
    times = [("Chat SFT", "2025-10-23 23:27:01"), ("Chat RL", "2025-10-24 01:27:02")]
    r = logged_run(tmp_path, times)
    assert r.generate().read_text().endswith("Total wall clock time: 1h0m\n")  # another run's header: its form
    (tmp_path / "run.json").write_text("{}")
    tail = "Total wall clock time: 1h0m\n\nTotal wall clock time including RL: 3h0m\n"
    assert r.generate().read_text().endswith(tail)


def test_a_run_on_rented_gpus_says_what_it_cost(tmp_path):
    r = logged_run(tmp_path, [("Chat SFT", "2025-10-23 23:57:01")])  # an hour and a half
    (tmp_path / "header.md").write_text(HEADER.replace("### Bloat", "- Hourly Rate: $24.00/hour\n\n### Bloat"))
    (tmp_path / "run.json").write_text("{}")
    assert "\nCost at $24.00/hour: $36.00\n" in r.generate().read_text()


def chat_scores(task, passed, total, controls=("0.2000", "0.2756"), **more):
    """Items as chat_eval logs them."""
    low, high = stats.wilson(passed, total)
    return {
        task: passed / total,
        f"{task} 95% interval": f"{low:.4f} to {high:.4f} ({passed} of {total})",
        f"{task} better than guessing": more.pop("better", "yes"),
        f"{task} random guess": controls[0],
        f"{task} always the commonest letter": controls[1],
        **{f"{task} {key.replace('_', ' ')}": value for key, value in more.items()},
    }


def test_our_own_runs_say_which_gains_are_real_and_which_scores_are_near_chance(tmp_path):
    r = logged_run(tmp_path, [])
    mid = chat_scores("TinySums", 40, 200) | chat_scores("TinyMC", 50, 200)
    gains = {
        "TinySums": "40 -> 180 of 200; 140 only now, 0 only in mid; difference +0.6 to +0.8; real (p < 0.0001)",
        "TinyMC": "not compared: their data differ; evaluate both again",
    }
    sft = chat_scores("TinySums", 180, 200, against_mid=gains["TinySums"])
    sft |= chat_scores("TinyMC", 60, 200, against_mid=gains["TinyMC"])
    rl = chat_scores(
        "AQUA",
        69,
        254,
        better="no: no better than always answering A (0.2756)",
        against_sft="no record of the stage before",
    )
    for stage, items in (("mid", mid), ("sft", sft), ("rl", rl)):
        r.log(f"Chat evaluation {stage}", [items])
    assert "gains are real" not in r.generate().read_text()  # another run's header: its form
    (tmp_path / "run.json").write_text("{}")
    text = r.generate().read_text()
    table = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("|")]
    assert table[-5:] == [
        ["Task", "Random", "Majority", "MID", "SFT", "SFT over MID", "RL", "RL over SFT"],
        ["---"] * 8,
        ["AQUA", "0.2000", "0.2756", "-", "-", "-", "0.2717 ± 0.0544", "no record of the stage before"],
        ["TinyMC", "0.2000", "0.2756", "0.2500 ± 0.0596", "0.3000 ± 0.0631", "not compared", "-", "-"],
        ["TinySums", "0.2000", "0.2756", "0.2000 ± 0.0552", "0.9000 ± 0.0418", "real (p < 0.0001)", "-", "-"],
    ]
    assert "\n- AQUA after RL: 0.2717 is no better than always answering A (0.2756)\n" in text
    assert text.count("Near chance or below it") == 1 and "TinyMC after" not in text


def test_one_evaluation_has_a_table_without_gains(tmp_path):
    r = logged_run(tmp_path, [])
    (tmp_path / "run.json").write_text("{}")
    r.log("Chat evaluation sft", [chat_scores("AQUA", 69, 254)])
    text = r.generate().read_text()
    assert "| Task | Random | Majority | SFT |\n" in text and "Near chance" not in text and "Chance alone" not in text


def test_without_a_header_the_report_says_what_is_unknown(tmp_path, capsys):
    Report(tmp_path).log("Chat SFT", [{"a": 1}])
    text = Report(tmp_path).generate().read_text()
    assert "Total wall clock time: unknown" in text
    assert "no header.md" in capsys.readouterr().out


def test_new_sections_follow_the_old_ones(tmp_path):
    r = logged_run(tmp_path, [("Data used", "2025-10-24 00:00:00"), ("Midtraining", "2025-10-24 00:00:00")])
    assert re.findall(r"^## (.*)", r.generate().read_text(), re.M) == ["Midtraining", "Data used", "Summary"]


def test_nothing_to_report_is_a_user_error(tmp_path):
    with pytest.raises(InputError, match="run a stage first"):
        Report(tmp_path).generate()


def test_reset_drops_the_old_run_and_writes_the_header(base, monkeypatch):
    get_report().log("Chat SFT", [{"a": 1}])
    curves.log_curve("base", 1, loss=1.0)
    notes = base / "report" / "my-notes.md"
    notes.write_text("mine")
    get_report().generate()
    report.main(["reset"])
    assert sorted(p.name for p in (base / "report").iterdir()) == ["header.md", "my-notes.md", "run.json"]
    assert not Path("report.md").exists()
    header = (base / "report" / "header.md").read_text()
    assert re.fullmatch(
        r"# nanochat training report\n\nGenerated: .*\n\n## Environment\n\n### Git Information\n"
        r"- Branch: .*\n- Commit: \w+ \((dirty|clean|unknown)\)\n- Message: .*\n\n### Hardware\n"
        r"- Platform: .*\n- CPUs: .* logical\)\n- Memory: [\d.]+ GB\n"
        r"(- GPU.*\n|- CUDA.*\n|- Hourly.*\n)+\n### Software\n- Python: .*\n"
        r"- PyTorch: .*\n\n\n### Bloat\n- Characters: .*\n- Lines: .*\n- Files: .*\n- Tokens \(approx\): .*\n"
        r"- Dependencies \(uv.lock lines\): .*\n\nRun started: .*\n\n---\n\n",
        header,
    )


def test_the_command_generates_by_default_and_copies_the_report_here(base):
    report.main(["reset"])
    get_report().log("Chat SFT", [{"a": 1}])
    report.main([])
    assert Path("report.md").read_bytes() == (base / "report" / "report.md").read_bytes()


def test_ranks_other_than_0_write_nothing(base, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    r = get_report()
    r.reset()
    r.log("Chat SFT", [{"a": 1}])
    r.generate()
    curves.log_curve("base", 1, loss=1.0)
    assert not (base / "report").exists()


def test_without_git_the_header_says_unknown(monkeypatch):
    monkeypatch.setattr(report_header, "_run", lambda *command: None)
    assert report_header.git_lines()[1] == "- Commit: unknown (unknown)"
    assert report_header.bloat_lines()[0] == "- Characters: unknown"


@pytest.mark.parametrize(
    ("name", "dollars"), [("NVIDIA H100 80GB HBM3", 24.0), ("NVIDIA A100-SXM4-40GB", 14.32), ("L4", 16.0)]
)
def test_eight_gpus_cost_eight_times_the_rate_of_one(name, dollars):
    assert report_header.hourly_rate(name, 8) == pytest.approx(dollars)


def test_durations_are_floored_to_minutes():
    assert report.format_duration(timedelta(hours=25, minutes=5, seconds=59)) == "25h5m"
