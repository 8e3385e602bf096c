"""What a recipe will take: each stage's command, expected time, memory per GPU and dollars. Starts nothing.

    bash speedrun.sh gpu8 --plan

Reads one stage a line, a name, a tab and its command, from standard input. Sizes that a command does not give
are the defaults of its script, so a flag that the script does not know ends the plan.
"""

from __future__ import annotations

import importlib
import shlex
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from nanochat import plan, runtime
from nanochat.config import InputError, flag, parse_config, run_cli
from nanochat.plan import Estimate, Estimator, Machine
from nanochat.scaling import Shape, num_iterations, rows_per_rank, shape_from_depth, with_settings


@dataclass(frozen=True)
class PlanConfig:
    num_gpus: int = flag(8, "GPUs of the machine; 0 = this CPU")

    def __post_init__(self) -> None:
        if self.num_gpus < 0:
            raise InputError(f"--num_gpus {self.num_gpus} must be 0 (this CPU) or more")


@dataclass(frozen=True)
class Stage:
    """One line of a recipe."""

    name: str
    command: str
    module: str
    num_ranks: int
    config: Any  # the script's config; None for the report


@dataclass(frozen=True)
class Recipe:
    """What the stages share: the model, its pretraining steps, and the kind of data."""

    shape: Shape
    steps: int
    is_tinyworld: bool


