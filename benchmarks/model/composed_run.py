"""All three grains in one chain: whole units, then channels, then single weights, then one fine-tuning.

    python -m benchmarks.model.composed_run --net resnet32_w8 --data cifar10:DIR --weights FILE.safetensors --out DIR

Shallowing with recovery (teacher: the dense network), LDRF, Net-Trim or L-OBS with a fine-tuning whose masks are frozen
at the end; each stage is a call of `nettrim.prune` on the result of the one before it and leaves a run directory that
`nettrim verify` checks. DIR/composed.json holds parameters, multiply-adds, latency against the first network,
accuracies and the ledger's figures after every stage. `--resume` goes on where a run was interrupted.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn

import nettrim
from benchmarks.model.train_nets import make, measure
from nettrim.data import load
from nettrim.network.batches import Batch
from nettrim.network.costs import latency_ratio
from nettrim.pipeline.files import describe_place
from nettrim.pipeline.result import PruneResult


def line(stage: str, result: PruneResult, dense: nn.Module, test: Any, images: torch.Tensor) -> dict[str, Any]:
    """Return what is known after one stage."""
    ledger, chain = result.ledger, result.ledger.chain
    speed = latency_ratio(dense, result.model, Batch((images,)))
    return {
        "stage": stage,
        "parameters": sum(p.numel() for p in result.model.parameters()),
        "kept weights": sum(int((p != 0).sum()) for p in result.model.parameters() if p.dim() > 1),
        "multiply-adds": ledger.costs["pruned"]["multiply_adds"],
        "speed-up": speed.speedup,
        "quartiles": speed.quartiles,
        "test accuracy": measure(result.model, test.inputs, test.labels),
        "merely pruned": None if ledger.before is None else ledger.before.accuracy.get("held-out", {}).get("pruned"),
        "own": {"measured": ledger.measured / ledger.output_norm, "bound": ledger.bound / ledger.output_norm},
        "chain": None
        if chain is None or chain.bound is None
        else {"measured": chain.measured / chain.output_norm, "bound": chain.bound / chain.output_norm},
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the stages and print a line for each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--net", required=True, help="of benchmarks.model.train_nets")
    parser.add_argument("--data", required=True, help="cifar10:DIR")
    parser.add_argument("--weights", required=True, type=Path)
    parser.add_argument("--out", required=True, type=Path, help="DIR")
    parser.add_argument("--units", type=int, default=4)
    parser.add_argument("--channels", type=float, default=0.5)
    parser.add_argument("--sparsity", type=float, default=0.5)
    parser.add_argument("--method", default="l-obs", choices=["net-trim", "l-obs"])
    parser.add_argument("--samples", type=int, default=2000, help="training images of calibration and recovery")
    parser.add_argument("--held", type=int, default=1000, help="test images that ledgers measure on")
    parser.add_argument("--epochs", type=int, default=3, help="of every recovery and of the fine-tuning at the end")
    parser.add_argument("--resume", action="store_true")
    options = parser.parse_args(arguments)
    data = load(options.data)
    train, test = data.train, data.test
    assert test is not None
    assert train.labels is not None
    assert test.labels is not None
    dense = make(options.net, 0)
    dense.load_state_dict(load_file(options.weights))
    dense.eval()
    batches = [(train.inputs[: options.samples], train.labels[: options.samples])]
    held = [(test.inputs[: options.held], test.labels[: options.held])]
    tune = nettrim.FineTune(epochs=options.epochs, validation=0.0, patience=None, learning_rate=1e-3, mixing=0.9)
    common: dict[str, Any] = {"held_out": held, "resume": options.resume, "memory_limit": "6 GiB"}
    images = test.inputs[:100]
    first = {
        "stage": "dense",
        "parameters": sum(p.numel() for p in dense.parameters()),
        "test accuracy": measure(dense, test.inputs, test.labels),
    }
    lines = [first]
    stages: list[tuple[str, str, dict[str, Any]]] = [
        ("shallowing", "shallowing", {"units": options.units, "finish": tune}),
        ("ldrf", "ldrf", {"channels": options.channels}),
        (options.method, options.method, {"sparsity": options.sparsity, "finish": tune}),
    ]
    current: Any = dense
    for name, method, settings in stages:
        current = nettrim.prune(current, batches, method, out_dir=options.out / name, **settings, **common)
        if name == "shallowing":
            lines[0]["multiply-adds"] = current.ledger.costs["dense"]["multiply_adds"]
        lines.append(line(name, current, dense, test, images))
        print(json.dumps(lines[-1]), flush=True)
        places = ("data", "weights", "out", "resume")
        about = {key: str(value) for key, value in vars(options).items() if key not in places} | describe_place()
        (options.out / "composed.json").write_text(json.dumps({"about": about, "stages": lines}, indent=1) + "\n")
    for name, *_ in stages:
        found = nettrim.verify(options.out / name)
        print(f"verify {name}: {found.checked} figures, {'all hold' if found.holds else found.failures}")


if __name__ == "__main__":
    main()
