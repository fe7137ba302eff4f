"""L-OBS: layer-wise Optimal Brain Surgeon, one-shot, as its authors released it, and what mends it at little cost.

Dong, Chen, Pan, "Learning to Prune Deep Neural Networks via Layer-wise Optimal Brain Surgeon", NIPS 2017.

Every weight of the layer is ranked once by ``L_q = w_q² / (2 [H⁻¹]_qq)``, with the damped ``H`` of
`nettrim.methods.hessian`. The weights are removed in that order; each removal adds ``−w_q/[H⁻¹]_qq · H⁻¹ e_q`` with the
*present* ``w_q`` and the *never downdated* ``H⁻¹``. For one neuron with removal order ``Q`` that is one triangular
solve: ``λ = tril([H⁻¹]_QQ)⁻¹ w_Q``, then ``w ← w − [H⁻¹]_{·Q} λ`` and ``w_Q = 0``.

So it is one forward Gauss-Seidel sweep on ``[H⁻¹]_QQ λ = w_Q``, whose solution gives the least squares weight on what
stays. `sweeps` makes more of them, `refit` solves it, and `nettrim.methods.exact_obs` also ranks by the inverse of what
is left.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch
from torch import Tensor

from nettrim.errors import ProblemError
from nettrim.methods.base import LayerResult, LayerTask
from nettrim.methods.hessian import Quadratic, Removals, check_damping, layer_quadratic, tolerance_of

_STEPS = 64  # removals of a block
_ENTRIES = 2**18  # float64 entries of the rows of H⁻¹ that are gathered at a time: 2 MiB


@dataclass(frozen=True)
class LObs:
    """One-shot L-OBS.

    It takes a sparsity, a number of weights to keep, or the paper's tolerance: all weights with ``√L_q ≤ tolerance``
    go. ``L_q`` is in squared units of the outputs and belongs to ``H = (1/P) XᵀX``, so that removing that weight alone
    raises the layer's mean square error by ``2 L_q``. Weights that are zero already stay zero and count among the
    removed; as in the released code the inverse is that of all inputs nevertheless. Weights on dead inputs go before
    all others.

    On inputs through pruned layers it starts from the least squares weight, see `nettrim.methods.hessian`.

    Parameters
    ----------
    damping : float ≥ 0, optional
        Added to the diagonal of ``H``, absolute, in squared units of the inputs: ``1/α`` in the paper's terms. 1e-6,
        the released value, unless `relative_damping` is given.
    bias : {"kept", "pooled", "frozen"}
        "kept": biases are compensated and never removed, so that the count of weights is exact. "pooled": they compete
        with the weights for the same number of removals, as in the released code. "frozen": they stay as they are.
    relative_damping : float ≥ 0, optional
        The damping as a multiple of the mean diagonal of ``H``.
    rerank : bool
        Rank anew, by the present weights, after every removal; the inverse is still not downdated.
    sweeps : int ≥ 1
        Gauss-Seidel sweeps; 1 is L-OBS.
    refit : bool
        Replace the sweep by the least squares weight on the weights that stay.
    inverse : {"cholesky", "recursive"}
        How ``H⁻¹`` is formed: by a factor, or sample by sample as in the paper, which is slow, gives the same, and
        needs all rows where the other needs their moments.

    Raises
    ------
    ProblemError
        A setting is out of range.
    """

    damping: float | None = None
    bias: str = "kept"
    relative_damping: float | None = None
    rerank: bool = False
    sweeps: int = 1
    refit: bool = False
    inverse: str = "cholesky"
    name: str = "l-obs"
    amounts: tuple[str, ...] = ("sparsity", "kept", "tolerance")

    def __post_init__(self) -> None:
        """Refuse unknown settings, and write the default damping down."""
        if self.bias not in ("kept", "pooled", "frozen"):
            raise ProblemError(f"LObs's bias={self.bias!r} is unknown: use kept or pooled or frozen.")
        if self.inverse not in ("cholesky", "recursive"):
            raise ProblemError(f"LObs's inverse={self.inverse!r} is unknown: use cholesky or recursive.")
        for field in ("rerank", "refit"):
            if not isinstance(getattr(self, field), bool):
                raise ProblemError(f"LObs's {field}={getattr(self, field)!r} is neither True nor False: give one.")
        if isinstance(self.sweeps, bool) or not isinstance(self.sweeps, int) or self.sweeps < 1:
            raise ProblemError(f"LObs's sweeps={self.sweeps!r} is out of range: give a whole number ≥ 1.")
        if self.refit and self.sweeps > 1:
            raise ProblemError(f"LObs's sweeps={self.sweeps} changes nothing with refit=True: leave one of them out.")
        object.__setattr__(self, "damping", check_damping("LObs", self.damping, self.relative_damping))

    def needs(self) -> str:
        """Return "moments", or "rows" where the inverse is recursive."""
        return "rows" if self.inverse == "recursive" else "moments"

    def prune_layer(self, task: LayerTask) -> LayerResult:
        """Rank, remove, compensate.

        Returns
        -------
        LayerResult
            Its facts: "E", the mean square error ``(1/P) ‖X Ûᵀ − Z‖²`` on these inputs; "floor", that of the weight
            it started from; "predicted_E", the floor and the sum of ``2 L_q``, neither the error nor a bound of it;
            "damping" in all, and "extra_damping", the part that the Cholesky factorisation needed beyond what was
            asked.

        Raises
        ------
        ProblemError, UnsupportedError
            As for `rank`; or the tolerance is negative or no number.
        """
        began = time.monotonic()
        ranking = self.rank(task)
        if task.amount == "tolerance":
            counts = ranking.removals.within(tolerance_of(task) ** 2)
        else:
            counts = ranking.removals.counts(task.weight.numel() - task.kept)
        joined = ranking.compensate(counts)
        weight, bias = ranking.quadratic.split(joined)
        facts = ranking.quadratic.facts(joined, ranking.removals.total(counts))
        return LayerResult(weight, bias, time.monotonic() - began, facts=facts)

    def rank(self, task: LayerTask) -> Ranking:
        """Rank a layer's weights once, for any number of removals; the task's amount is not looked at.

        Raises
        ------
        ProblemError
            Shapes do not match, NaN or infinity, or an inverse whose diagonal is not positive.
        UnsupportedError
            The inverse is recursive, and the task has only a sample of its rows.
        """
        fit_bias, recursive = self.bias != "frozen", self.inverse == "recursive"
        quadratic = layer_quadratic(task, self.damping, self.relative_damping, fit_bias, recursive)
        eligible = torch.ones_like(quadratic.support)
        if quadratic.fitted and self.bias == "kept":
            eligible[:, -1] = False
        if self.rerank:
            place, cost = _present_costs(quadratic, eligible)
        else:
            cost = 0.5 * quadratic.start.square() / quadratic.inverse.diagonal()
            place = cost = cost.where(quadratic.live, 0.0).where(eligible, torch.inf)
        # what was zero before goes first, also before weights on dead inputs
        place = place.where(quadratic.support, -1.0)
        removals = Removals.make(place, cost, quadratic.support, greedy=True)
        return Ranking(quadratic, removals, self.sweeps, self.refit)


@dataclass(frozen=True, eq=False)
class Ranking:
    """A layer with its weights ranked: what `LObs.rank` returns.

    Attributes
    ----------
    quadratic : Quadratic
        The layer.
    removals : Removals
        Which weights go first; biases are among them if they are pooled.
    sweeps : int
    refit : bool
        As in `LObs`.
    """

    quadratic: Quadratic
    removals: Removals
    sweeps: int = 1
    refit: bool = False

    def weight_at(self, kept: int) -> tuple[Tensor, Tensor | None]:
        """Return the weight and the bias with a number of weights kept.

        Parameters
        ----------
        kept : int
            From 0 to ``M N``. Where fewer were not zero to begin with, those stay; pooled biases count as removed
            weights.

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
        numel = len(self.quadratic.start) * self.quadratic.columns
        if not 0 <= kept <= numel:
            raise ProblemError(f"kept={kept} is out of range: the layer has {numel} weights.")
        return self.quadratic.split(self.compensate(self.removals.counts(numel - kept)))

    def compensate(self, counts: Tensor) -> Tensor:
        """Return the weight ``(M, N)``, or ``(M, N + 1)`` with a fitted bias, after ``counts (M,)`` removals."""
        mask = self.removals.mask(counts)
        if self.refit:
            return self.quadratic.refit(mask)
        weight, none = self.quadratic.start.clone(), torch.zeros_like(counts)
        for _ in range(self.sweeps):
            # removed weights grow again: they are the residual that the next sweep works on
            _sweep(weight, self.quadratic.inverse, self.removals.order, none, counts)
        return weight.where(mask, 0.0)


