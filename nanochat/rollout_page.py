"""A page of sampled rollouts for people to read: the best and the worst answers of some prompts at each evaluation."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from torch import Tensor

from nanochat.chat import Conversation
from nanochat.dialogue import AS_BRACKETS, StreamingDecoder
from nanochat.policy_gradient import is_equal
from nanochat.rollouts import Rollouts
from nanochat.tokenizer import Tokenizer, write_text

GROUPS = 4  # shown of an evaluation
HEAD = """# Sampled rollouts

Answers to held-out prompts, with the best and the worst of each group. An answer's advantage is its reward less the
group's average; a tool call reads [expression]=[output].
"""


def page(rollouts: Rollouts, advantages: Tensor, tokenizer: Tokenizer, step: int) -> str:
    """The part of the page for one evaluation. Groups whose rewards differ come first.

    Args:
        advantages: (prompts, num_samples).
    """
    known, differs = rollouts.is_known(), ~is_equal(rollouts.rewards)
    groups = sorted(known.nonzero().flatten().tolist(), key=lambda group: not differs[group])[:GROUPS]
    parts = [f"\n## Step {step}\n"]
    for group in sorted(groups):
        prompt = literal(_prompt_text(rollouts.conversations[group]))
        parts.append(f"\n### Example {rollouts.indices[group]}\n\n{prompt}\n")
        rewards = rollouts.rewards[group]
        best, worst = int(rewards.argmax()), int(rewards.argmin())
        shown = {"Best": best, "Worst": worst} if differs[group] else {f"One of {len(rewards)} equally good": best}
        for name, sample in shown.items():
            row = group * rollouts.num_samples + sample
            facts = f"reward {float(rewards[sample]):.4g}, advantage {float(advantages[group, sample]):+.4g}"
            facts += "" if rollouts.stopped[row] else ", cut for want of room"
            parts.append(f"\n{name} ({facts}):\n\n{literal(answer_text(tokenizer, rollouts.answer_ids(row)))}\n")
    return "".join(parts)


def write(path: Path, part: str, step: int) -> None:
    """Add an evaluation's part. What another try had written of this step and later ones goes."""
    text = path.read_text(encoding="utf-8") if path.exists() and step > 0 else HEAD
    for match in re.finditer(r"^## Step (\d+)$", text, re.MULTILINE):
        if int(match[1]) >= step:
            text = text[: match.start()].rstrip("\n") + "\n"
            break
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, text + part)


def literal(text: str) -> str:
    """Markdown that shows a text as it is: an indented block, in which nothing has a meaning. Control characters and
    the separators at which some readers break lines are written as escapes."""
    return "\n".join("    " + "".join(map(_visible, line)) for line in text.split("\n"))


def _visible(character: str) -> str:
    return character if character.isprintable() else character.encode("unicode_escape").decode("ascii")


def _prompt_text(conversation: Conversation) -> str:
    """All but the last message, with the roles where there are several."""
    messages = conversation["messages"][:-1]
    texts = [_text(message["content"]) for message in messages]
    if len(messages) == 1:
        return texts[0]
    return "\n".join(f"{message['role']}: {text}" for message, text in zip(messages, texts, strict=True))


def _text(content: str | Iterable[dict[str, str]]) -> str:
    return content if isinstance(content, str) else "".join(part["text"] for part in content)


def answer_text(tokenizer: Tokenizer, ids: list[int]) -> str:
    decoder = StreamingDecoder(tokenizer, AS_BRACKETS)
    return "".join(map(decoder.feed, ids)) + decoder.flush() or "(nothing)"
