"""The metrics of errors against explicit Jacobians, sample by sample, through what follows each layer."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from nettrim.errors import ProblemError, UnsupportedError
from nettrim.network.batches import Batch, read_batches
from nettrim.network.edit import double_copy
from nettrim.network.fold import fold_state
from nettrim.network.metric import error_metrics
from nettrim.network.program import run
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


def folded(model, batches):
    """The graph of a model, and its state with batch norms folded, in float64."""
    traced = trace(model, batches[0])
    return traced.graph, fold_state(traced.state, traced.graph.folds)


def metrics(model, batches, seed=0):
    read = read_batches(batches)
    return error_metrics(*folded(model, read), read, seed)


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
    found = metrics(model, [x])
    assert tuple(found) == tuple(name for name, module in model.named_modules() if isinstance(module, nn.Linear))
    for layer in found:
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
    found = metrics(model, [samples()])["0"]
    assert float(found[2, 2]) > 0
    torch.testing.assert_close(found, explicit(model, "0", samples()), rtol=1e-9, atol=1e-12)


def test_an_output_that_nobody_reads_costs_nothing():
    model = NETWORKS["plain"]()
    with torch.no_grad():
        model[2].weight[:, 3] = 0.0
        model[4].weight += 5.0  # the same to all outputs: it changes no prediction
    found = metrics(model, [samples()])
    assert not found["0"][3].any()
    assert not found["0"][:, 3].any()
    same = NETWORKS["plain"]()
    with torch.no_grad():
        same[2].weight[:, 3] = 0.0
    plain = metrics(same, [samples()])
    torch.testing.assert_close(found["2"], plain["2"], rtol=1e-9, atol=1e-10)


def test_the_quadratic_form_is_what_small_errors_cost():
    """Finite differences: errors handed on by an open layer move the centred outputs by that much."""
    model, x = NETWORKS["plain"](), samples(200)
    metric = metrics(model, [x])["0"]
    a = model[:2](x).detach()
    e = 1e-6 * torch.randn(8, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    with torch.no_grad():
        moved = model[2:](a + e) - model[2:](a)
    moved = moved - moved.mean(1, keepdim=True)
    assert float(moved.square().sum(1).mean()) == pytest.approx(float(e @ metric @ e), rel=1e-3)


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
    by_position = metrics(model, [x])
    by_name = metrics(model, [{"pixels": x}])
    as_float = metrics(model, [{"pixels": x.float(), "label": torch.ones(20)}])
    same = nn.Sequential(model.a, nn.ReLU(), model.b)
    for name, index in (("a", "0"), ("b", "2")):
        torch.testing.assert_close(by_position[name], explicit(same, index, x), rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(by_name[name], by_position[name])
        torch.testing.assert_close(as_float[name], by_position[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("pieces", [[20], [1] * 20, [3, 16, 1]])
def test_batches_do_not_matter(pieces):
    model, x = NETWORKS["dropout"](), samples()
    whole = metrics(model, [x])
    parts = metrics(model, list(x.split(pieces)))
    for name, metric in whole.items():
        torch.testing.assert_close(parts[name], metric, rtol=1e-12, atol=1e-14)


def test_a_sequence_of_vectors_counts_each():
    """Inputs (P, T, N): what is recorded of a layer has P·T rows, and so has the mean."""
    model = NETWORKS["plain"]()
    x = samples(12)
    flat = metrics(model, [x])
    deep = metrics(model, [x.reshape(4, 3, 6)])
    for name, metric in flat.items():
        torch.testing.assert_close(deep[name], metric, rtol=1e-9, atol=1e-12)


def test_many_outputs_are_estimated_without_bias():
    """40 outputs, 32 signs: the mean over seeds goes to the exact one as one over the root of their number."""
    model = chain(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 40))
    x = samples(10)
    exact = explicit(model, "0", x)
    graph, state = folded(model, [Batch((x,))])
    draws = torch.stack([error_metrics(graph, state, [Batch((x,))], seed=s)["0"] for s in range(200)])
    spread = draws.std(0) / 200**0.5
    assert (spread > 0).all()
    assert ((draws.mean(0) - exact).abs() < 4.5 * spread).all()
    # one draw is already of the right size
    assert float((draws[0] - exact).norm() / exact.norm()) < 0.6
    assert float(torch.linalg.eigvalsh(draws[0])[0]) >= -1e-12
    assert torch.equal(draws[7], metrics(model, [x], seed=7)["0"])
    assert not torch.equal(draws[7], draws[8])


@pytest.mark.parametrize(("outputs", "exact"), [(32, True), (33, False)])
def test_up_to_32_outputs_are_exact(outputs, exact):
    model = chain(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, outputs))
    found = metrics(model, [samples()])["0"]
    assert torch.allclose(found, explicit(model, "0", samples()), rtol=1e-9) == exact


def test_the_state_and_the_data_are_left_alone():
    model, x = NETWORKS["starts with a relu"](), samples()
    before = x.clone()
    graph, state = folded(model, [Batch((x,))])
    kept = {name: tensor.clone() for name, tensor in state.items()}
    rng = torch.get_rng_state()
    error_metrics(graph, state, [Batch((x,))])
    assert all(torch.equal(state[name], tensor) and state[name].grad is None for name, tensor in kept.items())
    assert torch.equal(x, before)
    assert not x.requires_grad
    assert torch.equal(rng, torch.get_rng_state())


def test_it_works_on_a_frozen_model_and_without_gradients_around():
    model, x = NETWORKS["plain"](), samples()
    expected = metrics(model, [x])["0"]
    with torch.no_grad():
        found = metrics(double_copy(model), [x])["0"]
    assert torch.equal(found, expected)
    assert not found.requires_grad


# convolutions, batch norms, branches, positions ----------------------------------------------------------------------


class Block(nn.Module):
    """A convolution with stride and groups, batch norms, a residual, two branches that are joined, pooling."""

    def __init__(self):
        super().__init__()
        self.stem, self.norm = nn.Conv2d(2, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)
        self.grouped, self.norm2 = nn.Conv2d(4, 4, 3, padding=1, groups=2), nn.BatchNorm2d(4)
        self.left = nn.Conv2d(4, 3, 3, stride=2, padding=1)
        self.right = nn.Conv2d(4, 2, 1, stride=2)
        self.hidden, self.head = nn.Linear(5 * 9, 6), nn.Linear(6, 3)

    def forward(self, x):
        x = F.relu(self.norm(self.stem(x)))
        x = x + F.relu(self.norm2(self.grouped(x)))
        x = torch.cat([F.relu(self.left(x)), self.right(x)], 1)
        return self.head(torch.flatten(self.hidden(x.flatten(1)).unsqueeze(1), 1).relu_())


class Late(nn.Module):
    """A ReLU behind a flatten, where its layout is no longer that of the convolution."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv1d(2, 4, 3, stride=2, dilation=2), nn.Linear(4 * 3, 3)

    def forward(self, x):
        return self.b(F.relu(self.a(x).flatten(1)))


