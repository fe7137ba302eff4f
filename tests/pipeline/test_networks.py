"""Real architectures, small, end to end: what is found in them, what comes out, whether the account of it is true."""

from __future__ import annotations

from functools import cache

import pytest
import torch
import torch.nn.functional as F
from networks import MAKERS, assert_bounds_hold, batches_of, call, network_of, seen

import nettrim
from nettrim.errors import UnsupportedError

SCHEDULES = ("parallel", "cascade")
TRIM = nettrim.NetTrim(tol=1e-2, on_failure="return")
RUNS = {
    # a weight within the radius is all that is asked for here, not the least one
    "dense": (nettrim.NetTrim(solver=nettrim.Admm(max_iter=1000), tol=0.1, on_failure="return"), {"epsilon": 1e-4}),
    "net-trim": (TRIM, {"epsilon": 0.1}),
    "alps": ("alps", {"sparsity": 0.5}),
}
DECODER = "model.decoder.layers.0."

#: what is to be found in each network, in execution order, and whether its output is compared behind a ReLU
LAYERS = {
    "lenet5": {"0": "relu", "3": "relu", "7": "relu", "9": "relu", "11": "linear"},
    "vgg": {"0": "relu", "3": "relu", "7": "relu", "12": "relu", "16": "linear"},
    "resnet": {
        "0": "relu",
        "4.conv1": "relu",
        "4.conv2": "linear",  # the addition comes before the ReLU
        "5.downsample.0": "linear",
        "5.conv1": "relu",
        "5.conv2": "linear",
        "8": "linear",
    },
    "pre-activation": {"stem": "linear", "one": "relu", "two": "linear", "head": "linear"},
    "mobilenet": {"0": "relu", "3": "relu", "6": "relu", "9": "linear", "12": "linear", "16": "linear"},
    "conv1d": {"0": "relu", "2": "relu", "7": "linear"},
    "branches": {"stem": "relu", "left": "relu", "right": "linear", "head": "linear"},
    "encoder": {
        "self_attn.in_proj_weight": "linear",
        "self_attn.out_proj": "linear",
        "linear1": "relu",
        "linear2": "linear",
    },
    "attention": {"q": "linear", "k": "linear", "v": "linear", "out": "linear", "up": "relu", "down": "linear"},
    "flow": {"steps.0": "relu", "steps.1": "relu", "steps.2": "linear", "wide": "relu", "last": "linear"},
    "opt": {
        DECODER + "self_attn.q_proj": "linear",
        DECODER + "self_attn.k_proj": "linear",
        DECODER + "self_attn.v_proj": "linear",
        DECODER + "self_attn.out_proj": "linear",
        DECODER + "fc1": "relu",
        DECODER + "fc2": "linear",
    },
}

#: the module that hands on what a layer and its batch norm give, where it is another
GIVES = {
    "vgg": {"0": "1", "3": "4", "7": "8", "12": "13"},
    "resnet": {
        "0": "1",
        "4.conv1": "4.bn1",
        "4.conv2": "4.bn2",
        "5.downsample.0": "5.downsample.1",
        "5.conv1": "5.bn1",
        "5.conv2": "5.bn2",
    },
    "mobilenet": {"0": "1", "3": "4", "6": "7", "9": "10", "12": "13"},
    "conv1d": {"2": "3"},
    "encoder": {"self_attn.out_proj": "self_attn"},
}

each = pytest.mark.parametrize("name", MAKERS)
both = pytest.mark.parametrize("schedule", SCHEDULES)
real = pytest.mark.parametrize("run", ["net-trim", "alps"])


@cache
def pruned(name, schedule, run):
    """One result serves all that is asked of it."""
    method, amount = RUNS[run]
    unsupported = "keep" if name == "opt" else "refuse"
    return nettrim.prune(
        network_of(name), batches_of(name), method, **amount,
        schedule=schedule, on_unsupported=unsupported, progress=False,
    )  # fmt: skip


def distance(a, b):
    return float((a.double() - b.double()).norm())


def layer_outputs(model, name):
    """What every layer hands on, its batch norm and its ReLU included."""
    modules = {layer: GIVES.get(name, {}).get(layer, layer) for layer in LAYERS[name]}
    packed = modules.pop("self_attn.in_proj_weight", None)
    found = seen(model, batches_of(name), list(modules.values()))
    values = {layer: found[module] for layer, module in modules.items()}
    if packed is not None:
        # no module gives it: three projections in one, and their input is the network's
        attention = model.self_attn
        x = torch.cat(batches_of(name)).double()
        weight, bias = (tensor.detach().double() for tensor in (attention.in_proj_weight, attention.in_proj_bias))
        values[packed] = F.linear(x, weight, bias)
    return {layer: value.clamp(min=0) if LAYERS[name][layer] == "relu" else value for layer, value in values.items()}


