"""Muon for matrices, AdamW for the rest, with state sharded over the ranks: one code path for 1 and N.

Gradients arrive unsynchronised. A step averages them by reduce-scatter, so that each rank holds one shard of the
averaged gradient, updates its shard of the weights with its shard of the state, and gathers the weights back
(Rajbhandari et al. 2020, arXiv 1910.02054, stage 2). AdamW tensors are cut flat; Muon's same-shaped matrices are
stacked and whole matrices dealt out, because orthogonalisation needs all of a matrix.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor, nn

NS_COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # quintic of Jordan et al. 2024, "Muon"
NS_ITERATIONS = 5


@dataclass
class Group:
    """Parameters that share hyper-parameters: kind "adamw" (any shapes) or "muon" (matrices of one shape)."""

    kind: str
    names: list[str]
    params: list[nn.Parameter]
    lr: float
    initial_lr: float
    betas: tuple[float, float] = (0.8, 0.95)
    eps: float = 1e-10
    weight_decay: float = 0.0
    momentum: float = 0.95


@dataclass
class Shard:
    """This rank's part of one tensor (AdamW) or one stack of matrices (Muon)."""

    group: Group
    names: list[str]
    params: list[nn.Parameter]
    numel: int  # elements (AdamW) or matrices (Muon) per rank, the last rank's padding included
    grad: Tensor | None = None
    state: dict[str, Tensor] = field(default_factory=dict)


