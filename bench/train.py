"""How fast a model trains here, against this machine's own matrix product.

    python -m bench.train --depths=4,6 --dtypes=float32,bfloat16           # a table; one JSON line at the end
    python -m bench.train --depths=12,20 --dtypes=bfloat16,fp8 --sequence_len=2048 --vocab_size=32768

tokens/s and mfu come from undisturbed steps. The shares come from a few more, in which the device is waited for after
every part: there the forward and backward passes' own rate stands beside that of a 2048^3 product, taken before and
after. Each row is measured in a process of its own, so that peak memory is that row's.
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from bench import common
from bench.common import Built, Plan, Setting
from bench.packed import Batch, tokenizer_for
from bench.results import finish, in_child, numbers, table, words
from nanochat import runtime
from nanochat.config import InputError, flag, run_cli
from nanochat.data.loader import PackingLoader
from nanochat.data.sources import open_source


@dataclass(frozen=True)
class TrainConfig:
    depths: str = flag("6", "layers")
    archs: str = flag("plain", "architectures")
    dtypes: str = flag("float32", "of the activations: float32, bfloat16, fp8")
    data: str | None = flag(None, "folder of text or source name; default: random tokens")
    steps: int = flag(10, "undisturbed steps that are timed")
    parted_steps: int = flag(4, "further steps whose parts are timed")
    vocab_size: int = flag(4096, "ids; with --data, of the tokenizer that is trained on it")
    sequence_len: int = flag(512, "context in tokens")
    tokens_per_step: int = flag(16_384, "tokens of an optimizer step")
    device_batch_size: int = flag(32, "rows of a forward pass")
    aspect_ratio: int | None = flag(None, "width per layer; default: the depth dial's")
    overrides: str = flag("", "hyper-parameters, e.g. extras=(lambdas,bigram)")
    compile: bool = flag(True, "torch.compile")
    device: str | None = flag(None, "cuda or cpu; default: the best there is")
    threads: int = flag(common.cores(), "of the CPU")
    matmul: int = flag(common.MATMUL, "side of the matrix product that the speed is compared with")
    isolate: bool = flag(True, "each row in a process of its own")

    def __post_init__(self) -> None:
        if min(self.parted_steps, self.matmul) < 1:
            raise InputError("--parted_steps and --matmul must be at least 1")
        if not words(self.archs) or not words(self.dtypes):
            raise InputError("--archs and --dtypes must name one each; try --archs=plain --dtypes=float32")


def stream(built: Built, vocab_size: int, data: str | None) -> Iterator[Batch]:
    """Batches without end: four of random tokens in turn, or the loader's."""
    plan, device = built.plan, built.rt.device
    if data is not None:
        source = open_source(data)
        tokenizer = tokenizer_for(source, vocab_size)
        rows, T = plan.device_batch_size, plan.sequence_len
        yield from PackingLoader(source, "train", tokenizer, batch_size=rows, sequence_len=T, device=device)
    shape = (4, plan.device_batch_size, plan.sequence_len + 1)
    ids = torch.randint(vocab_size, shape, generator=torch.Generator().manual_seed(0)).to(device)
    yield from itertools.cycle([(rows[:, :-1].contiguous(), rows[:, 1:].contiguous()) for rows in ids])


def measure(
    setting: Setting, plan: Plan, vocab_size: int, data: str | None, parted_steps: int, side: int
) -> dict[str, Any]:
    """Rates and shares of one setting; seconds, FLOP/s, MiB. `side`: of the product to compare with."""
    built = Built(setting, plan, vocab_size)
    rt, batches = built.rt, stream(built, vocab_size, data)
    accum = plan.tokens_per_step // (plan.device_batch_size * plan.sequence_len)

    def take() -> tuple[list[Batch], float]:
        t0 = time.perf_counter()
        taken = list(itertools.islice(batches, accum))
        return taken, time.perf_counter() - t0

    before = common.matmul_rate(rt, side)
    warmup = built.warm_up(take()[0])
    upcoming, _ = take()
    times, waits = [], []
    for step in range(plan.steps):
        runtime.synchronize(rt.device)
        t0 = time.perf_counter()
        loss = built.step(upcoming, step)
        upcoming, waited = take()  # while a GPU works, as in the training loop
        loss.item()
        runtime.synchronize(rt.device)
        times.append(time.perf_counter() - t0)
        waits.append(waited)
    parts = [_parts(built, take()[0], step) for step in range(parted_steps)]
    forward, backward, optimizer = (statistics.median(p[i] for p in parts) for i in range(3))
    after = common.matmul_rate(rt, side)
    wait, flops = statistics.median(waits), common.flops_per_token(built.config)
    rate = plan.tokens_per_step * plan.steps / sum(times)
    peak, parted = (before + after) / 2, wait + forward + backward + optimizer
    sheet = runtime.peak_flops(rt) if rt.device.type == "cuda" else None
    return {
        "tok_per_sec": rate,
        "median_step": statistics.median(times),
        "flops_per_token": flops,
        "matmul": [before, after],
        "mfu": 100 * flops * rate / peak,
        "mfu_of_data_sheet": 100 * flops * rate / sheet if sheet else None,
        "loader": 100 * wait / parted,
        "forward": 100 * forward / parted,
        "backward": 100 * backward / parted,
        "optimizer": 100 * optimizer / parted,
        "forward_backward_of_matmul": 100 * flops * plan.tokens_per_step / (forward + backward) / peak,
        "memory_mib": runtime.peak_memory_mib(rt.device),
        "warmup_seconds": warmup,
        "params": sum(p.numel() for p in built.model.parameters()),
    }


