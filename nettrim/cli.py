"""The command line: reads arguments, calls the library, prints.

Exit codes: 0 done; 1 a check did not hold: `verify` found a difference, a row of `compare` failed, or an answer of
`solve`, `prune`, `compare` or `demo` is not certified within the tolerance (it is written and printed all the same);
2 bad usage or input (one line, no traceback); 130 interrupted.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import sys
import traceback
import warnings
from collections.abc import Sequence
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch

import nettrim
from nettrim.cli_compare import add_arguments, check_compare, run_compare
from nettrim.cli_network import add_export_options, batches_of, check_numbers, run_export
from nettrim.cli_prune import add_prune_arguments, run_prune
from nettrim.core.problem import FORMS
from nettrim.data import load
from nettrim.demo import run_demo
from nettrim.errors import DataError, NetTrimError
from nettrim.loading import read_arrays
from nettrim.methods import METHODS
from nettrim.pipeline.files import write_atomically
from nettrim.pipeline.records import Ledger
from nettrim.pipeline.verify import verify
from nettrim.report.structure import latency_line, probe_table
from nettrim.report.tables import ledger_table, solution_table


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    try:
        options = _parser().parse_args(arguments)
    except SystemExit as stop:  # argparse has printed its one line, or the help
        return int(stop.code or 0)
    with warnings.catch_warnings():
        warnings.showwarning = _warn
        # torch says it to itself whenever an exported program runs
        warnings.filterwarnings("ignore", ".*treespec, LeafSpec", FutureWarning)
        try:
            code: int = options.run(options)
            return code
        except NetTrimError as error:
            if options.debug:
                traceback.print_exc()
            else:
                print(f"nettrim: {error}", file=sys.stderr)
            return 2
        except KeyboardInterrupt:
            print("nettrim: interrupted. What was finished is kept; --resume goes on.", file=sys.stderr)
            return 130
        except BrokenPipeError:
            # the reader of stdout went away; nothing more can be said to it
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 0


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, without the whole usage before it."""

    def error(self, message: str) -> NoReturn:
        """Exit with 2."""
        self.exit(2, f"{self.prog}: {message}; see {self.prog} --help\n")


