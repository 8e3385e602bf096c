"""base_eval and base_loss from end to end, on a tiny untrained model and text made here."""

import json
import math

import pytest
import torch

from bench import evals
from nanochat.config import InputError
from nanochat.evals.core import CoreResult, TaskScore
from nanochat.gpt import GPT, GPTConfig
from nanochat.report import parse_items
from nanochat.runtime import Runtime
from nanochat.tokenizer import Tokenizer
from scripts import base_eval, base_loss
from tests.conftest import save_checkpoint

CPU = Runtime(torch.device("cpu"), torch.float32)
TEXTS = [f"The {what} number {i} is nice. " * 4 for i in range(40) for what in ("red cat", "blue sky")]
SEQUENCE_LEN = 16


def save_model(base, dataset):
    tokenizer = Tokenizer.train_from_iterator(TEXTS, vocab_size=300)
    tokenizer.save(base / "tokenizer")
    torch.manual_seed(0)
    vocab_size = tokenizer.get_vocab_size()
    model = GPT(GPTConfig(SEQUENCE_LEN, vocab_size, n_layer=1, n_head=1, n_kv_head=1, n_embd=16))
    model.init_weights()
    meta = {
        "model_config": model.config.to_dict(),
        "user_config": {"dataset": dataset},
        "tokenizer": tokenizer.fingerprint,
    }
    save_checkpoint(base / "base_checkpoints" / "d1", 7, model, None, meta)
    return math.log2(vocab_size)


@pytest.fixture
def base(tmp_path, monkeypatch):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / "base"))
    monkeypatch.delenv("NANOCHAT_HUB_DIR", raising=False)
    monkeypatch.chdir(tmp_path)
    return tmp_path / "base"


