"""What layers see and say, against hooks on the modules; outputs of a model; how many samples run at a time."""

from __future__ import annotations

import copy
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nettrim.errors import ProblemError, UnknownNameError, UnsupportedError
from nettrim.network.batches import Batch, read_batches
from nettrim.network.calibrate import outputs, samples_at_a_time, scan
from nettrim.network.fold import fold_state
from nettrim.network.trace import trace

X = torch.randn(7, 3, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.ReLU(inplace=True), nn.Dropout(0.5), nn.Linear(4, 2))


def traced(model, batches):
    """A graph, the dense network's state with batch norms folded, and the samples."""
    read = read_batches(batches)
    found = trace(model, read.first(64))
    return found.graph, fold_state(found.state, found.graph.folds), read


def record(graph, dense, state, read, names, rows=512):
    """Everything that a scan yields, joined: name to inputs and outputs; the numbers of the rows are checked."""
    found = {name: [] for name in names}
    for seen in scan(graph, dense, state, read, names, rows):
        assert seen.start == sum(len(before.inputs) for before in found[seen.name])
        assert len(seen.inputs) == len(seen.outputs)
        assert seen.inputs.dtype == seen.outputs.dtype == torch.float64
        found[seen.name].append(seen)
    return {
        name: tuple(torch.cat([getattr(s, k) for s in f]) for k in ("inputs", "outputs")) for name, f in found.items()
    }


def hooked(model, names, *args, **kwargs):
    """What goes into and comes out of modules, by hooks on a copy in float64; nothing that works in place after it."""
    twin, found = copy.deepcopy(model).double().eval(), {}
    for name in names:
        twin.get_submodule(name).register_forward_hook(
            lambda _, given, named, result, name=name: found.update(
                {name: ((*given, *named.values())[0].clone(), result.clone())}
            ),
            with_kwargs=True,
        )
    with torch.no_grad():
        twin(*(a.double() for a in args), **{key: value.double() for key, value in kwargs.items()})
    return found


def patches_one_by_one(x, module):
    """The rows of a convolution, window by window: channels of all groups in order, then the entries of the kernel."""
    one = module.weight.dim() == 3
    kernel, stride, dilation = ((1, *v) if one else v for v in (module.kernel_size, module.stride, module.dilation))
    padding = (0, *module.padding) if one else module.padding
    x = x[:, :, None] if one else x
    x = F.pad(x, (padding[1], padding[1], padding[0], padding[0]))
    reach = [d * (k - 1) + 1 for k, d in zip(kernel, dilation, strict=True)]
    rows = [
        image[:, i : i + reach[0] : dilation[0], j : j + reach[1] : dilation[1]].flatten()
        for image in x
        for i in range(0, x.shape[2] - reach[0] + 1, stride[0])
        for j in range(0, x.shape[3] - reach[1] + 1, stride[1])
    ]
    return torch.stack(rows)


# ---- scan


def test_rows_of_linear_layers_are_what_hooks_see(model):
    graph, dense, read = traced(model, [X[:4], X[4:]])
    seen, wanted = record(graph, dense, dense, read, ["3", "0"]), hooked(model, ["0", "3"], X)
    assert list(seen) == ["3", "0"]
    for name, (inputs, result) in wanted.items():
        torch.testing.assert_close(seen[name][0], inputs, rtol=0, atol=0)
        torch.testing.assert_close(seen[name][1], result, rtol=1e-13, atol=1e-14)
    # raw: the ReLU that follows works in place and must not reach what was recorded
    assert seen["0"][1].min() < 0


CONVOLUTIONS = {
    "2d": lambda: (nn.Conv2d(2, 6, 3, padding=1), (9, 8)),
    "stride": lambda: (nn.Conv2d(2, 4, (3, 2), stride=(2, 3), padding=(1, 0)), (9, 8)),
    "dilation": lambda: (nn.Conv2d(2, 4, 2, dilation=(2, 1)), (9, 8)),
    "groups": lambda: (nn.Conv2d(4, 6, 3, groups=2, bias=False), (6, 5)),
    "depthwise": lambda: (nn.Conv2d(4, 4, 3, groups=4, padding=1), (5, 5)),
    "1x1": lambda: (nn.Conv2d(3, 5, 1), (4, 4)),
    "1d": lambda: (nn.Conv1d(3, 5, 4, stride=2, padding=2, dilation=2), (17,)),
    "1d groups": lambda: (nn.Conv1d(6, 4, 3, groups=2), (9,)),
}


