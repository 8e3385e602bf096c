"""Muon or NorMuon for matrices, AdamW for the rest, with state sharded over the ranks: one code path for 1 and N.

Gradients arrive unsynchronised. A step averages them by reduce-scatter, so that each rank holds one shard of the
averaged gradient, updates its shard of the weights with its shard of the state, and gathers the weights back
(Rajbhandari et al. 2020, arXiv 1910.02054, stage 2). A guarded step (`limits`) knows whether it is taken only when the
last reduction ended; so matrices are reduced first, and NorMuon orthogonalises them while the tables, most of the
bytes, are on their way. Each gather runs beside the updates after it. AdamW tensors are cut flat; same-shaped matrices
are stacked and whole matrices dealt out, because orthogonalisation needs all of a matrix. Parameters become views of
that stacked storage, so a step neither stacks nor copies back any weight: build the optimizer after the model is on its
device.

# K matrices of a stack, m rows (outputs), n columns (inputs)
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor, nn

from nanochat.updates import Number, adamw_, muon_, normuon_, normuon_direction, shape_factor

if TYPE_CHECKING:
    from nanochat.gpt import GPT

# Numbers of `modern` (docs/EXPERIMENTS.md).
VALUE_EMBEDS_LR = BIGRAM_LR = 0.5  # as shares of the token embedding's
# Absolute, as the scale of a scalar does not depend on width. What multiplies the stream layer after layer must move a
# hundred times slower than what only adds to it (the reference's later model).
RESID_LR, X0_LR, SCALAR_LR, X0_BETAS = 0.005, 0.5, 0.02, (0.96, 0.95)
NORMUON_BETA2 = 0.9

REPLICATED_BELOW = 1024  # elements; a smaller AdamW tensor costs more to scatter and gather than to update everywhere
STATE = {"adamw": ("exp_avg", "exp_avg_sq"), "muon": ("momentum",), "normuon": ("momentum", "second_moment")}


@dataclass
class Group:
    """Parameters that share hyper-parameters: kind "adamw" (any shapes), or "muon" or "normuon" (matrices of one
    shape)."""

    kind: str
    names: list[str]
    params: list[nn.Parameter]
    lr: float
    initial_lr: float
    betas: tuple[float, float] = (0.8, 0.95)
    eps: float = 1e-10
    weight_decay: float = 0.0
    momentum: float = 0.95
    beta2: float = NORMUON_BETA2


@dataclass
class Shard:
    """Tensors that are reduced, updated and gathered as one: a stack of matrices, or AdamW tensors laid flat.

    weights: (K, m, n) or (N,), the parameters' storage, zero-padded to a multiple of the ranks.
    """

    group: Group
    names: list[str]
    params: list[nn.Parameter]
    weights: Tensor
    replicated: bool  # whole on every rank
    arriving: tuple[dist.Work, Tensor] | None = None  # the reduction of grad under way, and what it sends
    grad: Tensor | None = None  # this rank's part, as the state's
    direction: Tensor | None = None  # NorMuon's, made before it is known whether the step is taken
    state: dict[str, Tensor] = field(default_factory=dict)


class MuonAdamW:
    def __init__(self, groups: Iterable[Group], muon_dtype: torch.dtype = torch.float32, compile: bool = False) -> None:
        """muon_dtype: of the orthogonalisation; bf16 is enough there (Jordan et al. 2024) where it is fast.
        compile: the updates under torch.compile, with hyper-parameters as tensors, so that none recompiles."""
        self.groups = list(groups)
        self.muon_dtype = muon_dtype
        self.compile = compile
        self.world = dist.get_world_size() if dist.is_initialized() else 1
        self.rank = dist.get_rank() if dist.is_initialized() else 0
        self.step_count = 0
        self.lr_multiplier = 1.0
        self.taken: Tensor | None = None  # () bool on the device: whether the last step was taken; None = it was
        shards = [shard for group in self.groups for shard in self._shards(group)]
        # Small stacks first: their reduction ends first, and orthogonalisation covers those of the AdamW tensors. The
        # last gather, which nothing covers, is the smallest.
        self.shards = sorted(
            shards, key=lambda s: (1, -s.weights.numel()) if s.group.kind == "adamw" else (0, s.weights.numel())
        )
        self.adamw = torch.compile(adamw_, dynamic=None) if compile else adamw_
        self.muon = torch.compile(muon_, dynamic=False) if compile else muon_
        self.normuon = torch.compile(normuon_, dynamic=False) if compile else normuon_
        self.direction = torch.compile(normuon_direction, dynamic=False) if compile else normuon_direction

    def _shards(self, group: Group) -> list[Shard]:
        named = list(zip(group.names, group.params, strict=True))
        assert all(p.dtype == torch.float32 for p in group.params), "parameters are fp32"
        if group.kind != "adamw":
            shape = (-(-len(named) // self.world) * self.world, *group.params[0].shape)
            return [self._shard(group, named, shape, False)]
        small = [(name, p) for name, p in named if p.numel() < REPLICATED_BELOW]
        shards = [self._shard(group, small, (sum(p.numel() for _, p in small),), True)] if small else []
        return shards + [
            self._shard(group, [(name, p)], (-(-p.numel() // self.world) * self.world,), False)
            for name, p in named
            if p.numel() >= REPLICATED_BELOW
        ]

    def _shard(
        self, group: Group, named: list[tuple[str, nn.Parameter]], shape: tuple[int, ...], replicated: bool
    ) -> Shard:
        params = [p for _, p in named]
        weights = pack([p.data for p in params], shape)
        for p, view in zip(params, unpack(weights, [p.shape for p in params]), strict=True):
            p.data = view
        return Shard(group, [name for name, _ in named], params, weights, replicated)

    def set_lr(self, multiplier: float, momentum: float | None = None) -> None:
        """lr = initial_lr * multiplier in all groups; the momentum of the Muon groups."""
        self.lr_multiplier = multiplier
        for group in self.groups:
            group.lr = group.initial_lr * multiplier
            if momentum is not None:
                group.momentum = momentum

    @torch.no_grad()
    def step(
        self, grad_clip: float | None = None, loss: Tensor | None = None, limits: tuple[float, float] | None = None
    ) -> Tensor:
        """Update from the parameters' .grad (averaged over ranks) and clear it.

        Args:
            loss, limits: take the step only if this () loss and the gradient norm are at most these, and the norm is
                above 0; else weights and state stay to the bit what they are. It is decided on the device, in
                self.taken; who reads there that it was not taken lowers step_count by 1.

        Returns:
            () the global L2 norm of the averaged gradient, before clipping to grad_clip.
        """
        self.step_count += 1
        for shard in self.shards:
            self._start_reduce(shard)
        norm: Tensor | None = None
        scale: Tensor | None = None
        self.taken = None
        if grad_clip is not None or limits is not None:  # only then must all gradients be here before the first update
            parts = []
            for shard in self.shards:
                parts.append(self._square(self._arrived(shard), shard))
                if self.world > 1 and grad_clip is None and shard.group.kind == "normuon":
                    shard.direction = self._direction(shard, self._arrived(shard))
            norm = self._norm(parts)
        if grad_clip is not None:
            assert norm is not None
            scale = (grad_clip / (norm + 1e-6)).clamp(max=1.0)
        if limits is not None:
            assert loss is not None and norm is not None
            self.taken = (loss <= limits[0]) & (norm <= limits[1]) & (norm > 0)  # false for what is no number
        squares, gathers = [], []
        for shard in self.shards:
            g = self._arrived(shard)
            if norm is None:
                squares.append(self._square(g, shard))
            if scale is not None:
                g.mul_(scale)
            # rates of 0 times what is not finite would not be 0; a CPU is asked first, which costs nothing there
            if self.taken is not None and not (g.device.type == "cpu" and self.taken):
                g.masked_fill_(~self.taken, 0.0)
                if shard.direction is not None:
                    shard.direction.masked_fill_(~self.taken, 0.0)
            self._update(shard, g)
            shard.grad = shard.direction = None
            gathers.append(self._start_gather(shard))
        for gather in gathers:
            if gather is not None:
                gather.wait()
        # the weights changed behind their views' backs: who caches what follows from them (fp8) must see it
        torch.autograd.graph.increment_version([p for shard in self.shards for p in shard.params])
        return self._norm(squares) if norm is None else norm

    def _square(self, g: Tensor, shard: Shard) -> Tensor:
        """() this rank's share of the gradient's squared norm; what is replicated counts on the first rank.

        Row by row, then in fp64: fp32 over 34M elements at once was 0.2% off, and a matrix has the same rows on any
        number of ranks, so that the norm, and what is clipped by it, is the same to the bit.
        """
        width = shard.params[0].size(-1)
        rows = g.view(-1, width) if g.numel() % width == 0 else g.view(1, -1)
        norms = torch.linalg.vector_norm(rows, dim=1)
        if g.device.type != "mps":  # has no fp64
            norms = norms.double()
        return norms.square().sum() * float(self.rank == 0 or not shard.replicated)

    def _norm(self, squares: list[Tensor]) -> Tensor:
        square = torch.stack(squares).sum()
        if self.world > 1:
            dist.all_reduce(square)
        return square.sqrt().float()

    def _local(self, shard: Shard, full: Tensor) -> Tensor:
        """This rank's part, a view."""
        return full if shard.replicated else full.chunk(self.world)[self.rank]

    def _start_reduce(self, shard: Shard) -> None:
        """Take the gradients and begin to sum them over ranks."""
        for p, view in zip(shard.params, unpack(shard.weights, [p.shape for p in shard.params]), strict=True):
            assert p.data_ptr() == view.data_ptr(), "the model was moved after its optimizer was built"
        full = pack([torch.zeros_like(p) if p.grad is None else p.grad for p in shard.params], shard.weights.shape)
        for p in shard.params:
            p.grad = None
        shard.grad = full
        if self.world == 1:
            return
        work: dist.Work | None
        if shard.replicated:
            work = dist.all_reduce(full, async_op=True)
        else:
            shard.grad = torch.empty_like(self._local(shard, full))
            work = dist.reduce_scatter_tensor(shard.grad, full, async_op=True)
        assert work is not None
        shard.arriving = work, full

    def _arrived(self, shard: Shard) -> Tensor:
        """This rank's part of the averaged gradient; waits for it."""
        assert shard.grad is not None
        if shard.arriving is not None:
            shard.arriving[0].wait()
            shard.arriving = None
            shard.grad.div_(self.world)
        return shard.grad

    def _start_gather(self, shard: Shard) -> dist.Work | None:
        if self.world == 1 or shard.replicated:
            return None
        return dist.all_gather_into_tensor(shard.weights, self._local(shard, shard.weights), async_op=True)

    def _update(self, shard: Shard, g: Tensor) -> None:
        group, w = shard.group, self._local(shard, shard.weights)
        state, number = self._state(shard), self._number
        decay = group.lr * group.weight_decay
        if group.kind == "adamw":
            beta1, beta2 = group.betas
            step_size = group.lr / (1 - beta1**self.step_count)
            root = (1 - beta2**self.step_count) ** -0.5
            hyper = [number(x, 0.0) for x in (1 - beta1, 1 - beta2, step_size)]
            hyper += [number(root), number(group.eps), number(decay, 0.0)]
            self.adamw(w, g, state["exp_avg"], state["exp_avg_sq"], hyper)
            return
        if group.kind == "normuon":  # by the rate's square: the end of a run belongs to the updates
            decay *= self.lr_multiplier
        scale = shape_factor(*w.shape[-2:])
        hyper = [number(group.lr * scale, 0.0), number(group.momentum, 1.0)]
        hyper += [number(1 - group.beta2, 0.0), number(decay * scale, 0.0)]
        if group.kind == "muon":
            self.muon(w, g, state["momentum"], hyper[:2], self.muon_dtype)
        else:
            direction = self._direction(shard, g) if shard.direction is None else shard.direction
            self.normuon(w, g, state["momentum"], state["second_moment"], direction, hyper)

    def _state(self, shard: Shard) -> dict[str, Tensor]:
        if not shard.state:
            w = self._local(shard, shard.weights)
            shard.state = {key: w.new_zeros(shape) for key, shape in state_shapes(shard, w).items()}
        return shard.state

    def _direction(self, shard: Shard, g: Tensor) -> Tensor:
        return self.direction(g, self._state(shard)["momentum"], self._number(shard.group.momentum), self.muon_dtype)

    def _number(self, value: float, if_skipped: float | None = None) -> Number:
        """A hyper-parameter, or, in a step that is not taken, the value with which it changes nothing.

        Code would be compiled again for each new float; a tensor is an input to it."""
        if self.taken is not None and if_skipped is not None:
            return torch.where(self.taken, value, if_skipped)
        return torch.tensor(value, dtype=torch.float32) if self.compile else value

    def state_dict(self) -> dict[str, Tensor]:
        """A copy of the whole state in host memory under parameter names, gathered from all ranks (call it on all); it
        loads on any number of ranks. Empty on all ranks but the first."""
        out = {"step": torch.tensor(self.step_count)}
        for shard in self.shards:
            for key, local in shard.state.items():
                full = local
                if self.world > 1 and not shard.replicated:
                    full = local.new_empty(self.world * local.size(0), *local.shape[1:])
                    dist.all_gather_into_tensor(full, local)
                if self.rank:
                    continue
                shapes = [p.shape if shard.group.kind == "adamw" else full.shape[1:] for p in shard.params]
                for name, whole in zip(shard.names, unpack(full, shapes), strict=True):
                    out[f"{name}.{key}"] = whole.to("cpu", copy=True)
        return out

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.step_count = int(state["step"])
        for shard in self.shards:
            shard.state = {}
            if self.step_count:
                for key, shape in state_shapes(shard, shard.weights).items():
                    full = pack([state[f"{name}.{key}"].float() for name in shard.names], shape)
                    shard.state[key] = self._local(shard, full).to(shard.weights.device, copy=True)


