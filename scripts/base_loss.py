"""Bits per byte of a base model on the training and validation text, and seven sample completions.

    python -m scripts.base_loss --device_batch_size=4 --split_tokens=65536
    torchrun --nproc_per_node=8 -m scripts.base_loss
    python -m scripts.base_loss --exact --stride=256       # whole documents, each token once, with context before it
    python -m scripts.base_loss --quantize=int8            # and what weights of 8 bits cost

Reads base_checkpoints/<tag>/ and the data set that the model was trained on. Rows of packed text as in training, or
--exact: document by document, and by source.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from nanochat import checkpoint, environment, runtime
from nanochat.config import InputError, flag, report_config, run_cli
from nanochat.data.loader import PackingLoader
from nanochat.data.sources import ParquetSource, Source, open_source
from nanochat.data.textfiles import TextFiles
from nanochat.evals.bpb import evaluate_bpb, evaluate_documents
from nanochat.evals.samples import sample_texts
from nanochat.gpt import GPTConfig
from nanochat.quantize import QUANTIZED, quantize_int8
from nanochat.report import get_report


@dataclass(frozen=True)
class BaseLossConfig:
    device_batch_size: int = flag(32, "rows a forward pass and rank", new=True)
    split_tokens: int = flag(20 * 524288, "tokens to evaluate of each split", new=True)
    model_tag: str | None = flag(None, "checkpoint tag; None = the deepest model", off="None", new=True)
    model_step: int | None = flag(None, "checkpoint step; None = the last", off="None", new=True)
    device_type: str | None = flag(None, "cuda, mps or cpu; empty = the best there is", off="", new=True)
    exact: bool = flag(False, "whole documents up to split_tokens, each token once, instead of packed rows", new=True)
    max_seq_len: int | None = flag(None, "row length; -1 = the model's", off=-1, new=True)
    stride: int | None = flag(None, "with --exact: tokens between windows; -1 = max_seq_len", off=-1, new=True)
    quantize: str | None = flag(
        None, "also with such weights, on the validation text", choices=QUANTIZED, off="", new=True
    )

    def __post_init__(self) -> None:
        for name in ("device_batch_size", "split_tokens", "max_seq_len", "stride"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise InputError(f"--{name} {getattr(self, name)} must be at least 1; try --{name}=1")
        if self.stride is not None and not self.exact:
            raise InputError(f"--stride {self.stride} is for whole documents; add --exact")


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


def row_length(cfg: BaseLossConfig, config: GPTConfig) -> int:
    """
    Raises:
        InputError: longer than the model can see, or a stride beyond it.
    """
    T = cfg.max_seq_len or config.sequence_len
    if T > config.max_positions:
        raise InputError(f"--max_seq_len {T} is beyond the model's positions; try {config.max_positions}")
    if cfg.stride is not None and cfg.stride > T:
        raise InputError(f"--stride {cfg.stride} would leave out tokens between rows of {T}; try {T}")
    return T


def packed_bpb(
    model: Any, tokenizer: Any, rt: runtime.Runtime, source: Source, split: str, cfg: BaseLossConfig
) -> dict[str, Any]:
    T = row_length(cfg, model.config)
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
    with contextlib.closing(loader):
        n = num_batches(cfg.split_tokens, cfg.device_batch_size, T, rt.world_size)
        return {f"{split} bpb": evaluate_bpb(model, loader, tokenizer.token_bytes().to(rt.device), n)}


def exact_bpb(
    model: Any, tokenizer: Any, rt: runtime.Runtime, source: Source, split: str, cfg: BaseLossConfig
) -> dict[str, Any]:
    """The value; then what it is over, and that of each source where there are several."""
    T = row_length(cfg, model.config)
    found = evaluate_documents(
        model,
        tokenizer,
        rt,
        documents(source, split),
        T,
        cfg.stride,
        cfg.device_batch_size,
        cfg.split_tokens,
    )
    by_source = {f"{split} bpb of {name}": bpb for name, bpb in found.by_source.items()}
    return {
        f"{split} bpb": found.bpb,
        f"{split} text": f"{found.num_documents:,} documents, {found.num_bytes:,} bytes",
        **(by_source if len(by_source) > 1 else {}),
    }


def documents(source: Source, split: str) -> Iterator[tuple[str, str]]:
    """(where it is from, text) of each document: the file; or the data set, where it has no files."""
    for i in range(source.num_blocks(split)):
        texts = source.read_block(split, i)
        if isinstance(source, TextFiles):
            names = source.origins(split, i)
        else:
            names = [source.blocks[split][i][0].name if isinstance(source, ParquetSource) else source.name] * len(texts)
        yield from zip(names, texts, strict=True)


def run(cfg: BaseLossConfig) -> dict[str, Any]:
    rt = runtime.start(cfg.device_type)
    model, tokenizer, meta = checkpoint.load_model("base", rt, cfg.model_tag, cfg.model_step)
    model.eval()
    T = row_length(cfg, model.config)
    if not cfg.exact:
        num_batches(cfg.split_tokens, cfg.device_batch_size, T, rt.world_size)
    dataset = meta["user_config"]["dataset"]
    source = open_source(dataset, bad_shards=meta["user_config"].get("bad_shards", "stop"))
    results: dict[str, Any] = {}
    details: dict[str, Any] = {}
    measure = exact_bpb if cfg.exact else packed_bpb
    for split in ("train", "val"):
        found = measure(model, tokenizer, rt, source, split, cfg)
        results[f"{split} bpb"] = found.pop(f"{split} bpb")
        environment.print0(f"{split} bpb: {results[f'{split} bpb']:.4f}")
        for key, value in found.items():
            environment.print0(f"{key}: {value:.4f}" if isinstance(value, float) else f"{key}: {value}")
        details |= found
    if rt.is_master:
        for i, text in enumerate(sample_texts(model, tokenizer)):
            results[f"sample {i}"] = text
            print(text)
    if cfg.quantize:
        found = measure(quantize_int8(model), tokenizer, rt, source, "val", cfg)
        details[f"val bpb with {cfg.quantize} weights"] = found["val bpb"]
        cost = found["val bpb"] - results["val bpb"]
        environment.print0(f"val bpb with {cfg.quantize} weights: {found['val bpb']:.4f}, {cost:+.4f}")
    new = {"Model": f"base_model (step {meta['step']})", "dataset": dataset, **details}
    get_report().log("Base model loss", [results, new, *report_config(cfg)])
    runtime.stop()
    return results


def main(argv: Sequence[str] | None = None) -> None:
    run_cli(BaseLossConfig, run, argv, about=__doc__)


if __name__ == "__main__":
    main()
