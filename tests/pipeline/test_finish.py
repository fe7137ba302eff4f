"""Training on after pruning: what is left, what is left alone, what is said of it, and what is refused."""

from __future__ import annotations

import copy
import json
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

import nettrim
from nettrim import Distill, FineTune, Overall, Pattern
from nettrim.errors import NetTrimError, ProblemError, UnknownNameError, UnsupportedError
from nettrim.network.edit import find_bias, find_weight
from nettrim.network.finishing import Finished
from nettrim.network.training import train
from nettrim.pipeline import plan as planning
from nettrim.pipeline.compare import compare
from nettrim.pipeline.finish import overstepped
from nettrim.pipeline.prune import DRIVERS
from nettrim.report.tables import ledger_table

NAMES = ["0", "3", "5"]
SIZES = {"0": 192, "3": 160, "5": 50}
QUIET: dict[str, Any] = {"progress": False}
#: three steps in an epoch of the sixty samples; the last weights are kept, so they are not those of the start
SHORT: dict[str, Any] = {"epochs": 3, "batch_size": 20, "validation": 0}
FIXED = Distill(**SHORT)
LAYER = Distill(**SHORT, choose="layer")
GLOBAL = Distill(**SHORT, choose="global")
TUNE = FineTune(**SHORT, learning_rate=0.01)


def zeros(model: nn.Module, name: str) -> int:
    return int((find_weight(model, name) == 0).sum())


def kept(model: nn.Module, name: str) -> int:
    return find_weight(model, name).numel() - zeros(model, name)


def counts(layers: list[Any]) -> dict[str, int]:
    return {layer.name: int((layer.weight != 0).sum()) for layer in layers}


def double_outputs(model: nn.Module, batches: Any) -> Tensor:
    twin = copy.deepcopy(model).double().eval()
    with torch.no_grad():
        return torch.cat([twin(x.double()) for x, _ in batches])


def same_weights(ours: nn.Module, theirs: nn.Module) -> bool:
    first, second = ours.state_dict(), theirs.state_dict()
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


def timeless(value: Any) -> Any:
    """What JSON holds of a ledger, without what a clock said."""
    if isinstance(value, dict):
        return {key: timeless(item) for key, item in value.items() if not key.startswith("seconds")}
    return [timeless(item) for item in value] if isinstance(value, (list, tuple)) else value


def require_agreement(result: Any, dense: nn.Module, batches: Any) -> None:
    """Masks, model, final layers and ledger say the same, and every bound of it holds of what is measured here."""
    ledger = result.ledger
    changed = [layer for layer in result.final if layer.pruned]
    assert list(result.masks) == [layer.name for layer in changed] == [record.name for record in ledger.records]
    for layer, record in zip(changed, ledger.records, strict=True):
        weight, bias = find_weight(result.model, layer.name), find_bias(result.model, layer.name)
        assert torch.equal(weight, layer.weight)
        assert (layer.bias is None) == (bias is None)
        assert layer.bias is None or torch.equal(bias, layer.bias)
        assert torch.equal(result.masks[layer.name], weight != 0)
        assert record.kept == int(result.masks[layer.name].sum())
        # nothing certifies these weights
        assert (record.gap, record.objective, record.promised, record.facts) == (None, None, None, {})
        assert all(record.network_error <= bound * (1 + 1e-9) for bound in record.bounds.values())
    error = float((double_outputs(result.model, batches) - double_outputs(dense, batches)).norm())
    assert ledger.measured == pytest.approx(error, rel=1e-9)
    assert {"operator", "l-obs", "telescoped"} <= set(ledger.bounds)
    assert all(error <= bound * (1 + 1e-9) for bound in ledger.bounds.values())
    assert ledger.bound == min(ledger.bounds.values())
    assert not any(p.requires_grad for p in result.model.parameters())
    assert not any(module.training for module in result.model.modules())


def no_pruning(monkeypatch) -> None:
    """Whatever prunes a layer or looks ahead for a split fails from here on."""

    def fail(*_args: Any, **_kwargs: Any) -> None:
        raise AssertionError("done a second time")

    for make in nettrim.METHODS.values():
        if hasattr(make, "prune_layer"):
            monkeypatch.setattr(make, "prune_layer", fail)
    for removes in DRIVERS:
        monkeypatch.setitem(DRIVERS, removes, fail)
    monkeypatch.setattr(planning, "allocate", fail)


