"""Run directories: written whole, read back, resumed, and every tampering found."""

import errno
import hashlib
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import nettrim
from nettrim.errors import RunError
from nettrim.network.modular import ProgramModule
from nettrim.pipeline import files

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
    tensors, about = files.read_tensors(layer)
    tensors["weight"][tensors["weight"] != 0] *= 1.01
    layer.write_bytes(files.tensor_bytes(tensors, about))
    run_json = json.loads((run / "run.json").read_text())
    run_json["files"]["layers/0.safetensors"] = hashlib.sha256(layer.read_bytes()).hexdigest()
    run_json.pop("digest")
    (run / "run.json").write_text(json.dumps(run_json | {"digest": files.digest_json(run_json)}))
    found = failures(run)
    assert "SHA-256" not in found
    assert "objective is stored as" in found
    assert "model.safetensors: weight of 0 is not the one" in found


@pytest.mark.parametrize("file", ["model", "masks", "network", "layers/3", "samples/calibration", "samples/held-out"])
def test_one_changed_entry_in_a_tensor_file_is_named(run, file):
    path = run / f"{file}.safetensors"
    tensors, about = files.read_tensors(path)
    key = sorted(tensors)[0]
    flat = tensors[key].reshape(-1)
    flat[0] = ~flat[0] if flat.dtype == torch.bool else flat[0] + 1
    path.write_bytes(files.tensor_bytes(tensors, about))
    assert f"{file}.safetensors: it is not the file that the run wrote" in failures(run)


def test_a_changed_setting_is_found(run):
    change(run / "run.json", lambda v: v.update(seed=7))
    assert "run.json: its own digest does not hold" in failures(run)


@pytest.mark.parametrize(
    "file",
    ["run.json", "ledger.json", "network.json", "network.safetensors", "model.safetensors", "layers/0.safetensors"],
)
def test_a_truncated_file_cannot_be_read(run, file):
    path = run / file
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(RunError, match=f"{path.name} is truncated"):
        nettrim.verify(run)


@pytest.mark.parametrize(
    "file", ["run.json", "network.json", "layers/3.safetensors", "samples/calibration.safetensors"]
)
def test_a_foreign_file_cannot_be_read(run, file):
    (run / file).write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(200))
    with pytest.raises(RunError, match=Path(file).name):
        nettrim.verify(run)


@pytest.mark.parametrize(
    "file", ["ledger.json", "layers/3.safetensors", "run.json", "network.json", "network.safetensors"]
)
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
    # no class is stored: the steps of the forward are, and they compute the same
    assert isinstance(back.model, ProgramModule)
    for x, _ in [*batches, *held_out]:
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

    files.write_atomically(tmp_path / "a.json", b"before")
    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(RunError, match="No space left on device"):
        files.write_atomically(tmp_path / "a.json", b"after")
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
        run_json["files"][name] = hashlib.sha256((path / name).read_bytes()).hexdigest()
    run_json.pop("digest")
    (path / "run.json").write_text(json.dumps(run_json | {"digest": files.digest_json(run_json)}))


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
    tensors, about = files.read_tensors(path)
    about["facts"]["epsilon"] = 0.5
    path.write_bytes(files.tensor_bytes(tensors, about))
    seal(run)
    assert "layers/0.safetensors: it was solved for epsilon=0.5, and run.json asked for 0.1" in failures(run)


def test_sealed_zero_weights_do_not_pass_as_solved(run):
    for name in ("0", "3", "5"):
        path = run / "layers" / f"{name}.safetensors"
        tensors, about = files.read_tensors(path)
        tensors["weight"].zero_()
        path.write_bytes(files.tensor_bytes(tensors, about))
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
    tensors, about = files.read_tensors(layer)
    tensors["weight"] *= 2
    layer.write_bytes(files.tensor_bytes(tensors, about))
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


@pytest.mark.parametrize("edit", [{"files": 3}, {"layers": [1]}, {"amount": {}}])
def test_json_of_another_shape_is_refused(run, edit):
    change(run / "run.json", lambda v: v.update(edit))
    with pytest.raises(RunError, match="run"):
        nettrim.verify(run)