def pack(tensors: Sequence[Tensor], shape: Sequence[int]) -> Tensor:
    """One contiguous tensor of that shape from the elements of all in their order, then zeros. A view where one
    tensor fills it."""
    flat = [t.reshape(-1) for t in tensors]
    padding = math.prod(shape) - sum(t.numel() for t in flat)
    if padding:
        flat.append(flat[0].new_zeros(padding))
    return (torch.cat(flat) if len(flat) > 1 else flat[0]).view(shape)


def unpack(full: Tensor, shapes: Iterable[Sequence[int]]) -> list[Tensor]:
    """What pack() put together, as views."""
    flat, views, at = full.view(-1), [], 0
    for shape in shapes:
        views.append(flat[at : at + math.prod(shape)].view(shape))
        at += math.prod(shape)
    return views


def state_shapes(shard: Shard, w: Tensor) -> dict[str, tuple[int, ...]]:
    """Of the state of w, which is all of the shard's weights or a part."""
    shapes = {key: tuple(w.shape) for key in STATE[shard.group.kind]}
    if "second_moment" in shapes:
        K, m, n = w.shape
        shapes["second_moment"] = (K, m, 1) if m >= n else (K, 1, n)
    return shapes


# Which parameter goes where ------------------------------------------------------------------------


@dataclass(frozen=True)
class Rule:
    """How the parameters with this in their name, and with none of the rules before, are trained."""

    part: str  # of the name
    kind: str
    rate: str  # whose learning rate: "unembedding", "embedding", "matrix", "scalar" (1)
    lr_factor: float = 1.0
    betas: tuple[float, float] = (0.8, 0.95)
    weight_decay: float | None = 0.0  # None = as asked for


