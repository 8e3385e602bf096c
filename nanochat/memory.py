"""How much memory a rank of a training run takes, and what fits: estimates from the sizes alone, no torch."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace

from nanochat.scaling import Shape

# Values kept for the backward pass per token, layer and channel: fitted, with the logits below, to the peak memory
# that two public runs of the plain architecture in bf16 report (19,176 MiB at depth 8, 75,422 MiB at depth 20, 32 rows
# of 2,048 tokens a GPU). What autograd keeps of ours, not compiled, at any depth, on a CPU: 19 to 20 in fp32; in bf16
# the bytes of 23 to 24, as some of it is fp32.
ACTIVATION_VALUES = 19.3
# With lambdas the residual stream is fp32 in any compute dtype. Counted in the same way: 21 to 22 in fp32, and in bf16
# the bytes of 26 to 28. That is so many values in the compute dtype, and so many that are fp32 in any.
LAMBDA_VALUES, STREAM_VALUES = 15.5, 6.0
WHOLE_LOGIT_BYTES = 2.05  # of those runs, which held all logits at once
# Our loss holds the logits of a chunk: as the head gives them, sigmoids, exponentials, gradient (fp32, and one in the
# compute dtype).
LOGITS_AT_ONCE = 1 << 27
LOGIT_BYTES = 16.0

# Of the free memory, what training is planned to take. The rest is for what the memory model does not know: workspaces,
# fragments, evaluations. On a CPU other programs want some, and the kernel kills who takes too much: no error comes.
GPU_SHARE, CPU_SHARE = 0.95, 0.7
CPU_PASS_TOKENS = 8192  # that a CPU takes at once: assumed to fill its cores; more would only take memory


def memory_bytes(
    shape: Shape,
    device_batch_size: int,
    world_size: int,
    recompute: bool = False,
    chunked_loss: bool = True,
    value_bytes: int = 2,
) -> float:
    """Estimated peak memory of one rank while training: fp32 weights and gradients, optimizer state, activations and
    logits.

    Args:
        recompute: each block keeps its input only, and computes the rest again in the backward pass.
        chunked_loss: the loss holds at most LOGITS_AT_ONCE logits; False = all of them, as the public runs did.
        value_bytes: of an activation: 2 in bf16, 4 in fp32.
    """
    tokens = device_batch_size * shape.sequence_len
    weights = 8 * shape.num_params + optimizer_bytes(shape, world_size)
    block, between = ACTIVATION_VALUES * value_bytes, float(value_bytes)  # bytes a token and channel
    if shape.has("lambdas"):
        block, between = LAMBDA_VALUES * value_bytes + 4 * STREAM_VALUES, 8.0  # the stream before and after the lambdas
    # recomputing: every block's input, and one block at a time in full
    kept = block + shape.n_layer * between if recompute else shape.n_layer * block
    activations = kept * tokens * shape.n_embd
    num_logits = tokens * shape.vocab_size
    logits = LOGIT_BYTES * min(num_logits, LOGITS_AT_ONCE) if chunked_loss else WHOLE_LOGIT_BYTES * num_logits
    return weights + activations + logits


def optimizer_bytes(shape: Shape, world_size: int) -> float:
    """State of one rank: 8 bytes per weight of AdamW's, 4 per matrix weight, shared out over the ranks."""
    matrices = shape.num_matrix_params
    return (8 * (shape.num_params - matrices) + 4 * matrices) / world_size


def fitting_rows(
    shape: Shape,
    rows: int,
    world_size: int,
    available: float,
    ways: Sequence[bool] = (False,),
    value_bytes: int = 2,
    pass_tokens: float = math.inf,
) -> Iterator[tuple[int, bool]]:
    """(rows a pass, whether blocks recompute): the divisors of `rows` that fit in `available` bytes, the best first.

    Args:
        ways: whether blocks recompute, in the order to try. Recomputing costs up to a third of the speed, so it
            belongs last: it comes in when not one row fits without.
        pass_tokens: more in a pass are of no use; one row always is.
    """
    for recompute in ways:
        for n in divisors(rows):
            if n > 1 and n * shape.sequence_len > pass_tokens:
                continue
            if memory_bytes(shape, n, world_size, recompute, value_bytes=value_bytes) <= available:
                yield n, recompute


def smaller(
    shape: Shape, world_size: int, available: float, ways: Sequence[bool] = (False,), value_bytes: int = 2
) -> str:
    """Flags of the nearest model of which a row fits: with half the context, or a quarter ..., else fewer layers."""

    def fits(candidate: Shape) -> bool:
        return any(fitting_rows(candidate, 1, world_size, available, ways, value_bytes))

    context = shape.sequence_len // 2
    while context >= 128:
        if fits(replace(shape, sequence_len=context)):
            return f"--max_seq_len={context}"
        context //= 2
    width = shape.n_embd // shape.n_layer
    for depth in range((shape.n_layer - 1) // 2 * 2, 0, -2):  # even ones divide into heads
        if fits(replace(shape, n_layer=depth, n_embd=depth * width, n_head=1, n_kv_head=1)):
            return f"--depth={depth}"
    return "a machine with more memory"


def less_memory(sequence_len: int, n_layer: int, recompute: bool) -> str:
    """A flag of base_train for a run of which one row was too much, whatever the estimates say."""
    if not recompute:
        return "--recompute"
    return f"--max_seq_len={sequence_len // 2}" if sequence_len >= 256 else f"--depth={half_depth(n_layer)}"


def half_depth(n_layer: int) -> int:
    return max(1, n_layer // 4 * 2)  # even ones divide into heads


def divisors(n: int) -> list[int]:
    """From n down to 1."""
    small = [d for d in range(1, math.isqrt(n) + 1) if n % d == 0]
    return sorted({*small, *(n // d for d in small)}, reverse=True)
