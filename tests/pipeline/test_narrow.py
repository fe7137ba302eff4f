"""Fewer channels: against least squares done by hand, against each other, and what must not change."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from nettrim.errors import ProblemError, UnsupportedError
from nettrim.methods import recover
from nettrim.methods.ldrf import Ldrf
from nettrim.methods.squeeze import Squeezed
from nettrim.network.batches import read_batches
from nettrim.network.channels import couplings
from nettrim.network.matrix import input_rows, output_rows
from nettrim.network.program import run, walk
from nettrim.network.trace import trace
from nettrim.pipeline import narrow as driver
from nettrim.pipeline.account import Account
from nettrim.pipeline.layers import How
from nettrim.pipeline.narrow import narrow
from nettrim.pipeline.plan import Plan
from nettrim.pipeline.widths import cost, widths
from tests.networks import MAKERS, batches_of, network_of, seeded

EXACT = {"ridge": 0.0, "steps": 0}
SHAPED = [name for name in MAKERS if name != "branches"]  # that has no channels to give away
QUICK = 25  # gradient steps


class Result:
    def __init__(
        self, model, batches, method, amount="channels", value=0.5, seed=0, limit=1 << 30, found=None, rows=None
    ):
        read = read_batches(batches)
        traced = trace(model, read.first(64), on_unsupported="keep")
        values = {layer.name: value.get(layer.name, 1.0) if isinstance(value, dict) else value for layer in
                  traced.graph.selected}  # fmt: skip
        plan = Plan(method, "cascade", traced, [], amount, values)
        self.account = Account.of(model, traced, read, None, limit)
        self.graph, self.standing = traced.graph, self.account.standing()
        with torch.random.fork_rng(devices=[]):
            self.layers, self.structure, _ = narrow(
                plan, self.account, self.standing, How(rows, 1, seed, False), found=found
            )
        self.facts = {layer.name: layer.facts for layer in self.layers}

    def weight(self, name):
        return self.standing.state[self.graph.layer(name).weight]

    def outputs(self, batches):
        return torch.cat([run(self.graph.program, self.standing.state, batch) for batch in read_batches(batches)])


def mlp(seed=0):
    model = nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 10), nn.ReLU(), nn.Linear(10, 3))
    return seeded(model, seed).double()


def rows(count=400, wide=8, seed=1):
    return torch.randn(count, wide, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def fitted(x, y):
    """The least squares of rows with an intercept, by another solver."""
    ones = torch.ones(len(x), 1, dtype=x.dtype)
    solved = torch.linalg.lstsq(torch.cat([x, ones], 1), y, driver="gelsd").solution.T
    return solved[:, :-1], solved[:, -1]


def by_hand(model, x, fraction):
    """An l1 choice and the least squares of each next layer, on a Sequential of Linear and ReLU."""
    layers = [(m.weight.detach().clone(), m.bias.detach().clone()) for m in model if isinstance(m, nn.Linear)]
    dense = list(layers)
    clean, current, choices = x, x, []
    for index in range(len(layers) - 1):
        weight, bias = layers[index]
        kept = dense[index][0].abs().sum(1).topk(round(fraction * len(weight))).indices.sort().values
        clean = F.relu(F.linear(clean, *dense[index]))
        current = F.relu(F.linear(current, weight[kept], bias[kept]))
        layers[index] = weight[kept], bias[kept]
        layers[index + 1] = fitted(current, F.linear(clean, *dense[index + 1]))
        choices.append(tuple(kept.tolist()))
    return layers, choices


@pytest.mark.parametrize("variant", ["direct", "core"])
def test_without_steps_it_is_the_least_squares_baseline(variant):
    """E1: with incoming weights as they are, the decomposition's least squares is that of the outputs."""
    model, x = mlp(), rows()
    found = Result(model, [x], Ldrf(variant=variant, **EXACT))
    layers, choices = by_hand(model, x, 0.5)
    before = torch.arange(8)
    for name, (weight, bias), kept in zip("024", layers, [*choices, range(3)], strict=True):
        kept = torch.tensor(list(kept))
        own = found.weight(name)
        assert torch.allclose(own[kept][:, before], weight, rtol=1e-6, atol=1e-7)
        assert torch.allclose(found.standing.state[f"{name}.bias"][kept], bias, rtol=1e-6, atol=1e-7)
        assert int((own != 0).sum()) == len(kept) * len(before)
        before = kept
    assert found.structure.channels == {"0": choices[0], "2": choices[1]}


