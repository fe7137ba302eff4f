"""Tracing finds the layers of a network and what their outputs flow into, and refuses what cannot be pruned by name."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import prune

from nettrim.errors import ProblemError, UnknownNameError, UnsupportedError
from nettrim.network.batches import Batch
from nettrim.network.edit import double_copy, find_weight, frozen_copy, write_state
from nettrim.network.matrix import Window
from nettrim.network.trace import LayerGraph, trace


def traced(model: nn.Module, *inputs: Tensor | tuple[int, ...], **how) -> LayerGraph:
    """The graph of a model on random inputs of some shapes."""
    given = tuple(torch.randn(entry) if isinstance(entry, tuple) else entry for entry in inputs)
    return trace(model, Batch(given), **how).graph


class Body(nn.Module):
    """One Linear layer `fc`, with a forward of the test's choosing."""

    def __init__(self, step, **modules: nn.Module) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)
        for name, module in modules.items():
            setattr(self, name, module)
        self.step = step

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.step(self, *inputs)


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


def test_execution_order_and_relu_of_a_custom_module():
    graph = traced(Custom(), (5, 2, 3))
    assert graph.names == ("first", "middle", "last")
    assert [(spec.in_features, spec.out_features) for spec in graph.layers] == [(6, 4), (4, 3), (3, 2)]
    assert [spec.bias for spec in graph.layers] == [True, False, True]
    assert [spec.bias_name for spec in graph.layers] == ["first.bias", None, "last.bias"]
    assert all(spec.relu and spec.prune for spec in graph.layers)
    assert [spec.generation for spec in graph.layers] == [0, 1, 2]
    assert all(spec.kind == "linear" and spec.window is None and spec.groups == 1 for spec in graph.layers)
    for spec in graph.layers:
        step = graph.program.steps[spec.step]
        assert (step.op, step.where) == ("linear", spec.name)
        assert step.held == [name for name in (spec.weight, spec.bias_name) if name]
        assert graph.program.steps[spec.output].op == "relu"


def test_a_convolutional_network():
    model = nn.Sequential(
        nn.Conv2d(2, 6, (3, 2), stride=(2, 1), padding=1, bias=False), nn.BatchNorm2d(6), nn.ReLU(),
        nn.Conv2d(6, 6, 3, padding="same", groups=3), nn.ReLU(), nn.Flatten(1, 2), nn.Conv1d(18, 4, 2, dilation=2),
        nn.Flatten(), nn.Linear(16, 3),
    )  # fmt: skip
    graph = traced(model, (7, 2, 5, 5))
    assert [spec.kind for spec in graph.layers] == ["conv2d", "conv2d", "conv1d", "linear"]
    assert [spec.shape for spec in graph.layers] == [(6, 2, 3, 2), (6, 2, 3, 3), (4, 18, 2), (3, 16)]
    assert [spec.in_features for spec in graph.layers] == [12, 18, 36, 16]
    assert [spec.out_features for spec in graph.layers] == [6, 6, 4, 3]
    assert [spec.numel for spec in graph.layers] == [72, 108, 144, 48]
    assert [spec.groups for spec in graph.layers] == [1, 3, 1, 1]
    assert [spec.positions for spec in graph.layers] == [18, 18, 4, 1]
    assert [spec.relu for spec in graph.layers] == [True, True, False, False]
    assert graph.layers[0].window == Window((3, 2), (2, 1), (1, 1), ((1, 1), (1, 1)))
    # a folded batch norm gives the layer a bias
    assert (graph.layers[0].bias, graph.layers[0].bias_name) == (True, "0.bias")
    assert [fold.weight for fold in graph.folds] == ["0.weight"]


def test_positions_are_counted_per_sample():
    assert traced(nn.Sequential(nn.Linear(4, 3)), (5, 4)).layers[0].positions == 1
    assert traced(nn.Sequential(nn.Linear(4, 3)), (5, 7, 4)).layers[0].positions == 7
    assert traced(nn.Sequential(nn.Linear(4, 3)), (1, 2, 7, 4)).layers[0].positions == 14
    merged = Body(lambda self, x: self.fc(x.reshape(-1, 4)).view(x.shape[0], -1))
    assert traced(merged, (5, 6, 4)).layers[0].positions == 6


def norm_relu(self, x):
    return F.relu(self.norm(self.fc(x)))


