"""Units in which first-order iterations behave alike, whatever units the user has."""

from __future__ import annotations

import torch
from torch import Tensor

from nettrim.core.problem import LayerProblem
from nettrim.core.solvers.base import Start


def relative_radius(problem: LayerProblem) -> float:
    """Return ``‖r‖ / ‖Y‖``; 1 where there is no radius, or no target."""
    if problem.radius is None:
        return 1.0
    size = float(torch.linalg.vector_norm(problem.targets.double()))
    radius = torch.as_tensor(problem.radius, dtype=torch.float64)
    return float(torch.linalg.vector_norm(radius)) / size if size > 0 else 1.0


class Scaled:
    """The problem in units where targets and columns have size one; ``objective' = (k/s_y) · objective``.

    Columns are divided by ``d_n``, which leaves them the square root of their relative size (full equalisation
    was measured worse on image inputs, none at all worse on hidden layers) and takes outliers wholly.
    """

    def __init__(self, problem: LayerProblem, dtype: torch.dtype) -> None:
        norms = torch.linalg.vector_norm(problem.inputs, dim=0, dtype=torch.float64)
        alive = norms[norms > 0]
        typical = alive.median() if alive.numel() else norms.new_ones(())
        relative = torch.where(norms > 0, norms / typical, 1.0)
        self.columns = typical * relative / relative.sqrt().clamp(0.03, 30.0)
        anchor_size = (
            float(torch.linalg.vector_norm(problem.anchor, dtype=torch.float64)) / problem.targets.numel() ** 0.5
        )
        self.size = anchor_size if anchor_size > 0 else 1.0
        self.k = float(typical)
        assert problem.penalty is not None
        penalty = problem.penalty * (self.k / self.columns)
        self.problem = LayerProblem(
            inputs=problem.inputs.to(dtype) / self.columns.to(dtype),
            targets=problem.targets.to(dtype) / self.size,
            form=problem.form,
            radius=None if problem.radius is None else problem.radius / self.size,
            lam=None if problem.lam is None else problem.lam * self.k * self.size,
            ceiling=None if problem.ceiling is None else problem.ceiling.to(dtype) / self.size,
            penalty=penalty,
            active=problem.active,
        )

    def change_radius(self, problem: LayerProblem) -> None:
        """Take the radius of a problem that is the same otherwise."""
        if problem.radius is not None:
            self.problem = self.problem.with_radius(problem.radius / self.size)

    def back(self, weight: Tensor, multipliers: Tensor) -> tuple[Tensor, Tensor]:
        """Return ``(N, M)`` weights and ``(P, M)`` multipliers in the original units, the weight as ``(M, N)``."""
        u = weight.double() * (self.size / self.columns)[:, None]
        return u.T.contiguous(), multipliers / self.k

    def into(self, start: Start) -> tuple[Tensor, Tensor]:
        """Return a start in the scaled units, the weight as ``(N, M)``."""
        return self.weight_into(start.weight), (start.multipliers * self.k).to(self.problem.inputs)

    def weight_into(self, weight: Tensor) -> Tensor:
        """Return a weight ``(M, N)`` in the scaled units, as ``(N, M)``."""
        scaled: Tensor = weight.to(self.columns).T * (self.columns / self.size)[:, None]
        return scaled.to(self.problem.inputs)
