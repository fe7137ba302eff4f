"""Prune trained PyTorch networks by convex optimisation, with a certificate for every answer."""

from nettrim.core.certificate import Certificate, certify
from nettrim.core.problem import LayerProblem
from nettrim.core.refine import Evidence, Refined, refine
from nettrim.core.solution import LayerSolution, SolveStats, Status
from nettrim.core.solve import solve_layer, solve_path
from nettrim.core.solvers import (
    SOLVERS,
    Admm,
    Clarabel,
    Newton,
    Osqp,
    Radius,
    Scs,
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
from nettrim.methods import (
    METHODS,
    Alps,
    Ldrf,
    LObs,
    Magnitude,
    NetTrim,
    Obs,
    Pattern,
    Shallowing,
    SparseGpt,
    Wanda,
    tolerance_curve,
)
from nettrim.network.finishing import Distill, FineTune
from nettrim.network.reestimate import Reestimate
from nettrim.pipeline.budget import Overall
from nettrim.pipeline.compare import compare
from nettrim.pipeline.prune import prune
from nettrim.pipeline.records import LayerRecord, Ledger
from nettrim.pipeline.result import PruneResult, load_result
from nettrim.pipeline.rows import Comparison, Row, load_comparison
from nettrim.pipeline.verify import Verification, verify

__version__ = "0.1.0"

__all__ = [
    "METHODS",
    "SOLVERS",
    "Admm",
    "Alps",
    "Certificate",
    "Clarabel",
    "Comparison",
    "DataError",
    "Distill",
    "Evidence",
    "FineTune",
    "LObs",
    "LayerProblem",
    "LayerRecord",
    "LayerSolution",
    "Ldrf",
    "Ledger",
    "Magnitude",
    "MissingExtraError",
    "NetTrim",
    "NetTrimError",
    "Newton",
    "Obs",
    "Osqp",
    "Overall",
    "Pattern",
    "ProblemError",
    "PruneResult",
    "Radius",
    "Reestimate",
    "Refined",
    "Row",
    "RunError",
    "Scs",
    "Shallowing",
    "SolveStats",
    "SolverError",
    "SparseGpt",
    "Status",
    "UnknownNameError",
    "UnsupportedError",
    "Verification",
    "Wanda",
    "certify",
    "compare",
    "load_comparison",
    "load_result",
    "prune",
    "refine",
    "solve_layer",
    "solve_path",
    "solve_problem",
    "tolerance_curve",
    "verify",
]
