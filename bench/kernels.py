"""Attention of every kind, and whole models, against fp64: the part of bench/gpu_suite.py that asks what is right.

# B rows, T positions, H heads, H_kv key/value heads, D head dim
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from itertools import product
from typing import Any

import torch

from bench import common
from bench.common import Plan, Setting
from bench.results import Task, table
from nanochat import attention, fp8
from nanochat.scaling import ARCHS

# Largest relative error against fp64 in the L2 norm, outputs and gradients: TF32 has 10 bits of mantissa, bf16 has 7,
# e4m3 has 3; a few layers add up to some units of the last place.
LIMITS = {"float32": 4e-3, "bfloat16": 5e-2, "fp8": 0.3}


def relative_error(found: Sequence[torch.Tensor], exact: Sequence[torch.Tensor]) -> float:
    """Largest ||found - exact|| / ||exact|| over pairs of tensors."""
    pairs = zip(found, exact, strict=True)
    return max(float((a.double() - b.double()).norm() / b.double().norm().clamp(min=1e-30)) for a, b in pairs)


def plain_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, window: int | None = None) -> torch.Tensor:
    """softmax(q k^T / sqrt(D)) v over each position and the `window` before it; (B, T, H or H_kv, D) each."""
    k, v = (x.repeat_interleave(q.size(2) // x.size(2), 2) for x in (k, v))
    scores = torch.einsum("bthd,bshd->bhts", q, k) / q.size(-1) ** 0.5
    at = torch.arange(q.size(1), device=q.device)
    distance = at[:, None] - at
    hidden = (distance < 0) | (distance > (q.size(1) if window is None else window))
    return torch.einsum("bhts,bshd->bthd", scores.masked_fill(hidden, -torch.inf).softmax(-1), v)


def check_attention(
    device: str, dtype: str, T: int, D: int, window: int | None = None, n_kv_head: int = 4, kernel: str | None = None
) -> dict[str, Any]:
    """The attention that the model uses, or a kernel by name, of 4 query heads: output and gradients."""
    generator = torch.Generator().manual_seed(0)
    heads = (4, n_kv_head, n_kv_head, 4)
    exact = [torch.randn(2, T, H, D, generator=generator, dtype=torch.float64) for H in heads]
    given = [x.to(device, getattr(torch, dtype)) for x in exact]
    found = partial(attention.causal_attention, window=window, kernel=kernel)
    outcome = []
    for attend, (q, k, v, up) in (
        (found, given),
        (partial(plain_attention, window=window), [x.double() for x in given]),
    ):
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        y = attend(*leaves)
        outcome.append([y.detach(), *torch.autograd.grad(y, leaves, up)])
    used = attention.DESCRIPTIONS[kernel] if kernel else attention.describe(q.device, given[0].dtype, window)
    return {"error": relative_error(*outcome), "kernel": used}


def check_model(
    arch: str, device: str, dtype: str, sizes: tuple[int, int, int, int], windows: str = "L"
) -> dict[str, Any]:
    """Loss and all gradients of a model in a dtype against the same model in fp64: head, loss, attention, matmuls."""
    depth, width, vocab_size, T = sizes
    plan = Plan(1, 2 * T, T, 2, dtype, False, device, 1)
    dial: dict[str, Any] = {"aspect_ratio": width // depth, "head_dim": min(128, width // 2)}
    setting = Setting(depth, arch, 0, {**dial, "window_pattern": windows, "short_window": T // 4})
    ids = torch.randint(vocab_size, (2, T + 1), generator=torch.Generator().manual_seed(1)).to(device)
    outcome = []
    for is_exact in (False, True):
        built = common.Built(setting, dataclasses.replace(plan, dtype="float32") if is_exact else plan, vocab_size)
        generator = torch.Generator(device).manual_seed(2)
        with torch.no_grad():
            for p in built.model.parameters():  # zeros at the start would leave most gradients zero
                if not p.any():
                    p.normal_(0.0, 0.02, generator=generator)
        if is_exact:
            built.model.double().prepare(built.rt.device, torch.float64)
        loss = built.model(ids[:, :-1], ids[:, 1:])
        loss.backward()
        grads = [p.grad for p in built.model.parameters() if p.grad is not None and p.ndim == 2]
        outcome.append([loss.detach(), *grads])
    return {"error": relative_error(*outcome)}


def tasks(tiny: bool) -> list[Task]:
    device = "cpu" if tiny else "cuda"
    T, D, sizes = (32, 16, (2, 64, 128, 32)) if tiny else (2048, 128, (2, fp8.MIN_WIDTH, 8192, 1024))
    found = []
    for dtype in ("float32", "bfloat16", *([] if tiny else ["fp8"])):
        checks: dict[str, Callable[[], dict[str, Any]]] = {
            f"model {arch} {windows}": partial(check_model, arch, device, dtype, sizes, windows)
            for arch, windows in product(ARCHS, ("L", "SL"))
        }
        variants: list[tuple[int | None, int, str | None]] = [*product((None, T // 4), (4, 2), (None,))]
        variants += [(T // 4, 2, kernel) for kernel in (("sdpa",) if tiny else ("flex", "sdpa"))]
        for window, n_kv_head, kernel in variants if dtype != "fp8" else []:
            name = f"attention {kernel or 'chosen'}, window {window}, {n_kv_head} of 4 heads"
            checks[name] = partial(check_attention, device, dtype, T, D, window, n_kv_head, kernel)
        for name, work in checks.items():
            spec = {"kind": "kernels", "name": name, "dtype": dtype, "sizes": [T, D, *sizes]}
            spec["machine"] = common.machine(Plan(1, device=device))
            found.append(Task(f"{name} {dtype} against fp64", spec, work))
    return found


def show(found: list[tuple[Task, dict[str, Any]]]) -> list[dict[str, Any]]:
    records = [
        {"name": t.spec["name"], "dtype": (dtype := t.spec["dtype"]), **r, "ok": r["error"] <= LIMITS[dtype]}
        for t, r in found
    ]
    rows = [
        (r["name"], r.get("kernel", ""), r["dtype"], f"{r['error']:.1e}", f"{LIMITS[r['dtype']]:.0e}", r["ok"])
        for r in records
    ]
    table(["against fp64", "kernel", "dtype", "relative error", "limit", "ok"], rows)
    return records
