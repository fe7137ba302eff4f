"""Costs are those that are counted by hand and by torch's own counter; times are of the networks and nothing else."""

from __future__ import annotations

import math
from itertools import count

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.model.nets import lenet5, plain_cifar, resnet_cifar, vgg_bn_small
from nettrim.errors import ProblemError
from nettrim.network import costs as module
from nettrim.network.batches import Batch
from nettrim.network.costs import Costs, costs, costs_of, latency, latency_ratio, multiply_adds
from nettrim.network.trace import trace


def images(rows=2, shape=(3, 8, 8)):
    return Batch((torch.rand(rows, *shape),))


class Clock:
    """A clock that only the networks of a test move."""

    def __init__(self, monkeypatch):
        self.now, self.log = 0.0, []
        monkeypatch.setattr(module.time, "perf_counter", lambda: self.now)

    def model(self, name, seconds):
        """A network whose calls take the seconds that `seconds(number of the call)` says."""
        clock, numbers = self, count()

        class Slow(nn.Linear):
            def forward(self, x):
                assert not self.training
                assert not torch.is_grad_enabled()
                assert torch.get_num_threads() == 3
                clock.log.append(name)
                clock.now += seconds(next(numbers))
                return super().forward(x)

        return Slow(4, 2)


# ---- counts


def test_lenet5_costs_what_is_counted_by_hand():
    products = {"conv1": 24 * 24 * 20 * 25, "conv2": 8 * 8 * 50 * 20 * 25, "fc1": 500 * 800, "fc2": 10 * 500}
    graph = trace(lenet5(), images(shape=(1, 28, 28))).graph
    assert {layer.name: multiply_adds(layer) for layer in graph.layers} == products
    found = costs(graph, lenet5())
    assert found == Costs(431_080, 431_080 - 580, sum(products.values()), 4 * 431_080)
    assert found.multiply_adds == 2_293_000


def test_a_resnet_of_twenty_layers_costs_the_41_million_of_the_literature():
    found = costs_of(resnet_cifar(blocks=3), images(shape=(3, 32, 32)))
    first, inner = 1024 * 16 * 27, 3 * 1024 * 16 * 16 * 9  # stage by stage: half the pixels, twice the channels
    second = 256 * 32 * 16 * 9 + 5 * 256 * 32 * 32 * 9 + 256 * 32 * 16
    third = 64 * 64 * 32 * 9 + 5 * 64 * 64 * 64 * 9 + 64 * 64 * 32
    assert found.multiply_adds == first + 2 * inner + second + third + 640
    assert found.multiply_adds == pytest.approx(41e6, rel=0.01)


@pytest.mark.parametrize("factory", [vgg_bn_small, plain_cifar, resnet_cifar])
def test_networks_with_batch_norm_cost_what_torch_counts(factory):
    model, batch = factory(width=4), images(shape=(3, 32, 32))
    found = costs_of(model, batch)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.eval()(*batch.inputs)
    assert found.multiply_adds * 2 * len(batch) == counter.get_total_flops()
    assert found.parameters == sum(parameter.numel() for parameter in model.parameters())
    matrices = [m for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    assert found.weights == sum(m.weight.numel() for m in matrices)
    # batch norms keep two floats a channel, and a counter of eight bytes
    channels = [m.num_features for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    assert found.bytes == 4 * (found.parameters + 2 * sum(channels)) + 8 * len(channels)
    assert found.uncounted == ()


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.Conv2d(4, 6, (3, 2), stride=(2, 1), padding=1, groups=2), (4, 9, 8)),
        (nn.Conv2d(4, 4, 3, dilation=2, groups=4, bias=False), (4, 9, 8)),
        (nn.Conv1d(4, 6, 5, stride=3), (4, 20)),
        (nn.Linear(6, 3), (6,)),
        (nn.Linear(6, 3), (5, 6)),
    ],
)
def test_every_kind_of_layer_costs_what_torch_counts(layer, shape):
    model, batch = nn.Sequential(layer), images(3, shape)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(*batch.inputs)
    assert costs_of(model, batch).multiply_adds * 2 * 3 == counter.get_total_flops()


def test_bytes_are_those_of_the_dtype_and_zeros_count():
    model = nn.Sequential(nn.Linear(6, 3)).double()
    nn.init.zeros_(model[0].weight)
    assert costs_of(model, images(shape=(6,))) == Costs(21, 18, 18, 168)


def test_what_is_not_selected_counts_and_what_cannot_be_pruned_is_named():
    class Tied(nn.Sequential):
        def forward(self, x):
            return self[2](self[1](self[1](self[0](x))))

    model = Tied(nn.Linear(6, 4), nn.Linear(4, 4), nn.Linear(4, 2))
    batch = images(shape=(6,))
    graph = trace(model, batch, layers="0", on_unsupported="keep").graph
    expected = Costs(28 + 20 + 10, 24 + 8, 24 + 8, 4 * 58, ("1",))
    assert costs(graph, model) == costs_of(model, batch) == expected


