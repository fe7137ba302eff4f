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
from nettrim.network.edit import find_linear, frozen_copy
from nettrim.network.sensitivity import GradualPruning, gauss_newton_saliency, keep_most
from nettrim.network.training import Support

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


@pytest.mark.parametrize("positions", [False, True])
@pytest.mark.parametrize("kind", ["module", "inplace", "call"])
def test_saliency_is_the_squared_weight_times_the_squared_jacobian(kind, positions):
    model, x = chain(kind, positions).eval(), samples(positions)
    found = gauss_newton_saliency(model, x, NAMES, batch_size=4)
    # jacrev cannot follow what works in place
    plain = chain("call", positions).eval()
    plain.load_state_dict(model.state_dict())
    for name in NAMES:
        weight = find_linear(plain, name).weight.detach()

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
    for name, scores in gauss_newton_saliency(model, x, ["0", "1"]).items():
        weight = find_linear(model, name).weight
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
    before = gauss_newton_saliency(model, x, NAMES)
    with torch.no_grad():
        model.a.weight.mul_(factor)
        model.a.bias.mul_(factor)
        model.b.weight.div_(factor)
    for name, scores in gauss_newton_saliency(model, x, NAMES).items():
        torch.testing.assert_close(scores, before[name], rtol=1e-9, atol=0)


@pytest.mark.parametrize("positions", [False, True])
def test_batches_and_precision_do_not_matter(positions, monkeypatch):
    model, x = chain(positions=positions), samples(positions)
    whole = gauss_newton_saliency(model, x, NAMES)
    monkeypatch.setattr("nettrim.network.sensitivity._ENTRIES", 1)
    single = gauss_newton_saliency(model, x, NAMES, batch_size=1)
    coarse = gauss_newton_saliency(model.float(), x, ["b"])["b"]
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
    found = gauss_newton_saliency(model, x, ["b", "a"])
    assert list(found) == ["b", "a"]
    assert torch.equal(x, before)
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert model.training
    assert not model.relu.training
    assert [p.requires_grad for p in model.parameters()] == [True, True, False, False, True, True]
    assert torch.equal(model.a.weight.grad, torch.ones_like(model.a.weight))
    assert all(p.grad is None for name, p in model.named_parameters() if name != "a.weight")
    assert not any(module._forward_hooks for module in model.modules())
    # a copy without any gradients gives the same, also inside no_grad
    with torch.no_grad():
        frozen = gauss_newton_saliency(frozen_copy(model), x, ["b", "a"])
    assert all(torch.equal(frozen[name], found[name]) for name in found)


def test_inputs_are_not_changed_by_a_first_layer_that_works_in_place():
    x = torch.randn(6, 3)
    before = x.clone()
    gauss_newton_saliency(nn.Sequential(nn.ReLU(inplace=True), nn.Linear(3, 2)), x, ["1"])
    assert torch.equal(x, before)


class Odd(nn.Module):
    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.a, self.b = how, nn.Linear(3, 3), nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor]:
        if self.how == "twice":
            return self.a(self.a(x))
        if self.how == "unused":
            return self.b(x)
        if self.how == "cut":
            return self.b(self.a(x).detach())
        if self.how == "tuple":
            return (self.a(x),)
        return self.a(x).flatten() if self.how == "flat" else self.a(x)


@pytest.mark.parametrize(
    ("how", "names", "error", "said"),
    [
        ("twice", ["a"], UnsupportedError, "'a' is called more than once"),
        ("unused", ["b", "a"], UnsupportedError, "'a' is not called"),
        ("cut", ["b", "a"], UnsupportedError, "do not depend on layer 'a'"),
        ("tuple", ["a"], UnsupportedError, "maps 4 rows to tuple"),
        ("flat", ["a"], UnsupportedError, r"maps 4 rows to \(12,\)"),
        ("plain", ["x"], UnknownNameError, "no Linear layer 'x'"),
        ("plain", [], ProblemError, "names is empty"),
    ],
)
def test_models_that_do_not_fit_are_refused(how, names, error, said):
    model = Odd(how)
    with pytest.raises(error, match=said):
        gauss_newton_saliency(model, torch.randn(4, 3), names)
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize(
    ("inputs", "batch_size", "said"),
    [
        (torch.full((4, 3), torch.nan), 2, "NaN or infinite"),
        (torch.ones(0, 3), 2, r"shape \(0, 3\)"),
        (torch.ones(4, 3).long(), 2, "torch.int64"),
        (torch.ones(4, 2), 2, r"fails on inputs of shape \(2, 2\)"),
        (torch.ones(4, 3), 0, "batch_size is 0"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(inputs, batch_size, said):
    with pytest.raises(ProblemError, match=said):
        gauss_newton_saliency(Odd("plain"), inputs, ["a"], batch_size=batch_size)


def test_what_overflows_is_not_ranked():
    model = nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 2))
    with torch.no_grad():
        model[2].weight.fill_(torch.inf)
    with pytest.raises(ProblemError, match=r"layer '\d' give \d+ NaN or infinite"):
        gauss_newton_saliency(model, torch.ones(4, 3), ["0", "2"])


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
    masks = {name: torch.ones_like(find_linear(model, name).weight, dtype=torch.bool) for name in ("a", "b")}
    masks["b"][:, ::2] = False
    support = Support(model, masks)
    held = sum(support.counts().values())
    assert held == 35 + 18
    support.clear()
    gradual = GradualPruning(model, support, [(["a", "b"], target)], samples(), last, every, 6, seed=0)
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
    masks = {name: torch.ones_like(find_linear(model, name).weight, dtype=torch.bool) for name in NAMES}
    support = Support(model, masks)
    GradualPruning(model, support, [(["c"], 3), (["a"], 30)], samples(), 0, 1, 6, seed=0).before_step()
    assert support.counts() == {"a": 30, "b": 42, "c": 3}
    scores = gauss_newton_saliency(chain(), samples(), ["c"])["c"]
    drawn = keep_most({"c": scores}, {"c": masks["c"]}, 24)
    assert int(drawn["c"].sum()) == 24
