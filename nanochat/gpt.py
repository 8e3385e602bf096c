"""The model: a decoder-only transformer (Vaswani et al. 2017, arXiv 1706.03762) with rotary positions
(Su et al. 2021, arXiv 2104.09864), RMS norm without parameters, QK norm, squared ReLU (So et al. 2021,
arXiv 2109.08668), untied embeddings, no biases and a soft cap on the logits. That is `plain`; `modern` adds EXTRAS.

# B rows, T positions, C = n_embd, H = n_head, H_kv = n_kv_head, D = head_dim, V = vocab_size
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from nanochat.attention import cached_attention, causal_attention
from nanochat.config import InputError
from nanochat.kv_cache import KVCache, Slots, offset_keys
from nanochat.linear import Linear
from nanochat.loss import SoftCap, capped, linear_cross_entropy
from nanochat.scaling import ARCHS, EXTRAS, GATE_CHANNELS, Shape, bigram_rows, windows

LOGIT_CAP = SoftCap(cap=15.0, scale=15.0)
ROPE_BASE = 10_000.0
ROPE_SPAN = 10  # rotary tables reach this many times sequence_len
BIGRAM_SIGNS = 1024

Rope = tuple[Tensor, Tensor]  # cos and sin, (1 or B, T, 1, D/2)


@dataclass(frozen=True)
class GPTConfig:
    sequence_len: int = 1024
    vocab_size: int = 50304
    n_layer: int = 12
    n_head: int = 6
    n_kv_head: int = 6
    n_embd: int = 768
    arch: str = "plain"
    extras: tuple[str, ...] | None = None  # None = all of the arch's
    window_pattern: str = "L"  # see scaling.windows
    short_window: int | None = None  # of an S layer; None = by sequence_len, and then it stays when that changes
    bigram_rows: int | None = None  # of the bigram table, per token of the vocabulary; None = by n_layer

    def __post_init__(self) -> None:
        if self.arch not in ARCHS:
            raise InputError(f"arch {self.arch!r} is not known; use one of {', '.join(ARCHS)}")
        if self.n_embd % self.n_head or self.head_dim % 2:
            raise InputError(f"n_embd {self.n_embd} does not give {self.n_head} heads of an even size")
        if self.n_head % self.n_kv_head:
            raise InputError(f"n_head {self.n_head} is no multiple of n_kv_head {self.n_kv_head}")
        extras = (EXTRAS if self.arch == "modern" else ()) if self.extras is None else tuple(self.extras)
        object.__setattr__(self, "extras", extras)
        if self.bigram_rows is None:
            object.__setattr__(self, "bigram_rows", bigram_rows(self.n_layer))
        if self.short_window is None:
            object.__setattr__(self, "short_window", min(windows("SL", 2, self.sequence_len)))
        if unknown := set(extras) - set(EXTRAS):
            raise InputError(f"extras {sorted(unknown)} are not known; use some of {', '.join(EXTRAS)}")

    def has(self, extra: str) -> bool:
        return self.shape.has(extra)

    @property
    def head_dim(self) -> int:
        return self.n_embd // self.n_head

    @property
    def max_positions(self) -> int:
        """Positions that the rotary tables cover; a longer context is an error."""
        return ROPE_SPAN * self.sequence_len

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "extras": list(self.extras or ())}

    @cached_property
    def shape(self) -> Shape:
        """The sizes as scaling.py counts them."""
        sizes = (self.n_layer, self.n_embd, self.n_head, self.n_kv_head, self.vocab_size, self.sequence_len)
        return Shape(*sizes, self.arch, self.window_pattern, self.short_window, self.extras, self.bigram_rows)


def norm(x: Tensor) -> Tensor:
    """RMS norm over the last dim, no parameters (Zhang & Sennrich 2019, arXiv 1910.07467)."""
    return F.rms_norm(x, (x.size(-1),))


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position embedding, halves layout. x: (B, T, H, D); cos, sin: (1 or B, T, 1, D/2)."""
    x1, x2 = x.chunk(2, dim=-1)
    return torch.cat((x1 * cos + x2 * sin, x2 * cos - x1 * sin), dim=-1)


def pick(x: Tensor, at: Tensor | None) -> Tensor:
    """Positions at (B, Q) of x (B or 1, T, ...) -> (B, Q, ...); None = all."""
    if at is None:
        return x
    return x.expand(len(at), *x.shape[1:])[torch.arange(len(at), device=at.device)[:, None], at]


