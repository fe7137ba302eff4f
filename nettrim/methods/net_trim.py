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

from nettrim.core.certificate import measure_fit
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
        if not (math.isfinite(self.gamma) and self.gamma >= 1):
            raise ProblemError(f"NetTrim's gamma={self.gamma} is out of range: γ ≥ 1, or no weight may fit.")
        if not 0 < self.kappa <= 1:
            raise ProblemError(f"NetTrim's kappa={self.kappa} is out of range: it lies in (0, 1].")
        make_solver(self.solver)
        check_limits(self.tol, self.max_seconds, self.on_failure)

    def prune_layer(self, task: LayerTask) -> LayerResult:
        """Set the program up, solve it, and round it to the model's dtype before it is certified."""
        began = time.monotonic()
        facts = self._facts(task)
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
        certificate, stats = solution.certificate, solution.stats
        facts |= {
            "tol": self.tol,
            "status": solution.status.name,
            "solver": stats.solver,
            "iterations": stats.iterations,
            "dtype": stats.dtype,
            "damping": stats.damping,
            "note": stats.note,
        }
        reached = 0.0 if facts["radius"] is None else facts["radius"]
        excess = 0.0
        if facts["form"] == "halfspace":
            inactive = task.targets <= 0
            excess = certificate.violation * float(task.targets.abs().max()) * math.sqrt(int(inactive.sum()))
        # what is violated promises no more than what was reached
        promised = math.hypot(max(reached, certificate.distance), facts["ceiling_norm"] + excess)
        return LayerResult(
            weight,
            bias,
            weight != 0,
            time.monotonic() - began,
            certificate,
            solution.multipliers,
            promised,
            facts,
        )

    def _facts(self, task: LayerTask) -> dict[str, Any]:
        """Return the settings from which `layer_problem` makes the program, and the radius by the schedule's rule."""
        facts: dict[str, Any] = {
            "form": self.form if task.relu else "linear",
            "bias": self.bias if task.bias is not None else "absent",
            "ceiling": "none",
            "radius": 1.0,
            "lam": None,
            "ceiling_norm": 0.0,
            "gamma": self.gamma,
            "cascade": self.cascade,
            "kappa": self.kappa if task.last else 1.0,
        }
        if facts["form"] == "halfspace" and not task.clean:
            facts["ceiling"] = "clipped" if self.clip_ceiling else "dense"
            off = task.targets <= 0
            facts["ceiling_norm"] = float(_pre_activation(task).clamp(min=0)[off].norm())
        size = float(task.targets.norm())
        facts["target_norm"] = size
        if task.amount == "lam":
            return facts | {"lam": task.value, "radius": None}
        # d_l: how far the dense weights themselves are from the targets on these inputs
        dense = task.weight if task.bias is None else join_bias(task.weight, task.bias, facts["bias"])
        drift = measure_fit(layer_problem(facts, task.inputs, task.targets, task.weight, task.bias), dense).distance
        asked = task.value * size
        follow = math.sqrt(self.gamma) * drift
        if task.clean:
            radius, rule = asked, "epsilon"
        elif self.cascade == "paper":
            radius, rule = follow, "drift"
        else:
            radius, rule = max((asked, "epsilon"), (follow, "drift"))
        # only dead neurons, or a prefix that changed nothing: any radius will do, and 0 is none
        radius = facts["kappa"] * radius or torch.finfo(torch.float64).tiny ** 0.5
        return facts | {"radius": radius, "drift": drift, "rule": rule, "asked": asked}


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


def _pre_activation(task: LayerTask) -> Tensor:
    outputs = task.inputs @ task.weight.T
    return outputs if task.bias is None else outputs + task.bias