@pytest.mark.parametrize("selector", ["thinet", "lasso", "energy", "random"])
def test_composed_of_factors_or_not_is_one_on_linear_layers(selector):
    model, x = mlp(3), rows(seed=5)
    one, two, three = (
        Result(model, [x], Ldrf(selector=selector, **EXACT, **more))
        for more in ({}, {"variant": "core"}, {"variant": "core", "head": "compose"})
    )
    assert one.structure == two.structure == three.structure
    for name in "024":
        assert torch.allclose(one.weight(name), two.weight(name), rtol=1e-6, atol=1e-7)
        assert torch.allclose(one.weight(name), three.weight(name), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("name", ["lenet5", "vgg", "conv1d"])
def test_a_convolution_is_fitted_on_all_of_its_patches(name):
    """The last layer by hand, on what reaches it through the network as it came out."""
    model, batches = network_of(name).double(), [b.double() for b in batches_of(name)]
    found = Result(model, batches, Ldrf(**EXACT))
    pairs = couplings(found.graph)[0]
    for pair in pairs.values():
        consumer = found.graph.layer(pair.consumer)
        if pair.consumer in pairs and consumer.window is None:
            continue  # its rows are cut once more
        seen, wanted = [], []
        for batch in read_batches(batches):
            for moment in walk(found.graph.program, [found.account.dense, found.standing.state], batch):
                if moment.at == consumer.step:
                    args, kwargs = moment.args[1]
                    seen.append(args[0] if args else kwargs["input"])
                    wanted.append(moment.values[0])
        x, z = torch.cat(seen), torch.cat(wanted)
        kept = torch.tensor(found.structure.channels[pair.producer])
        if consumer.window is not None:
            x, z = input_rows(x, consumer.window), output_rows(z, consumer.window)
        columns = (kept[:, None] * pair.taps + torch.arange(pair.taps)).flatten()
        ends = torch.tensor(found.structure.channels.get(pair.consumer, range(consumer.out_features)))
        weight, bias = fitted(x[:, columns], z[:, ends])
        own = found.weight(pair.consumer).reshape(consumer.out_features, -1)
        # dead channels leave weights open, but no outputs
        result = F.linear(x[:, columns], own[ends][:, columns], found.standing.state[consumer.bias_name][ends])
        assert torch.allclose(result, F.linear(x[:, columns], weight, bias), rtol=1e-6, atol=1e-6)
        lost = torch.ones(own.shape[1], dtype=torch.bool)
        lost[columns] = False
        assert int((own[:, lost] != 0).sum()) == 0


@pytest.mark.parametrize("method", [Ldrf(steps=QUICK), Ldrf(steps=QUICK, variant="core"), Ldrf.control(steps=QUICK)])
@pytest.mark.parametrize("name", SHAPED)
def test_no_pruning_returns_the_identical_network(name, method):
    found = Result(network_of(name), batches_of(name), method, value=1.0)
    assert all(tensor is found.account.dense[key] for key, tensor in found.standing.state.items())
    assert not found.structure.channels
    assert not found.standing.changed
    assert not any(layer.pruned for layer in found.layers)
    assert [layer.name for layer in found.layers] == list(found.graph.names)


METHODS = {
    "direct": Ldrf(steps=QUICK),
    "core": Ldrf(steps=QUICK, variant="core", basis="response", energy=0.95),
    "composed": Ldrf(steps=QUICK, variant="core", head="compose", selector="energy"),
    "control": Ldrf.control(steps=QUICK, selector="thinet"),
    "lasso": Ldrf.lasso(),
    "cut": Ldrf.cut(),
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ["lenet5", "vgg", "resnet", "conv1d", "flow", "encoder", "opt"])
def test_what_is_gone_is_zero_and_all_else_is_as_it_was(name, method):
    found = Result(network_of(name), batches_of(name), METHODS[method], value=0.5)
    pairs = couplings(found.graph)[0]
    assert found.structure.channels.keys() == pairs.keys()
    touched = {*pairs, *(pair.consumer for pair in pairs.values())}
    for layer in found.layers:
        spec = found.graph.layer(layer.name)
        assert layer.pruned == (layer.name in touched)
        assert torch.isfinite(layer.weight).all()
        if not layer.pruned:
            assert found.standing.state[spec.weight] is found.account.dense[spec.weight]
            continue
        assert torch.equal(layer.weight.double(), found.standing.state[spec.weight])
        if layer.name in pairs:
            kept = found.structure.channels[layer.name]
            lost = [c for c in range(spec.out_features) if c not in kept]
            assert len(kept) == max(1, int(spec.out_features / 2 + 0.5))
            assert layer.facts["kept_channels"] == list(kept)
            assert not bool(layer.weight[lost].any())
            reader = found.graph.layer(pairs[layer.name].consumer)
            taps = found.weight(reader.name).reshape(reader.out_features, spec.out_features, -1)
            assert not bool(taps[:, lost].any())
            assert layer.facts["error_end"] <= layer.facts["error_start"]
    assert {layer.name: layer.clean for layer in found.layers if layer.pruned}[next(iter(pairs))]


@pytest.mark.parametrize("learning_rate", [30.0, 1e30])
@pytest.mark.parametrize("variant", ["direct", "core"])
def test_wild_steps_end_no_worse_than_their_start(variant, learning_rate):
    model, batches = network_of("vgg"), batches_of("vgg")
    start = Result(model, batches, Ldrf(steps=1, learning_rate=1e-30, variant=variant))
    wild = Result(model, batches, Ldrf(steps=QUICK, learning_rate=learning_rate, variant=variant))
    first = next(iter(start.facts))
    assert wild.facts[first]["error_end"] <= start.facts[first]["error_end"] * (1 + 1e-6)
    for facts in wild.facts.values():
        assert facts.get("error_end", 0) <= facts.get("error_start", 0)


def test_a_squeeze_that_is_better_for_the_embedding_alone_is_not_taken(monkeypatch):
    """The guard looks at the layer itself: a planted iterate that says that it is best, and is not."""

    def planted(forward, inputs, target, start, *rest):
        worse = [torch.zeros_like(start[0]), *start[1:]]
        return Squeezed(worse, 7, 1.0, 0.0)

    monkeypatch.setattr(recover, "squeeze", planted)
    found = Result(mlp(), [rows()], Ldrf(steps=5))
    for facts in found.facts.values():
        if "channels_kept" in facts:
            assert facts["steps_kept"] == 0
            assert facts["error_end"] == facts["error_start"]
    assert all(bool(layer.weight.any()) for layer in found.layers)


def test_an_embedding_has_an_intercept_only_where_nothing_is_padded(monkeypatch):
    sites = {}
    real = driver.recover
    monkeypatch.setattr(driver, "recover", lambda site, *rest: sites.setdefault(site.consumer.name, site) and real(
        site, *rest))  # fmt: skip
    for name in ("lenet5", "vgg"):
        found = Result(network_of(name), batches_of(name), Ldrf(steps=0, variant="core"))
        for layer in found.layers:
            if layer.name in sites:
                padded = name == "vgg" and found.graph.layer(layer.name).window is not None
                assert sites[layer.name].intercept != padded
        sites.clear()


@pytest.mark.parametrize("name", ["lenet5", "vgg"])
def test_composed_layers_pass_the_embedding_on_exactly(name, monkeypatch):
    """What the recomposed layers give is what the factors gave: also on the border, where zeros are padded."""
    given = []
    real = driver.recover

    def seen(site, how, count):
        result = real(site, how, count)
        given.append((site, result))
        return result

    monkeypatch.setattr(driver, "recover", seen)
    model, batches = network_of(name).double(), [b.double() for b in batches_of(name)]
    found = Result(model, batches, Ldrf(steps=QUICK, variant="core", head="compose"))
    for site, result in given:
        values = []
        for batch in read_batches(batches):
            for moment in walk(found.graph.program, [found.standing.state], batch, until=site.pair.stop):
                if moment.at == site.pair.stop:
                    values.append(moment.values[0])
        kept = site.planes(torch.cat(values))[:, result.kept]
        by_factors = site.planes(site.activations(result.weight, result.bias))
        assert torch.allclose(kept, by_factors, rtol=1e-9, atol=1e-9)


def test_squeezing_wins_back_what_least_squares_loses():
    x = rows(600)
    errors = {}
    for name, method in {"least squares": Ldrf(steps=0), "embedding": Ldrf(steps=300), "core": Ldrf(
        steps=300, variant="core"), "control": Ldrf.control(steps=300)}.items():  # fmt: skip
        found = Result(mlp(), [x], method, value=0.25)
        errors[name] = float((found.outputs([x]) - mlp()(x)).detach().norm())
    for name in ("embedding", "core", "control"):
        assert errors[name] < 0.9 * errors["least squares"], errors


def test_the_trunk_is_put_right_at_the_sum(monkeypatch):
    """The last layer of a residual branch makes up for what the trunk has lost."""
    model, batches = network_of("resnet"), batches_of("resnet")
    with_it = Result(model, batches, Ldrf(steps=0), value=0.34)
    monkeypatch.setattr(driver, "at_sum", lambda *_: False)
    without = Result(model, batches, Ldrf(steps=0), value=0.34)
    off = []
    for found in (with_it, without):
        step, total = found.graph.layer("5.conv2").sum, 0.0
        for batch in read_batches(batches):
            for moment in walk(found.graph.program, [found.account.dense, found.standing.state], batch, until=step):
                if moment.at == step:
                    total += float((moment.values[0] - moment.values[1]).square().sum())
        off.append(total)
    assert off[0] < 0.99 * off[1]


def test_a_layer_that_keeps_all_behind_one_that_does_not_is_fitted_again():
    x = rows()
    found = Result(mlp(), [x], Ldrf(steps=QUICK), value={"0": 0.25})
    assert found.structure.channels.keys() == {"0"}
    assert found.facts["2"]["channels_kept"] == 10
    assert {layer.name: layer.pruned for layer in found.layers} == {"0": True, "2": True, "4": True}
    before = Result(mlp(), [x], Ldrf(steps=QUICK), value={"2": 0.25})
    assert before.structure.channels.keys() == {"2"}
    assert {layer.name: layer.pruned for layer in before.layers} == {"0": False, "2": True, "4": True}


def test_runs_repeat_by_their_seed():
    one, two, other = (
        Result(network_of("lenet5"), batches_of("lenet5"), Ldrf(steps=QUICK, selector="random"), seed=seed)
        for seed in (1, 1, 2)
    )
    assert all(torch.equal(tensor, two.standing.state[name]) for name, tensor in one.standing.state.items())
    assert one.structure != other.structure


@pytest.mark.parametrize("name", ["lenet5", "resnet"])
@pytest.mark.parametrize("variant", ["direct", "core"])
def test_a_run_goes_on_from_finished_layers(name, variant, monkeypatch):
    model, batches, method = network_of(name), batches_of(name), Ldrf(steps=QUICK, variant=variant)
    whole, solved = Result(model, batches, method), []
    real = driver.recover
    monkeypatch.setattr(driver, "recover", lambda site, *rest: solved.append(site.pair.producer) or real(site, *rest))
    for count in range(len(whole.layers) + 1):
        solved.clear()
        found = {layer.name: layer for layer in whole.layers[:count]}
        again = Result(model, batches, method, found=found)
        assert again.structure == whole.structure
        assert all(torch.equal(tensor, again.standing.state[name]) for name, tensor in whole.standing.state.items())
        assert not solved or count < len(whole.layers)
        assert name != "resnet" or ("4.conv1" in solved) == (count < 3)


def test_few_samples_fit_a_small_limit_and_none_is_said():
    model, batches = network_of("vgg"), batches_of("vgg")
    found = Result(model, batches, Ldrf(steps=3), limit=1 << 19)
    assert 2 <= found.facts["0"]["images"] < 60
    with pytest.raises(ProblemError, match="memory_limit"):
        Result(model, batches, Ldrf(steps=3), limit=1 << 13)


def test_fewer_rows_are_drawn_by_the_seed():
    one, two, other = (Result(mlp(), [rows()], Ldrf(**EXACT), seed=seed, rows=50) for seed in (0, 0, 1))
    assert torch.equal(one.weight("4"), two.weight("4"))
    assert not torch.equal(one.weight("4"), other.weight("4"))


def test_a_network_without_inner_widths_is_refused():
    with pytest.raises(ProblemError, match=r"no selected layer has channels that can go.*cat"):
        Result(network_of("branches"), batches_of("branches"), Ldrf(steps=3))


def graph_of(name):
    graph = trace(network_of(name), read_batches(batches_of(name)).first(8), on_unsupported="keep").graph
    return graph, couplings(graph)[0]


def test_costs_are_those_of_the_narrower_network():
    graph, pairs = graph_of("vgg")
    counts = {"0": 3, "3": 2, "7": 1, "12": 5}
    assert cost(graph, pairs, counts, "sparsity") == 2 * 3 * 9 + 3 * 2 * 9 + 2 * 1 * 9 + 1 * 4 * 5 + 5 * 4
    assert cost(graph, pairs, counts, "macs") == 64 * 2 * 3 * 9 + 64 * 3 * 2 * 9 + 16 * 2 * 1 * 9 + 1 * 4 * 5 + 5 * 4
    assert cost(graph, pairs, {}, "sparsity") == sum(layer.numel for layer in graph.layers)


@pytest.mark.parametrize("amount", ["macs", "sparsity"])
@pytest.mark.parametrize("name", ["vgg", "resnet", "lenet5"])
@pytest.mark.parametrize("capacities", [None, {}])
def test_a_budget_is_kept_and_used(name, amount, capacities):
    graph, pairs = graph_of(name)
    if capacities is not None:
        capacities = {name: 1 + index for index, name in enumerate(pairs)}
    most = cost(graph, pairs, {}, amount)
    for share in (0.9, 0.7):
        value = share if amount == "macs" else 1 - share
        counts = widths(graph, pairs, amount, dict.fromkeys(graph.names, value), capacities)
        assert cost(graph, pairs, counts, amount) <= share * most
        assert all(1 <= counts[name] <= pair.channels for name, pair in pairs.items())
        # no common factor that gives more would do
        weight = capacities or {name: pair.channels for name, pair in pairs.items()}
        for step in range(1, 400):
            more = {n: min(max(1, int(step / 100 * weight[n] + 0.5)), pairs[n].channels) for n in pairs}
            fits = cost(graph, pairs, more, amount) <= share * most
            assert not fits or all(more[n] <= counts[n] for n in pairs)


def test_amounts_that_cannot_be_are_refused():
    graph, pairs = graph_of("vgg")
    every = dict.fromkeys(graph.names, 1.0)
    with pytest.raises(ProblemError, match="at least 0"):
        widths(graph, pairs, "macs", dict.fromkeys(graph.names, 1e-3))
    with pytest.raises(ProblemError, match="at most 0"):
        widths(graph, pairs, "sparsity", dict.fromkeys(graph.names, 0.999))
    for amount, value in (("channels", 0.0), ("channels", 1.5), ("macs", 0.0), ("sparsity", 1.0), ("channels", True)):
        with pytest.raises(ProblemError, match="out of range"):
            widths(graph, pairs, amount, dict.fromkeys(graph.names, value))
    with pytest.raises(ProblemError, match="one number for all"):
        widths(graph, pairs, "macs", every | {"3": 0.5})
    with pytest.raises(UnsupportedError, match="splits a budget"):
        widths(graph, pairs, "channels", every, dict.fromkeys(pairs, 2))
    assert widths(graph, pairs, "channels", every | {"3": 0.01, "12": 0.5}) == {"0": 4, "3": 1, "7": 5, "12": 4}
    assert widths(graph, pairs, "macs", every) == widths(graph, pairs, "channels", every)


def low_rank():
    """An MLP whose last layer reads two directions of twelve."""
    model = mlp(2)
    with torch.no_grad():
        model[4].weight[2] = model[4].weight[0] + model[4].weight[1]
        model[2].weight.copy_(model[2].weight[:, :3] @ rows(3, 12, 9) * 0.5)
    return model


@pytest.mark.parametrize("labelled", [True, False])
def test_the_valid_capacity_is_the_rank_that_changes_few_samples(labelled):
    model, x = low_rank(), rows()
    batch = (x, model(x).argmax(1)) if labelled else x
    exact = Result(model, [batch], Ldrf(steps=0), value=0.5)
    assert (exact.facts["0"]["rank"], exact.facts["2"]["rank"]) == (3, 2)
    ranks = []
    for tolerance in (0.0, 0.3):
        found = Result(model, [batch], Ldrf(steps=0, capacity_tolerance=tolerance), value=0.5)
        ranks.append((found.facts["0"]["rank"], found.facts["2"]["rank"]))
        assert 0 < found.facts["0"]["energy"] <= 1
    assert ranks[0] <= (3, 2)
    assert sum(ranks[1]) < sum(ranks[0])


def test_a_budget_is_split_by_capacity():
    model, x = low_rank(), rows()
    even, split = (
        Result(model, [x], Ldrf(steps=0, allocate=kind), amount="sparsity", value=0.6)
        for kind in ("uniform", "capacity")
    )
    kept = [[r.facts[n]["channels_kept"] for n in "02"] for r in (even, split)]
    assert kept[0][0] / 12 == pytest.approx(kept[0][1] / 10, abs=0.1)
    assert kept[1][0] / 3 == pytest.approx(kept[1][1] / 2, abs=0.6)
    assert kept[0] != kept[1]


def test_capacity_needs_classes():
    model = nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 1))
    with pytest.raises(ProblemError, match="by class"):
        Result(seeded(model), [rows().float()], Ldrf(steps=0, capacity_tolerance=0.1))
