"""A comparison: the figures of its rows, what is refused before any work, what a failure and an interruption cost."""

import json
from dataclasses import dataclass, replace

import pytest
import torch
from networks import seeded
from torch import nn

import nettrim
from nettrim.errors import NetTrimError, RunError
from nettrim.methods.base import LayerResult
from nettrim.pipeline import compare as module
from nettrim.pipeline.compare import compare
from nettrim.pipeline.rows import Row, load_comparison

QUIET = {"progress": False}


@dataclass(frozen=True)
class Broken:
    """Fails where the layer is the second one; `repaired` mends all of them, as a new version would."""

    name: str = "broken"
    amounts: tuple[str, ...] = ("sparsity",)

    def prune_layer(self, task):
        if task.name == "3" and not repaired:
            raise RuntimeError("no factor\n of this matrix")
        return LayerResult(task.weight * (torch.rand(task.weight.shape) < 0.5), task.bias, 0.0)


@dataclass(frozen=True)
class Doubtful:
    """Says that it did not reach its tolerance."""

    name: str = "doubtful"
    amounts: tuple[str, ...] = ("sparsity",)

    def prune_layer(self, task):
        return LayerResult(task.weight, task.bias, 0.5, facts={"status": "MAX_ITER" if task.name == "5" else "SOLVED"})


@dataclass(frozen=True)
class Unlike:
    """Takes no sparsity."""

    name: str = "unlike"
    amounts: tuple[str, ...] = ("epsilon",)

    def prune_layer(self, task):
        raise AssertionError


repaired = False


@pytest.fixture
def calls(monkeypatch):
    """What `prune` was called with, call by call."""
    seen = []
    plain = module.prune

    def counted(*args, **kwargs):
        seen.append((args[2].name, kwargs["sparsity"], kwargs["schedule"]))
        return plain(*args, **kwargs)

    monkeypatch.setattr(module, "prune", counted)
    return seen


def test_every_row_holds_what_prune_gives(network, batches, held_out):
    budgets = [0.5, {"0": 0.5, "3": 0.25, "5": 0.0}]
    found = compare(
        network, batches, ["l-obs", "magnitude"], budgets, schedules=["cascade", "parallel"], held_out=held_out, **QUIET
    )
    asked = [(m, b, s) for b in budgets for m in ("l-obs", "magnitude") for s in ("cascade", "parallel")]
    assert len(found.rows) == len(asked) == 8
    for row, (method, budget, schedule) in zip(found.rows, asked, strict=True):
        ledger = nettrim.prune(
            network, batches, method, sparsity=budget, schedule=schedule, held_out=held_out, **QUIET
        ).ledger
        assert (row.method, row.schedule, row.failure) == (method, schedule, None)
        assert row.budget == ("0.5" if budget == 0.5 else "0=0.5,3=0.25,5=0")
        assert (row.kept, row.numel) == (ledger.kept, 12 * 16 + 16 * 10 + 10 * 5)
        assert row.accuracy == ledger.accuracy
        assert set(row.accuracy) == {"calibration", "held-out"}
        assert row.error["calibration"] == pytest.approx(ledger.measured / ledger.output_norm)
        assert row.error["held-out"] == pytest.approx(ledger.held_out)
        assert row.bound == pytest.approx(ledger.bound / ledger.output_norm)
        assert [(x.name, x.kept, x.numel) for x in row.layers] == [(r.name, r.kept, r.numel) for r in ledger.records]
        for layer, record in zip(row.layers, ledger.records, strict=True):
            assert layer.error == pytest.approx(record.network_error / record.target_norm)
            assert layer.held_out == pytest.approx(record.held_out)
        assert 0 < row.layer_seconds == sum(layer.seconds for layer in row.layers) < row.seconds
        assert row.peak_mib >= 0
        assert row.certified
    json.dumps(found.as_dict(), allow_nan=False)


