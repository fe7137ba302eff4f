"""Ledgers as pictures. matplotlib is an extra, and is imported only here, when something is drawn."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nettrim.errors import MissingExtraError, RunError
from nettrim.pipeline.records import Ledger

# blue, orange, green: told apart by readers who confuse red and green
_COLOURS = ("#3b6fb6", "#e08a1e", "#3f9b6c")


def plot_ledgers(ledgers: Mapping[str, Ledger], path: str | Path) -> None:
    """Draw kept weights per layer, and promised against measured error per layer and at the output, one colour
    a ledger.

    Parameters
    ----------
    ledgers : mapping from title to Ledger
        At most three, of the same layers.
    path : path
        Of the picture; its ending names the format.

    Raises
    ------
    MissingExtraError
        matplotlib is not installed.
    RunError
        The picture cannot be written.
    """
    figure_class = _figure_class()
    figure = figure_class(figsize=(10.5, 4.2), layout="constrained", dpi=120)
    kept, errors = figure.subplots(1, 2)
    width = 0.8 / len(ledgers)
    names: list[str] = []
    for k, (title, ledger) in enumerate(ledgers.items()):
        colour = _COLOURS[k % len(_COLOURS)]
        offset = (k - (len(ledgers) - 1) / 2) * width
        names = [record.name for record in ledger.records]
        at = [i + offset for i in range(len(names))]
        share = [100 * r.kept / r.numel for r in ledger.records]
        kept.bar(at, share, width * 0.92, color=colour, label=title)
        for x, value in zip(at, share, strict=True):
            kept.annotate(f"{value:.0f}", (x, value), ha="center", va="bottom", fontsize=8)
        size = [r.target_norm or 1.0 for r in ledger.records]
        measured = [r.measured / s for r, s in zip(ledger.records, size, strict=True)]
        errors.bar(at, measured, width * 0.92, color=colour, label=f"{title}: measured")
        promised = [
            (x, r.promised / s) for x, r, s in zip(at, ledger.records, size, strict=True) if r.promised is not None
        ]
        for x, value in promised:
            errors.hlines(value, x - width * 0.46, x + width * 0.46, color="black", linewidth=1.6)
        # the output: what the whole network does, against the tightest bound
        x, norm = len(names) + offset, ledger.output_norm or 1.0
        errors.bar([x], [ledger.measured / norm], width * 0.92, color=colour)
        errors.hlines(ledger.bound / norm, x - width * 0.46, x + width * 0.46, color="black", linewidth=1.6)
    errors.hlines([], 0, 0, color="black", linewidth=1.6, label="promised, or bounded by")
    kept.set_xticks(range(len(names)), names)
    kept.set_ylabel("weights kept, %")
    kept.set_ylim(0, 108)
    kept.set_title("Kept weights per layer", fontsize=11)
    errors.set_xticks(range(len(names) + 1), [*names, "network\noutput"])
    errors.set_ylabel("error relative to the dense outputs")
    errors.set_title("Promised against measured, calibration samples", fontsize=11)
    for axes in (kept, errors):
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize=9)
    errors.set_ylim(0, errors.get_ylim()[1] * 1.28)
    try:
        figure.savefig(path)
    except OSError as error:
        raise RunError(f"{path} cannot be written: {error.strerror or error}.") from error


def _figure_class() -> Any:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingExtraError("pictures need matplotlib: pip install 'nettrim[demo]'.") from error
    return Figure
