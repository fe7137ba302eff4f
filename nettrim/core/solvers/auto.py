"""Which solver for which problem, by device, size and expected density, with the reason in words."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass

from nettrim.core.problem import LayerProblem
from nettrim.core.solvers.admm import Admm
from nettrim.core.solvers.base import Limits, RawAnswer, Solver, Start
from nettrim.core.solvers.newton import Newton
from nettrim.core.solvers.scaling import relative_radius

SMALL = 2e7  # P N M below which ADMM needs no more than some tenths of a second
NARROW = 128  # inputs below which ADMM's iterations are cheaper than a neuron's program [conv3, conv5: 4 to 10 times]
WIDE = 1500  # weights kept for a neuron, beyond what was measured: at 1,150 Newton took half of ADMM's time


@dataclass(frozen=True)
class Auto:
    """Newton's steps where they pay, ADMM elsewhere; `choose` says why."""

    def refuses(self, problem: LayerProblem) -> str | None:
        """Take every problem."""
        return None

    def choose(self, problem: LayerProblem) -> tuple[Solver, str]:
        """Return the solver for a problem, and the reason."""
        if problem.inputs.device.type != "cpu":
            return Admm(), f"because the tensors are on {problem.inputs.device}"
        if not all(importlib.util.find_spec(name) for name in ("numba", "threadpoolctl")):
            return Admm(), "because numba is not installed (pip install 'nettrim[newton]')"
        size = problem.samples * problem.n_inputs * problem.n_outputs
        if size < SMALL:
            return Admm(), f"because the problem is small (P·N·M = {size:.1e})"
        if problem.n_inputs < NARROW:
            return Admm(), f"because the layer has only {problem.n_inputs} inputs"
        kept = expected_density(problem) * problem.n_inputs
        if kept > WIDE:
            return Admm(), f"because some {kept:.0f} weights are expected to stay for a neuron"
        return Newton(), f"because some {kept:.0f} of {problem.n_inputs} weights are expected to stay for a neuron"

    def run(self, problem: LayerProblem, limits: Limits, start: Start | None) -> RawAnswer:
        """Solve with what `choose` returns."""
        return self.choose(problem)[0].run(problem, limits, start)


def expected_density(problem: LayerProblem) -> float:
    """Guess what fraction of the weights stays, from the relative radius ``ε`` alone: ``0.08/√ε``, 1 at the most.

    On LeNet-300-100 between ``ε`` 0.05 and 0.3 this lies between half and one and a half times what was measured
    (``benchmarks/layer``). A regularised problem is taken for one of ``ε = 0.1``.
    """
    epsilon = 0.1 if problem.radius is None else relative_radius(problem)
    return float(min(1.0, 0.08 / max(epsilon, 1e-12) ** 0.5))
