"""What a run will take before it is started: parameters, FLOPs, memory, time, dollars. Estimates, and named so."""

from __future__ import annotations

from nanochat.scaling import Shape, memory_bytes

# One H100: bf16 peak, and the share of it that the public depth-20 runs of the plain architecture reached
# (47.9-48.2% at depth 20, 21% at depth 8 over 200 steps).
H100_FLOPS = 989e12
H100_MEMORY = 80 * 2**30
DOLLARS_PER_GPU_HOUR = 3.00
EXPECTED_MFU = 0.45


def train_seconds(shape: Shape, num_tokens: float, num_gpus: int) -> float:
    return shape.flops_per_token * num_tokens / (H100_FLOPS * num_gpus * EXPECTED_MFU)


def dollars(seconds: float, num_gpus: int) -> float:
    return seconds / 3600 * num_gpus * DOLLARS_PER_GPU_HOUR


def fitting_batch(shape: Shape, device_batch_size: int, world_size: int) -> int | None:
    """The largest power-of-two fraction of the device batch that fits an 80 GB card; None if no row does."""
    while device_batch_size >= 1:
        if memory_bytes(shape, device_batch_size, world_size) < 0.95 * H100_MEMORY:
            return device_batch_size
        device_batch_size //= 2
    return None


def plan_lines(shape: Shape, steps: int, total_batch_size: int, device_batch_size: int) -> list[str]:
    tokens = steps * total_batch_size
    lines = [
        f"depth {shape.n_layer}, width {shape.n_embd}, {shape.n_head} heads, vocabulary {shape.vocab_size:,}, "
        f"context {shape.sequence_len:,}",
        f"Number of parameters: {shape.num_params:,}",
        f"Estimated FLOPs per token: {shape.flops_per_token:e}",
        f"Number of iterations: {steps:,}",
        f"Total number of training tokens: {tokens:,}",
        f"Tokens : Params ratio: {tokens / shape.num_params:.2f}",
        f"Total training FLOPs estimate: {shape.flops_per_token * tokens:e}",
    ]
    for gpus in (1, 8):
        seconds = train_seconds(shape, tokens, gpus)
        memory = memory_bytes(shape, device_batch_size, gpus)
        fit = fitting_batch(shape, device_batch_size, gpus)
        way_out = f"use --device_batch_size={fit}" if fit else "not one row fits, lower --depth or --max_seq_len"
        advice = "" if fit == device_batch_size else f", too much: {way_out}"
        lines.append(
            f"{gpus} x H100 (estimate at {EXPECTED_MFU:.0%} of peak): {seconds / 3600:.2f} h, "
            f"${dollars(seconds, gpus):.2f}, {memory / 2**30:.1f} GiB per GPU at {device_batch_size} rows{advice}"
        )
    return lines
