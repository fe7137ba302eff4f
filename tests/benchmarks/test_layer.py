"""The layer benchmark: it runs, it goes on, it believes no solver, and the papers' ADMM is the papers'."""

import json
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch

from benchmarks.layer import run
from benchmarks.layer.__main__ import main
from benchmarks.layer.datasets import catalogue
from benchmarks.layer.objective import judge, nearly_reached, reached, shares
from benchmarks.layer.records import Records
from benchmarks.layer.solvers import COUNTS, ENTRIES, Entry, PapersAdmm
from nettrim.core.problem import build_problem
from nettrim.core.solvers import Admm, solve_problem
from nettrim.core.solvers.base import Limits

TINY = "tiny-16-240-6"


def bench(out, *arguments):
    return main(["--out", str(out), "--quick", "--threads", "1", *arguments])


def rows_of(out):
    return json.loads((out / "results.json").read_text())["rows"]


def small_layer(form="ball", epsilon=0.2, per_neuron=False):
    x = torch.randn(60, 8, dtype=torch.float64)
    y = x @ torch.randn(8, 4, dtype=torch.float64)
    return build_problem(
        x, y if form == "linear" else y.clamp(min=0), epsilon=epsilon, form=form, per_neuron=per_neuron
    )


def test_a_quick_run_leaves_rows_tables_and_plots(tmp_path, capsys):
    wanted = ("--solvers", "admm", "newton", "papers-100", "--tolerances", "1e-2", "1e-3")
    assert bench(tmp_path, *wanted) == 0
    rows = rows_of(tmp_path)
    assert {(row["instance"], row["solver"]) for row in rows} == {
        (instance, solver) for instance in (TINY, f"{TINY}-halfspace") for solver in ("admm", "newton", "papers-100")
    }
    for row in rows:
        assert row["failure"] == ""
        assert row["pairs"] == pytest.approx(row["seconds"] / row["pair_seconds"])
        assert 0 < row["kept"] <= row["numel"]
        assert row["threads"] == 1
    assert all(any(reached(row, 1e-3) for row in rows if row["solver"] == name) for name in ("admm", "newton"))
    content = json.loads((tmp_path / "results.json").read_text())
    assert content["runs"][0]["versions"]["torch"] == torch.__version__
    assert content["instances"][TINY]["samples"] == 240
    text = (tmp_path / "tables.txt").read_text()
    assert TINY in text
    assert text in capsys.readouterr().out
    for name in ("gap_against_time.png", "gap_against_time.svg"):
        assert (tmp_path / name).stat().st_size > 1000
    assert not list(tmp_path.glob("*.partial"))


def test_scaling_draws_growth(tmp_path):
    assert bench(tmp_path, "--scaling", "kept", "--solvers", "admm", "--tolerances", "1e-2") == 0
    assert {row["instance"] for row in rows_of(tmp_path)} == set(catalogue(quick=True).families["kept"])
    assert (tmp_path / "scaling.png").exists()
    assert "Growth with the kept fraction" in (tmp_path / "tables.txt").read_text()


def test_conic_solvers_get_neurons_and_their_seconds_are_marked_as_extrapolated(tmp_path):
    conic = ("--instances", TINY, "--solvers", "clarabel", "--neurons", "2", "--tolerances", "1e-3")
    assert bench(tmp_path, *conic) == 0
    (row,) = rows_of(tmp_path)
    assert row["failure"] == ""
    assert row["extrapolated"]
    assert len(row["neurons"]) == 2
    assert row["seconds"] == pytest.approx(3 * sum(neuron["seconds"] for neuron in row["neurons"]))
    assert row["gap"] == max(neuron["gap"] for neuron in row["neurons"])
    assert reached(row, 1e-3)
    assert ")*" in (tmp_path / "tables.txt").read_text()


