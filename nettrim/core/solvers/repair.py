"""How the sparse weight of a first-order iterate is made feasible, so that it can be judged and returned."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from nettrim.core.problem import LayerProblem
from nettrim.core.solvers.base import constant_column


@dataclass(frozen=True, eq=False)
class Repaired:
    """A weight that was made feasible where that was possible.

    `before` is its violation below the ceiling, where it can be lowered, but not yet scaled onto the radius: what ADMM
    is steered by.
    """

    weight: Tensor
    violation: float
    distance: float
    before: float


class Repair:
    """Makes a weight feasible at next to no cost, and leaves its zeros.

    A little outside the radius, every neuron is scaled: the ``ℓ1`` penalty has shrunk it. To first order that is the
    cheapest way there is: by ``⟨Γ, Z⟩ = objective``, a factor ``1 + s`` takes ``s · objective / ‖Γ‖`` from the
    distance, and the objective rises by ``‖Γ‖`` times that, its derivative. (Measured: an iterate 8·10⁻⁴ outside was
    repaired to 3·10⁻⁵ above the optimum, when its bound was still 1.5·10⁻³ below.)

    Under a hard ceiling, what sticks out is lowered first: by a positive constant column where there is one, else,
    where no input is negative, by all of the neuron's weights that are not zero. Without either, ADMM alone has to
    push a last hair of it under the ceiling, which takes thousands of iterations.

    Who has the anchor and the floor ``(P, M)`` at hand may lend them: they are made anew otherwise, at every use.
    """

    def __init__(
        self, problem: LayerProblem, margin: float, anchor: Tensor | None = None, floor: Tensor | None = None
    ) -> None:
        self.problem, p = problem, problem
        self._anchor, self.floor = anchor, floor
        self.constant = constant_column(p) if p.form == "halfspace" else None
        self.nonnegative = p.form == "halfspace" and bool((p.inputs >= 0).all())
        self.wanted: Tensor | None = None
        if p.radius is not None:
            self.wanted = torch.as_tensor(p.radius, dtype=torch.float64).to(p.inputs.device) * (1 - margin)

    def __call__(self, weight: Tensor) -> Repaired:
        """Return the weight ``(N, M)`` repaired, or as it was where no repair is found."""
        z = self.problem.inputs @ weight
        lowering = self._lowering(weight)
        one = z.new_ones(()) if self.wanted is None else torch.ones_like(self.wanted).to(z)
        lowered, by = self._lowered(z, one, lowering)
        before, distance = self._violation(lowered)
        found = Repaired(self._weight(weight, one, by), before, distance, before)
        if self.wanted is None:
            return found
        scale = self._onto_radius(z, lowering, one)
        lowered, by = self._lowered(z, scale, lowering)
        violation, distance = self._violation(lowered)
        if violation > before:
            return found  # no scale reaches the radius
        return Repaired(self._weight(weight, scale, by), violation, distance, before)

    @property
    def anchor(self) -> Tensor:
        """``T (P, M)``."""
        return self.problem.anchor if self._anchor is None else self._anchor

    def _lowering(self, weight: Tensor) -> Tensor | None:
        """How far every output sinks where the weights that lower it all sink by one, ``(P, 1)`` or ``(P, M)``."""
        x = self.problem.inputs
        if self.constant is not None:
            return x[:, self.constant : self.constant + 1]
        return x @ (weight != 0).to(weight) if self.nonnegative else None

    def _lowered(self, z: Tensor, scale: Tensor, lowering: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Return the outputs, scaled and then lowered under the ceiling, and by how much the weights sink ``(M,)``."""
        p = self.problem
        scaled = z * scale
        if lowering is None:
            return scaled, None
        assert p.active is not None
        over = torch.where(p.active | (lowering <= 0), 0.0, scaled - self.anchor).clamp_(min=0)
        # a rounding more, so that nothing sticks out by one
        by = (1 + 4 * torch.finfo(z.dtype).eps) * (over / lowering.clamp(min=1e-30)).amax(0)
        return scaled - lowering * by, by

    def _weight(self, weight: Tensor, scale: Tensor, by: Tensor | None) -> Tensor:
        weight = weight * scale
        if by is None:
            return weight
        if self.constant is None:
            return torch.where(weight != 0, weight - by, weight)
        weight[self.constant] -= by
        return weight

    def _onto_radius(self, z: Tensor, lowering: Tensor | None, one: Tensor) -> Tensor:
        """Return the scale, one for all or one for each neuron, that meets the radius: Newton's method from 1."""
        assert self.wanted is not None
        scale = one.double()

        def total(each: Tensor) -> Tensor:
            # added up in float64: one float32 sum over the layer is off by more than the margin
            sums = each.sum(0).double()
            return sums if self.problem.per_neuron else sums.sum()

        for _ in range(8):
            lowered, by = self._lowered(z, scale.to(z), lowering)
            r = self._counted(lowered.sub_(self.anchor))
            # by is in proportion to the scale where the ceiling is zero; elsewhere the slope is a little off
            slope = z if lowering is None or by is None else z - lowering * (by / scale.to(z))
            over = total(r * r) - self.wanted**2
            rise = 2 * total(r.mul_(slope))
            # the distance falls with the scale, or this is not the way
            new = torch.where(rise < 0, scale - over / rise, scale).nan_to_num(1.0).clamp(0.5, 2.0)
            settled = bool(((new - scale).abs() <= 1e-7).all())
            scale = new
            if settled:
                break
        return scale.to(z)

    def _counted(self, difference: Tensor) -> Tensor:
        """What of ``Z − T`` counts against the radius, in the memory of the difference."""
        p = self.problem
        if p.form == "linear":
            return difference
        assert p.active is not None
        if p.form == "ball" and self.floor is not None:
            return torch.maximum(difference, self.floor, out=difference)
        spared = ~p.active if p.form == "halfspace" else (difference < 0).logical_and_(~p.active)
        return difference.masked_fill_(spared, 0.0)

    def _violation(self, z: Tensor) -> tuple[float, float]:
        """Return the relative violation and the distance of outputs, as `measure_fit` defines them."""
        p = self.problem
        difference, over = z - self.anchor, 0.0
        if p.form == "halfspace":
            assert p.active is not None
            size = float(p.targets.abs().max()) or float(self.anchor.abs().max()) or 1.0
            over = float(difference.masked_fill(p.active, 0.0).max()) / size
        norms = torch.linalg.vector_norm(self._counted(difference), dim=0).double()
        distance = float(torch.linalg.vector_norm(norms))
        if isinstance(p.radius, Tensor):
            radius = torch.where(p.radius > 0, p.radius, p.radius.mean())
            return max(0.0, over, float(((norms - p.radius) / radius).max())), distance
        return max(0.0, over, (distance - p.radius) / p.radius if p.radius is not None else 0.0), distance
