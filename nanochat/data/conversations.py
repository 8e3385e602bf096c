"""Batches of rendered conversations: whole ones with masks for SFT, packed rows for midtraining, which cut them.
Both resume from a cursor."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nanochat.data.loader import PackingLoader
from nanochat.runtime import Runtime
from nanochat.tokenizer import Tokenizer

Batch = tuple[Tensor, ...]  # (inputs, targets), both (B, T) int64; targets are -1 where nothing is to be learned
PASS = 256  # a micro-batch takes as long as so many tokens besides its own (about 300 at depth 4 on a CPU core)
Rendered = tuple[list[int], list[int]]  # ids, and for each 1 where the assistant is to learn it


def padded(
    conversations: Any, tokenizer: Tokenizer, batch_size: int, sequence_len: int, rt: Runtime
) -> Iterator[Batch]:
    """Conversations in order, without end, a row each, with targets only where the assistant speaks. Each global batch
    is the next B conversations of every rank. Rows are cut after sequence_len + 1 tokens."""
    for first in itertools.count(rt.rank * batch_size, batch_size * rt.world_size):
        numbers = range(first, first + batch_size)
        rows = [tokenizer.render_conversation(conversations[i % len(conversations)], sequence_len + 1) for i in numbers]
        yield collate(rows, tokenizer, rt)


class ConversationSteps:
    """The micro-batches of optimizer steps, a list a step, with targets only where the assistant speaks.

    A step is the next `examples` conversations, begun anew after the last, until `total` were taken (None = without
    end); so it does not depend on ranks and memory. Each is a row, cut after sequence_len + 1 tokens, and those of like
    length make a micro-batch of at most `batch_size` times sequence_len tokens: lengths differ by ten times and more.
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
        T = self.sequence_len
        while self.total is None or self.cursor < self.total:
            end = self.cursor + self.examples
            places = range(self.cursor, end if self.total is None else min(end, self.total))
            self.cursor = places.stop
            numbers = [place % len(self.conversations) for place in places]
            examples = [(number, self.rows(number)) for number in numbers]
            examples.sort(key=lambda example: _num_tokens(example[1]))
            # a rank without an example takes part with one that has no target
            mine = examples[self.rt.rank :: self.rt.world_size] or [(-1, self.nothing())]
            cuts = best_cuts([_num_tokens(rows) for _, rows in mine], self.batch_size * (T + 1))
            yield [self.batch(mine[a:b]) for a, b in itertools.pairwise(cuts)]

    def rows(self, number: int) -> list[Rendered]:
        """The rows of an example, which stay in one batch."""
        return [self.render(self.conversations[number])]

    def nothing(self) -> list[Rendered]:
        return [([self.tokenizer.get_bos_token_id()], [0])]

    def batch(self, examples: Sequence[tuple[int, list[Rendered]]]) -> Batch:
        """Of numbers and rows."""
        return collate([row for _, rows in examples for row in rows], self.tokenizer, self.rt)

    def render(self, conversation: Any) -> Rendered:
        return self.tokenizer.render_conversation(conversation, self.sequence_len + 1)


def _num_tokens(rows: Sequence[Rendered]) -> int:
    """With the padding to the longest of them."""
    return len(rows) * max(len(ids) for ids, _ in rows)


def best_cuts(lengths: Sequence[int], most: int) -> list[int]:
    """Where to cut rows of rising lengths into batches, each padded to its longest, so that the fewest tokens are
    computed. A batch has at most `most` of them, and costs PASS more by itself.

    Returns:
        The first row of each batch, and the number of rows.
    """
    costs, starts = [0], [0]  # of the first n rows: tokens of the best way, and where its last batch begins
    for n, width in enumerate(lengths, start=1):
        ways = [(costs[a] + (n - a) * width + PASS, a) for a in range(n) if a == n - 1 or (n - a) * width <= most]
        cost, start = min(ways)
        costs.append(cost)
        starts.append(start)
    cuts = [len(lengths)]
    while cuts[-1]:
        cuts.append(starts[cuts[-1]])
    return cuts[::-1]


def collate(rows: Sequence[Rendered], tokenizer: Tokenizer, rt: Runtime) -> Batch:
    """Padded on the right to the longest."""
    width = max(2, *(len(ids) for ids, _ in rows))
    idx = torch.full((len(rows), width), tokenizer.encode_special("<|assistant_end|>"))
    mask = torch.zeros(len(rows), width, dtype=torch.int64)
    for row, (ids, supervised) in enumerate(rows):
        idx[row, : len(ids)] = torch.tensor(ids)
        mask[row, : len(ids)] = torch.tensor(supervised)
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
