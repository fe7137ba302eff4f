"""ALPS: the support by ADMM on the ℓ0 constraint, then the weights on it by conjugate gradients.

Meng, Behdin, Wang, Mazumder, "ALPS: Improved Optimization for Highly Sparse One-Shot Pruning for Large Language
Models", NeurIPS 2024.

With inputs ``X (P, N)``, dense weight ``Ŵ (M, N)`` and ``H = XᵀX/P + λI``, it looks for

    min ‖X Wᵀ − X Ŵᵀ‖²/P + λ‖W − Ŵ‖²   with exactly `kept` entries,

in coordinates where ``H`` has a unit diagonal. ``W`` and its sparse copy ``D`` are tied by multipliers ``V`` and a
penalty ``ρ`` that grows while the support still moves:

    W ← (Ŵ H − V + ρ D)(H + ρ I)⁻¹,    D ← the largest entries of W + V/ρ,    V ← V + ρ (W − D).

One eigendecomposition of ``H`` serves every ``ρ``. Once the support rests it is kept, and the weights are those that
conjugate gradients find on it. The program is not convex: no optimum is claimed, and no certificate exists.

The released code also divides ``ρ`` by 5 where the support hardly moves at first, and stops early once it has all but
come to rest; the paper has neither, and neither is here.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from nettrim.core.linalg import masked_cg
from nettrim.core.problem import check_amount, check_count, check_number
from nettrim.errors import ProblemError
from nettrim.methods.base import LayerResult, LayerTask
from nettrim.methods.fit import check_task, mean_error, shortfall_moment
from nettrim.methods.masks import keep_largest, keep_pattern


@dataclass(frozen=True)
class Alps:
    """ALPS to an exact count over the whole layer, or to N:M.

    Weights on dead inputs (zero in every sample) go first; those that a count above all live weights keeps stay as they
    are.

    Parameters
    ----------
    relative_damping : float
        ``λ`` as a fraction of the mean diagonal of ``XᵀX/P``, ≥ 0; 0.01 in the released code.
    rho : float
        The first ``ρ``, > 0, where ``H`` has a unit diagonal. Smaller values search longer.
    every : int
        Iterations between two looks at the support.
    growth : tuple of (float, float)
        Rows ``(share, factor)``: ``ρ`` is multiplied by the factor of the first row with ``s ≥ share · kept``, ``s``
        being the number of entries that entered or left the support since the last look. Shares descend to 0, factors
        are above 1. The iteration ends at ``s = 0``.
    max_iter : int
        Iterations after which the support is taken as it is; ``facts["settled"]`` then is False.
    refit_iterations, refit_tol : int, float
        The most conjugate gradient steps, ≥ 0, and the masked residual of each neuron, relative to its right-hand side,
        at which they end.
    targets : {"own", "dense"}
        What the layer is fitted to where its inputs come through pruned layers: what its dense weights make of these
        inputs, as in the released code, or the dense network's outputs. The same on the dense network's own inputs.
    bias : {"frozen", "kept"}
        "frozen": left as it is, as in the released code, whose layers have none. "kept": fitted like a weight that is
        never pruned.
    """

    relative_damping: float = 0.01
    rho: float = 0.1
    every: int = 3
    growth: tuple[tuple[float, float], ...] = ((0.1, 1.3), (0.005, 1.2), (0.0, 1.1))
    max_iter: int = 300
    refit_iterations: int = 10
    refit_tol: float = 1e-4
    targets: str = "own"
    bias: str = "frozen"
    name: str = "alps"
    amounts: tuple[str, ...] = ("sparsity", "kept", "pattern")

    def __post_init__(self) -> None:
        """Refuse unknown settings."""
        check_amount("Alps's rho", self.rho)
        for name in ("every", "max_iter"):
            check_count(f"Alps's {name}", getattr(self, name))
        for name in ("relative_damping", "refit_iterations", "refit_tol"):
            number = check_number(f"Alps's {name}", getattr(self, name))
            if not 0 <= number < float("inf"):
                raise ProblemError(f"Alps's {name}={number} is out of range: it is finite and ≥ 0.")
        if self.targets not in ("own", "dense"):
            raise ProblemError(f"Alps's targets={self.targets!r} is unknown: use own or dense.")
        if self.bias not in ("frozen", "kept"):
            raise ProblemError(f"Alps's bias={self.bias!r} is unknown: use frozen or kept.")
        self._check_growth()

    def _check_growth(self) -> None:
        rows = [tuple(row) if isinstance(row, (tuple, list)) else (row,) for row in self.growth]
        numbers = all(len(row) == 2 and all(isinstance(x, (int, float)) for x in row) for row in rows)
        falls = numbers and all(above[0] > below[0] for above, below in pairwise(rows))
        if not (rows and falls and rows[-1][0] == 0 and all(1 < row[1] < float("inf") for row in rows)):
            raise ProblemError(
                f"Alps's growth={self.growth} is no schedule: give rows (share, factor) with shares that fall to 0 and "
                "factors above 1, such as ((0.1, 1.3), (0.0, 1.1))."
            )

    def needs(self) -> str:
        """Return "moments"."""
        return "moments"

    def prune_layer(self, task: LayerTask) -> LayerResult:
        """Find a support, then the weights on it.

        Raises
        ------
        ProblemError
            Arrays do not fit together, are not finite, or their Gram matrix is not; the pattern does not divide rows.
        """
        began = time.monotonic()
        check_task(task)
        dense, columns, fitted = task.weight, task.weight.shape[1], False
        if task.bias is not None and self.bias == "kept":
            dense, fitted = torch.cat([dense, task.bias[:, None]], dim=1), True
        hessian = task.statistics().second_moment(ones=fitted)
        dead = hessian.diagonal() == 0
        damping = self.relative_damping * float(hessian.diagonal()[:columns].mean())
        # a dead input is tied to no other, so that any value above zero leaves its weight to itself
        hessian.diagonal().add_(torch.full_like(hessian.diagonal(), damping).where(~dead, 1.0))
        scale = hessian.diagonal().rsqrt()
        hessian = hessian * scale * scale[:, None]
        start = dense / scale
        right = start @ hessian
        if self.targets == "dense":
            right = right + shortfall_moment(task, ones=fitted) * scale
        found, mask, facts = self._support(hessian, right, start, dead, task)
        found, steps, residual = masked_cg(
            hessian, right.T, mask, found, tol=self.refit_tol, max_iter=int(self.refit_iterations)
        )
        # on dead inputs any value does, and the dense one is the only one known
        weight = dense.where(mask & dead, found * scale)
        bias = task.bias if task.bias is None or self.bias == "frozen" else weight[:, columns]
        weight = weight[:, :columns]
        facts |= {
            "damping": damping,
            "refit_iterations": steps,
            "refit_residual": residual,
            "targets": self.targets,
            "bias": "absent" if task.bias is None else self.bias,
            "E": mean_error(task, weight, bias),
        }
        return LayerResult(weight, bias, time.monotonic() - began, facts=facts)

    def _support(
        self, hessian: Tensor, right: Tensor, start: Tensor, dead: Tensor, task: LayerTask
    ) -> tuple[Tensor, Tensor, dict[str, Any]]:
        """Return the sparse copy ``D``, its support, and how the iteration ended, all in rescaled coordinates."""
        values, vectors = torch.linalg.eigh(hessian)
        rho, settled, iteration = float(self.rho), False, 0
        mask = _select(start, dead, task)
        sparse = start.where(mask, 0.0)
        multipliers = torch.zeros_like(start)
        seen, inverse = mask, (vectors / (values + rho)) @ vectors.T
        while iteration < self.max_iter and not settled:
            free = (right - multipliers + rho * sparse) @ inverse
            wanted = free + multipliers / rho
            mask = _select(wanted, dead, task)
            sparse = wanted.where(mask, 0.0)
            multipliers = multipliers + rho * (free - sparse)
            iteration += 1
            if iteration % int(self.every) == 0:
                moved = int((mask ^ seen).sum())
                seen, settled = mask, not moved
                if moved:
                    rho *= next(factor for share, factor in self.growth if moved >= share * task.kept)
                    inverse = (vectors / (values + rho)) @ vectors.T
        return sparse, mask, {"iterations": iteration, "rho": rho, "settled": settled}


def _select(values: Tensor, dead: Tensor, task: LayerTask) -> Tensor:
    """Return the mask of the largest entries, dead inputs last; columns beyond the weights' (a bias) all stay."""
    columns = task.weight.shape[1]
    scores = values.abs().where(~dead, -1.0)[:, :columns]
    chosen = keep_pattern(scores, task.pattern) if task.pattern else keep_largest(scores, task.kept)
    return torch.cat([chosen, chosen.new_ones(len(chosen), values.shape[1] - columns)], dim=1)
