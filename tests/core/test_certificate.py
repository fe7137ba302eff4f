"""The lower bound holds for any multipliers, is the best that scaling gives, and follows the units."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import distance, dual_bound, numbers, objective, violation
from scipy.optimize import minimize

from nettrim.core import certificate
from nettrim.core.cases import CASES, KINDS, dense_weight, random_layer
from nettrim.core.certificate import certify, feasible_multipliers, measure_fit
from nettrim.core.problem import LayerProblem
from nettrim.errors import ProblemError

SEEDED = settings(derandomize=True, database=None, deadline=None, max_examples=150)
AMOUNTS = ("joint", "per-neuron", "lam")
FORMS = ("ball", "halfspace", "linear")
CANDIDATES = ("noise", "residual", "both")


def layer(kind: str, form: str, amount: str, seed: int) -> LayerProblem:
    # the size of λ that goes with a radius of 0.1‖Y‖ or so, in the units of that kind
    lam = None
    if amount == "lam":
        x, y = random_layer(kind, seed, form=form, epsilon=1.0).inputs, random_layer(kind, seed, form=form).targets
        lam = 50.0 / float((x.T @ y).abs().max())
    return random_layer(kind, seed, form=form, lam=lam, per_neuron=amount == "per-neuron")


def candidate(problem: LayerProblem, w: torch.Tensor, how: str, seed: int) -> torch.Tensor:
    """Multipliers of every quality: noise gives poor bounds, the residual of a shrunk dense weight good ones."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(problem.targets.shape, generator=generator, dtype=torch.float64)
    good = -problem.residual(problem.inputs @ (0.8 * w).T)
    return {"noise": noise, "residual": good, "both": good + 0.3 * good.std() * noise}[how]


def feasible_points(problem: LayerProblem, w: torch.Tensor, seed: int) -> list[torch.Tensor]:
    """The dense weight, and points as far from it as the constraint allows in four directions (towards 0 first)."""
    generator = torch.Generator().manual_seed(seed)
    points = [w]
    for i in range(4):
        noise = torch.randn(w.shape, generator=generator, dtype=w.dtype) * w.abs().mean(0)
        step, direction = 1.0, -w if i == 0 else noise - w
        while violation(problem, w + step * direction) > 1e-12 and step > 1e-9:
            step /= 2
        if step > 1e-9:
            points.append(w + step * direction)
    return points


layers = {
    "kind": st.sampled_from(list(KINDS)),
    "form": st.sampled_from(FORMS),
    "amount": st.sampled_from(AMOUNTS),
    "seed": st.integers(0, 10_000),
}


@SEEDED
@given(**layers, how=st.sampled_from(CANDIDATES))
def test_no_feasible_point_is_below_the_bound(kind, form, amount, seed, how):
    problem, w = layer(kind, form, amount, seed), dense_weight(kind, seed)
    bound = feasible_multipliers(problem, candidate(problem, w, how, seed)).bound
    for point in feasible_points(problem, w, seed):
        assert bound <= objective(problem, point) * (1 + 1e-9)


@SEEDED
@given(**layers, how=st.sampled_from(CANDIDATES))
def test_feasible_multipliers_are_feasible_and_give_their_bound(kind, form, amount, seed, how):
    problem, w = layer(kind, form, amount, seed), dense_weight(kind, seed)
    dual = feasible_multipliers(problem, candidate(problem, w, how, seed))
    plain = dual_bound(problem, dual.multipliers)
    size = float((dual.multipliers * problem.anchor).abs().sum())
    assert plain == pytest.approx(dual.bound, rel=1e-9, abs=1e-9 * size + 1e-300)
    # what is feasible and best stays as it is
    again = feasible_multipliers(problem, dual.multipliers)
    assert again.bound == pytest.approx(dual.bound, rel=1e-9, abs=1e-9 * size + 1e-300)


