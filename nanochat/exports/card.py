"""The model card: README.md of an exported folder, from the checkpoint and the training report, where there is one."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from nanochat.data.shards import SHARD_SETS
from nanochat.gpt import GPTConfig
from nanochat.report import COLUMNS, format_value, parse_items, summary_rows

STAGES = ("base", "mid", "sft", "rl")
# Section of the report -> its stage, and which of its keys the card takes, under which names.
TRAINING: dict[str, tuple[str, dict[str, str]]] = {
    "base-model-training": (
        "base",
        {
            "Number of training tokens": "training tokens",
            "Tokens : Params ratio": "tokens per parameter",
            "Total training flops": "training FLOPs",
        },
    ),
    "midtraining": ("mid", {"mixture": "midtraining mixture", "Number of iterations": "midtraining steps"}),
    "chat-sft": ("sft", {"mixture": "fine-tuning mixture", "Training rows": "fine-tuning conversations"}),
    "chat-rl": ("rl", {"task": "reinforcement learning on", "Number of iterations": "reinforcement learning steps"}),
}
NO_REPORT = "There is no training report of this model beside its checkpoint, so nothing more is known here."
LIMITS = """\
- It is a small model trained on little text: it makes mistakes, and states them with confidence. Check what it says.
- It has had no training for safety. Do not put it before people without care of your own.
- What its texts do not contain it does not know; other languages than theirs it does not speak.
- A conversation must fit the context of {context:,} tokens; nothing has been trained beyond it.
- Within nanochat a calculator answers what stands between `<|python_start|>` and `<|python_end|>`. Other programs do
  not run it, and the model then makes the result up.
- Other programs read special tokens out of a user's text, such as `<|user_end|>`; nanochat does not. Take them out of
  text that you do not trust."""


@dataclass(frozen=True)
class Exported:
    """What the card is about. dataset: of the base model, see `dataset_name`; is_last: the last step under its tag."""

    source: str
    tag: str
    step: int
    is_last: bool
    config: GPTConfig
    num_params: int
    dataset: str | None
    is_plain: bool

    @property
    def tag_and_step(self) -> str:
        return f"{self.tag}, stage {self.source}, step {self.step:,}"


def dataset_name(name: str | None) -> str | None:
    """A public name, or "own text" for a folder, whose path is nobody's business."""
    return name if name is None or name in (*SHARD_SETS, "tinyworld") else "own text"


def model_card(model: Exported, sections: Mapping[str, str]) -> str:
    """Markdown.

    Args:
        sections: of the report in the same base directory, by slug; what is of another model is left out.
    """
    sections = {slug: text for slug, text in sections.items() if _is_of(model, parse_items(text))}
    training, scores = _training(model, sections), _scores(model, sections)
    config = model.config
    size = f"{model.num_params:,} parameters in {config.n_layer} layers of width {config.n_embd}"
    kind = "language" if model.source == "base" else "chat"
    what = "`NanoChatForCausalLM` of transformers" if model.is_plain else "its own class, in this folder"
    lines = [
        *("---", "library_name: transformers", "pipeline_tag: text-generation", "---", ""),
        *(f"# nanochat {model.tag} ({model.source})", ""),
        f"A {kind} model trained from scratch with nanochat: {size}, a context of",
        f"{config.sequence_len:,} tokens, a vocabulary of {config.vocab_size:,}. Checkpoint {model.tag_and_step}.",
        *(f"Architecture `{config.arch}`, {what}.", ""),
        *("## Training", ""),
        *([f"- {key}: {value}" for key, value in training.items()] or [NO_REPORT]),
        *("", "## Scores", ""),
        *(scores or [f"None measured. {'' if sections else NO_REPORT}".strip()]),
        *("", "## Use", "", "```python", _usage(model), "```", ""),
        *("Back into nanochat: `python -m scripts.export --import_from=FOLDER`.", ""),
        *("## Limitations", "", LIMITS.format(context=config.sequence_len)),
    ]
    return "\n".join(lines) + "\n"


def _is_of(model: Exported, items: Mapping[str, str]) -> bool:
    """Whether a section can be about this model, as far as it says: by tag, number of parameters, source."""
    known = {"model_tag": model.tag, "Number of parameters": format_value(model.num_params)}
    return all(items.get(key, "None") in ("", "None", value) for key, value in known.items())


def _training(model: Exported, sections: Mapping[str, str]) -> dict[str, str]:
    facts = {} if model.dataset is None else {"text": model.dataset}
    for slug, (stage, keys) in TRAINING.items():
        if STAGES.index(stage) <= STAGES.index(model.source):
            items = parse_items(sections.get(slug, ""))
            facts |= {name: items[key] for key, name in keys.items() if key in items}
    return facts


def _scores(model: Exported, sections: Mapping[str, str]) -> list[str]:
    """A table of this stage's own scores, with intervals where the report has them."""
    column = model.source.upper()
    own = {slug: text for slug, text in sections.items() if _is_of_step(model, parse_items(text))}
    items = parse_items(own.get(COLUMNS[column], ""))
    rows = {row: values[column] for row, values in summary_rows(own, ours=True).items() if column in values}
    if not rows:
        return []
    lines = ["| measure | score | 95% interval |", "|---|---|---|"]
    for row, value in rows.items():
        interval = items.get(f"{row} 95% interval") or items.get(f"{row} metric 95% interval") or "not estimated"
        lines.append(f"| {row} | {value} | {interval} |")
    if model.dataset == "tinyworld":
        lines += ["", "Tinyworld is a small made-up world of simple English; its scores compare with no other model's."]
    return lines


def _is_of_step(model: Exported, items: Mapping[str, str]) -> bool:
    """Whether a section's scores are of this step: the one that it names, else the last."""
    named = re.search(r"\(step (\d+)\)", items.get("Model", ""))
    step = named[1] if named else items.get("step", items.get("model_step", "None"))
    return model.is_last if step == "None" else step == str(model.step)


def _usage(model: Exported) -> str:
    trust = "" if model.is_plain else ", trust_remote_code=True"
    chat = model.source != "base"
    prompt = (
        'messages = [{"role": "user", "content": "Hello!"}]\n'
        "text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)"
        if chat
        else 'text = tokenizer.bos_token + "The capital of France is"'
    )
    return f"""\
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("FOLDER"{trust})
model = AutoModelForCausalLM.from_pretrained("FOLDER"{trust})
{prompt}
inputs = tokenizer(text, add_special_tokens=False, return_tensors="pt")
output = model.generate(**inputs, max_new_tokens=100)
print(tokenizer.decode(output[0, inputs.input_ids.size(1) :]))"""
