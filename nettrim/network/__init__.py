"""A torch model as a chain of prunable layers: traced, run, edited and trained. Knows no optimisation."""

from nettrim.network.calibrate import Batch, Recorded, outputs, read_batches, record
from nettrim.network.edit import (
    double_copy,
    evaluating,
    find_linear,
    frozen_copy,
    layer_arrays,
    write_layer,
)
from nettrim.network.trace import LayerGraph, LayerSpec, trace
from nettrim.network.training import train

__all__ = [
    "Batch",
    "LayerGraph",
    "LayerSpec",
    "Recorded",
    "double_copy",
    "evaluating",
    "find_linear",
    "frozen_copy",
    "layer_arrays",
    "outputs",
    "read_batches",
    "record",
    "trace",
    "train",
    "write_layer",
]