def test_the_bounds_above_are_not_vacuous():
    positive = [
        feasible_multipliers(p, candidate(p, dense_weight(kind, 0), "residual", 0)).bound > 0
        for kind in KINDS
        for form in FORMS
        for p in (layer(kind, form, amount, 0) for amount in AMOUNTS)
    ]
    assert sum(positive) > 0.8 * len(positive)


def best_bound(problem: LayerProblem, gamma: torch.Tensor) -> float:
    """The best bound over the scales of the neurons, by a general-purpose solver (signs must be right already)."""
    n, g = numbers(problem), gamma.numpy()
    gain = (g * n.t).sum(axis=0)
    norm = ((g if problem.form != "halfspace" else np.where(n.active, g, 0)) ** 2).sum(axis=0) ** 0.5
    pull = np.abs(n.x.T @ g)
    top = np.divide(n.c, pull, out=np.full_like(pull, np.inf), where=pull > 0).min(axis=0)
    top[np.isinf(top)] = 0  # a neuron without multipliers

    def loss(s):  # s in [0, 1]: the fraction of the largest scale
        t = s * top
        if problem.lam is not None:
            return ((t * norm) ** 2).sum() / (2 * problem.lam) - (t * gain).sum()
        if problem.per_neuron:
            return (problem.radius.numpy() * t * norm).sum() - (t * gain).sum()
        return problem.radius * np.sqrt(((t * norm) ** 2).sum()) - (t * gain).sum()

    starts = [np.full(len(top), s) for s in (1.0, 0.5, 0.01)]
    options = {"ftol": 1e-15, "gtol": 1e-12, "maxiter": 2000}
    found = [minimize(loss, s, method="L-BFGS-B", bounds=[(0, 1)] * len(top), options=options).fun for s in starts]
    return float(max(0.0, -min(found)))


@SEEDED
@given(
    kind=st.sampled_from(["plain", "all active", "rank-deficient", "few samples", "ceiling", "scaled 1e6"]),
    form=st.sampled_from(FORMS),
    amount=st.sampled_from(AMOUNTS),
    seed=st.integers(0, 10_000),
    factor=st.sampled_from([0.01, 0.1, 1.0, 3.0]),
    how=st.sampled_from(CANDIDATES),
)
def test_the_scales_are_the_best(kind, form, amount, seed, factor, how):
    base, w = layer(kind, form, amount, seed), dense_weight(kind, seed)
    # amounts of every size, so that all, some or none of the neurons reach their largest scale
    radius = None if base.radius is None else factor * base.radius
    lam = None if base.lam is None else factor * base.lam
    problem = LayerProblem(base.inputs, base.targets, form, radius, lam, ceiling=base.ceiling)
    # neurons of different quality, so that the largest scales are not all the best
    generator = torch.Generator().manual_seed(seed)
    sizes = 10 ** torch.randn(problem.n_outputs, generator=generator, dtype=torch.float64)
    gamma = candidate(problem, w, how, seed) * sizes
    if form != "linear":
        gamma = torch.where(problem.active, gamma, gamma.clamp(max=0))
    best = best_bound(problem, gamma)
    assert feasible_multipliers(problem, gamma).bound == pytest.approx(best, rel=1e-5, abs=1e-12)


def test_a_neuron_without_active_samples_costs_no_radius_under_a_hard_ceiling():
    def tensor(*rows):
        return torch.tensor(rows, dtype=torch.float64)

    x, y, ceiling = tensor([1.0, 0.0], [0.0, 1.0]), tensor([1.0, 0.0], [0.0, 0.0]), tensor([0.0, -1.0], [0.0, -2.0])
    problem = LayerProblem(x, y, "halfspace", 0.5, ceiling=ceiling)
    # the first neuron pays r: 1 − 0.5; the second must reach −1 and −2
    assert feasible_multipliers(problem, tensor([7.0, -4.0], [0.0, -4.0])).bound == pytest.approx(3.5)
    assert certify(problem, tensor([0.5, 0.0], [-1.0, -2.0]), tensor([1.0, -1.0], [0.0, -1.0])).gap <= 1e-12


