"""Every attention that runs here against one slow twin: a softmax in fp64 under an explicit mask."""

import math

import pytest
import torch

from nanochat import attention
from nanochat.attention import cached_attention, causal_attention, describe

WINDOW = 70  # blocks of 64 queries, and 64 does not divide it


def twin(q, k, v, visible):
    """visible: (B or 1, T, S) bool."""
    q, k, v = (x.double().transpose(1, 2) for x in (q, k, v))
    k, v = (x.repeat_interleave(q.size(1) // k.size(1), 1) for x in (k, v))
    scores = (q @ k.mT / math.sqrt(q.size(-1))).masked_fill(~visible[:, None], -math.inf)
    return (scores.softmax(-1) @ v).transpose(1, 2)


def seen(T, window):
    """A query sees itself, and of what lies before it `window` positions."""
    distance = torch.arange(T)[:, None] - torch.arange(T)
    return ((distance >= 0) & (distance <= (T if window is None else window)))[None]


def inputs(T, H=2, H_kv=2, dtype=torch.float32):
    gen = torch.Generator().manual_seed(0)
    return [torch.randn(2, T, heads, 16, generator=gen).to(dtype).requires_grad_() for heads in (H, H_kv, H_kv)]


def value_and_grads(function, qkv, *args):
    y = function(*qkv, *args)
    upstream = torch.linspace(-1, 1, y.numel()).view_as(y)
    return [t.double() for t in (y, *torch.autograd.grad((y * upstream).sum(), qkv))]


def assert_as_the_twin(function, qkv, *args, visible, tolerance):
    got, wanted = value_and_grads(function, qkv, *args), value_and_grads(twin, qkv, visible)
    for a, b in zip(got, wanted, strict=True):
        assert (a - b).abs().max() <= tolerance * b.abs().max()


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 3e-2)])
@pytest.mark.parametrize("H_kv", [2, 1])
@pytest.mark.parametrize(
    ("T", "window"),
    [(33, None), (1, 4), (69, WINDOW), (70, WINDOW), (71, WINDOW), (72, WINDOW), (139, WINDOW), (140, WINDOW)]
    + [(141, WINDOW), (198, WINDOW), (199, WINDOW), (130, 1), (130, 0)],
)
def test_causal_attention_sees_itself_and_the_window_before(T, window, H_kv, dtype, tolerance):
    qkv = inputs(T, H_kv=H_kv, dtype=dtype)
    assert_as_the_twin(causal_attention, qkv, window, visible=seen(T, window), tolerance=tolerance)


@pytest.mark.parametrize("function", [attention._blocks, attention._flex])
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_each_backend_that_runs_here_is_the_twin(function):
    qkv = inputs(2 * WINDOW + 3, H=4, H_kv=2)
    visible = seen(2 * WINDOW + 3, WINDOW)
    assert_as_the_twin(function, qkv, WINDOW, visible=visible, tolerance=1e-5)


def test_blocks_compute_fewer_scores_than_the_square(monkeypatch):
    """T 512, window 128: 128^2 for the first queries, and six blocks of 64 against 192."""
    scores = []
    sdpa = attention._sdpa
    monkeypatch.setattr(
        attention,
        "_sdpa",
        lambda q, k, *a, **kw: scores.append(q.shape[0] * q.size(1) * k.size(1)) or sdpa(q, k, *a, **kw),
    )
    causal_attention(*inputs(512), 128)
    assert sum(scores) == 2 * (128 * 128 + 6 * 64 * 192)


@pytest.mark.parametrize("window", [None, 3, 0])
def test_rows_of_different_lengths_see_their_own_slots_and_none_beyond(window):
    q, _, _ = inputs(2)
    _, k, v = inputs(9)
    positions = torch.tensor([[4, 5], [7, 8]])
    visible = torch.stack([seen(9, window)[0, p] for p in positions])
    assert_as_the_twin(
        lambda q, k, v: cached_attention(q, k, v, positions, window), [q, k, v], visible=visible, tolerance=1e-5
    )
    with torch.no_grad():
        before = cached_attention(q, k, v, positions, window)
        k[0, 6:], v[0, 6:] = 1e4, 1e4
        torch.testing.assert_close(cached_attention(q, k, v, positions, window), before)


def test_a_compiled_window_is_the_eager_one():
    compiled = torch.compile(causal_attention, backend="aot_eager", fullgraph=True)
    qkv = inputs(150)
    got, wanted = value_and_grads(compiled, qkv, WINDOW), value_and_grads(causal_attention, qkv, WINDOW)
    torch.testing.assert_close(got, wanted)


@pytest.mark.parametrize(
    ("device", "window", "expected"),
    [("cpu", None, "SDPA"), ("cpu", 128, "SDPA in blocks of the window"), ("mps", 128, "SDPA")],
)
def test_the_choice_is_named(device, window, expected):
    assert describe(torch.device(device), torch.float32, window) == expected
