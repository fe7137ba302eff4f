"""Run directories: written whole, read back, resumed, and every tampering found."""

import errno
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import nettrim
from nettrim.errors import RunError
from nettrim.pipeline import store

AMOUNT = {"epsilon": 0.1, "progress": False}


@pytest.fixture(params=["parallel", "cascade"])
def run(request, tmp_path, network, batches, held_out):
    path = tmp_path / "run"
    nettrim.prune(network, batches, schedule=request.param, held_out=held_out, out_dir=path, **AMOUNT)
    return path


def change(path, edit):
    """Edit a JSON file in place."""
    value = json.loads(path.read_text())
    edit(value)
    path.write_text(json.dumps(value))


def failures(path):
    return " | ".join(nettrim.verify(path).failures)


def test_an_honest_run_holds(run):
    found = nettrim.verify(run)
    assert found.holds
    assert found.checked > 100
    assert found.state == "finished"


@pytest.mark.parametrize("method", ["magnitude", "l-obs"])
def test_methods_without_certificates_hold_too(tmp_path, network, batches, method):
    nettrim.prune(network, batches, method, sparsity=0.5, out_dir=tmp_path / "run", progress=False)
    assert nettrim.verify(tmp_path / "run").holds


@pytest.mark.parametrize(
    "settings",
    [{"form": "halfspace"}, {"bias": "frozen"}, {"bias": "penalised"}, {"form": "halfspace", "bias": "frozen"}],
)
def test_every_kind_of_program_is_set_up_again(tmp_path, network, batches, settings):
    method = nettrim.NetTrim(**settings, on_failure="return")
    nettrim.prune(network, batches, method, out_dir=tmp_path / "run", **AMOUNT)
    assert failures(tmp_path / "run") == ""


NUMBERS = {
    "gap": lambda v: v["records"][0].update(gap=v["records"][0]["gap"] / 2),
    "violation": lambda v: v["records"][1].update(violation=1e-9),
    "objective": lambda v: v["records"][0].update(objective=v["records"][0]["objective"] * 1.001),
    "lower_bound": lambda v: v["records"][0].update(lower_bound=v["records"][0]["lower_bound"] * 1.001),
    "kept": lambda v: v["records"][2].update(kept=v["records"][2]["kept"] - 1),
    "measured": lambda v: v.update(measured=v["measured"] * 0.999),
    "bound": lambda v: v.update(bound=v["bound"] * 0.999),
    "operator": lambda v: v["records"][1]["bounds"].update(operator=v["records"][1]["bounds"]["operator"] * 0.99),
    "held_out": lambda v: v.update(held_out=v["held_out"] / 2),
    "pruned": lambda v: v["accuracy"]["held-out"].update(pruned=1.0),
    "radius": lambda v: v["records"][0]["facts"].update(radius=1.0),
}


@pytest.mark.parametrize("number", NUMBERS)
def test_one_changed_number_in_the_ledger_is_named(run, number):
    change(run / "ledger.json", NUMBERS[number])
    found = failures(run)
    assert f"{number} is stored as" in found
    # and so does the digest say, on its own
    assert "ledger.json: it is not the file" in found


def test_a_changed_number_is_found_without_the_digests(run, monkeypatch):
    """Whoever mends the digests as well is still found out by the figures."""
    layer = run / "layers" / "0.safetensors"
    tensors, about = store.read_tensors(layer)
    tensors["weight"][tensors["weight"] != 0] *= 1.01
    layer.write_bytes(store.to_bytes(tensors, {"about": json.dumps(about)}))
    run_json = json.loads((run / "run.json").read_text())
    run_json["files"]["layers/0.safetensors"] = store.hashlib.sha256(layer.read_bytes()).hexdigest()
    run_json.pop("digest")
    (run / "run.json").write_text(json.dumps(run_json | {"digest": store.digest_json(run_json)}))
    found = failures(run)
    assert "SHA-256" not in found
    assert "objective is stored as" in found
    assert "model.safetensors: 0.weight is not the one" in found


