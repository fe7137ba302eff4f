"""Which rows of a layer are drawn, and that rows and moments are what hooks see."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from networks import seeded
from torch import nn

import nettrim
from nettrim.core.moments import Moments
from nettrim.errors import ProblemError
from nettrim.network.batches import read_batches
from nettrim.network.trace import trace
from nettrim.pipeline.account import Account
from nettrim.pipeline.collect import ROWS, Wanted, check_rows, choose_rows, collect, packs, row_bytes
from nettrim.pipeline.layers import How, wanted_of
from nettrim.pipeline.plan import Plan

SAMPLES = 21
PLENTY = 1 << 40
LAYERS = ("0", "2", "5")


def model():
    return seeded(
        nn.Sequential(
            nn.Conv2d(2, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 6, (3, 2), stride=2, padding=(1, 0), groups=2),
            nn.ReLU(), nn.Flatten(), nn.Linear(36, 5),
        ), 4,
    ).double()  # fmt: skip


@pytest.fixture
def account():
    x = torch.randn(SAMPLES, 2, 6, 4, generator=torch.Generator().manual_seed(6), dtype=torch.float64)
    batches = read_batches([x[:4], x[4:17], x[17:]])
    dense = model()
    return Account.of(dense, trace(dense, batches.first(8)), batches, None, PLENTY)


@pytest.fixture
def wide(account):
    """A layer of a hundred positions."""
    return replace(account.graph.layer("0"), positions=100)


def soiled(account):
    """The state of a network whose first layer was pruned: it changes what reaches the others."""
    weight = account.dense["0.weight"]
    return account.dense | {"0.weight": weight * (weight.abs() > 0.2)}


def rows_by_hooks(account, state):
    """Every layer's inputs in one network and its outputs in the dense one, by hooks and `F.unfold`."""
    found = {}
    x = torch.cat([batch.inputs[0] for batch in account.batches])
    for which, weights in (("inputs", state), ("outputs", account.dense)):
        twin = model()
        twin.load_state_dict(weights)
        seen = {}
        for name in LAYERS:
            twin.get_submodule(name).register_forward_hook(
                lambda module, given, value, name=name, seen=seen: seen.update({name: (given[0], value)})
            )
        with torch.no_grad():
            twin(x)
        found[which] = seen
    rows = {}
    for name in LAYERS:
        layer, given, value = model().get_submodule(name), found["inputs"][name][0], found["outputs"][name][1]
        if isinstance(layer, nn.Conv2d):
            given = F.unfold(given, layer.kernel_size, padding=layer.padding, stride=layer.stride)
            given, value = given.transpose(1, 2).flatten(0, 1), value.permute(0, 2, 3, 1).flatten(0, 2)
        rows[name] = given, value
    return rows


def collected(account, wanted, at_a_time):
    return collect(account.graph, account.dense, soiled(account), account.batches, wanted, at_a_time)


@pytest.mark.parametrize("at_a_time", [1, 5, 100])
def test_all_rows_are_those_that_hooks_and_unfold_see(account, at_a_time):
    found = collected(account, dict.fromkeys(LAYERS, Wanted()), at_a_time)
    clean = rows_by_hooks(account, account.dense)
    for name, (inputs, outputs) in rows_by_hooks(account, soiled(account)).items():
        assert found[name].total == len(inputs) == SAMPLES * account.graph.layer(name).positions
        assert found[name].moments is None
        assert torch.allclose(found[name].inputs, inputs, rtol=1e-12, atol=1e-13)
        assert torch.allclose(found[name].outputs, outputs, rtol=1e-12, atol=1e-13)
        # the pruned prefix is seen by all but the first, and the targets are clean
        assert torch.equal(clean[name][1], outputs)
        assert torch.allclose(clean[name][0], inputs) == (name == "0")


