"""The seven prompts that the report completes, greedily, to show what a base model knows."""

from __future__ import annotations

from typing import Any

from nanochat.engine import Engine

SAMPLE_PROMPTS = (
    "The capital of France is",
    "The chemical symbol of gold is",
    "If yesterday was Friday, then tomorrow will be",
    "The opposite of hot is",
    "The planets of the solar system are:",
    "My favorite color is",
    "If 5*x + 3 = 13, then x is",
)
SAMPLE_TOKENS = 16


def sample_texts(model: Any, tokenizer: Any) -> list[str]:
    """Greedy completions of the seven prompts, with prompt and special tokens."""
    engine, bos = Engine(model, tokenizer), tokenizer.get_bos_token_id()
    texts = []
    for prompt in SAMPLE_PROMPTS:
        ids = tokenizer.encode(prompt, prepend=bos)
        sequences, _ = engine.generate_batch(ids, num_samples=1, max_tokens=SAMPLE_TOKENS, temperature=0.0)
        texts.append(tokenizer.decode(sequences[0]))
    return texts