@pytest.mark.parametrize("file", ["model", "masks", "layers/3", "samples/calibration", "samples/held-out"])
def test_one_changed_entry_in_a_tensor_file_is_named(run, file):
    path = run / f"{file}.safetensors"
    tensors, about = store.read_tensors(path)
    key = sorted(tensors)[0]
    flat = tensors[key].reshape(-1)
    flat[0] = ~flat[0] if flat.dtype == torch.bool else flat[0] + 1
    path.write_bytes(store.to_bytes(tensors, {"about": json.dumps(about)}))
    assert f"{file}.safetensors: it is not the file that the run wrote" in failures(run)


def test_a_changed_setting_is_found(run):
    change(run / "run.json", lambda v: v.update(seed=7))
    assert "run.json: its own digest does not hold" in failures(run)


@pytest.mark.parametrize("file", ["run.json", "ledger.json", "model.safetensors", "layers/0.safetensors"])
def test_a_truncated_file_cannot_be_read(run, file):
    path = run / file
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(RunError, match=f"{path.name} is truncated"):
        nettrim.verify(run)


@pytest.mark.parametrize("file", ["run.json", "layers/3.safetensors", "samples/calibration.safetensors"])
def test_a_foreign_file_cannot_be_read(run, file):
    (run / file).write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(200))
    with pytest.raises(RunError, match=Path(file).name):
        nettrim.verify(run)


@pytest.mark.parametrize("file", ["ledger.json", "layers/3.safetensors", "run.json"])
def test_a_missing_file_cannot_be_read(run, file):
    (run / file).unlink()
    with pytest.raises(RunError, match=Path(file).name):
        nettrim.verify(run)


def test_a_stray_file_is_named(run):
    (run / "layers" / "other.safetensors").write_bytes(b"")
    assert "layers/other.safetensors: the run did not write this file" in failures(run)


def test_the_layer_of_another_run_is_found(run, tmp_path, network, batches):
    nettrim.prune(network, batches, epsilon=0.3, out_dir=tmp_path / "other", progress=False)
    (run / "layers" / "0.safetensors").write_bytes((tmp_path / "other" / "layers" / "0.safetensors").read_bytes())
    assert "objective is stored as" in failures(run)


def test_another_schema_is_refused(run):
    change(run / "run.json", lambda v: v.update(schema=99))
    with pytest.raises(RunError, match="schema 99"):
        nettrim.verify(run)


def test_what_is_saved_is_what_was_returned(tmp_path, network, batches, held_out):
    result = nettrim.prune(network, batches, held_out=held_out, **AMOUNT)
    result.save(tmp_path / "saved")
    assert nettrim.verify(tmp_path / "saved").holds
    back = nettrim.load_result(tmp_path / "saved")
    assert back.ledger.as_dict() == json.loads(json.dumps(result.ledger.as_dict()))
    x = batches[0][0]
    torch.testing.assert_close(back.model(x), result.model(x))
    named = nettrim.load_result(tmp_path / "saved", network)
    for key, tensor in result.model.state_dict().items():
        assert torch.equal(named.model.state_dict()[key], tensor)
    assert all(torch.equal(back.masks[name], mask) for name, mask in result.masks.items())
    with pytest.raises(RunError, match="does not take the weights"):
        nettrim.load_result(tmp_path / "saved", nn.Linear(3, 3))


def test_a_directory_in_use_is_refused_and_left_alone(run, network, batches):
    before = {p: p.read_bytes() for p in run.rglob("*") if p.is_file()}
    with pytest.raises(RunError, match="already holds something"):
        nettrim.prune(network, batches, out_dir=run, **AMOUNT)
    assert {p: p.read_bytes() for p in run.rglob("*") if p.is_file()} == before


