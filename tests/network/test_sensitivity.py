"""Sensitivities are the derivatives that they say, whatever the model's modules look like, and leave it as it was."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.func import functional_call, jacrev, vmap

from nettrim.errors import ProblemError, UnknownNameError, UnsupportedError
from nettrim.network.batches import Batch, read_batches
from nettrim.network.edit import find_weight, frozen_copy
from nettrim.network.fold import fold_state
from nettrim.network.gradual import GradualPruning, folded_state, keep_most
from nettrim.network.sensitivity import gauss_newton_saliency
from nettrim.network.support import Support
from nettrim.network.trace import trace

NAMES = ["a", "b", "c"]


class Chain(nn.Module):
    """5-7-6-4, its ReLUs in three spellings; with `positions`, the first two layers see each of three positions."""

    def __init__(self, kind: str, positions: bool = False) -> None:
        super().__init__()
        self.kind, self.positions = kind, positions
        self.a, self.b, self.c = nn.Linear(5, 7), nn.Linear(7, 6), nn.Linear(6 * (3 if positions else 1), 4)
        self.relu, self.drop = nn.ReLU(inplace=kind == "inplace"), nn.Dropout(0.5)

    def activate(self, x: Tensor) -> Tensor:
        return F.relu(x) if self.kind == "call" else self.relu(x)

    def tail(self, hidden: Tensor, layer: str) -> Tensor:
        """The outputs, from what `layer` hands on."""
        if layer == "a":
            hidden = F.relu(self.b(hidden))
        return self.c(hidden.flatten(1)) if layer != "c" else hidden

    def forward(self, x: Tensor) -> Tensor:
        x = self.drop(self.activate(self.a(x)))
        # a reshape between a layer and its ReLU
        return self.c(self.activate(self.b(x).flatten(1)))


def chain(kind: str = "module", positions: bool = False) -> Chain:
    torch.manual_seed(1)
    return Chain(kind, positions).double()


def samples(positions: bool = False, rows: int = 9) -> Tensor:
    shape = (rows, 3, 5) if positions else (rows, 5)
    return torch.randn(shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


def saliency(model: nn.Module, x: Tensor, names: list[str], **settings: int) -> dict[str, Tensor]:
    """Of the weights that the model has, in its own dtype."""
    traced = trace(model, Batch((x,)))
    return gauss_newton_saliency(traced.graph, folded_state(model, traced), Batch((x,)), names, **settings)


@pytest.mark.parametrize("positions", [False, True])
@pytest.mark.parametrize("kind", ["module", "inplace", "call"])
def test_saliency_is_the_squared_weight_times_the_squared_jacobian(kind, positions):
    model, x = chain(kind, positions).eval(), samples(positions)
    found = saliency(model, x, NAMES, batch_size=4)
    # jacrev cannot follow what works in place
    plain = chain("call", positions).eval()
    plain.load_state_dict(model.state_dict())
    for name in NAMES:
        weight = find_weight(plain, name).detach()

        def outputs(w: Tensor, row: Tensor, name: str = name) -> Tensor:
            return functional_call(plain, {f"{name}.weight": w}, (row[None],))[0]

        jacobian = vmap(jacrev(outputs), in_dims=(None, 0))(weight, x)
        expected = weight.square() * jacobian.square().sum(1).mean(0)
        torch.testing.assert_close(found[name], expected.detach(), rtol=1e-10, atol=1e-14)


def test_saliency_is_what_a_removal_costs_where_the_network_is_linear():
    torch.manual_seed(5)
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2)).double().requires_grad_(False)
    x = torch.randn(20, 4, dtype=torch.float64)
    dense = model(x)
    for name, scores in saliency(model, x, ["0", "1"]).items():
        weight = find_weight(model, name)
        for m, n in ((0, 0), (1, 2)):
            kept = weight[m, n].item()
            weight[m, n] = 0.0
            cost = (model(x) - dense).square().sum(1).mean()
            weight[m, n] = kept
            torch.testing.assert_close(scores[m, n], cost)


@settings(deadline=None, max_examples=15)
@given(st.floats(0.1, 10.0))
def test_saliency_does_not_depend_on_how_layers_are_scaled(factor):
    model, x = chain(), samples()
    before = saliency(model, x, NAMES)
    with torch.no_grad():
        model.a.weight.mul_(factor)
        model.a.bias.mul_(factor)
        model.b.weight.div_(factor)
    for name, scores in saliency(model, x, NAMES).items():
        torch.testing.assert_close(scores, before[name], rtol=1e-9, atol=0)


@pytest.mark.parametrize("positions", [False, True])
def test_batches_and_precision_do_not_matter(positions, monkeypatch):
    model, x = chain(positions=positions), samples(positions)
    whole = saliency(model, x, NAMES)
    monkeypatch.setattr("nettrim.network.sensitivity._ENTRIES", 1)
    single = saliency(model, x, NAMES, batch_size=1)
    coarse = saliency(model.float(), x, ["b"])["b"]
    for name in NAMES:
        torch.testing.assert_close(single[name], whole[name], rtol=1e-10, atol=0)
    assert coarse.dtype == torch.float64
    torch.testing.assert_close(coarse, whole["b"], rtol=1e-4, atol=1e-8)


def test_the_model_is_left_as_it_was():
    model, x = chain("inplace").train(), samples()
    model.relu.eval()
    model.b.requires_grad_(False)
    model.a.weight.grad = torch.ones_like(model.a.weight)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    before = x.clone()
    found = saliency(model, x, ["b", "a"])
    assert list(found) == ["b", "a"]
    assert torch.equal(x, before)
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert model.training
    assert not model.relu.training
    assert [p.requires_grad for p in model.parameters()] == [True, True, False, False, True, True]
    assert torch.equal(model.a.weight.grad, torch.ones_like(model.a.weight))
    assert all(p.grad is None for name, p in model.named_parameters() if name != "a.weight")
    # a copy without any gradients gives the same, also inside no_grad
    with torch.no_grad():
        frozen = saliency(frozen_copy(model), x, ["b", "a"])
    assert all(torch.equal(frozen[name], found[name]) for name in found)


def test_inputs_are_not_changed_by_a_first_layer_that_works_in_place():
    x = torch.randn(6, 3)
    before = x.clone()
    saliency(nn.Sequential(nn.ReLU(inplace=True), nn.Linear(3, 2)), x, ["1"])
    assert torch.equal(x, before)


def small() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 2))


@pytest.mark.parametrize(
    ("inputs", "names", "batch_size", "error", "said"),
    [
        (torch.ones(4, 3), ["x"], 2, UnknownNameError, "no layer is called 'x'"),
        (torch.ones(4, 3), [], 2, ProblemError, "names is empty"),
        (torch.ones(4, 2), ["0"], 2, ProblemError, r"fails on inputs of shape \(2, 2\)"),
        (torch.ones(4, 3), ["0"], 0, ProblemError, "batch_size is 0"),
        (torch.ones(4, 3), ["0"], True, ProblemError, "batch_size is True"),
        (torch.full((4, 3), torch.inf), ["2"], 2, ProblemError, r"layer '2' give \d+ NaN or infinite"),
    ],
)
def test_what_does_not_fit_is_refused(inputs, names, batch_size, error, said):
    model = small()
    traced = trace(model, Batch((torch.ones(4, 3),)))
    with pytest.raises(error, match=said):
        gauss_newton_saliency(traced.graph, folded_state(model, traced), Batch((inputs,)), names, batch_size=batch_size)


@pytest.mark.parametrize(
    ("last", "said"),
    [(lambda z: z.detach(), "no gradient leads from the network's output to 0"), (torch.sum, r"maps 4 rows to \(\)")],
)
def test_outputs_that_do_not_fit_are_refused(last, said):
    class Ends(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            return last(super().forward(x))

    with pytest.raises(UnsupportedError, match=said):
        saliency(Ends(nn.Linear(3, 2)), torch.ones(4, 3), ["0"])


def test_a_layer_that_mixes_samples_is_refused():
    class Mixes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(3, 4), nn.Linear(2, 2)

        def forward(self, x: Tensor) -> Tensor:
            pooled = torch.stack([x.mean(0), x.amax(0)])  # (2, 3), whatever the batch
            return self.b((x @ pooled.T) * self.a(pooled).sum())

    with pytest.raises(UnsupportedError, match=r"layer 'a' mixes samples: its output is \(2, 4\)"):
        saliency(Mixes(), torch.randn(4, 3), ["b", "a"])


def test_what_overflows_is_not_ranked():
    model = small()
    traced = trace(model, Batch((torch.ones(4, 3),)))
    with torch.no_grad():
        model[2].weight.fill_(torch.inf)
    with pytest.raises(ProblemError, match=r"layer '\d' give \d+ NaN or infinite"):
        gauss_newton_saliency(traced.graph, folded_state(model, traced), Batch((torch.ones(4, 3),)), ["0", "2"])


# convolutions, batch norms, positions --------------------------------------------------------------------------------


class Net(nn.Module):
    """Strides, groups, a batch norm, a residual, branches, and layers on one position."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(2, 4, 3, padding=1, stride=2, bias=False), nn.BatchNorm2d(4)
        self.grouped = nn.Conv2d(4, 6, (3, 2), padding=(1, 0), groups=2, dilation=(1, 2))
        self.same = nn.Conv2d(4, 4, 3, padding="same")
        self.whole = nn.Conv2d(4, 6, 3, groups=2)  # one position
        self.line = nn.Conv1d(6, 2, 2)
        self.head = nn.Linear(2 * 2 + 6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.stem(x)))
        x = x + self.same(x)
        left = self.line(F.relu(self.grouped(x)).flatten(2))
        return self.head(torch.cat([left.flatten(1), F.relu(self.whole(x)).flatten(1)], 1))


