"""The demonstration: a small network trained on embedded data, pruned both ways, promised beside measured."""

from __future__ import annotations

import shutil
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from nettrim.data import load
from nettrim.errors import RunError
from nettrim.network.training import train
from nettrim.pipeline.ledger import Ledger
from nettrim.pipeline.prune import prune
from nettrim.pipeline.schedule import SCHEDULES
from nettrim.report.plots import plot_ledgers


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
        Gets one run directory for each schedule, and ``demo.png``. Those of an earlier demonstration are replaced.
    epsilon : float
        Relative radius of every layer.
    seed : int
    progress : bool

    Raises
    ------
    RunError
        `out` holds something of these names that is no run directory, or cannot be written.
    MissingExtraError
        scikit-learn or matplotlib is not installed.
    """
    directories = {schedule: Path(out) / schedule for schedule in SCHEDULES}
    for directory in directories.values():
        if directory.exists():
            if not (directory / "run.json").is_file():
                raise RunError(f"{directory} is there and is no run directory: choose another --out.")
            shutil.rmtree(directory)
    data = load("digits")
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
    picture = Path(out) / "demo.png"
    plot_ledgers(ledgers, picture)
    return Demo(ledgers, directories, picture)
