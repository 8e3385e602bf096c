"""Which attention runs where, over any device, dtype and window; `describe` names it.

On a CPU a window pays through blocks of queries against the keys that they can see: B 4, T 512, H 4, D 64, window 128,
fp32, forward and backward, one loaded core: 31 ms; SDPA with the mask 54 ms, SDPA without a window 53 ms.

# B rows, T query positions, S key positions, H heads, H_kv key/value heads, D head dim, W window
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

MIN_BLOCK = 64  # queries of a block on a CPU: fewer leave the matmuls short
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
    "blocks": "SDPA in blocks of the window",
    "sdpa": "SDPA",
}


def causal_attention(q: Tensor, k: Tensor, v: Tensor, window: int | None = None) -> Tensor:
    """Each position attends to itself and the `window` positions before it; None = all before it.

    Args:
        q: (B, T, H, D); k, v: (B, T, H_kv, D), H a multiple of H_kv.

    Returns:
        (B, T, H, D)
    """
    T = q.size(1)
    if window is not None and window >= T - 1:
        window = None
    name = backend(q.device, q.dtype, window)
    if name == "flash":
        return _flash(q, k, v, window)
    if name == "cudnn":
        with sdpa_kernel(HOPPER_ORDER, set_priority=True):
            return _sdpa(q, k, v, is_causal=True)
    if window is None:
        return _sdpa(q, k, v, is_causal=True)
    if name == "flex":
        return _flex(q, k, v, window)
    if name == "blocks" and T >= 2 * window:
        return _blocks(q, k, v, window)
    return _sdpa(q, k, v, mask=_band(T, T, window, q.device))


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
        return "sdpa" if window is None else "blocks"
    if device.type != "cuda":
        return "sdpa"
    is_hopper = torch.cuda.get_device_capability(device)[0] == 9 and dtype in (torch.bfloat16, torch.float16)
    if is_hopper and _load_flash():
        return "flash"
    if window is not None:
        return "flex" if find_spec("triton") else "sdpa"
    return "cudnn" if is_hopper and torch.backends.cudnn.is_available() else "sdpa"


_flash_function: Callable[..., Any] | None = None
_flash_error = ""


def _load_flash() -> bool:
    """FlashAttention-3 from an installed flash_attn_interface, or through the package `kernels`, which fetches a build
    for this torch."""
    global _flash_function, _flash_error
    if _flash_function is None and not _flash_error:
        try:
            if find_spec("flash_attn_interface"):
                from flash_attn_interface import flash_attn_func

                _flash_function = flash_attn_func
            elif find_spec("kernels"):
                from kernels import get_kernel

                _flash_function = get_kernel("kernels-community/flash-attn3").flash_attn_func
        except Exception as error:  # no network, no build for this torch, a library missing: each its own class
            _flash_error = f"FlashAttention-3 did not load: {type(error).__name__}"
    return _flash_function is not None


def _flash(q: Tensor, k: Tensor, v: Tensor, window: int | None) -> Tensor:
    assert _flash_function is not None
    y = _flash_function(q, k, v, causal=True, window_size=(-1 if window is None else window, 0))
    return y[0] if isinstance(y, tuple) else y  # older builds give the log-sum-exp too


def _flex(q: Tensor, k: Tensor, v: Tensor, window: int) -> Tensor:
    """Skips the blocks of keys that no query of a block sees."""

    def sees(b: Tensor, h: Tensor, q_at: Tensor, k_at: Tensor) -> Tensor:
        return (k_at <= q_at) & (q_at - k_at <= window)

    T = q.size(1)
    mask = create_block_mask(sees, None, None, T, T, device=q.device)
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    return flex_attention(q, k, v, block_mask=mask, enable_gqa=q.size(1) != k.size(1)).transpose(1, 2)  # type: ignore[union-attr]


def _blocks(q: Tensor, k: Tensor, v: Tensor, window: int) -> Tensor:
    """The first W queries see each other; each later block of queries sees its own keys and the W before them, so that
    T (W + block) scores are computed, not T^2 / 2. Blocks of half a window measured best."""
    B, T, H, D = q.shape
    size = max(MIN_BLOCK, window // 2)
    n = -(-(T - window) // size)
    pad = (0, 0, 0, 0, 0, window + n * size - T)  # at the end, where no real query looks
    q, k, v = F.pad(q, pad), F.pad(k, pad), F.pad(v, pad)
    head = _sdpa(q[:, :window], k[:, :window], v[:, :window], is_causal=True)
    blocks = [x.unfold(1, window + size, size).movedim(-1, 2).flatten(0, 1) for x in (k, v)]  # (B n, W + size, H_kv, D)
    k, v = blocks
    tail = _sdpa(q[:, window:].reshape(B * n, size, H, D), k, v, mask=_band(size, window + size, window, q.device))
    return torch.cat((head, tail.reshape(B, n * size, H, D)), dim=1)[:, :T]


def _band(T: int, S: int, window: int, device: torch.device) -> Tensor:
    """(T, S) bool, True = seen: the last query is at the last key."""
    at = torch.arange(S - T, S, device=device)[:, None]
    keys = torch.arange(S, device=device)
    return (keys <= at) & (keys >= at - window)


def _sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # SDPA wants heads in front
    y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=is_causal, enable_gqa=q.size(1) != k.size(1))
    return y.transpose(1, 2)