def two_readers(self, x):
    y = self.fc(x)
    return y.relu() + y


def two_relus(self, x):
    y = self.fc(x)
    return y.relu() + F.relu(-y)


@pytest.mark.parametrize(
    ("step", "relu"),
    [
        (lambda self, x: self.fc(x).relu(), True),
        (lambda self, x: F.relu_(self.fc(x)), True),
        (lambda self, x: self.fc(x).clamp(min=0), True),
        (lambda self, x: self.fc(x).clamp(0), True),
        (lambda self, x: torch.clip(self.fc(x), min=0.0), True),
        (lambda self, x: self.fc(x).clamp_min(0), True),
        (norm_relu, True),
        (lambda self, x: F.relu(self.drop(self.fc(x).view(-1, 2, 2)).flatten(1)), True),
        (lambda self, x: self.fc(x).unsqueeze(1).transpose(1, 2).contiguous().relu().sum(2), True),
        (lambda self, x: self.fc(x).relu() + x, True),
        (lambda self, x: self.fc(x), False),
        (lambda self, x: (self.fc(x) + x).relu(), False),
        (lambda self, x: (2 * self.fc(x)).relu(), False),
        (two_readers, False),
        (two_relus, False),
        (lambda self, x: (lambda y: (y.relu(), y)[1])(self.fc(x)), False),
        (lambda self, x: F.relu6(self.fc(x)), False),
        (lambda self, x: F.gelu(self.fc(x)), False),
        (lambda self, x: F.leaky_relu(self.fc(x)), False),
        (lambda self, x: self.fc(x).clamp(min=0, max=1), False),
        (lambda self, x: self.fc(x).clamp(0, 1), False),
        (lambda self, x: self.fc(x).clamp(max=0), False),
        (lambda self, x: self.fc(x).clamp(None, 0), False),
        (lambda self, x: self.fc(x).clamp(min=1), False),
        (lambda self, x: self.fc(x).clamp(min=torch.zeros(4, dtype=x.dtype)), False),
        (lambda self, x: self.fc(x)[:, :2].relu(), False),
    ],
)
def test_what_flows_into_a_relu_and_nowhere_else(step, relu):
    graph = traced(Body(step, norm=nn.BatchNorm1d(4), drop=nn.Dropout()), (5, 4))
    (spec,) = graph.layers
    assert spec.relu is relu
    if not relu:
        assert spec.output == spec.step
    else:
        assert graph.program.steps[spec.output].op in ("relu", "clamp", "clip", "clamp_min")


def test_branches_are_of_one_generation():
    def block(self, x):
        y = F.relu(self.fc(x))
        return self.last(self.left(y) + self.right(y) * self.deeper(self.left2(y).tanh()) + x)

    layers = {name: nn.Linear(4, 4) for name in ("left", "right", "left2", "deeper", "last")}
    graph = traced(Body(block, **layers), (5, 4))
    generations = {spec.name: spec.generation for spec in graph.layers}
    assert generations == {"fc": 0, "left": 1, "right": 1, "left2": 1, "deeper": 2, "last": 3}
    two = traced(Body(lambda self, x, y: self.fc(x) + self.other(y), other=nn.Linear(4, 4)), (5, 4), (5, 4))
    assert [spec.generation for spec in two.layers] == [0, 0]


def test_nested_sequential():
    body = nn.Sequential(nn.Linear(4, 3), nn.Dropout(0.5), nn.Identity(), nn.ReLU(inplace=True), nn.ReLU())
    model = nn.Sequential(nn.Flatten(), nn.ReLU(), body, nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 2)))
    graph = traced(model, (3, 2, 2))
    assert graph.names == ("2.0", "3.0", "3.1")
    assert [layer.relu for layer in graph.layers] == [True, False, False]


