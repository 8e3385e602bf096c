"""Batches of whole conversations: what is a target, which of them make a step, and where a resumed run goes on."""

from __future__ import annotations

import itertools
import random
from collections import Counter
from typing import Any

import pytest
import torch

from nanochat.data.conversations import PASS, ConversationSteps, best_cuts, padded
from nanochat.runtime import Runtime

BOS = 0
PAD = 49


class Numbers:
    """A tokenizer for conversations that are lists of ids; ids from 50 on are the assistant's."""

    def get_bos_token_id(self) -> int:
        return BOS

    def encode_special(self, name: str) -> int:
        return PAD

    def render_conversation(self, ids: list[int], max_tokens: int) -> tuple[list[int], list[int]]:
        return ids[:max_tokens], [int(i >= 50) for i in ids[:max_tokens]]


def runtime(rank: int = 0, world_size: int = 1) -> Runtime:
    return Runtime(torch.device("cpu"), torch.float32, rank=rank, world_size=world_size)


def steps(conversations: Any, rank: int = 0, world_size: int = 1, **settings: Any) -> ConversationSteps:
    defaults = {"examples": 4, "batch_size": 2, "sequence_len": 8}
    return ConversationSteps(conversations, Numbers(), rt=runtime(rank, world_size), **{**defaults, **settings})  # type: ignore[arg-type]


def chat(first: int, length: int) -> list[int]:
    """`length` ids: BOS, the user's `first`, then the assistant's, which are first's own."""
    return [BOS, first, *range(100 * first, 100 * first + length - 2)]


LENGTHS = [7, 3, 5, 3, 4, 6, 8, 4]
CHATS = [chat(i + 1, n) for i, n in enumerate(LENGTHS)]


def targets_of(batches: Any) -> Counter[int]:
    return Counter(t for _, targets in batches for t in targets.flatten().tolist() if t >= 0)


def all_targets(conversations: Any) -> Counter[int]:
    return Counter(i for c in conversations for i in c if i >= 50)


def test_only_what_the_assistant_says_is_a_target_and_neither_padding_nor_bos_is():
    two = [[BOS, 1, 50, 51], [BOS, 60]]
    (inputs, targets), *_ = next(iter(steps(two, examples=2)))
    assert inputs.tolist() == [[BOS, 60, PAD], [BOS, 1, 50]]
    assert targets.tolist() == [[60, -1, -1], [-1, 50, 51]]
    inputs, targets = next(padded(two, Numbers(), 2, 8, runtime()))  # type: ignore[arg-type]
    assert inputs.tolist() == [[BOS, 1, 50], [BOS, 60, PAD]]
    assert targets.tolist() == [[-1, 50, 51], [60, -1, -1]]


def test_a_conversation_is_cut_after_the_context():
    for inputs, targets in (
        next(iter(steps([chat(1, 30), chat(2, 30)], examples=2, sequence_len=5)))[0],
        next(padded([chat(1, 30), chat(2, 30)], Numbers(), 2, 5, runtime())),  # type: ignore[arg-type]
    ):
        assert inputs.shape == targets.shape == (2, 5)
        assert sorted(targets.tolist()) == [[-1, 100, 101, 102, 103], [-1, 200, 201, 202, 203]]


def test_a_step_takes_the_next_conversations_in_batches_of_like_length_within_memory():
    first, second = itertools.islice(steps(CHATS, batch_size=1), 2)
    assert targets_of(first) == all_targets(CHATS[:4])
    assert targets_of(second) == all_targets(CHATS[4:])
    assert [inputs.shape for inputs, _ in first] == [(2, 2), (1, 4), (1, 6)]  # at most 9 tokens, the last included


def every_way(lengths: list[int], most: int) -> int:
    """Tokens of the best of all ways to cut."""
    if not lengths:
        return 0
    ways = [(n * lengths[n - 1], every_way(lengths[n:], most)) for n in range(1, len(lengths) + 1)]
    return min(tokens + rest + PASS for i, (tokens, rest) in enumerate(ways) if i == 0 or tokens <= most)


@pytest.mark.parametrize("most", [1, 500, 1000, 10_000])
def test_the_cuts_are_the_best_of_all(most: int):
    rng = random.Random(most)
    for _ in range(20):
        lengths = sorted(rng.randrange(2, 300) for _ in range(rng.randrange(1, 10)))
        batches = [lengths[a:b] for a, b in itertools.pairwise(best_cuts(lengths, most))]
        assert list(itertools.chain(*batches)) == lengths
        assert sum(len(b) * b[-1] + PASS for b in batches) == every_way(lengths, most)
        assert all(len(b) == 1 or len(b) * b[-1] <= most for b in batches)


@pytest.mark.parametrize("world_size", [2, 3, 5])
def test_ranks_share_the_step_of_one(world_size: int):
    one = [targets_of(step) for step in itertools.islice(steps(CHATS), 2)]
    parts = [[targets_of(s) for s in itertools.islice(steps(CHATS, r, world_size), 2)] for r in range(world_size)]
    assert [sum(step, Counter()) for step in zip(*parts, strict=True)] == one


def test_a_rank_without_a_row_has_a_batch_without_targets():
    (inputs, targets), *more = next(iter(steps([chat(1, 3)], rank=1, world_size=2, total=1)))
    assert inputs.shape == targets.shape == (1, 1) and targets.tolist() == [[-1]] and not more


@pytest.mark.parametrize(("epochs", "num_steps"), [(1, 3), (2, 6), (3, 8)])
def test_in_each_epoch_each_conversation_is_there_once_where_they_do_not_divide_too(epochs: int, num_steps: int):
    taken = list(steps(CHATS, examples=3, total=epochs * len(CHATS)))
    assert len(taken) == num_steps
    assert targets_of(itertools.chain(*taken)) == Counter({t: epochs for t in all_targets(CHATS)})


def test_the_cursor_goes_on_with_the_next_step_and_the_end_is_followed_by_the_beginning():
    whole = [targets_of(step) for step in itertools.islice(steps(CHATS), 4)]
    first = steps(CHATS)
    next(iter(first))
    assert first.cursor == 4
    assert [targets_of(s) for s in itertools.islice(steps(CHATS, cursor=first.cursor), 3)] == whole[1:]
    assert whole[2:] == whole[:2]


def test_padded_batches_are_the_ranks_shares_of_the_conversations_in_order():
    parts = [itertools.islice(padded(CHATS, Numbers(), 1, 8, runtime(r, 2)), 5) for r in range(2)]  # type: ignore[arg-type]
    firsts = [[int(inputs[0, 1]) for inputs, _ in part] for part in parts]
    assert firsts == [[1, 3, 5, 7, 1], [2, 4, 6, 8, 2]]
