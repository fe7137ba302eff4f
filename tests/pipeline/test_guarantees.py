"""What held-out samples prove: the stated confidence is reached, exactly and by simulation, and no claim is free."""

import json
import math
from dataclasses import asdict
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import beta, binom, hypergeom

from nettrim.errors import ProblemError
from nettrim.pipeline.guarantees import (
    HeldOut,
    SampleFigures,
    changed_rate_bound,
    conformal_quantile,
    held_out_guarantee,
)

SPLITS = 500


def most_failures(allowed, trials=SPLITS):
    """More failures than this happen once in ten thousand runs where each has at most the probability `allowed`."""
    return int(binom.ppf(1 - 1e-4, trials, allowed))


# the bound on the rate


@pytest.mark.parametrize("total", [1, 2, 20, 59, 1000])
@pytest.mark.parametrize("confidence", [0.5, 0.9, 0.95, 0.999])
def test_the_bound_is_the_beta_quantile_and_right_at_both_ends(total, confidence):
    assert changed_rate_bound(0, total, confidence) == pytest.approx(1 - (1 - confidence) ** (1 / total), rel=1e-12)
    assert changed_rate_bound(total, total, confidence) == 1.0
    for changed in {0, total // 3, total - 1}:
        expected = beta.ppf(confidence, changed + 1, total - changed)
        bound = changed_rate_bound(changed, total, confidence)
        assert bound == pytest.approx(expected, rel=1e-9)
        # what it means: so few changes, or fewer, have probability 1 − confidence at that rate
        assert binom.cdf(changed, total, bound) == pytest.approx(1 - confidence, rel=1e-6)


def failure_probability(bounds, rate):
    """The exact probability that the bound on a count drawn at `rate` lies below it."""
    total = len(bounds) - 1
    return sum(binom.pmf(k, total, rate) for k, bound in enumerate(bounds) if bound < rate)


@pytest.mark.parametrize("total", [5, 19, 59])
def test_no_rate_is_missed_too_often_and_the_worst_one_is_close(total):
    bounds = [changed_rate_bound(k, total) for k in range(total + 1)]
    assert bounds == sorted(bounds)
    # just above a bound is where it fails most
    worst = [failure_probability(bounds, bound * (1 + 1e-9)) for bound in bounds[:-1]]
    assert max(worst) <= 0.05 + 1e-6
    assert max(worst) > 0.0499
    # the bounds of one change fewer, as an off-by-one would give them, fail there
    shifted = [bounds[0], *bounds[:-1]]
    assert max(failure_probability(shifted, bound * (1 + 1e-9)) for bound in bounds[:-1]) > 0.1


@pytest.mark.parametrize(
    ("changed", "total", "confidence"),
    [(-1, 5, 0.95), (6, 5, 0.95), (0, 0, 0.95), (0.0, 5, 0.95), (True, 5, 0.95), (0, 5, 0.0), (0, 5, 1.0), (0, 5, 95)],
)
def test_counts_and_confidences_out_of_range_are_refused(changed, total, confidence):
    with pytest.raises(ProblemError, match=r"changed=|confidence="):
        changed_rate_bound(changed, total, confidence)


# the quantile


def slow_quantile(errors, confidence):
    """The smallest error that ⌈(n + 1)c⌉ of them do not exceed, by looking at each."""
    need = math.ceil((len(errors) + 1) * Fraction(str(confidence)))
    good = [e for e in errors if sum(other <= e for other in errors) >= need]
    return min(good) if good else None


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.integers(0, 6).map(float), min_size=1, max_size=60),
    st.sampled_from([0.5, 0.8, 0.9, 0.95, 0.99]),
)
def test_the_quantile_is_the_slow_one_ties_and_all(errors, confidence):
    assert conformal_quantile(torch.tensor(errors), confidence) == slow_quantile(errors, confidence)