class Encoder(nn.Module):
    """Token ids to (B, T, C): attention, a residual, a layer norm; the result is an object with logits."""

    def __init__(self, classes=3):
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.attention = nn.MultiheadAttention(6, 2, batch_first=True)
        self.norm, self.up, self.down = nn.LayerNorm(6), nn.Linear(6, 8), nn.Linear(8, 6)
        self.head = nn.Linear(6, classes)

    def forward(self, ids):
        x = self.embed(ids)
        x = self.norm(x + self.attention(x, x, x, need_weights=False)[0])
        return {"logits": self.head(x + self.down(F.relu(self.up(x))))}


def randomly(model, seed=0):
    """Every parameter and statistic random, in float64."""
    generator = torch.Generator().manual_seed(seed)
    model = model.double()
    with torch.no_grad():
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            if tensor.is_floating_point():
                drawn = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
                tensor.copy_(drawn.abs() + 0.5 if "var" in name else 0.5 * drawn)
    return model


def by_rows(model, name, inputs, behind_relu):
    """``(1/P) Σ Jᵀ C J`` through the module: rows are the layer's outputs, position by position and sample by sample.

    With `behind_relu` the layer's ReLU is open: its output is what is differentiated by.
    """
    model = copy.deepcopy(model).eval().requires_grad_(False)
    total, rows = 0, 0
    for sample in inputs.split(1):
        modules = dict(model.named_modules())
        seen = []

        def hook(module, args, output, seen=seen):
            # a batch norm is part of its layer
            seen.append(output.detach().requires_grad_())
            return _Open.apply(seen[0]) if behind_relu else seen[0].clone()

        handle = modules[name].register_forward_hook(hook)
        with torch.enable_grad():
            z = model(sample)
        handle.remove()
        z = z if isinstance(z, torch.Tensor) else z["logits"]
        z = z - z.mean(-1, keepdim=True)
        convolution = seen[0].dim() == 4 or isinstance(modules[name], nn.Conv1d)
        for value in z.flatten():
            slope = torch.autograd.grad(value, seen[0], retain_graph=True)[0]
            flat = slope.flatten(2)[0].T if convolution else slope.reshape(-1, slope.shape[-1])
            total = total + flat.T @ flat
        rows += seen[0][0, 0].numel() if convolution else seen[0].numel() // seen[0].shape[-1]
    return total / rows


