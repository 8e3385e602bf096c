"""What a run will take before it is started: parameters, FLOPs, memory, time, dollars. Estimates, and named so."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from nanochat.config import InputError
from nanochat.memory import CPU_PASS_TOKENS, CPU_SHARE, GPU_SHARE, fitting_rows, memory_bytes
from nanochat.scaling import Shape, rows_per_rank

# One H100: bf16 peak, and the share of it that the public depth-20 runs of the plain architecture reached
# (47.9-48.2% at depth 20, 21% at depth 8 over 200 steps).
H100_FLOPS = 989e12
H100_MEMORY = 80 * 2**30
DOLLARS_PER_GPU_HOUR = 3.00
EXPECTED_MFU = 0.45
# Of a large matmul's rate on two cores: depth 4 and 6 reached 59 to 82% compiled (docs/BENCHMARKS.md, Pretraining), and
# compiling gains 1.3 to 1.45 times (docs/EXPERIMENTS.md).
CPU_MFU, CPU_EAGER_MFU = 0.6, 0.43
# Of a training, from which on base_train compiles on a CPU: about ten minutes on two cores, and 10 to 45 s to compile.
COMPILE_FLOPS = 1e14


def train_seconds(shape: Shape, num_tokens: float, machine: Machine, compile: bool | None = None) -> float:
    flops = shape.flops_per_token * num_tokens
    return flops / (machine.rate(flops >= COMPILE_FLOPS if compile is None else compile) * machine.num_devices)


def dollars(seconds: float, num_gpus: int) -> float:
    return seconds / 3600 * num_gpus * DOLLARS_PER_GPU_HOUR


@dataclass(frozen=True)
class Machine:
    """Where stages run. Rates are of one device: a GPU, or all cores of a CPU."""

    name: str
    num_devices: int
    flops: float  # FLOP/s that compiled training reaches
    pass_seconds: float  # per layer: the least that a forward and backward pass takes
    decode_seconds: float  # per layer: the least that a new token takes, for all rows at once
    core_seconds: float  # per CORE example
    start_seconds: float  # a stage: imports, loading, compiling
    chars_per_second: float  # of tokenizer training
    dollars_per_hour: float  # all devices together; they cost as much while one works
    idle_memory: float  # bytes of a process before it has a model
    memory: float | None  # bytes a device; None = not looked at
    value_bytes: int = 2  # of an activation
    is_cpu: bool = False

    def rate(self, compile: bool) -> float:
        """FLOP/s. What a GPU loses by not compiling has not been measured."""
        return self.flops if compile or not self.is_cpu else self.flops * CPU_EAGER_MFU / CPU_MFU

    def rows(self, shape: Shape, rows: int) -> int | None:
        """The largest divisor of the rows whose training fits a device; all of them where memory is not looked at."""
        if self.memory is None:
            return rows
        share = CPU_SHARE if self.is_cpu else GPU_SHARE
        pass_tokens = CPU_PASS_TOKENS if self.is_cpu else math.inf
        found = fitting_rows(
            shape, rows, self.num_devices, share * self.memory, (False,), self.value_bytes, pass_tokens
        )
        return next((n for n, _ in found), None)


def h100s(num_gpus: int) -> Machine:
    return Machine(
        name=f"{num_gpus} x H100 at ${DOLLARS_PER_GPU_HOUR:.2f} a GPU and hour, {EXPECTED_MFU:.0%} of peak",
        num_devices=num_gpus,
        flops=H100_FLOPS * EXPECTED_MFU,
        pass_seconds=0.01,  # 1,307 fine-tuning steps at depth 8 in 107 s
        decode_seconds=0.000585,  # 467 steps of RL at depth 20, two prompts of 256 new tokens each, in 47 min
        core_seconds=0.06,  # all of CORE at depth 8 on eight GPUs in 11.5 min
        start_seconds=40,  # base_loss at depth 8, whole
        chars_per_second=36e6,  # 6e9 characters in 167 s
        dollars_per_hour=dollars(3600, num_gpus),
        idle_memory=0.0,  # what the driver takes is not in the reports' figures
        memory=H100_MEMORY,
    )


def this_cpu(peak_flops: float, memory: float | None = None, value_bytes: int = 4) -> Machine:
    """This machine without a GPU, from the FLOP/s of a large matmul on it; rates but CPU_MFU's are rough guesses."""
    return Machine(
        name=f"this CPU, {CPU_MFU:.0%} compiled and {CPU_EAGER_MFU:.0%} eager of the {peak_flops / 1e9:.0f} GFLOP/s "
        "measured in matmuls",
        num_devices=1,
        flops=CPU_MFU * peak_flops,
        pass_seconds=0.004,
        decode_seconds=0.001,
        core_seconds=0.02,
        start_seconds=6,
        chars_per_second=2e6,
        dollars_per_hour=0.0,
        idle_memory=0.7 * 2**30,
        memory=memory,
        value_bytes=value_bytes,
        is_cpu=True,
    )


