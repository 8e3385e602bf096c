"""Reinforcement learning: rollouts and their figures, steps that must change nothing, rewards that fail, the page."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from nanochat.config import InputError
from nanochat.engine import Engine
from nanochat.optim import build_optimizer
from nanochat.resume import LoopState
from nanochat.rl import EQUAL_GROUPS, FAULTS, IDLE_STEPS, LOST_GROUPS, RLSettings, RLTrainer, step_seed
from nanochat.rollout_page import answer_text, literal
from nanochat.rollouts import Sampling, figures, roll_out
from nanochat.runtime import Runtime
from nanochat.saver import Saver
from nanochat.tracking import Tracker
from tests.tiny_engine import scripted_engine, tiny_gpt, tiny_tokenizer
from tests.tiny_trainer import assert_equal_to_the_bit, weights

RT = Runtime(torch.device("cpu"), torch.float32)
SAMPLING = Sampling(max_new_tokens=6, temperature=1.0, top_k=None)
TOKENIZER = tiny_tokenizer()

Reward = Callable[[Any, str], Any]


class Prompts:
    """Four prompts and a reward."""

    def __init__(self, reward: Reward) -> None:
        self.own = reward

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> dict[str, Any]:
        messages = [{"role": "user", "content": f"count {index}"}, {"role": "assistant", "content": str(index)}]
        return {"messages": messages}

    def reward(self, conversation: Any, response: str) -> float:
        return self.own(conversation, response)

    def parsed(self, response: str) -> bool | None:
        return response == "a"


def by_text(conversation: Any, answer: str) -> float:
    """Another value for nearly every answer."""
    return sum(map(ord, answer)) % 7 / 7


def number(conversation: Any) -> int:
    return int(conversation["messages"][-1]["content"])


def make(tmp_path: Path, reward: Reward = by_text, rt: Runtime = RT, **settings: Any) -> tuple[RLTrainer, LoopState]:
    model = tiny_gpt(TOKENIZER.get_vocab_size()).requires_grad_(True)
    optimizer = build_optimizer(model, unembedding_lr=0.004, embedding_lr=0.2, matrix_lr=0.02)
    state = LoopState()
    defaults: dict[str, Any] = dict(
        num_iterations=4, examples_per_step=4, num_samples=3, batch_size=5, sampling=SAMPLING, eval_examples=4, seed=42
    )
    trainer = RLTrainer(
        rt=rt,
        settings=RLSettings(**{**defaults, **settings}),
        model=model,
        tokenizer=TOKENIZER,
        start=None,
        optimizer=optimizer,
        task_name="Counting",
        train_task=Prompts(reward),
        val_task=Prompts(reward),
        tracker=Tracker("rl", "dummy", rt, {}),
        saver=Saver(rt, tmp_path / "rl" / "d2", model, optimizer, {}, state),
        page=tmp_path / "rollouts.md",
    )
    return trainer, state


def steps(trainer: RLTrainer, state: LoopState, count: int) -> None:
    for _ in range(count):
        trainer.step(state)
        state.step += 1


# Rollouts ----------------------------------------------------------------------------------------


def test_the_token_that_ends_an_answer_is_learnt_and_counts_as_stopping():
    start, end = TOKENIZER.encode_special("<|assistant_start|>"), TOKENIZER.encode_special("<|assistant_end|>")
    (a,) = TOKENIZER.encode("a")
    rollouts = roll_out(scripted_engine(TOKENIZER, start, a, end), Prompts(by_text), [0, 1], 2, SAMPLING, seed=1)
    for row in range(4):
        assert rollouts.answer_ids(row) == [a, end]
        assert rollouts.masks[row][-2:] == [1, 1] and not any(rollouts.masks[row][:-2])
    assert rollouts.answers == ["a"] * 4 and rollouts.stopped == [True] * 4
    means = figures(rollouts, TOKENIZER.encode_special("<|python_start|>"))
    assert (means["answer_length"], means["stopped"], means["tool_call"], means["parsed"]) == (2, 1, 0, 1)
    assert means["reward"] == pytest.approx(ord("a") % 7 / 7)


def test_an_answer_cut_for_want_of_room_did_not_stop_by_itself():
    start = TOKENIZER.encode_special("<|assistant_start|>")
    python, (b,) = TOKENIZER.encode_special("<|python_start|>"), TOKENIZER.encode("b")
    engine = scripted_engine(TOKENIZER, start, python, b)
    rollouts = roll_out(engine, Prompts(by_text), [2], 2, Sampling(2, 1.0, None), seed=1)
    means = figures(rollouts, python)
    assert (means["answer_length"], means["stopped"], means["tool_call"], means["parsed"]) == (2, 0, 1, 0)


def counts(engine: Engine, prompts: list[list[int]], together: bool, seed: int, temperature: float = 1.0):
    """(new tokens by id, lengths of the answers)."""
    groups = [prompts] if together else [[p] * prompts.count(p) for p in map(list, dict.fromkeys(map(tuple, prompts)))]
    unigrams, lengths = torch.zeros(engine.vocab_size), []
    for group in groups:
        sequences, masks, _ = engine.generate_many(group, 12, temperature, None, seed)
        for sequence, mask in zip(sequences, masks, strict=True):
            new = [t for t, m in zip(sequence, mask, strict=True) if m]
            unigrams += torch.bincount(torch.tensor(new, dtype=torch.int64), minlength=engine.vocab_size)
            lengths.append(float(len(new)))
    return unigrams, torch.tensor(lengths)


def chi_square(a: torch.Tensor, b: torch.Tensor) -> tuple[float, float]:
    """(two-sample statistic of these counts, its 99.9% quantile by Wilson and Hilferty). Rare ids count as one."""
    rare = a + b < 20
    a, b = (torch.cat([x[~rare], x[rare].sum()[None]]) for x in (a, b))
    statistic = float(((a * (b.sum() / a.sum()).sqrt() - b * (a.sum() / b.sum()).sqrt()) ** 2 / (a + b)).sum())
    df = len(a) - 1
    return statistic, df * (1 - 2 / (9 * df) + 3.09 * math.sqrt(2 / (9 * df))) ** 3


def test_many_prompts_at_once_have_the_token_statistics_of_one_prompt_at_a_time():
    model = tiny_gpt(TOKENIZER.get_vocab_size())
    with torch.no_grad():
        model.lm_head.weight *= 5  # so that some tokens are likely
    engine = Engine(model, TOKENIZER)
    engine.terminal |= set(range(30))  # so that answers end
    prompts = [[TOKENIZER.get_bos_token_id(), *TOKENIZER.encode(text)] for text in ("cat", "the mat", "how", "7*8=")]
    prompts = [prompt for prompt in prompts for _ in range(100)]
    once, alone = counts(engine, prompts, True, seed=1), counts(engine, prompts, False, seed=2)
    statistic, bound = chi_square(once[0], alone[0])
    assert statistic < bound
    standard_error = (once[1].var() / 400 + alone[1].var() / 400).sqrt()
    assert once[1].var() > 1 and abs(once[1].mean() - alone[1].mean()) < 3.3 * standard_error
    assert 0.8 < once[1].var() / alone[1].var() < 1.25
    statistic, bound = chi_square(counts(engine, prompts, True, seed=3, temperature=1.3)[0], alone[0])
    assert statistic > bound, "the test would not see another distribution"


# Steps -------------------------------------------------------------------------------------------


def test_a_step_in_which_all_groups_agree_changes_nothing_not_even_by_momentum(tmp_path):
    flat: list[bool] = []
    trainer, state = make(tmp_path, lambda c, answer: 1.0 if flat else by_text(c, answer))
    steps(trainer, state, 1)
    before, moments = weights(trainer.model), trainer.optimizer.state_dict()
    flat.append(True)
    skipped = state.outcome[EQUAL_GROUPS]
    steps(trainer, state, 2)
    assert_equal_to_the_bit(weights(trainer.model), before)
    assert_equal_to_the_bit(trainer.optimizer.state_dict(), moments)
    assert state.outcome[IDLE_STEPS] == 2 and state.outcome[EQUAL_GROUPS] == skipped + 8


def test_several_updates_learn_from_one_batch_of_rollouts(tmp_path):
    trainer, state = make(tmp_path, updates=3)
    asked: list[int] = []
    roll = trainer._roll_out
    trainer._roll_out = lambda *args: asked.append(1) or roll(*args)  # type: ignore[method-assign,func-returns-value]
    steps(trainer, state, 2)
    assert trainer.optimizer.step_count == 6 and len(asked) == 2


def test_training_on_a_reward_raises_it(tmp_path):
    def reward(conversation: Any, answer: str) -> float:
        return float("a" in answer)

    trainer, state = make(tmp_path, reward, num_iterations=20, num_samples=8)
    trainer.evaluate(state)
    steps(trainer, state, 20)
    trainer.evaluate(state)
    assert state.outcome["Reward at the end"] > state.outcome["Reward at step 0"] + 0.5


def test_seeds_are_the_same_on_every_machine_and_differ_by_step_and_rank():
    assert step_seed(42, 7, 3) == 42_007_192
    assert len({step_seed(42, step, rank) for step in range(100) for rank in range(8)}) == 800


# Rewards that fail -------------------------------------------------------------------------------


def broken(kind: Any) -> Reward:
    """A reward that fails on example 2."""

    def reward(conversation: Any, answer: str) -> Any:
        if number(conversation) != 2:
            return by_text(conversation, answer)
        if isinstance(kind, Exception):
            raise kind
        return kind

    return reward


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        (math.nan, "the reward is nan"),
        (-math.inf, "the reward is -inf"),
        ("1.0", "the reward is a str, not a number"),
        (None, "the reward is a NoneType, not a number"),
        (ZeroDivisionError("division\nby zero"), "ZeroDivisionError: division by zero"),
    ],
)
def test_a_reward_that_fails_is_named_and_counted_and_its_group_left_out(tmp_path, capsys, kind, said):
    trainer, state = make(tmp_path, broken(kind))
    steps(trainer, state, 1)
    assert f"Counting example 2: {said}" in capsys.readouterr().out
    assert state.outcome[LOST_GROUPS] == 1 and state.outcome[FAULTS] == f"Counting example 2: {said}"
    # as if that group's answers had all been equally good
    same, other = make(tmp_path, broken(0.5))
    steps(same, other, 1)
    assert_equal_to_the_bit(weights(trainer.model), weights(same.model))
    assert state.loss == other.loss and math.isfinite(state.loss)


def one_rank(rt: Runtime, folder: Path) -> None:
    """Of two: the second has examples 2, whose reward fails, and 3, whose answers are all as good."""

    def reward(conversation: Any, answer: str) -> float:
        return broken(math.nan)(conversation, answer) if number(conversation) < 3 else 0.0

    trainer, state = make(folder, reward, rt)
    trainer.evaluate(state)
    steps(trainer, state, 2)
    assert state.history.norms and state.history.norms[0] > 0
    assert state.outcome[LOST_GROUPS] == 2 and "Counting example 2: the reward is nan" in state.outcome[FAULTS]
    save_file(weights(trainer.model), folder / f"rank{rt.rank}.safetensors")


def test_a_rank_without_anything_to_learn_steps_with_the_others_and_its_faults_are_told(tmp_path, two_ranks):
    two_ranks(one_rank, tmp_path)
    assert_equal_to_the_bit(*(load_file(tmp_path / f"rank{rank}.safetensors") for rank in range(2)))


def test_a_reward_that_fails_for_every_prompt_ends_the_run_in_one_line(tmp_path):
    trainer, state = make(tmp_path, lambda c, a: 1 / 0)
    trainer.evaluate(state)  # survives: an evaluation must not end a run
    with pytest.raises(InputError, match=r"step 1: .*every prompt .*Counting example 0: ZeroDivisionError.* 1 more"):
        steps(trainer, state, 1)


def test_held_out_prompts_whose_reward_fails_are_left_out_of_the_scores(tmp_path, capsys):
    def reward(conversation: Any, answer: str) -> float:
        return math.nan if number(conversation) == 2 else float(number(conversation) == 0)

    trainer, state = make(tmp_path, reward)
    trainer.evaluate(state)
    assert state.outcome["Pass@1 at step 0"] == pytest.approx(1 / 3)
    assert "Counting example 2" in capsys.readouterr().out


# Evaluation and page -----------------------------------------------------------------------------


def test_pass_at_k_is_the_unbiased_estimate_at_the_powers_of_two(tmp_path, capsys):
    asked: dict[int, int] = {}

    def reward(conversation: Any, answer: str) -> float:
        """One of the 5 answers to each prompt is right."""
        asked[number(conversation)] = asked.get(number(conversation), 0) + 1
        return float(asked[number(conversation)] == 5)

    trainer, state = make(tmp_path, reward)
    trainer.evaluate(state)
    assert "Pass@1: 0.2000, Pass@2: 0.4000, Pass@4: 0.8000 | reward: 0.2000" in capsys.readouterr().out


def test_the_page_shows_best_and_worst_answers_and_an_evaluation_again_replaces_its_part(tmp_path):
    trainer, state = make(tmp_path, lambda c, a: by_text(c, a) if number(c) else 1.0)
    for state.step in (0, 2, 4):
        trainer.evaluate(state)
    state.step = 2
    trainer.evaluate(state)
    text = trainer.page.read_text()
    assert [line for line in text.splitlines() if line.startswith("## ")] == ["## Step 0", "## Step 2"]
    assert text.startswith("# ") and text.count("### Example 0") == 2
    part = text[text.index("### Example 1") : text.index("### Example 2")]
    assert "    count 1\n" in part and "Best (reward" in part and "Worst (reward" in part and "advantage -" in part
    alike = text[text.index("### Example 0") : text.index("### Example 1")]
    assert "One of 5 equally good (reward 1, advantage +0" in alike and "Worst" not in alike


def test_a_text_on_the_page_can_be_neither_markup_nor_a_heading():
    assert literal("## Step 9\n```\n\x1b[0m\u2028é") == "    ## Step 9\n    ```\n    \\x1b[0m\\u2028é"


def test_a_tool_call_reads_in_brackets_on_the_page(tmp_path):
    names = ("<|python_start|>", "<|python_end|>", "<|output_start|>", "<|output_end|>")
    python, close, out, out_close = map(TOKENIZER.encode_special, names)
    called = [python, *TOKENIZER.encode("1+2"), close, out, *TOKENIZER.encode("3"), out_close]
    assert answer_text(TOKENIZER, called) == "[1+2]=[3]"