def test_patterns_and_settings_are_named(network, batches):
    methods = [nettrim.LObs(damping=0.01), "l-obs", nettrim.LObs(damping=0.01, bias="pooled")]
    found = compare(network, batches, methods, [0.5], ignore="0", **QUIET)
    assert [row.method for row in found.rows] == ["l-obs (damping=0.01)", "l-obs", "l-obs (damping=0.01, bias=pooled)"]
    assert [layer.name for layer in found.rows[0].layers] == ["3", "5"]
    patterned = compare(network, batches, ["magnitude"], [nettrim.Pattern(1, 2)], **QUIET).rows[0]
    assert patterned.budget == "1:2"
    assert patterned.kept == patterned.numel / 2
    overall = compare(network, batches, ["magnitude"], [nettrim.Overall(0.5)], **QUIET).rows[0]
    assert overall.budget == "Overall(sparsity=0.5)"
    assert overall.kept == overall.numel / 2
    assert any(layer.kept != layer.numel / 2 for layer in overall.layers)


def test_what_it_is_about(network, batches, held_out):
    found = compare(network, batches, ["magnitude"], [0.5], held_out=held_out, seed=7, **QUIET).about
    assert found["seed"] == 7
    assert found["samples"] == {"calibration": 60, "held-out": 25}
    assert found["host"]["threads"] == 1
    assert found["host"]["cores"] >= 1
    assert found["host"]["processor"]
    assert found["host"]["versions"]["torch"] == torch.__version__
    assert [layer["name"] for layer in found["chain"]] == ["0", "3", "5"]
    # the fingerprint is of inputs, labels and splits alike
    x, y = batches[0]
    others = [batches, [(x + 1e-6, y), *batches[1:]], [(x, (y + 1) % 5), *batches[1:]], batches[1:]]
    prints = [compare(network, other, ["magnitude"], [0.5], seed=7, **QUIET).about["data"] for other in others]
    assert set(found["data"]) == {"calibration", "held-out"}
    assert len({json.dumps(each) for each in (found["data"], *prints)}) == 5


def test_without_labels_and_held_out_samples(network, batches):
    row = compare(network, [x for x, _ in batches], ["magnitude"], [0.5], **QUIET).rows[0]
    assert row.accuracy == {}
    assert set(row.error) == {"calibration"}
    assert all(layer.held_out is None for layer in row.layers)


def test_batches_are_read_once_and_alike_for_all(network, batches, held_out):
    listed = compare(network, batches, ["magnitude", "l-obs"], [0.5], held_out=held_out, **QUIET)
    read = compare(network, iter(batches), ["magnitude", "l-obs"], [0.5], held_out=iter(held_out), **QUIET)
    assert [row.error for row in read.rows] == [row.error for row in listed.rows]
    assert read.about["data"] == listed.about["data"]


def test_the_seed_is_that_of_every_row(network, batches, monkeypatch):
    monkeypatch.setitem(globals(), "repaired", True)
    schedules = ["cascade", "parallel"]
    one, two, other = (
        compare(network, batches, [Broken()], [0.5], schedules=schedules, seed=seed, **QUIET).rows for seed in (1, 1, 2)
    )
    assert [row.error for row in one] == [row.error for row in two]
    assert one[0].error == one[1].error  # the method draws, and draws the same in every row
    assert one[0].error != other[0].error


def test_a_failed_row_says_why_and_leaves_the_others(tmp_path, network, batches, calls, monkeypatch):
    out = tmp_path / "out"
    found = compare(network, batches, ["magnitude", Broken(), "l-obs"], [0.5], out_dir=out, **QUIET)
    assert [row.failure for row in found.rows] == [None, "RuntimeError: no factor of this matrix", None]
    failed = found.rows[1]
    assert (failed.kept, failed.layers, failed.error) == (0, (), {})
    assert failed.seconds > 0
    assert load_comparison(out) == found
    # what failed is tried again, in its place, and nothing else
    monkeypatch.setitem(globals(), "repaired", True)
    del calls[:]
    again = compare(network, batches, ["magnitude", Broken(), "l-obs"], [0.5], out_dir=out, resume=True, **QUIET)
    assert calls == [("broken", 0.5, "cascade")]
    assert [row.failure for row in again.rows] == [None, None, None]
    assert (again.rows[0], again.rows[2]) == (found.rows[0], found.rows[2])