class Words(nn.Module):
    """Token ids to (B, T, C). Attention has rows of positions, then samples; with `across` all layers have."""

    def __init__(self, across: bool = False, classes: int = 3) -> None:
        super().__init__()
        self.across = across
        self.embed, self.head = nn.Embedding(11, 6), nn.Linear(6, classes)
        self.attention = nn.MultiheadAttention(6, 2, batch_first=not across)
        self.up, self.down = nn.Linear(6, 5), nn.Linear(5, 6)

    def forward(self, ids: Tensor) -> dict[str, Tensor]:
        x = self.embed(ids.T if self.across else ids)
        x = x + self.attention(x, x, x, need_weights=False)[0]
        x = x + self.down(F.relu(self.up(x.reshape(-1, 6)))).reshape(x.shape)
        return {"logits": self.head(x.transpose(0, 1) if self.across else x)}


def drawn(model: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            if tensor.is_floating_point():
                value = torch.randn(tensor.shape, generator=generator)
                tensor.copy_(value.abs() + 0.5 if "var" in name else 0.6 * value)
    return model.double().eval().requires_grad_(False)


def one_by_one(model: nn.Module, x: Tensor, names: list[str]) -> dict[str, Tensor]:
    """``W² · mean Σ_c (∂z_c/∂W)²`` by a backward pass for each output of each sample, batch norms as they are."""
    weights = {name: find_weight(model, name).requires_grad_() for name in names}
    totals = {name: torch.zeros_like(weight) for name, weight in weights.items()}
    for sample in x.split(1):
        z = model(sample)
        for value in (z if isinstance(z, Tensor) else z["logits"]).flatten():
            for name, slope in zip(
                names, torch.autograd.grad(value, [*weights.values()], retain_graph=True), strict=True
            ):
                totals[name] += slope.square()
    model.requires_grad_(False)
    return {name: weights[name].detach().square() * total / len(x) for name, total in totals.items()}


@pytest.mark.parametrize(("batch_size", "entries"), [(512, 2**24), (4, 30), (1, 1)])
def test_convolutions_against_single_samples(batch_size, entries, monkeypatch):
    monkeypatch.setattr("nettrim.network.sensitivity._ENTRIES", entries)
    names = ["stem", "grouped", "same", "whole", "line", "head"]
    model, x = drawn(Net()), torch.randn(7, 2, 6, 6, dtype=torch.float64)
    found = saliency(model, x, names, batch_size=batch_size)
    for name, expected in one_by_one(model, x, names).items():
        assert bool((expected > 0).any())
        assert found[name].shape == (len(expected), expected[0].numel())
        torch.testing.assert_close(found[name].reshape(expected.shape), expected, rtol=1e-9, atol=1e-13)


TOKENS = torch.randint(0, 11, (6, 4), generator=torch.Generator().manual_seed(8))


@pytest.mark.parametrize("across", [False, True])
@pytest.mark.parametrize("rows", [6, 1])
def test_positions_are_added_within_their_sample_whatever_the_layout(across, rows):
    names = ["attention.in_proj_weight", "attention.out_proj", "up", "down", "head"]
    model, ids = drawn(Words(across)), TOKENS[:rows]
    found = saliency(model, ids, names, batch_size=4)
    for name, expected in one_by_one(model, ids, names).items():
        torch.testing.assert_close(found[name], expected, rtol=1e-9, atol=1e-13)


def test_rows_that_cannot_be_told_apart_are_refused():
    """Samples that are all the same say nothing about where their rows lie; nor does a layer that mixes them."""
    with pytest.raises(UnsupportedError, match=r"layer 'up' mixes samples, or hides them \(no change of one"):
        saliency(drawn(Words()), torch.zeros_like(TOKENS), ["up"])

    class Averaged(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.a((x + x.mean(0)).reshape(-1, 3)).reshape(len(x), -1)

    with pytest.raises(UnsupportedError, match=r"layer 'a' mixes samples, or hides them \(a change of one reaches"):
        saliency(Averaged(), torch.randn(6, 2, 3), ["a"])


def test_many_outputs_are_estimated_without_bias():
    """4 positions of 20 classes are 80 outputs: 32 signs of each sample stand for them."""
    model = drawn(Words(classes=20))
    traced = trace(model, Batch((TOKENS,)))
    exact = one_by_one(model, TOKENS, ["up"])["up"]
    state = fold_state(traced.state, traced.graph.folds)
    draws = torch.stack(
        [gauss_newton_saliency(traced.graph, state, Batch((TOKENS,)), ["up"], seed=s)["up"] for s in range(60)]
    )
    spread = draws.std(0) / 60**0.5
    assert bool(((draws.mean(0) - exact).abs() <= 4.5 * spread + 1e-12).all())
    assert float((draws[0] - exact).norm() / exact.norm()) < 0.5
    pieces = read_batches(list(TOKENS.split(2)))
    again = gauss_newton_saliency(traced.graph, state, pieces, ["up"], batch_size=1, seed=7)["up"]
    torch.testing.assert_close(again, draws[7], rtol=1e-10, atol=1e-14)


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(0, 3), st.booleans()), min_size=7, max_size=7), st.data())
def test_the_most_salient_are_kept_and_of_equal_ones_the_earlier(pairs, data):
    scores = torch.tensor([float(score) for score, _ in pairs])
    inside = torch.tensor([inside for _, inside in pairs])
    if not inside.any():
        inside[3] = True
    count = data.draw(st.integers(1, int(inside.sum())))
    order = sorted(torch.nonzero(inside)[:, 0].tolist(), key=lambda i: (-scores[i], i))[:count]
    expected = torch.zeros(7, dtype=torch.bool)
    expected[order] = True

    found = keep_most(
        {"b": scores[4:].reshape(1, 3), "a": scores[:4].reshape(2, 2)},
        {"a": inside[:4].reshape(2, 2), "b": inside[4:].reshape(1, 3)},
        count,
    )
    assert torch.equal(torch.cat([found["a"].flatten(), found["b"].flatten()]), expected)


