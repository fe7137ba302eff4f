"""Solvers on one layer, side by side: certified relative gap against seconds and GEMM pairs.

    python -m benchmarks.layer --out runs/layer
    python -m benchmarks.layer --out runs/layer --instances 'fc2-0.1' --solvers conic
    python -m benchmarks.layer --out runs/layer --scaling P N M kept --solvers admm newton

writes DIR/results.json after every solve, and DIR/tables.txt and the plots at the end. Rows that are in results.json
already are not run again, so an interrupted benchmark goes on, and several commands add to one directory. The data are
read from ``$NETTRIM_DATA`` (by default ``../shared/data``, beside the checkout).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, NoReturn

import torch
from tqdm import tqdm

from benchmarks.layer import plots, tables
from benchmarks.layer.datasets import AXES, SAMPLES, Catalogue, catalogue
from benchmarks.layer.records import Records
from benchmarks.layer.run import Runner, Settings, total
from benchmarks.layer.solvers import ENTRIES, Entry
from benchmarks.layer.timing import warm_up
from nettrim.core.problem import check_amount, check_count
from nettrim.errors import NetTrimError, ProblemError, RunError, UnknownNameError

TOLERANCES = (1e-1, 1e-2, 1e-3, 1e-4)
GROUPS = ("ours", "papers", "conic")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what is missing, then write tables and plots from all rows; return the exit code."""
    options = _parser().parse_args(arguments)
    try:
        if options.list:
            print(_listing(catalogue(options.samples, options.seed, options.quick)))
            return 0
        if options.out is None:
            raise ProblemError("--out is missing: name the directory for results, tables and plots.")
        _run(options)
    except NetTrimError as error:
        print(f"benchmarks.layer: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("benchmarks.layer: interrupted. The rows so far are kept; the same command goes on.", file=sys.stderr)
        return 130
    return 0


def _run(options: argparse.Namespace) -> None:
    for name in ("samples", "neurons", "threads"):
        check_count(f"--{name}", getattr(options, name))
    tolerances = tuple(check_amount("--tolerances", t) for t in options.tolerances)
    found = catalogue(options.samples, options.seed, options.quick)
    names, solvers = _choose_instances(found, options), _choose_solvers(options)
    out = Path(options.out)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunError(f"{out} cannot be made: {error.strerror or error}.") from error
    records = Records(out / "results.json")
    records.agree(options.seed, options.threads)
    before = torch.get_num_threads()
    torch.set_num_threads(options.threads)
    try:
        forms = ["ball", "halfspace"] if any("halfspace" in name for name in names) else ["ball"]
        warm_up((entry.make(1e-2) for entry in solvers.values() if entry.group != "papers"), forms)
        settings = Settings(
            tolerances,
            None if options.max_seconds is None else check_amount("--max-seconds", options.max_seconds),
            options.neurons,
            options.threads,
            options.seed,
        )
        with tqdm(total=total(solvers, tolerances, len(names)), disable=None) as bar:

            def tick(what: str) -> None:
                bar.set_description(what, refresh=False)
                bar.update()

            runner = Runner(records, settings, tick)
            for name in names:
                runner.run(found.instances[name], solvers)
    finally:
        torch.set_num_threads(before)
    report(records, found, out)


def report(records: Records, found: Catalogue, out: Path) -> None:
    """Write tables and plots of all rows that the records hold, whichever command made them."""
    tolerances = records.tolerances or list(TOLERANCES)
    text = tables.everything(records, found.families, tolerances)
    (out / "tables.txt").write_text(text + "\n", encoding="utf-8")
    print(text)
    plots.gaps(records, out / "gap_against_time")
    plots.scaling(records, found.families, _middle(tolerances), out / "scaling")


def _middle(tolerances: Sequence[float]) -> float:
    """Return the tolerance of the scaling plots: the package's own, where it is among those asked for."""
    return 1e-3 if 1e-3 in tolerances else min(tolerances)


def _choose_instances(found: Catalogue, options: argparse.Namespace) -> list[str]:
    """Return names by glob, or a family for each axis, or the usual ones."""
    names: list[str] = []
    for axis in options.scaling:
        if axis not in AXES:
            raise UnknownNameError(f"--scaling {axis} is unknown: use {', '.join(AXES)}.")
        names += found.families[axis]
    if options.instances:
        names += _matching("--instances", options.instances, list(found.instances))
    if not names:
        names = [name for name, instance in found.instances.items() if instance.usual]
    return list(dict.fromkeys(names))


def _choose_solvers(options: argparse.Namespace) -> dict[str, Entry]:
    """Return entries by name, glob or group."""
    groups = {group: [name for name, entry in ENTRIES.items() if entry.group == group] for group in GROUPS}
    patterns: list[str] = []
    for pattern in options.solvers:
        patterns += groups.get(pattern, [pattern])
    return {name: ENTRIES[name] for name in _matching("--solvers", patterns, list(ENTRIES), GROUPS)}


def _matching(option: str, patterns: Iterable[str], names: list[str], groups: Iterable[str] = ()) -> list[str]:
    chosen: list[str] = []
    for pattern in patterns:
        matching = [name for name in names if fnmatchcase(name, pattern)]
        if not matching:
            raise UnknownNameError(f"{option} {pattern} is unknown: use {', '.join([*groups, *names])}, or a glob.")
        chosen += matching
    return list(dict.fromkeys(chosen))


def _listing(found: Catalogue) -> str:
    usual = [f"{name:<24} {i.source}" for name, i in found.instances.items() if i.usual]
    families = [f"{axis:<6} {' '.join(names)}" for axis, names in found.families.items()]
    solvers = [f"{name:<12} {entry.group}, by {entry.knob}" for name, entry in ENTRIES.items()]
    sections: Mapping[str, list[str]] = {"instances": usual, "scaling": families, "solvers": solvers}
    return "\n\n".join("\n".join([title, *("  " + line for line in lines)]) for title, lines in sections.items())


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, without the whole usage before it."""

    def error(self, message: str) -> NoReturn:
        """Exit with 2."""
        self.exit(2, f"{self.prog}: {message}; see {self.prog} --help\n")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="benchmarks.layer", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)

    def add(name: str, **options: Any) -> None:
        parser.add_argument(name, **options)

    add("--out", metavar="DIR", help="where results.json, tables.txt and the plots go")
    add("--list", action="store_true", help="say which instances, scaling families and solvers there are")
    add("--instances", nargs="+", default=[], metavar="NAME", help="names or globs; all usual ones by default")
    add("--scaling", nargs="+", default=[], metavar="AXIS", help=f"families of instances: {' '.join(AXES)}")
    add("--solvers", nargs="+", default=["ours", "papers"], metavar="NAME",
        help="names, globs or groups (ours, papers, conic); ours and papers by default")  # fmt: skip
    add("--tolerances", nargs="+", type=float, default=list(TOLERANCES), metavar="TOL", help="relative gaps to ask for")
    add("--max-seconds", type=float, default=120.0, help="the clock of one solve (of one neuron for conic solvers)")
    add("--samples", type=int, default=SAMPLES, help="rows of the data sets' instances")
    add("--neurons", type=int, default=3, help="how many neurons a conic solver gets; seconds are extrapolated")
    add("--threads", type=int, default=torch.get_num_threads())
    add("--seed", type=int, default=0)
    add("--quick", action="store_true", help="tiny instances, to see that everything runs")
    return parser


if __name__ == "__main__":
    sys.exit(main())
