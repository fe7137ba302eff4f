"""Refits on a support against NumPy's least squares, one neuron at a time."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nettrim.core.linalg import gram
from nettrim.core.support import refit_linear, support_batches
from nettrim.errors import ProblemError


def random_mask(neurons, columns, generator):
    share = torch.rand(neurons, 1, generator=generator)
    return torch.rand(neurons, columns, generator=generator) < share


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 9), st.integers(1, 12))
def test_equals_least_squares(seed, neurons, columns):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(40, columns, generator=generator, dtype=torch.float64)
    y = torch.randn(40, neurons, generator=generator, dtype=torch.float64)
    mask = random_mask(neurons, columns, generator)
    weight = refit_linear(gram(x), x.T @ y, mask)
    assert bool((weight[~mask] == 0).all())
    for m in range(neurons):
        support = mask[m].nonzero()[:, 0]
        expected = torch.linalg.lstsq(x[:, support], y[:, m : m + 1]).solution[:, 0]
        torch.testing.assert_close(weight[m, support], expected, rtol=1e-8, atol=1e-10)


def test_batches_cover_every_neuron_once_and_stay_small():
    mask = random_mask(50, 20, torch.Generator().manual_seed(1))
    mask[:, 0] = True
    mask[7] = False
    seen = []
    for rows, support, valid in support_batches(mask, entries=1000):
        assert len(rows) * support.shape[1] ** 2 <= 1000
        seen += rows.tolist()
        for row, columns, real in zip(rows.tolist(), support, valid, strict=True):
            assert columns[real].tolist() == mask[row].nonzero()[:, 0].tolist()
    assert sorted(seen) == [m for m in range(50) if m != 7]


def test_collinear_inputs_are_fitted_all_the_same():
    x = torch.randn(30, 3, dtype=torch.float64)
    x = torch.cat([x, x[:, :1]], dim=1)
    y = x @ torch.randn(4, 2, dtype=torch.float64)
    weight = refit_linear(gram(x), x.T @ y, torch.ones(2, 4, dtype=torch.bool))
    assert float((x @ weight.T - y).norm() / y.norm()) < 1e-5


def test_refuses_shapes_that_do_not_match():
    with pytest.raises(ProblemError, match="do not match"):
        refit_linear(torch.eye(3), torch.ones(2, 3), torch.ones(2, 3, dtype=torch.bool))
