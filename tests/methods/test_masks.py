"""Exact counts, whatever the scores."""

from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nettrim.core.support import kept_count
from nettrim.errors import ProblemError
from nettrim.methods.masks import (
    Pattern,
    check_division,
    keep_largest,
    keep_pattern,
    keep_rows,
    share_out,
)


@given(st.lists(st.sampled_from([0.0, 1.0, 1.0, 2.0, -3.0]), min_size=1, max_size=40), st.data())
def test_keeps_exactly_as_many_with_ties(scores, data):
    count = data.draw(st.integers(0, len(scores)))
    mask = keep_largest(torch.tensor(scores), count)
    assert int(mask.sum()) == count
    kept = sorted(s for s, m in zip(scores, mask.tolist(), strict=True) if m)
    assert kept == sorted(scores)[len(scores) - count :]


@given(st.integers(1, 10_000), st.integers(0, 99))
def test_count_is_what_the_percentage_says(numel, percent):
    assert kept_count(numel, percent / 100) == numel - numel * percent // 100


@pytest.mark.parametrize("sparsity", [1.0, -0.1, float("nan")])
def test_refuses_a_sparsity_out_of_range(sparsity):
    with pytest.raises(ProblemError, match="fraction of zeros"):
        kept_count(10, sparsity)


def test_refuses_an_impossible_count():
    with pytest.raises(ProblemError, match="there are 3 weights"):
        keep_largest(torch.ones(3), 4)


def tied_scores(data, rows, columns):
    values = st.sampled_from([0.0, 1.0, 1.0, 2.0, -3.0])
    scores = data.draw(st.lists(values, min_size=rows * columns, max_size=rows * columns))
    return torch.tensor(scores).reshape(rows, columns)


@given(st.integers(1, 5), st.integers(1, 4), st.integers(2, 5), st.data())
def test_every_group_keeps_exactly_as_many_with_ties(rows, groups, of, data):
    pattern = Pattern(data.draw(st.integers(1, of - 1)), of)
    scores = tied_scores(data, rows, groups * of)
    mask = keep_pattern(scores, pattern)
    for group, kept in zip(scores.reshape(-1, of).tolist(), mask.reshape(-1, of).tolist(), strict=True):
        best = sorted(range(of), key=lambda i: (-group[i], i))[: pattern.keep]
        assert [i for i in range(of) if kept[i]] == sorted(best)


def test_a_pattern_that_does_not_divide_is_refused():
    for refuse in (lambda: check_division(6, Pattern(2, 4)), lambda: keep_pattern(torch.ones(2, 6), Pattern(2, 4))):
        with pytest.raises(ProblemError, match="2:4 does not divide rows of 6 weights"):
            refuse()
    check_division(8, Pattern(2, 4))


@given(st.integers(1, 6), st.integers(1, 6), st.data())
def test_rows_keep_the_same_number_and_the_next_best_the_rest(rows, columns, data):
    scores = tied_scores(data, rows, columns)
    count = data.draw(st.integers(0, rows * columns))
    each, left = divmod(count, rows)
    expected, following = torch.zeros(rows, columns, dtype=torch.bool), []
    for m in range(rows):
        best = sorted(range(columns), key=lambda n: (-float(scores[m, n]), n))
        expected[m, best[:each]] = True
        following += [(-float(scores[m, n]), m, n) for n in best[each : each + 1]]
    for _, m, n in sorted(following)[:left]:
        expected[m, n] = True
    assert int(expected.sum()) == count
    assert torch.equal(keep_rows(scores, count), expected)


def test_rows_refuse_an_impossible_count():
    with pytest.raises(ProblemError, match="there are 6 weights"):
        keep_rows(torch.ones(2, 3), 7)


def water_level(total, sizes, limits):
    """The real-valued share of each group: all filled to one height, and none above its limit."""
    heights = sorted({Fraction(limit, size) for size, limit in zip(sizes, limits, strict=True) if size})
    below = Fraction(0)
    for height in [*heights, heights[-1] + 1]:
        pour = [min(Fraction(limit), height * size) for size, limit in zip(sizes, limits, strict=True)]
        if sum(pour) >= total:
            rising = sum(s for s, limit in zip(sizes, limits, strict=True) if s and Fraction(limit, s) > below)
            low = sum(min(Fraction(limit), below * s) for s, limit in zip(sizes, limits, strict=True))
            level = below + (total - low) / rising if rising else below
            return [min(Fraction(limit), level * s) for s, limit in zip(sizes, limits, strict=True)]
        below = height
    raise AssertionError("more than the limits hold")


@given(st.lists(st.tuples(st.integers(1, 30), st.integers(0, 30)), min_size=1, max_size=7), st.data())
def test_shares_are_proportional_up_to_one_and_to_the_limits(groups, data):
    sizes, limits = [size for size, _ in groups], [limit for _, limit in groups]
    total = data.draw(st.integers(0, sum(limits)))
    shares = share_out(total, sizes, limits)
    assert sum(shares) == total
    for share, exact, limit in zip(shares, water_level(total, sizes, limits), limits, strict=True):
        assert share <= limit
        assert abs(share - exact) < 1


def test_shares_of_groups_that_are_empty_and_of_too_much():
    assert share_out(0, [0, 0], [0, 0]) == [0, 0]
    assert share_out(3, [0, 2], [0, 5]) == [0, 3]
    assert share_out(5, [1, 1, 1], [9, 9, 9]) == [2, 2, 1]
    with pytest.raises(ProblemError, match="the groups hold 4"):
        share_out(5, [1, 1], [2, 2])
