"""``ℓ0``-constrained least squares by ADMM: a good support of a given size, in about a hundred shared products.

``min Σ_m ω_m ‖X u_m − t_m‖²`` over weights with exactly `kept` entries outside the free columns. With the inputs scaled
to unit norm and every neuron by ``√ω``, one eigendecomposition of the Gram matrix serves every iteration:
``W ← (H + ρI)⁻¹ (B − V + ρD)``, ``D ←`` the largest entries of ``W + V/ρ``, ``V ← V + ρ(W − D)``, and ``ρ`` grows
until the support stands still. The splitting is that of Meng, Behdin, Wang and Mazumder, "ALPS", NeurIPS 2024;
the schedule is simpler.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from nettrim.errors import ProblemError


@dataclass(frozen=True, eq=False)
class Spectrum:
    """The eigendecomposition of a Gram matrix whose inputs were scaled to unit norm; one serves many searches.

    Attributes
    ----------
    scale : Tensor (N,)
    values : Tensor (N,)
    vectors : Tensor (N, N)
    """

    scale: Tensor
    values: Tensor
    vectors: Tensor

    @staticmethod
    def of(gram: Tensor, dtype: torch.dtype) -> Spectrum:
        """Decompose ``XᵀX (N, N)`` in float64, and keep it in `dtype`. ``9 N³`` flops or so.

        Raises
        ------
        ProblemError
            An entry is not finite: the inputs' squares overflow.
        """
        if not bool(gram.isfinite().all()):
            raise ProblemError(
                f"the Gram matrix of {len(gram)} inputs is not finite: check them for NaN, infinity and values above "
                "1e150."
            )
        # where all inputs are dead, there is no size to measure them by
        largest = float(gram.diagonal().max()) or 1.0
        scale = gram.diagonal().clamp(min=1e-6 * largest).rsqrt()
        values, vectors = torch.linalg.eigh(scale[:, None] * gram * scale)
        return Spectrum(scale.to(dtype), values.clamp(min=0).to(dtype), vectors.to(dtype))


def l0_support(
    spectrum: Spectrum,
    cross: Tensor,
    start: Tensor,
    kept: int,
    free: Tensor,
    importance: Tensor,
    *,
    rho: float = 0.1,
    growth: float = 1.1,
    max_iter: int = 300,
) -> tuple[Tensor, int]:
    """Return a weight ``(M, N)`` with exactly `kept` entries outside the free columns, and the iterations it took.

    Parameters
    ----------
    spectrum : Spectrum
        Of ``XᵀX``.
    cross : Tensor (N, M)
        ``XᵀT``.
    start : Tensor (M, N)
        Any weight; its dtype is that of the iterations.
    kept : int
        ``1 ≤ kept ≤`` the entries outside the free columns.
    free : bool Tensor (N,)
        Columns that are always kept.
    importance : Tensor (M,)
        ``ω > 0``.
    rho, growth : float
        ``ρ`` at first, and its factor every third iteration; the slower, the better the support.
    max_iter : int
    """
    scale, values, vectors = (tensor.to(start) for tensor in (spectrum.scale, spectrum.values, spectrum.vectors))
    weigh = importance.sqrt().to(start)
    right = scale[:, None] * cross.to(start) * weigh
    sparse = (start / scale).T * weigh
    dual = torch.zeros_like(sparse)
    before, iteration = None, 0
    for iteration in range(1, max_iter + 1):
        dense = vectors @ ((vectors.T @ (right - dual + rho * sparse)) / (values + rho)[:, None])
        full = dense + dual / rho
        scores = full.abs()
        scores[free] = -1.0
        mask = torch.zeros(scores.numel(), dtype=torch.bool, device=start.device)
        mask[torch.topk(scores.flatten(), kept, sorted=False).indices] = True
        mask = mask.view(scores.shape)
        mask[free] = True
        sparse = torch.where(mask, full, 0.0)
        dual = dual + rho * (dense - sparse)
        if iteration % 3 == 0:
            rho *= growth
            # below ρ = 1, the mean eigenvalue, a support that stands still may still move
            if rho > 1 and before is not None and torch.equal(before, mask):
                break
            before = mask
    return (scale[:, None] * sparse / weigh).T.contiguous(), iteration
