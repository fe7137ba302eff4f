"""A second-order solver: from a rough start to a sharp certificate in a few steps, on the CPU.

Where there are many more samples than inputs, the start is a rough solution on a quarter of them, since signs are
mostly right long before numbers are: some iterations of ADMM, then Newton steps (`nettrim.core.solvers.steps`, and
`halfspace` for hard ceilings). Elsewhere it is ADMM's. Where the steps do not certify, ADMM goes on: nothing is lost by
trying.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from nettrim.core.problem import LayerProblem, check_count
from nettrim.core.solution import Status
from nettrim.core.solvers.admm import Admm, Iteration
from nettrim.core.solvers.base import Limits, RawAnswer, Start, constant_column
from nettrim.core.solvers.halfspace import CeilingSteps
from nettrim.core.solvers.scaling import Scaled, relative_radius
from nettrim.core.solvers.steps import Steps
from nettrim.errors import MissingExtraError, ProblemError


@dataclass(frozen=True)
class Newton:
    """ADMM to a rough solution, working-set Newton steps to a sharp one.

    All forms, on the CPU; tensors on a GPU get ADMM alone.

    Parameters
    ----------
    first : int
        Iterations of ADMM before the first try; three times as many in all before each later one.
    steps : int
        Newton steps of one try, at the most, if they get anywhere; six times as many for ``halfspace``.
    start : Admm
        Settings of ADMM, its `max_iter` included.

    Raises
    ------
    ProblemError
        `first` or `steps` are no whole numbers from 1 up, or `start` is no `Admm`.
    MissingExtraError
        numba is not installed.
    """

    first: int = 20
    steps: int = 16
    start: Admm = field(default_factory=Admm)

    def __post_init__(self) -> None:
        """Refuse settings that try nothing, and a missing library before any work."""
        for name in ("first", "steps"):
            object.__setattr__(self, name, check_count(f"Newton's {name}", getattr(self, name)))
        if not isinstance(self.start, Admm):
            raise ProblemError(f"Newton's start={self.start!r} is no Admm: pass Admm(...).")
        if not all(importlib.util.find_spec(name) for name in ("numba", "threadpoolctl")):
            raise MissingExtraError("Newton needs numba and threadpoolctl: pip install 'nettrim[newton]'.")

    def refuses(self, problem: LayerProblem) -> str | None:
        """Take every problem."""
        return None

    def run(self, problem: LayerProblem, limits: Limits, start: Start | None) -> RawAnswer:
        """Make Newton steps from a rough start, then alternate with ADMM until the certificate holds or time is up."""
        if problem.inputs.device.type != "cpu":
            return self.start.run(problem, limits, start)
        kind = CeilingSteps if problem.form == "halfspace" else Steps
        made, found = 0, None
        dtype = _working_dtype(problem, limits.tol)
        # from another radius' multipliers a hard ceiling was met later than from a rough start
        near = start if problem.form != "halfspace" else None
        if near is not None or problem.samples >= 4 * problem.n_inputs:
            carry = None if near is None else near.carry
            if isinstance(carry, Steps) and carry.x.dtype == dtype:
                found = carry
                found.resume(problem, limits)
            else:
                found = kind(Scaled(problem, dtype), limits)
                if near is not None:
                    found.begin_at(*found.scaled.into(near))
                else:
                    found.begin(*self._rough(problem, found.scaled, limits))
            made = found.make(self.steps)
            if found.done or limits.out_of_time():
                weight, gamma = found.scaled.back(found.best.weight, found.best.multipliers)
                otherwise = Status.MAX_ITER if found.done else Status.TIME_LIMIT
                return RawAnswer(weight, gamma, 0, otherwise, dtype, note=self.note(made), carry=found)
        iteration = Iteration(problem, self.start, limits, start)
        if found is not None:
            inputs = iteration.scaled.problem.inputs
            iteration.best.consider(found.best.weight.to(inputs), found.best.multipliers.to(inputs))
        # under a hard ceiling a second try was never seen to help
        once = problem.form == "halfspace"
        trying = not (once and found is not None)
        found = None  # its memory is wanted
        steps, last = kind(iteration.scaled, limits, iteration.best) if trying else None, self.first
        while not iteration.done:
            iteration.until(min(last, self.start.max_iter) if steps else self.start.max_iter)
            if steps is None or iteration.done or iteration.steps >= self.start.max_iter:
                break
            variables = iteration.variables
            steps.begin_at(variables.sparse, -variables.step * variables.a)
            made += steps.make(self.steps)
            steps, last = None if once else steps, 3 * last
        return iteration.answer(self.note(made))

    @staticmethod
    def note(made: int) -> str:
        """Say how many steps there were."""
        return f"{made} Newton steps." if made else ""

    def _rough(self, problem: LayerProblem, scaled: Scaled, limits: Limits) -> tuple[Tensor, Tensor]:
        """Solve roughly on a quarter of the rows, and return the weight and ``λ`` in the units of `scaled`.

        Where a quarter is still many, it is begun on a quarter of it.
        """
        rows = torch.randperm(problem.samples, generator=torch.Generator().manual_seed(0))[: problem.samples // 4]
        share = len(rows) / problem.samples
        assert problem.active is not None
        quarter = replace(
            problem,
            # a hard ceiling of a quarter of the samples says little about the others'
            form="ball" if problem.form == "halfspace" else problem.form,
            inputs=problem.inputs[rows],
            targets=problem.targets[rows],
            ceiling=None if problem.ceiling is None else problem.ceiling[rows],
            active=problem.active[rows],
            radius=None if problem.radius is None else problem.radius * share**0.5,
            lam=None if problem.lam is None else problem.lam / share,
        )
        # no sharper: the quarter's optimum is not the whole's
        rough = Limits(0.3, limits.deadline)
        if quarter.samples >= 8 * problem.n_inputs:
            steps = Steps(Scaled(quarter, _working_dtype(quarter, 1e-3)), rough)
            steps.begin(*self._rough(quarter, steps.scaled, rough))
        else:
            iteration = Iteration(quarter, self.start, rough, None)
            iteration.until(min(self.first, self.start.max_iter))
            steps = Steps(iteration.scaled, rough)
            steps.begin(iteration.variables.sparse.T, iteration.variables.lam())
        steps.make(self.steps)
        weight, _ = steps.scaled.back(steps.u.T, steps.u[:0])
        lam = steps.lam * share / (steps.scaled.k * steps.scaled.size)
        return scaled.weight_into(weight).T, lam * (scaled.k * scaled.size)


def _working_dtype(problem: LayerProblem, tol: float) -> torch.dtype:
    """Return what the products run in: float32 where it resolves the radius and the gap, on large problems."""
    large = problem.samples * problem.n_inputs * problem.n_outputs >= 2e7
    fine = tol * min(1.0, 10 * relative_radius(problem)) < 5e-5
    # a hard ceiling is met to 1e-6 of the largest target, by lowering a constant column or else by precision
    fine |= problem.form == "halfspace" and constant_column(problem) is None
    return torch.float32 if large and not fine else torch.float64
