"""Muon, NorMuon and AdamW against torch and plain twins, and compiled against eager."""

from __future__ import annotations

import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.multiprocessing
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter

from nanochat import optim
from nanochat.optim import Group, MuonAdamW, build_optimizer
from tests.conftest import tiny_gpt
from tests.test_updates import slow_halley, through

# Ranks cannot share these evenly: 1,221 elements, 3 matrices of one shape and 1 of another. Below 1,024 elements they
# do not try.
ADAMW_SHAPES = {"odd": (37, 33), "one": (1,), "small": (4, 4)}
MUON_SHAPES = {"wide0": (4, 6), "wide1": (4, 6), "wide2": (4, 6), "tall": (6, 4)}


def tensors(seed: int, scale: float = 1.0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: scale * torch.randn(shape, generator=generator) for name, shape in {**ADAMW_SHAPES, **MUON_SHAPES}.items()
    }


def make(
    weight_decay: float = 0.1, matrices: str = "muon", **options: Any
) -> tuple[dict[str, nn.Parameter], MuonAdamW]:
    params = {name: nn.Parameter(value) for name, value in tensors(seed=0).items()}

    def group(kind: str, *names: str) -> Group:
        return Group(kind, list(names), [params[n] for n in names], 0.02, 0.02, weight_decay=weight_decay)

    groups = [group("adamw", *ADAMW_SHAPES), group(matrices, "wide0", "wide1", "wide2"), group(matrices, "tall")]
    return params, MuonAdamW(groups, **options)


def mean_grads(step: int) -> dict[str, Tensor]:
    """What the average over two ranks' gradients is."""
    one, other = tensors(100 + 2 * step), tensors(101 + 2 * step)
    return {name: (one[name] + other[name]) / 2 for name in one}


def take(
    params: dict[str, nn.Parameter],
    optimizer: MuonAdamW,
    steps: range,
    grads: Callable[[int], dict[str, Tensor]],
    clip: float | None = None,
) -> list[float]:
    """Steps with learning rate and momentum on the move; the gradient norms."""
    norms = []
    for step in steps:
        for name, grad in grads(step).items():
            params[name].grad = grad
        optimizer.set_lr(1 / (1 + step), momentum=0.85 + 0.01 * step)
        norms.append(optimizer.step(clip).item())
    return norms


def values(params: dict[str, nn.Parameter]) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in params.items()}


def load(params: dict[str, nn.Parameter], saved: dict[str, Tensor]) -> None:
    with torch.no_grad():
        for name, p in params.items():
            p.copy_(saved[name])