def _parts(built: Built, batches: Sequence[Batch], step: int) -> tuple[float, float, float]:
    """(forward, backward, optimizer) seconds of one step, the device waited for after each."""
    device = built.rt.device
    forward = backward = 0.0
    targets = sum(int((y != -1).sum()) for _, y in batches)
    runtime.synchronize(device)
    for x, y in batches:
        t0 = time.perf_counter()
        loss = built.forward(x, y, reduction="sum") / targets
        runtime.synchronize(device)
        t1 = time.perf_counter()
        loss.backward()
        runtime.synchronize(device)
        forward, backward = forward + t1 - t0, backward + time.perf_counter() - t1
    t0 = time.perf_counter()
    built.optimize(step, loss.detach())
    runtime.synchronize(device)
    return forward, backward, time.perf_counter() - t0


def show(rows: Sequence[dict[str, Any]]) -> None:
    """Rows of `measure` with depth, arch and dtype added."""
    head = "depth architecture dtype tokens/s ms/step mfu% of-data-sheet% FLOPs/token fwd+bwd-of-matmul%".split()
    head += "loader% forward% backward% optimizer% MiB compile-s matmul-before matmul-after".split()
    shares = ("loader", "forward", "backward", "optimizer")
    table(
        head,
        (
            [
                *(row["depth"], row["arch"], row["dtype"], f"{row['tok_per_sec']:,.0f}"),
                f"{1000 * row['median_step']:.1f}",
                f"{row['mfu']:.1f}",
                f"{row['mfu_of_data_sheet']:.1f}" if row["mfu_of_data_sheet"] else "",
                f"{row['flops_per_token']:.4g}",
                f"{row['forward_backward_of_matmul']:.1f}",
                *(f"{row[share]:.1f}" for share in shares),
                *(f"{row['memory_mib']:,.0f}", f"{row['warmup_seconds']:.0f}"),
                *(f"{rate / 1e9:,.0f}" for rate in row["matmul"]),
            ]
            for row in rows
        ),
    )


def run(cfg: TrainConfig) -> list[dict[str, Any]]:
    device = cfg.device or common.default_device()
    overrides = common.parse_overrides(cfg.overrides)
    if cfg.aspect_ratio is not None:
        overrides["aspect_ratio"] = cfg.aspect_ratio
    wanted = []
    for depth, arch, dtype in itertools.product(numbers("depths", cfg.depths, 1), words(cfg.archs), words(cfg.dtypes)):
        setting = Setting(depth, arch, 0, overrides)
        plan = Plan(
            cfg.steps,
            cfg.tokens_per_step,
            cfg.sequence_len,
            cfg.device_batch_size,
            dtype,
            cfg.compile,
            device,
            cfg.threads,
        )
        common.check(setting, plan, cfg.vocab_size)
        wanted.append((setting, plan))
    if cfg.data is not None:  # once, not in each row's process
        tokenizer_for(open_source(cfg.data), cfg.vocab_size)
    rows = []
    for setting, plan in wanted:
        work = partial(measure, setting, plan, cfg.vocab_size, cfg.data, cfg.parted_steps, cfg.matmul)
        found = in_child(work) if cfg.isolate else work()
        rows.append({"depth": setting.depth, "arch": setting.arch, "dtype": plan.dtype, **found})
        print(f"depth {setting.depth} {setting.arch} {plan.dtype}: {found['tok_per_sec']:,.0f} tokens/s", flush=True)
    print(f"{common.machine(wanted[0][1])}; matmul: GFLOP/s of a {cfg.matmul}^3 product in the row's dtype")
    show(rows)
    finish({"bench": "train", "machine": common.machine(wanted[0][1]), "rows": rows})
    return rows


def main(argv: Sequence[str] | None = None) -> None:
    run_cli(TrainConfig, run, argv, about=__doc__)


if __name__ == "__main__":
    main()
