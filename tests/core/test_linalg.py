"""Gram matrices do not depend on how they were accumulated; one damping policy, and it is reported."""

from __future__ import annotations

import pytest
import torch

from nettrim.core.linalg import RidgeInverse, damped_inverse, gram
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
