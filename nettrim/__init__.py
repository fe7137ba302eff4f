"""Prune trained PyTorch networks by convex optimisation, with a certificate for every answer."""

from nettrim.core.certificate import Certificate, certify
from nettrim.core.problem import LayerProblem
from nettrim.core.solution import LayerSolution, SolveStats, Status
from nettrim.core.solvers import (
    SOLVERS,
    Admm,
    Clarabel,
    Newton,
    Osqp,
    Radius,
    Scs,
    solve_layer,
    solve_path,
    solve_problem,
)
from nettrim.errors import (
    DataError,
    MissingExtraError,
    NetTrimError,
    ProblemError,
    RunError,
    SolverError,
    UnknownNameError,
    UnsupportedError,
)
from nettrim.methods import METHODS, LObs, Magnitude, NetTrim, Pattern
from nettrim.pipeline.ledger import LayerRecord, Ledger
from nettrim.pipeline.prune import PruneResult, prune
from nettrim.pipeline.verify import Verification, load_result, verify

__version__ = "0.1.0"

__all__ = [
    "METHODS",
    "SOLVERS",
    "Admm",
    "Certificate",
    "Clarabel",
    "DataError",
    "LObs",
    "LayerProblem",
    "LayerRecord",
    "LayerSolution",
    "Ledger",
    "Magnitude",
    "MissingExtraError",
    "NetTrim",
    "NetTrimError",
    "Newton",
    "Osqp",
    "Pattern",
    "ProblemError",
    "PruneResult",
    "Radius",
    "RunError",
    "Scs",
    "SolveStats",
    "SolverError",
    "Status",
    "UnknownNameError",
    "UnsupportedError",
    "Verification",
    "certify",
    "load_result",
    "prune",
    "solve_layer",
    "solve_path",
    "solve_problem",
    "verify",
]
