"""`nettrim compare` as a user types it."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import nettrim
from nettrim import cli_compare
from nettrim.cli import main
from nettrim.cli_compare import read_budgets
from nettrim.methods.magnitude import Magnitude

NETWORK = """
from torch import nn

def network():
    return nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 5))
"""


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A working directory with data and a factory; networks are trained for a moment only."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cli_compare, "_STEPS", 20)
    (tmp_path / "net.py").write_text(NETWORK)
    generator = torch.Generator().manual_seed(0)
    shapes = {"0.weight": (16, 12), "0.bias": (16,), "2.weight": (5, 16), "2.bias": (5,)}
    save_file(
        {name: torch.randn(shape, generator=generator) / 4 for name, shape in shapes.items()},
        tmp_path / "net.safetensors",
    )
    x = np.random.default_rng(0).standard_normal((100, 12)).astype(np.float32)
    labels = x[:, :5].argmax(1)
    np.savez(tmp_path / "data.npz", inputs=x[:80], labels=labels[:80], test_inputs=x[80:], test_labels=labels[80:])
    np.savez(tmp_path / "plain.npz", inputs=x)
    np.savez(tmp_path / "odd.npz", inputs=x, labels=labels + 1000)
    return tmp_path


GIVEN = ["compare", "--data", "data.npz", "--model", "net.py:network", "--weights", "net.safetensors"]
TRAIN = ["compare", "--data", "data.npz"]


def test_digits_from_start_to_picture(tmp_path):
    """In a process of its own, as it is typed: trained, compared, resumed with more."""
    command = [sys.executable, "-m", "nettrim", "compare", "--data", "digits", "--methods", "l-obs,magnitude"]
    command += ["--sparsity", "0.5", "--out", "out"]
    options = {"cwd": tmp_path, "capture_output": True, "text": True, "env": os.environ | {"OMP_NUM_THREADS": "1"}}
    done = subprocess.run(command, check=False, **options)
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    assert lines[0].startswith("the network out/model.safetensors: 64-300-100-10 with ReLU, trained on the 1,200 ")
    assert float(lines[1].split()[-6]) > 90
    assert [line.split()[:4] for line in lines if line.startswith(("l-obs", "magnitude"))] == [
        ["l-obs", "cascade", "0.5", "50.00"],
        ["magnitude", "cascade", "0.5", "50.00"],
    ]
    assert "picture: out/compare.png" in lines
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "compare.json",
        "compare.png",
        "model.safetensors",
    ]


def test_json_and_resume(place, capsys):
    run = [*TRAIN, "--methods", "magnitude", "--out", "out", "--json"]
    assert main([*run, "--sparsity", "0.5"]) == 0
    printed = capsys.readouterr()
    first = json.loads(printed.out, parse_constant=pytest.fail)
    assert printed.err == ""
    assert first["trained"]["network"] == [12, 300, 100, 5]
    assert set(first["trained"]["accuracy"]) == {"train", "test"}
    weights = (place / "out" / "model.safetensors").read_bytes()
    stored = json.loads((place / "out" / "compare.json").read_text())
    assert stored == {key: first[key] for key in stored}
    assert stored["samples"] == {"calibration": 80, "held-out": 20}
    dense = stored["rows"][0]["accuracy"]["held-out"]["dense"]
    assert dense == first["trained"]["accuracy"]["test"]

    assert main([*run, "--sparsity", "0.5,0.75", "--schedules", "cascade,parallel", "--resume"]) == 0
    more = json.loads(capsys.readouterr().out)
    assert [(row["budget"], row["schedule"]) for row in more["rows"]] == [
        ("0.5", "cascade"),
        ("0.5", "parallel"),
        ("0.75", "cascade"),
        ("0.75", "parallel"),
    ]
    assert more["rows"][0] == first["rows"][0]
    # not trained again
    assert (place / "out" / "model.safetensors").read_bytes() == weights
    assert more["trained"] == first["trained"]
    assert (more["directory"], more["picture"]) == ("out", "out/compare.png")


def test_what_was_trained_is_what_was_pruned(place, capsys):
    assert main([*TRAIN, "--methods", "magnitude", "--sparsity", "0", "--out", "out", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    state = load_file(place / "out" / "model.safetensors")
    x = np.load(place / "data.npz")
    inputs = torch.from_numpy(x["test_inputs"])
    for i in (1, 2, 3):
        inputs = inputs @ state[f"fc{i}.weight"].T + state[f"fc{i}.bias"]
        inputs = inputs.clamp(min=0) if i < 3 else inputs
    right = float((inputs.argmax(1).numpy() == x["test_labels"]).mean())
    row = found["rows"][0]
    assert row["accuracy"]["held-out"] == {"dense": right, "pruned": right}
    assert row["error"]["held-out"] < 1e-12
    again = ["--sparsity", "0", "--methods", "magnitude", "--json"]
    assert main([*TRAIN, *again, "--out", "twin"]) == 0
    assert json.loads(capsys.readouterr().out)["model"] == found["model"]
    assert main([*TRAIN, *again, "--out", "other", "--seed", "1"]) == 0
    assert json.loads(capsys.readouterr().out)["model"] != found["model"]


def test_an_interrupted_training_or_comparison_is_gone_on_with(place, capsys, monkeypatch):
    run = [*TRAIN, "--methods", "magnitude", "--sparsity", "0.5", "--out", "out"]
    plain_train, plain_compare = cli_compare.train, cli_compare.compare

    def stop(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli_compare, "train", stop)
    assert main(run) == 130
    assert not (place / "out").exists()
    monkeypatch.setattr(cli_compare, "train", plain_train)
    monkeypatch.setattr(cli_compare, "compare", stop)
    assert main(run) == 130
    assert [path.name for path in (place / "out").iterdir()] == ["model.safetensors"]
    monkeypatch.setattr(cli_compare, "train", stop)  # it must not be needed again
    monkeypatch.setattr(cli_compare, "compare", plain_compare)
    capsys.readouterr()
    assert main(run) == 2
    assert "already holds something" in capsys.readouterr().err
    assert main([*run, "--resume"]) == 0
    assert "picture: out/compare.png" in capsys.readouterr().out


def test_a_given_network(place, capsys):
    run = [*GIVEN, "--methods", "l-obs,magnitude", "--out", "out"]
    assert main([*run, "--sparsity", "0.5", "--sparsity", "0=0.75,2=0.5;0=0.5,2=0.75", "--samples", "50"]) == 0
    printed = capsys.readouterr()
    assert "trained" not in printed.out
    assert printed.out.startswith("network 12-16-5: 272 weights to prune")
    found = json.loads((place / "out" / "compare.json").read_text())
    assert found["samples"]["calibration"] == 50
    assert [row["budget"] for row in found["rows"]] == [
        *["0.5"] * 2,
        *["0=0.75,2=0.5"] * 2,
        *["0=0.5,2=0.75"] * 2,
    ]
    assert [layer["kept"] for layer in found["rows"][2]["layers"]] == [48, 40]
    assert not (place / "out" / "model.safetensors").exists()
    assert main([*TRAIN, "--sparsity", "0.5", "--out", "out", "--resume"]) == 2
    assert "give it again by --model" in capsys.readouterr().err
    assert main([*run, "--sparsity", "0.5", "--out", "out", "--resume", "--samples", "40"]) == 2
    assert "differs in data" in capsys.readouterr().err


def test_all_methods_that_set_single_weights_to_zero_are_the_default(place, capsys):
    made = {name: make() for name, make in nettrim.METHODS.items()}
    takes = [name for name, m in made.items() if "sparsity" in m.amounts and hasattr(m, "prune_layer")]
    assert main([*GIVEN, "--sparsity", "0.5", "--ignore", "2", "--out", "out", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [row["method"] for row in found["rows"]] == takes
    assert [layer["name"] for layer in found["rows"][0]["layers"]] == ["0"]


def test_without_held_out_samples_and_labels(place, capsys):
    run = ["compare", "--data", "plain.npz", "--model", "net.py:network", "--methods", "magnitude", "--sparsity", "0.5"]
    assert main([*run, "--out", "out"]) == 0
    printed = capsys.readouterr().out
    assert "calibration error" in printed
    assert "accuracy" not in printed


def test_a_failed_row_exits_1_and_is_shown(place, capsys, monkeypatch):
    plain = Magnitude.prune_layer

    def at_odds(self, task):
        if task.value == 0.75:
            raise RuntimeError("out of luck")
        return plain(self, task)

    monkeypatch.setattr(Magnitude, "prune_layer", at_odds)
    run = [*GIVEN, "--methods", "magnitude", "--out", "out"]
    assert main([*run, "--sparsity", "0.75"]) == 1
    printed = capsys.readouterr().out
    assert "FAILED  magnitude, cascade, 0.75: RuntimeError: out of luck" in printed
    assert "no picture: every row failed" in printed
    assert not (place / "out" / "compare.png").exists()
    assert main([*run, "--sparsity", "0.5", "--resume", "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert [row["failure"] for row in found["rows"]] == ["RuntimeError: out of luck", None]
    assert (place / "out" / "compare.png").exists()
    monkeypatch.setattr(Magnitude, "prune_layer", plain)
    assert main([*run, "--sparsity", "0.75", "--resume"]) == 0


def test_an_uncertified_row_exits_1(place, capsys, monkeypatch):
    plain = Magnitude.prune_layer

    def doubtful(self, task):
        found = plain(self, task)
        found.facts["status"] = "TIME_LIMIT"
        return found

    monkeypatch.setattr(Magnitude, "prune_layer", doubtful)
    assert main([*GIVEN, "--methods", "magnitude", "--sparsity", "0.5", "--out", "out"]) == 1
    assert "NOT certified within the tolerance  magnitude, cascade, 0.5: 0, 2" in capsys.readouterr().out


def test_finish_is_handed_on(place, capsys, monkeypatch):
    seen = []
    plain = cli_compare.compare

    def watching(*args, **kwargs):
        seen.append(kwargs["finish"])
        return plain(*args, **kwargs | {"finish": None})

    monkeypatch.setattr(cli_compare, "compare", watching)
    run = [*GIVEN, "--methods", "magnitude", "--sparsity", "0.5"]
    assert main([*run, "--finish", "none,distill", "--out", "one"]) == 0
    assert main([*run, "--out", "two"]) == 0
    assert seen == [[None, "distill"], [None]]


def test_budgets_are_read_as_the_help_says():
    pattern = nettrim.Pattern(2, 4)
    assert read_budgets("0.8,0.9,0.95") == [0.8, 0.9, 0.95]
    assert read_budgets("0.5, 2:4") == [0.5, pattern]
    assert read_budgets("fc1=0.9,fc2=0.8") == [{"fc1": 0.9, "fc2": 0.8}]
    assert read_budgets("0.8,0.9;fc1=0.9, fc2=2:4;1:4") == [
        0.8, 0.9, {"fc1": 0.9, "fc2": pattern}, nettrim.Pattern(1, 4)
    ]  # fmt: skip


OUT = ["--out", "out"]
SOME = ["--sparsity", "0.5", *OUT]
BAD = {
    "no sparsity": ([*GIVEN, *OUT], "--sparsity"),
    "no place": ([*GIVEN, "--sparsity", "0.5"], "--out"),
    "no data": (["compare", *SOME], "--data"),
    "no number": ([*GIVEN, "--sparsity", "much", *OUT], "'much' is no sparsity"),
    "nothing between commas": ([*GIVEN, "--sparsity", "0.5,", *OUT], "'' is no sparsity"),
    "pattern": ([*GIVEN, "--sparsity", "4:2", *OUT], "pattern 4:2 is out of range"),
    "number among names": ([*GIVEN, "--sparsity", "0=0.5,0.5", *OUT], "after a semicolon"),
    "layer twice": ([*GIVEN, "--sparsity", "0=0.5,0=0.6", *OUT], "one sparsity"),
    "layer missing": ([*GIVEN, "--sparsity", "0=0.5", *OUT], "no entry for 2"),
    "out of range": ([*GIVEN, "--sparsity", "0.5,1.5", *OUT], "sparsity=1.5"),
    "sparsity twice": ([*GIVEN, "--sparsity", "0.5", "--sparsity", "0.50", *OUT], "asked for twice"),
    "method": ([*GIVEN, "--methods", "trim", *SOME], "method='trim' is unknown"),
    "method before training": ([*TRAIN, "--methods", "trim", *SOME], "method='trim' is unknown"),
    "no method": ([*GIVEN, "--methods", ",", *SOME], "methods is []"),
    "schedule": ([*GIVEN, "--schedules", "both", *SOME], "schedule='both' is unknown"),
    "layer": ([*GIVEN, "--layers", "fc7", *SOME], "fc7"),
    "finish": ([*GIVEN, "--finish", "later", *SOME], "finish='later' is unknown"),
    "samples": ([*GIVEN, "--samples", "0", *SOME], "--samples 0"),
    "seed": ([*GIVEN, "--seed", "99999999999999999999", *SOME], "seed="),
    "weights alone": ([*TRAIN, "--weights", "net.safetensors", *SOME], "needs --model"),
    "model": (["compare", "--data", "data.npz", "--model", "net.py:absent", *SOME], "has no absent"),
    "data": (["compare", "--data", "absent.npz", *SOME], "does not exist"),
    "no labels to learn": (["compare", "--data", "plain.npz", *SOME], "give one by --model"),
    "labels of nothing": (["compare", "--data", "odd.npz", *SOME], "count the classes from 0"),
    "another directory": ([*GIVEN, "--sparsity", "0.5", "--out", "."], "already holds something"),
    "resume of nothing of ours": ([*GIVEN, "--sparsity", "0.5", "--out", ".", "--resume"], "already holds something"),
    "onto a file": ([*GIVEN, "--sparsity", "0.5", "--out", "net.py"], "is a file"),
}


@pytest.mark.parametrize(("arguments", "said"), BAD.values(), ids=BAD)
def test_bad_input_is_one_line_and_exit_2(place, capsys, monkeypatch, arguments, said):
    monkeypatch.setattr(cli_compare, "train", lambda *args, **kwargs: pytest.fail("work was begun"))
    before = {p for p in place.rglob("*") if "__pycache__" not in p.parts}
    assert main(arguments) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert said in printed.err
    assert len(printed.err.strip().splitlines()) == 1
    assert {p for p in place.rglob("*") if "__pycache__" not in p.parts} == before


def test_a_missing_matplotlib_is_said_before_any_work(place, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert main([*GIVEN, *SOME]) == 2
    assert "pip install" in capsys.readouterr().err
    assert not (place / "out").exists()


def test_a_trained_network_is_taken_only_on_the_same_terms(place, capsys):
    run = [*TRAIN, "--methods", "magnitude", *SOME]
    assert main(run) == 0
    capsys.readouterr()
    assert main([*run, "--resume", "--seed", "1"]) == 2
    assert "trained on other terms (seed)" in capsys.readouterr().err
    path = place / "out" / "model.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    assert main([*run, "--resume"]) == 2
    assert "is truncated" in capsys.readouterr().err
    path.write_bytes((place / "net.safetensors").read_bytes())
    assert main([*run, "--resume"]) == 2
    assert "was not trained here" in capsys.readouterr().err
    path.write_bytes(content)
    assert main([*run, "--resume"]) == 0
