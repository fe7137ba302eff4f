"""Every method on every kind of layer: what `prune` makes of a layer is what the method makes of its rows.

The rows are made here, by `F.unfold`, in the order of the flattened weight ``(C, kh, kw)``.
"""

from __future__ import annotations

import copy
from itertools import product
from math import prod

import pytest
import torch
import torch.nn.functional as F
from networks import assert_bounds_hold, call, seeded
from torch import nn

import nettrim
from nettrim import LObs, NetTrim, Overall, Pattern
from nettrim.core.moments import Moments
from nettrim.methods import LayerTask, make_method
from nettrim.methods.base import Shrinks, needs
from nettrim.network.trace import LayerSpec
from nettrim.pipeline import budget, plan
from nettrim.pipeline.collect import choose_rows

SAMPLES = 24
#: those that prune single layers; what the others make is in `test_shrink.py`
LAYERED = [name for name, make in nettrim.METHODS.items() if not isinstance(make(), Shrinks)]
TRIM = NetTrim(tol=1e-2, on_failure="return", evidence=False)

#: layer, what lies behind it, size of a sample
NETS = {
    "stride": (lambda: nn.Conv2d(4, 5, 3, stride=2, padding=1), "relu", (4, 6, 7)),
    "stride, norm": (lambda: nn.Conv2d(4, 5, 3, stride=2, padding=(2, 1)), "norm", (4, 6, 7)),
    "dilation, no bias": (lambda: nn.Conv2d(4, 5, 3, dilation=(2, 1), bias=False), "plain", (4, 7, 6)),
    "same, no bias, norm": (lambda: nn.Conv2d(4, 5, (2, 3), padding="same", bias=False), "norm", (4, 5, 5)),
    "grouped": (lambda: nn.Conv2d(4, 6, (2, 3), stride=(1, 2), padding=(1, 0), groups=2), "relu", (4, 6, 7)),
    "grouped, no bias, norm": (lambda: nn.Conv2d(4, 6, (2, 3), groups=2, bias=False), "norm", (4, 5, 6)),
    "depthwise": (lambda: nn.Conv2d(4, 8, 2, groups=4), "plain", (4, 6, 6)),
    "depthwise, norm": (lambda: nn.Conv2d(4, 4, (2, 4), padding=1, groups=4), "norm", (4, 6, 6)),
    "conv1d": (lambda: nn.Conv1d(4, 5, 3, stride=2, padding=1), "plain", (4, 11)),
    "conv1d, norm": (lambda: nn.Conv1d(4, 6, 4, padding="same", dilation=2, groups=2), "norm", (4, 9)),
    "tokens": (lambda: nn.Linear(8, 5), "relu", (6, 8)),
    "tokens, no bias": (lambda: nn.Linear(8, 5, bias=False), "plain", (6, 8)),
    "vectors, norm": (lambda: nn.Linear(12, 5), "norm", (12,)),
}

RUNS = [
    *[("net-trim", amount) for amount in ({"epsilon": 0.2}, {"lam": 0.05}, {"sparsity": 0.6}, {"kept": 17})],
    *[("l-obs", amount) for amount in ({"sparsity": 0.6}, {"kept": 17}, {"tolerance": 0.1})],
    *[("obs", amount) for amount in ({"sparsity": 0.6}, {"kept": 17}, {"tolerance": 0.1}, {"epsilon": 0.2})],
    *[
        (name, {"sparsity": value} if value != 17 else {"kept": 17})
        for name, value in product(("obs", "magnitude", "wanda", "sparsegpt", "alps"), (0.6, 17, Pattern(2, 4)))
        if (name, value) not in (("obs", 0.6), ("obs", 17))
    ],
]
IDS = [f"{name}-{'-'.join(f'{k}={v}' for k, v in amount.items())}" for name, amount in RUNS]


def method_of(name):
    return TRIM if name == "net-trim" else make_method(name)


def norm_for(layer):
    channels = layer.weight.shape[0]
    return nn.BatchNorm2d(channels) if isinstance(layer, nn.Conv2d) else nn.BatchNorm1d(channels)


def network_of(kind):
    make, behind, _ = NETS[kind]
    layer = make()
    parts = {"plain": [], "relu": [nn.ReLU()], "norm": [norm_for(layer), nn.ReLU()]}[behind]
    return seeded(nn.Sequential(layer, *parts), sum(map(ord, kind)))


