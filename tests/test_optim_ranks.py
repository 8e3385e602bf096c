"""The optimizer on several ranks against one process."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from nanochat.optim import MuonAdamW
from nanochat.runtime import Runtime
from tests.test_optim import assert_same, load, make, mean_grads, take, tensors, values


def take_guarded(
    params: dict[str, nn.Parameter], optimizer: MuonAdamW, grads: Callable[[int], dict[str, Tensor]]
) -> None:
    """Four guarded steps, the third of which has a gradient that is no number, and is not taken."""
    for step in range(4):
        for name, grad in grads(step).items():
            params[name].grad = grad * math.nan if (step, name) == (2, "wide1") else grad
        optimizer.step(None, torch.tensor(1.0), (9.0, 1e9))
        assert bool(optimizer.taken) == (step != 2)
        optimizer.step_count -= int(step == 2)  # as who reads that must


def train_on_two(rt: Runtime, folder: Path, matrices: str) -> None:
    def own_grads(step: int) -> dict[str, Tensor]:
        return tensors(100 + 2 * step + rt.rank)

    def keep(name: str, content: dict[str, Tensor]) -> None:
        if rt.is_master:
            save_file(content, folder / f"{name}.safetensors")

    params, optimizer = make(matrices=matrices)
    take(params, optimizer, range(3), own_grads)
    keep("weights3", values(params))
    keep("state3", optimizer.state_dict())
    norms = take(params, optimizer, range(3, 6), own_grads)
    keep("weights6", values(params))
    save_file({**values(params), "norms": torch.tensor(norms)}, folder / f"rank{rt.rank}.safetensors")

    params, optimizer = make(matrices=matrices)
    load(params, load_file(folder / "one_weights3.safetensors"))
    optimizer.load_state_dict(load_file(folder / "one_state3.safetensors"))
    take(params, optimizer, range(3, 6), own_grads)
    keep("from_one", values(params))

    params, optimizer = make(matrices=matrices)
    calls: list[int] = []  # 1 = an orthogonalisation, 2 = the gradient of a table has to be here, 3 = an update
    direction, arrived, update = optimizer.direction, optimizer._arrived, optimizer._update
    optimizer.direction = lambda *args: (calls.append(1), direction(*args))[1]
    optimizer._arrived = lambda shard: (calls.append(2) if shard.group.kind == "adamw" else None, arrived(shard))[1]
    optimizer._update = lambda shard, g: (calls.append(3), update(shard, g))[1]
    take_guarded(params, optimizer, own_grads)
    keep("guarded", values(params))
    keep("calls", {"calls": torch.tensor(calls[: calls.index(3)])})

    params, optimizer = make(matrices=matrices)
    norms = take(params, optimizer, range(4), own_grads, clip=0.5)
    keep("clipped", {**values(params), "norms": torch.tensor(norms)})
    shares = {name: sum(t.numel() for t in s.state.values()) for s in optimizer.shards for name in [s.names[0]]}
    keep("shares", {name: torch.tensor(n) for name, n in shares.items()})


@pytest.fixture(scope="module", params=["muon", "normuon"])
def one_and_two(
    request: pytest.FixtureRequest, two_ranks: Callable[..., None], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Any]:
    """What two ranks left, by name; the single process's files begin with one_. "matrices" gives the kind."""
    matrices = request.param
    folder = tmp_path_factory.mktemp("ranks")
    params, optimizer = make(matrices=matrices)
    take(params, optimizer, range(3), mean_grads)
    save_file(values(params), folder / "one_weights3.safetensors")
    save_file(optimizer.state_dict(), folder / "one_state3.safetensors")
    norms = take(params, optimizer, range(3, 6), mean_grads)
    save_file({**values(params), "norms": torch.tensor(norms)}, folder / "one_weights6.safetensors")
    two_ranks(train_on_two, folder, matrices)
    return lambda name: matrices if name == "matrices" else load_file(folder / f"{name}.safetensors")


def test_two_ranks_equal_one_process_on_the_mean_gradient_in_weights_and_gradient_norms(one_and_two):
    assert_same(one_and_two("rank0"), one_and_two("one_weights6"))


def test_both_ranks_hold_the_same_weights_and_norms_to_the_bit(one_and_two):
    first, second = one_and_two("rank0"), one_and_two("rank1")
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_the_state_of_two_ranks_is_whole_and_equal_to_that_of_one(one_and_two):
    assert_same(one_and_two("state3"), one_and_two("one_state3"))


def test_state_saved_on_two_ranks_goes_on_in_one_process(one_and_two):
    params, optimizer = make(matrices=one_and_two("matrices"))
    load(params, one_and_two("weights3"))
    optimizer.load_state_dict(one_and_two("state3"))
    take(params, optimizer, range(3, 6), mean_grads)
    assert_same(values(params), one_and_two("weights6"))


def test_state_saved_by_one_process_goes_on_in_two_ranks(one_and_two):
    assert_same(one_and_two("from_one"), one_and_two("weights6"))


def test_two_ranks_clip_by_the_norm_of_the_mean_gradient(one_and_two):
    params, optimizer = make(matrices=one_and_two("matrices"))
    norms = take(params, optimizer, range(4), mean_grads, clip=0.5)
    clipped = one_and_two("clipped")
    assert clipped.pop("norms").tolist() == pytest.approx(norms, rel=1e-5)
    assert norms[0] == pytest.approx(math.sqrt(sum(g.square().sum().item() for g in mean_grads(0).values())), rel=1e-5)
    assert_same(clipped, values(params))


def test_two_ranks_take_and_skip_guarded_steps_as_one_process_does(one_and_two):
    params, optimizer = make(matrices=one_and_two("matrices"))
    take_guarded(params, optimizer, mean_grads)
    assert_same(one_and_two("guarded"), values(params))


def test_normuon_orthogonalises_while_the_tables_gradients_are_on_their_way(one_and_two):
    calls = one_and_two("calls")["calls"].tolist()
    assert calls == ([1, 1, 2, 2] if one_and_two("matrices") == "normuon" else [2, 2])


def test_a_rank_holds_half_of_the_optimizer_state(one_and_two):
    shares = {name: n.item() for name, n in one_and_two("shares").items()}
    rows, columns = (6, 6) if one_and_two("matrices") == "normuon" else (0, 0)  # of NorMuon's second moment
    assert shares == {
        "odd": 2 * 611,  # two moments of 1,221 elements
        "one": 2 * (1 + 16),  # and of the small tensors, whole on each rank
        "wide0": 2 * (24 + columns),  # 2 of 3 matrices
        "tall": 24 + rows,  # the only one
    }


def train_on_four(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=4)
    params, optimizer = make(matrices="normuon")
    norms = take(params, optimizer, range(4), lambda step: tensors(200 + 4 * step + rank))
    if rank == 3:  # it holds padding only of both stacks
        save_file({**values(params), "norms": torch.tensor(norms)}, folder / "four.safetensors")
    dist.destroy_process_group()


def test_four_ranks_one_of_which_gets_no_matrix_equal_one_process(tmp_path):
    def mean_of_four(step: int) -> dict[str, Tensor]:
        each = [tensors(200 + 4 * step + rank) for rank in range(4)]
        return {name: sum(grads[name] for grads in each) / 4 for name in each[0]}

    torch.multiprocessing.spawn(train_on_four, (tmp_path,), nprocs=4)
    params, optimizer = make(matrices="normuon")
    norms = take(params, optimizer, range(4), mean_of_four)
    assert_same(load_file(tmp_path / "four.safetensors"), {**values(params), "norms": torch.tensor(norms)})
