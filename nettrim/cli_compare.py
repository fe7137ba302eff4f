"""`nettrim compare`: its options, the network that it trains where none is named, what it prints."""

from __future__ import annotations

import argparse
import json
import math
from collections import OrderedDict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save as to_bytes
from torch import nn

from nettrim.cli_network import add_network_options, network_options
from nettrim.data import Data
from nettrim.errors import ProblemError, RunError
from nettrim.loading import load_model
from nettrim.methods import METHODS, Pattern, Shrinks
from nettrim.network.batches import read_batches
from nettrim.network.calibrate import outputs
from nettrim.network.training import train
from nettrim.pipeline.budget import Overall
from nettrim.pipeline.compare import compare, plan_grid
from nettrim.pipeline.evaluate import accuracy
from nettrim.pipeline.files import digest_tensors, read_tensors, write_atomically
from nettrim.pipeline.finish import FINISHES
from nettrim.pipeline.rows import FILE, Comparison
from nettrim.pipeline.schedule import SCHEDULES
from nettrim.pipeline.store import require_free
from nettrim.report.comparison import comparison_table, plot_comparison, require_matplotlib

MODEL = "model.safetensors"
PICTURE = "compare.png"
#: of the network that is trained: so many epochs, and more where that is fewer steps than a small data set needs
_EPOCHS, _STEPS, _BATCH = 10, 2000, 64


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``nettrim compare``."""
    parser.add_argument(
        "--data", required=True, help="FILE.npz, mnist:DIR, cifar10:DIR or digits; its test split is held out"
    )
    parser.add_argument("--download", action="store_true", help="fetch mnist:DIR where the directory is absent")
    parser.add_argument(
        "--model",
        metavar="MODULE:FACTORY",
        help="a function that returns the network: package.module:name or path/file.py:name; or an archive "
        "FILE.pt2. Without it a network N-300-100-C with ReLU is trained on the training split, and kept in --out",
    )
    parser.add_argument("--weights", metavar="FILE.safetensors", help="load the weights of --model from here")
    # those that make the network smaller are asked for by name: not every network has channels or units to go
    made = {name: make() for name, make in METHODS.items()}
    takes = [name for name, m in made.items() if "sparsity" in m.amounts and not isinstance(m, Shrinks)]
    parser.add_argument(
        "--methods",
        type=_names,
        default=takes,
        metavar="NAME,NAME",
        help=f"default: {', '.join(takes)}; ldrf and shallowing make the network smaller, by that share of its weights",
    )
    parser.add_argument(
        "--sparsity",
        type=read_budgets,
        action="append",
        default=[],
        metavar="S,S",
        help="fractions of zeros such as 0.8,0.9 or patterns such as 2:4, comma-separated; for single layers "
        "NAME=S,NAME=S, with a semicolon between two of those: 'fc1=0.9,fc2=0.8;fc1=0.8,fc2=0.9'. May be repeated",
    )
    parser.add_argument(
        "--overall",
        type=_shares,
        default=[],
        metavar="S,S",
        help="fractions of zeros of all layers together, split over the layers by the data",
    )
    parser.add_argument(
        "--schedules",
        type=_names,
        default=["cascade"],
        metavar="NAME,NAME",
        help=f"{' and '.join(SCHEDULES)}, comma-separated; default cascade",
    )
    parser.add_argument("--layers", type=_names, help="names, globs or classes, comma-separated; default all")
    parser.add_argument("--ignore", type=_names, default=(), help="names, globs or classes, comma-separated")
    add_network_options(parser)
    parser.add_argument(
        "--finish",
        type=_names,
        default=["none"],
        metavar="HOW",
        help=f"train on after pruning, all rows alike: {', '.join(FINISHES)}; none,distill shows both; default none",
    )
    parser.add_argument(
        "--samples",
        type=int,
        default=10_000,
        metavar="P",
        help="calibration samples, the first P of the training split; default %(default)s",
    )
    parser.add_argument("--out", required=True, metavar="DIR", help=f"gets {FILE}, {PICTURE} and a trained {MODEL}")
    parser.add_argument("--resume", action="store_true", help="go on with the comparison in --out, or add rows to it")
    parser.add_argument("--seed", type=int, default=0)


def read_budgets(text: str) -> list[float | Pattern | dict[str, float | Pattern]]:
    """Read ``0.8,0.9``, ``2:4``, ``fc1=0.9,fc2=0.8``, or several of these with semicolons between.

    Raises
    ------
    ArgumentTypeError
        What the command line then shows as one line.
    """
    found: list[float | Pattern | dict[str, float | Pattern]] = []
    for part in text.split(";"):
        pieces = [piece.strip() for piece in part.split(",")]
        if "=" in part:
            named = [piece.rpartition("=") for piece in pieces]
            if not all(name for name, _, _ in named) or len({name for name, _, _ in named}) < len(named):
                raise argparse.ArgumentTypeError(
                    f"{part!r} does not give each layer one sparsity: write NAME=S,NAME=S, and numbers for all layers "
                    "after a semicolon"
                )
            found.append({name: read_sparsity(number) for name, _, number in named})
        else:
            found += [read_sparsity(piece) for piece in pieces]
    return found


def check_compare(options: argparse.Namespace) -> None:
    """Refuse what can be refused before the data are read."""
    if options.weights is not None and options.model is None:
        raise ProblemError(f"--weights {options.weights} needs --model, the function that makes the network for them.")
    if not options.sparsity and not options.overall:
        raise ProblemError("nothing to compare: give --sparsity, as in 0.8,0.9, or --overall.")
    require_matplotlib()
    directory = Path(options.out)
    if not (options.resume and any((directory / name).exists() for name in (FILE, MODEL))):
        require_free(directory)


def run_compare(options: argparse.Namespace, data: Data, calibration: list[Any], held_out: list[Any] | None) -> int:
    """Find or train the network, run the grid, print the table and draw the picture; return the exit code."""
    directory = Path(options.out)
    budgets = [budget for several in options.sparsity for budget in several]
    budgets += [Overall(share) for share in options.overall]
    grid = {"methods": options.methods, "budgets": budgets, "schedules": options.schedules}
    grid |= {
        "layers": options.layers or "all",
        "ignore": options.ignore,
        "finish": [None if how == "none" else how for how in options.finish],
    }
    shared = network_options(options)
    grid["on_unsupported"] = shared.pop("on_unsupported")
    trained, batches = None, read_batches(calibration)
    if options.model is not None:
        model = load_model(options.model, options.weights)
    else:
        model = _network(data, options.seed)
        plan_grid(model, batches, **grid)  # whatever is wrong with it is said before the training
        trained = _trained(model, data, directory, options.seed)
        if not options.json:
            print(_sentence(trained, directory), end="\n\n", flush=True)
    comparison = compare(
        model, batches, **grid, **shared, held_out=held_out, out_dir=directory, resume=True, seed=options.seed
    )
    picture = directory / PICTURE
    drawn = any(row.failure is None for row in comparison.rows)
    if drawn:
        plot_comparison(comparison, picture)
    if options.json:
        about = {"trained": trained, "directory": str(directory), "picture": str(picture) if drawn else None}
        print(json.dumps(comparison.as_dict() | about, indent=1, allow_nan=False))
    else:
        print(comparison_table(comparison))
        print(f"\npicture: {picture}" if drawn else "\nno picture: every row failed")
        print(f"figures: {directory / FILE}")
    return _code(comparison)


def _code(comparison: Comparison) -> int:
    return int(any(row.failure is not None or not row.certified for row in comparison.rows))


def _network(data: Data, seed: int) -> nn.Module:
    """Return the untrained network N-300-100-C."""
    labels = data.train.labels
    if labels is None:
        raise ProblemError(f"{data.name} has no labels, so no network can be trained on it: give one by --model.")
    classes = 1 + max(int(part.labels.max()) for part in (data.train, data.test) if part and part.labels is not None)
    if classes > len(labels):
        raise ProblemError(
            f"the labels of {data.name} go up to {classes - 1} and there are {len(labels)} rows to learn from: count "
            "the classes from 0."
        )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(
            OrderedDict(
                flatten=nn.Flatten(),
                fc1=nn.Linear(data.train.inputs[0].numel(), 300), relu1=nn.ReLU(),
                fc2=nn.Linear(300, 100), relu2=nn.ReLU(),
                fc3=nn.Linear(100, classes),
            )
        )  # fmt: skip


def _trained(model: nn.Module, data: Data, directory: Path, seed: int) -> dict[str, Any]:
    """Train the network in place, or take the weights that an earlier call trained, and return how it was done."""
    inputs, labels = data.train.inputs, data.train.labels
    assert labels is not None
    about: dict[str, Any] = {
        "network": [parameter.shape[1] for parameter in model.parameters() if parameter.dim() == 2],
        "data": digest_tensors({"inputs": inputs, "labels": labels}),
        "epochs": max(_EPOCHS, math.ceil(_STEPS / math.ceil(len(inputs) / _BATCH))),
        "seed": seed,
    }
    about["network"].append(next(reversed(list(model.parameters()))).shape[0])
    path = directory / MODEL
    if path.exists():
        return _taken(model, path, about)
    if (directory / FILE).exists():
        raise RunError(f"{directory} holds the comparison of a network that was given: give it again by --model.")
    train(model, inputs, labels, epochs=about["epochs"], batch_size=_BATCH, seed=seed, progress=True)
    about |= {"name": data.name, "rows": len(inputs)}
    about["accuracy"] = {
        split.name: accuracy(outputs(model, [split.inputs]), split.labels)
        for split in (data.train, data.test)
        if split is not None and split.labels is not None
    }
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunError(f"{directory} cannot be made: {error.strerror or error}.") from error
    write_atomically(path, to_bytes(dict(model.state_dict()), {"about": json.dumps({"trained": about})}))
    return about


def _taken(model: nn.Module, path: Path, wanted: dict[str, Any]) -> dict[str, Any]:
    """Load the weights that an earlier call trained, if it trained them in the same way."""
    tensors, about = read_tensors(path)
    found = about.get("trained")
    if not isinstance(found, dict):
        raise RunError(f"{path} was not trained here: name its network by --model, or use another directory.")
    differs = [key for key, value in wanted.items() if found.get(key) != value]
    if differs:
        raise RunError(
            f"{path} was trained on other terms ({', '.join(differs)}): resume with the same, or use another directory."
        )
    try:
        model.load_state_dict(tensors)
    except RuntimeError as error:
        raise RunError(f"{path} does not hold the weights that it says: {' '.join(str(error).split())}") from error
    model.eval()
    return found


def _sentence(trained: dict[str, Any], directory: Path) -> str:
    widths = "-".join(str(width) for width in trained["network"])
    right = ", ".join(f"{100 * share:.2f} % on the {split} split" for split, share in trained["accuracy"].items())
    return (
        f"the network {directory / MODEL}: {widths} with ReLU, trained on the {trained['rows']:,} training samples of "
        f"{trained['name']} ({trained['epochs']} epochs, seed {trained['seed']});\nright: {right}"
    )


def read_sparsity(text: str) -> float | Pattern:
    """Read ``0.9`` or ``2:4``.

    Raises
    ------
    ArgumentTypeError
        It is neither.
    """
    try:
        if ":" in text:
            keep, _, of = text.partition(":")
            return Pattern(int(keep), int(of))
        return float(text)
    except ProblemError as error:
        raise argparse.ArgumentTypeError(str(error).rstrip(".")) from error
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is no sparsity: write 0.9, 2:4 or NAME=0.9") from error


def _shares(text: str) -> list[float]:
    try:
        return [float(share) for share in _names(text)]
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is no fraction of zeros: write 0.9 or 0.9,0.95") from error


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]
