"""Batches of rendered conversations: padded ones for SFT, packed rows for midtraining. Both resume from a cursor."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nanochat.data.loader import PackingLoader
from nanochat.runtime import Runtime
from nanochat.tokenizer import Tokenizer


class PaddedConversations:
    """(inputs, targets), both (B, T) int64, with targets only where the assistant speaks (-1 elsewhere).

    Conversations come in order and begin anew after the last, until `total` were taken (None = without end). Each
    optimizer step's `accum` global batches of B conversations a rank are the next run of them, so that steps do not
    depend on the number of ranks; the last is filled up with rows without targets. Within a step they come by length:
    rows are cut after sequence_len + 1 tokens and padded on the right to the longest of their batch, and lengths differ
    by ten times and more. To sort them, each rank renders the whole step.
    """

    def __init__(
        self,
        conversations: Sequence[Any] | Any,
        tokenizer: Tokenizer,
        batch_size: int,
        sequence_len: int,
        rt: Runtime,
        cursor: int | None = None,
        accum: int = 1,
        total: int | None = None,
    ) -> None:
        self.conversations, self.tokenizer, self.total = conversations, tokenizer, total
        self.batch_size, self.sequence_len, self.rt, self.accum = batch_size, sequence_len, rt, accum
        self.position = cursor or 0  # conversations taken so far by all ranks
        self.pad = tokenizer.encode_special("<|assistant_end|>")

    @property
    def cursor(self) -> int:
        return self.position

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        batch = self.batch_size * self.rt.world_size  # of all ranks
        while self.total is None or self.position < self.total:
            end = self.position + batch * self.accum
            numbers = range(self.position, end if self.total is None else min(end, self.total))
            conversations = [self.conversations[i % len(self.conversations)] for i in numbers]
            rendered = [self.tokenizer.render_conversation(c, self.sequence_len + 1) for c in conversations]
            rendered += [([self.pad], [0])] * (batch * self.accum - len(rendered))
            rendered.sort(key=lambda row: len(row[0]))
            for first in range(self.rt.rank * self.batch_size, len(rendered), batch):
                self.position += batch
                yield self._collate(rendered[first : first + self.batch_size])

    def _collate(self, rendered: list[tuple[list[int], list[int]]]) -> tuple[Tensor, Tensor]:
        width = max(2, *(len(ids) for ids, _ in rendered))
        idx = torch.full((len(rendered), width), self.pad)
        mask = torch.zeros(len(rendered), width, dtype=torch.int64)
        for row, (ids, supervised) in enumerate(rendered):
            idx[row, : len(ids)] = torch.tensor(ids)
            mask[row, : len(ids)] = torch.tensor(supervised)
        targets = idx[:, 1:].masked_fill(mask[:, 1:] == 0, -1)
        return idx[:, :-1].to(self.rt.device), targets.to(self.rt.device)


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
