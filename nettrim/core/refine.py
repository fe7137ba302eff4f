"""An exact number of kept weights: the best support that we know how to find, and the best weight on it.

``ℓ1`` shrinks what it keeps, and its support is not the one that reproduces a layer best at a given count. So the count
is reached in four steps, each of which knows that inactive samples only have to stay inactive:

1. the targets of inactive samples are imputed from the weight at hand, ``t = min(z, v)``, and `l0_support` finds a
   superset of `headroom` times the count;
2. `OneSided.eliminate` removes the rest, by optimal brain surgery under the present active set;
3. swaps: the most promising weights are added, everything is refitted, and as many are removed;
4. a one-sided refit on the support, and where the next layers' metric is known, one in that metric; small layers are
   in float64 throughout, and the verdict is float64 for all.

What comes out is never worse than the weight that it started from, if that has no more weights than were asked for;
without a metric and where the search sees all samples, nor than a refit on that weight's own support.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from nettrim.core.certificate import Certificate, certify, feasible_multipliers
from nettrim.core.l0 import Spectrum, l0_support
from nettrim.core.linalg import gram
from nettrim.core.onesided import OneSided
from nettrim.core.problem import LayerProblem, as_float_tensor, check_count, check_number
from nettrim.core.solvers import Solver, solve_problem
from nettrim.errors import ProblemError

_DOUBLE = 2**20  # entries of the inputs up to which everything is float64
_SETTLE = 8  # Newton steps of a refit at the most
_SWEEPS = 3  # over the neurons, in the next layers' metric
_SMALL = 20_000  # weights of a layer that is also searched from the full support down: it costs next to nothing


@dataclass(frozen=True, eq=False)
class Refined:
    """A weight with an exact count, and what it is worth.

    Attributes
    ----------
    weight : Tensor (M, N)
        In the dtype of the inputs, exactly zero off `mask`.
    mask : bool Tensor (M, N)
        True = kept; free columns are True throughout.
    kept : int
        Weights that stay, free columns not counted.
    distance : float
        ``√Σ r²``, one-sided, on all samples, float64: what ``‖ReLU(X Uᵀ) − Y‖_F`` cannot exceed.
    start : float or None
        The same for the weight that it started from; None where that has more weights than `kept`.
    history : dict
        What was reached after each step, on the rows of the search.
    seconds : float
    problem : LayerProblem
    """

    weight: Tensor
    mask: Tensor
    kept: int
    distance: float
    start: float | None
    history: dict[str, float]
    seconds: float
    problem: LayerProblem = field(repr=False)

    def certify(self, solver: str | Solver = "auto", tol: float = 1e-3, max_seconds: float | None = None) -> Evidence:
        """Solve the convex program at this weight's own distance, and say how far the weight is from its optimum.

        Parameters are those of `nettrim.solve_problem`. An answer that is not certified within `tol` still bounds.
        """
        at = self.problem.with_radius(max(self.distance, torch.finfo(torch.float64).tiny ** 0.5))
        solved = solve_problem(at, solver, tol=tol, max_seconds=max_seconds, on_failure="return")
        return evidence_of(at, self.weight, solved.multipliers)


@dataclass(frozen=True, eq=False)
class Evidence:
    """How far a weight is from the convex optimum, in ``ℓ1`` norm at its error and in error at its ``ℓ1`` norm.

    Attributes
    ----------
    certificate : Certificate
        Of the program whose radius is the weight's own distance: no weight that is as near has a smaller norm than
        `certificate.lower_bound`.
    nearest : float
        No weight of this ``ℓ1`` norm has a smaller distance: ``(⟨Γ, T⟩ − Σ c|U|)/‖Γ‖``, from the same multipliers.
    multipliers : Tensor (P, M)
    """

    certificate: Certificate
    nearest: float
    multipliers: Tensor


def evidence_of(problem: LayerProblem, weight: Tensor, multipliers: Tensor) -> Evidence:
    """Return the evidence that given multipliers carry, whatever they are: they are made feasible first.

    For feasible ``Γ`` and any ``U``: ``Σ c|U| ≥ ⟨Γ, T⟩ − dist(U) ‖Γ‖``, which bounds either from the other.
    """
    certificate = certify(problem, weight, multipliers)
    gamma = feasible_multipliers(problem, multipliers.double()).multipliers
    size = float(gamma.norm())
    linear = float((gamma * problem.anchor.double()).sum())
    nearest = max(0.0, (linear - certificate.objective) / size) if size > 0 else 0.0
    return Evidence(certificate, nearest, multipliers)


def refine(
    problem: LayerProblem,
    weight: Any,
    *,
    kept: int,
    importance: Any = None,
    headroom: float = 1.5,
    steps: int = 3,
    swaps: int = 0,
    rows: int = 10_000,
    round_to: torch.dtype | None = None,
    progress: bool = False,
) -> Refined:
    """Find a weight with exactly `kept` non-zeros that reproduces a layer as well as we know how, from any start.

    Parameters
    ----------
    problem : LayerProblem
        Of form "ball" or "linear"; its radius or ``λ`` plays no part. Columns with a penalty of 0 (a free bias) are
        always kept and not counted.
    weight : Tensor or ndarray (M, N)
        Dense, or another method's answer.
    kept : int
        How many weights stay, 1 or more.
    importance : Tensor (M,) or (M, M), optional
        What the next layers make of this one's errors: a weight for each neuron's squared error, or the matrix ``G`` of
        ``Σ_p e_pᵀ G e_p``, symmetric positive semi-definite.
    headroom : float ≥ 1
        Size of the superset, in multiples of `kept`.
    steps : int
        Rounds of elimination.
    swaps : int
        Rounds of swaps.
    rows : int
        Samples that the search sees, evenly spread; the last refit sees all.
    round_to : torch.dtype, optional
        Round the weight to this dtype before it is measured, because it will be stored in it.
    progress : bool
        Show a bar on stderr, if that is a terminal.

    Raises
    ------
    ProblemError
        Shapes do not match, `kept` or another setting is out of range, or the form is "halfspace".
    """
    began = time.monotonic()
    kept, steps, rows = (check_count(*pair) for pair in (("kept", kept), ("steps", steps), ("rows", rows)))
    start, free, weights, metric = _checked(problem, weight, kept, importance)
    if not 1 <= check_number("headroom", headroom) < float("inf"):
        raise ProblemError(f"headroom={headroom} is out of range: the superset is headroom ≥ 1 times the count.")
    if isinstance(swaps, bool) or not isinstance(swaps, int) or swaps < 0:
        raise ProblemError(f"swaps={swaps} is out of range: give a whole number ≥ 0.")
    if round_to is not None and not round_to.is_floating_point:
        raise ProblemError(f"round_to={round_to} holds no weights: give a floating dtype, such as torch.float32.")
    total = int((~free).sum()) * len(start)
    kind = working_dtype(problem)
    chosen = None
    if problem.samples > rows:
        chosen = torch.arange(rows, device=problem.inputs.device) * (problem.samples - 1) // max(1, rows - 1)
    bar = tqdm(total=2 * steps + swaps * steps, desc="refine", leave=False, disable=None if progress else True)
    with bar:
        search = _Search(OneSided.of(problem, kind, chosen), free, weights, kept, steps, bar.update)
        found, mask, history = search.run(start.to(kind), headroom, swaps, also_full=kept < total <= _SMALL)
    found = conclude(problem, found, mask, metric, round_to)
    # the verdict is float64, on what will be stored
    verdict = OneSided.of(problem, torch.float64)

    def worth(candidate: Tensor) -> float:
        if metric is not None:
            return verdict.weighted(candidate.double(), metric)
        return float((verdict.losses(candidate.double()) * weights).sum())

    support = (start != 0) | free
    within = int(support[:, ~free].sum()) <= kept
    if within and worth(start) < worth(found):
        mask = _extended(verdict, start, support, free, kept)
        # in the metric, an unweighted refit first could lose what the start has
        found = (
            verdict.fit(start, mask, _SETTLE)[0] if metric is None else verdict.balance(start, mask, metric, _SWEEPS)
        )
        found = found.to(round_to or problem.inputs.dtype)
    found = _filled(verdict, found, mask, start)
    return Refined(
        weight=found.to(problem.inputs.dtype),
        mask=mask,
        kept=int(mask[:, ~free].sum()),
        distance=float(verdict.losses(found.double()).sum().sqrt()),
        start=float(verdict.losses(start).sum().sqrt()) if within else None,
        history=history,
        seconds=time.monotonic() - began,
        problem=problem,
    )


def conclude(
    problem: LayerProblem, weight: Tensor, mask: Tensor, metric: Tensor | None, round_to: torch.dtype | None
) -> Tensor:
    """Refit a weight ``(M, N)`` on a support by all samples, in the next layers' metric if known, and round it."""
    kind = working_dtype(problem)
    layer = OneSided.of(problem, kind)
    found, _ = layer.fit(weight.to(kind), mask, _SETTLE)
    if metric is not None:
        found = layer.balance(found, mask, metric.to(kind), _SWEEPS)
    return found.to(round_to or problem.inputs.dtype)