@pytest.mark.parametrize(
    ("last", "every", "rounds"), [(100, 10, range(0, 101, 10)), (60, 50, range(0, 61, 3)), (0, 5, [0])]
)
@pytest.mark.parametrize(("target", "power"), [(20, 2), (5, 3)])
def test_weights_go_by_the_schedule_and_none_comes_back(last, every, rounds, target, power):
    model = chain()
    masks = {name: torch.ones_like(find_weight(model, name), dtype=torch.bool) for name in ("a", "b")}
    masks["b"][:, ::2] = False
    support = Support(model, masks)
    held = sum(support.counts().values())
    assert held == 35 + 18
    support.clear()
    batch = Batch((samples(),))
    traced = trace(chain(), batch)  # a copy will do: the weights are those of the model
    gradual = GradualPruning(model, traced, support, [(["a", "b"], target)], batch, last, every, 6, seed=0)
    before = {name: mask.clone() for name, mask in masks.items()}
    counts = {}
    for step in range(last + 20):
        done = gradual.before_step()
        counts[step] = sum(support.counts().values())
        assert all(bool((before[name] | ~support.masks[name]).all()) for name in masks)
        assert bool((model.a.weight[~support.masks["a"]] == 0).all())
        assert done == (step >= rounds[-1])
        assert counts[step] == target or not done
        before = support.masks
    for step in rounds[:-1]:
        assert counts[step] == target + int((held - target) * (1 - step / last) ** power)
        assert counts[step + 1] == counts[step]


