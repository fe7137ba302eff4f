"""Small problems whose optimum is known by hand, and random layers of every awkward kind.

They are public because a solver that somebody else writes should meet them too: tests, documentation and
benchmarks read the same two tables, `CASES` (name -> factory of a `Case`) and `KINDS` (what is awkward).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from math import sqrt

import torch
from torch import Tensor

from nettrim.core.problem import LayerProblem, build_problem
from nettrim.errors import UnknownNameError


@dataclass(frozen=True, eq=False)
class Case:
    """A problem with a known answer.

    Attributes
    ----------
    name : str
    problem : LayerProblem
    optimum : float or None
        The smallest objective, derived by hand.
    weight : Tensor (M, N) or None
        The optimal weight, where it is unique.
    why : str
        The derivation, in a sentence.
    """

    name: str
    problem: LayerProblem
    optimum: float | None
    weight: Tensor | None
    why: str


def _tensor(*rows: tuple[float, ...]) -> Tensor:
    return torch.tensor(rows, dtype=torch.float64)


def _identity() -> Case:
    # the smallest Σu with ‖u − y‖ ≤ r takes the same t from every entry, less where an entry ends at 0:
    # Σ min(y, t)² = 0.1² + 2t² = 1
    t = sqrt(0.495)
    problem = LayerProblem(torch.eye(4, dtype=torch.float64), _tensor((3.0,), (4.0,), (0.1,), (0.0,)), radius=1.0)
    return Case(
        "identity",
        problem,
        7 - 2 * t,
        _tensor((3 - t, 4 - t, 0.0, 0.0)),
        "With X = I the targets are shrunk by a common t, Σ min(y, t)² = r²; what is below t vanishes.",
    )


def _joint_ball() -> Case:
    # four active entries share the joint ball: each gives r/√4
    problem = LayerProblem(torch.eye(3, dtype=torch.float64), _tensor((3.0, 1.0), (4.0, 0.0), (0.0, 2.0)), radius=1.0)
    return Case(
        "joint ball",
        problem,
        8.0,
        _tensor((2.5, 3.5, 0.0), (0.5, 0.0, 1.5)),
        "With X = I and k active entries in one ball, each is shrunk by r/√k: Σy − r√k = 10 − 2.",
    )


def _per_neuron() -> Case:
    problem = LayerProblem(
        torch.eye(2, dtype=torch.float64),
        _tensor((3.0, 1.0), (4.0, 2.0)),
        radius=torch.tensor([1.0, 0.5], dtype=torch.float64),
    )
    a, b = 1 / sqrt(2), 0.5 / sqrt(2)
    return Case(
        "per-neuron balls",
        problem,
        10 - 1.5 * sqrt(2),
        _tensor((3 - a, 4 - a), (1 - b, 2 - b)),
        "As 'joint ball', neuron by neuron: (7 − √2) + (3 − √2/2).",
    )


def _scalar() -> Case:
    problem = LayerProblem(_tensor((2.0,)), _tensor((6.0,)), radius=2.0)
    return Case("scalar", problem, 2.0, _tensor((2.0,)), "|2u − 6| ≤ 2 allows 2 ≤ u ≤ 4.")


def _weighted() -> Case:
    # stationarity: u = y − r c/‖c‖
    problem = LayerProblem(
        torch.eye(2, dtype=torch.float64),
        _tensor((3.0,), (4.0,)),
        radius=1.0,
        penalty=torch.tensor([1.0, 2.0], dtype=torch.float64),
    )
    return Case(
        "weighted norm",
        problem,
        11 - sqrt(5),
        _tensor((3 - 1 / sqrt(5), 4 - 2 / sqrt(5))),
        "With X = I, min c·u over ‖u − y‖ ≤ r is c·y − r‖c‖, c = (1, 2).",
    )


def _hadamard() -> Tensor:
    """Four orthonormal columns with entries ±1/2."""
    h = _tensor((1.0, 1.0), (1.0, -1.0)) / sqrt(2)
    return torch.kron(h, h)


def _soft_threshold() -> Case:
    # XᵀX = I and everything active: the problem separates into |u| + λ/2 (u − b)², b = Xᵀy = (10, 0.5, −1),
    # λ = 1/2, so that u = sign(b) max(|b| − 1/λ, 0) = (8, 0, 0). Outside the range of X, y has 2 h₄ more:
    # ‖y − Xu‖² = 2² + 0.5² + 1² + 2²
    h = _hadamard()
    y = h @ _tensor((10.0,), (0.5,), (-1.0,), (2.0,))
    problem = LayerProblem(h[:, :3].contiguous(), y, form="ball", lam=0.5)
    return Case(
        "soft threshold",
        problem,
        8 + 0.25 * 9.25,
        _tensor((8.0, 0.0, 0.0)),
        "With orthonormal columns and everything active, lam asks for a soft threshold of Xᵀy at 1/λ.",
    )


def _linear() -> Case:
    # ‖Xu − y‖² = ‖u − Xᵀy‖² + 0.6², so the ball around b = (3, −2) has radius 0.8
    h = _hadamard()
    y = h @ _tensor((3.0,), (-2.0,), (0.6,), (0.0,))
    problem = LayerProblem(h[:, :2].contiguous(), y, form="linear", radius=1.0)
    t = 0.8 / sqrt(2)
    return Case(
        "linear layer",
        problem,
        5 - 0.8 * sqrt(2),
        _tensor((3 - t, t - 2)),
        "With orthonormal inputs the fit is a ball around Xᵀy of radius √(r² − ‖y − XXᵀy‖²) = 0.8.",
    )


def _one_active_sample() -> Case:
    # |x·u − 5| ≤ 1 costs (5 − 1)/max|x| on the largest entry; the inactive samples see u₂ = −1 with x₂ ≥ 0
    problem = LayerProblem(
        _tensor((1.0, -4.0, 2.0), (1.0, 1.0, -1.0), (-1.0, 0.5, 1.0)),
        _tensor((5.0,), (0.0,), (0.0,)),
        radius=1.0,
    )
    return Case(
        "one active sample",
        problem,
        1.0,
        _tensor((0.0, -1.0, 0.0)),
        "One equation within r: everything on the largest input, (y − r)/max|x|.",
    )


def _dead_neuron() -> Case:
    problem = LayerProblem(
        torch.eye(2, dtype=torch.float64), _tensor((3.0, 0.0), (4.0, 0.0)), form="halfspace", radius=1.0
    )
    t = 1 / sqrt(2)
    return Case(
        "dead neuron",
        problem,
        7 - sqrt(2),
        _tensor((3 - t, 4 - t), (0.0, 0.0)),
        "A neuron that never fires gets the zero row; the other is shrunk as in 'identity'.",
    )


def _zero() -> Case:
    problem = LayerProblem(torch.eye(2, dtype=torch.float64), _tensor((3.0,), (4.0,)), form="halfspace", radius=5.0)
    return Case("zero", problem, 0.0, _tensor((0.0, 0.0)), "r ≥ ‖Y_Ω‖ admits U = 0.")


def _ceiling() -> Case:
    # (1, 3) is feasible too, and its output error is 3: a positive ceiling promises √(r² + 3²), not r
    problem = LayerProblem(
        torch.eye(2, dtype=torch.float64),
        _tensor((1.0,), (0.0,)),
        form="halfspace",
        radius=0.5,
        ceiling=_tensor((0.0,), (3.0,)),
    )
    return Case("positive ceiling", problem, 0.5, _tensor((0.5, 0.0)), "|u₁ − 1| ≤ r, and u₂ ≤ 3 costs nothing.")


def _negative_ceiling() -> Case:
    problem = LayerProblem(
        torch.eye(2, dtype=torch.float64),
        _tensor((1.0,), (0.0,)),
        form="halfspace",
        radius=0.5,
        ceiling=_tensor((0.0,), (-2.0,)),
    )
    return Case("negative ceiling", problem, 2.5, _tensor((0.5, -2.0)), "|u₁ − 1| ≤ r, and u₂ ≤ −2 costs 2.")


def _versus(form: str) -> Case:
    # active sample (1, 0) with target 1, inactive sample (1, 1). Take u₁ = 1 − a, u₂ = −(1 − a − e): cost
    # 2 − 2a − e. Hard: e = 0, a = r. Soft: a² + e² = r² at (a, e) ∝ (2, 1), cost 2 − r√5
    problem = LayerProblem(_tensor((1.0, 0.0), (1.0, 1.0)), _tensor((1.0,), (0.0,)), form=form, radius=0.5)
    if form == "halfspace":
        return Case("halfspace versus ball", problem, 1.0, _tensor((0.5, -0.5)), "a = r, e = 0: 2(1 − r).")
    a, e = 1 / sqrt(5), 0.5 / sqrt(5)
    return Case(
        "ball versus halfspace",
        problem,
        2 - 0.5 * sqrt(5),
        _tensor((1 - a, a + e - 1)),
        "The inactive sample shares the ball: 2 − r√5 < 2(1 − r).",
    )


def _free_bias() -> Case:
    # the free bias centres inputs and targets: (−1, 0, 1) u against (−1, 0, 1), |u − 1|√2 ≤ r = √2/2
    problem = LayerProblem(
        _tensor((1.0, 1.0), (2.0, 1.0), (3.0, 1.0)),
        _tensor((5.0,), (6.0,), (7.0,)),
        radius=sqrt(0.5),
        penalty=torch.tensor([1.0, 0.0], dtype=torch.float64),
    )
    return Case(
        "free bias",
        problem,
        0.5,
        _tensor((0.5, 5.0)),
        "A free bias centres the data: |u − 1| ≤ r/√2, b = 6 − 2u.",
    )


def _constant_target() -> Case:
    problem = LayerProblem(
        _tensor((1.0, 1.0), (2.0, 1.0), (4.0, 1.0)),
        _tensor((5.0,), (5.0,), (5.0,)),
        radius=0.5,
        penalty=torch.tensor([1.0, 0.0], dtype=torch.float64),
    )
    return Case("constant target", problem, 0.0, None, "The free bias alone reproduces the targets, at cost 0.")


_FACTORIES: tuple[Callable[[], Case], ...] = (
    _identity,
    _joint_ball,
    _per_neuron,
    _scalar,
    _weighted,
    _soft_threshold,
    _linear,
    _one_active_sample,
    _dead_neuron,
    _zero,
    _ceiling,
    _negative_ceiling,
    partial(_versus, "ball"),
    partial(_versus, "halfspace"),
    _free_bias,
    _constant_target,
)

#: name -> factory of a problem with a known optimum
CASES: dict[str, Callable[[], Case]] = {factory().name: factory for factory in _FACTORIES}

#: name -> what is awkward about a random layer of that kind
KINDS: dict[str, str] = {
    "plain": "nothing",
    "rank-deficient": "XᵀX is singular",
    "constant column": "a penalised bias column",
    "dead input": "one input is always 0",
    "dead neuron": "one neuron never fires",
    "all active": "no inactive sample",
    "few samples": "P < N",
    "one sample": "P = 1",
    "scaled 1e6": "the inputs are a million times larger",
    "scaled 1e-6": "the inputs are a million times smaller",
    "scaled columns": "one column is 10⁴ times larger, one 10⁴ times smaller",
    "free bias": "a bias column with penalty 0",
    "ceiling": "a ceiling that is positive in places and never negative",
    "cascade": "Net-Trim's own ceiling: the dense weights on perturbed inputs, of either sign",
    "tiny radius": "epsilon = 1e-4",
}


def random_layer(
    kind: str,
    seed: int,
    *,
    form: str | None = None,
    epsilon: float = 0.1,
    lam: float | None = None,
    per_neuron: bool = False,
) -> LayerProblem:
    """Return the problem of pruning a random dense layer ``Y = ReLU(X Wᵀ)``, whose own weight is feasible.

    Parameters
    ----------
    kind : str
        A name in `KINDS`.
    seed : int
        Of the generator that draws inputs and weights.
    form : {"ball", "halfspace", "linear"}, optional
        ``halfspace`` for the two kinds with a ceiling, else ``ball``. ``linear`` takes the outputs before the
        ReLU.
    epsilon : float
        Relative radius; "tiny radius" has its own, "cascade" at least what makes the dense weight feasible.
    lam : float, optional
        Ask for the regularised twin, of ``λ = lam``, instead.
    per_neuron : bool
        One ball per neuron.

    Raises
    ------
    UnknownNameError
        `kind` is not in `KINDS`.
    """
    x, w, seen = _draw(kind, seed)
    form = form or ("halfspace" if kind in ("ceiling", "cascade") else "ball")
    y = seen @ w.T
    ceiling = None
    if form != "linear":
        if kind == "ceiling":
            ceiling = torch.rand(y.shape, generator=torch.Generator().manual_seed(seed + 1), dtype=y.dtype)
            ceiling = (ceiling - 0.5).clamp(min=0) * y.std()
        if kind == "cascade":
            ceiling = x @ w.T
        y = y.clamp(min=0)
    penalty = torch.ones(x.shape[1], dtype=x.dtype)
    if kind == "free bias":
        penalty[-1] = 0
    if lam is not None:
        return build_problem(x, y, lam=lam, form=form, ceiling=ceiling, penalty=penalty)
    dim = 0 if per_neuron else None
    radius = (1e-4 if kind == "tiny radius" else epsilon) * torch.linalg.vector_norm(y, dim=dim)
    moved = torch.linalg.vector_norm((x - seen) @ w.T, dim=dim)  # 0 where nothing is perturbed
    radius = torch.maximum(radius, 1.1 * moved)
    return build_problem(
        x, y, radius=radius if per_neuron else float(radius), form=form, ceiling=ceiling, penalty=penalty
    )


def dense_weight(kind: str, seed: int) -> Tensor:
    """Return the weight ``W (M, N)`` of the dense layer behind ``random_layer(kind, seed)``, feasible."""
    return _draw(kind, seed)[1]


def _draw(kind: str, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the inputs, the dense weight, and the inputs that the dense layer saw (others in a cascade)."""
    if kind not in KINDS:
        raise UnknownNameError(f"kind={kind!r} is unknown: use one of {', '.join(KINDS)}.")
    generator = torch.Generator().manual_seed(seed)
    draw = partial(torch.randn, generator=generator, dtype=torch.float64)
    samples, n, m = {"few samples": 5, "one sample": 1}.get(kind, 40), 8, 4
    x, w = draw(samples, n), draw(m, n)
    seen: Tensor | None = None
    if kind == "rank-deficient":
        x = x[:, :3] @ draw(3, n)
    elif kind in ("constant column", "free bias"):
        x[:, -1] = 1
    elif kind == "dead input":
        x[:, 2] = 0
    elif kind == "dead neuron":
        x, w[1] = x.abs(), -w[1].abs()
    elif kind == "all active":
        x, w = x.abs(), w.abs()
    elif kind == "one sample":
        w[0] *= float(torch.sign(x[0] @ w[0]))
    elif kind in ("scaled 1e6", "scaled 1e-6"):
        factor = float(kind.removeprefix("scaled "))
        x, w = x * factor, w / factor
    elif kind == "scaled columns":
        factors = torch.ones(n, dtype=torch.float64)
        factors[0], factors[1] = 1e4, 1e-4
        x, w = x * factors, w / factors
    elif kind == "cascade":
        # inputs that are outputs of a ReLU, as in a chain: what lies below every ceiling has an interior
        seen = x.abs()
        x = (seen + 0.2 * draw(samples, n)).clamp(min=0)
    return x, w, x if seen is None else seen
