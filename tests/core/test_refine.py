"""`refine`: the count is exact, the start is never made worse, what it states is so, and both bounds are bounds."""

from __future__ import annotations

import math
from itertools import combinations, pairwise

import cvxpy as cp
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import array, distance, numbers, residual

import nettrim
from nettrim.core.cases import KINDS, dense_weight, random_layer
from nettrim.core.certificate import certify
from nettrim.core.onesided import OneSided
from nettrim.core.problem import LayerProblem
from nettrim.core.refine import evidence_of, neuron_importance, refine
from nettrim.errors import ProblemError
from nettrim.methods.base import LayerTask

SEEDED = settings(derandomize=True, database=None, deadline=None, max_examples=60)
KIND = st.sampled_from(sorted(KINDS))
FORMS = st.sampled_from(["ball", "linear"])
SEED = st.integers(0, 10_000)


def draw(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def like_trained(seed, samples=300, columns=24, neurons=10, bias=0.8):
    """A layer as training makes them: correlated non-negative inputs, few large weights, three samples in four idle."""
    x = (draw(seed, samples, 8) @ draw(seed + 1, 8, columns) + 0.3 * draw(seed + 2, samples, columns)).clamp(min=0)
    w = draw(seed + 3, neurons, columns) * draw(seed + 4, neurons, columns).abs() ** 1.5
    shift = -bias * (x @ w.T).std(0)
    x = torch.cat([x, torch.ones(samples, 1, dtype=torch.float64)], 1)
    return x, torch.cat([w, shift[:, None]], 1)


def problem_of(x, w, form="ball", free_bias=True):
    z = x @ w.T
    penalty = torch.ones(x.shape[1], dtype=torch.float64)
    penalty[-1] = 0.0 if free_bias else 1.0
    return LayerProblem(x, z.clamp(min=0) if form == "ball" else z, form, 1.0, penalty=penalty)


def free_of(problem):
    return (problem.penalty == 0).all(0)


def magnitude_start(w, kept, free):
    scores = torch.where(free, -1.0, w.abs()).flatten()
    mask = torch.zeros(w.numel(), dtype=torch.bool)
    mask[scores.argsort(descending=True, stable=True)[:kept]] = True
    return torch.where(mask.view(w.shape) | free, w, 0.0)


def refitted(problem, start, metric=None):
    """The best weight on a start's own support, by many Newton steps, and in the metric by many sweeps."""
    layer, mask = OneSided.of(problem, torch.float64), (start != 0) | free_of(problem)
    weight = layer.fit(start, mask, 60)[0]
    return weight if metric is None else layer.balance(weight, mask, metric, 30)


def weighted(problem, weight, metric):
    e = residual(problem, weight)
    return float(np.einsum("pi,ij,pj->", e, np.asarray(metric), e))


def size_of(problem):
    return float(np.linalg.norm(numbers(problem).t))


def random_metric(seed, neurons, rank=3):
    a = draw(seed, rank, neurons)
    return a.T @ a + 0.05 * torch.eye(neurons).double()


# ---- the count


@settings(SEEDED, max_examples=120)
@given(
    kind=KIND,
    form=FORMS,
    seed=SEED,
    what=st.sampled_from(["one", "some", "all"]),
    begin=st.sampled_from(["dense", "noise", "zero", "sparse"]),
    importance=st.sampled_from([None, "vector", "matrix"]),
    headroom=st.sampled_from([1, 1.5, 7.3]),
    steps=st.integers(1, 3),
    swaps=st.integers(0, 1),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
def test_exactly_the_count_is_kept_and_what_is_said_of_it_is_so(
    kind, form, seed, what, begin, importance, headroom, steps, swaps, dtype
):
    base = random_layer(kind, seed, form=form)
    problem = LayerProblem(
        base.inputs.to(dtype),
        base.targets.to(dtype),
        form,
        1.0,
        ceiling=None if base.ceiling is None else base.ceiling.to(dtype),
        penalty=base.penalty,
    )
    free = free_of(problem)
    available = 4 * int((~free).sum())
    kept = {"one": 1, "some": 1 + seed % available, "all": available}[what]
    dense = dense_weight(kind, seed)
    start = {
        "dense": dense,
        "noise": draw(seed + 5, 4, 8) * dense.abs().mean(0),
        "zero": torch.zeros_like(dense),
        "sparse": magnitude_start(dense, kept, free),
    }[begin]
    weighs = {None: None, "vector": draw(seed, 4).square() + 0.01, "matrix": random_metric(seed, 4)}[importance]
    before = start.clone()
    found = refine(problem, start, kept=kept, importance=weighs, headroom=headroom, steps=steps, swaps=swaps)
    assert torch.equal(before, start)
    assert found.kept == kept
    assert int(found.mask[:, ~free].sum()) == kept
    assert found.mask[:, free].all()
    assert found.weight.dtype == dtype
    assert found.weight.isfinite().all()
    assert not found.weight[~found.mask].any()
    live = problem.inputs.abs().sum(0) > 0
    if kind not in ("dead neuron", "one sample", "few samples", "rank-deficient") and begin != "zero":
        assert (found.weight[:, live & ~free] != 0).sum() == found.mask[:, live & ~free].sum()
    assert found.distance == pytest.approx(distance(problem, found.weight), rel=1e-9, abs=1e-9 * size_of(problem))
    assert np.linalg.norm(residual(problem, found.weight)) == pytest.approx(found.distance, rel=1e-9)
    if form == "ball" and problem.ceiling is None:
        error = np.maximum(array(problem.inputs) @ array(found.weight).T, 0) - array(problem.targets)
        assert np.linalg.norm(error) <= found.distance * (1 + 1e-12) + 1e-14 * size_of(problem)
    sparse_enough = int((start[:, ~free] != 0).sum()) <= kept
    assert (found.start is not None) == sparse_enough
    if sparse_enough:
        assert found.start == pytest.approx(distance(problem, start), rel=1e-9, abs=1e-9 * size_of(problem))
    if importance is None and sparse_enough:
        # float32: rounding of the weight, and of the outputs that it makes
        rounding = 1e-12 if dtype == torch.float64 else 1e-6
        assert found.distance <= found.start * (1 + rounding) + rounding * size_of(problem)


@pytest.mark.parametrize("kept", [1, 5, 20, 24])
@pytest.mark.parametrize("start", [0.0, 1.0])
@pytest.mark.parametrize("what", ["dead inputs", "dead neurons", "all inputs dead", "no targets"])
def test_the_mask_is_exact_where_most_weights_change_nothing(what, start, kept):
    x, y = draw(0, 40, 6), draw(1, 40, 4).clamp(min=0)
    if what == "dead inputs":
        x[:, 1:5] = 0
    elif what == "all inputs dead":
        x[:] = 0
    elif what == "dead neurons":
        y[:, 1:] = 0
    else:
        y[:] = 0
    found = refine(LayerProblem(x, y, "ball", 1.0), torch.full((4, 6), start).double(), kept=kept)
    assert found.kept == int(found.mask.sum()) == kept
    assert found.weight.isfinite().all()
    assert found.distance == pytest.approx(distance(found.problem, found.weight), rel=1e-12)


def test_kept_weights_on_dead_inputs_hold_what_they_started_with():
    """The layer then has as many non-zeros as were asked for, and no output notices."""
    x, w = like_trained(0, columns=6, neurons=4)
    x[:, 2] = 0
    problem = problem_of(x, w)
    found = refine(problem, w, kept=24)
    assert int((found.weight[:, :-1] != 0).sum()) == 24
    torch.testing.assert_close(found.weight[:, 2], w[:, 2])


@pytest.mark.parametrize("seed", [26, 37, 42])
def test_dead_inputs_hold_the_count_after_swaps_too(seed):
    x, w = like_trained(seed, columns=6, neurons=4, samples=60)
    x[:, seed % 5] = 0
    x[:, (seed + 2) % 5] = 0
    for kept in (20, 21, 22, 23):
        for start in (w, draw(seed, *w.shape)):
            found = refine(problem_of(x, w), start, kept=kept, swaps=2)
            assert int((found.weight[:, :-1] != 0).sum()) == kept


def test_filling_up_never_touches_a_live_input():
    """Of two equal inputs one may be left at zero by the refit: filled with the start's, it would spoil the fit."""
    for seed in range(20):
        base, noise = draw(seed, 30, 3), draw(seed + 100, 4, 6)
        x = torch.cat([base, base], 1)
        problem = LayerProblem(x, (base @ draw(seed + 50, 3, 4)).clamp(min=0), "ball", 1.0)
        for kept in (3, 12, 24):
            found = refine(problem, noise, kept=kept)
            again = OneSided.of(problem, torch.float64).fit(found.weight, found.mask, 60)[1].sum().sqrt()
            assert found.distance <= float(again) * (1 + 1e-4) + 1e-6 * size_of(problem)


# ---- never worse


@SEEDED
@given(kind=KIND, form=FORMS, seed=SEED, share=st.sampled_from([0.1, 0.5, 1.0]), swaps=st.integers(0, 1))
def test_never_worse_than_the_best_weight_on_the_starts_own_support(kind, form, seed, share, swaps):
    base = random_layer(kind, seed, form=form)
    problem = LayerProblem(base.inputs, base.targets, form, 1.0, ceiling=base.ceiling, penalty=base.penalty)
    free = free_of(problem)
    kept = max(1, int(share * 4 * int((~free).sum())))
    rough = dense_weight(kind, seed) + draw(seed, 4, 8) * dense_weight(kind, seed).abs().mean(0)
    start = magnitude_start(rough, kept, free)
    found = refine(problem, start, kept=kept, swaps=swaps)
    best = distance(problem, refitted(problem, start))
    assert found.distance <= best * (1 + 1e-3) + 1e-6 * size_of(problem)


@pytest.mark.parametrize("form", ["ball", "linear"])
@pytest.mark.parametrize("seed", range(6))
def test_a_good_support_with_bad_values_is_not_lost(seed, form):
    """The support of a long search, its values drawn anew: what comes out is no worse than their refit."""
    x, w = like_trained(seed, samples=150, columns=16, neurons=6, bias=0.2)
    problem = problem_of(x, w, form)
    for kept in (10, 30):
        good = refine(problem, w, kept=kept, swaps=4)
        spoiled = torch.where(good.mask, draw(seed, *w.shape), 0.0)
        found = refine(problem, spoiled, kept=kept)
        assert found.distance <= good.distance * (1 + 1e-3)
        assert found.history["start refitted"] <= found.start * (1 + 1e-9)


@SEEDED
@given(kind=KIND, form=FORMS, seed=SEED, share=st.sampled_from([0.1, 0.5, 1.0]))
def test_never_worse_than_the_start_in_the_metric(kind, form, seed, share):
    base = random_layer(kind, seed, form=form)
    problem = LayerProblem(base.inputs, base.targets, form, 1.0, ceiling=base.ceiling, penalty=base.penalty)
    free = free_of(problem)
    kept = max(1, int(share * 4 * int((~free).sum())))
    metric = random_metric(seed, 4)
    start = magnitude_start(dense_weight(kind, seed), kept, free)
    # what refine minimises: symmetric, a mean diagonal of 1, and a thousandth more on it
    used = metric / metric.diagonal().mean() + 1e-3 * torch.eye(4).double()
    found = refine(problem, start, kept=kept, importance=metric)
    floor = 1e-12 * size_of(problem) ** 2
    assert weighted(problem, found.weight, used) <= weighted(problem, start, used) * (1 + 1e-9) + floor
    better = refitted(problem, start, used)
    found = refine(problem, better, kept=kept, importance=metric)
    assert weighted(problem, found.weight, used) <= weighted(problem, better, used) * (1 + 1e-9) + floor


@pytest.mark.parametrize("importance", [None, "matrix"])
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("method", ["magnitude", "wanda", "alps", "alps kept"])
def test_never_worse_than_another_methods_answer(method, seed, importance):
    x, w = like_trained(seed)
    problem, kept = problem_of(x, w), 40
    metric = None if importance is None else random_metric(seed, 10)
    task = LayerTask("fc", True, False, True, w[:, :-1], w[:, -1], x[:, :-1], x @ w.T, "kept", kept, torch.float64)
    chosen = {
        "magnitude": nettrim.Magnitude(refit=True),
        "wanda": nettrim.Wanda(refit=True),
        "alps": nettrim.Alps(),
        "alps kept": nettrim.Alps(bias="kept"),
    }[method]
    result = chosen.prune_layer(task)
    start = torch.cat([result.weight, result.bias[:, None]], 1)
    assert int((start[:, :-1] != 0).sum()) == kept
    found = refine(problem, start, kept=kept, importance=metric)
    if metric is None:
        assert found.start == pytest.approx(distance(problem, start), rel=1e-9)
        assert found.distance < 0.98 * found.start
    else:
        used = metric / metric.diagonal().mean() + 1e-3 * torch.eye(10).double()
        assert weighted(problem, found.weight, used) < 0.98 * weighted(problem, start, used)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("kept", [20, 50, 100])
def test_knowing_the_relu_beats_a_linear_target(seed, kept):
    """Three samples in four are idle: what a linear target asks of them is wasted."""
    x, w = like_trained(seed)
    problem = problem_of(x, w)
    active = problem.active.double().mean()
    assert 0.1 < float(active) < 0.35
    found = refine(problem, w, kept=kept)
    linear = refine(problem_of(x, w, form="linear"), w, kept=kept)
    task = LayerTask("fc", True, False, True, w[:, :-1], w[:, -1], x[:, :-1], x @ w.T, "kept", kept, torch.float64)
    alps = nettrim.Alps(bias="kept", refit_iterations=200).prune_layer(task)
    magnitude = nettrim.Magnitude(refit=True).prune_layer(task)

    def error(weight):
        return float(((x @ weight.T).clamp(min=0) - problem.targets).norm())

    ours = error(found.weight)
    assert ours <= found.distance * (1 + 1e-12)
    assert ours < 0.9 * error(linear.weight)
    for other in (alps, magnitude):
        assert ours < 0.9 * error(torch.cat([other.weight, other.bias[:, None]], 1))


@pytest.mark.parametrize("form", ["ball", "linear"])
def test_near_the_best_of_all_supports_where_all_can_be_tried(form):
    """Two neurons, four inputs, three weights kept: 56 supports, each fitted to the end."""
    ratios = []
    for seed in range(12):
        x = draw(seed, 40, 4) @ (torch.eye(4).double() + 0.5 * draw(seed + 30, 4, 4))
        z = x @ draw(seed + 60, 4, 2)
        problem = LayerProblem(x, z.clamp(min=0) if form == "ball" else z, form, 1.0)
        layer, best = OneSided.of(problem, torch.float64), math.inf
        for places in combinations(range(8), 3):
            mask = torch.zeros(8, dtype=torch.bool)
            mask[list(places)] = True
            best = min(best, float(layer.fit(torch.zeros(2, 4).double(), mask.view(2, 4), 40)[1].sum()) ** 0.5)
        found = refine(problem, torch.linalg.lstsq(x, z).solution.T, kept=3, swaps=3)
        assert found.distance >= best * (1 - 1e-4)
        ratios.append(found.distance / best)
    assert max(ratios) < 1.25
    assert np.exp(np.mean(np.log(ratios))) < 1.05


def test_a_wrong_support_does_not_hold_the_search_back(monkeypatch):
    """Targets are imputed from the data, not from what a bad start makes of them; small layers need not start full."""
    monkeypatch.setattr("nettrim.core.refine._SMALL", 0)
    good = bad = 0.0
    for seed in range(4):
        x, w = like_trained(seed)
        problem = problem_of(x, w)
        noise = magnitude_start(draw(seed, *w.shape), 40, free_of(problem))
        good += refine(problem, w, kept=40).distance
        bad += refine(problem, noise, kept=40).distance
    assert bad < 1.5 * good


@pytest.mark.parametrize("seed", range(20, 28))
def test_more_swaps_are_never_worse(seed):
    x, w = like_trained(seed, samples=100, columns=10, neurons=5)
    problem = problem_of(x, w)
    for kept in (8, 20):
        reached = [refine(problem, w, kept=kept, swaps=k).distance for k in (0, 1, 2, 4)]
        assert all(b <= a * (1 + 1e-4) for a, b in pairwise(reached))


def test_swaps_repair_a_bad_start_and_never_cost():
    gains = []
    for seed in range(6):
        x, w = like_trained(seed)
        problem = problem_of(x, w)
        plain = refine(problem, w, kept=40, headroom=1, steps=1).distance
        swapped = refine(problem, w, kept=40, headroom=1, steps=1, swaps=6).distance
        assert swapped <= plain * (1 + 1e-6)
        gains.append(swapped / plain)
    assert min(gains) < 0.99


# ---- options


@pytest.mark.parametrize("round_to", [torch.float32, torch.float16, torch.bfloat16])
def test_the_rounded_weight_is_the_one_that_is_measured(round_to):
    x, w = like_trained(1)
    problem = problem_of(x, w)
    found = refine(problem, w, kept=40, round_to=round_to)
    assert found.weight.dtype == torch.float64
    assert torch.equal(found.weight.to(round_to).double(), found.weight)
    assert int((found.weight[:, :-1] != 0).sum()) == 40
    assert found.distance == pytest.approx(distance(problem, found.weight), rel=1e-12)
    exact = refine(problem, w, kept=40)
    assert found.distance >= exact.distance * (1 - 1e-9)
    assert found.distance <= exact.distance * (1 + 2 * torch.finfo(round_to).eps * 50)
    # a start that is better than what the search finds is rounded too
    found = refine(problem, exact.weight, kept=40, steps=1, headroom=1, round_to=round_to)
    assert torch.equal(found.weight.to(round_to).double(), found.weight)


@pytest.mark.parametrize("rows", [1, 2, 50, 299, 300, 301])
def test_few_rows_for_the_search_and_all_for_the_verdict(rows):
    x, w = like_trained(2)
    problem = problem_of(x, w)
    found = refine(problem, w, kept=40, rows=rows)
    assert found.kept == int((found.weight[:, :-1] != 0).sum()) == 40
    assert found.distance == pytest.approx(distance(problem, found.weight), rel=1e-12)
    # the last refit sees all samples: on its support nothing better is left
    assert found.distance <= distance(problem, refitted(problem, found.weight)) * (1 + 1e-5)
    if rows >= 300:
        assert torch.equal(found.weight, refine(problem, w, kept=40).weight)


def test_whole_floats_and_numpy_are_taken():
    x, w = like_trained(3)
    problem = LayerProblem(x.numpy(), (x @ w.T).clamp(min=0).numpy(), "ball", 1.0)
    found = refine(problem, w.numpy(), kept=40.0, steps=2.0, rows=1e4, swaps=1, headroom=2)
    same = refine(problem, w, kept=40, steps=2, rows=10_000, swaps=1, headroom=2.0)
    assert torch.equal(found.weight, same.weight)
    assert torch.equal(refine(problem, w, kept=np.int64(40), steps=2, swaps=1, headroom=2).weight, same.weight)


def test_two_runs_agree_to_the_bit_and_change_no_global_state():
    x, w = like_trained(4)
    problem = problem_of(x, w)
    state = torch.get_rng_state()
    one = refine(problem, w, kept=30, importance=random_metric(0, 10), swaps=1)
    two = refine(problem, w, kept=30, importance=random_metric(0, 10), swaps=1)
    assert torch.equal(one.weight, two.weight)
    assert torch.equal(state, torch.get_rng_state())
    assert one.history == two.history
    assert {"eliminated", "from everything"} <= set(one.history)
    assert one.seconds > 0


def test_a_ceiling_lets_pass_what_is_below_it():
    problem = random_layer("ceiling", 3, form="ball")
    plain = LayerProblem(problem.inputs, problem.targets, "ball", 1.0)
    w = dense_weight("ceiling", 3)
    with_ceiling, without = refine(problem, w, kept=12), refine(plain, w, kept=12)
    assert with_ceiling.distance < without.distance
    assert with_ceiling.distance <= distance(problem, without.weight) * (1 + 1e-9)


def test_importance_moves_the_error_where_it_costs_less():
    x, w = like_trained(5)
    problem = problem_of(x, w)
    weigh = torch.ones(10).double()
    weigh[3] = 1000.0
    plain, weighed = refine(problem, w, kept=40), refine(problem, w, kept=40, importance=weigh)
    before, after = (np.linalg.norm(residual(problem, r.weight)[:, 3]) for r in (plain, weighed))
    assert after < 0.7 * before
    assert weighed.distance >= plain.distance
    # the same in other units, and as a diagonal matrix up to its own ridge
    assert torch.equal(refine(problem, w, kept=40, importance=4 * weigh).weight, weighed.weight)


def test_a_metric_makes_errors_cancel():
    """Two neurons whose errors the next layer adds up: what one lacks the other may have too much."""
    x, w = like_trained(6, neurons=2, bias=-0.5)
    problem = problem_of(x, w, form="linear")
    metric = torch.tensor([[1.0, 1.0], [1.0, 1.0]]).double()
    together = refine(problem, w, kept=14, importance=metric)
    alone = refine(problem, w, kept=14, importance=torch.ones(2).double())
    assert weighted(problem, together.weight, metric) < 0.9 * weighted(problem, alone.weight, metric)


def test_neuron_importance_has_a_mean_of_one_and_no_zero():
    given_ = torch.tensor([0.0, 3.0, 1.0, 0.0], dtype=torch.float64)
    found = neuron_importance(given_)
    torch.testing.assert_close(found, torch.tensor([1e-3, 3.0, 1.0, 1e-3], dtype=torch.float64))
    torch.testing.assert_close(neuron_importance(torch.diag(given_)), found)
    assert torch.equal(neuron_importance(torch.zeros(3)), torch.ones(3))


NAN = torch.full((10, 25), math.nan, dtype=torch.float64)
REFUSALS = {
    "kept 0": ({"kept": 0}, "kept=0"),
    "kept negative": ({"kept": -3}, "kept=-3"),
    "kept too many": ({"kept": 241}, "kept=241 is out of range: the layer has 240"),
    "kept half": ({"kept": 2.5}, "kept=2.5"),
    "kept nan": ({"kept": math.nan}, "kept=nan"),
    "kept text": ({"kept": "5"}, "kept='5'"),
    "kept true": ({"kept": True}, "kept=True"),
    "weight shape": ({"weight": torch.zeros(25, 10)}, r"weight has shape \(25, 10\)"),
    "weight nan": ({"weight": NAN}, "weight holds 250 NaN"),
    "weight integers": ({"weight": torch.zeros(10, 25, dtype=torch.int64)}, "weight is torch.int64"),
    "importance shape": ({"importance": torch.ones(9)}, r"importance has shape \(9,\)"),
    "importance square": ({"importance": torch.eye(9)}, r"importance has shape \(9, 9\)"),
    "importance number": ({"importance": torch.tensor(2.0)}, r"importance has shape \(\)"),
    "importance negative": ({"importance": -torch.ones(10)}, "importance has a negative entry"),
    "importance negative diagonal": ({"importance": -torch.eye(10)}, "importance has a negative entry"),
    "importance zero": ({"importance": torch.zeros(10)}, "no positive one"),
    "importance nan": ({"importance": torch.full((10,), math.nan)}, "importance holds 10 NaN"),
    "headroom": ({"headroom": 0.9}, "headroom=0.9"),
    "headroom nan": ({"headroom": math.nan}, "headroom=nan"),
    "headroom infinite": ({"headroom": math.inf}, "headroom=inf"),
    "headroom text": ({"headroom": "x"}, "headroom='x'"),
    "steps": ({"steps": 0}, "steps=0"),
    "swaps": ({"swaps": -1}, "swaps=-1"),
    "swaps half": ({"swaps": 0.5}, "swaps=0.5"),
    "rows": ({"rows": 0}, "rows=0"),
    "round to": ({"round_to": torch.int8}, "round_to=torch.int8"),
}


@pytest.mark.parametrize(("arguments", "text"), REFUSALS.values(), ids=REFUSALS)
def test_refused_in_one_sentence(arguments, text):
    x, w = like_trained(0)
    with pytest.raises(ProblemError, match=text) as caught:
        refine(problem_of(x, w), **({"weight": w, "kept": 5} | arguments))
    assert str(caught.value).count("\n") == 0


def test_half_spaces_are_refused():
    x, w = like_trained(0)
    problem = LayerProblem(x, (x @ w.T).clamp(min=0), "halfspace", 1.0)
    with pytest.raises(ProblemError, match="form='halfspace' is not refined: use form='ball'"):
        refine(problem, w, kept=5)


def test_an_indefinite_metric_is_refused():
    """The weighted loss would have no minimum, and "never worse" no meaning."""
    x, w = like_trained(0, neurons=2)
    with pytest.raises(ProblemError, match="importance"):
        refine(problem_of(x, w), w, kept=5, importance=torch.tensor([[1.0, 3.0], [3.0, 1.0]]))


# ---- the evidence


def convex(problem, radius=None, norm=None):
    """The least norm within a radius, or the least distance within a norm, by Clarabel."""
    n = numbers(problem)
    u = cp.Variable((n.t.shape[1], n.x.shape[1]))
    out = n.x @ u.T - n.t
    on, off = n.active.astype(float), (~n.active).astype(float)
    parts = cp.norm(cp.multiply(on, out), "fro"), cp.norm(cp.multiply(off, cp.pos(out)), "fro")
    size, fit = cp.sum(cp.multiply(n.c.T, cp.abs(u))), cp.norm(cp.hstack(parts))
    goal, limits = (size, [fit <= radius]) if norm is None else (fit, [size <= norm])
    cp.Problem(cp.Minimize(goal), limits).solve(solver=cp.CLARABEL)
    return float(goal.value)


@pytest.mark.parametrize("kept", [3, 12, 24])
@pytest.mark.parametrize("kind", ["plain", "free bias", "ceiling", "dead input", "few samples", "linear"])
def test_both_bounds_hold_and_are_close(kind, kept):
    name = "plain" if kind == "linear" else kind
    problem = random_layer(name, 1, form="linear" if kind == "linear" else "ball")
    found = refine(problem, dense_weight(name, 1), kept=kept)
    evidence = found.certify(tol=1e-4)
    certificate = evidence.certificate
    own = float((problem.penalty * found.weight.abs()).sum())
    assert certificate.objective == pytest.approx(own, rel=1e-12)
    assert certificate.distance == pytest.approx(found.distance, rel=1e-9, abs=1e-9 * size_of(problem))
    if found.distance < 1e-6 * size_of(problem):
        return  # a radius of nothing: there is no inside, and no second opinion
    assert certificate.violation <= 1e-9
    least = convex(problem, radius=found.distance)
    assert certificate.lower_bound <= least * (1 + 1e-6) + 1e-9
    assert certificate.lower_bound >= least * (1 - 1e-3) - 1e-6
    assert least <= own * (1 + 1e-6)
    nearest = convex(problem, norm=own)
    assert evidence.nearest <= nearest * (1 + 1e-6) + 1e-7 * size_of(problem)
    assert nearest <= found.distance * (1 + 1e-6)


def test_the_bounds_meet_where_the_weight_is_the_convex_optimum():
    """Both say so: no smaller norm at this distance, no smaller distance at this norm."""
    problem = random_layer("plain", 0)
    solution = nettrim.solve_problem(problem, tol=1e-7)
    evidence = evidence_of(solution.problem, solution.weight, solution.multipliers)
    assert evidence.certificate.gap <= 1e-6
    assert evidence.nearest == pytest.approx(float(problem.radius), rel=1e-4)


@pytest.mark.parametrize("factor", [1e-3, 7.0, 1e6, -1.0])
def test_multipliers_of_any_size_claim_nothing_false(factor):
    """A file may hold multipliers that no solver gave: whatever they are, what follows from them is a bound."""
    problem = random_layer("plain", 1)
    found = refine(problem, dense_weight("plain", 1), kept=10)
    gamma = found.certify().multipliers * factor
    at = problem.with_radius(found.distance)
    evidence = evidence_of(at, found.weight, gamma)
    own = float(found.weight.abs().sum())
    assert evidence.nearest <= convex(problem, norm=own) * (1 + 1e-6)
    assert evidence.certificate.lower_bound <= convex(problem, radius=found.distance) * (1 + 1e-6)
    noise = evidence_of(at, found.weight, draw(3, *gamma.shape))
    assert noise.nearest <= convex(problem, norm=own) * (1 + 1e-6)


def test_evidence_without_multipliers_says_nothing():
    problem = random_layer("plain", 2)
    evidence = evidence_of(problem, dense_weight("plain", 2), torch.zeros(40, 4))
    assert evidence.nearest == 0.0
    assert evidence.certificate.lower_bound == 0.0


def test_a_perfect_weight_can_be_asked_for_evidence():
    """Distance 0: the radius of the program must not be."""
    x = torch.eye(6).double()
    problem = LayerProblem(x, torch.arange(12.0).reshape(6, 2).double(), "linear", 1.0)
    found = refine(problem, problem.targets.T, kept=12)
    assert found.distance == 0
    evidence = found.certify()
    own = float(found.weight.abs().sum())
    assert evidence.certificate.lower_bound <= own * (1 + 1e-9)
    assert evidence.nearest == pytest.approx(0, abs=1e-6 * own)


def test_what_certify_returns_can_be_certified_again():
    problem = random_layer("free bias", 4)
    found = refine(problem, dense_weight("free bias", 4), kept=14)
    evidence = found.certify()
    again = certify(problem.with_radius(found.distance), found.weight, evidence.multipliers)
    assert again.lower_bound == pytest.approx(evidence.certificate.lower_bound, rel=1e-9)
    assert 0 < again.gap < 1


def test_the_layout_in_memory_does_not_matter():
    x, w = like_trained(7)
    problem = problem_of(x, w)
    turned = LayerProblem(x.T.contiguous().T, problem.targets.T.contiguous().T, "ball", 1.0, penalty=problem.penalty[0])
    start = magnitude_start(w, 40, free_of(problem))
    one = refine(problem, start, kept=40, swaps=1)
    two = refine(turned, start.T.contiguous().T, kept=40, swaps=1)
    assert torch.equal(one.mask, two.mask)
    torch.testing.assert_close(one.weight, two.weight, rtol=1e-6, atol=1e-9)
