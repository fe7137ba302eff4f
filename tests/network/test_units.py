"""Units are what everything flows through; one that can go is gone exactly, in the dense shape."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from networks import PreActivation, batches_of, call, network_of, seeded
from torch import Tensor, nn

from benchmarks.model.nets import resnet_cifar, vgg_bn_small
from nettrim.network.batches import Batch, read_batches
from nettrim.network.fold import fold_state
from nettrim.network.matrix import Window
from nettrim.network.program import run
from nettrim.network.structure import gone
from nettrim.network.trace import trace
from nettrim.network.units import Unit, find_units, middle_tap


def units_of(model: nn.Module, inputs: Tensor, **how) -> dict[str, Unit]:
    traced = trace(model, Batch((inputs,)), **how)
    return {unit.name: unit for unit in find_units(traced.graph, fold_state(traced.state, traced.graph.folds))}


def without(model: nn.Module, inputs: Tensor, *names: str) -> Tensor:
    """What the dense shape gives with the entries that make some units vanish, in float64."""
    traced = trace(model, Batch((inputs,)))
    state = fold_state(traced.state, traced.graph.folds)
    found = {unit.name: unit for unit in find_units(traced.graph, state)}
    for name in names:
        assert found[name].removable
        state |= gone(traced.graph, found[name])
    return run(traced.graph.program, state, Batch((inputs.double(),)))


def bypassed(model: nn.Module, *modules: str) -> nn.Module:
    """A copy with the identity in place of some modules."""
    twin = copy.deepcopy(model)
    for name in modules:
        owner, _, last = name.rpartition(".")
        setattr(twin.get_submodule(owner), last, nn.Identity())
    return twin


def close(found: Tensor, wanted: Tensor) -> bool:
    return float((found - wanted).norm()) <= 1e-12 * float(wanted.norm())


# what is found -------------------------------------------------------------------------------------------------------


def test_the_blocks_of_a_resnet_are_its_units():
    units = units_of(seeded(resnet_cifar(8, 5)), torch.rand(2, 3, 32, 32))
    assert list(units) == [f"stage{stage}.{block}" for stage in (1, 2, 3) for block in range(5)]
    assert [unit.stage for unit in units.values()] == [0] * 5 + [1] * 5 + [2] * 5
    assert {name for name, unit in units.items() if not unit.removable} == {"stage2.0", "stage3.0"}
    assert "changes the width" in units["stage2.0"].why
    block = units["stage2.3"]
    assert block.kind == "residual"
    assert block.layers == ("stage2.3.conv1", "stage2.3.conv2")
    assert block.ends == ("stage2.3.conv2",)
    assert block.entry == units["stage2.2"].output
    assert units["stage2.0"].layers == ("stage2.0.conv1", "stage2.0.conv2", "stage2.0.shortcut.conv")


def test_the_layers_of_a_plain_network_are_its_units():
    units = units_of(seeded(vgg_bn_small()), torch.rand(2, 3, 32, 32))
    assert list(units) == [f"conv{number}" for number in range(1, 7)]
    assert [unit.removable for unit in units.values()] == [False, True] * 3
    assert [unit.stage for unit in units.values()] == [0, 0, 1, 1, 2, 2]
    assert units["conv3"].entry > units["conv2"].output  # the pool between them is of neither
    assert all(unit.layers == unit.ends == (name,) for name, unit in units.items())


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("lenet5", {"0": False, "3": False, "7": False, "9": False}),
        ("vgg", {"0": False, "3": True, "7": False, "12": False}),
        ("resnet", {"4": True, "5": False}),
        ("pre-activation", {"two": True}),
        ("conv1d", {"0": False, "2": False}),
        ("branches", {"stem": False}),  # nothing flows through one of two branches alone
        ("encoder", {"self_attn.out_proj": False, "linear2": True}),
        ("attention", {"out": True, "down": True}),
        ("flow", {"steps.1": False, "wide": False}),
    ],
)
def test_units_of_other_networks(name, expected):
    first = read_batches(batches_of(name)).first(64)
    traced = trace(network_of(name).eval(), first, on_unsupported="keep")
    found = find_units(traced.graph, fold_state(traced.state, traced.graph.folds))
    assert {unit.name: unit.removable for unit in found} == expected
    assert all((unit.why is None) == unit.removable for unit in found)


class Sum(nn.Module):
    """A branch of two layers, added in one of several ways."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.stem, self.one, self.two, self.head = (nn.Linear(6, 6) for _ in range(4))
        self.how = how

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        inner = F.relu(self.one(x))
        branch = self.two(inner)
        if self.how == "alpha":
            x = torch.add(x, branch, alpha=2)
        elif self.how == "rectified":
            x = x + F.relu(branch)
        elif self.how == "scaled":
            x = 0.5 * x + branch
        elif self.how == "twice":
            x = branch + branch
        elif self.how == "outside":
            x = x + branch
            x = x * inner
        else:
            x = branch + x
        return self.head(F.relu(x))


@pytest.mark.parametrize(
    ("how", "why"),
    [
        ("alpha", "sum is not"),
        ("rectified", "ends in no layer"),
        ("scaled", "no identity"),
        ("twice", None),
        ("outside", None),
        ("plain", "can go"),
    ],
)
def test_a_residual_branch_that_cannot_go_says_why(how, why):
    """None: what lies there is no residual unit at all."""
    units = [u for u in units_of(seeded(Sum(how)), torch.randn(5, 6)).values() if u.kind == "residual"]
    if why is None:
        assert units == []
    elif why == "can go":
        assert [unit.removable for unit in units] == [True]
    else:
        assert not units[0].removable
        assert why in units[0].why


