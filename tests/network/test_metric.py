"""The metrics of errors against explicit Jacobians, sample by sample, through what follows each layer."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from nettrim.errors import UnsupportedError
from nettrim.network.calibrate import Batch, read_batches
from nettrim.network.edit import double_copy
from nettrim.network.metric import error_metrics
from nettrim.network.trace import trace


def chain(*modules, seed=0):
    """A network in float64 with random weights, biases that close some units, dropout on as a user may hand it over."""
    generator = torch.Generator().manual_seed(seed)
    model = nn.Sequential(*modules).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
            parameter.mul_(parameter.shape[-1] ** -0.5)
    return model


def samples(rows=20, columns=6, seed=1):
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def explicit(model, name, x):
    """``(1/P) Σ Jᵀ C J`` with ``J = ∂z/∂a`` by `jacrev`, ``a`` after the layer's ReLUs if it has any."""
    modules = [copy.deepcopy(m).eval().requires_grad_(False) for m in model]
    for m in modules:
        if isinstance(m, nn.ReLU):
            m.inplace = False
    at = int(name) + 1
    for k in range(at, len(modules)):
        if isinstance(modules[k], nn.Linear):
            break
        if isinstance(modules[k], nn.ReLU):
            at = k + 1
    before, rest = nn.Sequential(*modules[:at]), nn.Sequential(*modules[at:])
    a = before(x.clone()).detach()
    jacobians = torch.stack([torch.func.jacrev(lambda v: rest(v[None])[0])(row) for row in a])
    outputs = jacobians.shape[1]
    centre = torch.eye(outputs).double()
    if outputs > 1:
        centre -= 1 / outputs
    return torch.einsum("pcm,cd,pdn->mn", jacobians, centre, jacobians) / len(x)