class _Open(torch.autograd.Function):
    """Positive where the ReLU behind would close, so that its slope is 1; the value behind the ReLU is the same."""

    @staticmethod
    def forward(ctx, x):
        return x.clamp(min=1e-300)

    @staticmethod
    def backward(ctx, slope):
        return slope


#: layer, the module whose output it hands on, whether a ReLU is behind
BLOCK_LAYERS = [
    ("stem", "norm", True),
    ("grouped", "norm2", True),
    ("left", "left", True),
    ("right", "right", False),
    ("hidden", "hidden", True),
    ("head", "head", False),
]


@pytest.mark.parametrize("pieces", [[7], [2, 4, 1]])
def test_convolutions_with_batch_norms_residuals_and_branches(pieces):
    model, x = randomly(Block()), samples(7, 2 * 6 * 6).reshape(7, 2, 6, 6)
    found = metrics(model, list(x.split(pieces)))
    assert set(found) == {layer for layer, _, _ in BLOCK_LAYERS}
    for layer, module, relu in BLOCK_LAYERS:
        expected = by_rows(model, module, x, relu)
        assert float(expected.norm()) > 0
        torch.testing.assert_close(found[layer], expected, rtol=1e-9, atol=1e-12)


def test_a_relu_behind_a_reshape():
    model, x = randomly(Late()), samples(5, 2 * 9).reshape(5, 2, 9)
    found = metrics(model, [x])
    for layer, relu in (("a", True), ("b", False)):
        torch.testing.assert_close(found[layer], by_rows(model, layer, x, relu), rtol=1e-9, atol=1e-12)


IDS = torch.randint(0, 11, (6, 4), generator=torch.Generator().manual_seed(8))


def test_scores_of_every_position_count():
    """4 positions of 3 classes are 12 outputs: each has its own pass, and an error reaches other positions' too."""
    model = randomly(Encoder())
    found = metrics(model, [IDS[:2], IDS[2:]])
    assert {"attention.in_proj_weight", "attention.out_proj", "up", "down", "head"} == set(found)
    for layer, relu in (("up", True), ("down", False), ("head", False)):
        torch.testing.assert_close(found[layer], by_rows(model, layer, IDS, relu), rtol=1e-9, atol=1e-12)
    by_name = metrics(model, [{"ids": IDS}])
    for layer, metric in by_name.items():
        torch.testing.assert_close(metric, found[layer], rtol=1e-10, atol=1e-14)


