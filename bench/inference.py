"""Prefill and decoding of the engine against this machine's memory bandwidth and against a plain loop.

    python -m bench.inference --depth=8                       # a table; one JSON line at the end
    python -m bench.inference --depth=8 --weights=bfloat16,int8 --batch=1,8,32

A decoding step has to read every weight of the matrices once: `bandwidth%` is what that comes to of the rate at which
the same threads add up 256 MiB. The plain loop is the model's own forward with a KV cache, a token at a time in eager
mode, for one row: `plain` with weights in the same dtype, `as loaded` with the checkpoint's fp32 weights, cast at each
use. All are timed in turns. The model is random, answers are greedy and do not end early.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from bench import common
from bench.common import Plan, Setting
from bench.results import finish, numbers, table, words
from nanochat.config import InputError, flag, run_cli
from nanochat.cuda_graphs import WARM_STEPS as GRAPH_WARM_STEPS
from nanochat.cuda_graphs import GraphDecoder, cuda_recorder
from nanochat.engine import Engine
from nanochat.gpt import GPT
from nanochat.quantize import QUANTIZED, Int8Linear, quantize_int8
from nanochat.runtime import DTYPES
from nanochat.sampling import Sampling
from nanochat.tokenizer import Tokenizer

READ_BYTES = 256 << 20  # far more than any cache
WARM_STEPS = 8  # a GPU's steps are recorded in them


@dataclass(frozen=True)
class InferenceConfig:
    depth: int = flag(8, "layers")
    arch: str = flag("plain", "architecture")
    weights: str = flag(
        "", "dtypes of the weights, among them int8; empty = what the machine is fast in, and int8 on a CPU"
    )
    batch: str = flag("1,8,32", "rows that decode together")
    prompt: int = flag(128, "tokens of a prompt")
    new: int = flag(48, "tokens decoded in a turn")
    repeats: int = flag(5, "turns")
    vocab_size: int = flag(65_536, "ids")
    sequence_len: int = flag(1024, "context in tokens")
    device: str | None = flag(None, "cuda or cpu; default: the best there is")
    threads: int = flag(common.cores(), "of the CPU")

    def __post_init__(self) -> None:
        if self.new < 1 or self.repeats < 1 or self.prompt < 1:
            raise InputError("--prompt, --new and --repeats must be at least 1")
        numbers("batch", self.batch, 1)
        if self.prompt + self.new + WARM_STEPS > self.sequence_len:
            raise InputError(
                f"--prompt {self.prompt} and --new {self.new} do not fit --sequence_len {self.sequence_len}"
            )

    @cached_property
    def plan(self) -> Plan:
        device = self.device or common.default_device()
        T = self.sequence_len
        return Plan(1, T, T, 1, common.default_dtype(device), compile=False, device=device, threads=self.threads)


def build(cfg: InferenceConfig, dtype: torch.dtype, cast: bool = True) -> GPT:
    """A random model, the same each time; as trained ones, no matrix of it is zero."""
    rt = common.start(cfg.plan)
    config, _ = common.resolve(Setting(cfg.depth, cfg.arch), cfg.vocab_size, cfg.sequence_len, cfg.sequence_len, 1)
    torch.manual_seed(0)
    model = GPT(config)
    model.init_weights()
    for parameter in model.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, 0.0, 0.02)
    model.requires_grad_(False).eval().prepare(rt.device, dtype)
    return model.to(dtype) if cast else model


def read_bytes(model: GPT) -> int:
    """Of the matrices, all of which a step needs; of the embeddings it needs a row."""
    total = 0
    for module in model.modules():
        if isinstance(module, Int8Linear):
            total += module.integers.numel() + 4 * module.scales.numel()
        elif isinstance(module, torch.nn.Linear):
            total += module.weight.numel() * module.weight.itemsize
    return total


def seconds_of(work: Callable[[], Any], device: torch.device) -> float:
    began = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - began


class Decoding:
    """An engine with as many running rows as wanted, from which stretches of steps are timed."""

    def __init__(self, model: GPT, tokenizer: Tokenizer, cfg: InferenceConfig, rows: int) -> None:
        self.model, self.cfg, self.rows = model, cfg, rows
        self.engine = Engine(model, tokenizer)
        self.engine.terminal = set()  # answers go on
        self.engine.vocab_size = cfg.vocab_size  # the tokenizer is not asked
        self.prompts = torch.randint(0, cfg.vocab_size, (rows, cfg.prompt), generator=torch.Generator().manual_seed(1))

    def turn(self) -> tuple[float, float]:
        """(seconds of prefill, seconds of `new` steps)."""
        engine, cfg = self.engine, self.cfg
        greedy = Sampling(temperature=0.0)
        for prompt in self.prompts.tolist():
            engine.submit(prompt, max_tokens=cfg.new + WARM_STEPS + cfg.prompt, sampling=greedy)

        def prefill() -> None:
            while len(engine.slots.running) < self.rows:
                engine.step()

        filling = seconds_of(prefill, self.model.device)
        for _ in range(WARM_STEPS):
            engine.step()
        decoding = seconds_of(lambda: [engine.step() for _ in range(cfg.new)], self.model.device)
        for row in list(engine.slots.live):
            engine.cancel(row)
        engine.release()
        return filling, decoding


@torch.inference_mode()
def plain_loop(model: GPT, prompt: Tensor, new: int) -> float:
    """Seconds of `new` tokens of one row, written as one would write it first."""
    cache = model.new_cache(1, prompt.size(1) + new + WARM_STEPS)
    idx = model(prompt, cache=cache)[:, -1].argmax(-1, keepdim=True)
    for _ in range(WARM_STEPS):
        idx = model(idx, cache=cache)[:, -1].argmax(-1, keepdim=True)
    began = time.perf_counter()
    for _ in range(new):
        idx = model(idx, cache=cache)[:, -1].argmax(-1, keepdim=True)
        int(idx)
    return time.perf_counter() - began


def bandwidth(buffer: Tensor) -> float:
    """Bytes a second, the best of three readings."""
    return buffer.numel() * buffer.itemsize / min(seconds_of(buffer.sum, buffer.device) for _ in range(3))


def measure(cfg: InferenceConfig, weights: str, tokenizer: Tokenizer) -> list[dict[str, Any]]:
    dtype = DTYPES[cfg.plan.dtype if weights == "int8" else weights]
    model, loaded = build(cfg, dtype), build(cfg, dtype, cast=False)
    plain = build(cfg, dtype)  # not quantized
    if weights == "int8":
        quantize_int8(model)
    buffer = torch.zeros(READ_BYTES // 4, device=model.device)
    batches = [Decoding(model, tokenizer, cfg, rows) for rows in numbers("batch", cfg.batch)]
    prompt = batches[0].prompts[:1].to(model.device)
    turns: list[dict[str, Any]] = []
    for _ in range(cfg.repeats):
        turn: dict[str, Any] = {"read": bandwidth(buffer)}
        turn["plain"], turn["loaded"] = plain_loop(plain, prompt, cfg.new), plain_loop(loaded, prompt, cfg.new)
        for batch in batches:
            turn[batch.rows] = batch.turn()
        turns.append(turn)
    median = {key: statistics.median(t[key] for t in turns) for key in ("read", "plain", "loaded")}
    lines = []
    for batch in batches:
        prefill, decode = (statistics.median(t[batch.rows][i] for t in turns) for i in (0, 1))
        step = decode / cfg.new
        lines.append(
            {
                "weights": weights,
                "rows": batch.rows,
                "prefill_tokens_per_second": batch.rows * cfg.prompt / prefill,
                "decode_tokens_per_second": batch.rows / step,
                "ms_per_step": 1e3 * step,
                "bandwidth_share": statistics.median(
                    read_bytes(model) * cfg.new / t[batch.rows][1] / t["read"] for t in turns
                ),
                "over_plain": batch.rows * median["plain"] / decode,
                "over_loaded": batch.rows * median["loaded"] / decode,
                "read_gb_per_second": median["read"] / 1e9,
                "weight_bytes": read_bytes(model),
            }
        )
    return lines


@torch.inference_mode()
def check_graphs(cfg: InferenceConfig, rows: int) -> dict[str, Any]:
    """Logits of recorded steps against the model's own steps, in one cache and then another."""
    model = build(cfg, DTYPES[cfg.weights])
    # what cannot be recorded on a CPU is run again, which tries the rest of it
    is_cuda = model.device.type == "cuda"
    decoder = GraphDecoder(model, rows, cuda_recorder if is_cuda else lambda: lambda run: run)
    prompts = torch.randint(0, cfg.vocab_size, (rows, cfg.prompt), generator=torch.Generator().manual_seed(1))
    errors, recordings = [], 0
    for _ in range(2):
        caches = [model.new_cache(rows, cfg.sequence_len) for _ in range(2)]
        logits = [model(prompts.to(model.device), cache=cache)[:, -1] for cache in caches]
        for length in range(cfg.prompt, cfg.prompt + 2 * GRAPH_WARM_STEPS):
            idx = logits[1].argmax(-1)
            views = [cache.at(range(rows), [length] * rows) for cache in caches]
            logits = [decoder.step(idx, views[0]), model(idx[:, None], cache=views[1])[:, -1]]
            errors.append(float((logits[0] - logits[1]).norm() / logits[1].norm()))
        recordings += len(decoder.recordings)
    return {"error": max(errors), "recordings": recordings}


