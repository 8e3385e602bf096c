"""Every attention that runs here against one slow twin: a softmax in fp64 under an explicit mask."""

import importlib.machinery
import math
import sys
import types

import pytest
import torch

from nanochat import attention, cpu_attention
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
        assert (a - b).abs().max() <= tolerance * max(1, b.abs().max())  # seeing itself only has gradients of 0


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 3e-2)])
@pytest.mark.parametrize("H_kv", [2, 1])
@pytest.mark.parametrize(
    ("T", "window"),
    [(33, None), (300, None), (1, 4), (130, 1), (130, 0), *((T, WINDOW) for T in (69, 71, 72, 139, 140, 141, 199))],
)
def test_causal_attention_sees_itself_and_the_window_before(T, window, H_kv, dtype, tolerance):
    qkv = inputs(T, H_kv=H_kv, dtype=dtype)
    assert_as_the_twin(causal_attention, qkv, window, visible=seen(T, window), tolerance=tolerance)


def masked_sdpa(q, k, v, window):
    return attention._sdpa(q, k, v, mask=attention._band(q.size(1), window, q.device))


def test_the_mask_that_other_devices_take_is_the_twins():
    qkv = inputs(40, H=4, H_kv=2)
    assert_as_the_twin(masked_sdpa, qkv, 7, visible=seen(40, 7), tolerance=1e-5)


@pytest.fixture
def flex_calls(monkeypatch):
    """How often the compiled FlexAttention was called, for which an eager one stands in: compiling takes a minute."""
    calls = []
    eager = attention.flex_attention
    monkeypatch.setattr(attention, "_compiled_flex", lambda: lambda *args, **kw: calls.append(1) or eager(*args, **kw))
    attention._cached_block_mask.cache_clear()
    return calls


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_flex_attention_is_the_twin(flex_calls):
    """Forward only: it has no backward pass on a CPU."""
    qkv = [x.detach() for x in inputs(150, H=4, H_kv=2)]
    got, wanted = attention._flex(*qkv, WINDOW), twin(*qkv, seen(150, WINDOW))
    torch.testing.assert_close(got.double(), wanted, rtol=1e-5, atol=1e-5)
    assert flex_calls == [1]


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_a_mask_of_blocks_is_made_once_and_serves_evaluation_and_training(flex_calls, monkeypatch):
    made = []
    make = attention.create_block_mask
    monkeypatch.setattr(attention, "create_block_mask", lambda *args, **kw: made.append(args[3:]) or make(*args, **kw))
    with torch.inference_mode():
        for T, window in ((150, WINDOW), (150, WINDOW), (140, WINDOW), (150, 9)):
            attention._flex(*(x.detach() for x in inputs(T)), window)
        assert not attention._cached_block_mask(150, 9, torch.device("cpu")).kv_indices.is_inference()
    assert made == [(150, 150), (140, 140), (150, 150)] and flex_calls == [1] * 4


@pytest.mark.slow
def test_a_trace_takes_flex_attention_in_with_neither_cache_nor_break(flex_calls):
    qkv = [x.detach() for x in inputs(150, H=4, H_kv=2)]
    got = torch.compile(attention._flex, backend="eager", fullgraph=True)(*qkv, WINDOW)
    torch.testing.assert_close(got.double(), twin(*qkv, seen(150, WINDOW)), rtol=1e-5, atol=1e-5)
    assert not flex_calls and attention._cached_block_mask.cache_info().misses == 0


def test_a_build_of_flash_attention_is_asked_for_by_version(monkeypatch):
    """Else `kernels` 0.17 refuses."""

    def get_kernel(repo_id, *, version):
        return types.SimpleNamespace(flash_attn_func=(repo_id, version))

    kernels = types.ModuleType("kernels")
    kernels.get_kernel, kernels.__spec__ = get_kernel, importlib.machinery.ModuleSpec("kernels", None)
    monkeypatch.setitem(sys.modules, "kernels", kernels)
    monkeypatch.setattr(attention, "_flash_function", None)
    monkeypatch.setattr(attention, "_flash_error", "")
    assert attention._load_flash() and attention._flash_function == ("kernels-community/flash-attn3", 1)


def test_in_fp64_the_gradients_are_exact():
    qkv = inputs(150, dtype=torch.float64)
    assert_as_the_twin(causal_attention, qkv, WINDOW, visible=seen(150, WINDOW), tolerance=1e-12)


def test_the_operators_keep_torchs_rules():
    """Fake outputs as the real ones, no hidden aliasing, autograd registered."""
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    qkv = inputs(9)
    torch.library.opcheck(cpu_attention._forward, (*qkv, 3), test_utils=tests)
    torch.library.opcheck(cpu_attention._backward, (*[x.detach() for x in (*qkv, *qkv[:2])], 3), test_utils=tests)


def test_few_heads_at_a_time_are_all_heads(monkeypatch):
    monkeypatch.setattr(cpu_attention, "SCORES_BYTES", 0)
    assert_as_the_twin(causal_attention, inputs(150), None, visible=seen(150, None), tolerance=1e-5)


@pytest.mark.parametrize(
    ("window", "expected"), [(128, 64 * (64 + 128) + 6 * 64 * 192), (None, 128 * 128 * (1 + 2 + 3 + 4))]
)
def test_scores_that_no_query_of_a_block_sees_are_not_computed(window, expected):
    """Of the 512^2 = 262,144 scores of T 512."""
    assert sum(mask.numel() for _, _, mask in cpu_attention._blocks(512, window, torch.float32)) == expected


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
    [("cpu", None, "blocks of queries"), ("cpu", 128, "blocks of queries"), ("mps", 128, "SDPA")],
)
def test_the_choice_is_named(device, window, expected):
    assert describe(torch.device(device), torch.float32, window) == expected