def samples_of(kind):
    shape = NETS[kind][2]
    generator = torch.Generator().manual_seed(sum(map(ord, kind)))
    x = torch.randn(SAMPLES, *shape, generator=generator)
    # channels of different size and neighbours that are alike, so that it matters which column is whose
    x = x * torch.linspace(0.5, 2, shape[0]).reshape(-1, *[1] * (len(shape) - 1))
    return x + 0.5 * x.roll(1, -1)


def unfolded(layer, x):
    """A layer's rows, in float64: ``(P, G · N)``, the order of columns that of the flattened weight."""
    x = x.double()
    if isinstance(layer, nn.Linear):
        return x.reshape(-1, layer.in_features)
    flat = isinstance(layer, nn.Conv1d)
    kernel, stride, dilation = layer.kernel_size, layer.stride, layer.dilation
    if layer.padding == "same":
        total = [d * (k - 1) for k, d in zip(kernel, dilation, strict=True)]
        before = [t // 2 for t in total]
        sides = [side for t, b in zip(reversed(total), reversed(before), strict=True) for side in (b, t - b)]
    else:
        sides = [p for p in reversed(layer.padding) for _ in range(2)]
    x = F.pad(x, sides)
    if flat:
        x, kernel, stride, dilation = x[:, :, None], (1, *kernel), (1, *stride), (1, *dilation)
    columns = F.unfold(x, kernel, dilation=dilation, stride=stride)
    return columns.transpose(1, 2).reshape(-1, columns.shape[1])


def folded(model):
    """The matrix and the bias of the first layer of a network, its batch norm folded in, in float64."""
    layer = model[0]
    weight = layer.weight.detach().double().flatten(1)
    bias = None if layer.bias is None else layer.bias.detach().double()
    norm = next((m for m in model if isinstance(m, nn.BatchNorm1d | nn.BatchNorm2d)), None)
    if norm is not None:
        scale = norm.weight.detach().double() / (norm.running_var.double() + norm.eps).sqrt()
        before = 0.0 if bias is None else bias
        bias = scale * (before - norm.running_mean.double()) + norm.bias.detach().double()
        weight = weight * scale[:, None]
    return weight, bias


def shares(scores, total):
    """How many weights each group keeps, weight after weight: first one for each, then the largest of all."""
    order = sorted(range(scores.numel()), key=lambda i: -float(scores.flatten()[i]))
    each = scores.numel() // len(scores)
    counts = [0] * len(scores)
    later = []
    for i in order:
        if counts[i // each] == 0 and sum(counts) < total:
            counts[i // each] = 1
        else:
            later.append(i)
    for i in later[: total - sum(counts)]:
        counts[i // each] += 1
    return counts


def by_hand(method, amount, rows, weight, bias, groups, relu, dtype, moments=None):
    """Call a method on every group's rows, and join what it gives: weight, bias."""
    ((kind, value),) = amount.items()
    if isinstance(value, Pattern):
        kind = "pattern"
    wide, tall = weight.shape[1], len(weight) // groups
    counts = [value] * groups
    if groups > 1 and kind in ("sparsity", "kept"):
        total = value if kind == "kept" else weight.numel() - int(value * weight.numel())
        norms = torch.ones(groups * wide) if needs(method) == "weight" else rows.norm(dim=0)
        kind = "kept"
        counts = shares(weight.abs().reshape(groups, tall, wide) * norms.reshape(groups, 1, wide), total)
    weights, biases = [], []
    for g in range(groups):
        columns, neurons = slice(g * wide, (g + 1) * wide), slice(g * tall, (g + 1) * tall)
        own = None if bias is None else bias[neurons]
        outputs = rows[:, columns] @ weight[neurons].T
        task = LayerTask(
            name="0", relu=relu, last=True, clean=True, weight=weight[neurons], bias=own, inputs=rows[:, columns],
            outputs=outputs if own is None else outputs + own, amount=kind, value=counts[g], dtype=dtype,
            moments=None if moments is None else moments[g],
        )  # fmt: skip
        result = method.prune_layer(task)
        weights.append(result.weight)
        biases.append(result.bias)
    return torch.cat(weights), None if bias is None else torch.cat(biases)


def assert_same(model, weight, bias):
    """The layer of a pruned network, folded, is this one: the same zeros, and values to the rounding of float32."""
    found = folded(model)
    assert torch.equal(found[0] != 0, weight != 0)
    scale = float(weight.abs().max())
    assert float((found[0] - weight).abs().max()) <= 1e-6 * scale
    if bias is None:
        assert found[1] is None
    else:
        assert float((found[1] - bias).abs().max()) <= 1e-6 * max(scale, float(bias.abs().max()), 1.0)


# one layer -----------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@pytest.mark.parametrize("kind", NETS)
@pytest.mark.parametrize(("name", "amount"), RUNS, ids=IDS)
def test_prune_is_the_method_on_the_unfolded_rows(kind, name, amount):
    model, x, method = network_of(kind), samples_of(kind), method_of(name)
    layer, (weight, bias) = model[0], folded(model)
    result = nettrim.prune(model, [x[:7], x[7:]], method, **amount, progress=False)
    dtype = torch.float64 if NETS[kind][1] == "norm" else torch.float32
    relu, groups = NETS[kind][1] != "plain", getattr(layer, "groups", 1)
    assert_same(result.model, *by_hand(method, amount, unfolded(layer, x), weight, bias, groups, relu, dtype))
    kept = int((result.model[0].weight != 0).sum())
    assert kept == result.ledger.records[0].kept == int(result.masks["0"].sum())
    ((kind_of, value),) = amount.items()
    numel = layer.weight.numel()
    if isinstance(value, Pattern):
        assert kept == numel // 2
        # of every four neighbours in a row of the flattened weight
        assert bool(((result.model[0].weight != 0).reshape(-1, 4).sum(1) == 2).all())
    elif kind_of in ("sparsity", "kept"):
        assert kept == (value if kind_of == "kept" else numel - int(value * numel))
    else:
        assert 0 < kept < numel
    assert_bounds_hold(result.ledger)


@pytest.mark.parametrize("name", [*LAYERED, "ldrf"])
def test_model_and_samples_are_left_as_they_were(name):
    model = nn.Sequential(*network_of("stride, norm"), nn.Flatten(), nn.Dropout(0.5), nn.LazyLinear(3))
    x = samples_of("stride, norm")
    model(x)
    model[0].eval()
    model[1].train()
    before, data = copy.deepcopy(model.state_dict()), x.clone()
    flags = [module.training for module in model.modules()]
    result = nettrim.prune(model, [x], method_of(name), sparsity=0.5, progress=False)
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())
    assert [module.training for module in model.modules()] == flags
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    assert torch.equal(x, data)
    mine = {tensor.data_ptr() for tensor in model.state_dict().values()}
    assert not mine & {tensor.data_ptr() for tensor in result.model.state_dict().values()}


# traps of the released L-OBS code ------------------------------------------------------------------------------------

ROWED = ["l-obs", "obs", "wanda", "sparsegpt", "alps"]


@pytest.mark.parametrize("name", ROWED)
def test_patches_in_the_order_of_another_framework_would_give_another_mask(name):
    model, x, method = network_of("stride"), samples_of("stride"), method_of(name)
    found = nettrim.prune(model, [x], method, sparsity=0.6, progress=False).masks["0"].flatten(1)
    weight, bias = folded(model)
    rows = unfolded(model[0], x)
    right = by_hand(method, {"sparsity": 0.6}, rows, weight, bias, 1, True, torch.float32)[0] != 0
    # the released code flattens patches as (kh, kw, C) and weights as (C, kh, kw)
    mixed = rows.reshape(-1, 4, 9).transpose(1, 2).reshape(len(rows), 36)
    wrong = by_hand(method, {"sparsity": 0.6}, mixed, weight, bias, 1, True, torch.float32)[0] != 0
    assert torch.equal(found, right)
    assert not torch.equal(found, wrong)


@pytest.mark.parametrize("name", ROWED)
@pytest.mark.parametrize("wrong", ["padding", "stride"])
def test_patches_at_other_places_would_give_another_layer(name, wrong):
    model, x, method = network_of("stride"), samples_of("stride"), method_of(name)
    found = nettrim.prune(model, [x], method, sparsity=0.6, progress=False).model[0].weight.flatten(1).double()
    weight, bias = folded(model)
    other = nn.Conv2d(4, 5, 3, stride=2 if wrong == "padding" else 3, padding=0 if wrong == "padding" else 1)
    moved = by_hand(method, {"sparsity": 0.6}, unfolded(other, x), weight, bias, 1, True, torch.float32)[0]
    assert float((found - moved).abs().max()) > 1e-3 * float(found.abs().max())


@pytest.mark.parametrize("kind", ["stride", "conv1d", "depthwise"])
def test_the_bias_of_a_convolution_is_the_column_of_ones(kind):
    model, x = network_of(kind), samples_of(kind)
    weight, bias = folded(model)
    rows, groups = unfolded(model[0], x), getattr(model[0], "groups", 1)
    result = nettrim.prune(model, [x], LObs(bias="pooled"), kept=17, progress=False)
    counts = [17]
    wide, tall = weight.shape[1], len(weight) // groups
    if groups > 1:
        counts = shares(weight.abs().reshape(groups, tall, wide) * rows.norm(dim=0).reshape(groups, 1, wide), 17)
    joined = []
    for g in range(groups):
        neurons = slice(g * tall, (g + 1) * tall)
        inputs = torch.cat([rows[:, g * wide : (g + 1) * wide], rows.new_ones(len(rows), 1)], 1)
        both = torch.cat([weight[neurons], bias[neurons, None]], 1)
        # the bias competes with the weights for as many removals as they lose
        task = LayerTask(
            name="0", relu=False, last=True, clean=True, weight=both, bias=None, inputs=inputs,
            outputs=inputs @ both.T, amount="kept", value=counts[g] + tall,
        )  # fmt: skip
        joined.append(LObs().prune_layer(task).weight)
    whole = torch.cat(joined)
    assert_same(result.model, whole[:, :-1], whole[:, -1])


@pytest.mark.parametrize("method", [LObs(refit=True), nettrim.Obs()], ids=["l-obs", "obs"])
@pytest.mark.parametrize("kind", ["stride", "dilation, no bias", "conv1d"])
def test_what_stays_is_the_least_squares_weight_with_a_column_of_ones(kind, method):
    model, x = network_of(kind), samples_of(kind)
    weight, bias = folded(model)
    rows = unfolded(model[0], x)
    found = nettrim.prune(model, [x], method, sparsity=0.7, progress=False).model
    mask = found[0].weight.flatten(1) != 0
    outputs = rows @ weight.T
    if bias is not None:
        outputs, rows = outputs + bias, torch.cat([rows, rows.new_ones(len(rows), 1)], 1)
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], 1)
    got = folded(found)
    got = got[0] if bias is None else torch.cat([got[0], got[1][:, None]], 1)
    for m in range(len(mask)):
        fitted = torch.linalg.lstsq(rows[:, mask[m]], outputs[:, m, None], driver="gelsd").solution[:, 0]
        assert float((got[m, mask[m]] - fitted).abs().max()) <= 1e-4


# groups that keep nothing --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", LAYERED)
@pytest.mark.parametrize("rows", [None, 64])
def test_fewer_weights_than_groups_leave_constant_channels(name, rows):
    model, x = network_of("depthwise, norm"), samples_of("depthwise, norm")
    method = method_of(name)
    result = nettrim.prune(model, [x], method, kept=3, rows=rows, progress=False)
    weight, bias = folded(model)
    every = unfolded(model[0], x)
    norms = torch.ones(32) if needs(method) == "weight" else every.norm(dim=0)
    if rows is not None and name == "net-trim":
        chosen = choose_rows(spec_of(result), SAMPLES, 64, 2 << 30, 0)
        norms = every[chosen].norm(dim=0)
    best = (weight.abs() * norms.reshape(4, 8)).max(1).values
    empty = int(best.argmin())
    found, constant = folded(result.model)
    assert [int(row.count_nonzero()) for row in found] == [0 if g == empty else 1 for g in range(4)]
    outputs = every[:, 8 * empty : 8 * empty + 8] @ weight[empty] + bias[empty]
    if name == "net-trim":
        # the constant nearest to what is behind the ReLU, on the rows that were drawn
        outputs = (outputs if rows is None else outputs[chosen]).clamp(min=0)
    if name in ("obs", "net-trim"):
        assert float(constant[empty]) == pytest.approx(float(outputs.mean()), abs=1e-5)
    elif name != "l-obs":
        assert float(constant[empty]) == pytest.approx(float(bias[empty]), abs=1e-6)
    else:
        # one sweep comes nearer
        middle = float(outputs.mean())
        assert abs(float(constant[empty]) - middle) < 0.5 * abs(float(bias[empty]) - middle)
    assert_bounds_hold(result.ledger)


def spec_of(result) -> LayerSpec:
    return result.account.graph.layer("0")


@pytest.mark.parametrize("bias", ["free", "frozen"])
def test_a_constant_channel_of_net_trim_is_certified_and_verified(bias, tmp_path):
    model, x = network_of("depthwise, norm"), samples_of("depthwise, norm")
    method = NetTrim(bias=bias, solver=nettrim.Admm(max_iter=1000), on_failure="return")
    result = nettrim.prune(model, [x], method, kept=2, out_dir=tmp_path / "run", progress=False)
    (record,) = result.ledger.records
    assert [block["kept"] for block in record.facts["blocks"]].count(0) == 2
    assert record.kept == 2
    assert 0 <= record.lower_bound <= record.objective * (1 + 1e-9)
    assert record.measured <= record.promised
    checked = nettrim.verify(tmp_path / "run")
    assert checked.holds, checked.failures


# several layers ------------------------------------------------------------------------------------------------------


def tower():
    """Convolution, depthwise and grouped ones and a head; batch norms behind two of them."""
    return seeded(
        nn.Sequential(
            nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(),
            nn.Conv2d(6, 6, 3, stride=2, padding=1, groups=6, bias=False), nn.BatchNorm2d(6), nn.ReLU(),
            nn.Conv2d(6, 4, 2, groups=2), nn.ReLU(), nn.Flatten(), nn.Linear(16, 4),
        ), 21,
    )  # fmt: skip


TOWER = {"0": 162, "3": 54, "6": 48, "9": 64}


def images(samples=60):
    x = torch.randn(samples, 3, 6, 6, generator=torch.Generator().manual_seed(22))
    return x + 0.5 * x.roll(1, -1) + 0.3 * x.roll(1, 1)


@pytest.fixture(scope="module")
def allocated():
    """The split of the first run: it hangs on the data alone, and to look for it anew would only take time."""
    found: list[dict[str, int]] = []

    def allocate(scout, total, **settings):
        if not found:
            found.append(budget.allocate(scout, total, **settings))
        return found[0]

    return allocate


@pytest.mark.parametrize("name", LAYERED)
def test_overall_is_exact_over_all_layers_together(name, allocated, monkeypatch):
    monkeypatch.setattr(plan, "allocate", allocated)
    result = nettrim.prune(tower(), [images()], method_of(name), sparsity=Overall(0.8), progress=False)
    counts = {layer: int(mask.sum()) for layer, mask in result.masks.items()}
    assert sum(counts.values()) == sum(TOWER.values()) - int(0.8 * sum(TOWER.values())) == result.ledger.kept
    assert counts == allocated(None, 0)
    assert all(1 <= counts[layer] <= numel for layer, numel in TOWER.items())
    assert_bounds_hold(result.ledger)


@pytest.mark.parametrize("name", LAYERED)
def test_a_layer_behind_a_pruned_one_is_fitted_on_what_reaches_it(name):
    model = seeded(nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 5, 3, stride=2, padding=1)), 23)
    x, method = images(), method_of(name)
    result = nettrim.prune(model, [x], method, sparsity=0.6, progress=False)
    rows = unfolded(model[2], call(result.model[:2], [x]))
    weight, bias = (tensor.detach().double() for tensor in (model[2].weight.flatten(1), model[2].bias))
    outputs = call(model, [x]).flatten(2).transpose(1, 2).reshape(-1, 5)
    task = LayerTask(
        name="2", relu=False, last=True, clean=False, weight=weight, bias=bias, inputs=rows, outputs=outputs,
        amount="sparsity", value=0.6, dtype=torch.float32,
    )  # fmt: skip
    expected = method.prune_layer(task)
    assert_same(result.model[2:], expected.weight, expected.bias)


