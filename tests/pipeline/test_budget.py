"""Splits of one number over the layers: exact for every number, repeatable, and no worse than where they start."""

from __future__ import annotations

import copy
import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import nettrim
from nettrim.errors import NetTrimError, ProblemError, RunError, UnsupportedError
from nettrim.network.batches import read_batches
from nettrim.network.edit import find_weight
from nettrim.network.trace import trace
from nettrim.pipeline import budget
from nettrim.pipeline.account import Account
from nettrim.pipeline.budget import Overall, allocate, shifted
from nettrim.pipeline.scout import Scout

SEEDED = settings(derandomize=True, database=None, deadline=None, max_examples=300)
QUICK = nettrim.NetTrim(evidence=False)


def scout_of(model, batches, **selection):
    read = read_batches(batches)
    return Scout.of(Account.of(model, trace(model, read[0], **selection), read, None, 2**30), 1000, 0)


class Watched:
    """Every cascade that was tried, in its order: its counts, and its error as measured."""

    def __init__(self, monkeypatch):
        self.tried, self.errors = [], []
        prune, measure = Scout.prune, Scout.measure

        def watched_prune(scout, kept, metrics, growth):
            self.tried.append(dict(kept))
            return prune(scout, kept, metrics, growth)

        def watched_measure(scout, state):
            self.errors.append(measure(scout, state))
            return self.errors[-1]

        monkeypatch.setattr(Scout, "prune", watched_prune)
        monkeypatch.setattr(Scout, "measure", watched_measure)


# ---- arithmetic


@st.composite
def splits(draw):
    sizes = draw(st.lists(st.integers(1, 2000), min_size=1, max_size=6))
    names = [f"layer {i}" for i in range(len(sizes))]
    kept = {name: draw(st.integers(1, size)) for name, size in zip(names, sizes, strict=True)}
    return kept, dict(zip(names, sizes, strict=True))


@SEEDED
@given(split=splits(), factor=st.floats(0.01, 100), which=st.integers(0, 5))
def test_a_shifted_split_adds_up_and_fits(split, factor, which):
    kept, sizes = split
    if len(kept) == 1:
        return
    name = list(kept)[which % len(kept)]
    found = shifted(kept, sizes, name, factor)
    assert list(found) == list(kept)
    assert sum(found.values()) == sum(kept.values())
    assert all(isinstance(count, int) and 1 <= count <= sizes[n] for n, count in found.items())


@SEEDED
@given(split=splits(), factor=st.sampled_from([1.5, 1.25, 1.12]))
def test_a_shift_goes_the_right_way(split, factor):
    """Up where there is room, and the others in proportion up to rounding and their limits."""
    kept, sizes = split
    if len(kept) < 2:
        return
    for name in kept:
        up, down = shifted(kept, sizes, name, factor), shifted(kept, sizes, name, 1 / factor)
        largest = max(sizes, key=sizes.get)
        if name != largest:
            assert up[name] == min(sizes[name], round(min(kept[name] * factor, sizes[name]))) or up[name] >= kept[name]
        assert up[name] >= kept[name] - len(kept)
        if all(kept[n] * 2 < sizes[n] for n in kept):
            assert down[name] <= kept[name] + len(kept)


@SEEDED
@given(split=splits(), share=st.floats(0, 1), values=st.lists(st.floats(-1e6, 1e6), min_size=6, max_size=6))
def test_any_wishes_become_an_exact_split(split, share, values):
    _, sizes = split
    total = len(sizes) + round(share * (sum(sizes.values()) - len(sizes)))
    found = budget._exactly(dict(zip(sizes, values, strict=False)), sizes, total)
    assert sum(found.values()) == total
    assert all(1 <= count <= sizes[name] for name, count in found.items())


@pytest.mark.parametrize("sparsity", [1.0, 1.5, -0.1, math.nan, math.inf, "0.9", True, None, [0.5]])
def test_overall_refuses_what_is_no_fraction(sparsity):
    with pytest.raises(ProblemError, match="Overall"):
        Overall(sparsity)


