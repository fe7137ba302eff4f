"""Runs that were finished: stored, read back, tampered with, interrupted and gone on with."""

from __future__ import annotations

import copy
import hashlib
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import nettrim
from nettrim import Distill, FineTune, Overall
from nettrim.errors import RunError
from nettrim.pipeline import files
from nettrim.pipeline import plan as planning
from nettrim.pipeline.prune import DRIVERS
from nettrim.report.tables import ledger_table

NAMES = ["0", "3", "5"]
QUIET: dict[str, Any] = {"progress": False}
#: three steps in an epoch of the sixty samples; the last weights are kept, so they are not those of the start
SHORT: dict[str, Any] = {"epochs": 3, "batch_size": 20, "validation": 0}
FIXED = Distill(**SHORT)
LAYER = Distill(**SHORT, choose="layer")
GLOBAL = Distill(**SHORT, choose="global")
TUNE = FineTune(**SHORT, learning_rate=0.01)
RUNS: dict[str, dict[str, Any]] = {
    "fixed": dict(epsilon=0.2, finish=FIXED),
    "layer": dict(method="l-obs", kept={"3": 20, "5": 9}, layers=["3", "5"], finish=LAYER),
    "global": dict(sparsity=Overall(0.7), layers=["0", "3"], finish=GLOBAL),
    "fine-tune": dict(method="magnitude", sparsity=0.5, schedule="parallel", finish=TUNE),
}


def counts(layers: list[Any]) -> dict[str, int]:
    return {layer.name: int((layer.weight != 0).sum()) for layer in layers}


def double_outputs(model: nn.Module, batches: Any) -> Tensor:
    twin = copy.deepcopy(model).double().eval()
    with torch.no_grad():
        return torch.cat([twin(x.double()) for x, _ in batches])


def same_weights(ours: nn.Module, theirs: nn.Module) -> bool:
    first, second = ours.state_dict(), theirs.state_dict()
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


def timeless(value: Any) -> Any:
    """What JSON holds of a ledger, without what a clock said."""
    if isinstance(value, dict):
        return {key: timeless(item) for key, item in value.items() if not key.startswith("seconds")}
    return [timeless(item) for item in value] if isinstance(value, (list, tuple)) else value


def no_pruning(monkeypatch) -> None:
    """Whatever prunes a layer or looks ahead for a split fails from here on."""

    def fail(*_args: Any, **_kwargs: Any) -> None:
        raise AssertionError("done a second time")

    for make in nettrim.METHODS.values():
        if hasattr(make, "prune_layer"):
            monkeypatch.setattr(make, "prune_layer", fail)
    for removes in DRIVERS:
        monkeypatch.setitem(DRIVERS, removes, fail)
    monkeypatch.setattr(planning, "allocate", fail)


# what is stored ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def stored(tmp_path_factory) -> dict[str, Any]:
    """One run of each kind, with what it was made of; copied before anything in it is changed."""
    generator = torch.Generator().manual_seed(6)
    model = nn.Sequential(
        nn.Linear(12, 16), nn.ReLU(), nn.Dropout(0.5), nn.Linear(16, 10), nn.ReLU(), nn.Linear(10, 5)
    )  # fmt: skip
    x, labels = torch.randn(80, 12, generator=generator), torch.randint(0, 5, (80,), generator=generator)
    batches, held = [(x[:30], labels[:30]), (x[30:60], labels[30:60])], [(x[60:], labels[60:])]
    path, threads = tmp_path_factory.mktemp("stored"), torch.get_num_threads()
    torch.set_num_threads(1)  # as in every test: bits are compared
    results = {
        name: nettrim.prune(model, batches, held_out=held, out_dir=path / name, **given, **QUIET)
        for name, given in RUNS.items()
    }
    torch.set_num_threads(threads)
    return {"model": model, "batches": batches, "held_out": held, "path": path, "results": results}


@pytest.fixture(params=RUNS)
def run(request, stored, tmp_path) -> tuple[Path, Any]:
    shutil.copytree(stored["path"] / request.param, tmp_path / "run")
    return tmp_path / "run", stored["results"][request.param]


def failures(path: Path) -> str:
    return " | ".join(nettrim.verify(path).failures)


def seal(path: Path) -> None:
    """Write digests that fit what stands there, as a forger would."""
    about = json.loads((path / "run.json").read_text())
    for name in about["files"]:
        about["files"][name] = hashlib.sha256((path / name).read_bytes()).hexdigest()
    about.pop("digest")
    (path / "run.json").write_text(json.dumps(about | {"digest": files.digest_json(about)}))


def change(path: Path, edit: Any) -> None:
    value = json.loads(path.read_text())
    edit(value)
    path.write_text(json.dumps(value))


