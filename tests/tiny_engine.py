"""A tokenizer of a few merges, a random model, and one that follows a script: for engine, CLI and server tests."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch

from nanochat.engine import Engine
from nanochat.gpt import GPT, GPTConfig
from nanochat.kv_cache import KVCache
from nanochat.tokenizer import Tokenizer
from nanochat.tools import calculate

TEXT = ["hello world, how are you? 12+3=15, 7*8=56, the cat sat on the mat", "déjà vu 日本語 🙂"]


def tiny_tokenizer() -> Tokenizer:
    return Tokenizer.train_from_iterator(TEXT * 3, 300)


def tiny_gpt(vocab_size: int, sequence_len: int = 64, seed: int = 0, arch: str = "plain", **sizes: Any) -> GPT:
    """Random in every weight (the usual initialisation has a zero head: all logits equal)."""
    torch.manual_seed(seed)
    sizes = {"n_layer": 2, "n_head": 4, "n_kv_head": 2, "n_embd": 32, **sizes}
    model = GPT(GPTConfig(sequence_len, vocab_size, arch=arch, **sizes))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, 0.0, 0.3)
    torch.nn.init.normal_(model.lm_head.weight, 0.0, 0.1)  # far from the cap, where logits would tie
    return model.requires_grad_(False)


TOKENIZER = tiny_tokenizer()


def special(name: str) -> int:
    return TOKENIZER.encode_special(f"<|{name}|>")


class ToolLover(GPT):
    """A random model that writes tool calls, digits and signs, and sometimes stops."""

    def logits(self, x: torch.Tensor) -> torch.Tensor:
        logits = super().logits(x)
        liked = [special("python_start"), special("python_end"), *b"0123456789+-*"]
        logits[..., liked] += 4.0
        logits[..., special("assistant_end")] += 4.0
        return logits


def tool_lover(seed: int, arch: str = "plain", **sizes: Any) -> ToolLover:
    model = tiny_gpt(TOKENIZER.get_vocab_size(), seed=seed, arch=arch, **sizes)
    model.__class__ = ToolLover
    return model  # type: ignore[return-value]


def naive_greedy(model: GPT, prompt: list[int], max_tokens: int) -> tuple[list[int], list[int]]:
    """Generation as one would write it first: no cache, one row, a full forward for each token."""
    ids, mask, forced, call = list(prompt), [0] * len(prompt), [], None
    for _ in range(max_tokens):
        is_forced = bool(forced)
        token = forced.pop(0) if is_forced else int(model(torch.tensor([ids]))[0, -1].argmax())
        if token in (special("assistant_end"), special("bos")):
            break
        if token == special("python_start"):
            call = []
        elif token == special("python_end") and call is not None:
            result = calculate(TOKENIZER.decode(call)) if call else None
            if result is not None:
                forced = [special("output_start"), *TOKENIZER.encode(result), special("output_end")]
            call = None
        elif call is not None:
            call.append(token)
        ids.append(token)
        mask.append(0 if is_forced else 1)
    return ids, mask


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

    def features(self, idx: torch.Tensor, cache: KVCache, at: torch.Tensor | None = None) -> torch.Tensor:
        self.rows_fed.append(idx.size(0))
        cache.previous(idx, cache.lengths[:, None] + torch.arange(idx.size(1)))
        cache.lengths = cache.lengths + idx.size(1)
        return (idx if at is None else idx.gather(1, at))[..., None]

    def logits(self, x: torch.Tensor) -> torch.Tensor:
        return self.table[x[..., 0]]

    def __call__(self, idx: torch.Tensor, cache: KVCache) -> torch.Tensor:
        return self.logits(self.features(idx, cache))


def scripted_engine(tokenizer: Tokenizer, *ids: int, sequence_len: int = 64) -> Engine:
    """After ids[0] come ids[1], ids[2], ...; ids must not repeat."""
    assert len(set(ids)) == len(ids)
    then = dict(pairwise(ids))
    return Engine(ScriptedModel(then, tokenizer.get_vocab_size(), sequence_len), tokenizer)  # type: ignore[arg-type]


def engine_that_says(*ids: int, sequence_len: int = 64) -> Engine:
    """Answers so, whatever it is asked."""
    return scripted_engine(
        TOKENIZER, special("assistant_start"), *ids, special("assistant_end"), sequence_len=sequence_len
    )