@pytest.mark.parametrize(("confidence", "needed"), [(0.5, 1), (0.8, 4), (0.9, 9), (0.95, 19), (0.99, 99), (0.999, 999)])
def test_it_takes_confidence_over_one_minus_confidence_samples(confidence, needed):
    errors = torch.arange(1.0, needed + 1)
    assert conformal_quantile(errors, confidence) == needed
    assert conformal_quantile(errors[1:], confidence) is None


def mean_coverage(quantile, n, splits=SPLITS):
    """How often one of the other members of a fixed population stays below the quantile of n of them, on average.

    By exchangeability exactly ⌈(n + 1)c⌉/(n + 1) without ties, whatever the population.
    """
    rng = np.random.default_rng(n)
    population = rng.lognormal(size=2000)
    shares = []
    for _ in range(splits):
        order = rng.permutation(len(population))
        limit = quantile(torch.from_numpy(population[order[:n]]))
        shares.append((population[order[n:]] <= limit).mean())
    return np.mean(shares)


def one_too_low(errors):
    rank = math.ceil((len(errors) + 1) * Fraction("0.95")) - 1
    return float(errors.sort().values[rank - 1])


@pytest.mark.parametrize("n", [19, 25, 38, 39])
def test_the_coverage_over_random_splits_is_the_promised_one_and_an_off_by_one_is_seen(n):
    rank = math.ceil((n + 1) * Fraction("0.95"))
    expected, sd = beta.mean(rank, n + 1 - rank), beta.std(rank, n + 1 - rank) / math.sqrt(SPLITS)
    assert expected >= 0.95
    assert abs(mean_coverage(conformal_quantile, n) - expected) < 4 * sd
    assert mean_coverage(one_too_low, n) < expected - 4 * sd


@pytest.mark.parametrize(
    ("errors", "confidence"),
    [
        (torch.ones(30, 2), 0.95),
        (torch.ones(30, dtype=torch.complex64), 0.95),
        (torch.tensor([1.0, math.nan] * 20), 0.95),
        (torch.tensor([1.0, math.inf] * 20), 0.95),
        (torch.ones(30), math.nan),
    ],
)
def test_errors_that_prove_nothing_are_refused(errors, confidence):
    with pytest.raises(ProblemError, match=r"errors|confidence"):
        conformal_quantile(errors, confidence)


# both, on outputs


