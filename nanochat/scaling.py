"""From depth to everything: width, parameters, FLOPs, batch, horizon, learning rates. Pure functions, no torch.

# L layers, d = n_embd, V vocab_size, T sequence_len; N parameters, B tokens a step, D tokens of a run
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from nanochat.config import InputError

ASPECT_RATIO = 64  # n_embd per layer (the reference's choice)
HEAD_DIM = 128  # target head size (the reference's choice)
ARCHS = ("plain", "modern")
# What `modern` adds to `plain` (gpt.py); each can be left out by itself (bench/ablate.py).
EXTRAS = ("lambdas", "value_embeds", "bigram", "offset_keys")
GATE_CHANNELS = 12  # of the normalised residual stream, that the gate of the value embeddings reads
# Rows of the bigram table per token of the vocabulary, up to a depth and beyond it: twice as many are worth 0.01 bits
# per byte at depths 2 and 4 for no time (docs/EXPERIMENTS.md), but 0.4 billion weights more at depth 20.
BIGRAM_ROWS = {8: 10, math.inf: 5}


@dataclass(frozen=True)
class Settings:
    """What the depth dial decides unless a flag does; the names are those of the flags."""

    total_batch_size: int  # tokens
    target_param_data_ratio: float  # D/N, N being num_params of plain and num_scaling_params of modern
    embedding_lr: float
    unembedding_lr: float
    matrix_lr: float
    weight_decay: float  # plain: of the tables and the head; modern: of the matrices
    grad_clip: float  # 0 = none
    warmup_ratio: float
    warmdown_ratio: float
    final_lr_frac: float


RATES = ("embedding_lr", "unembedding_lr", "matrix_lr")

PLAIN = Settings(2**19, 20, 0.2, 0.004, 0.02, 0.0, 1.0, 0.0, 0.2, 0.0)  # the reference's, at any depth

# `modern`: the values at the reference depth, those of the public recipe (batch, ratio, matrices' rate, decay), and how
# they move from there: by the literature above the reference's number of tokens, which no run of ours had, by our own
# runs below it (docs/EXPERIMENTS.md; runs/scaling_laws.sh). The dial's own series: docs/BENCHMARKS.md, The miniseries.
MODERN = Settings(2**19, 12.0, 0.2, 0.004, 0.02, 0.28, 0.0, 0.0, 0.6, 0.05)
REFERENCE_DEPTH = 12
BATCH_EXPONENT = 0.383  # B ~ D^0.383 (Bergsma et al. 2025, arXiv 2505.13738: the critical batch grows with the data)
# In runs with less data than the reference's: the best batches were near 5,400 tokens for 0.7M (depth 4), 8,300 for 2M
# and 12,000 for 8M (depth 2); the power that starts at the reference and passes nearest to them (docs/EXPERIMENTS.md).
SHORT_BATCH_EXPONENT = 0.66
# Rates ~ sqrt(B) (Malladi et al. 2022, arXiv 2205.10287; public runs up to depth 26), and in runs with less data than
# the reference's ~ D^-x as well: x fitted to depth 4 in 61 steps of 16,384 tokens, where 0.12 to 0.16 was best for the
# matrices and two to three times the reference's rates for tables and head (docs/EXPERIMENTS.md).
SHORTAGE_EXPONENTS = {"matrix_lr": 0.5, "embedding_lr": 0.37, "unembedding_lr": 0.37}
LR_MOST = 6.5  # times the reference's: still shorter runs are beyond the rule
# Where the rate ends rises in the same runs, to FINAL_MOST for 0.7M and for 2M tokens (0, 0.1 and 0.2 were tried).
FINAL_EXPONENT, FINAL_MOST = 0.22, 0.2
# Of Muon: 0.75 is worth 0.005 bits per byte in runs of 41 to 122 steps and nothing in 1,000 (docs/EXPERIMENTS.md).
FIRST_MOMENTUM = {"plain": 0.85, "modern": 0.75}
WINDOW_PARTS, WINDOW_MULTIPLE = 4, 128  # a short window: T/4, rounded up to what attention kernels take at once


@dataclass(frozen=True)
class Part:
    """Some of a model's weights.

    kind: "matrix" (in a block; Muon's), "head" (multiplies as well), "table" (only looked up) or "scalar".
    """

    kind: str
    num_params: int


@dataclass(frozen=True)
class Shape:
    """The sizes of a model."""

    n_layer: int
    n_embd: int
    n_head: int
    n_kv_head: int
    vocab_size: int
    sequence_len: int
    arch: str = "plain"
    window_pattern: str = "L"  # see windows()
    short_window: int | None = None
    extras: tuple[str, ...] | None = None  # None = all of the arch's
    bigram_rows: int | None = None  # None = by depth

    def has(self, extra: str) -> bool:
        """Whether the model has one of EXTRAS."""
        assert extra in EXTRAS
        return extra in (EXTRAS if self.arch == "modern" else ()) if self.extras is None else extra in self.extras

    @property
    def value_layers(self) -> list[int]:
        """Layers with value embeddings: every second one, the last included (as in the reference's later model)."""
        return [i for i in range(self.n_layer) if i % 2 == (self.n_layer - 1) % 2] if self.has("value_embeds") else []

    @property
    def parts(self) -> dict[str, Part]:
        """All weights by name: the one place that says what a model consists of."""
        head_dim = self.n_embd // self.n_head
        attention = 2 * self.n_embd**2 + 2 * self.n_embd * self.n_kv_head * head_dim
        parts = {
            "wte": Part("table", self.vocab_size * self.n_embd),
            "attention": Part("matrix", self.n_layer * attention),
            "mlp": Part("matrix", self.n_layer * 8 * self.n_embd**2),
            "lm_head": Part("head", self.vocab_size * self.n_embd),
        }
        if layers := len(self.value_layers):
            parts["value_embeds"] = Part("table", layers * self.vocab_size * self.n_kv_head * head_dim)
            parts["value_gates"] = Part("scalar", layers * min(GATE_CHANNELS, self.n_embd) * self.n_kv_head)
        if self.has("bigram"):
            rows = self.bigram_rows or bigram_rows(self.n_layer)
            parts["bigram"] = Part("table", rows * self.vocab_size * self.n_embd)
            parts["bigram_lambdas"] = Part("scalar", self.n_layer)
        if self.has("lambdas"):
            parts["lambdas"] = Part("scalar", 2 * self.n_layer)
        return parts

    def count(self, *kinds: str) -> int:
        return sum(part.num_params for part in self.parts.values() if part.kind in kinds)

    @property
    def num_params(self) -> int:
        return sum(part.num_params for part in self.parts.values())

    @property
    def num_matrix_params(self) -> int:
        return self.count("matrix")

    @property
    def num_scaling_params(self) -> int:
        """N of the scaling rules: what multiplies. Public runs found the best D/N then hardly moves with depth,
        while with the tables in N it falls from model to model."""
        return self.count("matrix", "head")

    @property
    def num_horizon_params(self) -> int:
        """N of --target_param_data_ratio: the reference counts all parameters."""
        return self.num_params if self.arch == "plain" else self.num_scaling_params

    @property
    def flops_per_token(self) -> int:
        """Training FLOPs: 6 per weight that multiplies, and 12*d*S for the attention scores and values of a layer
        with S visible positions (Chowdhery et al. 2022, arXiv 2204.02311, appendix B)."""
        visible = sum(windows(self.window_pattern, self.n_layer, self.sequence_len, self.short_window))
        return 6 * self.num_scaling_params + 12 * self.n_embd * visible


def shape_from_depth(
    depth: int,
    vocab_size: int,
    sequence_len: int,
    aspect_ratio: int = ASPECT_RATIO,
    head_dim: int = HEAD_DIM,
    arch: str = "plain",
) -> Shape:
    """The model that the depth dial means.

    Raises:
        InputError: no layer, or a width that does not divide into heads of an even size.
    """
    if depth < 1:
        near = _nearest_that_divides(1, aspect_ratio, head_dim)
        raise InputError(f"--depth {depth} must be at least 1; try {near}")
    n_embd, n_head = _width(depth, aspect_ratio, head_dim)
    if not _divides(n_embd, n_head):
        raise InputError(
            f"--depth {depth} gives a width of {n_embd} that {n_head} heads do not divide into even sizes; try "
            + _nearest_that_divides(depth, aspect_ratio, head_dim)
        )
    return Shape(depth, n_embd, n_head, n_head, vocab_size, sequence_len, arch)


def bigram_rows(n_layer: int) -> int:
    return next(rows for most, rows in BIGRAM_ROWS.items() if n_layer <= most)


def _width(depth: int, aspect_ratio: int, head_dim: int) -> tuple[int, int]:
    n_embd = depth * aspect_ratio
    return n_embd, max(1, math.ceil(n_embd / head_dim))


def _divides(n_embd: int, n_head: int) -> bool:
    return n_embd % n_head == 0 and (n_embd // n_head) % 2 == 0


def least_depth(width: int, multiple: int, aspect_ratio: int, head_dim: int) -> int | None:
    """The first one whose model is at least so wide, by a multiple; None where the heads allow none."""
    first = math.ceil(width / aspect_ratio)
    for depth in range(first, first + multiple * head_dim + 1):
        n_embd, n_head = _width(depth, aspect_ratio, head_dim)
        if n_embd % multiple == 0 and _divides(n_embd, n_head):
            return depth
    return None


def _nearest_that_divides(depth: int, aspect_ratio: int, head_dim: int) -> str:
    """Flags near these that give heads of an even size: another depth, else another head size as well."""
    depths = sorted(range(max(1, depth - 3), depth + 4), key=lambda d: (abs(d - depth), d))
    for d in depths:
        if _divides(*_width(d, aspect_ratio, head_dim)):
            return f"--depth={d}"
    for d in depths:
        width = d * aspect_ratio
        sizes = [h for h in range(2, width + 1, 2) if width % h == 0]
        if sizes:
            size = min(sizes, key=lambda h: abs(h - head_dim))
            return f"--depth={d} --head_dim={size}"
    raise AssertionError("one of two neighbouring depths is even, and its width has heads of 2")


def windows(pattern: str, n_layer: int, sequence_len: int, short: int | None = None) -> tuple[int, ...]:
    """Positions that each layer's attention sees, from a pattern of letters that is repeated over the layers.

    L sees the whole context, S `short` positions (None = a quarter of the context, rounded up to a multiple of 128); a
    short window that would be longer than the context is the whole context. The last layer is L whatever the pattern
    says.

    Raises:
        InputError: another letter, or none.
    """
    letters = pattern.upper()
    if not letters or set(letters) - set("SL"):
        near = "".join(letter for letter in letters if letter in "SL") or "L"
        raise InputError(
            f"--window_pattern {pattern!r} must be letters S (short window) and L (all of the context); try "
            f"--window_pattern={near}"
        )
    if short is None:
        short = math.ceil(sequence_len / WINDOW_PARTS / WINDOW_MULTIPLE) * WINDOW_MULTIPLE
    sizes = {"S": min(short, sequence_len), "L": sequence_len}
    layers = [sizes[letters[i % len(letters)]] for i in range(n_layer - 1)]
    return (*layers, sequence_len)


def settings(
    shape: Shape,
    world_size: int,
    rows: int | None = None,
    given: Mapping[str, Any] | None = None,
    iterations: int | None = None,
    target_flops: float | None = None,
) -> Settings:
    """What follows from the depth for a run on `world_size` ranks.

    `plain` has the reference's values. `modern`: with D = ratio * N tokens to see, and B_ref, D_ref those of depth 12
    with this vocabulary and context,

        B = B_ref * (D/D_ref)^0.383, with less data than D_ref ^0.66, rounded to what the ranks can share;
        learning rates * sqrt(B/B_ref), and of a run with less data than D_ref * (D_ref/D)^x (SHORTAGE_EXPONENTS);
        the rate's end * (D_ref/D)^0.22, at most 0.2;
        weight decay * sqrt(B/B_ref) * D_ref/D: then the steps over which it forgets stay the same part of a run
        (Wang & Aitchison 2024, arXiv 2405.13698); with less data than D_ref there is none.

    Args:
        rows: a rank takes at once, where that is decided already.
        given: values of flags by name; they are taken as they are. None = not given.
        iterations, target_flops: the horizon, where the ratio does not decide it.

    Raises:
        InputError: a value that no run can have.
    """
    flags = {name: value for name, value in (given or {}).items() if value is not None}
    check_numbers(shape, flags, world_size, rows)
    if shape.arch == "plain":
        return Settings(**{**asdict(PLAIN), **flags})
    ratio = flags.get("target_param_data_ratio", MODERN.target_param_data_ratio)
    tokens = ratio * shape.num_horizon_params
    if iterations is None and target_flops is not None and 0 < target_flops < math.inf:
        tokens = target_flops / shape.flops_per_token
    reference = reference_tokens(shape)
    batch = flags.get("total_batch_size")
    if batch is None:
        exponent = BATCH_EXPONENT if tokens >= reference else SHORT_BATCH_EXPONENT
        ideal = MODERN.total_batch_size * (tokens / reference) ** exponent
        batch = shared_batch(ideal, tokens, (rows or 1) * shape.sequence_len * world_size)
    tokens = batch * iterations if iterations else max(tokens, batch)
    scale = (batch / MODERN.total_batch_size) ** 0.5
    shortage = max(1.0, reference / tokens)
    auto = {
        name: getattr(MODERN, name) * min(LR_MOST, scale * shortage**exponent)
        for name, exponent in SHORTAGE_EXPONENTS.items()
    }
    auto["final_lr_frac"] = min(FINAL_MOST, MODERN.final_lr_frac * shortage**FINAL_EXPONENT)
    auto["weight_decay"] = MODERN.weight_decay * scale * reference / tokens if tokens >= reference else 0.0
    sizes = {"total_batch_size": batch, "target_param_data_ratio": ratio}
    return Settings(**{**asdict(MODERN), **auto, **sizes, **flags})


def with_settings(cfg: Any, shape: Shape, world_size: int) -> Any:
    """The config of a run (scripts/base_train.py) with every setting decided that it leaves open (None)."""
    given = {f.name: getattr(cfg, f.name) for f in fields(Settings)}
    whole = settings(shape, world_size, cfg.device_batch_size, given, cfg.num_iterations, cfg.target_flops)
    return replace(cfg, **asdict(whole))


def reference_tokens(shape: Shape) -> float:
    """D_ref: tokens of the reference depth's run with this vocabulary and context."""
    d12 = shape_from_depth(REFERENCE_DEPTH, shape.vocab_size, shape.sequence_len, arch=shape.arch)
    return MODERN.target_param_data_ratio * d12.num_horizon_params


def shared_batch(ideal: float, most: float, unit: int) -> int:
    """The batch near `ideal` that is a multiple of `unit` tokens, has three significant bits, so that passes of many
    rows divide it (the nearest power of two would be off by up to 1.41, this by at most 1/9), and is at most `most`.
    """
    n = max(ideal / unit, 1.0)
    step = max(1, 2 ** (math.floor(math.log2(n)) - 2))
    n = max(1, round(n / step) * step)
    return unit * min(n, max(1, math.floor(most / unit)))


def check_numbers(shape: Shape, flags: Mapping[str, Any], world_size: int, rows: int | None) -> None:
    """Refuse what no run can have.

    Raises:
        InputError: a batch that the ranks cannot share, a rate or ratio that is no number, infinite or negative, or a
            ratio of 0.
    """
    for name, value in flags.items():
        if name == "total_batch_size":
            grad_accum_steps(value, rows or 1, shape.sequence_len, world_size)
        if name == "target_param_data_ratio" and not 0 < value < math.inf:
            auto = PLAIN.total_batch_size if shape.arch == "plain" else (rows or 1) * shape.sequence_len * world_size
            least = rounded_up(flags.get("total_batch_size", auto) / shape.num_horizon_params)
            raise InputError(f"--{name} {value} gives no step; the least that gives one is --{name}={least}")
        if name.endswith("_ratio") and name != "target_param_data_ratio" and not 0 <= value <= 1:
            raise InputError(
                f"--{name} {value} must be a part of the run, from 0 to 1; try --{name}={min(1, max(0, value))}"
            )
        if (name in RATES or name in ("weight_decay", "grad_clip", "final_lr_frac")) and not 0 <= value < math.inf:
            raise InputError(f"--{name} {value} must be a number from 0; try --{name}={getattr(PLAIN, name)}")


def rounded_up(value: float) -> str:
    """The value to three digits, not below it."""
    digits = 2 - math.floor(math.log10(value))
    return f"{math.ceil(value * 10**digits) / 10**digits:.{max(0, digits)}f}"


def num_iterations(
    shape: Shape,
    total_batch_size: int,
    iterations: int | None,
    target_flops: float | None,
    target_param_data_ratio: float | None,
) -> tuple[int, str]:
    """(optimizer steps, the rule that gave them): explicit steps, else FLOPs, else tokens per parameter.

    Raises:
        InputError: no rule is set, or the one that is gives no step.
    """
    step_flops = shape.flops_per_token * total_batch_size
    if iterations is not None:
        steps, rule, value, least = float(iterations), "num_iterations", float(iterations), "1"
    elif target_flops is not None:
        steps, rule, value = target_flops / step_flops, "target_flops", target_flops
        least = f"{step_flops:.3e}"
    elif target_param_data_ratio is not None:
        tokens = target_param_data_ratio * shape.num_horizon_params
        steps, rule, value = tokens / total_batch_size, "target_param_data_ratio", target_param_data_ratio
        least = rounded_up(total_batch_size / shape.num_horizon_params)
    else:
        raise InputError(
            "no horizon: give --num_iterations, --target_flops or --target_param_data_ratio, e.g. "
            "--target_param_data_ratio=20"
        )
    if math.isfinite(steps):
        steps = round(steps) if rule == "target_flops" else math.floor(steps)
    if not 1 <= steps < math.inf:
        raise InputError(
            f"--{rule} {value:g} gives no step of {total_batch_size:,} tokens; the least that gives one is "
            f"--{rule}={least}"
        )
    return int(steps), rule


def rows_per_rank(total_batch_size: int, sequence_len: int, world_size: int) -> int:
    """Rows of a step on each rank: what a device batch must divide.

    Raises:
        InputError: the batch is no multiple of a row of each rank.
    """
    return grad_accum_steps(total_batch_size, 1, sequence_len, world_size)


def grad_accum_steps(total_batch_size: int, device_batch_size: int, sequence_len: int, world_size: int) -> int:
    """Micro-batches per optimizer step.

    Raises:
        InputError: the batch is no multiple of what one pass over all ranks takes.
    """
    tokens = device_batch_size * sequence_len * world_size
    if total_batch_size < 1 or total_batch_size % tokens:
        near = max(tokens, round(total_batch_size / tokens) * tokens)
        raise InputError(
            f"--total_batch_size {total_batch_size} is no multiple of the {tokens} tokens of one pass "
            f"({device_batch_size} rows x {sequence_len} x {world_size} ranks); try --total_batch_size={near}"
        )
    return total_batch_size // tokens


def lr_multiplier(
    progress: float, warmup: float = 0.0, warmdown: float = 0.2, final: float = 0.0, warmup_step: float = 0.0
) -> float:
    """Trapezoid over progress in [0, 1]: up over the first `warmup`, flat, down to `final` over the last
    `warmdown`. warmup_step is the progress of one step, so that the first step of a warm-up is not zero."""
    progress = min(max(progress, 0.0), 1.0)
    if progress < warmup:
        return min(1.0, (progress + warmup_step) / warmup)
    if warmdown > 0 and progress > 1 - warmdown:
        rest = (1 - progress) / warmdown
        return rest + (1 - rest) * final
    return 1.0


def schedule(recipe: Any, step: int, steps: int, arch: str) -> tuple[float, float]:
    """(learning rate multiplier, Muon momentum) of a step, from 0, in base training by `Settings`."""
    lrm = lr_multiplier(step / steps, recipe.warmup_ratio, recipe.warmdown_ratio, recipe.final_lr_frac, 1 / steps)
    return lrm, muon_momentum(step, FIRST_MOMENTUM[arch])


def muon_momentum(step: int, first: float = FIRST_MOMENTUM["plain"]) -> float:
    """From the first to 0.95 over 300 steps (the reference's habit)."""
    return first + (0.95 - first) * min(step / 300, 1.0)


def round_to_multiple(value: int, multiple: int) -> int:
    return max(multiple, round(value / multiple) * multiple)