def plan_lines(shape: Shape, steps: int, cfg: Any, machines: Sequence[Machine]) -> list[str]:
    """What a base training takes on each machine.

    Args:
        cfg: its config (scripts/base_train.py), with nothing left open but the device batch.
    """
    tokens = steps * cfg.total_batch_size
    return [
        f"depth {shape.n_layer}, width {shape.n_embd}, {shape.n_head} heads, vocabulary {shape.vocab_size:,}, "
        f"context {shape.sequence_len:,}, {shape.arch}",
        f"Number of parameters: {shape.num_params:,}",
        f"Estimated FLOPs per token: {shape.flops_per_token:e}",
        f"Total batch size: {cfg.total_batch_size:,} tokens",
        f"Learning rates: embedding {cfg.embedding_lr:.4g}, unembedding {cfg.unembedding_lr:.4g}, "
        f"matrices {cfg.matrix_lr:.4g}; weight decay {cfg.weight_decay:.4g}",
        f"Number of iterations: {steps:,}",
        f"Total number of training tokens: {tokens:,}",
        f"Tokens : Params ratio: {tokens / shape.num_params:.2f}",
        f"Total training FLOPs estimate: {shape.flops_per_token * tokens:e}",
        *(machine_line(shape, tokens, cfg, machine) for machine in machines),
    ]


def machine_line(shape: Shape, tokens: int, cfg: Any, machine: Machine) -> str:
    num_devices = machine.num_devices
    try:
        most = rows_per_rank(cfg.total_batch_size, shape.sequence_len, num_devices)
    except InputError as error:
        return f"{machine.name}: {error}"
    seconds = train_seconds(shape, tokens, machine, cfg.compile)
    cost = machine.dollars_per_hour * seconds / 3600
    rows, fit = cfg.device_batch_size, machine.rows(shape, most)
    advice = ""
    if fit is None:
        rows, advice = rows or 1, ", too much: not one row fits, lower --depth or --max_seq_len"
    elif rows is None:
        rows = fit
    elif machine.rows(shape, rows) != rows:
        advice = f", too much: use --device_batch_size={machine.rows(shape, rows)}"
    memory = memory_bytes(shape, rows, num_devices, value_bytes=machine.value_bytes) + machine.idle_memory
    where = "per GPU" if num_devices > 1 else "in all"
    return (
        f"{machine.name}: {seconds / 3600:.2f} h, ${cost:.2f}, {memory / 2**30:.1f} GiB {where} at {rows} rows{advice}"
    )


# The rest: rules of thumb for whole recipes. Those for GPUs are fitted to the times in public reports of this
# pipeline on 8 x H100 (depth 8 with 20,000 AQuA rows, depth 20), as each rule says.
SHARD_BYTES, DOWNLOAD_BYTES_PER_SECOND = 100e6, 100e6  # of a shard; of a data centre's line (assumed)
NUM_SHARDS = 6542
CORE_TASKS, CORE_EXAMPLES = 22, 91_037
TINYWORLD_CORE_TASKS, TINYWORLD_CORE_EXAMPLES = 7, 560
MID_STEPS = 809  # one pass over the real midtraining mixture, in steps of 524,288 tokens
SFT_ROWS = 21_839  # of the real mixture, without AQuA
CONVERSATION_TOKENS = {"real": 450, "tinyworld": 100}  # with padding (assumed)
PROMPT_TOKENS = 256  # of a task (assumed)
CACHE_BYTES = 8 << 30  # of keys and values: what the engine allows itself; more rows wait their turn
TASK_EXAMPLES = {
    "ARC-Easy": 2376,
    "ARC-Challenge": 1172,
    "MMLU": 14042,
    "GSM8K": 1319,
    "HumanEval": 164,
    "SpellingBee": 256,
    "AQUA": 254,
}
OTHER = 200  # tinyworld's
RL_EXAMPLES = {"GSM8K": 7473, "AQUA": 97_467, "SpellingBee": 80_000}
CATEGORICAL = ("ARC-Easy", "ARC-Challenge", "MMLU", "AQUA")


@dataclass(frozen=True)
class Estimate:
    """What a stage takes. Memory is the peak of one device, in bytes; None = hardly any."""

    seconds: float
    memory: float | None = None
    advice: str = ""


def download(num_shards: int | None) -> Estimate:
    return Estimate((num_shards or NUM_SHARDS) * SHARD_BYTES / DOWNLOAD_BYTES_PER_SECOND)


