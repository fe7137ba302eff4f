"""How much products, attention, normalisation and windows pass on of an error, measured on two networks' values.

``x`` is what the dense network has and ``x^`` what the pruned one has. Every function returns a factor that
``‖f(x^) − f(x)‖_F`` cannot exceed when it is multiplied with ``‖x^ − x‖_F``; those that read values hold for these
values. All is computed in float64 and raised by 1e-9 for the rounding.

**Products.** ``A^B^ − AB = ½(A^ + A)(B^ − B) + (A^ − A) ½(B^ + B)``: each factor's midpoint scales the other's error.
So for ``x²``, where both are one, the factor ``max |x^ + x|`` is attained.

**Shared operands.** An operand that is broadcast meets several partners: ``Σ_i ‖c_i ⊙ d‖² = Σ_j d_j² Σ_i c_ij²`` and
``Σ_i ‖A_i D‖² = tr(Dᵀ (Σ_i A_iᵀ A_i) D)``. The largest sum of squares and the largest eigenvalue are attained.

**Normalisation.** With ``ε > 0`` append ``√(d ε)`` to ``u ∈ R^d``: ``n(u) = u / s_u``, ``s_u = √(‖u‖²/d + ε)``, is then
``√d`` times a unit vector without its last entry, so ``‖n(u) − n(v)‖ ≤ 2 ‖u − v‖ / (s_u + s_v)`` (Dunkl and Williams,
"A simple norm inequality", 1964). Taking the mean away is a projection.

**Attention.** ``O = A V`` with ``A = softmax(S)``, ``S = scale · Q Kᵀ + mask``. A softmax is ½-Lipschitz (its Jacobian
``diag(p) − p pᵀ`` has row sums of absolute values ``2 p(1 − p) ≤ ½``), and ``½(A^ + A)`` has row sums 1, so its norm is
at most the root of its largest column sum. The rows of ``A^ − A`` sum to 0, and a constant added to a row of ``S``
changes nothing: ``V`` and ``K`` may be centred over the keys. With ``V', K'`` the centred midpoints, ``Q'`` and ``A'``
the midpoints: ``‖O^ − O‖ ≤ ‖A'‖ ‖dV‖ + ½ ‖V'‖ |scale| (‖K'‖ ‖dQ‖ + ‖Q'‖ ‖dK‖)`` for every sample and head.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

_ROUNDING = 1 + 1e-9  # far above what float64 loses in these sums
_BLOCK = 2**22  # numbers worked on at a time
_LARGEST = 512  # rows up to which a Gram matrix is decomposed; beyond, its power's norm is taken
_TOGETHER = 8  # matrices decomposed at a time


def peak(factors: Tensor) -> float:
    """Return the largest absolute value, 0.0 of nothing and infinity of NaN, raised for the rounding."""
    if factors.numel() == 0:
        return 0.0
    largest = float(factors.detach().abs().max())
    return math.inf if math.isnan(largest) else largest * _ROUNDING


def middle(dense: Tensor, pruned: Tensor) -> Tensor:
    """Return ``½(x + x^)`` in float64."""
    return (dense.detach().double() + pruned.detach().double()) / 2


def scale_gain(factors: Tensor, shape: Sequence[int]) -> float:
    """Return ``max ‖c ⊙ d‖ / ‖d‖`` over ``d`` of a shape that is broadcast to that of the factors ``c``."""
    if factors.numel() == 0:
        return 0.0
    return math.sqrt(peak(factors.double().square().sum_to_size(tuple(shape))))


def linear_gain(function: Callable[[Tensor], Tensor], ones: Tensor) -> float:
    """Bound the norm of a linear function with coefficients ``a ≥ 0``, applied to ``ones`` of the shape of its input.

    By Jensen ``(Σ_p a_wp x_p)² ≤ r_w Σ_p a_wp x_p²`` with ``r_w = Σ_p a_wp``, so ``‖A x‖² ≤ max_p (Aᵀ A 1)_p ‖x‖²``.
    For averages over windows this is ``max over pixels of Σ 1/n_w`` over the windows that cover it; where values are
    only copied it is the largest number of copies, attained.
    """
    if ones.numel() == 0:
        return 0.0
    with torch.enable_grad():
        given = ones.detach().requires_grad_()
        sums = function(given)
        (products,) = torch.autograd.grad(sums, given, sums.detach())
    return math.sqrt(peak(products))


def windows(starts: Tensor, stops: Tensor, size: int, step: int = 1) -> int:
    """Return how many of the windows ``start, start + step, … < stop`` read the same one of `size` pixels, at most."""
    counts = torch.zeros(size, dtype=torch.long)
    for start, stop in zip(starts.tolist(), stops.tolist(), strict=True):
        first = start if start >= 0 else start % step
        counts[first : max(0, min(stop, size)) : step] += 1
    return int(counts.max()) if size else 0


def matmul_gains(
    left: tuple[Tensor, Tensor], right: tuple[Tensor, Tensor], which: tuple[bool, bool] = (True, True)
) -> tuple[float, float]:
    """Return by how much ``A @ B`` passes on errors of ``A`` and of ``B``.

    Parameters
    ----------
    left, right : (dense, pruned)
        Of shapes (..., N, K) and (..., K, M), batch dimensions broadcast; or vectors.
    which : (bool, bool)
        Which of the two is wanted; the other is given as infinity.
    """
    a, b = middle(*left), middle(*right)
    a, b = a[None] if a.dim() == 1 else a, b[:, None] if b.dim() == 1 else b
    batch = _broadcast(a.shape[:-2], b.shape[:-2])
    of_left = _shared_norm(b.mT, batch, a.shape[:-2]) if which[0] else math.inf
    of_right = _shared_norm(a, batch, b.shape[:-2]) if which[1] else math.inf
    return of_left, of_right


def _shared_norm(matrices: Tensor, batch: Sequence[int], own: Sequence[int]) -> float:
    """Return ``max ‖A_i D‖ / ‖D‖`` over all ``i`` of `batch` and ``D`` of the batch dimensions `own`."""
    if matrices.numel() == 0 or math.prod(batch) == 0:
        return 0.0
    if not bool(torch.isfinite(matrices).all()):
        return math.inf
    rows, columns = matrices.shape[-2:]
    if math.prod(own) == 1:
        return _largest_norm(matrices.reshape(1, -1, columns))  # one D meets all: they stand on top of each other
    if math.prod(own) == math.prod(batch):
        return max(_largest_norm(block) for block in _blocks(matrices.reshape(-1, rows, columns)))
    gram = (matrices.mT @ matrices).expand(*batch, columns, columns)
    gram = gram.sum_to_size((*own, columns, columns)).reshape(-1, columns, columns)
    return math.sqrt(_largest_eigenvalue(gram)) * _ROUNDING


def _broadcast(*shapes: Sequence[int]) -> torch.Size:
    return torch.Size(torch.broadcast_shapes(*shapes))  # type: ignore[no-untyped-call]


def _parts(tensor: Tensor, size: int) -> Iterator[Tensor]:
    return iter(tensor.split(size))  # type: ignore[no-untyped-call]


def _blocks(items: Tensor) -> Iterator[Tensor]:
    """Yield matrices (P, N, M) some at a time."""
    return _parts(items, max(1, _BLOCK // max(1, items[0].numel())))


def _largest_norm(matrices: Tensor) -> float:
    """Return the largest spectral norm of matrices (P, N, M)."""
    return math.sqrt(_largest_eigenvalue(_grams(matrices))) * _ROUNDING


def _grams(matrices: Tensor) -> Tensor:
    """Return the smaller of ``A Aᵀ`` and ``Aᵀ A``, which share their largest eigenvalue."""
    return matrices @ matrices.mT if matrices.shape[-2] < matrices.shape[-1] else matrices.mT @ matrices


def _largest_eigenvalue(grams: Tensor) -> float:
    """Return the largest eigenvalue of positive semidefinite matrices (P, N, N), or a little more of large ones.

    ``λ ≤ ‖G^m‖_F^(1/m) ≤ λ N^(1/2m)`` needs products only; the matrices are decomposed from the largest such bound
    down, until none of the rest can exceed what was found.
    """
    large = grams.shape[-1] > _LARGEST
    above = _powers(grams, 6 if large else 3)
    if large:
        return peak(above)
    best = 0.0
    order = above.argsort(descending=True)
    for some in _parts(order, _TOGETHER):
        if float(above[some[0]]) <= best:
            break
        best = max(best, float(torch.linalg.eigvalsh(grams[some])[:, -1].max()))
    return best * _ROUNDING


def _powers(grams: Tensor, squarings: int) -> Tensor:
    """Return ``‖G^m‖_F^(1/m)``, ``m = 2^squarings``, for every matrix."""
    size = torch.linalg.matrix_norm(grams).clamp(min=1e-300)
    power, log = grams / size[:, None, None], size.log()
    for _ in range(squarings):
        power = power @ power
        size = torch.linalg.matrix_norm(power).clamp(min=1e-300)
        power, log = power / size[:, None, None], 2 * log + size.log()
    bound: Tensor = (log / 2**squarings).exp() * _ROUNDING
    return bound


def norm_gain(dense: Tensor, pruned: Tensor, dims: Sequence[int], eps: float, centred: bool = True) -> float:
    """Return the factor of ``u / √(‖u‖²/d + ε)`` over `dims`, where ``u`` is ``x``, less its mean if `centred`.

    A layer norm, group norm, instance norm or, if not `centred`, RMS norm without its weights.
    """
    total: Tensor | float = 0.0
    for values in (dense, pruned):
        x = values.detach().double()
        if centred:
            x = x - x.mean(tuple(dims), keepdim=True)
        total = total + (x.square().mean(tuple(dims)) + eps).sqrt()
    assert isinstance(total, Tensor)
    return peak(2 / total)


def unit_gain(dense: Tensor, pruned: Tensor, dim: int | Sequence[int], eps: float) -> float:
    """Return the factor of ``x / max(‖x‖, ε)``: Dunkl and Williams where both norms reach ``ε``.

    Elsewhere ``1/ε``: it is ``1/ε`` times the projection onto the ball of radius ``ε``.
    """
    first, second = (torch.linalg.vector_norm(x.detach().double(), dim=dim) for x in (dense, pruned))
    factors = torch.where((first >= eps) & (second >= eps), 2 / (first + second), 1 / eps if eps > 0 else math.inf)
    return peak(factors)


def attention_gains(
    query: tuple[Tensor, Tensor],
    key: tuple[Tensor, Tensor],
    value: tuple[Tensor, Tensor],
    mask: tuple[Tensor, Tensor] | None = None,
    is_causal: bool = False,
    scale: float | None = None,
) -> tuple[float, float, float, float]:
    """Return by how much attention passes on errors of the query, key, value and of a mask that is added.

    Parameters
    ----------
    query, key, value : (dense, pruned)
        Of shapes (..., L, E), (..., S, E) and (..., S, V), batch dimensions broadcast.
    mask : (dense, pruned), optional
        Broadcast to (..., L, S): True where a query sees a key, or added to the scores.
    is_causal : bool
        Whether query ``i`` sees keys ``j ≤ i`` only.
    scale : float, optional
        Of the scores, ``1/√E`` by default.
    """
    rows, columns = query[0].shape[-2], key[0].shape[-2]
    scale = query[0].shape[-1] ** -0.5 if scale is None else scale
    parts = [query, key, value]
    shapes = [pair[0].shape[:-2] for pair in parts] + ([] if mask is None else [mask[0].shape[:-2]])
    batch = _broadcast(*shapes, (1,))
    if math.prod(batch) * rows * columns == 0:
        return 0.0, 0.0, 0.0, 0.0
    if not all(bool(torch.isfinite(tensor).all()) for pair in parts for tensor in pair):
        return math.inf, math.inf, math.inf, math.inf

    def items(tensor: Tensor) -> Tensor:
        return tensor.detach().double().expand(*batch, *tensor.shape[-2:]).reshape(-1, *tensor.shape[-2:])

    spread = [[items(tensor) for tensor in pair] for pair in parts]
    hidden = [_hidden(None if mask is None else mask[k], rows, columns, is_causal, query[0]) for k in (0, 1)]
    gains = torch.zeros(4, dtype=torch.float64)
    for some in _parts(torch.arange(len(spread[0][0])), max(1, _BLOCK // (rows * columns))):
        q, k, v = ([tensor[some] for tensor in pair] for pair in spread)
        weights = torch.zeros(len(some), columns, dtype=torch.float64, device=q[0].device)
        for side in (0, 1):
            scores = scale * q[side] @ k[side].mT + hidden[side].expand(*batch, rows, columns).flatten(0, -3)[some]
            # a query that sees no key gives zeros in the newer torch and NaN in the older, never an error in between
            weights += scores.softmax(-1).nan_to_num().sum(-2) / 2
        # per item, since the norms of one are multiplied with each other and not with another's
        q_norm, k_norm, v_norm = (_norms(x) for x in (middle(*q), _centred(middle(*k)), _centred(middle(*v))))
        found = [
            k_norm * v_norm * abs(scale) / 2,
            q_norm * v_norm * abs(scale) / 2,
            weights.amax(-1).sqrt(),
            v_norm / 2,
        ]
        gains = torch.maximum(gains, torch.stack([part.max() for part in found]).cpu())
    copies = [math.sqrt(math.prod(batch) / max(1, math.prod(shape))) for shape in shapes]
    if mask is not None:
        shared = mask[0].shape[-2:].numel() if mask[0].dim() > 1 else mask[0].numel()
        copies[3] *= math.sqrt(rows * columns / shared)
    of_query, of_key, of_value, of_mask = (
        float(gain) * copy * _ROUNDING for gain, copy in zip(gains, [*copies, 1.0][:4], strict=True)
    )
    return of_query, of_key, of_value, of_mask


def _centred(values: Tensor) -> Tensor:
    centred: Tensor = values - values.mean(-2, keepdim=True)
    return centred


def _norms(matrices: Tensor) -> Tensor:
    """Return the spectral norms of matrices (P, N, M), a little more of large ones."""
    grams = _grams(matrices)
    if grams.shape[-1] > _LARGEST:
        return _powers(grams, 6).sqrt() * _ROUNDING
    squares: Tensor = torch.linalg.eigvalsh(grams)[:, -1].clamp(min=0.0)
    return squares.sqrt() * _ROUNDING


def _hidden(mask: Tensor | None, rows: int, columns: int, is_causal: bool, like: Tensor) -> Tensor:
    """Return what is added to the scores, broadcast from (1, L, S) on."""
    added = torch.zeros(1, rows, columns, dtype=torch.float64, device=like.device)
    if is_causal:
        seen = torch.ones(rows, columns, dtype=torch.bool, device=like.device).tril()
        added = added.masked_fill(~seen, -math.inf)
    if mask is None:
        return added
    if mask.dtype == torch.bool:
        return added.masked_fill(~mask, -math.inf)
    return added + mask.detach().double()