# what comes out ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("finish", [FIXED, TUNE], ids=["distill", "fine-tune"])
@pytest.mark.parametrize(
    ("method", "amount"),
    [
        ("net-trim", {"epsilon": 0.2}),
        ("net-trim", {"sparsity": 0.7}),
        ("l-obs", {"kept": {"0": 40, "3": 30, "5": 20}}),
        ("obs", {"tolerance": 0.1}),
        ("magnitude", {"sparsity": {"0": Pattern(2, 4), "3": Pattern(1, 4), "5": Pattern(1, 2)}}),
    ],
    ids=["epsilon", "sparsity", "kept", "tolerance", "pattern"],
)
def test_on_fixed_masks_the_pruned_network_is_the_one_without_finishing(
    network, batches, held_out, method, amount, finish
):
    merely = nettrim.prune(network, batches, method, **amount, held_out=held_out, **QUIET)
    result = nettrim.prune(network, batches, method, **amount, held_out=held_out, finish=finish, **QUIET)
    require_agreement(result, network, batches)
    ledger = result.ledger
    assert merely.ledger.finish is None
    assert merely.ledger.before is None
    assert merely.final is merely.layers
    assert timeless(ledger.before.as_dict()) == timeless(merely.ledger.as_dict())
    assert [record.gap is None for record in ledger.before.records] == [method != "net-trim"] * 3
    for ours, theirs, final in zip(result.layers, merely.layers, result.final, strict=True):
        assert torch.equal(ours.weight, theirs.weight)
        assert torch.equal(ours.bias, theirs.bias)
        assert torch.equal(final.weight != 0, theirs.weight != 0)
        assert not torch.equal(final.weight, theirs.weight)
    said = dict(ledger.finish)
    assert said.pop("seconds") > 0
    assert said == {
        "kind": finish.name, "settings": repr(finish), "samples": 60, "labels": finish is TUNE, "targets": None,
        "epochs": 3, "steps": 9, "best_epoch": 3,
    }  # fmt: skip
    assert json.loads(json.dumps(ledger.as_dict(), allow_nan=False))["before"]["finish"] is None


@pytest.mark.parametrize("schedule", ["parallel", "cascade"])
@pytest.mark.parametrize(
    ("amount", "asked"),
    [
        ({"sparsity": 0.8}, {"0": 39, "3": 32, "5": 10}),
        ({"sparsity": {"0": 0.9, "3": 0.5, "5": 0.0}}, {"0": 20, "3": 80, "5": 50}),
        ({"kept": {"0": 1, "3": 17, "5": 50}}, {"0": 1, "3": 17, "5": 50}),
    ],
)
@pytest.mark.parametrize("headroom", [1.0, 1.7, 3.0, 100.0])
def test_within_layers_exactly_the_asked_count_stays(network, batches, schedule, amount, asked, headroom):
    finish = replace(LAYER, headroom=headroom)
    result = nettrim.prune(network, batches, "magnitude", **amount, schedule=schedule, finish=finish, **QUIET)
    require_agreement(result, network, batches)
    assert counts(result.final) == asked
    assert counts(result.layers) == {name: min(SIZES[name], round(headroom * n)) for name, n in asked.items()}
    assert result.ledger.finish["targets"] == result.settings["targets"] == asked
    assert result.ledger.kept == sum(asked.values())
    assert result.ledger.before.kept == sum(counts(result.layers).values())
    for before, after in zip(result.layers, result.final, strict=True):
        assert not bool(((after.weight != 0) & (before.weight == 0)).any())


@pytest.mark.parametrize("headroom", [1.0, 2.5, 100.0])
@pytest.mark.parametrize("layers", ["all", ["0", "3"], ["3"], ["3", "5"]], ids=str)
def test_in_all_layers_together_exactly_the_overall_count_stays(tmp_path, network, batches, layers, headroom):
    """Layers that were not to be pruned are trained and stay dense; they do not count, and the account covers them."""
    finish, chosen = replace(GLOBAL, headroom=headroom), NAMES if layers == "all" else layers
    result = nettrim.prune(
        network, batches, "magnitude", sparsity=Overall(0.8), layers=layers, finish=finish, out_dir=tmp_path / "run",
        **QUIET,
    )  # fmt: skip
    require_agreement(result, network, batches)
    size = sum(SIZES[name] for name in chosen)
    total = size - int(0.8 * size)
    assert sum(kept(result.model, name) for name in chosen) == total
    before = counts(result.layers)
    assert sum(before[name] for name in chosen) == min(size, round(headroom * total))
    assert result.ledger.finish["targets"] == total
    assert result.ledger.before.kept == min(size, round(headroom * total))
    for name in set(NAMES) - set(chosen):
        assert kept(result.model, name) == SIZES[name]
        assert not torch.equal(find_weight(result.model, name), find_weight(network, name))
    assert [record.name for record in result.ledger.records] == NAMES
    assert [record.name for record in result.ledger.before.records] == chosen
    assert nettrim.verify(tmp_path / "run").failures == ()


