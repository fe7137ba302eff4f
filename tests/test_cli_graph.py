"""The command line on networks of any shape: archives, memory, unsupported weights, and the forms a run leaves in."""

import json
import os
import shutil
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import nettrim
from nettrim.cli import main
from nettrim.errors import DataError
from nettrim.loading import load_model
from nettrim.pipeline.outputs import SPEED, read_csr, read_packed

FACTORY = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.norm = nn.Conv2d(1, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)
        self.branch = nn.Conv2d(4, 4, 3, padding=1)
        self.head = nn.Linear(64, 3)

    def forward(self, x):
        y = torch.relu(self.norm(self.conv(x)))
        y = torch.relu(y + self.branch(y))
        return self.head(y.flatten(1))

def network():
    return Net().eval()

class Turning(Net):
    def __init__(self):
        super().__init__()
        self.back = nn.ConvTranspose2d(4, 4, 1)

    def forward(self, x):
        y = torch.relu(self.back(self.norm(self.conv(x))))
        return self.head(torch.relu(y + self.branch(y)).flatten(1))

def turning():
    return Turning().eval()
"""


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A working directory with a factory and a data file of 4 × 4 images."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "net.py").write_text(FACTORY)
    x = np.random.default_rng(0).standard_normal((80, 1, 4, 4)).astype(np.float32)
    labels = np.arange(80) % 3
    np.savez(tmp_path / "data.npz", inputs=x[:60], labels=labels[:60], test_inputs=x[60:], test_labels=labels[60:])
    return tmp_path


@pytest.fixture
def archive(place):
    """The network as a .pt2 file, for any number of rows."""
    model = load_model("net.py:network", None)
    free = ({0: torch.export.Dim("rows", min=2)},)
    torch.export.save(torch.export.export(model, (torch.randn(5, 1, 4, 4),), dynamic_shapes=free), place / "net.pt2")
    return place / "net.pt2"


@pytest.fixture
def run(place):
    """A finished run in `run`."""
    assert main([*PRUNE, "--method", "magnitude", "--sparsity", "0.75", "--out", "run"]) == 0
    return place / "run"


PRUNE = ["prune", "--model", "net.py:network", "--data", "data.npz"]


def said(capsys, command):
    """Run what must be refused, and return the one line that it prints."""
    assert main(command) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.count("\n") == 1
    return printed.err


# ------------------------------------------------------------------------------------------------- what prune is told


def test_rows_limit_forms_and_selection_reach_the_run(place, capsys):
    given = ["--rows", "100", "--memory-limit", "64 MiB", "--forms", "branch=linear", "--ignore", "Linear"]
    assert main([*PRUNE, "--epsilon", "0.3", "--tol", "0.01", *given, "--out", "run", "--json"]) in (0, 1)
    ledger = json.loads(capsys.readouterr().out)
    assert [(r["name"], r["rows"], r["total_rows"]) for r in ledger["records"]] == [
        ("conv", 100, 960),
        ("branch", 100, 960),
    ]
    settings = json.loads((place / "run" / "run.json").read_text())
    assert (settings["rows"], settings["memory_limit"], settings["forms"]) == (100, 64 * 2**20, {"branch": "linear"})


@pytest.mark.parametrize(("layers", "expected"), [("Conv2d", 2), ("head,conv", 2), ("*", 3), ("b*", 1)])
def test_layers_are_names_globs_and_types(place, capsys, layers, expected):
    command = [*PRUNE, "--method", "magnitude", "--sparsity", "0.5", "--layers", layers, "--out", "run", "--json"]
    assert main(command) == 0
    assert len(json.loads(capsys.readouterr().out)["records"]) == expected


@pytest.mark.parametrize(
    ("given", "named"),
    [
        (["--rows", "3"], "rows=3"),
        (["--memory-limit", "much"], "memory_limit='much'"),
        (["--on-unsupported", "hide"], "--on-unsupported"),
        (["--forms", "branch"], "NAME=linear"),
        (["--forms", "nowhere=linear"], "nowhere"),
        (["--forms", "branch=round"], "round"),
        (["--layers", "Conv9d"], "Conv9d"),
    ],
)
def test_what_is_wrong_with_an_option_is_one_line(place, capsys, given, named):
    assert named in said(capsys, [*PRUNE, "--epsilon", "0.3", *given, "--out", "run"])
    assert not (place / "run").exists()


def test_a_layer_beyond_the_memory_is_named_before_any_work(place, capsys):
    (place / "wide.py").write_text(
        "from torch import nn\n"
        "def network():\n"
        "    return nn.Sequential(nn.Flatten(), nn.Linear(16, 1500), nn.ReLU(), nn.Linear(1500, 3))\n"
    )
    command = ["prune", "--model", "wide.py:network", "--data", "data.npz", "--epsilon", "0.3", "--out", "run"]
    assert "layer '3' with 1500 inputs" in said(capsys, [*command, "--memory-limit", "16 MiB"])
    assert not (place / "run").exists()


def test_compare_takes_them_too(place, capsys):
    command = ["compare", "--model", "net.py:turning", "--data", "data.npz", "--methods", "magnitude"]
    command += ["--sparsity", "0.5", "--layers", "conv,back,head", "--rows", "64", "--memory-limit", "64 MiB"]
    assert "back" in said(capsys, [*command, "--out", "refused"])
    assert main([*command, "--on-unsupported", "keep", "--out", "kept", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [layer["name"] for layer in found["rows"][0]["layers"]] == ["conv", "head"]


# ------------------------------------------------------------------------------------------------ what prune prints


def test_the_summary_says_what_was_done_and_what_it_is_worth(place, capsys):
    command = ["prune", "--model", "net.py:turning", "--data", "data.npz", "--epsilon", "0.3", "--tol", "0.01"]
    assert "back" in said(capsys, [*command, "--layers", "conv,back,head", "--out", "refused"])
    command += ["--layers", "conv,back,head", "--on-unsupported", "keep", "--rows", "100"]
    assert main([*command, "--out", "run"]) in (0, 1)
    printed = capsys.readouterr().out
    stored = nettrim.load_result("run").ledger
    assert "100/960" in printed
    assert f"left dense: back, which {stored.unsupported['back']}" in printed
    # the bounds stand in order, the tightest first
    bounds = printed.split("bounded by\n")[1]
    assert bounds.split()[1] == min(stored.bounds, key=lambda name: stored.bounds[name]).split()[0]
    assert "held-out samples change their predicted class" in printed
    for form in ("dense", "csr", "bitmask"):
        assert f"{sum(record.bytes[form] for record in stored.records):,} {form}" in printed
    assert SPEED in printed


# ------------------------------------------------------------------------------------------------------------- archives


def test_an_archive_is_pruned_as_its_module_is(place, archive, capsys):
    amount = ["--method", "magnitude", "--sparsity", "0.5"]
    assert main([*PRUNE, *amount, "--out", "one"]) == 0
    assert main(["prune", "--model", "net.pt2", "--data", "data.npz", *amount, "--out", "two"]) == 0
    printed = capsys.readouterr()
    assert printed.err == ""
    one, two = (load_file(place / name / "model.safetensors") for name in ("one", "two"))
    for name in ("conv.weight", "branch.weight", "head.weight"):
        assert torch.equal(one[name], two[name])
    assert main(["verify", "two"]) == 0


def test_weights_are_loaded_into_an_archive(place, archive, run):
    model = load_model("net.pt2", str(run / "model.safetensors"))
    assert int((model.get_parameter("head.weight") == 0).sum()) == 144


def changed(path, edit, skip=()):
    """Write an archive anew with its files edited."""
    with zipfile.ZipFile(path) as old:
        content = {name: old.read(name) for name in old.namelist() if not any(part in name for part in skip)}
    with zipfile.ZipFile(path, "w") as new:
        for name, data in content.items():
            new.writestr(name, edit(name, data))


class Evil:
    """What must never be run."""

    def __reduce__(self):
        return Path.touch, (Path("touched"),)


def swap(before, after):
    return lambda name, data: data.replace(before, after) if name.endswith("model.json") else data


def pickled(name, data):
    if not name.endswith("sample_inputs/model.pt"):
        return data
    torch.save((Evil(),), "evil.pt")
    return Path("evil.pt").read_bytes()


TAMPERED = {
    "pickled example inputs": (pickled, ""),
    "call of python": (swap(b"torch.ops.aten.relu.default", b"torch.serialization.load"), "no tensor operation"),
    "size that runs": (swap(b"Symbol('s", b"open('s"), "no plain formula"),
    "dunder": (swap(b"Symbol('s", b"X.__class__('s"), "no plain formula"),
    "pickled weights": (
        lambda name, data: data.replace(b'"use_pickle":false', b'"use_pickle":true').replace(
            b'"use_pickle": false', b'"use_pickle": true'
        ),
        "pickled objects",
    ),
}


@pytest.mark.parametrize("kind", TAMPERED)
def test_an_archive_that_brings_code_is_refused(place, archive, capsys, kind):
    edit, named = TAMPERED[kind]
    before = archive.read_bytes()
    changed(archive, edit)
    assert archive.read_bytes() != before
    found = said(capsys, ["prune", "--model", "net.pt2", "--data", "data.npz", "--epsilon", "0.3", "--out", "run"])
    assert named in found
    assert "net.pt2 cannot be read as an archive of torch.export.save" in found
    assert not (place / "touched").exists()
    assert "TORCH_FORCE_WEIGHTS_ONLY_LOAD" not in os.environ


def test_guards_are_not_run(place, archive):
    def edit(name, data):
        if not name.endswith("model.json"):
            return data
        code = "__import__('pathlib').Path('touched').touch() is None"
        return json.dumps(json.loads(data) | {"guards_code": [code]}).encode()

    changed(archive, edit)
    load_model("net.pt2", None)(torch.randn(3, 1, 4, 4))
    assert not (place / "touched").exists()


def test_compiled_code_is_refused(place, archive):
    with zipfile.ZipFile(archive, "a") as file:
        file.writestr("net/data/aotinductor/model/a.so", b"code")
    with pytest.raises(DataError, match="compiled code"):
        load_model("net.pt2", None)


@pytest.mark.parametrize("kind", ["empty", "short", "flipped", "foreign zip", "state dict", "text", "missing"])
def test_a_damaged_or_foreign_archive_is_one_sentence(place, archive, capsys, kind):
    content = bytearray(archive.read_bytes())
    flipped = bytearray(content)
    with zipfile.ZipFile(archive) as file:
        largest = max((entry for entry in file.infolist() if "/weights/" in entry.filename), key=lambda e: e.file_size)
    # in the middle of its numbers, behind its name and padding
    flipped[largest.header_offset + 30 + len(largest.filename) + largest.file_size // 2] ^= 0x10
    made = {"empty": b"", "short": content[: len(content) // 2], "flipped": flipped, "text": b"model"}
    if kind in made:
        archive.write_bytes(made[kind])
    elif kind == "missing":
        archive.unlink()
    elif kind == "state dict":
        torch.save(nn.Linear(2, 2).state_dict(), archive)
    else:
        with zipfile.ZipFile(archive, "w") as file:
            file.writestr("a/b.txt", "c")
    found = said(capsys, ["prune", "--model", "net.pt2", "--data", "data.npz", "--epsilon", "0.3", "--out", "run"])
    assert "net.pt2" in found
    assert ("is damaged" in found) == (kind == "flipped")
    assert not (place / "run").exists()


# --------------------------------------------------------------------------------------------------------------- export


def test_every_form_holds_the_pruned_weights(run, capsys):
    state, masks = load_file(run / "model.safetensors"), load_file(run / "masks.safetensors")
    for form, read in {"packed": read_packed, "csr": read_csr, "masks": load_file}.items():
        capsys.readouterr()
        assert main(["export", "run", "--form", form, "--out", form]) == 0
        printed = capsys.readouterr().out
        assert f"{form}: {Path(form).stat().st_size:,} bytes" in printed
        assert SPEED in printed
        found, expected = read(form), masks if form == "masks" else state
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    assert Path("packed").stat().st_size < (run / "model.safetensors").stat().st_size


@pytest.mark.parametrize("given", [[], ["--model", "net.py:network"], ["--model", "net.pt2"]])
def test_onnx_answers_as_the_pruned_network(run, archive, capsys, given):
    import onnxruntime

    capsys.readouterr()
    assert main(["export", "run", "--form", "onnx", *given, "--out", "net.onnx", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["difference"] <= 1e-4
    session = onnxruntime.InferenceSession("net.onnx", providers=["CPUExecutionProvider"])
    x = torch.randn(7, 1, 4, 4)
    (found,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    model = nettrim.load_result("run", load_model("net.py:network", None)).model
    torch.testing.assert_close(torch.from_numpy(found), model(x), rtol=1e-4, atol=1e-5)


def test_what_cannot_be_exported_is_one_line(run, place, capsys):
    capsys.readouterr()
    command = ["export", "run", "--form", "csr", "--out"]
    Path("taken").write_text("")
    assert "taken exists" in said(capsys, [*command, "taken"])
    assert "no existing directory" in said(capsys, [*command, "nowhere/file"])
    assert "--model net.py:network is given" in said(capsys, [*command, "new", "--model", "net.py:network"])
    assert "--form" in said(capsys, ["export", "run", "--form", "zip", "--out", "new"])
    assert "nowhere" in said(capsys, ["export", "nowhere", "--form", "csr", "--out", "new"])
    shutil.copytree("run", "half")
    settings = json.loads((place / "half" / "run.json").read_text())
    (place / "half" / "run.json").write_text(json.dumps(settings | {"state": "started"}))
    assert "unfinished run (3 of 3 layers finished)" in said(
        capsys, ["export", "half", "--form", "csr", "--out", "new"]
    )
    assert not Path("new").exists()
