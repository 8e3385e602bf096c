"""What an optimizer does to weights, in place: AdamW, Muon and NorMuon, and the orthogonalisation of the latter two.

# K matrices of a stack, m rows (outputs), n columns (inputs); w weights, g gradient (overwritten)
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

NS_COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # quintic of Jordan et al. 2024, "Muon"
NS_ITERATIONS = 5
POLAR_EXPRESS = (  # Amsel et al. 2025, arXiv 2505.16932; made for singular values in [0.001, 1], 2% safety
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
)
HALLEY = (  # (a, b, c) of two weighted steps for singular values in [0.001, 1]: Nakatsukasa, Bai & Gygi 2010
    (0.9843132398189149, 0.015687740588197604, 6.24990183572424e-05),
    (0.5849259822261422, 0.4456384084521646, 0.0736360007360401),
)
POLAR_MARGIN = 1.02  # what POLAR_EXPRESS was made for: no singular value may exceed 1 by rounding

Number = float | Tensor


def adamw_(w: Tensor, g: Tensor, m: Tensor, v: Tensor, hyper: Sequence[Number]) -> None:
    """Adam with decoupled decay (Loshchilov & Hutter 2019, arXiv 1711.05101). All tensors of one shape.

    hyper: 1 - beta1; 1 - beta2; lr / (1 - beta1^t); (1 - beta2^t)^-0.5; epsilon; lr * weight_decay.
    """
    rate1, rate2, step_size, root, eps, decay = hyper
    m.lerp_(g, rate1)
    v.lerp_(g.square_(), rate2)
    update = m / v.sqrt().mul_(root).add_(eps)
    w.mul_(1 - decay).sub_(update.mul_(step_size))


def muon_(w: Tensor, g: Tensor, m: Tensor, hyper: Sequence[Number], dtype: torch.dtype) -> None:
    """Nesterov momentum, orthogonalised (Jordan et al. 2024).

    w, g, m: (K, m, n); hyper: lr with the shape factor; momentum.
    """
    lr, momentum = hyper
    update = orthogonalize(nesterov(g, m, momentum), dtype)
    m.lerp_(g, 1 - momentum)
    w.sub_(update.float() * lr)


def normuon_direction(g: Tensor, m: Tensor, momentum: Number, dtype: torch.dtype) -> Tensor:
    """The part of NorMuon that takes the time: MuonEq, polar factor and Muon+. Writes nothing, so that it can be made
    before it is known whether the step is taken. g, m: (K, m, n); returns (K, m, n) fp32."""
    return unit_scale(polar(equalize_rows(nesterov(g, m, momentum)), dtype).float())


def normuon_(w: Tensor, g: Tensor, m: Tensor, second: Tensor, direction: Tensor, hyper: Sequence[Number]) -> None:
    """NorMuon (Li et al. 2025, arXiv 2510.05491) along `normuon_direction`, with cautious decay.

    w, g, m, direction: (K, m, n); second: (K, m, 1) or (K, 1, n).
    hyper: lr with the shape factor; momentum; 1 - beta2; weight decay times the first.
    """
    lr, momentum, rate2, decay = hyper
    m.lerp_(g, 1 - momentum)
    update = even_out(direction, second, rate2)
    w.sub_(update * lr + cautious_decay(w, update) * decay)


def nesterov(g: Tensor, m: Tensor, momentum: Number) -> Tensor:
    """mu M' + (1 - mu) G, where M' = mu M + (1 - mu) G is the momentum after this step."""
    return g.lerp(m.lerp(g, 1 - momentum), momentum)


def equalize_rows(u: Tensor) -> Tensor:
    """Each row of norm 1: MuonEq, arXiv 2603.28254. (There it is |U|/sqrt(m); a factor common to all rows is lost in
    the polar factor, and 1 keeps its products in range.) A row of less than a millionth of the mean norm is rounding
    noise and stays small; the second floor keeps zero at zero."""
    norms = torch.linalg.vector_norm(u, dim=-1, keepdim=True)  # (K, m, 1)
    return u / norms.maximum(1e-6 * norms.mean(-2, keepdim=True)).clamp(min=1e-30)


def unit_scale(o: Tensor) -> Tensor:
    """|O| = sqrt(min(m, n)), as if all singular values were 1: Muon+, arXiv 2602.21545."""
    norm = torch.linalg.vector_norm(o, dim=(-2, -1), keepdim=True)
    return o * (math.sqrt(min(o.shape[-2:])) / norm.clamp(min=1e-6))


def even_out(o: Tensor, second: Tensor, rate2: Number) -> Tensor:
    """Each neuron's update over the root of its running mean square, |O| as before: NorMuon, arXiv 2510.05491.

    A neuron is a row where m >= n and a column otherwise. second: (K, m, 1) or (K, 1, n), updated in place.
    """
    dim = -1 if o.size(-2) >= o.size(-1) else -2
    mean_square = o.square().mean(dim, keepdim=True)
    second.lerp_(mean_square, rate2)
    scale = second.clamp(min=1e-10).rsqrt()
    before = mean_square.sum((-2, -1), keepdim=True)
    after = (mean_square * scale.square()).sum((-2, -1), keepdim=True)
    return o * (scale * (before / after.clamp(min=1e-20)).sqrt())


def cautious_decay(w: Tensor, update: Tensor) -> Tensor:
    """w where the update shrinks it as well (or both are zero), else 0: arXiv 2510.12402."""
    return w * (update * w >= 0)


def shape_factor(m: int, n: int) -> float:
    """Of the learning rate, from (outputs, inputs): Jordan et al. 2024."""
    return math.sqrt(max(1.0, m / n))


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


def polar(g: Tensor, dtype: torch.dtype) -> Tensor:
    """About the polar factor of each (K, m, n), of norms near 1: its nearest semi-orthogonal matrix. Zero stays.

    On a CPU by Halley's steps in fp32, whatever the dtype: ms a matrix on one thread with AVX512-BF16, square 384 and
    1536x384 (CPU time; the machine was loaded): Halley 10.6 and 16.7; Polar Express in fp32 20.0 and 59.4, in bf16 9.2
    and 31.3 (with four steps 7.3 and 25.5); eigenpairs of the Gram matrix 13.3 and 20.1. Elsewhere by Polar Express,
    which is products only. (Symmetric products by 2 x 2 blocks: 10 to 25% off each in fp32, slower in bf16.)
    """
    return polar_halley(g.float()) if g.device.type == "cpu" else polar_express(g, dtype)


def polar_halley(g: Tensor) -> Tensor:
    """Two steps X <- X(aI + b(A + cI)^-1), A = X^T X: the dynamically weighted Halley iteration (Nakatsukasa, Bai &
    Gygi 2010, SIAM J. Matrix Anal. Appl. 31). Singular values from 0.001 of |A|^(1/2) up end in [0.96, 1].

    X itself is read at the ends only: between them A <- S A S, where S A = aA + b(I - c(A + cI)^-1) costs no product.
    """
    tall = g.size(-2) > g.size(-1)
    A = g.mT @ g if tall else g @ g.mT  # (K, s, s), s = min(m, n)
    bound = torch.linalg.vector_norm(A, dim=(-2, -1), keepdim=True).clamp(min=1e-12)
    A, P = A / bound, None
    for i, (a, b, c) in enumerate(HALLEY):
        shifted = A.clone()
        shifted.diagonal(dim1=-2, dim2=-1).add_(c)
        inverse = torch.cholesky_inverse(torch.linalg.cholesky_ex(shifted).L)  # _ex: a NaN passes through
        S = inverse * b
        S.diagonal(dim1=-2, dim2=-1).add_(a)
        P = S if P is None else P @ S
        if i + 1 < len(HALLEY):
            SA = A.mul_(a).sub_(inverse, alpha=b * c)
            SA.diagonal(dim1=-2, dim2=-1).add_(b)
            A = S @ SA
    assert P is not None
    P = P / bound.sqrt()
    return g @ P if tall else P @ g


def polar_express(g: Tensor, dtype: torch.dtype) -> Tensor:
    """Five steps X <- aX + (bA + cA^2)X, A = XX^T, each the best quintic for what the last one left (Amsel et al.
    2025, arXiv 2505.16932). Singular values from 0.003 of the largest up end in [0.85, 1.15].

    X is scaled by |XX^T|^(1/2) (the Schatten-4 norm), not by |X|: as safe a bound on the largest singular value, up to
    min(m, n)^(1/4) times nearer to it, and free, as the first step needs XX^T anyway.
    """
    x = g.mT if g.size(-2) > g.size(-1) else g
    x = x.to(dtype)
    A = x @ x.mT
    bound = POLAR_MARGIN * torch.linalg.vector_norm(A, dim=(-2, -1), keepdim=True, dtype=torch.float32).sqrt()
    bound = bound.clamp(min=1e-6)
    x, A = (x / bound).to(dtype), (A / bound.square()).to(dtype)
    for i, (a, b, c) in enumerate(POLAR_EXPRESS):
        A = x @ x.mT if i else A
        x = torch.baddbmm(x, torch.baddbmm(A, A, A, beta=b, alpha=c), x, beta=a)
    return x.mT if g.size(-2) > g.size(-1) else x
