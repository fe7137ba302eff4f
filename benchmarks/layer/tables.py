"""The records as plain text: time to each tolerance, every row, and growth along each axis."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.layer.objective import feasible, nearly_reached, reached
from benchmarks.layer.records import Records, Row, in_order
from benchmarks.layer.solvers import ENTRIES
from nettrim.report.text import text_table

_LEGEND = """\
Seconds, and in brackets GEMM pairs (one dense float64 X @ U.T and R.T @ X of the instance, measured before and
after each solve). Each figure is one solve from cold, the quickest whose certified relative gap is within the
tolerance and whose weight meets the radius.
  ~   gap and violation are within the tolerance, but the radius is missed by more than 1e-6 of it: no certified
      answer (seconds; beside a certified one where it came sooner)
  *   sampled neurons, each alone with its share of the radius, on one thread; seconds times M/k: an extrapolation
  –   not reached"""


def everything(records: Records, families: Mapping[str, Sequence[str]], tolerances: Sequence[float]) -> str:
    """Return all tables, and what they were made with."""
    if not records.rows:
        return "No rows yet."
    names = list(dict.fromkeys(row["instance"] for row in records.rows))
    parts = ["Time to a certified relative gap", time_to_gap(records, names, tolerances), _LEGEND]
    for axis, members in families.items():
        table = growth(records, axis, members, tolerances)
        if table:
            parts += [f"Growth with {_MEANING[axis]}", table]
    parts += ["Every solve", all_rows(records, names), _made_with(records)]
    return "\n\n".join(parts)


def first(rows: Sequence[Row], tolerance: float) -> Row | None:
    """Return the quickest row that reached `tolerance`, or else the quickest that nearly did."""
    for test in (reached, nearly_reached):
        hits = [row for row in rows if row["seconds"] is not None and test(row, tolerance)]
        if hits:
            return min(hits, key=lambda row: float(row["seconds"]))
    return None


def time_to_gap(records: Records, names: Sequence[str], tolerances: Sequence[float]) -> str:
    """Return a row for every instance and solver, a column for every tolerance."""
    wanted = sorted(tolerances, reverse=True)
    head = ("instance", "solver", "thr", "pair s", *(f"{t:.0e}" for t in wanted), "kept %")
    body = []
    for name in names:
        solvers = in_order((row["solver"] for row in records.of(name)), ENTRIES)
        for i, solver in enumerate(solvers):
            rows = list(records.of(name, solver))
            label = _with_shape(name, records.instances[name]) if i == 0 else ""
            pair = sorted(row["pair_seconds"] for row in rows)[len(rows) // 2]
            times = [_time(first(rows, t), t) + _nearly(rows, t) for t in wanted]
            threads = "/".join(dict.fromkeys(str(row["threads"]) for row in rows))
            body.append((label, solver, threads, f"{pair:.3g}", *times, _kept(rows)))
    return text_table(head, body)


def growth(records: Records, axis: str, members: Sequence[str], tolerances: Sequence[float]) -> str:
    """Return seconds and pairs to the package's own tolerance along one axis, a column for every solver."""
    tolerance = 1e-3 if 1e-3 in tolerances else min(tolerances)
    known = [name for name in members if any(True for _ in records.of(name))]
    if len(known) < 2:
        return ""
    met = {solver: {r["instance"] for n in known for r in records.of(n, solver)} for solver in ENTRIES}
    solvers = [solver for solver, instances in met.items() if len(instances) > 1]
    head = ("instance", axis, "pair s", *solvers)
    body = []
    for name in known:
        found = [first(list(records.of(name, solver)), tolerance) for solver in solvers]
        value = axis_value(axis, records.instances[name], found)
        pairs = sorted(row["pair_seconds"] for row in records.of(name))
        at = "–" if value is None else f"{value:.4g}" if axis == "kept" else f"{value:.0f}"
        body.append((name, at, f"{pairs[len(pairs) // 2]:.3g}", *(_time(row, tolerance) for row in found)))
    return text_table(head, body) + f"\nto a gap of {tolerance:.0e}"


