"""L-OBS against a slow obvious reference, and against what its authors published."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import nettrim.methods.obs as obs
from nettrim.errors import ProblemError
from nettrim.methods import LObs
from nettrim.methods.base import LayerTask
from nettrim.methods.hessian import layer_quadratic, recursive_inverse
from nettrim.methods.masks import Pattern
from nettrim.methods.obs import tolerance_curve


def task(weight, bias, inputs, sparsity, **changes):
    """A layer on the dense network's own inputs."""
    outputs = inputs @ weight.T + (0 if bias is None else bias)
    made = LayerTask(
        name="fc", relu=True, last=False, clean=True, weight=weight, bias=bias, inputs=inputs,
        outputs=outputs, amount="sparsity", value=sparsity, dtype=torch.float64,
    )  # fmt: skip
    return replace(made, **changes)


def random_task(seed, sparsity=0.6, samples=40, columns=7, neurons=4, dead=0, zeros=0.0, bias=True, **changes):
    """Correlated inputs, the first `dead` of them dead, and a fraction of weights that are zero already."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, dtype=torch.float64, generator=generator)

    inputs = normal(samples, columns) @ normal(columns, columns) + 0.3
    inputs[:, :dead] = 0
    weight = normal(neurons, columns)
    weight[torch.rand(neurons, columns, generator=generator) < zeros] = 0
    return task(weight, normal(neurons) if bias else None, inputs, sparsity, **changes)


def with_ones(t):
    """``[X, 1]`` and ``[W, b]``."""
    x = torch.cat([t.inputs, t.inputs.new_ones(len(t.inputs), 1)], 1)
    return x, torch.cat([t.weight, t.bias[:, None]], 1)


def joined(result):
    return torch.cat([result.weight, result.bias[:, None]], 1)


def error(t, weight, bias):
    """E, from the definition."""
    return float((t.inputs @ weight.T + (0 if bias is None else bias) - t.outputs).square().sum()) / len(t.inputs)


def slow_reference(weight, inputs, damping, remove, protect, rerank=False):
    """The paper's loop: one removal at a time, the whole row updated, removed entries never read again."""
    w = weight.clone()
    inverse = torch.linalg.inv(inputs.T @ inputs / inputs.shape[0] + damping * torch.eye(inputs.shape[1]).double())
    gone = torch.zeros_like(w, dtype=torch.bool)

    def score():
        found = (w**2 / (2 * inverse.diagonal())).where(~gone, torch.inf)
        found[:, protect] = torch.inf
        return found

    order = torch.argsort(score().flatten(), stable=True)[:remove].tolist()
    for step in range(remove):
        m, q = divmod(int(score().argmin()) if rerank else order[step], w.shape[1])
        w[m] -= w[m, q] / inverse[q, q] * inverse[:, q]
        gone[m, q] = True
    return w.where(~gone, 0.0)


def test_a_bias_of_zero_compensates_too():
    t = random_task(23)
    t = replace(t, bias=torch.zeros(4).double(), outputs=t.inputs @ t.weight.T)
    x, start = with_ones(t)
    found = joined(LObs().prune_layer(t))
    torch.testing.assert_close(found, slow_reference(start, x, 1e-6, 16, [7]), rtol=1e-7, atol=1e-9)
    assert bool((found[:, -1] != 0).all())


@pytest.mark.parametrize("rerank", [False, True])
@pytest.mark.parametrize("bias", ["kept", "pooled", "frozen", None])
@pytest.mark.parametrize("columns", [7, 150])
def test_equals_one_removal_at_a_time(bias, rerank, columns):
    t = random_task(1, samples=300, columns=columns, bias=bias is not None)
    result = LObs(bias=bias or "kept", rerank=rerank).prune_layer(t)
    ones, start, found = t.inputs, t.weight, result.weight
    if bias in ("kept", "pooled"):
        (ones, start), found = with_ones(t), joined(result)
    protect = [columns] if bias == "kept" else []
    expected = slow_reference(start, ones, 1e-6, int(4 * columns * 0.6), protect, rerank)
    assert torch.equal(found != 0, expected != 0)
    torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-9)
    if bias == "frozen":
        assert torch.equal(result.bias, t.bias)
    assert result.facts["E"] == pytest.approx(error(t, result.weight, result.bias), rel=1e-9)


