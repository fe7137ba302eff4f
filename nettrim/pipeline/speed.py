"""How much faster a smaller network runs than the dense one, on this machine."""

from __future__ import annotations

import torch
from torch import nn

from nettrim.network.costs import LatencyRatio, latency_ratio
from nettrim.network.modular import ProgramModule
from nettrim.pipeline.records import Ledger
from nettrim.pipeline.result import PruneResult

_SAMPLES = 64  # in the batch that is timed


def is_smaller(ledger: Ledger) -> bool:
    """Return whether channels or units are gone, and not merely zero."""
    costs = ledger.costs
    return bool(costs) and costs["pruned"]["weights"] < costs["dense"]["weights"]


def speed(dense: nn.Module, result: PruneResult) -> LatencyRatio | None:
    """Measure the latency of a result's module against the dense one's, by turns, on the first calibration samples.

    Where the result's module runs steps instead of the class's forward, so does what it is held against.

    Parameters
    ----------
    dense : nn.Module
        That was pruned.
    result : PruneResult

    Returns
    -------
    LatencyRatio or None
        None where the result is not smaller, has no samples stored, or is not on the CPU.
    """
    if result.account is None or not is_smaller(result.ledger):
        return None
    if isinstance(result.model, ProgramModule):
        dense = result.account.standing().steps()
    tensors = [tensor for model in (dense, result.model) for tensor in (*model.parameters(), *model.buffers())]
    if any(tensor.device != torch.device("cpu") for tensor in tensors):
        return None
    return latency_ratio(dense, result.model, result.account.batches.first(_SAMPLES))
