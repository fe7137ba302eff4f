"""Ledgers and solutions as plain text, for a terminal."""

from __future__ import annotations

from nettrim.core.solution import LayerSolution
from nettrim.pipeline.guarantees import HeldOut
from nettrim.pipeline.outputs import SPEED
from nettrim.pipeline.records import LayerRecord, Ledger
from nettrim.pipeline.speed import is_smaller
from nettrim.report.structure import chain_lines, structure_lines
from nettrim.report.text import text_table


def ledger_table(ledger: Ledger) -> str:
    """Return a ledger as text: a row per layer, then the network's bounds against what was measured.

    Errors are relative to the norm of the dense network's outputs at the same place.
    """
    head = (
        "layer",
        "rows",
        "kept",
        "of",
        "%",
        "gap",
        "violation",
        "promised",
        "measured",
        "in network",
        "bound",
        "held-out",
        "s",
    )
    rows: list[tuple[str, ...]] = []
    for r in ledger.records:
        size = r.target_norm or 1.0
        rows.append(
            (
                r.name,
                _rows(r),
                f"{r.kept}",
                f"{r.numel}",
                f"{100 * r.kept / r.numel:.2f}",
                _short(r.gap, "{:.1e}"),
                _short(r.violation, "{:.1e}"),
                _short(r.promised and r.promised / size),
                _short(r.measured / size),
                _short(r.network_error / size),
                _short(min(r.bounds.values()) / size),
                _short(r.held_out),
                f"{r.seconds:.1f}",
            )
        )
    share = f"{100 * ledger.kept / max(1, ledger.numel):.2f}"
    rows.append(
        (
            "all",
            "",
            f"{ledger.kept}",
            f"{ledger.numel}",
            share,
            *[""] * 7,
            f"{sum(r.seconds for r in ledger.records):.1f}",
        )
    )
    title = f"{ledger.method}, {ledger.schedule}"
    if ledger.finish is not None:
        how = {"distill": "distilled to the dense network without labels", "fine-tune": "fine-tuned with labels"}
        done = ledger.finish
        title += f", then {how.get(done['kind'], done['kind'])}: {done['epochs']} epochs in {done['seconds']:.1f} s"
    lines = [title, "", text_table(head, rows), ""]
    size = ledger.output_norm or 1.0
    lines.append(
        f"output error ‖ŷ − y‖/‖y‖ on the calibration samples: measured {ledger.measured / size:.5g}, bounded by"
    )
    lines += [
        f"  {value / size:<12.5g} {name}" for name, value in sorted(ledger.bounds.items(), key=lambda item: item[1])
    ]
    if ledger.held_out is not None:
        lines.append(f"on the held-out samples: measured {ledger.held_out:.5g}")
    lines += [
        f"accuracy, {split}: {100 * a['dense']:.2f} % dense, {100 * a['pruned']:.2f} % pruned"
        for split, a in ledger.accuracy.items()
    ]
    if ledger.before is not None:
        first = ledger.before
        parts = [f"{first.kept:,} weights", f"output error {first.measured / (first.output_norm or 1.0):.5g}"]
        parts += [f"accuracy, {split}: {100 * a['pruned']:.2f} %" for split, a in first.accuracy.items()]
        lines.append(f"before it was trained on: {', '.join(parts)}")
    if ledger.guarantee is not None:
        lines.append(HeldOut(**ledger.guarantee).sentence())
    if ledger.unbounded is not None:
        lines.append(f"composed bounds end at {ledger.unbounded}, of which no gain is known")
    lines += [f"left dense: {name}, which {why}" for name, why in ledger.unsupported.items()]
    missed = [f"{name} ({status})" for name, status in ledger.uncertified.items()]
    if missed:
        lines.append(f"NOT certified within the tolerance: {', '.join(missed)}")
    if ledger.chain is not None:
        lines += ["", *chain_lines(ledger.chain), ""]
    if is_smaller(ledger):
        return "\n".join([*lines, *structure_lines(ledger)])
    sizes = {kind: sum(r.bytes[kind] for r in ledger.records) for kind in ("dense", "csr", "bitmask")}
    lines.append("bytes of the pruned weights: " + ", ".join(f"{value:,} {kind}" for kind, value in sizes.items()))
    lines.append(SPEED)
    return "\n".join(lines)


def solution_table(solution: LayerSolution) -> str:
    """Return one solved layer as text."""
    c, s = solution.certificate, solution.stats
    kept = int((solution.weight != 0).sum())
    rows = [
        ("status", f"{solution.status.name}: {solution.status.remedy}"),
        (
            "kept",
            f"{kept} of {solution.problem.n_outputs * solution.problem.n_inputs}",
        ),
        ("objective", f"{c.objective:.8g}"),
        ("lower bound", f"{c.lower_bound:.8g}"),
        ("gap", f"{c.gap:.3e}"),
        ("violation", f"{c.violation:.3e}"),
        ("distance", f"{c.distance:.8g}"),
        ("solver", f"{s.solver}, {s.dtype}, {s.device}"),
        ("iterations", f"{s.iterations} in {s.seconds:.2f} s"),
    ]
    if s.note:
        rows.append(("note", s.note))
    return "\n".join(f"{key:<12} {value}" for key, value in rows)


def _rows(record: LayerRecord) -> str:
    """Say how many rows a program was made of, of all there are; all of them go without saying."""
    if record.rows in (0, record.total_rows):
        return f"{record.total_rows:,}"
    return f"{record.rows:,}/{record.total_rows:,}"


def _short(value: float | None, form: str = "{:.4g}") -> str:
    return "–" if value is None else form.format(value)
