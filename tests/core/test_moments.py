"""Moments against sums written out row by row, whatever the batches, and how near the error by them comes."""

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from nettrim.core.moments import Moments
from nettrim.errors import ProblemError

FIELDS = ("gram", "cross", "power")


def draw(samples=30, columns=5, neurons=3, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(samples, columns, generator=generator, dtype=torch.float64) + 0.5
    y = torch.randn(samples, neurons, generator=generator, dtype=torch.float64) - 0.2
    return x.to(dtype), y.to(dtype)


def slow_sums(x, y):
    """The definition, one row after the other."""
    size = x.shape[1] + 1
    gram, cross = torch.zeros(size, size).double(), torch.zeros(size, y.shape[1]).double()
    power = 0.0
    for row, target in zip(x.double(), y.double(), strict=True):
        one = torch.cat([row, torch.ones(1).double()])
        gram += one[:, None] * one
        cross += one[:, None] * target
        power += sum(float(t) ** 2 for t in target)
    return gram, cross, torch.tensor(power, dtype=torch.float64)


def assert_near(found, expected, rel=1e-12):
    for name, (one, other) in zip(FIELDS, ((getattr(found, n), getattr(expected, n)) for n in FIELDS), strict=True):
        scale = float(other.abs().max()) if other.numel() else 0.0
        torch.testing.assert_close(one, other, rtol=rel, atol=rel * scale, msg=lambda m, n=name: f"{n}: {m}")
    assert found.count == expected.count


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 7, 30, 8192])
def test_are_the_sums_over_the_rows(dtype, rows):
    x, y = draw(dtype=dtype)
    found = Moments.of(x, y, rows)
    gram, cross, power = slow_sums(x, y)
    torch.testing.assert_close(found.gram, gram, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(found.cross, cross, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(found.power, power, rtol=1e-13, atol=0)
    assert found.count == 30
    assert found.columns == 5
    assert float(found.gram[-1, -1]) == 30
    assert all(getattr(found, name).dtype == torch.float64 for name in FIELDS)


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10**6), cuts=st.lists(st.integers(0, 50), max_size=6), rows=st.integers(1, 60),
    columns=st.integers(1, 9), neurons=st.integers(1, 4), scale=st.sampled_from([1e-6, 1.0, 1e6]),
    single=st.booleans(), backwards=st.booleans(),
)  # fmt: skip
def test_the_batches_do_not_matter(seed, cuts, rows, columns, neurons, scale, single, backwards):
    x, y = draw(50, columns, neurons, seed, torch.float32 if single else torch.float64)
    x = x * scale
    edges = [0, *sorted(cuts), 50]  # empty batches too
    parts = [Moments.of(x[a:b], y[a:b], rows) for a, b in pairwise(edges)]
    total = sum(parts[::-1] if backwards else parts, Moments.zeros(columns, neurons))
    assert_near(total, Moments.of(x, y))
    assert torch.equal(total.gram[-1], total.gram[:, -1])


def test_adding_changes_neither():
    x, y = draw()
    one, other = Moments.of(x[:10], y[:10]), Moments.of(x[10:], y[10:])
    before = [getattr(m, name).clone() for m in (one, other) for name in FIELDS]
    assert_near(one + other, Moments.of(x, y))
    assert all(map(torch.equal, before, [getattr(m, name) for m in (one, other) for name in FIELDS]))


def test_no_second_copy_of_the_inputs_arises():
    """No tensor of more than a block of rows is made on the way, though float32 is summed in float64."""

    class Largest(TorchDispatchMode):
        size = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor):
                Largest.size = max(Largest.size, result.numel())
            return result

    x, y = draw(5000, 6, 4, dtype=torch.float32)
    with Largest():
        Moments.of(x, y, rows=64)
    assert 0 < Largest.size <= 64 * 6