class Attention(nn.Module):
    def __init__(self, config: GPTConfig, layer: int) -> None:
        super().__init__()
        self.layer, self.config = layer, config
        C, D = config.n_embd, config.head_dim
        self.c_q = Linear(C, config.n_head * D)
        self.c_k = Linear(C, config.n_kv_head * D)
        self.c_v = Linear(C, config.n_kv_head * D)
        self.c_proj = Linear(C, C)
        self.offsets_keys = config.has("offset_keys")
        # Earlier positions seen; None = all. Not by sequence_len: a cache may be longer.
        window = windows(config.window_pattern, config.n_layer, config.max_positions, config.short_window)[layer]
        self.window = window if window < config.max_positions else None
        if layer in config.shape.value_layers:
            self.value_gate = Linear(min(GATE_CHANNELS, C), config.n_kv_head)

    def forward(self, x: Tensor, rope: Rope, slots: Slots | None, values: Tensor | None, at: Tensor | None) -> Tensor:
        """x: (B, T, C) normalised; values: (B, T, H_kv*D), what the tokens' ids add to the values; at: (B, Q), the
        positions that ask, None = all. Returns (B, Q, C)."""
        D = self.config.head_dim
        q = self.c_q(pick(x, at)).unflatten(-1, (-1, D))
        k = self.c_k(x).unflatten(-1, (-1, D))
        v = self.c_v(x).unflatten(-1, (-1, D))
        if values is not None:
            gate = 3 * torch.sigmoid(self.value_gate(x[..., : self.value_gate.in_features]))  # (B, T, H_kv)
            v = v + gate[..., None] * values.view(v.shape)
        q, k = norm(rotate(q, pick(rope[0], at), pick(rope[1], at))), norm(rotate(k, *rope))
        if slots is not None:
            k, v = slots.cache.insert(self.layer, k, v, slots.positions, slots.end)
        elif self.offsets_keys:
            k = offset_keys(k)
        # Where nothing came before, the faster way. Not on a CPU: it is no faster there, and oneDNN keeps what it made
        # for each shape (see linear.py).
        if slots is not None and (slots.end > x.size(1) or x.device.type == "cpu"):
            at = pick(slots.positions, at)
        if at is None:
            y = causal_attention(q, k, v, self.window)
        else:
            y = cached_attention(q, k, v, at, self.window)
        return self.c_proj(y.flatten(-2))


class MLP(nn.Module):
    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.c_fc = Linear(config.n_embd, 4 * config.n_embd)
        self.c_proj = Linear(4 * config.n_embd, config.n_embd)

    def forward(self, x: Tensor) -> Tensor:
        return self.c_proj(F.relu(self.c_fc(x)).square())


class Block(nn.Module):
    def __init__(self, config: GPTConfig, layer: int) -> None:
        super().__init__()
        self.attn = Attention(config, layer)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, rope: Rope, slots: Slots | None, values: Tensor | None, at: Tensor | None) -> Tensor:
        dtype = rope[0].dtype  # of the matmuls; the stream x may be wider
        x = pick(x, at) + self.attn(norm(x).to(dtype), rope, slots, values, at)
        return x + self.mlp(norm(x).to(dtype))


class Bigrams(nn.Module):
    """A vector for each pair of a token and the one before it: rows of a table by a hash, times random signs that
    another hash picks, so that pairs which share a row disturb each other like noise, not like a bias.

    Hashed bigram embeddings with signs: records 62 and 83 of the modded-nanogpt speedrun (2026); hashing with signs:
    Weinberger et al. 2009, arXiv 0902.2206.
    """

    signs: Tensor  # (BIGRAM_SIGNS, C), not stored: the same in every model of a width

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        assert config.bigram_rows is not None
        self.weight = nn.Parameter(torch.empty(config.bigram_rows * config.vocab_size, config.n_embd))
        self.fill_buffers()

    def fill_buffers(self) -> None:
        draws = np.random.default_rng(0).integers(0, 2, (BIGRAM_SIGNS, self.weight.size(1)))
        self.register_buffer("signs", torch.from_numpy(2.0 * draws - 1.0).float(), persistent=False)

    def forward(self, idx: Tensor, previous: Tensor) -> Tensor:
        """(B, T) ids and the ids before them, -1 = none -> (B, T, C) fp32. The last row is for the latter."""
        mixed = (36_313 * idx) ^ (27_191 * previous)
        last = self.weight.size(0) - 1
        row = torch.where(previous < 0, last, mixed % last)
        return F.embedding(row, self.weight) * self.signs[(idx ^ previous) % BIGRAM_SIGNS]


