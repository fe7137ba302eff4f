"""Net-Trim: each layer becomes the sparsest weight, in ``ℓ1``, that reproduces the dense layer's outputs.

Aghasi, Abdi, Nguyen, Romberg, "Net-Trim: Convex Pruning of Deep Neural Networks with Performance Guarantee", NIPS 2017;
Aghasi, Abdi, Romberg, "Fast Convex Pruning of Deep Neural Networks", SIAM J. Math. Data Science, 2020.

In parallel the radius of layer ``l`` is ``ε_l ‖Y_l‖_F``. In cascade the inputs come through the pruned prefix,
where the dense weights themselves are off by ``d_l``; the radius is ``max(ε_l ‖Y_l‖_F, √γ d_l)`` ("relative"),
or ``√γ d_l`` after the first pruned layer ("paper").
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nettrim.core.certificate import Certificate, measure_fit
from nettrim.core.problem import FORMS, LayerProblem
from nettrim.core.solvers import Solver, check_limits, make_solver, solve_problem
from nettrim.errors import ProblemError
from nettrim.methods.base import LayerResult, LayerTask, with_bias_column


@dataclass(frozen=True)
class NetTrim:
    """Net-Trim, both papers and both schemes.

    Parameters
    ----------
    form : {"ball", "halfspace"}
        Of layers with a ReLU; the others are ``linear``. "halfspace" is the published program, "ball" allows more at
        the same guarantee.
    gamma : float ≥ 1
        ``γ`` of the cascade; 1.1 in the papers.
    cascade : {"relative", "paper"}
        The rule for the radius in a cascade.
    kappa : float in (0, 1]
        Risk factor: the last layer's radius is multiplied by it. Below 1 the program may have no solution.
    bias : {"free", "penalised", "frozen"}
        "free": fitted, not part of the norm. "penalised": like a weight, as in the released code.
        "frozen": kept as it is.
    clip_ceiling : bool
        For "halfspace" in cascade: replace the ceiling ``V`` by ``max(V, 0)``, which enlarges the feasible set at the
        same guarantee. False reproduces the papers.
    solver : str or Solver
    tol : float
        Relative duality gap.
    max_seconds : float, optional
        For each layer.
    on_failure : {"warn", "raise", "return"}
        What to do where a layer is not certified; its record says so in any case.
    """

    form: str = "ball"
    gamma: float = 1.1
    cascade: str = "relative"
    kappa: float = 1.0
    bias: str = "free"
    clip_ceiling: bool = True
    solver: str | Solver = "auto"
    tol: float = 1e-3
    max_seconds: float | None = None
    on_failure: str = "warn"
    name: str = "net-trim"
    amounts: tuple[str, ...] = ("epsilon", "lam")

    def __post_init__(self) -> None:
        """Refuse settings out of range before any work."""
        choices: dict[str, tuple[str, ...]] = {"form": ("ball", "halfspace"), "cascade": ("relative", "paper")}
        choices["bias"] = ("free", "penalised", "frozen")
        for field, allowed in choices.items():
            if getattr(self, field) not in allowed:
                raise ProblemError(
                    f"NetTrim's {field}={getattr(self, field)!r} is unknown: use {' or '.join(allowed)}."
                )
        for field in ("gamma", "kappa"):
            if isinstance(getattr(self, field), bool) or not isinstance(getattr(self, field), (int, float)):
                raise ProblemError(f"NetTrim's {field}={getattr(self, field)!r} is no number: give one.")
        if not (math.isfinite(self.gamma) and self.gamma >= 1):
            raise ProblemError(f"NetTrim's gamma={self.gamma} is out of range: γ ≥ 1, or no weight may fit.")
        if not 0 < self.kappa <= 1:
            raise ProblemError(f"NetTrim's kappa={self.kappa} is out of range: it lies in (0, 1].")
        make_solver(self.solver)
        check_limits(self.tol, self.max_seconds, self.on_failure)

    def prune_layer(self, task: LayerTask) -> LayerResult:
        """Set the program up, solve it, and round it to the model's dtype before it is certified."""
        began = time.monotonic()
        facts = self._given(task)
        facts |= derive(facts, task.clean, task.inputs, task.targets, task.weight, task.bias)
        problem = layer_problem(facts, task.inputs, task.targets, task.weight, task.bias)
        solution = solve_problem(
            problem,
            self.solver,
            tol=self.tol,
            max_seconds=self.max_seconds,
            on_failure=self.on_failure,
            round_to=task.dtype,
        )
        weight, bias = split_bias(solution.weight, task.bias, facts["bias"])
        stats = solution.stats
        facts |= {
            "status": solution.status.name,
            "solver": stats.solver,
            "iterations": stats.iterations,
            "dtype": stats.dtype,
            "damping": stats.damping,
            "note": stats.note,
        }
        return LayerResult(weight, bias, time.monotonic() - began, solution.multipliers, facts)

    def _given(self, task: LayerTask) -> dict[str, Any]:
        """Return what was asked for: all that `derive` needs beside the data."""
        form = self.form if task.relu else "linear"
        ceiling = "none"
        if form == "halfspace" and not task.clean:
            ceiling = "clipped" if self.clip_ceiling else "dense"
        return {
            "form": form,
            "bias": self.bias if task.bias is not None else "absent",
            "ceiling": ceiling,
            "gamma": self.gamma,
            "cascade": self.cascade,
            "kappa": self.kappa if task.last else 1.0,
            "tol": self.tol,
            task.amount: task.value,
        }


