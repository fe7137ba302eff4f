"""Magnitude: exact counts and N:M by loops, and the refit that nobody asked for does not happen."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nettrim.errors import ProblemError
from nettrim.methods.base import LayerTask
from nettrim.methods.fit import mean_error
from nettrim.methods.magnitude import Magnitude
from nettrim.methods.masks import Pattern


def make_task(weight, amount, value, bias=True, samples=40):
    x = torch.randn(samples, weight.shape[1], dtype=torch.float64)
    b = torch.randn(len(weight), dtype=torch.float64) if bias else None
    outputs = x @ weight.T + (b if bias else 0.0)
    return LayerTask("fc", True, False, True, weight, b, x, outputs, amount, value, torch.float64)


@given(st.lists(st.sampled_from([-2.0, -1.0, 1.0, 1.0, 3.0]), min_size=12, max_size=12), st.integers(1, 12))
def test_keeps_exactly_the_largest_with_ties(values, kept):
    weight = torch.tensor(values, dtype=torch.float64).reshape(3, 4)
    result = Magnitude().prune_layer(make_task(weight, "kept", kept))
    best = sorted(range(12), key=lambda i: (-abs(values[i]), i))[:kept]
    expected = torch.zeros(12, dtype=torch.float64)
    expected[best] = weight.flatten()[best]
    assert torch.equal(result.weight.flatten(), expected)


def test_nothing_that_stays_is_changed_unless_asked_for():
    task = make_task(torch.randn(5, 8, dtype=torch.float64), "sparsity", 0.0)
    result = Magnitude().prune_layer(task)
    assert torch.equal(result.weight, task.weight)
    assert result.bias is task.bias


@pytest.mark.parametrize("refit", [False, True])
def test_pattern(refit):
    task = make_task(torch.randn(5, 8, dtype=torch.float64), "pattern", Pattern(1, 4))
    result = Magnitude(refit=refit).prune_layer(task)
    groups = task.weight.abs().reshape(-1, 4)
    for found, group in zip((result.weight != 0).reshape(-1, 4), groups, strict=True):
        assert found.tolist() == [i == int(group.argmax()) for i in range(4)]


@pytest.mark.parametrize("bias", [True, False])
def test_refit_keeps_the_mask_and_lowers_the_error(bias):
    task = make_task(torch.randn(5, 8, dtype=torch.float64), "kept", 17, bias)
    plain, fitted = Magnitude().prune_layer(task), Magnitude(refit=True).prune_layer(task)
    assert torch.equal(plain.weight != 0, fitted.weight != 0)
    assert mean_error(task, fitted.weight, fitted.bias) < mean_error(task, plain.weight, plain.bias)
    residual = task.inputs @ fitted.weight.T - task.outputs + (fitted.bias if bias else 0.0)
    gradient = residual.T @ task.inputs
    torch.testing.assert_close(gradient * (fitted.weight != 0), torch.zeros_like(gradient), rtol=0, atol=1e-10)
    if bias:
        torch.testing.assert_close(residual.sum(0), torch.zeros(5, dtype=torch.float64), rtol=0, atol=1e-10)


def test_refuses_nan_and_a_pattern_that_does_not_divide():
    task = make_task(torch.randn(5, 6, dtype=torch.float64), "pattern", Pattern(2, 4))
    with pytest.raises(ProblemError, match="does not divide"):
        Magnitude().prune_layer(task)
    weight = task.weight.clone()
    weight[0, 0] = torch.nan
    with pytest.raises(ProblemError, match="weight holds NaN"):
        Magnitude().prune_layer(replace(task, weight=weight, amount="kept", value=3))
