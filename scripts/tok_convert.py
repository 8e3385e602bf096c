"""Carry a tokenizer to other programs, or take theirs.

    python -m scripts.tok_convert --to=hf --out=exported          # for tokenizers and transformers
    python -m scripts.tok_convert --to=tiktoken --out=exported
    python -m scripts.tok_convert --read=exported/tokenizer.json  # becomes the base directory's tokenizer

Reads the base directory's tokenizer unless --read names a tokenizer.json or a list of ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from nanochat.config import InputError, flag, run_cli
from nanochat.environment import base_dir, print0
from nanochat.tokenizer import get_tokenizer
from nanochat.tokenizer_formats import export_huggingface, export_tiktoken, import_tokenizer, install


@dataclass(frozen=True)
class TokConvertConfig:
    read: str | None = flag(None, "a tokenizer.json or a list of ranks; the base directory's tokenizer if not given")
    to: str = flag("ours", "what to write", choices=("ours", "hf", "tiktoken"))
    out: str | None = flag(None, "folder to write to; needed but for ours, which goes to the base directory")
    pattern: str | None = flag(None, "split pattern of a list of ranks: ours, gpt2, gpt4 or a regular expression")
    special_tokens: str | None = flag(
        None, "special tokens of a list of ranks, by commas, the one that starts a document first"
    )

    def __post_init__(self) -> None:
        if self.to != "ours" and self.out is None:
            raise InputError(f"--to {self.to} needs --out, the folder to write to")
        if self.read is None and self.to == "ours":
            raise InputError(
                "nothing to do: give --read FILE to take a tokenizer, or --to=hf or --to=tiktoken to carry ours"
            )


def run(cfg: TokConvertConfig) -> list[Path]:
    tokenizer = import_tokenizer(cfg.read, cfg.pattern, cfg.special_tokens) if cfg.read else get_tokenizer()
    out = base_dir() / "tokenizer" if cfg.out is None else Path(cfg.out)
    if cfg.to == "ours":
        paths = [install(tokenizer, out, str(cfg.read))]
    else:
        paths = (export_huggingface if cfg.to == "hf" else export_tiktoken)(tokenizer, out)
    for path in paths:
        print0(f"Saved {path}: {tokenizer.get_vocab_size():,} ids, fingerprint {tokenizer.fingerprint[:12]}")
    return paths


def main(argv: Sequence[str] | None = None) -> None:
    run_cli(TokConvertConfig, run, argv, about=__doc__)


if __name__ == "__main__":
    main()
