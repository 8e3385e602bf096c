"""Muon and AdamW against torch and a plain twin, and two ranks against one."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from nanochat.optim import Group, MuonAdamW, build_optimizer, orthogonalize
from nanochat.runtime import Runtime
from tests.conftest import tiny_gpt

# Ranks cannot share these evenly: 1,221 elements, 3 matrices of one shape and 1 of another. Below 1,024 elements they
# do not try.
ADAMW_SHAPES = {"odd": (37, 33), "one": (1,), "small": (4, 4)}
MUON_SHAPES = {"wide0": (4, 6), "wide1": (4, 6), "wide2": (4, 6), "tall": (6, 4)}


def tensors(seed: int, scale: float = 1.0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: scale * torch.randn(shape, generator=generator) for name, shape in {**ADAMW_SHAPES, **MUON_SHAPES}.items()
    }


def make(weight_decay: float = 0.1) -> tuple[dict[str, nn.Parameter], MuonAdamW]:
    params = {name: nn.Parameter(value) for name, value in tensors(seed=0).items()}

    def group(kind: str, *names: str) -> Group:
        decay = weight_decay if kind == "adamw" else 0.0
        return Group(kind, list(names), [params[n] for n in names], 0.02, 0.02, weight_decay=decay)

    return params, MuonAdamW(
        [group("adamw", *ADAMW_SHAPES), group("muon", "wide0", "wide1", "wide2"), group("muon", "tall")]
    )


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
    """Steps with a schedule and Muon's momentum on the move; the gradient norms."""
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


def test_orthogonalisation_treats_each_matrix_of_a_stack_alone_and_leaves_zero_at_zero():
    torch.manual_seed(0)
    stack = torch.randn(3, 8, 5)
    stack[1] = 0
    together = orthogonalize(stack, torch.float32)
    for i in range(3):
        torch.testing.assert_close(together[i], orthogonalize(stack[i : i + 1], torch.float32)[0])
    assert not together[1].any()


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


def test_a_parameter_without_gradient_takes_a_zero_and_gradients_are_cleared():
    params, optimizer = make(weight_decay=0.0)
    before = values(params)
    params["odd"].grad = torch.ones(37, 33)
    optimizer.step()
    assert all(p.grad is None for p in params.values())
    assert not torch.equal(params["odd"], before["odd"])
    assert all(torch.equal(params[name], before[name]) for name in params if name != "odd")


def test_state_saved_after_three_steps_goes_on_to_the_bit():
    params, optimizer = make()
    take(params, optimizer, range(3), mean_grads)
    weights, state = values(params), {k: v.clone() for k, v in optimizer.state_dict().items()}
    take(params, optimizer, range(3, 6), mean_grads)
    again, fresh = make()
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


# Two processes -----------------------------------------------------------------------------------


def train_on_two(rt: Runtime, folder: Path) -> None:
    def own_grads(step: int) -> dict[str, Tensor]:
        return tensors(100 + 2 * step + rt.rank)

    def keep(name: str, content: dict[str, Tensor]) -> None:
        if rt.is_master:
            save_file(content, folder / f"{name}.safetensors")

    params, optimizer = make()
    take(params, optimizer, range(3), own_grads)
    keep("weights3", values(params))
    keep("state3", optimizer.state_dict())
    take(params, optimizer, range(3, 6), own_grads)
    keep("weights6", values(params))
    save_file(values(params), folder / f"rank{rt.rank}.safetensors")

    params, optimizer = make()
    load(params, load_file(folder / "one_weights3.safetensors"))
    optimizer.load_state_dict(load_file(folder / "one_state3.safetensors"))
    take(params, optimizer, range(3, 6), own_grads)
    keep("from_one", values(params))

    params, optimizer = make()
    norms = take(params, optimizer, range(4), own_grads, clip=0.5)
    keep("clipped", {**values(params), "norms": torch.tensor(norms)})
    shares = {name: sum(t.numel() for t in s.state.values()) for s in optimizer.shards for name in [s.names[0]]}
    keep("shares", {name: torch.tensor(n) for name, n in shares.items()})


@pytest.fixture(scope="module")
def one_and_two(
    two_ranks: Callable[..., None], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], dict[str, Tensor]]:
    """What two ranks left, by name; the single process's files begin with one_."""
    folder = tmp_path_factory.mktemp("ranks")
    params, optimizer = make()
    take(params, optimizer, range(3), mean_grads)
    save_file(values(params), folder / "one_weights3.safetensors")
    save_file(optimizer.state_dict(), folder / "one_state3.safetensors")
    take(params, optimizer, range(3, 6), mean_grads)
    save_file(values(params), folder / "one_weights6.safetensors")
    two_ranks(train_on_two, folder)
    return lambda name: load_file(folder / f"{name}.safetensors")


def assert_same(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    for name in one:
        torch.testing.assert_close(one[name], other[name], rtol=1e-5, atol=1e-6, msg=name)


def test_two_ranks_equal_one_process_on_the_mean_gradient(one_and_two):
    assert_same(one_and_two("weights6"), one_and_two("one_weights6"))


def test_both_ranks_hold_the_same_weights_to_the_bit(one_and_two):
    first, second = one_and_two("rank0"), one_and_two("rank1")
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_the_state_of_two_ranks_is_whole_and_equal_to_that_of_one(one_and_two):
    assert_same(one_and_two("state3"), one_and_two("one_state3"))


def test_state_saved_on_two_ranks_goes_on_in_one_process(one_and_two):
    params, optimizer = make()
    load(params, one_and_two("weights3"))
    optimizer.load_state_dict(one_and_two("state3"))
    take(params, optimizer, range(3, 6), mean_grads)
    assert_same(values(params), one_and_two("one_weights6"))


def test_state_saved_by_one_process_goes_on_in_two_ranks(one_and_two):
    assert_same(one_and_two("from_one"), one_and_two("one_weights6"))


def test_two_ranks_clip_by_the_norm_of_the_mean_gradient(one_and_two):
    params, optimizer = make()
    norms = take(params, optimizer, range(4), mean_grads, clip=0.5)
    clipped = one_and_two("clipped")
    assert clipped.pop("norms").tolist() == pytest.approx(norms, rel=1e-5)
    assert norms[0] == pytest.approx(math.sqrt(sum(g.square().sum().item() for g in mean_grads(0).values())), rel=1e-5)
    assert_same(clipped, values(params))


def test_a_rank_holds_half_of_the_optimizer_state(one_and_two):
    shares = {name: n.item() for name, n in one_and_two("shares").items()}
    assert shares == {
        "odd": 2 * 611,  # two moments of 1,221 elements
        "one": 2 * (1 + 16),  # and of the small tensors, whole on each rank
        "wide0": 2 * 24,  # 2 of 3 matrices
        "tall": 24,  # the only one
    }
