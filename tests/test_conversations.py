"""Batches of padded conversations: what is a target, which rows make a step, and where a resumed run goes on."""

from __future__ import annotations

import itertools
from typing import Any

import torch

from nanochat.data.conversations import PaddedConversations
from nanochat.runtime import Runtime

PAD = 99


class Numbers:
    """A tokenizer for conversations that are lists of ids; ids from 50 on are the assistant's."""

    def encode_special(self, name: str) -> int:
        return PAD

    def render_conversation(self, ids: list[int], max_tokens: int) -> tuple[list[int], list[int]]:
        return ids[:max_tokens], [int(i >= 50) for i in ids[:max_tokens]]


def loader(conversations: Any, rank: int = 0, world_size: int = 1, **settings: Any) -> PaddedConversations:
    rt = Runtime(torch.device("cpu"), torch.float32, rank=rank, world_size=world_size)
    defaults = {"batch_size": 2, "sequence_len": 8}
    return PaddedConversations(conversations, Numbers(), rt=rt, **{**defaults, **settings})  # type: ignore[arg-type]


def chat(first: int, length: int) -> list[int]:
    return [first, *range(50, 49 + length)]


LENGTHS = [7, 2, 5, 3, 4, 6, 8, 2]
CHATS = [chat(i, n) for i, n in enumerate(LENGTHS)]


def firsts(batches: Any) -> list[list[int]]:
    return [inputs[:, 0].tolist() for inputs, _ in batches]


def test_only_what_the_assistant_says_is_a_target_and_padding_is_none():
    inputs, targets = next(iter(loader([[1, 2, 50, 51], [3, 60]])))
    assert inputs.tolist() == [[3, 60, PAD], [1, 2, 50]]
    assert targets.tolist() == [[60, -1, -1], [-1, 50, 51]]


def test_a_row_is_cut_after_the_context():
    inputs, targets = next(iter(loader([chat(1, 30), chat(2, 30)], sequence_len=5)))
    assert inputs.shape == targets.shape == (2, 5)
    assert targets[0].tolist() == [50, 51, 52, 53, 54]


def test_a_step_takes_the_next_conversations_and_batches_them_by_length():
    taken = list(itertools.islice(loader(CHATS, accum=2), 4))
    assert firsts(taken) == [[1, 3], [2, 0], [7, 4], [5, 6]]  # of 0-3, then of 4-7
    assert [inputs.size(1) for inputs, _ in taken] == [2, 6, 3, 7]


def test_two_ranks_share_the_step_of_one():
    one = firsts(itertools.islice(loader(CHATS, batch_size=4), 2))
    parts = [firsts(itertools.islice(loader(CHATS, rank=r, world_size=2), 2)) for r in range(2)]
    assert [a + b for a, b in zip(*parts, strict=True)] == one


def test_the_cursor_goes_on_with_the_next_step_and_the_end_is_followed_by_the_beginning():
    whole = firsts(itertools.islice(loader(CHATS, accum=2), 8))
    first = loader(CHATS, accum=2)
    list(itertools.islice(first, 2))
    assert first.cursor == 4
    assert firsts(itertools.islice(loader(CHATS, accum=2, cursor=first.cursor), 6)) == whole[2:]
    assert whole[4:] == whole[:4]
