"""NetTrim asked for a number of weights: one layer's task, whole networks, and what a saved run can be held to."""

from __future__ import annotations

import copy
import hashlib
import json
import math
import shutil
import warnings
from dataclasses import replace

import pytest
import torch
from oracle import distance
from torch import nn

import nettrim
from nettrim.core.certificate import certify
from nettrim.errors import NetTrimError, ProblemError, UnsupportedError
from nettrim.methods.base import LayerTask
from nettrim.methods.masks import Pattern
from nettrim.methods.program import join_bias, layer_problem
from nettrim.pipeline import files

SIZES = {"0": 192, "3": 160, "5": 50}


def draw(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def task_of(seed=0, relu=True, bias=True, clean=True, amount="kept", value=30, dtype=torch.float32, **more):
    """A layer of 6 × 14 on 90 samples; in a cascade its inputs are not the dense network's own."""
    x = draw(seed, 90, 14) @ (torch.eye(14).double() + 0.4 * draw(seed + 1, 14, 14))
    w, b = draw(seed + 2, 6, 14), draw(seed + 3, 6) - 2.0
    outputs = x @ w.T + (b if bias else 0.0)
    if not clean:
        x = x + 0.2 * draw(seed + 4, 90, 14)
    return LayerTask("fc", relu, False, clean, w, b if bias else None, x, outputs, amount, value, dtype, **more)


def problem_of(task, result):
    """The program that the record describes, set up as `verify` does."""
    return layer_problem(result.facts, task.inputs, task.targets, task.weight, task.bias)


# ---- one layer


@pytest.mark.parametrize("route", ["refined", "reweighted"])
@pytest.mark.parametrize("bias", ["free", "frozen", "absent"])
@pytest.mark.parametrize("relu", [True, False])
@pytest.mark.parametrize("clean", [True, False])
@pytest.mark.parametrize("kept", [1, 30])
def test_a_layer_keeps_its_count_and_its_record_is_true(route, bias, relu, clean, kept):
    task = task_of(relu=relu, bias=bias != "absent", clean=clean, value=kept)
    method = nettrim.NetTrim(bias="frozen" if bias == "frozen" else "free", route=route, on_failure="raise")
    result = method.prune_layer(task)
    assert int((result.weight != 0).sum()) == kept
    assert torch.equal(result.weight.float().double(), result.weight.double())
    if bias == "absent":
        assert result.bias is None
    else:
        assert torch.equal(result.bias, task.bias) == (bias == "frozen")
    facts = json.loads(json.dumps(result.facts, allow_nan=False))
    assert facts["status"] == "REFINED"
    assert facts["kept"] == kept
    assert facts["bias"] == bias
    assert facts["form"] == ("ball" if relu else "linear")
    joined = join_bias(result.weight, result.bias, bias)
    reached = distance(problem_of(task, result), joined)
    assert facts["radius"] == pytest.approx(max(reached, facts["floor"]), rel=1e-9)
    found = certify(problem_of(task, result), joined, result.multipliers)
    assert found.violation <= 1e-9
    assert 0 <= found.lower_bound <= found.objective
    # what is promised holds: the error after the ReLU is at most the radius
    z = task.inputs @ result.weight.double().T + (0.0 if result.bias is None else result.bias.double())
    error = (z.clamp(min=0) if relu else z) - task.targets
    assert float(error.norm()) <= facts["radius"] * (1 + 1e-9)


@pytest.mark.parametrize("route", ["refined", "reweighted"])
@pytest.mark.parametrize("relu", [True, False])
def test_keeping_everything_is_the_best_fit_there_is(route, relu):
    """In a cascade the dense weights are not; nothing comes nearer than a fit of all weights and the bias."""
    task = task_of(relu=relu, clean=False, value=84, dtype=torch.float64)
    result = nettrim.NetTrim(route=route, evidence=False).prune_layer(task)
    x = torch.cat([task.inputs, torch.ones(90, 1).double()], 1)
    best = torch.linalg.lstsq(x, task.targets).solution
    if not relu:
        torch.testing.assert_close(result.weight, best[:14].T, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(result.bias, best[14], rtol=1e-4, atol=1e-5)
    assert result.facts["radius"] <= float((x @ best - task.targets).norm()) * (1 + 1e-6)
    assert result.facts["radius"] <= result.facts["drift"]
    assert int((result.weight != 0).sum()) == 84


@pytest.mark.parametrize(("sparsity", "kept"), [(0.0, 84), (0.5, 42), (0.9, 9), (0.98, 2)])
def test_a_sparsity_is_the_count_that_it_says(sparsity, kept):
    result = nettrim.NetTrim(evidence=False).prune_layer(task_of(amount="sparsity", value=sparsity))
    assert int((result.weight != 0).sum()) == kept
    assert result.facts["sparsity"] == sparsity


def test_without_evidence_nothing_is_solved(monkeypatch):
    task = task_of()
    with_evidence = nettrim.NetTrim().prune_layer(task)

    def fail(*_args, **_kwargs):
        raise AssertionError("a program was solved")

    monkeypatch.setattr("nettrim.methods.net_trim.solve_problem", fail)
    result = nettrim.NetTrim(evidence=False).prune_layer(task)
    assert result.multipliers is None
    assert torch.equal(result.weight, with_evidence.weight)
    assert result.facts["radius"] == with_evidence.facts["radius"]
    assert "bound_status" not in result.facts
    assert with_evidence.facts["bound_status"] == "SOLVED"


def test_importance_moves_the_error_to_where_it_costs_less():
    plain = task_of(value=25)
    metric = torch.diag(torch.tensor([1e3, 1.0, 1.0, 1.0, 1.0, 1.0], dtype=torch.float64))
    weighed = replace(plain, importance=metric)
    errors = []
    for task in (plain, weighed):
        result = nettrim.NetTrim(evidence=False).prune_layer(task)
        z = task.inputs @ result.weight.double().T + result.bias.double()
        errors.append((z.clamp(min=0) - task.targets).norm(dim=0))
    assert float(errors[1][0]) < 0.5 * float(errors[0][0])
    assert float(errors[1].norm()) > float(errors[0].norm())


def test_importance_that_is_all_zero_is_none_at_all():
    """The layers behind read nothing of this one: then all its neurons count the same, and the count still holds."""
    plain = task_of()
    zero = replace(plain, importance=torch.zeros(6, 6, dtype=torch.float64))
    one, two = (nettrim.NetTrim(evidence=False).prune_layer(task) for task in (plain, zero))
    assert torch.equal(one.weight, two.weight)


def test_swaps_do_not_cost():
    task = task_of(value=20)
    radii = [nettrim.NetTrim(evidence=False, swaps=k).prune_layer(task).facts["radius"] for k in (0, 4)]
    assert radii[1] <= radii[0] * (1 + 1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_weight_comes_in_the_models_own_precision(dtype):
    result = nettrim.NetTrim(evidence=False).prune_layer(task_of(dtype=dtype))
    assert torch.equal(result.weight.to(dtype).double(), result.weight.double())
    exact = nettrim.NetTrim(evidence=False).prune_layer(task_of(dtype=torch.float64))
    torch.testing.assert_close(result.weight.double(), exact.weight.double(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("route", ["refined", "reweighted"])
@pytest.mark.parametrize("dead", ["some", "all"])
def test_dead_inputs(bias, route, dead):
    """As behind units that were pruned away: nothing is divided by, and the count holds where weights can be told."""
    task = task_of(bias=bias, clean=False, value=20)
    inputs = task.inputs.clone()
    inputs[:, : 5 if dead == "some" else 14] = 0
    result = nettrim.NetTrim(route=route).prune_layer(replace(task, inputs=inputs))
    assert result.weight.isfinite().all()
    assert result.bias is None or result.bias.isfinite().all()
    assert int((result.weight != 0).sum()) <= 20
    if dead == "some":
        assert int((result.weight[:, 5:] != 0).sum()) == 20


def test_a_layer_that_never_fires_keeps_its_count():
    task = task_of()
    quiet = replace(task, bias=task.bias - 100.0, outputs=task.outputs - 100.0)
    for route in ("refined", "reweighted"):
        result = nettrim.NetTrim(route=route).prune_layer(quiet)
        z = quiet.inputs @ result.weight.double().T + result.bias.double()
        assert float(z.clamp(min=0).norm()) <= result.facts["radius"] * (1 + 1e-9)
        assert int((result.weight != 0).sum()) <= 30


REFUSED = {
    "half spaces": ({"form": "halfspace"}, "form='halfspace'"),
    "penalised bias": ({"bias": "penalised"}, "bias='penalised'"),
}


@pytest.mark.parametrize(("settings", "text"), REFUSED.values(), ids=REFUSED)
@pytest.mark.parametrize("amount", ["sparsity", "kept"])
def test_the_published_settings_have_no_count(network, batches, monkeypatch, tmp_path, settings, text, amount):
    value = {"sparsity": 0.5, "kept": 30}[amount]
    method = nettrim.NetTrim(**settings)
    with pytest.raises(UnsupportedError, match=f"needs NetTrim's form='ball' and bias='free' or 'frozen': .*{text}"):
        method.prune_layer(task_of(amount=amount, value=value))

    def fail(*_args, **_kwargs):
        raise RuntimeError("work was started")

    # before any work: nothing is recorded and nothing written
    monkeypatch.setattr("nettrim.pipeline.account.collect", fail)
    with pytest.raises(UnsupportedError, match=text):
        nettrim.prune(network, batches, method, out_dir=tmp_path / "run", progress=False, **{amount: value})
    assert not (tmp_path / "run").exists()
    # a radius is another matter
    with pytest.raises(RuntimeError, match="work was started"):
        nettrim.prune(network, batches, method, epsilon=0.1, progress=False)


def test_a_penalised_bias_is_no_matter_where_there_is_none(batches):
    model = nn.Sequential(nn.Linear(12, 6, bias=False), nn.ReLU(), nn.Linear(6, 5, bias=False))
    method = nettrim.NetTrim(bias="penalised", evidence=False)
    result = nettrim.prune(model, batches, method, sparsity=0.5, progress=False)
    assert result.ledger.kept == 51


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"route": "shortest"}, "route='shortest'"),
        ({"swaps": -1}, "swaps=-1"),
        ({"swaps": 1.5}, "swaps=1.5"),
        ({"swaps": True}, "swaps=True"),
    ],
)
def test_settings_out_of_range_are_refused(settings, text):
    with pytest.raises(ProblemError, match=text):
        nettrim.NetTrim(**settings)


# ---- whole networks


@pytest.mark.parametrize("schedule", ["cascade", "parallel"])
@pytest.mark.parametrize(("route", "bias"), [("refined", "free"), ("refined", "frozen"), ("reweighted", "free")])
def test_a_networks_layers_keep_their_counts_and_the_account_agrees(network, batches, held_out, schedule, route, bias):
    method = nettrim.NetTrim(route=route, bias=bias)
    result = nettrim.prune(network, batches, method, sparsity=0.7, schedule=schedule, held_out=held_out, progress=False)
    for record in result.ledger.records:
        weight = result.model.get_submodule(record.name).weight
        assert record.kept == int((weight != 0).sum()) == SIZES[record.name] - int(0.7 * SIZES[record.name] + 1e-9)
        assert record.measured <= record.promised * (1 + 1e-9)
        assert 0 <= record.lower_bound <= record.objective
        assert record.gap == pytest.approx((record.objective - record.lower_bound) / record.objective)
        assert record.violation <= 1e-6
        assert record.facts["status"] == "REFINED"
        assert 0 <= record.facts["nearest"] <= record.facts["radius"] * (1 + 1e-9)
    assert result.ledger.measured <= result.ledger.bound * (1 + 1e-9)
    same = [torch.equal(result.model[i].bias, network[i].bias) for i in (0, 3, 5)]
    assert same == [bias == "frozen"] * 3


def test_the_last_distance_of_a_cascade_is_the_guarantee(network, batches):
    ledger = nettrim.prune(network, batches, sparsity=0.6, progress=False).ledger
    assert ledger.bounds["cascade"] == pytest.approx(ledger.records[-1].facts["radius"], rel=1e-6)
    assert ledger.measured <= ledger.bounds["cascade"] * (1 + 1e-9)


def test_counts_and_sparsities_of_single_layers(network, batches):
    counts = {"5": 7, "0": 33, "3": 160}
    result = nettrim.prune(network, batches, kept=counts, progress=False)
    assert {record.name: record.kept for record in result.ledger.records} == counts
    other = nettrim.prune(network, batches, sparsity={"0": 0.5, "3": 0.0}, layers=["0", "3"], progress=False)
    assert [record.kept for record in other.ledger.records] == [96, 160]
    assert torch.equal(other.model[5].weight, network[5].weight)


@pytest.mark.parametrize("schedule", ["cascade", "parallel"])
def test_one_weight_a_layer_is_still_a_network(network, batches, schedule):
    """So sparse that units behind may read nothing: no metric, no division, no NaN."""
    result = nettrim.prune(network, batches, kept=1, schedule=schedule, progress=False)
    assert [record.kept for record in result.ledger.records] == [1, 1, 1]
    assert all(p.isfinite().all() for p in result.model.parameters())
    assert result.ledger.measured <= result.ledger.output_norm
    assert result.ledger.measured <= result.ledger.bound * (1 + 1e-9)


def test_a_network_whose_pruned_layers_read_a_dead_unit(batches):
    """The last layer's one weight reads a unit that never fires: an error before it costs nothing at the output."""
    model = nn.Sequential(nn.Linear(12, 3), nn.ReLU(), nn.Linear(3, 2), nn.ReLU(), nn.Linear(2, 2))
    with torch.no_grad():
        model[2].weight.zero_()
        model[2].bias.copy_(torch.tensor([-1.0, -2.0]))
    result = nettrim.prune(model, batches, kept={"0": 5, "2": 1, "4": 1}, progress=False)
    assert result.ledger.records[0].kept == 5
    assert result.ledger.measured <= 1e-6


NETWORKS = {
    "without biases": lambda: nn.Sequential(nn.Linear(12, 8, bias=False), nn.ReLU(), nn.Linear(8, 5, bias=False)),
    "one bias": lambda: nn.Sequential(nn.Linear(12, 8, bias=False), nn.ReLU(), nn.Linear(8, 5)),
    "ends in a relu": lambda: nn.Sequential(nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 5), nn.ReLU()),
    "in place": lambda: nn.Sequential(nn.Linear(12, 8), nn.ReLU(True), nn.Linear(8, 5), nn.ReLU(True)),
    "one layer": lambda: nn.Sequential(nn.Linear(12, 5)),
    "one layer and a relu": lambda: nn.Sequential(nn.Linear(12, 5), nn.ReLU()),
    "one output": lambda: nn.Sequential(nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 1)),
    "forty outputs": lambda: nn.Sequential(nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 40)),
    "no relu between": lambda: nn.Sequential(nn.Linear(12, 8), nn.Linear(8, 5)),
    "starts with a relu": lambda: nn.Sequential(nn.ReLU(True), nn.Linear(12, 8), nn.ReLU(True), nn.Linear(8, 5)),
    "flatten": lambda: nn.Sequential(nn.Flatten(), nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 5)),
}


