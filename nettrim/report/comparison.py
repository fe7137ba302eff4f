"""A comparison as one table and one picture."""

from __future__ import annotations

import io
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from nettrim.errors import ProblemError
from nettrim.pipeline.files import write_atomically
from nettrim.pipeline.rows import Comparison, Row
from nettrim.pipeline.schedule import SCHEDULES
from nettrim.report.plots import _figure_class
from nettrim.report.text import text_table

# Okabe and Ito's colours, which readers with any kind of colour vision tell apart, without the yellow, which is pale
# on white. Markers change beside them, so that no two of the first forty methods look the same
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#000000", "#7f7f7f")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "p", "<", ">")
#: of a network with more layers, only the largest error is shown
_LAYERS_SHOWN = 5


def comparison_table(comparison: Comparison) -> str:
    """Return a comparison as text: budget by budget, the least error first.

    Errors are relative to the norm of the dense network's outputs at the same place. A star marks the best accuracy and
    the least error of each budget: on the held-out samples where there are any, else on the calibration samples.
    """
    split, done = _split(comparison), _done(comparison)
    accuracies, errors = _best(done, lambda row: _accuracy(row, split)), _best(done, lambda row: -row.error[split])
    columns: list[tuple[str, Callable[[Row], str]]] = [
        ("method", _title),
        ("schedule", lambda row: row.schedule.ljust(max(map(len, SCHEDULES)))),
        ("sparsity", lambda row: row.budget),
        ("kept %", lambda row: f"{_share(row):.2f}"),
        (f"{split} accuracy %", lambda row: _starred(f"{100 * _accuracy(row, split):.2f}", row in accuracies)),
        (f"{split} error", lambda row: _starred(f"{row.error[split]:.4f}", row in errors)),
        ("error by layer", _layer_errors),
        ("method s", lambda row: f"{row.layer_seconds:.2f}"),
        ("call s", lambda row: f"{row.seconds:.2f}"),
        ("peak MiB", lambda row: f"{row.peak_mib:.0f}"),
    ]
    if any(row.latency is not None for row in done):
        # beside what is kept: all of it is there, zeros too
        columns[4:4] = [
            ("weights %", lambda row: _cost(row, "weights")),
            ("multiply-adds %", lambda row: _cost(row, "multiply_adds")),
            ("times as fast", lambda row: "–" if row.latency is None else f"{row.latency['speedup']:.2f}"),
        ]
    if not any(row.accuracy for row in done):
        columns = [column for column in columns if column[0] != f"{split} accuracy %"]
    cells: list[list[str]] = []
    budget = None
    for row in _ordered(comparison, split):
        if cells and row.budget != budget:
            cells.append([""] * len(columns))
        budget = row.budget
        if row.failure is None:
            cells.append([show(row) for _, show in columns])
        else:
            cells.append([*(show(row) for _, show in columns[:3]), "FAILED", *["–"] * (len(columns) - 4)])
    return "\n".join(
        [*_heading(comparison, split), "", text_table([name for name, _ in columns], cells), "", *_notes(comparison)]
    )


def plot_comparison(comparison: Comparison, path: str | Path) -> None:
    """Draw accuracy, output error, seconds and peak memory against the kept weights.

    One colour and marker a method; cascade filled, parallel hollow and dashed; dotted where the network was trained on.
    Accuracy is left out where there are no labels, failed rows always.

    Parameters
    ----------
    comparison : Comparison
    path : path
        Of the picture; its ending names the format.

    Raises
    ------
    ProblemError
        No row is finished.
    MissingExtraError
        matplotlib is not installed.
    RunError
        The picture cannot be written.
    """
    done, split = _done(comparison), _split(comparison)
    if not done:
        raise ProblemError("no row of the comparison is finished, so there is nothing to draw: see why in the table.")
    figure = _figure_class()(figsize=(10, 8), layout="constrained", dpi=120)
    panels = [(_draw_accuracy, f"Accuracy, {split} samples")] if any(split in row.accuracy for row in done) else []
    panels += [
        (_draw_error, f"Output error, {split} samples"),
        (_draw_seconds, "Time of the method on all layers"),
        (_draw_memory, "Peak memory of the call"),
    ]
    axes = figure.subplots(2, 2).flatten()
    for spare in axes[len(panels) :]:
        spare.remove()
    for axis, (draw, title) in zip(axes, panels, strict=False):
        draw(axis, done, split)
        axis.set_title(title, fontsize=12, loc="left")
        axis.yaxis.labelpad = 8
        _kept_axis(axis, done)
    _legend(figure, done)
    buffer = io.BytesIO()
    try:
        figure.savefig(buffer, format=Path(path).suffix.lstrip(".") or None)
    except ValueError as error:
        raise ProblemError(f"{path} cannot be drawn ({error}): let its name end in .png, .svg or .pdf.") from error
    write_atomically(Path(path), buffer.getvalue())


