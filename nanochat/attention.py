"""Which attention runs where, by device, dtype and window; `describe` names it. The CPU's own is cpu_attention.py.

# B rows, T query positions, S key positions, H heads, H_kv key/value heads, D head dim
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, lru_cache
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from nanochat import cpu_attention

# cuDNN before torch's own kernels; torch's default order has it last
HOPPER_ORDER = [
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]
DESCRIPTIONS = {
    "flash": "FlashAttention-3",
    "cudnn": "SDPA, cuDNN first",
    "flex": "FlexAttention",
    "blocks": "blocks of queries",
    "sdpa": "SDPA",
}


def causal_attention(q: Tensor, k: Tensor, v: Tensor, window: int | None = None, kernel: str | None = None) -> Tensor:
    """Each position attends to itself and the `window` positions before it; None = all before it.

    Args:
        q: (B, T, H, D); k, v: (B, T, H_kv, D), H a multiple of H_kv.
        kernel: a key of DESCRIPTIONS; None = the best for this device, dtype and window.

    Returns:
        (B, T, H, D)
    """
    T = q.size(1)
    if window is not None and window >= T - 1:
        window = None
    name = kernel or backend(q.device, q.dtype, window)
    if name == "blocks":
        groups = q.size(2) // k.size(2)
        if groups > 1:
            k, v = k.repeat_interleave(groups, 2), v.repeat_interleave(groups, 2)
        return cpu_attention.causal(q, k, v, window)
    if name == "flash":
        return _flash(q, k, v, window)
    if name == "cudnn":
        with sdpa_kernel(HOPPER_ORDER, set_priority=True):
            return _sdpa(q, k, v, is_causal=True)
    if window is None:
        return _sdpa(q, k, v, is_causal=True)
    if name == "flex":
        return _flex(q, k, v, window)
    return _sdpa(q, k, v, mask=_band(T, window, q.device))


def cached_attention(q: Tensor, k: Tensor, v: Tensor, positions: Tensor, window: int | None = None) -> Tensor:
    """Queries against a cache: the query at position p sees the keys p - window..p of its row; None = 0..p.

    Args:
        q: (B, T, H, D); k, v: (B, S, H_kv, D), of which a row's slots beyond its length hold anything.
        positions: (B, T) int64, each query's position in its row.
    """
    slots, at = torch.arange(k.size(1), device=q.device), positions[:, :, None]
    visible = slots <= at  # (B, T, S)
    if window is not None:
        visible &= slots >= at - window
    return _sdpa(q, k, v, mask=visible[:, None])


def describe(device: torch.device, dtype: torch.dtype, window: int | None = None) -> str:
    """One line for the log: what `causal_attention` runs on."""
    line = DESCRIPTIONS[backend(device, dtype, window)]
    return f"{line} ({_flash_error})" if _flash_error else line


@torch.compiler.assume_constant_result  # looks for packages, which a trace cannot
def backend(device: torch.device, dtype: torch.dtype, window: int | None) -> str:
    """A key of DESCRIPTIONS."""
    if device.type == "cpu":
        return "blocks"
    if device.type != "cuda":
        return "sdpa"
    is_hopper = torch.cuda.get_device_capability(device)[0] == 9 and dtype in (torch.bfloat16, torch.float16)
    if is_hopper and _load_flash():
        return "flash"
    if window is not None:  # FlexAttention sums in fp32
        return "flex" if find_spec("triton") and dtype != torch.float64 else "sdpa"
    return "cudnn" if is_hopper and torch.backends.cudnn.is_available() else "sdpa"


_flash_function: Callable[..., Any] | None = None
_flash_error = ""


def _load_flash() -> bool:
    """FlashAttention-3 from an installed flash_attn_interface (built from hopper/ of Dao-AILab/flash-attention), or
    through the package `kernels`, which fetches a build for this torch. Neither is a dependency: uv pip install kernels
    """
    global _flash_function, _flash_error
    if _flash_function is None and not _flash_error:
        try:
            if find_spec("flash_attn_interface"):
                from flash_attn_interface import flash_attn_func

                _flash_function = flash_attn_func
            elif find_spec("kernels"):
                from kernels import get_kernel

                _flash_function = get_kernel("kernels-community/flash-attn3", version=1).flash_attn_func
        except Exception as error:  # no network, no build for this torch, a library missing: each its own class
            _flash_error = f"FlashAttention-3 did not load: {type(error).__name__}"
    return _flash_function is not None


def _flash(q: Tensor, k: Tensor, v: Tensor, window: int | None) -> Tensor:
    assert _flash_function is not None
    y = _flash_function(q, k, v, causal=True, window_size=(-1 if window is None else window, 0))
    return y[0] if isinstance(y, tuple) else y  # older builds give the log-sum-exp too


def _flex(q: Tensor, k: Tensor, v: Tensor, window: int) -> Tensor:
    """Skips the blocks of keys that no query of a block sees."""
    is_traced = torch.compiler.is_compiling()  # then it becomes part of that graph; eager, all scores are materialised
    mask = (_block_mask if is_traced else _cached_block_mask)(q.size(1), window, q.device)
    attend = flex_attention if is_traced else _compiled_flex()
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    return attend(q, k, v, block_mask=mask, enable_gqa=q.size(1) != k.size(1)).transpose(1, 2)  # type: ignore[operator,union-attr]


def _block_mask(T: int, window: int, device: torch.device) -> BlockMask:
    def sees(b: Tensor, h: Tensor, q_at: Tensor, k_at: Tensor) -> Tensor:
        return (k_at <= q_at) & (q_at - k_at <= window)

    return create_block_mask(sees, None, None, T, T, device=device)


@lru_cache(maxsize=64)  # not for a trace, which would warn of it and look through it
def _cached_block_mask(T: int, window: int, device: torch.device) -> BlockMask:
    with torch.inference_mode(False):  # an evaluation may ask first, and a backward pass refuses inference tensors
        return _block_mask(T, window, device)


@cache
def _compiled_flex() -> Callable[..., Any]:
    return torch.compile(flex_attention)


def _band(T: int, window: int, device: torch.device) -> Tensor:
    """(T, T) bool, True = seen."""
    at = torch.arange(T, device=device)
    distance = at[:, None] - at
    return (distance >= 0) & (distance <= window)


def _sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # SDPA wants heads in front
    y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=is_causal, enable_gqa=q.size(1) != k.size(1))
    return y.transpose(1, 2)