def change_tensors(path: Path, edit: Any) -> None:
    tensors, about = files.read_tensors(path)
    edit(tensors)
    path.write_bytes(files.tensor_bytes(tensors, about))


def test_a_finished_run_holds_and_is_read_back(run, stored, tmp_path):
    path, result = run
    found = nettrim.verify(path)
    assert (found.failures, found.state) == ((), "finished")
    plain, named = nettrim.load_result(path), nettrim.load_result(path, stored["model"])
    assert same_weights(named.model, result.model)
    dense = double_outputs(stored["model"], stored["batches"])
    outputs = double_outputs(result.model, stored["batches"])
    torch.testing.assert_close(double_outputs(plain.model, stored["batches"]), outputs, rtol=1e-12, atol=1e-12)
    assert float((outputs - dense).norm()) == pytest.approx(result.ledger.measured, rel=1e-9)
    for back in (plain, named):
        assert back.ledger.as_dict() == json.loads(json.dumps(result.ledger.as_dict()))
        assert back.ledger.before.records[0].kept == result.ledger.before.records[0].kept
        assert [layer.name for layer in back.final] == NAMES
        for key in ("layers", "final"):
            for ours, theirs in zip(getattr(back, key), getattr(result, key), strict=True):
                assert torch.equal(ours.weight, theirs.weight)
                assert torch.equal(ours.bias, theirs.bias)
                assert (ours.pruned, ours.facts) == (theirs.pruned, theirs.facts)
        assert back.masks.keys() == result.masks.keys()
        assert all(torch.equal(back.masks[name], mask) for name, mask in result.masks.items())
    # what was read back, and what never was in a directory, can be saved
    for i, each in enumerate((plain, named, result)):
        each.save(tmp_path / f"again {i}")
        assert failures(tmp_path / f"again {i}") == ""
        assert same_weights(nettrim.load_result(tmp_path / f"again {i}", stored["model"]).model, result.model)


def first_pruned(path: Path) -> str:
    layers = json.loads((path / "run.json").read_text())["layers"]
    return next(layer["name"] for layer in layers if layer["prune"])


def a_weight(path: Path) -> None:
    def edit(tensors: dict[str, Tensor]) -> None:
        flat = tensors[f"{first_pruned(path)}.weight"].view(-1)
        flat[flat.nonzero()[0]] *= 1.01

    change_tensors(path / "model.safetensors", edit)


def a_bias_of_the_last_layer(path: Path) -> None:
    change_tensors(path / "model.safetensors", lambda tensors: tensors["5.bias"].add_(0.001))


def a_weight_that_was_pruned(path: Path) -> None:
    pruned, _ = files.read_tensors(path / "layers" / f"{first_pruned(path)}.safetensors")

    def edit(tensors: dict[str, Tensor]) -> None:
        where = (pruned["weight"].view(-1) == 0).nonzero()[0]
        tensors[f"{first_pruned(path)}.weight"].view(-1)[where] = 0.1

    change_tensors(path / "model.safetensors", edit)


def a_mask(path: Path) -> None:
    def edit(tensors: dict[str, Tensor]) -> None:
        flat = tensors[first_pruned(path)].view(-1)
        flat[0] = ~flat[0]

    change_tensors(path / "masks.safetensors", edit)


def a_pruned_layer(path: Path) -> None:
    file = path / "layers" / f"{first_pruned(path)}.safetensors"
    change_tensors(file, lambda tensors: tensors["weight"].mul_(1.01))


def a_dense_layer(path: Path) -> None:
    file = path / "layers" / "3.safetensors"
    change_tensors(file, lambda tensors: tensors["dense_weight"].mul_(1.01))


def the_ledger(edit: Any) -> Any:
    return lambda path: change(path / "ledger.json", edit)


def the_run(edit: Any) -> Any:
    return lambda path: change(path / "run.json", edit)


def merely_pruned(ledger: dict[str, Any]) -> None:
    before = ledger.pop("before")
    ledger.update(before)