def population(size=1000, seed=5):
    """Logits of a fixed finite population: exactly 50 in 1000 change their class, all others by less."""
    generator = torch.Generator().manual_seed(seed)
    dense = torch.randn(size, 4, generator=generator, dtype=torch.float64)
    pruned = dense + 0.01 * torch.randn(size, 4, generator=generator, dtype=torch.float64)
    top = dense.topk(2, dim=1)
    pruned = pruned.scatter(1, top.indices, dense.gather(1, top.indices))
    swapped = torch.randperm(size, generator=generator)[: size // 20]
    pruned[swapped] = pruned[swapped].scatter(1, top.indices[swapped], top.values[swapped].flip(1))
    return dense, pruned


def test_both_claims_hold_over_random_splits_of_a_finite_population():
    """59 of 1000, drawn 500 times: at most the stated share of the claims about the population is false.

    The rate is that of the whole population; the error is that of one sample outside the split. 59 and 5 % are where
    the bound is least generous: only a draw without any change fails, and that has probability 0.0445.
    """
    dense, pruned = population()
    errors = (pruned - dense).norm(dim=1)
    rate = int((dense.argmax(1) != pruned.argmax(1)).sum()) / len(dense)
    assert rate == 0.05
    generator = torch.Generator().manual_seed(11)
    too_low, too_far = 0, 0
    for _ in range(SPLITS):
        order = torch.randperm(len(dense), generator=generator)
        found = held_out_guarantee(dense[order[:59]], pruned[order[:59]])
        too_low += found.changed_bound < rate
        too_far += float(errors[order[59]]) > found.error_quantile
    assert too_low <= most_failures(0.05)
    assert too_far <= most_failures(0.05)
    # and the simulation is close to the edge, so that a looser count would not go unseen
    assert too_low == pytest.approx(SPLITS * hypergeom.pmf(0, 1000, 50, 59), abs=20)
    assert too_far > 5


def test_both_claims_hold_over_independent_draws_of_a_distribution():
    """New logits every time; the rate is known in closed form: the sign of a normal number flips with probability p."""
    rate, n = 0.05, 59
    generator = torch.Generator().manual_seed(12)
    too_low, too_far = 0, 0
    for _ in range(SPLITS):
        dense = torch.randn(n + 1, 2, generator=generator, dtype=torch.float64)
        flips = torch.rand(n + 1, 1, generator=generator) < rate
        pruned = torch.where(flips, dense.flip(1), dense + torch.rand(n + 1, 1, generator=generator))
        found = held_out_guarantee(dense[:n], pruned[:n])
        too_low += found.changed_bound < rate
        too_far += float((pruned[n] - dense[n]).norm()) > found.error_quantile
    assert too_low <= most_failures(0.05)
    assert too_far <= most_failures(0.05)
    assert too_low > 5


def test_the_simulations_see_a_bound_that_takes_one_change_off():
    """The power of the two tests above: the bound of one change fewer fails more often than they allow."""
    bounds = [changed_rate_bound(max(k - 1, 0), 59) for k in range(60)]
    likely = failure_probability(bounds, 0.05)
    assert binom.sf(most_failures(0.05), SPLITS, likely) > 0.999


@settings(max_examples=150, deadline=None)
@given(st.integers(0, 2**31), st.integers(1, 30), st.integers(2, 6), st.sampled_from([1e-3, 0.1, 1.0]))
def test_what_is_certain_has_not_changed(seed, samples, classes, size):
    generator = torch.Generator().manual_seed(seed)
    dense = torch.randn(samples, classes, generator=generator)
    pruned = dense + size * torch.randn(samples, classes, generator=generator)
    found = held_out_guarantee(dense, pruned)
    certain = [
        sorted(d)[-1] - sorted(d)[-2] > math.sqrt(2) * math.dist(d, p)
        for d, p in zip(dense.tolist(), pruned.tolist(), strict=True)
    ]
    assert found.certain == sum(certain)
    assert found.certain + found.changed <= samples


def test_a_margin_that_is_just_used_up_is_not_certain():
    dense = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.5, 0.5]])
    pruned = torch.tensor([[0.5, 0.5], [0.51, 0.49], [0.5, 0.5]])
    found = held_out_guarantee(dense, pruned)
    assert (found.certain, found.changed) == (1, 0)


def test_a_sample_with_many_positions_counts_once():
    """(P, T, V): any changed position changes the sample, and all must be certain; the error is over all of it."""
    dense = torch.tensor([3.0, 0.0, 0.0]).repeat(40, 5, 1)
    pruned = dense.clone()
    pruned[:7, 2] = torch.tensor([0.0, 3.0, 0.0])
    pruned[:7, 4] = torch.tensor([0.0, 3.0, 0.0])
    pruned[7:10, 1] = torch.tensor([3.0, 2.5, 2.5])  # uncertain, and not changed
    found = held_out_guarantee(dense, pruned)
    assert (found.total, found.changed, found.certain) == (40, 7, 30)
    assert found.error_quantile == pytest.approx(math.sqrt(4 * 9))
    assert found.changed_bound == changed_rate_bound(7, 40)
    # the same as maps (P, C, H, W), with the classes in dimension 1
    maps = [outputs.movedim(-1, 1).unsqueeze(-1) for outputs in (dense, pruned)]
    assert held_out_guarantee(*maps, class_dim=1) == found
    assert held_out_guarantee(*maps, class_dim=-3) == found


