"""Train the tokenizer on the training text.

    python -m scripts.tok_train --max_chars=2_000_000_000 --vocab_size=32768
    python -m scripts.tok_train --dataset=tinyworld --max_chars=20_000_000 --vocab_size=4096

    python -m scripts.tok_train --dataset=my_texts --pattern=gpt2

Reads the documents of --dataset in order; writes tokenizer/ in the base directory.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from nanochat import environment
from nanochat.config import InputError, flag, report_config, run_cli
from nanochat.data.sources import Source, open_source
from nanochat.report import get_report
from nanochat.tokenizer import PATTERNS, Tokenizer, check_vocab_size

# What a lossy tokenizer would trip over.
ROUND_TRIP_TEXT = """\
A quick check, in 2 lines: 7 times 12,345 is 86,415.
They've said it's fine; we'll see if she'd agree -- O'Neill wouldn't!
{"path": "C:\\\\tmp", "ok": true}  # 100% @ $3.50 & <|bos|> is only text here
\t한국어, 日本語, Ελληνικά, naïve café, 👩‍🚀🌍
"""

PROGRESS_SECONDS = 5.0


@dataclass(frozen=True)
class TokTrainConfig:
    max_chars: int = flag(10_000_000_000, "characters to train on; the document that crosses it is used")
    doc_cap: int = flag(10_000, "characters used of each document")
    vocab_size: int = flag(65_536, "ids, the nine special tokens included")
    dataset: str = flag("climbmix", "climbmix, fineweb-edu, tinyworld or a folder of text", new=True)
    bad_shards: str = flag("stop", "a damaged shard ends the run, or is left out", choices=("stop", "skip"), new=True)
    pattern: str = flag("ours", "how a text is cut before merging: ours, gpt2, gpt4 or a regular expression", new=True)

    def __post_init__(self) -> None:
        for name in ("max_chars", "doc_cap"):
            if getattr(self, name) < 1:
                raise InputError(f"--{name} {getattr(self, name)} must be at least 1")
        check_vocab_size(self.vocab_size)


class Reader:
    """Iterates the cropped documents once, and counts and prints how far it is."""

    def __init__(self, source: Source, cfg: TokTrainConfig) -> None:
        self.source = source
        self.cfg = cfg
        self.num_chars = 0
        self.num_documents = 0

    def __iter__(self) -> Iterator[str]:
        num_blocks = self.source.num_blocks("train")
        start = shown = time.perf_counter()
        for block in range(num_blocks):
            for text in self.source.read_block("train", block):
                text = text[: self.cfg.doc_cap]
                self.num_chars += len(text)
                self.num_documents += 1
                yield text
                if self.num_chars > self.cfg.max_chars:
                    return
            now = time.perf_counter()
            if now - shown >= PROGRESS_SECONDS:
                shown = now
                done = max(self.num_chars / self.cfg.max_chars, (block + 1) / num_blocks)
                self._print_progress(done, now - start)
        if not self.num_chars:
            raise InputError(f"--dataset {self.cfg.dataset} has no training text; add documents to it")

    def _print_progress(self, done: float, seconds: float) -> None:
        million = self.num_chars / 1e6
        eta = seconds * (1 - done) / done
        environment.print0(
            f"read {million:,.1f}M characters ({100 * done:.1f}%) | {million / seconds:.1f}M chars/sec | "
            f"eta: {eta / 60:.1f}m"
        )


def dataset_name(dataset: str) -> str:
    """The name to open the data set by from any working directory: a folder's becomes absolute."""
    path = Path(dataset).expanduser()
    is_folder = path.exists() and dataset not in ("climbmix", "fineweb-edu", "tinyworld")
    return str(path.resolve()) if is_folder else dataset


def token_bytes_stats(tokenizer: Tokenizer) -> dict[str, Any]:
    """Smallest, largest, mean and sample deviation of the bytes a token stands for; special ones left out."""
    num_bytes = tokenizer.num_bytes()
    num_bytes = num_bytes[num_bytes > 0]
    return {
        "token_bytes_min": int(num_bytes.min()),
        "token_bytes_max": int(num_bytes.max()),
        "token_bytes_mean": num_bytes.mean().item(),
        "token_bytes_std": num_bytes.std(ddof=1).item(),
    }


class MergeBar:
    """Shows how far the merge loop is, its rate and the time left."""

    bar: tqdm | None = None

    def __call__(self, done: int, planned: int) -> None:
        if self.bar is None:
            self.bar = tqdm(total=planned, desc="merging", unit=" merges", mininterval=0.5)
        self.bar.update(done - self.bar.n)
        if done == planned:
            self.bar.close()


def run(cfg: TokTrainConfig) -> Tokenizer:
    reader = Reader(open_source(cfg.dataset, bad_shards=cfg.bad_shards), cfg)
    start = time.perf_counter()
    pattern = PATTERNS.get(cfg.pattern, cfg.pattern)
    tokenizer = Tokenizer.train_from_iterator(reader, cfg.vocab_size, pattern, MergeBar())
    train_time = time.perf_counter() - start
    if tokenizer.decode(tokenizer.encode(ROUND_TRIP_TEXT)) != ROUND_TRIP_TEXT:
        raise InputError(
            f"--pattern {cfg.pattern} leaves out parts of a text; use ours, gpt2, gpt4 or an expression that "
            "matches every character, say by ending in |(?s:.)"
        )

    environment.print0(f"Training time: {train_time:.2f}s for {reader.num_chars:,} characters")
    vocab_size = tokenizer.get_vocab_size()
    environment.print0(f"Vocab size: {vocab_size:,}")
    if vocab_size < cfg.vocab_size:
        environment.print0(
            f"Training stopped early: the text has no pair left to merge, so ids end at {vocab_size - 1:,} "
            f"instead of {cfg.vocab_size - 1:,}; more text gives more tokens"
        )
    old, new = report_config(cfg)
    tokenizer.metadata = {
        **old,
        "dataset": dataset_name(cfg.dataset),
        "characters": reader.num_chars,
        "documents": reader.num_documents,
    }
    environment.print0(f"Saved {tokenizer.save(environment.base_dir() / 'tokenizer')}")
    get_report().log(
        "Tokenizer training",
        [
            old,
            {"train_time": train_time, "num_special_tokens": len(tokenizer.get_special_tokens())},
            token_bytes_stats(tokenizer),
            new,
            {
                "characters read": reader.num_chars,
                "documents read": reader.num_documents,
                "ids in use": vocab_size,
                "fingerprint": tokenizer.fingerprint[:12],
            },
        ],
    )
    return tokenizer


def main(argv: Sequence[str] | None = None) -> None:
    run_cli(TokTrainConfig, run, argv, about=__doc__)


if __name__ == "__main__":
    main()