@pytest.mark.parametrize("name", LAYERED)
def test_two_workers_give_the_same(name):
    alone, both = (
        nettrim.prune(tower(), [images()], method_of(name), sparsity=0.6, executor=n, progress=False)
        for n in (None, 2)
    )  # fmt: skip
    for key, tensor in alone.model.state_dict().items():
        assert torch.equal(tensor, both.model.state_dict()[key]), key


@pytest.mark.parametrize("name", [name for name in LAYERED if name != "net-trim"])
def test_moments_of_all_rows_leave_no_say_to_a_sample(name):
    x = images()
    whole, few, other = (
        nettrim.prune(tower(), [x[:11], x[11:]], name, sparsity=0.6, rows=rows, seed=seed, progress=False)
        for rows, seed in ((None, 0), (64, 0), (64, 1))
    )
    for layer in TOWER:
        assert torch.equal(whole.masks[layer], few.masks[layer])
    # and nothing of it hangs on which rows were drawn
    for key, tensor in few.model.state_dict().items():
        assert torch.equal(tensor, other.model.state_dict()[key]), key
        assert torch.allclose(tensor, whole.model.state_dict()[key], atol=1e-4), key


@pytest.mark.parametrize("amount", [{"epsilon": 0.2}, {"kept": 17}], ids=["epsilon", "kept"])
@pytest.mark.parametrize("kind", ["stride", "depthwise", "tokens"])
def test_net_trim_is_made_of_a_sample_of_the_rows(kind, amount):
    model, x = network_of(kind), samples_of(kind)
    result = nettrim.prune(model, [x], NetTrim(tol=1e-2, on_failure="return"), **amount, rows=64, progress=False)
    (record,) = result.ledger.records
    spec = spec_of(result)
    assert (record.rows, record.total_rows) == (64, SAMPLES * spec.positions)
    chosen = choose_rows(spec, SAMPLES, 64, 2 << 30, 0)
    assert len(chosen.unique()) == 64
    groups, relu = getattr(model[0], "groups", 1), NETS[kind][1] != "plain"
    rows = unfolded(model[0], x)
    assert len(rows) == record.total_rows
    assert_same(result.model, *by_hand(TRIM, amount, rows[chosen], *folded(model), groups, relu, torch.float32))