def test_by_name_distillation_chooses_where_a_number_was_asked_for(network, batches):
    def said(**amount: Any) -> tuple[str, Any]:
        ledger = nettrim.prune(network, batches, **amount, finish="distill", **QUIET).ledger
        return ledger.finish["settings"], ledger.finish["targets"]

    assert said(epsilon=0.3) == (repr(Distill()), None)
    assert said(method="magnitude", sparsity=Pattern(1, 2)) == (repr(Distill()), None)
    assert said(method="l-obs", tolerance=0.5) == (repr(Distill()), None)
    assert said(method="l-obs", kept=30) == (repr(Distill(choose="layer")), dict.fromkeys(NAMES, 30))
    assert said(method="l-obs", sparsity=Overall(0.9)) == (repr(Distill(choose="global")), 41)


@pytest.mark.parametrize("finish", [None, FIXED, TUNE, LAYER], ids=["none", "distill", "fine-tune", "layer"])
def test_an_overall_split_is_the_final_one_unless_all_layers_compete(network, batches, finish):
    split = nettrim.prune(network, batches, "magnitude", sparsity=Overall(0.8), **QUIET)
    result = nettrim.prune(network, batches, "magnitude", sparsity=Overall(0.8), finish=finish, **QUIET)
    assert counts(result.final) == counts(split.final)
    assert result.ledger.kept == 402 - int(0.8 * 402)
    assert result.settings["targets"] == (counts(split.final) if finish is LAYER else None)
    times = 3 if finish is LAYER else 1
    assert counts(result.layers) == {n: min(SIZES[n], times * k) for n, k in counts(split.final).items()}


@pytest.mark.parametrize("layers", [["0"], ["3"], ["5"], ["0", "5"]], ids=str)
@pytest.mark.parametrize("schedule", ["parallel", "cascade"])
@pytest.mark.parametrize("method", ["net-trim", "magnitude"])
def test_bounds_hold_where_layers_that_stay_dense_are_trained(
    tmp_path, network, batches, held_out, layers, schedule, method
):
    amount = {"epsilon": 0.2} if method == "net-trim" else {"sparsity": 0.6}
    given = dict(amount, schedule=schedule, layers=layers, held_out=held_out, finish=replace(FIXED, learning_rate=0.05))
    result = nettrim.prune(network, batches, method, out_dir=tmp_path / "run", **given, **QUIET)
    require_agreement(result, network, batches)
    assert [record.name for record in result.ledger.records] == NAMES
    assert [layer.pruned for layer in result.layers] == [name in layers for name in NAMES]
    # no theorem of the pruned weights is said of these
    assert not {"paper", "cascade", "cascade product"} & set(result.ledger.bounds)
    dense, pruned = double_outputs(network, held_out), double_outputs(result.model, held_out)
    assert result.ledger.held_out == pytest.approx(float((pruned - dense).norm() / dense.norm()), rel=1e-9)
    assert nettrim.verify(tmp_path / "run").failures == ()


@pytest.mark.parametrize("kind", ["double", "no bias, last ReLU"])
def test_other_networks(tmp_path, batches, kind):
    if kind == "double":
        model: nn.Module = nn.Sequential(nn.Flatten(), nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 4)).double()
    else:
        model = nn.Sequential(nn.Linear(12, 8, bias=False), nn.ReLU(), nn.Linear(8, 4), nn.ReLU())
    result = nettrim.prune(
        model, batches, "l-obs", sparsity=0.5, finish=replace(LAYER, loss="mse"), out_dir=tmp_path / "run", **QUIET
    )
    require_agreement(result, model, batches)
    assert {name: kept(result.model, name) for name in result.masks} == result.settings["targets"]
    assert nettrim.verify(tmp_path / "run").failures == ()
    back = nettrim.load_result(tmp_path / "run").model
    torch.testing.assert_close(double_outputs(back, batches), double_outputs(result.model, batches))


