"""Chat evaluation: counting solved problems, and the stage that reports them."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from nanochat import checkpoint
from nanochat.config import InputError, parse_config
from nanochat.evals import chat
from nanochat.evals.chat import ChatResult, chat_core, evaluate_task
from nanochat.gpt import GPT, GPTConfig
from nanochat.runtime import RankError, Runtime
from nanochat.tokenizer import Tokenizer
from scripts import chat_eval
from tasks.common import Task, evaluate_letter, mc_conversation
from tasks.registry import BASELINES, EVAL_TASKS, REAL, TINYWORLD, eval_task, rl_tasks
from tests.conftest import save_checkpoint

RT = Runtime(torch.device("cpu"), torch.float32)


@pytest.fixture(autouse=True)
def one_thread():
    """A model this small is slower on several threads, by far when the cores are busy."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train_from_iterator(["the cat sat on the mat and the dog sat on the cat " * 20], 300)


@pytest.fixture(scope="module")
def model(tokenizer) -> GPT:
    return tiny_model(tokenizer)


def tiny_model(tokenizer: Tokenizer, sequence_len: int = 256) -> GPT:
    torch.manual_seed(0)
    config = GPTConfig(sequence_len, tokenizer.get_vocab_size(), n_layer=2, n_head=2, n_kv_head=2, n_embd=32)
    model = GPT(config)
    model.init_weights()
    with torch.no_grad():  # these start at 0: all letters would be equal, and no token would look at another
        model.lm_head.weight.normal_(0.0, 0.3)
        for block in model.blocks:
            block.attn.c_proj.weight.normal_(0.0, 1.0)
    return model.prepare(RT.device, RT.dtype).eval()


class Letters(Task):
    """Multiple choice of differing lengths; the right letter of problem i is letter i mod 3, but C only twice."""

    eval_type = "categorical"

    def __init__(self, size: int = 11, letters: str = "ABCD", **slicing: int) -> None:
        super().__init__(**slicing)
        self.size, self.letters = size, letters
        self.responses: list[str] = []

    def num_examples(self) -> int:
        return self.size

    def get_example(self, index: int) -> dict[str, Any]:
        answer = self.letters[index % 3 if index < 8 else 0]
        return mc_conversation(f"{index} the cat " * (1 + 5 * index % 7), self.letters, ["w", "x", "y", "z"], answer)

    def evaluate(self, conversation: dict[str, Any], response: str) -> bool:
        self.responses.append(response)
        return evaluate_letter(conversation, response)


class Echo(Task):
    """Right: the response contains the problem's number; leniently: any digit."""

    def __init__(self, size: int, **slicing: int) -> None:
        super().__init__(**slicing)
        self.size = size
        self.seen: list[str] = []

    def num_examples(self) -> int:
        return self.size

    def get_example(self, index: int) -> dict[str, Any]:
        messages = [{"role": "user", "content": f"say {index}"}, {"role": "assistant", "content": str(index)}]
        return {"messages": messages}

    def evaluate(self, conversation: dict[str, Any], response: str) -> bool:
        self.seen.append(response)
        return conversation["messages"][1]["content"] in response

    def evaluate_lenient(self, conversation: dict[str, Any], response: str) -> bool:
        return any(c.isdigit() for c in response)


def script_engine(monkeypatch, answers: list[str]) -> list[dict[str, Any]]:
    """An engine that gives these answers in turn; returns the calls that it got."""
    calls: list[dict[str, Any]] = []
    left = iter(answers)

    class Scripted:
        def __init__(self, model, tokenizer) -> None:
            self.tokenizer = tokenizer

        def generate_many(self, prompts, **sampling):
            calls.append({"prompts": len(prompts), **sampling})
            sequences = [[*p, *self.tokenizer.encode(next(left))] for p in prompts]
            return sequences, [[0] * len(s) for s in sequences], [True] * len(prompts)

    monkeypatch.setattr(chat, "Engine", Scripted)
    return calls


# categorical


@torch.no_grad()
def choose_plainly(task: Task, model: GPT, tokenizer: Tokenizer) -> list[str]:
    """One problem at a time, all logits, no padding."""
    chosen = []
    for conversation in task:
        ids = tokenizer.render_for_completion(conversation)
        logits = model(torch.tensor([ids]))[0, -1]
        scores = [float(logits[tokenizer.encode(letter)[0]]) for letter in conversation["letters"]]
        chosen.append(conversation["letters"][scores.index(max(scores))])
    return chosen