def require_matplotlib() -> None:
    """Raise `MissingExtraError` where `plot_comparison` could not draw, so that it is said before hours of work."""
    _figure_class()


def _draw_accuracy(axis: Any, rows: list[Row], split: str) -> None:
    """Draw accuracy, on an axis that is logarithmic in what is wrong where that spreads: 98 % and 99 % are then as far
    apart as 80 % and 90 %.
    """
    labelled = [row for row in rows if split in row.accuracy]
    dense = 100 * labelled[0].accuracy[split]["dense"]
    shown = [dense, *(100 * _accuracy(row, split) for row in labelled)]
    axis.set_ylabel("% right")
    if 100 - min(shown) > 3 * (100 - max(shown)) > 0:
        _draw(axis, labelled, lambda row: 100 - 100 * _accuracy(row, split))
        axis.axhline(100 - dense, color="0.4", linestyle=":", zorder=1)
        _log_axis(axis, lambda wrong: f"{100 - wrong:g}")
        axis.invert_yaxis()
        dense = 100 - dense
    else:
        _draw(axis, labelled, lambda row: 100 * _accuracy(row, split))
        axis.axhline(dense, color="0.4", linestyle=":", zorder=1)
    axis.text(0.01, dense, "dense", transform=axis.get_yaxis_transform(), va="bottom", fontsize=9, color="0.4")


def _draw_error(axis: Any, rows: list[Row], split: str) -> None:
    _draw(axis, rows, lambda row: row.error[split])
    axis.set_ylabel("‖ŷ − y‖ / ‖y‖")
    if all(row.error[split] > 0 for row in rows):
        _log_axis(axis)
    styles, shares = _styles(rows), [_share(row) for row in rows]
    middle = math.sqrt(min(shares) * max(shares))
    # what is no fraction of every layer alike says what it is, on the side where there is room
    for row in rows:
        if not _is_number(row.budget):
            kind = _kind(row.budget)
            text = "by layer" if "=" in kind else kind
            at = _share(row), row.error[split]
            side, shift = ("left", 7) if _share(row) < middle else ("right", -7)
            style = {"fontsize": 8, "color": styles[row.method][0], "ha": side, "va": "center"}
            axis.annotate(text, at, (shift, 0), textcoords="offset points", **style)


def _draw_seconds(axis: Any, rows: list[Row], split: str) -> None:
    _draw(axis, rows, lambda row: row.layer_seconds)
    axis.set_ylabel("seconds")
    if all(row.layer_seconds > 0 for row in rows):
        _log_axis(axis)


def _draw_memory(axis: Any, rows: list[Row], split: str) -> None:
    _draw(axis, rows, lambda row: row.peak_mib)
    axis.set_ylabel("MiB above the start")
    axis.set_ylim(0, max(1.0, *(1.15 * row.peak_mib for row in rows)))


def _draw(axis: Any, rows: list[Row], value: Callable[[Row], float]) -> None:
    """Draw a line for each method and schedule, from sparse to dense, through budgets of one kind."""
    lines: dict[tuple[str, str, bool, str], list[tuple[float, float]]] = {}
    for row in rows:
        line = lines.setdefault((row.method, row.schedule, row.finish is not None, _kind(row.budget)), [])
        line.append((_share(row), value(row)))
    styles = _styles(rows)
    for (method, schedule, finished, _), line in lines.items():
        axis.plot(*zip(*sorted(line), strict=True), **_look(schedule, finished, *styles[method]))


