"""Layers that are added to a trunk and make up for its drift: targets, where it happens, and what is promised then."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cache
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from networks import assert_bounds_hold, batches_of, call, network_of, seeded, seen
from torch import nn

import nettrim
from nettrim import LObs, Magnitude, NetTrim
from nettrim.errors import RunError, UnknownNameError
from nettrim.pipeline.verify import verify

TRIM = NetTrim(solver=nettrim.Admm(max_iter=1000), tol=1e-2, on_failure="return")
RUNS = {"epsilon": (TRIM, {"epsilon": 0.2}), "kept": (TRIM, {"sparsity": 0.5}), "l-obs": ("l-obs", {"sparsity": 0.5})}

#: of each layer that is fitted at a sum: what gives the layer's part of it, and what gives the trunk
SUMS = {
    "resnet": {"4.conv2": ("4.bn2", "3"), "5.conv2": ("5.bn2", "5.downsample.1")},
    "attention": {"down": ("down", "+out")},
}


@dataclass(frozen=True)
class Spy:
    """A method that keeps the tasks it is given."""

    tasks: dict[str, Any] = field(default_factory=dict)
    name: str = "l-obs"
    amounts: tuple[str, ...] = ("sparsity",)

    def prune_layer(self, task):
        self.tasks[task.name] = task
        return LObs().prune_layer(task)


def as_rows(tensor):
    """Outputs as rows ``(P, M)``."""
    return tensor.flatten(2).transpose(1, 2).flatten(0, 1) if tensor.dim() == 4 else tensor.flatten(0, -2)


def parts_of(model, name, layer):
    """What a network adds up at a layer's sum, by hooks: the layer's part, and the trunk."""
    own, trunk = SUMS[name][layer]
    batches = batches_of(name)
    if trunk == "+out":
        # x + out(...), of which nothing is a module
        found = seen(model, batches, [own, "out"])
        return found[own], torch.cat(batches).double() + found["out"]
    found = seen(model, batches, [own, trunk])
    return found[own], found[trunk]


@cache
def pruned(name, run, residual="sum"):
    method, amount = RUNS[run]
    return nettrim.prune(
        network_of(name), batches_of(name), method, **amount, residual=residual, progress=False
    )  # fmt: skip


def fitted_at_sums(result):
    return [layer.name for layer in result.layers if layer.pruned and layer.facts["residual"]]


networks = pytest.mark.parametrize("name", SUMS)
runs = pytest.mark.parametrize("run", RUNS)


# targets -------------------------------------------------------------------------------------------------------------


@networks
@pytest.mark.parametrize("rows", [None, 50])
def test_targets_are_the_dense_sum_less_the_pruned_trunk(name, rows):
    spy = Spy()
    result = nettrim.prune(
        network_of(name), batches_of(name), spy, sparsity=0.5, residual="sum", rows=rows, progress=False
    )
    for layer in SUMS[name]:
        own, trunk = parts_of(network_of(name), name, layer)
        # when the layer was fitted, its trunk was what it is now
        after = parts_of(result.model, name, layer)[1]
        assert float((after - trunk).norm()) > 1e-3 * float(trunk.norm())
        task, wanted = spy.tasks[layer], as_rows(own + trunk - after)
        assert not task.clean
        assert not task.relu
        if rows is None:
            assert torch.allclose(task.outputs, wanted, atol=1e-12)
        else:
            # each of the rows is one of all, in their order
            places = (task.outputs[:, None] - wanted).abs().amax(2).min(1)
            assert len(task.outputs) == 50
            assert float(places.values.max()) < 1e-12
            assert bool((places.indices.diff() > 0).all())


def test_inputs_are_those_of_the_same_rows():
    spy = Spy()
    result = nettrim.prune(
        network_of("resnet"), batches_of("resnet"), spy, sparsity=0.5, residual="sum", progress=False
    )
    before = seen(result.model, batches_of("resnet"), ["5.bn1"])["5.bn1"].clamp(min=0)
    rows = F.unfold(before, 3, padding=1).transpose(1, 2).flatten(0, 1)
    assert torch.allclose(spy.tasks["5.conv2"].inputs, rows, atol=1e-12)


def test_all_other_layers_are_fitted_as_ever():
    one, other = Spy(), Spy()
    for spy, residual in ((one, "own"), (other, "sum")):
        nettrim.prune(network_of("resnet"), batches_of("resnet"), spy, sparsity=0.5, residual=residual, progress=False)
    dense = seen(network_of("resnet"), batches_of("resnet"), ["4.bn2", "5.bn1", "5.downsample.1"])
    for layer, module in (("5.conv1", "5.bn1"), ("5.downsample.0", "5.downsample.1")):
        assert torch.allclose(other.tasks[layer].outputs, as_rows(dense[module]), atol=1e-12)
    # and of the layers up to the first sum nothing is changed at all
    for layer in ("0", "4.conv1"):
        assert torch.equal(one.tasks[layer].inputs, other.tasks[layer].inputs)
        assert torch.equal(one.tasks[layer].outputs, other.tasks[layer].outputs)
    assert torch.allclose(one.tasks["4.conv2"].outputs, as_rows(dense["4.bn2"]), atol=1e-12)


@pytest.mark.parametrize("method", ["l-obs", "obs", "alps", "wanda"])
def test_moments_of_all_rows_carry_the_same_targets(method):
    whole, few = (
        nettrim.prune(
            network_of("resnet"), batches_of("resnet"), method, sparsity=0.5, residual="sum", rows=rows, progress=False
        )
        for rows in (None, 50)
    )
    assert fitted_at_sums(few) == ["4.conv2", "5.conv2"]
    for key, tensor in whole.model.state_dict().items():
        assert torch.allclose(tensor, few.model.state_dict()[key], atol=1e-5), key


# where it happens ----------------------------------------------------------------------------------------------------


@networks
@runs
def test_only_the_last_layer_before_a_sum_is_fitted_to_it(name, run):
    assert fitted_at_sums(pruned(name, run)) == list(SUMS[name])
    assert fitted_at_sums(pruned(name, run, "own")) == []


@networks
def test_in_parallel_it_changes_nothing(name):
    results = [
        nettrim.prune(
            network_of(name), batches_of(name), "l-obs", sparsity=0.5, schedule="parallel", residual=residual,
            progress=False,
        )
        for residual in ("own", "sum")
    ]  # fmt: skip
    assert [fitted_at_sums(result) for result in results] == [[], []]
    for key, tensor in results[0].model.state_dict().items():
        assert torch.equal(tensor, results[1].model.state_dict()[key])


@pytest.mark.parametrize(
    ("ignore", "expected"),
    [
        # the shortcut is the last then
        (["5.conv1", "5.conv2"], ["4.conv2", "5.downsample.0"]),
        # the first convolution of the block comes later than the shortcut, and leads to the sum
        (["5.conv2"], ["4.conv2"]),
        (["5.downsample.0"], ["4.conv2", "5.conv2"]),
        # nothing that leads to the trunk is pruned: there is no drift
        (["0"], ["5.conv2"]),
    ],
)
def test_the_trunk_must_be_final_and_pruned(ignore, expected):
    result = nettrim.prune(
        network_of("resnet"), batches_of("resnet"), "l-obs", sparsity=0.5, residual="sum", ignore=ignore, progress=False
    )
    assert fitted_at_sums(result) == expected
    assert_bounds_hold(result.ledger)


class Added(nn.Module):
    """Two branches that are added up, in one of many ways."""

    def __init__(self, how) -> None:
        super().__init__()
        self.stem, self.a, self.b, self.head = nn.Linear(6, 6), nn.Linear(6, 5), nn.Linear(6, 5), nn.Linear(5, 3)
        self.first = nn.Linear(6, 6)
        self.how = how

    def forward(self, x):
        h = F.relu(self.stem(x))
        return self.head(F.relu(self.how(self.a(h), self.b(F.relu(self.first(h))))))


WAYS = {
    "plus": (lambda a, b: a + b, ["b"]),
    "method": (lambda a, b: b.add(a), ["b"]),
    "in place": (lambda a, b: a.add_(b), ["b"]),
    "scaled": (lambda a, b: torch.add(a, b, alpha=3.0), []),
    "scaled trunk": (lambda a, b: torch.add(b, a, alpha=3.0), []),
    "less": (lambda a, b: a - b, []),
    "with itself": (lambda a, b: (b + b) * a, []),
    "used twice": (lambda a, b: (a + b) * b, []),
    "broadcast": (lambda a, b: a.mean(1, keepdim=True) + b, ["b"]),
    "a number": (lambda a, b: a * (b + 1.0), []),
}


@pytest.mark.parametrize("way", WAYS)
def test_what_is_not_a_plain_sum_is_left_alone(way):
    how, expected = WAYS[way]
    x = torch.randn(60, 6, generator=torch.Generator().manual_seed(1))
    result = nettrim.prune(seeded(Added(how), 2), [x], TRIM, sparsity=0.5, residual="sum", progress=False)
    assert fitted_at_sums(result) == expected
    for record in result.ledger.records:
        assert record.measured <= record.promised * (1 + 1e-9), record.name


@pytest.mark.parametrize("method", [TRIM, LObs(refit=True)], ids=["net-trim", "l-obs"])
def test_a_layer_on_the_dense_networks_inputs_makes_up_for_a_pruned_trunk(method):
    x = torch.randn(60, 6, generator=torch.Generator().manual_seed(1))
    model = seeded(Added(lambda a, b: a + b), 2)
    results = [
        nettrim.prune(model, [x], method, sparsity=0.5, ignore=["stem", "first"], residual=residual, progress=False)
        for residual in ("own", "sum")
    ]
    assert [fitted_at_sums(result) for result in results] == [[], ["b"]]
    assert [next(layer.clean for layer in result.layers if layer.name == "b") for result in results] == [True, False]
    errors = []
    for result in results:
        assert_bounds_hold(result.ledger)
        found = [seen(m, [x], ["a", "b"]) for m in (model, result.model)]
        errors.append(float((found[1]["a"] + found[1]["b"] - found[0]["a"] - found[0]["b"]).norm()))
    record = next(record for record in results[1].ledger.records if record.name == "b")
    assert record.measured == pytest.approx(errors[1], rel=1e-9)
    assert errors[1] < errors[0]


def test_layers_of_one_wave_do_not_wait_for_each_other():
    class Twins(Added):
        def forward(self, x):
            h = F.relu(self.stem(x))
            return self.head(F.relu(self.a(h) + self.b(h)))

    x = torch.randn(60, 6, generator=torch.Generator().manual_seed(1))
    result = nettrim.prune(seeded(Twins(None), 2), [x], "l-obs", sparsity=0.5, residual="sum", progress=False)
    assert fitted_at_sums(result) == []


def test_another_word_is_refused_before_any_work(tmp_path):
    with pytest.raises(UnknownNameError, match="residual='both' is unknown: use own or sum"):
        nettrim.prune(network_of("resnet"), batches_of("resnet"), sparsity=0.5, residual="both", out_dir=tmp_path / "r")
    assert not (tmp_path / "r").exists()


# what it is worth ----------------------------------------------------------------------------------------------------


def error_at_sum(model, name, layer):
    before, after = (sum(parts_of(m, name, layer)) for m in (network_of(name), model))
    return float((after - before).norm())


@networks
@pytest.mark.parametrize("sparsity", [0.3, 0.6])
def test_on_the_same_mask_no_other_fit_is_nearer_at_the_sum(name, sparsity):
    results = [
        nettrim.prune(
            network_of(name), batches_of(name), Magnitude(refit=True), sparsity=sparsity, residual=residual,
            progress=False,
        )
        for residual in ("own", "sum")
    ]  # fmt: skip
    first = next(iter(SUMS[name]))
    assert torch.equal(results[0].masks[first], results[1].masks[first])
    own, at_sum = (error_at_sum(result.model, name, first) for result in results)
    assert at_sum < own


@pytest.mark.parametrize("method", [LObs(refit=True), "obs", NetTrim(evidence=False)], ids=["l-obs", "obs", "net-trim"])
def test_drift_is_corrected(method):
    errors = {}
    for residual in ("own", "sum"):
        result = nettrim.prune(
            network_of("resnet"), batches_of("resnet"), method, sparsity=0.5, residual=residual, progress=False
        )
        errors[residual] = [error_at_sum(result.model, "resnet", layer) for layer in SUMS["resnet"]]
    assert all(at_sum < own for at_sum, own in zip(errors["sum"], errors["own"], strict=True)), errors


# what is promised ----------------------------------------------------------------------------------------------------


@networks
@runs
def test_no_error_exceeds_a_bound(name, run):
    result = pruned(name, run)
    assert_bounds_hold(result.ledger)
    dense, found = (call(model, batches_of(name)) for model in (network_of(name), result.model))
    assert result.ledger.measured == pytest.approx(float((found - dense).norm()), rel=1e-9)
    records = {record.name: record for record in result.ledger.records}
    for layer in SUMS[name]:
        record = records[layer]
        error = error_at_sum(result.model, name, layer)
        # the layer answers for the sum
        assert record.network_error == record.measured == pytest.approx(error, rel=1e-9)
        total = sum(parts_of(network_of(name), name, layer))
        assert record.target_norm == pytest.approx(float(total.norm()), rel=1e-9)
        if run != "l-obs":
            # a bound by its promise, not by way of the trunk; a radius follows the drift, so no rule is composed of it
            assert error <= record.promised * (1 + 1e-9)
            assert record.bounds["cascade"] == pytest.approx(record.promised, rel=1e-9)
            assert record.promised < 1.5 * error
            assert not {"paper", "cascade product"} & set(record.bounds)
    assert {"operator", "l-obs", "telescoped"} <= set(result.ledger.bounds)


@networks
@runs
def test_a_saved_run_is_verified(name, run, tmp_path):
    pruned(name, run).save(tmp_path / "run")
    checked = verify(tmp_path / "run")
    assert checked.holds, checked.failures
    again = nettrim.load_result(tmp_path / "run", network_of(name))
    assert again.ledger.as_dict() == pruned(name, run).ledger.as_dict()


def test_a_sample_of_the_rows_promises_nothing_of_the_others():
    result = nettrim.prune(
        network_of("resnet"), batches_of("resnet"), TRIM, sparsity=0.5, residual="sum", rows=50, progress=False
    )
    assert fitted_at_sums(result) == ["4.conv2", "5.conv2"]
    record = next(record for record in result.ledger.records if record.name == "5.conv2")
    assert record.rows == 50 < record.total_rows
    assert "cascade" not in record.bounds
    assert_bounds_hold(result.ledger)


def test_a_network_that_was_trained_on_answers_for_its_layers_again(tmp_path):
    result = nettrim.prune(
        network_of("resnet"), batches_of("resnet"), "l-obs", sparsity=0.5, residual="sum", finish="batch-norm",
        out_dir=tmp_path / "run", progress=False,
    )  # fmt: skip
    assert {record.name for record in result.ledger.before.records if record.facts["residual"]} == set(SUMS["resnet"])
    record = next(record for record in result.ledger.records if record.name == "5.conv2")
    own = [parts_of(model, "resnet", "5.conv2")[0] for model in (network_of("resnet"), result.model)]
    assert record.network_error == pytest.approx(float((own[1] - own[0]).norm()), rel=1e-9)
    assert_bounds_hold(result.ledger)
    checked = verify(tmp_path / "run")
    assert checked.holds, checked.failures


# going on ------------------------------------------------------------------------------------------------------------


def test_a_run_is_gone_on_with_only_as_it_was_started(tmp_path, monkeypatch):
    def run(**settings):
        return nettrim.prune(
            network_of("resnet"), batches_of("resnet"), "l-obs", sparsity=0.5, progress=False, **settings
        )

    plain = LObs.prune_layer

    def stop(self, task):
        if task.name == "5.conv2":
            raise KeyboardInterrupt
        return plain(self, task)

    path = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(LObs, "prune_layer", stop)
        with pytest.raises(KeyboardInterrupt):
            run(residual="sum", out_dir=path)
    assert list((path / "layers").iterdir())
    with pytest.raises(RunError, match="another residual"):
        run(out_dir=path, resume=True)
    done = run(residual="sum", out_dir=path, resume=True)
    assert fitted_at_sums(done) == list(SUMS["resnet"])
    whole = run(residual="sum")
    for key, tensor in whole.model.state_dict().items():
        assert torch.equal(tensor, done.model.state_dict()[key])
    checked = verify(path)
    assert checked.holds, checked.failures
