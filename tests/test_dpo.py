"""Preference pairs: what is read, the loss against the plain formula, which way it pulls, and resuming."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from nanochat import checkpoint, dpo
from nanochat.config import InputError, parse_config
from nanochat.dpo import PairSteps, PreferenceLoss, compare
from nanochat.gpt import GPT
from nanochat.runtime import Runtime
from nanochat.tokenizer import Tokenizer
from nanochat.trainer import accumulate
from scripts import chat_sft
from scripts.chat_sft import ChatSFTConfig, settled, tags
from tasks.preferences import SIDES, Preferences, parse_pair
from tests.conftest import save_checkpoint, tiny_gpt
from tests.tiny_stages import cat_tokenizer, save_d2

CPU = Runtime(torch.device("cpu"), torch.float32)
T = 32
USER = {"role": "user", "content": "who sat?"}
SMALL = ["--source=sft", "--eval_metrics_every=-1", "--device_batch_size=2", "--target_examples_per_step=3"]


def said(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def pair(i: int) -> dict[str, Any]:
    return {"prompt": [{"role": "user", "content": f"who sat {i}?"}], "chosen": "the cat", "rejected": f"the mat {i}"}


def write(path: Path, number: int) -> str:
    path.write_text("".join(json.dumps(pair(i)) + "\n" for i in range(number)))
    return str(path)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return cat_tokenizer()


@pytest.fixture
def base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """With an SFT model d2."""
    monkeypatch.chdir(tmp_path)
    save_d2(tmp_path, "sft", {"mixture": "none", "init_lr_frac": 0.5}, sequence_len=T, std=0.1)
    return tmp_path


@pytest.fixture
def pairs(tmp_path: Path) -> Preferences:
    return Preferences(write(tmp_path / "pairs.jsonl", 7))


def models() -> tuple[GPT, GPT]:
    """(trained, start)"""
    return tiny_gpt(1, vocab_size=300, sequence_len=T), tiny_gpt(0, vocab_size=300, sequence_len=T)


def steps(pairs: Any, tokenizer: Tokenizer, examples: int = 7, rt: Runtime = CPU) -> PairSteps:
    return PairSteps(pairs, tokenizer, examples, 2, T, rt, total=len(pairs))


def log_probability(model: GPT, tokenizer: Tokenizer, conversation: Any) -> torch.Tensor:
    """() of what the assistant says, token after token, from the logits."""
    ids, mask = tokenizer.render_conversation(conversation)
    logp = model(torch.tensor([ids])).log_softmax(-1)[0]
    return torch.stack([logp[i - 1, ids[i]] for i in range(1, len(ids)) if mask[i]]).sum()


# What is read ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "line",
    [
        {"prompt": [USER], "chosen": "cat", "rejected": "mat"},
        {"prompt": "who sat?", "chosen": "cat", "rejected": "mat"},
        {"chosen": [USER, said("cat")], "rejected": [USER, said("mat")]},
        {"prompt": "who sat?", "chosen": [USER, said("cat")], "rejected": [USER, said("mat")]},
        {"prompt": [USER], "chosen": [said("cat")], "rejected": [said("mat")]},
    ],
)
def test_the_shapes_of_a_pair_are_one(line: Any):
    assert parse_pair(json.dumps(line), "line 1") == {
        "chosen": {"messages": [USER, said("cat")]},
        "rejected": {"messages": [USER, said("mat")]},
    }


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("{", "line 2: no JSON"),
        ([USER], 'line 2: it must be {"prompt": [messages], "chosen"'),
        ({"prompt": [USER], "chosen": "cat"}, 'line 2: it must be {"prompt": [messages], "chosen"'),
        (
            {"prompt": 5, "chosen": "cat", "rejected": "mat"},
            "line 2: the prompt must be text or a list of messages, got 5",
        ),
        ({"chosen": "cat", "rejected": "mat"}, "line 2, chosen: message 0: role is 'assistant', not 'user'"),
        ({"prompt": [USER], "chosen": "cat", "rejected": 5}, "line 2, rejected: it must be"),
        ({"chosen": [USER, said("a")], "rejected": [USER]}, "line 2, rejected: the last message is the user's"),
        ({"prompt": [USER, USER], "chosen": "a", "rejected": "b"}, "line 2, chosen: message 1: role is 'user'"),
        (
            {"chosen": [USER, said("a")], "rejected": [{**USER, "content": "?"}, said("b")]},
            "line 2: chosen and rejected differ before their last message",
        ),
        ({"prompt": [USER], "chosen": "cat", "rejected": "cat"}, "line 2: chosen and rejected are the same answer"),
        ({"prompt": [USER], "chosen": " ", "rejected": "cat"}, "line 2: the chosen answer is empty"),
    ],
)
def test_what_is_no_pair_is_named_by_its_line(tmp_path: Path, line: Any, reason: str):
    path = tmp_path / "pairs.jsonl"
    path.write_text(json.dumps(pair(0)) + "\n" + (line if isinstance(line, str) else json.dumps(line)) + "\n")
    with pytest.raises(InputError) as error:
        Preferences(path)
    assert reason in str(error.value) and "\n" not in str(error.value)


def test_a_tenth_is_held_out_and_a_file_that_has_none_is_refused(tmp_path: Path):
    train, val = Preferences.split(write(tmp_path / "pairs.jsonl", 25))
    assert (len(train), len(val)) == (23, 2) and val[0]["chosen"]["messages"][0]["content"] == "who sat 23?"
    with pytest.raises(InputError, match="holds 1 preference pair; at least 2 are needed"):
        Preferences.split(write(tmp_path / "one.jsonl", 1))
    (tmp_path / "none.jsonl").write_text("\n")
    with pytest.raises(InputError, match="holds no preference pair; write one"):
        Preferences(tmp_path / "none.jsonl")
    with pytest.raises(InputError, match="no preference pairs file"):
        Preferences(tmp_path / "away.jsonl")


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        (["--dpo=x"], "add --source=sft"),
        (["--dpo=x", "--source=sft", "--conversations=y"], "on its pairs alone"),
        (["--dpo=x", "--source=sft", "--dpo_beta=0"], "--dpo_beta 0.0 must be above 0"),
        (["--dpo=x", "--source=sft", "--dpo_beta=nan"], "--dpo_beta nan must be above 0"),
    ],
)
def test_flags_that_do_not_go_together_are_refused(flags: list[str], reason: str, capsys: Any):
    with pytest.raises(SystemExit):
        chat_sft.main(flags)
    assert reason in capsys.readouterr().err


# The loss ----------------------------------------------------------------------------------------


def test_loss_and_gradients_are_those_of_the_formula_whatever_the_batches(pairs: Preferences, tokenizer: Tokenizer):
    (model, start), beta = models(), 0.3
    loss = PreferenceLoss(model, compare(start, pairs, tokenizer, 2, CPU, beta).start, beta)
    (micro,) = steps(pairs, tokenizer)
    assert len(micro) > 1
    ours = accumulate(loss, micro, count=loss.count)
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    terms = []
    for example in pairs:
        ratio = {}
        for side in SIDES:
            reference = log_probability(start, tokenizer, example[side]).detach()
            ratio[side] = log_probability(model, tokenizer, example[side]) - reference
        terms.append(-torch.log(1 / (1 + torch.exp(-beta * (ratio["chosen"] - ratio["rejected"])))))
    plain = torch.stack(terms).mean()
    plain.backward()
    torch.testing.assert_close(ours, plain.detach(), atol=1e-5, rtol=1e-5)
    expected = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
    figures = loss.figures(pairs, tokenizer, 3, CPU)
    gaps = torch.stack(terms).detach().neg().exp()  # sigmoid of the margin: above a half where it is positive
    assert figures["val_loss"] == pytest.approx(float(plain.detach()), rel=1e-5)
    assert figures["preference_accuracy"] == pytest.approx(float((gaps > 0.5).float().mean()))
    assert figures["margin"] == pytest.approx(float((gaps / (1 - gaps)).log().mean()), rel=1e-4)


def test_at_the_start_all_is_even_and_a_step_down_the_gradient_prefers_the_chosen(
    pairs: Preferences, tokenizer: Tokenizer
):
    model, _ = models()
    loss = compare(model, pairs, tokenizer, 2, CPU, 0.1)
    before = loss.figures(pairs, tokenizer, 2, CPU)
    assert before == {"val_loss": pytest.approx(math.log(2)), "preference_accuracy": 0.5, "margin": 0.0}
    accumulate(loss, next(iter(steps(pairs, tokenizer))), count=loss.count)
    with torch.no_grad():
        for p in model.parameters():
            if p.grad is not None:
                p -= 0.01 * p.grad
    after = loss.figures(pairs, tokenizer, 2, CPU)
    assert after["preference_accuracy"] == 1 and after["margin"] > 0 and after["val_loss"] < before["val_loss"]


def test_both_answers_to_a_pair_are_in_one_batch_on_one_rank_and_each_pair_is_there_once(
    pairs: Preferences, tokenizer: Tokenizer
):
    seen = []
    for rank in range(2):
        rt = Runtime(torch.device("cpu"), torch.float32, rank=rank, world_size=2)
        for inputs, targets, numbers in itertools.chain.from_iterable(steps(pairs, tokenizer, 3, rt)):
            assert inputs.shape == targets.shape and len(inputs) == 2 * len(numbers)
            for row, number in enumerate(numbers.tolist()):
                ids = [tokenizer.render_conversation(pairs[number][side])[0] for side in SIDES] if number >= 0 else []
                for place, expected in enumerate(ids):
                    assert inputs[2 * row + place, : len(expected) - 1].tolist() == expected[:-1]
            seen += [int(n) for n in numbers if n >= 0]
    assert sorted(seen) == list(range(7))


def test_a_rank_without_a_pair_counts_for_nothing(pairs: Preferences, tokenizer: Tokenizer):
    model, _ = models()
    loss = compare(model, pairs, tokenizer, 2, CPU, 0.1)
    rt = Runtime(torch.device("cpu"), torch.float32, rank=1, world_size=2)
    *_, (nothing,) = steps(pairs, tokenizer, 3, rt)  # the last step has one pair for two ranks
    assert nothing[2].tolist() == [-1] and loss.count(nothing) == 0
    assert accumulate(loss, [nothing], count=loss.count) == 0
    assert all(not p.grad.any() for p in model.parameters() if p.grad is not None)


# The stage ---------------------------------------------------------------------------------------


def section(base: Path) -> dict[str, str]:
    lines = (base / "report" / "chat-sft.md").read_text().splitlines()
    return dict(line[2:].split(": ", 1) for line in lines if line.startswith("- "))


def test_the_stage_teaches_the_preference_and_leaves_the_start_model(base: Path, capsys: Any):
    file = write(base / "pairs.jsonl", 30)
    before = checkpoint.find("sft")
    chat_sft.main([*SMALL, f"--dpo={file}", "--num_epochs=2"])
    out = capsys.readouterr().out
    assert "Step 00000 | val_loss: 0.6931, preference_accuracy: 0.5000, margin: 0.0000" in out
    assert "As in the run before: --init_lr_frac=0.5\nLearning rates of its own: --init_lr_frac=0.125\n" in out
    facts = section(base)
    assert facts["Preference accuracy"] == "1.0000" and float(facts["Preference margin"]) > 0
    assert facts[file] == "27 pairs, 3 held out" and facts["Number of iterations"] == "18"
    assert checkpoint.find("sft") == before and checkpoint.find("sft", "d2-dpo").name == "step_000018"


def test_a_run_that_was_stopped_and_resumed_is_the_one_that_was_not(base: Path):
    file = write(base / "pairs.jsonl", 20)
    command = [*SMALL, f"--dpo={file}", "--save_every=2", "--keep_last=-1"]
    chat_sft.main(command)
    whole = checkpoint.load(checkpoint.find("sft", "d2-dpo"), with_optimizer=True)
    accuracy = section(base)["Preference margin"]
    chat_sft.main([*command, "--resume=2"])
    resumed = checkpoint.load(checkpoint.find("sft", "d2-dpo"), with_optimizer=True)
    assert whole.meta["step"] == resumed.meta["step"] == 6 and section(base)["Preference margin"] == accuracy
    assert whole.optimizer is not None and resumed.optimizer is not None
    for one, other in ((whole.model, resumed.model), (whole.optimizer, resumed.optimizer)):
        assert one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


def test_a_resumed_run_with_another_start_model_is_refused(base: Path, capsys: Any):
    command = [*SMALL, f"--dpo={write(base / 'pairs.jsonl', 9)}"]
    chat_sft.main(command)
    at = checkpoint.find("sft", "d2")
    meta = {k: v for k, v in checkpoint.read_manifest(at).items() if k not in ("format", "step", "files")}
    save_checkpoint(at.parent, 8, tiny_gpt(5, vocab_size=300, sequence_len=T), None, meta)
    with pytest.raises(SystemExit):
        chat_sft.main([*command, "--resume=auto"])
    assert "the start model has changed since" in capsys.readouterr().err


def test_a_pair_longer_than_the_context_is_named_and_does_no_harm(base: Path, capsys: Any):
    long = {"prompt": "who sat on the mat? " * 20, "chosen": "cat", "rejected": "mat"}
    file = Path(write(base / "pairs.jsonl", 9))
    file.write_text(json.dumps(long) + "\n" + file.read_text())
    chat_sft.main([*SMALL, f"--dpo={file}"])
    out = capsys.readouterr().out
    assert "warning: 1 of 9 preference pairs of" in out and "(lines 1); 1 of them have nothing left to learn" in out
    assert math.isfinite(float(section(base)["Training loss"]))


def test_what_is_written_is_named_after_what_it_was_made_from(base: Path):
    def names(**settings: Any) -> tuple[str, str]:
        return tags(ChatSFTConfig(source="sft", dpo="x", **settings))

    assert names() == ("d2", "d2-dpo") and names(save_tag="y") == ("d2", "y")
    (base / "chatsft_checkpoints" / "d2").rename(base / "chatsft_checkpoints" / "d2-own")
    assert names() == ("d2-own", "d2-own-dpo")


def test_it_learns_at_a_quarter_of_sfts_rates_unless_told_otherwise_and_takes_nothing_of_its_mixture():
    cfg = ChatSFTConfig(source="sft", dpo="x")
    quarter = dataclasses.replace(cfg, init_lr_frac=cfg.init_lr_frac / 4)
    assert settled(cfg, {"mixture": "tinyworld", "task": "TinyMC:3", "aqua_val_examples": 0}) == quarter
    assert settled(cfg, {"init_lr_frac": 0.4}).init_lr_frac == 0.1
    for rate in (0.3, cfg.init_lr_frac):
        told = parse_config(ChatSFTConfig, ["--source=sft", "--dpo=x", f"--init_lr_frac={rate}"])
        assert settled(told, {"init_lr_frac": 0.4}).init_lr_frac == rate


def test_ranks_share_the_work_of_the_start_models_log_probabilities(tmp_path: Path, two_ranks: Any):
    write(tmp_path / "pairs.jsonl", 5)
    two_ranks(one_rank, tmp_path)


def one_rank(rt: Runtime, folder: Path) -> None:
    tokenizer = cat_tokenizer()
    pairs, (model, _) = Preferences(folder / "pairs.jsonl"), models()
    ours = dpo.all_logprobs(model, pairs, tokenizer, 2, rt)
    with torch.no_grad():
        plain = [[log_probability(model, tokenizer, p[side]) for side in SIDES] for p in pairs]
    torch.testing.assert_close(ours, torch.tensor(plain), atol=1e-4, rtol=1e-5)
