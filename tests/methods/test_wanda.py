"""Wanda against loops over neurons and weights."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import nettrim
from nettrim.errors import ProblemError
from nettrim.methods.base import LayerTask
from nettrim.methods.fit import mean_error
from nettrim.methods.masks import Pattern
from nettrim.methods.wanda import Wanda


def make_task(neurons=5, columns=8, amount="kept", value=20, seed=0, samples=30):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(samples, columns, generator=generator, dtype=torch.float64) * torch.linspace(0.1, 3, columns)
    w = torch.randn(neurons, columns, generator=generator, dtype=torch.float64)
    b = torch.randn(neurons, generator=generator, dtype=torch.float64)
    return LayerTask("fc", True, False, True, w, b, x, x @ w.T + b, amount, value, torch.float64)


def slow_scores(task):
    neurons, columns = task.weight.shape
    norms = [sum(float(task.inputs[p, j]) ** 2 for p in range(len(task.inputs))) ** 0.5 for j in range(columns)]
    return [[abs(float(task.weight[m, j])) * norms[j] for j in range(columns)] for m in range(neurons)]


def test_rows_lose_the_same_share():
    task = make_task(value=20)
    mask = Wanda().prune_layer(task).weight != 0
    for m, scores in enumerate(slow_scores(task)):
        best = sorted(range(8), key=lambda j: -scores[j])[:4]
        assert mask[m].nonzero()[:, 0].tolist() == sorted(best)


def test_a_remainder_goes_to_the_largest_next_scores():
    task = make_task(value=22)
    mask = Wanda().prune_layer(task).weight != 0
    scores = slow_scores(task)
    ordered = [sorted(range(8), key=lambda j: -scores[m][j]) for m in range(5)]
    more = sorted(range(5), key=lambda m: -scores[m][ordered[m][4]])[:2]
    for m in range(5):
        assert mask[m].nonzero()[:, 0].tolist() == sorted(ordered[m][: 4 + (m in more)])


def test_the_whole_layer_competes():
    task = make_task(value=13)
    mask = Wanda(group="layer").prune_layer(task).weight != 0
    flat = [score for row in slow_scores(task) for score in row]
    assert mask.flatten().nonzero()[:, 0].tolist() == sorted(sorted(range(40), key=lambda i: -flat[i])[:13])


def test_pattern():
    task = make_task(amount="pattern", value=Pattern(1, 4))
    mask = (Wanda().prune_layer(task).weight != 0).reshape(-1, 4)
    groups = torch.tensor(slow_scores(task)).reshape(-1, 4)
    assert torch.equal(mask, torch.nn.functional.one_hot(groups.argmax(1), 4).bool())


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 1000), st.integers(1, 40), st.sampled_from(["row", "layer"]), st.booleans())
def test_exact_counts_with_ties_and_dead_inputs(seed, kept, group, refit):
    task = make_task(value=kept, seed=seed)
    task = replace(task, weight=task.weight.sign())
    task.inputs[:, 1] = 0
    if not refit:  # the best weight of two equal inputs whose dense ones cancel is zero
        task.inputs[:, 5] = task.inputs[:, 6]
    mask = Wanda(group=group, refit=refit).prune_layer(task).weight != 0
    assert int(mask.sum()) == kept
    if group == "row":
        assert set(mask.sum(1).tolist()) <= {kept // 5, kept // 5 + 1}
    if kept <= 35:
        assert not mask[:, 1].any()


def test_nothing_that_stays_is_changed():
    task = make_task(amount="sparsity", value=0.0)
    result = Wanda().prune_layer(task)
    assert torch.equal(result.weight, task.weight)
    assert result.bias is task.bias
    task = make_task(value=17)
    result = Wanda().prune_layer(task)
    assert torch.equal(result.weight[result.weight != 0], task.weight[result.weight != 0])


@pytest.mark.parametrize("group", ["row", "layer"])
def test_refit_keeps_the_mask_and_lowers_the_error(group):
    task = make_task(value=17)
    plain, fitted = Wanda(group).prune_layer(task), Wanda(group, refit=True).prune_layer(task)
    assert torch.equal(plain.weight != 0, fitted.weight != 0)
    assert mean_error(task, fitted.weight, fitted.bias) < mean_error(task, plain.weight, plain.bias)


def test_nothing_depends_on_how_the_data_were_batched(network, batches):
    whole = [tuple(torch.cat(parts) for parts in zip(*batches, strict=True))]
    single = [(x[i : i + 1], y[i : i + 1]) for x, y in batches for i in range(len(x))]
    masks = [
        nettrim.prune(network, data, Wanda(), sparsity=0.6, progress=False).masks for data in (batches, whole, single)
    ]
    for name in masks[0]:
        assert torch.equal(masks[0][name], masks[1][name])
        assert torch.equal(masks[0][name], masks[2][name])


def test_refuses():
    with pytest.raises(ProblemError, match="use row or layer"):
        Wanda(group="column")
    task = make_task()
    task.inputs[0, 0] = torch.nan
    with pytest.raises(ProblemError, match="inputs holds NaN"):
        Wanda().prune_layer(task)
    task.inputs[:, 0] = 1e200
    with pytest.raises(ProblemError, match="norms of layer 'fc'"):
        Wanda().prune_layer(task)