def axis_value(axis: str, facts: Mapping[str, Any], rows: Sequence[Row | None]) -> float | None:
    """Return where an instance stands on an axis; the kept fraction is that of the best answer."""
    if axis != "kept":
        return float(facts[{"P": "samples", "N": "inputs", "M": "outputs"}[axis]])
    known = [row for row in rows if row is not None and row["kept"] is not None]
    if not known:
        return None
    best = min(known, key=lambda row: (not feasible(row), float(row["gap"])))
    return float(best["kept"]) / float(best["numel"])


def all_rows(records: Records, names: Sequence[str]) -> str:
    """Return every record, with the gap to the best bound that any solver found beside its own."""
    head = ("instance", "solver", "level", "s", "pairs", "gap", "to best bound", "violation", "objective", "kept",
            "iterations", "dtype", "MiB", "remark")  # fmt: skip
    body = []
    for name in names:
        bounds = [row["lower_bound"] for row in records.of(name) if row["lower_bound"] is not None]
        for row in records.of(name):
            remark = row["failure"] or ("out of time" if row["timed_out"] else "")
            level = f"{row['level']:.0f}" if row["knob"] == "iterations" else f"{row['level']:.0e}"
            to_best = None
            if row["objective"]:
                to_best = (row["objective"] - max(bounds)) / row["objective"]
            body.append(
                (
                    name,
                    row["solver"] + ("*" if row["extrapolated"] else ""),
                    level,
                    "–" if row["seconds"] is None else _digits(row["seconds"]),
                    "–" if row["pairs"] is None else _digits(row["pairs"]),
                    _number(row["gap"], "{:.1e}"),
                    _number(to_best, "{:.1e}"),
                    _number(row["violation"], "{:.0e}"),
                    _number(row["objective"], "{:.6g}"),
                    _number(row["kept"], "{}"),
                    _number(row["iterations"], "{}"),
                    row["dtype"] or "–",
                    _number(row["peak_mib"], "{:.0f}"),
                    remark if len(remark) <= 60 else remark[:57] + "...",
                )
            )
    return text_table(head, body)


_MEANING = {"P": "the samples P", "N": "the inputs N", "M": "the neurons M", "kept": "the kept fraction"}


def _with_shape(name: str, facts: Mapping[str, Any]) -> str:
    return f"{name} ({facts['samples']} × {facts['inputs']} → {facts['outputs']}, ε {facts['epsilon']:.2g})"


def _time(row: Row | None, tolerance: float) -> str:
    if row is None:
        return "–"
    marks = ("" if reached(row, tolerance) else "~", "*" if row["extrapolated"] else "")
    return f"{marks[0]}{_digits(row['seconds'])} ({_digits(row['pairs'])}){marks[1]}"


def _nearly(rows: Sequence[Row], tolerance: float) -> str:
    """Return the seconds of a quicker solve that nearly reached the tolerance, where one did and one reached it."""
    certified = first(rows, tolerance)
    if certified is None or not reached(certified, tolerance):
        return ""
    hits = [float(row["seconds"]) for row in rows if nearly_reached(row, tolerance) and not reached(row, tolerance)]
    return f" ~{_digits(min(hits))}" if hits and min(hits) < certified["seconds"] else ""


def _kept(rows: Sequence[Row]) -> str:
    """Return the percentage kept by the best certified answer among the rows."""
    known = [row for row in rows if row["kept"] is not None and feasible(row)]
    if not known:
        return "–"
    best = min(known, key=lambda row: float(row["gap"]))
    return f"{100 * best['kept'] / best['numel']:.1f}"


def _made_with(records: Records) -> str:
    lines = ["Made with"]
    for i, run in enumerate(records.content["runs"]):
        count = sum(row["run"] == i for row in records.rows)
        if count:
            versions = ", ".join(f"{k} {v}" for k, v in run["versions"].items())
            lines.append(
                f"  {count} rows: commit {run['commit'] or 'unknown'}, {run['date']}, {run['host']['processor']}, "
                f"{run['host']['cores']} cores, {run['threads']} threads, {versions}"
            )
    return "\n".join(lines)


def _digits(value: float) -> str:
    """Return three digits, without an exponent where the number is large."""
    return f"{value:.0f}" if value >= 1000 else f"{value:.3g}"


def _number(value: Any, form: str) -> str:
    return "–" if value is None else form.format(value)