@pytest.mark.parametrize("batch_size", [1, 3, 16])
def test_padded_batches_choose_what_one_problem_at_a_time_chooses(model, tokenizer, batch_size):
    task = Letters()
    chosen = choose_plainly(task, model, tokenizer)
    assert len(set(chosen)) > 1
    result = evaluate_task(task, model, tokenizer, RT, batch_size=batch_size)
    assert task.responses == chosen
    right = sum(c == task[i]["messages"][1]["content"] for i, c in enumerate(chosen))
    assert (result.num_passed, result.total, result.num_cropped) == (right, 11, 0)


def test_ranks_share_the_batches_and_together_count_what_one_counts(model, tokenizer):
    class Recording(Letters):
        def get_example(self, index):
            taken.append(index)
            return super().get_example(index)

    taken: list[int] = []
    shares, passed = [], 0
    for rank in (0, 1):
        taken.clear()
        rt = Runtime(RT.device, RT.dtype, rank=rank, world_size=2)  # no process group: counts stay apart
        passed += evaluate_task(Recording(), model, tokenizer, rt, batch_size=2).num_passed
        shares.append(list(taken))
    assert shares == [[0, 1, 4, 5, 8, 9], [2, 3, 6, 7, 10]]
    assert passed == evaluate_task(Letters(), model, tokenizer, RT).num_passed


def test_max_problems_takes_the_first_ones_and_the_control_is_the_commonest_letter(model, tokenizer):
    # right letters: A B C A B C A B | A A A
    assert evaluate_task(Letters(), model, tokenizer, RT).majority == pytest.approx(6 / 11)
    result = evaluate_task(Letters(), model, tokenizer, RT, max_problems=4)
    assert result.total == 4 and result.majority == pytest.approx(2 / 4)
    assert evaluate_task(Letters(), model, tokenizer, RT, max_problems=99).total == 11


def test_an_empty_task_is_refused(model, tokenizer):
    with pytest.raises(InputError, match="no problem"):
        evaluate_task(Letters(0), model, tokenizer, RT)


def test_a_letter_of_two_tokens_is_refused(model, tokenizer):
    class Wide(Letters):
        def get_example(self, index):
            return mc_conversation("q", ["A", "Ω"], ["x", "y"], "A")

    with pytest.raises(InputError, match="one"):
        evaluate_task(Wide(), model, tokenizer, RT)


@pytest.mark.parametrize(("extra", "cropped"), [(0, 0), (1, 1), (40, 1)])
def test_a_prompt_beyond_the_context_loses_its_beginning_but_not_bos(model, tokenizer, monkeypatch, extra, cropped):
    seen = []
    monkeypatch.setattr(model, "features", lambda idx: seen.append(idx[0].tolist()) or torch.zeros(*idx.shape, 32))
    whole = tokenizer.render_for_completion(Letters(1)[0])
    monkeypatch.setattr(model, "config", GPTConfig(len(whole) - extra, 300, 2, 2, 2, 32))
    result = evaluate_task(Letters(1), model, tokenizer, RT)
    assert result.num_cropped == cropped
    assert seen[0] == ([whole[0], *whole[extra + 1 :]] if extra else whole)


# generative


def test_a_problem_is_solved_when_any_of_its_samples_is_right(model, tokenizer, monkeypatch):
    calls = script_engine(monkeypatch, ["no", "it is 0", "7", "no", "no", "no"])
    result = evaluate_task(
        Echo(3), model, tokenizer, RT, batch_size=2, num_samples=2, temperature=0.5, max_new_tokens=9
    )
    assert (result.num_passed, result.total, result.num_lenient, result.majority) == (1, 3, 2, None)
    assert calls == [
        {"prompts": 4, "max_tokens": 9, "temperature": 0.5, "top_k": 50},
        {"prompts": 2, "max_tokens": 9, "temperature": 0.5, "top_k": 50},
    ]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_generated_answers_do_not_depend_on_the_batch(model, tokenizer, temperature):
    seen = []
    for batch_size in (1, 4):
        task = Echo(5)
        evaluate_task(task, model, tokenizer, RT, batch_size=batch_size, max_new_tokens=6, temperature=temperature)
        seen.append(task.seen)
    assert seen[0] == seen[1] and len(seen[0]) == 5


