"""Shallowing as a whole: features are what hooks see, the right units go, and nothing else changes."""

from __future__ import annotations

import json

import pytest
import torch
from networks import Attention, network_of, seeded, seen
from torch import Tensor, nn

from benchmarks.model.nets import resnet_cifar
from nettrim.errors import ProblemError, UnsupportedError
from nettrim.methods.probes import ProbeCurve, probe
from nettrim.methods.shallowing import Shallowing
from nettrim.network.batches import Batches, read_batches
from nettrim.network.features import block_influence, pooled_features
from nettrim.network.program import run
from nettrim.network.structure import gone
from nettrim.network.units import find_units
from nettrim.pipeline.account import Account
from nettrim.pipeline.layers import How
from nettrim.pipeline.plan import Plan
from nettrim.pipeline.shorten import shorten

X = torch.rand(90, 3, 8, 8, generator=torch.Generator().manual_seed(0))
Y = torch.arange(90) % 3


def samples(labels: Tensor | None = Y) -> Batches:
    cuts = (slice(0, 40), slice(40, 41), slice(41, 90))
    return read_batches([X[cut] if labels is None else (X[cut], labels[cut]) for cut in cuts])


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return seeded(resnet_cifar(4, 3), 5)


def shortened(model, method, batches=None, seed=0, layers="all", ignore=(), **amount):
    batches = samples() if batches is None else batches
    plan = Plan.make(model, batches, method, "cascade", layers, ignore, amount)
    account = Account.of(model, plan.traced, batches, None, 2 << 30)
    standing = account.standing()
    evidence, structure, about = shorten(plan, account, standing, How(None, 1, seed, False))
    return account, standing, evidence, structure, about


# features -------------------------------------------------------------------------------------------------------------


def units_of(account: Account):
    return find_units(account.graph, account.dense)


def account_of(model: nn.Module, batches: Batches) -> Account:
    plan = Plan.make(model, batches, "magnitude", "cascade", "all", (), dict(sparsity=0.5))
    return Account.of(model, plan.traced, batches, None, 2 << 30)


def test_features_are_the_means_of_what_the_modules_give(model):
    account = account_of(model, samples())
    units = units_of(account)
    features = pooled_features(account.graph, account.dense, samples(), units, at_a_time=16)
    hooked = seen(model, [X], [unit.name for unit in units] + ["relu"])
    assert list(features) == ["stem", *(unit.name for unit in units)]
    for name, found in features.items():
        wanted = hooked["relu" if name == "stem" else name].mean((2, 3))
        assert found.dtype == torch.float32
        assert torch.allclose(found.double(), wanted, rtol=1e-4, atol=1e-5), name
    rows = torch.tensor([0, 39, 40, 88])
    some = pooled_features(account.graph, account.dense, samples(), units, rows)
    assert all(torch.allclose(some[name], features[name][rows], atol=1e-5) for name in features)


def test_features_of_tokens_vectors_and_what_the_network_is_given():
    attention = seeded(Attention())
    x = torch.randn(7, 4, 6)
    account = account_of(attention, read_batches([x]))
    features = pooled_features(account.graph, account.dense, read_batches([x]), units_of(account))
    assert torch.equal(features["stem"], x.mean(1))
    assert torch.allclose(features["down"], attention(x).mean(1).detach(), atol=1e-5)
    plain = seeded(nn.Sequential(nn.Linear(5, 5), nn.ReLU(), nn.Linear(5, 5), nn.ReLU(), nn.Linear(5, 2)))
    v = torch.randn(7, 5)
    account = account_of(plain, read_batches([v]))
    features = pooled_features(account.graph, account.dense, read_batches([v]), units_of(account))
    assert torch.equal(features["stem"], v)
    assert torch.allclose(features["2"], plain[:4](v).detach(), atol=1e-6)


