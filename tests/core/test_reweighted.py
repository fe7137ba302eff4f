"""Reweighted ℓ1 to an exact count: the count, the free columns, the evidence, and that reweighting is worth it."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import array, distance, residual

import nettrim
from nettrim.core.cases import KINDS, random_layer
from nettrim.core.onesided import OneSided
from nettrim.core.problem import LayerProblem
from nettrim.core.reweighted import reweighted
from nettrim.errors import NetTrimError, ProblemError

SEED = st.integers(0, 10_000)


def draw(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def planted(seed, noise=0.0, samples=120, columns=16, neurons=5):
    """A ReLU layer whose dense weight is sparse, plus small entries everywhere: which are which is the question."""
    x = draw(seed, samples, columns) @ (torch.eye(columns).double() + 0.35 * draw(seed + 1, columns, columns))
    truth = draw(seed + 2, neurons, columns)
    truth = truth.sign() * (truth.abs() + 0.5) * (draw(seed + 3, neurons, columns) > 0.5)
    z = x @ (truth + noise * draw(seed + 4, neurons, columns)).T
    return LayerProblem(x, z.clamp(min=0), "ball", 1.0), truth


def size_of(problem):
    return float(problem.targets.norm())


def refit_error(problem, mask):
    """The least one-sided distance on a support."""
    start = torch.zeros(mask.shape, dtype=torch.float64)
    return float(OneSided.of(problem, torch.float64).fit(start, mask, 60)[1].sum()) ** 0.5


@settings(derandomize=True, database=None, deadline=None, max_examples=40)
@given(
    kind=st.sampled_from(sorted(KINDS)),
    form=st.sampled_from(["ball", "linear"]),
    seed=SEED,
    what=st.sampled_from(["one", "some", "all"]),
    epsilon=st.sampled_from([0.02, 0.3, 1.5]),
)
def test_exactly_the_count_is_kept_and_what_is_said_of_it_is_so(kind, form, seed, what, epsilon):
    base = random_layer(kind, seed, form=form)
    problem = LayerProblem(base.inputs, base.targets, form, 1.0, ceiling=base.ceiling, penalty=base.penalty)
    free = (problem.penalty == 0).all(0)
    available = 4 * int((~free).sum())
    kept = {"one": 1, "some": 1 + seed % available, "all": available}[what]
    found = reweighted(problem, kept=kept, rounds=3, epsilon=epsilon)
    assert found.kept == kept
    assert int(found.mask[:, ~free].sum()) == kept
    assert found.mask[:, free].all()
    assert not found.weight[~found.mask].any()
    assert found.weight.isfinite().all()
    assert found.distance == pytest.approx(distance(problem, found.weight), rel=1e-9, abs=1e-9 * size_of(problem))
    assert np.linalg.norm(residual(problem, found.weight)) == pytest.approx(found.distance, rel=1e-9)
    assert found.distance <= refit_error(problem, found.mask) * (1 + 1e-2) + 1e-6 * size_of(problem)
    assert len(found.history) == 3
    if form == "ball" and problem.ceiling is None:
        error = np.maximum(array(problem.inputs) @ array(found.weight).T, 0) - array(problem.targets)
        assert np.linalg.norm(error) <= found.distance * (1 + 1e-12) + 1e-14 * size_of(problem)


def test_reweighting_beats_the_largest_of_plain_l1_refitted():
    """Better in the mean of eight planted layers, and hardly worse on any: ℓ1 alone shrinks what it should keep."""
    ratios = []
    for seed in range(8):
        problem, truth = planted(seed, noise=0.03)
        kept = int((truth != 0).sum())
        radius = 0.1 * size_of(problem)
        plain = nettrim.solve_problem(problem.with_radius(radius), tol=1e-3).weight.abs().flatten()
        mask = torch.zeros(plain.numel(), dtype=torch.bool)
        mask[plain.argsort(descending=True, stable=True)[:kept]] = True
        ratios.append(reweighted(problem, kept=kept).distance / refit_error(problem, mask.view(truth.shape)))
    assert max(ratios) < 1.1
    assert np.mean(ratios) < 0.97


@pytest.mark.parametrize("seed", range(3))
def test_a_planted_truth_is_recovered(seed):
    problem, truth = planted(seed)
    found = reweighted(problem, kept=int((truth != 0).sum()), epsilon=0.02)
    assert torch.equal(found.mask, truth != 0)
    torch.testing.assert_close(found.weight, truth, rtol=1e-4, atol=1e-4)


def test_a_free_bias_is_fitted_and_not_counted():
    x = torch.cat([draw(0, 100, 6), torch.ones(100, 1).double()], 1)
    w = draw(1, 4, 7)
    w[:, -1] = 2.0
    penalty = torch.ones(7).double()
    penalty[-1] = 0
    problem = LayerProblem(x, (x @ w.T).clamp(min=0), "ball", 1.0, penalty=penalty)
    found = reweighted(problem, kept=6)
    assert int((found.weight[:, :-1] != 0).sum()) == 6
    assert (found.weight[:, -1] != 0).all()


def test_each_round_weighs_by_the_last_and_leaves_free_columns_free(monkeypatch):
    """``c = s/(|u| + s/10)`` with ``s`` the mean kept weight: at most 10, small where the weight is large."""
    solved = []

    def watched(problem, *args, **kwargs):
        solution = nettrim.solve_problem(problem, *args, **kwargs)
        solved.append((problem, solution))
        return solution

    monkeypatch.setattr("nettrim.core.reweighted.solve_problem", watched)
    base = random_layer("free bias", 2)
    reweighted(LayerProblem(base.inputs, base.targets, "ball", 1.0, penalty=base.penalty), kept=10, rounds=4)
    assert len(solved) == 4
    assert torch.equal(solved[0][0].penalty, base.penalty)
    for (_, before), (problem, _) in pairwise(solved):
        size = before.weight.abs()[:, :-1]
        typical = size[size > 0].mean()
        torch.testing.assert_close(problem.penalty[:, :-1], typical / (size + 0.1 * typical))
        assert not problem.penalty[:, -1].any()


def test_the_evidence_bounds_as_that_of_refine_does():
    problem, _ = planted(3, noise=0.05)
    found = reweighted(problem, kept=20)
    evidence = found.certify(tol=1e-4)
    own = float(found.weight.abs().sum())
    assert 0 < evidence.certificate.lower_bound <= own
    assert 0 <= evidence.nearest <= found.distance
    best = nettrim.solve_problem(problem.with_radius(found.distance), "clarabel", tol=1e-4)
    assert evidence.certificate.lower_bound <= float(best.weight.abs().sum()) * (1 + 1e-5)


def test_the_rounded_weight_is_the_one_that_is_measured():
    problem, _ = planted(2, noise=0.05)
    found = reweighted(problem, kept=20, rounds=2, round_to=torch.bfloat16)
    assert torch.equal(found.weight.bfloat16().double(), found.weight)
    assert found.distance == pytest.approx(distance(problem, found.weight), rel=1e-12)


def test_targets_that_are_all_zero_keep_their_count():
    """A layer that never fires on these samples: any weight that stays below the ceiling is right."""
    x = draw(0, 30, 5).abs()
    found = reweighted(LayerProblem(x, torch.zeros(30, 3).double(), "ball", 1.0), kept=4, rounds=2)
    assert found.kept == int(found.mask.sum()) == 4
    assert found.distance == pytest.approx(0, abs=1e-9)


def test_two_runs_agree_to_the_bit_and_the_problem_is_left_alone():
    problem, _ = planted(1, noise=0.1)
    given_ = problem.inputs, problem.targets, problem.penalty
    before = [t.clone() for t in given_]
    one, two = reweighted(problem, kept=17, rounds=3), reweighted(problem, kept=17, rounds=3)
    assert torch.equal(one.weight, two.weight)
    assert one.history == two.history
    assert all(
        torch.equal(a, b) for a, b in zip(before, (problem.inputs, problem.targets, problem.penalty), strict=True)
    )
    assert problem.radius == 1.0


REFUSALS = {
    "kept 0": ({"kept": 0}, "kept=0"),
    "kept too many": ({"kept": 81}, "kept=81 is out of range: the layer has 80"),
    "kept nan": ({"kept": math.nan}, "kept=nan"),
    "rounds": ({"rounds": 0}, "rounds=0"),
    "rounds half": ({"rounds": 1.5}, "rounds=1.5"),
    "epsilon": ({"epsilon": 0.0}, "epsilon=0"),
    "epsilon negative": ({"epsilon": -0.1}, "epsilon=-0.1"),
    "epsilon nan": ({"epsilon": math.nan}, "epsilon=nan"),
    "tol": ({"tol": 0}, "tol=0"),
    "solver": ({"solver": "best"}, "solver='best'"),
}


@pytest.mark.parametrize(("arguments", "text"), REFUSALS.values(), ids=REFUSALS)
def test_refused_in_one_sentence(arguments, text):
    problem, _ = planted(0)
    with pytest.raises(NetTrimError, match=text) as caught:
        reweighted(problem, **({"kept": 5} | arguments))
    assert str(caught.value).count("\n") == 0


def test_half_spaces_are_refused():
    problem, _ = planted(0)
    hard = LayerProblem(problem.inputs, problem.targets, "halfspace", 1.0)
    with pytest.raises(ProblemError, match="form='halfspace' has no exact count: use form='ball'"):
        reweighted(hard, kept=5)


def test_whole_floats_are_counts():
    problem, _ = planted(0)
    assert torch.equal(reweighted(problem, kept=9.0, rounds=2.0).mask, reweighted(problem, kept=9, rounds=2).mask)


def test_a_first_radius_that_gives_nothing_is_not_the_last_word():
    """Everything is zero in the first round: the penalties of the second must not all be free."""
    problem, truth = planted(4)
    kept = int((truth != 0).sum())
    found = reweighted(problem, kept=kept, epsilon=2.0)
    assert found.history["kept in round 1"] == 0
    assert found.distance < 0.2 * size_of(problem)