class GPT(nn.Module):
    cos: Tensor  # (max_positions, head_dim/2)
    sin: Tensor

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.config = config
        self.transformer = nn.ModuleDict(
            {
                "wte": nn.Embedding(config.vocab_size, config.n_embd),
                "h": nn.ModuleList([Block(config, i) for i in range(config.n_layer)]),
            }
        )
        L, values = config.n_layer, config.n_kv_head * config.head_dim
        if config.has("value_embeds"):
            tables = {str(i): nn.Embedding(config.vocab_size, values) for i in config.shape.value_layers}
            self.transformer["value_embeds"] = nn.ModuleDict(tables)
        if config.has("bigram"):
            self.transformer["bigram"] = Bigrams(config)
            self.bigram_lambdas = nn.Parameter(torch.empty(L))
        self.has_lambdas = config.has("lambdas")
        if self.has_lambdas:
            self.resid_lambdas = nn.Parameter(torch.empty(L))
            self.x0_lambdas = nn.Parameter(torch.empty(L))
        self.lm_head = Linear(config.n_embd, config.vocab_size)
        self.compute_dtype = torch.float32
        self.recompute = False  # activations of blocks in the backward pass instead of keeping them: less memory
        self.fill_buffers()

    def fill_buffers(self) -> None:
        """The rotary tables and signs; again after the model was built without storage."""
        if self.bigrams is not None:
            self.bigrams.fill_buffers()
        cos, sin = rope_tables(self.config.max_positions, self.config.head_dim)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)

    def resize(self, config: GPTConfig) -> None:
        """Take a config that differs in sequence_len only: other rotary tables, the same weights."""
        assert {**config.to_dict(), "sequence_len": 0} == {**self.config.to_dict(), "sequence_len": 0}
        self.config = config
        self.fill_buffers()
        self.prepare(self.device, self.compute_dtype)

    def prepare(self, device: Any, dtype: torch.dtype) -> GPT:
        """Move to the device and set the dtype of the activations; parameters stay fp32."""
        self.to(device)
        self.compute_dtype = dtype
        self.cos, self.sin = self.cos.to(dtype), self.sin.to(dtype)
        return self

    @torch.no_grad()
    def init_weights(self) -> None:
        """Matrices N(0, s), s = min(1, sqrt(fan_out/fan_in)) / sqrt(fan_in); embeddings N(0, 1); the
        output head and what writes into the residual stream start at zero, so the first loss is ln V. Value embeddings
        are as large as the values beside them; bigrams and gates start at zero."""
        for module in self.modules():
            if isinstance(module, Linear):
                fan_out, fan_in = module.weight.shape
                module.weight.normal_(0.0, min(1.0, math.sqrt(fan_out / fan_in)) / math.sqrt(fan_in))
        self.wte.weight.normal_(0.0, 1.0)
        self.lm_head.weight.zero_()
        for block in self.blocks:
            block.attn.c_proj.weight.zero_()
            block.mlp.c_proj.weight.zero_()
            if block.attn.layer in self.value_embeds:
                block.attn.value_gate.weight.zero_()
        for table in self.value_embeds.values():
            table.weight.normal_(0.0, self.config.n_embd**-0.5)
        # the ramps of the reference's later model: early layers count more, the embedding itself less and less
        ramp = torch.linspace(0, 1, self.config.n_layer)
        if self.has_lambdas:
            self.resid_lambdas.copy_(1.15 - 0.10 * ramp)
            self.x0_lambdas.copy_(0.20 - 0.15 * ramp)
        if self.bigrams is not None:
            self.bigrams.weight.zero_()
            self.bigram_lambdas.fill_(0.05)
            self.bigram_lambdas[0] = 0.1

    @property
    def wte(self) -> nn.Embedding:
        return self.transformer["wte"]  # type: ignore[return-value]

    @property
    def bigrams(self) -> Bigrams | None:
        return self.transformer["bigram"] if "bigram" in self.transformer else None  # type: ignore[return-value]

    @property
    def value_embeds(self) -> dict[int, nn.Embedding]:
        """By layer."""
        tables = self.transformer["value_embeds"].items() if "value_embeds" in self.transformer else ()  # type: ignore[operator]
        return {int(layer): table for layer, table in tables}

    @property
    def blocks(self) -> list[Block]:
        return list(self.transformer["h"])  # type: ignore[call-overload]

    @property
    def device(self) -> torch.device:
        return self.wte.weight.device

    def new_cache(self, batch_size: int, max_len: int) -> KVCache:
        return KVCache(self.config, batch_size, max_len, self.device, self.compute_dtype)

    def forward(
        self,
        idx: Tensor,
        targets: Tensor | None = None,
        cache: KVCache | None = None,
        reduction: str = "mean",
    ) -> Tensor:
        """Logits of the next token at each position, or the loss against targets.

        Args:
            idx: (B, T) int64.
            targets: (B, T) int64, -1 = not counted; None = return logits.
            cache: append idx to each row's cached tokens, and advance the cache's lengths by T.
            reduction: "mean" or "sum" over counted targets, or "none". The sum over no target is 0.

        Returns:
            (B, T, V) fp32 logits; or the loss in nats, () or for "none" (B*T,).
        """
        x = self.features(idx, cache)
        if targets is None:
            return self.logits(x)
        x, targets = x.view(-1, x.size(-1)), targets.reshape(-1)
        return linear_cross_entropy(x, self.lm_head.weight, targets, LOGIT_CAP, reduction)

    def features(self, idx: Tensor, cache: KVCache | None = None, at: Tensor | None = None) -> Tensor:
        """(B, T) token ids -> (B, T, C), the normalised residual stream that the head reads.

        at: (B, Q) int64, the positions of idx that are wanted; the last block then makes only keys and values of the
        others. Returns (B, Q, C).
        """
        T = idx.size(1)
        if cache is None:
            self._check_span(T)
            slots, rope = None, (self.cos[:T][None, :, None], self.sin[:T][None, :, None])
            previous = F.pad(idx[:, :-1], (1, 0), value=-1)
        else:
            positions = cache.lengths[:, None] + torch.arange(T, device=idx.device)  # (B, T)
            end = T + (int(cache.lengths.max()) if cache.longest is None else cache.longest)
            self._check_span(end)
            slots = Slots(cache, positions, end)
            rope = (self.cos[positions][:, :, None], self.sin[positions][:, :, None])
            previous = cache.previous(idx, positions)
        dtype = self.compute_dtype
        # With lambdas the stream grows twenty times as large as what a block adds to it, of which bf16 would lose four
        # bits: depth 4 ended at 1.932 bits per byte instead of the 1.903 of fp32.
        stream = torch.promote_types(dtype, torch.float32) if self.has_lambdas else dtype
        x = x0 = norm(self.wte(idx).to(stream))
        bigrams = self.bigrams(idx, previous).to(stream) if self.bigrams is not None else None
        value_embeds = self.value_embeds
        for i, block in enumerate(self.blocks):
            if self.has_lambdas:
                x = self.resid_lambdas[i] * x + self.x0_lambdas[i] * x0
            if bigrams is not None:
                x = x + self.bigram_lambdas[i].to(stream) * bigrams
            values = value_embeds[i](idx).to(dtype) if i in value_embeds else None
            wanted = at if i == self.config.n_layer - 1 else None
            if self.recompute and self.training:
                x = checkpoint(block, x, rope, slots, values, wanted, use_reentrant=False)
            else:
                x = block(x, rope, slots, values, wanted)
        if cache is not None:
            cache.lengths = cache.lengths + T
        return norm(x).to(dtype)

    def logits(self, x: Tensor) -> Tensor:
        """(..., C) -> (..., V) fp32: in bf16 a capped logit near 15 would be off by up to 0.03."""
        return capped(self.lm_head(x), LOGIT_CAP)

    def _check_span(self, positions: int) -> None:
        if positions > self.config.max_positions:
            raise InputError(
                f"a context of {positions} tokens is beyond the {self.config.max_positions} positions of this "
                "model; shorten the prompt"
            )


def rope_tables(positions: int, head_dim: int) -> tuple[Tensor, Tensor]:
    """cos and sin, (positions, head_dim/2) fp32: angle = position * base^(-2j/head_dim)."""
    inv_freq = ROPE_BASE ** (-torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
    angles = torch.outer(torch.arange(positions, dtype=torch.float32), inv_freq)
    return angles.cos(), angles.sin()
