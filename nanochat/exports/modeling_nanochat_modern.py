"""nanochat's `modern` model for transformers: AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).

An export puts this file beside the weights; it needs torch, numpy and transformers, nothing of nanochat. It says in few
lines what nanochat/gpt.py says in fast ones, under the same names of weights; tests/test_export.py compares the two.

# B rows, T positions, S positions of cache and input, C = n_embd, H heads, D head dim, V vocabulary
"""

from functools import lru_cache

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from transformers import GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.cache_utils import DynamicCache, DynamicLayer
from transformers.modeling_outputs import CausalLMOutputWithPast

# transformers renamed it
CACHE = "cache" if "cache" in CausalLMOutputWithPast.__dataclass_fields__ else "past_key_values"
LOGIT_CAP, ROPE_BASE, BIGRAM_SIGNS = 15.0, 10_000.0, 1024


class NanoChatModernConfig(PretrainedConfig):
    """n_layer, n_head, n_kv_head, n_embd, vocab_size, sequence_len; extras: which of lambdas, value_embeds, bigram and
    offset_keys the model has; windows: by layer, earlier positions seen, None = all; value_layers, gate_channels and
    bigram_rows: sizes of extras."""

    model_type = "nanochat_modern"
    attribute_map = {  # noqa: RUF012
        "hidden_size": "n_embd",
        "num_hidden_layers": "n_layer",
        "num_attention_heads": "n_head",
        "num_key_value_heads": "n_kv_head",
        "max_position_embeddings": "sequence_len",
    }


def linear(n_in, n_out):
    return nn.Linear(n_in, n_out, bias=False)


def norm(x):
    return F.rms_norm(x, (x.size(-1),))


def rotate(x, cos, sin):
    """x: (B, H, T, D); cos, sin: (B, 1, T, D/2)."""
    x1, x2 = x.chunk(2, dim=-1)
    return torch.cat((x1 * cos + x2 * sin, x2 * cos - x1 * sin), dim=-1)


