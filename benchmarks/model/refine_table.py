"""ReLU-aware refinement against ALPS on one layer: fc1 of LeNet-300-100, at an exact number of weights.

    python -m benchmarks.model.refine_table

10,000 training images, the relative error of the ReLU outputs on the 10,000 test images, and the convex evidence. ALPS
is `nettrim.Alps`, whose released code gives 0.189 at 7 % kept and 0.322 at 3 %; the refinement starts from its answer.
Writes ``benchmarks/results/refine_fc1.json``.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

import nettrim
from benchmarks.model.lenet import DATA, lenet_300_100
from benchmarks.model.net_trim_table import git, processor
from nettrim.core.reweighted import reweighted
from nettrim.data import load
from nettrim.methods.base import LayerTask, with_bias_column
from nettrim.network.edit import find_bias, find_weight
from nettrim.report.text import text_table

RESULTS = Path(__file__).resolve().parents[1] / "results" / "refine_fc1.json"
RELEASED = {0.07: 0.189, 0.03: 0.322}


def main() -> None:
    """Run both counts, print the table, write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=10_000)
    parser.add_argument("--kept", type=float, nargs="+", default=[0.07, 0.03], help="fractions")
    options = parser.parse_args()
    data = load(f"mnist:{DATA / 'mnist'}")
    assert data.test is not None
    train, test = data.train.inputs[: options.samples].flatten(1).double(), data.test.inputs.flatten(1).double()
    network = lenet_300_100().double()
    weight, bias = find_weight(network, "fc1").detach(), find_bias(network, "fc1")
    assert bias is not None
    bias = bias.detach()
    rows = [row for share in tqdm(options.kept, disable=None) for row in compare(share, train, test, weight, bias)]
    print(table(rows))
    result = {
        "command": "python -m benchmarks.model.refine_table",
        "commit": git("describe", "--always", "--dirty"),
        "host": {"processor": processor(), "cores": os.cpu_count(), "threads": torch.get_num_threads()},
        "samples": options.samples,
        "rows": rows,
    }
    RESULTS.write_text(json.dumps(result, indent=1) + "\n")


def compare(
    share: float, train: torch.Tensor, test: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor
) -> list[dict[str, Any]]:
    """Return one row for each method at one count."""
    outputs = train @ weight.T + bias
    wanted = (test @ weight.T + bias).clamp(min=0)
    task = LayerTask("fc1", True, False, True, weight, bias, train, outputs, "sparsity", 1 - share, torch.float32)
    penalty = torch.ones(train.shape[1] + 1, dtype=torch.float64)
    penalty[-1] = 0.0
    problem = nettrim.LayerProblem(with_bias_column(train), outputs.clamp(min=0), radius=1.0, penalty=penalty)

    def row(method: str, found: torch.Tensor, offset: torch.Tensor, seconds: float, **more: Any) -> dict[str, Any]:
        given = (test @ found.double().T + offset.double()).clamp(min=0)
        return {
            "kept": share,
            "method": method,
            "weights": int((found != 0).sum()),
            "test_error": float((given - wanted).norm() / wanted.norm()),
            "seconds": seconds,
            **more,
        }

    began = time.monotonic()
    alps = nettrim.Alps().prune_layer(task)
    assert alps.bias is not None
    rows = [row("ALPS", alps.weight, alps.bias, time.monotonic() - began, released=RELEASED.get(share))]
    start = torch.cat([alps.weight, alps.bias[:, None]], dim=1)
    size = float(problem.targets.norm())
    for name, swaps in (("refine", 0), ("refine, 2 swaps", 2)):
        refined = nettrim.refine(problem, start, kept=task.kept, swaps=swaps, round_to=torch.float32)
        evidence = refined.certify(tol=1e-2) if swaps == 0 else None
        rows.append(
            row(
                name, refined.weight[:, :-1], refined.weight[:, -1], refined.seconds,
                one_sided=refined.distance / size, start=refined.start and refined.start / size,
                l1=evidence and evidence.certificate.objective, l1_bound=evidence and evidence.certificate.lower_bound,
                nearest=evidence and evidence.nearest / size,
            )
        )  # fmt: skip
    convex = reweighted(problem, kept=task.kept, round_to=torch.float32)
    rows.append(
        row("reweighted l1", convex.weight[:, :-1], convex.weight[:, -1], convex.seconds,
            one_sided=convex.distance / size)
    )  # fmt: skip
    for each in rows:
        each["below_alps"] = 1 - each["test_error"] / rows[0]["test_error"]
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """Return the rows as text."""
    head = ("kept %", "method", "weights", "test error", "below ALPS", "released", "one-sided", "nearest of this l1",
            "l1", "least l1 at this error", "s")  # fmt: skip

    def shown(value: float | None, form: str) -> str:
        return "–" if value is None else form.format(value)

    return text_table(
        head,
        [
            (
                f"{100 * row['kept']:g}",
                row["method"],
                str(row["weights"]),
                f"{row['test_error']:.4f}",
                f"{100 * row['below_alps']:.1f} %",
                shown(row.get("released"), "{:.3f}"),
                shown(row.get("one_sided"), "{:.4f}"),
                shown(row.get("nearest"), "{:.4f}"),
                shown(row.get("l1"), "{:.1f}"),
                shown(row.get("l1_bound"), "{:.1f}"),
                f"{row['seconds']:.1f}",
            )
            for row in rows
        ],
    )


if __name__ == "__main__":
    main()