def test_channels_of_one_dimension_lie_before_the_positions():
    x = torch.randn(6, 2, 24)
    model = network_of("conv1d")
    account = account_of(model, read_batches([x]))
    features = pooled_features(account.graph, account.dense, read_batches([x]), units_of(account))
    assert torch.equal(features["stem"], x.mean(2))
    assert torch.allclose(features["2"], model[:5](x).mean(2).detach(), atol=1e-5)


def test_block_influence_is_one_less_the_cosine(model):
    account = account_of(model, samples())
    found = block_influence(account.graph, account.dense, samples(), units_of(account), at_a_time=7)
    hooked = {name: value.flatten(1) for name, value in seen(model, [X], ["stage2.0", "stage2.1"]).items()}
    cosine = torch.cosine_similarity(hooked["stage2.0"], hooked["stage2.1"]).mean()
    assert found["stage2.1"] == pytest.approx(1 - float(cosine), abs=1e-5)
    assert "stage2.0" not in found


# the driver -----------------------------------------------------------------------------------------------------------


def test_the_units_of_least_gain_go_and_nothing_else_changes(model):
    account, standing, evidence, structure, about = shortened(model, Shallowing(), units=3)
    units = {unit.name: unit for unit in units_of(account)}
    features = pooled_features(account.graph, account.dense, samples(), list(units.values()))
    curve = probe(features, Y)
    worth = {point.name: point.gain for point in curve.points[1:] if units[point.name].removable}
    order, left, going = sorted(worth, key=lambda name: worth[name]), {0: 3, 1: 3, 2: 3}, []
    for name in order:
        if left[units[name].stage] > 1 and len(going) < 3:
            left[units[name].stage] -= 1
            going.append(name)
    assert set(structure.removed) == set(going)
    assert list(structure.removed) == [name for name in units if name in going]
    entries = {key: value for name in going for key, value in gone(account.graph, units[name]).items()}
    assert {key for key, value in standing.state.items() if value is not account.dense[key]} == set(entries)
    assert all(torch.equal(standing.state[key], value) for key, value in entries.items())
    assert standing.changed == {}
    twin = seeded(resnet_cifar(4, 3), 5).double()
    for name in going:
        stage, _, block = name.partition(".")
        twin.get_submodule(stage)[int(block)] = nn.Identity()
    wanted = twin(X.double()).detach()
    found = torch.cat([run(account.graph.program, standing.state, batch) for batch in account.batches])
    assert float((found - wanted).norm()) <= 1e-12 * float(wanted.norm())
    assert [layer.name for layer in evidence] == list(account.graph.names)
    removed = {layer for name in going for layer in units[name].layers}
    for layer in evidence:
        assert layer.pruned == layer.removed == (layer.name in removed)
        assert bool((layer.weight == 0).all()) == layer.pruned
        assert layer.pruned or layer.weight is layer.dense_weight or torch.equal(layer.weight, layer.dense_weight)
        assert layer.facts["units"] == 3
    assert {layer.name: layer.facts["unit"] for layer in evidence}["stage2.1.conv2"] == "stage2.1"
    assert evidence[0].facts["unit"] is None  # the stem
    stored = ProbeCurve.of_dict(json.loads(json.dumps(about["probes"])))
    assert stored.removed == structure.removed
    assert stored.stages == (0, 0, 0, 1, 1, 1, 2, 2, 2)
    assert [point.gain for point in stored.points] == pytest.approx([point.gain for point in curve.points])


def removed(model, method, **how) -> tuple[str, ...]:
    return shortened(model, method, **how)[3].removed


def test_the_choices_that_need_no_labels(model):
    bare = samples(None)
    assert removed(model, Shallowing("reverse"), batches=bare, units=3) == ("stage2.2", "stage3.1", "stage3.2")
    assert removed(model, Shallowing("forward"), batches=bare, units=3) == ("stage1.0", "stage1.1", "stage2.1")
    draws = {removed(model, Shallowing("random"), batches=bare, units=2, seed=seed) for seed in range(6)}
    assert len(draws) > 2
    assert removed(model, Shallowing("random"), batches=bare, units=2, seed=3) in draws
    account = account_of(model, bare)
    influence = block_influence(account.graph, account.dense, bare, units_of(account))
    free = {unit.name: unit for unit in units_of(account) if unit.removable}
    least = min(free, key=lambda name: influence[name])
    assert removed(model, Shallowing("block-influence"), batches=bare, units=1) == (least,)

    def size(name: str) -> float:
        weights = [account.dense[account.graph.layer(layer).weight].abs().flatten() for layer in free[name].layers]
        return float(torch.cat(weights).mean())

    assert removed(model, Shallowing("magnitude"), batches=bare, units=1) == (min(free, key=size),)