@pytest.mark.parametrize("schedule", ["parallel", "cascade"])
def test_an_interrupted_run_is_readable_and_goes_on(tmp_path, network, batches, schedule, monkeypatch):
    whole = nettrim.prune(network, batches, schedule=schedule, **AMOUNT)
    path = tmp_path / "run"
    plain = nettrim.NetTrim.prune_layer
    with monkeypatch.context() as patch:
        patch.setattr(nettrim.NetTrim, "prune_layer", lambda self, task: stop(self, task, plain))
        with pytest.raises(KeyboardInterrupt):
            nettrim.prune(network, batches, schedule=schedule, out_dir=path, **AMOUNT)
    assert torch.equal(load_file(path / "layers" / "0.safetensors")["weight"], whole.model[0].weight)
    found = nettrim.verify(path)
    assert found.holds
    assert found.state == "1 of 3 layers finished"
    with pytest.raises(RunError, match="unfinished"):
        nettrim.load_result(path)
    for changed in ({"seed": 1}, {"schedule": "parallel" if schedule == "cascade" else "cascade"}, {"epsilon": 0.2}):
        with pytest.raises(RunError, match=r"another (seed|schedule|amount)"):
            nettrim.prune(network, batches, out_dir=path, resume=True, **({"schedule": schedule} | AMOUNT | changed))
    with pytest.raises(RunError, match="another data"):
        nettrim.prune(network, batches[:2], schedule=schedule, out_dir=path, resume=True, **AMOUNT)
    again = nettrim.prune(network, batches, schedule=schedule, out_dir=path, resume=True, **AMOUNT)
    for key, tensor in whole.model.state_dict().items():
        assert torch.equal(again.model.state_dict()[key], tensor)
    assert nettrim.verify(path).holds


def stop(self, task, plain):
    """Prune a layer, or stop at the second one as Ctrl-C would."""
    if task.name == "3":
        raise KeyboardInterrupt
    return plain(self, task)


