"""Where we run: device, dtype, ranks, peak FLOPs. Only this module and `environment` read environment variables."""

from __future__ import annotations

import contextlib
import functools
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from nanochat.config import InputError

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}

# How long a rank waits for the others in a collective before the run ends: a cold torch.compile on one of them takes
# minutes, a first download an hour. NANOCHAT_TIMEOUT_MINUTES changes it.
TIMEOUT_MINUTES = 60.0

# On a CPU bf16 must be this much faster in a matmul than fp32, or what it loses in casts is not won back.
BF16_GAIN = 1.5
FP8_CAPABILITY = (8, 9)  # Ada and Hopper

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
    local_world_size: int = 1  # ranks on this node, which share its memory and cores

    @property
    def is_master(self) -> bool:
        return self.rank == 0


def autodetect_device() -> str:
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def given_dtype() -> torch.dtype | None:
    """NANOCHAT_DTYPE."""
    name = os.environ.get("NANOCHAT_DTYPE")
    if name is not None and name not in DTYPES:
        raise InputError(f"NANOCHAT_DTYPE={name} is not known; use one of {', '.join(DTYPES)}")
    return None if name is None else DTYPES[name]


def _compute_dtype(device_type: str, timed: bool = True) -> torch.dtype:
    if (given := given_dtype()) is not None:
        return given
    if device_type == "cuda" and torch.cuda.get_device_capability() >= (8, 0):
        return torch.bfloat16
    if device_type == "cpu" and timed and bf16_gain() >= BF16_GAIN:
        return torch.bfloat16
    return torch.float32


@functools.cache
def bf16_gain() -> float:
    """How many times as fast as in fp32 this CPU multiplies matrices in bf16: 2 to 4 with AVX512_BF16 or AMX, below 1
    where bf16 is emulated. Takes some 20 ms.

    On one thread and in turns, so that other work on the machine, which slows both, does not decide it. fp16 is never
    tried: no common CPU multiplies it faster than fp32.
    """
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        fp32, bf16 = matmul_seconds(384, (torch.float32, torch.bfloat16), repeats=12)
    finally:
        torch.set_num_threads(num_threads)
    return fp32 / bf16


def matmul_seconds(n: int, dtypes: tuple[torch.dtype, ...], repeats: int) -> list[float]:
    """The best time of an n x n x n matmul in each dtype, tried in turns, after one that warms up."""
    best = [float("inf")] * len(dtypes)
    matrices = [torch.ones(n, n, dtype=dtype) for dtype in dtypes]
    for repeat in range(repeats + 1):
        for i, a in enumerate(matrices):
            t0 = time.perf_counter()
            a @ a
            if repeat:
                best[i] = min(best[i], time.perf_counter() - t0)
    return best


def require_fp8(runtime: Runtime) -> None:
    """
    Raises:
        InputError: this device does not multiply in fp8.
    """
    if runtime.device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(runtime.device)
        if (major, minor) >= FP8_CAPABILITY:
            return
        have = f"{torch.cuda.get_device_name(runtime.device)} has {major}.{minor}"
    else:
        have = f"this run is on {runtime.device.type}"
    needed = ".".join(map(str, FP8_CAPABILITY))
    raise InputError(f"--fp8 needs a GPU of compute capability {needed} or more, and {have}; leave it out")