def _parser() -> argparse.ArgumentParser:
    common = _Parser(add_help=False)
    common.add_argument("--json", action="store_true", help="print JSON on stdout instead of tables")
    common.add_argument("--debug", action="store_true", help="show the traceback of an error")
    parser = _Parser(prog="nettrim", description=nettrim.__doc__)
    parser.add_argument("--version", action="version", version=f"nettrim {nettrim.__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(name: str, run: Any, text: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, parents=[common], help=text, description=text)
        sub.set_defaults(run=run)
        return sub

    demo = command("demo", _demo, "train a small network on embedded data, prune it both ways, show the ledgers")
    demo.add_argument("--out", default="nettrim-demo", metavar="DIR", help="default: %(default)s")
    demo.add_argument("--epsilon", type=float, default=0.1, help="relative radius of every layer, default %(default)s")
    demo.add_argument("--seed", type=int, default=0)

    add_prune_arguments(command("prune", _prune, "prune a network"))
    add_arguments(command("compare", _compare, "prune one network by several methods and amounts, side by side"))

    solve = command("solve", _solve, "solve one layer from arrays `inputs` and `targets`")
    solve.add_argument(
        "file", metavar="LAYER.npz", help="arrays inputs (P, N) and targets (P, M); optional ceiling, penalty"
    )
    solve.add_argument("--epsilon", type=float)
    solve.add_argument("--radius", type=float)
    solve.add_argument("--lam", type=float)
    solve.add_argument("--form", default="ball", help=f"{', '.join(FORMS)}; default %(default)s")
    solve.add_argument("--per-neuron", action="store_true", help="one ball per output neuron")
    solve.add_argument("--solver", default="auto", help="default: %(default)s")
    solve.add_argument("--tol", type=float, default=1e-3, help="relative duality gap, default %(default)s")
    solve.add_argument("--max-seconds", type=float)
    solve.add_argument("--out", metavar="FILE.npz", help="write weight and multipliers")

    check = command("verify", _verify, "recompute every stored figure of a run directory")
    check.add_argument("directory", metavar="DIR")

    add_export_options(command("export", _export, "write a pruned network in another form"))

    command("info", _info, "solvers and methods found, devices, versions")
    return parser


def _demo(options: argparse.Namespace) -> int:
    demo = run_demo(options.out, options.epsilon, options.seed)
    code = _code(*demo.ledgers.values())
    if options.json:
        _print_json(
            {
                "schedules": {name: ledger.as_dict() for name, ledger in demo.ledgers.items()},
                "directories": {name: str(path) for name, path in demo.directories.items()},
                "picture": str(demo.picture),
            }
        )
        return code
    for ledger in demo.ledgers.values():
        print(ledger_table(ledger), end="\n\n")
    print(f"run directories: {', '.join(str(path) for path in demo.directories.values())}")
    print(f"picture: {demo.picture}")
    print(f"check it yourself: nettrim verify {demo.directories['cascade']}")
    return code


def _prune(options: argparse.Namespace) -> int:
    result, latency = run_prune(options)
    if options.json:
        structure = None if result.structure is None else result.structure.as_dict() | result.about
        timed = None if latency is None else asdict(latency)
        _print_json(result.ledger.as_dict() | {"directory": options.out, "structure": structure, "latency": timed})
    else:
        if "probes" in result.about:
            print(probe_table(result.about["probes"]), end="\n\n")
        print(ledger_table(result.ledger))
        if latency is not None:
            print(latency_line(latency))
        if options.picture is not None:
            print(f"picture: {options.picture}")
        print(f"run directory: {options.out}")
    return _code(result.ledger)


def _compare(options: argparse.Namespace) -> int:
    check_numbers(options)
    check_compare(options)
    data = load(options.data, download=options.download)
    held_out = None if data.test is None else batches_of(data.test, len(data.test.inputs))
    return run_compare(options, data, batches_of(data.train, options.samples), held_out)


def _code(*ledgers: Ledger) -> int:
    """Return 1 where a layer is not certified within its tolerance; methods that certify nothing have no status."""
    return int(any(ledger.uncertified for ledger in ledgers))


def _solve(options: argparse.Namespace) -> int:
    arrays = read_arrays(Path(options.file))
    if options.out is not None:
        out = Path(options.out).absolute()
        if not out.parent.is_dir():
            raise DataError(f"--out {options.out} lies in no existing directory: make it first.")
        if out.is_dir() or out.resolve() == Path(options.file).resolve():
            raise DataError(f"--out {options.out} is a directory or the layer itself: name another file.")
    solution = nettrim.solve_layer(
        arrays["inputs"],
        arrays["targets"],
        epsilon=options.epsilon,
        radius=options.radius,
        lam=options.lam,
        form=options.form,
        ceiling=arrays.get("ceiling"),
        penalty=arrays.get("penalty"),
        per_neuron=options.per_neuron,
        solver=options.solver,
        tol=options.tol,
        max_seconds=options.max_seconds,
        on_failure="return",
    )
    if options.out is not None:
        import io

        buffer = io.BytesIO()
        np.savez_compressed(buffer, weight=solution.weight, multipliers=solution.multipliers)
        write_atomically(Path(options.out), buffer.getvalue())
    solved = solution.status is nettrim.Status.SOLVED
    if options.json:
        _print_json(
            {
                "status": solution.status.name,
                "remedy": solution.status.remedy,
                "certificate": vars(solution.certificate),
                "stats": vars(solution.stats),
                "kept": int((solution.weight != 0).sum()),
                "numel": int(solution.weight.size),
            }
        )
    else:
        print(solution_table(solution))
    return 0 if solved else 1


def _verify(options: argparse.Namespace) -> int:
    found = verify(options.directory)
    if options.json:
        _print_json(vars(found) | {"holds": found.holds})
    else:
        for failure in found.failures:
            print(f"DOES NOT HOLD  {failure}")
        print(f"{found.checked} figures and files checked, {len(found.failures)} do not hold; run {found.state}")
    return 0 if found.holds else 1


def _export(options: argparse.Namespace) -> int:
    found, text = run_export(options)
    if options.json:
        _print_json(found)
    else:
        print(text)
    return 0


def _info(options: argparse.Namespace) -> int:
    facts: dict[str, Any] = {
        "nettrim": nettrim.__version__,
        "solvers": list(nettrim.SOLVERS),
        "methods": list(METHODS),
        "devices": [
            "cpu",
            *(f"cuda:{i} {torch.cuda.get_device_name(i)}" for i in range(torch.cuda.device_count())),
        ],
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "versions": {},
    }
    for name in (
        "torch",
        "numpy",
        "scipy",
        "cvxpy",
        "scs",
        "osqp",
        "clarabel",
        "safetensors",
        "scikit-learn",
        "matplotlib",
    ):
        try:
            facts["versions"][name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            facts["versions"][name] = "not installed"
    if options.json:
        _print_json(facts)
        return 0
    for key, value in facts.items():
        if isinstance(value, dict):
            value = ", ".join(f"{name} {version}" for name, version in value.items())
        print(f"{key:<9} {', '.join(value) if isinstance(value, list) else value}")
    return 0


def _print_json(value: Any) -> None:
    print(json.dumps(_finite(value), indent=1, allow_nan=False))


def _finite(value: Any) -> Any:
    """Replace NaN and infinity, which JSON does not have, by null: the gap of an answer without a bound, say."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _warn(message: Warning | str, *_: Any, **__: Any) -> None:
    print(f"nettrim: {message}", file=sys.stderr)
