"""Compare our tokenizer with those of GPT-2 and GPT-4 on seven texts and in twelve languages.

    python -m scripts.tok_eval

Reads tokenizer/ and the data set that it was trained on: the first block of each split, and the validation split for
the tokens that it never uses. The other two vocabularies are fetched by tiktoken, once; without a network,
TIKTOKEN_CACHE_DIR names a folder that has them.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from nanochat import environment
from nanochat.config import InputError, run_cli
from nanochat.data.sources import Source, open_source
from nanochat.report import get_report
from nanochat.tok_eval_texts import LANGUAGES, TEXTS
from nanochat.tokenizer import Tokenizer, get_tiktoken, get_tokenizer

BASELINES = {"GPT-2": "gpt2", "GPT-4": "cl100k_base"}
FETCH_SECONDS = 20.0  # the vocabularies are some 3 MB; without a network the stage goes on after this
ROW_PREFIXES = {"fineweb-edu": "fwe"}  # the name the tables always had
NUM_LONGEST = 20
MAX_VAL_BYTES = 100_000_000  # of validation text that are searched for tokens never used


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


class Coder(NamedTuple):
    """A tokenizer as far as it is compared."""

    vocab_size: int
    encode: Callable[[str], list[int]]
    decode_bytes: Callable[[list[int]], bytes]


def data_texts(source: Source, dataset: str) -> dict[str, str]:
    """The first block of the training and of the validation split, documents joined by newlines."""
    prefix = ROW_PREFIXES.get(dataset, Path(dataset).name)
    texts = {
        # a lone surrogate, which JSON may hold, has no UTF-8
        f"{prefix}-{split}": "\n".join(source.read_block(split, 0)).encode("utf-8", "replace").decode("utf-8")
        for split in ("train", "val")
        if source.num_blocks(split)
    }
    return {name: text for name, text in texts.items() if text}


def count_tokens(coder: Coder, texts: Mapping[str, str], who: str) -> dict[str, int]:
    """Tokens of each text.

    Raises:
        InputError: a text does not come back from its ids.
    """
    counts = {}
    for name, text in texts.items():
        ids = coder.encode(text)
        if coder.decode_bytes(ids) != text.encode("utf-8"):
            raise InputError(f"the {who} tokenizer does not give back the text {name!r}; it is damaged")
        counts[name] = len(ids)
    return counts


def fetch(baselines: Mapping[str, str], seconds: float = FETCH_SECONDS) -> dict[str, Coder | str]:
    """tiktoken's tokenizers by the baseline's name, or why one cannot be had. Waits `seconds` at the most."""
    found: dict[str, Coder | str] = {}

    def work() -> None:
        for name, encoding_name in baselines.items():
            try:
                encoding = get_tiktoken(encoding_name)
                found[name] = Coder(encoding.n_vocab, encoding.encode_ordinary, encoding.decode_bytes)
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


def format_comparison(
    baseline: str, theirs: Mapping[str, int] | str, texts: Mapping[str, str], ours: Mapping[str, int]
) -> str:
    """The report's part on one baseline: its table, or one line that says why there is none."""
    if isinstance(theirs, str):
        return f"### Comparison with {baseline}\n\nNot compared: {' '.join(theirs.split())}\n"
    return format_table(baseline, [Row(n, len(t.encode("utf-8")), theirs[n], ours[n]) for n, t in texts.items()])


def format_compression(texts: Mapping[str, str], counts: Mapping[str, Mapping[str, int] | str]) -> str:
    """Bytes per token of every text by every tokenizer that could be had."""
    had = {who: tokens for who, tokens in counts.items() if not isinstance(tokens, str)}
    lines = ["### Bytes per token\n", f"| Text | Bytes | {' | '.join(had)} |", "|---|---:|" + "---:|" * len(had)]
    for name, text in texts.items():
        size = len(text.encode("utf-8"))
        ratios = " | ".join(f"{size / tokens[name]:.2f}" for tokens in had.values())
        lines.append(f"| {name} | {size} | {ratios} |")
    return "\n".join(lines) + "\n"


def format_longest(tokenizer: Tokenizer) -> str:
    """The longest tokens: what a vocabulary learned of a corpus by heart is often junk."""
    num_bytes = tokenizer.num_bytes()
    longest = np.argsort(-num_bytes, kind="stable")[:NUM_LONGEST]
    lines = [f"- {i}: {tokenizer.id_to_token(int(i))!r} ({num_bytes[i]} bytes)" for i in longest]
    return "\n".join([f"### The {len(lines)} longest tokens\n", *lines]) + "\n"


def format_unused(tokenizer: Tokenizer, source: Source) -> str:
    """The share of the ordinary vocabulary that the validation split never uses."""
    is_used, size = np.zeros(tokenizer.get_vocab_size(), bool), 0
    for block in range(source.num_blocks("val")):
        texts = source.read_block("val", block)
        for ids in tokenizer.encode_to_arrays(texts):
            is_used[ids] = True
        size += sum(len(text.encode("utf-8")) for text in texts)
        if size >= MAX_VAL_BYTES:
            break
    unused = ~is_used[tokenizer.num_bytes() > 0]
    share = f"{100 * unused.mean():.1f}% of the vocabulary ({unused.sum():,} of {len(unused):,} tokens)"
    return f"### Tokens never used\n\n- {share} in {size:,} bytes of validation text\n"


def run(cfg: TokEvalConfig) -> str:
    tokenizer = get_tokenizer()
    dataset = str(tokenizer.metadata.get("dataset", ""))
    source = open_source(dataset) if dataset else None
    texts = TEXTS | (data_texts(source, dataset) if source else {})
    coders: dict[str, Coder | str] = {
        "Ours": Coder(tokenizer.get_vocab_size(), tokenizer.encode, tokenizer.decode_bytes),
        **fetch(BASELINES),
    }
    for name in (*BASELINES, "Ours"):
        coder = coders[name]
        if isinstance(coder, Coder):
            environment.print0(f"{name}: {coder.vocab_size}")
    counts = {
        name: coder if isinstance(coder, str) else count_tokens(coder, texts | LANGUAGES, name)
        for name, coder in coders.items()
    }
    ours = counts["Ours"]
    assert not isinstance(ours, str)
    tables = "\n".join(format_comparison(name, counts[name], texts, ours) for name in BASELINES)
    more = [format_compression(texts | LANGUAGES, counts), format_longest(tokenizer)]
    if source:
        more.append(format_unused(tokenizer, source))
    everything = "\n".join([tables, *more])
    environment.print0("\n" + everything)
    get_report().log("Tokenizer evaluation", [everything])
    return everything


def main(argv: Sequence[str] | None = None) -> None:
    run_cli(TokEvalConfig, run, argv, about=__doc__)


if __name__ == "__main__":
    main()
