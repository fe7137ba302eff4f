"""Gram matrices, damped inverses and masked conjugate gradients.

One damping policy for the whole package, and whoever uses it reports it.
"""

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


def second_moment(inputs: Tensor) -> Tensor:
    """Return ``H = XᵀX / P (N, N)`` in float64: the same whatever the batches that the rows came in.

    Raises
    ------
    ProblemError
        An entry is not finite: the inputs hold NaN or infinity, or their squares overflow.
    """
    moment = gram(inputs) / inputs.shape[0]
    if not bool(moment.isfinite().all()):
        raise ProblemError(
            f"the Gram matrix of {inputs.shape[1]} inputs is not finite: check the inputs for NaN, infinity and values "
            "above 1e150."
        )
    return moment


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


def masked_cg(
    gram: Tensor, cross: Tensor, mask: Tensor, start: Tensor | None = None, tol: float = 1e-8, max_iter: int = 1000
) -> tuple[Tensor, int, float]:
    """Fit linear targets on a support by conjugate gradients, all neurons at once: products in place of factorisations.

    For neuron ``m`` with support ``S`` it solves ``G_SS u = c_S``, the system of `nettrim.core.support.refit_linear`,
    preconditioned by the diagonal of ``G``. Residuals are masked: off the support they are not zero at the solution,
    and a test that looked there would never be met. ``2 M N²`` flops an iteration.

    Parameters
    ----------
    gram : Tensor (N, N)
        ``G``, symmetric positive semi-definite.
    cross : Tensor (N, M)
        The right-hand sides ``c``.
    mask : bool Tensor (M, N)
        True = on the support.
    start : Tensor (M, N), optional
        Where to start; what it holds off the support is not used. Zero by default.
    tol : float
        A neuron is done at ``‖(c − G u)_S‖ ≤ tol · ‖c_S‖``; ≥ 0.
    max_iter : int
        Iterations, ≥ 0.

    Returns
    -------
    weight : Tensor (M, N)
        Exactly zero off the support.
    iterations : int
    residual : float
        The largest ``‖(c − G u)_S‖ / ‖c_S‖`` of a neuron, computed from `weight`: above `tol` where `max_iter` was too
        few, or the system is singular and has no solution.

    Raises
    ------
    ProblemError
        Shapes do not match, a value is not finite, or ``G`` is not positive semi-definite.
    """
    neurons, columns = mask.shape
    if gram.shape != (columns, columns) or cross.shape != (columns, neurons):
        raise ProblemError(
            f"gram {tuple(gram.shape)}, cross {tuple(cross.shape)} and mask {tuple(mask.shape)} do not match: "
            "they must be (N, N), (N, M) and (M, N)."
        )
    if start is None:
        start = gram.new_zeros(neurons, columns)
    if start.shape != mask.shape:
        raise ProblemError(f"start {tuple(start.shape)} does not match mask {tuple(mask.shape)}: give (M, N).")
    if not all(bool(tensor.isfinite().all()) for tensor in (gram, cross, start)):
        raise ProblemError("gram, cross or start is not finite: check the inputs for NaN and infinity.")
    right = cross.T.where(mask, 0.0)
    norm = right.norm(dim=1)
    # where the right-hand side is zero, so is the solution, and no relative residual says how near it is
    weight = start.where(mask & (norm > 0)[:, None], 0.0)
    diagonal = gram.diagonal()
    scale = torch.where(diagonal > 0, 1 / diagonal, 1.0)
    residual = (right - weight @ gram).where(mask, 0.0)
    direction = residual * scale
    product = (residual * direction).sum(1)
    active = residual.norm(dim=1) > tol * norm
    iterations = 0
    while iterations < max_iter and bool(active.any()):
        image = direction @ gram
        curvature, size = (direction * image).sum(1), (direction.square() * diagonal).sum(1)
        if bool((curvature < -1e-10 * size)[active].any()):
            raise ProblemError(f"the Gram matrix of size {columns} is not positive semi-definite: check the inputs.")
        # no curvature left but rounding: a singular system, and a longer step would only grow
        active = active & (curvature > torch.finfo(gram.dtype).eps * size)
        step = torch.where(active, product / curvature, 0.0)[:, None]
        weight = weight + step * direction
        residual = residual - (step * image).where(mask, 0.0)
        before, product = product, (residual.square() * scale).sum(1)
        active = active & (residual.norm(dim=1) > tol * norm)
        direction = residual * scale + torch.where(active, product / before, 0.0)[:, None] * direction
        iterations += 1
    left = (right - weight @ gram).where(mask, 0.0).norm(dim=1)
    return weight, iterations, float((left / norm.clamp(min=torch.finfo(norm.dtype).tiny)).max())


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
