"""Net-Trim on a trained network: three radii, both schedules, each by the command that a user types.

    python -m benchmarks.model.net_trim_table --out runs/lenet
    python -m benchmarks.model.train_nets --net lenet5 --data mnist:DIR --out lenet5.safetensors
    python -m benchmarks.model.net_trim_table --net lenet5 --weights lenet5.safetensors --out runs/lenet5
    python -m benchmarks.model.train_nets --net resnet8 --data cifar10:DIR --out resnet8.safetensors
    python -m benchmarks.model.net_trim_table --net resnet8 --weights resnet8.safetensors --samples 1000 --out runs/res

runs ``nettrim prune`` and ``nettrim verify`` in a process of their own for every row, so that peak memory is
the command's, and writes ``benchmarks/results/NET_net_trim.json`` and a table. The data are read from
``$NETTRIM_DATA`` (by default ``../shared/data``, beside the checkout).
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from benchmarks.model.lenet import DATA
from nettrim.report.text import text_table

RESULTS = Path(__file__).resolve().parents[1] / "results"
#: the networks: their factory, and their data
NETS = {
    "lenet_300_100": ("benchmarks.model.lenet:lenet_300_100", f"mnist:{DATA / 'mnist'}"),
    "lenet5": ("benchmarks.model.nets:lenet5", f"mnist:{DATA / 'mnist'}"),
    "resnet8": ("benchmarks.model.nets:resnet_cifar", f"cifar10:{DATA / 'cifar10'}"),
}
_FEW = 4  # layers that are shown one by one


def main() -> None:
    """Run every row, print the table, write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--net", choices=NETS, default="lenet_300_100")
    parser.add_argument("--weights", help="of a network that train_nets trained")
    parser.add_argument("--out", required=True, help="where the run directories go")
    parser.add_argument("--samples", type=int, default=10_000)
    parser.add_argument("--epsilons", type=float, nargs="+", default=[0.05, 0.1, 0.2])
    options = parser.parse_args()
    rows = [(epsilon, schedule) for epsilon in options.epsilons for schedule in ("parallel", "cascade")]
    model, data = NETS[options.net]
    network = ["--model", model, "--data", data, *(["--weights", options.weights] if options.weights else [])]
    found = [
        run(network, epsilon, schedule, options.samples, Path(options.out))
        for epsilon, schedule in tqdm(rows, disable=None)
    ]
    print(table(found))
    result = {
        "command": f"python -m benchmarks.model.net_trim_table --net {options.net} --out DIR "
        f"--samples {options.samples} --epsilons {' '.join(map(str, options.epsilons))}",
        "commit": git("describe", "--always", "--dirty"),
        "host": {"processor": processor(), "cores": os.cpu_count(), "torch": torch.__version__},
        "rows": found,
    }
    (RESULTS / f"{options.net}_net_trim.json").write_text(json.dumps(result, indent=1) + "\n")


def run(network: list[str], epsilon: float, schedule: str, samples: int, out: Path) -> dict[str, Any]:
    """Prune and verify one row."""
    directory = out / f"{schedule}-{epsilon:g}"
    prune = [
        *("prune", *network),
        *("--samples", str(samples), "--epsilon", str(epsilon), "--schedule", schedule, "--out", str(directory)),
    ]
    ledger, seconds, memory = command([*prune, "--json"])
    checked, _, _ = command(["verify", str(directory), "--json"])
    keep = (
        "name",
        "kept",
        "numel",
        "rows",
        "total_rows",
        "gap",
        "violation",
        "promised",
        "measured",
        "target_norm",
        "network_error",
        "seconds",
    )
    return {
        "epsilon": epsilon,
        "schedule": schedule,
        "layers": [{key: record[key] for key in keep} for record in ledger["records"]],
        "kept": sum(record["kept"] for record in ledger["records"]),
        "numel": sum(record["numel"] for record in ledger["records"]),
        "measured": ledger["measured"] / ledger["output_norm"],
        "bounds": {name: bound / ledger["output_norm"] for name, bound in ledger["bounds"].items()},
        "held_out": ledger["held_out"],
        "accuracy": ledger["accuracy"],
        "seconds": seconds,
        "peak_memory_mib": memory,
        "verified": checked["holds"],
    }


def command(arguments: list[str]) -> tuple[dict[str, Any], float, float]:
    """Run ``nettrim`` and return its JSON, its wall seconds and its peak memory in MiB."""
    began = time.monotonic()
    process = subprocess.Popen([sys.executable, "-m", "nettrim", *arguments], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    text = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode not in (0, 1):
        raise SystemExit(f"nettrim {' '.join(arguments)} ended with {process.returncode}")
    return json.loads(text), time.monotonic() - began, usage.ru_maxrss / 1024


def table(rows: list[dict[str, Any]]) -> str:
    """Return the rows as text."""
    names = [layer["name"] for layer in rows[0]["layers"]]
    shown = names if len(names) <= _FEW else []
    shares = [f"{name} %" for name in shown]
    bounds = ("cascade", "telescoped", "operator", "l-obs", "paper")
    head = ("schedule", "epsilon", *shares, "all %", "max gap", "violation", "measured", *bounds)
    head += ("held-out", "test acc %", "s", "MiB", "verified")
    body = []
    for row in rows:
        layers = row["layers"]
        body.append(
            (
                row["schedule"],
                f"{row['epsilon']:g}",
                *(f"{100 * layer['kept'] / layer['numel']:.2f}" for layer in layers if layer["name"] in shown),
                f"{100 * row['kept'] / row['numel']:.2f}",
                f"{max(layer['gap'] for layer in layers):.1e}",
                f"{max(layer['violation'] for layer in layers):.0e}",
                f"{row['measured']:.4f}",
                *(f"{row['bounds'][name]:.4g}" if name in row["bounds"] else "–" for name in bounds),
                f"{row['held_out']:.4f}",
                f"{100 * row['accuracy']['held-out']['pruned']:.2f}",
                f"{row['seconds']:.0f}",
                f"{row['peak_memory_mib']:.0f}",
                "yes" if row["verified"] else "NO",
            )
        )
    return text_table(head, body)


def processor() -> str:
    """Return the processor's name, where the system tells it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def git(*arguments: str) -> str:
    """Return what git says of this checkout."""
    return subprocess.run(["git", *arguments], capture_output=True, text=True, check=False).stdout.strip()


if __name__ == "__main__":
    main()