def test_the_size_of_blocks_does_not_matter(monkeypatch):
    t = random_task(2, samples=100, columns=60, neurons=9)
    expected = LObs().prune_layer(t).weight
    monkeypatch.setattr(obs, "_STEPS", 5)
    monkeypatch.setattr(obs, "_ENTRIES", 700)
    torch.testing.assert_close(LObs().prune_layer(t).weight, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("sweeps", [1, 2, 5])
def test_sweeps_are_gauss_seidel_on_the_group_system(sweeps):
    t = random_task(3)
    result = LObs(sweeps=sweeps).prune_layer(t)
    x, start = with_ones(t)
    inverse = torch.linalg.inv(x.T @ x / len(x) + 1e-6 * torch.eye(8).double())
    score = start.square() / inverse.diagonal()
    score[:, -1] = torch.inf
    order = torch.argsort(score.flatten(), stable=True)[:16].tolist()
    for m in range(4):
        q = [flat % 8 for flat in order if flat // 8 == m]
        a, right, step = inverse[q][:, q], start[m, q], torch.zeros(len(q)).double()
        for _ in range(sweeps):
            for i in range(len(q)):
                step[i] += (right[i] - a[i] @ step) / a[i, i]
        expected = start[m] - inverse[:, q] @ step
        expected[q] = 0
        torch.testing.assert_close(joined(result)[m], expected, rtol=1e-7, atol=1e-9)


def test_many_sweeps_lead_to_the_refit():
    t = random_task(4, columns=4)
    refit = LObs(refit=True).prune_layer(t)
    torch.testing.assert_close(LObs(sweeps=5000).prune_layer(t).weight, refit.weight, rtol=1e-5, atol=1e-7)


def test_refit_is_the_least_squares_weight_on_the_mask():
    t = random_task(5)
    result = LObs(refit=True, bias="pooled").prune_layer(t)
    x, _ = with_ones(t)
    for m, row in enumerate(joined(result)):
        kept = row != 0
        expected = torch.linalg.lstsq(x[:, kept], t.outputs[:, m : m + 1], driver="gelsd").solution[:, 0]
        torch.testing.assert_close(row[kept], expected, rtol=1e-4, atol=1e-5)  # apart from the damping
    assert torch.equal(joined(result) != 0, joined(LObs(bias="pooled").prune_layer(t)) != 0)


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10**6), sparsity=st.floats(0, 0.99), dead=st.integers(0, 3), zeros=st.sampled_from([0, 0.4]),
    samples=st.sampled_from([3, 40]), bias=st.sampled_from(["kept", "frozen", None]), clean=st.booleans(),
    rerank=st.booleans(),
)  # fmt: skip
def test_counts_are_exact_and_refitting_is_never_worse(seed, sparsity, dead, zeros, samples, bias, clean, rerank):
    t = random_task(seed, sparsity, samples=samples, dead=dead, zeros=zeros, bias=bias is not None, clean=clean)
    method = LObs(bias=bias or "kept", rerank=rerank)
    before = int((t.weight != 0).sum())
    result, refit = method.prune_layer(t), replace(method, refit=True).prune_layer(t)
    assert int((result.weight != 0).sum()) == min(t.kept, before)
    assert not bool((result.weight != 0)[t.weight == 0].any())
    assert torch.equal(result.weight != 0, refit.weight != 0)
    quadratic = method.rank(t).quadratic

    def damped_error(found):
        change = (joined(found) if bias == "kept" else found.weight) - quadratic.start
        return float(((change @ quadratic.damped) * change).sum())

    assert damped_error(refit) <= damped_error(result) * (1 + 1e-9) + 1e-12


def test_pooled_biases_are_removed_in_place_of_weights():
    t = random_task(6, sparsity=0.8)
    t = replace(t, bias=t.bias * 1e-3)
    result = LObs(bias="pooled").prune_layer(t)
    gone = int((result.bias == 0).sum())
    assert gone > 0
    assert int((result.weight == 0).sum()) == int(28 * 0.8) - gone