@pytest.mark.parametrize("rows", [1, 4, 512])
@pytest.mark.parametrize("kind", CONVOLUTIONS)
def test_rows_of_convolutions_are_windows_one_by_one(kind, rows):
    """An input row times the weight as a matrix, plus the bias, is the output row, group by group."""
    conv, size = CONVOLUTIONS[kind]()
    model = nn.Sequential(conv, nn.ReLU(), nn.Flatten(), nn.LazyLinear(3))
    x = torch.randn(6, conv.in_channels, *size)
    model(x)
    graph, dense, read = traced(model, [x[:5], x[5:]])
    wanted = hooked(model, ["0", "3"], x)
    seen = record(graph, dense, dense, read, ["0", "3"], rows)
    assert torch.equal(seen["0"][0], patches_one_by_one(x.double(), conv))
    given = wanted["0"][1].flatten(2).transpose(1, 2).reshape(-1, conv.out_channels)
    torch.testing.assert_close(seen["0"][1], given, rtol=1e-12, atol=1e-13)
    spec = graph.layer("0")
    assert len(seen["0"][0]) == 6 * spec.positions
    matrix = conv.weight.detach().double().reshape(spec.out_features, spec.in_features)
    parts = zip(seen["0"][0].chunk(spec.groups, 1), matrix.chunk(spec.groups), strict=True)
    product = torch.cat([a @ w.T for a, w in parts], 1)
    offset = 0 if conv.bias is None else conv.bias.detach().double()
    torch.testing.assert_close(product + offset, seen["0"][1], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(seen["3"][0], wanted["3"][0], rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(seen["3"][1], wanted["3"][1], rtol=1e-12, atol=1e-13)


def test_behind_a_folded_batch_norm_outputs_are_those_of_the_norm():
    model = nn.Sequential(nn.Conv2d(2, 3, 3, bias=False), nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten(), nn.Linear(27, 2))
    with torch.no_grad():
        model[1].running_mean.normal_()
        model[1].running_var.uniform_(0.5, 3.0)
        model[1].weight.normal_()
    x = torch.randn(5, 2, 5, 5)
    graph, dense, read = traced(model, [x])
    seen, wanted = record(graph, dense, dense, read, ["0"]), hooked(model, ["1"], x)
    given = wanted["1"][1].flatten(2).transpose(1, 2).reshape(-1, 3)
    torch.testing.assert_close(seen["0"][1], given, rtol=1e-12, atol=1e-12)


def test_inputs_are_the_other_networks_and_outputs_the_dense_ones(model):
    graph, dense, read = traced(model, [X])
    state = dense | {"0.weight": dense["0.weight"] * (dense["0.weight"].abs() > 0.3)}
    pruned = copy.deepcopy(model)
    with torch.no_grad():
        pruned[0].weight.copy_(state["0.weight"])
    seen = record(graph, dense, state, read, ["0", "3"])
    ours, theirs = hooked(model, ["0", "3"], X), hooked(pruned, ["0", "3"], X)
    for name in ("0", "3"):
        torch.testing.assert_close(seen[name][0], theirs[name][0], rtol=1e-13, atol=1e-14)
        torch.testing.assert_close(seen[name][1], ours[name][1], rtol=1e-13, atol=1e-14)
    assert not torch.equal(theirs["3"][0], ours["3"][0])


@pytest.mark.parametrize("rows", [1, 2, 3, 100])
def test_batching_does_not_matter(model, rows):
    graph, dense, read = traced(model, [X])
    whole = record(graph, dense, dense, read, ["0", "3"])
    parts = record(graph, dense, dense, read_batches([row[None] for row in X]), ["0", "3"])
    cut = record(graph, dense, dense, read, ["0", "3"], rows)
    for name in whole:
        for k in (0, 1):
            torch.testing.assert_close(parts[name][k], whole[name][k], rtol=1e-13, atol=1e-14)
            torch.testing.assert_close(cut[name][k], whole[name][k], rtol=1e-13, atol=1e-14)


def test_no_more_samples_run_at_a_time_than_were_said(model):
    graph, dense, read = traced(model, [X[:5], X[5:]])
    sizes = [len(seen.inputs) for seen in scan(graph, dense, dense, read, ["0"], 3)]
    assert sizes == [3, 2, 2]


def test_leading_dimensions_become_rows(model):
    cube = X[:6].reshape(2, 3, 3)
    graph, dense, read = traced(model, [cube])
    assert torch.equal(record(graph, dense, dense, read, ["0"])["0"][0], X[:6].double())
    assert outputs(model, [cube]).shape == (6, 2)


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(3, 2)

    def forward(self, x: Tensor, scale: Tensor) -> Tensor:
        return self.fc(input=x * scale)


def test_keyword_inputs_reach_forward_and_layers():
    scale = torch.arange(7.0)[:, None]
    graph, dense, read = traced(Scaled(), [{"x": X, "scale": scale}])
    assert torch.equal(record(graph, dense, dense, read, ["fc"])["fc"][0], (X.double() * scale.double()))


class Branching(nn.Module):
    """Layers that are called in another order than they are made in, and join."""

    def __init__(self) -> None:
        super().__init__()
        self.last, self.left, self.right = nn.Linear(8, 2), nn.Linear(3, 4), nn.Linear(3, 4)

    def forward(self, x: Tensor) -> Tensor:
        right = self.right(x).tanh()
        return self.last(torch.cat([self.left(x).relu(), right], 1))


def test_branches_are_seen_where_they_are_called():
    model = Branching()
    graph, dense, read = traced(model, [X])
    wanted = hooked(model, ["left", "right", "last"], X)
    seen = record(graph, dense, dense, read, ["last", "left", "right"])
    for name, pair in wanted.items():
        for ours, theirs in zip(seen[name], pair, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-13, atol=1e-14)
    order = [each.name for each in scan(graph, dense, dense, read, ["last", "left", "right"], 512)]
    assert order == ["right", "left", "last"]


def test_nothing_behind_the_last_layer_that_was_asked_for_is_run(model):
    graph, dense, read = traced(model, [X])
    broken = dense | {"3.weight": torch.full((2, 4), torch.nan, dtype=torch.float64)}
    assert len(list(scan(graph, broken, broken, read, ["0"], 512))) == 1


def hooks(model: nn.Module) -> int:
    return sum(len(module._forward_hooks) for module in model.modules())


def test_the_model_and_the_data_are_left_alone(model):
    model[2].eval()
    weights = [parameter.detach().clone() for parameter in model.parameters()]
    data = X.clone()
    graph, dense, read = traced(model, [data])
    kept = {name: tensor.clone() for name, tensor in dense.items()}
    record(graph, dense, dense, read, ["0", "3"])
    outputs(nn.Sequential(nn.ReLU(inplace=True), model), [data])
    assert hooks(model) == 0
    assert [model.training, model[0].training, model[2].training] == [True, True, False]
    assert torch.equal(data, X)
    assert all(torch.equal(dense[name], tensor) for name, tensor in kept.items())
    for parameter, before in zip(model.parameters(), weights, strict=True):
        assert torch.equal(parameter, before)
        assert parameter.grad is None


def test_activations_that_are_not_finite_name_layer_and_samples(model):
    graph, dense, _ = traced(model, [X])
    large = dense | {"0.weight": torch.full((4, 3), 1e300, dtype=torch.float64)}
    read = read_batches([torch.full((2, 3), 1e-3), torch.full((2, 3), 1e10)])
    with pytest.raises(ProblemError, match=r"output of layer '0' has 8 NaN or infinite entries on samples 2 and after"):
        record(graph, large, dense, read, ["0", "3"], rows=2)
    # of the network whose inputs are wanted, what reaches the next layer
    with pytest.raises(ProblemError, match=r"input of layer '3' has 8 NaN or infinite"):
        record(graph, dense, large, read, ["0", "3"], rows=2)


def test_a_name_that_no_layer_has_is_refused(model):
    graph, dense, read = traced(model, [X])
    with pytest.raises(UnknownNameError, match="'1'"):
        record(graph, dense, dense, read, ["1"])


# ---- outputs


def test_outputs_are_the_models_own(model):
    with torch.no_grad():
        wanted = copy.deepcopy(model).eval()(X)
    torch.testing.assert_close(outputs(model, X.split(2)), wanted.double(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(outputs(model, read_batches([X])), wanted.double(), rtol=0, atol=0)
    assert outputs(model, [X], dtype=torch.float32).dtype == torch.float32
    # floating inputs are cast to the model
    assert outputs(model.double(), [X]).dtype == torch.float64


def test_one_number_for_each_row_is_one_column():
    model = nn.Sequential(nn.Linear(3, 1), nn.Flatten(0))
    assert outputs(model, [X[:5], X[5:]]).shape == (7, 1)


def test_an_error_names_the_batch_and_leaves_the_model(model):
    with pytest.raises(ProblemError, match="give all samples one shape"):
        outputs(model, [X, X[:, :2]])
    with pytest.raises(ProblemError, match=r"fails on batches\[0\] with inputs of shape \(7, 2\)"):
        outputs(model, [X[:, :2], X[:, :2]])
    assert model.training
    with torch.no_grad():
        model[0].weight.fill_(1e38)
        model[3].weight.fill_(1.0)
    with pytest.raises(ProblemError, match=r"the model's output on batches\[1\] has 4 NaN or infinite entries of 4"):
        outputs(model, [torch.full((2, 3), 1e-3), torch.full((2, 3), 100.0)])


def test_a_model_that_returns_no_tensor_is_refused():
    class Pair(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return x, x

    with pytest.raises(UnsupportedError, match="returns a tuple"):
        outputs(Pair(), [X])


def test_progress_is_silent_where_stderr_is_no_terminal(model, capsys):
    graph, dense, read = traced(model, [Batch((X,))])
    list(scan(graph, dense, dense, read, ["0"], 512, progress=True))
    outputs(model, [X], progress=True)
    captured = capsys.readouterr()
    assert captured.out + captured.err == ""


# ---- samples_at_a_time


def wide(channels: int) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, channels, 3, padding=1), nn.ReLU(), nn.Conv2d(channels, 2, 3, padding=1), nn.Flatten(),
        nn.Linear(2 * 64, 3),
    )  # fmt: skip


def test_samples_at_a_time_are_at_least_one_and_at_most_512():
    graph, _, _ = traced(wide(4), [torch.randn(2, 1, 8, 8)])
    assert samples_at_a_time(graph, 1) == 1
    assert samples_at_a_time(graph, 2**60) == 512
    found = [samples_at_a_time(graph, 2**k) for k in range(10, 40)]
    assert all(a <= b for a, b in pairwise(found))


@pytest.mark.parametrize("networks", [2, 5])
def test_samples_at_a_time_follow_what_one_of_them_takes(networks):
    """Twice the channels, twice the bytes; what is said fits the budget and one more sample would not."""
    budget = 2**22
    few, many = (traced(wide(channels), [torch.randn(2, 1, 8, 8)])[0] for channels in (16, 32))
    counts = [samples_at_a_time(graph, budget, networks) for graph in (few, many)]
    # a sample's largest moment: one convolution's output beside its ReLU, in float64, and patches in and out
    for channels, count in zip((16, 32), counts, strict=True):
        live = 2 * channels * 64 * 8
        patches = 9 * channels * 64 * 8
        assert count == budget // (networks * live + 2 * patches)
    assert counts[0] // 2 <= counts[1] <= counts[0] // 2 + 1


def test_what_is_not_read_any_more_takes_no_memory():
    """A chain of a hundred activations needs two of them at a time."""
    model = nn.Sequential(nn.Linear(8, 8), *(nn.Tanh() for _ in range(100)), nn.Linear(8, 2))
    graph, _, _ = traced(model, [torch.randn(3, 8)])
    budget = 2**13
    assert samples_at_a_time(graph, budget) == budget // (2 * 2 * 64 + 2 * 64)
