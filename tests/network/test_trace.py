"""Tracing finds the layers of a chain in execution order, and refuses everything else by name."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import prune

from nettrim.errors import ProblemError, UnknownNameError, UnsupportedError
from nettrim.network.edit import double_copy, frozen_copy, layer_arrays, write_layer
from nettrim.network.trace import LayerSpec, trace


class Custom(nn.Module):
    """A chain whose forward runs its layers in another order than they are declared in, by calls."""

    def __init__(self) -> None:
        super().__init__()
        self.last = nn.Linear(3, 2)
        self.middle = nn.Linear(4, 3, bias=False)
        self.first = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.flatten(x, 1).view(x.size(0), -1)
        x = F.dropout(F.relu(self.first(x), inplace=True), 0.3, training=self.training)
        x = torch.relu(self.middle(x.reshape(x.shape[0], 2 * 2)))
        return self.last(x.flatten(1)).relu()


class Body(nn.Module):
    """One Linear layer `fc`, with a step of the test's choosing in front of or behind it."""

    def __init__(self, step, **modules: nn.Module) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)
        for name, module in modules.items():
            self.add_module(name, module)
        self.step = step

    def forward(self, x: Tensor) -> Tensor:
        return self.step(self, x)


def test_execution_order_and_relu_of_a_custom_module():
    graph = trace(Custom())
    assert graph.layers == (
        LayerSpec("first", 6, 4, bias=True, relu=True, prune=True),
        LayerSpec("middle", 4, 3, bias=False, relu=True, prune=True),
        LayerSpec("last", 3, 2, bias=True, relu=True, prune=True),
    )


def test_nested_sequential():
    body = nn.Sequential(nn.Linear(4, 3), nn.Dropout(0.5), nn.Identity(), nn.ReLU(inplace=True), nn.ReLU())
    model = nn.Sequential(nn.Flatten(), nn.ReLU(), body, nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 2)))
    graph = trace(model)
    assert graph.names == ("2.0", "3.0", "3.1")
    assert [layer.relu for layer in graph.layers] == [True, False, False]


def test_subclasses_are_judged_by_their_forward():
    class Named(nn.Linear):
        pass

    class Twisted(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * 2

    assert trace(nn.Sequential(Named(2, 2))).names == ("0",)
    with pytest.raises(UnsupportedError, match=r"layer '1' \(Twisted\)"):
        trace(nn.Sequential(nn.Linear(2, 2), Twisted(2, 2)))


def test_training_flags_survive():
    model = Custom()
    model.middle.eval()
    trace(model)
    assert [model.training, model.first.training, model.middle.training] == [True, True, False]


@pytest.mark.parametrize(
    ("layer", "said"),
    [
        (nn.Conv2d(1, 1, 1), "Conv2d"),
        (nn.BatchNorm1d(4), "BatchNorm1d"),
        (nn.Sigmoid(), "Sigmoid"),
        (nn.ReLU6(), "ReLU6"),
        (nn.LeakyReLU(), "LeakyReLU"),
        (nn.LazyLinear(2), "LazyLinear|no weights yet"),
    ],
)
def test_other_layers_are_refused_by_name(layer, said):
    with pytest.raises(UnsupportedError, match=rf"layer '1'.*({said})"):
        trace(nn.Sequential(nn.Linear(4, 4), layer))


@pytest.mark.parametrize(
    ("step", "said"),
    [
        (lambda self, x: x + self.fc(x), "'add'"),
        (lambda self, x: torch.cat([self.fc(x), x]), "'cat'"),
        (lambda self, x: self.fc(x).sigmoid(), "'sigmoid'"),
        (lambda self, x: self.fc(self.fc(x)), "'fc'.*called twice"),
        (lambda self, x: (self.fc(x), x), "output"),
        (lambda self, x: {"out": self.fc(x)}, "output"),
        (lambda self, x: F.dropout(self.fc(x)), "self.training"),
        (lambda self, x: F.linear(x, self.fc.weight), "'fc.weight'"),
        (lambda self, x: self.fc(x) if x.sum() > 0 else x, "traced by torch.fx"),
        (lambda self, x: sum(self.fc(x) for _ in range(x.size(0))), "traced by torch.fx"),
    ],
)
def test_forwards_that_are_no_chain_are_refused(step, said):
    with pytest.raises(UnsupportedError, match=said):
        trace(Body(step))


def test_a_branch_into_two_layers_is_refused():
    def two_heads(self, x):
        y = self.fc(x)
        self.head(y)
        return self.other(y)

    with pytest.raises(UnsupportedError, match="'other'"):
        trace(Body(two_heads, head=nn.Linear(4, 2), other=nn.Linear(4, 2)))


def test_an_in_place_relu_whose_result_is_dropped_is_not_overlooked():
    def drops(self, x):
        y = self.fc(x)
        F.relu(y, inplace=True)
        return y

    with pytest.raises(UnsupportedError, match="output"):
        trace(Body(drops))


def test_two_inputs_are_refused_and_an_unused_one_is_not():
    class Two(nn.Module):
        def __init__(self, use: bool) -> None:
            super().__init__()
            self.fc = nn.Linear(2, 2)
            self.use = use

        def forward(self, x: Tensor, extra: Tensor | None = None) -> Tensor:
            return self.fc(x + extra) if self.use else self.fc(x)

    assert trace(Two(use=False)).names == ("fc",)
    with pytest.raises(UnsupportedError, match=r"'x' and 'extra'"):
        trace(Two(use=True))


def test_tied_weights_are_refused():
    model = nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 3))
    model[2].weight = model[0].weight
    with pytest.raises(UnsupportedError, match=r"'0' and '2' share one weight"):
        trace(model)


