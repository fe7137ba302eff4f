"""Methods that make networks smaller: what comes out is smaller, is verified, is read back, goes on, and is chained."""

import copy
import hashlib
import json
import shutil

import pytest
import torch
from networks import Block, seeded
from torch import nn

import nettrim
from nettrim import Distill, FineTune, Ldrf, Overall, Pattern, Shallowing
from nettrim.cli import main
from nettrim.errors import NetTrimError, RunError
from nettrim.network.batches import Batch
from nettrim.network.costs import costs_of
from nettrim.network.modular import ProgramModule
from nettrim.network.program import run
from nettrim.pipeline.files import digest_json, digest_tensors, read_tensors, tensor_bytes
from nettrim.pipeline.onnx_export import export_onnx
from nettrim.pipeline.outputs import read_csr, read_packed, sizes, write_csr, write_packed
from nettrim.pipeline.store import RunStore

QUIET = {"progress": False}


def unit(before, after, bias=True):
    return [nn.Conv2d(before, after, 3, padding=1, bias=bias), nn.BatchNorm2d(after), nn.ReLU()]


def plain():
    return seeded(
        nn.Sequential(
            *unit(2, 6), *unit(6, 6, bias=False), *unit(6, 6), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(54, 8),
            nn.ReLU(), nn.Linear(8, 4),
        ), 31,
    )  # fmt: skip


def residual():
    return seeded(
        nn.Sequential(
            *unit(2, 4), Block(4, 4, 1), Block(4, 4, 1), Block(4, 6, 2), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
            nn.Linear(6, 4),
        ), 32,
    )  # fmt: skip


def samples(count=60, seed=33):
    drawing = torch.Generator().manual_seed(seed)
    x = torch.randn(count, 2, 6, 6, generator=drawing)
    return x + 0.5 * x.roll(1, -1), torch.randint(0, 4, (count,), generator=drawing)


NARROW, SHORT = Ldrf(steps=5), Shallowing(probe_seeds=1)
NETS = {"plain": plain, "residual": residual}
METHODS = {"ldrf": (NARROW, {"channels": 0.5}), "shallowing": (SHORT, {"units": 1})}
RUNS = [(net, name) for net in NETS for name in METHODS]


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    """Every method on every network, with a run directory that no test changes."""
    path, threads = tmp_path_factory.mktemp("shrunk"), torch.get_num_threads()
    torch.set_num_threads(1)
    found = {}
    for net, name in RUNS:
        method, amount = METHODS[name]
        out = path / f"{net}-{name}"
        found[net, name] = out, nettrim.prune(
            NETS[net](), [samples()], method, **amount, held_out=[samples(20, 34)], out_dir=out, **QUIET
        )  # fmt: skip
    torch.set_num_threads(threads)
    return found


def parameters(model):
    return sum(parameter.numel() for parameter in model.parameters())


def outputs(model, x):
    with torch.no_grad():
        return copy.deepcopy(model).double()(x.double())


def same(one, other):
    found, wanted = one.state_dict(), other.state_dict()
    return found.keys() == wanted.keys() and all(torch.equal(found[key], wanted[key]) for key in wanted)


# what comes out ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("net", "name"), RUNS)
def test_what_is_gone_is_gone_and_not_zero(stored, net, name):
    _, result = stored[net, name]
    dense, (x, _) = NETS[net](), samples()
    assert type(result.model) is type(dense)
    assert parameters(result.model) < parameters(dense)
    batch = Batch((x,))
    for model, key in ((dense, "dense"), (result.model, "pruned")):
        counted = costs_of(model, batch)
        assert result.ledger.costs[key] == {"weights": counted.weights, "multiply_adds": counted.multiply_adds}
    # the network that every figure is of
    account = result.account
    standing = account.of_state(
        {key: t.double() if t.is_floating_point() else t for key, t in result.model.state_dict().items()},
        account.slimming(result.structure),
    )
    wanted = run(account.graph.program, standing.state, batch)
    assert torch.allclose(outputs(result.model, x), wanted, rtol=0, atol=1e-9 * float(wanted.abs().max()))
    error = float((wanted - outputs(dense, x)).norm())
    assert result.ledger.measured == pytest.approx(error, rel=1e-9)
    assert 0 < error <= result.ledger.bound
    if name == "ldrf":
        assert result.structure.channels
        for layer, kept in result.structure.channels.items():
            weight = dense.get_submodule(layer).weight
            assert result.model.get_submodule(layer).weight.shape[0] == len(kept) == len(weight) // 2
            assert result.masks[layer].shape == result.model.get_submodule(layer).weight.shape
    else:
        (gone,) = result.structure.removed
        assert isinstance(result.model.get_submodule(gone), nn.Identity)
        assert result.about["probes"]["removed"] == [gone]
        assert not result.masks


