"""Which channels can go: by network, by what lies in between, and that what lies in between keeps channels apart."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from nettrim.network.batches import read_batches
from nettrim.network.channels import couplings
from nettrim.network.fold import fold_state
from nettrim.network.program import walk
from nettrim.network.segment import applied, between
from nettrim.network.trace import trace
from tests.networks import MAKERS, batches_of, network_of


def traced(model, inputs, **settings):
    batch = read_batches(inputs if isinstance(inputs, list) else [inputs]).first(32)
    return trace(model, batch, on_unsupported="keep", **settings), batch


EXPECTED = {
    "lenet5": {"0": ("3", 25), "3": ("7", 4), "7": ("9", 1), "9": ("11", 1)},
    "vgg": {"0": ("3", 9), "3": ("7", 9), "7": ("12", 4), "12": ("16", 1)},
    "resnet": {"4.conv1": ("4.conv2", 9), "5.conv1": ("5.conv2", 9)},
    "pre-activation": {"one": ("two", 1)},
    "mobilenet": {"12": ("16", 1)},
    "conv1d": {"0": ("2", 3), "2": ("7", 5)},
    "branches": {},
    "encoder": {"linear1": ("linear2", 1)},
    "attention": {"up": ("down", 1)},
    "flow": {"steps.0": ("steps.1", 1), "steps.2": ("wide", 1), "wide": ("last", 1)},
    "opt": {"model.decoder.layers.0.fc1": ("model.decoder.layers.0.fc2", 1)},
}


@pytest.mark.parametrize("name", MAKERS)
def test_every_selected_layer_is_a_producer_or_has_a_reason(name):
    graph = traced(network_of(name), batches_of(name))[0].graph
    found, why = couplings(graph)
    assert {p: (c.consumer, c.taps) for p, c in found.items()} == EXPECTED[name]
    assert {*found, *why} == {layer.name for layer in graph.selected}
    assert not {*found} & {*why}
    for name, pair in found.items():
        assert pair.channels == graph.layer(name).out_features
        assert pair.channels * pair.taps == graph.layer(pair.consumer).in_features


@pytest.mark.parametrize("name", [name for name, pairs in EXPECTED.items() if pairs])
def test_steps_in_between_are_those_of_the_network_and_keep_channels_apart(name):
    found, batch = traced(network_of(name), batches_of(name))
    graph = found.graph
    state = fold_state(found.state, graph.folds)
    for pair in couplings(graph)[0].values():
        producer = graph.layer(pair.producer)
        for moment in walk(graph.program, [state], batch):
            if moment.at == pair.start:
                args, kwargs = moment.args[0]
                inputs, value = args[0] if args else kwargs["input"], moment.values[0]
            if moment.at == pair.stop:
                reached = moment.values[0]
        step = graph.program.steps[pair.start]
        bias = None if producer.bias_name is None else state[producer.bias_name]
        assert torch.equal(applied(step, inputs, state[producer.weight], bias), value)
        assert torch.equal(between(graph.program, pair.start, pair.stop, value), reached)
        kept = torch.arange(0, pair.channels, 2)
        narrower = applied(step, inputs, state[producer.weight][kept], None if bias is None else bias[kept])
        part = between(graph.program, pair.start, pair.stop, narrower)
        if graph.layer(pair.consumer).window is not None:
            wanted = reached[:, kept]
        else:
            wanted = reached.reshape(*reached.shape[:-1], -1, pair.taps)[..., kept, :].flatten(-2)
        assert torch.allclose(part, wanted, rtol=1e-12, atol=1e-12)


class Between(nn.Module):
    """Two layers and something in between."""

    def __init__(self, middle, flat=False, before=None, after=None):
        super().__init__()
        self.one = before or nn.Conv2d(2, 6, 3)
        self.two = after or (nn.Linear(6 * 16, 3) if flat else nn.Conv2d(6, 3, 1))
        self.middle = middle

    def forward(self, x):
        return self.two(self.middle(self.one(x)))


IMAGES = torch.randn(5, 2, 6, 6)
PASSES = {
    "nothing": (lambda v: v, False, None),
    "flatten": (lambda v: torch.flatten(v, 1), True, None),
    "view": (lambda v: v.view(v.size(0), -1), True, None),
    "flatten in two": (lambda v: v.flatten(2).flatten(1), True, None),
    "mean": (lambda v: F.relu(v).mean((2, 3)), False, nn.Linear(6, 3)),
    "mean, kept": (lambda v: v.mean((-1, -2), keepdim=True), False, None),
    "squeeze": (lambda v: F.adaptive_max_pool2d(v, 1).squeeze(-1).squeeze(-1), False, nn.Linear(6, 3)),
    "pooled": (lambda v: F.avg_pool2d(F.gelu(v), 2), False, None),
    "view to a map": (lambda v: v.view(v.size(0), -1, 2, 8), False, None),
}
STOPS = {
    "fixed": (lambda v: v.view(-1, 96), True, None, "fixed size"),
    "fixed, known batch": (lambda v: v.view(v.size(0), 96), True, None, "fixed size"),
    "any squeeze": (lambda v: F.adaptive_max_pool2d(v, 1).squeeze(), False, nn.Linear(6, 3), "squeeze"),
    "softmax": (lambda v: v.softmax(1), False, None, "softmax"),
    "mean over channels": (lambda v: v.mean((1, 2, 3), keepdim=True), False, nn.Conv2d(1, 3, 1), "across its channels"),
    "twice": (lambda v: v + v.relu(), False, None, "2 steps"),
    "grouped": (lambda v: v, False, nn.Conv2d(6, 4, 1, groups=2), "grouped"),
    "transposed": (lambda v: v.transpose(1, 2), False, nn.Conv2d(4, 3, 1), "transpose"),
    "along another dimension": (lambda v: v, False, nn.Linear(4, 3), "another dimension"),
    "scaled by another": (lambda v: F.prelu(v, torch.full((6,), 0.1, dtype=v.dtype)), False, None, "together"),
}


@pytest.mark.parametrize("name", PASSES)
def test_channels_pass_what_leaves_each_of_them_alone(name):
    middle, flat, after = PASSES[name]
    found, _ = couplings(traced(Between(middle, flat, after=after), IMAGES)[0].graph)
    assert list(found) == ["one"]


@pytest.mark.parametrize("name", STOPS)
def test_channels_stay_where_something_mixes_them_or_counts_on_their_number(name):
    middle, flat, after, reason = STOPS[name]
    found, why = couplings(traced(Between(middle, flat, after=after), IMAGES)[0].graph)
    assert not found
    assert reason in why["one"]


def test_pooling_behind_a_linear_layer_is_across_its_outputs():
    model = Between(lambda v: F.avg_pool1d(v, 2), before=nn.Linear(6, 8), after=nn.Linear(4, 3))
    found, why = couplings(traced(model, torch.randn(5, 4, 6))[0].graph)
    assert not found
    assert "across" in why["one"]


def test_both_layers_must_be_selected():
    found, why = couplings(traced(Between(lambda v: v), IMAGES, ignore="two")[0].graph)
    assert not found
    assert "not selected" in why["one"]
    found, why = couplings(traced(Between(lambda v: v), IMAGES, ignore="one")[0].graph)
    assert (list(found), list(why)) == ([], ["two"])
