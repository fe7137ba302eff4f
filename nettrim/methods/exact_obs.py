"""OBS: exact iterative Optimal Brain Surgeon on one layer's quadratic, for every number of weights in one pass.

Hassibi, Stork, "Second order derivatives for network pruning: Optimal Brain Surgeon", NIPS 1992; by neurons and with
the inverse downdated, as ExactOBS in Frantar, Singh, Alistarh, "Optimal Brain Compression", NeurIPS 2022.

In each neuron the weight of lowest ``w_q²/[H_S⁻¹]_qq`` goes, where ``S`` are the weights that are left; the others are
compensated by ``−w_q/[H_S⁻¹]_qq · H_S⁻¹ e_q``, and the inverse loses ``q``:

    H_S⁻¹ ← H_S⁻¹ − v vᵀ,    v = H_S⁻¹ e_q / √[H_S⁻¹]_qq.

So the weight is the least squares weight on ``S`` at every step, and the sum of the increments is the error. The order
of removals does not depend on how many there are: `Obs.trace` goes down to no weight once, and `Trace` has them all.
Across the neurons of a layer, as many weights of each go as it has increments among the lowest of the layer.

The ``v`` of 64 removals are kept apart and then taken off the inverse by one product, when the removed rows and columns
are dropped too. For ``M`` neurons of ``N`` inputs that is ``⅔ M N³`` flops, most of them in those products.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from nettrim.core.support import gather_blocks, support_batches
from nettrim.errors import ProblemError
from nettrim.methods.base import LayerResult, LayerTask
from nettrim.methods.hessian import Quadratic, Removals, check_damping, layer_quadratic, tolerance_of
from nettrim.methods.masks import Pattern, check_division

_STEPS = 64  # removals between two products
_ENTRIES = 2**22  # float64 entries of the inverses that are downdated at a time: 32 MiB


@dataclass(frozen=True, eq=False)
class Trace:
    """All removals of one layer, first to last: what `Obs.trace` returns.

    Attributes
    ----------
    quadratic : Quadratic
        The layer.
    removals : Removals
        Of its weights, biases not among them.
    """

    quadratic: Quadratic
    removals: Removals

    @property
    def order(self) -> Tensor:
        """The columns of each neuron ``int64 (M, N)``: zero already, on dead inputs, and then as OBS removes them."""
        return self.removals.order

    @property
    def increments(self) -> Tensor:
        """By how much each removal raises the error ``(M, N)``, in that order: ``2 L_q``, in squared units of outputs.

        A mean over the samples, the damping included; infinite where an N:M pattern keeps the weight.
        """
        return 2 * self.removals.cost

    @cached_property
    def errors(self) -> Tensor:
        """The predicted ``E (R + 1,)`` after 0, 1, … R removals in the layer: the floor and the increments till then.

        It is above the measured one by the damping's share, ``damping ‖U − U₀‖²``, where the inputs are the dense
        network's own.
        """
        steps = self.increments.new_zeros(self.order.numel())
        steps[self.removals.step.flatten()] = self.increments.flatten()
        return self.quadratic.floor + torch.cat([steps.new_zeros(1), steps[steps.isfinite()].cumsum(0)])

    def weight_at(self, kept: int) -> tuple[Tensor, Tensor | None]:
        """Return the weight and the bias with a number of weights kept: the least squares fit on those.

        Parameters
        ----------
        kept : int
            From 0, or what the pattern keeps, to ``M N``. Where fewer were not zero to begin with, those stay.

        Returns
        -------
        weight : Tensor (M, N)
            Exactly zero where pruned.
        bias : Tensor (M,) or None

        Raises
        ------
        ProblemError
            `kept` is out of range.
        """
        return self.quadratic.split(self.refit(self.counts_at(kept)))

    def counts_at(self, kept: int) -> Tensor:
        """Return how many weights of each neuron are gone ``(M,)`` when `kept` are left in the layer.

        Raises
        ------
        ProblemError
            `kept` is out of range.
        """
        numel = self.order.numel()
        least = numel - (len(self.errors) - 1)
        if not least <= kept <= numel:
            raise ProblemError(f"kept={kept} is out of range: this trace goes from {numel} weights to {least}.")
        return self.removals.counts(numel - kept)

    def refit(self, counts: Tensor) -> Tensor:
        """Return the best ``(M, N)``, or ``(M, N + 1)`` with a fitted bias, after ``counts (M,)`` removals."""
        mask = torch.ones_like(self.quadratic.support)
        mask[:, : self.quadratic.columns] = self.removals.mask(counts)
        return self.quadratic.refit(mask)


@dataclass(frozen=True)
class Obs:
    """Exact iterative OBS.

    It takes one of

    - a sparsity or a number of weights to keep;
    - a tolerance: in each neuron weights go until the next one's ``√L_q`` is above it, in units of the outputs, with
      ``L_q = w_q²/(2 [H_S⁻¹]_qq)`` and ``H = (1/P) XᵀX``, so that its removal would raise the mean square error by
      ``2 L_q``;
    - epsilon: as many go as leave ``√(E / mean square of Z) ≤ epsilon`` for the layer's linear outputs ``Z``, measured
      with weights rounded to the model's dtype;
    - an N:M pattern: in every group of neighbouring weights, weights go until `keep` are left.

    Weights that are zero already stay zero and count among the removed; weights on dead inputs go before all others.
    Biases are compensated and not removed. On inputs through pruned layers it starts from the least squares weight, see
    `nettrim.methods.hessian`.

    Parameters
    ----------
    damping : float ≥ 0, optional
        Added to the diagonal of ``H``, absolute, in squared units of the inputs. 1e-6 unless `relative_damping` is
        given.
    bias : {"kept", "frozen"}
        "frozen": the bias stays as it is.
    relative_damping : float ≥ 0, optional
        The damping as a multiple of the mean diagonal of ``H``.

    Raises
    ------
    ProblemError
        A setting is out of range.
    """

    damping: float | None = None
    bias: str = "kept"
    relative_damping: float | None = None
    name: str = "obs"
    amounts: tuple[str, ...] = ("epsilon", "sparsity", "kept", "tolerance", "pattern")

    def __post_init__(self) -> None:
        """Refuse unknown settings, and write the default damping down."""
        if self.bias not in ("kept", "frozen"):
            raise ProblemError(f"Obs's bias={self.bias!r} is unknown: use kept or frozen.")
        object.__setattr__(self, "damping", check_damping("Obs", self.damping, self.relative_damping))

    def trace(self, task: LayerTask) -> Trace:
        """Remove all weights, one after the other, or all that the task's N:M pattern does not keep.

        Raises
        ------
        ProblemError
            Shapes do not match, NaN or infinity, an inverse whose diagonal is not positive, or a pattern that does not
            divide the rows.
        """
        if task.pattern is not None:
            check_division(task.weight.shape[1], task.pattern)
        quadratic = layer_quadratic(task, self.damping, self.relative_damping, self.bias != "frozen")
        columns = quadratic.columns
        place, increment = _eliminate(quadratic, task.pattern)
        removals = Removals.make(place, 0.5 * increment, quadratic.support[:, :columns], greedy=False)
        return Trace(quadratic, removals)

    def needs(self) -> str:
        """Return "moments"."""
        return "moments"

    def prune_layer(self, task: LayerTask) -> LayerResult:
        """Trace, choose, refit.

        Returns
        -------
        LayerResult
            Its facts: "E", the mean square error ``(1/P) ‖X Ûᵀ − Z‖²`` on these inputs; "floor", that of the weight it
            started from; "predicted_E", the floor and the sum of the increments, which is ``E`` and the damping's
            share; "damping" in all, and "extra_damping", the part that the Cholesky factorisation needed beyond what
            was asked.

        Raises
        ------
        ProblemError
            As for `trace`; or not even the weight it starts from is within epsilon.
        """
        began = time.monotonic()
        trace = self.trace(task)
        if task.pattern is not None:
            counts = trace.increments.isfinite().sum(1)
        elif task.amount == "tolerance":
            counts = trace.removals.within(tolerance_of(task) ** 2)
        elif task.amount == "epsilon":
            counts = _within_epsilon(trace, task, tolerance_of(task))
        else:
            counts = trace.counts_at(task.kept)
        joined = trace.refit(counts)
        weight, bias = trace.quadratic.split(joined)
        facts = trace.quadratic.facts(joined, trace.removals.total(counts))
        return LayerResult(weight, bias, time.monotonic() - began, facts=facts)


def _within_epsilon(trace: Trace, task: LayerTask, epsilon: float) -> Tensor:
    """Return the counts of the most removals whose measured error is within ``epsilon² · power``.

    The prediction says where to look: it is above the measured error by the damping's share.
    """
    quadratic, errors = trace.quadratic, trace.errors
    budget = epsilon**2 * quadratic.power

    def fits(removed: int) -> bool:
        joined = trace.refit(trace.removals.counts(removed))
        return quadratic.error(joined.to(task.dtype).double()) <= budget

    most = len(errors) - 1
    low = int(torch.searchsorted(errors, budget, right=True)) - 1
    low, high, step = min(max(low, 0), most), most + 1, 1
    while not fits(low):
        if low == 0:
            least = (quadratic.error(quadratic.start.to(task.dtype).double()) / quadratic.power) ** 0.5
            raise ProblemError(
                f"layer {task.name!r}: epsilon={epsilon:g} is below {least:.3g}, the relative error with no weight "
                "removed: the inputs come through layers that are pruned too far for it; raise epsilon."
            )
        low, high, step = max(0, low - step), low, 2 * step
    step = 1
    while low + step < high and fits(low + step):
        low, step = low + step, 2 * step
    high = min(high, low + step)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return trace.removals.counts(low)


def _eliminate(quadratic: Quadratic, pattern: Pattern | None) -> tuple[Tensor, Tensor]:
    """Return when each weight goes and what that costs.

    Returns
    -------
    place : Tensor (M, N)
        −1 off the support, 0 on dead inputs, then 1, 2, …; infinite for what the pattern keeps.
    increment : Tensor (M, N)
        Of the damped quadratic; infinite for what the pattern keeps.
    """
    columns = quadratic.columns
    support, dead = quadratic.support[:, :columns], quadratic.dead[:columns]
    place = torch.full(support.shape, torch.inf, dtype=torch.float64, device=support.device)
    free = dead & support
    room = None
    if pattern is not None:
        # what each group may still lose: first what is free
        groups = (len(support), -1, pattern.of)
        room = pattern.of - pattern.keep - (~support).reshape(groups).sum(2)
        free = free & (free.reshape(groups).cumsum(2) <= room[:, :, None]).reshape(support.shape)
        room = room - free.reshape(groups).sum(2)
    place[free], place[~support] = 0.0, -1.0
    increment = place.clamp(min=0)
    for rows, active, valid in support_batches(quadratic.live, _ENTRIES):
        _eliminate_batch(quadratic, rows, active, valid, pattern, room, place, increment)
    return place, increment


def _eliminate_batch(
    quadratic: Quadratic,
    rows: Tensor,
    active: Tensor,
    valid: Tensor,
    pattern: Pattern | None,
    room: Tensor | None,
    place: Tensor,
    increment: Tensor,
) -> None:
    """Run the removals of the neurons `rows (B,)` with live columns ``active (B, S)``; write into the last two."""
    neurons = torch.arange(len(rows), device=rows.device)
    inverse = _inverses(quadratic, active, valid)
    weight = quadratic.start[rows].gather(1, active).where(valid, 0.0)
    candidate = valid & (active < quadratic.columns)
    room = None if room is None else room[rows]
    if pattern is not None and room is not None:
        candidate &= _open(active, pattern, room)
    taken = 0
    while True:
        steps = min(_STEPS, int(candidate.sum(1).max()))
        pending = inverse.new_zeros(len(rows), steps, active.shape[1])
        diagonal = inverse.diagonal(dim1=1, dim2=2).clone()
        _require_positive((diagonal > 0) & diagonal.isfinite() | ~valid)
        for i in range(steps):
            lowest, q = (weight.square() / diagonal).where(candidate, torch.inf).min(1)
            going = lowest.isfinite()
            taken += 1
            gone = active[neurons, q]
            place[rows[going], gone[going]] = float(taken)
            increment[rows[going], gone[going]] = lowest[going]
            row = inverse[neurons, q]
            if i:
                before = pending[neurons, :i, q][:, None]
                row = torch.baddbmm(row[:, None], before, pending[:, :i], alpha=-1)[:, 0]
            # a neuron that is done takes no part: its row is whatever rounding left
            scale = row[neurons, q].rsqrt().where(going, 0.0)[:, None]
            v = row * scale
            pending[:, i] = v
            weight -= weight[neurons, q][:, None] * scale * v
            diagonal -= v.square()
            candidate[neurons, q] = False
            valid[neurons, q] &= ~going
            if pattern is not None and room is not None:
                room[neurons[going], gone[going] // pattern.of] -= 1
                candidate &= _open(active, pattern, room)
        # a root of something negative makes all that comes after it NaN
        _require_positive(diagonal.isfinite())
        if not bool(candidate.any()):
            return
        # what is left in each neuron, ascending; where that is less than in another, something removed, which is inert
        keep = torch.argsort(valid.to(torch.int8), dim=1, descending=True, stable=True)[:, : int(valid.sum(1).max())]
        inverse = _downdated(inverse, pending, keep)
        active, weight, valid, candidate = (t.gather(1, keep) for t in (active, weight, valid, candidate))


def _require_positive(found: Tensor) -> None:
    if not bool(found.all()):
        raise ProblemError("an inverse Hessian lost its positive diagonal to rounding: raise the damping.")


def _downdated(inverse: Tensor, pending: Tensor, keep: Tensor) -> Tensor:
    """Return ``A − VᵀV`` on the columns ``keep (B, S')``, for the inverses ``A (B, S, S)`` and ``V (B, K, S)``."""
    size = keep.shape[1]
    pending = pending.gather(2, keep[:, None].expand(-1, pending.shape[1], -1))
    smaller = inverse.new_empty(len(keep), size, size)
    for b in range(len(keep)):
        smaller[b] = inverse[b].index_select(0, keep[b]).index_select(1, keep[b])
    return smaller.baddbmm_(pending.transpose(1, 2), pending, alpha=-1)


def _inverses(quadratic: Quadratic, active: Tensor, valid: Tensor) -> Tensor:
    """Return the inverse of the damped Hessian on each set of columns ``(B, S, S)``, the identity where padded."""
    count, size = active.shape
    live = torch.nonzero(~quadratic.dead)[:, 0]
    if size == len(live) and bool(valid.all()):
        return quadratic.inverse[live][:, live].expand(count, size, size).contiguous()
    factor, failed = torch.linalg.cholesky_ex(gather_blocks(quadratic.damped, active, valid))
    if bool(failed.any()):
        raise ProblemError("a block of the damped Hessian has no Cholesky factor: raise the damping.")
    return torch.cholesky_inverse(factor)


def _open(active: Tensor, pattern: Pattern, room: Tensor) -> Tensor:
    """Return which of the columns ``active (B, S)`` stand in a group that may lose one more; ``room (B, groups)``."""
    return room.gather(1, (active // pattern.of).clamp(max=room.shape[1] - 1)) > 0
