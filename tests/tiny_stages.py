"""Small models of the stages, saved: for tests of what trains them further."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

from nanochat import checkpoint
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