@pytest.mark.parametrize("rerank", [False, True])
def test_weights_on_dead_inputs_go_first_and_cost_nothing(rerank):
    t = random_task(7, dead=2, amount="kept", value=20)
    t.weight[:, :2] *= 1e6
    result = LObs(rerank=rerank).prune_layer(t)
    assert bool((result.weight[:, :2] == 0).all())
    assert torch.equal(result.weight[:, 2:], t.weight[:, 2:])
    assert result.facts["E"] == result.facts["predicted_E"] == 0


def test_single_removal_costs_twice_its_sensitivity():
    t = random_task(8, amount="kept", value=27)
    facts = LObs(damping=0).prune_layer(t).facts
    assert facts["E"] == pytest.approx(facts["predicted_E"], rel=1e-9)
    assert facts["E"] > 0


@pytest.mark.parametrize("bias", ["kept", "pooled"])
def test_tolerance_removes_what_is_below_it(bias):
    t = random_task(9)
    x, start = with_ones(t)
    inverse = torch.linalg.inv(x.T @ x / len(x) + 1e-6 * torch.eye(8).double())
    root = (start.square() / (2 * inverse.diagonal())).sqrt()
    below = root <= root.median()
    result = LObs(bias=bias).prune_layer(replace(t, amount="tolerance", value=float(root.median()) * (1 + 1e-9)))
    if bias == "kept":
        below[:, -1] = False
    assert torch.equal(joined(result) == 0, below)


@pytest.mark.parametrize("method", [LObs(), LObs(sweeps=3), LObs(refit=True), LObs(rerank=True), LObs(bias="pooled")])
def test_tolerance_curve_is_what_pruning_at_each_tolerance_gives(method):
    t = random_task(10, samples=200, columns=80, dead=3, zeros=0.1)
    curve = tolerance_curve(t, method, points=9)
    assert bool((curve.kept.diff() < 0).all())
    assert int(curve.kept[-1]) == 0
    for i, tolerance in enumerate(curve.tolerance.tolist()):
        result = method.prune_layer(replace(t, amount="tolerance", value=tolerance))
        assert int((result.weight != 0).sum()) == int(curve.kept[i])
        assert result.facts["E"] == pytest.approx(float(curve.error[i]), rel=1e-7, abs=1e-9)
    power = float(t.outputs.square().sum()) / 200
    torch.testing.assert_close(curve.relative, (curve.error / power).sqrt())


@pytest.mark.parametrize("seed", range(20))
def test_the_last_tolerance_takes_every_weight(seed):
    assert int(tolerance_curve(random_task(seed), points=2).kept[-1]) == 0


def test_inflection_is_where_the_large_weights_begin():
    x = torch.linalg.qr(torch.randn(50, 20, dtype=torch.float64)).Q * 50**0.5
    weight = torch.ones(3, 20, dtype=torch.float64)
    weight[:, :14] = 1e-3
    weight += 1e-4 * torch.rand(3, 20)
    curve = tolerance_curve(task(weight, None, x, 0.5), points=60)
    assert len(curve.kept) == 60
    assert int(curve.kept[curve.inflection]) == 18  # 3 neurons, 6 large weights each


@pytest.mark.parametrize(
    ("tolerances", "points"), [([0.2, 0.1], 5), ([-1.0, 0.1], 5), ([[0.1]], 5), ([], 5), (None, 1), (None, 2.5)]
)
def test_curve_refuses(tolerances, points):
    with pytest.raises(ProblemError, match=r"tolerances must be|points="):
        tolerance_curve(
            random_task(11), tolerances=None if tolerances is None else torch.tensor(tolerances), points=points
        )


def test_the_recursion_over_samples_gives_the_same_inverse():
    t = random_task(12, samples=80, dead=1)
    x, _ = with_ones(t)
    expected = torch.linalg.inv(x.T @ x / 80 + 1e-2 * torch.eye(8).double())
    assert float((recursive_inverse(x, 1e-2) - expected).abs().max() / expected.abs().max()) < 1e-9
    one, other = (LObs(damping=1e-2, inverse=kind).prune_layer(t) for kind in ("cholesky", "recursive"))
    torch.testing.assert_close(joined(one), joined(other), rtol=1e-9, atol=1e-9)
    with pytest.raises(ProblemError, match="needs one above 0"):
        LObs(damping=0, inverse="recursive").prune_layer(t)


