"""The records as pictures: gap against time for each instance, and growth along each axis, as PNG and SVG."""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from textwrap import fill
from typing import Any

from benchmarks.layer.objective import error, feasible, reached
from benchmarks.layer.records import Records, Row, in_order
from benchmarks.layer.solvers import ENTRIES
from benchmarks.layer.tables import axis_value, first
from nettrim.errors import MissingExtraError, RunError

# Okabe and Ito's palette, which readers of every kind of colour vision tell apart; each solver also has its marker
_STYLES = {
    "auto": ("#000000", "x", ":"),
    "admm": ("#0072b2", "o", "-"),
    "newton": ("#d55e00", "s", "-"),
    "papers-1": ("#009e73", "^", "--"),
    "papers-100": ("#56b4e9", "v", "--"),
    "scs": ("#cc79a7", "D", "-."),
    "clarabel": ("#e69f00", "P", "-."),
    "osqp": ("#7a7a7a", "*", "-."),
}
_OTHER = ("#5b3a8c", "h", "-")
_NAMES = {"papers-1": "papers, ρ = 1", "papers-100": "papers, ρ = 100"}
# what is below is rounding
_FLOOR = 1e-8
_AXES = {"P": "samples P", "N": "inputs N", "M": "neurons M", "kept": "kept fraction"}


def gaps(records: Records, path: Path) -> None:
    """Draw the worse of gap and violation against seconds, one panel an instance, with pairs on the upper axis."""
    names = [name for name in records.instances if any(_drawable(row) for row in records.of(name))]
    # instances of the scaling plots, solved to one tolerance, make no curve here
    names = [name for name in names if _levels(records, name) > 1] or names
    if not names:
        return
    columns = min(3, len(names))
    rows = math.ceil(len(names) / columns)
    figure = _figure(5.0 * columns, 3.9 * rows + 0.5)
    grid = figure.subplots(rows, columns, squeeze=False)
    for axes, name in zip(grid.flat, names, strict=False):
        _gap_panel(axes, records, name)
    for axes in list(grid.flat)[len(names) :]:
        axes.set_visible(False)
    for row in grid:
        row[0].set_ylabel("max(relative gap, violation)")
    caption = (
        "Seconds; each point is one solve from cold (upper axis: GEMM pairs). Hollow: the radius is missed by more "
        "than 1e-6 of it. Faint: a quicker solve was better."
    )
    if any(row["extrapolated"] for row in records.rows):
        caption += " scs, clarabel, osqp: sampled neurons on one thread, seconds times M/k, which is an extrapolation."
    figure.supxlabel(fill(caption, 68 * columns), fontsize=9)
    _save(figure, path)


def scaling(records: Records, families: Mapping[str, Sequence[str]], tolerance: float, path: Path) -> None:
    """Draw seconds (above) and pairs (below) to `tolerance` along every axis that has two points or more."""
    drawn = {axis: curves for axis, names in families.items() if (curves := _curves(records, axis, names, tolerance))}
    if not drawn:
        return
    figure = _figure(4.7 * len(drawn), 6.8)
    grid = figure.subplots(2, len(drawn), squeeze=False, sharex="col")
    for column, (axis, curves) in enumerate(drawn.items()):
        for line, what in enumerate(("seconds", "pairs")):
            axes = grid[line][column]
            ends = []
            for solver, points in curves.items():
                colour, marker, dashes = _style(solver)
                points = sorted(points, key=lambda point: point[0])
                xs, ys = [x for x, _ in points], [float(row[what]) for _, row in points]
                axes.plot(xs, ys, dashes, color=colour, linewidth=1.6, zorder=2)
                _markers(axes, xs, ys, [reached(row, tolerance) for _, row in points], colour, marker)
                ends.append((solver, xs[-1], ys[-1], colour))
            axes.set_xscale("log")
            axes.set_yscale("log")
            _log_ticks(axes.yaxis, axes.get_ylim())
            _plain_ticks(axes, sorted({x for points in curves.values() for x, _ in points}))
            _finish(axes, ends)
        grid[0][column].set_title(f"growth with the {_AXES[axis]}", fontsize=10)
        grid[1][column].set_xlabel(_AXES[axis])
    grid[0][0].set_ylabel(f"seconds to {tolerance:.0e}")
    grid[1][0].set_ylabel(f"GEMM pairs to {tolerance:.0e}")
    figure.supxlabel("Pairs are those of each instance's own size.", fontsize=9)
    _save(figure, path)


def _curves(records: Records, axis: str, names: Sequence[str], tolerance: float) -> dict[str, list[tuple[float, Row]]]:
    """Return for each solver where it reached the tolerance along an axis; nothing where no line can be drawn."""
    known = [name for name in names if name in records.instances]
    curves: dict[str, list[tuple[float, Row]]] = {}
    solvers = in_order((row["solver"] for name in known for row in records.of(name)), ENTRIES)
    for name in known:
        found = {solver: first(list(records.of(name, solver)), tolerance) for solver in solvers}
        at = axis_value(axis, records.instances[name], list(found.values()))
        for solver, row in found.items():
            if row is not None and at is not None:
                curves.setdefault(solver, []).append((at, row))
    return {solver: curves[solver] for solver in solvers if len(curves.get(solver, ())) > 1}


