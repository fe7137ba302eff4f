"""`nettrim prune` and `nettrim compare` to numbers of weights, and training on afterwards, as a user types it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import nettrim
from nettrim import cli_compare
from nettrim.cli import main

FACTORY = """
from torch import nn

def network():
    return nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 5))

def single():
    return nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 1))
"""

DIGITS = """
import torch
from torch import nn
from nettrim.data import load
from nettrim.network.training import train

def network():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 32), nn.ReLU(), nn.Linear(32, 10))
    split = load("digits").train
    train(model, split.inputs, split.labels, epochs=12, learning_rate=5e-3)
    return model
"""

PRUNE = ["prune", "--model", "net.py:network", "--weights", "net.safetensors", "--data", "data.npz"]
COMPARE = ["compare", *PRUNE[1:], "--methods", "magnitude"]


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A working directory with a factory, weights for it, labelled data and data without labels."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "net.py").write_text(FACTORY)
    generator = torch.Generator().manual_seed(0)
    shapes = {"0.weight": (16, 12), "0.bias": (16,), "2.weight": (5, 16), "2.bias": (5,)}
    weights = {name: torch.randn(shape, generator=generator) / 4 for name, shape in shapes.items()}
    save_file(weights, tmp_path / "net.safetensors")
    x = np.random.default_rng(0).standard_normal((80, 12)).astype(np.float32)
    labels = x[:, :5].argmax(1)
    np.savez(tmp_path / "data.npz", inputs=x[:60], labels=labels[:60], test_inputs=x[60:], test_labels=labels[60:])
    np.savez(tmp_path / "plain.npz", inputs=x)
    return tmp_path


def run(capsys, *arguments: str) -> dict[str, Any]:
    """Prune into `run`, hold that against `nettrim verify`, and return what was printed as JSON."""
    assert main([*PRUNE, *arguments, "--out", "run", "--json"]) == 0
    printed = capsys.readouterr()
    assert printed.err == ""
    found = json.loads(printed.out, parse_constant=pytest.fail)
    assert main(["verify", "run"]) == 0
    assert "0 do not hold; run finished" in capsys.readouterr().out
    stored = json.loads(Path("run/ledger.json").read_text())
    stored.pop("schema")
    assert found == stored | {"directory": "run", "structure": None, "latency": None}
    for each in filter(None, (found, found["before"])):
        assert all(each["measured"] <= bound * (1 + 1e-9) for bound in each["bounds"].values())
    weights = load_file("run/model.safetensors")
    assert [int((weights[f"{r['name']}.weight"] != 0).sum()) for r in found["records"]] == kept(found)
    return found


def kept(ledger: dict[str, Any]) -> list[int]:
    return [record["kept"] for record in ledger["records"]]


def settings() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(Path("run/run.json").read_text())
    return found


@pytest.mark.parametrize("method", ["net-trim", "l-obs", "obs", "magnitude"])
@pytest.mark.parametrize(
    ("amount", "counts"),
    [
        (["--kept", "30"], [30, 30]),
        (["--kept", "0=100,2=7"], [100, 7]),
        (["--kept", "2=7, 0=100"], [100, 7]),
        (["--sparsity", "0=0.75,2=0.5"], [48, 40]),
    ],
)
def test_a_number_of_weights_stays(place, capsys, method, amount, counts):
    found = run(capsys, "--method", method, *amount)
    assert kept(found) == counts
    assert (found["finish"], found["before"]) == (None, None)


def test_a_pattern_stays(place, capsys):
    run(capsys, "--method", "magnitude", "--sparsity", "2:4")
    dense, pruned = load_file("net.safetensors"), load_file("run/model.safetensors")
    for name in ("0.weight", "2.weight"):
        largest = dense[name].abs().reshape(-1, 4).argsort(dim=1, descending=True)[:, :2]
        assert bool((pruned[name].reshape(-1, 4).gather(1, largest) != 0).all())
        assert bool(((pruned[name].reshape(-1, 4) != 0).sum(1) == 2).all())
    assert settings()["amount"] == {"pattern": {"0": "2:4", "2": "2:4"}}


def test_a_pattern_for_each_layer(place, capsys):
    run(capsys, "--method", "obs", "--sparsity", "0=1:3,2=2:8")
    weights = load_file("run/model.safetensors")
    assert bool(((weights["0.weight"].reshape(-1, 3) != 0).sum(1) == 1).all())
    assert bool(((weights["2.weight"].reshape(-1, 8) != 0).sum(1) == 2).all())


def test_weights_go_while_the_tolerance_allows_it(place, capsys):
    totals = []
    for tolerance in ("0.05", "0.2"):
        found = run(capsys, "--method", "obs", "--tolerance", tolerance)
        assert settings()["amount"] == {"tolerance": {"0": float(tolerance), "2": float(tolerance)}}
        totals.append(sum(kept(found)))
        shutil.rmtree("run")
    assert 272 > totals[0] > totals[1] > 0


def test_overall_is_split_by_the_data(place, capsys):
    found = run(capsys, "--overall", "0.9")
    assert sum(kept(found)) == 272 - int(0.9 * 272)
    assert settings()["overall"] == "Overall(sparsity=0.9)"
    assert settings()["amount"] == {"kept": dict(zip(("0", "2"), kept(found), strict=True))}


def test_the_options_of_net_trim_arrive(place, capsys):
    found = run(capsys, "--kept", "40", "--route", "reweighted", "--swaps", "2", "--no-evidence")
    assert kept(found) == [40, 40]
    said = settings()["method_settings"]
    assert "route='reweighted', swaps=2, evidence=False" in said
    # no convex program was solved, so nothing is said of it
    assert all((r["gap"], r["lower_bound"], r["objective"]) == (None, None, None) for r in found["records"])


def test_evidence_is_the_default(place, capsys):
    found = run(capsys, "--kept", "40", "--swaps", "1")
    assert all(record["gap"] is not None for record in found["records"])
    assert "route='refined', swaps=1, evidence=True" in settings()["method_settings"]


@pytest.mark.parametrize(
    ("amount", "finish", "chosen", "targets"),
    [
        (["--overall", "0.9"], "distill", "Distill(", 28),
        (["--method", "l-obs", "--sparsity", "0.8"], "distill", "Distill(", {"0": 39, "2": 16}),
        (["--method", "l-obs", "--kept", "0=20,2=9"], "distill", "Distill(", {"0": 20, "2": 9}),
        (["--method", "magnitude", "--sparsity", "2:4"], "distill", "Distill(", None),
        (["--epsilon", "0.2", "--layers", "2"], "distill", "Distill(", None),
        (["--overall", "0.8"], "fine-tune", "FineTune(", None),
    ],
)
def test_it_is_trained_on_and_says_so(place, capsys, amount, finish, chosen, targets):
    found = run(capsys, *amount, "--finish", finish)
    said, before = found["finish"], found["before"]
    assert (said["kind"], said["samples"], said["labels"]) == (finish, 60, finish == "fine-tune")
    assert said["settings"].startswith(chosen)
    assert said["targets"] == settings()["targets"] == targets
    assert before["finish"] is None
    assert before["before"] is None
    if isinstance(targets, dict):
        assert kept(found) == list(targets.values())
    elif targets is not None:
        assert sum(kept(found)) == targets
        assert sum(kept(before)) == 3 * targets
    elif "--layers" not in amount:
        assert kept(found) == kept(before)
    else:  # the other layer is trained and stays dense
        assert kept(found) == [192, kept(before)[0]]
    # what is read back without the class gives the outputs that were accounted for
    x, plain = torch.from_numpy(np.load("data.npz")["inputs"]), nettrim.load_result("run").model.double()
    state = load_file("net.safetensors")
    dense = (x @ state["0.weight"].T + state["0.bias"]).clamp(min=0) @ state["2.weight"].T + state["2.bias"]
    assert float((plain(x.double()) - dense).norm()) == pytest.approx(found["measured"], rel=1e-5)


def test_the_table_says_how_it_was_finished_and_what_it_was(place, capsys):
    assert main([*PRUNE, "--method", "l-obs", "--sparsity", "0.8", "--finish", "fine-tune", "--out", "run"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("l-obs, cascade, then fine-tuned with labels: ")
    assert any(line.startswith("before it was trained on: 55 weights, output error ") for line in lines)
    assert lines[-1] == "run directory: run"


@pytest.mark.filterwarnings("default")  # shown on stderr, as a user sees it
def test_training_on_does_not_certify_what_was_not(place, capsys):
    hard = ["--epsilon", "0.05", "--tol", "1e-13", "--max-seconds", "0.001"]
    assert main([*PRUNE, *hard, "--finish", "distill", "--out", "run"]) == 1
    assert "NOT certified within the tolerance: 0 (" in capsys.readouterr().out
    assert main([*PRUNE, *hard, "--finish", "distill", "--out", "again", "--json"]) == 1
    found = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)
    assert found["before"]["records"][0]["facts"]["status"] != "SOLVED"


def test_it_goes_on_after_it_was_stopped_while_finishing(place, capsys, monkeypatch):
    command = ["--overall", "0.8", "--method", "magnitude", "--finish", "distill"]
    whole = run(capsys, *command)
    weights = load_file("run/model.safetensors")
    Path("run").rename("whole")

    def stop(*_: Any) -> Any:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(nettrim.Distill, "run", stop)
        assert main([*PRUNE, *command, "--out", "run"]) == 130
    assert "--resume goes on" in capsys.readouterr().err
    assert main(["verify", "run"]) == 0
    assert "2 of 2 layers finished" in capsys.readouterr().out
    monkeypatch.setattr(nettrim.Magnitude, "prune_layer", stop)  # it must not be needed again
    for changed, what in (
        (["--finish", "fine-tune"], "finish"),
        (["--overall", "0.7"], "overall"),
        (["--seed", "3"], "seed"),
    ):
        assert main([*PRUNE, *command, *changed, "--out", "run", "--resume"]) == 2
        assert f"holds a run with another {what}: " in capsys.readouterr().err
    found = run(capsys, *command, "--resume")
    assert found["measured"] == whole["measured"]
    again = load_file("run/model.safetensors")
    assert again.keys() == weights.keys()
    assert all(torch.equal(weights[key], tensor) for key, tensor in again.items())


def test_digits_from_start_to_verified(tmp_path):
    """In processes of their own, as it is typed: a tenth of the weights, and nearly all of the accuracy."""
    (tmp_path / "net.py").write_text(DIGITS)
    options: dict[str, Any] = {
        "cwd": tmp_path, "capture_output": True, "text": True, "env": os.environ | {"OMP_NUM_THREADS": "1"}
    }  # fmt: skip
    command = [sys.executable, "-m", "nettrim", "prune", "--model", "net.py:network", "--data", "digits"]
    done = subprocess.run(
        [*command, "--overall", "0.9", "--finish", "distill", "--out", "run", "--json"], check=False, **options
    )
    assert (done.returncode, done.stderr) == (0, "")
    found = json.loads(done.stdout)
    total = 64 * 48 + 48 * 32 + 32 * 10
    assert sum(kept(found)) == total - int(0.9 * total)
    right = found["accuracy"]["held-out"]
    assert right["dense"] > 0.9
    assert right["pruned"] > right["dense"] - 0.05
    assert found["measured"] <= found["bound"]
    done = subprocess.run([sys.executable, "-m", "nettrim", "verify", "run"], check=False, **options)
    assert (done.returncode, done.stderr) == (0, "")
    assert "0 do not hold; run finished" in done.stdout


RUN = ["--out", "run"]
PLAIN = ["prune", *PRUNE[1:-1], "plain.npz"]
SINGLE = ["prune", "--model", "net.py:single", "--data", "plain.npz", "--method", "magnitude"]
BAD = {
    "pattern": ([*PRUNE, "--sparsity", "4:2", *RUN], "pattern 4:2 is out of range"),
    "pattern of nothing": ([*PRUNE, "--sparsity", "0:4", *RUN], "pattern 0:4 is out of range"),
    "pattern of words": ([*PRUNE, "--sparsity", "a:b", *RUN], "'a:b' is no sparsity"),
    "pattern of a layer": ([*PRUNE, "--sparsity", "0=4:2,2=0.5", *RUN], "pattern 4:2"),
    "pattern that does not divide": (
        [*PRUNE, "--sparsity", "2:5", "--method", "magnitude", *RUN], "does not divide the 12 inputs of layer '0'"
    ),
    "pattern beside a number": (
        [*PRUNE, "--method", "obs", "--sparsity", "0=2:4,2=0.5", *RUN], "give every layer a pattern, or none"
    ),
    "pattern of a method without": ([*PRUNE, "--sparsity", "2:4", *RUN], "'net-trim' takes epsilon or lam"),
    "sparsity": ([*PRUNE, "--sparsity", "1.5", *RUN], "sparsity=1.5 is out of range"),
    "sparsity of words": ([*PRUNE, "--sparsity", "much", *RUN], "'much' is no sparsity"),
    "sparsity of a layer twice": ([*PRUNE, "--sparsity", "0=0.5,0=0.6", *RUN], "each layer one number"),
    "sparsity of no layer": ([*PRUNE, "--sparsity", "=0.5", *RUN], "each layer one number"),
    "overall": ([*PRUNE, "--overall", "1.5", *RUN], "Overall(1.5) is out of range"),
    "overall of one": ([*PRUNE, "--overall", "1", *RUN], "Overall(1.0) is out of range"),
    "overall below": ([*PRUNE, "--overall", "-0.1", *RUN], "Overall(-0.1) is out of range"),
    "overall nan": ([*PRUNE, "--overall", "nan", *RUN], "Overall"),
    "overall of words": ([*PRUNE, "--overall", "much", *RUN], "--overall: invalid float value: 'much'"),
    "overall and sparsity": (
        [*PRUNE, "--overall", "0.9", "--sparsity", "0.5", *RUN], "--sparsity and --overall 0.9 are both given"
    ),
    "overall and kept": ([*PRUNE, "--overall", "0.9", "--kept", "9", *RUN], "and kept were given"),
    "overall and epsilon": ([*PRUNE, "--overall", "0.9", "--epsilon", "0.1", *RUN], "and epsilon were given"),
    "overall of too few": ([*PRUNE, "--overall", "0.999", *RUN], "leaves 1 weights for 2 layers"),
    "kept": ([*PRUNE, "--kept", "1.5", *RUN], "kept=1.5 is out of range: give a whole number"),
    "kept none": ([*PRUNE, "--kept", "0", *RUN], "kept=0 is out of range"),
    "kept infinite": ([*PRUNE, "--kept", "inf", *RUN], "kept"),
    "kept more": ([*PRUNE, "--kept", "81", *RUN], "kept=81 is out of range: layer '2' has 80 weights"),
    "kept of words": ([*PRUNE, "--kept", "many", *RUN], "'many' is no number"),
    "kept of a layer of words": ([*PRUNE, "--kept", "0=5,2=many", *RUN], "'many' is no number"),
    "kept of a layer twice": ([*PRUNE, "--kept", "0=5,0=6", *RUN], "each layer one number"),
    "kept of one layer": ([*PRUNE, "--kept", "0=5", *RUN], "kept has no entry for 2"),
    "kept of another layer": ([*PRUNE, "--kept", "0=5,2=5,9=5", *RUN], "kept names 9"),
    "tolerance": ([*PRUNE, "--method", "obs", "--tolerance", "0", *RUN], "tolerance=0"),
    "tolerance of net-trim": ([*PRUNE, "--tolerance", "0.5", *RUN], "tolerance=0.5 was given"),
    "finish": ([*PRUNE, "--kept", "9", "--finish", "nonsense", *RUN], "finish='nonsense' is unknown: use distill or"),
    "finish empty": ([*PRUNE, "--kept", "9", "--finish", "", *RUN], "finish='' is unknown"),
    "finish both": ([*PRUNE, "--kept", "9", "--finish", "distill,fine-tune", *RUN], "finish='distill,fine-tune'"),
    "finish without labels": ([*PLAIN, "--kept", "9", "--finish", "fine-tune", *RUN], "needs labels in batches"),
    "finish one output": ([*SINGLE, "--kept", "9", "--finish", "distill", *RUN], "compares classes"),
    "swaps": ([*PRUNE, "--kept", "9", "--swaps", "-1", *RUN], "--swaps -1 is out of range"),
    "swaps half": ([*PRUNE, "--kept", "9", "--swaps", "1.5", *RUN], "--swaps"),
    "route": ([*PRUNE, "--kept", "9", "--route", "x", *RUN], "route='x' is unknown: use refined or reweighted"),
    "route of another method": (
        [*PRUNE, "--kept", "9", "--method", "obs", "--route", "refined", *RUN], "--route given, which only net-trim"
    ),
    "swaps of another method": (
        [*PRUNE, "--kept", "9", "--method", "magnitude", "--swaps", "0", *RUN], "--swaps given, which only net-trim"
    ),
    "evidence of another method": (
        [*PRUNE, "--kept", "9", "--method", "l-obs", "--no-evidence", *RUN], "--no-evidence given, which only net-trim"
    ),
    "all three": (
        [*PRUNE, "--kept", "9", "--method", "obs", "--no-evidence", "--rule", "paper", "--swaps", "1", *RUN],
        "--rule, --swaps, --no-evidence given",
    ),
    "compare overall": ([*COMPARE, "--overall", "1.5", *RUN], "Overall(1.5) is out of range"),
    "compare overall of words": ([*COMPARE, "--overall", "0.5,much", *RUN], "'0.5,much' is no fraction of zeros"),
    "compare overall empty": ([*COMPARE, "--overall", "", *RUN], "nothing to compare"),
    "compare overall twice": ([*COMPARE, "--overall", "0.5,0.50", *RUN], "asked for twice"),
    "compare finish": ([*COMPARE, "--overall", "0.5", "--finish", "nonsense", *RUN], "finish='nonsense' is unknown"),
    "compare finish empty": ([*COMPARE, "--overall", "0.5", "--finish", ",", *RUN], "finish is []"),
    "compare finish twice": ([*COMPARE, "--overall", "0.5", "--finish", "none,none", *RUN], "asked for twice"),
    "compare finish without labels": (
        ["compare", *PLAIN[1:], "--methods", "magnitude", "--overall", "0.5", "--finish", "fine-tune", *RUN],
        "needs labels in batches",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("arguments", "said"), BAD.values(), ids=BAD)
def test_bad_input_is_one_line_and_exit_2(place, capsys, arguments, said):
    before = {p for p in place.rglob("*") if "__pycache__" not in p.parts}
    assert main(arguments) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("nettrim")
    assert said in printed.err
    assert len(printed.err.strip().splitlines()) == 1
    assert {p for p in place.rglob("*") if "__pycache__" not in p.parts} == before


def test_compare_shows_every_row_both_ways(place, capsys):
    command = [*COMPARE, "--methods", "magnitude,l-obs", "--overall", "0.8", "--sparsity", "0.7"]
    assert main([*command, "--finish", "none,distill", "--out", "out", "--json"]) == 0
    printed = capsys.readouterr()
    assert printed.err == ""
    found = json.loads(printed.out, parse_constant=pytest.fail)
    assert [(row["budget"], row["method"], row["finish"]) for row in found["rows"]] == [
        (budget, method, finish)
        for budget in ("0.7", "Overall(sparsity=0.8)")
        for method in ("magnitude", "l-obs")
        for finish in (None, "distill")
    ]
    weights = [sum(layer["kept"] for layer in row["layers"]) for row in found["rows"]]
    assert weights == [row["kept"] for row in found["rows"]] == [58 + 24] * 4 + [272 - int(0.8 * 272)] * 4
    assert all(row["failure"] is None and row["layer_seconds"] > 0 for row in found["rows"])
    assert (place / "out" / "compare.png").read_bytes().startswith(b"\x89PNG")
    # the finished rows are those of `prune`, not the pruned ones under another name
    assert main([*PRUNE, "--method", "l-obs", "--overall", "0.8", "--finish", "distill", "--out", "run", "--json"]) == 0
    ledger = json.loads(capsys.readouterr().out)
    assert found["rows"][-1]["error"]["calibration"] == pytest.approx(ledger["measured"] / ledger["output_norm"])
    assert kept(ledger) == [layer["kept"] for layer in found["rows"][-1]["layers"]]

    more = ["--methods", "magnitude", "--overall", "0.8,0.5", "--finish", "fine-tune,distill"]
    assert main([*command, *more, "--out", "out", "--resume"]) == 0
    table = capsys.readouterr().out
    for title in ("magnitude + distill", "l-obs + distill", "magnitude + fine-tune", "Overall(sparsity=0.5)"):
        assert title in table
    again = json.loads((place / "out" / "compare.json").read_text())["rows"]
    assert again[:8] == found["rows"]
    assert [row["finish"] for row in again[8:]] == ["fine-tune", "fine-tune", "fine-tune", "distill"]


def test_compare_without_finish_prunes_alone(place, capsys):
    assert main([*COMPARE, "--overall", "0.5", "--out", "out", "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)["rows"]
    assert (row["finish"], row["kept"]) == (None, 136)


def test_compare_refuses_a_finish_before_it_trains(place, capsys, monkeypatch):
    monkeypatch.setattr(cli_compare, "train", lambda *_args, **_kwargs: pytest.fail("work was begun"))
    assert main(["compare", "--data", "data.npz", "--overall", "0.5", "--finish", "later", "--out", "out"]) == 2
    assert "finish='later' is unknown" in capsys.readouterr().err
    assert not (place / "out").exists()
