"""Magnitude pruning: the smallest weights of each layer go, nothing is adjusted. The baseline of every table.

Han, Pool, Tran, Dally, "Learning both Weights and Connections for Efficient Neural Networks", NIPS 2015, without its
retraining.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

from nettrim.methods.base import LayerResult, LayerTask
from nettrim.methods.fit import check_task, refit
from nettrim.methods.masks import keep_largest, keep_pattern


@dataclass(frozen=True)
class Magnitude:
    """One-shot, layer-wise magnitude pruning to an exact count, or to N:M.

    Parameters
    ----------
    refit : bool
        Fit the weights that stay, and the bias, to the dense network's outputs by least squares. By default nothing
        that stays is changed.
    """

    refit: bool = False
    name: str = "magnitude"
    amounts: tuple[str, ...] = ("sparsity", "kept", "pattern")

    def needs(self) -> str:
        """Return "weight", or with `refit` "moments"."""
        return "moments" if self.refit else "weight"

    def prune_layer(self, task: LayerTask) -> LayerResult:
        """Keep the largest weights; of equal ones the earlier.

        Raises
        ------
        ProblemError
            The pattern does not divide the rows; with `refit`, the inputs have no finite Gram matrix.
        """
        began = time.monotonic()
        check_task(task, self.needs())
        scores = task.weight.abs()
        mask = keep_pattern(scores, task.pattern) if task.pattern else keep_largest(scores, task.kept)
        weight, bias = refit(task, mask) if self.refit else (task.weight.where(mask, 0.0), task.bias)
        return LayerResult(weight, bias, time.monotonic() - began)