def test_one_output_is_distilled_by_its_squared_error(network, batches):
    model = nn.Sequential(nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 1))
    result = nettrim.prune(model, batches, "magnitude", sparsity=0.5, finish=Distill(epochs=3, loss="mse"), **QUIET)
    require_agreement(result, model, batches)


def test_a_network_of_which_nothing_is_left_stays_zero(network, batches):
    result = nettrim.prune(network, batches, epsilon=1.0, schedule="parallel", finish=FIXED, **QUIET)
    assert result.ledger.kept == result.ledger.before.kept == 0
    require_agreement(result, network, batches)
    # biases are all that it has, and they are trained
    assert not torch.equal(result.model[5].bias, result.layers[2].bias)


@pytest.mark.parametrize("finish", [LAYER, GLOBAL], ids=["layer", "global"])
def test_weights_that_were_zero_from_the_start_are_not_asked_for(tmp_path, network, batches, finish):
    with torch.no_grad():
        network[0].weight[:, :8] = 0.0
    amount = {"sparsity": 0.2} if finish is LAYER else {"sparsity": Overall(0.1)}
    result = nettrim.prune(network, batches, "magnitude", **amount, finish=finish, out_dir=tmp_path / "run", **QUIET)
    require_agreement(result, network, batches)
    assert kept(result.model, "0") == 64  # of 154, or so, that may stay
    assert nettrim.verify(tmp_path / "run").failures == ()


class Gated(nn.Module):
    """Two inputs, one of them by keyword alone; what it returns branches and joins again."""

    def __init__(self) -> None:
        super().__init__()
        self.value, self.gate = nn.Linear(12, 9), nn.Linear(12, 9)
        self.out = nn.Linear(9, 4)

    def forward(self, x: Tensor, *, mask: Tensor) -> Tensor:
        return self.out(self.value(x).relu() * self.gate(x * mask).sigmoid())


@pytest.mark.parametrize("finish", [FIXED, LAYER, GLOBAL], ids=["distill", "layer", "global"])
def test_networks_of_several_inputs_are_trained_on(tmp_path, finish):
    model, x = Gated(), torch.randn(60, 12)
    batches = [{"x": x, "mask": (torch.rand(60, 12) > 0.3).float()}]
    sparsity: Any = Overall(0.5) if finish is GLOBAL else 0.5
    given = dict(method="magnitude", sparsity=sparsity, out_dir=tmp_path / "run", **QUIET)
    result = nettrim.prune(model, batches, finish=finish, **given)
    assert list(result.masks) == ["value", "gate", "out"]
    assert sum(kept(result.model, name) for name in result.masks) == (2 * 108 + 36) / 2
    with torch.no_grad():
        before, after = (copy.deepcopy(m).double()(*(), **{k: v.double() for k, v in batches[0].items()})
                         for m in (model, result.model))  # fmt: skip
    assert result.ledger.measured == pytest.approx(float((after - before).norm()), rel=1e-9)
    assert all(result.ledger.measured <= bound * (1 + 1e-9) for bound in result.ledger.bounds.values())
    assert nettrim.verify(tmp_path / "run").failures == ()


@pytest.mark.parametrize("labelled", [False, True])
@pytest.mark.parametrize("length", [1, 7])
def test_sequences_are_trained_on(tmp_path, network, length, labelled):
    """One row of them becomes (1, 7, 5): every position has scores and, with labels, a class."""
    x, labels = torch.randn(20, length, 12), torch.randint(0, 5, (20, length))
    batches = [(x, labels)] if labelled else [x]
    result = nettrim.prune(
        network, batches, "magnitude", sparsity=0.5, finish=TUNE if labelled else FIXED, out_dir=tmp_path / "run",
        **QUIET,
    )  # fmt: skip
    require_agreement(result, network, [(x, labels)])
    assert result.ledger.finish["samples"] == 20
    assert ("calibration" in result.ledger.accuracy) == labelled
    assert nettrim.verify(tmp_path / "run").failures == ()


