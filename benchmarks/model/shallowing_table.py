"""Which units go: probes against random draws, magnitude, order, block influence and the opposite choice.

    python -m benchmarks.model.shallowing_table --net plain_w8 --data cifar10:DIR --weights DIR --out FILE.json

For every seed a network that was trained with that seed (`benchmarks.model.train_nets`, DIR/NET_seedS.safetensors). Its
units are probed on training images; then for every count of units that go and every choice the network without them is
measured at once, and again after the same recovery: the same images, epochs and settings for all, with the dense
network as teacher and, for some choices, with labels alone. FILE.json holds the probe curves and one
row for each and is written after every run; what it holds is not run again. `--summary` prints what follows from it.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from scipy.stats import spearmanr
from torch import Tensor, nn
from tqdm import tqdm

from benchmarks.model.train_nets import make, measure
from nettrim import FineTune
from nettrim.data import Data, load
from nettrim.methods.probes import ProbeCurve, probe
from nettrim.methods.unit_choice import accumulated_until, drawn, least, magnitude
from nettrim.network.batches import read_batches
from nettrim.network.features import block_influence, pooled_features
from nettrim.network.structure import Structure
from nettrim.network.units import Unit, find_units
from nettrim.pipeline.account import Account
from nettrim.pipeline.files import describe_place
from nettrim.pipeline.plan import Plan
from nettrim.pipeline.prune import module_of

NAMED = ("probe", "probe-loss", "accumulate", "magnitude", "reverse", "block-influence", "largest")
LABELLED = ("probe", "magnitude", "reverse")  # that are recovered without the teacher, too

#: options that say where, not what
PLACES = ("data", "weights", "out", "summary")


class Study:
    """One trained network, its units, and what they are worth."""

    def __init__(self, options: argparse.Namespace, data: Data, seed: int, stored: Mapping[str, Any] | None) -> None:
        train = data.train
        assert train.labels is not None
        self.model = make(options.net, seed)
        self.model.load_state_dict(load_file(options.weights / f"{options.net}_seed{seed}.safetensors"))
        self.model.eval()
        chosen = torch.randperm(len(train.inputs), generator=torch.Generator().manual_seed(seed))[: options.samples]
        batches = read_batches([(train.inputs[chosen], train.labels[chosen])], memory_limit=2**30)
        plan = Plan.make(self.model, batches, "shallowing", "cascade", "all", (), {"units": 1})
        self.account = Account.of(self.model, plan.traced, batches, None, 4 * 2**30)
        graph, dense = self.account.graph, self.account.dense
        self.units = find_units(graph, dense)
        if stored is None:
            features = pooled_features(graph, dense, batches, self.units)
            self.curve = probe(features, train.labels[chosen], seed=seed)
        else:
            self.curve = ProbeCurve.of_dict(stored)
        points = self.curve.points[1:]
        self.gains = {point.name: point.gain for point in points}
        self.worth = {
            "probe": self.gains,
            "probe-loss": {point.name: point.loss_gain for point in points},
            "largest": {name: -gain for name, gain in self.gains.items()},
            "magnitude": magnitude(graph, dense, self.units),
            "reverse": {unit.name: -float(place) for place, unit in enumerate(self.units)},
            "block-influence": block_influence(graph, dense, batches, self.units),
        }

    def going(self, choice: str, count: int) -> tuple[Unit, ...]:
        """Return the units that go."""
        if choice == "accumulate":
            heights = {point.name: point.score for point in self.curve.points}
            start = heights.pop(self.curve.points[0].name)
            return accumulated_until(self.units, heights, start, lambda found: len(found) >= count)
        draw = int(choice.removeprefix("random ")) if choice.startswith("random") else None
        worth = self.worth[choice] if draw is None else drawn(self.units, draw)
        return least(self.units, worth, lambda found: len(found) >= count)

    def without(self, going: Sequence[Unit]) -> nn.Module:
        """Return the network without some units."""
        structure = Structure(removed=tuple(unit.name for unit in going))
        return module_of(self.model, self.account.standing().without(self.account.slimming(structure)))


def recovered(
    model: nn.Module, teacher: nn.Module, images: Tensor, labels: Tensor, options: argparse.Namespace, mixing: float
) -> nn.Module:
    """Train in place: the same for all."""
    settings = FineTune(
        epochs=options.epochs,
        batch_size=32,  # many short steps: the images are few
        validation=0.0,
        patience=None,
        learning_rate=options.rate,
        mixing=mixing,
        temperature=4.0,
    )
    layers = {name: m for name, m in model.named_modules() if isinstance(m, (nn.Linear, nn.Conv2d))}
    masks = {name: torch.ones_like(layer.weight, dtype=torch.bool) for name, layer in layers.items()}
    settings.run(model.requires_grad_(True), teacher, images, labels, masks, seed=0)
    return model


def run(options: argparse.Namespace, data: Data) -> None:
    """Run every cell that the file does not hold yet."""
    found: dict[str, Any] = json.loads(options.out.read_text()) if options.out.exists() else {"curves": {}, "rows": []}
    done = {(row["seed"], row["count"], row["choice"]) for row in found["rows"]}
    train, test = data.train, data.test
    assert test is not None
    assert train.labels is not None
    assert test.labels is not None
    count_of = options.tune_samples
    choices = [*NAMED, *(f"random {draw}" for draw in range(options.draws))]
    bar = tqdm(total=len(options.seeds) * len(options.counts) * len(choices) - len(done), disable=None)
    for seed in options.seeds:
        cells = [(count, choice) for count in options.counts for choice in choices if (seed, count, choice) not in done]
        if not cells:
            continue
        study = Study(options, data, seed, found["curves"].get(str(seed)))
        found["curves"][str(seed)] = study.curve.as_dict()
        dense = measure(study.model, test.inputs, test.labels)
        known: dict[tuple[str, ...], dict[str, Any]] = {}  # two choices may be one network
        for count, choice in cells:
            going = study.going(choice, count)
            names = tuple(unit.name for unit in going)
            began = time.monotonic()
            row = {"seed": seed, "count": count, "choice": choice, "removed": list(names), "dense": dense}
            row["gain"] = sum(study.gains[name] for name in names)
            if names not in known:
                small = study.without(going)
                figures = {
                    "raw": measure(small, test.inputs, test.labels),
                    "parameters": sum(p.numel() for p in small.parameters()),
                }
                images, labels = train.inputs[:count_of], train.labels[:count_of]
                taught = recovered(small, study.model, images, labels, options, options.mixing)
                figures["taught"] = measure(taught, test.inputs, test.labels)
                known[names] = figures
            if choice in LABELLED and "labelled" not in known[names]:
                images, labels = train.inputs[:count_of], train.labels[:count_of]
                alone = recovered(study.without(going), study.model, images, labels, options, 0.0)
                known[names]["labelled"] = measure(alone, test.inputs, test.labels)
            found["rows"].append(row | known[names] | {"seconds": time.monotonic() - began})
            about = {key: str(value) for key, value in vars(options).items() if key not in PLACES} | describe_place()
            options.out.write_text(json.dumps({"about": about, **found}, indent=1) + "\n")
            bar.update()


def summary(found: dict[str, Any]) -> str:
    """Return the curves, accuracies by choice and count, and how they hang on the gains that went."""
    said = []
    for seed, stored in found["curves"].items():
        points = ProbeCurve.of_dict(stored).points
        said.append(f"seed {seed}: probes {' '.join(f'{100 * p.score:.1f}' for p in points)}")
        said.append(f"  gains {' '.join(f'{100 * p.gain:.1f}' for p in points[1:])}")
        said.append(f"  their standard errors {' '.join(f'{100 * p.gain_error:.1f}' for p in points[1:])}")
    rows = found["rows"]
    counts = sorted({row["count"] for row in rows})
    seeds = sorted({row["seed"] for row in rows})
    dense = 100 * statistics.fmean({row["seed"]: row["dense"] for row in rows}.values())
    said.append(f"dense {dense:.2f} %; test accuracy raw / recovered with teacher / with labels alone, mean of {seeds}")
    said.append("| choice | " + " | ".join(f"{count} units" for count in counts) + " |\n|" + "---|" * (1 + len(counts)))
    groups = [*NAMED, "random"]
    for group in groups:
        line = [group]
        for count in counts:
            mine = [r for r in rows if r["count"] == count and r["choice"].split(" ")[0] == group]
            if not mine:
                line.append("")
                continue
            figures = [100 * statistics.fmean(r[key] for r in mine) for key in ("raw", "taught")]
            text = " / ".join(f"{figure:.2f}" for figure in figures)
            labelled = [100 * r["labelled"] for r in mine if "labelled" in r]
            text += f" / {statistics.fmean(labelled):.2f}" if labelled and group != "random" else ""
            if group == "random":
                spread = [statistics.pstdev([100 * r["taught"] for r in mine if r["seed"] == s]) for s in seeds]
                text += f" (deviation {statistics.fmean(spread):.2f})"
            line.append(text)
        said.append("| " + " | ".join(line) + " |")
    for choice in ("probe", "accumulate", "probe-loss"):
        for count in counts:
            places, above = [], []
            for seed in seeds:
                here = [r for r in rows if (r["count"], r["seed"]) == (count, seed)]
                draws = [r["taught"] for r in here if r["choice"].startswith("random")]
                own = [r["taught"] for r in here if r["choice"] == choice]
                if draws and own:
                    places.append(sum(d < own[0] for d in draws) / len(draws))
                    above.append((own[0] - statistics.fmean(draws)) / (statistics.pstdev(draws) or 1.0))
            if places:
                said.append(
                    f"{choice}, {count} units: above {100 * statistics.fmean(places):.0f} % of the draws "
                    f"({', '.join(f'{100 * p:.0f}' for p in places)}), {statistics.fmean(above):+.2f} deviations from "
                    "their mean"
                )
    for count in counts:
        correlations = []
        for seed in seeds:
            draws = [r for r in rows if (r["count"], r["seed"]) == (count, seed)]
            once = {tuple(r["removed"]): r for r in draws}.values()
            if len(once) > 2:
                correlations.append(spearmanr([r["gain"] for r in once], [r["taught"] for r in once]).statistic)
        if correlations:
            said.append(
                f"{count} units: Spearman's correlation of removed gain and recovered accuracy "
                f"{statistics.fmean(correlations):+.2f} ({', '.join(f'{c:+.2f}' for c in correlations)})"
            )
    return "\n".join(said)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the cells, print what follows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--net", help="of benchmarks.model.train_nets")
    parser.add_argument("--data", help="cifar10:DIR")
    parser.add_argument("--weights", type=Path, help="DIR with NET_seedS.safetensors")
    parser.add_argument("--out", required=True, type=Path, help="FILE.json")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--counts", type=int, nargs="+", default=[2, 4, 6])
    parser.add_argument("--draws", type=int, default=10, help="random choices for each count")
    parser.add_argument("--samples", type=int, default=5000, help="images that units are judged on")
    parser.add_argument("--tune-samples", type=int, default=5000, help="training images of the recovery")
    parser.add_argument("--epochs", type=int, default=1, help="of the recovery")
    parser.add_argument("--rate", type=float, default=5e-3, help="learning rate of the recovery")
    parser.add_argument("--mixing", type=float, default=0.9, help="share of the teacher in the recovery's loss")
    parser.add_argument("--summary", action="store_true", help="only print what the file holds")
    options = parser.parse_args(arguments)
    if not options.summary:
        run(options, load(options.data))
    print(summary(json.loads(options.out.read_text())))


if __name__ == "__main__":
    main()
