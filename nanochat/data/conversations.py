"""Batches of rendered conversations: whole ones with masks for SFT, packed rows for midtraining, which cut them.
Both resume from a cursor."""

from __future__ import annotations

import itertools
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nanochat.data.loader import PackingLoader
from nanochat.runtime import Runtime
from nanochat.tokenizer import Tokenizer

Batch = tuple[Tensor, Tensor]  # (inputs, targets), both (B, T) int64; targets are -1 where nothing is to be learned
Rendered = tuple[list[int], list[int]]  # ids, and for each 1 where the assistant is to learn it


def padded(
    conversations: Any, tokenizer: Tokenizer, batch_size: int, sequence_len: int, rt: Runtime
) -> Iterator[Batch]:
    """Conversations in order, without end, a row each, with targets only where the assistant speaks. Each global batch
    is the next B conversations of every rank. Rows are cut after sequence_len + 1 tokens."""
    for first in itertools.count(rt.rank * batch_size, batch_size * rt.world_size):
        numbers = range(first, first + batch_size)
        rows = [
            [tokenizer.render_conversation(conversations[i % len(conversations)], sequence_len + 1)] for i in numbers
        ]
        yield _collate(rows, tokenizer, rt)


class PackedSteps:
    """The micro-batches of optimizer steps, a list a step, with targets only where the assistant speaks.

    A step is the next `examples` conversations, begun anew after the last, until `total` were taken (None = without
    end); so it does not depend on ranks and memory. They are packed whole into rows of sequence_len + 1 tokens, after
    which a longer one is cut; the ranks take rows in turn, at most `batch_size` of them a micro-batch. Padding each to
    the longest of a batch gives half as many targets a second (docs/EXPERIMENTS.md).
    """

    def __init__(
        self,
        conversations: Any,
        tokenizer: Tokenizer,
        examples: int,
        batch_size: int,
        sequence_len: int,
        rt: Runtime,
        cursor: int | None = None,
        total: int | None = None,
    ) -> None:
        self.conversations, self.tokenizer, self.examples = conversations, tokenizer, examples
        self.batch_size, self.sequence_len, self.rt, self.total = batch_size, sequence_len, rt, total
        self.cursor = cursor or 0  # conversations taken so far by all ranks

    def __iter__(self) -> Iterator[list[Batch]]:
        capacity = self.sequence_len + 1
        while self.total is None or self.cursor < self.total:
            end = self.cursor + self.examples
            numbers = range(self.cursor, end if self.total is None else min(end, self.total))
            self.cursor = numbers.stop
            conversations = [self.conversations[i % len(self.conversations)] for i in numbers]
            rows = whole_fit([self.tokenizer.render_conversation(c, capacity) for c in conversations], capacity)
            # a rank without a row takes part with one that has no target
            mine = rows[self.rt.rank :: self.rt.world_size] or [[([self.tokenizer.get_bos_token_id()], [0])]]
            groups = (mine[i : i + self.batch_size] for i in range(0, len(mine), self.batch_size))
            yield [_collate(group, self.tokenizer, self.rt) for group in groups]


def whole_fit(rendered: Sequence[Rendered], capacity: int) -> list[list[Rendered]]:
    """Rows of up to `capacity` tokens that hold each conversation once and whole: the longest that fits, again and
    again, and when none fits a new row."""
    left = sorted(rendered, key=lambda c: len(c[0]))
    rows = []
    while left:
        row, space = [], capacity
        while (at := bisect_right(left, space, key=lambda c: len(c[0]))) > 0:
            row.append(left.pop(at - 1))
            space -= len(row[-1][0])
        rows.append(row)
    return rows


def _collate(rows: Sequence[Sequence[Rendered]], tokenizer: Tokenizer, rt: Runtime) -> Batch:
    """Rows of one or more conversations, filled up with BOS to the longest row."""
    width = max(2, *(sum(len(ids) for ids, _ in row) for row in rows))
    idx = torch.full((len(rows), width), tokenizer.get_bos_token_id())
    mask = torch.zeros(len(rows), width, dtype=torch.int64)
    for i, row in enumerate(rows):
        ids = [token for conversation, _ in row for token in conversation]
        idx[i, : len(ids)] = torch.tensor(ids)
        mask[i, : len(ids)] = torch.tensor([learned for _, supervised in row for learned in supervised])
    targets = idx[:, 1:].masked_fill(mask[:, 1:] == 0, -1)
    return idx[:, :-1].to(rt.device), targets.to(rt.device)


BLOCK = 1024  # conversations that are rendered and packed at a time
WHOLE = 1 << 30  # tokens: cropping is the packer's business


class _Blocks:
    """Conversations as a source of documents: what PackingLoader reads, with rendering in place of encoding."""

    name = "the mixture"

    def __init__(self, conversations: Any, tokenizer: Tokenizer) -> None:
        self.conversations, self.tokenizer = conversations, tokenizer

    def num_blocks(self, split: str) -> int:
        return -(-len(self.conversations) // BLOCK)

    def read_block(self, split: str, index: int) -> list[Any]:
        end = min((index + 1) * BLOCK, len(self.conversations))
        return [self.conversations[i] for i in range(index * BLOCK, end)]

    def get_bos_token_id(self) -> int:
        return self.tokenizer.get_bos_token_id()

    def encode_to_arrays(self, conversations: list[Any], prepend: int, num_threads: int) -> list[np.ndarray]:
        return [np.array(self.tokenizer.render_conversation(c, WHOLE)[0], np.int32) for c in conversations]


class PackedConversations(PackingLoader):
    """Rows of T+1 tokens packed from rendered conversations, every token a target: midtraining reads
    conversations as pretraining reads documents."""

    def __init__(
        self,
        conversations: Any,
        tokenizer: Tokenizer,
        batch_size: int,
        sequence_len: int,
        rt: Runtime,
        cursor: Any = None,
        repeat: bool = True,
    ) -> None:
        blocks: Any = _Blocks(conversations, tokenizer)
        self.num_blocks = blocks.num_blocks("train")
        super().__init__(
            blocks,
            "train",
            blocks,
            batch_size=batch_size,
            sequence_len=sequence_len,
            rank=rt.rank,
            world_size=rt.world_size,
            cursor=cursor,
            device=rt.device,
            repeat=repeat,
        )

    @property
    def progress(self) -> float:
        """Share of one pass that was taken, to the block."""
        return min(1.0, self.cursor["epoch"] + self.cursor["block"] / max(1, self.num_blocks))
