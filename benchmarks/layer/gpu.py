"""ADMM on one planted layer on a GPU: seconds, and how far they are from what the device could do.

    python -m benchmarks.layer.gpu --out runs/gpu.json
    python -m benchmarks.layer.gpu --out runs/small.json --device cpu --samples 2000 --inputs 256 --outputs 128

The layer is that of the ``planted-N-P`` instances. An iteration is compared with two floors, measured on the same
device: its products (``4 P N M + 2 N² M`` flops) at the rate of a GEMM pair of that size and dtype, and its elementwise
passes at the bandwidth of a copy. The sum of both is what an iteration takes that wastes nothing and overlaps nothing.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

import nettrim
from benchmarks.layer.datasets import planted_layer
from nettrim.core.problem import LayerProblem, check_amount, check_count
from nettrim.core.solution import judge
from nettrim.core.solvers import Admm
from nettrim.core.solvers.admm import Iteration
from nettrim.core.solvers.base import Limits
from nettrim.core.solvers.fused import full_precision, memory_needed
from nettrim.errors import NetTrimError, ProblemError, RunError

#: reads and writes of whole arrays in one iteration: of ``(P, M)`` and of ``(N, M)``, with every stage fused
PASSES = (13, 11)


def main(arguments: Sequence[str] | None = None) -> int:
    """Build, solve, measure, and write the record; return the exit code."""
    options = _parser().parse_args(arguments)
    try:
        record = measure(
            _device(options.device),
            check_count("--samples", options.samples),
            check_count("--inputs", options.inputs),
            check_count("--outputs", options.outputs),
            check_amount("--density", options.density),
            check_amount("--tol", options.tol),
        )
        try:
            Path(options.out).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        except OSError as error:
            raise RunError(f"{options.out} cannot be written: {error.strerror or error}.") from error
    except NetTrimError as error:
        print(f"benchmarks.layer.gpu: {error}", file=sys.stderr)
        return 2
    print(_text(record))
    return 0


def measure(
    device: torch.device, samples: int, inputs: int, outputs: int, density: float, tol: float, seed: int = 0
) -> dict[str, Any]:
    """Return the record of one solve, and of the floors of its iteration."""
    if density > 1:
        raise ProblemError(f"--density {density:g} is out of range: it is at most 1.")
    problem = _moved(planted_layer(inputs, samples, outputs, seed=seed, density=density).problem, device)
    solver, limits = Admm(), Limits(tol)
    dtype = solver.working_dtype(problem, tol)
    # compiled, and every library started, before anything is timed
    solver.run(_moved(planted_layer(32, 256, 8, seed=seed).problem, device, problem.inputs.dtype), Limits(0.1), None)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
    answer, seconds = _timed(device, lambda: solver.run(problem, limits, None))
    # what is resident on the CPU says little: memory that was freed is used again
    peak = torch.cuda.max_memory_allocated(device) - before if device.type == "cuda" else None
    weight = answer.weight.to(problem.inputs)
    certificate, certified_in = _timed(device, lambda: nettrim.certify(problem, weight, answer.multipliers))
    per_iteration = _iteration_seconds(problem, solver, limits)
    rate, bandwidth = _gemm_rate(problem, dtype), _bandwidth(device)
    flops = 4 * samples * inputs * outputs + 2 * inputs**2 * outputs
    moved = (PASSES[0] * samples * outputs + PASSES[1] * inputs * outputs) * torch.finfo(dtype).bits // 8
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "torch": torch.__version__,
        "samples": samples,
        "inputs": inputs,
        "outputs": outputs,
        "density": density,
        "tol": tol,
        "seed": seed,
        "dtype": str(dtype).removeprefix("torch."),
        "status": judge(certificate, tol, answer.otherwise).name,
        "seconds": seconds,
        "certificate_seconds": certified_in,
        "iterations": answer.iterations,
        "iteration_seconds": per_iteration,
        "flops": flops,
        "flops_per_second": rate,
        "flop_floor_seconds": flops / rate,
        "bytes": moved,
        "bytes_per_second": bandwidth,
        "byte_floor_seconds": moved / bandwidth,
        "of_the_floor": per_iteration / (flops / rate + moved / bandwidth),
        "peak_bytes": peak,
        "model_bytes": memory_needed(samples, inputs, outputs, dtype, problem.form),
        "objective": certificate.objective,
        "lower_bound": certificate.lower_bound,
        "gap": certificate.gap,
        "violation": certificate.violation,
        "note": answer.note,
    }


def _moved(problem: LayerProblem, device: torch.device, dtype: torch.dtype | None = None) -> LayerProblem:
    x, y = (tensor.to(device=device, dtype=dtype or tensor.dtype) for tensor in (problem.inputs, problem.targets))
    return LayerProblem(x, y, problem.form, problem.radius)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _timed(device: torch.device, work: Callable[[], Any], count: int = 1) -> tuple[Any, float]:
    """Return what the work gives, and the seconds of one of `count` runs."""
    _wait(device)
    began = time.perf_counter()
    for _ in range(count):
        result = work()
    _wait(device)
    return result, (time.perf_counter() - began) / count


def _iteration_seconds(problem: LayerProblem, solver: Admm, limits: Limits) -> float:
    """Return the seconds of one iteration, without certificates and factorisations."""
    iteration = Iteration(problem, solver, limits, None)
    with full_precision(problem.inputs.device):
        for _ in range(3):
            iteration.variables.advance()
        return _timed(problem.inputs.device, iteration.variables.advance, 10)[1]


def _gemm_rate(problem: LayerProblem, dtype: torch.dtype) -> float:
    """Return the flops per second of a GEMM pair of this size."""
    x, z = problem.inputs.to(dtype), torch.empty_like(problem.targets, dtype=dtype)
    u = torch.randn(problem.n_inputs, problem.n_outputs, dtype=dtype, device=x.device)

    def pair() -> None:
        torch.mm(x, u, out=z)
        torch.mm(x.T, z)

    with full_precision(x.device):
        pair()
        seconds = _timed(x.device, pair, 5)[1]
    return 4 * problem.samples * problem.n_inputs * problem.n_outputs / seconds


def _bandwidth(device: torch.device) -> float:
    """Return the bytes per second of a copy, those read and those written counted."""
    size = 2**28 if device.type == "cuda" else 2**25
    source, target = (torch.zeros(size, dtype=torch.uint8, device=device) for _ in range(2))
    target.copy_(source)
    return 2 * size / _timed(device, lambda: target.copy_(source), 5)[1]


def _device(name: str | None) -> torch.device:
    """Return the device that was asked for, or the GPU where there is one."""
    found = torch.cuda.is_available()
    if name is None and not found:
        print("There is no CUDA device, so this runs on the CPU.")
    if name == "cuda" and not found:
        raise ProblemError("--device cuda: torch sees no CUDA device; use --device cpu.")
    return torch.device(name or ("cuda" if found else "cpu"))


def _text(r: dict[str, Any]) -> str:
    peak = "measured on a GPU only" if r["peak_bytes"] is None else f"{r['peak_bytes'] / 2**30:.3f} GiB"
    lines = (
        f"{r['samples']} x {r['inputs']} -> {r['outputs']} on {r['device']} in {r['dtype']}, tol {r['tol']:g}",
        f"{r['status']}: gap {r['gap']:.2e}, violation {r['violation']:.1e}",
        f"{r['seconds']:.3f} s, {r['iterations']} iterations; the float64 certificate {r['certificate_seconds']:.3f} s",
        f"one iteration {1e3 * r['iteration_seconds']:.3f} ms, {r['of_the_floor']:.2f} times its floor: products "
        f"{1e3 * r['flop_floor_seconds']:.3f} ms at {r['flops_per_second'] / 1e12:.3g} Tflop/s, passes "
        f"{1e3 * r['byte_floor_seconds']:.3f} ms at {r['bytes_per_second'] / 1e9:.3g} GB/s",
        f"memory: peak {peak}, model {r['model_bytes'] / 2**30:.3f} GiB",
        r["note"],
    )
    return "\n".join(filter(None, lines))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="benchmarks.layer.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", metavar="FILE", required=True, help="where the record goes, as JSON")
    parser.add_argument("--device", choices=("cuda", "cpu"), help="by default the GPU, where there is one")
    parser.add_argument("--samples", type=int, default=8192)
    parser.add_argument("--inputs", type=int, default=4096)
    parser.add_argument("--outputs", type=int, default=4096)
    parser.add_argument("--density", type=float, default=0.1, help="planted weights that are not zero")
    parser.add_argument("--tol", type=float, default=1e-3)
    return parser


if __name__ == "__main__":
    sys.exit(main())