@pytest.fixture
def own_text(tmp_path):
    folder = tmp_path / "text"
    folder.mkdir()
    (folder / "all.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in TEXTS))
    return str(folder)


def write_bundle(folder, labels):
    (folder / "eval_data").mkdir(parents=True)
    items = [{"query": f"cat {i}", "choices": ["red", "blue"], "gold": i % 2} for i in range(6)]
    (folder / "eval_data" / "t.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items))
    entry = "- label: {}\n  dataset_uri: t.jsonl\n  num_fewshot: [1]\n  icl_task_type: multiple_choice\n"
    (folder / "core.yaml").write_text("icl_tasks:\n" + "".join(entry.format(label) for label in labels))
    rows = "".join(f"{label},50\n" for label in labels)
    (folder / "eval_meta_data.csv").write_text("Eval Task,Random baseline\n" + rows)
    return str(folder)


def section(base, name):
    return parse_items((base / "report" / f"{name}.md").read_text(encoding="utf-8"))


def test_base_eval_writes_scores_to_the_report_and_the_table(base, own_text, tmp_path):
    save_model(base, own_text)
    bundle = write_bundle(tmp_path / "b", ["copa", "boolq"])
    base_eval.main([f"--bundle={bundle}", "--max-per-task=4", "--device_type", "cpu"])
    logged = section(base, "base-model-evaluation")
    assert list(logged)[:4] == ["Model", "CORE metric (2 of 22 tasks)", "copa", "boolq"]
    assert logged["Model"] == "base_model (step 7)"
    assert logged["max_per_task"] == "4"
    head, copa, boolq, mean = (base / "base_eval" / "base_model_000007.csv").read_text().splitlines()
    assert head == "Task                               , Accuracy  , Centered  "
    accuracy, centered = (float(cell) for cell in copa.split(",")[1:])
    assert accuracy in (0, 0.25, 0.5, 0.75, 1) and centered == 2 * accuracy - 1
    assert mean.startswith("CORE metric (2 of 22 tasks)") and boolq.startswith("boolq   ")
    found, _ = map(json.loads, (base / "base_eval" / "base_model_000007.jsonl").read_text().splitlines())
    assert found["task"] == "copa" and len(found["predictions"]) == len(found["right"]) == 4
    assert sum(x == y for x, y in zip(found["predictions"], found["right"], strict=True)) / 4 == accuracy


def test_a_score_on_tinyworld_is_never_reported_as_core():
    result = CoreResult("CORE tinyworld", (TaskScore("capitals", 3, 4, 0.5),))
    scores, tasks, sureness, lines = base_eval.report_items(result, 7)
    assert scores == {
        "Model": "base_model (step 7)",
        "CORE metric": "not measured (tinyworld bundle)",
        "CORE tinyworld": 0.5,
    }
    assert tasks == {"capitals": 0.5}
    assert list(sureness) == [
        "CORE tinyworld standard error",
        "CORE tinyworld 95% interval",
        "CORE tinyworld of random guesses",
        "CORE tinyworld of one answer to all",
    ]
    assert sureness["CORE tinyworld 95% interval"] == "-0.3487 to 1.3487"  # 0.5 +- 1.96 * 0.433
    assert list(lines) == ["capitals accuracy"]
    assert base_eval.format_csv(result).splitlines()[-1].startswith("CORE tinyworld  ")


def test_a_tasks_line_has_its_counts_its_interval_and_the_controls():
    task = TaskScore("copa", 50, 100, 0.5, guess=0.5, majority=0.55, num_cropped=3)
    assert base_eval.describe(task) == (
        "0.5000 (50 of 100), centered 0.0000 +- 0.1000, 95% -0.1923 to 0.1923, random guesses 0.5000, "
        "one answer to all 0.5500, 3 longer than the context"
    )


def test_both_modes_write_the_same_scores_and_predictions(base, own_text, tmp_path):
    save_model(base, own_text)
    bundle = write_bundle(tmp_path / "b", ["copa", "boolq"])
    written = []
    for mode in ("fast", "identity"):
        base_eval.main([f"--bundle={bundle}", f"--mode={mode}", "--device_type", "cpu"])
        files = sorted((base / "base_eval").iterdir())
        assert [file.name for file in files] == ["base_model_000007.csv", "base_model_000007.jsonl"]
        written.append([file.read_text() for file in files])
    assert written[0] == written[1]
    assert len(list((base / "core_requests").iterdir())) == 2


def test_the_benchmark_times_both_modes_and_compares_them_on_some_examples(base, own_text, tmp_path, capsys):
    save_model(base, own_text)
    bundle = write_bundle(tmp_path / "b", ["copa", "boolq"])
    sizes = {"max_per_task": 3, "one_by_one": 2, "dtype": "float32", "device": "cpu", "threads": 1}
    result = evals.run(evals.EvalsConfig(bundle=bundle, **sizes))
    assert (result["examples"], result["compared"], result["different_predictions"]) == (6, 4, 0)
    assert result["ratio"] == pytest.approx(result["identity_seconds"] / result["fast_seconds"])
    *_, whole, empty, line = capsys.readouterr().out.splitlines()
    assert whole.startswith("| the bundle, scaled | 12 |") and not empty and json.loads(line) == result


def test_an_unknown_mode_is_refused():
    with pytest.raises(InputError, match="--mode quick is not known; use one of fast, identity"):
        base_eval.BaseEvalConfig(mode="quick")


def test_a_model_of_tinyworld_is_evaluated_on_tinyworlds_bundle(base):
    save_model(base, "tinyworld")
    base_eval.main(["--max_per_task", "2", "--device_type", "cpu"])
    logged = section(base, "base-model-evaluation")
    assert logged["CORE metric"] == "not measured (tinyworld bundle)"
    assert -1 <= float(logged["CORE tinyworld"]) <= 1


def test_the_table_of_all_22_tasks_ends_with_core():
    last = base_eval.format_csv(CoreResult("CORE metric", (TaskScore("copa", 48, 100, 0.5),))).splitlines()[-1]
    assert last == "CORE                               ,           , -0.040000 "


def test_base_loss_of_an_untrained_model_is_that_of_guessing_a_token(base, own_text):
    bits_per_token = save_model(base, own_text)
    tokenizer = Tokenizer.from_directory(base / "tokenizer")
    text = "".join(TEXTS)
    bits_per_byte = bits_per_token * len(tokenizer.encode(text)) / len(text.encode())
    base_loss.main(["--device_batch_size=2", "--split_tokens=640", "--device_type=cpu"])
    logged = section(base, "base-model-loss")
    assert list(logged)[:9] == ["train bpb", "val bpb", *(f"sample {i}" for i in range(7))]
    for split in ("train", "val"):
        assert float(logged[f"{split} bpb"]) == pytest.approx(bits_per_byte, rel=0.1)
    assert logged["sample 0"].startswith("<|bos|>The capital of France is")
    assert logged["sample 6"].startswith("<|bos|>If 5*x + 3 = 13, then x is")
    assert logged["dataset"] == own_text


def test_base_loss_of_whole_documents_names_the_text_and_its_sources(base, tmp_path):
    folder = tmp_path / "text"
    for name, texts in (("a.jsonl", TEXTS), ("b/c.jsonl", [t.upper() for t in TEXTS])):
        (folder / name).parent.mkdir(exist_ok=True, parents=True)
        (folder / name).write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    save_model(base, str(folder))
    base_loss.main(["--exact", "--stride=4", "--max_seq_len=12", "--device_batch_size=8", "--device_type=cpu"])
    logged = section(base, "base-model-loss")
    documents, num_bytes = (int(part.split()[0].replace(",", "")) for part in logged["train text"].split(", "))
    val = [int(part.split()[0].replace(",", "")) for part in logged["val text"].split(", ")]
    assert (documents + val[0], num_bytes + val[1]) == (160, 2 * sum(map(len, TEXTS)))
    assert float(logged["train bpb of a.jsonl"]) > 0 and float(logged["train bpb of b/c.jsonl"]) > 0


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--stride=4"], "--stride 4 is for whole documents; add --exact"),
        (["--exact", "--stride=17"], "--stride 17 would leave out tokens between rows of 16; try 16"),
        (["--max_seq_len=161"], "--max_seq_len 161 is beyond the model's positions; try 160"),
    ],
)
def test_rows_that_cannot_be_are_refused(base, own_text, capsys, flags, message):
    save_model(base, own_text)
    with pytest.raises(SystemExit) as stop:
        base_loss.main([*flags, "--device_type=cpu"])
    assert stop.value.code == 2 and message in capsys.readouterr().err


@pytest.mark.parametrize(("tokens", "nearest"), [(1000, 1024), (700, 512), (3, 512)])
def test_split_tokens_that_do_not_divide_name_the_nearest_that_do(tokens, nearest):
    with pytest.raises(InputError, match=rf"--split_tokens {tokens} .* 512 .*; try {nearest}$"):
        base_loss.num_batches(tokens, device_batch_size=4, sequence_len=64, world_size=2)
    assert base_loss.num_batches(nearest, 4, 64, 2) == nearest // 512


@pytest.mark.parametrize("stage", [base_eval, base_loss])
def test_without_a_model_the_stage_ends_in_one_line(stage, base, capsys):
    with pytest.raises(SystemExit) as stop:
        stage.main(["--device_type=cpu"])
    assert stop.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1
