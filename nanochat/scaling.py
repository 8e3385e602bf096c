"""From depth to everything: width, parameters, FLOPs, horizon, memory. Pure functions, no torch.

# L layers, d = n_embd, V vocab_size, T sequence_len
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from nanochat.config import InputError

ASPECT_RATIO = 64  # n_embd per layer (the reference's choice)
HEAD_DIM = 128  # target head size (the reference's choice)

# Activation bytes per token, layer and channel, and logit bytes per token and vocabulary entry: fitted to the
# peak memory that two public runs of the plain architecture report (19,176 MiB at depth 8, 75,422 MiB at
# depth 20, 32 rows of 2,048 tokens a GPU).
ACTIVATION_BYTES = 38.6
LOGIT_BYTES = 2.05


@dataclass(frozen=True)
class Shape:
    """The sizes of a plain model."""

    n_layer: int
    n_embd: int
    n_head: int
    n_kv_head: int
    vocab_size: int
    sequence_len: int

    @property
    def num_matrix_params(self) -> int:
        head_dim = self.n_embd // self.n_head
        attention = 2 * self.n_embd**2 + 2 * self.n_embd * self.n_kv_head * head_dim
        return self.n_layer * (attention + 8 * self.n_embd**2)

    @property
    def num_params(self) -> int:
        return self.num_matrix_params + 2 * self.vocab_size * self.n_embd

    @property
    def flops_per_token(self) -> int:
        """Training FLOPs: 6 per matrix parameter (the embedding table is a look-up, the head counts), and
        12*L*d*T for attention scores and values (Chowdhery et al. 2022, arXiv 2204.02311, appendix B)."""
        matmul = 6 * (self.num_params - self.vocab_size * self.n_embd)
        return matmul + 12 * self.n_layer * self.n_embd * self.sequence_len


def shape_from_depth(
    depth: int,
    vocab_size: int,
    sequence_len: int,
    aspect_ratio: int = ASPECT_RATIO,
    head_dim: int = HEAD_DIM,
) -> Shape:
    """The model that the depth dial means.

    Raises:
        InputError: the width does not divide into heads of an even size.
    """
    n_embd, n_head = _width(depth, aspect_ratio, head_dim)
    if not _divides(n_embd, n_head):
        near = [d for d in range(max(1, depth - 3), depth + 4) if _divides(*_width(d, aspect_ratio, head_dim))]
        best = min(near, key=lambda d: abs(d - depth), default=2 * depth)
        raise InputError(
            f"--depth {depth} gives a width of {n_embd} that {n_head} heads do not divide; try --depth={best}"
        )
    return Shape(depth, n_embd, n_head, n_head, vocab_size, sequence_len)


def _width(depth: int, aspect_ratio: int, head_dim: int) -> tuple[int, int]:
    n_embd = depth * aspect_ratio
    return n_embd, max(1, math.ceil(n_embd / head_dim))


def _divides(n_embd: int, n_head: int) -> bool:
    return n_embd % n_head == 0 and (n_embd // n_head) % 2 == 0


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
    if iterations is not None:
        steps, rule = iterations, "num_iterations"
    elif target_flops is not None:
        steps, rule = round(target_flops / (shape.flops_per_token * total_batch_size)), "target_flops"
    elif target_param_data_ratio is not None:
        steps = math.floor(target_param_data_ratio * shape.num_params / total_batch_size)
        rule = "target_param_data_ratio"
    else:
        raise InputError(
            "no horizon: give --num_iterations, --target_flops or --target_param_data_ratio, e.g. "
            "--target_param_data_ratio=20"
        )
    if steps < 1:
        raise InputError(
            f"--{rule} gives {steps} optimizer steps of {total_batch_size:,} tokens; raise it, or try "
            "--num_iterations=1"
        )
    return steps, rule


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


def memory_bytes(shape: Shape, device_batch_size: int, world_size: int) -> float:
    """Estimated peak memory of one rank while training: fp32 weights and gradients, sharded optimizer state
    (8 bytes per embedding weight, 4 per matrix weight), activations and logits."""
    tokens = device_batch_size * shape.sequence_len
    weights = 8 * shape.num_params
    embeddings = shape.num_params - shape.num_matrix_params
    state = (8 * embeddings + 4 * shape.num_matrix_params) / world_size
    activations = ACTIVATION_BYTES * tokens * shape.n_layer * shape.n_embd
    return weights + state + activations + LOGIT_BYTES * tokens * shape.vocab_size


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


def muon_momentum(step: int) -> float:
    """0.85 to 0.95 over the first 300 steps (the reference's habit)."""
    return 0.85 + 0.10 * min(step / 300, 1.0)


def round_to_multiple(value: int, multiple: int) -> int:
    return max(multiple, round(value / multiple) * multiple)
