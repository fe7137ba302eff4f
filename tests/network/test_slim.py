"""The smaller network computes what the dense shape with zeros does, and comes back from it."""

import copy

import pytest
import torch
from torch import nn

from benchmarks.model.nets import lenet5, resnet_cifar, vgg_bn_small
from nettrim.errors import RunError
from nettrim.network.batches import Batch
from nettrim.network.channels import couplings
from nettrim.network.modular import ProgramModule
from nettrim.network.program import run
from nettrim.network.structure import Structure
from nettrim.network.trace import trace
from nettrim.network.units import find_units
from nettrim.pipeline.account import Account


def stirred(model):
    """The model in evaluation mode, its batch norms with statistics as after training."""
    drawing = torch.Generator().manual_seed(1)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (module.running_var, module.weight.data):
                tensor.copy_(torch.rand(len(tensor), generator=drawing) + 0.5)
            for tensor in (module.running_mean, module.bias.data):
                tensor.copy_(torch.randn(len(tensor), generator=drawing) * 0.2)
    return model.eval()


def plain():
    return nn.Sequential(
        nn.Conv2d(1, 6, 3, padding=1), nn.ReLU(),
        nn.Conv2d(6, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(6, 6, 3, padding=1), nn.ReLU(),
        nn.Conv2d(6, 6, 3, padding=1), nn.ReLU(),
        nn.Flatten(), nn.Linear(6 * 16, 12), nn.ReLU(), nn.Linear(12, 12), nn.ReLU(), nn.Linear(12, 4),
    )  # fmt: skip


NETS = {
    "plain": (plain, (1, 8, 8)),
    "lenet5": (lenet5, (1, 28, 28)),
    "vgg": (lambda: vgg_bn_small(8), (3, 32, 32)),
    "resnet": (lambda: resnet_cifar(8, 2), (3, 32, 32)),
}


@pytest.fixture(params=NETS)
def network(request):
    torch.manual_seed(0)
    factory, shape = NETS[request.param]
    model, batch = stirred(factory()), Batch((torch.rand(5, *shape),))
    traced = trace(model, batch)
    return model, batch, traced


def account_of(model, batch, traced):
    dtypes = {name: tensor.dtype for name, tensor in model.state_dict().items()}
    return Account(traced.graph, traced.state, dtypes, None, None, 2**30)


def zeroed(account, channels):
    """The dense network with other weights, in which all but some channels are zero and read by nobody."""
    standing, pairs = account.standing(), couplings(account.graph)[0]
    drawing = torch.Generator().manual_seed(2)
    weights = {}
    for spec in account.graph.layers:
        weight, bias = standing.dense_arrays(spec)
        matrix = weight.double().reshape(spec.out_features, spec.in_features)
        weights[spec.name] = matrix + 0.01 * torch.randn(matrix.shape, generator=drawing), bias.double()
    for name, kept in channels.items():
        pair = pairs[name]
        lost = [c for c in range(pair.channels) if c not in kept]
        for tensor in weights[name]:
            tensor[lost] = 0
        weights[pair.consumer][0].unflatten(1, (pair.channels, pair.taps))[:, lost] = 0
    for name, (weight, bias) in weights.items():
        standing.put(account.graph.layer(name), weight, bias)
    return standing


def some_structure(account):
    pairs, _ = couplings(account.graph)
    channels = {name: tuple(range(k % 2, pair.channels, 3)) for k, (name, pair) in enumerate(pairs.items())}
    removable = [unit for unit in find_units(account.graph, account.dense) if unit.removable]
    removed = tuple(unit.name for unit in removable[:2])
    touched = {layer for unit in removable[:2] for layer in unit.layers}
    channels = {name: kept for name, kept in channels.items() if not {name, pairs[name].consumer} & touched}
    return Structure(channels, removed)


def test_the_smaller_module_computes_what_the_dense_shape_does(network):
    model, batch, traced = network
    account = account_of(model, batch, traced)
    structure = some_structure(account)
    before = copy.deepcopy(model.state_dict())
    standing = zeroed(account, structure.channels)
    standing = standing.without(account.slimming(structure))
    wanted = run(account.graph.program, standing.state, batch)

    small = standing.slimming.module(model, standing.changed, standing.state, batch)
    assert type(small) is type(model)
    found = copy.deepcopy(small).double()(batch.inputs[0].double())
    assert torch.allclose(found, wanted, rtol=0, atol=1e-9 * float(wanted.abs().max()))
    steps = standing.steps()(batch.inputs[0])
    assert torch.allclose(steps.double(), wanted, rtol=0, atol=1e-4 * float(wanted.abs().max()))
    assert float((wanted - run(account.graph.program, account.dense, batch)).norm()) > 1e-3  # it is another network
    # gone, not zero
    assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in model.parameters())
    for name, kept in structure.channels.items():
        assert small.get_submodule(name).weight.shape[0] == len(kept)
    for module in small.modules():
        if isinstance(module, nn.Conv2d):
            assert module.weight.shape[:2] == (module.out_channels, module.in_channels)
        if isinstance(module, nn.BatchNorm2d):
            assert module.num_features == len(module.running_mean)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_the_dense_shape_comes_back_from_the_smaller_module(network):
    model, batch, traced = network
    account = account_of(model, batch, traced)
    structure = some_structure(account)
    standing = zeroed(account, structure.channels).without(account.slimming(structure))
    small = standing.slimming.module(model, standing.changed, standing.state, batch)
    back = account.of_state(small.state_dict(), account.slimming(structure))
    for name in {name for step in account.graph.program.steps for name in step.held}:
        assert torch.allclose(back.state[name], standing.state[name], rtol=0, atol=1e-12), name
    assert {name: tuple(t.shape) for name, t in back.raw().items() if t.dim()} == {
        name: tuple(t.shape) for name, t in small.state_dict().items() if t.dim()
    }