@pytest.mark.parametrize(
    ("shape", "class_dim"), [((30, 1), -1), ((30,), -1), ((30, 4), None), ((30, 7, 1), -1), ((30, 1, 5), 1)]
)
def test_what_is_no_class_score_has_no_changed_class(shape, class_dim):
    dense = torch.randn(shape)
    found = held_out_guarantee(dense, dense + 2, class_dim=class_dim)
    assert (found.changed, found.changed_bound, found.certain) == (None, None, None)
    assert found.error_quantile == pytest.approx(2 * math.sqrt(dense[0].numel()), rel=1e-6)
    assert "no class scores" in found.sentence()


GOOD = torch.zeros(4, 3)


@pytest.mark.parametrize(
    ("dense", "pruned", "options", "named"),
    [
        (GOOD, torch.zeros(4, 2), {}, "pruned_outputs"),
        (torch.zeros(0, 3), torch.zeros(0, 3), {}, "dense_outputs has shape"),
        (torch.tensor(1.0), torch.tensor(1.0), {}, "dense_outputs has shape"),
        (GOOD.long(), GOOD, {}, "torch.int64"),
        (GOOD, GOOD.where(torch.eye(4, 3) == 0, math.nan), {}, "pruned_outputs has 3 NaN"),
        (GOOD, GOOD, {"class_dim": 0}, "class_dim=0"),
        (GOOD, GOOD, {"class_dim": -2}, "class_dim=-2"),
        (GOOD, GOOD, {"class_dim": 2}, "class_dim=2"),
        (GOOD, GOOD, {"confidence": 1.5}, "confidence=1.5"),
    ],
)
def test_bad_outputs_get_one_sentence(dense, pruned, options, named):
    with pytest.raises(ProblemError, match=named):
        held_out_guarantee(dense, pruned, **options)


def test_half_precision_is_compared_in_double():
    """In float16 itself the squares of these differences are zero."""
    dense = torch.zeros(19, 2, dtype=torch.float16)
    found = held_out_guarantee(dense, dense + 2.0**-14)
    assert found.error_quantile == pytest.approx(math.sqrt(2) * 2.0**-14)


@pytest.mark.parametrize("class_dim", [-1, None])
def test_batches_prove_what_all_samples_together_do(class_dim):
    dense, pruned = population()
    parts = [SampleFigures.of(d, p, class_dim) for d, p in zip(dense.split(300), pruned.split(300), strict=True)]
    expected = held_out_guarantee(dense, pruned, 0.9, class_dim)
    assert SampleFigures.joined(parts).guarantee(0.9) == expected
    assert (expected.changed is None) == (class_dim is None)


def test_batches_of_two_kinds_and_none_at_all_are_refused():
    with pytest.raises(ProblemError, match="some batches only"):
        SampleFigures.joined([SampleFigures.of(GOOD, GOOD), SampleFigures.of(GOOD, GOOD, None)])
    with pytest.raises(ProblemError, match="figures is empty"):
        SampleFigures.joined([])


def test_it_is_json():
    found = held_out_guarantee(*population())
    assert json.loads(json.dumps(asdict(found), allow_nan=False)) == asdict(found)
    assert HeldOut(**asdict(found)) == found


def test_the_sentence_rounds_up_and_states_the_confidence():
    said = HeldOut(1000, 12, 0.0193402, 901, 3.2101, 0.95).sentence()
    assert said == (
        "12 of 1000 held-out samples change their predicted class (901 provably keep it), so with 95 % confidence at "
        "most 1.94 % of new samples of the same distribution do, and with probability 95 % the output error (l2 norm) "
        "of a new sample of the same distribution is at most 3.22."
    )
    few = held_out_guarantee(torch.zeros(5, 3), torch.zeros(5, 3), 0.99)
    assert few.error_quantile is None
    assert "too few to bound the output error of a new sample with probability 99 %, which takes 99." in few.sentence()
    assert "at most 60.2 %" in few.sentence()
