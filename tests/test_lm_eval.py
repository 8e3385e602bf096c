"""The adapter for lm-eval: its log-probabilities, its generation, and lm-eval itself choosing what we choose."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from nanochat import checkpoint
from nanochat.config import InputError
from nanochat.evals import lm_eval_adapter as adapter
from nanochat.evals.bundle import Bundle, CoreTask, read_bundle
from nanochat.evals.core import evaluate_core
from nanochat.evals.core_rules import render_prompts, scored_spans
from nanochat.gpt import GPT
from nanochat.runtime import Runtime
from nanochat.tokenizer import Tokenizer
from scripts import second_opinion
from tests.conftest import save_checkpoint, tiny_gpt

RT = Runtime(torch.device("cpu"), torch.float32)
LABELS = ("arc_easy", "piqa", "boolq")
EXAMPLES = 25


@dataclass
class Request:
    args: tuple[Any, ...]


def requests(*args: tuple[Any, ...]) -> list[Request]:
    return [Request(a) for a in args]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    text = "Question: what is the answer? Answer: yes, no, the cat and the dog sat on a mat; éé 12\n"
    return Tokenizer.train_from_iterator([text * 20], 320)


@pytest.fixture(scope="module")
def model(tokenizer) -> GPT:
    sizes = {"vocab_size": tokenizer.get_vocab_size(), "sequence_len": 256}
    return tiny_gpt(**sizes).prepare(RT.device, RT.dtype).eval()


@torch.no_grad()
def log_prob_plainly(model: GPT, ids: list[int], start: int) -> tuple[float, bool]:
    """One row, one token at a time."""
    total, greedy = 0.0, True
    for t in range(start, len(ids)):
        log_probs = model(torch.tensor([ids[:t]]))[0, -1].double().log_softmax(-1)
        total += float(log_probs[ids[t]])
        greedy &= int(log_probs.argmax()) == ids[t]
    return total, greedy


# the requests


def test_the_log_probability_is_that_of_the_continuations_tokens(model, tokenizer):
    pairs = [
        ("Question: what", " is the answer"),
        ("the cat and ", "the dog"),
        ("", "yes"),
        ("é" * 30, " no"),
        ("a", ""),
    ]
    lm = adapter.LanguageModel(model, tokenizer, batch_size=2)
    for (context, continuation), (total, greedy) in zip(pairs, lm.loglikelihood(requests(*pairs)), strict=True):
        ids = [tokenizer.get_bos_token_id(), *tokenizer.encode(context + continuation)]
        start = next(i for i in range(len(ids), 0, -1) if i == 1 or _fits(tokenizer, ids[1:i], context))
        plain, plain_greedy = log_prob_plainly(model, ids, start)
        assert total == pytest.approx(plain, abs=1e-4) and greedy == plain_greedy


def _fits(tokenizer: Tokenizer, ids: list[int], context: str) -> bool:
    return len(tokenizer.decode_bytes(ids)) <= len(context.encode())


def test_the_likeliest_token_is_known_for_it(model, tokenizer):
    ids = [tokenizer.get_bos_token_id(), *tokenizer.encode("the cat")]
    lm = adapter.LanguageModel(model, tokenizer)
    best = int(model(torch.tensor([ids]))[0, -1].argmax())
    assert lm.score([([*ids, best], len(ids))])[0][1] and not lm.score([([*ids, (best + 1) % 300], len(ids))])[0][1]


def test_a_space_before_the_continuation_belongs_to_its_token(tokenizer):
    lm = adapter.LanguageModel(tiny_gpt(vocab_size=tokenizer.get_vocab_size()), tokenizer)
    (ids, start), (same, other) = lm.split("on the ", "mat"), lm.split("on the", " mat")
    assert ids == same and start == other and tokenizer.decode(ids[start:]) == " mat"


def test_a_prompt_beyond_the_limit_loses_its_beginning_but_not_bos(model, tokenizer):
    lm, short = adapter.LanguageModel(model, tokenizer), adapter.LanguageModel(model, tokenizer, max_length=8)
    ids = [tokenizer.get_bos_token_id(), *tokenizer.encode("the cat sat on a mat and the dog sat on the cat")]
    assert len(ids) > 10
    kept = [ids[0], *ids[-7:]]
    assert short.score([(ids, len(ids) - 2)])[0][0] == pytest.approx(lm.score([(kept, 6)])[0][0])


def test_a_long_text_is_scored_in_pieces_each_token_once(tokenizer):
    model = tiny_gpt(vocab_size=tokenizer.get_vocab_size(), sequence_len=8).prepare(RT.device, RT.dtype).eval()
    text = "the cat sat on a mat and the dog sat on the cat, yes, no"
    ids = [tokenizer.get_bos_token_id(), *tokenizer.encode(text)]
    plain = sum(log_prob_plainly(model, ids[i : i + 9], 1)[0] for i in range(0, len(ids) - 1, 8))
    lm = adapter.LanguageModel(model, tokenizer)
    assert lm.loglikelihood_rolling(requests((text,), ("",))) == [pytest.approx(plain, abs=1e-4), 0]


def test_generation_ends_before_the_first_stop_string(model, tokenizer):
    lm = adapter.LanguageModel(model, tokenizer)
    whole = lm.generate_until(requests(("the cat", {"max_gen_toks": 12})))[0]
    assert len(whole) > 4
    stop = whole[2:4]
    until = {"until": ["never", stop], "max_gen_toks": 12}
    assert lm.generate_until(requests(("the cat", until))) == [whole[: whole.find(stop)]]
    assert lm.generate_until(requests(("the cat", {**until, "do_sample": False, "temperature": 1.0})))[0] in whole


def test_an_unknown_generation_setting_is_named():
    assert adapter.generation_settings({"until": "\n", "temperature": 0.5, "do_sample": True, "top_k": 3}) == (
        ["\n"],
        {"max_tokens": 256, "temperature": 0.5, "top_k": 3},
    )
    with pytest.raises(InputError, match="generation setting 'top_p' is not known"):
        adapter.generation_settings({"top_p": 0.9})


# the tasks


def choice_task(items: list[dict[str, Any]]) -> CoreTask:
    return CoreTask("quiz", "multiple_choice", 0, "\nAnswer: ", 0.5, lambda: items)


def test_a_row_parts_the_choices_where_our_scorer_does(tokenizer):
    item = {"query": "Question: é", "choices": ["the cat sat", "the cat and", "the cat"], "gold": 1}
    row = adapter.choice_row(choice_task([item]), item, [], tokenizer)
    spans = scored_spans("multiple_choice", tokenizer.encode(render_prompts(choice_task([]), item, [])))
    for rest, span, length in zip(row["choices"], spans, row["lengths"], strict=True):
        assert row["query"] + rest == tokenizer.decode(span.ids)
        assert rest == tokenizer.decode(span.ids[span.start :]) and length == len(span.ids) - span.start
    assert row["gold"] == 1 and row["query"].startswith("Question: é\nAnswer:")


def test_choices_that_part_inside_a_character_keep_it_whole(tokenizer):
    item = {"query": "q", "choices": ["ж", "з"], "gold": 0}  # two bytes each, the first the same
    row = adapter.choice_row(choice_task([item]), item, [], tokenizer)
    assert [r[-1] for r in row["choices"]] == ["ж", "з"]


def test_other_kinds_are_refused(tokenizer, tmp_path):
    task = CoreTask("wino", "schema", 0, " ", 0.5, list)
    with pytest.raises(InputError, match="wino is of type schema"):
        adapter.write_tasks([task], tmp_path, tokenizer, {"wino": []})


def test_the_rules_differ_where_the_lengths_do():
    assert adapter.chosen([-3.0, -4.0]) == 0 and adapter.chosen([-3.0, -4.0], [1, 2]) == 1


# lm-eval itself


@pytest.fixture(scope="module")
def bundle() -> Bundle:
    path = Path(__file__).parent.parent.parent / "shared" / "hub" / "eval_bundle"
    if not path.is_dir():
        pytest.skip("needs the evaluation bundle at ../shared/hub/eval_bundle")
    tasks = {task.label: task for task in read_bundle(path).tasks}
    return Bundle("bundle", tuple(tasks[label] for label in LABELS))


@pytest.fixture(scope="module")
def words(bundle) -> Tokenizer:
    return Tokenizer.train_from_iterator(["\n".join(texts(bundle))], 1000)


def texts(bundle: Bundle) -> list[str]:
    """The right answers to some items of the tasks, which a model can be trained on."""
    items = [(task, item) for task in bundle.tasks for item in task.read()[:40]]
    return [render_prompts(task, item, [])[item["gold"]][-300:] for task, item in items]


def make_model(words: Tokenizer, bundle: Bundle, train_steps: int) -> GPT:
    sizes = {"vocab_size": words.get_vocab_size(), "sequence_len": 512, "n_embd": 64}
    model = tiny_gpt(**sizes, std=0.2 if train_steps == 0 else 0.05).prepare(RT.device, RT.dtype)
    rows = [ids[:64] for ids in words.encode(texts(bundle), prepend=words.get_bos_token_id()) if len(ids) >= 64]
    idx = torch.tensor(rows)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for step in range(train_steps):
        batch = idx[step * 8 % len(idx) :][:8]
        optimizer.zero_grad()
        loss = model(batch[:, :-1], batch[:, 1:])
        loss.backward()
        optimizer.step()
    assert train_steps == 0 or loss.item() < 5.5  # of ln 1000 = 6.9
    return model.eval()


@torch.no_grad()
def choose_plainly(model: GPT, words: Tokenizer, task: CoreTask, item: Any, shots: Any, mean: bool) -> tuple[int, Any]:
    """(the choice, the log-probability of each choice's span): one prompt at a time, all logits."""
    lls, lengths = [], []
    for span in scored_spans(
        "multiple_choice", words.encode(render_prompts(task, item, shots), words.get_bos_token_id())
    ):
        log_probs = model(torch.tensor([span.ids]))[0].log_softmax(-1)
        lls.append(sum(float(log_probs[t - 1, span.ids[t]]) for t in range(span.start, len(span.ids))))
        lengths.append(len(span.ids) - span.start if mean else 1)
    values = [ll / n for ll, n in zip(lls, lengths, strict=True)]
    return values.index(max(values)), lls


@pytest.mark.filterwarnings("ignore")  # lm-eval's and its libraries' own
@pytest.mark.parametrize("train_steps", [0, 40], ids=["random", "trained"])
def test_lm_eval_chooses_what_we_choose_on_every_example(bundle, words, tmp_path, train_steps):
    pytest.importorskip("lm_eval", reason="lm-eval is not installed; uv sync --group lm-eval")
    model = make_model(words, bundle, train_steps)
    # without shots, and of boolq the short passages: the prompts of 10 shots would take minutes here
    tasks = [CoreTask(t.label, t.kind, 0, t.delimiter, t.baseline, short(t)) for t in bundle.tasks]
    examples = {task.label: adapter.draw_examples(task, EXAMPLES) for task in tasks}
    names = adapter.write_tasks(tasks, tmp_path, words, examples)
    asked = adapter.ask_lm_eval(adapter.as_lm(model, words), names, tmp_path)
    core = evaluate_core(model, words, RT, Bundle("b", tuple(tasks)), EXAMPLES)
    differ = 0
    for task, name, score in zip(tasks, names, core.tasks, strict=True):
        right = 0
        assert len(asked[name]) == score.num_examples == EXAMPLES
        for sample, (item, shots) in zip(asked[name], examples[task.label], strict=True):
            by_sum, lls = choose_plainly(model, words, task, item, shots, mean=False)
            by_mean, _ = choose_plainly(model, words, task, item, shots, mean=True)
            assert sample["lls"] == pytest.approx(lls, abs=1e-3)
            assert sample["acc"] == (by_sum == item["gold"])  # lm-eval's own rule on its own
            assert adapter.chosen(sample["lls"], sample["doc"]["lengths"]) == by_mean
            right += by_mean == item["gold"]
            differ += by_mean != by_sum
        assert score.num_correct == right
    assert differ > 0  # else the two rules could stand for each other


def short(task: CoreTask) -> Any:
    return lambda: [item for item in task.read() if len(item["query"]) < 500]


def write_bundle(folder: Path, tasks: list[CoreTask]) -> Path:
    (folder / "eval_data").mkdir(parents=True)
    entries, rows = [], ["Eval Task,Random baseline"]
    for task in tasks:
        items = short(task)()[:40]
        (folder / "eval_data" / f"{task.label}.jsonl").write_text("\n".join(map(json.dumps, items)) + "\n")
        entries.append(
            f"- {{label: {task.label}, dataset_uri: {task.label}.jsonl, num_fewshot: [2], "
            f"icl_task_type: multiple_choice, continuation_delimiter: {json.dumps(task.delimiter)}}}"
        )
        rows.append(f"{task.label},25")
    (folder / "core.yaml").write_text("icl_tasks:\n" + "\n".join(entries) + "\n")
    (folder / "eval_meta_data.csv").write_text("\n".join(rows) + "\n")
    return folder


@pytest.mark.filterwarnings("ignore")
def test_the_stage_prints_both_opinions(bundle, words, tmp_path, capsys):
    pytest.importorskip("lm_eval", reason="lm-eval is not installed; uv sync --group lm-eval")
    words.save(tmp_path / "tokenizer")
    model = make_model(words, bundle, 40)
    meta = {"model_config": model.config.to_dict(), "user_config": {}, "tokenizer": words.fingerprint}
    save_checkpoint(checkpoint.tag_directory("base", "d2"), 7, model, None, meta)
    folder = write_bundle(tmp_path / "small", list(bundle.tasks[:2]))
    argv = f"-i base --tasks=arc_easy|piqa --bundle={folder} --max_per_task=12 --device_type=cpu".split()
    second_opinion.main(argv)
    out = capsys.readouterr().out
    assert out.count("(the same), lm-eval's acc") == 2 and "arc_easy (2-shot), of 12: ours" in out
    with pytest.raises(SystemExit):
        second_opinion.main(["-i", "base", f"--bundle={folder}", "--tasks=boolq"])
    assert "no multiple-choice task 'boolq'; there are arc_easy, piqa" in capsys.readouterr().err


def test_without_lm_eval_the_way_to_it_is_one_line(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(SystemExit) as ended:
        second_opinion.main(["-i", "base"])
    error = capsys.readouterr().err
    assert ended.value.code == 2 and "uv sync --group lm-eval" in error and error.count("\n") == 1
