"""The loader: tokens a second against what an H100 takes, text wasted, and where the time goes.

    python -m bench.loader --dataset=FOLDER                   # all cores of this process, a tokenizer made on the spot
    python -m bench.loader --dataset=FOLDER --cores=1 --vocab_size=None --device=cuda    # the base dir's tokenizer

The rate is that of batches on the device, from reading to int64 targets, over whole blocks in the steady state, with
a consumer that only waits. Every rank tokenises the text of all ranks: --world_size=8 gives the rate of one of
eight. Times of single parts are CPU seconds of one thread, so that other programs do not count. Needs no network.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch

from nanochat import scaling
from nanochat.config import REQUIRED, InputError, flag, run_cli
from nanochat.data.loader import PackingLoader, encode_threads, packed_unit, packed_units
from nanochat.data.sources import Source, open_source
from nanochat.tokenizer import Tokenizer, check_vocab_size, get_tokenizer

LENGTHS = (512, 1024, 2048)
H100_FLOPS = 989e12  # dense bf16, vendor's data sheet
H100_MFU = 0.55
H100_DEPTH, H100_VOCAB, H100_SEQUENCE = 12, 32_768, 2048
TARGET_CORES = 8
WARM_UP_UNITS = 4  # more than wait in the queue


@dataclass(frozen=True)
class BenchConfig:
    dataset: str = flag(REQUIRED, "a folder of text, or the name of a source")
    vocab_size: int | None = flag(32_768, "ids of a tokenizer trained on the first blocks; None = the base dir's")
    cores: int | None = flag(None, "bind the process to so many cores; None = to those it has")
    max_seq_len: int = flag(2048, "row length of the rate")
    device_batch_size: int = flag(32, "rows a batch of the rate")
    world_size: int = flag(1, "ranks among which batches are shared; the rate is that of one")
    device: str = flag("cpu", "where batches go: cpu, cuda or cuda:N")
    seconds: float = flag(5.0, "how long the rate is measured at least")
    blocks: int = flag(8, "blocks (of about 1,024 documents) packed for the waste and the times")

    def __post_init__(self) -> None:
        available = len(os.sched_getaffinity(0))
        if self.cores is not None and not 1 <= self.cores <= available:
            raise InputError(f"--cores {self.cores}: this process has 1 to {available}; try --cores={available}")
        for name in ("max_seq_len", "device_batch_size", "world_size", "blocks"):
            if getattr(self, name) < 1:
                raise InputError(f"--{name} {getattr(self, name)} must be at least 1; try --{name}=1")
        if self.device.split(":")[0] not in ("cpu", "cuda"):
            raise InputError(f"--device {self.device} is neither cpu nor cuda nor cuda:N; try --device=cpu")
        if self.device != "cpu" and not torch.cuda.is_available():
            raise InputError(f"--device {self.device}: PyTorch finds no GPU; try --device=cpu")
        if self.vocab_size is not None:
            check_vocab_size(self.vocab_size)


def h100_tokens_per_second() -> float:
    """What one H100 trains on a second at depth 12: peak FLOP/s x mfu / FLOPs a token."""
    shape = scaling.shape_from_depth(H100_DEPTH, H100_VOCAB, H100_SEQUENCE)
    return H100_FLOPS * H100_MFU / shape.flops_per_token


def tokens_per_second(source: Source, tokenizer: Any, cfg: BenchConfig) -> float:
    """Targets a second that one rank gets, from the end of one block to that of another."""
    loader = PackingLoader(
        source,
        "train",
        tokenizer,
        batch_size=cfg.device_batch_size,
        sequence_len=cfg.max_seq_len,
        world_size=cfg.world_size,
        device=cfg.device,
    )
    units = batches = 0
    block, start = None, 0.0
    for _ in loader:
        batches += 1
        now = (loader.cursor["epoch"], loader.cursor["block"])
        if now == block:
            continue
        units, block = units + 1, now
        if units <= WARM_UP_UNITS:
            batches, start = 0, time.perf_counter()
        elif time.perf_counter() - start >= cfg.seconds:
            break
    if cfg.device != "cpu":
        torch.cuda.synchronize(cfg.device)
    seconds = time.perf_counter() - start
    loader.close()
    return batches * cfg.device_batch_size * cfg.max_seq_len / seconds


def waste(source: Source, tokenizer: Any, sequence_len: int, blocks: int) -> tuple[float, float]:
    """(% of the text's tokens that no row shows, % of the rows' slots that are BOS) in the first units."""
    num_threads = encode_threads(1)
    stream = packed_units(source, "train", tokenizer, sequence_len, 0, 0, False, num_threads, torch.device("cpu"))
    units = list(islice(stream, blocks))
    kept = sum(unit.num_kept for unit in units)
    slots = sum(int((unit.rows >= 0).sum()) for unit in units)
    return 100 * (1 - kept / sum(unit.num_text for unit in units)), 100 * (1 - kept / slots)


def seconds_per_million(source: Source, tokenizer: Any, blocks: int) -> dict[str, float]:
    """CPU seconds of one thread for a million tokens: reading, tokenising, packing at each length."""
    seconds = dict.fromkeys(("reading", "tokenising", *(f"packing at {T}" for T in LENGTHS)), 0.0)
    tokens = 0
    for block in range(min(blocks, source.num_blocks("train"))):
        at = time.thread_time()
        texts = source.read_block("train", block)
        seconds["reading"] += time.thread_time() - at
        at = time.thread_time()
        ids = tokenizer.encode_to_arrays(texts, prepend=tokenizer.get_bos_token_id(), num_threads=1)
        seconds["tokenising"] += time.thread_time() - at
        documents = [doc for doc in ids if len(doc) > 1]
        tokens += sum(map(len, documents))
        for T in LENGTHS if documents else ():
            at = time.thread_time()
            packed_unit(documents, T + 1, 0, block, False, torch.device("cpu"))
            seconds[f"packing at {T}"] += time.thread_time() - at
    if not tokens:
        raise InputError(f"the first {blocks} blocks of {source.name} have no text; try --blocks={2 * blocks}")
    return {name: 1e6 * value / tokens for name, value in seconds.items()}


def measure(cfg: BenchConfig) -> dict[str, Any]:
    """Print the table and one JSON line, and return what the line has."""
    source = open_source(cfg.dataset)
    if cfg.vocab_size is None:
        tokenizer = get_tokenizer()
    else:
        blocks = range(min(cfg.blocks, source.num_blocks("train")))
        texts = (text for block in blocks for text in source.read_block("train", block))
        tokenizer = Tokenizer.train_from_iterator(texts, cfg.vocab_size)
    cores, h100 = len(os.sched_getaffinity(0)), h100_tokens_per_second()
    parts = seconds_per_million(source, tokenizer, cfg.blocks)
    wasted = {T: waste(source, tokenizer, T, cfg.blocks) for T in LENGTHS}
    load = os.getloadavg()[0]  # of the minute before: what else this machine was doing
    rate = tokens_per_second(source, tokenizer, cfg)
    ratio = rate / h100
    assumption = (
        f"H100: {H100_FLOPS / 1e12:.0f} TFLOP/s, {H100_MFU:.0%} mfu, depth {H100_DEPTH}, vocabulary {H100_VOCAB:,}, "
        f"T {H100_SEQUENCE:,}: {h100:,.0f} tokens/s"
    )
    name = f"ratio_{TARGET_CORES}_cores" + ("" if cores == TARGET_CORES else f"_extrapolated_linearly_from_{cores}")
    result = {
        "bench": "loader",
        "dataset": source.name,
        "device": torch.cuda.get_device_name(cfg.device) if cfg.device != "cpu" else "cpu",
        "vocab_size": tokenizer.get_vocab_size(),
        "max_seq_len": cfg.max_seq_len,
        "device_batch_size": cfg.device_batch_size,
        "world_size": cfg.world_size,
        "cores": cores,
        "encode_threads": encode_threads(cfg.world_size),
        "load_average": round(load, 1),
        "tokens_per_second": round(rate),
        "assumption": assumption,
        "ratio": round(ratio, 2),
        name: round(ratio * TARGET_CORES / cores, 2),
        "waste_percent": {T: round(percent, 3) for T, (percent, _) in wasted.items()},
        "bos_percent_of_slots": {T: round(percent, 3) for T, (_, percent) in wasted.items()},
        "cpu_ms_per_million_tokens": {part: round(1000 * value, 2) for part, value in parts.items()},
        "tokenising_over_packing": {
            T: round(parts["tokenising"] / parts[f"packing at {T}"], 1) for T in LENGTHS if parts[f"packing at {T}"]
        },
    }
    print(f"{source.name}, {result['vocab_size']:,} ids, rows of {cfg.max_seq_len:,}, {cores} cores, load {load:.1f}")
    print(f"{rate:,.0f} tokens/s for one rank of {cfg.world_size}: {ratio:.1f}x one H100 ({assumption})")
    print(f"{name.replace('_', ' ')}: {result[name]} (target: 3 or more)\n")
    print("| T | text wasted, % | BOS, % of slots | packing, CPU ms per M tokens | tokenising is ... as long |")
    print("|---:|---:|---:|---:|---:|")
    for T, (percent, bos) in wasted.items():
        packing = parts[f"packing at {T}"]
        times = f"{parts['tokenising'] / packing:.1f}x" if packing else "-"
        print(f"| {T} | {percent:.3f} | {bos:.2f} | {1000 * packing:.2f} | {times} |")
    print(f"\nreading {1000 * parts['reading']:.1f}, tokenising {1000 * parts['tokenising']:.1f} CPU ms per M tokens")
    print(json.dumps(result), flush=True)
    return result


def run(cfg: BenchConfig) -> dict[str, Any]:
    """measure() on the cores that were asked for; threads started in it are bound like it."""
    before = os.sched_getaffinity(0)
    if cfg.cores is not None:
        os.sched_setaffinity(0, sorted(before)[: cfg.cores])
    try:
        return measure(cfg)
    finally:
        os.sched_setaffinity(0, before)


def main(argv: Sequence[str] | None = None) -> None:
    run_cli(BenchConfig, run, argv, about=__doc__)


if __name__ == "__main__":
    main()