@given(numel=st.integers(1, 10**7), sparsity=st.floats(0, 1, exclude_max=True))
@SEEDED
def test_overall_counts_as_a_sparsity_does(numel, sparsity):
    kept = Overall(sparsity).kept(numel)
    assert 0 <= numel - kept <= numel * sparsity + 1e-6
    assert numel - kept > numel * sparsity - 1


# ---- allocate


@pytest.mark.parametrize("total", [3, 4, 7, 30, 100, 201, 350, 400, 401, 402])
def test_every_number_is_split_exactly(network, batches, total):
    scout = scout_of(network, batches)
    kept = allocate(scout, total, evaluations=6, progress=False)
    assert list(kept) == ["0", "3", "5"]
    assert sum(kept.values()) == total
    sizes = {"0": 192, "3": 160, "5": 50}
    assert all(1 <= kept[name] <= sizes[name] for name in kept)


def test_the_found_split_is_the_best_that_was_tried(network, batches, monkeypatch):
    """Of all cascades from the second on: the first was tried with the dense network's metrics, the start twice."""
    scout, watched = scout_of(network, batches), Watched(monkeypatch)
    kept = allocate(scout, 80, progress=False)
    assert watched.tried[0] == watched.tried[1]
    best = min(watched.errors[1:])
    assert best <= watched.errors[1]
    assert kept == watched.tried[1 + watched.errors[1:].index(best)]
    assert len(watched.tried) > 5
    assert all(sum(split.values()) == 80 for split in watched.tried)
    assert best < 0.95 * watched.errors[1]  # here the start can be improved on


@pytest.mark.parametrize("evaluations", [2, 3, 5, 10])
@pytest.mark.parametrize("progress", [False, True])
def test_no_more_cascades_than_allowed(network, batches, monkeypatch, evaluations, progress):
    """Whether or not a bar is shown."""
    watched = Watched(monkeypatch)
    allocate(scout_of(network, batches), 80, evaluations=evaluations, progress=progress)
    assert len(watched.tried) <= evaluations


def test_two_allocations_agree(network, batches):
    state = torch.get_rng_state()
    scout = scout_of(network, batches)
    first = allocate(scout, 70, evaluations=12, progress=False)
    assert allocate(scout, 70, evaluations=12, progress=False) == first
    assert allocate(scout_of(network, batches), 70, evaluations=12, progress=False) == first
    assert torch.equal(state, torch.get_rng_state())


def test_the_start_keeps_what_matters_most_by_one_threshold(network, batches, monkeypatch):
    """``w² E[x²] G_mm`` over all layers: the counts of its largest entries, by a sort of its own."""
    scout, watched = scout_of(network, batches), Watched(monkeypatch)
    allocate(scout, 90, evaluations=2, progress=False)
    reaching = {"0": torch.cat([x for x, _ in batches]).double()}
    twin = copy.deepcopy(network).double().eval()
    with torch.no_grad():
        reaching |= {name: twin[: int(name)](reaching["0"]) for name in ("3", "5")}
    ranked = []
    for name in ("0", "3", "5"):
        weight, energy = find_weight(network, name).detach().double(), reaching[name].square().mean(0)
        cost = scout.metrics[name].diagonal()
        ranked += [
            (float(weight[m, n] ** 2 * energy[n] * cost[m]), name)
            for m in range(weight.shape[0])
            for n in range(weight.shape[1])
        ]
    largest = [name for _, name in sorted(ranked, reverse=True)[:90]]
    assert watched.tried[0] == {name: largest.count(name) for name in ("0", "3", "5")}


def test_a_layer_that_no_saliency_speaks_for_keeps_one_weight(network, batches):
    with torch.no_grad():
        network[3].weight.mul_(1e-9)
    kept = allocate(scout_of(network, batches), 40, evaluations=2, progress=False)
    assert sum(kept.values()) == 40
    assert min(kept.values()) >= 1


