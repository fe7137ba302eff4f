"""The ℓ0 search against a literal transcription with dense inverses, planted supports and least squares."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nettrim.core.cases import KINDS, dense_weight, random_layer
from nettrim.core.l0 import Spectrum, l0_support
from nettrim.core.linalg import gram
from nettrim.core.support import refit_linear
from nettrim.errors import ProblemError

SEEDED = settings(derandomize=True, database=None, deadline=None, max_examples=60)
SEED = st.integers(0, 10_000)


def draw(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def correlated(seed, samples=80, columns=10):
    mix = torch.eye(columns).double() + 0.4 * draw(seed + 1, columns, columns)
    return draw(seed, samples, columns) @ mix * torch.linspace(0.3, 3, columns, dtype=torch.float64)


def search(x, targets, start, kept, free=None, importance=None, **settings):
    """`l0_support` as it is meant to be called."""
    free = torch.zeros(x.shape[1], dtype=torch.bool) if free is None else free
    importance = torch.ones(len(start), dtype=torch.float64) if importance is None else importance
    return l0_support(Spectrum.of(gram(x), start.dtype), x.T @ targets, start, kept, free, importance, **settings)


def literal(x, targets, start, kept, free, importance, rho=0.1, growth=1.1, max_iter=300):
    """The same in the layout of papers, W (N, M), with an inverse at every iteration and no eigendecomposition."""
    x, t, free = x.numpy(), targets.numpy(), free.numpy()
    norms = np.sqrt((x**2).sum(0))
    x = x / norms
    omega = np.sqrt(importance.numpy())
    h, b = x.T @ x, x.T @ t * omega
    d, v = start.numpy().T * norms[:, None] * omega, np.zeros_like(b)
    before = None
    for iteration in range(1, max_iter + 1):
        w = np.linalg.inv(h + rho * np.eye(len(h))) @ (b - v + rho * d)
        c = w + v / rho
        places = [(n, m) for n in range(len(h)) for m in range(t.shape[1]) if not free[n]]
        places.sort(key=lambda place: -abs(c[place]))
        mask = np.zeros(c.shape, dtype=bool)
        mask[free] = True
        for place in places[:kept]:
            mask[place] = True
        d = np.where(mask, c, 0)
        v = v + rho * (w - d)
        if iteration % 3 == 0:
            rho *= growth
            if rho > 1 and before is not None and (before == mask).all():
                break
            before = mask
    return (d / norms[:, None] / omega).T, iteration


@pytest.mark.parametrize("free", [False, True])
@pytest.mark.parametrize("growth", [1.02, 1.1, 1.3])
@pytest.mark.parametrize("seed", range(4))
def test_equals_the_literal_iteration(seed, growth, free):
    x, w = correlated(seed), draw(seed + 2, 5, 10)
    targets = x @ w.T + 0.1 * draw(seed + 3, 80, 5)
    columns = torch.zeros(10, dtype=torch.bool)
    columns[3] = free
    importance = 10 ** draw(seed + 4, 5)
    for kept in (1, 12, 30):
        found, iterations = search(x, targets, w, kept, columns, importance, growth=growth)
        slow, slow_iterations = literal(x, targets, w, kept, columns, importance, growth=growth)
        assert iterations == slow_iterations
        torch.testing.assert_close(found, torch.as_tensor(slow), rtol=1e-6, atol=1e-9)


@SEEDED
@given(
    kind=st.sampled_from(sorted(KINDS)),
    seed=SEED,
    what=st.sampled_from(["one", "some", "all"]),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
def test_the_count_is_exact_and_free_columns_are_kept(kind, seed, what, dtype):
    problem = random_layer(kind, seed, form="linear")
    free = torch.zeros(8, dtype=torch.bool)
    free[-1] = seed % 2 == 0
    available = 4 * int((~free).sum())
    kept = {"one": 1, "some": 1 + seed % available, "all": available}[what]
    start = (dense_weight(kind, seed) + 0.01 * dense_weight(kind, seed).abs().mean(0)).to(dtype)
    found, iterations = search(problem.inputs, problem.targets, start, kept, free, growth=1.3)
    assert found.shape == start.shape
    assert found.dtype == dtype
    assert found.isfinite().all()
    assert int((found[:, ~free] != 0).sum()) == kept
    assert found[:, free].all()
    assert 1 <= iterations <= 300


@pytest.mark.parametrize("start", ["truth", "zero", "dense"])
@pytest.mark.parametrize("seed", range(5))
def test_a_planted_sparse_truth_is_recovered(seed, start):
    x = draw(seed, 200, 20)
    truth = draw(seed + 10, 6, 20)
    # bounded away from zero, so that every entry can be told from none
    truth = truth.sign() * (truth.abs() + 0.5) * (draw(seed + 20, 6, 20) > 0.4)
    kept = int((truth != 0).sum())
    begin = {"truth": truth, "zero": torch.zeros_like(truth), "dense": truth + 0.3 * draw(seed + 30, 6, 20)}[start]
    found, _ = search(x, x @ truth.T, begin, kept)
    assert torch.equal(found != 0, truth != 0)
    torch.testing.assert_close(refit_linear(gram(x), x.T @ x @ truth.T, found != 0), truth, rtol=1e-8, atol=1e-8)


def test_keeping_everything_is_least_squares():
    """No sparsity binds: what is left is the proximal point method, which goes to least squares."""
    x, targets = draw(0, 100, 6), draw(1, 100, 4)
    best = torch.linalg.lstsq(x, targets).solution.T
    found, _ = search(x, targets, draw(2, 4, 6), 24)
    torch.testing.assert_close(found, best, rtol=1e-6, atol=1e-8)


def test_two_runs_agree_to_the_bit_and_change_nothing_that_they_were_given():
    x, w = correlated(5), draw(7, 5, 10)
    spectrum, cross = Spectrum.of(gram(x), torch.float32), x.T @ x @ w.T
    free, importance, start = torch.zeros(10, dtype=torch.bool), torch.ones(5), w.float()
    before = [t.clone() for t in (spectrum.scale, spectrum.values, spectrum.vectors, cross, free, importance, start)]
    one = l0_support(spectrum, cross, start, 11, free, importance)
    two = l0_support(spectrum, cross, start, 11, free, importance)
    assert torch.equal(one[0], two[0])
    assert one[1] == two[1]
    after = (spectrum.scale, spectrum.values, spectrum.vectors, cross, free, importance, start)
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


@SEEDED
@given(seed=SEED, factor=st.sampled_from([2.0**-20, 4.0, 2.0**20]))
def test_units_do_not_matter(seed, factor):
    """Inputs, targets and importance in other units, by powers of two: the same support."""
    x, w = correlated(seed), draw(seed + 2, 5, 10)
    one, n = search(x, x @ w.T, w, 15)
    other, k = search(factor * x, x @ w.T, w / factor, 15)
    assert torch.equal(one != 0, other != 0)
    assert n == k
    torch.testing.assert_close(other * factor, one, rtol=1e-9, atol=1e-12)
    scaled, _ = search(x, factor * (x @ w.T), w * factor, 15)
    torch.testing.assert_close(scaled, one * factor, rtol=1e-9, atol=1e-12 * factor)
    weighed, _ = search(x, x @ w.T, w, 15, importance=torch.full((5,), factor, dtype=torch.float64))
    torch.testing.assert_close(weighed, one, rtol=1e-9, atol=1e-12)


def test_important_neurons_keep_more():
    x, w = draw(1, 100, 10), draw(2, 1, 10).repeat(3, 1)
    found, _ = search(x, x @ w.T, w, 15, importance=torch.tensor([1.0, 1e4, 1e-4], dtype=torch.float64))
    counts = (found != 0).sum(1).tolist()
    assert counts[1] == 10
    assert counts[0] == 5
    assert counts[2] == 0


def test_a_dead_input_goes_first():
    x, w = draw(3, 100, 8), draw(4, 4, 8)
    x[:, 5] = 0
    found, _ = search(x, x @ w.T, w, 20)
    assert not found[:, 5].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_inputs_that_are_all_dead_are_survived(dtype):
    """As behind a layer that was pruned to death, where there is no bias: nothing to choose by, and no NaN."""
    x, w = torch.zeros(30, 8, dtype=torch.float64), draw(4, 4, 8).to(dtype)
    found, _ = search(x, draw(1, 30, 4), w, 5)
    assert found.isfinite().all()
    assert int((found != 0).sum()) == 5


def test_the_search_beats_magnitude_and_the_slow_schedule_beats_the_fast():
    """Mean over ten correlated layers: a tenth of what least squares on the largest weights leaves, and better slow."""
    losses = {"magnitude": 0.0, "fast": 0.0, "slow": 0.0}
    for seed in range(10):
        x, w = correlated(seed, samples=120, columns=24), draw(seed + 50, 8, 24)
        cross = x.T @ x @ w.T
        masks = {}
        largest = w.abs().flatten().argsort(descending=True)[:60]
        masks["magnitude"] = torch.zeros(w.numel(), dtype=torch.bool).index_fill(0, largest, True).view(w.shape)
        masks["fast"] = search(x, x @ w.T, w, 60, growth=1.3)[0] != 0
        masks["slow"] = search(x, x @ w.T, w, 60, growth=1.02, max_iter=1000)[0] != 0
        for name, mask in masks.items():
            assert int(mask.sum()) == 60
            losses[name] += float((x @ (refit_linear(gram(x), cross, mask) - w).T).square().sum())
    assert losses["slow"] < losses["fast"] < 0.7 * losses["magnitude"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_spectrum_is_that_of_the_scaled_matrix(dtype):
    x = correlated(8)
    x[:, 2] *= 1e-9
    moments = gram(x)
    spectrum = Spectrum.of(moments, dtype)
    assert {t.dtype for t in (spectrum.scale, spectrum.values, spectrum.vectors)} == {dtype}
    rebuilt = (spectrum.vectors * spectrum.values) @ spectrum.vectors.T
    scaled = spectrum.scale[:, None] * moments.to(dtype) * spectrum.scale
    torch.testing.assert_close(rebuilt, scaled, rtol=1e-4, atol=1e-5)
    live = torch.arange(10) != 2
    torch.testing.assert_close(scaled.diagonal()[live], torch.ones(9, dtype=dtype))
    # an input that is all but dead is not blown up to the size of the others
    assert float(scaled[2, 2]) < 1e-6
    assert (spectrum.values >= 0).all()


def test_squares_that_overflow_are_named():
    with pytest.raises(ProblemError, match=r"Gram matrix of 8 inputs is not finite"):
        Spectrum.of(gram(1e160 * draw(0, 20, 8)), torch.float64)
