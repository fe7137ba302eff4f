"""Evidence that needs no solver: how far a weight is from the optimum, and how far from feasible, in float64.

For multipliers ``Γ (P, M)`` with ``|XᵀΓ|_nm ≤ c_mn`` and ``Γ ≤ 0`` off the active set, weak duality gives

=============  =========================================
form           lower bound on the optimum
=============  =========================================
ball, linear   ``⟨Γ, T⟩ − r ‖Γ‖_F``
halfspace      ``⟨Γ, T⟩ − r ‖Γ_Ω‖_F``
regularised    ``⟨Γ, T⟩ − ‖Γ‖_F² / (2λ)`` (``Γ_Ω`` for halfspace)
=============  =========================================

with the anchor ``T`` of `nettrim.core.problem`. Proof for the ball: ``Σ c|U| ≥ ⟨XᵀΓ, Uᵀ⟩ = ⟨Γ, Z⟩``; write ``Z
= Q + R`` with ``Q`` the projection of ``Z``: ``⟨Γ, Q⟩ ≥ ⟨Γ, T⟩`` since ``Γ ≤ 0`` where ``Q ≤ T``, and ``⟨Γ, R⟩
≥ −r‖Γ‖``.

Any candidate is made feasible first: signs clipped, free columns (``c = 0``) centred, each neuron's column
scaled by ``t_m``, and the ``t_m`` chosen to maximise the bound. So a certificate can be wrong only by rounding.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nettrim.core.problem import LayerProblem, as_float_tensor
from nettrim.errors import ProblemError

_ROWS = 8192  # rows that are held in float64 at a time
# |Σ_p x_pn Γ_pm| of a free column, relative to Σ_p |x_pn Γ_pm|, that counts as rounding
_CENTRED = {torch.float64: 1e-13, torch.float32: 1e-4}


@dataclass(frozen=True)
class Certificate:
    """What was computed about one weight, in float64.

    Attributes
    ----------
    objective : float
        ``Σ c|U|``, plus ``(λ/2) dist²`` for a regularised problem.
    lower_bound : float
        No feasible weight has a smaller objective.
    gap : float
        ``(objective − lower_bound) / objective``: what the optimum can be below, at the most. Proves nothing
        without `violation`.
    violation : float
        ``max(0, (dist − r) / r)``, the worst over the neurons where each has a ball of its own; for
        ``halfspace`` also the worst excess over the ceiling, relative to ``max |Y|``.
    distance : float
        ``‖R‖_F``, in the units of the targets (the active samples alone for ``halfspace``).
    excess : float
        Of ``halfspace``: the worst excess over the ceiling, in the units of the targets.
    note : str
        What a reader must know about the bound, or "".
    """

    objective: float
    lower_bound: float
    gap: float
    violation: float
    distance: float
    excess: float = 0.0
    note: str = ""


def certify(problem: LayerProblem, weight: Any, multipliers: Any = None) -> Certificate:
    """Return the evidence for any `weight (M, N)`, also another tool's.

    Parameters
    ----------
    problem : LayerProblem
    weight : Tensor or ndarray (M, N)
    multipliers : Tensor or ndarray (P, M), optional
        A candidate ``Γ``; any will do, and a poor one gives a poor bound. When absent, the direction of the
        weight's own residual is used, which is optimal at an optimal weight of the ball and linear forms.

    Raises
    ------
    ProblemError
        Shapes that do not match the problem's, NaN or infinity.
    """
    u = _shaped("weight", weight, (problem.n_outputs, problem.n_inputs))
    fit = measure_fit(problem, u)
    if multipliers is None:
        candidate = -fit.residual
    else:
        candidate = _shaped("multipliers", multipliers, (problem.samples, problem.n_outputs))
    return certificate_of(problem, u, fit, feasible_multipliers(problem, candidate))


def certificate_of(problem: LayerProblem, u: Tensor, fit: Fit, dual: DualPoint) -> Certificate:
    """Return the certificate from its two halves."""
    objective = float((problem.penalty * u.double().abs()).sum())  # type: ignore[operator]
    if problem.lam is not None:
        objective += 0.5 * problem.lam * fit.distance**2
    # a bound above a zero objective is no rounding: the weight is not feasible, or the certificate is wrong
    size = objective if objective > 0 else dual.bound
    gap = (objective - dual.bound) / size if size > 0 else 0.0
    return Certificate(objective, dual.bound, gap, fit.violation, fit.distance, fit.excess, dual.note)


@dataclass(frozen=True)
class Fit:
    """How a weight meets the constraint: its residual, distance, violation and absolute excess over the ceiling."""

    residual: Tensor
    distance: float
    violation: float
    excess: float


def measure_fit(problem: LayerProblem, weight: Tensor, dtype: torch.dtype = torch.float64) -> Fit:
    """Return residual ``R (P, M)``, ``dist`` and the relative violation of `weight`, products in `dtype`."""
    residual = torch.empty(problem.samples, problem.n_outputs, dtype=dtype, device=problem.inputs.device)
    u = weight.to(device=problem.inputs.device, dtype=dtype)
    anchor, active = problem.anchor, problem.active
    assert active is not None
    for rows in _chunks(problem):
        difference = problem.inputs[rows].to(dtype) @ u.T - anchor[rows].to(dtype)
        residual[rows] = torch.where(active[rows], difference, difference.clamp(min=0))
    excess = over_ceiling = 0.0
    counted = residual
    if problem.form == "halfspace":
        excess = float(torch.where(active, 0.0, residual).max())
        counted = torch.where(active, residual, 0.0)
        # where all targets are zero, the ceiling is the scale, and where it is zero too, one
        size = float(problem.targets.abs().max()) or float(anchor.abs().max()) or 1.0
        over_ceiling = excess / size
    per_neuron = torch.linalg.vector_norm(counted, dim=0)
    distance = float(torch.linalg.vector_norm(per_neuron))
    over = 0.0
    if isinstance(problem.radius, Tensor):
        # a zero radius (a dead neuron) is measured against the mean one
        scale = torch.where(problem.radius > 0, problem.radius, problem.radius.mean())
        over = float(((per_neuron - problem.radius) / scale).max())
    elif problem.radius is not None:
        over = (distance - problem.radius) / problem.radius
    return Fit(residual, distance, max(0.0, over, over_ceiling), max(0.0, excess))


@dataclass(frozen=True)
class DualPoint:
    """Multipliers that satisfy every condition of a lower bound, and the bound that they give."""

    multipliers: Tensor
    bound: float
    note: str


def feasible_multipliers(problem: LayerProblem, candidate: Tensor, dtype: torch.dtype = torch.float64) -> DualPoint:
    """Turn any ``Γ (P, M)`` into a feasible one: clip signs, centre free columns, scale each neuron as well as can be.

    A solver may ask for float32 to learn when to stop; a verdict is float64.
    """
    gamma = candidate.to(device=problem.inputs.device, dtype=dtype)
    active = problem.active
    assert active is not None and problem.penalty is not None
    if problem.form != "linear":
        gamma = torch.where(active, gamma, gamma.clamp(max=0))
    gamma, dropped = _centre_free_columns(problem, gamma)
    products = gamma.new_zeros(problem.n_inputs, problem.n_outputs)
    linear = gamma.new_zeros(problem.n_outputs)
    anchor = problem.anchor
    for rows in _chunks(problem):
        products += problem.inputs[rows].to(dtype).T @ gamma[rows]
        linear += (gamma[rows] * anchor[rows].to(dtype)).sum(0)
    counted = torch.where(active, gamma, 0.0) if problem.form == "halfspace" else gamma
    square = (counted * counted).sum(0)
    scale, value = best_bound(problem, products, linear, square)
    note = ""
    if dropped:
        note = (
            f"{dropped} of {problem.n_outputs} neurons add nothing to the lower bound: "
            "their free columns could not be centred."
        )
    return DualPoint(gamma * scale, value, note)


def best_bound(problem: LayerProblem, products: Tensor, linear: Tensor, square: Tensor) -> tuple[Tensor, float]:
    """Return the best factor ``t_m`` for each neuron's multipliers, and the bound that they give together.

    Parameters
    ----------
    problem : LayerProblem
    products : Tensor (N, M)
        ``XᵀΓ``, centred where columns are free.
    linear, square : Tensor (M,)
        ``⟨Γ_m, T_m⟩`` and the ``‖Γ_m‖²`` that the form's norm counts.
    """
    assert problem.penalty is not None
    if not bool(torch.isfinite(products).all() & torch.isfinite(linear).all() & torch.isfinite(square).all()):
        return torch.zeros_like(linear), 0.0  # of overflown multipliers nothing follows
    scale = _best_scales(problem, linear, square, _largest_scales(problem.penalty.T.to(products), products))
    gain = float((scale * linear).sum())
    norm = (scale * scale * square).sum(0)
    if problem.lam is not None:
        cost = float(norm) / (2 * problem.lam)
    elif isinstance(problem.radius, Tensor):
        cost = float((problem.radius * scale * square.sqrt()).sum())
    else:
        assert problem.radius is not None
        cost = problem.radius * float(norm.sqrt())
    # what cancels leaves its rounding behind; and the norm is never negative, so 0 is a bound too
    return scale, max(0.0, gain - cost - 1e-14 * (gain + cost))


def _centre_free_columns(problem: LayerProblem, gamma: Tensor) -> tuple[Tensor, int]:
    """Make ``(XᵀΓ)_nm = 0`` where ``c_mn = 0``, by the smallest change over the active samples, which have no
    sign to keep.

    A neuron where that is impossible gets ``Γ_m = 0``, which is feasible and adds nothing to the bound.
    """
    assert problem.penalty is not None and problem.active is not None
    free = problem.penalty == 0  # (M, N)
    columns = free.any(0).nonzero().flatten()
    if columns.numel() == 0:
        return gamma, 0
    x = problem.inputs[:, columns].to(gamma.dtype)
    wanted = free[:, columns]
    active = problem.active.to(gamma.dtype)
    gram = torch.einsum("pm,pi,pj->mij", active, x, x) if columns.numel() > 1 else (active.T @ (x * x))[:, :, None]
    both = wanted[:, :, None] & wanted[:, None, :]
    inverse = torch.linalg.pinv(torch.where(both, gram, 0.0), hermitian=True)
    for _ in range(2):  # the second time takes the rounding of the first
        missing = (gamma.T @ x) * wanted
        step = torch.einsum("mij,mj->mi", inverse, missing)
        gamma = gamma - active * (x @ step.T)
    left = ((gamma.T @ x) * wanted).abs()
    size = gamma.abs().T @ x.abs()
    bad = (left > _CENTRED[gamma.dtype] * size).any(1)
    return torch.where(bad, 0.0, gamma), int(bad.sum())


def _largest_scales(penalty: Tensor, products: Tensor) -> Tensor:
    """Return ``max t_m`` with ``t_m |XᵀΓ|_nm ≤ c_mn``, free columns left out; infinite where ``XᵀΓ_m = 0``."""
    size = products.abs()
    return torch.where((penalty > 0) & (size > 0), penalty / size, torch.inf).amin(0)


def _best_scales(problem: LayerProblem, linear: Tensor, square: Tensor, largest: Tensor) -> Tensor:
    """Return the ``0 ≤ t_m ≤ largest_m`` that maximise ``Σ t_m a_m`` minus the form's norm term.

    Joint ball: at the optimum ``t_m = min(largest_m, a_m s / (r b_m))`` with ``s = ‖tΓ‖_F``. Neurons saturate
    in the order of ``s_m = largest_m r b_m / a_m``, and between two of these ``s² = Σ_saturated t_m² b_m / (1 −
    Σ_others a_m² / (r² b_m))``.
    """
    gain = linear.clamp(min=0)
    usable = (gain > 0) & (largest > 0)
    if problem.lam is not None:
        best = torch.where(square > 0, problem.lam * gain / square, torch.inf)
        return torch.where(usable, torch.minimum(largest, best), 0.0)
    assert problem.radius is not None
    # any finite scale of an unlimited neuron is valid; this one is as good as unlimited beside the others
    finite = torch.isfinite(largest)
    ceiling = float(largest[finite].max()) if bool(finite.any()) else 1.0
    largest = torch.where(finite, largest, 1e6 * max(ceiling, 1.0))
    if isinstance(problem.radius, Tensor):
        return torch.where(usable & (linear > problem.radius * square.sqrt()), largest, 0.0)
    # neurons without a norm term (halfspace, no active sample) saturate at once
    costly = usable & (square > 0)
    a, b, top = gain[costly], square[costly], largest[costly]
    scale = torch.where(usable & (square == 0), largest, 0.0)
    if a.numel() == 0:
        return scale
    radius = problem.radius
    turn = top * radius * b / a
    order = turn.argsort()
    pull = (a * a / b)[order] / radius**2
    unsaturated = pull.flip(0).cumsum(0).flip(0)  # of this one and those after it
    saturated = (top * top * b)[order].cumsum(0)
    if float(unsaturated[0]) <= 1:
        return scale  # even unscaled the norm costs more than it brings: the best bound is 0
    # the k first are saturated: s_k² = saturated_k / (1 − unsaturated_{k+1}); the first k with s_k ≤ turn_{k+1}
    rest = torch.cat([unsaturated[1:], unsaturated.new_zeros(1)])
    ends = torch.cat([turn[order][1:], turn.new_full((1,), torch.inf)])
    s = torch.where(rest < 1, (saturated / (1 - rest).clamp(min=1e-300)).sqrt(), torch.inf)
    s_best = s[int((s <= ends).nonzero()[0])]
    scale[costly] = torch.minimum(top, a * s_best / (radius * b))
    return scale


def _chunks(problem: LayerProblem) -> Iterator[slice]:
    for start in range(0, problem.samples, _ROWS):
        yield slice(start, start + _ROWS)


def _shaped(name: str, value: Any, shape: tuple[int, int]) -> Tensor:
    tensor = as_float_tensor(name, value)
    if tensor.shape != shape:
        raise ProblemError(f"{name} has shape {tuple(tensor.shape)}: the problem needs {shape}.")
    return tensor