def test_damping_is_reported():
    t = random_task(13)
    assert LObs().prune_layer(t).facts["damping"] == 1e-6
    x, _ = with_ones(t)
    mean = float(x.square().sum(0).mean()) / len(x)
    facts = LObs(relative_damping=0.1).prune_layer(t).facts
    assert facts["damping"] == pytest.approx(0.1 * mean, rel=1e-12)
    assert facts["extra_damping"] == 0
    collinear = task(t.weight, t.bias, torch.cat([t.inputs[:, :6], t.inputs[:, :1]], 1), 0.5)
    facts = LObs(damping=0).prune_layer(collinear).facts
    assert facts["damping"] == facts["extra_damping"] > 0
    quadratic = LObs(damping=0).rank(collinear).quadratic
    added = (quadratic.damped - quadratic.hessian).diagonal()
    assert added.tolist() == pytest.approx([facts["damping"]] * 8, rel=0.1)  # 1e-12 of what it is added to


def test_duplicate_inputs_share_the_load():
    """Of two equal inputs one is free to go: the other takes its weight over."""
    x = torch.randn(30, 1, dtype=torch.float64)
    result = LObs(refit=True).prune_layer(task(torch.tensor([[1.0, 2.0]]).double(), None, x.expand(-1, 2), 0.5))
    assert sorted(result.weight[0].tolist()) == pytest.approx([0, 3], abs=1e-5)
    assert result.facts["E"] < 1e-10


def test_cascade_starts_from_the_least_squares_weight():
    t = random_task(14, samples=60, clean=False, amount="kept", value=28)
    t = replace(t, outputs=t.outputs + torch.randn(60, 4).double())
    result = LObs(damping=0).prune_layer(t)
    x, _ = with_ones(t)
    expected = torch.linalg.lstsq(x, t.outputs).solution.T
    torch.testing.assert_close(joined(result), expected, rtol=1e-7, atol=1e-9)
    assert result.facts["E"] == result.facts["floor"] == pytest.approx(error(t, expected[:, :-1], expected[:, -1]))


@pytest.mark.parametrize("bias", ["kept", "pooled", "frozen"])
@pytest.mark.parametrize("damping", [1e-6, 0.3])
def test_cascade_on_the_dense_inputs_is_the_same_as_parallel(bias, damping):
    t = random_task(15, dead=1, zeros=0.2)
    method = LObs(damping=damping, bias=bias)
    one, other = method.prune_layer(t), method.prune_layer(replace(t, clean=False))
    torch.testing.assert_close(joined(one), joined(other), rtol=1e-6, atol=1e-8)
    assert one.facts["E"] == pytest.approx(other.facts["E"], rel=1e-6)


@pytest.mark.parametrize("bias", ["kept", "frozen"])
def test_cascade_reports_the_error_against_the_dense_outputs(bias):
    t = random_task(16, clean=False)
    t = replace(t, outputs=t.outputs + torch.randn(40, 4).double())
    result = LObs(bias=bias).prune_layer(t)
    assert result.facts["E"] == pytest.approx(error(t, result.weight, result.bias), rel=1e-9)
    assert result.facts["E"] > result.facts["floor"] > 0


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"bias": "both"}, "use kept or pooled or frozen"),
        ({"inverse": "qr"}, "use cholesky or recursive"),
        ({"damping": -1e-6}, "damping=-1e-06 is out of range"),
        ({"damping": float("nan")}, "damping=nan is out of range"),
        ({"relative_damping": "0.1"}, "relative_damping='0.1' is out of range"),
        ({"damping": 1e-6, "relative_damping": 0.01}, "both given"),
        ({"sweeps": 0}, "sweeps=0 is out of range"),
        ({"sweeps": True}, "sweeps=True is out of range"),
        ({"sweeps": 3, "refit": True}, "changes nothing"),
        ({"rerank": "yes"}, "neither True nor False"),
    ],
)
def test_refuses_settings(settings, sentence):
    with pytest.raises(ProblemError, match=sentence):
        LObs(**settings)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"inputs": torch.full((40, 7), torch.nan).double()}, "inputs holds NaN"),
        ({"inputs": torch.full((40, 7), 1e200, dtype=torch.float64)}, "not finite"),
        ({"inputs": torch.zeros(40, 6).double()}, r"inputs has shape \(40, 6\)|weight has shape"),
        ({"bias": torch.tensor([1, 2, 3, torch.inf]).double()}, "bias holds NaN or infinity"),
        ({"amount": "tolerance", "value": -0.1}, "tolerance=-0.1 is out of range"),
        ({"amount": "tolerance", "value": Pattern(2, 4)}, "tolerance=2:4 is out of range"),
        ({"amount": "epsilon", "value": 0.1}, "epsilon says no number of weights"),
    ],
)
def test_refuses_a_task(changes, sentence):
    with pytest.raises(ProblemError, match=sentence):
        LObs().prune_layer(replace(random_task(17), **changes))


