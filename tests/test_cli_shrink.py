"""`nettrim prune` and `nettrim compare` with methods that make the network smaller, as a user types it."""

import json

import numpy as np
import pytest
import torch

import nettrim
from nettrim.cli import main

FACTORY = """
import torch
from torch import nn

def unit(before, after):
    return [nn.Conv2d(before, after, 3, padding=1), nn.BatchNorm2d(after), nn.ReLU()]

def network():
    torch.manual_seed(0)
    return nn.Sequential(
        *unit(1, 6), *unit(6, 6), *unit(6, 6), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 3)
    ).eval()
"""


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A working directory with a factory and labelled images."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "net.py").write_text(FACTORY)
    x = np.random.default_rng(0).standard_normal((80, 1, 6, 6)).astype(np.float32)
    labels = np.arange(80) % 3
    np.savez(tmp_path / "data.npz", inputs=x[:60], labels=labels[:60], test_inputs=x[60:], test_labels=labels[60:])
    return tmp_path


DATA = ["prune", "--data", "data.npz"]
PRUNE = [*DATA, "--model", "net.py:network"]
NARROW = ["--method", "ldrf", "--channels", "0.5", "--steps", "3"]
SHORT = ["--method", "shallowing", "--units", "1"]


def test_three_runs_one_after_the_other(place, capsys):
    assert main([*PRUNE, *SHORT, "--out", "one"]) == 0
    text = capsys.readouterr().out
    assert text.startswith("linear probes on the features of every unit, 42 samples to train and 18 to score, 3 splits")
    gone = nettrim.load_result("one").structure.removed[0]
    line = next(line for line in text.splitlines() if line.split()[:1] == [gone])
    assert line.split()[-1] == "gone"
    assert f"units that are gone: {gone}\n" in text
    assert "smaller, not sparse: 396 of 720 weights (55.0 %), 13,626 of 25,290 multiply-adds a sample (53.9 %)" in text
    assert "latency on this CPU, 1 thread, 60 samples: " in text
    assert "Zeros make files smaller" not in text
    assert "chain of" not in text

    assert main([*DATA, "--from", "one", *NARROW, "--target", "outputs", "--out", "two", "--json"]) == 0
    found = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)
    settings = json.loads((place / "two" / "run.json").read_text())["method_settings"]
    assert "steps=3" in settings
    assert "target='outputs'" in settings
    assert [stage["method"] for stage in found["chain"]["stages"]] == ["shallowing", "ldrf"]
    assert found["chain"]["measured"] <= found["chain"]["bound"]
    assert set(found["structure"]["channels"]) == {record["name"] for record in found["records"][:-1]}
    assert found["structure"]["removed"] == []
    assert found["latency"]["dense"]["samples"] == 60

    last = [*DATA, "--from", "two", "--method", "magnitude", "--sparsity", "0.5", "--out", "three"]
    assert main(last) == 0
    text = capsys.readouterr().out
    assert "chain of 3 runs, from the first network to this one:" in text
    rows = [line.split() for line in text.splitlines() if line.startswith(("1  ", "2  ", "3  "))]
    assert [row[1] for row in rows] == ["shallowing", "ldrf", "magnitude"]
    # each starts with what the one before it left
    assert [row[2] for row in rows[:2]] == [row[3] for row in rows[1:]]
    assert main([*last, "--resume"]) == 0
    for run in ("one", "two", "three"):
        assert main(["verify", run]) == 0
    assert sum(p.numel() for p in nettrim.load_result("three").model.parameters()) < 300


def test_the_other_amounts_and_settings(place, capsys):
    x = torch.from_numpy(np.load("data.npz")["inputs"])
    for given, said in (
        (["--method", "ldrf", "--macs", "0.5", "--steps", "0", "--selector", "thinet"], "selector='thinet'"),
        (["--method", "ldrf", "--channels", "0=0.5", "--steps", "0"], "steps=0"),
        (["--method", "ldrf", "--sparsity", "0.4", "--steps", "0", "--allocate", "capacity"], "allocate='capacity'"),
        (["--method", "shallowing", "--units", "1", "--choice", "reverse"], "choice='reverse'"),
        (["--method", "shallowing", "--tolerance", "2", "--rule", "accumulate"], "rule='accumulate'"),
    ):
        out = f"run{len(list(place.iterdir()))}"
        assert main([*PRUNE, *given, "--out", out, "--json"]) == 0
        found = json.loads(capsys.readouterr().out)
        assert found["costs"]["pruned"]["weights"] < found["costs"]["dense"]["weights"]
        assert said in json.loads((place / out / "run.json").read_text())["method_settings"]
        assert nettrim.load_result(out).model(x).shape == (60, 3)