def times(steps: int, every: int | None, at_start: bool = True) -> int:
    """How often a hook with a period runs: at the start perhaps, every so many steps, and at the end."""
    return 0 if every is None else -(-steps // every) + at_start


def core_examples(recipe: Recipe, max_per_task: int | None) -> int:
    most = plan.TINYWORLD_CORE_EXAMPLES if recipe.is_tinyworld else plan.CORE_EXAMPLES
    num_tasks = plan.TINYWORLD_CORE_TASKS if recipe.is_tinyworld else plan.CORE_TASKS
    return most if max_per_task is None else min(most, num_tasks * max_per_task)


def base_train(c: Any, recipe: Recipe, model: Estimator) -> Estimate:
    c = with_settings(c, recipe.shape, model.num_ranks)
    most = rows_per_rank(c.total_batch_size, c.max_seq_len, model.num_ranks)
    rows = c.device_batch_size or model.machine.rows(recipe.shape, most) or 1
    validations = times(recipe.steps, c.eval_every)
    training = model.training(recipe.steps, c.total_batch_size, rows, validations, c.eval_tokens)
    examples = core_examples(recipe, c.core_metric_max_per_task) * times(recipe.steps, c.core_metric_every, False)
    return replace(training, seconds=training.seconds + model.core_seconds(examples))


def mid_train(c: Any, recipe: Recipe, model: Estimator) -> Estimate:
    steps = c.num_iterations or plan.MID_STEPS
    return model.training(steps, c.total_batch_size, c.device_batch_size, times(steps, c.eval_every), c.eval_tokens)


def chat_sft(c: Any, recipe: Recipe, model: Estimator) -> Estimate:
    rows = c.num_epochs * (plan.SFT_ROWS + c.aqua_train_examples)
    steps = c.num_iterations or -(-rows // c.target_examples_per_step)
    batches = times(steps, c.eval_every) * c.eval_steps
    tokens = plan.CONVERSATION_TOKENS["tinyworld" if recipe.is_tinyworld else "real"]
    return model.fine_tuning(steps, c.target_examples_per_step, c.device_batch_size, batches, tokens)


def chat_rl(c: Any, recipe: Recipe, model: Estimator) -> Estimate:
    steps = c.num_iterations or c.num_epochs * (plan.RL_EXAMPLES.get(c.task_name, plan.OTHER) // c.examples_per_step)
    return model.reinforcement(
        steps,
        c.examples_per_step,
        c.num_samples,
        c.device_batch_size,
        c.max_new_tokens,
        times(steps, c.eval_every),
        c.eval_examples,
    )


def chat_eval(c: Any, recipe: Recipe, model: Estimator) -> Estimate:
    from tasks.registry import default_tasks

    names = c.task_name.split("|") if c.task_name else default_tasks("tinyworld" if recipe.is_tinyworld else None)
    return model.chat_eval(names, c.max_problems, c.batch_size, c.max_new_tokens)


# Each stage's module: the name of its config, and its rule.
RULES: dict[str, tuple[str | None, Callable[[Any, Recipe, Estimator], Estimate]]] = {
    "nanochat.report": (None, lambda c, recipe, model: Estimate(3.0)),
    "nanochat.dataset": ("DatasetConfig", lambda c, recipe, model: plan.download(c.num_files)),
    "scripts.tok_train": ("TokTrainConfig", lambda c, recipe, model: model.tokenizer(c.max_chars)),
    "scripts.tok_eval": ("TokEvalConfig", lambda c, recipe, model: model.tokenizer(0)),
    "scripts.base_train": ("BaseTrainConfig", base_train),
    "scripts.base_loss": ("BaseLossConfig", lambda c, recipe, model: model.loss(c.split_tokens, c.device_batch_size)),
    "scripts.base_eval": (
        "BaseEvalConfig",
        lambda c, recipe, model: model.core(core_examples(recipe, c.max_per_task), c.device_batch_size),
    ),
    "scripts.mid_train": ("MidTrainConfig", mid_train),
    "scripts.chat_sft": ("ChatSFTConfig", chat_sft),
    "scripts.chat_rl": ("ChatRLConfig", chat_rl),
    "scripts.chat_eval": ("ChatEvalConfig", chat_eval),
}


def parse_stage(line: str) -> Stage:
    """A line `NAME <tab> COMMAND`, the command being python or torchrun with -m MODULE.

    Raises:
        InputError: no such line, an unknown script, or a flag that the script refuses.
    """
    name, tab, command = line.rstrip("\n").partition("\t")
    words = shlex.split(command)
    if not tab or "-m" not in words:
        raise InputError(f"no stage in the line {line!r}; it must be a name, a tab and `python -m MODULE FLAGS`")
    at = words.index("-m")
    launcher, (module, *flags) = words[:at], words[at + 1 :]
    if module not in RULES:
        raise InputError(f"stage {name} runs {module}; the plan knows {', '.join(RULES)}")
    ranks = [word.split("=")[1] for word in launcher if word.startswith("--nproc_per_node=")]
    config_name, _ = RULES[module]
    config = None
    if config_name is not None:
        try:
            config = parse_config(getattr(importlib.import_module(module), config_name), flags)
        except InputError as error:
            raise InputError(f"stage {name}: {error}") from None
    return Stage(name, command, module, int(ranks[0]) if ranks else 1, config)


def read_recipe(stages: Sequence[Stage]) -> Recipe:
    """What all stages follow from.

    Raises:
        InputError: no tokenizer or no base model is trained.
    """
    configs = {stage.module: stage.config for stage in stages}
    for module in ("scripts.tok_train", "scripts.base_train"):
        if module not in configs:
            raise InputError(f"no stage runs {module}, so the model's size is unknown; add that stage")
    base, tokenizer = configs["scripts.base_train"], configs["scripts.tok_train"]
    shape = shape_from_depth(
        base.depth, tokenizer.vocab_size, base.max_seq_len, base.aspect_ratio, base.head_dim, base.arch
    )
    num_ranks = next(stage.num_ranks for stage in stages if stage.module == "scripts.base_train")
    base = with_settings(base, shape, num_ranks)
    steps, _ = num_iterations(
        shape, base.total_batch_size, base.num_iterations, base.target_flops, base.target_param_data_ratio
    )
    return Recipe(shape, steps, base.dataset == "tinyworld")


def table(stages: Sequence[Stage], machine: Machine) -> list[str]:
    """Two lines a stage: what it takes, and its command; then the sum. What runs in the background takes no time
    of its own."""
    recipe = read_recipe(stages)
    gib = "GiB/GPU" if machine.memory else "GiB"
    lines = [f"{'stage':<20} {'time':>9} {gib:>8} {'dollars':>9}"]
    total, most = 0.0, 0.0
    for stage in stages:
        e = RULES[stage.module][1](stage.config, recipe, Estimator(machine, recipe.shape, stage.num_ranks))
        is_waited_for = not stage.name.endswith("(background)")
        total += e.seconds * is_waited_for
        most = max(most, e.memory or 0.0)
        cost = machine.dollars_per_hour * e.seconds / 3600 * is_waited_for
        memory = "-" if e.memory is None else f"{e.memory / 2**30:.1f}"
        line = f"{stage.name:<20} {duration(e.seconds):>9} {memory:>8} {cost:>9.2f}  {e.advice}".rstrip()
        lines += [line, f"    {stage.command}"]
    dollars = machine.dollars_per_hour * total / 3600
    lines.append(f"{'in all':<20} {duration(total):>9} {most / 2**30:>8.1f} {dollars:>9.2f}")
    return lines


def duration(seconds: float) -> str:
    """`3 h 05 min`, `12 min`, `40 s`"""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60}h{minutes % 60:02d}min"


def run(cfg: PlanConfig, lines: Iterable[str] | None = None) -> None:
    if lines is None and sys.stdin.isatty():
        raise InputError("the plan reads a recipe's stages from standard input; try: bash speedrun.sh gpu8 --plan")
    stages = [parse_stage(line) for line in (sys.stdin if lines is None else lines) if line.strip()]
    if cfg.num_gpus:
        machine = plan.h100s(cfg.num_gpus)
    else:
        rt = runtime.start("cpu")
        machine = plan.this_cpu(runtime.peak_flops(rt), runtime.available_memory(rt), rt.dtype.itemsize)
    print("\n".join(table(stages, machine)))
    print(f"Estimates for {machine.name}; the rules and where they come from: nanochat/plan.py")


def main(argv: Sequence[str] | None = None) -> None:
    run_cli(PlanConfig, run, argv, about=__doc__)


if __name__ == "__main__":
    main()