# ---- what a directory holds, and networks that are no chains


class Residual(nn.Module):
    """Convolutions with a batch norm and groups, a skip connection, and a buffer that is not saved."""

    def __init__(self):
        super().__init__()
        self.one = nn.Conv2d(2, 4, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(4)
        self.two = nn.Conv2d(4, 4, 3, padding=1, groups=2)
        self.head = nn.Linear(4 * 36, 5)
        self.register_buffer("shift", torch.linspace(-1, 1, 4)[:, None, None], persistent=False)

    def forward(self, x):
        x = self.norm(self.one(x)).relu()
        return self.head((x + self.two(x + self.shift).relu()).flatten(1))


@pytest.fixture
def residual():
    torch.manual_seed(3)
    model = Residual()
    with torch.no_grad():
        model.norm.running_mean.normal_()
        model.norm.running_var.uniform_(0.5, 2.0)
        model.norm.weight.uniform_(0.5, 2.0)
        model.norm.bias.normal_()
    images = torch.randn(50, 2, 6, 6)
    return model, [images[:20], images[20:40]], [images[40:]]


def test_what_lies_in_a_run_directory(run):
    found = {path.relative_to(run).as_posix() for path in run.rglob("*") if path.is_file()}
    layers = {f"layers/{name}.safetensors" for name in ("0", "3", "5")}
    samples = {"samples/calibration.safetensors", "samples/held-out.safetensors"}
    others = {
        "run.json",
        "ledger.json",
        "network.json",
        "network.safetensors",
        "model.safetensors",
        "masks.safetensors",
    }
    assert found == layers | samples | others
    about = json.loads((run / "run.json").read_text())
    assert about["schema"] == 4
    assert set(about["files"]) == found - {"run.json"}
    assert [layer["name"] for layer in about["layers"]] == ["0", "3", "5"]
    assert "chain" not in about
    assert about["not_stored"] == {}


@pytest.mark.parametrize("schedule", ["parallel", "cascade"])
@pytest.mark.parametrize("method", ["net-trim", "magnitude"])
def test_networks_of_branches_and_convolutions_are_stored_and_hold(tmp_path, residual, method, schedule):
    model, batches, held_out = residual
    amount = {"epsilon": 0.2} if method == "net-trim" else {"sparsity": 0.6}
    given = dict(amount, schedule=schedule, held_out=held_out, out_dir=tmp_path / "run", progress=False)
    result = nettrim.prune(model, batches, method, **given)
    assert failures(tmp_path / "run") == ""
    plain, named = nettrim.load_result(tmp_path / "run"), nettrim.load_result(tmp_path / "run", model)
    assert isinstance(plain.model, ProgramModule)
    assert isinstance(named.model, Residual)
    x = torch.cat(batches)
    with torch.no_grad():
        wanted = result.model(x)
        torch.testing.assert_close(plain.model(x), wanted, rtol=1e-4, atol=1e-5)
        assert torch.equal(named.model(x), wanted)
        assert plain.model(x[:3]).shape == (3, 5)
    again = nettrim.prune(model, batches, method, **given, resume=True)
    assert all(torch.equal(again.model.state_dict()[k], v) for k, v in result.model.state_dict().items())
    for i, each in enumerate((plain, named)):
        each.save(tmp_path / f"again {i}")
        assert failures(tmp_path / f"again {i}") == ""
        last = nettrim.load_result(tmp_path / f"again {i}", model).model
        assert all(torch.equal(last.state_dict()[k], v) for k, v in result.model.state_dict().items())


def edit_network(path, edit):
    tensors, about = files.read_tensors(path / "network.safetensors")
    edit(tensors)
    (path / "network.safetensors").write_bytes(files.tensor_bytes(tensors, about or None))
    seal(path)


FORGED = {
    "a dense weight": lambda p: edit_network(p, lambda t: t["head.weight"].mul_(1.01)),
    "a variance": lambda p: edit_network(p, lambda t: t["norm.running_var"].mul_(1.01)),
    "a step": lambda p: (
        change(p / "network.json", lambda v: swap_step(v, "torch.Tensor.relu", "torch.Tensor.tanh")), seal(p)
    ),
    "the pruned batch norm": lambda p: forged_model(p, "norm.bias", 0.01),
    "the pruned weight": lambda p: forged_model(p, "two.weight", 0.01),
}  # fmt: skip


def swap_step(network, old, new):
    step = next(step for step in network["program"]["steps"] if step["target"] == old)
    step["target"] = new


def forged_model(path, name, by):
    tensors, about = files.read_tensors(path / "model.safetensors")
    tensors[name] += by
    (path / "model.safetensors").write_bytes(files.tensor_bytes(tensors, about or None))
    seal(path)


@pytest.mark.parametrize("forge", FORGED.values(), ids=FORGED)
def test_a_sealed_change_of_the_network_is_found_by_its_figures(tmp_path, residual, forge):
    model, batches, held_out = residual
    nettrim.prune(model, batches, held_out=held_out, out_dir=tmp_path / "run", **AMOUNT)
    forge(tmp_path / "run")
    found = failures(tmp_path / "run")
    assert "SHA-256" not in found
    assert "is stored as" in found or "is not the one in layers/" in found


@pytest.mark.parametrize("name", ["one.weight", "two.bias", "norm.weight", "norm.running_var"])
def test_an_entry_missing_in_the_model_is_said(tmp_path, residual, name):
    model, batches, _ = residual
    nettrim.prune(model, batches, out_dir=tmp_path / "run", **AMOUNT)
    tensors, about = files.read_tensors(tmp_path / "run" / "model.safetensors")
    del tensors[name]
    (tmp_path / "run" / "model.safetensors").write_bytes(files.tensor_bytes(tensors, about or None))
    seal(tmp_path / "run")
    assert f"the stored layers do not fit together: 'model.safetensors has no {name}'" in failures(tmp_path / "run")
    for given in ((), (model,)):
        with pytest.raises(RunError, match=name.replace(".", r"\.")):
            nettrim.load_result(tmp_path / "run", *given)


@pytest.mark.parametrize(
    ("changed", "said"),
    [({"rows": 64}, "rows"), ({"memory_limit": "1 GiB"}, "memory_limit"), ({"forms": {"two": "linear"}}, "forms")],
    ids=["rows", "memory limit", "forms"],
)
def test_other_rows_limits_or_forms_are_another_run(tmp_path, residual, changed, said):
    model, batches, _ = residual
    nettrim.prune(model, batches, out_dir=tmp_path / "run", **AMOUNT)
    with pytest.raises(RunError, match=f"another {said}"):
        nettrim.prune(model, batches, out_dir=tmp_path / "run", resume=True, **AMOUNT, **changed)


def test_samples_beyond_the_memory_limit_are_not_stored_and_that_is_said(tmp_path, network):
    x = torch.randn(110_000, 12)
    given = dict(method="magnitude", sparsity=0.5, out_dir=tmp_path / "run", memory_limit=2**24, progress=False)
    result = nettrim.prune(network, (part for part in x.split(10_000)), **given)
    assert not (tmp_path / "run" / "samples" / "calibration.safetensors").exists()
    found = nettrim.verify(tmp_path / "run")
    assert found.holds
    assert found.state.startswith("finished, and only its files and amounts could be checked")
    assert "the calibration samples are 5 MiB, more than is held in memory" in found.state
    with pytest.raises(RunError, match="pass model, a module of its class"):
        nettrim.load_result(tmp_path / "run")
    back = nettrim.load_result(tmp_path / "run", network)
    assert torch.equal(back.model[0].weight, result.model[0].weight)
    with pytest.raises(RunError, match="copy its directory"):
        back.save(tmp_path / "second")
    (tmp_path / "run" / "model.safetensors").write_bytes(b"")
    assert not nettrim.verify(tmp_path / "run").holds
