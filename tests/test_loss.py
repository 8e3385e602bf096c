"""The fused head and loss against the plain one, which holds all logits at once."""

import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from nanochat import loss
from nanochat.loss import SoftCap, linear_cross_entropy


def plain_linear_cross_entropy(
    x: Tensor, weight: Tensor, targets: Tensor, cap: SoftCap, reduction: str = "mean"
) -> Tensor:
    """All logits at once."""
    u = F.linear(x, weight.to(x.dtype)).to(torch.promote_types(x.dtype, torch.float32))
    logits = cap.cap * torch.tanh((u + cap.shift) / cap.scale)
    return F.cross_entropy(logits, targets, ignore_index=-1, reduction=reduction)


SYMMETRIC, ASYMMETRIC = SoftCap(), SoftCap(11.5, 15.0, 5.0)


@pytest.fixture(autouse=True)
def several_chunks(monkeypatch):
    monkeypatch.setattr(loss, "CHUNK_BYTES_CPU", 0)
    monkeypatch.setattr(loss, "MIN_ROWS", 16)


def case(dtype=torch.float64, N=53, C=12, V=37, scale=3.0):
    """Every third of 53 targets is not counted; the other 35 are two chunks of 16 and one of 3."""
    gen = torch.Generator().manual_seed(0)
    x = torch.randn(N, C, generator=gen, dtype=torch.float64)
    weight = scale * torch.randn(V, C, generator=gen, dtype=torch.float64)
    targets = torch.randint(0, V, (N,), generator=gen)
    targets[::3] = -1
    weight = weight if dtype == torch.float64 else weight.float()
    return x.to(dtype).requires_grad_(), weight.requires_grad_(), targets


def loss_and_grads(function, x, weight, targets, cap, reduction):
    value = function(x, weight, targets, cap, reduction)
    upstream = torch.linspace(-1, 2, value.numel(), dtype=value.dtype).view_as(value) if value.ndim else 0.3
    return value, *torch.autograd.grad((value * upstream).sum(), (x, weight))


