"""``nettrim prune``: its options, and what they come to."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

from nettrim.cli_compare import read_sparsity
from nettrim.cli_network import add_network_options, batches_of, check_numbers, network_options, read_forms
from nettrim.data import load
from nettrim.errors import ProblemError
from nettrim.loading import load_model
from nettrim.methods import METHODS, Method, NetTrim
from nettrim.pipeline.budget import Overall
from nettrim.pipeline.finish import FINISHES
from nettrim.pipeline.prune import prune
from nettrim.pipeline.result import PruneResult
from nettrim.pipeline.schedule import SCHEDULES


def add_prune_arguments(cut: argparse.ArgumentParser) -> None:
    """Add the options of ``nettrim prune``."""
    cut.add_argument(
        "--model",
        required=True,
        metavar="MODULE:FACTORY",
        help="a function that returns the network: package.module:name or path/file.py:name; or an archive FILE.pt2",
    )
    cut.add_argument("--weights", metavar="FILE.safetensors", help="load the network's weights from here")
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
    amount.add_argument("--tolerance", type=_amount, help="of l-obs and obs: remove while the error is below it")
    cut.add_argument("--schedule", default="cascade", help=f"{' or '.join(SCHEDULES)}; default %(default)s")
    cut.add_argument("--layers", default="all", help="names, globs or classes, comma-separated; default all")
    cut.add_argument("--ignore", default="", help="names, globs or classes, comma-separated")
    cut.add_argument("--residual", default="own", help="fit a branch to its own outputs, or to what its sum lacks: sum")
    add_network_options(cut)
    trim = cut.add_argument_group("of net-trim")
    trim.add_argument("--form", help="ball or halfspace")
    trim.add_argument("--forms", type=read_forms, metavar="NAME=FORM,...", help="of single layers; linear too")
    trim.add_argument("--gamma", type=float, help="γ of the cascade")
    trim.add_argument("--rule", dest="cascade", help="radius in cascade: relative or paper")
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
    cut.add_argument("--finish", help=f"train on afterwards: {', '.join(FINISHES)}")
    cut.add_argument("--out", required=True, metavar="DIR", help="run directory")
    cut.add_argument("--resume", action="store_true", help="go on with the run in --out")
    cut.add_argument("--jobs", type=int, help="worker processes for the layers of a wave")
    cut.add_argument("--seed", type=int, default=0)


def run_prune(options: argparse.Namespace) -> PruneResult:
    """Read the network and the data, and prune."""
    method = _method(options)
    check_numbers(options)
    sparsity = _one_sparsity(options)
    model = load_model(options.model, options.weights)
    data = load(options.data, download=options.download)
    return prune(
        model,
        batches_of(data.train, options.samples),
        method,
        epsilon=options.epsilon,
        sparsity=sparsity,
        kept=options.kept,
        lam=options.lam,
        tolerance=options.tolerance,
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


def _method(options: argparse.Namespace) -> str | Method:
    """Return the method of that name, with the options of net-trim that were given."""
    names = ("form", "gamma", "cascade", "kappa", "bias", "solver", "tol", "max_seconds", "route", "swaps", "evidence")
    given = {name: getattr(options, name) for name in names if getattr(options, name) is not None}
    name: str = options.method
    if not given:
        return name
    if name != "net-trim":
        said = {"cascade": "rule", "evidence": "no-evidence"}
        flags = ", ".join("--" + said.get(key, key.replace("_", "-")) for key in given)
        raise ProblemError(f"{flags} given, which only net-trim reads, and the method is {name!r}: leave them out.")
    if options.swaps is not None and options.swaps < 0:
        raise ProblemError(f"--swaps {options.swaps} is out of range: at least 0.")
    return NetTrim(**given)


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
