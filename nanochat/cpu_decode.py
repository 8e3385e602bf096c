"""A decode step on a CPU by the kernels of rustdecode: each weight is read once, activations are fp32, and what torch
spends on dozens of small operations a layer is gone. It is GPT.features and GPT.logits for one token a row; a test
compares the two.

# B rows, C = n_embd, H = n_head, H_kv = n_kv_head, D = head_dim, V = vocab_size
"""

from __future__ import annotations

import ctypes

import torch
import torch.nn.functional as F
from torch import Tensor

import rustdecode
from nanochat.gpt import GPT, LOGIT_CAP, norm
from nanochat.kv_cache import KVCache
from nanochat.linear import Linear
from nanochat.quantize import Int8Linear

# What torch's own threads start by, if its OpenMP is GCC's or one that has this name too.
OPENMP = ctypes.cast(getattr(ctypes.CDLL(None), "GOMP_parallel", 0), ctypes.c_void_p).value or 0


class CPUDecoder:
    """Decodes with a model on the CPU; the weights are the model's own, in fp32, bf16 or int8."""

    def __init__(self, model: GPT) -> None:
        config = model.config
        self.model = model
        self.layers = [
            rustdecode.Layer(config.n_head, config.n_kv_head, config.head_dim, b.attn.window, b.attn.offsets_keys)
            for b in model.blocks
        ]
        self.buffer = torch.empty(0, config.vocab_size)
        # as the model rounds them
        self.cos, self.sin = model.cos.float().contiguous(), model.sin.float().contiguous()

    @torch.inference_mode()
    def step(self, idx: Tensor, cache: KVCache) -> Tensor:
        """Append a token to each row's cached ones.

        Args:
            idx: (B,) int64.

        Returns:
            (B, V) fp32 logits of the next token, in a buffer that the next step writes to.
        """
        rustdecode.set_threads(torch.get_num_threads(), OPENMP)
        model, config = self.model, self.model.config
        positions = cache.lengths.contiguous()
        previous = cache.previous(idx[:, None], positions[:, None])
        x = x0 = norm(model.wte(idx).float())
        bigrams = model.bigrams(idx[:, None], previous)[:, 0].float() if model.bigrams is not None else None
        heads, kv_width = config.n_head + 2 * config.n_kv_head, config.n_kv_head * config.head_dim
        qkv = x.new_empty(len(x), heads * config.head_dim)
        y, h = torch.empty_like(x), x.new_empty(len(x), 4 * config.n_embd)
        value_embeds = model.value_embeds
        for i, block in enumerate(model.blocks):
            if model.has_lambdas:
                x = model.resid_lambdas[i].float() * x + model.x0_lambdas[i].float() * x0
            elif i == 0:
                x = x.clone()  # written to below; x0 is not
            if bigrams is not None:
                x += model.bigram_lambdas[i].float() * bigrams
            attn, mlp = block.attn, block.mlp
            _linear(x, [attn.c_q, attn.c_k, attn.c_v], qkv, norm=True)
            if i in value_embeds:
                gate = 3 * torch.sigmoid(
                    F.linear(norm(x)[:, : attn.value_gate.in_features], attn.value_gate.weight.float())
                )
                qkv[:, -kv_width:] += (gate[..., None] * value_embeds[i](idx).float().view(*gate.shape, -1)).flatten(1)
            self._attend(i, qkv, positions, cache, y)
            _linear(y, [attn.c_proj], x, then="add")
            _linear(x, [mlp.c_fc], h, norm=True, then="squared_relu")
            _linear(h, [mlp.c_proj], x, then="add")
        cache.lengths = cache.lengths + 1
        return self._head(x, norm=True)

    @torch.inference_mode()
    def logits(self, x: Tensor) -> Tensor:
        """GPT.logits of a few rows of GPT.features, in the buffer of step(): (B, C) -> (B, V) fp32."""
        rustdecode.set_threads(torch.get_num_threads(), OPENMP)
        return self._head(x.float().contiguous(), norm=False)

    def _head(self, x: Tensor, norm: bool) -> Tensor:
        if len(self.buffer) < len(x):  # megabytes, whose pages the system would have to clear anew each step
            self.buffer = x.new_empty(len(x), self.model.config.vocab_size)
        logits = self.buffer[: len(x)]
        _linear(x, [self.model.lm_head], logits, norm=norm)
        return logits.add_(LOGIT_CAP.shift).div_(LOGIT_CAP.scale).tanh_().mul_(LOGIT_CAP.cap)

    def _attend(self, i: int, qkv: Tensor, positions: Tensor, cache: KVCache, y: Tensor) -> None:
        k, v = cache.k[i][cache.rows], cache.v[i][cache.rows]
        assert isinstance(cache.rows, slice), "only neighbours can be written to where they are"
        assert k.is_contiguous() and v.is_contiguous() and len(k) == len(v) == len(positions)
        self.layers[i].attention(
            str(k.dtype).removeprefix("torch."),
            qkv.data_ptr(),
            len(qkv),
            positions.data_ptr(),
            (self.cos.data_ptr(), self.sin.data_ptr(), self.cos.numel()),
            (k.data_ptr(), k.size(1)),
            (v.data_ptr(), v.size(1)),
            y.data_ptr(),
        )


def _linear(x: Tensor, matrices: list[Linear], y: Tensor, norm: bool = False, then: str = "store") -> None:
    """y (B, all their outputs) = f(x times each matrix); see rustdecode.linear."""
    assert x.is_contiguous() and y.is_contiguous() and x.dtype == y.dtype == torch.float32
    parts, kind = [], ""
    for matrix in matrices:
        if isinstance(matrix, Int8Linear):
            assert matrix.scales.dtype == torch.float32
            weight, scales = matrix.integers, matrix.scales.data_ptr()
        else:
            weight, scales = matrix.weight, 0
        assert weight.is_contiguous()
        kind = str(weight.dtype).removeprefix("torch.")
        parts.append((weight.data_ptr(), scales, len(weight)))
    rustdecode.linear(kind, x.data_ptr(), len(x), x.size(1), parts, y.data_ptr(), norm, then)