@pytest.mark.parametrize("name", ["identity", "joint ball", "per-neuron balls", "linear layer", "soft threshold"])
def test_the_residual_certifies_an_optimal_weight(name):
    case = CASES[name]()
    found = certify(case.problem, case.weight)
    assert found.gap == pytest.approx(0, abs=1e-9)
    assert found.lower_bound == pytest.approx(case.optimum)
    assert found.violation <= 1e-12


@pytest.mark.parametrize("name", [name for name, make in CASES.items() if make().weight is not None])
def test_certify_agrees_with_the_oracle(name):
    case = CASES[name]()
    for weight in (case.weight, case.weight.numpy() + 0.125, case.weight.float()):
        found = certify(case.problem, weight)
        assert found.objective == pytest.approx(objective(case.problem, weight), rel=1e-12)
        assert found.distance == pytest.approx(distance(case.problem, weight), rel=1e-12, abs=1e-12)
        assert found.violation == pytest.approx(violation(case.problem, weight), rel=1e-12, abs=1e-12)


@SEEDED
@given(**layers, a=st.sampled_from([1e-3, 2.0, 1e4]), b=st.sampled_from([1e-4, 3.0, 1e3]))
def test_units_do_not_matter(kind, form, amount, seed, a, b):
    problem, w = layer(kind, form, amount, seed), 0.9 * dense_weight(kind, seed)
    scaled = LayerProblem(
        a * problem.inputs,
        b * problem.targets,
        form,
        None if problem.radius is None else b * problem.radius,
        None if problem.lam is None else problem.lam / (a * b),
        None if problem.ceiling is None else b * problem.ceiling,
        problem.penalty,
    )
    one, other = certify(problem, w), certify(scaled, (b / a) * w)
    for name, unit in (("objective", b / a), ("lower_bound", b / a), ("gap", 1), ("violation", 1), ("distance", b)):
        expected = unit * getattr(one, name)
        slack = 1e-8 * (unit * one.objective if name == "lower_bound" else unit)
        assert getattr(other, name) == pytest.approx(expected, rel=1e-8, abs=slack), name


@pytest.mark.parametrize("rows", [1, 7, 40])
@pytest.mark.parametrize("kind", ["plain", "free bias", "cascade"])
@pytest.mark.parametrize("form", FORMS)
def test_chunks_of_rows_do_not_matter(monkeypatch, form, kind, rows):
    problem, w = random_layer(kind, 0, form=form), 0.9 * dense_weight(kind, 0)
    whole = certify(problem, w)
    monkeypatch.setattr(certificate, "_ROWS", rows)
    parts = certify(problem, w)
    for name in ("objective", "lower_bound", "gap", "violation", "distance"):
        assert getattr(parts, name) == pytest.approx(getattr(whole, name), rel=1e-12), name


@SEEDED
@given(kind=layers["kind"], seed=layers["seed"], size=st.floats(0, 2), amount=layers["amount"])
def test_the_ball_bounds_the_output_error(kind, seed, size, amount):
    """Proposition 1 of the paper, for the ball form: ‖ReLU(Z) − Y‖ ≤ dist(Z, K), whatever the weight."""
    problem = random_layer(kind, seed, form="ball", per_neuron=amount == "per-neuron")
    problem = LayerProblem(problem.inputs, problem.targets, radius=problem.radius)  # without a ceiling
    generator = torch.Generator().manual_seed(seed)
    w = dense_weight(kind, seed)
    u = size * w + (1 - size) * torch.randn(w.shape, generator=generator, dtype=w.dtype) * w.abs().mean(0)
    error = torch.linalg.vector_norm((problem.inputs @ u.T).clamp(min=0) - problem.targets)
    assert float(error) <= measure_fit(problem, u).distance * (1 + 1e-12)