def test_groups_do_not_take_from_each_other():
    model = chain()
    masks = {name: torch.ones_like(find_weight(model, name), dtype=torch.bool) for name in NAMES}
    support = Support(model, masks)
    batch = Batch((samples(),))
    GradualPruning(model, trace(model, batch), support, [(["c"], 3), (["a"], 30)], batch, 0, 1, 6, seed=0).before_step()
    assert support.counts() == {"a": 30, "b": 42, "c": 3}
    scores = saliency(chain(), samples(), ["c"])["c"]
    drawn = keep_most({"c": scores}, {"c": masks["c"]}, 24)
    assert int(drawn["c"].sum()) == 24


def test_rounds_see_the_weights_of_the_moment():
    """What decides is the model as it is by then, its batch norms folded, not what it was when it was traced."""
    model, x = drawn(Net()).float(), torch.randn(7, 2, 6, 6)
    traced = trace(model, Batch((x,)))
    with torch.no_grad():
        model.stem.weight.mul_(torch.linspace(0.1, 3.0, model.stem.weight.numel()).reshape(model.stem.weight.shape))
        model.norm.weight.mul_(torch.tensor([0.1, 5.0, 1.0, 1.0]))
    expected = keep_most(
        one_by_one(model.double(), x.double(), ["stem"]), {"stem": torch.ones(4, 2, 3, 3, dtype=torch.bool)}, 9
    )
    model.float().requires_grad_(True)
    support = Support(model, {"stem": torch.ones(4, 2, 3, 3, dtype=torch.bool)})
    GradualPruning(model, traced, support, [(["stem"], 9)], Batch((x,)), 0, 1, 7, seed=0).before_step()
    assert torch.equal(support.masks["stem"], expected["stem"])
    assert torch.equal(model.stem.weight != 0, expected["stem"])
    assert all(parameter.grad is None for parameter in model.parameters())


def test_the_state_of_the_moment_holds_constants_of_the_trace():
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(3, 2)
            self.scale = torch.tensor([2.0, 3.0])  # neither parameter nor buffer

        def forward(self, x: Tensor) -> Tensor:
            return self.a(x) * self.scale

    model, x = Scaled(), torch.randn(5, 3)
    traced = trace(model, Batch((x,)))
    state = folded_state(model, traced)
    assert all(tensor.dtype == torch.float32 and not tensor.requires_grad for tensor in state.values())
    expected = model.a.weight.detach().square() * torch.tensor([[4.0], [9.0]]) * x.square().mean(0)
    found = gauss_newton_saliency(traced.graph, state, Batch((x,)), ["a"])["a"]
    torch.testing.assert_close(found, expected.double(), rtol=1e-5, atol=1e-7)
