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


def reinsert_norms(model: nn.Module, inputs: Tensor | Batch | Batches, batch_size: int = 256) -> None:
    """Give every batch norm the statistics of what it reads now, and the scale and shift with which it does the same.

    Layers that were fitted anew behind folded batch norms have statistics that are still the dense network's: in
    training mode, where those of the batch are taken, the network would jump. With ``s = γ / √(σ² + ε)`` and the mean
    ``μ'`` and variance ``σ'²`` of its inputs, ``γ' = s √(σ'² + ε)`` and ``β' = β + s (μ' − μ)`` leave it as it is.

    Parameters
    ----------
    model : nn.Module
        Changed in place. Batch norms without running statistics, scale or shift stay.
    inputs : Tensor, Batch or Batches
    batch_size : int
        Samples that run at a time.
    """
    norms = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.running_mean is not None and m.affine]
    if not norms:
        return
    like = next(model.parameters())
    sums = {norm: torch.zeros(3, norm.num_features, dtype=torch.float64, device=like.device) for norm in norms}

    def note(norm: nn.Module, args: tuple[Tensor, ...]) -> None:
        rows = args[0].detach().double().transpose(0, 1).flatten(1)
        assert isinstance(norm, _BatchNorm)
        sums[norm] += torch.stack([torch.full_like(rows[:, 0], rows.shape[1]), rows.sum(1), rows.square().sum(1)])

    hooks = [norm.register_forward_pre_hook(note) for norm in norms]
    try:
        with evaluating(model), torch.no_grad():
            for batch in pieces(inputs if isinstance(inputs, Batches) else joined(inputs), batch_size):
                forward(model, moved(batch, like))
    finally:
        for hook in hooks:
            hook.remove()
    for norm, (count, total, squares) in sums.items():
        if not bool(count.all()):
            continue  # the forward passes it by
        mean = total / count
        variance = (squares / count - mean.square()).clamp(min=0)
        assert norm.running_mean is not None and norm.running_var is not None
        with torch.no_grad():
            scale = norm.weight.double() / (norm.running_var.double() + norm.eps).sqrt()
            norm.bias.copy_(norm.bias.double() + scale * (mean - norm.running_mean.double()))
            norm.weight.copy_(scale * (variance + norm.eps).sqrt())
            norm.running_mean.copy_(mean)
            norm.running_var.copy_(variance)