@pytest.mark.parametrize(
    "change",
    [
        torch.nn.utils.parametrizations.weight_norm,
        lambda layer: prune.random_unstructured(layer, "weight", amount=0.5),
    ],
)
def test_weights_that_are_computed_are_refused(change):
    model = nn.Sequential(nn.Linear(3, 3))
    change(model[0])
    with pytest.raises(UnsupportedError, match=r"layer '0'.*parametrization"):
        trace(model)


def test_weights_that_are_not_finite_are_refused():
    model = nn.Sequential(nn.Linear(3, 3))
    with torch.no_grad():
        model[0].weight[1, 2] = torch.nan
    with pytest.raises(ProblemError, match=r"weight of layer '0' has 1 NaN"):
        trace(model)


def test_no_linear_layer_and_no_module():
    with pytest.raises(UnsupportedError, match="no Linear"):
        trace(nn.Sequential(nn.ReLU()))
    with pytest.raises(UnsupportedError, match=r"nn\.Sequential\(model\)"):
        trace(nn.Linear(2, 2))
    with pytest.raises(ProblemError, match="model is a str"):
        trace("model")


@pytest.mark.parametrize(
    ("layers", "ignore", "selected"),
    [
        ("all", (), ["body.0", "body.2", "head"]),
        ("body.*", (), ["body.0", "body.2"]),
        (["head", "body.0"], (), ["body.0", "head"]),
        ("all", "head", ["body.0", "body.2"]),
        ("all", ["body.[12]"], ["body.0", "head"]),
        (("body.*",), ("body.0",), ["body.2"]),
    ],
)
def test_selection(layers, ignore, selected):
    model = nn.Sequential()
    model.add_module("body", nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2)))
    model.add_module("head", nn.Linear(2, 2))
    graph = trace(model, layers, ignore)
    assert [layer.name for layer in graph.selected] == selected
    assert graph.names == ("body.0", "body.2", "head")


def test_a_pattern_that_matches_nothing_lists_the_layers():
    model = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2))
    with pytest.raises(UnknownNameError, match=r"layers names 'fc\*'.*'0', '2'"):
        trace(model, ["0", "fc*"])
    with pytest.raises(UnknownNameError, match=r"ignore names '1'"):
        trace(model, ignore="1")


def test_a_selection_of_nothing_or_of_the_wrong_kind():
    model = nn.Sequential(nn.Linear(2, 2))
    with pytest.raises(ProblemError, match="leaves nothing to prune"):
        trace(model, ignore="*")
    with pytest.raises(ProblemError, match="layers is 3"):
        trace(model, 3)


def test_lookup_by_name():
    graph = trace(nn.Sequential(nn.Linear(2, 3)))
    assert graph.layer("0").out_features == 3
    with pytest.raises(UnknownNameError, match=r"'fc'.*'0'"):
        graph.layer("fc")


@pytest.mark.parametrize("register", ["register_forward_hook", "register_forward_pre_hook"])
@pytest.mark.parametrize(
    ("name", "said"), [("", "the model"), ("0", "layer '0'"), ("1", "layer '1'"), ("1.0", r"'1\.0'")]
)
def test_hooks_are_refused_before_any_of_them_runs(register, name, said):
    model = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.ReLU(), nn.Linear(2, 2)))
    calls: list[object] = []
    handle = getattr(model.get_submodule(name), register)(lambda *args: calls.append(args))
    with pytest.raises(UnsupportedError, match=rf"{said}.*carries a forward hook.*remove the hooks first"):
        trace(model)
    assert calls == []
    handle.remove()
    assert trace(model).names == ("0", "1.1")


@pytest.mark.parametrize("name", ["", "0"])
def test_a_forward_that_was_put_on_an_object_is_refused(name):
    model = nn.Sequential(nn.Linear(2, 2))
    module = model.get_submodule(name)
    module.forward = lambda x: 2 * x
    with pytest.raises(UnsupportedError, match="has a forward that was put on the object"):
        trace(model)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # inside torch
def test_compiled_models_are_refused():
    for compiled in (torch.compile(nn.Sequential(nn.Linear(2, 2))), torch.jit.trace(nn.Linear(2, 2), torch.ones(1, 2))):
        with pytest.raises(UnsupportedError, match="is compiled; pass the plain module"):
            trace(compiled)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_coarse_weights_are_refused(dtype):
    with pytest.raises(UnsupportedError, match=rf"weight of layer '0' is {dtype}.*call \.float\(\) on the model"):
        trace(nn.Sequential(nn.Linear(2, 2)).to(dtype))
    assert trace(nn.Sequential(nn.Linear(2, 2)).double()).names == ("0",)


def test_a_model_made_in_inference_mode_is_copied_whole():
    with torch.inference_mode():
        model = nn.Sequential(nn.Linear(2, 2))
    assert trace(model).names == ("0",)
    for twin in (frozen_copy(model), double_copy(model)):
        weight, bias = (tensor.double() + 1 for tensor in layer_arrays(twin, "0"))
        write_layer(twin, "0", weight, bias)
        torch.testing.assert_close(twin[0].weight.double(), weight, rtol=1e-6, atol=0)