@pytest.mark.parametrize("cap", [SYMMETRIC, ASYMMETRIC])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_loss_and_gradients_equal_the_plain_ones_to_fp64(cap, reduction):
    fused = loss_and_grads(linear_cross_entropy, *case(), cap, reduction)
    plain = loss_and_grads(plain_linear_cross_entropy, *case(), cap, reduction)
    torch.testing.assert_close(fused, plain, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_in_lower_precision_they_are_close_to_fp64_and_have_the_dtypes_of_the_inputs(dtype, tolerance, reduction):
    fused = loss_and_grads(linear_cross_entropy, *case(dtype), SYMMETRIC, reduction)
    plain = loss_and_grads(plain_linear_cross_entropy, *case(), SYMMETRIC, reduction)
    assert [t.dtype for t in fused] == [torch.float32, dtype, torch.float32]
    for got, wanted in zip(fused, plain, strict=True):
        assert (got.double() - wanted).abs().max() <= tolerance * wanted.abs().max()


def test_with_no_target_the_sum_is_zero_the_mean_nan_and_no_gradient_is_lost_to_nan_in_the_sum():
    x, weight, targets = case()
    none = torch.full_like(targets, -1)
    total, dx, dw = loss_and_grads(linear_cross_entropy, x, weight, none, SYMMETRIC, "sum")
    assert total == 0 and not dx.any() and not dw.any()
    assert not linear_cross_entropy(x, weight, none, SYMMETRIC, "none").any()
    for function in (linear_cross_entropy, plain_linear_cross_entropy):
        assert function(x, weight, none, SYMMETRIC, "mean").isnan()


def test_the_cap_of_40_does_not_underflow_at_the_extremes():
    x = torch.tensor([[1e4]])
    weight = torch.tensor([[1.0], [-1.0]])
    for target in (0, 1):
        args = x, weight, torch.tensor([target]), SoftCap(40.0, 15.0)
        torch.testing.assert_close(linear_cross_entropy(*args), plain_linear_cross_entropy(*args))


def test_only_the_wanted_gradients_are_computed(monkeypatch):
    asked = []
    chunk = loss._chunk
    monkeypatch.setattr(loss, "_chunk", lambda *args: asked.append(args[-1]) or chunk(*args))
    x, weight, targets = case()
    with torch.no_grad():
        linear_cross_entropy(x, weight, targets, SYMMETRIC, "sum")
    assert len(asked) > 1 and not any(asked)
    asked.clear()
    linear_cross_entropy(x, weight.detach(), targets, SYMMETRIC, "sum").backward()
    assert len(asked) > 1 and all(asked) and x.grad is not None and weight.grad is None


def test_on_a_cpu_rows_without_a_target_are_left_out_and_in_bf16_few_numbers_of_rows_are_met(monkeypatch):
    computed = []
    all_chunks = loss._all_chunks
    monkeypatch.setattr(loss, "_all_chunks", lambda x, *args: computed.append(len(x)) or all_chunks(x, *args))
    weight = torch.randn(7, 4, requires_grad=True)
    for counted in range(1, 101):
        x, targets = torch.randn(101, 4, dtype=torch.bfloat16, requires_grad=True), torch.full((101,), -1)
        targets[torch.randperm(101)[:counted]] = 3
        _, dx, _ = loss_and_grads(linear_cross_entropy, x, weight, targets, SYMMETRIC, "sum")
        assert counted <= computed[-1] <= 1.25 * counted
        assert (dx.any(1) == (targets == 3)).all()
    assert len(set(computed)) <= 23


def test_the_sum_of_chunks_in_bf16_does_not_stop_growing():
    """300 chunks that each add the same to the head's gradient: in bf16 the total would stay at 256 times that."""
    N = 300 * loss.MIN_ROWS
    x, weight = torch.ones(N, 1, dtype=torch.bfloat16), torch.zeros(2, 1, requires_grad=True)
    linear_cross_entropy(x, weight, torch.zeros(N, dtype=torch.int64), SYMMETRIC, "sum").backward()
    torch.testing.assert_close(weight.grad, torch.tensor([[-0.5 * N], [0.5 * N]]))


def test_a_compiled_caller_gets_the_same():
    def head(x, weight, targets, cap, reduction):
        return linear_cross_entropy(x * 2, weight, targets, cap, reduction) * 2

    compiled = torch.compile(head, backend="aot_eager", fullgraph=True)
    for reduction in ("sum", "none"):
        got, wanted = (loss_and_grads(f, *case(), SYMMETRIC, reduction) for f in (compiled, head))
        torch.testing.assert_close(got, wanted)


def test_the_operators_keep_torchs_rules():
    """Fake outputs as the real ones, no hidden aliasing, autograd registered."""
    x, weight, targets = case(torch.bfloat16)
    cap = list(SYMMETRIC)
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(loss._loss_sum, (x, weight, targets, cap, [True, False]), test_utils=tests)
    torch.library.opcheck(loss._loss_per_row, (x, weight, targets, cap), test_utils=tests)
    backward = x.detach(), weight.detach(), targets, cap, [True, True], torch.ones(53)
    torch.library.opcheck(loss._loss_per_row_backward, backward, test_utils=tests)


KERNEL_CHECK = """
import torch
from nanochat.kernels import capped_cross_entropy_
from nanochat.loss import SoftCap, _chunk

for dtype, V, cap in ((torch.float32, 5000, SoftCap()), (torch.bfloat16, 37, SoftCap(11.5, 15.0, 5.0))):
    u = (20 * torch.randn(5, V)).to(dtype)
    targets, weights = torch.tensor([0, V - 1, -1, 4, 4]), torch.tensor([1.0, -2.0, 0.0, 0.5, 1.0])
    wanted = _chunk(u.double(), targets, weights.double(), cap, True)
    for with_gradient in (False, True):
        losses, g = capped_cross_entropy_(u, targets, weights, cap, with_gradient)
        torch.testing.assert_close(losses.double(), wanted[0], rtol=1e-5, atol=1e-5)
    tolerance = 1e-6 if dtype == torch.float32 else 1e-2
    torch.testing.assert_close(g.double(), wanted[1], rtol=tolerance, atol=3e-7)  # the sums are in another order
"""


def test_the_triton_kernel_in_its_interpreter_gives_losses_and_gradient_of_the_plain_chunk():
    pytest.importorskip("triton", reason="triton is not installed")
    environment = {**os.environ, "TRITON_INTERPRET": "1"}  # read when triton is imported: a process of its own
    done = subprocess.run([sys.executable, "-c", KERNEL_CHECK], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
