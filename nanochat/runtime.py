"""Where we run: device, dtype, ranks, peak FLOPs. Only this module and `environment` read environment variables."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from nanochat.config import InputError

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}

# Dense bf16 peak FLOP/s by lower-cased device name; all listed substrings must occur, first match wins
# (vendors' data sheets).
PEAK_FLOPS: tuple[tuple[tuple[str, ...], float], ...] = (
    (("gb200",), 2.5e15),
    (("grace blackwell",), 2.5e15),
    (("b200",), 2.25e15),
    (("b100",), 1.8e15),
    (("h200", "nvl"), 836e12),
    (("h200", "pcie"), 836e12),
    (("h200",), 989e12),
    (("h100", "nvl"), 835e12),
    (("h100", "pcie"), 756e12),
    (("h100",), 989e12),
    (("h800", "nvl"), 989e12),
    (("h800",), 756e12),
    (("a100",), 312e12),
    (("a800",), 312e12),
    (("a40",), 149.7e12),
    (("a30",), 165e12),
    (("l40s",), 362e12),
    (("l40-s",), 362e12),
    (("l40 s",), 362e12),
    (("l4",), 121e12),
    (("mi355",), 2.5e15),
    (("mi325",), 1.3074e15),
    (("mi300x",), 1.3074e15),
    (("mi300a",), 980.6e12),
    (("mi250x",), 383e12),
    (("mi250",), 362.1e12),
    (("5090",), 209.5e12),
    (("4090",), 165.2e12),
    (("3090",), 71e12),
)


@dataclass(frozen=True)
class Runtime:
    """One process of a run."""

    device: torch.device
    dtype: torch.dtype  # compute dtype of activations; parameters are stored in fp32
    rank: int = 0
    local_rank: int = 0
    world_size: int = 1

    @property
    def is_master(self) -> bool:
        return self.rank == 0


def autodetect_device() -> str:
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def _compute_dtype(device_type: str) -> torch.dtype:
    name = os.environ.get("NANOCHAT_DTYPE")
    if name is not None:
        if name not in DTYPES:
            raise InputError(f"NANOCHAT_DTYPE={name} is not known; use one of {', '.join(DTYPES)}")
        return DTYPES[name]
    if device_type == "cuda" and torch.cuda.get_device_capability() >= (8, 0):
        return torch.bfloat16
    if device_type == "cpu" and _cpu_has_bf16():
        return torch.bfloat16
    return torch.float32


def _cpu_has_bf16() -> bool:
    """Whether the CPU multiplies bf16 in hardware (AVX512_BF16 or AMX): four times the fp32 rate there, while an
    emulated bf16 is slower than fp32. torch offers these probes only under private names."""
    probes = [getattr(torch.cpu, f"_is_{name}_supported", None) for name in ("avx512_bf16", "amx_tile")]
    return any(probe() for probe in probes if probe is not None)


def start(device_type: str | None = None, seed: int = 42) -> Runtime:
    """Pick the device, join the process group when launched by torchrun, seed torch.

    Raises:
        InputError: the device is unknown or absent.
    """
    device_type = device_type or autodetect_device()
    if device_type not in ("cuda", "mps", "cpu"):
        raise InputError(f"--device_type {device_type} is not known; use cuda, mps or cpu")
    if device_type == "cuda" and not torch.cuda.is_available():
        raise InputError("--device_type cuda, but torch finds no GPU; use --device_type=cpu")
    if device_type == "mps" and not torch.backends.mps.is_available():
        raise InputError("--device_type mps, but torch finds no Apple GPU; use --device_type=cpu")
    rank, local_rank = int(os.environ.get("RANK", 0)), int(os.environ.get("LOCAL_RANK", 0))
    world_size = int(os.environ.get("WORLD_SIZE", 1))
    device = torch.device(device_type)
    if device_type == "cuda":
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")  # TF32 for what stays in fp32
    if "RANK" in os.environ and not dist.is_initialized():
        backend = "nccl" if device_type == "cuda" else "gloo"
        # an hour: a cold torch.compile on one rank must not trip the others' watchdog
        kwargs: dict[str, Any] = {"device_id": device} if device_type == "cuda" else {}
        dist.init_process_group(backend, timeout=timedelta(hours=1), **kwargs)
        dist.barrier()
    torch.manual_seed(seed)
    return Runtime(device, _compute_dtype(device_type), rank, local_rank, world_size)


def stop() -> None:
    """Leave the process group, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()


def all_reduce(x: torch.Tensor, op: str = "sum") -> torch.Tensor:
    """In place over all ranks ("sum", "max" or "mean"); the identity in a single process."""
    if dist.is_initialized():
        dist.all_reduce(x, op=dist.ReduceOp.MAX if op == "max" else dist.ReduceOp.SUM)
        if op == "mean":
            x /= dist.get_world_size()
    return x


def barrier() -> None:
    if dist.is_initialized():
        dist.barrier()


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def peak_flops(runtime: Runtime) -> float:
    """FLOP/s that one rank could reach: from the table on a GPU (infinity when unknown, so mfu reads 0);
    on a CPU the measured rate of a large matmul in the compute dtype, shared by the ranks of the machine."""
    if runtime.device.type == "cuda":
        name = torch.cuda.get_device_name(runtime.device).lower()
        for parts, flops in PEAK_FLOPS:
            if all(part in name for part in parts):
                return flops
        return float("inf")
    if runtime.device.type != "cpu":
        return float("inf")
    n = 1024
    a = torch.ones(n, n, dtype=runtime.dtype)
    a @ a
    best = float("inf")
    for _ in range(5):
        t0 = time.perf_counter()
        a @ a
        best = min(best, time.perf_counter() - t0)
    return 2 * n**3 / best


def peak_memory_mib(device: torch.device) -> float:
    """Peak memory of this process so far: allocated on the GPU, or resident on a CPU. MiB."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    import resource
    import sys

    kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return kib / (2**20 if sys.platform == "darwin" else 2**10)
