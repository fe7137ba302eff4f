"""Which channels stay: by their weights, by what the next layer makes of them, or by chance.

A channel ``i`` adds ``X_i W_iᵀ`` to the next layer's outputs: ``X_i (P, taps)`` its columns of that layer's rows,
``W_i (M, taps)`` its part of the weight. With second moments of the rows, whatever a choice makes of the outputs
follows from the contributions' Gram matrix ``A_ij = ⟨X_i W_iᵀ, X_j W_jᵀ⟩`` and ``b_i = ⟨X_i W_iᵀ, Y⟩``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from nettrim.core.moments import Moments
from nettrim.errors import ProblemError

Doubles = npt.NDArray[np.float64]

_SWEEPS = 200  # of coordinate descent, at the most
_HALVINGS = 60  # of the LASSO's penalty


@dataclass(frozen=True, eq=False)
class Candidates:
    """The channels to choose from.

    Attributes
    ----------
    incoming : Tensor (C, N)
        The dense weights that make them.
    outgoing : Tensor (M, C, taps)
        The dense weights that read them.
    bias : Tensor (M,) or None
        Of the layer that reads them.
    moments : callable
        Returns the `Moments` of that layer's rows, inputs behind the pruned prefix, outputs the dense network's; only
        called where they are needed.
    generator : torch.Generator
    """

    incoming: Tensor
    outgoing: Tensor
    bias: Tensor | None
    moments: Callable[[], Moments]
    generator: torch.Generator


Selector = Callable[[Candidates, int], Tensor]


def contributions(candidates: Candidates) -> tuple[Tensor, Tensor]:
    """Return ``A (C, C)`` and ``b (C,)``, ``Y`` being the outputs less the bias: means over the rows."""
    moments, weight = candidates.moments(), candidates.outgoing
    channels, taps = weight.shape[1:]
    columns = channels * taps
    flat = weight.reshape(-1, columns)
    gram = moments.second_moment(ones=True)
    cross = moments.cross_moment()
    if candidates.bias is not None:
        cross = cross - gram[:-1, -1:] * candidates.bias
    both = (flat.T @ flat) * gram[:-1, :-1]
    matrix = both.reshape(channels, taps, channels, taps).sum((1, 3))
    return matrix, (cross.T * flat).reshape(-1, channels, taps).sum((0, 2))


def by_l1(candidates: Candidates, count: int) -> Tensor:
    """Keep those with the largest ``ℓ1`` norm of incoming weights (the paper's Top-k)."""
    return _largest(candidates.incoming.abs().sum(1), count)


def by_energy(candidates: Candidates, count: int) -> Tensor:
    """Keep those with the largest root mean square activation times the norm of what reads it."""
    channels, taps = candidates.outgoing.shape[1:]
    squares = candidates.moments().second_moment().diagonal().reshape(channels, taps).mean(1)
    return _largest(squares.clamp(min=0).sqrt() * candidates.outgoing.pow(2).sum((0, 2)).sqrt(), count)


def by_lasso(candidates: Candidates, count: int) -> Tensor:
    """Keep those whose coefficient a LASSO on the contributions leaves nonzero (He 2017).

    ``min_β ½ βᵀ A β − bᵀ β + λ ‖β‖₁``. The penalty is bisected until `count` survive; where it passes over that number,
    the largest ``β`` of the least larger set stay, and of too few, those with the largest correlation beside them.
    """
    matrix, cross = (tensor.numpy() for tensor in contributions(candidates))
    low, high = 0.0, float(np.abs(cross).max())
    beta: Doubles = np.zeros(len(cross))
    best = lasso(matrix, cross, 0.0, beta)
    for _ in range(_HALVINGS):
        if np.count_nonzero(best) == count:
            break
        middle = (low + high) / 2
        beta = lasso(matrix, cross, middle, beta)
        if np.count_nonzero(beta) < count:
            high = middle
        else:
            low, best = middle, beta
    left = np.abs(cross - matrix @ best)
    # survivors come first, by their coefficients
    scores = np.where(best != 0, 2 + np.abs(best) / max(float(np.abs(best).max()), 1e-300), 0.0)
    scores = scores + np.where(best == 0, left / max(float(left.max()), 1e-300), 0.0)
    return _largest(torch.from_numpy(scores), count)


def lasso(matrix: Doubles, cross: Doubles, penalty: float, start: Doubles) -> Doubles:
    """Minimise ``½ βᵀ A β − bᵀ β + λ ‖β‖₁`` by cyclic coordinate descent from `start`."""
    beta, residual = start.copy(), cross - matrix @ start
    diagonal = np.diag(matrix)
    scale = float(np.abs(cross).max())
    for _ in range(_SWEEPS):
        moved = 0.0
        for i in np.flatnonzero(diagonal > 0):
            rest = residual[i] + diagonal[i] * beta[i]
            value = np.sign(rest) * max(abs(rest) - penalty, 0.0) / diagonal[i]
            step = value - beta[i]
            if step:
                residual -= step * matrix[i]
                beta[i] = value
                moved = max(moved, abs(step) * diagonal[i])
        if moved <= 1e-7 * scale:
            break
    return beta


def by_thinet(candidates: Candidates, count: int) -> Tensor:
    """Take out, one after the other, the channel that makes ``‖Σ_removed X_i W_iᵀ‖²`` least (ThiNet)."""
    matrix, _ = contributions(candidates)
    shared, out = torch.zeros(len(matrix), dtype=matrix.dtype), torch.zeros(len(matrix), dtype=torch.bool)
    for _ in range(len(matrix) - count):
        cost = (matrix.diagonal() + 2 * shared).masked_fill(out, torch.inf)
        gone = int(cost.argmin())
        out[gone] = True
        shared = shared + matrix[gone]
    return (~out).nonzero().flatten()


def at_random(candidates: Candidates, count: int) -> Tensor:
    """Draw those that stay."""
    return torch.randperm(len(candidates.incoming), generator=candidates.generator)[:count].sort().values


#: name -> what chooses the channels that stay: ascending numbers (count,)
SELECTORS: dict[str, Selector] = {
    "l1": by_l1,
    "energy": by_energy,
    "lasso": by_lasso,
    "thinet": by_thinet,
    "random": at_random,
}


def select(name: str, candidates: Candidates, count: int) -> Tensor:
    """Return the numbers of the channels that stay, ascending ``(count,)``.

    Raises
    ------
    ProblemError
        There are fewer, or `count` is not positive.
    """
    channels = len(candidates.incoming)
    if not 1 <= count <= channels:
        raise ProblemError(f"{count} of {channels} channels shall stay: keep at least one and at most all.")
    return torch.arange(channels) if count == channels else SELECTORS[name](candidates, count)


def _largest(scores: Tensor, count: int) -> Tensor:
    """Return the numbers of the largest, ascending; of equal ones the first."""
    if not bool(scores.isfinite().all()):
        raise ProblemError("a score of channels is NaN or infinite: check weights and activations.")
    return scores.sort(descending=True, stable=True).indices[:count].sort().values
