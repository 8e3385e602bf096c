"""Compare our tokenizer with those of GPT-2 and GPT-4 on seven texts.

    python -m scripts.tok_eval

Reads tokenizer/ and the first block of each split of the data set that it was trained on. The other two
vocabularies are fetched by tiktoken, once; without a network, TIKTOKEN_CACHE_DIR names a folder that has them.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from nanochat import runtime
from nanochat.config import InputError, run_cli
from nanochat.data.sources import open_source
from nanochat.report import get_report
from nanochat.tok_eval_texts import TEXTS
from nanochat.tokenizer import Tokenizer, get_tokenizer

BASELINES = {"GPT-2": "gpt2", "GPT-4": "cl100k_base"}
FETCH_SECONDS = 20.0  # the vocabularies are some 3 MB; without a network the stage goes on after this
ROW_PREFIXES = {"fineweb-edu": "fwe"}  # the name the tables always had


@dataclass(frozen=True)
class TokEvalConfig:
    """No flags: everything follows from the tokenizer."""


@dataclass(frozen=True)
class Row:
    """One text, counted by the baseline and by us."""

    name: str
    num_bytes: int
    baseline_tokens: int
    our_tokens: int

    def __str__(self) -> str:
        diff = 100 * (self.baseline_tokens - self.our_tokens) / self.baseline_tokens
        return (
            f"| {self.name} | {self.num_bytes} "
            f"| {self.baseline_tokens} | {self.num_bytes / self.baseline_tokens:.2f} "
            f"| {self.our_tokens} | {self.num_bytes / self.our_tokens:.2f} | {diff:+.1f}% |"
        )


def data_texts(dataset: str) -> dict[str, str]:
    """The first block of the training and of the validation split, documents joined by newlines."""
    source = open_source(dataset)
    prefix = ROW_PREFIXES.get(dataset, Path(dataset).name)
    texts = {
        # a lone surrogate, which JSON may hold, has no UTF-8
        f"{prefix}-{split}": "\n".join(source.read_block(split, 0)).encode("utf-8", "replace").decode("utf-8")
        for split in ("train", "val")
        if source.num_blocks(split)
    }
    return {name: text for name, text in texts.items() if text}


def count_tokens(tokenizer: Tokenizer, texts: Mapping[str, str], who: str) -> dict[str, int]:
    """Tokens of each text.

    Raises:
        InputError: a text does not come back from its ids.
    """
    counts = {}
    for name, text in texts.items():
        ids = tokenizer.encode(text)
        if tokenizer.decode_bytes(ids) != text.encode("utf-8"):
            raise InputError(f"the {who} tokenizer does not give back the text {name!r}; it is damaged")
        counts[name] = len(ids)
    return counts


def fetch(baselines: Mapping[str, str], seconds: float = FETCH_SECONDS) -> dict[str, Tokenizer | str]:
    """tiktoken's tokenizers by the baseline's name, or why one cannot be had. Waits `seconds` at the most."""
    found: dict[str, Tokenizer | str] = {}

    def work() -> None:
        for name, encoding_name in baselines.items():
            try:
                found[name] = Tokenizer.from_pretrained(encoding_name)
            except InputError as error:
                found[name] = str(error)

    # a daemon: a connection that hangs must not hold up the end of the process
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(seconds)
    late = f"its vocabulary did not arrive within {seconds:g} s"
    return {name: found.get(name, late) for name in baselines}


def format_table(baseline: str, rows: Sequence[Row]) -> str:
    """A comparison as Markdown; the dash row's widths never change."""
    header = (
        f"| Text Type | Bytes | {baseline} Tokens | {baseline} Ratio | Ours Tokens | Ours Ratio | Relative Diff % |"
    )
    dashes = "|" + "|".join("-" * width for width in (11, 7, 14, 14, 13, 12, 17)) + "|"
    return "\n".join([f"### Comparison with {baseline}\n", header, dashes, *map(str, rows)]) + "\n"


def compare(baseline: str, tokenizer: Tokenizer | str, texts: Mapping[str, str], ours: Mapping[str, int]) -> str:
    """The report's part on one baseline: its table, or one line that says why there is none."""
    if isinstance(tokenizer, str):
        return f"### Comparison with {baseline}\n\nNot compared: {' '.join(tokenizer.split())}\n"
    theirs = count_tokens(tokenizer, texts, baseline)
    rows = [Row(n, len(t.encode("utf-8")), theirs[n], ours[n]) for n, t in texts.items()]
    return format_table(baseline, rows)


def run(cfg: TokEvalConfig) -> str:
    tokenizer = get_tokenizer()
    dataset = tokenizer.metadata.get("dataset")
    texts = TEXTS | (data_texts(dataset) if dataset else {})
    baselines = fetch(BASELINES)
    for name, baseline in baselines.items():
        if isinstance(baseline, Tokenizer):
            runtime.print0(f"{name}: {baseline.get_vocab_size()}")
    runtime.print0(f"Ours: {tokenizer.get_vocab_size()}")
    ours = count_tokens(tokenizer, texts, "trained")
    tables = "\n".join(compare(name, baseline, texts, ours) for name, baseline in baselines.items())
    runtime.print0("\n" + tables)
    get_report().log("Tokenizer evaluation", [tables])
    return tables


def main(argv: Sequence[str] | None = None) -> None:
    run_cli(TokEvalConfig, run, argv, about=__doc__)


if __name__ == "__main__":
    main()