def assert_same(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    for name in one:
        torch.testing.assert_close(one[name], other[name], rtol=1e-5, atol=1e-6, msg=name)


# One process -------------------------------------------------------------------------------------


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_adamw_is_torchs_adamw_over_several_steps(weight_decay):
    params, ours = make(weight_decay)
    twins = {name: nn.Parameter(params[name].detach().clone()) for name in ADAMW_SHAPES}
    theirs = torch.optim.AdamW(twins.values(), lr=0.02, betas=(0.8, 0.95), eps=1e-10, weight_decay=weight_decay)
    for step in range(6):
        for name, grad in mean_grads(step).items():
            params[name].grad = grad.clone()
            if name in twins:
                twins[name].grad = grad.clone()
        for group in theirs.param_groups:
            group["lr"] = 0.02 / (1 + step)
        ours.set_lr(1 / (1 + step))
        ours.step()
        theirs.step()
    for name, twin in twins.items():
        torch.testing.assert_close(params[name], twin, rtol=0, atol=1e-6)


def test_epsilon_is_added_to_the_corrected_root_as_torch_does():
    """A gradient as small as epsilon: with the correction misplaced the first step would be 1/(1 + sqrt(20))."""
    p = nn.Parameter(torch.zeros(1))
    optimizer = MuonAdamW([Group("adamw", ["p"], [p], lr=1.0, initial_lr=1.0, eps=1e-10)])
    p.grad = torch.tensor([1e-10])
    optimizer.step()
    assert p.item() == pytest.approx(-0.5, rel=1e-4)


def slow_muon(w: Tensor, grads: list[Tensor], lrs: list[float], momenta: list[float]) -> Tensor:
    """One matrix, fp64, by the letter; the polynomial acts on singular values one by one."""
    w, m = w.double(), torch.zeros_like(w, dtype=torch.float64)
    for g, lr, mu in zip(grads, lrs, momenta, strict=True):
        g = g.double()
        m = mu * m + (1 - mu) * g
        u, s, vt = torch.linalg.svd(mu * m + (1 - mu) * g, full_matrices=False)
        s = s / s.square().sum().sqrt()
        for _ in range(5):
            s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
        w = w - lr * max(1, w.size(0) / w.size(1)) ** 0.5 * (u * s) @ vt
    return w.float()


@pytest.mark.parametrize("name", MUON_SHAPES)
def test_muon_is_its_plain_twin_in_every_matrix(name):
    params, optimizer = make()
    start, steps = params[name].detach().clone(), range(5)
    take(params, optimizer, steps, mean_grads)
    expected = slow_muon(
        start,
        [mean_grads(step)[name] for step in steps],
        [0.02 / (1 + step) for step in steps],
        [0.85 + 0.01 * step for step in steps],
    )
    torch.testing.assert_close(params[name], expected, rtol=0, atol=2e-6)


@pytest.mark.parametrize("shape", [(64, 96), (32, 96), (96, 32)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_first_muon_update_is_nearly_semi_orthogonal(shape, dtype):
    torch.manual_seed(0)
    w = nn.Parameter(torch.zeros(shape))
    optimizer = MuonAdamW([Group("muon", ["w"], [w], lr=1.0, initial_lr=1.0)], muon_dtype=dtype)
    w.grad = torch.randn(shape) * 1e-4  # the update does not depend on the gradient's size
    optimizer.step()
    update = -w.detach() / max(1, shape[0] / shape[1]) ** 0.5
    singular = torch.linalg.svdvals(update)
    assert singular.max() / singular.min() < 4
    assert singular.max() < 1.5 and singular.median() > 0.6


def slow_normuon(w: Tensor, grads: list[Tensor]) -> Tensor:
    """One matrix, fp64, by the letter, on the schedule of take(): lr 0.02 and decay 0.1 at first, beta2 0.9."""
    (m, n), w = w.shape, w.double()
    momentum = torch.zeros_like(w)
    second = w.new_zeros((m, 1) if m >= n else (1, n))
    for step, g in enumerate(grads):
        mu, lr = 0.85 + 0.01 * step, 0.02 / (1 + step) * max(1, m / n) ** 0.5
        momentum = mu * momentum + (1 - mu) * g.double()
        u = mu * momentum + (1 - mu) * g.double()
        o = through(u / u.norm(dim=1, keepdim=True), slow_halley)
        o = o * min(m, n) ** 0.5 / o.norm()
        second = 0.9 * second + 0.1 * o.square().mean(1 if m >= n else 0, keepdim=True)
        even = o / second.sqrt()
        o = even * o.norm() / even.norm()
        w = w - lr * o - lr * 0.1 / (1 + step) * torch.where(o * w >= 0, w, 0)
    return w.float()


@pytest.mark.parametrize("name", MUON_SHAPES)
def test_normuon_is_its_plain_twin_in_every_matrix(name):
    params, optimizer = make(matrices="normuon")
    start = params[name].detach().clone()
    take(params, optimizer, range(5), mean_grads)
    expected = slow_normuon(start, [mean_grads(step)[name] for step in range(5)])
    torch.testing.assert_close(params[name], expected, rtol=0, atol=3e-6)


def test_a_step_shows_in_the_version_of_every_parameter():
    params, optimizer = make(matrices="normuon")
    before = {name: p._version for name, p in params.items()}
    take(params, optimizer, range(1), mean_grads)
    assert all(p._version > before[name] for name, p in params.items())


def test_a_gradient_that_is_not_finite_shows_in_the_norm_and_raises_nothing():
    params, optimizer = make(matrices="normuon")
    params["wide1"].grad = torch.full((4, 6), math.nan)
    assert optimizer.step().isnan()


@pytest.mark.parametrize("matrices", ["muon", "normuon"])
def test_compiled_updates_equal_eager_ones_and_no_schedule_recompiles_them(matrices, monkeypatch):
    counter, compile_ = CompileCounter(), torch.compile  # a backend that runs the traced graph as it is
    monkeypatch.setattr(torch, "compile", lambda f, **options: compile_(f, backend=counter, **options))
    params, optimizer = make(matrices=matrices, compile=True)
    plain, eager = make(matrices=matrices)
    take(params, optimizer, range(2), mean_grads)
    compiled = counter.frame_count
    take(params, optimizer, range(2, 6), mean_grads)
    take(plain, eager, range(6), mean_grads)
    assert compiled >= 3 and counter.frame_count == compiled  # AdamW, and the matrices of two shapes
    assert_same(values(params), values(plain))


# The step as a whole


@pytest.mark.parametrize("max_norm", [0.5, 1e9])
def test_clipping_is_torchs_clipping_by_the_norm_over_all_gradients(max_norm):
    params, ours = make()
    clipped, plain = make()
    for name, grad in mean_grads(0).items():
        params[name].grad = grad.clone()
        clipped[name].grad = grad.clone()
    expected = torch.nn.utils.clip_grad_norm_(clipped.values(), max_norm)
    plain.step()
    norm = ours.step(grad_clip=max_norm)
    assert norm.item() == pytest.approx(expected.item(), rel=1e-6)
    for name in params:
        torch.testing.assert_close(params[name], clipped[name], rtol=0, atol=1e-6)
    for key, moment in plain.state_dict().items():  # Adam's first step hides the clip; its moments do not
        torch.testing.assert_close(ours.state_dict()[key], moment, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("matrices", ["muon", "normuon"])
def test_a_parameter_without_gradient_takes_a_zero_and_gradients_are_cleared(matrices):
    params, optimizer = make(weight_decay=0.0, matrices=matrices)
    before = values(params)
    params["odd"].grad = torch.ones(37, 33)
    optimizer.step()
    assert all(p.grad is None for p in params.values())
    assert not torch.equal(params["odd"], before["odd"])
    assert all(torch.equal(params[name], before[name]) for name in params if name != "odd")


@pytest.mark.parametrize("matrices", ["muon", "normuon"])
def test_state_saved_after_three_steps_goes_on_to_the_bit(matrices):
    params, optimizer = make(matrices=matrices)
    take(params, optimizer, range(3), mean_grads)
    weights, state = values(params), {k: v.clone() for k, v in optimizer.state_dict().items()}
    take(params, optimizer, range(3, 6), mean_grads)
    again, fresh = make(matrices=matrices)
    load(again, weights)
    fresh.load_state_dict(state)
    take(again, fresh, range(3, 6), mean_grads)
    assert all(torch.equal(again[name], params[name]) for name in params)


def test_every_parameter_of_a_model_has_its_optimizer_and_learning_rate():
    model = tiny_gpt(n_kv_head=2)
    optimizer = build_optimizer(
        model, unembedding_lr=0.004, embedding_lr=0.2, matrix_lr=0.02, weight_decay=0.3, init_lr_frac=0.5
    )
    scale = math.sqrt(768 / 32)
    facts = {n: (g.kind, g.initial_lr, g.weight_decay) for g in optimizer.groups for n in g.names}
    assert facts.keys() == dict(model.named_parameters()).keys()
    assert facts["lm_head.weight"] == ("adamw", pytest.approx(0.002 * scale), 0.3)
    assert facts["transformer.wte.weight"] == ("adamw", pytest.approx(0.1 * scale), 0.3)
    assert {fact for n, fact in facts.items() if ".h." in n} == {("muon", 0.01, 0.0)}
    shapes = [{tuple(p.shape) for p in g.params} for g in optimizer.groups if g.kind == "muon"]
    assert shapes == [{(16, 32)}, {(32, 32)}, {(32, 128)}, {(128, 32)}]  # one stack a shape


def test_the_state_goes_by_parameter_and_old_names():
    params, optimizer = make()
    take(params, optimizer, range(1), mean_grads)
    state = optimizer.state_dict()
    assert {key: t.shape for key, t in state.items()} == {
        "step": (),
        **{f"{name}.{key}": shape for name, shape in ADAMW_SHAPES.items() for key in ("exp_avg", "exp_avg_sq")},
        **{f"{name}.momentum": shape for name, shape in MUON_SHAPES.items()},
    }
    params, optimizer = make(matrices="normuon")
    take(params, optimizer, range(1), mean_grads)
    extra = optimizer.state_dict().keys() - state.keys()
    assert extra == {f"{name}.second_moment" for name in MUON_SHAPES}


def test_a_model_moved_after_its_optimizer_was_built_is_refused():
    params, optimizer = make()
    params["odd"].data = params["odd"].data.clone()
    with pytest.raises(AssertionError, match="moved"):
        optimizer.step()


def model_with(**shapes: tuple[int, ...]) -> Any:
    """Parameters by dotted name, of `modern`."""
    named = [(name.replace("__", "."), nn.Parameter(torch.zeros(shape))) for name, shape in shapes.items()]
    return SimpleNamespace(named_parameters=lambda: named, config=SimpleNamespace(arch="modern"))


RATES = {"unembedding_lr": 0.004, "embedding_lr": 0.2, "matrix_lr": 0.02, "weight_decay": 0.3}


def test_every_parameter_of_modern_goes_where_the_table_says():
    model = model_with(
        transformer__wte__weight=(8, 768),
        lm_head__weight=(8, 768),
        transformer__value_embeds__1__weight=(8, 4),
        transformer__bigram__weight=(8, 4),
        transformer__h__0__attn__c_q__weight=(4, 4),
        transformer__h__0__mlp__c_fc__weight=(16, 4),
        transformer__h__1__attn__c_q__weight=(4, 4),
        transformer__h__0__attn__value_gate__weight=(2, 12),
        resid_lambdas=(2,),
        x0_lambdas=(2,),
        bigram_lambdas=(2,),
    )
    groups = build_optimizer(model, **RATES).groups
    assert [(g.kind, g.names, g.initial_lr) for g in groups] == [
        ("adamw", ["lm_head.weight"], 0.004),
        ("adamw", ["transformer.wte.weight"], 0.2),
        ("adamw", ["transformer.value_embeds.1.weight"], pytest.approx(0.2 * optim.VALUE_EMBEDS_LR)),
        ("adamw", ["transformer.bigram.weight"], pytest.approx(0.2 * optim.BIGRAM_LR)),
        ("adamw", ["transformer.h.0.attn.value_gate.weight"], optim.SCALAR_LR),
        ("normuon", ["transformer.h.0.attn.c_q.weight", "transformer.h.1.attn.c_q.weight"], 0.02),
        ("normuon", ["transformer.h.0.mlp.c_fc.weight"], 0.02),
        ("adamw", ["x0_lambdas"], optim.X0_LR),
        ("adamw", ["resid_lambdas"], optim.RESID_LR),
        ("adamw", ["bigram_lambdas"], optim.SCALAR_LR),
    ]
    assert {g.weight_decay for g in groups if g.kind == "normuon"} == {0.3}


def test_a_parameter_that_no_rule_claims_is_refused():
    model = model_with(transformer__wte__weight=(8, 4), new__weight=(4, 4))
    with pytest.raises(AssertionError, match=r"no optimizer for \['new\.weight'\]"):
        build_optimizer(model, **RATES)
