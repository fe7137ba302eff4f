"""Newton and brain surgery on the one-sided loss, against bounded least squares, brute force and re-inversion."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from oracle import array, numbers, residual
from scipy.optimize import lsq_linear, minimize

from nettrim.core.cases import KINDS, dense_weight, random_layer
from nettrim.core.onesided import OneSided, trace
from nettrim.core.problem import LayerProblem

SEEDED = settings(derandomize=True, database=None, deadline=None, max_examples=60)
FORMS = st.sampled_from(["ball", "linear"])
KIND = st.sampled_from(sorted(KINDS))
SEED = st.integers(0, 10_000)


def generator(seed):
    return torch.Generator().manual_seed(seed)


def draw(seed, *shape):
    return torch.randn(*shape, generator=generator(seed), dtype=torch.float64)


def layer_of(kind, seed, form):
    """A problem of that kind, with its ceiling also where the form is "ball"."""
    return random_layer(kind, seed, form=form)


def random_mask(problem, seed, share=0.6):
    return torch.rand(problem.n_outputs, problem.n_inputs, generator=generator(seed)) < share


def random_start(problem, kind, seed):
    noise = torch.randn(problem.n_outputs, problem.n_inputs, generator=generator(seed + 7), dtype=torch.float64)
    dense = dense_weight(kind, seed)
    return dense + (seed % 3) * noise * dense.abs().mean(0)


def squares(problem, weight):
    """The loss of each neuron, in NumPy."""
    return (residual(problem, weight) ** 2).sum(axis=0)


def least(problem, m, support):
    """The least one-sided loss of a neuron on a support, exactly.

    Off the active set ``max(z − v, 0)² = min_{s ≤ v} (z − s)²``: least squares with bounds, in ``u`` and ``s``.
    """
    n = numbers(problem)
    x, active, target = n.x[:, support], n.active[:, m], n.t[:, m]
    # an orthonormal basis of what the support spans, whatever its columns' sizes
    left, size, _ = np.linalg.svd(x, full_matrices=False)
    x = left[:, size > 1e-12 * size.max(initial=0)]
    off = np.flatnonzero(~active)
    slack = np.zeros((len(x), len(off)))
    slack[off, np.arange(len(off))] = -1
    wanted = np.where(active, target, 0)
    ceilings = np.concatenate([np.full(x.shape[1], np.inf), target[off]])
    system = np.hstack([x, slack])
    if not system.shape[1]:
        return float(wanted @ wanted)
    found = lsq_linear(system, wanted, (-np.inf, ceilings), method="bvls", tol=1e-15, max_iter=1000)
    assert found.success, found.message
    return 2 * float(found.cost)


def scale_of(problem):
    return float((numbers(problem).t ** 2).sum())


# ---- step and fit


@SEEDED
@given(kind=KIND, seed=SEED, form=FORMS, share=st.sampled_from([0.2, 0.6, 1.0]))
# few samples count there, and only a fiftieth of a Newton step lowers the loss
@example(kind="cascade", seed=301, form="ball", share=0.2)
def test_fit_reaches_the_least_loss_on_a_support(kind, seed, form, share):
    problem = layer_of(kind, seed, form)
    mask, start = random_mask(problem, seed, share), random_start(problem, kind, seed)
    weight, losses = OneSided.of(problem, torch.float64).fit(start, mask, 60)
    assert not weight[~mask].any()
    np.testing.assert_allclose(losses, squares(problem, weight), rtol=1e-9, atol=1e-12 * scale_of(problem))
    for m in range(problem.n_outputs):
        best = least(problem, m, mask[m].nonzero()[:, 0].numpy())
        assert float(losses[m]) <= best * (1 + 1e-4) + 1e-9 * scale_of(problem)
        assert float(losses[m]) >= best * (1 - 1e-7) - 1e-9 * scale_of(problem)


@SEEDED
@given(kind=KIND, seed=SEED, form=FORMS, steps=st.integers(1, 6), dtype=st.sampled_from([torch.float32, torch.float64]))
def test_fit_never_raises_the_loss(kind, seed, form, steps, dtype):
    problem = layer_of(kind, seed, form)
    layer = OneSided.of(problem, dtype)
    mask, start = random_mask(problem, seed), random_start(problem, kind, seed).to(dtype)
    before = layer.losses(torch.where(mask, start, 0.0))
    _, losses = layer.fit(start, mask, steps)
    # in float32 a residual has the rounding of the outputs
    rounding, floor = (1e-12, 0.0) if dtype == torch.float64 else (1e-5, 1e-12)
    assert (losses <= before * (1 + rounding) + floor * scale_of(problem)).all()


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_one_step_ends_on_a_linear_layer(kind):
    """Quadratic: one Newton step from anywhere, up to the ridge; a second moves it no further."""
    problem = layer_of(kind, 3, "linear")
    layer = OneSided.of(problem, torch.float64)
    mask = random_mask(problem, 3)
    one, losses = layer.fit(random_start(problem, kind, 3), mask, 1)
    for m in range(problem.n_outputs):
        best = least(problem, m, mask[m].nonzero()[:, 0].numpy())
        assert float(losses[m]) <= best * (1 + 1e-6) + 1e-9 * scale_of(problem)
    assert float(layer.fit(one, mask, 1)[1].sum()) <= float(losses.sum()) * (1 + 1e-12)


@SEEDED
@given(seed=SEED)
def test_columns_of_very_different_size_are_fitted_too(seed):
    """Rescaling a column rescales its weight and leaves the least loss as it is."""
    base = random_layer("plain", seed)
    factors = 10.0 ** torch.randint(-3, 4, (base.n_inputs,), generator=generator(seed))
    problem = LayerProblem(base.inputs * factors, base.targets, "ball", 1.0)
    mask = random_mask(base, seed)
    start = torch.zeros(mask.shape, dtype=torch.float64)
    losses = OneSided.of(problem, torch.float64).fit(start, mask, 20)[1]
    for m in range(base.n_outputs):
        best = least(base, m, mask[m].nonzero()[:, 0].numpy())
        assert float(losses[m]) <= best * (1 + 1e-3) + 1e-9 * scale_of(base)


@SEEDED
@given(seed=SEED, shift=st.sampled_from([-1.0, 0.5]))
def test_a_frozen_bias_shifts_targets_and_ceilings(seed, shift):
    """``ReLU(x·u + b)`` fitted for ``u`` alone is the problem whose targets and ceiling are moved by ``−b``."""
    base = random_layer("plain", seed)
    bias = shift * torch.rand(base.n_outputs, generator=generator(seed), dtype=torch.float64)
    outputs = base.inputs @ dense_weight("plain", seed).T + bias
    active = outputs > 0
    ceiling = (-bias).expand_as(outputs)
    problem = LayerProblem(base.inputs, outputs.clamp(min=0) - bias, "ball", 1.0, None, ceiling, None, active)
    layer = OneSided.of(problem, torch.float64)
    mask = random_mask(problem, seed)
    weight, losses = layer.fit(torch.zeros(mask.shape, dtype=torch.float64), mask, 60)
    for m in range(problem.n_outputs):
        best = least(problem, m, mask[m].nonzero()[:, 0].numpy())
        assert best * (1 - 1e-7) - 1e-9 <= float(losses[m]) <= best * (1 + 1e-5) + 1e-9
    error = (base.inputs @ weight.T + bias).clamp(min=0) - outputs.clamp(min=0)
    assert float(error.square().sum()) <= float(losses.sum()) * (1 + 1e-12)
    dense = layer.losses(dense_weight("plain", seed))
    assert float(dense.sum()) <= 1e-20 * scale_of(problem)


def test_a_step_returns_the_residual_and_the_hessian_where_it_started():
    problem = random_layer("plain", 5)
    layer = OneSided.of(problem, torch.float64)
    support = torch.tensor([0, 3, 4, 6])
    start = dense_weight("plain", 5)[1, support]
    u, r, hessian = layer.step(1, support, start, 1)
    x, anchor = problem.inputs[:, support], problem.anchor[:, 1]
    z = x @ u
    expected = torch.where(problem.active[:, 1], z - anchor, (z - anchor).clamp(min=0))
    torch.testing.assert_close(r, expected)
    on = problem.active[:, 1] | (x @ start > anchor)
    torch.testing.assert_close(hessian, (x * on[:, None]).T @ x, rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("form", ["ball", "linear"])
def test_an_empty_support_and_a_neuron_without_active_samples(form):
    problem = random_layer("dead neuron", 1, form=form)
    layer = OneSided.of(problem, torch.float64)
    mask = torch.ones(4, 8, dtype=torch.bool)
    mask[0] = False
    weight, losses = layer.fit(torch.ones(4, 8, dtype=torch.float64), mask, 30)
    assert not weight[0].any()
    assert float(losses[0]) == pytest.approx(least(problem, 0, np.arange(0)))
    if form == "ball":
        assert not problem.active[:, 1].any()
        assert float(losses[1]) == pytest.approx(0, abs=1e-12)
    u, r, hessian = layer.step(0, torch.zeros(0, dtype=torch.int64), torch.zeros(0).double(), 3)
    assert u.shape == (0,)
    assert hessian.shape == (0, 0)
    assert float(r @ r) == pytest.approx(float(losses[0]))


def test_a_dead_input_keeps_its_weight_and_hurts_nobody():
    problem = random_layer("dead input", 2)
    layer = OneSided.of(problem, torch.float64)
    everything = torch.ones(4, 8, dtype=torch.bool)
    start = random_start(problem, "dead input", 1)
    weight, losses = layer.fit(start, everything, 30)
    assert torch.equal(weight[:, 2], start[:, 2])
    without = everything.clone()
    without[:, 2] = False
    torch.testing.assert_close(losses, layer.fit(start, without, 30)[1], rtol=1e-9, atol=1e-12)


def test_collinear_inputs_share_what_one_of_them_would_have():
    base = random_layer("plain", 4)
    twins = torch.cat([base.inputs, base.inputs], dim=1)
    doubled = LayerProblem(twins, base.targets, "ball", 1.0)
    mask = random_mask(base, 4)
    start = torch.zeros(4, 16, dtype=torch.float64)
    one = OneSided.of(base, torch.float64).fit(start[:, :8], mask, 30)[1]
    two = OneSided.of(doubled, torch.float64).fit(start, mask.repeat(1, 2), 30)[1]
    torch.testing.assert_close(one, two, rtol=1e-6, atol=1e-9)


def test_rows_take_those_samples():
    problem = random_layer("cascade", 0, form="ball")
    rows = torch.tensor([3, 1, 7])
    part = OneSided.of(problem, torch.float64, rows)
    whole = OneSided.of(problem, torch.float64)
    weight = dense_weight("cascade", 0)
    torch.testing.assert_close(part.residual(weight @ part.inputs), whole.residual(weight @ whole.inputs)[:, rows])


@SEEDED
@given(kind=KIND, seed=SEED, form=FORMS)
def test_an_offset_is_made_up_for_and_never_costs(kind, seed, form):
    problem = layer_of(kind, seed, form)
    layer = OneSided.of(problem, torch.float64)
    m = seed % problem.n_outputs
    support = random_mask(problem, seed)[m].nonzero()[:, 0]
    start = random_start(problem, kind, seed)[m, support]
    size = problem.targets.std() if problem.samples > 1 else problem.targets.abs().max()
    offset = size * torch.randn(problem.samples, generator=generator(seed), dtype=torch.float64)
    before = (layer.residual(start @ layer.inputs[support], m) + offset).square().sum()
    u, r, _ = layer.step(m, support, start, 40, offset)
    torch.testing.assert_close(r, layer.residual(u @ layer.inputs[support], m))
    after = (r + offset).square().sum()
    assert float(after) <= float(before) * (1 + 1e-12)
    if form == "linear" and len(support):
        x, y = array(problem.inputs)[:, support.numpy()], array(problem.targets)[:, m] - offset.numpy()
        best = np.linalg.lstsq(x, y, rcond=None)[0]
        assert float(after) <= ((x @ best - y) ** 2).sum() * (1 + 1e-5) + 1e-9 * float(y @ y)


# ---- trace


def slow_trace(inverse, weight, may, depth):
    """One neuron; the surviving block of H is inverted anew at every removal."""
    hessian = np.linalg.inv(inverse)
    u, left = weight.copy(), list(range(len(weight)))
    order, costs = [], []
    for _ in range(depth):
        allowed = [q for q in left if may[q]]
        if not allowed:
            break
        block = np.linalg.inv(hessian[np.ix_(left, left)])
        position = {q: i for i, q in enumerate(left)}
        cost = {q: u[q] ** 2 / block[position[q], position[q]] for q in allowed}
        q = min(allowed, key=cost.get)
        u[left] -= u[q] / block[position[q], position[q]] * block[:, position[q]]
        left.remove(q)
        order.append(q)
        costs.append(cost[q])
    return order, costs


def random_traces(seed, neurons=3, size=6, samples=30):
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((neurons, samples, size)) * rng.uniform(0.3, 3, size)
    inverse = np.linalg.inv(np.einsum("bpi,bpj->bij", x, x))
    return inverse, rng.standard_normal((neurons, size)), rng.random((neurons, size)) < 0.8


@SEEDED
@given(seed=SEED, depth=st.integers(1, 8))
def test_trace_equals_inverting_anew(seed, depth):
    inverse, weight, may = random_traces(seed)
    order, costs = trace(*map(torch.as_tensor, (inverse, weight, may)), depth)
    assert order.shape == costs.shape == (3, depth)
    for b in range(3):
        slow_order, slow_costs = slow_trace(inverse[b], weight[b], may[b], depth)
        assert order[b, : len(slow_order)].tolist() == slow_order
        np.testing.assert_allclose(costs[b, : len(slow_costs)], slow_costs, rtol=1e-8)
        assert torch.isinf(costs[b, len(slow_costs) :]).all()


@SEEDED
@given(seed=SEED)
def test_a_cost_is_what_the_quadratic_rises_by(seed):
    """``min (u − w)ᵀ H (u − w)`` with the removed entries at 0, by a solve of its own: the costs are its increments."""
    inverse, weight, _ = random_traces(seed)
    may = np.ones_like(weight, dtype=bool)
    order, costs = trace(*map(torch.as_tensor, (inverse, weight, may)), 6)
    for b in range(3):
        hessian = np.linalg.inv(inverse[b])
        rises = [0.0]
        for k in range(1, 7):
            gone = order[b, :k].numpy()
            left = np.setdiff1d(np.arange(6), gone)
            u = np.zeros(6)
            u[left] = np.linalg.solve(hessian[np.ix_(left, left)], (hessian @ weight[b])[left])
            rises.append((u - weight[b]) @ hessian @ (u - weight[b]))
        np.testing.assert_allclose(costs[b], np.diff(rises), rtol=1e-6, atol=1e-9)


def test_trace_leaves_its_arguments_alone_and_knows_padding():
    inverse, weight, may = (torch.as_tensor(a) for a in random_traces(1))
    inverse[2, 4:, :], inverse[2, :, 4:] = 0.0, 0.0
    inverse[2, 4:, 4:], weight[2, 4:], may[2, 4:] = torch.eye(2).double(), 0.0, False
    copies = inverse.clone(), weight.clone(), may.clone()
    order, costs = trace(inverse, weight, may, 6)
    assert all(torch.equal(a, b) for a, b in zip(copies, (inverse, weight, may), strict=True))
    small = trace(inverse[2:, :4, :4], weight[2:, :4], may[2:, :4], 6)
    assert torch.equal(small[0], order[2:])
    torch.testing.assert_close(small[1], costs[2:])


# ---- eliminate


@SEEDED
@given(
    kind=KIND,
    seed=SEED,
    form=FORMS,
    steps=st.integers(1, 5),
    what=st.sampled_from(["one", "all", "some", "few"]),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
def test_the_count_is_exact_and_free_columns_stay(kind, seed, form, steps, what, dtype):
    problem = layer_of(kind, seed, form)
    layer = OneSided.of(problem, dtype)
    free = torch.zeros(8, dtype=torch.bool)
    free[-1] = seed % 2 == 0
    mask = random_mask(problem, seed) | free
    available = int(mask[:, ~free].sum())
    kept = {"one": 1, "all": available, "some": 1 + seed % available, "few": min(3, available)}[what]
    start = random_start(problem, kind, seed).to(dtype)
    weight, found = layer.eliminate(start, mask, free, torch.ones(4, dtype=dtype), kept, steps)
    assert int(found[:, ~free].sum()) == kept
    assert (mask | ~found).all()
    assert found[:, free].all()
    assert not weight[~found].any()
    assert weight.isfinite().all()


@pytest.mark.parametrize("weight", [torch.zeros(4, 8), torch.ones(4, 8)], ids=["zeros", "ones"])
@pytest.mark.parametrize("inputs", [torch.zeros(6, 8), torch.ones(6, 8)], ids=["dead", "equal"])
@pytest.mark.parametrize("kept", [1, 7, 32])
def test_ties_leave_the_exact_count(weight, inputs, kept):
    problem = LayerProblem(inputs.double(), torch.zeros(6, 4).double(), "ball", 1.0)
    layer = OneSided.of(problem, torch.float64)
    none, everything = torch.zeros(8, dtype=torch.bool), torch.ones(4, 8, dtype=torch.bool)
    for steps in (1, 3):
        _, found = layer.eliminate(weight.double(), everything, none, torch.ones(4).double(), kept, steps)
        assert int(found.sum()) == kept


def test_a_neuron_may_lose_everything_in_one_step():
    """More removals of one neuron than a trace is deep: the count is exact all the same."""
    x = torch.randn(400, 80, generator=generator(0), dtype=torch.float64)
    w = torch.randn(3, 80, generator=generator(1), dtype=torch.float64)
    w[0] *= 1e-6
    problem = LayerProblem(x, x @ w.T, "linear", 1.0)
    layer = OneSided.of(problem, torch.float64)
    none, everything = torch.zeros(80, dtype=torch.bool), torch.ones(3, 80, dtype=torch.bool)
    for kept in (240 - 70, 160, 5, 1):
        _, found = layer.eliminate(w, everything, none, torch.ones(3).double(), kept, 1)
        assert int(found.sum()) == kept
    # the neuron that is worth nearly nothing goes first
    _, found = layer.eliminate(w, everything, none, torch.ones(3).double(), 160, 3)
    assert found.sum(1).tolist() == [0, 80, 80]


def test_a_wide_neuron_beside_many_narrow_ones_loses_what_the_traces_do_not_reach():
    """The traces of one step are cut in depth: what is missing goes by size, and never a free column."""
    x = torch.cat([draw(0, 400, 300), torch.ones(400, 1, dtype=torch.float64)], 1)
    w = torch.cat([draw(1, 20, 300), torch.full((20, 1), 1e-9, dtype=torch.float64)], 1)
    free = torch.zeros(301, dtype=torch.bool)
    free[-1] = True
    mask = torch.zeros(20, 301, dtype=torch.bool)
    mask[0], mask[:, 0], mask[:, -1] = True, True, True
    problem = LayerProblem(x, x @ torch.where(mask, w, 0.0).T, "linear", 1.0)
    for kept in (5, 30, 250):
        _, found = OneSided.of(problem, torch.float64).eliminate(w, mask, free, torch.ones(20).double(), kept, 1)
        assert int(found[:, :-1].sum()) == kept
        assert found[:, -1].all()


@pytest.mark.parametrize("steps", [1, 2, 7])
def test_every_count_of_49_is_met(steps):
    """Counts fall geometrically, and 49 · (k/49) is not k in floating point."""
    problem = LayerProblem(draw(0, 30, 7), draw(1, 30, 7), "linear", 1.0)
    layer, none = OneSided.of(problem, torch.float64), torch.zeros(7, dtype=torch.bool)
    everything, weight = torch.ones(7, 7, dtype=torch.bool), draw(2, 7, 7)
    for kept in range(1, 50):
        _, found = layer.eliminate(weight, everything, none, torch.ones(7).double(), kept, steps)
        assert int(found.sum()) == kept


def brute_obs(x, w, kept, importance):
    """Exact OBS over the layer: at each removal every candidate is tried, by least squares of its own."""
    mask = np.ones(w.shape, dtype=bool)
    y = x @ w.T

    def loss(m, support):
        u = np.linalg.lstsq(x[:, support], y[:, m], rcond=None)[0]
        return ((x[:, support] @ u - y[:, m]) ** 2).sum()

    while mask.sum() > kept:
        best = None
        for m, n in np.argwhere(mask):
            support = [k for k in np.flatnonzero(mask[m]) if k != n]
            rise = importance[m] * (loss(m, support) - loss(m, np.flatnonzero(mask[m])))
            if best is None or rise < best[0]:
                best = rise, m, n
        mask[best[1], best[2]] = False
    return mask


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("kept", [1, 4, 9])
def test_one_removal_a_step_is_exact_obs(seed, kept):
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((30, 5)) @ (np.eye(5) + 0.5 * rng.standard_normal((5, 5)))
    w = rng.standard_normal((3, 5))
    importance = rng.uniform(0.3, 3, 3)
    problem = LayerProblem(torch.as_tensor(x), torch.as_tensor(x @ w.T), "linear", 1.0)
    # counts fall geometrically, so that with this many steps no two go at a time
    weight, found = OneSided.of(problem, torch.float64).eliminate(
        torch.as_tensor(w),
        torch.ones(3, 5, dtype=torch.bool),
        torch.zeros(5, dtype=torch.bool),
        torch.as_tensor(importance),
        kept,
        120,
    )
    assert np.array_equal(found.numpy(), brute_obs(x, w, kept, importance))
    # the weight is as the last removal left it; the fit gives the least squares of that support
    fitted = OneSided.of(problem, torch.float64).fit(weight, found, 3)[0]
    for m in range(3):
        s = np.flatnonzero(found[m])
        if len(s):
            best = np.linalg.lstsq(x[:, s], x @ w[m], rcond=None)[0]
            np.testing.assert_allclose(fitted[m, s], best, rtol=1e-4, atol=1e-6)


def test_one_large_step_removes_prefixes_of_the_traces_in_the_order_of_their_costs():
    """Layer-wide, a removal waits for those before it in its neuron."""
    problem = random_layer("plain", 9, form="linear")
    layer = OneSided.of(problem, torch.float64)
    dense = dense_weight("plain", 9)
    none, everything = torch.zeros(8, dtype=torch.bool), torch.ones(4, 8, dtype=torch.bool)
    hessian = array(problem.inputs).T @ array(problem.inputs)
    prefixes = [slow_trace(np.linalg.inv(hessian), array(dense)[m], np.ones(8, dtype=bool), 8) for m in range(4)]
    for kept in (30, 20, 11, 3):
        _, found = layer.eliminate(dense, everything, none, torch.ones(4).double(), kept, 1)
        ranked = sorted((np.maximum.accumulate(c)[k], m, k) for m, (_, c) in enumerate(prefixes) for k in range(8))
        expected = np.ones((4, 8), dtype=bool)
        for _, m, k in ranked[: 32 - kept]:
            expected[m, prefixes[m][0][k]] = False
        assert np.array_equal(found.numpy(), expected)


def test_importance_decides_between_equal_neurons():
    base = random_layer("plain", 2, form="linear")
    y = base.targets[:, :1].repeat(1, 3)
    problem = LayerProblem(base.inputs, y, "linear", 1.0)
    dense = dense_weight("plain", 2)[:1].repeat(3, 1)
    none, everything = torch.zeros(8, dtype=torch.bool), torch.ones(3, 8, dtype=torch.bool)
    importance = torch.tensor([1.0, 100.0, 1e-4], dtype=torch.float64)
    _, found = OneSided.of(problem, torch.float64).eliminate(dense, everything, none, importance, 12, 6)
    counts = found.sum(1).tolist()
    assert counts[2] == 0
    assert counts[1] > counts[0]


def test_eliminate_tells_of_every_step_and_leaves_its_arguments_alone():
    problem = random_layer("plain", 0)
    layer, dense = OneSided.of(problem, torch.float64), dense_weight("plain", 0)
    mask, told = torch.ones(4, 8, dtype=torch.bool), []
    before = dense.clone()
    layer.eliminate(dense, mask, torch.zeros(8, dtype=torch.bool), torch.ones(4).double(), 5, 4, lambda: told.append(1))
    assert len(told) == 4
    assert mask.all()
    assert torch.equal(dense, before)


# ---- gains


@SEEDED
@given(kind=KIND, seed=SEED, form=FORMS)
def test_a_gain_is_what_freeing_one_weight_brings_with_the_active_set_held(kind, seed, form):
    problem = layer_of(kind, seed, form)
    layer = OneSided.of(problem, torch.float64)
    # not the dense weight itself, which stands on the ceiling of a cascade up to rounding
    weight = random_start(problem, kind, 3 * (seed // 3) + 1)
    gains = layer.gains(weight)
    n, r = numbers(problem), residual(problem, weight)
    for m in range(problem.n_outputs):
        on = n.active[:, m] | (r[:, m] > 0)
        for k in range(problem.n_inputs):
            column = n.x[on, k]
            if not column.any():
                assert float(gains[m, k]) == 0
                continue
            scaled = column / np.abs(column).max()
            move = np.linalg.lstsq(scaled[:, None], r[on, m], rcond=None)[0]
            fall = (r[on, m] ** 2).sum() - ((r[on, m] - scaled * move) ** 2).sum()
            assert float(gains[m, k]) == pytest.approx(fall, rel=1e-6, abs=1e-12 * scale_of(problem))


# ---- the metric


def random_metric(seed, neurons=4, rank=3, floor=1e-3):
    a = torch.randn(rank, neurons, generator=generator(seed), dtype=torch.float64)
    return a.T @ a + floor * torch.eye(neurons, dtype=torch.float64)


@SEEDED
@given(kind=KIND, seed=SEED, form=FORMS, rank=st.integers(1, 4), sweeps=st.integers(1, 4))
def test_balance_never_raises_the_weighted_loss(kind, seed, form, rank, sweeps):
    problem = layer_of(kind, seed, form)
    layer = OneSided.of(problem, torch.float64)
    mask, metric = random_mask(problem, seed), random_metric(seed, rank=rank)
    start = torch.where(mask, random_start(problem, kind, seed), 0.0)
    if seed % 2:
        start = layer.fit(start, mask, 8)[0]
    weight = layer.balance(start, mask, metric, sweeps)
    assert not weight[~mask].any()
    e = residual(problem, weight)
    by_hand = float(np.einsum("pi,ij,pj->", e, metric.numpy(), e))
    assert layer.weighted(weight, metric) == pytest.approx(by_hand, rel=1e-9, abs=1e-12 * scale_of(problem))
    assert by_hand <= layer.weighted(start, metric) * (1 + 1e-10) + 1e-12 * scale_of(problem)


def test_balance_on_a_linear_layer_reaches_the_best_of_the_support():
    """Against BFGS on the weighted loss; with a full support that is least squares, whatever the metric."""
    problem = random_layer("plain", 6, form="linear")
    noisy = problem.targets + torch.randn(problem.targets.shape, generator=generator(6), dtype=torch.float64)
    problem = LayerProblem(problem.inputs, noisy, "linear", 1.0)
    layer, metric = OneSided.of(problem, torch.float64), random_metric(6, floor=0.3)
    everything = torch.ones(4, 8, dtype=torch.bool)
    zero = torch.zeros(4, 8, dtype=torch.float64)
    best = torch.linalg.lstsq(problem.inputs, noisy).solution.T
    torch.testing.assert_close(layer.balance(zero, everything, metric, 2000), best, rtol=1e-4, atol=1e-5)

    mask = random_mask(problem, 6)
    x, y, g = array(problem.inputs), array(noisy), metric.numpy()

    def loss(free):
        u = np.zeros((4, 8))
        u[mask.numpy()] = free
        e = x @ u.T - y
        return np.einsum("pi,ij,pj->", e, g, e), 2 * (g @ e.T @ x)[mask.numpy()]

    reference = minimize(loss, np.zeros(int(mask.sum())), jac=True, method="BFGS", options={"gtol": 1e-8}).fun
    assert layer.weighted(layer.balance(zero, mask, metric, 2000), metric) == pytest.approx(reference, rel=1e-6)
    alone = layer.weighted(layer.fit(zero, mask, 8)[0], metric)
    assert alone > reference * 1.001  # the neurons do make up for each other here


def test_balance_in_the_identity_is_the_ordinary_refit():
    problem = random_layer("plain", 7)
    layer, mask = OneSided.of(problem, torch.float64), random_mask(problem, 7)
    start = random_start(problem, "plain", 7)
    alone = layer.fit(start, mask, 40)[1].sum()
    together = layer.weighted(layer.balance(start, mask, torch.eye(4).double(), 20), torch.eye(4).double())
    assert together == pytest.approx(float(alone), rel=1e-6)


def test_a_neuron_that_does_not_count_is_left_alone():
    problem = random_layer("plain", 8)
    layer, mask = OneSided.of(problem, torch.float64), random_mask(problem, 8)
    start = random_start(problem, "plain", 8)
    metric = torch.diag(torch.tensor([1.0, 0.0, 2.0, 1.0], dtype=torch.float64))
    weight = layer.balance(start, mask, metric, 3)
    assert torch.equal(weight[1], torch.where(mask[1], start[1], 0.0))
    assert not torch.equal(weight[0], torch.where(mask[0], start[0], 0.0))


def test_removing_the_cheapest_pair_one_by_one_is_near_the_best_pair():
    """Sanity of the greedy choice on a layer where all pairs can be tried: within twice the best."""
    problem = random_layer("plain", 11, form="linear")
    layer, dense = OneSided.of(problem, torch.float64), dense_weight("plain", 11)[:1]
    one = LayerProblem(problem.inputs, problem.targets[:, :1], "linear", 1.0)
    layer = OneSided.of(one, torch.float64)
    none, everything = torch.zeros(8, dtype=torch.bool), torch.ones(1, 8, dtype=torch.bool)
    weight, found = layer.eliminate(dense, everything, none, torch.ones(1).double(), 6, 30)
    reached = float(layer.fit(weight, found, 3)[1].sum())
    best = min(least(one, 0, np.setdiff1d(np.arange(8), pair)) for pair in combinations(range(8), 2))
    assert best * (1 - 1e-9) <= reached <= 2 * best