@SEEDED
@given(kind=layers["kind"], seed=layers["seed"])
def test_the_halfspace_bounds_the_output_error_up_to_its_ceiling(kind, seed):
    problem = random_layer(kind, seed, form="halfspace")
    above = torch.zeros_like(problem.targets) if problem.ceiling is None else problem.ceiling.clamp(min=0)
    extra = float((torch.where(problem.active, 0.0, above) ** 2).sum())
    for u in feasible_points(problem, dense_weight(kind, seed), seed):
        error = float((((problem.inputs @ u.T).clamp(min=0) - problem.targets) ** 2).sum())
        assert error <= (measure_fit(problem, u).distance ** 2 + extra) * (1 + 1e-9) + 1e-20


def test_the_ceiling_bound_is_attained():
    problem = CASES["positive ceiling"]().problem
    u = torch.tensor([[1.0, 3.0]], dtype=torch.float64)
    fit = measure_fit(problem, u)
    assert (fit.distance, fit.violation) == (0.0, 0.0)
    assert float(torch.linalg.vector_norm((problem.inputs @ u.T).clamp(min=0) - problem.targets)) == 3.0


@SEEDED
@given(kind=layers["kind"], seed=layers["seed"], amount=st.sampled_from(["joint", "per-neuron"]))
def test_what_meets_the_halfspace_meets_the_ball(kind, seed, amount):
    hard = random_layer(kind, seed, form="halfspace", per_neuron=amount == "per-neuron")
    hard = LayerProblem(hard.inputs, hard.targets, "halfspace", radius=hard.radius)  # V = 0
    soft = LayerProblem(hard.inputs, hard.targets, "ball", radius=hard.radius)
    points = feasible_points(hard, dense_weight(kind, seed), seed)
    assert all(measure_fit(soft, u).violation <= measure_fit(hard, u).violation + 1e-12 for u in points)


@pytest.mark.parametrize("amount", AMOUNTS)
@pytest.mark.parametrize("form", ["ball", "halfspace"])
def test_a_free_bias_that_cannot_be_centred_adds_nothing_and_says_so(form, amount):
    """Without active samples Γ ≤ 0 everywhere and ΣΓ = 0 leave Γ = 0 alone."""
    base = layer("free bias", form, amount, 1)
    y = base.targets.clone()
    y[:, 2] = 0
    problem = LayerProblem(base.inputs, y, form, base.radius, base.lam, penalty=base.penalty)
    gamma = -problem.residual(0.8 * problem.inputs @ dense_weight("free bias", 1).T)
    dual = feasible_multipliers(problem, gamma)
    assert "1 of 4 neurons" in dual.note
    assert not dual.multipliers[:, 2].any()
    assert dual.multipliers[:, 0].any()
    assert dual_bound(problem, dual.multipliers) == pytest.approx(dual.bound)
    w = dense_weight("free bias", 1)
    w[2] = 0
    assert violation(problem, w) < 1e-12
    assert dual.bound <= objective(problem, w)
    assert certify(problem, w, gamma).note == dual.note


@settings(SEEDED, max_examples=60)
@given(form=layers["form"], amount=layers["amount"], seed=layers["seed"], share=st.sampled_from([0.2, 0.6, 1.0]))
def test_any_pattern_of_free_weights(form, amount, seed, share):
    base, w = layer("plain", form, amount, seed), dense_weight("plain", seed)
    generator = torch.Generator().manual_seed(seed)
    penalty = (torch.rand(w.shape, generator=generator, dtype=w.dtype) - share).clamp(min=0)
    problem = LayerProblem(base.inputs, base.targets, form, base.radius, base.lam, penalty=penalty)
    dual = feasible_multipliers(problem, candidate(problem, w, "both", seed))
    assert dual.note == ""  # there are active samples enough to centre on
    assert dual_bound(problem, dual.multipliers) == pytest.approx(dual.bound, rel=1e-9, abs=1e-12)
    for point in feasible_points(problem, w, seed):
        assert dual.bound <= objective(problem, point) * (1 + 1e-9) + 1e-12