@pytest.mark.parametrize("net", NETS)
@pytest.mark.parametrize("name", METHODS)
def test_model_and_samples_are_left_as_they_were(net, name):
    model, (x, labels) = NETS[net](), samples()
    model.train()
    before, data = copy.deepcopy(model.state_dict()), x.clone()
    method, amount = METHODS[name]
    found = [nettrim.prune(model, [(x, labels)], method, **amount, **QUIET) for _ in range(2)]
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())
    assert all(module.training for module in model.modules())
    assert torch.equal(x, data)
    mine = {tensor.data_ptr() for tensor in model.state_dict().values()}
    assert not mine & {tensor.data_ptr() for tensor in found[0].model.state_dict().values()}
    assert same(found[0].model, found[1].model)  # of the same seed


def test_other_amounts():
    dense = parameters(plain())
    for method, amount in (
        (NARROW, {"macs": 0.5}), (NARROW, {"sparsity": 0.5}), (NARROW, {"channels": {"0": 0.5}}),
        (SHORT, {"sparsity": 0.2}), (SHORT, {"tolerance": 2.0}),
    ):  # fmt: skip
        result = nettrim.prune(plain(), [samples()], method, **amount, **QUIET)
        assert parameters(result.model) < dense
        costs = result.ledger.costs
        if "macs" in amount:
            assert costs["pruned"]["multiply_adds"] <= 0.5 * costs["dense"]["multiply_adds"]
        if "sparsity" in amount:
            assert costs["pruned"]["weights"] <= (1 - amount["sparsity"]) * costs["dense"]["weights"]
        if "channels" in amount:
            assert set(result.structure.channels) == {"0"}


# run directories -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("net", "name"), RUNS)
def test_a_run_directory_is_verified_and_read_back(stored, tmp_path, net, name):
    path, result = stored[net, name]
    x, _ = samples(15, 35)
    checked = nettrim.verify(path)
    assert checked.holds, checked.failures
    with_class, without = nettrim.load_result(path, NETS[net]()), nettrim.load_result(path)
    assert type(with_class.model) is type(result.model)
    assert same(with_class.model, result.model)
    assert isinstance(without.model, ProgramModule)
    wanted = result.model(x)
    assert torch.allclose(without.model(x), wanted, rtol=0, atol=1e-5 * float(wanted.abs().max()))
    for read in (with_class, without):
        assert read.structure == result.structure
        assert read.about == result.about
        assert read.ledger == result.ledger
    # what was read back is saved as it was, and holds again
    without.save(tmp_path / "again")
    assert nettrim.verify(tmp_path / "again").holds
    with pytest.raises(RunError, match="model"):
        nettrim.load_result(path, nn.Linear(3, 2))


def rewrite(path, name, content):
    """Replace a file of a run directory, with all digests set right again, as somebody who means it would."""
    (path / name).write_bytes(content)
    stored = json.loads((path / "run.json").read_text())
    stored["files"][name] = hashlib.sha256(content).hexdigest()
    stored["digest"] = digest_json({key: value for key, value in stored.items() if key != "digest"})
    (path / "run.json").write_text(json.dumps(stored))


def other_structure(path):
    stored = json.loads((path / "structure.json").read_text())
    for layer, kept in stored["channels"].items():
        spare = next(channel for channel in range(100) if channel not in kept)
        stored["channels"][layer] = sorted([spare, *kept[1:]])
    if stored["removed"]:
        stored["removed"] = []
    return "structure.json", json.dumps(stored).encode()


