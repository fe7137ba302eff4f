"""Gram matrices do not depend on how they were accumulated; one damping policy, and it is reported; masked CG."""

from __future__ import annotations

import pytest
import torch

from nettrim.core.linalg import RidgeInverse, damped_inverse, gram, masked_cg, second_moment
from nettrim.errors import ProblemError


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@pytest.mark.parametrize("rows", [1, 2, 7, 50, 51, 8192])
def test_gram_whatever_the_block(rows):
    x = draw(50, 6)
    torch.testing.assert_close(gram(x, rows=rows), x.T @ x, rtol=1e-13, atol=1e-13)


def test_gram_is_float64_from_the_start():
    x = draw(50, 6, dtype=torch.float32)
    assert gram(x, rows=8).dtype == torch.float64
    torch.testing.assert_close(gram(x, rows=8), x.double().T @ x.double(), rtol=1e-13, atol=1e-13)


def test_no_damping_where_none_is_needed():
    x = draw(50, 6)
    inverse, damping = damped_inverse(x.T @ x)
    assert damping == 0
    torch.testing.assert_close(inverse @ (x.T @ x), torch.eye(6, dtype=torch.float64), rtol=0, atol=1e-12)


def test_a_huge_or_tiny_unit_is_no_reason_to_damp():
    x = draw(50, 6)
    for unit in (1e-12, 1e12):
        assert damped_inverse(unit * (x.T @ x))[1] == 0


def test_damping_of_a_singular_matrix_is_reported_and_exact():
    x = draw(50, 6)
    x[:, 5] = 0
    matrix = x.T @ x
    inverse, damping = damped_inverse(matrix)
    assert damping == pytest.approx(1e-12 * float(matrix.diagonal().mean()))
    damped = matrix + damping * torch.eye(6, dtype=torch.float64)
    torch.testing.assert_close(inverse @ damped, torch.eye(6, dtype=torch.float64), rtol=0, atol=1e-9)


def test_damping_grows_until_it_is_enough():
    # smallest eigenvalue −1e-7: 1e-8 of the mean diagonal (about 2/3) fails, 1e-6 does not
    matrix = torch.diag(torch.tensor([1.0, 1.0, -1e-7], dtype=torch.float64))
    inverse, damping = damped_inverse(matrix)
    assert damping == pytest.approx(1e-6 * 2 / 3, rel=1e-6)
    torch.testing.assert_close(inverse.diagonal(), 1 / (matrix.diagonal() + damping))


@pytest.mark.parametrize(
    "matrix",
    [
        -torch.eye(3, dtype=torch.float64),
        torch.diag(torch.tensor([1.0, 1.0, -1.0], dtype=torch.float64)),
        torch.full((3, 3), torch.nan, dtype=torch.float64),
        torch.full((3, 3), torch.inf, dtype=torch.float64),
        torch.zeros(3, 3, dtype=torch.float64),
    ],
    ids=["negative", "indefinite", "nan", "infinite", "zero"],
)
def test_what_no_damping_repairs(matrix):
    with pytest.raises(ProblemError, match="Gram matrix of size 3 has no Cholesky factor"):
        damped_inverse(matrix)