def test_subclasses_are_followed():
    class Named(nn.Linear):
        pass

    class Twisted(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * 2

    graph = traced(nn.Sequential(Named(2, 2), Twisted(2, 2), nn.ReLU()), (3, 2))
    assert [(spec.name, spec.relu) for spec in graph.layers] == [("0", False), ("1", False)]


def test_a_layer_that_nothing_reads_or_that_reads_no_sample_is_none():
    def parts(self, x):
        self.unread(x)
        return self.fc(x) + self.constant(self.seed)

    model = Body(parts, unread=nn.Linear(4, 4), constant=nn.Linear(4, 4), seed=nn.Parameter(torch.randn(1, 4)))
    assert traced(model, (5, 4)).names == ("fc",)


def test_the_model_is_left_as_it_is():
    model = Custom()
    model.middle.eval()
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    result = trace(model, Batch((torch.randn(4, 6),)))
    assert [model.training, model.first.training, model.middle.training] == [True, True, False]
    assert all(torch.equal(state[name], tensor) for name, tensor in model.state_dict().items())
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert all(tensor.dtype is torch.float64 for tensor in result.state.values())
    assert result.state["first.weight"] is result.double.first.weight


@pytest.mark.parametrize(
    ("layers", "ignore", "selected"),
    [
        ("all", (), ["body.0", "body.2", "head"]),
        ("body.*", (), ["body.0", "body.2"]),
        (["head", "body.0"], (), ["body.0", "head"]),
        ("all", "head", ["body.0", "body.2"]),
        ("all", ["body.[12]"], ["body.0", "head"]),
        (("body.*",), ("body.0",), ["body.2"]),
        (nn.Conv1d, (), ["body.0"]),
        ("Linear", (), ["body.2", "head"]),
        ([nn.Conv1d, "head"], (), ["body.0", "head"]),
        ("all", nn.Linear, ["body.0"]),
        ("all", ["Conv1d", "head"], ["body.2"]),
        (nn.Module, "body.2", ["body.0", "head"]),
        ("Special", (), ["head"]),
    ],
)
def test_selection(layers, ignore, selected):
    class Special(nn.Linear):
        pass

    model = nn.Sequential()
    model.add_module("body", nn.Sequential(nn.Conv1d(2, 2, 1), nn.ReLU(), nn.Linear(3, 3)))
    model.add_module("head", Special(3, 2))
    graph = traced(model, (4, 2, 3), layers=layers, ignore=ignore)
    assert [layer.name for layer in graph.selected] == selected
    assert graph.names == ("body.0", "body.2", "head")
    assert graph.unsupported == ()


def test_a_pattern_that_matches_nothing_lists_the_layers():
    model = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2))
    with pytest.raises(UnknownNameError, match=r"layers names 'fc\*', which matches no layer; the layers are '0', '2'"):
        traced(model, (3, 2), layers=["0", "fc*"])
    with pytest.raises(UnknownNameError, match=r"ignore names '1'"):
        traced(model, (3, 2), ignore="1")
    with pytest.raises(UnknownNameError, match=r"layers names 'Conv2d'"):
        traced(model, (3, 2), layers=nn.Conv2d)


def test_a_selection_of_nothing_or_of_the_wrong_kind():
    model = nn.Sequential(nn.Linear(2, 2))
    with pytest.raises(ProblemError, match="leaves nothing to prune; select one of '0'"):
        traced(model, (3, 2), ignore="*")
    with pytest.raises(ProblemError, match="leaves nothing to prune"):
        traced(model, (3, 2), layers=[])
    for wrong in (3, None, [3], nn.Linear(2, 2)):
        with pytest.raises(ProblemError, match="layers is "):
            traced(model, (3, 2), layers=wrong)
    with pytest.raises(UnknownNameError, match="on_unsupported='maybe' is unknown: use refuse or keep"):
        traced(model, (3, 2), on_unsupported="maybe")


def test_lookup_by_name():
    graph = traced(nn.Sequential(nn.Linear(2, 3)), (4, 2))
    assert graph.layer("0").out_features == 3
    with pytest.raises(UnknownNameError, match=r"'fc'.*'0'"):
        graph.layer("fc")


class Head(nn.Module):
    """Tokens in, tokens out, the embedding tied to the last layer."""

    def __init__(self) -> None:
        super().__init__()
        self.emb, self.fc = nn.Embedding(9, 4), nn.Linear(4, 4)
        self.lm_head = nn.Linear(4, 9, bias=False)
        self.lm_head.weight = self.emb.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.lm_head(F.relu(self.fc(self.emb(ids))))


IDS = torch.randint(0, 9, (3, 5))