def test_moments_of_every_group_are_those_of_its_own_rows():
    model, x = network_of("grouped"), samples_of("grouped")
    rows, (weight, bias) = unfolded(model[0], x), folded(model)
    outputs = torch.cat([rows[:, :12] @ weight[:3].T, rows[:, 12:] @ weight[3:].T], 1) + bias
    moments = [Moments.of(rows[:, :12], outputs[:, :3]), Moments.of(rows[:, 12:], outputs[:, 3:])]
    for name in ROWED:
        method = method_of(name)
        result = nettrim.prune(model, [x[:9], x[9:]], method, sparsity=0.6, rows=32, progress=False)
        expected = by_hand(method, {"sparsity": 0.6}, rows, weight, bias, 2, True, torch.float32, moments)
        assert_same(result.model, *expected)


# training on ---------------------------------------------------------------------------------------------------------

FINISHES = {
    "distill": nettrim.Distill(epochs=2, batch_size=20, validation=0),
    "distill, choosing": nettrim.Distill(epochs=3, batch_size=20, validation=0, choose="layer"),
    "fine-tune": nettrim.FineTune(epochs=2, batch_size=20, validation=0),
    "batch-norm": "batch-norm",
}


@pytest.mark.parametrize("method", ["l-obs", "magnitude"])
@pytest.mark.parametrize("finish", FINISHES)
def test_finishing_a_convolutional_network_keeps_its_zeros(finish, method, tmp_path):
    x = images()
    labels = call(tower(), [x]).argmax(1)
    result = nettrim.prune(
        tower(), [(x, labels)], method, sparsity=0.6, finish=FINISHES[finish], out_dir=tmp_path / "run", progress=False
    )
    before = result.ledger.before
    assert before is not None
    assert result.ledger.finish["kind"] == finish.split(",")[0]
    pruned = {layer.name: layer.weight for layer in result.layers}
    for layer, numel in TOWER.items():
        found = result.model.get_submodule(layer).weight
        assert bool((found[pruned[layer] == 0] == 0).all())
        # by choice: exactly the count that was asked for, of more to begin with
        assert int(found.count_nonzero()) == numel - int(0.6 * numel)
    started = {record.name: record.kept for record in before.records}
    assert all((started[layer] > TOWER[layer] - int(0.6 * TOWER[layer])) == ("choosing" in finish) for layer in TOWER)
    error = float((call(result.model, [x]) - call(tower(), [x])).norm())
    assert result.ledger.measured == pytest.approx(error, rel=1e-9)
    assert error != before.measured
    assert prod(result.ledger.accuracy["calibration"].values()) > 0
    checked = nettrim.verify(tmp_path / "run")
    assert checked.holds, checked.failures
    assert_bounds_hold(result.ledger)