def test_free_columns_are_centred_by_the_smallest_change():
    base, w = random_layer("plain", 0), dense_weight("plain", 0)
    penalty = torch.ones_like(w)
    penalty[0, [1, 4]] = penalty[1, 4] = penalty[2, 0] = 0
    problem = LayerProblem(base.inputs, base.targets, "ball", base.radius, penalty=penalty)
    gamma = candidate(problem, w, "residual", 0)
    found = feasible_multipliers(problem, gamma).multipliers.numpy()
    for m in range(4):
        column, on = gamma[:, m].numpy().copy(), problem.active[:, m].numpy()
        free = problem.inputs[:, penalty[m] == 0].numpy()
        if free.size:
            # the nearest point on the plane (free columns)ᵀγ = 0 that moves nothing off the active set
            column[on] -= np.linalg.pinv(free[on].T) @ (free.T @ column)
        cosine = column @ found[:, m] / np.linalg.norm(column) / np.linalg.norm(found[:, m])
        assert cosine == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize("form", FORMS)
def test_zero_multipliers_give_the_bound_zero(form):
    problem = random_layer("plain", 0, form=form)
    found = certify(problem, dense_weight("plain", 0), torch.zeros(40, 4))
    assert found.lower_bound == 0.0
    assert found.gap == 1.0


def test_gap_of_the_zero_weight():
    problem = CASES["zero"]().problem
    zero = torch.zeros(1, 2)
    assert certify(problem, zero).gap == 0.0
    impossible = LayerProblem(problem.inputs, problem.targets, radius=1.0)
    found = certify(impossible, zero)  # infeasible, with an objective below the optimum: the violation says so
    assert found.gap <= 0
    assert found.violation == pytest.approx(4.0)


@pytest.mark.parametrize("name", ["weight", "multipliers"])
def test_certify_refuses_other_shapes_and_nan(name):
    problem = CASES["identity"]().problem
    good = {"weight": torch.zeros(1, 4), "multipliers": torch.zeros(4, 1)}
    with pytest.raises(ProblemError, match=rf"{name} has shape \(2, 2\): the problem needs"):
        certify(problem, **{**good, name: torch.zeros(2, 2)})
    with pytest.raises(ProblemError, match=f"{name} holds 4 NaN"):
        certify(problem, **{**good, name: good[name] * torch.nan})


def test_nearly_equal_free_columns_prove_nothing():
    """Centring to the accuracy of the columns' difference is no centring: the optimum here is 0."""
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(50, 1, generator=generator, dtype=torch.float64)
    ones = torch.ones(50, 1, dtype=torch.float64)
    x = torch.cat([torch.randn(50, 2, generator=generator, dtype=torch.float64), ones, ones + 1e-11 * z], 1)
    penalty = torch.tensor([1.0, 1.0, 0.0, 0.0])
    problem = LayerProblem(x, z, "linear", radius=0.1, penalty=penalty)
    exact = torch.tensor([[0.0, 0.0, -1e11, 1e11]], dtype=torch.float64)
    certificate = certify(problem, exact, z - z.mean())
    assert certificate.objective == 0
    assert certificate.lower_bound <= 0


def test_overflown_multipliers_prove_nothing():
    problem = LayerProblem(torch.eye(2).double(), torch.ones(2, 1).double(), radius=0.1)
    gamma = torch.full((2, 1), 1e200, dtype=torch.float64)
    assert feasible_multipliers(problem, gamma).bound == 0.0


def test_inputs_that_are_all_zero_give_no_bound_by_rounding():
    """Every Γ is feasible there, and only what is left after cancelling counts."""
    problem = LayerProblem(torch.zeros(40, 3).double(), torch.rand(40, 5).double(), radius=9.0)
    zero = torch.zeros(5, 3, dtype=torch.float64)
    certificate = certify(problem, zero, torch.rand(40, 5).double())
    assert certificate.violation == 0
    assert certificate.lower_bound == 0
