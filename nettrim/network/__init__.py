"""A torch model as a graph of prunable layers: observed, run, edited and trained. Knows no optimisation."""

from nettrim.network.batches import Batch, Batches, read_batches
from nettrim.network.calibrate import outputs
from nettrim.network.edit import double_copy, evaluating, find_weight, frozen_copy, write_state
from nettrim.network.trace import LayerGraph, LayerSpec, trace
from nettrim.network.training import train

__all__ = [
    "Batch",
    "Batches",
    "LayerGraph",
    "LayerSpec",
    "double_copy",
    "evaluating",
    "find_weight",
    "frozen_copy",
    "outputs",
    "read_batches",
    "trace",
    "train",
    "write_state",
]
