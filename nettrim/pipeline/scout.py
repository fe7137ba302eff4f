"""A quick look ahead: what a network pruned to given counts will look like, before any layer is pruned for good.

Layer after layer in cascade, on some of the samples, a support by ``ℓ0``-ADMM and least squares on it: seconds, where
the real thing takes minutes. Two questions are answered from it. *What will the next layers need of this one?* The
dense network does not tell: of its 100 units a last layer with 30 weights reads 30 at the most, and an error in the
others costs nothing. *How should a number of weights be spread over the layers?* The error at the scout's output tells.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from nettrim.core.l0 import Spectrum, l0_support
from nettrim.core.moments import Moments
from nettrim.core.refine import neuron_importance
from nettrim.core.support import refit_linear
from nettrim.methods.masks import share_out
from nettrim.network.batches import Batches, read_batches
from nettrim.network.metric import error_metrics
from nettrim.network.trace import LayerGraph, LayerSpec
from nettrim.pipeline.account import Account
from nettrim.pipeline.collect import Wanted
from nettrim.pipeline.measure import measure
from nettrim.pipeline.schedule import waves

_PRODUCTS = 4e9  # multiply-adds of one pass: a look ahead takes dozens
_FEWEST = 128  # samples
State = dict[str, Tensor]


@dataclass(frozen=True, eq=False)
class Scout:
    """The dense network on the samples that the look ahead is taken on.

    Attributes
    ----------
    account : Account
        With few samples.
    metrics : dict of str to Tensor (M, M)
        How errors of each layer count at the dense network's output.
    seed : int
    spectra : dict of str to list of Spectrum
        Of layers that no pruned layer comes before, for each group, once they are known.
    """

    account: Account
    metrics: dict[str, Tensor]
    seed: int
    spectra: dict[str, list[Spectrum]] = field(default_factory=dict)

    @property
    def graph(self) -> LayerGraph:
        """The network's forward and its layers."""
        return self.account.graph

    @staticmethod
    def of(account: Account, rows: int, seed: int) -> Scout:
        """Take at most `rows` samples, evenly spread, and fewer where the network is slow."""
        products = sum(layer.numel * layer.positions for layer in account.graph.layers)
        few = thinned(account.batches, min(rows, max(_FEWEST, int(_PRODUCTS / products))))
        account = replace(account, batches=few, held=None)
        return Scout(account, error_metrics(account.graph, account.dense, few, seed), seed)

    def prune(self, kept: Mapping[str, int], metrics: Mapping[str, Tensor], growth: float) -> State:
        """Return the state of the network with as many weights as `kept` says, quickly; `growth` is that of ``ρ``."""
        state = dict(self.account.dense)
        for wave in waves(self.graph, "cascade"):
            data = self.account.collect(state, dict.fromkeys(wave, Wanted(moments=True)), progress=False)
            for name in wave:
                spec, moments = self.graph.layer(name), data[name].moments
                assert moments is not None
                first = spec.generation == 0  # whatever is pruned, its inputs stay
                weight, bias = self._layer(spec, moments, kept[name], self.importance(name, metrics), growth, first)
                state[spec.weight] = weight.reshape(spec.shape)
                if spec.bias_name is not None:
                    state[spec.bias_name] = bias
        return state

    def _layer(
        self, spec: LayerSpec, moments: list[Moments], count: int, importance: Tensor, growth: float, first: bool
    ) -> tuple[Tensor, Tensor]:
        """Return a layer's weight ``(M, N)`` and bias, group by group."""
        size, tall = spec.numel // spec.groups, spec.out_features // spec.groups
        dense = self.account.dense[spec.weight].reshape(spec.out_features, spec.in_features)
        dense_bias = dense.new_zeros(len(dense)) if spec.bias_name is None else self.account.dense[spec.bias_name]
        counts = share_out(count, [1] * spec.groups, [size] * spec.groups)
        if first and spec.name not in self.spectra:
            self.spectra[spec.name] = [Spectrum.of(_cut(own, spec)[0], torch.float32) for own in moments]
        weights, biases = [], []
        for g, own in enumerate(moments):
            rows = slice(g * tall, (g + 1) * tall)
            gram, cross = _cut(own, spec)
            spectrum = self.spectra[spec.name][g] if first else Spectrum.of(gram, torch.float32)
            start = torch.cat([dense[rows], dense_bias[rows, None]], 1)[:, : len(gram)]
            free = torch.arange(len(gram), device=gram.device) >= spec.in_features
            if counts[g] == 0:
                mask = free.expand_as(start)
                found = start.where(mask, 0.0)
            else:
                found, _ = l0_support(spectrum, cross, start.float(), counts[g], free, importance[rows], growth=growth)
                # on dead inputs any value does: 0, so that no block is singular for them alone
                mask = (found != 0) & (gram.diagonal() > 0) | free
            fitted = torch.where(mask, refit_linear(gram, cross, mask), found.to(gram))
            weights.append(fitted[:, : spec.in_features])
            biases.append(fitted[:, -1])
        return torch.cat(weights), torch.cat(biases)

    def importance(self, name: str, metrics: Mapping[str, Tensor]) -> Tensor:
        """Return how much each neuron's squared error counts ``(M,)``; the same for all in the last layer."""
        last = self.graph.layer(name).output == self.graph.program.output.step
        return metrics[name].new_ones(len(metrics[name])) if last else neuron_importance(metrics[name])

    def measure(self, state: Mapping[str, Tensor]) -> float:
        """Return ``‖ŷ − y‖/‖y‖`` at the output."""
        account = self.account
        found = measure(self.graph, account.dense, state, [], account.batches, account.at_a_time, gains=False)
        passage = found.passages[self.graph.program.output.step]
        return math.sqrt(passage.error / max(passage.norm, 1e-60))

    def look_ahead(self, kept: Mapping[str, int]) -> dict[str, Tensor]:
        """Return the metrics of the network that will be, seen through a scout that itself was pruned by a scout's.

        A second look is not always better than the first: those metrics are returned by which a scout errs least.
        """
        metrics, found = self.metrics_of(self.prune(kept, self.metrics, growth=1.1)), []
        for _ in range(2):
            state = self.prune(kept, metrics, growth=1.1)
            found.append((self.measure(state), metrics))
            metrics = self.metrics_of(state)
        return min(found, key=lambda pair: pair[0])[1]

    def metrics_of(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return how errors of each layer count at the output of another network, on the same samples."""
        return error_metrics(self.graph, state, self.account.batches, self.seed)


def _cut(moments: Moments, spec: LayerSpec) -> tuple[Tensor, Tensor]:
    """Return Gram matrix and cross moments, with the column of ones only where there is a bias to fit."""
    side = spec.in_features + (spec.bias_name is not None)
    return moments.gram[:side, :side], moments.cross[:side]


def thinned(batches: Batches, rows: int) -> Batches:
    """Return `rows` of the samples, evenly spread over all batches; all where there are no more."""
    if batches.rows <= rows:
        return batches
    return read_batches([batches.select(torch.arange(rows) * (batches.rows - 1) // max(1, rows - 1))])
