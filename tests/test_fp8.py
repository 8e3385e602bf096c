"""fp8 layers with the rounding emulated on a CPU, against the plain Linear in fp32."""

import copy

import pytest
import torch
from torch import nn

from nanochat import fp8
from nanochat.fp8 import Float8Linear, convert_to_fp8, is_worth_fp8, quantize

E4M3_ERROR, E5M2_ERROR = 2**-4, 2**-3  # half a unit of 3 and of 2 mantissa bits


def everything(name, linear):
    return is_worth_fp8(name, linear, min_width=0)


def two_layers():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(128, 256, bias=False), nn.Tanh(), nn.Linear(256, 128, bias=False))


def relative_error(got, wanted):
    return ((got - wanted).norm() / wanted.norm()).item()


@pytest.mark.parametrize("magnitude", [1e-6, 1.0, 1e6])
@pytest.mark.parametrize(("dtype", "error"), [(torch.float8_e4m3fn, E4M3_ERROR), (torch.float8_e5m2, E5M2_ERROR)])
def test_the_largest_value_survives_and_none_is_further_off_than_half_a_unit(dtype, error, magnitude):
    x = magnitude * torch.linspace(-1, 1, 201)
    x8, scale = quantize(x, dtype)
    back = x8.float() * scale
    torch.testing.assert_close(back.abs().max(), x.abs().max())
    assert ((back - x).abs() <= error * x.abs() + 1e-4 * magnitude).all()


def test_zeros_stay_zeros():
    x8, scale = quantize(torch.zeros(4), torch.float8_e4m3fn)
    assert not x8.float().any() and scale.isfinite()


def rounded(x, dtype):
    x8, scale = quantize(x, dtype)
    return x8.float() * scale


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
def test_forward_multiplies_in_e4m3_and_backward_the_gradient_in_e5m2(dtype, tolerance):
    """Equal to matmuls of the rounded tensors, and a few percent (the rounding) from those of the given ones."""
    torch.manual_seed(0)
    linear = nn.Linear(128, 256, bias=False)
    layer = Float8Linear(linear)
    x = torch.randn(4, 8, 128).to(dtype).requires_grad_()
    dy = torch.randn(4, 8, 256).to(dtype)
    y = layer(x)
    y.backward(dy)
    assert [t.dtype for t in (y, x.grad, layer.weight.grad)] == [dtype, dtype, torch.float32]

    def products(x, w, dy):
        return x @ w.T, dy @ w, dy.flatten(0, 1).T @ x.flatten(0, 1)

    given = x.detach().float(), linear.weight.detach(), dy.float()
    formats = torch.float8_e4m3fn, torch.float8_e4m3fn, torch.float8_e5m2
    of_rounded = products(*(rounded(t, format) for t, format in zip(given, formats, strict=True)))
    for got, exact, near in zip((y, x.grad, linear.weight.grad), of_rounded, products(*given), strict=True):
        assert relative_error(got.float(), exact) < tolerance
        assert 0.01 < relative_error(got.float(), near) < 0.1


def test_weights_are_shared_and_the_state_dict_is_the_same():
    model = two_layers()
    before, names = list(model.parameters()), list(model.state_dict())
    convert_to_fp8(model, everything)
    assert all(a is b for a, b in zip(before, model.parameters(), strict=True)) and list(model.state_dict()) == names


def test_a_weight_is_cast_once_until_the_optimizer_changes_it(monkeypatch):
    model = two_layers()
    convert_to_fp8(model, everything)
    cast = []
    monkeypatch.setattr(
        fp8, "quantize", lambda x, dtype: cast.append(isinstance(x, nn.Parameter)) or quantize(x, dtype)
    )
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    x = torch.randn(16, 128)
    for _ in range(3):
        model(x).sum().backward()
    assert sum(cast) == 2
    before = model(x)
    optimizer.step()
    after = model(x)
    assert sum(cast) == 4 and not torch.equal(before, after)


def test_a_compiled_model_sees_the_weights_that_the_optimizer_wrote():
    model = two_layers()
    convert_to_fp8(model, everything)
    compiled = torch.compile(model, backend="aot_eager")
    x = torch.randn(16, 128)
    before = compiled(x)
    with torch.no_grad():
        model[0].weight.mul_(2)
    torch.testing.assert_close(compiled(x), model(x))
    assert relative_error(compiled(x), before) > 0.1


def test_evaluation_is_in_full_precision():
    plain = two_layers()
    model = copy.deepcopy(plain)
    convert_to_fp8(model, everything)
    x = torch.randn(16, 128)
    with torch.no_grad():
        torch.testing.assert_close(model(x), plain(x), rtol=0, atol=0)
    torch.testing.assert_close(model.eval()(x), plain(x), rtol=0, atol=0)


def test_rows_that_the_hardware_refuses_go_the_plain_way():
    plain = two_layers()
    model = copy.deepcopy(plain)
    convert_to_fp8(model, everything)
    x = torch.randn(15, 128)
    torch.testing.assert_close(model(x), plain(x), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("name", "n_in", "n_out", "expected"),
    [
        ("h.0.c_fc", 1280, 5120, True),
        ("h.0.c_fc", 768, 3072, False),  # depth 12: slower
        ("h.0.c_k", 1288, 1280, False),  # 1288 is no multiple of 16
        ("lm_head", 1280, 32768, False),
    ],
)
def test_only_wide_aligned_layers_that_are_not_the_head(name, n_in, n_out, expected):
    assert is_worth_fp8(name, nn.Linear(n_in, n_out, bias=False, device="meta")) is expected
    assert isinstance(Float8Linear(nn.Linear(16, 16, bias=False)), nn.Linear)
