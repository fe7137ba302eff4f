"""LDRF against discard-and-reconstruct baselines: accuracy by the share of channels that stay, before fine-tuning.

    python -m benchmarks.model.ldrf_table --net vgg_w16 --data cifar10:DIR --weights DIR --out FILE.json

For every seed a network that was trained with that seed (`benchmarks.model.train_nets`, DIR/NET_seedS.safetensors), for
every share and method one run on the same calibration images, drawn by the seed. Methods are the same code with other
settings: "ls" is the choice of channels and the next layer's least squares (with the selectors lasso and thinet these
are He 2017 and ThiNet); "ldrf" adds the joint optimisation toward the embedding; "control" takes as many gradient steps
toward the next layer's outputs; "cut" fits nothing, and its rows say how much faster networks of these widths are.
FILE.json holds one row for each and is written after every run; what it holds is not run again. `--summary` prints the
tables that follow from it.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from tqdm import tqdm

from benchmarks.model.train_nets import make, measure
from nettrim import FineTune, Ldrf
from nettrim.data import Data, load
from nettrim.network.batches import Batch, Batches, read_batches
from nettrim.network.costs import costs_of, latency_ratio
from nettrim.network.reestimate import reinsert_norms
from nettrim.pipeline.account import Account
from nettrim.pipeline.files import describe_place
from nettrim.pipeline.layers import How
from nettrim.pipeline.narrow import narrow
from nettrim.pipeline.plan import Plan
from nettrim.pipeline.prune import module_of

SELECTORS = ("l1", "lasso", "random")
#: method -> settings but the selector
METHODS: dict[str, Callable[..., Ldrf]] = {
    "cut": Ldrf.cut,
    "ls": lambda **settings: Ldrf(**{**settings, "steps": 0}),
    "ldrf": Ldrf,
    "ldrf-response": lambda **settings: Ldrf(basis="response", energy=0.9, **settings),
    "core": lambda **settings: Ldrf(variant="core", **settings),
    "control": Ldrf.control,
}
#: method, selector
CELLS = (
    ("cut", "l1"),
    *(("ls", selector) for selector in (*SELECTORS, "energy", "thinet")),
    *(("ldrf", selector) for selector in SELECTORS),
    ("control", "l1"),
    ("ldrf-response", "l1"),
    ("core", "l1"),
)
#: those that are fine-tuned as well
TUNED = (("ls", "l1"), ("ls", "lasso"), ("ldrf", "l1"), ("ldrf", "lasso"), ("control", "l1"))

#: options that say where, not what
PLACES = ("data", "weights", "out", "summary")


def narrowed(
    model: nn.Module, batches: Batches, method: Ldrf, share: float, seed: int
) -> tuple[nn.Module, list[float], float]:
    """Return the smaller network, the relative error at every consumer, and the seconds that it took."""
    began = time.monotonic()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        plan = Plan.make(model, batches, method, "cascade", "all", (), {"channels": share})
        account = Account.of(model, plan.traced, batches, None, 8 * 2**30)
        standing = account.standing()
        layers, structure, *_ = narrow(plan, account, standing, How(None, 1, seed, False))
        small = module_of(model, standing.without(account.slimming(structure)))
    errors = [layer.facts["error_end"] for layer in layers if "channels_kept" in layer.facts]
    return small, errors, time.monotonic() - began


def faster(model: nn.Module, small: nn.Module, batch: Batch) -> dict[str, Any]:
    """Return how many times fewer multiply-adds the smaller network has, and how many times as fast it is."""
    fewer = costs_of(model, batch).multiply_adds / costs_of(small, batch).multiply_adds
    ratio = latency_ratio(model, small, batch)
    return {"fewer": fewer, "speed-up": ratio.speedup, "quartiles": ratio.quartiles}


def tuned(model: nn.Module, dense: nn.Module, images: Tensor, labels: Tensor, epochs: int, seed: int) -> nn.Module:
    """Fine-tune in place, without choosing an epoch: all alike."""
    settings = FineTune(epochs=epochs, validation=0.0, patience=None, learning_rate=1e-3)
    reinsert_norms(model, images)
    layers = {name: m for name, m in model.named_modules() if isinstance(m, (nn.Linear, nn.Conv2d))}
    masks = {name: torch.ones_like(layer.weight, dtype=torch.bool) for name, layer in layers.items()}
    settings.run(model.requires_grad_(True), dense, images, labels, masks, seed=seed)
    return model


def run(options: argparse.Namespace, data: Data) -> None:
    """Run every cell that the file does not hold yet."""
    rows: list[dict[str, Any]] = json.loads(options.out.read_text())["rows"] if options.out.exists() else []
    done = {(row["seed"], row["share"], row["method"], row["selector"]) for row in rows}
    train, test = data.train, data.test
    assert test is not None
    assert train.labels is not None
    assert test.labels is not None
    cells = [(s, f, *cell) for s in options.seeds for f in options.shares for cell in CELLS]
    pending = [cell for cell in cells if cell not in done and (not options.methods or cell[2] in options.methods)]
    for seed, share, method, selector in tqdm(pending, disable=None):
        model = make(options.net, seed)
        model.load_state_dict(load_file(options.weights / f"{options.net}_seed{seed}.safetensors"))
        chosen = torch.randperm(len(train.inputs), generator=torch.Generator().manual_seed(seed))[: options.samples]
        batches = read_batches([train.inputs[chosen]], memory_limit=2**30)
        effort = {} if method == "cut" else {"steps": options.steps, "learning_rate": options.rate}
        settings = METHODS[method](selector=selector, **effort)
        small, errors, seconds = narrowed(model.eval(), batches, settings, share, seed)
        row = {"seed": seed, "share": share, "method": method, "selector": selector, "seconds": seconds}
        row |= {"dense": measure(model, test.inputs, test.labels), "errors": errors}
        row |= {"accuracy": measure(small, test.inputs, test.labels)}
        if method == "cut":
            row |= faster(model, small, batches.first(64))  # all methods end with these shapes
        if options.epochs and (method, selector) in TUNED:
            count = options.tune_samples or len(train.inputs)
            tuned(small, model, train.inputs[:count], train.labels[:count], options.epochs, seed)
            row["tuned"] = measure(small, test.inputs, test.labels)
        rows.append(row)
        about = {key: str(value) for key, value in vars(options).items() if key not in PLACES} | describe_place()
        options.out.write_text(json.dumps({"about": about, "rows": rows}, indent=1) + "\n")


def _mean(rows: list[dict[str, Any]], key: str = "accuracy") -> float | None:
    values = [100 * row[key] for row in rows if key in row]
    return statistics.fmean(values) if values else None


def summary(rows: list[dict[str, Any]]) -> str:
    """Return the tables: accuracies, what is won back of the best baseline's loss, and the spread over selectors."""
    said = []
    dense = 100 * statistics.fmean({row["seed"]: row["dense"] for row in rows}.values())
    seeds = sorted({row["seed"] for row in rows})
    shares = sorted({row["share"] for row in rows}, reverse=True)
    said.append(f"dense {dense:.2f} %, seeds {seeds}; test accuracy, mean (least to most) over seeds")
    head = ["method", "selector", *(f"{100 * share:g} %" for share in shares)]
    said.append("| " + " | ".join(head) + " |\n|" + "---|" * len(head))
    for method, selector in dict.fromkeys((row["method"], row["selector"]) for row in rows):
        line = [method, selector]
        for share in shares:
            mine = [r for r in rows if (r["method"], r["selector"], r["share"]) == (method, selector, share)]
            found = [100 * row["accuracy"] for row in mine]
            after = _mean(mine, "tuned")
            text = f"{statistics.fmean(found):.2f} ({min(found):.1f} to {max(found):.1f})" if found else ""
            line.append(text + (f"; tuned {after:.2f}" if after is not None else ""))
        said.append("| " + " | ".join(line) + " |")
    for share in shares:
        here = [row for row in rows if row["share"] == share]
        for row in here:
            if "speed-up" in row:
                low, high = row["quartiles"]
                said.append(
                    f"{100 * share:g} %, seed {row['seed']}: {row['fewer']:.2f} times fewer multiply-adds, "
                    f"{row['speed-up']:.2f} times as fast (quartiles {low:.2f} to {high:.2f})"
                )
        won, controls, spreads, factored, losses = [], [], [], [], []
        for seed in seeds:
            mine = {(r["method"], r["selector"]): 100 * r["accuracy"] for r in here if r["seed"] == seed}
            ls = {selector: value for (method, selector), value in mine.items() if method == "ls"}
            own = {selector: value for (method, selector), value in mine.items() if method == "ldrf"}
            if not ls or not own:
                continue
            top = 100 * next(r["dense"] for r in here if r["seed"] == seed)
            loss = top - max(ls.values())
            losses.append(loss)
            if loss > 0:
                won.append((mine[("ldrf", "l1")] - max(ls.values())) / loss)
                factored.append((max(own.values()) - max(ls.values())) / loss)
                if ("control", "l1") in mine:
                    controls.append((mine[("control", "l1")] - max(ls.values())) / loss)
            both = [s for s in SELECTORS if s in ls and s in own]
            spreads.append([max(v[s] for s in both) - min(v[s] for s in both) for v in (ls, own)])
        if not won:
            continue
        said.append(
            f"{100 * share:g} %: the best baseline loses {statistics.fmean(losses):.2f} points; of that ldrf (l1) wins "
            f"back {100 * statistics.fmean(won):.0f} % ({', '.join(f'{100 * w:.0f}' for w in won)}), its best selector "
            f"{100 * statistics.fmean(factored):.0f} %, the control (l1) "
            f"{100 * statistics.fmean(controls) if controls else float('nan'):.0f} %; spread over selectors: least "
            f"squares {statistics.fmean(s[0] for s in spreads):.2f}, ldrf {statistics.fmean(s[1] for s in spreads):.2f}"
        )
    return "\n".join(said)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the cells, print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--net", help="of benchmarks.model.train_nets")
    parser.add_argument("--data", help="mnist:DIR or cifar10:DIR")
    parser.add_argument("--weights", type=Path, help="DIR with NET_seedS.safetensors")
    parser.add_argument("--out", required=True, type=Path, help="FILE.json")
    parser.add_argument("--shares", type=float, nargs="+", default=[0.5, 0.25, 0.125])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), help="only these")
    parser.add_argument("--samples", type=int, default=2000, help="calibration images")
    parser.add_argument("--steps", type=int, default=1000, help="gradient steps for each layer")
    parser.add_argument("--rate", type=float, default=1e-2, help="learning rate of these")
    parser.add_argument("--epochs", type=int, default=0, help="of fine-tuning, for the methods that are tuned")
    parser.add_argument("--tune-samples", type=int, default=0, help="training images of fine-tuning; 0 is all")
    parser.add_argument("--summary", action="store_true", help="only print what the file holds")
    options = parser.parse_args(arguments)
    if not options.summary:
        run(options, load(options.data))
    print(summary(json.loads(options.out.read_text())["rows"]))


if __name__ == "__main__":
    main()