def test_an_inverse_that_overflows_is_refused_and_not_ranked():
    t = random_task(18)
    tiny = replace(t, inputs=torch.randn(40, 7).double() * 1e-156, bias=None)
    with pytest.raises(
        ProblemError, match="7 of 7 diagonal entries of the inverse Hessian are not positive and finite"
    ):
        LObs(damping=0).prune_layer(tiny)


@pytest.mark.parametrize("kept", [-1, 29])
def test_ranking_refuses_an_impossible_count(kept):
    with pytest.raises(ProblemError, match="the layer has 28 weights"):
        LObs().rank(random_task(19)).weight_at(kept)


def test_one_ranking_serves_every_count():
    t = random_task(20)
    ranking = LObs().rank(t)
    for kept in (0, 5, 14, 28):
        weight, bias = ranking.weight_at(kept)
        result = LObs().prune_layer(replace(t, amount="kept", value=kept))
        assert torch.equal(weight, result.weight)
        assert torch.equal(bias, result.bias)


def test_relative_error_refers_to_the_whole_output():
    """Also where the bias is frozen, and not part of the quadratic."""
    t = random_task(21)
    power = float(t.outputs.square().sum()) / 40
    for changes in ({}, {"clean": False}):
        for fit_bias in (True, False):
            assert layer_quadratic(replace(t, **changes), 1e-6, None, fit_bias).power == pytest.approx(power)


@pytest.mark.data
def test_reproduces_the_network_that_the_authors_shipped(data_directory):
    """Their pruned LeNet-300-100: the last 55,000 training images, 80 % of every layer, biases in the pool."""
    from nettrim.data import load

    folder = data_directory / "lenet300-100"
    data = load(f"mnist:{data_directory / 'mnist'}")
    x = data.train.inputs[5000:].double().reshape(55_000, -1)
    images = data.test.inputs.double().reshape(10_000, -1)

    def read(name, i):
        return torch.from_numpy(np.load(folder / name.format(i))).double()

    dense, pruned = images, images
    for i, stated in ((1, 96.9901), (2, 390.321), (3, 1293.01)):
        weight, bias = read("w_layer{}.npy", i).T.contiguous(), read("b_layer{}.npy", i).reshape(-1)
        result = LObs(bias="pooled").prune_layer(task(weight, bias, x, 0.8))
        shipped = read("pruned-by-authors/w_layer{}.npy", i).T
        shipped_bias = read("pruned-by-authors/b_layer{}.npy", i).reshape(-1)
        assert int(((shipped != 0) != (result.weight != 0)).sum()) == 0
        assert int(((shipped_bias != 0) != (result.bias != 0)).sum()) == 0
        assert float((result.weight - shipped).norm() / shipped.norm()) < 1e-6
        assert result.facts["E"] == pytest.approx(stated, rel=5e-6)  # stated to six digits
        x = (x @ weight.T + bias).clamp(min=0)
        dense = (dense.clamp(min=0) if i > 1 else dense) @ weight.T + bias
        pruned = (pruned.clamp(min=0) if i > 1 else pruned) @ result.weight.T + result.bias
    assert int((dense.argmax(1) == data.test.labels).sum()) == 9839
    assert int((pruned.argmax(1) == data.test.labels).sum()) == 9664
