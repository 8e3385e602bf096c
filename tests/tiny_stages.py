"""Small models of the stages, saved: for tests of what trains them further."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import torch

from nanochat import checkpoint
from nanochat.gpt import GPT, GPTConfig
from nanochat.tokenizer import Tokenizer
from tests.conftest import save_checkpoint, tiny_gpt


@functools.cache
def cat_tokenizer() -> Tokenizer:
    return Tokenizer.train_from_iterator(["who sat on the mat? the cat sat on the mat. " * 20], 300)


def save_d2(base: Path, stage: str, settings: dict[str, Any], **sizes: Any) -> None:
    """The tokenizer, and a model d2 of the stage that was made with these settings."""
    tokenizer = cat_tokenizer()
    tokenizer.save(base / "tokenizer")
    model = tiny_gpt(vocab_size=300, **sizes)
    meta: dict[str, Any] = {"model_config": model.config.to_dict(), "tokenizer": tokenizer.fingerprint}
    meta["user_config"] = {"dataset": "tinyworld", **settings}
    save_checkpoint(checkpoint.tag_directory(stage, "d2"), 7, model, None, meta)


def tiny_chat_model(tokenizer: Tokenizer, sequence_len: int = 256) -> GPT:
    """In fp32, ready to answer; its letters differ and its tokens look at each other, which start at 0."""
    torch.manual_seed(0)
    config = GPTConfig(sequence_len, tokenizer.get_vocab_size(), n_layer=2, n_head=2, n_kv_head=2, n_embd=32)
    model = GPT(config)
    model.init_weights()
    with torch.no_grad():
        model.lm_head.weight.normal_(0.0, 0.3)
        for block in model.blocks:
            block.attn.c_proj.weight.normal_(0.0, 1.0)
    return model.prepare(torch.device("cpu"), torch.float32).eval()


def write_aqua(base: Path) -> None:
    """AQuA's validation split in a base directory: three questions, B each time."""
    (base / "aqua").mkdir(parents=True)
    row = '{"question": "q", "options": ["A)1", "B)2"], "rationale": "r", "correct": "B"}\n'
    (base / "aqua" / "validation.jsonl").write_text(row * 3)
