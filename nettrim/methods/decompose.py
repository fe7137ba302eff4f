"""A layer split along its input channels: into what it reads of them, and what it makes of that.

``conv(W, y) = conv(R, Qᵀ y)``, with ``Qᵀ`` applied to the channels of every pixel. That the split is a singular value
decomposition along the channels is the paper's; that ``Q`` takes the singular values, so that an error of ``Qᵀ y`` is
one of the layer's output (of a linear layer exactly), and the response basis are our reading.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from nettrim.errors import ProblemError

_ZERO = 1e-10  # relative to the largest singular value: below is rounding


@dataclass(frozen=True, eq=False)
class Decomposition:
    """One layer's factors, float64, all of its rank; the first are the largest.

    Attributes
    ----------
    reading : Tensor (C, r)
        ``Q``: what the layer reads of the channels, its embedding.
    making : Tensor (M, r, taps)
        ``R``: what it makes of the embedding.
    values : Tensor (r,)
        Singular values, of the weight or of the response.
    """

    reading: Tensor
    making: Tensor
    values: Tensor

    @property
    def rank(self) -> int:
        """``r``."""
        return len(self.values)

    def rank_at(self, energy: float) -> int:
        """Return the least rank whose singular values hold that share of the sum of squares."""
        if energy >= 1:
            return self.rank
        held = self.values.square().cumsum(0)
        return min(self.rank, int((held < energy * held[-1]).sum()) + 1)

    def truncated(self, rank: int) -> Decomposition:
        """Return the decomposition of that rank."""
        return Decomposition(self.reading[:, :rank], self.making[:, :rank], self.values[:rank])

    def weight(self) -> Tensor:
        """Return the weight ``(M, C, taps)`` that the factors make."""
        return recompose(self.making, self.reading)


def decompose(weight: Tensor, moment: Tensor | None = None) -> Decomposition:
    """Split a weight along its input channels.

    Parameters
    ----------
    weight : Tensor (M, C, taps)
        Of the layer that reads the channels.
    moment : Tensor (C, C), optional
        ``E[y yᵀ]``, over all pixels. With it the split is that of the responses: it orders the embedding by what of it
        reaches the layer's outputs on the data, and is exact on what the activations span; without it by the weight
        alone, and exact.

    Raises
    ------
    ProblemError
        The weight or the moment is not finite.
    """
    if not bool(weight.isfinite().all()) or (moment is not None and not bool(moment.isfinite().all())):
        raise ProblemError("a layer to decompose has NaN or infinity in its weight or activations: check both.")
    out, channels, taps = weight.shape
    # a row for every output and tap
    unfolded = weight.double().permute(0, 2, 1).reshape(out * taps, channels)
    if moment is None:
        left, values, right = torch.linalg.svd(unfolded, full_matrices=False)
        reading = right.T * values
    else:
        squares, vectors = torch.linalg.eigh(moment.double())
        root = (vectors * squares.clamp(min=0).sqrt()) @ vectors.T
        left, values, _ = torch.linalg.svd(unfolded @ root, full_matrices=False)
        reading = unfolded.T @ left
    rank = max(1, int((values > _ZERO * values[0]).sum()))
    making = left[:, :rank].reshape(out, taps, rank).permute(0, 2, 1).contiguous()
    return Decomposition(reading[:, :rank].contiguous(), making, values[:rank])


def recompose(making: Tensor, reading: Tensor) -> Tensor:
    """Return ``W[o, c, t] = Σ_k R[o, k, t] Q[c, k]``: one layer in place of two, exact whatever the padding.

    Parameters
    ----------
    making : Tensor (M, r, taps)
    reading : Tensor (C, r)
    """
    return torch.einsum("okt,ck->oct", making, reading)