# what is left alone --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("finish", [FIXED, TUNE, GLOBAL], ids=["distill", "fine-tune", "global"])
def test_the_dense_model_and_the_random_numbers_are_left_alone(network, batches, finish):
    network[3].requires_grad_(False)
    network[1].eval()
    network[0].weight.grad = torch.full((16, 12), 7.0)
    state = copy.deepcopy(network.state_dict())
    training = [module.training for module in network.modules()]
    inputs = [x.clone() for x, _ in batches]
    torch.manual_seed(11)
    drawing = torch.get_rng_state()
    nettrim.prune(network, batches, "magnitude", sparsity=Overall(0.5), finish=finish, **QUIET)
    assert torch.equal(torch.get_rng_state(), drawing)
    assert all(torch.equal(state[key], value) for key, value in network.state_dict().items())
    assert [module.training for module in network.modules()] == training
    assert [p.requires_grad for p in network.parameters()] == [True, True, False, False, True, True]
    assert torch.equal(network[0].weight.grad, torch.full((16, 12), 7.0))
    assert all(p.grad is None for p in list(network.parameters())[1:])
    assert all(not module._forward_hooks for module in network.modules())
    assert all(torch.equal(x, before) for (x, _), before in zip(batches, inputs, strict=True))


@pytest.mark.parametrize("finish", [FIXED, TUNE, LAYER, GLOBAL], ids=["distill", "fine-tune", "layer", "global"])
def test_the_seed_decides_everything(network, batches, finish):
    def run(seed: int) -> Any:
        torch.rand(seed + 1)  # what was drawn before makes no difference
        return nettrim.prune(network, batches, "magnitude", sparsity=Overall(0.7), finish=finish, seed=seed, **QUIET)

    first, again, other = run(0), run(0), run(1)
    assert same_weights(first.model, again.model)
    assert timeless(first.ledger.as_dict()) == timeless(again.ledger.as_dict())
    assert not same_weights(first.model, other.model)


@dataclass(frozen=True)
class Spy:
    """Notes what it is handed and trains as another does."""

    inner: Any
    seen: Any
    name: str = "spy"

    @property
    def choose(self) -> str:
        return self.inner.choose

    @property
    def headroom(self) -> float:
        return self.inner.headroom

    def run(self, model, teacher, inputs, labels, masks, targets, seed, progress, traced) -> Finished:
        given = dict(model=model, teacher=teacher, labels=labels, masks=masks, targets=targets)
        self.seen.append(copy.deepcopy(given) | dict(inputs=inputs, seed=seed, progress=progress, traced=traced))
        done = self.inner.run(model, teacher, inputs, labels, masks, targets, seed, progress, traced)
        with torch.no_grad():
            for parameter in teacher.parameters():
                parameter.zero_()
        model.requires_grad_(True).train()
        return done


@pytest.mark.parametrize("finish", [TUNE, GLOBAL], ids=["fine-tune", "global"])
def test_gradients_may_be_switched_off_around_it(network, batches, finish):
    def run() -> Any:
        return nettrim.prune(network, batches, "magnitude", sparsity=Overall(0.7), finish=finish, **QUIET)

    wanted = run()
    for off in (torch.no_grad(), torch.inference_mode()):
        with off:
            assert same_weights(run().model, wanted.model)


@pytest.mark.parametrize("labelled", [True, False])
def test_it_is_handed_the_calibration_samples_and_nothing_else(network, batches, held_out, labelled):
    spy = Spy(replace(LAYER, headroom=2.0), [])
    given = batches if labelled else [x for x, _ in batches]
    result = nettrim.prune(network, given, "magnitude", kept=20, held_out=held_out, finish=spy, seed=5, **QUIET)
    (seen,) = spy.seen
    assert torch.equal(torch.cat([batch.inputs[0] for batch in seen["inputs"]]), torch.cat([x for x, _ in batches]))
    assert seen["inputs"].rows == 60
    assert list(seen["traced"].graph.names) == NAMES
    assert torch.equal(seen["traced"].state["0.weight"], network[0].weight.double())
    assert torch.equal(seen["labels"], torch.cat([y for _, y in batches])) if labelled else seen["labels"] is None
    assert (seen["seed"], seen["progress"]) == (5, False)
    assert seen["targets"] == dict.fromkeys(NAMES, 20)
    assert same_weights(seen["teacher"], network)
    for layer in result.layers:
        assert torch.equal(seen["masks"][layer.name], layer.weight != 0)
        assert torch.equal(find_weight(seen["model"], layer.name), layer.weight)
    assert {name: int(mask.sum()) for name, mask in seen["masks"].items()} == dict.fromkeys(NAMES, 40)
    require_agreement(result, network, batches)
    # the teacher is a copy too: its owner's network and the account are as they were
    assert float(double_outputs(network, batches).norm()) == pytest.approx(result.ledger.output_norm)
    assert result.ledger.finish["kind"] == "spy"
    assert ledger_table(result.ledger).startswith("magnitude, cascade, then spy: 3 epochs in ")


