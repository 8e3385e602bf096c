"""Carry a model to other programs, or take one back.

    python -m scripts.export -i sft --out=exported                  # for transformers
    python -m scripts.export -i sft --out=exported --dtype=bfloat16 # half the size
    python -m scripts.export --import_from=exported -i sft -g copy  # becomes a checkpoint in the base directory

A model of --arch=plain is transformers' NanoChatForCausalLM; any other brings its class along (trust_remote_code=True).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from nanochat import checkpoint
from nanochat.config import InputError, flag, run_cli
from nanochat.environment import base_dir, print0
from nanochat.exports import huggingface
from nanochat.exports.card import Exported, dataset_name, model_card
from nanochat.report import get_report
from nanochat.runtime import Runtime
from nanochat.tokenizer_formats import install

NO_GGUF = (
    "--to gguf: llama.cpp has no architecture for this model (none joins squared ReLU, QK norm and a cap on the "
    "logits), so nothing would open the file; use --to=hf"
)


@dataclass(frozen=True)
class ExportConfig:
    source: str | None = flag(
        None,
        "stage of the checkpoint; None = sft, or when importing what the folder says",
        choices=("base", "mid", "sft", "rl"),
        short="-i",
    )
    model_tag: str | None = flag(None, "its tag; None = the deepest, or what the folder says", short="-g")
    step: int | None = flag(None, "its step; None = the last, or what the folder says", short="-s")
    out: str | None = flag(None, "folder to write, which must not exist or be empty")
    to: str = flag("hf", "what to write", choices=("hf", "gguf"))
    dtype: str = flag("float32", "of the weights in the file", choices=tuple(huggingface.DTYPES), short="-d")
    force: bool = flag(False, "replace an earlier export in --out")
    import_from: str | None = flag(None, "folder to take a model from, instead of writing one")

    def __post_init__(self) -> None:
        if self.to == "gguf":
            raise InputError(NO_GGUF)
        if (self.out is None) == (self.import_from is None):
            raise InputError("give either --out, the folder to write, or --import_from, the folder to read")


def export(cfg: ExportConfig, folder: Path) -> Exported:
    """Fill the folder; returns what it is about."""
    source = cfg.source or "sft"
    model, tokenizer, meta = checkpoint.load_model(
        source, Runtime(torch.device("cpu"), torch.float32), cfg.model_tag, cfg.step
    )
    tag, step = meta["tag"], meta["step"]
    dataset = dataset_name(meta.get("user_config", {}).get("dataset"))
    about = Exported(
        source=source,
        tag=tag,
        step=step,
        is_last=step == checkpoint.steps(checkpoint.tag_directory(source, tag))[-1],
        config=model.config,
        num_params=sum(p.numel() for p in model.parameters()),
        dataset=dataset,
        is_plain=huggingface.is_plain(model),
    )
    sections = {} if "imported_from" in meta else get_report().sections()
    record = {"source": source, "tag": tag, "step": step, "dataset": dataset}
    huggingface.write_model(folder, model, tokenizer, record, cfg.dtype)
    (folder / "README.md").write_text(model_card(about, sections), encoding="utf-8")
    return about


def import_(cfg: ExportConfig, folder: Path) -> Path:
    """Write the checkpoint; returns its path."""
    config, weights, tokenizer, record = huggingface.read_model(folder)
    source = cfg.source or record.get("source")
    if source not in checkpoint.DIRECTORIES:
        raise InputError(f"{folder} does not say which stage its model is of; give -i base, mid, sft or rl")
    tag = cfg.model_tag or record.get("tag") or f"d{config.n_layer}"
    step = record.get("step", 0) if cfg.step is None else cfg.step
    if step < 0:
        raise InputError(f"step {step} must be 0 or more; give another --step")
    directory = checkpoint.tag_directory(source, tag)
    if checkpoint.steps(directory):
        raise InputError(f"{directory} has checkpoints, which an import does not replace; choose another tag by -g")
    install(tokenizer, base_dir() / "tokenizer", str(folder))
    meta: dict[str, Any] = {
        "tokenizer": tokenizer.fingerprint,
        "model_config": config.to_dict(),
        "user_config": {"dataset": record.get("dataset") or "unknown"},
        "imported_from": str(folder),
    }
    path = checkpoint.write(directory, step, weights, None, meta)
    print0(f"Imported {folder} to {path}")
    return path


def run(cfg: ExportConfig) -> Path:
    """Returns the folder or the checkpoint that it wrote."""
    if cfg.import_from is not None:
        return import_(cfg, Path(cfg.import_from))
    out = Path(str(cfg.out))
    with huggingface.staged(out, cfg.force) as folder:
        about = export(cfg, folder)
    print0(f"Exported {about.tag_and_step} to {out}" + ("" if about.is_plain else " (needs trust_remote_code=True)"))
    return out


def main(argv: Sequence[str] | None = None) -> None:
    run_cli(ExportConfig, run, argv, about=__doc__)


if __name__ == "__main__":
    main()