SEALED: dict[str, tuple[Any, str]] = {
    "a weight": (a_weight, "measured is stored as"),
    "a bias": (a_bias_of_the_last_layer, "measured is stored as"),
    "a weight that was pruned": (a_weight_that_was_pruned, "has 1 weights back that were pruned"),
    "a mask": (a_mask, "is not where the weight is kept"),
    "a pruned layer": (a_pruned_layer, "ledger.json: before"),
    "a dense layer": (a_dense_layer, "is stored as"),
    "measured": (the_ledger(lambda v: v.update(measured=v["measured"] * 0.99)), "ledger.json: measured is stored as"),
    "bound": (the_ledger(lambda v: v.update(bound=v["bound"] * 0.99)), "ledger.json: bound is stored as"),
    "kept": (the_ledger(lambda v: v["records"][0].update(kept=1)), "].kept is stored as 1"),
    "accuracy": (the_ledger(lambda v: v["accuracy"]["held-out"].update(pruned=1.0)), "ledger.json: accuracy.held-out"),
    "a gap where there is none": (the_ledger(lambda v: v["records"][0].update(gap=0.0)), "].gap is stored as 0.0"),
    "before measured": (the_ledger(lambda v: v["before"].update(measured=1e3)), "before.measured is stored as 1000"),
    "before kept": (the_ledger(lambda v: v["before"]["records"][0].update(kept=1)), "].kept is stored as 1"),
    "before bounds": (the_ledger(lambda v: v["before"]["bounds"].update(telescoped=0.0)), "before.bounds.telescoped"),
    "before removed": (the_ledger(lambda v: v.update(before=None)), "ledger.json: before is stored as None"),
    "before has a finish": (the_ledger(lambda v: v["before"].update(finish={})), "before.finish is stored as"),
    "finish removed": (the_ledger(lambda v: v.update(finish=None)), "finish is missing, and run.json asked for it"),
    "other settings": (the_ledger(lambda v: v["finish"].update(settings="FineTune()")), "finish.settings is stored as"),
    "other targets": (the_ledger(lambda v: v["finish"].update(targets=7)), "finish.targets is stored as 7"),
    "merely pruned": (the_ledger(merely_pruned), "finish is missing"),
    "run without finish": (the_run(lambda v: v.update(finish=None, targets=None)), "is not the one in layers/"),
}  # fmt: skip


@pytest.mark.parametrize(("tamper", "said"), SEALED.values(), ids=SEALED)
def test_what_is_changed_is_found_even_with_the_digests_mended(run, tamper, said):
    path, _ = run
    tamper(path)
    # by its digest alone, whatever it is
    assert any(words in failures(path) for words in ("it is not the file that the run wrote", "own digest"))
    seal(path)
    found = failures(path)
    assert "SHA-256" not in found
    assert "digest" not in found
    assert said in found


@pytest.mark.parametrize("kind", ["layer", "global"])
def test_more_weights_than_were_to_be_left_are_found(stored, tmp_path, kind):
    shutil.copytree(stored["path"] / kind, tmp_path / "run")

    def lower(value: dict[str, Any]) -> None:
        targets = value["targets"]
        value["targets"] = targets - 1 if kind == "global" else {name: count - 1 for name, count in targets.items()}

    change(tmp_path / "run" / "run.json", lower)
    seal(tmp_path / "run")
    assert "and finishing was to leave" in failures(tmp_path / "run")


