"""Exact counts, whatever the scores."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nettrim.errors import ProblemError
from nettrim.methods.masks import keep_largest, kept_count


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
