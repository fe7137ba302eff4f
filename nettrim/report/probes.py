"""The picture of a probe curve: what the features of every unit are worth, and which units went."""

from __future__ import annotations

import io
from itertools import groupby
from pathlib import Path
from typing import Any

from nettrim.errors import ProblemError
from nettrim.methods.probes import ACCURACY, ProbeCurve
from nettrim.pipeline.files import write_atomically
from nettrim.report.plots import _figure_class

_KEPT, _REMOVED, _GREY = "#3b6fb6", "#e08a1e", "0.4"


def plot_probes(curve: ProbeCurve, path: str | Path) -> None:
    """Draw the score of the probes along the units, and below what each gains on the one before.

    Bars are one standard error; stages are shaded in turn; units that were removed are orange and hollow.

    Parameters
    ----------
    curve : ProbeCurve
    path : path
        Of the picture; its ending names the format.

    Raises
    ------
    ProblemError
        The format is unknown.
    MissingExtraError
        matplotlib is not installed.
    RunError
        The picture cannot be written.
    """
    points = curve.points
    wide = max(6.5, 2.2 + 0.42 * len(points))
    figure = _figure_class()(figsize=(wide, 6.2), layout="constrained", dpi=120)
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(3, 2))
    at = list(range(len(points)))
    _shade(upper, curve, names=True)
    _shade(lower, curve, names=False)
    upper.plot(at, [100 * point.score for point in points], color=_GREY, linewidth=1, zorder=2)
    for x, point in enumerate(points):
        gone = point.name in curve.removed
        colour = _REMOVED if gone else _KEPT
        upper.errorbar(
            x, 100 * point.score, 100 * point.score_error, color=colour, marker="o", markersize=5, capsize=4,
            markerfacecolor="white" if gone else colour, markeredgewidth=1.6, linewidth=1.4, zorder=3,
        )  # fmt: skip
        if x:
            lower.bar(
                x, 100 * point.gain, 0.62, yerr=100 * point.gain_error, edgecolor=colour, linewidth=1.4,
                facecolor="white" if gone else colour, error_kw={"capsize": 3, "linewidth": 1.2}, zorder=3,
            )  # fmt: skip
    short = curve.measure == ACCURACY
    upper.set_ylabel("probe accuracy, %" if short else "mean average precision, %")
    lower.set_ylabel("gain, points")
    lower.axhline(0, color="black", linewidth=0.8, zorder=4)
    lower.set_xticks(at, [point.name for point in points], rotation=50, ha="right", rotation_mode="anchor", fontsize=9)
    lower.set_xlim(-0.6, len(points) - 0.4)
    for axes in (upper, lower):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", color="0.88", linewidth=0.8, zorder=0)
        axes.set_axisbelow(True)
    upper.set_title(
        f"Linear probes of the units, {curve.held} of {curve.held + curve.trained} samples held out, "
        f"{curve.seeds} split{'s' if curve.seeds > 1 else ''}; bars: one standard error",
        fontsize=11,
        loc="left",
        pad=18,
    )
    upper.errorbar([], [], [], color=_KEPT, marker="o", capsize=3, linestyle="", label="stays")
    if curve.removed:
        upper.errorbar(
            [], [], [], color=_REMOVED, marker="o", markerfacecolor="white", markeredgewidth=1.6, capsize=3,
            linestyle="", label="removed",
        )  # fmt: skip
    upper.legend(frameon=False, fontsize=9, loc="lower right")
    buffer = io.BytesIO()
    try:
        figure.savefig(buffer, format=Path(path).suffix.lstrip(".") or None)
    except ValueError as error:
        raise ProblemError(f"{path} cannot be drawn ({error}): let its name end in .png, .svg or .pdf.") from error
    write_atomically(Path(path), buffer.getvalue())


def _shade(axes: Any, curve: ProbeCurve, names: bool) -> None:
    """Shade every other stage, and number them all above the upper axes."""
    start = 1
    for number, (_, units) in enumerate(groupby(curve.stages)):
        stop = start + len(list(units))
        if number % 2 == 0:
            axes.axvspan(start - 0.5, stop - 0.5, color="0.955", zorder=0)
        if names:
            label = f"stage {number + 1}" if stop - start > 1 else f"{number + 1}"
            axes.annotate(
                label, ((start + stop - 1) / 2, 1), xycoords=("data", "axes fraction"), xytext=(0, 3),
                textcoords="offset points", ha="center", va="bottom", fontsize=9, color=_GREY,
            )  # fmt: skip
        start = stop
