"""What every solver is: a frozen value with its settings, that refuses by name or returns raw numbers.

Quality is none of its business: `nettrim.core.solvers.solve_problem` recomputes it from the raw weight.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from nettrim.core.problem import LayerProblem
from nettrim.core.solution import Status


@dataclass(frozen=True)
class Limits:
    """When a solver must stop: the relative gap that is wanted, and the clock."""

    tol: float
    deadline: float | None = None

    def out_of_time(self) -> bool:
        """Whether the clock has run out."""
        return self.deadline is not None and time.monotonic() >= self.deadline


@dataclass(frozen=True, eq=False)
class Start:
    """A point to start from: the weight and multipliers of a nearby problem, both in the problem's own units."""

    weight: Tensor
    multipliers: Tensor


@dataclass(frozen=True, eq=False)
class RawAnswer:
    """Unjudged numbers.

    `otherwise` is the status that holds where the certificate does not say SOLVED.
    """

    weight: Tensor
    multipliers: Tensor | None
    iterations: int
    otherwise: Status
    dtype: torch.dtype
    damping: float = 0.0
    note: str = ""


class Solver(Protocol):
    """The contract. `run` may assume that `refuses` returned None."""

    def refuses(self, problem: LayerProblem) -> str | None:
        """Return why this solver cannot take `problem` and what can, or None."""

    def run(self, problem: LayerProblem, limits: Limits, start: Start | None) -> RawAnswer:
        """Solve, and return whatever was reached."""