@dataclass(frozen=True, eq=False)
class ToleranceCurve:
    """One layer, pruned at a rising tolerance: what `tolerance_curve` returns.

    Attributes
    ----------
    tolerance : Tensor (K,)
        Ascending; of ``√L_q``, in units of the outputs.
    kept : int64 Tensor (K,)
        How many weights stay; biases are not counted.
    error : Tensor (K,)
        ``E``, the mean square error of the layer's linear outputs.
    relative : Tensor (K,)
        ``√(E / mean square of the dense layer's linear outputs)``.
    inflection : int
        The index of the pruning inflection point: where the relative error, as a function of the pruned fraction and
        both scaled to [0, 1], lies farthest below the line from its first point to its last.
    """

    tolerance: Tensor
    kept: Tensor
    error: Tensor
    relative: Tensor
    inflection: int


def tolerance_curve(
    task: LayerTask, method: LObs | None = None, tolerances: Tensor | None = None, points: int = 50
) -> ToleranceCurve:
    """Return how many weights stay, and at what error, against the paper's tolerance of ``√L_q``.

    The paper raises the tolerance from a small value and stops at the pruning inflection point, after which accuracy
    falls off. Here that point is found without labels, from the layer's error. The order of removals does not depend on
    the tolerance, so the whole curve takes little more than its last point.

    Parameters
    ----------
    task : LayerTask
        Its amount is not looked at.
    method : LObs, optional
        ``LObs()`` by default.
    tolerances : Tensor (K,), optional
        Ascending, ≥ 0. By default up to `points` of them, with equally many removals between one and the next, up to
        that at which all weights go.
    points : int ≥ 2

    Raises
    ------
    ProblemError
        `tolerances` do not ascend or `points` is below 2, or the layer is refused as by `LObs.rank`.
    """
    ranking = (LObs() if method is None else method).rank(task)
    quadratic, removals = ranking.quadratic, ranking.removals
    if tolerances is None:
        tolerances = _even_tolerances(removals, points)
    tolerances = torch.as_tensor(tolerances, dtype=torch.float64, device=removals.cost.device)
    ascending = tolerances.dim() == 1 and len(tolerances) > 0 and bool((tolerances.diff() > 0).all())
    if not ascending or not bool((tolerances >= 0).all()):
        raise ProblemError("tolerances must be a vector of ascending numbers ≥ 0.")
    weight, before = quadratic.start.clone(), torch.zeros_like(removals.order[:, 0])
    kept, errors = [], []
    for tolerance in tolerances.tolist():
        counts = removals.within(tolerance**2)
        stays = removals.mask(counts)
        if ranking.refit or ranking.sweeps > 1:
            joined = ranking.compensate(counts)
        else:
            # what a removal adds does not depend on those that come after it
            _sweep(weight, quadratic.inverse, removals.order, before, counts)
            joined, before = weight.where(stays, 0.0), counts
        kept.append(int(stays[:, : quadratic.columns].sum()))
        errors.append(quadratic.error(joined))
    error = torch.tensor(errors, dtype=torch.float64)
    relative = (error.clamp(min=0) / quadratic.power).sqrt() if quadratic.power > 0 else torch.zeros_like(error)
    count = torch.tensor(kept)
    return ToleranceCurve(tolerances.cpu(), count, error, relative, _knee(-count.double(), relative))


