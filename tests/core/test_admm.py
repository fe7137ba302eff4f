"""ADMM: its elementwise stages compiled and plain, what it must not do on a GPU, its memory, and the repair."""

from __future__ import annotations

import json

import pytest
import torch
from oracle import assert_certified
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.layer import gpu
from benchmarks.layer.datasets import catalogue
from nettrim.core.cases import random_layer
from nettrim.core.certificate import certify, measure_fit
from nettrim.core.problem import LayerProblem, build_problem
from nettrim.core.solution import FEASIBLE, Status
from nettrim.core.solvers import Admm, fused, solve_problem
from nettrim.core.solvers.admm import Iteration
from nettrim.core.solvers.base import Limits
from nettrim.core.solvers.fused import Stages, memory_needed
from nettrim.core.solvers.repair import Repair
from nettrim.errors import UnsupportedError

KINDS = {
    "ball": random_layer("plain", 0),
    "linear": random_layer("plain", 0, form="linear"),
    "halfspace": random_layer("plain", 0, form="halfspace"),
    "per neuron": random_layer("plain", 0, per_neuron=True),
    "halfspace per neuron": random_layer("ceiling", 0, per_neuron=True),
    "lam": random_layer("plain", 0, lam=2.0),
    "halfspace lam": random_layer("plain", 0, form="halfspace", lam=2.0),
}


def iteration_of(problem: LayerProblem, tol: float = 1e-3) -> Iteration:
    return Iteration(problem, Admm(), Limits(tol), None)


class Ops(TorchDispatchMode):
    """Names every operation that reaches torch."""

    def __init__(self):
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.append(func.name())
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("name", KINDS)
def test_compiled_stages_are_the_plain_ones(name, backend):
    plain, compiled = iteration_of(KINDS[name]).variables, iteration_of(KINDS[name]).variables
    compiled.stages = Stages(torch.device("cpu"), backend)
    for _ in range(4):
        plain.advance()
        compiled.advance()
    assert compiled.stages.note == ""
    for one in ("z", "z_dual", "step", "u", "u_dual", "w2"):
        torch.testing.assert_close(getattr(compiled, one), getattr(plain, one), rtol=1e-12, atol=1e-12)


def test_where_nothing_compiles_the_plain_stages_run_and_the_answer_says_so():
    def broken(graph, inputs):
        raise RuntimeError("no compiler")

    plain, other = iteration_of(KINDS["ball"]), iteration_of(KINDS["ball"])
    other.variables.stages = Stages(torch.device("cpu"), broken)
    plain.until(40)
    other.until(40)
    assert "ran uncompiled, because torch.compile failed" in other.answer().note
    torch.testing.assert_close(other.answer().weight, plain.answer().weight, rtol=0, atol=0)


@pytest.mark.parametrize("name", KINDS)
def test_an_iteration_asks_the_device_for_nothing(name):
    variables = iteration_of(KINDS[name]).variables
    with Ops() as ops:
        for _ in range(3):
            variables.advance()
    assert len(ops.seen) > 20
    waits = ("item", "_local_scalar_dense", "nonzero", "is_nonzero", "equal", "_to_copy")
    found = [op for op in ops.seen if op.removeprefix("aten::").split(".")[0] in waits]
    assert not found


def test_the_check_for_waits_sees_one():
    with Ops() as ops:
        float(torch.ones(3).sum())
    assert "aten::_local_scalar_dense" in ops.seen


@pytest.mark.parametrize("name", KINDS)
def test_an_iteration_allocates_no_array_of_the_samples_but_what_the_form_needs(name):
    variables = iteration_of(KINDS[name]).variables
    held = {variables.z.data_ptr(), variables.z_dual.data_ptr(), variables.step.data_ptr()}
    for _ in range(3):
        variables.advance()
        assert {variables.z.data_ptr(), variables.z_dual.data_ptr(), variables.step.data_ptr()} == held


