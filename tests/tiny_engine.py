"""A tokenizer of a few merges, a random model, and one that follows a script: for engine, CLI and server tests."""

from __future__ import annotations

from itertools import pairwise

import torch

from nanochat.engine import Engine
from nanochat.gpt import GPT, GPTConfig
from nanochat.kv_cache import KVCache
from nanochat.tokenizer import Tokenizer

TEXT = ["hello world, how are you? 12+3=15, 7*8=56, the cat sat on the mat", "déjà vu 日本語 🙂"]


def tiny_tokenizer() -> Tokenizer:
    return Tokenizer.train_from_iterator(TEXT * 3, 300)


def tiny_gpt(vocab_size: int, sequence_len: int = 64, seed: int = 0, arch: str = "plain") -> GPT:
    """Random in every weight (the usual initialisation has a zero head: all logits equal)."""
    torch.manual_seed(seed)
    config = GPTConfig(sequence_len, vocab_size, n_layer=2, n_head=4, n_kv_head=2, n_embd=32, arch=arch)
    model = GPT(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, 0.0, 0.3)
    torch.nn.init.normal_(model.lm_head.weight, 0.0, 0.1)  # far from the cap, where logits would tie
    return model.requires_grad_(False)


class ScriptedModel:
    """Token `a` is followed by `then[a]` with certainty, or by any token alike where `then` has none."""

    def __init__(self, then: dict[int, int], vocab_size: int, sequence_len: int = 64) -> None:
        self.config = GPTConfig(sequence_len, vocab_size, n_layer=1, n_head=1, n_kv_head=1, n_embd=2)
        self.device, self.compute_dtype = torch.device("cpu"), torch.float32
        self.table = torch.zeros(vocab_size, vocab_size)
        for token, follower in then.items():
            self.table[token, follower] = 1000.0
        self.rows_fed: list[int] = []  # the batch size of every forward

    def new_cache(self, batch_size: int, max_len: int) -> KVCache:
        return KVCache(self.config, batch_size, max_len, self.device, self.compute_dtype)

    def features(self, idx: torch.Tensor, cache: KVCache) -> torch.Tensor:
        self.rows_fed.append(idx.size(0))
        cache.previous(idx, cache.lengths[:, None] + torch.arange(idx.size(1)))
        cache.lengths = cache.lengths + idx.size(1)
        return idx[..., None]

    def logits(self, x: torch.Tensor) -> torch.Tensor:
        return self.table[x[..., 0]]

    def __call__(self, idx: torch.Tensor, cache: KVCache) -> torch.Tensor:
        return self.logits(self.features(idx, cache))


def scripted_engine(tokenizer: Tokenizer, *ids: int, sequence_len: int = 64) -> Engine:
    """After ids[0] come ids[1], ids[2], ...; ids must not repeat."""
    assert len(set(ids)) == len(ids)
    then = dict(pairwise(ids))
    return Engine(ScriptedModel(then, tokenizer.get_vocab_size(), sequence_len), tokenizer)  # type: ignore[arg-type]
