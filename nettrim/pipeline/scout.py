"""A quick look ahead: what a network pruned to given counts will look like, before any layer is pruned for good.

Layer after layer in cascade, on some of the samples, a support by ``ℓ0``-ADMM and least squares on it: seconds, where
the real thing takes minutes. Two questions are answered from it. *What will the next layers need of this one?* The
dense network does not tell: of its 100 units a last layer with 30 weights reads 30 at the most, and an error in the
others costs nothing. *How should a number of weights be spread over the layers?* The error at the scout's output tells.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from nettrim.core.l0 import Spectrum, l0_support
from nettrim.core.linalg import gram
from nettrim.core.refine import neuron_importance
from nettrim.core.support import refit_linear
from nettrim.methods.base import with_bias_column
from nettrim.network.calibrate import Batch, Recorded, record
from nettrim.network.edit import double_copy, layer_arrays, write_layer
from nettrim.network.metric import error_metrics
from nettrim.network.trace import LayerGraph


@dataclass(frozen=True, eq=False)
class Scout:
    """The dense network on the samples that the look ahead is taken on.

    Attributes
    ----------
    dense : nn.Module
        In float64.
    graph : LayerGraph
    batches : list of Batch
    clean : dict of str to Recorded
        Of every layer of the dense network.
    metrics : dict of str to Tensor (M, M)
        How errors of each layer count at the dense network's output.
    seed : int
    spectra : dict of str to Spectrum
        Of the first layer, once it is known.
    """

    dense: nn.Module
    graph: LayerGraph
    batches: list[Batch]
    clean: dict[str, Recorded]
    metrics: dict[str, Tensor]
    seed: int
    spectra: dict[str, Spectrum] = field(default_factory=dict)

    @staticmethod
    def of(dense: nn.Module, graph: LayerGraph, batches: Sequence[Batch], rows: int, seed: int) -> Scout:
        """Take `rows` samples, evenly spread."""
        few = thinned(batches, rows)
        return Scout(
            dense, graph, few, record(dense, few, graph.names), error_metrics(dense, graph.layers, few, seed), seed
        )

    def prune(self, kept: Mapping[str, int], metrics: Mapping[str, Tensor], growth: float) -> nn.Module:
        """Return the network with as many weights as `kept` says, quickly; `growth` is that of ``ρ``."""
        model = double_copy(self.dense)
        for name, count in kept.items():
            weight, bias = layer_arrays(self.dense, name)
            inputs, outputs = record(model, self.batches, [name])[name].inputs, self.clean[name].outputs
            start = weight
            if bias is not None:
                inputs, start = with_bias_column(inputs), torch.cat([weight, bias[:, None]], dim=1)
            free = torch.zeros(start.shape[1], dtype=torch.bool, device=start.device)
            free[weight.shape[1] :] = True
            moments, cross = gram(inputs), inputs.T @ outputs
            if name not in self.spectra:
                spectrum = Spectrum.of(moments, torch.float32)
                if name == self.graph.names[0]:  # whatever is pruned, its inputs stay
                    self.spectra[name] = spectrum
            else:
                spectrum = self.spectra[name]
            importance = self.importance(name, metrics)
            found, _ = l0_support(spectrum, cross, start.float(), count, free, importance, growth=growth)
            # on dead inputs any value does: 0, so that no block is singular for them alone
            mask = (found != 0) & (moments.diagonal() > 0) | free
            fitted = torch.where(mask, refit_linear(moments, cross, mask), found.to(moments))
            write_layer(model, name, fitted[:, : weight.shape[1]], fitted[:, -1] if bias is not None else None)
        return model

    def importance(self, name: str, metrics: Mapping[str, Tensor]) -> Tensor:
        """Return how much each neuron's squared error counts ``(M,)``; the same for all in the last layer."""
        last = name == self.graph.names[-1]
        return metrics[name].new_ones(len(metrics[name])) if last else neuron_importance(metrics[name])

    def measure(self, model: nn.Module) -> float:
        """Return ``‖ŷ − y‖/‖y‖`` at the output, before any last ReLU."""
        last = self.graph.names[-1]
        clean = self.clean[last].outputs
        return float((record(model, self.batches, [last])[last].outputs - clean).norm() / clean.norm().clamp(min=1e-30))

    def look_ahead(self, kept: Mapping[str, int]) -> dict[str, Tensor]:
        """Return the metrics of the network that will be: seen through a scout that itself was pruned by a scout's."""
        metrics: Mapping[str, Tensor] = self.metrics
        for _ in range(2):
            metrics = self.metrics_of(self.prune(kept, metrics, growth=1.1))
        return dict(metrics)

    def metrics_of(self, model: nn.Module) -> dict[str, Tensor]:
        """Return how errors of each layer count at the output of another network, on the same samples."""
        return error_metrics(model, self.graph.layers, self.batches, self.seed)


def thinned(batches: Sequence[Batch], rows: int) -> list[Batch]:
    """Return `rows` of the samples, evenly spread over all batches; all where there are no more."""
    total = sum(len(batch) for batch in batches)
    if total <= rows:
        return list(batches)
    chosen = torch.arange(rows) * (total - 1) // max(1, rows - 1)
    few, start = [], 0
    for batch in batches:
        own = chosen[(chosen >= start) & (chosen < start + len(batch))] - start
        start += len(batch)
        if len(own):
            few.append(
                Batch(
                    tuple(tensor[own.to(tensor.device)] for tensor in batch.inputs),
                    {key: tensor[own.to(tensor.device)] for key, tensor in batch.kwargs.items()},
                )
            )
    return few