def test_errors_of_our_own_are_the_sentence_itself(network, batches, monkeypatch):
    def refuse(self, task):
        raise nettrim.ProblemError("the layer is too small.")

    monkeypatch.setattr(Broken, "prune_layer", refuse)
    assert compare(network, batches, [Broken()], [0.5], **QUIET).rows[0].failure == "the layer is too small."
    monkeypatch.setattr(Broken, "prune_layer", lambda self, task: (_ for _ in ()).throw(MemoryError))
    assert compare(network, batches, [Broken()], [0.5], **QUIET).rows[0].failure == "MemoryError"


def test_a_layer_without_its_certificate_shows(network, batches):
    row = compare(network, batches, [Doubtful()], [0.5], **QUIET).rows[0]
    assert not row.certified
    assert [layer.certified for layer in row.layers] == [True, True, False]


def test_a_network_that_puts_out_nothing_has_errors_too(batches):
    model = nn.Sequential(nn.Linear(12, 4), nn.ReLU(), nn.Linear(4, 5))
    nn.init.zeros_(model[2].weight)
    nn.init.zeros_(model[2].bias)
    row = compare(model, batches, ["magnitude"], [0.5], **QUIET).rows[0]
    assert row.failure is None
    assert row.error["calibration"] == 0


def test_killed_between_rows_and_resumed(tmp_path, network, batches, held_out, monkeypatch):
    grid = (["magnitude", "l-obs"], [0.5, 0.75])
    whole = compare(network, batches, *grid, held_out=held_out, **QUIET)
    plain, done = module.prune, []

    def stopping(*args, **kwargs):
        if len(done) == 2:
            raise KeyboardInterrupt
        done.append(kwargs["sparsity"])
        return plain(*args, **kwargs)

    monkeypatch.setattr(module, "prune", stopping)
    with pytest.raises(KeyboardInterrupt):
        compare(network, batches, *grid, held_out=held_out, out_dir=tmp_path / "out", **QUIET)
    first = load_comparison(tmp_path / "out")
    assert [(row.method, row.budget) for row in first.rows] == [("magnitude", "0.5"), ("l-obs", "0.5")]
    assert not list((tmp_path / "out").glob("*.part"))

    del done[:]
    monkeypatch.setattr(
        module, "prune", lambda *args, **kwargs: done.append(kwargs["sparsity"]) or plain(*args, **kwargs)
    )
    resumed = compare(network, batches, *grid, held_out=held_out, out_dir=tmp_path / "out", resume=True, **QUIET)
    assert done == [0.75, 0.75]
    assert resumed.rows[:2] == first.rows  # to the second that they took
    assert [row.key for row in resumed.rows] == [row.key for row in whole.rows]
    assert [row.error for row in resumed.rows] == [row.error for row in whole.rows]
    assert load_comparison(tmp_path / "out") == resumed


def test_resuming_adds_rows_and_keeps_the_others(tmp_path, network, batches, calls):
    out = {"out_dir": tmp_path / "out", "resume": True}
    first = compare(network, batches, ["magnitude"], [0.5], **out, **QUIET)  # nothing there: it starts one
    assert compare(network, batches, ["magnitude"], [0.5], **out, **QUIET) == first
    assert len(calls) == 1
    more = compare(network, batches, ["l-obs"], [0.5, 0.25], schedules=["parallel"], **out, **QUIET)
    assert calls[1:] == [("l-obs", 0.5, "parallel"), ("l-obs", 0.25, "parallel")]
    assert more.rows[0] == first.rows[0]
    assert len(more.rows) == 3
    assert all(row.host is None for row in more.rows)
    # the same name with other settings is another row
    other = compare(network, batches, [nettrim.LObs(damping=0.1)], [0.5], schedules=["parallel"], **out, **QUIET)
    assert len(other.rows) == 4


