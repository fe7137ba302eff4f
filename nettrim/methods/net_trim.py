"""Net-Trim: each layer becomes the sparsest weight, in ``ℓ1``, that reproduces the dense layer's outputs.

Aghasi, Abdi, Nguyen, Romberg, "Net-Trim: Convex Pruning of Deep Neural Networks with Performance Guarantee", NIPS 2017;
Aghasi, Abdi, Romberg, "Fast Convex Pruning of Deep Neural Networks", SIAM J. Math. Data Science, 2020.

The radius follows from what was asked for by the rules in `nettrim.methods.program`. Asked for a number of weights
instead, each layer is refined at exactly that count (`nettrim.core.refine`), and the convex program at the error that
was reached says how far its ``ℓ1`` norm is from the least.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nettrim.core.l0 import Spectrum, l0_support
from nettrim.core.linalg import gram
from nettrim.core.problem import LayerProblem
from nettrim.core.refine import conclude, neuron_importance, refine
from nettrim.core.reweighted import reweighted
from nettrim.core.solution import SolveStats, Status
from nettrim.core.solvers import Solver, check_limits, make_solver, solve_problem
from nettrim.errors import ProblemError, UnsupportedError
from nettrim.methods.base import COUNTS, LayerResult, LayerTask
from nettrim.methods.program import derive, join_bias, layer_problem, split_bias

_BOUND = 1e-2  # relative gap of the convex program that stands beside an exact count


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
    route : {"refined", "reweighted"}
        To a number of weights: "refined" searches the support directly (`nettrim.core.refine`), "reweighted" solves
        reweighted convex programs until few enough are left (`nettrim.core.reweighted`); the published programs have
        no count.
    swaps : int
        Rounds of swaps of the refinement.
    evidence : bool
        Beside a number of weights, solve the convex program at the error that was reached, and record how far the
        ``ℓ1`` norm is from its least.
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
    route: str = "refined"
    swaps: int = 0
    evidence: bool = True
    name: str = "net-trim"
    amounts: tuple[str, ...] = ("epsilon", "lam", *COUNTS)

    def __post_init__(self) -> None:
        """Refuse settings out of range before any work."""
        choices: dict[str, tuple[str, ...]] = {"form": ("ball", "halfspace"), "cascade": ("relative", "paper")}
        choices |= {"bias": ("free", "penalised", "frozen"), "route": ("refined", "reweighted")}
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
        if isinstance(self.swaps, bool) or not isinstance(self.swaps, int) or self.swaps < 0:
            raise ProblemError(f"NetTrim's swaps={self.swaps!r} is out of range: give a whole number ≥ 0.")
        make_solver(self.solver)
        check_limits(self.tol, self.max_seconds, self.on_failure)

    def looks_ahead(self, amount: str) -> bool:
        """Whether it weighs a layer's errors by what the next layers will make of them."""
        return amount in COUNTS

    def check_amount(self, amount: str, biased: bool) -> None:
        """Refuse the published programs' own settings where a number of weights is asked for.

        Raises
        ------
        UnsupportedError
            With ``form="halfspace"``, and with ``bias="penalised"`` where there is a bias.
        """
        if amount in COUNTS and (self.form == "halfspace" or (self.bias == "penalised" and biased)):
            raise UnsupportedError(
                f"a number of weights needs NetTrim's form='ball' and bias='free' or 'frozen': form={self.form!r} and "
                f"bias={self.bias!r} were given, with {amount}."
            )

    def prune_layer(self, task: LayerTask) -> LayerResult:
        """Set the program up, solve it, and round it to the model's dtype before it is certified."""
        if task.amount in COUNTS:
            return self._prune_to_count(task)
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
        facts |= {"status": solution.status.name} | _said(solution.stats)
        return LayerResult(weight, bias, time.monotonic() - began, solution.multipliers, facts)

    def _prune_to_count(self, task: LayerTask) -> LayerResult:
        """Refine at the count, and let the convex program at the error that was reached say what it is worth."""
        began = time.monotonic()
        self.check_amount(task.amount, task.bias is not None)
        facts = self._given(task)
        # the radius plays no part in the search
        problem = layer_problem(facts | {"radius": 1.0, "lam": None}, task.inputs, task.targets, task.weight, task.bias)
        search: dict[str, float] = {}
        if task.kept == 0:
            found = _constant(problem, task.outputs, task.dtype)
        elif self.route == "reweighted":
            refined = reweighted(problem, kept=task.kept, solver=self.solver, round_to=task.dtype)
            found, search = refined.weight, refined.history
        else:
            assert problem.penalty is not None
            free = problem.penalty[0] == 0
            wanted = task.outputs
            if facts["bias"] == "frozen" and task.bias is not None:
                wanted = wanted - task.bias
            dense = join_bias(task.weight, task.bias, facts["bias"])
            spectrum = Spectrum.of(gram(problem.inputs), torch.float32)
            importance = task.importance
            if importance is not None and not bool((importance.diagonal() > 0).any()):
                importance = None  # the layers behind will read nothing of this one: all its neurons count the same
            weigh = dense.new_ones(len(dense)) if importance is None else neuron_importance(importance)
            start, _ = l0_support(spectrum, problem.inputs.T @ wanted, dense.float(), task.kept, free, weigh)
            refined = refine(
                problem, start, kept=task.kept, importance=importance, swaps=self.swaps, round_to=task.dtype
            )
            found, search = refined.weight, refined.history
        weight, bias = split_bias(found, task.bias, facts["bias"])
        facts |= {"status": Status.REFINED.name, "seconds_search": time.monotonic() - began, "search": search}
        facts |= derive(facts, task.clean, task.inputs, task.targets, task.weight, task.bias, found)
        multipliers = None
        if self.evidence:
            solution = solve_problem(
                problem.with_radius(facts["radius"]),
                self.solver,
                # the weight is far above the bound in any case, so a sharper one says nothing more
                tol=max(self.tol, _BOUND),
                max_seconds=self.max_seconds,
                on_failure="return",
            )
            multipliers = solution.multipliers
            facts |= {"bound_status": solution.status.name} | _said(solution.stats)
        return LayerResult(weight, bias, time.monotonic() - began, multipliers, facts)

    def _given(self, task: LayerTask) -> dict[str, Any]:
        """Return what was asked for: all that `derive` needs beside the data."""
        form = task.form or (self.form if task.relu else "linear")
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


def _constant(problem: LayerProblem, outputs: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the weight of a group of a convolution that keeps nothing ``(M, N)``: its bias alone, where it is free."""
    assert problem.penalty is not None
    free = problem.penalty == 0
    start = torch.where(free, outputs.mean(0)[:, None], 0.0)
    return conclude(problem, start, free, None, dtype) if bool(free.any()) else start.to(dtype)


def _said(stats: SolveStats) -> dict[str, Any]:
    """Return what the solver says of its work, as a record keeps it."""
    return {
        "solver": stats.solver,
        "iterations": stats.iterations,
        "dtype": stats.dtype,
        "damping": stats.damping,
        "note": stats.note,
    }
