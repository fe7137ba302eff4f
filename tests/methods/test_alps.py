"""ALPS against a literal dense transcription of the paper's iteration, and against its authors' code on LeNet's fc1."""

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import nettrim
from nettrim.errors import ProblemError
from nettrim.methods.alps import Alps
from nettrim.methods.base import LayerTask
from nettrim.methods.fit import mean_error
from nettrim.methods.masks import Pattern

EXACT = {"refit_iterations": 1000, "refit_tol": 1e-13}


def make_task(neurons=6, columns=16, samples=80, amount="kept", value=30, bias=True, clean=True, seed=0):
    """Correlated inputs of different size."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    x = draw(samples, columns) @ (torch.eye(columns) + 0.4 * draw(columns, columns)) * torch.linspace(0.2, 2, columns)
    w, b = draw(neurons, columns), draw(neurons) if bias else None
    outputs = x @ w.T + (b if bias else 0.0)
    if not clean:
        x = x + 0.3 * draw(samples, columns)
    return LayerTask("fc", True, False, clean, w, b, x, outputs, amount, value, torch.float64)


def slow_reference(x, w_hat, k, targets=None, pattern=None, protect=(), damping=0.01, weights=None):
    """The paper's algorithm in its own layout: X (P, N), W (N, M), sums over samples, dense inverses at every step.

    `targets` are X Ŵ by default; rows in `protect` are always kept; `weights` are the inputs that the damping counts.
    """
    columns = x.shape[1] if weights is None else weights
    lam = damping * np.mean(np.diag(x.T @ x)[:columns])
    h = x.T @ x + lam * np.eye(x.shape[1])
    g = x.T @ (x @ w_hat if targets is None else targets) + lam * w_hat
    e = np.diag(np.diag(h) ** -0.5)
    h_scaled, g_scaled, start = e @ h @ e, e @ g, np.linalg.inv(e) @ w_hat
    free = [n for n in range(len(w_hat)) if n not in protect]

    def project(a):
        out = np.zeros_like(a)
        out[list(protect)] = a[list(protect)]
        for column in range(a.shape[1]) if pattern else ():
            for first in range(0, len(free), pattern.of):
                group = sorted(range(first, first + pattern.of), key=lambda n: -abs(a[n, column]))
                out[group[: pattern.keep], column] = a[group[: pattern.keep], column]
        if not pattern:
            entries = sorted(((n, m) for n in free for m in range(a.shape[1])), key=lambda i: -abs(a[i]))
            for i in entries[:k]:
                out[i] = a[i]
        return out

    d, v, rho, t = project(start), np.zeros_like(start), 0.1, 0
    before = d != 0
    while True:
        w = np.linalg.inv(h_scaled + rho * np.eye(len(h))) @ (g_scaled - v + rho * d)
        d = project(w + v / rho)
        v = v + rho * (w - d)
        t += 1
        if t % 3 == 0:
            s, before = int(((d != 0) ^ before).sum()), d != 0
            if s == 0:
                break
            rho *= 1.3 if s >= 0.1 * k else 1.2 if s >= 0.005 * k else 1.1
    result = np.zeros_like(w_hat)
    for m in range(w_hat.shape[1]):
        support = np.flatnonzero(d[:, m])
        if len(support):
            result[support, m] = np.linalg.solve(h[np.ix_(support, support)], g[support, m])
    return result, t, rho


@pytest.mark.parametrize("kept", [1, 7, 30, 80])
@pytest.mark.parametrize("bias", [True, False])
def test_equals_the_papers_iteration(kept, bias):
    task = make_task(value=kept, bias=bias)
    result = Alps(**EXACT).prune_layer(task)
    expected, iterations, rho = slow_reference(task.inputs.numpy(), task.weight.numpy().T, kept)
    np.testing.assert_allclose(result.weight, expected.T, rtol=1e-7, atol=1e-9)
    assert result.facts["iterations"] == iterations
    assert result.facts["rho"] == pytest.approx(rho)
    assert result.facts["settled"]
    assert result.bias is task.bias


def test_the_search_is_longer_than_one_look():
    """Else the schedule would not be tested above: supports move, and all three factors are used."""
    task = make_task(neurons=20, columns=40, samples=300, value=200)
    facts = Alps().prune_layer(task).facts
    _, iterations, rho = slow_reference(task.inputs.numpy(), task.weight.numpy().T, 200)
    assert (facts["iterations"], facts["rho"]) == (iterations, pytest.approx(rho))
    powers = np.log(facts["rho"] / 0.1)
    assert facts["iterations"] > 15
    assert powers < np.log(1.3) * (facts["iterations"] / 3 - 1) * 0.99


@pytest.mark.parametrize("pattern", [Pattern(2, 4), Pattern(1, 4), Pattern(3, 8)])
def test_pattern_equals_the_papers_iteration(pattern):
    task = make_task(amount="pattern", value=pattern)
    result = Alps(**EXACT).prune_layer(task)
    expected, iterations, _ = slow_reference(task.inputs.numpy(), task.weight.numpy().T, task.kept, pattern=pattern)
    np.testing.assert_allclose(result.weight, expected.T, rtol=1e-7, atol=1e-9)
    assert result.facts["iterations"] == iterations
    assert bool(((result.weight != 0).reshape(-1, pattern.of).sum(1) == pattern.keep).all())


@pytest.mark.parametrize("clean", [True, False])
def test_a_kept_bias_is_one_more_input_that_always_stays(clean):
    task = make_task(value=20, clean=clean)
    x = np.column_stack([task.inputs, np.ones(80)])
    w_hat = np.column_stack([task.weight, task.bias]).T
    for targets in ("own", "dense"):
        result = Alps(bias="kept", targets=targets, **EXACT).prune_layer(task)
        wanted = task.outputs.numpy() if targets == "dense" else None
        expected, *_ = slow_reference(x, w_hat, 20, wanted, protect=(16,), weights=16)
        np.testing.assert_allclose(result.weight, expected[:16].T, rtol=1e-7, atol=1e-9)
        np.testing.assert_allclose(result.bias, expected[16], rtol=1e-7, atol=1e-9)
        assert int((result.weight != 0).sum()) == 20
    assert Alps().prune_layer(task).facts["bias"] == "frozen"
    assert Alps(bias="kept").prune_layer(make_task(bias=False)).facts["bias"] == "absent"


@pytest.mark.parametrize("bias", [True, False])
def test_dense_targets_are_the_dense_networks_outputs(bias):
    task = make_task(clean=False, bias=bias)
    wanted = (task.outputs - (task.bias if bias else 0.0)).numpy()
    result = Alps(targets="dense", **EXACT).prune_layer(task)
    expected, *_ = slow_reference(task.inputs.numpy(), task.weight.numpy().T, 30, wanted)
    np.testing.assert_allclose(result.weight, expected.T, rtol=1e-7, atol=1e-9)
    # with nothing to prune and no damping, least squares toward those outputs
    task = replace(task, amount="sparsity", value=0.0)
    result = Alps(targets="dense", relative_damping=0.0, **EXACT).prune_layer(task)
    best = np.linalg.lstsq(task.inputs.numpy(), wanted, rcond=None)[0]
    np.testing.assert_allclose(result.weight, best.T, rtol=1e-7, atol=1e-9)
    assert result.facts["E"] < Alps().prune_layer(task).facts["E"]


def test_own_targets_do_not_look_at_the_outputs():
    task = make_task(clean=False)
    other = Alps().prune_layer(replace(task, outputs=torch.zeros_like(task.outputs)))
    assert torch.equal(Alps().prune_layer(task).weight, other.weight)


def test_error_is_that_of_the_original_problem():
    """Not of the damped and rescaled one, and the damping is in the unit of the original one."""
    task = make_task(clean=False)
    result = Alps(relative_damping=0.3).prune_layer(task)
    residual = task.inputs @ result.weight.T + task.bias - task.outputs
    assert result.facts["E"] == pytest.approx(float(residual.square().sum()) / 80)
    assert result.facts["damping"] == pytest.approx(0.3 * float(task.inputs.square().mean()))


def test_a_damping_is_used_to_the_last_digit():
    task = make_task()
    result = Alps(relative_damping=0.3, **EXACT).prune_layer(task)
    expected, *_ = slow_reference(task.inputs.numpy(), task.weight.numpy().T, 30, damping=0.3)
    np.testing.assert_allclose(result.weight, expected.T, rtol=1e-10, atol=1e-12)


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 1000), kept=st.integers(1, 24), samples=st.integers(1, 20), ties=st.booleans(),
    dead=st.lists(st.integers(0, 7), max_size=8), relative=st.sampled_from([0.0, 0.01]),
    bias=st.sampled_from(["frozen", "kept"]),
)  # fmt: skip
def test_exact_counts_with_ties_and_dead_inputs(seed, kept, samples, ties, dead, relative, bias):
    task = make_task(3, 8, samples, value=kept, seed=seed)
    if ties:
        task = replace(task, weight=task.weight.sign(), inputs=task.inputs.sign())
    task.inputs[:, dead] = 0
    weight = Alps(relative_damping=relative, bias=bias).prune_layer(task).weight
    assert bool(weight.isfinite().all())
    # a tie may be fitted to exactly zero; a dead input's weight stays only where there is nothing else
    assert int((weight != 0).sum()) == kept or (ties and int((weight != 0).sum()) <= kept)
    assert not (weight[:, dead] != 0).any() or kept > 3 * (8 - len(set(dead)))
    assert torch.equal(weight[:, dead][weight[:, dead] != 0], task.weight[:, dead][weight[:, dead] != 0])


def test_orthogonal_inputs_have_a_known_optimum():
    """Without correlation the largest |w|·‖x‖ are best and stay as they are; a ρ below 1 would leave them to search."""
    task = make_task(samples=64)
    x = torch.linalg.qr(torch.randn(64, 16, dtype=torch.float64))[0] * torch.linspace(0.2, 2, 16)
    task = replace(task, inputs=x, outputs=x @ task.weight.T + task.bias)
    scores = (task.weight * x.norm(dim=0)).abs()
    best = task.weight * (scores >= scores.flatten().sort(descending=True).values[29])
    result = Alps(relative_damping=0.0, rho=2.0, **EXACT).prune_layer(task)
    torch.testing.assert_close(result.weight, best, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("samples", [80, 5])
def test_sparsity_zero_is_the_dense_layer(samples):
    task = make_task(amount="sparsity", value=0.0, samples=samples)
    task.inputs[:, 3] = 0
    result = Alps().prune_layer(task)
    torch.testing.assert_close(result.weight, task.weight, rtol=1e-9, atol=1e-12)
    assert torch.equal(result.weight[:, 3], task.weight[:, 3])


def test_more_refit_steps_are_never_worse():
    """On the damped problem, which is the one that is solved; with no damping it is the original."""
    task = make_task(neurons=20, columns=40, samples=300, value=200)
    errors, masks = [], []
    for steps in (0, 1, 3, 10, 100):
        result = Alps(relative_damping=0.0, refit_iterations=steps, refit_tol=0.0).prune_layer(task)
        errors.append(result.facts["E"])
        masks.append(result.weight != 0)
        assert result.facts["refit_iterations"] <= steps
    assert all(torch.equal(mask, masks[0]) for mask in masks)
    assert all(after <= before * (1 + 1e-12) for before, after in pairwise(errors))
    assert errors[0] > errors[3]
    plain = task.weight.where(masks[0], 0.0)
    assert errors[-1] < mean_error(task, plain, task.bias)


def test_the_refit_says_how_near_it_came():
    task = make_task(neurons=20, columns=40, samples=300, value=400)
    short = Alps(refit_iterations=1).prune_layer(task)
    full = Alps(refit_iterations=100, refit_tol=1e-6).prune_layer(task)
    assert short.facts["refit_residual"] > 1e-4
    assert full.facts["refit_residual"] <= 1e-6 * (1 + 1e-6)
    assert 1 < full.facts["refit_iterations"] < 100


def test_an_iteration_that_is_cut_short_says_so():
    task = make_task(neurons=20, columns=40, samples=300, value=200)
    facts = Alps(max_iter=4).prune_layer(task).facts
    assert facts["iterations"] == 4
    assert facts["settled"] is False


def test_nothing_depends_on_how_the_data_were_batched(network, batches):
    whole = [tuple(torch.cat(parts) for parts in zip(*batches, strict=True))]
    single = [(x[i : i + 1], y[i : i + 1]) for x, y in batches for i in range(len(x))]
    first, *others = (
        nettrim.prune(network, data, Alps(bias="kept"), sparsity=0.6, progress=False).model.state_dict()
        for data in (batches, whole, single)
    )
    for other in others:
        for name, value in first.items():
            torch.testing.assert_close(other[name], value, rtol=1e-5, atol=1e-6)


def test_repeated_samples_and_units_change_nothing():
    task = make_task()
    task.inputs[:, 2] = 0
    result = Alps(**EXACT).prune_layer(task)
    again = replace(task, inputs=task.inputs.repeat(5, 1), outputs=task.outputs.repeat(5, 1))
    torch.testing.assert_close(Alps(**EXACT).prune_layer(again).weight, result.weight, rtol=1e-8, atol=1e-10)
    small = replace(task, inputs=1e-4 * task.inputs)
    torch.testing.assert_close(Alps(**EXACT).prune_layer(small).weight, result.weight, rtol=1e-8, atol=1e-10)


def test_a_second_call_and_the_task_are_not_touched_by_the_first():
    task, method = make_task(clean=False), Alps(bias="kept", targets="dense")
    before = task.weight.clone(), task.inputs.clone(), task.outputs.clone(), task.bias.clone()
    first, second = method.prune_layer(task), method.prune_layer(task)
    assert torch.equal(first.weight, second.weight)
    assert first.facts == second.facts
    for old, new in zip(before, (task.weight, task.inputs, task.outputs, task.bias), strict=True):
        assert torch.equal(old, new)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rho": 0.0}, "rho=0 is out of range"),
        ({"every": 0}, "every=0 is out of range"),
        ({"max_iter": 1.5}, "max_iter=1.5 is out of range"),
        ({"relative_damping": -1}, "relative_damping=-1.0 is out of range"),
        ({"refit_iterations": -1}, "refit_iterations=-1.0 is out of range"),
        ({"refit_tol": float("inf")}, "refit_tol=inf is out of range"),
        ({"targets": "both"}, "use own or dense"),
        ({"bias": "pooled"}, "use frozen or kept"),
        ({"growth": ()}, "is no schedule"),
        ({"growth": ((0.1, 1.3),)}, "is no schedule"),
        ({"growth": ((0.1, 1.3), (0.2, 1.2), (0.0, 1.1))}, "is no schedule"),
        ({"growth": ((0.1, 1.3), (0.0, 1.0))}, "is no schedule"),
        ({"growth": ((0.0, float("inf")),)}, "is no schedule"),
        ({"growth": (1.3, 1.2)}, "is no schedule"),
        ({"growth": (("a", "b"),)}, "is no schedule"),
    ],
)
def test_refuses_settings(settings, message):
    with pytest.raises(ProblemError, match=message):
        Alps(**settings)


def test_failures_raise():
    task = make_task()
    task.inputs[0, 0] = 1e200
    with pytest.raises(ProblemError, match="Gram matrix of 16 inputs is not finite"):
        Alps().prune_layer(task)
    task.inputs[0, 0] = torch.nan
    with pytest.raises(ProblemError, match="inputs holds NaN"):
        Alps().prune_layer(task)
    with pytest.raises(ProblemError, match="does not divide"):
        Alps().prune_layer(make_task(columns=6, amount="pattern", value=Pattern(2, 4)))


@pytest.mark.data
@pytest.mark.parametrize(("share", "error"), [(0.07, 0.189), (0.03, 0.322)])
def test_reproduces_the_released_code_on_lenet(data_directory, share, error):
    """Relative error of fc1's activations on the test images; which 10,000 images theirs saw is not recorded."""
    from nettrim.data import load

    data = load(f"mnist:{data_directory / 'mnist'}")
    x, test = (split.inputs[:10_000].double().flatten(1) for split in (data.train, data.test))
    w, b = (torch.from_numpy(np.load(data_directory / "lenet300-100" / f"{k}_layer1.npy")).double() for k in "wb")
    w, b = w.T.contiguous(), b.flatten()
    kept = round(share * w.numel())
    task = LayerTask("fc1", True, False, True, w, b, x, x @ w.T + b, "kept", kept, torch.float64)
    result = Alps().prune_layer(task)
    assert int((result.weight != 0).sum()) == kept
    dense, pruned = ((test @ u.T + b).clamp(min=0) for u in (w, result.weight))
    assert float((pruned - dense).norm() / dense.norm()) == pytest.approx(error, rel=0.02)