def test_resuming_elsewhere_is_noted_in_the_new_rows_only(tmp_path, network, batches):
    out = tmp_path / "out"
    compare(network, batches, ["magnitude"], [0.5], out_dir=out, **QUIET)
    stored = json.loads((out / "compare.json").read_text())
    stored["host"]["processor"] = "another one"
    (out / "compare.json").write_text(json.dumps(stored))
    found = compare(network, batches, ["magnitude"], [0.5, 0.75], out_dir=out, resume=True, **QUIET)
    assert found.about["host"]["processor"] == "another one"
    assert found.rows[0].host is None
    assert found.rows[1].host["host"]["processor"] != "another one"


def other_model(network):
    with torch.no_grad():
        network[0].weight[0, 0] += 1e-3
    return network


RESUME = {
    "model": lambda m, b, h: ((other_model(m), b), {"held_out": h}),
    "data": lambda m, b, h: ((m, b[:2]), {"held_out": h}),
    "data, first batch": lambda m, b, h: ((m, [h[0], *b[1:]]), {"held_out": h}),
    "data, held out": lambda m, b, h: ((m, b), {"held_out": b}),
    "data, none held out": lambda m, b, h: ((m, b), {}),
    "seed": lambda m, b, h: ((m, b), {"held_out": h, "seed": 1}),
    "chain": lambda m, b, h: ((m, b), {"held_out": h, "layers": ["0", "3"]}),
}


@pytest.mark.parametrize("change", RESUME)
def test_resume_refuses_and_says_what_differs(tmp_path, network, batches, held_out, change):
    out = tmp_path / "out"
    compare(network, batches, ["magnitude"], [0.5], held_out=held_out, out_dir=out, **QUIET)
    before = (out / "compare.json").read_bytes()
    given, options = RESUME[change](network, batches, held_out)
    with pytest.raises(RunError, match=f"differs in {change.split(',')[0]}: resume with the same"):
        compare(*given, ["magnitude"], [0.5], out_dir=out, resume=True, **options, **QUIET)
    assert (out / "compare.json").read_bytes() == before


BAD = {
    "no method": (dict(methods=[]), "methods is \\[\\]"),
    "a single method": (dict(methods="l-obs"), "methods is a single str"),
    "a single object": (dict(methods=nettrim.LObs()), "methods is a single LObs"),
    "unknown method": (dict(methods=["magnitude", "trim"]), "method='trim' is unknown"),
    "the class": (dict(methods=[nettrim.LObs]), "the class LObs"),
    "method twice": (dict(methods=["magnitude", nettrim.Magnitude()]), "magnitude at sparsity 0.5, cascade, is asked"),
    "one name for two": (dict(methods=[Broken(), Broken(name="broken", amounts=("sparsity", "kept"))]), "both called"),
    "no sparsity": (dict(methods=["magnitude", Unlike()]), "'unlike' takes epsilon, and sparsity=0.5"),
    "no budget": (dict(budgets=[]), "budgets is \\[\\]"),
    "a single budget": (dict(budgets=0.5), "budgets is a single float"),
    "a single dict": (dict(budgets={"0": 0.5}), "budgets is a single dict"),
    "budget None": (dict(budgets=[None]), "no None"),
    "budget out of range": (dict(budgets=[0.5, 1.0]), "sparsity=1 is out of range"),
    "budget NaN": (dict(budgets=[float("nan")]), "sparsity=nan"),
    "budget for less than every layer": (dict(budgets=[nettrim.Overall(0.999)]), "leaves 1 weights for 3 layers"),
    "budget twice": (dict(budgets=[0.5, 0.50]), "asked for twice"),
    "budget of another layer": (dict(budgets=[{"7": 0.5}]), "names 7"),
    "pattern that does not divide": (dict(budgets=[nettrim.Pattern(2, 4)]), "does not divide the 10 inputs"),
    "schedule": (dict(schedules=["both"]), "schedule='both' is unknown"),
    "a single schedule": (dict(schedules="cascade"), "schedules is a single str"),
    "layer": (dict(layers="fc7"), "fc7"),
    "finish": (dict(finish="retrain"), "finish='retrain' is unknown"),
    "seed": (dict(seed=0.5), "seed=0.5"),
    "resume nowhere": (dict(resume=True, out_dir=None), "resume=True needs out_dir"),
    "data that do not fit": (dict(batches=[torch.zeros(4, 3)]), "inputs of shape"),
    "held-out data that do not fit": (dict(held_out=[torch.zeros(4, 3)]), "inputs of shape"),
    "NaN": (dict(batches=[torch.full((4, 12), torch.nan)]), "NaN"),
    "no data": (dict(batches=[]), "batches holds no batch"),
    "fine-tuning without labels": (dict(batches=[torch.ones(4, 12)], finish="fine-tune"), "needs labels"),
}  # fmt: skip