@each
@both
def test_the_layers_and_their_forms_are_found(name, schedule):
    result = pruned(name, schedule, "net-trim")
    forms = {"relu": "ball", "linear": "linear"}
    found = [(record.name, record.facts["form"]) for record in result.ledger.records]
    assert found == [(layer, forms[form]) for layer, form in LAYERS[name].items()]
    weights = dict(network_of(name).named_parameters())
    for record in result.ledger.records:
        weight = weights.get(f"{record.name}.weight", weights.get(record.name))
        assert result.masks[record.name].shape == weight.shape
        # a sample meets a layer at every position of its output
        assert record.total_rows * len(weight) == layer_outputs(network_of(name), name)[record.name].numel()


@each
@both
def test_next_to_no_tolerance_gives_the_dense_outputs(name, schedule):
    result = pruned(name, schedule, "dense")
    dense, found = (call(model, batches_of(name), torch.float32) for model in (network_of(name), result.model))
    assert distance(found, dense) <= 1e-3 * float(dense.double().norm())


@each
@both
@real
def test_no_error_exceeds_a_bound(name, schedule, run):
    ledger = pruned(name, schedule, run).ledger
    assert_bounds_hold(ledger)
    # and every bound is there: nothing on the way is of unknown gain
    own = {"parallel": {"paper"}, "cascade": {"paper", "cascade", "cascade product"}}[schedule]
    expected = {"operator", "l-obs", "l-obs spectral"} | (own if run == "net-trim" else set())
    assert ledger.unbounded is None
    assert set(ledger.bounds) == expected | {"telescoped"}
    assert all(set(record.bounds) == expected for record in ledger.records)


@each
@both
@real
def test_the_measured_error_is_what_the_returned_model_does(name, schedule, run):
    result = pruned(name, schedule, run)
    dense, found = (call(model, batches_of(name)) for model in (network_of(name), result.model))
    error = distance(found, dense)
    assert error > 1e-3 * float(dense.norm()), "nothing was pruned"
    assert result.ledger.measured == pytest.approx(error, rel=1e-9)
    assert result.ledger.output_norm == pytest.approx(float(dense.norm()), rel=1e-9)


@each
@both
@real
def test_the_errors_of_layers_are_those_that_hooks_see(name, schedule, run):
    result = pruned(name, schedule, run)
    before, after = (layer_outputs(model, name) for model in (network_of(name), result.model))
    for record in result.ledger.records:
        assert record.target_norm == pytest.approx(float(before[record.name].norm()), rel=1e-9), record.name
        error = distance(after[record.name], before[record.name])
        assert record.network_error == pytest.approx(error, rel=1e-9), record.name


@each
@both
def test_a_saved_result_is_verified_and_computes_the_same(name, schedule, tmp_path):
    result = pruned(name, schedule, "net-trim")
    result.save(tmp_path / "run")
    checked = nettrim.verify(tmp_path / "run")
    assert checked.holds, checked.failures
    assert checked.state == "finished"
    outputs = call(result.model, batches_of(name), torch.float32)
    again = nettrim.load_result(tmp_path / "run", network_of(name))
    assert torch.equal(call(again.model, batches_of(name), torch.float32), outputs)
    # without its class: batch norms stay folded in, so sums are rounded in another order
    plain = nettrim.load_result(tmp_path / "run").model
    with torch.no_grad():
        found = torch.cat([plain(**b) if isinstance(b, dict) else plain(b) for b in batches_of(name)])
    assert distance(found, outputs) <= 1e-5 * float(outputs.norm())
    assert again.ledger.as_dict() == result.ledger.as_dict()


@both
def test_bounds_hold_where_programs_are_made_of_a_sample_of_the_rows(schedule, tmp_path):
    result = nettrim.prune(
        network_of("vgg"), batches_of("vgg"), TRIM, epsilon=0.1, schedule=schedule, rows=200, progress=False
    )
    ledger = result.ledger
    assert [record.rows for record in ledger.records] == [200, 200, 200, 60, 60]
    assert [record.total_rows for record in ledger.records] == [3840, 3840, 960, 60, 60]
    assert_bounds_hold(ledger)
    # the promise is of the sample: of all rows it bounds nothing, and nobody says so
    assert any(record.measured > record.promised for record in ledger.records[:3])
    assert all("cascade" not in record.bounds for record in ledger.records[:3])
    assert ("cascade" in ledger.bounds) == (schedule == "cascade")
    result.save(tmp_path / "run")
    checked = nettrim.verify(tmp_path / "run")
    assert checked.holds, checked.failures


def test_tied_weights_are_refused_by_name_and_kept_on_request():
    with pytest.raises(UnsupportedError, match=r"layer 'lm_head' shares its weight.*embed_tokens.*tied weights"):
        nettrim.prune(network_of("opt"), batches_of("opt"), TRIM, epsilon=0.1, progress=False)
    result = pruned("opt", "cascade", "net-trim")
    assert list(result.ledger.unsupported) == ["lm_head"]
    dense, found = network_of("opt").lm_head.weight, result.model.lm_head.weight
    assert torch.equal(found, dense)
    assert found is result.model.model.decoder.embed_tokens.weight, "tied no more"


def test_a_batch_that_takes_another_path_is_refused():
    x = torch.cat(batches_of("flow") * 2)
    with pytest.raises(UnsupportedError, match=r"batches\[1\].*hangs on the data"):
        nettrim.prune(network_of("flow"), [x, 1e3 * x], "alps", sparsity=0.5, progress=False)