def test_only_the_selected_layers_share(network, batches):
    kept = allocate(scout_of(network, batches, ignore=["3"]), 60, evaluations=4, progress=False)
    assert list(kept) == ["0", "5"]
    assert sum(kept.values()) == 60


def test_fewer_weights_than_layers_are_refused(network, batches):
    with pytest.raises(ProblemError, match="Overall leaves 2 weights for 3 layers: lower the sparsity"):
        allocate(scout_of(network, batches), 2)


# ---- in prune


@pytest.mark.parametrize("schedule", ["cascade", "parallel"])
@pytest.mark.parametrize("method", ["net-trim", "magnitude", "alps"])
@pytest.mark.parametrize("sparsity", [0.0, 0.7, 0.925, 0.99])
def test_the_overall_count_is_exact(network, batches, method, schedule, sparsity):
    chosen = QUICK if method == "net-trim" else method
    result = nettrim.prune(network, batches, chosen, sparsity=Overall(sparsity), schedule=schedule, progress=False)
    wanted = 402 - math.floor(402 * sparsity + 1e-9)
    assert result.ledger.kept == wanted
    assert sum(int(mask.sum()) for mask in result.masks.values()) == wanted
    assert sum(result.settings["amount"]["kept"].values()) == wanted
    for record in result.ledger.records:
        assert record.kept == result.settings["amount"]["kept"][record.name] >= 1
        weight = result.model.get_submodule(record.name).weight
        assert int((weight != 0).sum()) == record.kept


def test_a_split_from_the_data_beats_the_same_sparsity_everywhere(network, batches):
    split = nettrim.prune(network, batches, QUICK, sparsity=Overall(0.8), progress=False)
    flat = nettrim.prune(network, batches, QUICK, sparsity=0.8, progress=False)
    assert abs(split.ledger.kept - flat.ledger.kept) <= 3
    assert split.ledger.measured < flat.ledger.measured


def interrupted(monkeypatch, method, network, batches, path, after, **arguments):
    """Start a run whose method gives up at its third call or so."""
    calls, work = [], type(method).prune_layer

    def failing(self, task):
        calls.append(task.name)
        if len(calls) > after:
            raise RuntimeError("the light went out")
        return work(self, task)

    with monkeypatch.context() as patch:
        patch.setattr(type(method), "prune_layer", failing)
        with pytest.raises(RuntimeError, match="the light went out"):
            nettrim.prune(network, batches, method, out_dir=path, progress=False, **arguments)


@pytest.mark.parametrize("after", [0, 1, 2])
@pytest.mark.parametrize("schedule", ["cascade", "parallel"])
def test_a_resumed_run_takes_the_same_split_and_ends_in_the_same_weights(
    network, batches, tmp_path, monkeypatch, schedule, after
):
    arguments = {"sparsity": Overall(0.8), "schedule": schedule, "seed": 5}
    whole = nettrim.prune(network, batches, QUICK, out_dir=tmp_path / "whole", progress=False, **arguments)
    interrupted(monkeypatch, QUICK, network, batches, tmp_path / "part", after, **arguments)
    started = json.loads((tmp_path / "part" / "run.json").read_text())
    assert started["state"] == "started"
    assert started["amount"] == whole.settings["amount"]

    def never(*_args, **_kwargs):
        raise AssertionError("the split was looked for again")

    with monkeypatch.context() as patch:
        patch.setattr("nettrim.pipeline.plan.allocate", never)
        again = nettrim.prune(
            network, batches, QUICK, out_dir=tmp_path / "part", resume=True, progress=False, **arguments
        )
    assert again.settings["amount"] == whole.settings["amount"]
    for key, tensor in whole.model.state_dict().items():
        assert torch.equal(again.model.state_dict()[key], tensor)
    assert nettrim.verify(tmp_path / "part").holds
    assert nettrim.verify(tmp_path / "whole").holds