def other_model(path):
    tensors, _ = read_tensors(path / "model.safetensors")
    name = max(tensors, key=lambda key: tensors[key].numel())
    tensors[name].view(-1)[0] += 1e-3
    return "model.safetensors", tensor_bytes(tensors)


def other_costs(path):
    stored = json.loads((path / "ledger.json").read_text())
    stored["costs"]["pruned"]["multiply_adds"] -= 1
    return "ledger.json", json.dumps(stored).encode()


@pytest.mark.parametrize("tamper", [other_structure, other_model, other_costs])
@pytest.mark.parametrize(("net", "name"), [("plain", "ldrf"), ("residual", "shallowing"), ("plain", "shallowing")])
def test_what_was_tampered_with_does_not_hold(stored, tmp_path, net, name, tamper):
    path = shutil.copytree(stored[net, name][0], tmp_path / "run")
    file, content = tamper(path)
    rewrite(path, file, content)
    checked = nettrim.verify(path)
    assert not checked.holds
    assert not any("SHA-256" in failure or "digest" in failure for failure in checked.failures)


@pytest.mark.parametrize("net", NETS)
def test_a_narrowing_run_that_was_killed_goes_on_to_the_same_bits(stored, tmp_path, monkeypatch, net):
    path, whole = stored[net, "ldrf"]
    write = RunStore.write_layer
    layers = len(whole.layers)
    for after in range(1, layers):
        out, written = tmp_path / str(after), []

        def stopping(self, layer, written=written, after=after):
            if len(written) == after:
                raise KeyboardInterrupt
            written.append(layer.name)
            write(self, layer)

        given = dict(channels=0.5, held_out=[samples(20, 34)], out_dir=out, **QUIET)
        monkeypatch.setattr(RunStore, "write_layer", stopping)
        with pytest.raises(KeyboardInterrupt):
            nettrim.prune(NETS[net](), [samples()], NARROW, **given)
        assert f"{after} of {layers} layers finished" in nettrim.verify(out).state
        monkeypatch.setattr(RunStore, "write_layer", write)
        again = nettrim.prune(NETS[net](), [samples()], NARROW, **given, resume=True)
        assert same(again.model, whole.model)
        assert again.structure == whole.structure
        assert nettrim.verify(out).holds
    assert nettrim.verify(path).holds