def derive(
    facts: dict[str, Any], clean: bool, inputs: Tensor, targets: Tensor, weight: Tensor, bias: Tensor | None
) -> dict[str, Any]:
    """Return what follows from the data: the radius by the schedule's rule, and what it was made from.

    Parameters
    ----------
    facts : dict
        As a record stores them; "epsilon" or "lam" among them.
    clean : bool
        Whether the inputs are the dense network's own.
    inputs : Tensor (P, N)
    targets : Tensor (P, M)
    weight, bias : Tensor (M, N), Tensor (M,) or None
        Dense.

    Returns
    -------
    dict
        "target_norm" ``‖Y‖``; "ceiling_norm" ``‖V₊‖`` off the active set; "radius", "lam"; and with a radius "drift"
        ``d``, how far the dense weights are from these targets, "asked" ``ε‖Y‖`` (0 where the papers' rule does not
        ask) and "floor", below which no radius is set.
    """
    dense = inputs @ weight.T if bias is None else inputs @ weight.T + bias
    size = float(targets.norm())
    ceiling_norm = 0.0
    if facts["ceiling"] != "none":
        ceiling_norm = float(dense.clamp(min=0)[targets <= 0].norm())
    found = {"target_norm": size, "ceiling_norm": ceiling_norm, "lam": facts.get("lam"), "radius": None}
    if found["lam"] is not None:
        return found
    # the distance does not depend on the radius, which is not known yet
    problem = layer_problem(facts | {"radius": 1.0, "lam": None}, inputs, targets, weight, bias)
    drift = measure_fit(problem, join_bias(weight, bias, facts["bias"])).distance
    # where nothing was asked and nothing drifted, or all targets are zero, a radius of 0 would ask for the impossible
    floor = 1e-6 * (size or float(dense.norm()) or 1.0)
    asked = facts["epsilon"] * size if clean or facts["cascade"] == "relative" else 0.0
    radius = facts["kappa"] * (asked if clean else max(asked, math.sqrt(facts["gamma"]) * drift))
    return found | {"drift": drift, "asked": asked, "floor": floor, "radius": max(radius, floor)}


def promise(facts: dict[str, Any], certificate: Certificate, targets: Tensor) -> float:
    """Return what ``‖σ(X Ûᵀ) − Y‖_F`` cannot exceed, on the inputs that the layer was solved for.

    The radius, or the distance where that is missed, and for ``halfspace`` what the ceiling lets pass: all of ``V₊``,
    and the excess over it at every inactive entry. Raised by 1e-12 for the rounding of sums.
    """
    reached = max(certificate.distance, facts["radius"] or 0.0)
    passed: float = facts["ceiling_norm"] + certificate.excess * math.sqrt(int((targets <= 0).sum()))
    return math.hypot(reached, passed) * (1 + 1e-12)


def layer_problem(
    facts: dict[str, Any], inputs: Tensor, targets: Tensor, weight: Tensor, bias: Tensor | None
) -> LayerProblem:
    """Set up one layer's program from what a record stores, so that `verify` solves nothing but checks the same thing.

    Parameters
    ----------
    facts : dict
        "form", "bias", "ceiling", and one of "radius" and "lam" not None.
    inputs : Tensor (P, N)
    targets : Tensor (P, M)
    weight, bias : Tensor (M, N), Tensor (M,) or None
        Dense.
    """
    form, kind = facts["form"], facts["bias"]
    if form not in FORMS:
        raise ProblemError(f"form={form!r} is unknown: use one of {', '.join(FORMS)}.")
    dense = inputs @ weight.T if bias is None else inputs @ weight.T + bias
    ceiling = None
    if facts["ceiling"] != "none":
        ceiling = dense.clamp(min=0) if facts["ceiling"] == "clipped" else dense
    active = None if form == "linear" else targets > 0
    penalty = None
    if kind == "frozen":
        assert bias is not None
        # Z = X Uᵀ + b: the anchor moves by −b, on the active set and off it
        targets = targets - bias
        if form != "linear":
            ceiling = (inputs.new_zeros(()) if ceiling is None else ceiling) - bias.expand_as(targets)
    elif kind in ("free", "penalised"):
        inputs = with_bias_column(inputs)
        if kind == "free":
            penalty = inputs.new_ones(inputs.shape[1], dtype=torch.float64)
            penalty[-1] = 0.0
    return LayerProblem(inputs, targets, form, facts["radius"], facts["lam"], ceiling, penalty, active)


def join_bias(weight: Tensor, bias: Tensor | None, kind: str) -> Tensor:
    """Return ``U``: the weight, with the bias as its last column where the program fits one."""
    return torch.cat([weight, bias[:, None]], dim=1) if bias is not None and kind in ("free", "penalised") else weight


def split_bias(u: Tensor, bias: Tensor | None, kind: str) -> tuple[Tensor, Tensor | None]:
    """Undo `join_bias`; a frozen bias comes back as it was."""
    return (u[:, :-1], u[:, -1]) if kind in ("free", "penalised") else (u, bias)