class MuonAdamW:
    def __init__(self, groups: Iterable[Group], muon_dtype: torch.dtype = torch.float32) -> None:
        """muon_dtype: of the orthogonalisation; bf16 is enough there (Jordan et al. 2024) where it is fast."""
        self.groups = list(groups)
        self.muon_dtype = muon_dtype
        self.world = dist.get_world_size() if dist.is_initialized() else 1
        self.rank = dist.get_rank() if dist.is_initialized() else 0
        self.step_count = 0
        self.shards = [shard for group in self.groups for shard in self._shards(group)]

    def _shards(self, group: Group) -> list[Shard]:
        if group.kind == "muon":
            return [Shard(group, group.names, group.params, -(-len(group.params) // self.world))]
        return [
            Shard(group, [name], [p], -(-p.numel() // self.world))
            for name, p in zip(group.names, group.params, strict=True)
        ]

    def set_lr(self, multiplier: float, momentum: float | None = None) -> None:
        """lr = initial_lr * multiplier in all groups; the momentum of the Muon groups."""
        for group in self.groups:
            group.lr = group.initial_lr * multiplier
            if momentum is not None:
                group.momentum = momentum

    @torch.no_grad()
    def step(self, grad_clip: float | None = None) -> Tensor:
        """Update from the parameters' .grad (averaged over ranks) and clear it.

        Returns:
            () the global L2 norm of the averaged gradient, before clipping to grad_clip.
        """
        for shard in self.shards:
            shard.grad = self._reduce(shard)
        square = torch.stack([s.grad.square().sum() for s in self.shards if s.grad is not None]).sum()
        if self.world > 1:
            dist.all_reduce(square)
        grad_norm = square.sqrt()
        if grad_clip is not None:
            scale = (grad_clip / (grad_norm + 1e-6)).clamp(max=1.0)
            for shard in self.shards:
                shard.grad = shard.grad * scale  # type: ignore[operator]
        self.step_count += 1
        for shard in self.shards:
            weights = self._local(shard, [p.data for p in shard.params])
            update = self._muon if shard.group.kind == "muon" else self._adamw
            self._gather(shard, update(shard, weights))
            shard.grad = None
        return grad_norm

    def _stack(self, shard: Shard, tensors: list[Tensor]) -> Tensor:
        """The full tensor of all ranks: (world * numel, ...) fp32, zero-padded."""
        total = shard.numel * self.world
        if shard.group.kind == "muon":
            full = torch.stack([t.float() for t in tensors])
            pad: tuple[int, ...] = (0, 0, 0, 0, 0, total - len(tensors))
        else:
            full = tensors[0].float().reshape(-1)
            pad = (0, total - full.numel())
        return nn.functional.pad(full, pad) if pad[-1] else full

    def _local(self, shard: Shard, tensors: list[Tensor]) -> Tensor:
        return self._stack(shard, tensors)[self.rank * shard.numel : (self.rank + 1) * shard.numel]

    def _reduce(self, shard: Shard) -> Tensor:
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in shard.params]
        full = self._stack(shard, grads)
        for p in shard.params:
            p.grad = None
        if self.world == 1:
            return full
        local = full.new_empty(shard.numel, *full.shape[1:])
        dist.reduce_scatter_tensor(local, full)
        return local / self.world

    def _gather(self, shard: Shard, local: Tensor) -> None:
        full = self._all_gather(local)
        if shard.group.kind == "muon":
            for p, w in zip(shard.params, full, strict=False):  # the stack may end in padding
                p.copy_(w)
        else:
            p = shard.params[0]
            p.copy_(full[: p.numel()].view_as(p))

    def _all_gather(self, local: Tensor) -> Tensor:
        if self.world == 1:
            return local
        full = local.new_empty(self.world * local.size(0), *local.shape[1:])
        dist.all_gather_into_tensor(full, local.contiguous())
        return full

    def _adamw(self, shard: Shard, w: Tensor) -> Tensor:
        """Decoupled decay, then Adam (Loshchilov & Hutter 2019, arXiv 1711.05101), in fp32."""
        group, g = shard.group, shard.grad
        assert g is not None
        if not shard.state:
            shard.state = {"exp_avg": torch.zeros_like(g), "exp_avg_sq": torch.zeros_like(g)}
        m, v = shard.state["exp_avg"], shard.state["exp_avg_sq"]
        beta1, beta2 = group.betas
        m.lerp_(g, 1 - beta1)
        v.lerp_(g.square(), 1 - beta2)
        denom = (v / (1 - beta2**self.step_count)).sqrt_().add_(group.eps)
        return (w * (1 - group.lr * group.weight_decay)).addcdiv_(
            m, denom, value=-group.lr / (1 - beta1**self.step_count)
        )

    def _muon(self, shard: Shard, w: Tensor) -> Tensor:
        """Nesterov momentum, orthogonalised (Jordan et al. 2024). w: (K, rows, cols)."""
        group, g = shard.group, shard.grad
        assert g is not None
        if not shard.state:
            shard.state = {"momentum": torch.zeros_like(g)}
        m = shard.state["momentum"]
        m.lerp_(g, 1 - group.momentum)
        update = orthogonalize(g.lerp(m, group.momentum), self.muon_dtype)
        scale = math.sqrt(max(1.0, w.size(-2) / w.size(-1)))
        return w.sub(update.float(), alpha=group.lr * scale)

    def state_dict(self) -> dict[str, Tensor]:
        """The whole state under parameter names, gathered from all ranks (call it on all); it loads on any
        number of ranks."""
        out = {"step": torch.tensor(self.step_count)}
        for shard in self.shards:
            for key, local in shard.state.items():
                full = self._all_gather(local)
                for i, (name, p) in enumerate(zip(shard.names, shard.params, strict=True)):
                    whole = full[i] if shard.group.kind == "muon" else full[: p.numel()]
                    out[f"{name}.{key}"] = whole.reshape(p.shape).cpu()
        return out

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.step_count = int(state["step"])
        for shard in self.shards:
            keys = ["momentum"] if shard.group.kind == "muon" else ["exp_avg", "exp_avg_sq"]
            if self.step_count:
                device = shard.params[0].device
                shard.state = {
                    key: self._local(shard, [state[f"{n}.{key}"].to(device) for n in shard.names]).clone()
                    for key in keys
                }


def orthogonalize(g: Tensor, dtype: torch.dtype) -> Tensor:
    """The nearest semi-orthogonal matrix of each (K, rows, cols), roughly: singular values end in about
    [0.5, 1.5] after five Newton-Schulz steps X <- aX + (bA + cA^2)X, A = XX^T."""
    a, b, c = NS_COEFFICIENTS
    x = g.to(dtype)
    tall = x.size(-2) > x.size(-1)
    x = x.mT if tall else x
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(NS_ITERATIONS):
        A = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(A, A, A, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


def build_optimizer(
    model: nn.Module,
    *,
    unembedding_lr: float,
    embedding_lr: float,
    matrix_lr: float,
    weight_decay: float = 0.0,
    init_lr_frac: float = 1.0,
    muon_dtype: torch.dtype = torch.float32,
) -> MuonAdamW:
    """AdamW for lm_head and wte, with learning rates tuned at width 768 and scaled by (n_embd/768)^-0.5;
    Muon for every matrix inside the blocks, grouped by shape."""
    named = dict(model.named_parameters())
    head = [n for n in named if n.startswith("lm_head.")]
    table = [n for n in named if n.startswith("transformer.wte.")]
    matrices = [n for n in named if n.startswith("transformer.h.")]
    assert len(head) + len(table) + len(matrices) == len(named), "a parameter has no optimizer"
    width_scale = (named[table[0]].size(1) / 768) ** -0.5

    def group(kind: str, names: list[str], lr: float, decay: float) -> Group:
        lr *= init_lr_frac
        return Group(kind, names, [named[n] for n in names], lr, lr, weight_decay=decay)

    groups = [
        group("adamw", head, unembedding_lr * width_scale, weight_decay),
        group("adamw", table, embedding_lr * width_scale, weight_decay),
    ]
    by_shape: dict[torch.Size, list[str]] = {}
    for n in matrices:
        by_shape.setdefault(named[n].shape, []).append(n)
    groups += [group("muon", names, matrix_lr, 0.0) for _, names in sorted(by_shape.items())]
    return MuonAdamW(groups, muon_dtype)