def test_rows_of_a_convolution_give_its_outputs_group_by_group(account):
    """The order of the columns is that of the weight as a matrix."""
    found = collect(account.graph, account.dense, account.dense, account.batches, {"2": Wanted()}, 7)["2"]
    weight = account.dense["2.weight"].reshape(6, -1)
    parts = (found.inputs.chunk(2, 1), found.outputs.chunk(2, 1), weight.chunk(2), account.dense["2.bias"].chunk(2))
    for inputs, outputs, rows, bias in zip(*parts, strict=True):
        assert torch.allclose(inputs @ rows.T + bias, outputs, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("at_a_time", [1, 6, 100])
def test_chosen_rows_are_a_part_of_all(account, at_a_time):
    everything = collected(account, dict.fromkeys(LAYERS, Wanted()), 100)
    chosen = {name: choose_rows(account.graph.layer(name), SAMPLES, 17, PLENTY, 3) for name in LAYERS}
    found = collected(account, {name: Wanted(rows) for name, rows in chosen.items()}, at_a_time)
    for name in LAYERS:
        assert len(found[name].inputs) == len(found[name].outputs) == 17
        assert torch.allclose(found[name].inputs, everything[name].inputs[chosen[name]], rtol=1e-12, atol=1e-13)
        assert torch.allclose(found[name].outputs, everything[name].outputs[chosen[name]], rtol=1e-12, atol=1e-13)
        assert found[name].total == everything[name].total


@pytest.mark.parametrize("at_a_time", [1, 6, 100])
def test_moments_are_those_of_all_rows_for_every_group(account, at_a_time):
    everything = collected(account, dict.fromkeys(LAYERS, Wanted()), 100)
    found = collected(account, dict.fromkeys(LAYERS, Wanted(torch.arange(16), moments=True)), at_a_time)
    for name in LAYERS:
        groups = account.graph.layer(name).groups
        assert len(found[name].inputs) == len(found[name].outputs) == 0
        assert len(found[name].moments) == groups
        parts = zip(everything[name].inputs.chunk(groups, 1), everything[name].outputs.chunk(groups, 1), strict=True)
        for own, (inputs, outputs) in zip(found[name].moments, parts, strict=True):
            expected = Moments.of(inputs, outputs)
            assert own.count == expected.count == everything[name].total
            assert torch.allclose(own.gram, expected.gram, rtol=1e-11, atol=1e-11)
            assert torch.allclose(own.cross, expected.cross, rtol=1e-11, atol=1e-11)
            assert torch.allclose(own.power, expected.power, rtol=1e-11)


def test_rows_are_drawn_without_replacement_in_order_from_all(wide):
    rows = choose_rows(wide, 400, 500, PLENTY, 0)
    assert rows.dtype == torch.int64
    assert len(rows) == 500
    assert bool((rows[1:] > rows[:-1]).all())
    assert int(rows[0]) >= 0
    assert int(rows[-1]) < 40000
    # all samples and positions alike: each quarter is expected to have 125, give or take 10
    assert all(80 < int(part) < 170 for part in torch.bincount(rows // 10000, minlength=4))
    assert all(80 < int(part) < 170 for part in torch.bincount(rows % 100 // 25, minlength=4))


def test_the_draw_hangs_on_seed_and_name_and_nothing_else(wide):
    rows = choose_rows(wide, 400, 500, PLENTY, 0)
    torch.manual_seed(99)
    assert torch.equal(rows, choose_rows(wide, 400, 500, PLENTY, 0))
    assert not torch.equal(rows, choose_rows(wide, 400, 500, PLENTY, 1))
    assert not torch.equal(rows, choose_rows(replace(wide, name="other"), 400, 500, PLENTY, 0))


def test_how_many_rows_are_drawn(account, wide):
    once = replace(wide, positions=1)
    # by default all samples, or 16,384 rows of a layer that meets a sample more than once
    assert choose_rows(once, 50_000, None, PLENTY, 0) is None
    assert choose_rows(wide, 163, None, PLENTY, 0) is None
    assert len(choose_rows(wide, 164, None, PLENTY, 0)) == ROWS == 16384
    assert len(choose_rows(wide, 20_000, None, PLENTY, 0)) == 20_000
    # fewer where that is asked for
    assert len(choose_rows(wide, 400, 100, PLENTY, 0)) == 100
    assert choose_rows(once, 100, 100, PLENTY, 0) is None


def test_memory_bounds_the_rows(wide):
    counts = []
    for limit in (100_000, 200_000, 400_000, 1_000_000):
        rows = choose_rows(wide, 400, None, limit, 0)
        assert len(rows) * row_bytes(wide) <= limit
        # data alone, inputs and outputs in float64
        assert len(rows) * 8 * (18 + 4) < limit
        counts.append(len(rows))
        assert len(choose_rows(wide, 400, 20, limit, 0)) == 20
    assert counts == sorted(set(counts))
    # what is left over beside the rows does not grow with them
    assert counts[3] - counts[2] == pytest.approx(3 * (counts[2] - counts[1]), abs=3)


def test_too_little_memory_is_refused_with_the_layer_named(wide):
    with pytest.raises(ProblemError, match=r"memory_limit=5000 holds \d+ rows of layer '0' with 18 inputs"):
        choose_rows(wide, 400, None, 5000, 0)


@pytest.mark.parametrize("rows", [15, 0, -1, 20.0, True, "100"])
def test_a_number_of_rows_that_is_none_is_refused(rows):
    with pytest.raises(ProblemError, match="rows="):
        check_rows(rows)
    assert check_rows(16) == 16
    assert check_rows(None) is None


@pytest.mark.parametrize(
    ("method", "amount", "few", "many"),
    [
        ("net-trim", {"epsilon": 0.1}, (20, False), (None, False)),
        ("alps", {"sparsity": 0.5}, (None, True), (None, False)),
        ("magnitude", {"sparsity": 0.5}, (0, False), (0, False)),
    ],
)
def test_a_method_gets_what_it_needs(account, method, amount, few, many):
    """Rows, at the most so many; moments of all rows where those are more; nothing where the weight is enough."""
    amounts = dict.fromkeys(("epsilon", "sparsity", "kept", "lam", "tolerance")) | amount
    plan = Plan.make(
        model(), account.batches, nettrim.METHODS[method](), "parallel", "all", (), amounts, None, None, "refuse"
    )
    for rows, (count, moments) in ((20, few), (None, many)):
        wanted = wanted_of(plan, account, account.graph.layer("0"), How(rows, 1, 0, False))
        assert (None if wanted.chosen is None else len(wanted.chosen)) == count
        assert wanted.moments == moments


def test_layers_are_packed_in_order_within_the_limit(account):
    wanted = {"0": Wanted(torch.arange(100)), "2": Wanted(), "5": Wanted(torch.arange(16), moments=True)}
    found = [list(packs(account.graph, wanted, SAMPLES, limit)) for limit in (1, 10**5, 2 * 10**5, PLENTY)]
    # one alone is never split, whatever it takes
    assert found[0] == [["0"], ["2"], ["5"]]
    assert found[-1] == [["0", "2", "5"]]
    for packed in found:
        assert [name for pack in packed for name in pack] == ["0", "2", "5"]
    assert [len(packed) for packed in found] == sorted((len(packed) for packed in found), reverse=True)
