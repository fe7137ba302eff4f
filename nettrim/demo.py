"""The demonstration: a small network trained on embedded data, pruned both ways, promised beside measured."""

from __future__ import annotations

import importlib
import shutil
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from nettrim.core.problem import check_amount, check_seed
from nettrim.data import load
from nettrim.errors import MissingExtraError, RunError
from nettrim.network.training import train
from nettrim.pipeline.prune import prune
from nettrim.pipeline.records import Ledger
from nettrim.pipeline.schedule import SCHEDULES
from nettrim.report.plots import plot_ledgers

_MARK = ".nettrim-demo"


@dataclass(frozen=True)
class Demo:
    """What the demonstration made: a ledger for each schedule, its run directories and its picture."""

    ledgers: dict[str, Ledger]
    directories: dict[str, Path]
    picture: Path


def demo_network() -> nn.Module:
    """Return the untrained network: 64-128-64-10, ReLU and dropout between."""
    return nn.Sequential(
        OrderedDict(
            fc1=nn.Linear(64, 128), relu1=nn.ReLU(), drop1=nn.Dropout(0.2),
            fc2=nn.Linear(128, 64), relu2=nn.ReLU(), drop2=nn.Dropout(0.2),
            fc3=nn.Linear(64, 10),
        )
    )  # fmt: skip


def run_demo(out: str | Path, epsilon: float = 0.1, seed: int = 0, progress: bool = True) -> Demo:
    """Train on the digits of scikit-learn, prune in parallel and in cascade, and draw the picture.

    Parameters
    ----------
    out : path
        Gets one run directory for each schedule, and ``demo.png``. Those of an earlier demonstration are replaced,
        which a file ``.nettrim-demo`` beside them tells from anybody else's.
    epsilon : float
        Relative radius of every layer.
    seed : int
        From -2**63 to 2**64 - 1.
    progress : bool

    Raises
    ------
    ProblemError
        `epsilon` or `seed` is out of range.
    RunError
        `out` holds something of these names that no demonstration made, or cannot be written.
    MissingExtraError
        scikit-learn or matplotlib is not installed.
    """
    # whatever can be refused is refused first: an earlier demonstration is lost only to one that goes through
    epsilon, seed = check_amount("epsilon", epsilon), check_seed(seed)
    data = load("digits")
    _require_matplotlib()
    directories = {schedule: Path(out) / schedule for schedule in SCHEDULES}
    picture = Path(out) / "demo.png"
    _make_room(Path(out), list(directories.values()), picture)
    assert data.test is not None and data.train.labels is not None
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = demo_network()
    train(model, data.train.inputs, data.train.labels, epochs=60, seed=seed, progress=progress)
    ledgers = {
        schedule: prune(
            model,
            [(data.train.inputs, data.train.labels)],
            epsilon=epsilon,
            schedule=schedule,
            held_out=[(data.test.inputs, data.test.labels)],
            out_dir=directory,
            progress=progress,
            seed=seed,
        ).ledger
        for schedule, directory in directories.items()
    }
    plot_ledgers(ledgers, picture)
    return Demo(ledgers, directories, picture)


def _require_matplotlib() -> None:
    try:
        importlib.import_module("matplotlib.figure")
    except ImportError as error:
        raise MissingExtraError("the demonstration needs matplotlib: pip install 'nettrim[demo]'.") from error


def _make_room(out: Path, directories: list[Path], picture: Path) -> None:
    """Delete the run directories of an earlier demonstration and mark `out`, or refuse to touch somebody else's."""
    mark = out / _MARK
    try:
        for directory in directories:
            if not directory.exists() and not directory.is_symlink():
                continue
            if directory.is_symlink() or not (directory / "run.json").is_file():
                raise RunError(f"{directory} is there and is no run directory: choose another --out.")
            if not mark.is_file():
                raise RunError(f"{directory} is a run that no demonstration made: choose another --out.")
        if picture.exists() and not mark.is_file():
            raise RunError(f"{picture} is there and no demonstration made it: choose another --out.")
        out.mkdir(parents=True, exist_ok=True)
        mark.write_text("nettrim demo made the run directories beside this file, and replaces them when run again.\n")
        for directory in directories:
            if directory.exists():
                shutil.rmtree(directory)
    except OSError as error:
        raise RunError(f"{error.filename or out} cannot be written: {error.strerror or error}.") from error