def test_a_task_that_crashes_while_scoring_stops_the_evaluation(model, tokenizer, monkeypatch):
    script_engine(monkeypatch, ["x"])
    monkeypatch.setattr(Echo, "evaluate", lambda self, c, r: 1 / 0)
    with pytest.raises(RankError, match="ZeroDivisionError"):
        evaluate_task(Echo(1), model, tokenizer, RT)


# arithmetic


@pytest.mark.parametrize(
    ("passed", "total", "low", "high"), [(50, 100, 0.4038, 0.5962), (0, 10, 0.0, 0.2775), (10, 10, 0.7225, 1.0)]
)
def test_the_interval_is_wilsons(passed, total, low, high):
    assert ChatResult(passed, total).interval == pytest.approx((low, high), abs=5e-5)


def test_chat_core_of_published_figures():
    accuracies = {"ARC-Challenge": 0.2807, "ARC-Easy": 0.3876, "GSM8K": 0.0455, "HumanEval": 0.0854, "MMLU": 0.3151}
    assert chat_core(accuracies, BASELINES) == pytest.approx(0.0884, abs=5e-5)
    assert chat_core({"MMLU": 0.25, "AQUA": 0.20, "GSM8K": 0.0}, BASELINES) == 0.0


# the stage


def test_flags_have_the_references_order_names_and_letters():
    argv = "-i rl -a GSM8K|MMLU -d float32 -t 0.5 -m 64 -n 4 -k 0 -b 2 -g d4 -s 60 -x 10 --device-type cpu".split()
    cfg = parse_config(chat_eval.ChatEvalConfig, argv)
    assert list(vars(cfg).items()) == [
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
    assert "ChatCORE metric" not in chat_eval.report_items(results)[0]
    scores, _ = chat_eval.report_items({name: ChatResult(1, 2) for name in TINYWORLD})
    assert list(scores) == [*TINYWORLD, "ChatCORE tinyworld"]


def test_every_name_has_a_task_and_unknown_ones_list_what_there_is():
    assert set(REAL) | set(TINYWORLD) | {"AQUA"} == set(EVAL_TASKS)
    assert set(BASELINES) < set(EVAL_TASKS)
    for look_up in (eval_task, rl_tasks):
        with pytest.raises(InputError, match=r"there are .*GSM8K"):
            look_up("GSM9K")


@pytest.fixture
def base(tmp_path, monkeypatch, tokenizer):
    """A base directory with a chat checkpoint, a word list and AQuA's validation split."""
    for name in ("NANOCHAT_HUB_DIR", "NANOCHAT_AQUA_DIR", "AQUA_DATA_DIR"):
        monkeypatch.delenv(name, raising=False)
    base = tmp_path / "base"
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(base))
    monkeypatch.chdir(tmp_path)
    (base / "aqua").mkdir(parents=True)
    row = '{"question": "q", "options": ["A)1", "B)2"], "rationale": "r", "correct": "B"}\n'
    (base / "aqua" / "validation.jsonl").write_text(row * 3)
    (base / "words_alpha.txt").write_text("cat\ndog\n")
    tokenizer.save(base / "tokenizer")
    return base


def save_model(tokenizer: Tokenizer, **user_config: Any) -> None:
    model = tiny_model(tokenizer, sequence_len=512)
    meta = {"model_config": model.config.to_dict(), "user_config": user_config, "tokenizer": tokenizer.fingerprint}
    save_checkpoint(checkpoint.tag_directory("sft", "d2"), 7, model, None, meta)


def test_the_stage_writes_the_references_keys_first_and_prints_each_accuracy(base, tokenizer, capsys):
    save_model(tokenizer)
    chat_eval.main("-i sft -a AQUA|SpellingBee -x 2 -m 4 -d float32 --device-type cpu".split())
    out = capsys.readouterr().out
    assert "Final: 0/2 (0.00%)\nAQUA accuracy: 0.00%\n" in out
    assert "Final: 0/2 (0.00%)\nSpellingBee accuracy: 0.00%\n" in out
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
    assert lines[17] == "- AQUA 95% interval: 0.0000 to 0.6576 (0 of 2)"
    assert "- AQUA always the commonest letter: 1.0000" in lines


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
