"""The dense network on the samples of a run, and the ledger of any other network of the same layers against it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from nettrim.network.calibrate import Batch, Recorded, record
from nettrim.network.edit import double_copy, write_layer
from nettrim.network.trace import LayerGraph
from nettrim.pipeline.ledger import Activations, LayerEvidence, Ledger, build_ledger
from nettrim.pipeline.store import Samples


@dataclass(frozen=True, eq=False)
class Account:
    """What every figure is measured against.

    Attributes
    ----------
    graph : LayerGraph
    dense : nn.Module
        In float64.
    calibration : list of Batch
    clean : dict of str to Recorded
        Inputs and outputs of every layer of the dense network.
    samples : Samples
        The calibration rows that enter the first layer, and their labels.
    held : list of Batch or None
    clean_held : dict of str to Recorded
    held_samples : Samples or None
    """

    graph: LayerGraph
    dense: nn.Module
    calibration: list[Batch]
    clean: dict[str, Recorded]
    samples: Samples
    held: list[Batch] | None
    clean_held: dict[str, Recorded]
    held_samples: Samples | None

    @staticmethod
    def of(
        model: nn.Module, graph: LayerGraph, calibration: list[Batch], held: list[Batch] | None, progress: bool
    ) -> Account:
        """Run the dense network on the samples."""
        dense, first = double_copy(model), graph.names[0]
        clean = record(dense, calibration, graph.names, progress=progress)
        samples = _samples("calibration", calibration, clean[first].inputs)
        clean_held, held_samples = {}, None
        if held is not None:
            clean_held = record(dense, held, graph.names, progress=progress)
            held_samples = _samples("held-out", held, clean_held[first].inputs)
        return Account(graph, dense, calibration, clean, samples, held, clean_held, held_samples)

    def ledger(
        self,
        method: str,
        schedule: str,
        model: nn.Module,
        layers: list[LayerEvidence],
        finish: dict[str, Any] | None = None,
        before: Ledger | None = None,
    ) -> Ledger:
        """Return the ledger of a network with these layers; `finish` and `before` are of one that was trained on."""
        twin = double_copy(model)
        after = record(twin, self.calibration, self.graph.names)
        held_out = None
        if self.held is not None and self.held_samples is not None:
            after_held = record(twin, self.held, self.graph.names)
            held_out = (
                _activations("held-out", self.clean_held),
                _activations("held-out", after_held),
                self.held_samples.labels,
            )
        return build_ledger(
            method,
            schedule,
            layers,
            _activations("calibration", self.clean),
            _activations("calibration", after),
            self._ladder(layers, after),
            self.samples.labels,
            held_out,
            finish,
            before,
        )

    def _ladder(self, layers: list[LayerEvidence], after: dict[str, Recorded]) -> list[Tensor]:
        """Return the output with 0, 1, … of the pruned layers in place; first and last are known already."""
        last = self.graph.names[-1]
        rungs = [self.clean[last].outputs]
        step = double_copy(self.dense)
        pruned = [layer for layer in layers if layer.pruned]
        for layer in pruned[:-1]:
            write_layer(step, layer.name, layer.weight, layer.bias)
            rungs.append(record(step, self.calibration, [last])[last].outputs)
        rungs.append(after[last].outputs)
        return [rung.clamp(min=0) for rung in rungs] if self.graph.layers[-1].relu else rungs


def _activations(split: str, recorded: dict[str, Recorded]) -> Activations:
    return Activations(split, [r.inputs for r in recorded.values()], [r.outputs for r in recorded.values()])


def _samples(name: str, batches: list[Batch], rows: Tensor) -> Samples:
    labels = None
    if batches[0].labels is not None:
        labels = torch.cat([batch.labels for batch in batches if batch.labels is not None])
        if labels.dim() != 1 or labels.shape[0] != rows.shape[0] or labels.is_floating_point():
            labels = None  # not class indices of the rows: accuracy has no meaning
    return Samples(name, rows, labels)
