"""The device batch that fits: from the memory model of memory.py, checked by a pass before training begins."""

from __future__ import annotations

import math

import torch

from nanochat import memory, runtime
from nanochat.checkpoint import build_model
from nanochat.config import InputError
from nanochat.environment import print0
from nanochat.fp8 import convert_to_fp8
from nanochat.gpt import GPTConfig
from nanochat.runtime import Runtime
from nanochat.trainer import compiled

SURE_SHARE = 0.5  # an estimate below this part of a CPU's free memory is believed without a probe


def budget_of(available: float, rt: Runtime) -> float:
    return available * (memory.GPU_SHARE if rt.device.type == "cuda" else memory.CPU_SHARE)


def check_rows(config: GPTConfig, rt: Runtime, rows: int, recompute: bool) -> None:
    """Refuse rows a pass that were asked for only where the estimate is beyond all that is free: it is an estimate. On
    a CPU no error would come, the kernel kills.

    Raises:
        InputError: with flags that fit.
    """
    shape, available, value_bytes = config.shape, runtime.available_memory(rt), rt.dtype.itemsize
    estimate = memory.memory_bytes(shape, rows, rt.world_size, recompute, value_bytes=value_bytes)
    if estimate <= available:
        return
    budget, ways = budget_of(available, rt), (True,) if recompute else (False, True)
    fit = memory.fitting_rows(shape, rows, rt.world_size, budget, ways, value_bytes)
    n, again = next(fit, (0, recompute))
    way_out = f"--device_batch_size={max(1, n)}" * (n < rows > 1) + " --recompute" * (again and not recompute)
    if not n:
        less = memory.smaller(shape, rt.world_size, budget, (recompute,), value_bytes)
        way_out = f"{less} {way_out}" if less.startswith("--") else less
    raise InputError(
        f"--device_batch_size {rows} takes about {estimate / 2**30:.1f} GiB of memory, and {available / 2**30:.1f} are "
        f"free here; try {way_out.strip()}"
    )


def find_rows(
    config: GPTConfig,
    rt: Runtime,
    rows: int,
    recompute: bool = False,
    compile: bool | None = None,
    fp8: bool = False,
) -> tuple[int, bool]:
    """(rows a pass, whether blocks must recompute) for a rank that has `rows` rows a step. The same on all ranks.

    The largest divisor of `rows` that the memory model says fits is tried in one forward and backward pass of random
    tokens, with a block of the optimizer state's size held; the next smaller one if it runs out of memory.

    Raises:
        InputError: not one row fits; the message says which model does.
    """
    available = runtime.available_memory(rt)
    is_gpu = rt.device.type == "cuda"
    budget = budget_of(available, rt)
    pass_tokens = math.inf if is_gpu else memory.CPU_PASS_TOKENS
    ways = (True,) if recompute else (False, True)
    shape, value_bytes = config.shape, rt.dtype.itemsize
    is_trusted = not is_gpu  # the estimate, until a pass runs out of memory
    for n, again in memory.fitting_rows(shape, rows, rt.world_size, budget, ways, value_bytes, pass_tokens):
        estimate = memory.memory_bytes(shape, n, rt.world_size, again, value_bytes=value_bytes)
        is_sure = is_trusted and estimate < SURE_SHARE * available
        if is_sure or probe(config, rt, n, again, compile, fp8):
            how = f"{n} rows, recomputing activations" if again else f"{n} rows"
            tried = "" if is_sure else ", tried"
            gib = f"{estimate / 2**30:.1f} GiB expected of the {available / 2**30:.1f} that are free{tried}"
            print0(f"Device batch: {how}: {gib}")
            return n, again
        is_trusted = False
    way_out = memory.smaller(shape, rt.world_size, budget, ways, value_bytes)
    raise InputError(
        f"not one row of {config.sequence_len} tokens of --depth {config.n_layer} fits the {available / 2**30:.1f} GiB "
        f"that are free here; try {way_out}"
    )


def probe(
    config: GPTConfig, rt: Runtime, rows: int, recompute: bool, compile: bool | None = None, fp8: bool = False
) -> bool:
    """Whether a pass of so many rows fits on every rank. The model is a throw-away; torch.compile keeps the graph."""
    failed = torch.zeros((), device=rt.device)
    try:
        _pass(config, rt, rows, recompute, compile, fp8)
    except (RuntimeError, MemoryError) as error:
        if not runtime.is_out_of_memory(error):
            raise
        failed += 1
    if rt.device.type == "cuda":
        torch.cuda.empty_cache()
    return runtime.all_reduce(failed, "max").item() == 0


def _pass(config: GPTConfig, rt: Runtime, rows: int, recompute: bool, compile: bool | None, fp8: bool) -> None:
    with torch.random.fork_rng(devices=[]):  # the run's own weights must not depend on whether there was a probe
        model = build_model(config, rt)
    model.recompute = recompute
    if fp8:
        convert_to_fp8(model)
    held = torch.empty(int(memory.optimizer_bytes(config.shape, rt.world_size)), dtype=torch.uint8, device=rt.device)
    generator = torch.Generator(rt.device).manual_seed(0)
    idx = torch.randint(config.vocab_size, (rows, config.sequence_len), generator=generator, device=rt.device)
    compiled(model, rt, compile)(idx, idx, reduction="sum").backward()
    runtime.synchronize(rt.device)
    del held