@pytest.mark.parametrize("shape", [(20, 6), (6, 20), (6, 6), (1, 5), (5, 1)])
@pytest.mark.parametrize(("a", "b"), [(1.0, 1.0), (1e-3, 10.0), (1e3, 1e-2)])
def test_ridge_inverse_is_the_dense_solve(shape, a, b):
    x, v = draw(*shape), draw(shape[1], 3, seed=1)
    ridge = RidgeInverse(x)
    ridge.update(7.0, 7.0)  # an earlier factorisation leaves nothing behind
    ridge.update(a, b)
    assert ridge.wide == (shape[0] < shape[1])
    assert ridge.damping == 0
    matrix = a * x.T @ x + b * torch.eye(shape[1], dtype=torch.float64)
    torch.testing.assert_close(ridge.apply(v), torch.linalg.solve(matrix, v), rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("shape", [(20, 6), (6, 20)])
def test_ridge_inverse_works_in_the_dtype_of_the_inputs(shape):
    x, v = draw(*shape, dtype=torch.float32), draw(shape[1], 3, seed=1, dtype=torch.float32)
    ridge = RidgeInverse(x)
    ridge.update(1.0, 0.5)
    matrix = x.double().T @ x.double() + 0.5 * torch.eye(shape[1], dtype=torch.float64)
    assert ridge.apply(v).dtype == torch.float32
    torch.testing.assert_close(ridge.apply(v), torch.linalg.solve(matrix, v.double()).float(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shape", [(20, 6), (6, 20)])
def test_mean_diagonal_is_of_the_gram_of_columns(shape):
    x = draw(*shape)
    assert RidgeInverse(x).mean_diagonal == pytest.approx(float((x.T @ x).diagonal().mean()))


def test_second_moment_counts_the_rows_itself():
    x = draw(50, 6)
    torch.testing.assert_close(second_moment(x), x.T @ x / 50, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(second_moment(x.repeat(7, 1)), second_moment(x), rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, 1e200])
def test_second_moment_refuses_what_is_not_finite(value):
    x = draw(50, 6)
    x[3, 2] = value
    with pytest.raises(ProblemError, match="Gram matrix of 6 inputs is not finite"):
        second_moment(x)


def masked_system(neurons: int = 5, columns: int = 12, rows: int = 40, seed: int = 0):
    """Inputs of very different size, and a support of its own for every neuron; the last has none."""
    x = draw(rows, columns, seed=seed) * torch.logspace(-2, 2, columns, dtype=torch.float64)
    y = draw(rows, neurons, seed=seed + 1)
    mask = draw(neurons, columns, seed=seed + 2) > 0
    mask[-1] = False
    return x.T @ x, x.T @ y, mask


def dense_solve(matrix, cross, mask):
    weight = torch.zeros(mask.shape, dtype=torch.float64)
    for m, row in enumerate(mask):
        support = row.nonzero()[:, 0]
        if len(support):
            weight[m, support] = torch.linalg.solve(matrix[support][:, support], cross[support, m])
    return weight


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("warm", [False, True])
def test_masked_cg_is_the_dense_solve_on_every_support(seed, warm):
    matrix, cross, mask = masked_system(seed=seed)
    start = draw(*mask.shape, seed=9) if warm else None
    weight, iterations, residual = masked_cg(matrix, cross, mask, start, tol=1e-12)
    torch.testing.assert_close(weight, dense_solve(matrix, cross, mask), rtol=1e-8, atol=1e-11)
    assert bool((weight[~mask] == 0).all())
    assert 0 < iterations <= 60
    assert residual <= 1e-11


def test_masked_cg_stops_by_the_masked_residual_and_says_what_it_is():
    matrix, cross, mask = masked_system(columns=60, rows=200)
    counts = []
    for tol in (1e-2, 1e-5, 1e-10):
        weight, iterations, residual = masked_cg(matrix, cross, mask, tol=tol)
        left = (cross.T - weight @ matrix).where(mask, 0.0).norm(dim=1)
        size = cross.T.where(mask, 0.0).norm(dim=1)
        assert residual == pytest.approx(float((left / size)[:-1].max()))
        assert residual <= tol * (1 + 1e-6)
        counts.append(iterations)
        # off the support the residual is large at the very solution
        assert float((cross.T - weight @ matrix)[:-1].norm()) > 0.1 * float(cross.norm())
    assert 0 < counts[0] < counts[1] < counts[2] < 100


def test_masked_cg_starts_at_the_solution_and_stays():
    matrix, cross, mask = masked_system()
    solution = dense_solve(matrix, cross, mask)
    weight, iterations, _ = masked_cg(matrix, cross, mask, solution + (~mask) * 7.0, tol=1e-9)
    assert iterations == 0
    assert torch.equal(weight, solution)


def test_masked_cg_without_iterations_returns_the_start_and_its_residual():
    matrix, cross, mask = masked_system()
    weight, iterations, residual = masked_cg(matrix, cross, mask, max_iter=0)
    assert (iterations, residual) == (0, 1.0)
    assert not bool(weight.any())


def test_masked_cg_preconditions_by_the_diagonal():
    """A diagonal matrix of any condition takes one step."""
    matrix = torch.diag(torch.logspace(-8, 8, 12, dtype=torch.float64))
    mask = draw(4, 12) > 0
    weight, iterations, _ = masked_cg(matrix, draw(12, 4, seed=1), mask, tol=1e-12)
    assert iterations == 1
    torch.testing.assert_close(weight, dense_solve(matrix, draw(12, 4, seed=1), mask), rtol=1e-10, atol=0)


def test_masked_cg_of_zero_targets_is_zero_wherever_it_starts():
    matrix, cross, mask = masked_system()
    cross[:, 1] = 0
    weight, _, residual = masked_cg(matrix, cross, mask, draw(*mask.shape), tol=1e-12)
    assert not bool(weight[1].any())
    assert residual <= 1e-11


def test_masked_cg_fits_singular_systems_that_have_a_solution():
    x = draw(40, 6)
    x = torch.cat([x, x[:, :2], torch.zeros(40, 1, dtype=torch.float64)], dim=1)
    y = draw(40, 3, seed=1)
    mask = torch.ones(3, 9, dtype=torch.bool)
    weight, iterations, residual = masked_cg(x.T @ x, x.T @ y, mask, tol=1e-10)
    assert residual <= 1e-9
    assert iterations < 50
    best = (x[:, :6] @ torch.linalg.lstsq(x[:, :6], y).solution - y).norm()
    assert float((x @ weight.T - y).norm()) == pytest.approx(float(best), rel=1e-9)


def test_masked_cg_ends_and_says_so_where_there_is_no_solution():
    matrix = torch.diag(torch.tensor([1.0, 0.0], dtype=torch.float64))
    cross = torch.ones(2, 1, dtype=torch.float64)
    _, iterations, residual = masked_cg(matrix, cross, torch.ones(1, 2, dtype=torch.bool))
    assert iterations < 1000
    assert residual > 0.1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda g, c, m: (g[:3], c, m, None), "do not match"),
        (lambda g, c, m: (g, c.T, m, None), "do not match"),
        (lambda g, c, m: (g, c, m, torch.zeros(1, 12, dtype=torch.float64)), r"start \(1, 12\) does not match"),
        (lambda g, c, m: (g * torch.nan, c, m, None), "not finite"),
        (lambda g, c, m: (g, c + torch.inf, m, None), "not finite"),
        (lambda g, c, m: (g, c, m, torch.full((5, 12), torch.nan, dtype=torch.float64)), "not finite"),
        (lambda g, c, m: (g - 2 * torch.diag(g.diagonal()), c, m, None), "not positive semi-definite"),
    ],
)
def test_masked_cg_refuses(change, message):
    with pytest.raises(ProblemError, match=message):
        masked_cg(*change(*masked_system()))