@pytest.mark.parametrize("finish", [TUNE, FIXED], ids=["fine-tune", "distill"])
def test_held_out_samples_make_no_difference_to_the_weights(network, batches, held_out, finish):
    runs = [
        nettrim.prune(network, batches, "magnitude", sparsity=0.7, held_out=held, finish=finish, **QUIET)
        for held in (None, held_out, [(5 - held_out[0][0], held_out[0][1])])
    ]
    assert same_weights(runs[0].model, runs[1].model)
    assert same_weights(runs[0].model, runs[2].model)


def test_fine_tuning_learns_from_the_labels_and_says_so():
    x = torch.randn(600, 10, generator=torch.Generator().manual_seed(1))
    y = (x[:, :3] + 0.5 * x[:, 3:6] * x[:, 6:9]).argmax(1)
    model = nn.Sequential(nn.Linear(10, 24), nn.ReLU(), nn.Linear(24, 3))
    train(model, x[:400], y[:400], epochs=40, learning_rate=0.01)
    given = dict(method="magnitude", sparsity=0.8, held_out=[(x[400:], y[400:])], **QUIET)
    finish = FineTune(epochs=30, learning_rate=0.02, batch_size=32)
    ledger = nettrim.prune(model, [(x[:400], y[:400])], finish=finish, **given).ledger
    for split, samples, labels in (("calibration", x[:400], y[:400]), ("held-out", x[400:], y[400:])):
        found = ledger.accuracy[split]
        with torch.no_grad():
            assert found["dense"] == float((model(samples).argmax(1) == labels).double().mean())
        assert found["pruned"] > ledger.before.accuracy[split]["pruned"] + 0.1
    assert ledger.finish["labels"] is True
    # with other labels it learns something else, and distilling reads none
    wrong = [(x[:400], (y[:400] + 1) % 3)]
    assert nettrim.prune(model, wrong, finish=finish, **given).ledger.accuracy["held-out"]["pruned"] < 0.3
    first, second, third = (
        nettrim.prune(model, samples, finish=FIXED, **given)
        for samples in (wrong, [(x[:400], y[:400])], [x[:400]])
    )  # fmt: skip
    assert same_weights(first.model, second.model)
    assert same_weights(first.model, third.model)
    assert first.ledger.finish["labels"] is False


def test_distilling_nears_the_dense_network(network, batches):
    ledger = nettrim.prune(network, batches, "magnitude", sparsity=0.6, finish=Distill(epochs=60), **QUIET).ledger
    assert ledger.measured < 0.7 * ledger.before.measured
    assert ledger.output_norm == ledger.before.output_norm


# what is refused -----------------------------------------------------------------------------------------------------


class Halfway:
    """Runs, and says neither what it is nor what it chooses."""

    def run(self) -> None:
        """Do nothing."""


@dataclass(frozen=True)
class OnlySparsity:
    """A method that knows no `kept`."""

    name: str = "only"
    amounts: tuple[str, ...] = ("sparsity",)

    def prune_layer(self, task: Any) -> Any:
        raise AssertionError("work was started")


X = torch.ones(4, 12)
CLASSES = torch.tensor([0, 1, 2, 5])


def at(**given: Any) -> dict[str, Any]:
    return {"method": "magnitude", "sparsity": 0.5} | given


def on(*batches: Any, finish: Any = FIXED) -> dict[str, Any]:
    return at(batches=list(batches), finish=finish)