def start(device_type: str | None = None, seed: int = 42, deterministic: bool = False) -> Runtime:
    """Pick the device, join the process group when launched by torchrun, seed torch.

    Args:
        deterministic: the same command gives the same result to the bit on the same machine: no kernel that adds in
            the order of arrival, and no dtype that was chosen by timing (a CPU computes in fp32 unless NANOCHAT_DTYPE
            says otherwise).

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
    local_world_size = int(os.environ.get("LOCAL_WORLD_SIZE", world_size))  # a launcher without it knows one node
    device = torch.device(device_type)
    if device_type == "cuda":
        num_gpus = torch.cuda.device_count()
        if local_rank >= num_gpus:
            raise InputError(
                f"{local_world_size} ranks on this node, but it has {num_gpus} GPUs; use --nproc_per_node={num_gpus}"
            )
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")  # TF32 for what stays in fp32
    if "RANK" in os.environ and not dist.is_initialized():
        backend = "nccl" if device_type == "cuda" else "gloo"
        kwargs: dict[str, Any] = {"device_id": device} if device_type == "cuda" else {}
        dist.init_process_group(backend, timeout=timeout(), **kwargs)
        dist.barrier()
    torch.manual_seed(seed)
    torch.use_deterministic_algorithms(deterministic)
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # asked for by cuBLAS; read at its first use
    dtype = _agreed(_compute_dtype(device_type, timed=not deterministic), device)
    return Runtime(device, dtype, rank, local_rank, world_size, local_world_size)


def timeout() -> timedelta:
    """How long a collective waits for a rank.

    Raises:
        InputError: NANOCHAT_TIMEOUT_MINUTES is no time.
    """
    text = os.environ.get("NANOCHAT_TIMEOUT_MINUTES", str(TIMEOUT_MINUTES))
    try:
        minutes = timedelta(minutes=float(text))
        if minutes > timedelta(0):
            return minutes
    except (ValueError, OverflowError):
        pass
    raise InputError(
        f"NANOCHAT_TIMEOUT_MINUTES={text} is no number of minutes above 0; unset it for {TIMEOUT_MINUTES:.0f}"
    )


def _agreed(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """The master's dtype, on all ranks: nodes may differ, and probes at their limit too."""
    if not dist.is_initialized():
        return dtype
    known = list(DTYPES.values())
    index = torch.tensor(known.index(dtype), device=device)
    dist.broadcast(index, src=0)
    return known[int(index)]


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
    return _cpu_flops(runtime.dtype)


@functools.cache
def _cpu_flops(dtype: torch.dtype) -> float:
    """The best rate over sizes: what fits a core's cache is fastest on a busy machine, large ones on a quiet one."""
    sizes = ((512, 5), (1024, 5), (2048, 3))
    return max(2 * n**3 / matmul_seconds(n, (dtype,), repeats)[0] for n, repeats in sizes)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed: torch's own error on GPUs, a plain RuntimeError of its CPU allocator."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or (
        isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
    )


@contextlib.contextmanager
def memory_advice(rows: int | None, otherwise: str = "a base model of fewer layers") -> Iterator[None]:
    """End an allocation that fails in training with the flags that fit.

    Args:
        rows: of the pass; half of them are the first advice. None = there has been no pass.
        otherwise: the advice where no row can be left out.

    Raises:
        InputError: out of memory.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        fewer = next((n for n in range(rows // 2, 0, -1) if rows % n == 0), None) if rows else None
        way_out = f"--device_batch_size={fewer}" if fewer else otherwise
        where = f" with {rows} rows a pass" if rows else ""
        raise InputError(f"out of memory{where}; try {way_out}") from None


def available_memory(runtime: Runtime) -> float:
    """Bytes that this rank may still take: free on its GPU, or its share of the node's free memory, where a cgroup
    (a container, a job of a scheduler) may allow less than the machine has. The least over all ranks."""
    if runtime.device.type == "cuda":
        free = float(torch.cuda.mem_get_info(runtime.device)[0])
    else:
        import psutil

        free = min(float(psutil.virtual_memory().available), _cgroup_free(Path("/sys/fs/cgroup"), _cgroups()))
        free /= runtime.local_world_size
    least = torch.tensor(-free, dtype=torch.float32, device=runtime.device)  # MPS has no fp64
    return -all_reduce(least, "max").item()


def _cgroups() -> str:
    try:
        return Path("/proc/self/cgroup").read_text()
    except OSError:  # no Linux
        return ""


def _cgroup_free(root: Path, membership: str) -> float:
    """Bytes that the process's control group and those around it leave; infinity without a limit. Cached files count
    as used there, yet are given up on demand.

    Args:
        membership: text of /proc/self/cgroup: lines `id:controllers:path`, of version 1 or (no controllers) 2.
    """
    free = float("inf")
    for line in membership.splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            top, limit, used = root, "memory.max", "memory.current"
        elif "memory" in controllers.split(","):
            top, limit, used = root / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes"
        else:
            continue
        group = top / path.strip("/")
        for folder in (group, *group.parents):
            if not folder.is_relative_to(top):
                break
            try:
                stat = dict(entry.split() for entry in (folder / "memory.stat").read_text().splitlines())
                taken = int((folder / used).read_text()) - int(stat.get("inactive_file", 0))
                free = min(free, float(int((folder / limit).read_text()) - taken))
            except (OSError, ValueError):  # no such group here, or no limit: "max"
                continue
    return free


def peak_memory_mib(device: torch.device) -> float:
    """Peak memory of this process so far: allocated on the GPU, or resident on a CPU. MiB."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    import resource
    import sys

    kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return kib / (2**20 if sys.platform == "darwin" else 2**10)
