"""Batch-norm statistics, estimated anew on the pruned network: the cheapest way of training on, without any gradient.

Pruning changes the mean and the spread of what a batch norm reads, and its running statistics are still the dense
network's. One pass over the calibration samples in training mode, with cumulative averages, sets them right.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from nettrim.errors import ProblemError, UnsupportedError
from nettrim.network.batches import Batch, Batches
from nettrim.network.edit import evaluating
from nettrim.network.finishing import Finished
from nettrim.network.samples import forward, joined, moved, pieces
from nettrim.network.trace import Traced


@dataclass(frozen=True)
class Reestimate:
    """Re-estimate the running statistics of every batch norm; no weight changes, so pruned ones stay zero.

    Parameters
    ----------
    batch_size : int
        Samples that one set of statistics is taken over; their averages count alike, so a last batch of less than half
        that size is left out.

    Raises
    ------
    ProblemError
        `batch_size` is less than 2.
    """

    batch_size: int = 128
    name: str = "batch-norm"
    choose: str = "fixed"
    headroom: float = 1.0

    def __post_init__(self) -> None:
        """Refuse a size that has no spread."""
        if isinstance(self.batch_size, bool) or not isinstance(self.batch_size, int) or self.batch_size < 2:
            raise ProblemError(f"Reestimate's batch_size={self.batch_size!r} is out of range: give at least 2.")

    def run(
        self,
        model: nn.Module,
        teacher: nn.Module | None,
        inputs: Tensor | Batch | Batches,
        labels: Tensor | None,
        masks: Mapping[str, Tensor],
        targets: Mapping[str, int] | int | None = None,
        seed: int = 0,
        progress: bool = False,
        traced: Traced | None = None,
    ) -> Finished:
        """Set the statistics of `model` in place; of the other arguments, only `inputs` and `masks` are used.

        Raises
        ------
        UnsupportedError
            The model has no batch norm with running statistics.
        ProblemError
            There is only one sample. As whatever else the model raises, it leaves the statistics as they were.
        """
        began = time.monotonic()
        norms = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.running_mean is not None]
        if not norms:
            raise UnsupportedError("finish='batch-norm' needs a model with batch norms: leave finish out.")
        like = next(model.parameters())
        before = [(norm.momentum, copy.deepcopy(norm.state_dict())) for norm in norms]
        steps = 0
        with evaluating(model), torch.no_grad():
            try:
                for norm in norms:
                    norm.reset_running_stats()
                    norm.momentum = None  # a cumulative average
                    norm.train()
                for batch in pieces(joined(inputs), self.batch_size):
                    if len(batch) > 1 and (steps == 0 or 2 * len(batch) >= self.batch_size):
                        forward(model, moved(batch, like))
                        steps += 1
                if steps == 0:
                    raise ProblemError("finish='batch-norm' has one sample in batches, which has no spread: give more.")
            except BaseException:
                for norm, (_, state) in zip(norms, before, strict=True):
                    norm.load_state_dict(state)
                raise
            finally:
                for norm, (momentum, _) in zip(norms, before, strict=True):
                    norm.momentum = momentum
        return Finished(dict(masks), (), (), steps, 0, time.monotonic() - began)
