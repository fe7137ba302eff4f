"""Choices of channels against brute force and the conditions of their optimum."""

import itertools

import pytest
import torch

from nettrim.core.moments import Moments
from nettrim.errors import ProblemError
from nettrim.methods.channel_selection import SELECTORS, Candidates, contributions, lasso, select


def problem(channels=6, taps=3, out=4, rows=200, seed=0, bias=True):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, channels * taps, dtype=torch.float64, generator=g) @ torch.randn(
        channels * taps, channels * taps, dtype=torch.float64, generator=g
    )
    dense = x + 0.3 * torch.randn(x.shape, dtype=torch.float64, generator=g)
    weight = torch.randn(out, channels, taps, dtype=torch.float64, generator=g)
    shift = torch.randn(out, dtype=torch.float64, generator=g) if bias else None
    y = dense @ weight.flatten(1).T + (0 if shift is None else shift)
    incoming = torch.randn(channels, 5, dtype=torch.float64, generator=g)
    moments = Moments.of(x, y)
    return Candidates(incoming, weight, shift, lambda: moments, torch.Generator().manual_seed(1)), x, y


def parts(candidates, x):
    """What each channel adds to every output of every row: (C, P · M)."""
    channels, taps = candidates.outgoing.shape[1:]
    split = x.reshape(len(x), channels, taps)
    return torch.einsum("pct,oct->cpo", split, candidates.outgoing).reshape(channels, -1)


@pytest.mark.parametrize("bias", [True, False])
def test_contributions_are_those_of_the_rows(bias):
    candidates, x, y = problem(bias=bias)
    added = parts(candidates, x)
    matrix, cross = contributions(candidates)
    target = y if candidates.bias is None else y - candidates.bias
    assert torch.allclose(matrix, added @ added.T / len(x), rtol=1e-9)
    assert torch.allclose(cross, added @ target.flatten() / len(x), rtol=1e-9)


@pytest.mark.parametrize("count", [1, 3, 5])
def test_thinet_removes_greedily_what_costs_least(count):
    candidates, x, _ = problem()
    added, gone = parts(candidates, x), []
    while len(added) - len(gone) > count:
        rest = [i for i in range(len(added)) if i not in gone]
        gone.append(min(rest, key=lambda i: float(added[[*gone, i]].sum(0).square().sum())))
    assert select("thinet", candidates, count).tolist() == [i for i in range(len(added)) if i not in gone]


def test_lasso_meets_the_conditions_of_its_optimum():
    candidates, _, _ = problem()
    matrix, cross = (tensor.numpy() for tensor in contributions(candidates))
    for share in (0.0, 0.1, 0.5):
        penalty = share * abs(cross).max()
        beta = lasso(matrix, cross, penalty, 0 * cross)
        left = cross - matrix @ beta
        tolerance = 1e-5 * abs(cross).max()
        assert (abs(left) <= penalty + tolerance).all()
        on = beta != 0
        assert (abs(left[on] - penalty * (beta[on] / abs(beta[on]))) <= tolerance).all()


def test_lasso_finds_the_channels_that_alone_make_the_outputs():
    candidates, x, _ = problem(channels=7, seed=3)
    weight = candidates.outgoing.clone()
    y = x @ weight.index_fill(1, torch.tensor([0, 2, 5]), 0).flatten(1).T
    moments = Moments.of(x, y)
    planted = Candidates(candidates.incoming, weight, None, lambda: moments, candidates.generator)
    assert select("lasso", planted, 4).tolist() == [1, 3, 4, 6]


def test_lasso_is_near_the_best_of_all_choices():
    candidates, x, y = problem(channels=6, seed=5)
    added, target = parts(candidates, x), (y - candidates.bias).flatten()

    def error(kept):
        chosen = added[list(kept)].T
        return float((target - chosen @ torch.linalg.lstsq(chosen, target).solution).square().sum())

    found = error(select("lasso", candidates, 3).tolist())
    every = sorted(error(kept) for kept in itertools.combinations(range(6), 3))
    assert found <= every[len(every) // 4]


@pytest.mark.parametrize("name", SELECTORS)
def test_exactly_as_many_stay_and_a_tie_is_no_accident(name):
    for count in range(1, 7):
        kept = select(name, problem(seed=2)[0], count)
        assert kept.tolist() == sorted(set(kept.tolist()))
        assert len(kept) == count
        assert torch.equal(kept, select(name, problem(seed=2)[0], count))


def test_a_dead_channel_goes_first():
    candidates, x, y = problem()
    x[:, 3:6] = 0
    moments = Moments.of(x, y)
    dead = Candidates(candidates.incoming, candidates.outgoing, candidates.bias, lambda: moments, candidates.generator)
    for name in ("energy", "lasso", "thinet"):
        assert 1 not in select(name, dead, 5).tolist(), name


def test_l1_and_energy_rank_by_their_scores():
    candidates, x, _ = problem()
    best = candidates.incoming.abs().sum(1).topk(2).indices.sort().values
    assert torch.equal(select("l1", candidates, 2), best)
    scores = x.reshape(len(x), 6, 3).square().mean((0, 2)).sqrt() * candidates.outgoing.transpose(0, 1).flatten(1).norm(
        dim=1
    )
    assert torch.equal(select("energy", candidates, 2), scores.topk(2).indices.sort().values)


@pytest.mark.parametrize("count", [0, 7])
def test_impossible_counts_are_refused(count):
    with pytest.raises(ProblemError, match="of 6 channels"):
        select("l1", problem()[0], count)