NAMES_OF_NONE = {
    "name": (at(finish="retrain"), UnknownNameError, "finish='retrain' is unknown: use distill or fine-tune"),
    "empty name": (at(finish=""), UnknownNameError, "finish='' is unknown"),
    "class": (at(finish=Distill), ProblemError, "finish is the class Distill: use .* Distill()"),
    "number": (at(finish=3), ProblemError, "finish is a int"),
    "true": (at(finish=True), ProblemError, "finish is a bool"),
    "half an object": (at(finish=Halfway()), ProblemError, "finish is a Halfway"),
}
CHOICES_OF_NOTHING = {
    "no number": ({"epsilon": 0.1, "finish": LAYER}, UnsupportedError, r"finish chooses weights \(layer\) and epsilon"),
    "of all": ({"lam": 0.1, "finish": GLOBAL}, UnsupportedError, r"finish chooses weights \(global\) and lam"),
    "tolerance": ({"method": "obs", "tolerance": 1.0, "finish": LAYER}, UnsupportedError, "tolerance says no number"),
    "pattern": (at(sparsity=Pattern(1, 2), finish=LAYER), UnsupportedError, "pattern says no number"),
    "sparsity alone": (at(method=OnlySparsity(), finish="distill"), UnsupportedError, "method must take kept"),
}
DATA = {
    "no labels": (on(X, finish="fine-tune"), ProblemError, "finish='fine-tune' needs labels in batches"),
    "float labels": (on((X, torch.rand(4)), finish=TUNE), ProblemError, "labels are torch.float32"),
    "label rows": (on((X, torch.ones(4, 5).long()), finish=TUNE), ProblemError, r"pass labels of shape \(4,\)"),
    "no such class": (on((X, CLASSES), finish=TUNE), ProblemError, "labels lie in 0 ... 5"),
    "two inputs": (on({"x": X, "mask": X}), ProblemError, "fails on batches.*keyword argument 'mask'"),
    "by keyword": (on({"input_ids": X}), ProblemError, "fails on batches.*keyword argument 'input_ids'"),
    "second batch": (on(X, {"x": X, "y": X}), ProblemError, "give all batches the same inputs"),
    "two shapes": (on(X, torch.ones(4, 1, 12)), ProblemError, "give all samples one shape"),
    "one row": (on(X[:1], finish="distill"), ProblemError, "validation=0.1 of 1 rows"),
    "nearly all held": (at(finish=FineTune(validation=0.99)), ProblemError, "validation=0.99 of 60 rows"),
    "width": (on(torch.ones(4, 11)), ProblemError, "fails on batches"),
}
SHARE = Overall(0.5)
OVERALL = {
    "and kept": (
        at(sparsity=SHARE, kept=5),
        ProblemError,
        "exactly one amount: .*Overall.* and kept were given",
    ),
    "and two": (at(sparsity=SHARE, lam=1.0, epsilon=0.1), ProblemError, "epsilon, lam were given"),
    "no counts": (at(sparsity=SHARE, method=OnlySparsity()), UnsupportedError, "sparsity=Overall"),
    "too few": (at(sparsity=Overall(0.999)), ProblemError, "leaves 1 weights for 3 layers"),
    "of a layer": (at(sparsity=dict.fromkeys(NAMES, SHARE)), ProblemError, "sparsity=Overall"),
}
REFUSALS = {
    f"{what}: {key}": case
    for what, cases in (("name", NAMES_OF_NONE), ("choice", CHOICES_OF_NOTHING), ("data", DATA), ("overall", OVERALL))
    for key, case in cases.items()
}


@pytest.mark.parametrize(("given", "error", "said"), REFUSALS.values(), ids=REFUSALS)
def test_refused_in_one_sentence_before_any_work(tmp_path, network, batches, monkeypatch, given, error, said):
    no_pruning(monkeypatch)
    with pytest.raises(error, match=said) as caught:
        nettrim.prune(network, **{"batches": batches, "out_dir": tmp_path / "run"} | given, **QUIET)
    assert isinstance(caught.value, NetTrimError)
    assert len(str(caught.value).splitlines()) == 1
    assert not (tmp_path / "run").exists()


def test_one_output_is_refused_by_name_before_any_work(tmp_path, monkeypatch):
    no_pruning(monkeypatch)
    model = nn.Sequential(nn.Linear(12, 3), nn.ReLU(), nn.Linear(3, 1))
    with pytest.raises(ProblemError, match=r"finish='distill' compares classes .* use Distill\(loss='mse'\)"):
        nettrim.prune(model, [X], "magnitude", sparsity=0.5, finish="distill", out_dir=tmp_path / "run", **QUIET)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("share", [-0.1, 1.0, 1.5, float("nan"), float("inf"), "0.5", None, True])
def test_overall_is_a_fraction(share):
    with pytest.raises(ProblemError, match="Overall"):
        Overall(share)


@dataclass(frozen=True)
class Careless:
    """Brings pruned weights back, or leaves them all."""

    grows: bool
    name: str = "careless"
    choose: ClassVar[str] = "layer"
    headroom: ClassVar[float] = 2.0

    def run(self, model, teacher, inputs, labels, masks, targets, seed, progress, traced) -> Finished:
        if self.grows:
            find_weight(model, "3").data[~masks["3"]] = 0.5
        return Finished(dict(masks), (), (), 0, 0, 0.0)