def _even_tolerances(removals: Removals, points: int) -> Tensor:
    """Return up to `points` tolerances with equally many removals between them."""
    if isinstance(points, bool) or not isinstance(points, int) or points < 2:
        raise ProblemError(f"points={points!r} is out of range: give a whole number ≥ 2.")
    level = removals.cost.cummax(1).values
    level = level[level.isfinite()].sort().values
    if not len(level):
        raise ProblemError("the layer has no weight to prune: there is no curve.")
    at = torch.linspace(0, len(level) - 1, points, dtype=torch.float64).round().long()
    # the square of a root may fall short of what it was taken of
    values = level[at].sqrt() * (1 + 1e-14)
    return torch.cat([values[:1], values[1:][values.diff() > 0]])


def _knee(x: Tensor, y: Tensor) -> int:
    """Return the index of the point that lies farthest below the chord of a curve, in the curve's own box."""

    def scaled(v: Tensor) -> Tensor:
        width = v[-1] - v[0]
        return (v - v[0]) / width if width != 0 else torch.zeros_like(v)

    return int((scaled(x) - scaled(y)).argmax())


def _present_costs(quadratic: Quadratic, eligible: Tensor) -> tuple[Tensor, Tensor]:
    """Remove in each neuron the weight of lowest present ``L_q``, until none is left; all neurons step by step.

    Returns
    -------
    place : Tensor (M, D)
        At which step each weight goes: 0 on dead inputs, infinite where it may not.
    cost : Tensor (M, D)
        ``L_q`` then.
    """
    weight, diagonal = quadratic.start.clone(), quadratic.inverse.diagonal()
    left = quadratic.live & eligible
    place = torch.zeros_like(weight).where(eligible, torch.inf)
    cost = place.clone()
    neurons = torch.arange(len(weight), device=weight.device)
    for step in range(1, int(left.sum(1).max()) + 1):
        lowest, column = (0.5 * weight.square() / diagonal).where(left, torch.inf).min(1)
        going = lowest.isfinite()
        rows, gone = neurons[going], column[going]
        place[rows, gone], cost[rows, gone] = float(step), lowest[going]
        left[rows, gone] = False
        weight[rows] -= (weight[rows, gone] / diagonal[gone])[:, None] * quadratic.inverse[gone]
    return place, cost


