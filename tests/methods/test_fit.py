"""The refit of a whole layer against NumPy's least squares, and what it refuses to look at."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nettrim.errors import ProblemError
from nettrim.methods.base import LayerTask
from nettrim.methods.fit import check_task, mean_error, refit, shortfall


def make_task(neurons=4, columns=7, samples=50, bias=True, clean=True, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    x, weight, b = draw(samples, columns), draw(neurons, columns), draw(neurons) if bias else None
    outputs = x @ weight.T + (b if bias else 0.0)
    if not clean:
        x = x + 0.3 * draw(samples, columns)
    return LayerTask("fc", True, False, clean, weight, b, x, outputs, "sparsity", 0.5, torch.float64)


def random_mask(task, seed=1):
    return torch.rand(task.weight.shape, generator=torch.Generator().manual_seed(seed)) < 0.5


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("clean", [True, False])
def test_refit_is_least_squares_toward_the_dense_outputs(bias, clean):
    task = make_task(bias=bias, clean=clean)
    mask = random_mask(task)
    weight, fitted = refit(task, mask)
    assert (fitted is None) == (not bias)
    x = task.inputs.numpy()
    for m in range(4):
        support = np.flatnonzero(mask[m].numpy())
        columns = np.column_stack([x[:, support]] + [np.ones(50)] * bias)
        expected = np.linalg.lstsq(columns, task.outputs[:, m].numpy(), rcond=None)[0]
        np.testing.assert_allclose(weight[m, support], expected[: len(support)], rtol=1e-8, atol=1e-10)
        if bias:
            assert float(fitted[m]) == pytest.approx(expected[-1], rel=1e-8)
        assert not weight[m][~mask[m]].any()


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10_000), samples=st.integers(1, 30), bias=st.booleans(), clean=st.booleans())
def test_a_refit_is_never_worse(seed, samples, bias, clean):
    """Also with fewer samples than inputs, a dead input and one that is there twice."""
    task = make_task(samples=samples, bias=bias, clean=clean, seed=seed)
    task.inputs[:, 2] = 0
    task.inputs[:, 3] = task.inputs[:, 4]
    mask = random_mask(task, seed)
    before = mean_error(task, task.weight * mask, task.bias)
    after = mean_error(task, *refit(task, mask))
    assert after <= before + 1e-9 * float(task.outputs.square().sum()) / samples


def test_a_kept_weight_on_a_dead_input_stays_as_it_is():
    task = make_task()
    task.inputs[:, 2] = 0
    mask = torch.ones_like(task.weight, dtype=torch.bool)
    mask[1, 2] = False
    weight, _ = refit(task, mask)
    assert torch.equal(weight[[0, 2, 3], 2], task.weight[[0, 2, 3], 2])
    assert float(weight[1, 2]) == 0


def test_a_dead_input_does_not_blur_the_fit_of_a_faint_one():
    """It is left out: damping for its sake would be felt by inputs that are small beside the others."""
    task = make_task(bias=False)
    task.inputs[:, 0] *= 1e-5
    task.inputs[:, 2] = 0
    task = replace(task, outputs=task.inputs @ task.weight.T)
    weight, _ = refit(task, torch.ones_like(task.weight, dtype=torch.bool))
    torch.testing.assert_close(weight, task.weight, rtol=1e-4, atol=0)


@pytest.mark.parametrize("rows", [1, 7, 50, 8192])
@pytest.mark.parametrize("bias", [True, False])
def test_mean_error_whatever_the_block(rows, bias):
    task = make_task(bias=bias, clean=False)
    weight = task.weight * random_mask(task)
    outputs = task.inputs @ weight.T + (task.bias if bias else 0.0)
    expected = sum(float((outputs[p] - task.outputs[p]) @ (outputs[p] - task.outputs[p])) for p in range(50)) / 50
    assert mean_error(task, weight, task.bias, rows) == pytest.approx(expected)


def test_shortfall_is_zero_on_the_dense_inputs_alone():
    assert float(shortfall(make_task()).norm()) < 1e-12
    task = make_task(clean=False)
    expected = task.outputs - (task.inputs @ task.weight.T + task.bias)
    torch.testing.assert_close(shortfall(task), expected)
    assert float(expected.norm()) > 1


@pytest.mark.parametrize("name", ["weight", "bias", "inputs", "outputs"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_nan_is_ranked_nowhere(name, value):
    task = make_task()
    damaged = getattr(task, name).clone()
    damaged.view(-1)[2] = value
    with pytest.raises(ProblemError, match=f"layer 'fc': {name} holds NaN or infinity"):
        check_task(replace(task, **{name: damaged}))


@pytest.mark.parametrize("name", ["bias", "inputs", "outputs"])
def test_arrays_that_do_not_fit_are_named(name):
    task = make_task()
    check_task(task)
    with pytest.raises(ProblemError, match=f"{name} has shape"):
        check_task(replace(task, **{name: getattr(task, name)[..., :-1]}))


def test_no_sample_is_refused():
    task = make_task()
    with pytest.raises(ProblemError, match="no sample"):
        check_task(replace(task, inputs=task.inputs[:0], outputs=task.outputs[:0]))