@pytest.mark.parametrize("amount", ["sparsity", "overall"])
@pytest.mark.parametrize("name", NETWORKS)
def test_networks_of_every_shape(batches, tmp_path, name, amount):
    model = NETWORKS[name]()
    numel = sum(m.weight.numel() for m in model if isinstance(m, nn.Linear))
    if amount == "overall":
        sparsity, wanted = nettrim.Overall(0.7), numel - int(0.7 * numel + 1e-9)
    else:
        sparsity = 0.7
        wanted = sum(m.weight.numel() - int(0.7 * m.weight.numel() + 1e-9) for m in model if isinstance(m, nn.Linear))
    result = nettrim.prune(model, batches, sparsity=sparsity, out_dir=tmp_path / "run", progress=False)
    assert result.ledger.kept == wanted
    assert result.ledger.measured <= result.ledger.bound * (1 + 1e-9)
    assert nettrim.verify(tmp_path / "run").failures == ()


class Named(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(12, 8), nn.Linear(8, 5)

    def forward(self, pixels):
        return self.b(torch.relu(self.a(pixels)))


def test_keyword_batches_and_batches_of_sequences(batches):
    x = torch.cat([x for x, _ in batches])
    model = Named()
    chain = nn.Sequential(model.a, nn.ReLU(), model.b)
    plain = nettrim.prune(chain, [x], sparsity=0.7, progress=False)
    by_name = nettrim.prune(model, [{"pixels": x}], sparsity=0.7, progress=False)
    assert torch.equal(by_name.model.a.weight, plain.model[0].weight)
    deep = nettrim.prune(chain, [x.reshape(20, 3, 12)], sparsity=0.7, progress=False)
    torch.testing.assert_close(deep.model[0].weight, plain.model[0].weight, rtol=1e-4, atol=1e-5)


def test_batching_workers_and_labels_do_not_matter(network, batches):
    whole = [torch.cat([x for x, _ in batches])]
    first = nettrim.prune(network, batches, sparsity=0.7, schedule="parallel", progress=False)
    for given, workers in ((whole, None), (batches, 2)):
        with warnings.catch_warnings():
            # of the process pool, where its clean-up meets that of another test
            warnings.simplefilter("ignore", ResourceWarning)
            other = nettrim.prune(network, given, sparsity=0.7, schedule="parallel", executor=workers, progress=False)
        for key, tensor in first.model.state_dict().items():
            torch.testing.assert_close(other.model.state_dict()[key], tensor, rtol=1e-4, atol=1e-6)


def test_two_runs_agree_to_the_bit_and_the_global_state_is_restored(network, batches):
    state = torch.get_rng_state()
    one = nettrim.prune(network, batches, sparsity=0.8, progress=False)
    two = nettrim.prune(network, batches, sparsity=0.8, progress=False)
    for key, tensor in one.model.state_dict().items():
        assert torch.equal(two.model.state_dict()[key], tensor)
    assert torch.equal(state, torch.get_rng_state())


def test_refining_beats_the_linear_methods_at_the_same_count(network, batches):
    """On the calibration samples: the output's error, with a bias fitted by every one of them."""
    errors = {}
    for name, method in {
        "net-trim": nettrim.NetTrim(evidence=False),
        "alps": nettrim.Alps(bias="kept"),
        "magnitude": nettrim.Magnitude(refit=True),
        "wanda": nettrim.Wanda(refit=True),
    }.items():
        result = nettrim.prune(network, batches, method, kept={"0": 60, "3": 50, "5": 30}, progress=False)
        errors[name] = result.ledger.measured
    assert errors["net-trim"] < 0.95 * min(errors["alps"], errors["magnitude"], errors["wanda"])


def test_patterns_are_refused_with_what_is_taken(network, batches):
    with pytest.raises(UnsupportedError, match="'net-trim' takes epsilon or lam or sparsity or kept, and pattern=2:4"):
        nettrim.prune(network, batches, sparsity=Pattern(2, 4), layers=["0", "3"], progress=False)


@pytest.mark.parametrize(
    ("amount", "text"),
    [
        ({"kept": 0}, "kept=0"),
        ({"kept": 193}, "layer '3' has 160|kept=193"),
        ({"kept": {"0": 1, "3": 1}}, "no entry for 5"),
        ({"kept": math.nan}, "kept=nan"),
        ({"sparsity": 1.0}, "sparsity=1"),
        ({"sparsity": math.nan}, "sparsity=nan"),
        ({"sparsity": "half"}, "sparsity='half'"),
        ({"sparsity": 0.5, "kept": 5}, "exactly one"),
    ],
)
def test_amounts_out_of_range_are_refused(network, batches, amount, text):
    with pytest.raises(NetTrimError, match=text):
        nettrim.prune(network, batches, progress=False, **amount)


# ---- a saved run


KINDS = {
    "refined": {},
    "reweighted": {"route": "reweighted"},
    "frozen": {"bias": "frozen"},
    "no evidence": {"evidence": False},
}


@pytest.fixture(scope="module", params=KINDS)
def saved(request, tmp_path_factory):
    """One run of each kind, pruned once; the tests spoil copies of it."""
    model = nn.Sequential(
        nn.Linear(12, 16), nn.ReLU(), nn.Dropout(0.5), nn.Linear(16, 10), nn.ReLU(), nn.Linear(10, 5)
    )  # fmt: skip
    with torch.no_grad():
        for k, parameter in enumerate(model.parameters()):
            parameter.copy_(draw(k, *parameter.shape) * parameter.shape[-1] ** -0.5)
    x, labels = draw(20, 60, 12).float(), torch.arange(60) % 5
    path = tmp_path_factory.mktemp("saved") / "run"
    nettrim.prune(
        model,
        [(x, labels)],
        nettrim.NetTrim(**KINDS[request.param]),
        sparsity=0.7,
        held_out=[(draw(21, 25, 12).float(), torch.arange(25) % 5)],
        out_dir=path,
        progress=False,
    )
    return path, request.param, model


@pytest.fixture
def run(saved, tmp_path):
    path, kind, _ = saved
    shutil.copytree(path, tmp_path / "run")
    return tmp_path / "run", kind


def mend(path, name, content):
    """Put a file in place of another, with the digests that the run would have written for it."""
    (path / name).write_bytes(content)
    about = json.loads((path / "run.json").read_text())
    about["files"][name] = hashlib.sha256(content).hexdigest()
    about.pop("digest")
    (path / "run.json").write_text(json.dumps(about | {"digest": files.digest_json(about)}))


def forge(path, name, edit):
    tensors, about = files.read_tensors(path / name)
    edit(tensors, about)
    mend(path, name, files.tensor_bytes(tensors, about))


def test_an_honest_run_holds_and_comes_back(saved):
    path, _, network = saved
    found = nettrim.verify(path)
    assert found.failures == ()
    assert found.checked > 60
    back = nettrim.load_result(path, copy.deepcopy(network))
    assert back.ledger.kept == sum(SIZES[n] - int(0.7 * SIZES[n] + 1e-9) for n in SIZES)
    assert back.settings["amount"] == {"sparsity": dict.fromkeys(SIZES, 0.7)}


def test_a_weight_that_was_changed_is_found_though_the_digests_were_mended(run):
    path, kind = run
    forge(path, "layers/0.safetensors", lambda t, _: t["weight"].mul_(1.01))
    found = " | ".join(nettrim.verify(path).failures)
    assert "SHA-256" not in found
    assert "model.safetensors: weight of 0 is not the one" in found
    assert "measured is stored as" in found
    if kind != "no evidence":
        assert "objective is stored as" in found


def test_a_weight_more_than_was_kept_is_found(run):
    path, _ = run

    def add(tensors, _):
        flat = tensors["weight"].view(-1)
        flat[(flat == 0).nonzero()[0, 0]] = 1e-6

    forge(path, "layers/3.safetensors", add)
    found = " | ".join(nettrim.verify(path).failures)
    assert "records[3].kept is stored as" in found
    assert "masks.safetensors: 3 is not where the weight is kept" in found


@pytest.mark.parametrize("factor", [0.5, 3.0, -1.0])
def test_multipliers_that_were_changed_are_found_or_prove_the_same(run, factor):
    """Scaled up they are made feasible again, and prove what they proved; halved or turned round, less."""
    path, kind = run
    if kind == "no evidence":
        assert "multipliers" not in files.read_tensors(path / "layers/0.safetensors")[0]
        return
    forge(path, "layers/0.safetensors", lambda t, _: t["multipliers"].mul_(factor))
    found = " | ".join(nettrim.verify(path).failures)
    if factor < 0:
        assert "records[0].lower_bound is stored as" in found
        assert "records[0].gap is stored as" in found
    else:
        assert "objective" not in found
    # one neuron's alone
    forge(path, "layers/5.safetensors", lambda t, _: t["multipliers"][:, 0].zero_())
    found = " | ".join(nettrim.verify(path).failures)
    assert "records[5].lower_bound is stored as" in found
    assert "records[5].facts.nearest is stored as" in found


@pytest.mark.parametrize(
    ("number", "edit"),
    [
        ("nearest", lambda r: r["facts"].update(nearest=r["facts"]["nearest"] * 1.01 + 1e-3)),
        ("radius", lambda r: r["facts"].update(radius=r["facts"]["radius"] * 0.99)),
        ("lower_bound", lambda r: r.update(lower_bound=r["lower_bound"] * 1.01)),
        ("gap", lambda r: r.update(gap=r["gap"] / 2)),
        ("kept", lambda r: r.update(kept=r["kept"] - 1)),
        ("promised", lambda r: r.update(promised=r["promised"] * 0.99)),
    ],
)
def test_a_figure_that_was_changed_is_found(run, number, edit):
    path, kind = run
    ledger = json.loads((path / "ledger.json").read_text())
    if ledger["records"][1].get(number, ledger["records"][1]["facts"].get(number)) is None:
        assert kind == "no evidence"
        return
    if number == "radius" and kind == "no evidence":
        return  # without multipliers nothing was promised
    edit(ledger["records"][1])
    mend(path, "ledger.json", json.dumps(ledger).encode())
    assert f"{number} is stored as" in " | ".join(nettrim.verify(path).failures)


def test_a_record_of_another_count_is_found(run):
    path, _ = run
    forge(path, "layers/3.safetensors", lambda _, about: about["facts"].update(sparsity=0.6))
    assert "it was solved for sparsity=0.6, and run.json asked for 0.7" in " | ".join(nettrim.verify(path).failures)