def test_rows_that_are_there_are_not_run_again(tmp_path, monkeypatch):
    wanted = ("--instances", TINY, "--solvers", "admm", "--tolerances", "1e-1", "1e-2")
    assert bench(tmp_path, *wanted) == 0
    before = (tmp_path / "results.json").read_bytes()
    calls = []
    real = run.solve_problem
    monkeypatch.setattr(run, "solve_problem", lambda *a, **k: calls.append(k["tol"]) or real(*a, **k))
    assert bench(tmp_path, *wanted) == 0
    assert calls == []
    assert (tmp_path / "results.json").read_bytes() == before
    assert bench(tmp_path, *wanted, "1e-3") == 0
    assert calls == [1e-3]
    assert len(rows_of(tmp_path)) == 3


def test_failures_are_rows_and_get_another_chance(tmp_path, monkeypatch):
    wanted = ("--instances", TINY, "--solvers", "admm", "--tolerances", "1e-1", "1e-2")

    def breaks(*arguments, **options):
        raise ArithmeticError("no")

    with monkeypatch.context() as broken:
        broken.setattr(run, "solve_problem", breaks)
        assert bench(tmp_path, *wanted) == 0
    # a sweep ends where it breaks
    assert [row["failure"] for row in rows_of(tmp_path)] == ["ArithmeticError: no"]
    assert bench(tmp_path, *wanted) == 0
    assert [row["failure"] for row in rows_of(tmp_path)] == ["", ""]


def test_a_row_that_the_clock_cut_off_is_run_again_with_a_longer_one(tmp_path):
    records = Records(tmp_path / "results.json")
    key = {"instance": "a", "solver": "b", "level": 0.1, "seed": 0, "threads": 1}
    records.add({**key, "failure": "", "timed_out": True, "max_seconds": 5.0})
    again = Records(tmp_path / "results.json")
    assert again.find(key, 5.0) is not None
    assert again.find(key, 50.0) is None
    assert again.find({**key, "threads": 2}, 5.0) is None


@dataclass(frozen=True)
class Shrinks:
    """Says that it solved, and returns nine tenths of the weight: a smaller norm than the optimum's."""

    def refuses(self, problem):
        return None

    def run(self, problem, limits, start):
        answer = Admm().run(problem, limits, start)
        return replace(answer, weight=0.9 * answer.weight)


def test_a_wrong_solver_is_found_out(tmp_path, monkeypatch):
    monkeypatch.setitem(ENTRIES, "shrinks", Entry(lambda tolerance: Shrinks(), "ours"))
    assert bench(tmp_path, "--instances", TINY, "--solvers", "shrinks", "--tolerances", "1e-1", "1e-2") == 0
    for row in rows_of(tmp_path):
        assert row["gap"] < 1e-1  # which alone would look like success
        assert row["violation"] > 1e-2
        assert not reached(row, 1e-1)
        assert not nearly_reached(row, 1e-2)


@pytest.mark.parametrize(
    ("form", "per_neuron", "rho"),
    [("ball", False, 1.0), ("ball", True, 10.0), ("halfspace", False, 10.0), ("linear", False, 10.0)],
)  # fmt: skip
def test_the_papers_admm_goes_to_our_optimum(form, per_neuron, rho):
    problem = small_layer(form, per_neuron=per_neuron)
    answer = PapersAdmm(rho, 20_000).run(problem, Limits(1e-3), None)
    verdict = judge(problem, answer.weight, answer.multipliers)
    assert verdict.gap < 1e-6
    assert verdict.violation < 1e-6
    ours = solve_problem(problem, "admm", tol=1e-5)
    assert verdict.objective == pytest.approx(ours.certificate.objective, rel=2e-5)


