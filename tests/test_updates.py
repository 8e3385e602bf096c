"""Parts of the optimizers' updates against their formulas in fp64."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from nanochat import updates


def test_orthogonalisation_treats_each_matrix_of_a_stack_alone_and_leaves_zero_at_zero():
    torch.manual_seed(0)
    stack = torch.randn(3, 8, 5)
    stack[1] = 0
    together = updates.orthogonalize(stack, torch.float32)
    for i in range(3):
        torch.testing.assert_close(together[i], updates.orthogonalize(stack[i : i + 1], torch.float32)[0])
    assert not together[1].any()


# Parts of NorMuon, each against fp64 on one matrix at a time


def shaped(m: int, n: int, decades: float = 2.0) -> Tensor:
    """(3, m, n): singular values over some decades, a zero matrix, and one with a zero row."""
    generator = torch.Generator().manual_seed(m + n)
    stack = torch.randn(3, m, n, generator=generator)
    u, s, vt = torch.linalg.svd(stack[0], full_matrices=False)
    stack[0] = u * torch.logspace(0, -decades, len(s)) @ vt
    stack[1] = 0
    stack[2, 0] = 0
    return stack


SHAPES = [(24, 24), (16, 40), (40, 16)]


def through(g: Tensor, gain: Callable[[Tensor], Tensor]) -> Tensor:
    """One matrix in fp64, each singular value s (of the matrix at Schatten-4 norm 1) replaced by s * gain(s)."""
    u, s, vt = torch.linalg.svd(g.double(), full_matrices=False)
    s = s / (s.pow(4).sum() ** 0.25).clamp(min=1e-30)
    return (u * (s * gain(s))) @ vt


def slow_halley(s: Tensor) -> Tensor:
    """By the textbook: x (a + b x^2) / (1 + c x^2), twice, from a lower bound l of 0.001."""
    x, low = s, 1e-3
    for _ in range(2):
        d = (4 * (1 - low**2) / low**4) ** (1 / 3)
        a = math.sqrt(1 + d) + math.sqrt(8 - 4 * d + 8 * (2 - low**2) / (low**2 * math.sqrt(1 + d))) / 2
        b = (a - 1) ** 2 / 4
        c = a + b - 1
        x, low = x * (a + b * x**2) / (1 + c * x**2), low * (a + b * low**2) / (1 + c * low**2)
    return x / s.clamp(min=1e-30)


def slow_express(s: Tensor) -> Tensor:
    x = s / 1.02
    for a, b, c in updates.POLAR_EXPRESS:
        x = a * x + b * x**3 + c * x**5
    return x / s.clamp(min=1e-30)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("scale", [1e-6, 1.0])
def test_rows_are_equalised_and_rounding_noise_stays_small(shape, scale):
    g = scale * shaped(*shape)
    g[2, 1] *= 1e-9
    rows = updates.equalize_rows(g)
    for i in range(3):
        norms = g[i].double().norm(dim=1)
        floor = torch.clamp(norms, min=max(1e-6 * norms.mean().item(), 1e-30))
        torch.testing.assert_close(rows[i], (g[i].double() / floor[:, None]).float(), rtol=1e-5, atol=1e-6)
    assert rows[2, 1].norm() < 0.01 and not rows[1].any()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(
    ("fast", "slow"),
    [(updates.polar_halley, slow_halley), (lambda g: updates.polar_express(g, g.dtype), slow_express)],
    ids=["halley", "express"],
)
def test_the_polar_factor_maps_singular_values_as_its_formula_does_one_by_one(shape, fast, slow):
    g = shaped(*shape)
    together = fast(g)
    for i in range(3):
        torch.testing.assert_close(together[i], through(g[i], slow).float(), rtol=0, atol=2e-4)
    assert not together[1].any()


@pytest.mark.parametrize("shape", [(128, 128), (64, 256), (256, 64)])
@pytest.mark.parametrize(
    ("fast", "low", "high"),
    [
        (lambda g: updates.polar(g, torch.float32), 0.95, 1.001),
        (lambda g: updates.polar_express(g, torch.float32), 0.84, 1.15),
        (lambda g: updates.polar_express(g, torch.bfloat16), 0.83, 1.16),
    ],
    ids=["halley", "express", "express in bf16"],
)
def test_singular_values_over_two_decades_end_near_one(shape, fast, low, high):
    singular = torch.linalg.svdvals(fast(shaped(*shape)[:1]).float())
    assert low < singular.min() and singular.max() < high


def test_the_two_polar_factors_agree_on_a_random_matrix():
    g = torch.randn(1, 96, 96, generator=torch.Generator().manual_seed(0))
    one, other = updates.polar_halley(g), updates.polar_express(g, torch.float32)
    assert torch.cosine_similarity(one.view(-1), other.view(-1), dim=0) > 0.99


@pytest.mark.parametrize("shape", SHAPES)
def test_the_scale_is_that_of_unit_singular_values(shape):
    o = updates.unit_scale(0.1 * shaped(*shape))
    torch.testing.assert_close(o.norm(dim=(1, 2)), math.sqrt(min(shape)) * torch.tensor([1.0, 0.0, 1.0]))
    torch.testing.assert_close(o[0] / o[0].norm(), shaped(*shape)[0] / shaped(*shape)[0].norm())


@pytest.mark.parametrize("shape", SHAPES)
def test_each_neurons_update_is_divided_by_its_running_size_and_the_norm_stays(shape):
    o, dim = shaped(*shape), 1 if shape[0] >= shape[1] else 0
    second = torch.rand(3, *((shape[0], 1) if dim else (1, shape[1])), generator=torch.Generator().manual_seed(1))
    old = second.double()
    even = updates.even_out(o, second, 0.1)
    for i in range(3):
        new = 0.9 * old[i] + 0.1 * o[i].double().square().mean(dim, keepdim=True)
        torch.testing.assert_close(second[i], new.float())
        divided = o[i].double() / new.sqrt()
        expected = divided * (o[i].double().norm() / divided.norm().clamp(min=1e-30))
        torch.testing.assert_close(even[i], expected.float(), rtol=1e-5, atol=1e-6)


def test_cautious_decay_shrinks_only_weights_that_the_update_shrinks():
    w = torch.tensor([1.0, -2.0, 3.0, -4.0, 5.0])
    update = torch.tensor([1.0, -1.0, -1.0, 1.0, 0.0])
    assert updates.cautious_decay(w, update).tolist() == [1, -2, 0, 0, 5]


@pytest.mark.parametrize(("shape", "factor"), [((4, 1), 2), ((3, 3), 1), ((1, 4), 1)])
def test_the_shape_factor_is_of_outputs_over_inputs(shape, factor):
    assert updates.shape_factor(*shape) == factor