def measure_all(cfg: InferenceConfig) -> list[dict[str, Any]]:
    wanted = words(cfg.weights) or [cfg.plan.dtype, *(["int8"] if cfg.plan.device == "cpu" else [])]
    for weights in wanted:
        if weights not in (*DTYPES, *QUANTIZED):
            raise InputError(f"--weights {weights} is not known; use some of {', '.join((*DTYPES, *QUANTIZED))}")
    common.check(Setting(cfg.depth, cfg.arch), cfg.plan, cfg.vocab_size)
    tokenizer = Tokenizer.train_from_iterator(["a text that only gives names to ids"], 265 + 9)
    return [line for weights in wanted for line in measure(cfg, weights, tokenizer)]


def show(lines: list[dict[str, Any]]) -> None:
    alone = {line["weights"]: line["decode_tokens_per_second"] for line in reversed(lines) if line["rows"] == 1}
    table(
        [
            "weights",
            "MB",
            "rows",
            "prefill-tok/s",
            "decode-tok/s",
            "ms/step",
            "bandwidth%",
            "x-plain",
            "x-as-loaded",
            "x-1-row",
        ],
        [
            [
                line["weights"],
                f"{line['weight_bytes'] / 1e6:.0f}",
                line["rows"],
                f"{line['prefill_tokens_per_second']:,.0f}",
                f"{line['decode_tokens_per_second']:,.0f}",
                f"{line['ms_per_step']:.2f}",
                f"{100 * line['bandwidth_share']:.0f}",
                f"{line['over_plain']:.2f}",
                f"{line['over_loaded']:.2f}",
                f"{line['decode_tokens_per_second'] / alone[line['weights']]:.2f}" if line["weights"] in alone else "",
            ]
            for line in lines
        ],
    )


def run(cfg: InferenceConfig) -> dict[str, Any]:
    lines = measure_all(cfg)
    print(f"{common.machine(cfg.plan)}; depth {cfg.depth}, {cfg.arch}, {cfg.vocab_size:,} ids")
    show(lines)
    result = {
        "bench": "inference",
        "machine": common.machine(cfg.plan),
        "depth": cfg.depth,
        "arch": cfg.arch,
        "rows": lines,
    }
    finish(result)
    return result


def main(argv: Sequence[str] | None = None) -> None:
    run_cli(InferenceConfig, run, argv, about=__doc__)


if __name__ == "__main__":
    main()