def test_what_methods_read_off_them():
    x, y = draw()
    x[:, 3] = 0
    moments, ones = Moments.of(x, y), torch.cat([x, torch.ones(30, 1).double()], 1)
    assert moments.dead.tolist() == [False, False, False, True, False]
    torch.testing.assert_close(moments.norms, x.norm(dim=0))
    torch.testing.assert_close(moments.mean, x.mean(0))
    torch.testing.assert_close(moments.second_moment(), x.T @ x / 30)
    torch.testing.assert_close(moments.second_moment(ones=True), ones.T @ ones / 30)
    torch.testing.assert_close(moments.cross_moment(), x.T @ y / 30)
    torch.testing.assert_close(moments.cross_moment(ones=True), ones.T @ y / 30)
    assert float(moments.second_moment(ones=True)[-1, -1]) == 1


def test_what_is_read_off_may_be_written_to():
    moments = Moments.of(*draw())
    before = moments.gram.clone(), moments.cross.clone()
    moments.second_moment(ones=True).add_(1)
    moments.cross_moment(ones=True).add_(1)
    assert torch.equal(moments.gram, before[0])
    assert torch.equal(moments.cross, before[1])


@pytest.mark.parametrize("bias", [True, False])
def test_shortfall_and_errors_are_those_of_the_rows(bias):
    x, y = draw()
    u, b = torch.randn(3, 5).double(), torch.randn(3).double() if bias else None
    outputs = x @ u.T + (b if bias else 0.0)
    moments, ones = Moments.of(x, y), torch.cat([x, torch.ones(30, 1).double()], 1)
    torch.testing.assert_close(moments.shortfall(u, b), (y - outputs).T @ ones, rtol=1e-12, atol=1e-11)
    assert moments.error(u, b) == pytest.approx(float((outputs - y).square().sum()) / 30, rel=1e-12)
    assert moments.output_power(u, b) == pytest.approx(float(outputs.square().sum()) / 30, rel=1e-12)