def _sweep(weight: Tensor, inverse: Tensor, order: Tensor, first: Tensor, last: Tensor) -> None:
    """Remove from ``weight (M, D)``, in place, what ``order (M, D)`` has at the places from `first` to `last` (M,).

    Blocks of removals of several neurons at a time: within a block by a triangular solve, on the rest of the weights by
    a product. Removed weights are not set to zero.
    """
    steps = torch.arange(_STEPS, device=weight.device)
    chunk = max(1, _ENTRIES // (_STEPS * weight.shape[1]))
    busy = torch.nonzero(first < last)[:, 0]
    for start in range(0, len(busy), chunk):
        some = busy[start : start + chunk]
        for done in range(0, int((last - first)[some].max()), _STEPS):
            rows = some[first[some] + done < last[some]]
            places = first[rows, None] + done + steps
            valid = places < last[rows, None]
            columns = order[rows].gather(1, places.clamp(max=order.shape[1] - 1))
            across = inverse[columns]
            block = across.gather(2, columns[:, None, :].expand(-1, _STEPS, -1))
            right = weight[rows].gather(1, columns)
            # read below the diagonal only; what is not valid stands at the end, so that nothing before depends on it
            step = torch.linalg.solve_triangular(block, right[..., None], upper=False).where(valid[..., None], 0.0)
            weight[rows] -= (step.transpose(1, 2) @ across)[:, 0]
