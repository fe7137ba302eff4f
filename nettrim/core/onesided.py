"""The one-sided loss of a layer on given supports: Newton's method, and optimal brain surgery that knows the ReLU.

For neuron ``m`` with weight ``u`` and ``z = X u`` the residual is ``r_p = z_p − t_p`` where the sample is active and
``max(z_p − v_p, 0)`` where it is not (``v`` the ceiling, 0 unless given). ``f_m = Σ_p r_p²`` is convex and piecewise
quadratic, it bounds ``‖ReLU(z) − y‖²`` from above, and where ``A`` are the samples that are active or above the ceiling
its Hessian on a support ``S`` is ``2 X_ASᵀ X_AS``. A linear layer has all samples active, and one Newton step ends.

Removing weight ``q`` and letting the others compensate raises the quadratic model by ``u_q² / [H_S⁻¹]_qq`` with
``H_S = X_ASᵀ X_AS``: the saliency of Optimal Brain Surgeon (Hassibi and Stork, 1993) under the present active set.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from nettrim.core.problem import LayerProblem

# of each diagonal entry, so that units of the inputs do not matter: H_S may be singular, on collinear inputs and where
# few samples are active
_RIDGE = 1e-7
_ENTRIES = 2**24  # float64 entries of the inverses that are held at a time: 128 MiB
_CURVATURE = 10_000  # samples that the Hessian is the sum over, scaled up to all
_ARMIJO = 1e-4
_SETTLED = 1e-7  # of the loss: a step that promises less is the last


@dataclass(frozen=True, eq=False)
class OneSided:
    """The data of one layer, a row per input and per neuron so that a support is a contiguous read.

    Attributes
    ----------
    inputs : Tensor (N, P)
    anchor : Tensor (M, P)
        Targets where active, the ceiling elsewhere.
    active : bool Tensor (M, P), or None
        None for a linear layer: everything counts.
    """

    inputs: Tensor
    anchor: Tensor
    active: Tensor | None

    @staticmethod
    def of(problem: LayerProblem, dtype: torch.dtype, rows: Tensor | None = None) -> OneSided:
        """Take a problem's samples, or those of `rows`, in a dtype."""
        inputs, anchor, active = problem.inputs, problem.anchor, problem.active
        assert active is not None
        if rows is not None:
            inputs, anchor, active = inputs[rows], anchor[rows], active[rows]
        linear = problem.form == "linear"
        return OneSided(
            inputs.T.to(dtype).contiguous(),
            anchor.T.to(dtype).contiguous(),
            None if linear else active.T.contiguous(),
        )

    def residual(self, outputs: Tensor, neurons: slice | int = slice(None)) -> Tensor:
        """Return ``r`` for pre-activations ``(M, P)``, or of the neurons that are given."""
        difference = outputs - self.anchor[neurons]
        if self.active is None:
            return difference
        return torch.where(self.active[neurons], difference, difference.clamp(min=0))

    def step(
        self, neuron: int, support: Tensor, weight: Tensor, steps: int, offset: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Take Newton steps with backtracking on one neuron.

        Parameters
        ----------
        neuron : int
        support : Tensor (S,)
            Its columns.
        weight : Tensor (S,)
            Where to start.
        steps : int
            At the most; fewer where the loss ceases to fall.
        offset : Tensor (P,), optional
            Added to the residual: what other neurons leave to be made up for.

        Returns
        -------
        weight : Tensor (S,)
        residual : Tensor (P,)
            Without the offset; its squares, offset added, sum to no more than at the start.
        hessian : Tensor (S, S)
            ``X_ASᵀ X_AS`` where the last step started, with its ridge; from some of the samples where there are many.
        """
        x = self.inputs[support]
        # of many samples some give the curvature well enough: the slope, and what is accepted, is of all
        stride = max(1, x.shape[1] // _CURVATURE)
        few = x[:, ::stride].contiguous() if stride > 1 else x
        active = None if self.active is None else self.active[neuron]
        residual = self.residual(weight @ x, neuron)
        shifted = residual if offset is None else residual + offset
        loss = float(shifted @ shifted)
        hessian = x.new_zeros(len(support), len(support))
        for _ in range(steps):
            pull, some = shifted, few
            if active is not None:
                # off the active set only what stands above the ceiling has a slope
                on = active | (residual > 0)
                pull, some = torch.where(on, shifted, 0.0), few * on[::stride]
            slope, hessian = x @ pull, _ridged(some @ few.T * (x.shape[1] / few.shape[1]))
            direction = _solve(hessian, slope)
            promised = max(0.0, float(direction @ slope))  # by how much the quadratic falls
            length, before, moved = 1.0, loss, False
            while not moved:
                trial = weight - length * direction
                found = self.residual(trial @ x, neuron)
                pulled = found if offset is None else found + offset
                new = float(pulled @ pulled)
                moved = new <= before - _ARMIJO * length * promised
                if moved:
                    weight, residual, shifted, loss = trial, found, pulled, new
                length /= 2
                # where few samples are active, a step soon makes others so, and only a short one lowers the loss
                if not length * promised > _SETTLED * before:
                    break
            if not moved or not promised > _SETTLED * before:
                break
        return weight, residual, hessian

    def fit(self, weight: Tensor, mask: Tensor, steps: int) -> tuple[Tensor, Tensor]:
        """Refit every neuron on its support; return the weight ``(M, N)`` and the losses ``f (M,)``.

        `weight` is where it starts, and what it holds off the mask is dropped. Never above the loss of that start.
        """
        fitted, losses = torch.zeros_like(weight), weight.new_zeros(len(weight))
        for m in range(len(weight)):
            support = mask[m].nonzero()[:, 0]
            found, residual, _ = self.step(m, support, weight[m, support], steps)
            fitted[m, support] = found
            losses[m] = residual @ residual
        return fitted, losses

    def losses(self, weight: Tensor) -> Tensor:
        """Return ``f (M,)``."""
        return self.residual(weight @ self.inputs).square().sum(1)

    def eliminate(
        self,
        weight: Tensor,
        mask: Tensor,
        free: Tensor,
        importance: Tensor,
        kept: int,
        steps: int,
        advance: Callable[[], object] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Remove weights until `kept` are left, each time those that cost the layer least.

        Between the steps, whose counts fall geometrically, every neuron is refitted under its new active set.

        Parameters
        ----------
        weight : Tensor (M, N)
        mask : bool Tensor (M, N)
            The support to start from.
        free : bool Tensor (N,)
            Columns that are never removed and not counted: a bias.
        importance : Tensor (M,)
            Weight of each neuron's loss.
        kept : int
            How many to leave.
        steps : int
        advance : callable, optional
            Called after every step.

        Returns
        -------
        weight, mask : Tensor (M, N)
            The weight is not refitted after the last removals: that is `fit`.
        """
        weight, mask = torch.where(mask, weight, 0.0), mask.clone(memory_format=torch.contiguous_format)
        before = int(mask[:, ~free].sum())
        for i in range(1, steps + 1):
            goal = round(before * (kept / before) ** (i / steps)) if before > kept else kept
            remove = int(mask[:, ~free].sum()) - goal
            if remove > 0:
                weight, mask = self._remove(weight, mask, free, importance, remove)
            if advance is not None:
                advance()
        return weight, mask

    def _remove(
        self, weight: Tensor, mask: Tensor, free: Tensor, importance: Tensor, remove: int
    ) -> tuple[Tensor, Tensor]:
        """Refit, rank removals by one trace per neuron, and remove the cheapest of the layer."""
        sizes = mask.sum(1)
        # deep enough that the layer-wide choice is hardly ever cut short in one neuron
        depth = min(int(mask[:, ~free].sum(1).max()), 6 * (remove // len(mask) + 1) + 10)
        weight = torch.where(mask, weight, 0.0)
        costs = torch.full((len(mask), depth), torch.inf, dtype=torch.float64)
        columns = torch.zeros(len(mask), depth, dtype=torch.int64)
        order = torch.argsort(sizes, descending=True, stable=True).tolist()
        start = 0
        while start < len(order):
            width = max(1, int(sizes[order[start]]))
            block = order[start : start + max(1, _ENTRIES // width**2)]
            start += len(block)
            inverse = torch.eye(width, dtype=torch.float64).repeat(len(block), 1, 1)
            held = torch.zeros(len(block), width, dtype=torch.float64)
            may = torch.zeros(len(block), width, dtype=torch.bool)
            places = torch.zeros(len(block), width, dtype=torch.int64)
            for b, m in enumerate(block):
                support = mask[m].nonzero()[:, 0]
                if not len(support):
                    continue
                found, _, hessian = self.step(m, support, weight[m, support], 2)
                weight[m, support] = found
                n = len(support)
                inverse[b, :n, :n] = torch.cholesky_inverse(_factor(hessian.double())).cpu()
                held[b, :n], places[b, :n], may[b, :n] = found.double().cpu(), support.cpu(), ~free[support].cpu()
            picked, cost = trace(inverse, held, may, depth)
            columns[block] = places.gather(1, picked)
            costs[block] = cost * importance[block, None].double().cpu()
        # a removal waits for those before it in its neuron: ranked by the dearest up to it
        flat = torch.argsort(costs.cummax(dim=1).values.flatten(), stable=True)[:remove]
        flat = flat[torch.isfinite(costs.cummax(dim=1).values.flatten()[flat])]
        mask = mask.clone()
        mask[flat // depth, columns.flatten()[flat]] = False
        short = remove - len(flat)
        if short:  # traces ended before enough was found: the rest goes by size
            rest = torch.where(mask & ~free, weight.abs(), torch.inf).flatten()
            mask.view(-1)[torch.argsort(rest, stable=True)[:short]] = False
        return torch.where(mask, weight, 0.0), mask

    def gains(self, weight: Tensor) -> Tensor:
        """Return ``(M, N)``: by how much freeing each single weight would lower the loss, the others held.

        ``g²/h`` with slope ``g = x_n · r_m`` and curvature ``h = Σ_A x_n²``; 0 on dead inputs.
        """
        outputs = weight @ self.inputs
        residual = self.residual(outputs)
        on = torch.ones_like(residual) if self.active is None else (self.active | (residual > 0)).to(residual)
        slope, curvature = residual @ self.inputs.T, on @ self.inputs.square().T
        return torch.where(curvature > 0, slope.square() / curvature.clamp(min=torch.finfo(slope.dtype).tiny), 0.0)

    def balance(self, weight: Tensor, mask: Tensor, metric: Tensor, sweeps: int) -> Tensor:
        """Refit on a fixed support in the metric ``Σ_p e_pᵀ G e_p``, where the neurons' errors make up for each other.

        Gauss-Seidel over the neurons, the most important first: with the others held, neuron ``m`` sees the offset
        ``(E G_m)/G_mm − e_m``. No step raises the weighted loss.
        """
        weight = torch.where(mask, weight, 0.0)
        errors = self.residual(weight @ self.inputs)
        order = torch.argsort(metric.diagonal(), descending=True, stable=True).tolist()
        for _ in range(sweeps):
            for m in order:
                support = mask[m].nonzero()[:, 0]
                if len(support) and float(metric[m, m]) > 0:
                    offset = (metric[m] @ errors) / metric[m, m] - errors[m]
                    weight[m, support], errors[m], _ = self.step(m, support, weight[m, support], 2, offset)
        return weight

    def weighted(self, weight: Tensor, metric: Tensor) -> float:
        """Return ``Σ_p e_pᵀ G e_p``."""
        errors = self.residual(weight @ self.inputs)
        return float(((metric @ errors) * errors).sum())


def trace(inverse: Tensor, weight: Tensor, may: Tensor, depth: int) -> tuple[Tensor, Tensor]:
    """Remove weights one at a time by exact OBS, the inverse downdated each time, for a batch of neurons at once.

    Parameters
    ----------
    inverse : Tensor (B, S, S)
        ``H_S⁻¹``; the identity where padded.
    weight : Tensor (B, S)
    may : bool Tensor (B, S)
        What may be removed.
    depth : int
        How many removals.

    Returns
    -------
    order : Tensor (B, depth)
        Positions in the support.
    costs : Tensor (B, depth)
        ``u_q² / [H⁻¹]_qq`` at each removal; infinite where nothing is left.
    """
    inverse, weight, may = inverse.clone(), weight.clone(), may.clone()
    rows = torch.arange(len(weight))
    order = torch.zeros(len(weight), depth, dtype=torch.int64)
    costs = torch.full((len(weight), depth), torch.inf, dtype=weight.dtype)
    for k in range(depth):
        diagonal = inverse.diagonal(dim1=1, dim2=2)
        cost, q = torch.where(may, weight.square() / diagonal, torch.inf).min(dim=1)
        left = torch.isfinite(cost)
        if not bool(left.any()):
            break
        order[:, k], costs[:, k] = q, cost
        column = inverse[rows, :, q]
        pivot = torch.where(left, column[rows, q], torch.inf)
        weight = weight - (weight[rows, q] / pivot)[:, None] * column
        inverse.baddbmm_(column[:, :, None], column[:, None, :] / pivot[:, None, None], alpha=-1.0)
        # removed: its row and column are zero up to rounding, and its diagonal must not be divided by
        weight[rows[left], q[left]], may[rows, q] = 0.0, False
        inverse[rows[left], q[left], q[left]] = 1.0
    return order, costs


def _ridged(matrix: Tensor) -> Tensor:
    """Add the ridge, in place."""
    matrix.diagonal().mul_(1 + _RIDGE).add_(torch.finfo(matrix.dtype).tiny)
    return matrix


def _factor(matrix: Tensor) -> Tensor:
    """Return the Cholesky factor, with as much more ridge as it takes: a step may be cautious, it is measured."""
    ridge = 0.0
    factor: Tensor
    while True:
        factor, failed = torch.linalg.cholesky_ex(matrix + ridge * matrix.diagonal().diag())
        if not int(failed) or not ridge < 1:
            return factor
        ridge = max(100 * ridge, 1e-6)


def _solve(matrix: Tensor, right: Tensor) -> Tensor:
    solution: Tensor = torch.cholesky_solve(right[:, None], _factor(matrix))
    return solution[:, 0]