def test_a_graph_of_another_model_is_refused():
    graph = trace(nn.Sequential(nn.Linear(6, 4)), images(shape=(6,))).graph
    with pytest.raises(ProblemError, match=r"'0.weight' has shape \(4, 6\) in it and is of shape \(3, 6\)"):
        costs(graph, nn.Sequential(nn.Linear(6, 3)))
    with pytest.raises(ProblemError, match="is missing in the model"):
        costs(graph, nn.Sequential(nn.ReLU(), nn.Linear(6, 4)))


# ---- times


def test_latency_is_the_median_of_one_call_and_its_quartiles(monkeypatch):
    clock = Clock(monkeypatch)
    # one call that is checked, two that warm up; then what is measured
    model = clock.model("model", lambda number: 9.0 if number < 3 else float(number - 2))
    found = latency(model, images(7, (4,)), repeats=5, threads=3)
    assert (found.seconds, found.quartiles) == (3.0, (2.0, 4.0))
    assert (found.samples, found.threads, found.repeats) == (7, 3, 5)
    assert len(clock.log) == 8


def test_a_fast_network_is_called_several_times_in_one_timing(monkeypatch):
    clock = Clock(monkeypatch)
    found = latency(clock.model("model", lambda number: 2**-10), images(2, (4,)), repeats=3, threads=3)
    assert found.seconds == 2**-10
    assert len(clock.log) == 3 + 3 * math.ceil(0.005 * 2**10)
    clock.log.clear()
    # a clock too coarse to see a call
    latency(clock.model("model", lambda number: 0.0), images(2, (4,)), repeats=1, threads=3)
    assert len(clock.log) == 3 + 1000


def test_a_ratio_is_of_pairs_that_change_their_order(monkeypatch):
    clock = Clock(monkeypatch)
    # the machine becomes slower and slower; the ratio of a pair does not change, that of the medians would
    dense = clock.model("dense", lambda number: 3.0 * 2**number)
    pruned = clock.model("pruned", lambda number: 1.0 * 2**number)
    found = latency_ratio(dense, pruned, images(2, (4,)), repeats=4, threads=3)
    assert clock.log[6:] == ["dense", "pruned", "pruned", "dense"] * 2
    assert (found.speedup, found.quartiles) == (3.0, (3.0, 3.0))
    assert found.dense.seconds == 3 * found.pruned.seconds == 3 * (2**4 + 2**5) / 2
    assert found.dense.repeats == found.pruned.repeats == 4


def test_quartiles_of_the_ratio_are_those_of_the_pairs(monkeypatch):
    clock = Clock(monkeypatch)
    dense = clock.model("dense", lambda number: 1.0 if number < 3 else float(number - 2))
    found = latency_ratio(dense, clock.model("pruned", lambda number: 2.0), images(2, (4,)), repeats=5, threads=3)
    assert (found.speedup, found.quartiles) == (1.5, (1.0, 2.0))


def test_a_real_clock_gives_positive_figures_and_everything_is_left_as_it_was():
    dense, pruned = vgg_bn_small(width=4), vgg_bn_small(width=2)
    dense[1].eval()
    samples = torch.rand(2, 3, 32, 32, dtype=torch.float64)
    batch, before = Batch((samples,)), samples.clone()
    states = [{name: tensor.clone() for name, tensor in model.state_dict().items()} for model in (dense, pruned)]
    torch.set_num_threads(2)
    found = latency_ratio(dense, pruned, batch, repeats=3)
    alone = latency(pruned, batch, repeats=3)
    assert torch.get_num_threads() == 2
    for times in (found.dense, found.pruned, alone):
        assert 0 < times.quartiles[0] <= times.seconds <= times.quartiles[1] < math.inf
        assert (times.samples, times.threads) == (2, 1)
    assert 0 < found.quartiles[0] <= found.speedup <= found.quartiles[1] < math.inf
    assert dense.training
    assert not dense[1].training
    assert pruned.training
    for model, state in zip((dense, pruned), states, strict=True):
        assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert torch.equal(samples, before)


def test_a_layer_that_works_in_place_leaves_the_samples():
    samples = torch.full((2, 4), -1.0)
    latency(nn.Sequential(nn.ReLU(inplace=True), nn.Linear(4, 2)), Batch((samples,)), repeats=1)
    assert torch.equal(samples, torch.full((2, 4), -1.0))


def test_what_cannot_be_measured_is_refused_and_the_threads_are_put_back():
    model, batch = nn.Linear(4, 2), images(2, (4,))
    with pytest.raises(ProblemError, match="repeats is 0"):
        latency(model, batch, repeats=0)
    with pytest.raises(ProblemError, match="threads is 0"):
        latency_ratio(model, model, batch, threads=0)
    with pytest.raises(ProblemError, match=r"pruned is on meta and latency is measured on the CPU"):
        latency_ratio(model, nn.Linear(4, 2, device="meta"), batch)
    torch.set_num_threads(2)
    with pytest.raises(ProblemError, match="fails on inputs of shape"):
        latency(nn.Linear(5, 2), batch)
    assert torch.get_num_threads() == 2