def test_a_head_that_is_tied_to_the_embedding():
    with pytest.raises(UnsupportedError, match=r"layer 'lm_head' shares its weight with another \('emb' and 'lm_head'"):
        traced(Head(), IDS)
    for how in ({"ignore": "lm_head"}, {"on_unsupported": "keep"}, {"layers": "fc"}):
        graph = traced(Head(), IDS, **how)
        assert graph.names == ("fc",)
        assert [name for name, _ in graph.unsupported] == ["lm_head"]


def test_tied_weights_are_refused():
    model = nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 3))
    model[2].weight = model[0].weight
    with pytest.raises(UnsupportedError, match=r"'0' and '2'; tied weights.*give each its own copy"):
        traced(model, (4, 3))
    model = nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 3))
    model[2].bias = model[0].bias
    with pytest.raises(UnsupportedError, match=r"layer '0' shares its bias with another \('0' and '2'"):
        traced(model, (4, 3))


def test_a_layer_under_two_names_is_one():
    model = Body(lambda self, x: self.again(x), again=nn.Identity())
    model.again = model.fc
    assert traced(model, (3, 4)).names == ("fc",)


def test_a_layer_that_is_called_twice():
    twice = Body(lambda self, x: self.last(self.fc(self.fc(x))), last=nn.Linear(4, 2))
    with pytest.raises(UnsupportedError, match=r"'fc' is called 2 times in one forward.*give each call its own layer"):
        traced(twice, (3, 4))
    graph = traced(twice, (3, 4), ignore="fc")
    assert (graph.names, graph.selected[0].name) == (("last",), "last")


def test_a_weight_that_other_steps_read():
    model = Body(lambda self, x: self.fc(x) * self.fc.weight.norm() + self.last(x), last=nn.Linear(4, 4))
    with pytest.raises(UnsupportedError, match=r"'fc' shares its weight or bias with another part"):
        traced(model, (3, 4))
    model = Body(lambda self, x: self.fc(x) + F.linear(x, self.last.weight, self.fc.bias), last=nn.Linear(4, 4))
    with pytest.raises(UnsupportedError, match=r"'fc' shares its weight or bias with another part"):
        traced(model, (3, 4))


@pytest.mark.parametrize(
    "change",
    [
        torch.nn.utils.parametrizations.weight_norm,
        torch.nn.utils.parametrizations.spectral_norm,
        lambda layer: prune.random_unstructured(layer, "weight", amount=0.5),
        lambda layer: prune.random_unstructured(layer, "bias", amount=0.5),
    ],
)
def test_weights_that_are_computed_are_refused(change):
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    change(model[0])
    with pytest.raises(UnsupportedError, match=r"layer '0'.*parametrization"):
        traced(model, (4, 3))


def test_parametrized_layers_can_stay_dense():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    torch.nn.utils.parametrizations.weight_norm(model[0])
    for how in ({"ignore": "0"}, {"on_unsupported": "keep"}, {"layers": "1"}):
        graph = traced(model, (4, 3), **how)
        assert graph.names == ("1",)
        assert graph.unsupported[0][0] == "0"
    with pytest.raises(ProblemError, match="leaves nothing to prune"):
        traced(nn.Sequential(model[0]), (4, 3), on_unsupported="keep")


def test_weights_that_are_computed_in_ones_own_forward():
    model = Body(lambda self, x: F.linear(x, self.fc.weight * self.mask), mask=nn.Parameter(torch.ones(4, 4)))
    with pytest.raises(UnsupportedError, match=r"layer '(fc|mask)' computes its weight"):
        traced(model, (3, 4))


