"""The model: a decoder-only transformer (Vaswani et al. 2017, arXiv 1706.03762) with rotary positions
(Su et al. 2021, arXiv 2104.09864), RMS norm without parameters, QK norm, squared ReLU (So et al. 2021,
arXiv 2109.08668), untied embeddings, no biases and a soft cap on the logits. That is `plain`; `modern` differs by
`offset_keys` and by `QK_INIT`.

# B rows, T positions, C = n_embd, H = n_head, H_kv = n_kv_head, D = head_dim, V = vocab_size
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from nanochat.attention import cached_attention, causal_attention
from nanochat.config import InputError
from nanochat.scaling import Shape

ARCHS = ("plain", "modern")
LOGIT_CAP = 15.0
ROPE_BASE = 10_000.0
LOGITS_AT_ONCE = 1 << 28  # 1 GiB of fp32; beyond it the loss is computed in chunks
ROPE_SPAN = 10  # rotary tables reach this many times sequence_len
# Scale of the initial c_q and c_k in `modern`. QK norm takes the scale of queries and keys away, so a smaller start
# only means that the same steps turn them further: a copying task takes 100 steps, not 150 (docs/EXPERIMENTS.md).
QK_INIT = 0.1


@dataclass(frozen=True)
class GPTConfig:
    sequence_len: int = 1024
    vocab_size: int = 50304
    n_layer: int = 12
    n_head: int = 6
    n_kv_head: int = 6
    n_embd: int = 768
    arch: str = "plain"

    def __post_init__(self) -> None:
        if self.arch not in ARCHS:
            raise InputError(f"arch {self.arch!r} is not known; use one of {', '.join(ARCHS)}")
        if self.n_embd % self.n_head or self.head_dim % 2:
            raise InputError(f"n_embd {self.n_embd} does not give {self.n_head} heads of an even size")
        if self.n_head % self.n_kv_head:
            raise InputError(f"n_head {self.n_head} is no multiple of n_kv_head {self.n_kv_head}")

    @property
    def head_dim(self) -> int:
        return self.n_embd // self.n_head

    @property
    def is_modern(self) -> bool:
        return self.arch == "modern"

    @property
    def max_positions(self) -> int:
        """Positions that the rotary tables cover; a longer context is an error."""
        return ROPE_SPAN * self.sequence_len

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @property
    def shape(self) -> Shape:
        """The sizes as scaling.py counts them."""
        return Shape(self.n_layer, self.n_embd, self.n_head, self.n_kv_head, self.vocab_size, self.sequence_len)


class KVCache:
    """Keys and values of a batch of rows, each row with its own length.

    k, v: (n_layer, B, max_len, H_kv, D), k with one slot more for what the last key passes on (`offset_keys`);
    lengths: (B,) int64, tokens held per row.
    """

    def __init__(self, config: GPTConfig, batch_size: int, max_len: int, device: Any, dtype: torch.dtype) -> None:
        self.has_offset_keys = config.is_modern
        L, H, D = config.n_layer, config.n_kv_head, config.head_dim
        self.k = torch.zeros(L, batch_size, max_len + 1, H, D, device=device, dtype=dtype)
        self.v = torch.zeros(L, batch_size, max_len, H, D, device=device, dtype=dtype)
        self.lengths = torch.zeros(batch_size, device=device, dtype=torch.int64)

    @property
    def max_len(self) -> int:
        return self.v.size(2)

    def select(self, rows: Tensor, max_len: int | None = None) -> KVCache:
        """A cache of the given rows (int64 indices, repeats allowed), widened to max_len if given."""
        new = object.__new__(KVCache)
        new.has_offset_keys = self.has_offset_keys
        new.k, new.v, new.lengths = self.k[:, rows], self.v[:, rows], self.lengths[rows]
        if max_len is not None and max_len > self.max_len:
            pad = (0, 0, 0, 0, 0, max_len - self.max_len)
            new.k, new.v = F.pad(new.k, pad), F.pad(new.v, pad)
        return new

    def insert(self, layer: int, k: Tensor, v: Tensor, positions: Tensor, end: int) -> tuple[Tensor, Tensor]:
        """Write (B, T, H_kv, D) at each row's (B, T) positions; returns the layer's slots 0..end."""
        rows = torch.arange(k.size(0), device=k.device)[:, None]
        if self.has_offset_keys:  # see offset_keys(): the slow channels belong to the next token's key
            fast, slow = fast_and_slow(self.k[layer])
            fast[rows, positions], slow[rows, positions + 1] = fast_and_slow(k)
        else:
            self.k[layer][rows, positions] = k
        self.v[layer][rows, positions] = v
        return self.k[layer][:, :end], self.v[layer][:, :end]


def norm(x: Tensor) -> Tensor:
    """RMS norm over the last dim, no parameters (Zhang & Sennrich 2019, arXiv 1910.07467)."""
    return F.rms_norm(x, (x.size(-1),))


class Linear(nn.Linear):
    """No bias; weights live in fp32 for the optimizer and are cast to the activations' dtype here."""

    def __init__(self, n_in: int, n_out: int) -> None:
        super().__init__(n_in, n_out, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype))


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position embedding, halves layout. x: (B, T, H, D); cos, sin: (1 or B, T, 1, D/2)."""
    x1, x2 = x.chunk(2, dim=-1)
    return torch.cat((x1 * cos + x2 * sin, x2 * cos - x1 * sin), dim=-1)


def fast_and_slow(k: Tensor) -> tuple[Tensor, Tensor]:
    """(..., D) keys -> views (..., 2, about D/4) of the channels that turn fast with the position and of the slow ones:
    the first and the second half of each half of `rotate`'s layout."""
    pairs = k.unflatten(-1, (2, -1))
    at = pairs.size(-1) // 2
    return pairs[..., :at], pairs[..., at:]