CHANGES = {
    "sparsity": {"sparsity": Overall(0.7)},
    "plain sparsity": {"sparsity": 0.8},
    "seed": {"seed": 6},
    "schedule": {"schedule": "parallel"},
    "layers": {"ignore": ["3"]},
    "method": {"method": nettrim.NetTrim(evidence=False, swaps=1)},
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_run_with_other_settings_is_not_gone_on_with(network, batches, tmp_path, monkeypatch, change):
    arguments = {"method": QUICK, "sparsity": Overall(0.8), "seed": 5}
    interrupted(monkeypatch, QUICK, network, batches, tmp_path / "run", 1, sparsity=Overall(0.8), seed=5)
    with pytest.raises(RunError, match="another"):
        nettrim.prune(
            network, batches, out_dir=tmp_path / "run", resume=True, progress=False, **(arguments | CHANGES[change])
        )


def test_another_model_is_not_gone_on_with(network, batches, tmp_path, monkeypatch):
    interrupted(monkeypatch, QUICK, network, batches, tmp_path / "run", 1, sparsity=Overall(0.8))
    other = nn.Sequential(nn.Linear(12, 4), nn.ReLU(), nn.Linear(4, 3))
    with pytest.raises(RunError, match="another"):
        nettrim.prune(
            other,
            [x for x, _ in batches],
            QUICK,
            sparsity=Overall(0.8),
            out_dir=tmp_path / "run",
            resume=True,
            progress=False,
        )


REFUSALS = {
    "two amounts": ({"sparsity": Overall(0.5), "epsilon": 0.1}, ProblemError, "exactly one amount"),
    "kept too": ({"sparsity": Overall(0.5), "kept": 5}, ProblemError, "exactly one amount"),
    "too few": ({"sparsity": Overall(0.999)}, ProblemError, "leaves 1 weights for 3 layers"),
    "in a dict": ({"sparsity": {"0": Overall(0.5), "3": 0.5, "5": 0.5}}, NetTrimError, "sparsity"),
    "half spaces": (
        {"sparsity": Overall(0.5), "method": nettrim.NetTrim(form="halfspace")}, UnsupportedError, "form='halfspace'"
    ),
    "penalised": (
        {"sparsity": Overall(0.5), "method": nettrim.NetTrim(bias="penalised")}, UnsupportedError, "bias='penalised'"
    ),
}  # fmt: skip


@pytest.mark.parametrize(("arguments", "error", "text"), REFUSALS.values(), ids=REFUSALS)
def test_refused_before_any_work(network, batches, monkeypatch, tmp_path, arguments, error, text):
    def fail(*_args, **_kwargs):
        raise RuntimeError("work was started")

    monkeypatch.setattr(nettrim.NetTrim, "prune_layer", fail)
    monkeypatch.setattr(Scout, "of", fail)
    with pytest.raises(error, match=text):
        nettrim.prune(network, batches, out_dir=tmp_path / "run", progress=False, **arguments)
    assert not (tmp_path / "run").exists()


def test_the_dense_model_and_the_data_are_left_alone(network, batches):
    network, data = network.double(), [(x.double(), y) for x, y in batches]
    before = copy.deepcopy(network.state_dict())
    flags = [m.training for m in network.modules()]
    nettrim.prune(network, data, QUICK, sparsity=Overall(0.8), progress=False)
    assert all(torch.equal(before[k], v) for k, v in network.state_dict().items())
    assert [m.training for m in network.modules()] == flags
    assert all(not m._forward_hooks for m in network.modules())
    assert all(p.grad is None and p.requires_grad for p in network.parameters())
    assert all(not x.requires_grad for x, _ in data)


def test_it_works_where_gradients_are_switched_off(network, batches):
    expected = nettrim.prune(network, batches, QUICK, sparsity=Overall(0.8), progress=False).model.state_dict()
    with torch.no_grad():
        found = nettrim.prune(network, batches, QUICK, sparsity=Overall(0.8), progress=False).model.state_dict()
    assert all(torch.equal(expected[k], found[k]) for k in expected)