def test_the_other_choices_that_look_at_labels(model):
    account = account_of(model, samples())
    units = units_of(account)
    points = probe(pooled_features(account.graph, account.dense, samples(), units), Y).points[1:]
    free = [(point, unit) for point, unit in zip(points, units, strict=True) if unit.removable]
    assert removed(model, Shallowing("largest"), units=1) == (max(free, key=lambda pair: pair[0].gain)[0].name,)
    assert removed(model, Shallowing("probe-loss"), units=1) == (min(free, key=lambda pair: pair[0].loss_gain)[0].name,)
    threshold = 0.01
    going = removed(model, Shallowing(), tolerance=threshold)
    poor = {point.name for point, _ in free if point.gain < threshold}
    assert set(going) <= poor
    assert len(removed(model, Shallowing(rule="accumulate"), units=4)) == 4
    assert removed(model, Shallowing(rule="accumulate"), tolerance=5.0)


def test_a_share_of_the_weights_can_be_asked_for(model):
    account, _, evidence, structure, _ = shortened(model, Shallowing("reverse"), sparsity=0.2)
    total = sum(layer.numel for layer in account.graph.layers)
    out = [sum(account.graph.layer(layer.name).numel for layer in evidence if layer.removed)]
    last = structure.removed[0]
    out.append(sum(spec.numel for spec in account.graph.layers if spec.name.startswith(f"{last}.")))
    assert out[0] >= 0.2 * total > out[0] - out[1]
    with pytest.raises(ProblemError, match=r"sparsity=0.9 cannot be reached .* the 6 of 9 that can go hold 0\.\d+"):
        shortened(model, Shallowing("reverse"), sparsity=0.9)


def test_probes_see_a_bounded_number_of_samples_and_hang_on_the_seed(model):
    about = [shortened(model, Shallowing(probe_samples=60), units=1, seed=seed)[4]["probes"] for seed in (0, 0, 1)]
    assert about[0]["trained"] + about[0]["held"] == 60
    assert about[0]["points"] == about[1]["points"]
    assert about[0]["points"] != about[2]["points"]


def test_several_labels_to_a_sample_are_probed(model):
    labels = torch.stack([Y == 0, X.mean((1, 2, 3)) > 0.5], dim=1).float()
    about = shortened(model, Shallowing(), batches=samples(labels), units=2)[4]
    assert about["probes"]["measure"] == "mean average precision"


def test_unselected_layers_stay(model):
    names = [f"stage{stage}.*" for stage in (1, 3)]
    going = removed(model, Shallowing("reverse"), layers=names, ignore="stage3.2.conv2", units=3)
    assert going == ("stage1.1", "stage1.2", "stage3.1")


def test_what_cannot_be_done_is_refused(model):
    with pytest.raises(ProblemError, match="batches have no labels: pass"):
        shortened(model, Shallowing(), batches=samples(None), units=1)
    with pytest.raises(ProblemError, match="units=7 of 9, and 6 can go"):
        shortened(model, Shallowing(), units=7)
    with pytest.raises(UnsupportedError, match="give units or sparsity"):
        shortened(model, Shallowing("reverse"), tolerance=0.1)
    bare = nn.Sequential(nn.Flatten(), nn.Linear(192, 4), nn.Tanh(), nn.Linear(4, 3))
    with pytest.raises(UnsupportedError, match="has no units"):
        shortened(seeded(bare), Shallowing("reverse"), units=1)