def test_the_picture_of_the_probes(place, capsys):
    pytest.importorskip("matplotlib")
    assert main([*PRUNE, *SHORT, "--out", "one", "--picture", "probes.png"]) == 0
    assert "picture: probes.png" in capsys.readouterr().out
    assert (place / "probes.png").read_bytes().startswith(b"\x89PNG")
    assert main(["verify", "one"]) == 0


BAD = {
    "no network": ([*DATA, *SHORT], "no network is given"),
    "two networks": ([*PRUNE, "--from", "one", *SHORT], "leave one out"),
    "weights of a run": ([*DATA, "--from", "one", "--weights", "x.safetensors", *SHORT], "leave one out"),
    "no such run": ([*DATA, "--from", "one", *SHORT], "one"),
    "channels no number": ([*PRUNE, "--method", "ldrf", "--channels", "half"], "is no number"),
    "macs no number": ([*PRUNE, "--method", "ldrf", "--macs", "half"], "invalid float"),
    "units no number": ([*PRUNE, "--method", "shallowing", "--units", "1.5"], "invalid int"),
    "units to ldrf": ([*PRUNE, "--method", "ldrf", "--units", "1"], "and units=1 was given"),
    "steps of another": ([*PRUNE, *SHORT, "--steps", "3"], "--steps given, which only ldrf reads"),
    "rule of another": ([*PRUNE, *NARROW, "--rule", "gain"], "which only net-trim and shallowing read"),
    "form of another": ([*PRUNE, *NARROW, "--form", "ball"], "which only net-trim reads"),
    "steps": ([*PRUNE, "--method", "ldrf", "--channels", "0.5", "--steps", "-1"], "steps=-1 is out of range"),
    "selector": ([*PRUNE, *NARROW, "--selector", "best"], "selector='best' is unknown"),
    "choice": ([*PRUNE, *SHORT, "--choice", "best"], "choice='best' is unknown"),
    "picture of nothing": ([*PRUNE, *NARROW, "--picture", "p.png"], "trains none"),
    "picture of no probes": ([*PRUNE, *SHORT, "--choice", "reverse", "--picture", "p.png"], "trains none"),
    "picture nowhere": ([*PRUNE, *SHORT, "--picture", "no/p.png"], "name a file"),
    "parallel": ([*PRUNE, *SHORT, "--schedule", "parallel"], "use cascade"),
}


@pytest.mark.parametrize(("arguments", "said"), BAD.values(), ids=BAD)
def test_bad_input_is_one_line_and_exit_2(place, capsys, arguments, said):
    assert main([*arguments, "--out", "run"]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert len(printed.err.strip().splitlines()) == 1
    assert said in printed.err
    assert not (place / "run").exists()


def test_compare_shows_what_smaller_networks_cost(place, capsys):
    run = ["compare", "--data", "data.npz", "--model", "net.py:network", "--methods", "magnitude,shallowing"]
    assert main([*run, "--sparsity", "0.3", "--out", "some"]) == 0
    lines = capsys.readouterr().out.splitlines()
    head = next(line for line in lines if line.startswith("method"))
    assert "weights %  multiply-adds %  times as fast" in head
    cells = {line.split()[0]: line.split() for line in lines if line.startswith(("magnitude", "shallowing"))}
    assert cells["magnitude"][4:7] == ["100.00", "100.00", "–"]
    assert float(cells["shallowing"][4]) <= 70
    assert float(cells["shallowing"][6]) > 0
    # a budget that it cannot reach is said, and the other rows stand
    assert main([*run, "--sparsity", "0.95", "--out", "more"]) == 1
    text = capsys.readouterr().out
    assert "FAILED  shallowing, cascade, 0.95: sparsity=0.95 cannot be reached by taking units out" in text
    assert "times as fast" not in text
