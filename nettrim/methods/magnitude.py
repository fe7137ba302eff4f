"""Magnitude pruning: the smallest weights of each layer go, nothing is adjusted. The baseline of every table."""

from __future__ import annotations

import time
from dataclasses import dataclass

from nettrim.methods.base import LayerResult, LayerTask
from nettrim.methods.masks import keep_largest


@dataclass(frozen=True)
class Magnitude:
    """One-shot, layer-wise magnitude pruning to an exact count: Han et al., 2015, without its retraining."""

    name: str = "magnitude"
    amounts: tuple[str, ...] = ("sparsity", "kept")

    def prune_layer(self, task: LayerTask) -> LayerResult:
        """Keep the largest weights."""
        began = time.monotonic()
        mask = keep_largest(task.weight.abs(), task.kept)
        weight = task.weight.where(mask, 0.0)
        return LayerResult(weight, task.bias, time.monotonic() - began)