class Estimator:
    """Expected time and memory of stages of one model on `num_ranks` devices of a machine."""

    def __init__(self, machine: Machine, shape: Shape, num_ranks: int) -> None:
        self.machine, self.shape, self.num_ranks = machine, shape, num_ranks

    def _forward(self, num_tokens: float) -> float:
        """Seconds to evaluate tokens over all ranks: a third of their training."""
        return self._train(num_tokens) / 3

    def _train(self, num_tokens: float, compile: bool = False) -> float:
        return self.shape.flops_per_token * num_tokens / (self.machine.rate(compile) * self.num_ranks)

    def _passes(self, num_steps: float, num_tokens: float, accumulation: float, compile: bool = False) -> float:
        """Seconds of optimizer steps: arithmetic, or the least that their passes take if that is more."""
        least = num_steps * accumulation * self.shape.n_layer * self.machine.pass_seconds
        return max(self._train(num_tokens, compile), least)

    def _cache(self, rows: float, length: int) -> float:
        """Bytes of keys and values in bf16, without the engine's bound."""
        return 4 * rows * length * self.shape.n_layer * self.shape.n_embd

    def _generate(self, rows: float, new_tokens: int) -> float:
        """Seconds to add new tokens to the rows of one rank, in as many rounds as the cache needs."""
        rounds = math.ceil(self._cache(rows, PROMPT_TOKENS + new_tokens) / CACHE_BYTES)
        least = rounds * self.shape.n_layer * self.machine.decode_seconds
        return new_tokens * max(least, rows * self.shape.flops_per_token / 3 / self.machine.rate(False))

    def _weights(self, rows: float, length: int, logit_rows: float | None = None) -> float:
        """Bytes of a model that reads or answers: fp32 weights, cache, logits of the rows it reads at once."""
        logits = 6 * (rows if logit_rows is None else logit_rows) * length * self.shape.vocab_size
        return 4 * self.shape.num_params + min(self._cache(rows, length), CACHE_BYTES) + logits

    def training_memory(self, rows: int, sequence_len: int) -> float:
        shape = replace(self.shape, sequence_len=sequence_len)
        return memory_bytes(shape, rows, self.num_ranks, value_bytes=self.machine.value_bytes)

    def training(
        self, steps: int, total_batch_size: int, rows: int, validations: float, validation_tokens: float
    ) -> Estimate:
        """base_train and mid_train, compiled by base_train's rule."""
        tokens = steps * total_batch_size
        accumulation = total_batch_size / (rows * self.shape.sequence_len * self.num_ranks)
        compile = self.shape.flops_per_token * tokens >= COMPILE_FLOPS
        seconds = self._passes(steps, tokens, accumulation, compile) + self._forward(validations * validation_tokens)
        memory = self.training_memory(rows, self.shape.sequence_len)
        fit = self.machine.rows(self.shape, rows)
        return self._stage(seconds, memory, f"too much: use --device_batch_size={fit}" if fit != rows else "")

    def tokenizer(self, num_chars: int) -> Estimate:
        return Estimate(self.machine.start_seconds + num_chars / self.machine.chars_per_second)

    def loss(self, split_tokens: int, rows: int) -> Estimate:
        return self._stage(self._forward(2 * split_tokens), self._weights(rows, self.shape.sequence_len))

    def core_seconds(self, num_examples: int) -> float:
        return num_examples * self.machine.core_seconds / self.num_ranks

    def core(self, num_examples: int, rows: int) -> Estimate:
        """The examples differ in length; 1,024 tokens is a long one."""
        return self._stage(self.core_seconds(num_examples), self._weights(rows, min(1024, self.shape.sequence_len)))

    def fine_tuning(
        self, steps: int, examples_per_step: int, rows: int, validation_batches: float, conversation_tokens: int
    ) -> Estimate:
        tokens = steps * examples_per_step * conversation_tokens
        accumulation = examples_per_step / (rows * self.num_ranks)
        seconds = self._passes(steps, tokens, accumulation)
        seconds += self._forward(validation_batches * rows * conversation_tokens * self.num_ranks)
        return self._stage(seconds, self.training_memory(rows, min(4 * conversation_tokens, self.shape.sequence_len)))

    def chat_eval(self, task_names: Sequence[str], max_problems: int | None, rows: int, new_tokens: int) -> Estimate:
        """Answers are taken to be as long as allowed."""
        seconds = 0.0
        for name in task_names:
            n = min(TASK_EXAMPLES.get(name, OTHER), max_problems or math.inf)
            batches = math.ceil(n / (rows * self.num_ranks))
            seconds += self._forward(n * PROMPT_TOKENS) + batches * self._generate(rows, 1)
            if name not in CATEGORICAL:
                seconds += batches * self._generate(rows, new_tokens)
        return self._stage(seconds, self._weights(rows, min(PROMPT_TOKENS + new_tokens, self.shape.sequence_len)))

    def reinforcement(
        self, steps: int, prompts: int, samples: int, rows: int, new_tokens: int, evals: float, eval_examples: int
    ) -> Estimate:
        """Each rank samples all its answers of a step at once, then learns from them, `rows` at a time."""
        answers = prompts * samples / self.num_ranks
        length = min(PROMPT_TOKENS + new_tokens, self.shape.sequence_len)
        step = self._generate(answers, new_tokens)
        step += self._passes(1, prompts * samples * length, answers / rows)
        held_out = eval_examples * rows / self.num_ranks
        seconds = steps * step + evals * self._generate(held_out, new_tokens)
        sampling = self._weights(max(answers, held_out), length, logit_rows=1)
        return self._stage(seconds, max(self.training_memory(rows, length), sampling))

    def _stage(self, seconds: float, memory: float, advice: str = "") -> Estimate:
        return Estimate(self.machine.start_seconds + seconds, self.machine.idle_memory + memory, advice)