NETWORKS = {
    "plain": lambda: chain(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 7), nn.ReLU(), nn.Linear(7, 4)),
    "in place": lambda: chain(nn.Linear(6, 8), nn.ReLU(True), nn.Linear(8, 7), nn.ReLU(True), nn.Linear(7, 4)),
    "dropout": lambda: chain(
        nn.Linear(6, 8), nn.ReLU(), nn.Dropout(0.5), nn.Linear(8, 7), nn.Dropout(0.5), nn.ReLU(True), nn.Linear(7, 4)
    ),
    "no relu between": lambda: chain(nn.Linear(6, 8), nn.Linear(8, 7), nn.ReLU(), nn.Linear(7, 4)),
    "ends in a relu": lambda: chain(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4), nn.ReLU(True)),
    "no bias": lambda: chain(nn.Linear(6, 8, bias=False), nn.ReLU(), nn.Linear(8, 4, bias=False)),
    "one output": lambda: chain(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 1)),
    "one layer": lambda: chain(nn.Linear(6, 4)),
    "identity": lambda: chain(nn.Linear(6, 8), nn.Identity(), nn.ReLU(), nn.Identity(), nn.Linear(8, 4)),
    "relu twice": lambda: chain(nn.Linear(6, 8), nn.ReLU(), nn.ReLU(), nn.Linear(8, 4)),
    "starts with a relu": lambda: chain(nn.ReLU(True), nn.Linear(6, 8), nn.ReLU(True), nn.Linear(8, 4)),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_equals_the_explicit_jacobian(name):
    model, x = NETWORKS[name](), samples()
    graph = trace(model)
    found = error_metrics(model, graph.layers, read_batches([x]))
    assert tuple(found) == graph.names
    for layer in graph.names:
        expected = explicit(model, layer, x)
        assert found[layer].dtype == torch.float64
        torch.testing.assert_close(found[layer], expected, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(found[layer], found[layer].T, rtol=1e-12, atol=1e-14)
        assert float(torch.linalg.eigvalsh(found[layer])[0]) >= -1e-12


def test_a_closed_unit_has_the_slope_of_its_output():
    """A unit that never fires still has a slope: an error that opened it would reach the output."""
    model = NETWORKS["plain"]()
    with torch.no_grad():
        model[0].bias[2] = -100.0
    found = error_metrics(model, trace(model).layers, read_batches([samples()]))["0"]
    assert float(found[2, 2]) > 0
    torch.testing.assert_close(found, explicit(model, "0", samples()), rtol=1e-9, atol=1e-12)


def test_an_output_that_nobody_reads_costs_nothing():
    model = NETWORKS["plain"]()
    with torch.no_grad():
        model[2].weight[:, 3] = 0.0
        model[4].weight += 5.0  # the same to all outputs: it changes no prediction
    found = error_metrics(model, trace(model).layers, read_batches([samples()]))
    assert not found["0"][3].any()
    assert not found["0"][:, 3].any()
    same = NETWORKS["plain"]()
    with torch.no_grad():
        same[2].weight[:, 3] = 0.0
    plain = error_metrics(same, trace(same).layers, read_batches([samples()]))
    torch.testing.assert_close(found["2"], plain["2"], rtol=1e-9, atol=1e-10)


def test_the_quadratic_form_is_what_small_errors_cost():
    """Finite differences: errors handed on by an open layer move the centred outputs by that much."""
    model, x = NETWORKS["plain"](), samples(200)
    metric = error_metrics(model, trace(model).layers, read_batches([x]))["0"]
    a = model[:2](x).detach()
    e = 1e-6 * torch.randn(8, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    with torch.no_grad():
        moved = model[2:](a + e) - model[2:](a)
    moved = moved - moved.mean(1, keepdim=True)
    assert float(moved.square().sum(1).mean()) == pytest.approx(float(e @ metric @ e), rel=1e-3)


def test_only_the_layers_that_are_asked_for():
    model = NETWORKS["plain"]()
    layers = trace(model).layers
    every = error_metrics(model, layers, read_batches([samples()]))
    some = error_metrics(model, layers[1:2], read_batches([samples()]))
    assert list(some) == ["2"]
    torch.testing.assert_close(some["2"], every["2"])


class Functional(nn.Module):
    """Functional calls, and an input of another name."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(6, 8), nn.Linear(8, 4)

    def forward(self, pixels):
        return self.b(F.dropout(torch.relu_(self.a(torch.flatten(pixels, 1))), training=self.training))


def test_functional_calls_and_keyword_inputs():
    """A batch that is a dict goes by the names of forward; floats are cast to the model's dtype as everywhere."""
    model = Functional().double()
    x = samples()
    by_position = error_metrics(model, trace(model).layers, read_batches([x]))
    by_name = error_metrics(model, trace(model).layers, read_batches([{"pixels": x}]))
    as_float = error_metrics(model, trace(model).layers, read_batches([{"pixels": x.float(), "label": torch.ones(20)}]))
    same = nn.Sequential(model.a, nn.ReLU(), model.b)
    for name, index in (("a", "0"), ("b", "2")):
        torch.testing.assert_close(by_position[name], explicit(same, index, x), rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(by_name[name], by_position[name])
        torch.testing.assert_close(as_float[name], by_position[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("pieces", [[20], [1] * 20, [3, 16, 1]])
def test_batches_do_not_matter(pieces):
    model, x = NETWORKS["dropout"](), samples()
    whole = error_metrics(model, trace(model).layers, read_batches([x]))
    parts = error_metrics(model, trace(model).layers, read_batches(list(x.split(pieces))))
    for name, metric in whole.items():
        torch.testing.assert_close(parts[name], metric, rtol=1e-12, atol=1e-14)


def test_a_sequence_of_vectors_counts_each():
    """Inputs (P, T, N): what is recorded of a layer has P·T rows, and so has the mean."""
    model = NETWORKS["plain"]()
    x = samples(12)
    flat = error_metrics(model, trace(model).layers, read_batches([x]))
    deep = error_metrics(model, trace(model).layers, read_batches([x.reshape(4, 3, 6)]))
    for name, metric in flat.items():
        torch.testing.assert_close(deep[name], metric, rtol=1e-9, atol=1e-12)


def test_many_outputs_are_estimated_without_bias():
    """40 outputs, 32 signs: the mean over seeds goes to the exact one as one over the root of their number."""
    model = chain(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 40))
    x = samples(10)
    exact = explicit(model, "0", x)
    draws = torch.stack([error_metrics(model, trace(model).layers, read_batches([x]), seed=s)["0"] for s in range(200)])
    spread = draws.std(0) / 200**0.5
    assert (spread > 0).all()
    assert ((draws.mean(0) - exact).abs() < 4.5 * spread).all()
    # one draw is already of the right size
    assert float((draws[0] - exact).norm() / exact.norm()) < 0.6
    assert float(torch.linalg.eigvalsh(draws[0])[0]) >= -1e-12
    assert torch.equal(draws[7], error_metrics(model, trace(model).layers, read_batches([x]), seed=7)["0"])
    assert not torch.equal(draws[7], draws[8])


@pytest.mark.parametrize(("outputs", "exact"), [(32, True), (33, False)])
def test_up_to_32_outputs_are_exact(outputs, exact):
    model = chain(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, outputs))
    found = error_metrics(model, trace(model).layers, read_batches([samples()]))["0"]
    assert torch.allclose(found, explicit(model, "0", samples()), rtol=1e-9) == exact


def untouched(model, state, flags):
    assert all(torch.equal(state[k], v) for k, v in model.state_dict().items())
    assert [m.training for m in model.modules()] == flags
    assert all(not m._forward_hooks and not m._forward_pre_hooks and not m._backward_hooks for m in model.modules())
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


def test_the_model_and_the_data_are_left_alone():
    model, x = NETWORKS["starts with a relu"](), samples()
    model[1].training = False
    before, state, flags = x.clone(), copy.deepcopy(model.state_dict()), [m.training for m in model.modules()]
    rng = torch.get_rng_state()
    batches = [Batch((x,)), Batch((), {"input": x})]
    error_metrics(model, trace(model).layers, batches)
    untouched(model, state, flags)
    assert torch.equal(x, before)
    assert not x.requires_grad
    assert torch.equal(rng, torch.get_rng_state())


def test_it_works_on_a_frozen_model_and_without_gradients_around():
    model, x = NETWORKS["plain"](), samples()
    expected = error_metrics(model, trace(model).layers, read_batches([x]))["0"]
    with torch.no_grad():
        found = error_metrics(double_copy(model), trace(model).layers, read_batches([x]))["0"]
    assert torch.equal(found, expected)
    assert not found.requires_grad


class Fails(nn.Module):
    def __init__(self, outputs):
        super().__init__()
        self.a, self.b, self.outputs = nn.Linear(6, 8), nn.Linear(8, 4), outputs

    def forward(self, x):
        return self.outputs(self.b(torch.relu(self.a(x))))


@pytest.mark.parametrize(
    ("outputs", "error"),
    [
        (lambda z: (z, z), UnsupportedError),
        (lambda z: {"z": z}, UnsupportedError),
        (lambda z: z.sum(), UnsupportedError),
        (lambda z: z.detach(), UnsupportedError),
        (lambda z: z.missing(), AttributeError),
    ],
    ids=["tuple", "dict", "number", "detached", "raises"],
)
def test_hooks_go_also_where_it_fails(outputs, error):
    model = Fails(lambda z: z).double()
    graph = trace(model)
    model.outputs = outputs
    state, flags = copy.deepcopy(model.state_dict()), [m.training for m in model.modules()]
    with pytest.raises(error):
        error_metrics(model, graph.layers, read_batches([samples()]))
    untouched(model, state, flags)


def test_what_no_gradient_can_pass_is_named():
    """The second ReLU overwrites what the first one's slope is read from: torch cannot go back through that."""
    model = chain(nn.Linear(6, 8), nn.ReLU(), nn.ReLU(True), nn.Linear(8, 4))
    with pytest.raises(UnsupportedError, match="no gradient leads from the network's output to 0, 3"):
        error_metrics(model, trace(model).layers, read_batches([samples()]))