def offset_keys(k: Tensor) -> Tensor:
    """Each (B, T, H_kv, D) key gets the slow half of its channels from the key before it; the first has zeros there.

    A query that looks for a token then finds the one after it, so that one layer can do what takes an induction head
    two: find what followed the same token before. Partial key offset, record 49 of the modded-nanogpt speedrun (2025).
    """
    fast, slow = fast_and_slow(k)
    slow = F.pad(slow[:, :-1], (0, 0, 0, 0, 0, 0, 1, 0))
    return torch.cat((fast, slow), dim=-1).flatten(-2)


class Attention(nn.Module):
    def __init__(self, config: GPTConfig, layer: int) -> None:
        super().__init__()
        self.layer, self.config = layer, config
        C, D = config.n_embd, config.head_dim
        self.c_q = Linear(C, config.n_head * D)
        self.c_k = Linear(C, config.n_kv_head * D)
        self.c_v = Linear(C, config.n_kv_head * D)
        self.c_proj = Linear(C, C)

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor], slots: Slots | None) -> Tensor:
        B, T, C = x.shape
        D = self.config.head_dim
        q = self.c_q(x).view(B, T, -1, D)
        k = self.c_k(x).view(B, T, -1, D)
        v = self.c_v(x).view(B, T, -1, D)
        q, k = norm(rotate(q, *rope)), norm(rotate(k, *rope))
        if slots is None:
            y = causal_attention(q, offset_keys(k) if self.config.is_modern else k, v)
        else:
            k, v = slots.cache.insert(self.layer, k, v, slots.positions, slots.end)
            y = cached_attention(q, k, v, slots.positions)
        return self.c_proj(y.reshape(B, T, C))


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

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor], slots: Slots | None) -> Tensor:
        x = x + self.attn(norm(x), rope, slots)
        return x + self.mlp(norm(x))


@dataclass(frozen=True)
class Slots:
    """Where in the cache the tokens of this forward go: (B, T) positions, all below `end`."""

    cache: KVCache
    positions: Tensor
    end: int


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
        self.lm_head = Linear(config.n_embd, config.vocab_size)
        self.compute_dtype = torch.float32
        self.fill_buffers()

    def fill_buffers(self) -> None:
        """The rotary tables; again after the model was built without storage."""
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
        output head and what writes into the residual stream start at zero, so the first loss is ln V."""
        for module in self.modules():
            if isinstance(module, Linear):
                fan_out, fan_in = module.weight.shape
                module.weight.normal_(0.0, min(1.0, math.sqrt(fan_out / fan_in)) / math.sqrt(fan_in))
        self.wte.weight.normal_(0.0, 1.0)
        self.lm_head.weight.zero_()
        for block in self.blocks:
            block.attn.c_proj.weight.zero_()
            block.mlp.c_proj.weight.zero_()
            if self.config.is_modern:
                block.attn.c_q.weight.mul_(QK_INIT)
                block.attn.c_k.weight.mul_(QK_INIT)

    @property
    def wte(self) -> nn.Embedding:
        return self.transformer["wte"]  # type: ignore[return-value]

    @property
    def blocks(self) -> list[Block]:
        return list(self.transformer["h"])  # type: ignore[call-overload]

    @property
    def device(self) -> torch.device:
        return self.lm_head.weight.device

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
        if x.size(0) * self.config.vocab_size <= LOGITS_AT_ONCE:
            return self.loss(x, targets, reduction)
        return self._chunked_loss(x, targets, reduction)

    def loss(self, x: Tensor, targets: Tensor, reduction: str) -> Tensor:
        """Cross-entropy of (N, C) features against (N,) targets, in fp32."""
        return F.cross_entropy(self.logits(x), targets, ignore_index=-1, reduction=reduction)

    def _chunked_loss(self, x: Tensor, targets: Tensor, reduction: str) -> Tensor:
        """The same loss without ever holding all logits: chunks of rows, whose logits are computed again in the
        backward pass. 32 x 2,048 positions of a 65,536 vocabulary would be 17 GB of fp32 logits at once."""
        rows = max(1, LOGITS_AT_ONCE // self.config.vocab_size)
        inner = "none" if reduction == "none" else "sum"
        losses = [
            checkpoint(self.loss, x_chunk, t_chunk, inner, use_reentrant=False)
            for x_chunk, t_chunk in zip(x.split(rows), targets.split(rows), strict=True)
        ]
        if reduction == "none":
            return torch.cat(losses)
        total = torch.stack(losses).sum()
        return total / (targets != -1).sum() if reduction == "mean" else total

    def features(self, idx: Tensor, cache: KVCache | None = None) -> Tensor:
        """(B, T) token ids -> (B, T, C), the normalised residual stream that the head reads."""
        T = idx.size(1)
        if cache is None:
            self._check_span(T)
            slots, rope = None, (self.cos[:T][None, :, None], self.sin[:T][None, :, None])
        else:
            positions = cache.lengths[:, None] + torch.arange(T, device=idx.device)  # (B, T)
            end = int(positions[:, -1].max()) + 1
            self._check_span(end)
            slots = Slots(cache, positions, end)
            rope = (self.cos[positions][:, :, None], self.sin[positions][:, :, None])
        x = norm(self.wte(idx).to(self.compute_dtype))
        for block in self.blocks:
            x = block(x, rope, slots)
        if cache is not None:
            cache.lengths = cache.lengths + T
        return norm(x)

    def logits(self, x: Tensor) -> Tensor:
        """(..., C) -> (..., V) fp32: in bf16 a capped logit near 15 would be off by up to 0.03."""
        return LOGIT_CAP * torch.tanh(self.lm_head(x).float() / LOGIT_CAP)

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