def test_the_program_without_units_reads_nothing_of_them(network):
    model, batch, traced = network
    account = account_of(model, batch, traced)
    removable = [unit for unit in find_units(account.graph, account.dense) if unit.removable]
    if not removable:
        pytest.skip("nothing to remove")
    slimming = account.slimming(Structure(removed=tuple(unit.name for unit in removable)))
    read = {name for step in slimming.program().steps for name in step.held}
    assert not read & slimming.absent
    found = run(slimming.program(), account.dense, batch)
    wanted = run(account.graph.program, account.dense | slimming.gone, batch)
    assert torch.allclose(found, wanted, rtol=0, atol=1e-12 * float(wanted.abs().max()))


class Own(nn.Module):
    """A class that computes something else once its parts are exchanged: it looks at its own layers."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.third = nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 2)

    def forward(self, inputs):
        hidden = self.first(inputs).relu()
        hidden = torch.nn.functional.linear(hidden, self.second.weight, self.second.bias).relu()
        return self.third(hidden)


def test_a_class_whose_parts_cannot_be_exchanged_runs_steps():
    torch.manual_seed(0)
    model, batch = Own().eval(), Batch((torch.rand(5, 4),))
    traced = trace(model, batch)
    account = account_of(model, batch, traced)
    standing = account.standing().without(account.slimming(Structure(removed=("second",))))
    assert standing.slimming.module(model, standing.changed, standing.state, batch) is None
    steps = standing.steps()
    assert isinstance(steps, ProgramModule)
    hidden = model.first(batch.inputs[0]).relu()
    assert torch.allclose(steps(batch.inputs[0]), model.third(hidden), atol=1e-6)
    assert not [name for name in dict(steps.named_parameters()) if name.startswith("second")]


@pytest.mark.parametrize(
    ("structure", "said"),
    [
        (Structure({"fc2": (0,)}), "0 to choose"),
        (Structure({"conv1": (3, 1)}), "keeps channels"),
        (Structure({"conv1": (0, 20)}), "keeps channels"),
        (Structure({"conv1": ()}), "keeps channels"),
        (Structure(removed=("conv1",)), "cannot do without"),
    ],
)
def test_a_structure_of_another_network_is_refused(structure, said):
    model, batch = lenet5().eval(), Batch((torch.rand(5, 1, 28, 28),))
    with pytest.raises(RunError, match=said):
        account_of(model, batch, trace(model, batch)).slimming(structure)
