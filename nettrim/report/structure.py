"""What smaller networks are without, what that saves, and chains of several runs, as plain text."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from nettrim.methods.probes import ACCURACY, ProbeCurve
from nettrim.network.costs import LatencyRatio
from nettrim.pipeline.records import Chain, Ledger
from nettrim.report.text import text_table


def structure_lines(ledger: Ledger) -> list[str]:
    """Return which channels and units are gone, and what the network costs without them."""
    # training on leaves the structure, and tells nothing of it
    records = (ledger.before or ledger).records
    units = dict.fromkeys(str(record.facts["unit"]) for record in records if record.facts.get("removed"))
    channels = [
        f"{record.name} {record.facts['channels_kept']} of {record.facts['channels_all']}"
        for record in records
        if "channels_kept" in record.facts
    ]
    lines = [f"units that are gone: {', '.join(units)}"] if units else []
    lines += [f"channels that stay: {', '.join(channels)}"] if channels else []
    dense, pruned = ledger.costs["dense"], ledger.costs["pruned"]
    said = ", ".join(
        f"{pruned[key]:,} of {dense[key]:,} {name} ({100 * pruned[key] / max(1, dense[key]):.1f} %)"
        for key, name in (("weights", "weights"), ("multiply_adds", "multiply-adds a sample"))
    )
    return [*lines, f"smaller, not sparse: {said}"]


def latency_line(latency: LatencyRatio) -> str:
    """Return how much faster a smaller network was measured to be, with what it was measured on."""
    lower, upper = latency.quartiles
    dense, pruned = (1e3 * side.seconds for side in (latency.dense, latency.pruned))
    threads = f"{latency.dense.threads} thread{'s' if latency.dense.threads > 1 else ''}"
    return (
        f"latency on this CPU, {threads}, {latency.dense.samples} samples: {pruned:.3g} ms, dense {dense:.3g} ms; "
        f"{latency.speedup:.2f} times as fast (quartiles {lower:.2f} to {upper:.2f})"
    )


def chain_lines(chain: Chain) -> list[str]:
    """Return a table of the runs that led from the first network to the last, and what they did together.

    Where all were measured on the same samples, errors are relative to the outputs of the first network, so that the
    bounds add up; else each is relative to those of the network that its run started from.
    """
    rows = []
    for number, run in enumerate(chain.stages, 1):
        size = (run.output_norm if chain.bound is None else chain.output_norm) or 1.0
        rows.append(
            (
                f"{number}  {run.method}" + ("" if run.finish is None else f" + {run.finish}"),
                f"{run.kept:,}",
                f"{run.numel:,}",
                f"{100 * run.kept / max(1, run.numel):.2f}",
                f"{run.bound / size:.4g}",
                f"{run.measured / size:.4g}",
            )
        )
    size = chain.output_norm or 1.0
    bound = "–" if chain.bound is None else f"{chain.bound / size:.4g}"
    first, last = chain.stages[0].numel, chain.stages[-1].kept
    rows.append(
        ("all", f"{last:,}", f"{first:,}", f"{100 * last / max(1, first):.2f}", bound, f"{chain.measured / size:.4g}")
    )
    head = ("run", "kept", "of", "%", "bound", "measured")
    lines = [f"chain of {len(chain.stages)} runs, from the first network to this one:", text_table(head, rows)]
    if chain.why is not None:
        lines.append(f"no bound over all: {chain.why}")
    if chain.held_out is not None:
        lines.append(f"over all, on the held-out samples: measured {chain.held_out:.5g}")
    return lines + [
        f"accuracy, {split}: {100 * figures['dense']:.2f} % of the first, {100 * figures['pruned']:.2f} % now"
        for split, figures in chain.accuracy.items()
    ]


def probe_table(stored: Mapping[str, Any]) -> str:
    """Return the probes of a network's units as text; `stored` is what `PruneResult.about` has of them."""
    curve = ProbeCurve.of_dict(stored)
    measure = "accuracy %" if curve.measure == ACCURACY else "average precision %"
    rows = []
    for number, point in enumerate(curve.points):
        stage = str(curve.stages[number - 1] + 1) if number else ""
        gain = (f"{100 * point.gain:+.2f}", f"{100 * point.gain_error:.2f}") if number else ("", "")
        score = (f"{100 * point.score:.2f}", f"{100 * point.score_error:.2f}")
        rows.append((point.name, stage, *score, *gain, "gone" if point.name in curve.removed else ""))
    seeds = f"{curve.seeds} split{'s' if curve.seeds > 1 else ''}"
    return (
        f"linear probes on the features of every unit, {curve.trained} samples to train and {curve.held} to score, "
        f"{seeds}\n\n" + text_table(("unit", "stage", measure, "±", "gain", "±", ""), rows)
    )