def test_many_positions_are_estimated_without_bias():
    model = randomly(Encoder(classes=9))
    exact = by_rows(model, "up", IDS, True)
    graph, state = folded(model, [Batch((IDS,))])
    draws = torch.stack([error_metrics(graph, state, [Batch((IDS,))], seed)["up"] for seed in range(60)])
    spread = draws.std(0) / 60**0.5
    assert ((draws.mean(0) - exact).abs() <= 4.5 * spread + 1e-12).all()
    assert float((draws[0] - exact).norm() / exact.norm()) < 0.5


def test_random_signs_do_not_hang_on_the_batches(monkeypatch):
    model = randomly(Encoder(classes=9))
    whole = metrics(model, [IDS], seed=4)
    parts = metrics(model, list(IDS.split([1, 3, 2])), seed=4)
    monkeypatch.setattr("nettrim.network.slopes._ENTRIES", 1)
    single = metrics(model, [IDS], seed=4)
    for name, metric in whole.items():
        torch.testing.assert_close(parts[name], metric, rtol=1e-10, atol=1e-14)
        torch.testing.assert_close(single[name], metric, rtol=1e-10, atol=1e-14)


def test_passes_are_bounded(monkeypatch):
    seen = []

    def watched(program, state, batch, change=None):
        seen.append(len(batch))
        return run(program, state, batch, change)

    monkeypatch.setattr("nettrim.network.slopes.run", watched)
    model, x = NETWORKS["plain"](), samples(600)
    whole = metrics(model, [x])
    assert seen == [256, 256, 88]
    seen.clear()
    # 6 inputs and 8, 8, 7, 7, 4 activations of each sample
    monkeypatch.setattr("nettrim.network.slopes._ENTRIES", 40 * 100)
    torch.testing.assert_close(metrics(model, [x])["0"], whole["0"])
    assert seen == [100] * 6


def test_classes_of_images_are_their_channels():
    """(B, C, height, width): centred over C. Adding the same to all classes of a pixel costs nothing."""
    model = randomly(nn.Sequential(nn.Conv2d(2, 3, 3), nn.ReLU(), nn.Conv2d(3, 2, 1)))
    x = samples(3, 2 * 16).reshape(3, 2, 4, 4)
    with torch.no_grad():
        model[2].weight[1] = model[2].weight[0]
    found = metrics(model, [x])
    assert float(found["0"].abs().max()) < 1e-20
    assert float(found["2"].abs().max()) > 0.1


def test_one_number_for_each_sample():
    class Squeezed(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, x):
            return self.inner(x).squeeze(-1)

    model = NETWORKS["one output"]()
    plain, squeezed = metrics(model, [samples()]), metrics(Squeezed(model), [samples()])
    assert torch.equal(plain["0"], squeezed["inner.0"])


class Fails(nn.Module):
    def __init__(self, outputs):
        super().__init__()
        self.a, self.b, self.outputs = nn.Linear(6, 8), nn.Linear(8, 4), outputs

    def forward(self, x):
        return self.outputs(self.b(torch.relu(self.a(x))))


@pytest.mark.parametrize(
    ("outputs", "said"),
    [
        (lambda z: z.sum(), r"maps 20 rows to \(\)"),
        (lambda z: z.T, r"maps 20 rows to \(4, 20\)"),
        (lambda z: z.detach(), "no gradient leads from the network's output to a, b .*does not require grad"),
    ],
    ids=["number", "transposed", "detached"],
)
def test_what_has_no_slope_is_refused(outputs, said):
    with pytest.raises(UnsupportedError, match=said):
        metrics(Fails(outputs).double(), [samples()])


def test_what_overflows_is_refused():
    model = NETWORKS["plain"]()
    graph, state = folded(model, [Batch((samples(),))])
    with pytest.raises(ProblemError, match=r"layer '0' give \d+ NaN or infinite"):
        error_metrics(graph, state | {"2.weight": 1e200 * state["2.weight"]}, [Batch((samples(),))])


def test_inputs_that_do_not_fit_are_refused():
    graph, state = folded(NETWORKS["plain"](), [Batch((samples(),))])
    with pytest.raises(ProblemError, match=r"fails on inputs of shape \(20, 5\)"):
        error_metrics(graph, state, [Batch((samples(columns=5),))])
