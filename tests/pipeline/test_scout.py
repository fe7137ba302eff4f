"""The look ahead: which rows it takes, what it prunes, and that it sees what the dense network does not tell."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from nettrim.network.batches import Batch, Batches, read_batches
from nettrim.network.metric import error_metrics
from nettrim.network.program import run
from nettrim.network.trace import trace
from nettrim.pipeline import scout as scouting
from nettrim.pipeline.account import Account
from nettrim.pipeline.scout import Scout, thinned

SEEDED = settings(derandomize=True, database=None, deadline=None, max_examples=100)


def scout_of(model, batches, rows=1000, seed=0, **selection):
    read = read_batches(batches)
    return Scout.of(Account.of(model, trace(model, read[0], **selection), read, None, 2**30), rows, seed)


def rows_of(batches):
    return torch.cat([next(iter((*b.inputs, *b.kwargs.values()))) for b in batches])[:, 0].tolist()


def kept(scout, state, name):
    return int((state[scout.graph.layer(name).weight] != 0).sum())


def as_module(network, state):
    """The network itself with the weights of a state, in float64."""
    twin = copy.deepcopy(network).double().eval().requires_grad_(False)
    twin.load_state_dict(state)
    return twin


# ---- thinned


@SEEDED
@given(sizes=st.lists(st.integers(1, 40), min_size=1, max_size=6), rows=st.integers(1, 120))
def test_thinned_takes_that_many_different_rows_evenly_spread(sizes, rows):
    total = sum(sizes)
    ids = torch.arange(float(total))[:, None]
    batches = read_batches([Batch((part,), {"other": part + 0.5}, part[:, 0].long()) for part in ids.split(sizes)])
    few = thinned(batches, rows)
    assert isinstance(few, Batches)
    assert few.rows == min(rows, total)
    taken = rows_of(few)
    assert len(taken) == min(rows, total)
    assert taken == sorted(set(taken))
    assert all(len(batch) for batch in few)
    for batch in few:
        assert torch.equal(batch.kwargs["other"], batch.inputs[0] + 0.5)
        assert torch.equal(batch.labels.double(), batch.inputs[0][:, 0].double())
    if rows < total:
        assert taken[0] == 0
        # every row stands within one of its place
        step = (total - 1) / max(1, rows - 1)
        assert all(abs(row - k * step) <= 1 for k, row in enumerate(taken))
    else:
        assert few is batches


@pytest.mark.parametrize(("total", "rows"), [(5001, 5000), (60_000, 59_999), (70_001, 5000)])
def test_thinned_repeats_no_row_of_many(total, rows):
    batch = Batch((torch.arange(total, dtype=torch.float64)[:, None],))
    taken = thinned(read_batches([batch]), rows)[0].inputs[0][:, 0]
    assert len(taken) == rows
    assert (taken.diff() >= 1).all()
    assert float(taken[-1]) <= total - 1


def test_thinned_keeps_keyword_inputs_without_positional_ones():
    few = thinned(read_batches([Batch((), {"pixels": torch.arange(10.0)[:, None]}, torch.arange(10))]), 4)
    assert few[0].inputs == ()
    assert len(few[0]) == 4


# ---- prune


@pytest.mark.parametrize("shares", [(1, 1, 1), (50, 30, 20), (192, 160, 50)])
def test_each_layer_keeps_its_count_and_the_dense_network_stays(network, batches, shares):
    scout, counts = scout_of(network, batches), dict(zip(("0", "3", "5"), shares, strict=True))
    before = copy.deepcopy(scout.account.dense)
    state = scout.prune(counts, scout.metrics, growth=1.1)
    for name, count in counts.items():
        assert kept(scout, state, name) == count
    assert all(torch.equal(before[k], v) for k, v in scout.account.dense.items())
    if sum(counts.values()) == 402:
        assert scout.measure(state) < 1e-8


def test_layers_that_are_not_named_stay_dense(network, batches):
    scout = scout_of(network, batches, ignore=["3"])
    state = scout.prune({"0": 40, "5": 10}, scout.metrics, growth=1.1)
    assert state["3.weight"] is scout.account.dense["3.weight"]
    assert torch.equal(state["3.weight"], network[3].weight.double())


def test_each_layer_is_fitted_by_least_squares_through_the_pruned_ones_before(network, batches):
    """Cascade: on its support, no other weight and bias come nearer to the dense outputs on the pruned inputs."""
    scout = scout_of(network, batches)
    model = as_module(network, scout.prune({"0": 60, "3": 50, "5": 20}, scout.metrics, growth=1.1))
    dense, samples = as_module(network, scout.account.dense), torch.cat([x for x, _ in batches]).double()
    for name in ("0", "3", "5"):
        layer = model.get_submodule(name)
        with torch.no_grad():
            wanted = dense[: int(name) + 1](samples)
            x = torch.cat([model[: int(name)](samples), torch.ones(60, 1).double()], 1)
        for m in range(len(layer.weight)):
            support = torch.cat([layer.weight[m] != 0, torch.ones(1, dtype=torch.bool)])
            best = torch.linalg.lstsq(x[:, support], wanted[:, m]).solution
            found = torch.cat([layer.weight[m], layer.bias[m : m + 1]])[support]
            error, least = ((x[:, support] @ u - wanted[:, m]).norm() for u in (found, best))
            assert float(error) <= float(least) * (1 + 1e-6) + 1e-9


def test_more_weights_and_a_slower_search_measure_less(network, batches):
    scout = scout_of(network, batches)
    few, many = ({"0": 10 * k, "3": 8 * k, "5": 3 * k} for k in (4, 12))
    errors = [scout.measure(scout.prune(counts, scout.metrics, growth=1.1)) for counts in (few, many)]
    assert 0 < errors[1] < errors[0]


def test_measure_is_the_relative_error_of_the_outputs(network, batches):
    scout = scout_of(network, batches)
    state = scout.prune({"0": 60, "3": 50, "5": 20}, scout.metrics, growth=1.1)
    x = torch.cat([x for x, _ in batches]).double()
    with torch.no_grad():
        y, y_hat = (as_module(network, each)(x) for each in (scout.account.dense, state))
    assert scout.measure(state) == pytest.approx(float((y_hat - y).norm() / y.norm()), rel=1e-9)
    assert scout.measure(scout.account.dense) == 0.0


def test_two_scouts_agree_to_the_bit_and_draw_nothing(network, batches):
    state = torch.get_rng_state()
    counts = {"0": 60, "3": 50, "5": 20}
    one, two = scout_of(network, batches), scout_of(network, batches)
    first = one.prune(counts, one.metrics, growth=1.1)
    one.prune({"0": 5, "3": 5, "5": 5}, one.metrics, growth=1.3)  # what is kept for later changes nothing
    for state_of in (one.prune(counts, one.metrics, growth=1.1), two.prune(counts, two.metrics, growth=1.1)):
        assert first.keys() == state_of.keys()
        assert all(torch.equal(first[key], tensor) for key, tensor in state_of.items())
    looked = one.look_ahead(counts), two.look_ahead(counts)
    assert all(torch.equal(looked[0][name], looked[1][name]) for name in counts)
    assert torch.equal(state, torch.get_rng_state())


def test_rows_limit_what_is_looked_at(network, batches):
    scout = scout_of(network, batches, rows=7)
    assert scout.account.batches.rows == 7
    assert scout.account.held is None
    # and nothing else is looked at: what all others hold makes no difference
    x = torch.cat([x for x, _ in batches])
    others = torch.ones(60, dtype=torch.bool)
    others[torch.arange(7) * 59 // 6] = False
    x[others] = torch.randn(53, 12)
    changed = scout_of(network, [x], rows=7)
    assert all(torch.equal(changed.metrics[name], scout.metrics[name]) for name in scout.metrics)
    counts = {"0": 60, "3": 50, "5": 20}
    pruned = scout.prune(counts, scout.metrics, growth=1.1)
    for key, tensor in changed.prune(counts, scout.metrics, growth=1.1).items():
        assert torch.equal(pruned[key], tensor)


def test_a_slow_network_is_looked_at_on_fewer_samples(monkeypatch):
    """What counts is the multiply-adds of a sample: those of a convolution at every position."""
    model = nn.Sequential(nn.Conv2d(2, 4, 3, padding=1, groups=2), nn.ReLU(), nn.Flatten(), nn.Linear(256, 3))
    products = 4 * 9 * 64 + 256 * 3
    x = [torch.randn(300, 2, 8, 8)]
    monkeypatch.setattr(scouting, "_PRODUCTS", 200 * products)
    assert scout_of(model, x).account.batches.rows == 200
    assert scout_of(model, x, rows=150).account.batches.rows == 150
    monkeypatch.setattr(scouting, "_PRODUCTS", 10 * products)
    # fewer would tell nothing
    assert scout_of(model, x).account.batches.rows == 128


# ---- looking ahead


def test_importance_is_the_diagonal_with_a_mean_of_one_and_flat_for_the_last_layer(network, batches):
    scout = scout_of(network, batches)
    diagonal = scout.metrics["3"].diagonal()
    torch.testing.assert_close(scout.importance("3", scout.metrics), (diagonal / diagonal.mean()).clamp(min=1e-3))
    assert torch.equal(scout.importance("5", scout.metrics), torch.ones(5).double())


def test_units_that_the_pruned_network_will_not_read_cost_nothing(network, batches):
    """A last layer of three weights reads three units at the most; the dense network reads all ten."""
    scout = scout_of(network, batches)
    counts = {"0": 150, "3": 120, "5": 3}
    seen = scout.look_ahead(counts)
    assert (scout.metrics["3"].diagonal() > 0).all()
    assert int((seen["3"].diagonal() > 0).sum()) <= 3
    # twice: the second scout was pruned by what the first one saw
    account = scout.account

    def metrics_of(state):
        return error_metrics(scout.graph, state, account.batches, scout.seed)

    first = metrics_of(scout.prune(counts, scout.metrics, growth=1.1))
    second = metrics_of(scout.prune(counts, first, growth=1.1))
    for name in counts:
        torch.testing.assert_close(seen[name], second[name])


# ---- what may come


class Named(nn.Module):
    def __init__(self, network):
        super().__init__()
        self.body = network

    def forward(self, pixels):
        return self.body(pixels)


def test_keyword_batches_are_taken(network, batches):
    x = torch.cat([x for x, _ in batches])
    positional = scout_of(network, [x])
    by_name = scout_of(Named(network), [{"pixels": x}])
    for (name, one), (other, two) in zip(positional.metrics.items(), by_name.metrics.items(), strict=True):
        assert other == f"body.{name}"
        torch.testing.assert_close(one, two)


@pytest.mark.parametrize("dead", ["first", "all"])
def test_dead_inputs_and_a_layer_without_bias_are_survived(dead):
    """Behind a layer that was pruned to death nothing can be fitted, and nothing is divided by."""
    model = nn.Sequential(nn.Linear(6, 8, bias=False), nn.ReLU(), nn.Linear(8, 4, bias=False))
    x = torch.randn(30, 6)
    if dead == "first":
        x[:, :3] = 0
    else:
        with torch.no_grad():
            model[0].weight.copy_(-model[0].weight.abs())
        x = x.abs()
    scout = scout_of(model, [x])
    for counts in ({"0": 40, "2": 30}, {"0": 3, "2": 2}, {"0": 48, "2": 32}):
        pruned = scout.prune(counts, scout.metrics, growth=1.3)
        assert all(tensor.isfinite().all() for tensor in pruned.values())
        assert scout.measure(pruned) >= 0
        scout.look_ahead(counts)


@pytest.mark.parametrize("model", [
    nn.Sequential(nn.Linear(12, 5)),
    nn.Sequential(nn.Linear(12, 6), nn.ReLU(True), nn.Linear(6, 4), nn.ReLU(True)),
    nn.Sequential(nn.Flatten(), nn.Linear(12, 6, bias=False), nn.ReLU(), nn.Linear(6, 1)),
], ids=["one layer", "ends in a relu", "one output"])  # fmt: skip
def test_networks_of_other_shapes(model, batches):
    scout = scout_of(model, batches)
    counts = {layer.name: layer.in_features * layer.out_features // 3 for layer in scout.graph.layers}
    pruned = scout.prune(counts, scout.metrics, growth=1.1)
    for name, count in counts.items():
        assert kept(scout, pruned, name) == count
    assert 0 < scout.measure(pruned) < 1
    assert set(scout.look_ahead(counts)) == set(counts)


class Residual(nn.Module):
    """Branches, a batch norm and a grouped convolution."""

    def __init__(self):
        super().__init__()
        self.one = nn.Conv2d(3, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.two = nn.Conv2d(4, 4, 3, padding=1, groups=2)
        self.head = nn.Linear(4 * 36, 5)

    def forward(self, x):
        x = self.norm(self.one(x)).relu()
        return self.head((x + self.two(x).relu()).flatten(1))


def test_a_network_of_branches_and_groups(batches):
    torch.manual_seed(7)
    model, x = Residual().eval(), [torch.randn(80, 3, 6, 6)]
    with torch.no_grad():
        model.norm.running_var.uniform_(0.5, 2.0)
        model.norm.running_mean.normal_()
    scout = scout_of(model, x)
    counts = {"one": 40, "two": 30, "head": 300}
    state = scout.prune(counts, scout.metrics, growth=1.1)
    assert {name: kept(scout, state, name) for name in counts} == counts
    # groups share a layer's count out evenly
    assert [int((part != 0).sum()) for part in state["two.weight"].chunk(2)] == [15, 15]
    # what the whole network makes of it, run as it is
    y, y_hat = (run(scout.graph.program, each, scout.account.batches[0]) for each in (scout.account.dense, state))
    assert scout.measure(state) == pytest.approx(float((y_hat - y).norm() / y.norm()), rel=1e-9)
    assert set(scout.look_ahead(counts)) == set(counts)
    more = scout.prune({name: 2 * count for name, count in counts.items()}, scout.metrics, growth=1.1)
    assert scout.measure(more) < scout.measure(state) < 1
