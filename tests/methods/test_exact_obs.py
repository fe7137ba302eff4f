"""Exact OBS against re-inverting the surviving block at every step, and against least squares."""

import functools
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import nettrim.methods.exact_obs as exact_obs
from nettrim import prune
from nettrim.core.moments import Moments
from nettrim.errors import ProblemError
from nettrim.methods.base import LayerTask
from nettrim.methods.exact_obs import Obs
from nettrim.methods.masks import Pattern


def random_task(seed, samples=40, columns=8, neurons=4, dead=0, zeros=0.0, bias=True, **changes):
    """Correlated inputs, the first `dead` of them dead, and a fraction of weights that are zero already."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, dtype=torch.float64, generator=generator)

    inputs = normal(samples, columns) @ normal(columns, columns) + 0.3
    inputs[:, :dead] = 0
    weight = normal(neurons, columns)
    weight[torch.rand(neurons, columns, generator=generator) < zeros] = 0
    b = normal(neurons) if bias else None
    made = LayerTask(
        name="fc", relu=True, last=False, clean=True, weight=weight, bias=b, inputs=inputs,
        outputs=inputs @ weight.T + (b if bias else 0), amount="kept", value=10, dtype=torch.float64,
    )  # fmt: skip
    return replace(made, **changes)


def drifted(t, seed=0):
    """The task in a cascade: the outputs are not those of the weight on these inputs."""
    noise = torch.randn(t.outputs.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return replace(t, clean=False, outputs=t.outputs + noise)


def error(t, weight, bias):
    """E, from the definition."""
    return float((t.inputs @ weight.T + (0 if bias is None else bias) - t.outputs).square().sum()) / len(t.inputs)


def damped_gram(t, damping):
    x = t.inputs if t.bias is None else torch.cat([t.inputs, t.inputs.new_ones(len(t.inputs), 1)], 1)
    return x.T @ x / len(x) + damping * torch.eye(x.shape[1]).double()


def slow_trace(t, damping, pattern=None):
    """OBS with the inverse of what is left made anew at every step: the order of each neuron, and the increments."""
    h, n = damped_gram(t, damping), t.weight.shape[1]
    start = t.weight if t.bias is None else torch.cat([t.weight, t.bias[:, None]], 1)
    orders, increments = [], []
    for w in start.clone():
        order = [q for q in range(n) if w[q] == 0]
        left = [q for q in range(len(w)) if w[q] != 0]
        costs = [0.0] * len(order)
        while True:
            room = {q for q in left if q < n}
            if pattern is not None:
                gone = [sum(p // pattern.of == g for p in order) for g in range(n // pattern.of)]
                room = {q for q in room if gone[q // pattern.of] < pattern.of - pattern.keep}
            if not room:
                break
            inverse = torch.linalg.inv(h[left][:, left])
            cost = w[left] ** 2 / inverse.diagonal()
            i = min((i for i, q in enumerate(left) if q in room), key=lambda i: float(cost[i]))
            order.append(left[i])
            costs.append(float(cost[i]))
            w[left] -= w[left[i]] / inverse[i, i] * inverse[:, i]
            del left[i]
        orders.append(order)
        increments.append(costs)
    return orders, increments


def assert_same_trace(trace, slow, rel=1e-7):
    for order, increments, columns, costs in zip(trace.order, trace.increments, *slow, strict=True):
        done = len(columns)
        assert order[:done].tolist() == columns
        assert increments[:done].tolist() == pytest.approx(costs, rel=rel, abs=1e-9)
        assert bool(increments[done:].isinf().all())


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10**6), columns=st.integers(1, 12), neurons=st.integers(1, 5), bias=st.booleans(),
    zeros=st.sampled_from([0.0, 0.5]), samples=st.sampled_from([5, 40]),
)  # fmt: skip
def test_equals_inverting_what_is_left_at_every_step(seed, columns, neurons, bias, zeros, samples):
    t = random_task(seed, samples, columns, neurons, zeros=zeros, bias=bias)
    assert_same_trace(Obs(damping=1e-2).trace(t), slow_trace(t, 1e-2))


@pytest.mark.parametrize("zeros", [0.0, 0.3])
def test_equals_it_over_several_blocks_of_removals(zeros):
    t = random_task(1, samples=400, columns=150, neurons=2, zeros=zeros)
    assert_same_trace(Obs(damping=1e-4).trace(t), slow_trace(t, 1e-4))


def test_the_size_of_blocks_does_not_matter(monkeypatch):
    t = random_task(2, samples=100, columns=30, neurons=7, zeros=0.4)
    expected = Obs().trace(t)
    monkeypatch.setattr(exact_obs, "_STEPS", 4)
    monkeypatch.setattr(exact_obs, "_ENTRIES", 2000)
    found = Obs().trace(t)
    assert torch.equal(found.order, expected.order)
    torch.testing.assert_close(found.increments, expected.increments, rtol=1e-7, atol=1e-12)


@pytest.mark.parametrize("rows", [1, 7, 1000])
def test_the_batches_of_samples_do_not_matter(monkeypatch, rows):
    t = random_task(3)
    expected = Obs().prune_layer(t)
    monkeypatch.setattr(Moments, "of", functools.partial(Moments.of, rows=rows))
    found = Obs().prune_layer(t)
    assert torch.equal(found.weight != 0, expected.weight != 0)
    torch.testing.assert_close(found.weight, expected.weight, rtol=1e-9, atol=1e-12)
    again = Obs().prune_layer(replace(t, inputs=t.inputs.repeat(3, 1), outputs=t.outputs.repeat(3, 1)))
    torch.testing.assert_close(again.weight, expected.weight, rtol=1e-9, atol=1e-12)


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10**6), kept=st.integers(0, 32), dead=st.integers(0, 3), zeros=st.sampled_from([0.0, 0.4]),
    bias=st.sampled_from(["kept", "frozen", None]), clean=st.booleans(), samples=st.sampled_from([4, 40]),
)  # fmt: skip
def test_increments_add_up_to_the_error(seed, kept, dead, zeros, bias, clean, samples):
    t = random_task(seed, samples, dead=dead, zeros=zeros, bias=bias is not None, value=kept)
    t = t if clean else drifted(t, seed)
    trace = Obs(damping=1e-2, bias=bias or "kept").trace(t)
    weight, after = trace.weight_at(kept)
    assert int((weight != 0).sum()) == min(kept, int((t.weight != 0).sum()))
    assert not bool((weight != 0)[t.weight == 0].any())
    joined = torch.cat([weight, after[:, None]], 1) if bias == "kept" else weight
    quadratic = trace.quadratic
    change = (joined - quadratic.start) * ~quadratic.dead  # what dead inputs lose costs nothing
    rise = float(((change @ quadratic.damped) * change).sum())
    assert rise == pytest.approx(float(trace.errors[32 - kept]) - quadratic.floor, rel=1e-7, abs=1e-9)
    assert quadratic.error(joined) == pytest.approx(error(t, weight, after), rel=1e-7, abs=1e-9)
    assert bool((trace.errors.diff() >= 0).all())


def test_layer_counts_follow_the_lowest_increments():
    trace = Obs().trace(random_task(4))
    lowest = trace.increments.flatten().sort().values
    for kept in range(1, 32):
        below = trace.increments <= lowest[32 - kept - 1]
        assert torch.equal(trace.counts_at(kept), below.sum(1))


@pytest.mark.parametrize("bias", [True, False])
def test_a_whole_group_is_least_squares(bias):
    """For any support that OBS ends in, and down to none: then the bias is the mean of the outputs."""
    t = random_task(5, bias=bias)
    trace = Obs(damping=0).trace(t)
    x = t.inputs if not bias else torch.cat([t.inputs, t.inputs.new_ones(40, 1)], 1)
    for kept in (32, 20, 9, 3):
        weight, after = trace.weight_at(kept)
        for m in range(4):
            support = weight[m] != 0
            if bias:
                support = torch.cat([support, torch.tensor([True])])
            if not bool(support.any()):
                continue
            expected = torch.linalg.lstsq(x[:, support], t.outputs[:, m : m + 1]).solution[:, 0]
            found = torch.cat([weight[m], after[m : m + 1]]) if bias else weight[m]
            torch.testing.assert_close(found[support], expected, rtol=1e-6, atol=1e-8)
    weight, after = trace.weight_at(0)
    assert not bool(weight.any())
    if bias:
        torch.testing.assert_close(after, t.outputs.mean(0))


def test_starts_from_a_sparse_weight_in_stages():
    """Pruned to 20 and then to 10 is pruned to 10, where one neuron is all there is to choose from."""
    t = random_task(6, neurons=1, columns=24, samples=100)
    once = Obs().trace(t)
    weight, bias = once.weight_at(12)
    # the second stage is fitted to the first's outputs, off the dense ones by what is orthogonal to the inputs left
    outputs = t.inputs @ weight.T + bias
    twice = Obs().trace(replace(t, weight=weight, bias=bias, outputs=outputs))
    for kept in (11, 6, 1):
        torch.testing.assert_close(twice.weight_at(kept)[0], once.weight_at(kept)[0], rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(twice.weight_at(20)[0], weight, rtol=1e-9, atol=0)


def test_weights_on_dead_inputs_go_first_and_cost_nothing():
    t = random_task(7, dead=3, value=20)
    t.weight[:, :3] *= 1e6
    trace = Obs(damping=0).trace(t)
    assert trace.order[:, :3].sort().values.tolist() == [[0, 1, 2]] * 4
    assert not bool(trace.increments[:, :3].any())
    result = Obs(damping=0).prune_layer(t)
    torch.testing.assert_close(result.weight[:, 3:], t.weight[:, 3:], rtol=1e-9, atol=0)
    result = Obs(damping=0).prune_layer(replace(t, value=25))
    kept = result.weight[:, :3] != 0
    assert int(kept.sum()) == 5
    assert torch.equal(result.weight[:, :3][kept], t.weight[:, :3][kept])


@pytest.mark.parametrize("bias", ["kept", "frozen"])
def test_tolerance_stops_each_neuron_at_the_first_increment_above_it(bias):
    t = random_task(8)
    method = Obs(bias=bias)
    trace = method.trace(t)
    differs = False
    for level in trace.increments.flatten().tolist():
        result = method.prune_layer(replace(t, amount="tolerance", value=(level / 2) ** 0.5 * (1 + 1e-9)))
        below = trace.increments <= level * (1 + 1e-8)
        first = [next((i for i, b in enumerate(row) if not b), 8) for row in below.tolist()]
        assert (result.weight == 0).sum(1).tolist() == first
        differs = differs or below.sum(1).tolist() != first
    assert differs  # some increments fall below those before them, or the test sees nothing


@pytest.mark.parametrize("bias", ["kept", "frozen"])
@pytest.mark.parametrize("damping", [{}, {"relative_damping": 0.1}])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("epsilon", [0.05, 0.3, 2.0])
def test_epsilon_prunes_as_far_as_it_allows(bias, damping, dtype, epsilon):
    t = random_task(9, samples=100, columns=12, amount="epsilon", value=epsilon, dtype=dtype)
    t = replace(t, weight=t.weight.to(dtype).double(), bias=t.bias.to(dtype).double())
    t = replace(t, outputs=t.inputs @ t.weight.T + t.bias)
    method = Obs(bias=bias, **damping)
    budget = epsilon**2 * float(t.outputs.square().sum()) / 100
    result = method.prune_layer(t)
    kept = int((result.weight != 0).sum())
    assert error(t, result.weight.to(dtype).double(), result.bias.to(dtype).double()) <= budget
    assert kept < 48
    if kept:
        weight, after = method.trace(t).weight_at(kept - 1)
        assert error(t, weight.to(dtype).double(), after.to(dtype).double()) > budget


def test_epsilon_is_measured_after_rounding():
    """An epsilon that the fit on 20 weights just meets: rounded to eight bits it misses, and fewer weights go."""
    t = random_task(9, samples=100, columns=12, amount="epsilon", dtype=torch.bfloat16)
    t = replace(t, weight=t.weight.bfloat16().double(), bias=t.bias.bfloat16().double())
    t = replace(t, outputs=t.inputs @ t.weight.T + t.bias)
    power = float(t.outputs.square().sum()) / 100
    just = (error(t, *Obs().trace(t).weight_at(20)) / power) ** 0.5 * (1 + 1e-9)
    exact, rounded = (Obs().prune_layer(replace(t, value=just, dtype=d)) for d in (torch.float64, torch.bfloat16))
    assert int((exact.weight != 0).sum()) == 20
    assert int((rounded.weight != 0).sum()) > 20
    assert error(t, rounded.weight.bfloat16().double(), rounded.bias.bfloat16().double()) <= just**2 * power


def test_epsilon_below_the_floor_of_a_cascade_is_refused():
    t = drifted(random_task(10, samples=100))
    floor = Obs().trace(t).quadratic.floor
    relative = (floor / (float(t.outputs.square().sum()) / 100)) ** 0.5
    with pytest.raises(ProblemError, match=f"epsilon={relative / 2:g} is below {relative:.3g}"):
        Obs().prune_layer(replace(t, amount="epsilon", value=relative / 2))
    result = Obs().prune_layer(replace(t, amount="epsilon", value=relative * 1.1))
    assert 0 < int((result.weight == 0).sum()) < 32


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10**6), pattern=st.sampled_from([(2, 4), (1, 4), (3, 4), (1, 2), (4, 8)]),
    dead=st.integers(0, 5), zeros=st.sampled_from([0.0, 0.3]), bias=st.booleans(),
)  # fmt: skip
def test_patterns_are_kept_exactly(seed, pattern, dead, zeros, bias):
    keep, of = pattern
    t = random_task(seed, columns=16, dead=dead, zeros=zeros, bias=bias, amount="pattern", value=Pattern(keep, of))
    result = Obs(damping=1e-2).prune_layer(t)
    kept = (result.weight != 0).reshape(4, -1, of).sum(2)
    before = (t.weight != 0).reshape(4, -1, of).sum(2)
    assert torch.equal(kept, before.clamp(max=keep))
    if not dead:
        slow = slow_trace(t, 1e-2, Pattern(keep, of))
        assert_same_trace(Obs(damping=1e-2).trace(t), slow)
        assert result.facts["predicted_E"] == pytest.approx(sum(map(sum, slow[1])), rel=1e-7)


def test_a_pattern_loses_dead_inputs_first():
    t = random_task(11, columns=8, amount="pattern", value=Pattern(2, 4))
    t.inputs[:, [1, 4, 5, 6]] = 0
    result = Obs().prune_layer(replace(t, outputs=t.inputs @ t.weight.T + t.bias))
    assert bool((result.weight[:, 1] == 0).all())
    assert torch.equal(result.weight[:, 4:] != 0, torch.tensor([False, False, True, True]).expand(4, 4))


def test_a_trace_of_a_pattern_ends_there():
    trace = Obs().trace(random_task(12, amount="pattern", value=Pattern(2, 4)))
    assert int((trace.weight_at(16)[0] != 0).sum()) == 16
    with pytest.raises(ProblemError, match="kept=15 is out of range: this trace goes from 32 weights to 16"):
        trace.weight_at(15)


@pytest.mark.parametrize("kept", [-1, 33])
def test_a_trace_refuses_an_impossible_count(kept):
    with pytest.raises(ProblemError, match="goes from 32 weights to 0"):
        Obs().trace(random_task(13)).weight_at(kept)


@pytest.mark.parametrize(("amount", "value"), [("kept", 9), ("sparsity", 0.7)])
def test_pruning_is_the_trace_at_that_count(amount, value):
    t = random_task(14, amount=amount, value=value)
    result = Obs().prune_layer(t)
    weight, bias = Obs().trace(t).weight_at(9 if amount == "kept" else 10)
    assert torch.equal(result.weight, weight)
    assert torch.equal(result.bias, bias)
    assert result.facts["E"] == pytest.approx(error(t, weight, bias), rel=1e-9)
    assert result.facts["predicted_E"] == pytest.approx(result.facts["E"], rel=1e-4)
    assert result.facts["damping"] == 1e-6
    assert result.facts["extra_damping"] == 0


def test_collinear_inputs_and_few_samples():
    """Twice the same inputs: one copy of each goes for nearly nothing, and the other takes its weight over."""
    t = random_task(15, samples=12, columns=6)
    twice = replace(t, inputs=t.inputs.repeat(1, 2), weight=t.weight.repeat(1, 2), value=24)
    twice = replace(twice, outputs=twice.inputs @ twice.weight.T + t.bias)
    for damping in (0, 1e-9, 1e-6):
        result = Obs(damping=damping).prune_layer(twice)
        pairs = result.weight.reshape(4, 2, 6)
        assert bool(((pairs != 0).sum(1) == 1).all())
        torch.testing.assert_close(pairs.sum(1), 2 * t.weight, rtol=1e-3, atol=1e-4)
        assert result.facts["extra_damping"] > 0 if damping == 0 else result.facts["extra_damping"] == 0
    few = random_task(16, samples=3, value=16)
    assert int((Obs().prune_layer(few).weight != 0).sum()) == 16


def test_an_indefinite_inverse_is_refused_and_not_ranked():
    quadratic = Obs().trace(random_task(17)).quadratic
    for at, wrong in ((3, -1.0), (3, torch.nan), (3, torch.inf), (8, -1.0)):  # the last is the bias
        inverse = quadratic.inverse.clone()
        inverse[at, at] = wrong
        with pytest.raises(ProblemError, match="lost its positive diagonal"):
            exact_obs._eliminate(replace(quadratic, inverse=inverse), None)
    inverse = quadratic.inverse.clone()
    inverse[3, :3] = inverse[:3, 3] = 100 * inverse.diagonal().max()  # a positive diagonal, till one of them goes
    with pytest.raises(ProblemError, match="lost its positive diagonal"):
        exact_obs._eliminate(replace(quadratic, inverse=inverse), None)


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"bias": "pooled"}, "use kept or frozen"),
        ({"damping": -1.0}, "damping=-1.0 is out of range"),
        ({"damping": 0.1, "relative_damping": 0.1}, "both given"),
    ],
)
def test_refuses_settings(settings, sentence):
    with pytest.raises(ProblemError, match=sentence):
        Obs(**settings)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"outputs": torch.full((40, 4), torch.nan).double()}, "outputs holds NaN"),
        ({"value": Pattern(2, 3), "amount": "pattern"}, "pattern 2:3 does not divide rows of 8"),
        ({"value": -1.0, "amount": "epsilon"}, "epsilon=-1.0 is out of range"),
        ({"value": 33}, "kept=33 is out of range"),
    ],
)
def test_refuses_a_task(changes, sentence):
    with pytest.raises(ProblemError, match=sentence):
        Obs().prune_layer(replace(random_task(18), **changes))


@pytest.mark.parametrize("schedule", ["parallel", "cascade"])
def test_prunes_a_network(network, batches, schedule):
    result = prune(network, batches, Obs(), sparsity=0.8, schedule=schedule, progress=False)
    for record in result.ledger.records:
        assert record.kept == record.numel - int(record.numel * 0.8)
    patterned = prune(network, batches, Obs(), sparsity=Pattern(1, 2), schedule=schedule, progress=False)
    assert all(record.kept == record.numel // 2 for record in patterned.ledger.records)


def test_cascade_is_closer_than_parallel(network, batches):
    """Each layer also makes up for what the ones before it lost."""
    one, other = (
        prune(network, batches, Obs(), sparsity=0.8, schedule=schedule, progress=False).ledger.measured
        for schedule in ("parallel", "cascade")
    )
    assert other < one


@pytest.mark.data
def test_reaches_the_known_errors_on_lenet(data_directory):
    """Relative errors of the last two layers at 10 and 5 % kept, from an independent float64 run."""
    from nettrim.data import load

    folder = data_directory / "lenet300-100"
    x = load(f"mnist:{data_directory / 'mnist'}").train.inputs[5000:].double().reshape(55_000, -1)
    known = {2: (0.170, 0.266), 3: (0.111, 0.205)}
    for i in (1, 2, 3):
        weight = torch.from_numpy(np.load(folder / f"w_layer{i}.npy")).double().T.contiguous()
        bias = torch.from_numpy(np.load(folder / f"b_layer{i}.npy").reshape(-1)).double()
        outputs = x @ weight.T + bias
        if i in known:
            t = LayerTask("fc", i < 3, i == 3, True, weight, bias, x, outputs, "sparsity", 0.9, torch.float32)
            trace = Obs().trace(t)
            for kept, expected in zip((0.1, 0.05), known[i], strict=True):
                count = int(weight.numel() * kept)
                joined = trace.refit(trace.counts_at(count))
                assert int((joined[:, :-1] != 0).sum()) == count
                measured = trace.quadratic.error(joined)
                assert (measured / trace.quadratic.power) ** 0.5 == pytest.approx(expected, abs=5e-4)
                assert measured == pytest.approx(float(trace.errors[weight.numel() - count]), rel=1e-3)
        x = outputs.clamp(min=0)