@settings(max_examples=80, deadline=None)
@given(
    seed=st.integers(0, 10**6), size=st.floats(-12, 0), samples=st.integers(1, 200), columns=st.integers(1, 40),
    bias=st.booleans(), shift=st.sampled_from([0.0, 3.0]),
)  # fmt: skip
def test_small_errors_lose_digits_as_the_documentation_says(seed, size, samples, columns, bias, shift):
    """Of the power about 1e-16 √P is lost; what the change of a known weight does to the outputs loses nothing."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    x, w, b = normal(samples, columns) + shift, normal(4, columns), normal(4) if bias else None
    y = x @ w.T + (b if bias else 0.0)
    change, lift = 10**size * normal(4, columns), 10**size * normal(4) if bias else None
    moments = Moments.of(x, y)
    exact = float((x @ change.T + (lift if bias else 0.0)).square().sum()) / samples
    # what the terms come to before they cancel
    joined = torch.cat([w, torch.zeros(4, 1).double() if b is None else b[:, None]], 1).abs()
    terms = float(((joined @ moments.gram.abs()) * joined).sum()) / samples
    found = moments.error(w + change, b + lift if bias else None)
    assert found >= 0
    assert abs(found - exact) <= 1e-9 * exact + 2.2e-16 * (8 + 4 * samples**0.5) * terms
    parts = torch.cat([change, torch.zeros(4, 1).double() if lift is None else lift[:, None]], 1).abs()
    rounding = float(((parts @ moments.gram.abs()) * parts).sum()) / samples
    assert abs(moments.output_power(change, lift) - exact) <= 1e-14 * rounding


def test_an_error_of_1e_9_of_the_power_keeps_six_digits_and_1e_18_is_rounding():
    x, w = draw(5000, 50)[0], torch.randn(8, 50).double()
    y = x @ w.T
    moments, change = Moments.of(x, y), torch.randn(8, 50).double()
    power = float(y.square().sum()) / 5000
    change *= (power / (float((x @ change.T).square().sum()) / 5000)) ** 0.5
    assert moments.error(w + 10**-4.5 * change, None) == pytest.approx(1e-9 * power, rel=1e-6)
    assert moments.error(w + 1e-9 * change, None) < 1e-14 * power
    assert moments.output_power(1e-9 * change, None) == pytest.approx(1e-18 * power, rel=1e-12)


def test_rounding_below_zero_is_zero():
    """Among many exact fits about half fall below zero before the clamp."""
    found = []
    for seed in range(40):
        x, w = draw(60, 12, seed=seed)[0], torch.randn(3, 12).double()
        moments = Moments.of(x, x @ w.T)
        found.append(moments.error(w, None))
    assert min(found) == 0
    assert 0 < found.count(0.0) < 40


def test_float32_rows_are_summed_in_float64():
    """100,000 rows of 1.1: a float32 sum would be off in the sixth digit."""
    x = torch.full((100_000, 1), 1.1)
    found = Moments.of(x, x)
    exact = float(x[0, 0].double()) ** 2 * 100_000
    assert float(found.gram[0, 0]) == pytest.approx(exact, rel=1e-12)
    assert float(found.cross[0, 0]) == pytest.approx(exact, rel=1e-12)
    assert float(found.power) == pytest.approx(exact, rel=1e-12)


def test_no_row_has_no_mean():
    empty = Moments.zeros(3, 2)
    assert empty.count == 0
    assert_near(empty, Moments.of(torch.zeros(0, 3), torch.zeros(0, 2)))
    for mean in (
        empty.second_moment, empty.cross_moment, lambda: empty.mean,
        lambda: empty.error(torch.ones(2, 3), None), lambda: empty.output_power(torch.ones(2, 3), None),
    ):  # fmt: skip
        with pytest.raises(ProblemError, match="of no row"):
            mean()


@pytest.mark.parametrize("value", [torch.nan, torch.inf, 1e200])
def test_what_is_not_finite_is_refused_where_it_is_used(value):
    x, y = draw()
    assert Moments.of(x, y).finite
    x[2, 1] = value
    found = Moments.of(x, y)
    assert not found.finite
    with pytest.raises(ProblemError, match="Gram matrix of 5 inputs is not finite"):
        found.second_moment()
    x, y = draw()
    y[2, 1] = value
    x[2, :] = 1e150
    found = Moments.of(x, y)
    assert not found.finite
    found.second_moment()
    with pytest.raises(ProblemError, match="products of 5 inputs and 3 outputs"):
        found.cross_moment()


def test_refuses_what_does_not_fit():
    x, y = draw()
    moments = Moments.of(x, y)
    with pytest.raises(ProblemError, match=r"inputs \(30, 5\) and outputs \(29, 3\) do not match"):
        Moments.of(x, y[:-1])
    with pytest.raises(ProblemError, match="do not match"):
        Moments.of(x[0], y[0])
    with pytest.raises(ProblemError, match="5 inputs and 3 outputs and 5 inputs and 2 outputs"):
        moments + Moments.zeros(5, 2)
    for weight, bias in ((torch.ones(3, 4), None), (torch.ones(2, 5), None), (torch.ones(3, 5), torch.ones(2))):
        with pytest.raises(ProblemError, match="do not match the moments"):
            moments.error(weight.double(), bias)
    for changes, sentence in (
        ({"count": -1}, "count=-1 is out of range"),
        ({"count": 2.5}, "count=2.5 is out of range"),
        ({"count": True}, "count=True is out of range"),
        ({"gram": moments.gram[:-1]}, "do not match"),
        ({"gram": moments.gram[0, 0]}, "do not match"),
        ({"cross": moments.cross[:-1]}, "do not match"),
        ({"cross": moments.cross[:, 0]}, "do not match"),
        ({"power": moments.power[None]}, "do not match"),
        ({"gram": moments.gram.float()}, "gram is torch.float32"),
        ({"cross": moments.cross.float()}, "cross is torch.float32"),
        ({"power": moments.power.float()}, "power is torch.float32"),
    ):
        with pytest.raises(ProblemError, match=sentence):
            replace(moments, **changes)