RULES = {
    "plain": (
        Rule("lm_head.", "adamw", "unembedding", weight_decay=None),
        Rule("transformer.wte.", "adamw", "embedding", weight_decay=None),
        Rule("transformer.h.", "muon", "matrix"),
    ),
    "modern": (
        Rule("lm_head.", "adamw", "unembedding"),
        Rule("transformer.wte.", "adamw", "embedding"),
        Rule("transformer.value_embeds.", "adamw", "embedding", VALUE_EMBEDS_LR),
        Rule("transformer.bigram.", "adamw", "embedding", BIGRAM_LR),
        Rule(".value_gate.", "adamw", "scalar", SCALAR_LR),
        Rule("transformer.h.", "normuon", "matrix", weight_decay=None),
        Rule("x0_lambdas", "adamw", "scalar", X0_LR, X0_BETAS),
        Rule("resid_lambdas", "adamw", "scalar", RESID_LR),
        Rule("bigram_lambdas", "adamw", "scalar", SCALAR_LR),
    ),
}


def build_optimizer(
    model: GPT,
    *,
    unembedding_lr: float,
    embedding_lr: float,
    matrix_lr: float,
    weight_decay: float = 0.0,
    init_lr_frac: float = 1.0,
    muon_dtype: torch.dtype = torch.float32,
    compile: bool = False,
) -> MuonAdamW:
    """The groups of the architecture's rules; those of matrices by shape.

    The head's and the tables' learning rates were tuned at width 768 and are scaled by (n_embd/768)^-0.5. weight_decay
    is that of the head and the table in `plain`, of the matrices in `modern`.
    """
    rules = RULES[model.config.arch]
    named = dict(model.named_parameters())
    width_scale = (named["transformer.wte.weight"].size(1) / 768) ** -0.5
    rates = {
        "unembedding": unembedding_lr * width_scale,
        "embedding": embedding_lr * width_scale,
        "matrix": matrix_lr,
        "scalar": 1.0,
    }
    claims = {name: next((rule for rule in rules if rule.part in name), None) for name in named}
    assert None not in claims.values(), f"no optimizer for {[name for name, rule in claims.items() if rule is None]}"
    groups = []
    for rule in rules:
        by_shape: dict[tuple[int, ...], list[str]] = {}
        for name, p in named.items():
            if claims[name] is rule:
                by_shape.setdefault(() if rule.kind == "adamw" else tuple(p.shape), []).append(name)
        lr = rates[rule.rate] * rule.lr_factor * init_lr_frac
        decay = weight_decay if rule.weight_decay is None else rule.weight_decay
        groups += [
            Group(rule.kind, names, [named[n] for n in names], lr, lr, rule.betas, 1e-10, decay)
            for _, names in sorted(by_shape.items())
        ]
    return MuonAdamW(groups, muon_dtype, compile)
