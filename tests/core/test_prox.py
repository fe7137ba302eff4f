"""The closed-form steps against brute force over a grid, and against their own definitions."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nettrim.core.prox import ball_step, quadratic_step, soft_threshold

SEEDED = settings(derandomize=True, database=None, deadline=None, max_examples=60)
GRID = torch.linspace(-4, 4, 1601, dtype=torch.float64)  # steps of 0.005
numbers = st.floats(-3, 3, allow_nan=False)
positive = st.floats(0.05, 3, allow_nan=False)


def residual_off(a):
    """R = A − P_K(A) for K = {w : w₁ = 1, w₂ ≤ 0.5}: one active entry with target 1, one inactive with ceiling 0.5."""
    return torch.stack([a[..., 0] - 1.0, (a[..., 1] - 0.5).clamp(min=0)], dim=-1)


def two_dimensions():
    return torch.stack(torch.meshgrid(GRID[::4], GRID[::4], indexing="ij"), dim=-1)


@SEEDED
@given(a=numbers, t=positive)
def test_soft_threshold_is_the_minimiser(a, t):
    value = t * GRID.abs() + 0.5 * (GRID - a) ** 2
    found = float(soft_threshold(torch.tensor(a, dtype=torch.float64), t))
    assert found == pytest.approx(float(GRID[value.argmin()]), abs=0.006)
    assert t * abs(found) + 0.5 * (found - a) ** 2 <= float(value.min()) + 1e-12


def test_soft_threshold_is_exactly_zero_inside_and_takes_a_threshold_each():
    a = torch.tensor([[0.3, -0.3, 2.0], [-2.0, 0.0, 1.0]], dtype=torch.float64)
    assert soft_threshold(a, 0.5).tolist() == [[0.0, 0.0, 1.5], [-1.5, 0.0, 0.5]]
    t = torch.tensor([[0.0, 0.5, 0.5], [1.0, 0.5, 2.0]], dtype=torch.float64)
    torch.testing.assert_close(soft_threshold(a, t), torch.sign(a) * (a.abs() - t).clamp(min=0))


@SEEDED
@given(a=st.tuples(numbers, numbers), radius=positive)
def test_ball_step_finds_the_nearest_point_of_the_ball(a, radius):
    point = torch.tensor(a, dtype=torch.float64)
    nearest = point - ball_step(residual_off(point), radius)
    assert float(torch.linalg.vector_norm(residual_off(nearest))) <= radius * (1 + 1e-12)
    grid = two_dimensions()
    inside = torch.linalg.vector_norm(residual_off(grid), dim=-1) <= radius
    best = torch.linalg.vector_norm((grid - point)[inside], dim=-1).min()
    found = torch.linalg.vector_norm(nearest - point)
    assert float(found) <= float(best) + 1e-12
    assert float(best) - float(found) < 0.03  # the grid's width is 0.02


@SEEDED
@given(a=st.tuples(numbers, numbers), lam=positive, rho=positive)
def test_quadratic_step_is_the_minimiser(a, lam, rho):
    point = torch.tensor(a, dtype=torch.float64)

    def value(w):
        return lam / 2 * (residual_off(w) ** 2).sum(-1) + rho / 2 * ((w - point) ** 2).sum(-1)

    found = float(value(point - quadratic_step(residual_off(point), lam, rho)))
    best = float(value(two_dimensions()).min())
    assert found <= best + 1e-12
    assert best - found < 1e-3 * (lam + rho)


def test_ball_step_per_neuron_is_the_step_of_each_column():
    residual = torch.randn(7, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    radius = torch.tensor([0.5, 100.0, 0.0], dtype=torch.float64)
    each = ball_step(residual, radius, per_neuron=True)
    columns = [ball_step(residual[:, m], float(radius[m])) for m in range(3)]
    torch.testing.assert_close(each, torch.stack(columns, dim=1))
    assert not each[:, 1].any()  # inside its ball: no step
    assert torch.equal(each[:, 2], residual[:, 2])  # radius 0: the whole way
    joint = ball_step(residual, 0.5)
    torch.testing.assert_close(joint, residual * (1 - 0.5 / (residual**2).sum().sqrt()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("per_neuron", [False, True])
def test_no_residual_no_step(per_neuron, dtype):
    zero = torch.zeros(4, 2, dtype=dtype)
    radius = torch.tensor([0.0, 1.0], dtype=dtype) if per_neuron else 0.5
    step = ball_step(zero, radius, per_neuron)
    assert step.dtype == dtype
    assert torch.equal(step, zero)
