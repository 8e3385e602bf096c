"""Packed text in memory: what the training benchmarks train and validate on.

# B rows, T positions, N rows of text, V vocab_size
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from nanochat.config import InputError
from nanochat.data.loader import PackingLoader
from nanochat.data.sources import Source, open_source
from nanochat.environment import base_dir
from nanochat.tokenizer import FILE_NAME, Tokenizer, check_vocab_size

if TYPE_CHECKING:
    from bench.common import Plan

Batch = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Text:
    """Packed text in memory, so that a run's time is the training's alone and every run sees the same tokens."""

    name: str
    train: np.ndarray  # (N, T+1) ids; -1 = no token
    val: np.ndarray  # (M, T+1) ids, each row the beginning of a document; -1 behind its end
    token_bytes: np.ndarray  # (V,)
    bos: int

    @property
    def vocab_size(self) -> int:
        return len(self.token_bytes)

    @property
    def sequence_len(self) -> int:
        return self.train.shape[1] - 1

    def digest(self, num_rows: int) -> str:
        """Of what a run over the first num_rows sees."""
        parts = (np.ascontiguousarray(a, np.int32) for a in (self.train[:num_rows], self.val, self.token_bytes))
        return hashlib.sha256(b"".join(a.tobytes() for a in parts)).hexdigest()[:16]

    def save(self, path: Path, max_bytes: int | None = None) -> None:
        """One .npz; rows of training text are left out until it fits into max_bytes."""
        count = len(self.train)
        while True:
            kind = np.uint16 if self.vocab_size < 1 << 16 else np.int32  # -1 wraps to 65,535, which is no id
            ids = self.train[:count].astype(kind), self.val.astype(kind)
            facts = np.frombuffer(json.dumps({"name": self.name, "bos": self.bos}).encode(), np.uint8)
            with path.open("wb") as file:
                np.savez_compressed(file, train=ids[0], val=ids[1], token_bytes=self.token_bytes, facts=facts)
            size = path.stat().st_size
            if max_bytes is None or size <= max_bytes or count <= 1:
                return
            count = min(count - 1, int(count * max_bytes / size * 0.99))

    @classmethod
    def load(cls, path: Path) -> Text:
        try:
            with np.load(path, allow_pickle=False) as file:
                found = {key: file[key] for key in ("train", "val", "token_bytes", "facts")}
        except (OSError, ValueError, KeyError) as error:
            raise InputError(f"{path} is no packed text ({error}); write it with bench.gpu_suite --pack") from None
        ids = {key: _signed(found[key]) for key in ("train", "val")}
        facts = json.loads(found["facts"].tobytes())
        return cls(facts["name"], ids["train"], ids["val"], found["token_bytes"], facts["bos"])

    @classmethod
    def pack(
        cls, name: str | Source, vocab_size: int, sequence_len: int, num_rows: int | None, val_documents: int = 512
    ) -> Text:
        """The first rows of a source of text, or all of one pass, tokenised by a vocabulary trained on its train split.

        Raises:
            InputError: no such source, or it has no text.
        """
        sizes = {"sequence_len": sequence_len, "pack_rows": num_rows, "val_documents": val_documents}
        for key, value in sizes.items():
            if value is not None and value < 1:
                raise InputError(f"--{key} {value} must be at least 1; try --{key}=1")
        source = open_source(name) if isinstance(name, str) else name
        tokenizer = tokenizer_for(source, vocab_size)
        rows = train_rows(source, tokenizer, sequence_len, num_rows)
        val = validation_rows(source, tokenizer, sequence_len, val_documents)
        return cls(source.name, rows, val, tokenizer.num_bytes(), tokenizer.get_bos_token_id())

    @classmethod
    def open(
        cls, name: str, vocab_size: int, sequence_len: int, num_rows: int | None, val_documents: int = 512
    ) -> Text:
        """A packed file, or a source of text that is packed now. A file keeps its own sizes."""
        if name.endswith(".npz"):
            return cls.load(Path(name))
        return cls.pack(name, vocab_size, sequence_len, num_rows, val_documents)

    def batches(self, plan: Plan, seed: int, device: torch.device) -> Iterator[list[Batch]]:
        """The micro-batches of each step: the first rows of the text in an order that the seed gives."""
        n, size = plan.num_rows, plan.device_batch_size
        order = np.random.default_rng(seed).permutation(n)
        for at in range(0, n, plan.rows_per_step):
            rows = self.train[order[at : at + plan.rows_per_step]]
            yield [to_batch(rows[i : i + size], self.bos, device) for i in range(0, len(rows), size)]


def _signed(ids: np.ndarray) -> np.ndarray:
    """(…) int32 with -1 where no token stands."""
    return np.where(ids == 0xFFFF, -1, ids.astype(np.int32)) if ids.dtype == np.uint16 else ids


def to_batch(rows: np.ndarray, bos: int, device: torch.device) -> Batch:
    """(B, T+1) ids -> inputs and targets, int64 (B, T) each; where no token stands, the input is BOS."""
    ids = torch.from_numpy(rows.astype(np.int64)).to(device)
    return ids[:, :-1].where(ids[:, :-1] >= 0, bos), ids[:, 1:].contiguous()


def tokenizer_for(source: Source, vocab_size: int) -> Tokenizer:
    """Trained on the train split, kept under the base directory."""
    check_vocab_size(vocab_size)
    folder = base_dir() / "bench" / f"tokenizer-{vocab_size}-{source.fingerprint()[:16]}"
    if not (folder / FILE_NAME).exists():
        print(f"training a tokenizer of {vocab_size:,} ids on {source.name}", flush=True)
        Tokenizer.train_from_iterator(source.texts("train"), vocab_size).save(folder)
    return Tokenizer.from_directory(folder)


def train_rows(source: Source, tokenizer: Tokenizer, sequence_len: int, num_rows: int | None) -> np.ndarray:
    """(N, T+1) rows of the loader's stream from its start; num_rows None = one pass over the text."""
    loader = PackingLoader(
        source, "train", tokenizer, batch_size=32, sequence_len=sequence_len, repeat=num_rows is not None
    )
    parts: list[np.ndarray] = []
    while num_rows is None or 32 * len(parts) < num_rows:
        batch = next(loader, None)
        if batch is None:
            break
        inputs, targets = batch
        assert torch.equal(inputs[:, 1:][targets[:, :-1] >= 0], targets[:, :-1][targets[:, :-1] >= 0])
        parts.append(torch.cat([inputs[:, :1], targets], 1).to(torch.int32).numpy())
    loader.close()
    rows = np.concatenate(parts)[:num_rows]
    return rows[(rows[:, 1:] >= 0).any(1)]  # the last batch of a pass is filled up with empty rows


def validation_rows(source: Source, tokenizer: Tokenizer, sequence_len: int, documents: int) -> np.ndarray:
    """(M, T+1): BOS and the first T tokens of each of the first documents of the val split; -1 behind the end."""
    texts: list[str] = []
    for block in range(source.num_blocks("val")):
        texts += source.read_block("val", block)
        if len(texts) >= documents:
            break
    ids = tokenizer.encode_to_arrays(texts[:documents], prepend=tokenizer.get_bos_token_id())
    rows = np.full((len(ids), sequence_len + 1), -1, np.int32)
    for row, document in zip(rows, ids, strict=True):
        row[: len(document)] = document[: sequence_len + 1]
    return rows
