"""Bits per byte of a base model on the training and validation text, and seven sample completions.

    python -m scripts.base_loss --device_batch_size=4 --split_tokens=65536
    torchrun --nproc_per_node=8 -m scripts.base_loss

Reads base_checkpoints/<tag>/ and the data set that the model was trained on.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from nanochat import checkpoint, environment, runtime
from nanochat.config import InputError, flag, report_config, run_cli
from nanochat.data.loader import PackingLoader
from nanochat.data.sources import Source, open_source
from nanochat.evals.bpb import evaluate_bpb
from nanochat.evals.samples import sample_texts
from nanochat.report import get_report


@dataclass(frozen=True)
class BaseLossConfig:
    device_batch_size: int = flag(32, "rows a forward pass and rank", new=True)
    split_tokens: int = flag(20 * 524288, "tokens to evaluate of each split", new=True)
    model_tag: str | None = flag(None, "checkpoint tag; None = the deepest model", off="None", new=True)
    model_step: int | None = flag(None, "checkpoint step; None = the last", off="None", new=True)
    device_type: str | None = flag(None, "cuda, mps or cpu; empty = the best there is", off="", new=True)

    def __post_init__(self) -> None:
        for name in ("device_batch_size", "split_tokens"):
            if getattr(self, name) < 1:
                raise InputError(f"--{name} {getattr(self, name)} must be at least 1")


def num_batches(split_tokens: int, device_batch_size: int, sequence_len: int, world_size: int) -> int:
    """Forward passes of each rank.

    Raises:
        InputError: the tokens do not divide; the message gives the nearest number that does.
    """
    per_pass = device_batch_size * sequence_len * world_size
    if split_tokens % per_pass:
        nearest = max(1, round(split_tokens / per_pass)) * per_pass
        raise InputError(
            f"--split_tokens {split_tokens} is no multiple of the {per_pass} tokens of one pass "
            f"({device_batch_size} rows x {sequence_len} tokens x {world_size} ranks); try {nearest}"
        )
    return split_tokens // per_pass


def split_bpb(
    model: Any, tokenizer: Any, rt: runtime.Runtime, source: Source, split: str, cfg: BaseLossConfig
) -> float:
    T = model.config.sequence_len
    loader = PackingLoader(
        source,
        split,
        tokenizer,
        batch_size=cfg.device_batch_size,
        sequence_len=T,
        rank=rt.rank,
        world_size=rt.world_size,
        device=rt.device,
    )
    n = num_batches(cfg.split_tokens, cfg.device_batch_size, T, rt.world_size)
    bpb = evaluate_bpb(model, itertools.islice(loader, n), tokenizer.token_bytes().to(rt.device))
    loader.close()
    return bpb


def run(cfg: BaseLossConfig) -> dict[str, Any]:
    rt = runtime.start(cfg.device_type)
    model, tokenizer, meta = checkpoint.load_model("base", rt, cfg.model_tag, cfg.model_step)
    model.eval()
    num_batches(cfg.split_tokens, cfg.device_batch_size, model.config.sequence_len, rt.world_size)
    dataset = meta["user_config"]["dataset"]
    source = open_source(dataset, bad_shards=meta["user_config"].get("bad_shards", "stop"))
    results: dict[str, Any] = {}
    for split in ("train", "val"):
        results[f"{split} bpb"] = split_bpb(model, tokenizer, rt, source, split, cfg)
        environment.print0(f"{split} bpb: {results[f'{split} bpb']:.4f}")
    if rt.is_master:
        for i, text in enumerate(sample_texts(model, tokenizer)):
            results[f"sample {i}"] = text
            print(text)
    new = {"Model": f"base_model (step {meta['step']})", "dataset": dataset}
    get_report().log("Base model loss", [results, new, *report_config(cfg)])
    runtime.stop()
    return results


def main(argv: Sequence[str] | None = None) -> None:
    run_cli(BaseLossConfig, run, argv, about=__doc__)


if __name__ == "__main__":
    main()
