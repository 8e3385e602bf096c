"""Kernels of a decode step on a CPU. Addresses are of contiguous tensors, which nanochat/cpu_decode.py checks."""

def linear(
    kind: str, x: int, rows: int, k: int, parts: list[tuple[int, int, int]], y: int, norm: bool, then: str
) -> None:
    """y (rows, sum of n) fp32 = f(x (rows, k) fp32 times the weights of each part, side by side).

    kind: of the weights: float32, bfloat16 or int8; parts: (weights (n, k), fp32 scales (n,) or 0, n) each;
    norm: divide x by its root mean square first; then: "store", "squared_relu", or "add" to what is in y.
    """

def set_threads(threads: int, fork: int) -> None:
    """Work on so many threads of the OpenMP whose GOMP_parallel has this address; 0 = none is there, so on one."""

class Layer:
    def __init__(self, heads: int, kv_heads: int, head_dim: int, window: int | None, offset_keys: bool) -> None: ...
    def attention(
        self,
        kind: str,
        qkv: int,
        rows: int,
        positions: int,
        rotary: tuple[int, int, int],
        keys: tuple[int, int],
        values: tuple[int, int],
        y: int,
    ) -> None:
        """Put each row's key and value into the cache at its position and attend; y (rows, heads D) fp32.

        kind: of the cache, float32 or bfloat16; qkv: (rows, (heads + 2 kv_heads) D) fp32; positions: (rows,) int64;
        rotary: cos and sin, (positions, D/2) fp32, and how many numbers each has; keys, values: (rows, slots,
        kv_heads, D) and slots.
        """
