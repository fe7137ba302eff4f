"""Gram matrices and damped inverses. One damping policy for the whole package, and whoever uses it reports it."""

from __future__ import annotations

import torch
from torch import Tensor

from nettrim.errors import ProblemError


def gram(inputs: Tensor, rows: int = 8192) -> Tensor:
    """Return ``XᵀX (N, N)`` in float64, accumulated over blocks of `rows`. ``2 P N²`` flops."""
    total = torch.zeros(inputs.shape[1], inputs.shape[1], dtype=torch.float64, device=inputs.device)
    for start in range(0, inputs.shape[0], rows):
        block = inputs[start : start + rows].double()
        total.addmm_(block.T, block)
    return total


def damped_inverse(matrix: Tensor) -> tuple[Tensor, float]:
    """Return the inverse of a symmetric positive semi-definite matrix and the damping that it took.

    The damping is the smallest of 0, 1e-12, 1e-10, … 1e-2 times the mean diagonal with which the Cholesky factorisation
    succeeds. It is absolute (in the units of `matrix`), so that ``inverse = (matrix + damping·I)⁻¹`` exactly.

    Raises
    ------
    ProblemError
        Where even the largest damping fails: the matrix is not positive semi-definite, or not finite.
    """
    mean = float(matrix.diagonal().mean())
    eye = torch.eye(matrix.shape[0], dtype=matrix.dtype, device=matrix.device)
    for relative in (0.0, 1e-12, 1e-10, 1e-8, 1e-6, 1e-4, 1e-2):
        damping = relative * mean
        factor, failed = torch.linalg.cholesky_ex(matrix + damping * eye if damping else matrix)
        if not int(failed):
            return torch.cholesky_inverse(factor), damping
    raise ProblemError(
        f"a Gram matrix of size {matrix.shape[0]} has no Cholesky factor (mean diagonal {mean:.3g}): check the inputs."
    )


class RidgeInverse:
    """``K = (a XᵀX + b I)⁻¹`` for one ``X (P, N)`` and changing ``a, b > 0``, applied to ``(N, M)`` arrays.

    The inverse of the smaller of ``XᵀX`` and ``XXᵀ`` is formed in float64 and kept in the dtype of ``X``; where
    ``P < N``, by Woodbury, ``K v = (v − Xᵀ (XXᵀ + (b/a) I)⁻¹ X v) / b``. So one application is products only:
    ``2 N² M`` flops, or ``6 N P M``.
    """

    def __init__(self, inputs: Tensor) -> None:
        self.inputs = inputs
        self.wide = inputs.shape[0] < inputs.shape[1]
        self.damping = 0.0
        self._gram = gram(inputs.T if self.wide else inputs)
        self._inverse = inputs.new_empty(0)
        self._b = 1.0

    @property
    def mean_diagonal(self) -> float:
        """Mean of the diagonal of ``XᵀX (N, N)``."""
        return float(self._gram.diagonal().sum()) / self.inputs.shape[1]

    def update(self, a: float, b: float) -> None:
        """Factorise anew for ``a`` and ``b``."""
        eye = torch.eye(self._gram.shape[0], dtype=torch.float64, device=self._gram.device)
        matrix = self._gram + (b / a) * eye if self.wide else a * self._gram + b * eye
        inverse, damping = damped_inverse(matrix)
        self.damping = max(self.damping, damping)
        self._inverse, self._b = inverse.to(self.inputs.dtype), b

    def apply(self, v: Tensor) -> Tensor:
        """Return ``K v``."""
        if not self.wide:
            return self._inverse @ v
        return (v - self.inputs.T @ (self._inverse @ (self.inputs @ v))) / self._b