def _kind(budget: str) -> str:
    """Return what budgets that lie on one curve have in common: those of single layers and N:M have nothing."""
    if _is_number(budget):
        return "number"
    name, bracket, _ = budget.partition("(")
    return name if bracket else budget


def _look(schedule: str, finished: bool, colour: str, marker: str) -> dict[str, Any]:
    solid = schedule == "cascade"
    return {
        "color": colour,
        "marker": marker,
        "linestyle": ":" if finished else "-" if solid else "--",
        "linewidth": 1.6,
        "markersize": 5.5 if solid else 8.5,
        "markerfacecolor": colour if solid else "white",
        # cascade above and smaller: where the two agree, its filled marker lies inside the hollow one
        "zorder": 3 if solid else 2,
    }


def _log_axis(axis: Any, text: Callable[[float], str] = "{:g}".format) -> None:
    """Make the vertical axis logarithmic, with plain numbers on it, whether it spans a factor of two or a million."""
    from matplotlib.ticker import FuncFormatter, LogLocator

    low, high = axis.dataLim.intervaly
    subs = (1, 2, 3, 4, 5, 6, 8) if high < 10 * low else (1, 2, 5) if high < 1000 * low else (1,)
    axis.set_yscale("log")
    axis.yaxis.set_major_locator(LogLocator(subs=subs))
    axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: text(value)))
    axis.set_yticks([], minor=True)


def _kept_axis(axis: Any, rows: list[Row]) -> None:
    """Label a logarithmic axis of kept weights with the values that occur, those that would overlap but once."""
    ticks: list[float] = []
    for kept in sorted({_share(row) for row in rows}):
        if kept > 0 and (not ticks or kept > 1.12 * ticks[-1]):
            ticks.append(kept)
    axis.set_xscale("log")
    axis.set_xticks(ticks, [f"{tick:.3g}" for tick in ticks])
    axis.set_xticks([], minor=True)
    axis.set_xlabel("weights kept, %")
    axis.grid(axis="y", color="0.9", linewidth=0.8)
    axis.set_axisbelow(True)
    axis.spines[["top", "right"]].set_visible(False)


