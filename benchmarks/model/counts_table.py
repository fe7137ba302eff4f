"""Net-Trim at an exact number of weights on LeNet-300-100 and MNIST: layer by layer, and with label-free finishing.

    python -m benchmarks.model.counts_table --out runs/counts

runs ``nettrim prune`` in a process of its own for every row, as a user would type it, and ``nettrim verify`` on what it
wrote, and prints accuracy and output error on the 10,000 test images beside the floor and the goal that were set. The
first column of figures of other methods is from the reference runs in the issue; `benchmarks.model.lobs_table` measures
them anew. Writes ``benchmarks/results/lenet_300_100_counts.json``.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from benchmarks.model.lenet import DATA
from benchmarks.model.net_trim_table import command, git, processor
from nettrim.report.text import text_table

RESULTS = Path(__file__).resolve().parents[1] / "results" / "lenet_300_100_counts.json"
LAYERS = ("fc1", "fc2", "fc3")

#: plan -> amount as typed, test accuracy (floor, goal) layer by layer, and with finishing
PLANS: dict[str, tuple[list[str], tuple[float, float], tuple[float, float]]] = {
    "7/7/7": (["--sparsity", "0.93"], (97.2, 97.6), (98.0, 98.2)),
    "3/3/3": (["--sparsity", "0.97"], (89.0, 92.0), (96.2, 97.0)),
    "1/4/54": (["--sparsity", "fc1=0.99,fc2=0.96,fc3=0.46"], (96.2, 96.8), (97.1, 97.5)),
    "7 % in all": (["--overall", "0.93"], (98.2, 98.4), (98.3, 98.4)),
    "5 % in all": (["--overall", "0.95"], (98.0, 98.3), (98.25, 98.4)),
    "3 % in all": (["--overall", "0.97"], (97.5, 97.9), (97.8, 98.1)),
    "1.54 % in all": (["--overall", "0.9846"], (96.1, 96.8), (97.2, 97.7)),
}
#: relative logit error on test images, layer by layer (floor, goal)
ERRORS = {"7 % in all": (0.088, 0.080), "3 % in all": (0.15, 0.135), "1.54 % in all": (0.21, 0.19)}


def main() -> None:
    """Run every row, print the table, write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True, help="where the run directories go")
    parser.add_argument("--samples", type=int, default=60_000)
    parser.add_argument("--plans", nargs="+", default=list(PLANS), choices=list(PLANS))
    parser.add_argument("--kinds", nargs="+", default=["layers", "finish"], choices=["layers", "finish"])
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    stored = json.loads(RESULTS.read_text()) if RESULTS.exists() else {"rows": []}
    rows = [row for row in stored["rows"] if (row["plan"], row["kind"]) not in
            {(plan, kind) for plan in options.plans for kind in options.kinds}]  # fmt: skip
    for plan in tqdm(options.plans, disable=None):
        for kind in options.kinds:
            rows.append(run(plan, kind, options.samples, options.seed, Path(options.out)))
            print(table(rows[-1:]), flush=True)
            result = {
                "command": "python -m benchmarks.model.counts_table --out DIR",
                "commit": git("describe", "--always", "--dirty"),
                "host": {"processor": processor(), "cores": os.cpu_count(), "torch": torch.__version__},
                "rows": rows,
            }
            RESULTS.write_text(json.dumps(result, indent=1) + "\n")
    print(table(rows))


def run(plan: str, kind: str, samples: int, seed: int, out: Path) -> dict[str, Any]:
    """Prune and verify one row."""
    amount, floors, finished = PLANS[plan]
    directory = out / f"{plan.replace('/', '-').replace(' ', '-').replace('%', 'percent')}-{kind}"
    prune = [
        *("prune", "--model", "benchmarks.model.lenet:lenet_300_100", "--data", f"mnist:{DATA / 'mnist'}"),
        *("--samples", str(samples), *amount, "--schedule", "cascade", "--seed", str(seed), "--out", str(directory)),
        *("--memory-limit", "8 GiB"),  # every sample in every program
    ]
    # the convex bound is beside the point of what finishing makes of the weights
    prune += ["--finish", "distill", "--no-evidence"] if kind == "finish" else []
    ledger, seconds, memory = command([*prune, "--json"])
    checked, _, _ = command(["verify", str(directory), "--json"])
    floor, goal = floors if kind == "layers" else finished
    return {
        "plan": plan,
        "kind": kind,
        "command": " ".join(["nettrim", *prune]).replace(str(DATA), "DATA").replace(str(out), "DIR"),
        "samples": samples,
        "seed": seed,
        "kept": {record["name"]: record["kept"] for record in ledger["records"]},
        "gaps": {record["name"]: record["gap"] for record in ledger["records"]},
        "accuracy": 100 * ledger["accuracy"]["held-out"]["pruned"],
        "floor": floor,
        "goal": goal,
        "error": ledger["held_out"],
        "calibration_error": ledger["measured"] / ledger["output_norm"],
        "bound": ledger["bound"] / ledger["output_norm"],
        "layer_seconds": {record["name"]: record["seconds"] for record in (ledger["before"] or ledger)["records"]},
        "finish": ledger["finish"],
        "seconds": seconds,
        "peak_memory_mib": memory,
        "verified": checked["holds"],
    }


def table(rows: list[dict[str, Any]]) -> str:
    """Return the rows as text."""
    head = ("plan", "kind", *LAYERS, "all %", "test acc %", "floor", "goal", "logit error", "floor", "goal", "s", "MiB",
            "verified")  # fmt: skip
    body = []
    for row in rows:
        floors = ERRORS.get(row["plan"], ()) if row["kind"] == "layers" else ()
        body.append(
            (
                row["plan"],
                row["kind"],
                *(str(row["kept"][name]) for name in LAYERS),
                f"{100 * sum(row['kept'].values()) / 266_200:.2f}",
                f"{row['accuracy']:.2f}",
                f"{row['floor']:g}",
                f"{row['goal']:g}",
                f"{row['error']:.4f}",
                *(f"{limit:g}" for limit in floors or ()),
                *(("–", "–") if not floors else ()),
                f"{row['seconds']:.0f}",
                f"{row['peak_memory_mib']:.0f}",
                "yes" if row["verified"] else "NO",
            )
        )
    return text_table(head, body)


if __name__ == "__main__":
    main()