def test_a_full_disk_leaves_no_half_file(tmp_path, monkeypatch):
    def full(_descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    store.write_atomically(tmp_path / "a.json", b"before")
    monkeypatch.setattr(store.os, "fsync", full)
    with pytest.raises(RunError, match="No space left on device"):
        store.write_atomically(tmp_path / "a.json", b"after")
    assert (tmp_path / "a.json").read_bytes() == b"before"
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


def test_no_pickles(run):
    for path in run.rglob("*"):
        if path.is_file():
            assert path.suffix in (".safetensors", ".json")


def test_safetensors_of_something_else_is_no_layer(run):
    save_file({"x": torch.ones(2)}, run / "layers" / "0.safetensors")
    with pytest.raises(RunError, match="not the file of a pruned layer"):
        nettrim.verify(run)


def seal(path):
    """Write digests that fit what stands there, as a forger would."""
    run_json = json.loads((path / "run.json").read_text())
    for name in run_json["files"]:
        run_json["files"][name] = store.hashlib.sha256((path / name).read_bytes()).hexdigest()
    run_json.pop("digest")
    (path / "run.json").write_text(json.dumps(run_json | {"digest": store.digest_json(run_json)}))


def test_a_sealed_promise_that_does_not_follow_from_the_data_is_found(run):
    def lower(ledger):
        for record in ledger["records"]:
            record["promised"] /= 1000
            record["facts"]["asked"] /= 1000

    change(run / "ledger.json", lower)
    seal(run)
    found = failures(run)
    assert "promised is stored as" in found
    assert "asked is stored as" in found


def test_sealed_settings_of_a_layer_are_held_against_the_run(run):
    path = run / "layers" / "0.safetensors"
    tensors, about = store.read_tensors(path)
    about["facts"]["epsilon"] = 0.5
    path.write_bytes(store.to_bytes(tensors, {"about": json.dumps(about)}))
    seal(run)
    assert "layers/0.safetensors: it was solved for epsilon=0.5, and run.json asked for 0.1" in failures(run)


def test_sealed_zero_weights_do_not_pass_as_solved(run):
    for name in ("0", "3", "5"):
        path = run / "layers" / f"{name}.safetensors"
        tensors, about = store.read_tensors(path)
        tensors["weight"].zero_()
        path.write_bytes(store.to_bytes(tensors, {"about": json.dumps(about)}))
    seal(run)
    found = failures(run)
    assert "status is stored as 'SOLVED', and recomputed as 'NOT_FEASIBLE'" in found
    assert "violation is stored as" in found


@pytest.mark.parametrize("kappa", [0.05, 1e-4])
def test_an_honest_run_that_could_not_be_solved_holds(tmp_path, network, batches, kappa):
    method = nettrim.NetTrim(kappa=kappa, solver=nettrim.Admm(max_iter=200), on_failure="return")
    result = nettrim.prune(network, batches, method, out_dir=tmp_path / "run", **AMOUNT)
    last = result.ledger.records[-1]
    assert last.facts["status"] != "SOLVED"
    assert last.gap is None
    assert failures(tmp_path / "run") == ""


def test_layers_that_lose_nothing_hold(tmp_path):
    generator = torch.Generator().manual_seed(0)
    model = nn.Sequential(nn.Linear(200, 100), nn.ReLU(), nn.Linear(100, 100), nn.ReLU(), nn.Linear(100, 10))
    x = 255 * torch.rand(300, 200, generator=generator)
    amount = {"0": 0.0, "2": 0.0, "4": 0.5}
    nettrim.prune(model, [x], "magnitude", sparsity=amount, out_dir=tmp_path / "run", progress=False)
    assert failures(tmp_path / "run") == ""


@pytest.mark.parametrize("settings", [{}, {"form": "halfspace", "clip_ceiling": False, "bias": "penalised"}])
def test_a_layer_of_dead_neurons_holds(tmp_path, settings):
    model = nn.Sequential(nn.Linear(8, 10), nn.ReLU(), nn.Linear(10, 6), nn.ReLU())
    with torch.no_grad():
        model[2].bias.fill_(-5)
    method = nettrim.NetTrim(**settings, on_failure="return")
    result = nettrim.prune(model, [torch.randn(60, 8)], method, out_dir=tmp_path / "run", **AMOUNT)
    # an unclipped ceiling below 0 has to be met, which the zero weight does not
    assert (result.ledger.records[1].kept == 0) == (not settings)
    assert failures(tmp_path / "run") == ""


def test_a_damaged_layer_is_solved_again(tmp_path, network, batches):
    path = tmp_path / "run"
    whole = nettrim.prune(network, batches, out_dir=path, **AMOUNT)
    layer = path / "layers" / "0.safetensors"
    tensors, about = store.read_tensors(layer)
    tensors["weight"] *= 2
    layer.write_bytes(store.to_bytes(tensors, {"about": json.dumps(about)}))
    again = nettrim.prune(network, batches, out_dir=path, resume=True, **AMOUNT)
    for key, tensor in whole.model.state_dict().items():
        assert torch.equal(again.model.state_dict()[key], tensor)
    assert nettrim.verify(path).holds


def test_other_labels_are_other_data(tmp_path, network, batches):
    nettrim.prune(network, [x for x, _ in batches], out_dir=tmp_path / "run", **AMOUNT)
    with pytest.raises(RunError, match="another data"):
        nettrim.prune(network, batches, out_dir=tmp_path / "run", resume=True, **AMOUNT)


def test_a_run_killed_before_its_first_file_starts_anew(tmp_path, network, batches):
    (tmp_path / "run" / "layers").mkdir(parents=True)
    nettrim.prune(network, batches, out_dir=tmp_path / "run", resume=True, **AMOUNT)
    assert nettrim.verify(tmp_path / "run").holds


def test_what_was_read_back_can_be_saved(tmp_path, network, batches):
    nettrim.prune(network, batches, **AMOUNT).save(tmp_path / "first")
    nettrim.load_result(tmp_path / "first").save(tmp_path / "second")
    assert nettrim.verify(tmp_path / "second").holds


@pytest.mark.parametrize("name", ["a/b", "/tmp/a", "n" * 300, "fc*", "Ω"])
def test_any_layer_name_is_a_file_inside_the_directory(tmp_path, name):
    model = nn.Sequential()
    model._modules[name] = nn.Linear(8, 5)
    nettrim.prune(model, [torch.randn(30, 8)], out_dir=tmp_path / "run", **AMOUNT)
    assert nettrim.verify(tmp_path / "run").holds
    assert len(list((tmp_path / "run" / "layers").iterdir())) == 1


def test_a_file_is_no_directory(tmp_path, network, batches):
    (tmp_path / "run").write_text("mine")
    for resume in (False, True):
        with pytest.raises(RunError, match="is a file"):
            nettrim.prune(network, batches, out_dir=tmp_path / "run", resume=resume, **AMOUNT)


@pytest.mark.parametrize("edit", [{"files": 3}, {"chain": [1]}, {"amount": {}}])
def test_json_of_another_shape_is_refused(run, edit):
    change(run / "run.json", lambda v: v.update(edit))
    with pytest.raises(RunError, match="run"):
        nettrim.verify(run)