def peak_bytes(work) -> int:
    """The peak of what torch allocates on the CPU while `work` runs."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        work()
    now = peak = 0
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak


@pytest.mark.parametrize("form", ["ball", "linear", "halfspace"])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize(("p", "n", "m"), [(3000, 60, 200), (1500, 300, 40), (200, 400, 300), (600, 600, 600)])
def test_memory_is_as_foretold(p, n, m, dtype, form):
    x = torch.rand(p, n, generator=torch.Generator().manual_seed(0), dtype=getattr(torch, dtype))
    z = x @ torch.randn(n, m, generator=torch.Generator().manual_seed(1), dtype=x.dtype)
    problem = build_problem(x, z if form == "linear" else z.clamp(min=0), epsilon=0.3, form=form)
    peak = peak_bytes(lambda: Admm(max_iter=60, dtype=dtype).run(problem, Limits(1e-4), None))
    assert peak == pytest.approx(memory_needed(p, n, m, x.dtype, form), rel=0.15)


def test_what_does_not_fit_is_refused_before_any_work(monkeypatch):
    problem = KINDS["ball"]
    needed = memory_needed(problem.samples, problem.n_inputs, problem.n_outputs, torch.float64)
    monkeypatch.setattr(fused, "free_memory", lambda device: needed)
    assert solve_problem(problem, "admm").status is Status.SOLVED
    monkeypatch.setattr(fused, "free_memory", lambda device: needed - 1)
    with pytest.raises(UnsupportedError, match=r"ADMM needs .* GiB on cpu for 40 samples.*are free: use .*float32"):
        solve_problem(problem, "admm")


@pytest.mark.parametrize("kind", ["plain", "constant column", "few samples", "cascade"])
@pytest.mark.parametrize("form", ["ball", "linear", "halfspace"])
@pytest.mark.parametrize("per_neuron", [False, True])
def test_a_repair_measures_what_the_certificate_measures_and_keeps_zeros(kind, form, per_neuron):
    problem = random_layer(kind, 0, form=form, per_neuron=per_neuron)
    iteration = iteration_of(problem)
    iteration.until(40)
    p, weight = iteration.scaled.problem, iteration.variables.sparse
    repair = Repair(p, 1e-6)
    found = repair(weight)
    fit = measure_fit(p, found.weight.T)
    assert found.violation == pytest.approx(fit.violation, abs=1e-9)
    assert found.distance == pytest.approx(fit.distance, rel=1e-9)
    assert found.violation <= found.before
    others = [n for n in range(p.n_inputs) if n != repair.constant]
    assert not found.weight[others][weight[others] == 0].any()


@pytest.mark.parametrize("kind", ["plain", "constant column", "dead neuron"])
@pytest.mark.parametrize("form", ["ball", "linear", "halfspace"])
def test_what_was_shrunk_is_repaired_at_second_order_cost(kind, form):
    problem = random_layer(kind, 0, form=form)
    best = solve_problem(problem, "admm", tol=1e-8)
    p, u = best.problem, best.weight
    shrunk = u * (1 - 0.02 * torch.rand(len(u), 1, generator=torch.Generator().manual_seed(0), dtype=u.dtype))
    found = Repair(p, 1e-9)(shrunk.T)
    after = certify(p, found.weight.T, best.multipliers)
    assert found.before > 1e-3
    assert after.violation <= FEASIBLE
    # a cost of first order would be a hundredth
    assert after.gap <= 5e-4
    assert not found.weight.T[u == 0].any()


@pytest.mark.parametrize("tol", [0.1, 1e-2, 1e-3, 1e-4])
def test_a_hard_ceiling_without_a_constant_column_is_met_at_any_tolerance(tol):
    problem = catalogue(quick=True).instances["tiny-16-240-6-halfspace"].build().problem
    assert not (problem.inputs == problem.inputs[0]).all(0).any()
    solution = solve_problem(problem, "admm", tol=tol)
    assert_certified(solution, tol)
    assert solution.stats.iterations <= 3000
    assert solution.certificate.violation <= FEASIBLE
    loose = LayerProblem(problem.inputs, problem.targets, "halfspace", lam=50.0 / float(problem.targets.abs().max()))
    assert_certified(solve_problem(loose, Admm(max_iter=3000), tol=tol), tol)


def test_the_gpu_benchmark_runs_on_the_cpu_and_says_so(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    out = tmp_path / "gpu.json"
    small = ["--out", str(out), "--samples", "300", "--inputs", "24", "--outputs", "10"]
    assert gpu.main(small) == 0
    record, text = json.loads(out.read_text()), capsys.readouterr().out
    assert text.startswith("There is no CUDA device, so this runs on the CPU.")
    assert record["status"] == "SOLVED"
    assert record["gap"] <= 1e-3
    assert record["flops"] == 4 * 300 * 24 * 10 + 2 * 24**2 * 10
    assert record["iteration_seconds"] > 0
    assert record["model_bytes"] == memory_needed(300, 24, 10, torch.float64)
    assert f"{record['iterations']} iterations" in text
    assert gpu.main([*small, "--device", "cuda"]) == 2
    assert gpu.main([*small, "--density", "2"]) == 2
    assert gpu.main([*small, "--tol", "0"]) == 2
    assert gpu.main(["--out", str(tmp_path / "no" / "gpu.json"), *small[2:]]) == 2
    assert capsys.readouterr().err.count("benchmarks.layer.gpu: ") == 4
