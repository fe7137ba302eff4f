"""What a solver hands back: the weight, the evidence, and an outcome whose text says what to do."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Any

from nettrim.core.certificate import Certificate
from nettrim.core.problem import LayerProblem

#: the relative violation that still counts as feasible
FEASIBLE = 1e-6


class Status(Enum):
    """How a solve ended, judged from the certificate alone. The value is the sentence that says what to do."""

    SOLVED = "Certified: the gap and the violation are within their tolerances."
    REFINED = (
        "Refined at an exact count: the gap says how far the l1 norm is above the least at the same error; it is "
        "evidence, and nothing that a longer run would close."
    )
    MAX_ITER = "The iterations ran out before the gap was within tol: raise the solver's max_iter, or tol."
    TIME_LIMIT = "max_seconds ran out before the gap was within tol: raise max_seconds, or tol."
    NOT_FEASIBLE = (
        "The weight does not meet the radius or the ceiling: raise max_iter, or raise epsilon or the radius, "
        "which may be below the smallest distance that any weight reaches."
    )
    INFEASIBLE = "No weight reaches this radius: raise epsilon or the radius above the least-squares residual."
    BACKEND_FAILED = "The backend gave no usable answer: scale the inputs, raise the radius, or use another solver."

    @property
    def accepted(self) -> bool:
        """Whether the answer is what was asked for."""
        return self in (Status.SOLVED, Status.REFINED)

    @property
    def remedy(self) -> str:
        """The sentence that says what to do."""
        return self.value


@dataclass(frozen=True)
class SolveStats:
    """How the answer came about.

    Attributes
    ----------
    solver : str
        Name and settings of the solver that ran, and why it was chosen where the choice was automatic.
    seconds : float
        Wall time of the solver and of the final certificate.
    iterations : int
    dtype, device : str
        In which the solver worked; the certificate is always float64.
    damping : float
        What was added to a diagonal before a factorisation, absolute; 0 almost always.
    note : str
        What a reader should know, or "".
    """

    solver: str
    seconds: float
    iterations: int
    dtype: str
    device: str
    damping: float = 0.0
    note: str = ""


@dataclass(frozen=True, eq=False)
class LayerSolution:
    """One solved layer. `weight (M, N)` is of the kind (torch or NumPy) and dtype of the inputs.

    `multipliers (P, M)`, float64, is the feasible ``Γ`` behind the certificate: ``|XᵀΓ| ≤ c``, ``Γ ≤ 0`` off
    the active set.
    """

    weight: Any
    multipliers: Any
    certificate: Certificate
    status: Status
    stats: SolveStats
    problem: LayerProblem


def judge(certificate: Certificate, tol: float, otherwise: Status) -> Status:
    """Return SOLVED where the certificate says so, NOT_FEASIBLE where the violation does not, else `otherwise`."""
    if certificate.violation > FEASIBLE:
        return otherwise if otherwise in (Status.INFEASIBLE, Status.BACKEND_FAILED) else Status.NOT_FEASIBLE
    return Status.SOLVED if certificate.gap <= tol else otherwise