@pytest.mark.parametrize(
    ("layer", "why"),
    [
        (nn.Conv2d(4, 4, 3), "width or the size"),
        (nn.Conv2d(4, 4, 3, stride=2, padding=1), "width or the size"),
        (nn.Conv2d(4, 4, 3, padding=1, padding_mode="circular"), "width or the size"),
        (nn.Conv2d(4, 5, 3, padding=1), "width or the size"),
        (nn.Conv2d(4, 4, 4, padding=6, dilation=4), "no kernel"),
    ],
)
def test_a_plain_layer_that_cannot_go_says_why(layer, why):
    model = nn.Sequential(nn.Conv2d(2, 4, 1), nn.ReLU(), layer, nn.ReLU(), nn.Flatten(), nn.LazyLinear(3))
    model(torch.randn(1, 2, 9, 9))
    unit = units_of(seeded(model), torch.randn(3, 2, 9, 9))["2"]
    assert not unit.removable
    assert why in unit.why


def test_a_layer_that_reads_negative_numbers_stays():
    """The identity with a ReLU behind it is none there."""
    model = seeded(nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 3)))
    units = units_of(model, torch.randn(3, 4))
    assert "negative" in units["0"].why
    norm = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.LayerNorm(5), nn.Linear(5, 5), nn.ReLU(), nn.Linear(5, 2))
    assert "negative" in units_of(seeded(norm), torch.randn(3, 4))["3"].why
    clamped = nn.Sequential(nn.Linear(4, 5), nn.Hardtanh(-1, 1), nn.Linear(5, 5), nn.ReLU(), nn.Linear(5, 2))
    assert not units_of(seeded(clamped), torch.randn(3, 4))["2"].removable


def test_an_unselected_layer_keeps_its_unit():
    units = units_of(seeded(resnet_cifar(4, 2)), torch.rand(2, 3, 8, 8), ignore="stage1.1.conv1")
    assert not units["stage1.1"].removable
    assert units["stage1.1"].why == "layer 'stage1.1.conv1' is not selected"
    assert units["stage1.0"].removable
    assert "not selected" in units_of(network_of("vgg"), torch.randn(2, 2, 8, 8), layers=["0", "7"])["3"].why


def test_the_last_layer_is_no_unit():
    model = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 5), nn.ReLU(), nn.Linear(5, 5), nn.ReLU())
    assert list(units_of(seeded(model), torch.randn(3, 4))) == ["0", "2"]


# what is gone is gone ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("removed", [("stage1.0",), ("stage1.2", "stage2.1", "stage3.2"), ("stage3.1", "stage3.2")])
def test_a_residual_block_that_is_gone_is_the_identity(removed):
    model, x = seeded(resnet_cifar(4, 3)), torch.rand(3, 3, 12, 12)
    assert close(without(model, x, *removed), call(bypassed(model, *removed), [x]))
    assert not close(without(model, x, *removed), call(model, [x]))


def test_a_branch_without_a_module_of_its_own_goes_exactly():
    model, x = seeded(PreActivation()), torch.randn(7, 5)
    twin = copy.deepcopy(model).double()
    assert close(without(model, x, "two"), twin.head(F.relu(twin.stem(x.double()))).detach())


def conv(before: int, after: int, *how, **more) -> list[nn.Module]:
    return [nn.Conv2d(before, after, *how, **more), nn.BatchNorm2d(after), nn.ReLU()]


def test_plain_layers_that_are_gone_are_the_identity():
    model = seeded(
        nn.Sequential(
            *conv(2, 4, 3, padding=1), *conv(4, 4, 3, padding=1), nn.MaxPool2d(2),
            *conv(4, 4, 5, padding=4, dilation=2), *conv(4, 4, (1, 3), padding=(0, 1), bias=False),
            nn.AvgPool2d(2), nn.Dropout(), nn.Flatten(),
            nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 3),
        )
    )  # fmt: skip
    x = torch.randn(5, 2, 8, 8)
    blocks = {"3": ["3", "4"], "7": ["7", "8"], "10": ["10", "11"], "16": ["16"]}
    assert {name for name, unit in units_of(model, x).items() if unit.removable} == set(blocks)
    for name, modules in blocks.items():
        assert close(without(model, x, name), call(bypassed(model, *modules, str(int(modules[-1]) + 1)), [x])), name
    every = [module for modules in blocks.values() for module in modules]
    assert close(without(model, x, *blocks), call(bypassed(model, *every), [x]))
    assert not close(without(model, x, "7"), call(model, [x]))


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
def test_even_kernels_and_one_dimension_go_exactly():
    model = seeded(
        nn.Sequential(
            nn.Conv1d(2, 3, 3), nn.ReLU(), nn.Conv1d(3, 3, 4, padding="same"), nn.ReLU(), nn.Flatten(), nn.Linear(18, 2)
        )
    )
    x = torch.randn(4, 2, 8)
    assert close(without(model, x, "2"), call(bypassed(model, "2"), [x]))


def test_the_tap_over_the_own_position():
    assert middle_tap(Window.of((3, 5), 1, (1, 2), 1)) == (1, 2)
    assert middle_tap(Window.of((4,), 1, "same", 1)) == (1,)
    assert middle_tap(Window.of((3,), 1, 2, 2)) == (1,)
    assert middle_tap(Window.of((3,), 1, 1, 2)) is None
    assert middle_tap(Window.of((2,), 1, 2, 1)) is None