@pytest.mark.parametrize(("grows", "said"), [(True, "3 has 120 weights back"), (False, "0 keeps 40 weights")])
def test_what_an_object_leaves_is_counted(network, batches, grows, said):
    with pytest.raises(ProblemError, match=f"finish='careless' is not what finishing may be: {said}"):
        nettrim.prune(network, batches, "magnitude", kept=20, finish=Careless(grows), **QUIET)


def test_what_oversteps_is_named(network, batches):
    result = nettrim.prune(network, batches, "magnitude", kept=20, layers=["0", "5"], **QUIET)
    layers = result.layers
    assert overstepped(layers, layers, None) == []
    assert overstepped(layers, layers, 40) == []
    assert overstepped(layers, layers, 39) == ["all together keeps 40 weights, and finishing was to leave 39"]
    assert overstepped(layers, layers, {"0": 20, "5": 20}) == []
    assert overstepped(layers, layers, {"0": 30, "5": 19}) == ["5 keeps 20 weights, and finishing was to leave 19"]
    full = [replace(layer, weight=layer.dense_weight) for layer in layers]
    assert overstepped(layers, full, None) == [
        "0 has 172 weights back that were pruned", "5 has 30 weights back that were pruned"
    ]  # fmt: skip


# what is printed and compared ----------------------------------------------------------------------------------------


def test_a_pruned_network_that_was_not_certified_is_not_hidden_by_training_on(network, batches):
    method = nettrim.NetTrim(solver=nettrim.Admm(max_iter=1), on_failure="return")
    given = dict(epsilon=0.05, layers=["0", "5"])
    merely, finished = (
        nettrim.prune(network, batches, method, **given, finish=finish, **QUIET).ledger for finish in (None, FIXED)
    )
    assert set(merely.uncertified) == {"0", "5"}
    assert finished.uncertified == finished.before.uncertified == merely.uncertified
    missed = ", ".join(f"{name} ({status})" for name, status in merely.uncertified.items())
    for ledger in (merely, finished):
        assert f"NOT certified within the tolerance: {missed}" in ledger_table(ledger)


def test_a_finished_row_of_a_comparison_says_what_its_method_did(network, batches):
    slow = nettrim.NetTrim(solver=nettrim.Admm(max_iter=1), on_failure="return", amounts=("sparsity", "kept"))
    found = compare(
        network, batches, [slow, "magnitude"], [Overall(0.8), 0.5], layers=["0", "3"], finish=(None, "distill"), **QUIET
    )
    assert [row.failure for row in found.rows] == [None] * 8
    pairs = list(zip(found.rows[::2], found.rows[1::2], strict=True))
    for merely, finished in pairs:
        assert (merely.finish, finished.finish) == (None, "distill")
        assert (merely.method, merely.budget) == (finished.method, finished.budget)
        # the method's own seconds, which would be none of the weights that came out
        assert finished.layer_seconds > 0
        assert finished.layer_seconds == sum(layer.seconds for layer in finished.layers)
        assert merely.kept == sum(layer.kept for layer in finished.layers if layer.name != "5")
    assert [row.budget for row in found.rows[::4]] == ["Overall(sparsity=0.8)", "0.5"]


def test_a_finished_row_of_what_was_not_certified_says_so(network, batches, monkeypatch):
    plain = nettrim.Magnitude.prune_layer

    def doubtful(self, task):
        found = plain(self, task)
        return replace(found, facts={"status": "TIME_LIMIT"} if task.name == "3" else {})

    monkeypatch.setattr(nettrim.Magnitude, "prune_layer", doubtful)
    (row,) = compare(network, batches, ["magnitude"], [0.5], finish="distill", **QUIET).rows
    assert [layer.certified for layer in row.layers] == [True, False, True]
    assert not row.certified


@pytest.mark.parametrize("finish", [[], (), Distill(), [Distill()], ["distill", 3], 3, {"distill": 1}], ids=str)
def test_a_comparison_finishes_by_name_alone(network, batches, finish):
    with pytest.raises(ProblemError, match="finish is"):
        compare(network, batches, ["magnitude"], [0.5], finish=finish, **QUIET)


@pytest.mark.parametrize("finish", [("distill", "distill"), (None, None)])
def test_a_comparison_finishes_each_row_once(network, batches, finish):
    with pytest.raises(ProblemError, match="asked for twice"):
        compare(network, batches, ["magnitude"], [0.5], finish=finish, **QUIET)
