"""LeNet-300-100 with the weights that the authors of L-OBS published: the factory that the benchmarks prune.

The weights are read from ``$NETTRIM_DATA/lenet300-100`` (by default ``../shared/data``, beside the checkout).
They are stored as (inputs, outputs) and expect pixels in [0, 1].
"""

from __future__ import annotations

import os
from collections import OrderedDict
from pathlib import Path

import numpy as np
import torch
from torch import nn

DATA = Path(os.environ.get("NETTRIM_DATA", Path(__file__).resolve().parents[3] / "shared" / "data"))


def lenet_300_100(pruned_by_authors: bool = False) -> nn.Module:
    """Return the trained network, dense (98.39 % on MNIST's test images) or as its authors pruned it (96.64 %)."""
    folder = DATA / "lenet300-100" / ("pruned-by-authors" if pruned_by_authors else "")
    model = nn.Sequential(
        OrderedDict(
            flatten=nn.Flatten(),
            fc1=nn.Linear(784, 300), relu1=nn.ReLU(),
            fc2=nn.Linear(300, 100), relu2=nn.ReLU(),
            fc3=nn.Linear(100, 10),
        )
    )  # fmt: skip
    state = {}
    for i in (1, 2, 3):
        state[f"fc{i}.weight"] = torch.from_numpy(np.load(folder / f"w_layer{i}.npy").T.copy()).float()
        state[f"fc{i}.bias"] = torch.from_numpy(np.load(folder / f"b_layer{i}.npy").reshape(-1).copy()).float()
    model.load_state_dict(state)
    return model.eval()