@pytest.mark.parametrize("file", ["model.safetensors", "masks.safetensors", "ledger.json"])
def test_a_truncated_or_missing_file_is_named(run, file):
    path, _ = run
    content = (path / file).read_bytes()
    (path / file).write_bytes(content[: len(content) // 2])
    for read in (nettrim.verify, nettrim.load_result):
        with pytest.raises(RunError, match=f"{file} is truncated"):
            read(path)
    (path / file).unlink()
    for read in (nettrim.verify, nettrim.load_result):
        with pytest.raises(RunError, match=file):
            read(path)


def test_a_layer_missing_in_the_model_is_said(run):
    path, _ = run
    change_tensors(path / "model.safetensors", lambda tensors: tensors.pop("3.weight"))
    seal(path)
    assert "the stored layers do not fit together" in failures(path)
    with pytest.raises(RunError, match=r"3\.weight"):
        nettrim.load_result(path)


# resuming ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def interrupted(stored, tmp_path, monkeypatch):
    """Start a run and stop it in the middle of its finishing, by what Ctrl-C raises."""

    def start(name: str, **changed: Any) -> Path:
        given = RUNS[name] | changed
        plain = type(given["finish"]).run

        def stopped(self, model, *args, **kwargs):
            plain(self, model, *args, **kwargs)
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(type(given["finish"]), "run", stopped)
            with pytest.raises(KeyboardInterrupt):
                again(stored, tmp_path / "run", resume=False, **given)
        return tmp_path / "run"

    return start


def again(stored: dict[str, Any], path: Path, *, resume: bool = True, **given: Any) -> Any:
    how = {"batches": stored["batches"], "held_out": stored["held_out"]} | given
    return nettrim.prune(stored["model"], out_dir=path, resume=resume, **how, **QUIET)


@pytest.mark.parametrize("name", RUNS)
def test_a_run_stopped_while_finishing_goes_on_to_the_same_bits(stored, interrupted, monkeypatch, name):
    path = interrupted(name)
    found = nettrim.verify(path)
    assert (found.failures, found.state) == ((), "3 of 3 layers finished")
    assert not (path / "model.safetensors").exists()
    with pytest.raises(RunError, match="unfinished run"):
        nettrim.load_result(path)
    no_pruning(monkeypatch)
    whole, resumed = stored["results"][name], again(stored, path, **RUNS[name])
    assert same_weights(resumed.model, whole.model)
    assert timeless(resumed.ledger.as_dict()) == timeless(whole.ledger.as_dict())
    assert timeless(resumed.settings) == timeless(whole.settings)
    assert failures(path) == ""
    # and a whole one can be gone on with too
    assert same_weights(again(stored, path, **RUNS[name]).model, whole.model)
    assert failures(path) == ""


@pytest.mark.parametrize(
    ("name", "changed", "said"),
    [
        ("fixed", {"finish": replace(FIXED, epochs=4)}, "another finish:"),
        ("fixed", {"finish": TUNE}, "another finish:"),
        ("fixed", {"finish": None}, "another finish:"),
        ("fixed", {"seed": 1}, "another seed:"),
        ("layer", {"finish": replace(LAYER, headroom=2.0)}, "another amount, finish:"),
        ("layer", {"kept": {"3": 20, "5": 8}}, "another amount, targets:"),
        ("layer", {"finish": None}, "another amount, finish, targets:"),
        ("global", {"finish": replace(GLOBAL, every=7)}, "another finish:"),
        ("global", {"finish": LAYER}, "another finish:"),
        ("global", {"finish": None}, "another finish:"),
        ("global", {"seed": 1}, "another seed:"),
        ("global", {"sparsity": Overall(0.6)}, "another overall:"),
        ("global", {"layers": "all"}, "another layers:"),
        ("global", {"layers": ["0"]}, "another layers:"),
        ("global", {"method": "l-obs"}, "another method, method_settings:"),
        ("global", {"held_out": None}, "another data:"),
        ("global", {"sparsity": 0.7}, "another amount, overall, targets"),
    ],
)
def test_another_wish_is_refused_by_name_before_any_work(stored, interrupted, monkeypatch, name, changed, said):
    path = interrupted(name)
    before = {p: p.read_bytes() for p in path.rglob("*") if p.is_file()}
    no_pruning(monkeypatch)
    with pytest.raises(RunError, match=f"holds a run with {said}"):
        again(stored, path, **RUNS[name] | changed)
    assert {p: p.read_bytes() for p in path.rglob("*") if p.is_file()} == before


def test_a_split_is_taken_over_and_not_found_again(stored, tmp_path, monkeypatch):
    """Also where it was stopped before the first layer: the split is what `run.json` says."""
    given = RUNS["global"]
    monkeypatch.setattr(planning, "allocate", lambda *_args, **_kwargs: {"0": 200 - 93, "3": 93})
    with monkeypatch.context() as patch:
        patch.setattr(nettrim.NetTrim, "prune_layer", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            again(stored, tmp_path / "run", resume=False, **given)
    monkeypatch.setattr(planning, "allocate", lambda *_args, **_kwargs: {"0": 100, "3": 100})
    result = again(stored, tmp_path / "run", **given)
    assert result.settings["amount"] == {"kept": {"0": 107, "3": 93}}
    assert counts(result.layers) == {"0": 107, "3": 93, "5": 50}
    assert result.ledger.finish["targets"] == 352 - int(0.7 * 352)
    assert failures(tmp_path / "run") == ""


# what is printed -----------------------------------------------------------------------------------------------------


def test_the_table_says_how_it_was_finished_and_what_it_was_before(stored):
    for name, kind in (
        ("fixed", "net-trim, cascade, then distilled to the dense network without labels: 3 epochs in "),
        ("layer", "l-obs, cascade, then distilled to the dense network without labels: 3 epochs in "),
        ("fine-tune", "magnitude, parallel, then fine-tuned with labels: 3 epochs in "),
    ):
        ledger = stored["results"][name].ledger
        text = ledger_table(ledger)
        assert text.startswith(kind)
        before = ledger.before
        size, right = before.measured / before.output_norm, 100 * before.accuracy["held-out"]["pruned"]
        (line,) = [line for line in text.splitlines() if line.startswith("before it was trained on: ")]
        assert f"{before.kept:,} weights, output error {size:.5g}, accuracy, calibration: " in line
        assert line.endswith(f"accuracy, held-out: {right:.2f} %")
        assert f"measured {ledger.measured / ledger.output_norm:.5g}, bounded by" in text
        plain = ledger_table(before)
        assert "trained on" not in plain
        assert "then" not in plain.splitlines()[0]
        assert "NOT certified" not in text