def test_a_shortening_run_that_was_killed_goes_on_to_the_same(stored, tmp_path, monkeypatch):
    write = RunStore.write_layer
    monkeypatch.setattr(RunStore, "write_layer", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    given = dict(units=1, held_out=[samples(20, 34)], out_dir=tmp_path / "run", **QUIET)
    with pytest.raises(KeyboardInterrupt):
        nettrim.prune(plain(), [samples()], SHORT, **given)
    monkeypatch.setattr(RunStore, "write_layer", write)
    again = nettrim.prune(plain(), [samples()], SHORT, **given, resume=True)
    assert same(again.model, stored["plain", "shallowing"][1].model)
    assert nettrim.verify(tmp_path / "run").holds
    with pytest.raises(RunError, match="another amount"):
        nettrim.prune(plain(), [samples()], SHORT, **given | {"units": 2}, resume=True)


# training on ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("net", "name"), [("plain", "ldrf"), ("residual", "ldrf"), ("residual", "shallowing")])
@pytest.mark.parametrize(
    "finish",
    [Distill(epochs=2, batch_size=20, validation=0), FineTune(epochs=2, batch_size=20, validation=0), "batch-norm"],
    ids=["distill", "fine-tune", "batch-norm"],
)
def test_a_smaller_network_is_trained_on(stored, tmp_path, net, name, finish):
    method, amount = METHODS[name]
    out = tmp_path / "run"
    result = nettrim.prune(NETS[net](), [samples()], method, **amount, finish=finish, out_dir=out, **QUIET)
    pruned = stored[net, name][1]
    assert result.structure == pruned.structure
    assert {k: t.shape for k, t in result.model.state_dict().items()} == {
        k: t.shape for k, t in pruned.model.state_dict().items()
    }
    assert not same(result.model, pruned.model)
    assert result.ledger.before.measured == pytest.approx(pruned.ledger.measured, rel=1e-9)
    x, _ = samples()
    error = float((outputs(result.model, x) - outputs(NETS[net](), x)).norm())
    assert result.ledger.measured == pytest.approx(error, rel=1e-9)
    assert result.ledger.costs == pruned.ledger.costs
    checked = nettrim.verify(out)
    assert checked.holds, checked.failures
    assert same(nettrim.load_result(out, NETS[net]()).model, result.model)


# several runs --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("read", [False, True], ids=["in memory", "read back"])
def test_three_runs_make_one_chain(stored, tmp_path, read):
    paths = [tmp_path / str(k) for k in range(3)]
    held = [samples(20, 34)]

    def back(k, result):
        return nettrim.load_result(paths[k]) if read else result

    one = nettrim.prune(residual(), [samples()], SHORT, units=1, held_out=held, out_dir=paths[0], **QUIET)
    assert one.ledger.chain is None
    two = nettrim.prune(back(0, one), [samples()], NARROW, channels=0.5, held_out=held, out_dir=paths[1], **QUIET)
    three = nettrim.prune(
        back(1, two), [samples()], "magnitude", sparsity=0.3, held_out=held, out_dir=paths[2],
        finish=FineTune(epochs=1), **QUIET,
    )  # fmt: skip
    x, labels = samples()
    dense = residual()
    for result, methods in ((two, ["shallowing", "ldrf"]), (three, ["shallowing", "ldrf", "magnitude"])):
        chain = result.ledger.chain
        assert [stage.method for stage in chain.stages] == methods
        assert all(now.before == past.after for past, now in zip(chain.stages, chain.stages[1:], strict=False))
        assert len({stage.data for stage in chain.stages}) == 1
        assert chain.stages[0].numel == one.ledger.costs["dense"]["weights"]
        assert all(stage.kept < stage.numel for stage in chain.stages)
        error = float((outputs(result.model, x) - outputs(dense, x)).norm())
        assert chain.measured == pytest.approx(error, rel=1e-6)
        assert chain.output_norm == pytest.approx(float(outputs(dense, x).norm()), rel=1e-9)
        assert chain.bound == pytest.approx(sum(stage.bound for stage in chain.stages))
        assert chain.measured <= chain.bound
        right = (dense(x).argmax(1) == labels).double().mean()
        assert chain.accuracy["calibration"]["dense"] == pytest.approx(float(right))
    assert three.ledger.chain.stages[2].finish == "fine-tune"
    first = digest_tensors(dict(residual().state_dict()))
    assert three.ledger.chain.stages[0].before == first
    for path in paths:
        checked = nettrim.verify(path)
        assert checked.holds, checked.failures
    # weights that are zero stay zero in the last one
    assert all(bool((three.model.state_dict()[f"{k}.weight"][~mask] == 0).all()) for k, mask in three.masks.items())
    # a chain that somebody made look better does not hold
    ledger = json.loads((paths[2] / "ledger.json").read_text())
    ledger["chain"]["measured"] *= 0.5
    rewrite(paths[2], "ledger.json", json.dumps(ledger).encode())
    assert any("chain" in failure for failure in nettrim.verify(paths[2]).failures)


def test_bounds_of_other_samples_do_not_add_up(stored, tmp_path):
    result = nettrim.prune(
        stored["plain", "shallowing"][1],
        [samples(40, 36)],
        "magnitude",
        sparsity=0.3,
        out_dir=tmp_path / "run",
        **QUIET,
    )
    chain = result.ledger.chain
    assert chain.bound is None
    assert chain.why == "the runs were not all measured on the same calibration samples."
    x, _ = samples(40, 36)
    assert chain.measured == pytest.approx(float((outputs(result.model, x) - outputs(plain(), x)).norm()), rel=1e-6)
    assert nettrim.verify(tmp_path / "run").holds


# refused -------------------------------------------------------------------------------------------------------------

unlabelled = {"batches": [samples()[0]]}
BAD = {
    "parallel": (NARROW, dict(channels=0.5, schedule="parallel"), "schedule='parallel' was given: use cascade"),
    "parallel, units": (SHORT, dict(units=1, schedule="parallel"), "schedule='parallel' was given: use cascade"),
    "units to ldrf": (NARROW, dict(units=1), "takes channels or macs or sparsity, and units=1"),
    "channels to shallowing": (SHORT, dict(channels=0.5), "takes units or tolerance or sparsity, and channels=0.5"),
    "channels to another": ("magnitude", dict(channels=0.5), "and channels=0.5 was given"),
    "dict of macs": (NARROW, dict(macs={"0": 0.5}), "takes a single number"),
    "dict of units": (SHORT, dict(units={"0": 1}), "takes a single number"),
    "channels of another layer": (NARROW, dict(channels={"99": 0.5}), "names 99"),
    "no channels": (NARROW, dict(channels=0.0), "channels"),
    "too many channels": (NARROW, dict(channels=1.5), "channels=1.5 is out of range"),
    "too few macs": (NARROW, dict(macs=1e-4), "cannot be reached"),
    "too sparse": (NARROW, dict(sparsity=0.999), "cannot be reached"),
    "pattern": (NARROW, dict(sparsity=Pattern(1, 2)), "and pattern=1:2 was given"),
    "overall": (NARROW, dict(sparsity=Overall(0.5)), "takes channels or macs or sparsity"),
    "no unit": (SHORT, dict(units=0), "units"),
    "too many units": (SHORT, dict(units=9), "units=9 of"),
    "units that weigh too little": (SHORT, dict(sparsity=0.95), "cannot be reached by taking units out"),
    "no labels": (SHORT, dict(units=1) | unlabelled, "batches have no labels"),
    "layers without channels": (NARROW, dict(channels=0.5, layers="13"), "no selected layer has channels that can go"),
    "two amounts": (NARROW, dict(channels=0.5, macs=0.5), "exactly one"),
    "choice of weights": (NARROW, dict(channels=0.5, finish=Distill(choose="layer")), "choose"),
    "threshold of no measure": (Shallowing(choice="reverse"), dict(tolerance=0.1), "measures none"),
}


@pytest.mark.parametrize(("method", "given", "said"), BAD.values(), ids=BAD)
def test_refused_in_one_sentence_before_any_work(tmp_path, method, given, said):
    given = {"batches": [samples()]} | given
    with pytest.raises(NetTrimError, match=said) as caught:
        nettrim.prune(plain(), given.pop("batches"), method, **given, out_dir=tmp_path / "run", **QUIET)
    assert len(str(caught.value).splitlines()) == 1
    assert not (tmp_path / "run").exists()


def test_without_labels_other_choices_remain():
    result = nettrim.prune(plain(), [samples()[0]], Shallowing(choice="reverse"), units=1, **QUIET)
    assert result.structure.removed
    assert result.about == {}


# other forms ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("net", "name"), RUNS)
def test_a_smaller_network_leaves_in_every_form(stored, tmp_path, net, name):
    path, result = stored[net, name]
    state = result.model.state_dict()
    for write, read in ((write_packed, read_packed), (write_csr, read_csr)):
        write(tmp_path / "file", state)
        found = read(tmp_path / "file")
        assert found.keys() == state.keys()
        for key, tensor in state.items():
            got = found[key].to_dense() if found[key].layout != torch.strided else found[key]
            assert torch.equal(got.reshape(tensor.shape), tensor)
        (tmp_path / "file").unlink()
    assert sizes(result.model)["dense"] < sizes(NETS[net]())["dense"]
    for form in ("packed", "csr", "masks"):
        assert main(["export", str(path), "--form", form, "--out", str(tmp_path / form)]) == 0
    assert read_packed(tmp_path / "packed").keys() == state.keys()
    assert read_tensors(tmp_path / "masks")[0].keys() == result.masks.keys()


@pytest.mark.parametrize(("net", "name"), [("plain", "ldrf"), ("residual", "shallowing")])
def test_a_smaller_network_leaves_as_onnx(stored, tmp_path, net, name):
    pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    path, result = stored[net, name]
    x, _ = samples(4)
    assert export_onnx(result.model, (x,), tmp_path / "model.onnx") < 1e-4
    assert main(["export", str(path), "--form", "onnx", "--out", str(tmp_path / "run.onnx")]) == 0