def offset_keys(k, has_previous):
    """Each (B, H, S, D) key gets the second half of each half of its channels from the key before it, 0 from none."""
    fast, slow = k.unflatten(-1, (2, -1)).tensor_split([(k.size(-1) // 2) // 2], dim=-1)
    slow = F.pad(slow[:, :, :-1], (0, 0, 0, 0, 1, 0)) * has_previous[:, None, :, None, None]
    return torch.cat((fast, slow), dim=-1).flatten(-2)


class Attention(nn.Module):
    def __init__(self, config, layer):
        super().__init__()
        self.layer, self.config = layer, config
        self.head_dim = config.n_embd // config.n_head
        kv = config.n_kv_head * self.head_dim
        self.c_q, self.c_proj = linear(config.n_embd, config.n_embd), linear(config.n_embd, config.n_embd)
        self.c_k, self.c_v = linear(config.n_embd, kv), linear(config.n_embd, kv)
        if layer in config.value_layers:
            self.value_gate = linear(config.gate_channels, config.n_kv_head)

    def forward(self, x, rope, values, cache, has_previous, distance, visible):
        B, T, C = x.shape
        q, k, v = (c(x).view(B, T, -1, self.head_dim).transpose(1, 2) for c in (self.c_q, self.c_k, self.c_v))
        if values is not None:
            gate = 3 * torch.sigmoid(self.value_gate(x[..., : self.config.gate_channels]))  # (B, T, H_kv)
            v = v + (gate[..., None] * values.view(B, T, -1, self.head_dim)).transpose(1, 2)
        q, k = norm(rotate(q, *rope)), norm(rotate(k, *rope))
        if cache is not None:  # of keys before their offset, which is cheap
            k, v = cache.update(k, v, self.layer)
        if "offset_keys" in self.config.extras:
            k = offset_keys(k, has_previous)
        window = self.config.windows[self.layer]
        if window is not None:
            visible = visible & (distance <= window)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=visible[:, None], enable_gqa=True)
        return self.c_proj(y.transpose(1, 2).reshape(B, T, C))


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.c_fc, self.c_proj = linear(config.n_embd, 4 * config.n_embd), linear(4 * config.n_embd, config.n_embd)

    def forward(self, x):
        return self.c_proj(F.relu(self.c_fc(x)).square())


class Block(nn.Module):
    def __init__(self, config, layer):
        super().__init__()
        self.attn, self.mlp = Attention(config, layer), MLP(config)

    def forward(self, x, dtype, *context):
        x = x + self.attn(norm(x).to(dtype), *context)
        return x + self.mlp(norm(x).to(dtype))


@lru_cache(maxsize=4)
def signs(width):
    """(BIGRAM_SIGNS, width), the same in every model of a width."""
    draws = np.random.default_rng(0).integers(0, 2, (BIGRAM_SIGNS, width))
    return torch.from_numpy(2.0 * draws - 1.0).float()


class Bigrams(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(config.bigram_rows * config.vocab_size, config.n_embd))

    def forward(self, idx, previous):
        """(B, T) ids and the ids before them, -1 = none -> (B, T, C)."""
        last = self.weight.size(0) - 1
        row = torch.where(previous < 0, last, ((36_313 * idx) ^ (27_191 * previous)) % last)
        return (
            F.embedding(row, self.weight) * signs(self.weight.size(1)).to(idx.device)[(idx ^ previous) % BIGRAM_SIGNS]
        )


class NanoChatModernForCausalLM(PreTrainedModel, GenerationMixin):
    config_class = NanoChatModernConfig
    _supports_sdpa = True

    def __init__(self, config):
        super().__init__(config)
        C, V, L = config.n_embd, config.vocab_size, config.n_layer
        parts = {"wte": nn.Embedding(V, C), "h": nn.ModuleList([Block(config, i) for i in range(L)])}
        if "value_embeds" in config.extras:
            values = config.n_kv_head * (C // config.n_head)
            parts["value_embeds"] = nn.ModuleDict({str(i): nn.Embedding(V, values) for i in config.value_layers})
        if "bigram" in config.extras:
            parts["bigram"] = Bigrams(config)
            self.bigram_lambdas = nn.Parameter(torch.empty(L))
        if "lambdas" in config.extras:
            self.resid_lambdas, self.x0_lambdas = nn.Parameter(torch.empty(L)), nn.Parameter(torch.empty(L))
        self.transformer = nn.ModuleDict(parts)
        self.lm_head = linear(C, V)
        self.post_init()

    def get_input_embeddings(self):
        return self.transformer["wte"]

    def get_output_embeddings(self):
        return self.lm_head

    def forward(
        self,
        input_ids,
        attention_mask=None,
        position_ids=None,
        past_key_values=None,
        cache=None,
        use_cache=None,
        labels=None,
        logits_to_keep=0,
        **kwargs,
    ):
        """attention_mask: (B, S), 0 = padding, which may stand on either side; None = no padding."""
        cfg, T = self.config, input_ids.size(1)
        cache = past_key_values if cache is None else cache
        if cache is None and use_cache:
            cache = DynamicCache()
        ids = input_ids  # (B, S)
        if cache is not None:  # keeps the ids too, as one layer more, because the bigrams need those gone by
            while len(cache.layers) <= cfg.n_layer:
                cache.layers.append(DynamicLayer())
            if type(cache.layers[0]) is not DynamicLayer:
                raise ValueError(f"this model runs with a DynamicCache or none, not with {type(cache).__name__}")
            ids = cache.update(ids[:, None, :, None], ids[:, None, :, None], cfg.n_layer)[0][:, 0, :, 0]
        seen = torch.ones_like(ids, dtype=torch.bool) if attention_mask is None else attention_mask.bool()
        has_previous = F.pad(seen[:, :-1], (1, 0), value=False)  # (B, S)
        if position_ids is None:
            position_ids = (seen.cumsum(-1) - 1).clamp(min=0)[:, -T:]
        slots = torch.arange(ids.size(1), device=ids.device)
        distance = slots[-T:, None] - slots  # (T, S)
        # padding sees itself: in some kernels a row without any key becomes NaN, and spreads
        visible = (distance >= 0) & (seen[:, None] | (distance == 0))  # (B, T, S)

        dtype = self.lm_head.weight.dtype
        head_dim = cfg.n_embd // cfg.n_head
        inv_freq = ROPE_BASE ** (-torch.arange(0, head_dim, 2, device=ids.device).float() / head_dim)
        angles = position_ids[:, None, :, None].float() * inv_freq  # (B, 1, T, D/2)
        rope = angles.cos().to(dtype), angles.sin().to(dtype)
        has_lambdas = "lambdas" in cfg.extras
        stream = torch.float32 if has_lambdas else dtype
        x = x0 = norm(self.transformer["wte"](input_ids).to(stream))
        if "bigram" in cfg.extras:
            previous = torch.where(has_previous, F.pad(ids[:, :-1], (1, 0)), -1)[:, -T:]
            bigrams = self.transformer["bigram"](input_ids, previous).to(stream)
        for i, block in enumerate(self.transformer["h"]):  # type: ignore
            if has_lambdas:
                x = self.resid_lambdas[i] * x + self.x0_lambdas[i] * x0
            if "bigram" in cfg.extras:
                x = x + self.bigram_lambdas[i].to(stream) * bigrams
            values = None
            if i in cfg.value_layers:
                values = self.transformer["value_embeds"][str(i)](input_ids)  # type: ignore
            x = block(x, dtype, rope, values, cache, has_previous, distance, visible)
        x = norm(x).to(dtype)[:, -logits_to_keep:]
        logits = LOGIT_CAP * torch.tanh(self.lm_head(x).float() / LOGIT_CAP)
        loss = None if labels is None else self.loss_function(logits=logits, labels=labels, vocab_size=cfg.vocab_size)
        return CausalLMOutputWithPast(loss=loss, logits=logits, **{CACHE: cache})