@pytest.mark.parametrize(("change", "said"), BAD.values(), ids=BAD)
def test_what_cannot_be_is_refused_before_any_work(tmp_path, network, batches, calls, change, said):
    given = dict(batches=batches, methods=["magnitude"], budgets=[0.5], out_dir=tmp_path / "out") | change
    with pytest.raises(NetTrimError, match=said) as caught:
        compare(network, **given, **QUIET)
    assert len(str(caught.value).splitlines()) == 1
    assert calls == []
    assert not (tmp_path / "out").exists()


def test_a_directory_in_use_is_refused(tmp_path, network, batches, calls):
    (tmp_path / "thesis.txt").write_text("all of it")
    with pytest.raises(RunError, match="already holds something"):
        compare(network, batches, ["magnitude"], [0.5], out_dir=tmp_path, **QUIET)
    with pytest.raises(RunError, match="cannot be made"):
        compare(network, batches, ["magnitude"], [0.5], out_dir=tmp_path / "thesis.txt" / "in", resume=True, **QUIET)
    assert calls == []


def test_a_file_of_the_first_version_is_read_and_gone_on_with(tmp_path, network, batches, calls):
    out = tmp_path / "out"
    found = compare(network, batches, ["magnitude"], [0.5], out_dir=out, **QUIET)
    stored = json.loads((out / "compare.json").read_text())
    for row in stored["rows"]:
        del row["costs"], row["latency"]
    (out / "compare.json").write_text(json.dumps(stored | {"schema": 1}))
    old = load_comparison(out)
    assert old.rows == (replace(found.rows[0], costs={}),)
    del calls[:]
    more = compare(network, batches, ["magnitude"], [0.5, 0.25], out_dir=out, resume=True, **QUIET)
    assert calls == [("magnitude", 0.25, "cascade")]
    assert more.rows[0] == old.rows[0]
    assert json.loads((out / "compare.json").read_text())["schema"] == 2