@pytest.mark.parametrize(
    ("module", "shape", "said"),
    [
        (nn.Conv3d(2, 2, 1), (3, 2, 2, 2, 4), "layer 'other' is used by conv3d, which cannot be pruned"),
        (nn.ConvTranspose1d(2, 2, 1), (3, 2, 4), "layer 'other' is used by conv_transpose1d"),
        (nn.ConvTranspose2d(2, 2, 1), (3, 2, 2, 4), "layer 'other' is used by conv_transpose2d"),
        (nn.LSTM(4, 4), (3, 2, 4), r"layer 'other\.weight_ih_l0' is used by lstm"),
        (nn.GRU(4, 4), (3, 2, 4), r"layer 'other\.weight_ih_l0' is used by gru"),
        (nn.RNN(4, 4), (3, 2, 4), r"layer 'other\.weight_ih_l0' is used by rnn_tanh"),
        (nn.LSTMCell(4, 4), (3, 4), r"layer 'other\.weight_ih' is used by lstm_cell"),
    ],
)
def test_layers_of_other_kinds(module, shape, said):
    def step(self, x):
        result = self.other(x)
        return self.fc(result[0] if isinstance(result, tuple) else result)

    model = Body(step, other=module)
    # batches come first in every call here but those of recurrent layers, which are batched last
    if isinstance(module, (nn.LSTM, nn.GRU, nn.RNN)):
        module.batch_first = True
    with pytest.raises(UnsupportedError, match=said + ".*or leave such layers dense: ignore them, or on_unsupported"):
        traced(model, shape)
    for how in (
        {"on_unsupported": "keep"}, {"ignore": type(module)}, {"ignore": type(module).__name__}, {"layers": "fc"},
        {"ignore": "other*"}, {"ignore": "other"},
    ):  # fmt: skip
        graph = traced(model, shape, **how)
        assert graph.names == ("fc",)
        assert graph.unsupported
        assert all(name.split(".")[0] == "other" for name, _ in graph.unsupported)


@pytest.mark.parametrize(
    ("step", "op"),
    [
        (lambda self, x: self.fc(x) @ self.w, "matmul"),
        (lambda self, x: self.w @ self.fc(x).T, "matmul"),
        (lambda self, x: torch.mm(self.fc(x), self.w), "mm"),
        (lambda self, x: torch.addmm(x, self.fc(x), self.w), "addmm"),
        (lambda self, x: torch.einsum("bi,io->bo", self.fc(x), self.w), "einsum"),
        (lambda self, x: self.fc(x) @ (2 * self.w).T.softmax(0), "matmul"),
        (lambda self, x: torch.tensordot(self.fc(x), self.w, 1), "tensordot"),
    ],
)
def test_products_with_a_parameter(step, op):
    model = Body(step, w=nn.Parameter(torch.randn(4, 4)))
    with pytest.raises(UnsupportedError, match=rf"layer 'w' is used by {op}, which cannot be pruned"):
        traced(model, (4, 4), ignore="fc")
    assert traced(Body(step, w=nn.Parameter(torch.randn(4, 4))), (4, 4), layers="fc", on_unsupported="keep").unsupported


def test_products_of_activations_are_no_layers():
    graph = traced(Body(lambda self, x: torch.bmm(self.fc(x), x.transpose(1, 2))), (3, 5, 4))
    assert (graph.names, graph.unsupported) == (("fc",), ())


def test_attention_is_made_of_layers():
    graph = traced(nn.Sequential(nn.TransformerEncoderLayer(4, 2, 8, batch_first=True)), (3, 5, 4))
    names = ("0.self_attn.in_proj_weight", "0.self_attn.out_proj", "0.linear1", "0.linear2")
    assert graph.names == names
    assert [spec.relu for spec in graph.layers] == [False, False, True, False]
    assert graph.layers[0].bias_name == "0.self_attn.in_proj_bias"
    chosen = traced(
        nn.Sequential(nn.TransformerEncoderLayer(4, 2, 8, batch_first=True)), (3, 5, 4), ignore=nn.MultiheadAttention
    )
    assert [spec.name for spec in chosen.selected] == list(names[1:])


def test_weights_that_are_not_finite_are_refused():
    model = nn.Sequential(nn.Linear(3, 3))
    with torch.no_grad():
        model[0].weight[1, 2] = torch.nan
    with pytest.raises(ProblemError, match=r"weight of layer '0' has 1 NaN"):
        traced(model, (4, 3))
    with torch.no_grad():
        model[0].weight.fill_(1)
        model[0].bias[:2] = torch.inf
    with pytest.raises(ProblemError, match=r"bias of layer '0' has 2 NaN or infinite"):
        traced(model, (4, 3))


def test_no_layer_and_no_module():
    with pytest.raises(UnsupportedError, match="no Linear or convolutional layer"):
        traced(nn.Sequential(nn.ReLU()), (4, 3))
    for model in (nn.Linear(3, 2), nn.Conv1d(1, 1, 1), nn.Conv2d(1, 1, 1)):
        with pytest.raises(UnsupportedError, match=r"nn\.Sequential\(model\)"):
            traced(model, (4, 3))
    with pytest.raises(ProblemError, match="model is a str"):
        traced("model", (4, 3))