def working_dtype(problem: LayerProblem) -> torch.dtype:
    """Return the precision of the search: float64 where that costs nothing."""
    return torch.float64 if problem.inputs.numel() <= _DOUBLE else torch.float32


@dataclass(frozen=True, eq=False)
class _Search:
    """One layer's search for a support: the data, what may go, and what an error of each neuron weighs."""

    layer: OneSided
    free: Tensor
    importance: Tensor
    kept: int
    steps: int
    advance: Callable[[], object]

    def run(
        self, start: Tensor, headroom: float, swaps: int, also_full: bool
    ) -> tuple[Tensor, Tensor, dict[str, float]]:
        """Return weight, mask, and the loss after each step."""
        history, own = {}, (start != 0) | self.free
        within = int(own[:, ~self.free].sum()) <= self.kept
        if within:
            own = _extended(self.layer, start, own, self.free, self.kept)
            start = self.layer.fit(start, own, _SETTLE)[0]
            history["start refitted"] = self._loss(start) ** 0.5
        found, mask = self._eliminate(*self._superset(start, headroom))
        loss = self._loss(found)
        history["eliminated"] = loss**0.5
        if within and self._loss(start) < loss:
            found, mask, loss = start, own, self._loss(start)
        if also_full:
            other, other_mask = self._eliminate(start, torch.ones_like(mask))
            history["from everything"] = self._loss(other) ** 0.5
            if self._loss(other) < loss:
                found, mask, loss = other, other_mask, self._loss(other)
        for _ in range(swaps):
            grown = _extended(self.layer, found, mask, self.free, self.kept + max(1, self.kept // 10))
            other, other_mask = self._eliminate(found, grown)
            if self._loss(other) >= loss:
                break
            found, mask, loss = other, other_mask, self._loss(other)
            history["swapped"] = loss**0.5
        return found, mask, history

    def _superset(self, start: Tensor, headroom: float) -> tuple[Tensor, Tensor]:
        """Find more than is wanted by ``ℓ0``-ADMM toward imputed targets, the start's own support included."""
        size = min(int(headroom * self.kept), int((~self.free).sum()) * len(start))
        outputs = start @ self.layer.inputs
        targets = outputs - self.layer.residual(outputs)
        weight, _ = l0_support(
            Spectrum.of(gram(self.layer.inputs.T), start.dtype),
            (targets @ self.layer.inputs.T).T,
            start,
            size,
            self.free,
            self.importance,
        )
        mask = (weight != 0) | self.free
        own = start != 0
        if int(own[:, ~self.free].sum()) <= size:
            weight, mask = torch.where(mask, weight, start), mask | own
        # where inputs or targets are zero, so may be what was found: the superset must not hold less than is wanted
        if int(mask[:, ~self.free].sum()) < self.kept:
            mask = _extended(self.layer, weight, mask, self.free, self.kept)
        return weight, mask

    def _eliminate(self, weight: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        weight, mask = self.layer.eliminate(
            weight, mask, self.free, self.importance, self.kept, self.steps, self.advance
        )
        return self.layer.fit(weight, mask, _SETTLE)[0], mask

    def _loss(self, weight: Tensor) -> float:
        return float((self.layer.losses(weight) * self.importance).sum())


def _extended(layer: OneSided, weight: Tensor, mask: Tensor, free: Tensor, count: int) -> Tensor:
    """Return the mask with the most promising weights added until `count` are kept."""
    missing = count - int(mask[:, ~free].sum())
    missing = min(missing, int((~mask).sum()))
    gains = torch.where(mask, -1.0, layer.gains(weight)).flatten()
    mask = mask.clone(memory_format=torch.contiguous_format)
    mask.view(-1)[torch.argsort(gains, descending=True, stable=True)[: max(0, missing)]] = True
    return mask


def _filled(verdict: OneSided, weight: Tensor, mask: Tensor, start: Tensor) -> Tensor:
    """Give kept weights that are 0 what they started with, where that costs nothing, so that the count is exact.

    On inputs that are dead here, and in neurons whose residual does not notice.
    """
    empty = mask & (weight == 0)
    if not bool(empty.any()):
        return weight
    weight = torch.where(empty & (verdict.inputs == 0).all(1), start.to(weight.dtype), weight)
    filled = torch.where(empty, start.to(weight.dtype), weight)
    harmless = verdict.losses(filled.double()) <= verdict.losses(weight.double())
    return torch.where(harmless[:, None], filled, weight)


def _checked(
    problem: LayerProblem, weight: Any, kept: int, importance: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Return the start (float64), the free columns, each neuron's importance and the metric, or refuse."""
    if problem.form == "halfspace":
        raise ProblemError("form='halfspace' is not refined: use form='ball', which has the same guarantee.")
    assert problem.penalty is not None
    shape = (problem.n_outputs, problem.n_inputs)
    start = as_float_tensor("weight", weight).to(problem.inputs.device, torch.float64).contiguous()
    if start.shape != shape:
        raise ProblemError(f"weight has shape {tuple(start.shape)}: it must be {shape}, as the problem's.")
    free = (problem.penalty == 0).all(0)
    available = int((~free).sum()) * shape[0]
    if kept > available:
        raise ProblemError(f"kept={kept} is out of range: the layer has {available} weights beside its free columns.")
    if importance is None:
        return start, free, start.new_ones(shape[0]), None
    given = as_float_tensor("importance", importance).to(start)
    if given.shape not in (torch.Size([shape[0]]), torch.Size([shape[0], shape[0]])):
        raise ProblemError(
            f"importance has shape {tuple(given.shape)}: it must be ({shape[0]},) or ({shape[0]}, {shape[0]})."
        )
    diagonal = given if given.dim() == 1 else given.diagonal()
    if bool((diagonal < 0).any()) or not bool((diagonal > 0).any()):
        raise ProblemError("importance has a negative entry, or no positive one: it weighs squared errors.")
    metric = None
    if given.dim() == 2:
        metric = 0.5 * (given + given.T) / diagonal.mean()
        if float(torch.linalg.eigvalsh(metric)[0]) < -1e-6 * shape[0]:
            raise ProblemError("importance is not positive semi-definite: some errors would pay.")
        metric = metric + 1e-3 * torch.eye(shape[0]).to(metric)
    return start, free, neuron_importance(given), metric


def neuron_importance(importance: Tensor) -> Tensor:
    """Return how much each neuron's squared error counts ``(M,)``, 1 in the mean.

    A neuron that nothing needs still counts a thousandth, so that nothing is divided by zero.
    """
    diagonal = importance if importance.dim() == 1 else importance.diagonal()
    mean = float(diagonal.mean())
    return (diagonal / mean).clamp(min=1e-3) if mean > 0 else torch.ones_like(diagonal)