def test_smaller_networks_beside_sparse_ones():
    def unit(before, after):
        return [nn.Conv2d(before, after, 3, padding=1), nn.ReLU()]

    model = seeded(
        nn.Sequential(*unit(2, 6), *unit(6, 6), *unit(6, 6), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 3)), 5
    )
    drawing = torch.Generator().manual_seed(6)
    x, labels = torch.randn(60, 2, 6, 6, generator=drawing), torch.randint(0, 3, (60,), generator=drawing)
    methods = ["magnitude", nettrim.Ldrf(steps=5), nettrim.Shallowing(probe_seeds=1)]
    found = compare(model, [(x, labels)], methods, [0.25, 0.9], **QUIET)
    rows = {(row.method.split()[0], row.budget): row for row in found.rows}
    assert list(rows) == [(name, budget) for budget in ("0.25", "0.9") for name in ("magnitude", "ldrf", "shallowing")]
    # what cannot be reached is one row's failure, and says why
    failed = rows.pop(("shallowing", "0.9"))
    assert "sparsity=0.9 cannot be reached by taking units out" in failed.failure
    assert (failed.costs, failed.latency) == ({}, None)
    dense = {"weights": 774, "multiply_adds": 36 * 756 + 18}
    for (method, budget), row in rows.items():
        assert row.failure is None
        assert row.costs["dense"] == dense
        assert row.numel == 774
        assert row.kept <= 774 * (1 - float(budget)) + 4  # a weight less than one of each layer is not taken
        if method == "magnitude":
            assert row.costs["pruned"] == dense
            assert row.latency is None
        else:
            assert row.kept <= row.costs["pruned"]["weights"] < 774
            assert row.costs["pruned"]["multiply_adds"] < dense["multiply_adds"]
            assert 0 < row.latency["lower"] <= row.latency["speedup"] <= row.latency["upper"]
            assert (row.latency["samples"], row.latency["threads"]) == (60, 1)
    assert rows["shallowing", "0.25"].kept == 774 - 324
    assert rows["shallowing", "0.25"].costs["pruned"]["weights"] == 774 - 324
    json.dumps(found.as_dict(), allow_nan=False)


def test_files_that_are_no_comparison_are_refused(tmp_path, network, batches):
    compare(network, batches, ["magnitude"], [0.5], out_dir=tmp_path / "out", **QUIET)
    path = tmp_path / "out" / "compare.json"
    good = json.loads(path.read_text())
    spoiled = {
        "truncated": path.read_text()[:300],
        "holds no JSON object": "[]",
        "schema 3": json.dumps(good | {"schema": 3}),
        "none of a comparison": json.dumps(good | {"rows": [{"method": "x"}]}),
        "rows that are none": json.dumps(good | {"rows": [good["rows"][0] | {"colour": 1}]}),
        "lacks data, host": json.dumps({k: v for k, v in good.items() if k not in ("data", "host")}),
    }
    for said, text in spoiled.items():
        path.write_text(text)
        with pytest.raises(RunError, match=said):
            compare(network, batches, ["magnitude"], [0.5], out_dir=tmp_path / "out", resume=True, **QUIET)
        assert path.read_text() == text
    with pytest.raises(RunError, match="cannot be read"):
        load_comparison(tmp_path)


def test_rows_come_merely_pruned_and_trained_on(tmp_path, network, batches):
    alone = compare(network, batches, ["magnitude"], [0.5], out_dir=tmp_path / "out", **QUIET)
    both = compare(
        network, batches, ["magnitude"], [0.5], finish=(None, "distill"), out_dir=tmp_path / "out", resume=True, **QUIET
    )
    # what was finished is never taken for what was merely pruned, and what is there is not run again
    assert [row.finish for row in both.rows] == [None, "distill"]
    assert both.rows[0] == alone.rows[0]
    pruned, finished = both.rows
    assert finished.kept == pruned.kept
    assert finished.error["calibration"] < pruned.error["calibration"]


def test_the_model_and_the_callers_random_numbers_are_left_alone(network, batches):
    before = {key: value.clone() for key, value in network.state_dict().items()}
    state = torch.get_rng_state()
    compare(network, batches, ["magnitude"], [0.5], **QUIET)
    assert all(torch.equal(before[key], value) for key, value in network.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)
    assert network.training


def test_rows_are_told_apart_by_what_they_are():
    row = Row("l-obs", "LObs()", "0.5", "cascade")
    changes = [{"settings": "LObs(damping=1)"}, {"budget": "0.6"}, {"schedule": "parallel"}, {"finish": "distill"}]
    assert len({row.key, *(replace(row, **change).key for change in changes)}) == 5
    assert replace(row, seconds=3.0, failure="x").key == row.key