def _legend(figure: Any, rows: list[Row]) -> None:
    """Set the legend above the panels, where it covers none of them."""
    from matplotlib.lines import Line2D

    handles = [
        Line2D([], [], color=colour, marker=marker, linewidth=1.6, label=title)
        for title, (colour, marker) in _styles(rows).items()
    ]
    schedules = [schedule for schedule in sorted(SCHEDULES) if any(row.schedule == schedule for row in rows)]
    handles += [Line2D([], [], label=schedule, **_look(schedule, False, "0.4", "o")) for schedule in schedules]
    kinds = sorted({row.finish for row in rows if row.finish is not None})
    handles += [Line2D([], [], label=f"then {kind}", color="0.4", linewidth=1.6, linestyle=":") for kind in kinds]
    # as many columns as the width holds, and as many rows as that takes, evenly filled
    longest = max(len(str(handle.get_label())) for handle in handles)
    columns = max(1, min(6, 110 // (longest + 7)))
    columns = math.ceil(len(handles) / math.ceil(len(handles) / columns))
    figure.legend(handles=handles, loc="outside upper center", ncols=columns, frameon=False, fontsize=11)


def _styles(rows: list[Row]) -> dict[str, tuple[str, str]]:
    """Return the colour and marker of every method, in the order of their names."""
    titles = sorted({row.method for row in rows})
    return {title: (_COLOURS[i % len(_COLOURS)], _MARKERS[i % len(_MARKERS)]) for i, title in enumerate(titles)}


def _split(comparison: Comparison) -> str:
    return "held-out" if "held-out" in comparison.about["samples"] else "calibration"


def _done(comparison: Comparison) -> list[Row]:
    return [row for row in comparison.rows if row.failure is None]


def _is_number(budget: str) -> bool:
    try:
        float(budget)
    except ValueError:
        return False
    return True


def _share(row: Row) -> float:
    """Return the kept weights in percent."""
    return 100 * row.kept / max(1, row.numel)


def _cost(row: Row, kind: str) -> str:
    """Return what of the dense network's cost is left, in percent; of rows of older files nothing is known."""
    return f"{100 * row.costs['pruned'][kind] / max(1, row.costs['dense'][kind]):.2f}" if row.costs else "–"


def _title(row: Row) -> str:
    return row.method if row.finish is None else f"{row.method} + {row.finish}"


def _accuracy(row: Row, split: str) -> float:
    """Return the pruned network's accuracy, or NaN on samples without labels."""
    return row.accuracy[split]["pruned"] if split in row.accuracy else math.nan


def _best(rows: list[Row], value: Callable[[Row], float]) -> list[Row]:
    """Return the row of each budget with the largest value, and those that equal it."""
    top: dict[str, float] = {}
    for row in rows:
        top[row.budget] = max(top.get(row.budget, -math.inf), value(row))
    return [row for row in rows if value(row) == top[row.budget]]


def _starred(text: str, best: bool) -> str:
    # the space keeps the digits of all rows under one another
    return text + ("*" if best else " ")


def _layer_errors(row: Row) -> str:
    if len(row.layers) <= _LAYERS_SHOWN:
        return " / ".join(f"{layer.error:.3f}" for layer in row.layers)
    worst = max(row.layers, key=lambda layer: layer.error)
    return f"at most {worst.error:.3f} ({worst.name})"


def _ordered(comparison: Comparison, split: str) -> list[Row]:
    """Sort by budget, numbers first and the others as they were asked for, then by error, what failed last."""
    order = list(dict.fromkeys(row.budget for row in comparison.rows))

    def place(row: Row) -> tuple[float, int, float]:
        number = float(row.budget) if _is_number(row.budget) else math.inf
        return number, order.index(row.budget), row.error.get(split, math.inf)

    return sorted(comparison.rows, key=place)


def _heading(comparison: Comparison, split: str) -> list[str]:
    about = comparison.about
    chain, host = about["chain"], about["host"]
    widths = "-".join(str(width) for width in (chain[0]["in_features"], *(layer["out_features"] for layer in chain)))
    numel = sum(layer["in_features"] * layer["out_features"] for layer in chain if layer["prune"])
    samples = ", ".join(f"{count:,} {name}" for name, count in about["samples"].items())
    dense = [row.accuracy[split]["dense"] for row in _done(comparison) if split in row.accuracy]
    right = f", {100 * dense[0]:.2f} % right on the {split} samples before" if dense else ""
    return [
        f"network {widths}: {numel:,} weights to prune{right}; {samples} samples",
        f"{host['processor']}, {host['threads']} of {host['cores']} threads; nettrim {about['commit'] or 'installed'}, "
        f"torch {host['versions']['torch']}, seed {about['seed']}",
    ]


def _notes(comparison: Comparison) -> list[str]:
    """Return what the table needs said below it."""
    notes = [
        "* best of its budget. Errors are relative to the dense outputs; those by layer, of the calibration samples.",
        "method s: pruning the layers; call s: with recording, measuring and bounds; peak MiB: rise during the call.",
    ]

    timed = [row.latency for row in comparison.rows if row.latency is not None]
    if timed:
        samples, threads = timed[0]["samples"], timed[0]["threads"]
        notes.append(
            "weights, multiply-adds: of all layers, zeros too. times as fast: a smaller network against the dense one "
            f"on this CPU, {threads} thread{'s' if threads > 1 else ''}, {samples} samples, by turns."
        )

    def where(row: Row) -> str:
        return f"{_title(row)}, {row.schedule}, {row.budget}"

    for row in comparison.rows:
        if row.failure is not None:
            notes.append(f"FAILED  {where(row)}: {row.failure}")
    for row in comparison.rows:
        missed = [layer.name for layer in row.layers if not layer.certified]
        if missed:
            notes.append(f"NOT certified within the tolerance  {where(row)}: {', '.join(missed)}")
    elsewhere = sum(row.host is not None for row in comparison.rows)
    if elsewhere:
        notes.append(f"{elsewhere} of the rows were made on another host or version: their seconds do not compare.")
    return notes