def _gap_panel(axes: Any, records: Records, name: str) -> None:
    solvers = in_order((row["solver"] for row in records.of(name)), ENTRIES)
    ends = []
    for solver in solvers:
        rows = [row for row in records.of(name, solver) if _drawable(row)]
        if not rows:
            continue
        rows.sort(key=lambda row: float(row["seconds"]))
        colour, marker, dashes = _style(solver)
        xs, ys = [float(row["seconds"]) for row in rows], [max(_FLOOR, error(row)) for row in rows]
        # the line: what was reached by a time; a point that a quicker one betters stands alone, and faint
        on = [i for i, y in enumerate(ys) if y < min(ys[:i], default=math.inf)]
        axes.plot([xs[i] for i in on], [ys[i] for i in on], dashes, color=colour, linewidth=1.6, zorder=2)
        full = [feasible(row) for row in rows]
        off = [i for i in range(len(rows)) if i not in on]
        for which, alpha in ((on, 1.0), (off, 0.35)):
            _markers(
                axes, [xs[i] for i in which], [ys[i] for i in which], [full[i] for i in which], colour, marker, alpha
            )
        ends.append((solver, xs[on[-1]], ys[on[-1]], colour))
    axes.set_xscale("log")
    axes.set_yscale("log")
    _log_ticks(axes.xaxis, axes.get_xlim())
    facts = records.instances[name]
    axes.set_title(
        f"{name}\n{facts['samples']:,} × {facts['inputs']} → {facts['outputs']}, {facts['form']}, "
        f"ε = {facts['epsilon']:.2g}",
        fontsize=9,
    )
    pair = statistics.median(row["pair_seconds"] for row in records.of(name) if row["threads"] == _threads(records))
    upper = axes.secondary_xaxis("top", functions=(lambda s: s / pair, lambda n: n * pair))
    _log_ticks(upper.xaxis, [limit / pair for limit in axes.get_xlim()])
    upper.tick_params(labelsize=8)
    _finish(axes, ends)


def _levels(records: Records, name: str) -> int:
    """Return how many tolerances were asked of the solver that was asked for most."""
    counts = Counter(row["solver"] for row in records.of(name) if row["knob"] == "tolerance")
    return max(counts.values(), default=0)


def _finish(axes: Any, ends: list[tuple[str, float, float, str]]) -> None:
    """Label the lines at their ends, in the margin to the right, no two labels on top of each other."""
    axes.grid(True, which="major", color="#dddddd", linewidth=0.6, zorder=0)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=8)
    low, high = (math.log10(limit) for limit in axes.get_ylim())
    height = {solver: (math.log10(y) - low) / (high - low) for solver, _, y, _ in ends}
    order = sorted(ends, key=lambda end: height[end[0]])
    step = 0.075
    places: list[float] = []
    for solver, *_ in order:
        places.append(max(height[solver], places[-1] + step if places else 0.0))
    # pushed above the top, the stack moves down as far as it must
    if places and places[-1] > 1:
        places[-1] = 1.0
        for i in range(len(places) - 2, -1, -1):
            places[i] = min(places[i], places[i + 1] - step)
    for (solver, x, y, colour), place in zip(order, places, strict=True):
        axes.annotate(
            _NAMES.get(solver, solver), xy=(x, y), xycoords="data", xytext=(1.03, place), textcoords="axes fraction",
            color=colour, fontsize=8.5, va="center", ha="left", annotation_clip=False,
            arrowprops={"arrowstyle": "-", "color": colour, "alpha": 0.35, "linewidth": 0.7, "shrinkB": 3},
        )  # fmt: skip


def _markers(
    axes: Any, xs: list[float], ys: list[float], full: list[bool], colour: str, marker: str, alpha: float = 1.0
) -> None:
    """Mark points, hollow where `full` is false."""
    for kind in (True, False):
        at = [i for i, one in enumerate(full) if one is kind]
        face = colour if kind or marker == "x" else "white"
        axes.scatter([xs[i] for i in at], [ys[i] for i in at], s=26, marker=marker, zorder=3, facecolors=face,
                     **({} if marker == "x" else {"edgecolors": colour}), linewidths=1.2, alpha=alpha)  # fmt: skip


def _plain_ticks(axes: Any, values: list[float]) -> None:
    """Put ticks where the instances are, as plain numbers, not crowded."""
    from matplotlib.ticker import NullLocator

    spread = math.log10(values[-1] / values[0]) or 1.0
    shown: list[float] = []
    for value in values:
        if not shown or math.log10(value / shown[-1]) > 0.11 * spread:
            shown.append(value)
    axes.set_xticks(shown, [f"{v:,.0f}" if v >= 1 else f"{v:.2g}" for v in shown])
    axes.xaxis.set_minor_locator(NullLocator())


def _log_ticks(axis: Any, limits: Sequence[float]) -> None:
    """Label decades, or on a short axis also 2 and 5 of each, as plain numbers."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    decades = math.log10(limits[1] / limits[0])
    axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if decades < 2 else (1.0,), numticks=12))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}" if value >= 1 else f"{value:.4g}"))
    axis.set_minor_formatter(NullFormatter())


def _threads(records: Records) -> int:
    """Return the threads of most rows: the pairs of single neurons, on one, are not those of the upper axis."""
    counts = [int(row["threads"]) for row in records.rows if not row["extrapolated"]]
    return statistics.mode(counts or [int(row["threads"]) for row in records.rows])


def _drawable(row: Row) -> bool:
    return row["seconds"] is not None and math.isfinite(error(row))


def _style(solver: str) -> tuple[str, str, str]:
    return _STYLES.get(solver, _OTHER)


def _figure(width: float, height: float) -> Any:
    try:
        from matplotlib.figure import Figure
    except ImportError as missing:
        raise MissingExtraError("pictures need matplotlib: pip install 'nettrim[demo]'.") from missing
    return Figure(figsize=(width, height), layout="constrained", dpi=120)


def _save(figure: Any, path: Path) -> None:
    try:
        for ending in (".png", ".svg"):
            figure.savefig(path.with_suffix(ending), metadata={"Date": None} if ending == ".svg" else None)
    except OSError as failed:
        raise RunError(f"{path} cannot be written: {failed.strerror or failed}.") from failed
