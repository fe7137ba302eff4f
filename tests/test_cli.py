"""The command line as a user types it: exit codes, one-line errors, JSON on stdout."""

import json
import os
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import nettrim
from nettrim.cli import main

FACTORY = """
from torch import nn

def network():
    return nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 5))

def odd():
    return nn.Sequential(
        nn.Linear(12, 16), nn.Unflatten(1, (1, 16)), nn.ConvTranspose1d(1, 1, 3), nn.Flatten(), nn.Linear(18, 5)
    )

def nothing():
    return None

def broken():
    raise OSError("no such\\nweights")

def leaving():
    raise SystemExit
"""

SIBLINGS = """
from __future__ import annotations
from dataclasses import dataclass
from sizes import WIDTH
from torch import nn

@dataclass
class Config:
    width: int = WIDTH

def network():
    return nn.Sequential(nn.Linear(12, Config().width), nn.ReLU(), nn.Linear(16, 5))
"""


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A working directory with a factory, weights for it, a data file and a layer file."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "net.py").write_text(FACTORY)
    generator = torch.Generator().manual_seed(0)

    def random(*shape):
        return torch.randn(*shape, generator=generator) / shape[-1] ** 0.5

    weights = {"0.weight": random(16, 12), "0.bias": random(16), "2.weight": random(5, 16), "2.bias": random(5)}
    save_file(weights, tmp_path / "net.safetensors")
    x = np.random.default_rng(0).standard_normal((80, 12)).astype(np.float32)
    labels = np.arange(80) % 5
    np.savez(tmp_path / "data.npz", inputs=x[:60], labels=labels[:60], test_inputs=x[60:], test_labels=labels[60:])
    y = np.maximum(x @ weights["0.weight"].numpy().T, 0)
    np.savez(tmp_path / "layer.npz", inputs=x, targets=y)
    np.save(tmp_path / "array.npy", x)
    np.savez(tmp_path / "text.npz", inputs=x, targets=y, penalty=np.array("1"))
    np.savez(tmp_path / "complex.npz", inputs=x, targets=y, penalty=np.ones(12) * 1j)
    np.savez_compressed(tmp_path / "packed.npz", inputs=x, targets=y)
    content = bytearray((tmp_path / "packed.npz").read_bytes())
    (tmp_path / "short.npz").write_bytes(content[: len(content) // 2])
    content[len(content) // 3] ^= 0x10
    (tmp_path / "flipped.npz").write_bytes(content)
    return tmp_path


PRUNE = ["prune", "--model", "net.py:network", "--weights", "net.safetensors", "--data", "data.npz"]


def test_prune_then_verify_then_tamper(place, capsys):
    assert main([*PRUNE, "--epsilon", "0.1", "--out", "run", "--json"]) == 0
    printed = capsys.readouterr()
    ledger = json.loads(printed.out)
    assert [record["name"] for record in ledger["records"]] == ["0", "2"]
    assert printed.err == ""
    assert main(["verify", "run"]) == 0
    assert "0 do not hold; run finished" in capsys.readouterr().out
    changed = (place / "run" / "ledger.json").read_text().replace('"kept": ', '"kept": 1')
    (place / "run" / "ledger.json").write_text(changed)
    assert main(["verify", "run"]) == 1
    assert "DOES NOT HOLD  ledger.json: records[0].kept is stored as" in capsys.readouterr().out
    assert main(["verify", "run", "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["holds"] is False
    (place / "run" / "model.safetensors").write_bytes(b"short")
    assert main(["verify", "run"]) == 2
    assert "model.safetensors is truncated" in capsys.readouterr().err


def test_prune_table_and_options(place, capsys):
    given = ["--schedule", "parallel", "--form", "halfspace", "--bias", "penalised", "--gamma", "1.2", "--tol", "0.005"]
    assert main([*PRUNE, "--epsilon", "0=0.1,2=0.2", "--out", "run", "--samples", "50", *given]) == 0
    table = capsys.readouterr().out
    assert table.startswith("net-trim, parallel\n")
    assert "accuracy, held-out" in table
    settings = json.loads((place / "run" / "run.json").read_text())
    assert settings["amount"] == {"epsilon": {"0": 0.1, "2": 0.2}}
    for text in ("form='halfspace'", "bias='penalised'", "gamma=1.2", "tol=0.005"):
        assert text in settings["method_settings"]


@pytest.mark.parametrize("method", ["magnitude", "l-obs"])
def test_prune_by_sparsity(place, capsys, method):
    assert main([*PRUNE, "--method", method, "--sparsity", "0.75", "--out", "run", "--json"]) == 0
    assert [r["kept"] for r in json.loads(capsys.readouterr().out)["records"]] == [48, 20]


def test_resume_goes_on_and_refuses_other_settings(place, capsys):
    run = [*PRUNE, "--epsilon", "0.1", "--out", "run", "--json"]
    assert main(run) == 0
    assert main([*run, "--resume"]) == 0
    assert main([*PRUNE, "--epsilon", "0.2", "--out", "run", "--resume"]) == 2
    assert "another amount" in capsys.readouterr().err


@pytest.mark.filterwarnings("default")  # shown on stderr, as a user sees it
def test_an_uncertified_layer_exits_1(place, capsys):
    run = [*PRUNE, "--epsilon", "0.05", "--tol", "1e-13", "--max-seconds", "0.001"]
    assert main([*run, "--out", "run"]) == 1
    assert "NOT certified within the tolerance: 0 (" in capsys.readouterr().out
    assert main([*run, "--out", "again", "--json"]) == 1
    found = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)
    assert found["records"][0]["facts"]["status"] != "SOLVED"


@pytest.mark.parametrize("name", ["siblings.py", "json.py", "my-net.v2.py"])
def test_a_model_file_is_imported_as_python_imports_it(place, capsys, monkeypatch, name):
    monkeypatch.setattr(sys, "path", sys.path.copy())
    monkeypatch.delitem(sys.modules, "sizes", raising=False)
    (place / "models").mkdir()
    (place / "models" / "sizes.py").write_text("WIDTH = 16")
    (place / "models" / name).write_text(SIBLINGS)
    command = ["prune", "--model", f"models/{name}:network", "--data", "data.npz", "--epsilon", "0.3", "--json"]
    assert main([*command, "--out", "run"]) == 0
    assert sys.modules["json"] is json
    # read anew each time: the file may have changed between two calls in one process
    (place / "models" / name).write_text(SIBLINGS.replace("def network", "def other"))
    assert main([*command, "--out", "again"]) == 2
    assert "has no network" in capsys.readouterr().err


def test_solve(place, capsys):
    assert main(["solve", "layer.npz", "--epsilon", "0.1", "--json", "--out", "solved.npz"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["status"] == "SOLVED"
    assert found["certificate"]["gap"] <= 1e-3
    with np.load("layer.npz") as layer, np.load("solved.npz") as solved:
        problem = nettrim.LayerProblem(
            torch.from_numpy(layer["inputs"]), torch.from_numpy(layer["targets"]),
            radius=0.1 * float(np.linalg.norm(layer["targets"].astype(float))),
        )  # fmt: skip
        again = nettrim.certify(problem, solved["weight"], solved["multipliers"])
    assert again.gap == pytest.approx(found["certificate"]["gap"], abs=1e-9)
    assert main(["solve", "layer.npz", "--epsilon", "0.1", "--solver", "clarabel"]) == 0
    assert "SOLVED" in capsys.readouterr().out


def test_solve_that_does_not_reach_its_tolerance_exits_1(place, capsys):
    assert main(["solve", "layer.npz", "--epsilon", "0.05", "--tol", "1e-12", "--max-seconds", "0.05"]) == 1
    assert re.search("TIME_LIMIT|NOT_FEASIBLE", capsys.readouterr().out)


def test_info(capsys):
    assert main(["info", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["solvers"] == list(nettrim.SOLVERS)
    assert facts["methods"] == list(nettrim.METHODS)
    assert facts["versions"]["torch"] == torch.__version__
    assert main(["info"]) == 0
    assert "clarabel" in capsys.readouterr().out


BAD = {
    "no command": [],
    "unknown command": ["trim"],
    "no amount": [*PRUNE, "--out", "run"],
    "two amounts": [*PRUNE, "--epsilon", "0.1", "--lam", "1", "--out", "run"],
    "amount no number": [*PRUNE, "--epsilon", "much", "--out", "run"],
    "amount zero": [*PRUNE, "--epsilon", "0", "--out", "run"],
    "method": [*PRUNE, "--epsilon", "0.1", "--method", "trim", "--out", "run"],
    "solver": [*PRUNE, "--epsilon", "0.1", "--solver", "gurobi", "--out", "run"],
    "option of another method": [*PRUNE, "--sparsity", "0.5", "--method", "magnitude", "--form", "ball", "--out", "r"],
    "schedule": [*PRUNE, "--epsilon", "0.1", "--schedule", "x", "--out", "run"],
    "layer": [*PRUNE, "--epsilon", "0.1", "--layers", "fc7", "--out", "run"],
    "samples": [*PRUNE, "--epsilon", "0.1", "--samples", "0", "--out", "run"],
    "jobs": [*PRUNE, "--epsilon", "0.1", "--jobs", "0", "--out", "run"],
    "unsupported layer": ["prune", "--model", "net.py:odd", "--data", "data.npz", "--epsilon", "0.1", "--out", "run"],
    "no module": ["prune", "--model", "net.py:nothing", "--data", "data.npz", "--epsilon", "0.1", "--out", "run"],
    "factory raises": ["prune", "--model", "net.py:broken", "--data", "data.npz", "--epsilon", "0.1", "--out", "run"],
    "factory exits": ["prune", "--model", "net.py:leaving", "--data", "data.npz", "--epsilon", "0.1", "--out", "run"],
    "seed": [*PRUNE, "--epsilon", "0.1", "--seed", "99999999999999999999", "--out", "run"],
    "no factory": ["prune", "--model", "net.py:absent", "--data", "data.npz", "--epsilon", "0.1", "--out", "run"],
    "no file": ["prune", "--model", "absent.py:f", "--data", "data.npz", "--epsilon", "0.1", "--out", "run"],
    "no package": ["prune", "--model", "absent.sub:f", "--data", "data.npz", "--epsilon", "0.1", "--out", "run"],
    "no colon": ["prune", "--model", "net.py", "--data", "data.npz", "--epsilon", "0.1", "--out", "run"],
    "data": ["prune", "--model", "net.py:network", "--data", "absent.npz", "--epsilon", "0.1", "--out", "run"],
    "mnist absent": ["prune", "--model", "net.py:network", "--data", "mnist:no", "--epsilon", "0.1", "--out", "run"],
    "weights": ["prune", "--model", "net.py:network", "--weights", "net.py", "--data", "data.npz", "--epsilon", "0.1",
                "--out", "run"],
    "solve no file": ["solve", "absent.npz", "--epsilon", "0.1"],
    "solve no arrays": ["solve", "data.npz", "--epsilon", "0.1"],
    "solve two amounts": ["solve", "layer.npz", "--epsilon", "0.1", "--radius", "1"],
    "solve no such form": ["solve", "layer.npz", "--epsilon", "0.1", "--form", "round"],
    "solve no such place": ["solve", "layer.npz", "--epsilon", "0.1", "--out", "no/where.npz"],
    "solve into a directory": ["solve", "layer.npz", "--epsilon", "0.1", "--out", "."],
    "solve into its own input": ["solve", "layer.npz", "--epsilon", "0.1", "--out", "./layer.npz"],
    "solve truncated": ["solve", "short.npz", "--epsilon", "0.1"],
    "solve bit-flipped": ["solve", "flipped.npz", "--epsilon", "0.1"],
    "solve npy": ["solve", "array.npy", "--epsilon", "0.1"],
    "solve penalty of text": ["solve", "text.npz", "--epsilon", "0.1"],
    "solve complex penalty": ["solve", "complex.npz", "--epsilon", "0.1"],
    "verify no directory": ["verify", "absent"],
    "demo nan": ["demo", "--out", "demo", "--epsilon", "nan"],
    "demo seed": ["demo", "--out", "demo", "--seed", "-9999999999999999999"],
    "demo onto a file": ["demo", "--out", "net.py"],
}  # fmt: skip


@pytest.mark.parametrize("arguments", BAD.values(), ids=BAD)
def test_bad_input_is_one_line_and_exit_2(place, capsys, arguments):
    before = {p for p in place.rglob("*") if "__pycache__" not in p.parts}
    assert main(arguments) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("nettrim")
    assert len(printed.err.strip().splitlines()) == 1
    assert {p for p in place.rglob("*") if "__pycache__" not in p.parts} == before


def test_bad_numbers_in_the_data_are_refused(place, capsys):
    np.savez("data.npz", inputs=np.full((4, 12), np.nan, dtype=np.float32))
    assert main([*PRUNE, "--epsilon", "0.1", "--out", "run"]) == 2
    assert "NaN" in capsys.readouterr().err


def test_debug_shows_the_traceback(place, capsys):
    assert main(["verify", "absent", "--debug"]) == 2
    assert "Traceback" in capsys.readouterr().err


def test_the_demo_certifies_every_layer_of_both_schedules(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for _ in range(2):  # the second replaces the first
        assert main(["demo", "--json", "--out", "demo"]) == 0
        shown = json.loads(capsys.readouterr().out)
    for schedule in ("parallel", "cascade"):
        ledger = shown["schedules"][schedule]
        for record in ledger["records"]:
            assert record["gap"] <= 1e-3
            assert record["violation"] <= 1e-6
            assert record["measured"] <= record["promised"]
            for bound in record["bounds"].values():
                assert record["network_error"] <= bound * (1 + 1e-9)
        for bound in ledger["bounds"].values():
            assert ledger["measured"] <= bound * (1 + 1e-9)
        assert ledger["accuracy"]["held-out"]["dense"] > 0.95
        assert main(["verify", f"demo/{schedule}"]) == 0
        capsys.readouterr()
    assert (tmp_path / "demo" / "demo.png").read_bytes().startswith(b"\x89PNG")


def test_the_demo_does_not_replace_what_is_not_its_own(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "demo" / "cascade").mkdir(parents=True)
    (tmp_path / "demo" / "cascade" / "thesis.txt").write_text("all of it")
    assert main(["demo", "--out", "demo"]) == 2
    assert "no run directory" in capsys.readouterr().err
    assert (tmp_path / "demo" / "cascade" / "thesis.txt").read_text() == "all of it"


def test_the_demo_does_not_replace_a_run_or_a_picture_of_the_users(place, capsys, monkeypatch):
    assert main([*PRUNE, "--epsilon", "0.1", "--out", "dm/cascade"]) == 0
    before = {path: path.read_bytes() for path in (place / "dm").rglob("*") if path.is_file()}
    for options in (["--epsilon", "-1"], ["--seed", "99999999999999999999"], []):
        capsys.readouterr()
        assert main(["demo", "--out", "dm", *options]) == 2
        assert len(capsys.readouterr().err.splitlines()) == 1
        assert {path: path.read_bytes() for path in (place / "dm").rglob("*") if path.is_file()} == before
    (place / "pictures").mkdir()
    (place / "pictures" / "demo.png").write_bytes(b"mine")
    assert main(["demo", "--out", "pictures"]) == 2
    assert "no demonstration made it" in capsys.readouterr().err


@pytest.mark.parametrize("library", ["matplotlib.figure", "sklearn.datasets"])
def test_the_demo_misses_a_library_before_it_deletes(place, capsys, monkeypatch, library):
    assert main([*PRUNE, "--epsilon", "0.1", "--out", "dm/cascade"]) == 0
    (place / "dm" / ".nettrim-demo").touch()
    before = (place / "dm" / "cascade" / "run.json").read_bytes()
    monkeypatch.setitem(sys.modules, library, None)
    capsys.readouterr()
    assert main(["demo", "--out", "dm"]) == 2
    assert "pip install" in capsys.readouterr().err
    assert (place / "dm" / "cascade" / "run.json").read_bytes() == before


def test_ctrl_c_exits_130_and_keeps_what_was_finished(place, capsys):
    x = np.random.default_rng(1).standard_normal((4000, 12)).astype(np.float32)
    np.savez("data.npz", inputs=x)
    # the second layer takes for ever: a gap that no arithmetic reaches
    (place / "slow.py").write_text(
        "import nettrim, signal, sys\n"
        # a shell that works in the background starts its children with the signal ignored
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "from nettrim.methods.net_trim import NetTrim\n"
        "plain = NetTrim.prune_layer\n"
        "def slow(self, task):\n"
        "    import time\n"
        "    if task.name == '2':\n"
        "        print('second layer', file=sys.stderr, flush=True)\n"
        "        time.sleep(120)\n"
        "    return plain(self, task)\n"
        "NetTrim.prune_layer = slow\n"
        "from nettrim.cli import main\n"
        "sys.exit(main(sys.argv[1:]))\n"
    )
    command = [sys.executable, "slow.py", *PRUNE, "--epsilon", "0.1", "--out", "run"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert process.stderr.readline().strip() == "second layer"
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert err.strip() == "nettrim: interrupted. What was finished is kept; --resume goes on."
    began = time.monotonic()
    assert main(["verify", "run"]) == 0
    assert "1 of 2 layers finished" in capsys.readouterr().out
    assert main([*PRUNE, "--epsilon", "0.1", "--out", "run", "--resume"]) == 0
    assert time.monotonic() - began < 60
