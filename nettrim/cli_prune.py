"""``nettrim prune``: its options, and what they come to."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from nettrim.cli_compare import read_sparsity
from nettrim.cli_network import add_network_options, batches_of, check_numbers, network_options, read_forms
from nettrim.data import load
from nettrim.errors import ProblemError
from nettrim.loading import load_model
from nettrim.methods import METHODS, Ldrf, Method, NetTrim, Shallowing, Shrinks, make_method
from nettrim.methods.channel_selection import SELECTORS
from nettrim.methods.probes import ProbeCurve
from nettrim.methods.shallowing import CHOICES
from nettrim.network.costs import LatencyRatio
from nettrim.pipeline.budget import Overall
from nettrim.pipeline.finish import FINISHES
from nettrim.pipeline.prune import prune
from nettrim.pipeline.result import PruneResult, load_result
from nettrim.pipeline.schedule import SCHEDULES
from nettrim.pipeline.speed import speed
from nettrim.report.comparison import require_matplotlib
from nettrim.report.probes import plot_probes

#: method to what makes it, and the options that are its settings
_SETTINGS: dict[str, tuple[Callable[..., Method | Shrinks], tuple[str, ...]]] = {
    "net-trim": (
        NetTrim,
        ("form", "gamma", "rule", "kappa", "bias", "solver", "tol", "max_seconds", "route", "swaps", "evidence"),
    ),
    "ldrf": (Ldrf, ("selector", "steps", "target", "allocate")),
    "shallowing": (Shallowing, ("choice", "rule")),
}


def add_prune_arguments(cut: argparse.ArgumentParser) -> None:
    """Add the options of ``nettrim prune``."""
    cut.add_argument(
        "--model",
        metavar="MODULE:FACTORY",
        help="a function that returns the network: package.module:name or path/file.py:name; or an archive FILE.pt2",
    )
    cut.add_argument("--weights", metavar="FILE.safetensors", help="load the network's weights from here")
    cut.add_argument(
        "--from",
        dest="start",
        metavar="DIR",
        help="in place of --model: go on with the network of a finished run, batch norms folded; the ledger joins the "
        "evidence of both",
    )
    cut.add_argument(
        "--data", required=True, help="FILE.npz, mnist:DIR, cifar10:DIR or digits; its test split is held out"
    )
    cut.add_argument("--download", action="store_true", help="fetch mnist:DIR where the directory is absent")
    cut.add_argument(
        "--samples",
        type=int,
        default=10_000,
        metavar="P",
        help="calibration samples, the first P of the training split; default %(default)s",
    )
    cut.add_argument("--method", default="net-trim", help=f"{', '.join(METHODS)}; default %(default)s")
    amount = cut.add_argument_group("amount: exactly one, a number or NAME=NUMBER,NAME=NUMBER for single layers")
    amount.add_argument("--epsilon", type=_amount, help="relative radius of each layer")
    amount.add_argument("--sparsity", type=_sparsity, help="fraction of zeros of each layer, or N:M such as 2:4")
    amount.add_argument("--overall", type=float, help="fraction of zeros of all layers together, split by the data")
    amount.add_argument("--kept", type=_amount, help="number of weights that stay in each layer")
    amount.add_argument("--lam", type=_amount, help="lambda of the regularised program")
    amount.add_argument(
        "--tolerance",
        type=_amount,
        help="of l-obs and obs: remove while the error is below it; of shallowing: the gain that a unit has to have",
    )
    amount.add_argument("--channels", type=_amount, help="of ldrf: fraction of channels that stays; unnamed keep all")
    amount.add_argument("--macs", type=float, help="of ldrf: fraction of the network's multiply-adds that stays")
    amount.add_argument("--units", type=int, help="of shallowing: how many layers or residual blocks go")
    cut.add_argument("--schedule", default="cascade", help=f"{' or '.join(SCHEDULES)}; default %(default)s")
    cut.add_argument("--layers", default="all", help="names, globs or classes, comma-separated; default all")
    cut.add_argument("--ignore", default="", help="names, globs or classes, comma-separated")
    cut.add_argument("--residual", default="own", help="fit a branch to its own outputs, or to what its sum lacks: sum")
    add_network_options(cut)
    trim = cut.add_argument_group("of net-trim")
    trim.add_argument("--form", help="ball or halfspace")
    trim.add_argument("--forms", type=read_forms, metavar="NAME=FORM,...", help="of single layers; linear too")
    trim.add_argument("--gamma", type=float, help="γ of the cascade")
    trim.add_argument("--rule", help="radius in cascade: relative or paper; of shallowing: gain or accumulate")
    trim.add_argument("--kappa", type=float, help="risk factor of the last layer")
    trim.add_argument("--bias", help="free, penalised or frozen")
    trim.add_argument("--solver", help="a name in `nettrim info`")
    trim.add_argument("--tol", type=float, help="relative duality gap")
    trim.add_argument("--route", help="to a number of weights: refined or reweighted")
    trim.add_argument("--swaps", type=int, help="rounds of swaps of the refinement")
    trim.add_argument(
        "--no-evidence",
        dest="evidence",
        action="store_false",
        default=None,
        help="beside a number of weights, solve no convex program for the bound",
    )
    trim.add_argument("--max-seconds", type=float, help="for each layer")
    narrow = cut.add_argument_group("of ldrf and shallowing")
    narrow.add_argument("--selector", help=f"which channels stay: {', '.join(SELECTORS)}")
    narrow.add_argument("--steps", type=int, help="gradient steps for each layer; 0 is the least-squares baseline")
    narrow.add_argument("--target", help="what the steps fit: embedding or outputs")
    narrow.add_argument("--allocate", help="how a budget is split: uniform or capacity")
    narrow.add_argument("--choice", help=f"which units go: {', '.join(CHOICES)}")
    narrow.add_argument("--picture", metavar="FILE", help="draw the probes of the units: .png, .svg or .pdf")
    cut.add_argument("--finish", help=f"train on afterwards: {', '.join(FINISHES)}")
    cut.add_argument("--out", required=True, metavar="DIR", help="run directory")
    cut.add_argument("--resume", action="store_true", help="go on with the run in --out")
    cut.add_argument("--jobs", type=int, help="worker processes for the layers of a wave")
    cut.add_argument("--seed", type=int, default=0)


def run_prune(options: argparse.Namespace) -> tuple[PruneResult, LatencyRatio | None]:
    """Read the network and the data, and prune; measure the latency of a network that is smaller."""
    method = _method(options)
    check_numbers(options)
    sparsity = _one_sparsity(options)
    _check_start(options)
    if options.picture is not None:
        _check_picture(options, method)
    model = load_model(options.model, options.weights) if options.start is None else load_result(options.start)
    data = load(options.data, download=options.download)
    result = prune(
        model,
        batches_of(data.train, options.samples),
        method,
        epsilon=options.epsilon,
        sparsity=sparsity,
        kept=options.kept,
        lam=options.lam,
        tolerance=options.tolerance,
        channels=options.channels,
        macs=options.macs,
        units=options.units,
        schedule=options.schedule,
        finish=options.finish,
        layers="all" if options.layers == "all" else options.layers.split(","),
        ignore=[name for name in options.ignore.split(",") if name],
        held_out=None if data.test is None else batches_of(data.test, len(data.test.inputs)),
        out_dir=options.out,
        resume=options.resume,
        executor=options.jobs,
        seed=options.seed,
        forms=options.forms,
        residual=options.residual,
        **network_options(options),
    )
    if options.picture is not None:
        plot_probes(ProbeCurve.of_dict(result.about["probes"]), options.picture)
    return result, speed(model.model if isinstance(model, PruneResult) else model, result)


def _check_start(options: argparse.Namespace) -> None:
    """Refuse two networks to start from, or none."""
    if options.start is None and options.model is None:
        raise ProblemError("no network is given: name one by --model, or a finished run by --from.")
    given = [f"--{name} {value}" for name in ("model", "weights") if (value := getattr(options, name)) is not None]
    if options.start is not None and given:
        raise ProblemError(f"--from {options.start} has its network, and {' and '.join(given)} given: leave one out.")


def _check_picture(options: argparse.Namespace, method: str | Method | Shrinks) -> None:
    """Refuse a picture of probes that nobody trains, or that cannot be drawn."""
    made = make_method(method)
    if not (isinstance(made, Shallowing) and made.probes):
        raise ProblemError(f"--picture {options.picture} draws probes, and --method {options.method} trains none here.")
    require_matplotlib()
    path = Path(options.picture).absolute()
    if path.is_dir() or not path.parent.is_dir():
        raise ProblemError(f"--picture {options.picture} is a directory, or lies in none: name a file.")


def _method(options: argparse.Namespace) -> str | Method | Shrinks:
    """Return the method of that name, with its options that were given."""
    name: str = options.method
    make, own = _SETTINGS.get(name, (None, ()))
    names = dict.fromkeys(flag for _, flags in _SETTINGS.values() for flag in flags)
    given = {flag: getattr(options, flag) for flag in names if getattr(options, flag) is not None}
    foreign = [flag for flag in given if flag not in own]
    if foreign:
        readers = [other for other, (_, flags) in _SETTINGS.items() if foreign[0] in flags]
        said = {"evidence": "no-evidence"}
        flags = ", ".join("--" + said.get(flag, flag.replace("_", "-")) for flag in foreign)
        read = f"{' and '.join(readers)} read{'s' if len(readers) == 1 else ''}"
        raise ProblemError(f"{flags} given, which only {read}, and the method is {name!r}: leave them out.")
    if make is None or not given:
        return name
    if options.swaps is not None and options.swaps < 0:
        raise ProblemError(f"--swaps {options.swaps} is out of range: at least 0.")
    if name == "net-trim" and "rule" in given:
        given["cascade"] = given.pop("rule")
    return make(**given)


def _one_sparsity(options: argparse.Namespace) -> Any:
    """Return what --sparsity or --overall says."""
    if options.overall is None:
        return options.sparsity
    if options.sparsity is not None:
        raise ProblemError(f"--sparsity and --overall {options.overall:g} are both given: give one amount.")
    return Overall(options.overall)


def _sparsity(text: str) -> Any:
    """Read ``0.9``, ``2:4`` or ``fc1=0.9,fc2=2:4``."""
    return _read_each(text, read_sparsity)


def _amount(text: str) -> Any:
    """Read ``0.1`` or ``fc1=0.1,fc2=0.2``."""

    def read(number: str) -> float:
        try:
            return float(number)
        except ValueError as error:
            raise argparse.ArgumentTypeError(f"{number!r} is no number: write 0.1 or NAME=0.1,NAME=0.2") from error

    return _read_each(text, read)


def _read_each(text: str, read: Callable[[str], Any]) -> Any:
    if "=" not in text:
        return read(text)
    parts = [part.strip().rpartition("=") for part in text.split(",")]
    names = [name for name, _, _ in parts]
    if not all(names) or len(set(names)) < len(names):
        raise argparse.ArgumentTypeError(f"{text!r} does not give each layer one number: write NAME=NUMBER,NAME=NUMBER")
    return {name: read(number) for name, _, number in parts}