def test_samples_that_do_not_fit():
    with pytest.raises(ProblemError, match=r"model \(Sequential\) fails on batches\[0\] with inputs of shape \(4, 2\)"):
        traced(nn.Sequential(nn.Linear(3, 3)), (4, 2))


@pytest.mark.parametrize("register", ["register_forward_hook", "register_forward_pre_hook"])
@pytest.mark.parametrize(
    ("name", "said"), [("", "the model"), ("0", "layer '0'"), ("1", "layer '1'"), ("1.0", r"'1\.0'")]
)
def test_hooks_are_refused_before_any_of_them_runs(register, name, said):
    model = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.ReLU(), nn.Linear(2, 2)))
    calls: list[object] = []
    handle = getattr(model.get_submodule(name), register)(lambda *args: calls.append(args))
    with pytest.raises(UnsupportedError, match=rf"{said}.*carries a forward hook.*remove the hooks first"):
        traced(model, (3, 2))
    assert calls == []
    handle.remove()
    assert traced(model, (3, 2)).names == ("0", "1.1")


@pytest.mark.parametrize("name", ["", "0"])
def test_a_forward_that_was_put_on_an_object_is_refused(name):
    model = nn.Sequential(nn.Linear(2, 2))
    module = model.get_submodule(name)
    module.forward = lambda x: 2 * x
    with pytest.raises(UnsupportedError, match="has a forward that was put on the object"):
        traced(model, (3, 2))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # inside torch
def test_compiled_models_are_refused():
    for compiled in (torch.compile(nn.Sequential(nn.Linear(2, 2))), torch.jit.trace(nn.Linear(2, 2), torch.ones(1, 2))):
        with pytest.raises(UnsupportedError, match="is compiled; pass the plain module"):
            traced(compiled, (3, 2))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_coarse_weights_are_refused(dtype):
    with pytest.raises(UnsupportedError, match=rf"weight of layer '0' is {dtype}.*call \.float\(\) on the model"):
        traced(nn.Sequential(nn.Linear(2, 2)).to(dtype), (3, 2))
    assert traced(nn.Sequential(nn.Linear(2, 2)).double(), (3, 2)).names == ("0",)


def test_weights_that_are_not_there_yet():
    for model in (nn.Sequential(nn.LazyLinear(2)), nn.Sequential(nn.Linear(2, 2, device="meta"))):
        with pytest.raises(UnsupportedError, match=r"layer '0' holds no weights yet"):
            traced(model, (3, 2))
    model = nn.Sequential(nn.LazyConv1d(2, 1), nn.Flatten(), nn.LazyLinear(3))
    model(torch.randn(3, 2, 4))
    assert traced(model, (3, 2, 4)).names == ("0", "2")


@pytest.mark.filterwarnings("ignore::FutureWarning")  # of torch's own copying
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_exported_programs():
    model = nn.Sequential(nn.Conv1d(2, 3, 3), nn.BatchNorm1d(3), nn.ReLU(), nn.Flatten(), nn.Linear(12, 4)).eval()
    rows = ({0: torch.export.Dim("rows")},)
    exported = torch.export.export(model, (torch.randn(5, 2, 6),), dynamic_shapes=rows).module()
    names = [(spec.name, spec.kind, spec.relu, spec.positions) for spec in traced(model, (5, 2, 6)).layers]
    graph = traced(exported, (5, 2, 6))
    assert [(spec.name, spec.kind, spec.relu, spec.positions) for spec in graph.layers] == names
    assert len(graph.folds) == 1
    exported.register_forward_hook(lambda *args: None)
    with pytest.raises(UnsupportedError, match="carries a forward hook"):
        traced(exported, (5, 2, 6))


def test_a_model_made_in_inference_mode_is_copied_whole():
    with torch.inference_mode():
        model = nn.Sequential(nn.Linear(2, 2), nn.ReLU(inplace=True))
    assert traced(model, (3, 2)).names == ("0",)
    for twin in (frozen_copy(model), double_copy(model)):
        weight = find_weight(twin, "0").double() + 1
        write_state(twin, {"0.weight": weight})
        torch.testing.assert_close(twin[0].weight.double(), weight, rtol=1e-6, atol=0)