def test_the_papers_admm_is_the_published_iteration_step_by_step():
    # the published formulas, written down once more in their own notation: columns are samples
    problem, rho = small_layer("halfspace"), 5.0
    x, y = problem.inputs.numpy().T, problem.targets.numpy().T
    c0 = 0.3 * np.sqrt((x @ x.T).max())
    x, y, eps, on = x / c0, y / c0, problem.radius / c0, y > 0
    w3, u1, u2 = np.zeros((8, 4)), np.zeros((4, 60)), np.zeros((8, 4))
    for _ in range(7):
        z = w3.T @ x - u1
        miss = np.linalg.norm((z - y)[on])
        w1 = np.where(on, y + min(1, eps / miss) * (z - y), np.minimum(z, 0))
        w2 = np.sign(w3 - u2) * np.maximum(np.abs(w3 - u2) - 1 / rho, 0)
        w3 = np.linalg.solve(x @ x.T + np.eye(8), x @ (w1 + u1).T + w2 + u2)
        u1, u2 = u1 + w1 - w3.T @ x, u2 + w2 - w3
    answer = PapersAdmm(rho, 7).run(problem, Limits(1e-3), None)
    np.testing.assert_allclose(answer.weight.numpy(), w2.T, atol=1e-12)
    np.testing.assert_allclose(answer.multipliers.numpy(), rho / c0 * u1.T, atol=1e-12)


def test_the_papers_admm_takes_the_papers_counts_and_no_lam():
    assert {300, 500, 2000} <= set(COUNTS)
    assert ENTRIES["papers-1"].levels([1e-1]) == list(COUNTS)
    problem = build_problem(torch.eye(3), torch.ones(3, 1), lam=1.0)
    assert "radius" in PapersAdmm().refuses(problem)


def test_shares_of_the_neurons_add_up_to_the_distance():
    for form in ("ball", "halfspace"):
        problem = small_layer(form)
        weight = solve_problem(problem, "admm").weight
        assert float(shares(problem, weight).norm()) == pytest.approx(judge(problem, weight).distance)


@pytest.mark.parametrize(
    "wrong",
    [
        ("--instances", "fc9"),
        ("--solvers", "gurobi"),
        ("--scaling", "Q"),
        ("--tolerances", "-1"),
        ("--neurons", "0"),
    ],
)
def test_a_wrong_argument_gives_one_sentence(wrong, tmp_path, capsys):
    assert bench(tmp_path, *wrong) == 2
    text = capsys.readouterr().err
    assert text.count("\n") == 1
    assert wrong[1] in text
    assert not (tmp_path / "results.json").exists()


def test_a_foreign_file_is_left_alone(tmp_path, capsys):
    (tmp_path / "results.json").write_text('{"rows": []}')
    assert bench(tmp_path, "--solvers", "admm") == 2
    assert "give another --out" in capsys.readouterr().err
    assert (tmp_path / "results.json").read_text() == '{"rows": []}'


def test_rows_that_cannot_be_compared_are_not_put_side_by_side(tmp_path, capsys):
    assert bench(tmp_path, "--instances", TINY, "--solvers", "admm", "--tolerances", "1e-1") == 0
    assert bench(tmp_path, "--instances", TINY, "--solvers", "admm", "--seed", "1") == 2
    assert "seed 0 (now 1)" in capsys.readouterr().err


def test_the_list_names_everything(capsys):
    assert main(["--list"]) == 0
    text = capsys.readouterr().out
    assert all(name in text for name in ("fc1-0.05", "fc2-0.3", "conv5-0.1", "planted-4096-8192", *ENTRIES))


@pytest.mark.data
@pytest.mark.usefixtures("data_directory")
def test_data_instances_are_what_they_say():
    built = {name: i.build().problem for name, i in catalogue(100).instances.items() if name.endswith("0.1-P100")}
    assert {(p.samples, p.n_inputs, p.n_outputs) for p in built.values()} >= {(100, 785, 300), (100, 301, 100)}
    for p in built.values():
        assert bool((p.inputs[:, -1] == 1).all())
        assert p.radius == pytest.approx(0.1 * float(p.targets.norm()))
    larger = catalogue(200).instances["fc2-0.1-P200"].build().problem
    assert torch.equal(larger.inputs[:100], built["fc2-0.1-P100"].inputs)
    patches = catalogue(2000).instances["conv3-0.1-P2000"].build().problem
    assert patches.inputs.shape == (2000, 28)
    assert patches.active.double().mean(0) == pytest.approx(torch.full((64,), 0.3, dtype=torch.float64), abs=1e-2)
