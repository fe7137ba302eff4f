"""Fewer channels, layer by layer: the driver of LDRF and of the channel baselines.

Always in cascade: targets are the dense network's, inputs those behind the layers that are narrower already. Every
layer stays in the dense shape, with zeros for what is gone.
"""

from __future__ import annotations

import time
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from nettrim.errors import ProblemError
from nettrim.methods.decompose import Decomposition, decompose, recompose
from nettrim.methods.ldrf import Ldrf
from nettrim.methods.recover import Recovered, Site, recover
from nettrim.network.batches import Batch
from nettrim.network.channels import Coupling, from_planes, planes
from nettrim.network.program import walk
from nettrim.network.structure import Structure
from nettrim.network.trace import LayerSpec
from nettrim.pipeline.account import Account, Standing
from nettrim.pipeline.layers import How, at_sum
from nettrim.pipeline.memory import trim
from nettrim.pipeline.plan import Plan
from nettrim.pipeline.records import LayerEvidence
from nettrim.pipeline.store import RunStore
from nettrim.pipeline.widths import check_couplings, valid_energy, widths

State = dict[str, Tensor]


def narrow(
    plan: Plan,
    account: Account,
    standing: Standing,
    how: How,
    store: RunStore | None = None,
    found: Mapping[str, LayerEvidence] | None = None,
) -> tuple[list[LayerEvidence], Structure, dict[str, Any]]:
    """Take channels out of layer after layer, putting each into `standing`; return the evidence of all, and what stays.

    The third of what is returned, how a structure was chosen, is empty: the evidence says it layer by layer.

    Activations are held in float32, in float64 where the model is, of as many samples as fit a quarter of the memory
    limit, drawn by the seed; least squares are solved in float64. A layer that keeps all channels, behind layers that
    do, is left as it is, bit for bit.

    Parameters
    ----------
    plan : Plan
        Its method is an `Ldrf`, its amount one of that.
    account : Account
    standing : Standing
        Changed in place.
    how : How
    store : RunStore, optional
        A finished layer is written at once.
    found : mapping from str to LayerEvidence, optional
        Layers that are finished already. Of layers that read one another all must be, or they are solved again, with
        the same result.

    Raises
    ------
    ProblemError
        No layer has channels that can go, a budget cannot be reached, or the memory limit holds no two samples.
    """
    run = _Run.of(plan, account, standing, how)
    found = found or {}
    bar = tqdm(
        total=len(run.pairs), desc=plan.method.name, unit="layer", leave=False, disable=None if how.progress else True
    )
    evidence: dict[str, LayerEvidence] = {}
    for pair in run.pairs.values():
        bar.set_postfix_str(pair.producer)
        for layer in run.narrow(pair, found):
            evidence[layer.name] = layer
            if store is not None and found.get(layer.name) is not layer:
                store.write_layer(layer)
        bar.update()
        trim()
    bar.close()
    for spec in plan.graph.layers:
        if spec.name not in evidence:
            arrays = standing.dense_arrays(spec)
            evidence[spec.name] = LayerEvidence(spec.name, spec.relu, False, False, *arrays, *arrays)
            if store is not None and spec.name not in found:
                store.write_layer(evidence[spec.name])
    kept = {name: tuple(stays) for name, stays in run.kept.items() if len(stays) < run.pairs[name].channels}
    return [evidence[name] for name in plan.graph.names], Structure(kept), {}


@dataclass(eq=False)
class _Run:
    """What a run knows, and how far it is.

    Attributes
    ----------
    pairs : dict of str to Coupling
        By producer, in execution order.
    counts : dict of str to int
        Channels of each that stay.
    splits : dict of str to Decomposition
        Of every consumer.
    energy : float
    kept : dict of str to list of int
        Channels of finished producers.
    readings : dict of str to (Tensor, Tensor or None)
        ``Q'`` and its intercept by consumer, of the variant that is composed of factors.
    """

    plan: Plan
    account: Account
    standing: Standing
    how: How
    method: Ldrf
    pairs: dict[str, Coupling]
    counts: dict[str, int]
    splits: dict[str, Decomposition]
    energy: float
    dense: State
    kept: dict[str, list[int]] = field(default_factory=dict)
    readings: dict[str, tuple[Tensor, Tensor | None]] = field(default_factory=dict)
    changed: set[str] = field(default_factory=set)

    @staticmethod
    def of(plan: Plan, account: Account, standing: Standing, how: How) -> _Run:
        method, graph = plan.method, plan.graph
        assert isinstance(method, Ldrf)
        pairs = check_couplings(graph)
        if how.rows is not None:
            method = replace(method, rows=how.rows)
        doubled = all(dtype == torch.float64 for dtype in account.dtypes.values() if dtype.is_floating_point)
        dtype = torch.float64 if doubled else torch.float32
        dense = {name: t.to(dtype) if t.is_floating_point() else t for name, t in account.dense.items()}
        splits: dict[str, Decomposition] = {}
        means = _channel_moments(account, dense, pairs) if method.basis == "response" else {}
        for pair in pairs.values():
            weight = account.dense[graph.layer(pair.consumer).weight]
            splits[pair.consumer] = decompose(weight.reshape(len(weight), pair.channels, -1), means.get(pair.producer))
        energy = method.energy
        if method.capacity_tolerance is not None:
            energy = valid_energy(account, pairs, splits, method.capacity_tolerance)
        splits = {name: split.truncated(split.rank_at(energy)) for name, split in splits.items()}
        ranks = {name: splits[pair.consumer].rank for name, pair in pairs.items()}
        capacities = ranks if method.allocate == "capacity" else None
        counts = widths(graph, pairs, plan.amount, plan.values, capacities)
        return _Run(plan, account, standing, how, method, pairs, counts, splits, energy, dense)

    def narrow(self, pair: Coupling, found: Mapping[str, LayerEvidence]) -> Iterator[LayerEvidence]:
        """Take out one producer's channels, and yield the layers that are finished then."""
        began = time.monotonic()
        graph = self.plan.graph
        producer, consumer = graph.layer(pair.producer), graph.layer(pair.consumer)
        if self.counts[pair.producer] == pair.channels and not self._reached(producer, consumer):
            self.kept[pair.producer] = list(range(pair.channels))
            return
        clean = not self._reached(producer, producer)
        if self._chain(pair) <= found.keys():
            known, reader = found[pair.producer], found[pair.consumer]
            kept = torch.tensor(known.facts["kept_channels"])
            self._finish(pair, kept, [known.weight, known.bias], [reader.weight, reader.bias])
            yield known
            if pair.consumer not in self.pairs:
                yield reader
            return
        site = self._site(pair, producer, consumer)
        result = recover(site, self.method, self.counts[pair.producer])
        own, other = self._widened(pair, site, result)
        self._finish(pair, result.kept, own, other)
        if result.reading is not None:
            self.readings[pair.consumer] = result.reading, result.shift
        seconds = time.monotonic() - began
        split = self.splits[pair.consumer]
        facts = {
            "channels_kept": len(result.kept),
            "channels_all": pair.channels,
            "kept_channels": result.kept.tolist(),
            "selector": self.method.selector,
            "rank": split.rank,
            "energy": self.energy,
        }
        yield self._evidence(producer, clean, facts | result.facts, seconds)
        if pair.consumer not in self.pairs:
            error = {"error_start": result.facts["error_start"], "error_end": result.facts["error_end"]}
            yield self._evidence(consumer, False, {"reads": pair.producer} | error, 0.0)

    def _evidence(self, spec: LayerSpec, clean: bool, facts: dict[str, Any], seconds: float) -> LayerEvidence:
        value = self.plan.values[spec.name]
        return LayerEvidence(
            spec.name,
            spec.relu,
            True,
            clean,
            *self.standing.dense_arrays(spec),
            *self.standing.arrays(spec),
            facts={self.plan.amount: value if isinstance(value, int | float) else str(value)} | facts,
            seconds=seconds,
        )

    def _finish(self, pair: Coupling, kept: Tensor, own: list[Any], other: list[Any]) -> None:
        """Put both layers into the network."""
        for name, (weight, bias) in ((pair.producer, own), (pair.consumer, other)):
            self.standing.put(self.plan.graph.layer(name), weight, bias)
            self.changed.add(name)
        self.kept[pair.producer] = kept.tolist()

    def _reached(self, *specs: LayerSpec) -> bool:
        """Whether a layer that is changed already is one of these, or lies before them."""
        program = self.plan.graph.program
        steps = {self.plan.graph.layer(name).step for name in self.changed}
        pending, seen = [spec.step if spec.sum is None else spec.sum for spec in specs], set()
        while pending:
            step = pending.pop()
            if step in steps:
                return True
            if step not in seen:
                seen.add(step)
                pending += [ref.step for ref in program.steps[step].refs]
        return False

    def _chain(self, pair: Coupling) -> set[str]:
        """Return all layers that are coupled with one another.

        What a layer in their midst was before its own channels went is not kept: they are finished together or not.
        """
        readers = {other.consumer: other for other in self.pairs.values()}
        while pair.producer in readers:
            pair = readers[pair.producer]
        names = {pair.producer}
        while pair.consumer in self.pairs:
            pair = self.pairs[pair.consumer]
            names.add(pair.producer)
        return names | {pair.consumer}

    def _before(self, name: str) -> Coupling | None:
        return next(
            (pair for pair in self.pairs.values() if pair.consumer == name and pair.producer in self.kept), None
        )

    def _site(self, pair: Coupling, producer: LayerSpec, consumer: LayerSpec) -> Site:
        """Gather what both networks say on the samples."""
        due = {name for done in self.pairs.values() if done.producer not in self.kept for name in (done.producer,)}
        due |= {self.pairs[name].consumer for name in due}
        residual = at_sum(self.plan.graph, consumer.name, due)
        inputs, reference, drift = self._gather(pair, producer, consumer, residual)
        state, dense = self.standing.state, self.account.dense
        weight, bias = state[producer.weight], _entry(state, producer)
        split = self.splits[pair.consumer]
        before = self._before(producer.name)
        if before is not None:
            stays = torch.tensor(self.kept[before.producer])
            read = planes(inputs, producer, before.taps)[:, stays]
            weight = weight.reshape(len(weight), before.channels, -1)[:, stays]
            if producer.name in self.readings:
                reading, shift = self.readings[producer.name]
                read = torch.matmul(reading.T.to(read), read)
                read = read if shift is None else read + shift.to(read)[:, None]
                making = self.splits[producer.name].making
                weight, bias = making, _entry(dense, producer)
            inputs = from_planes(read, inputs, producer, before.taps)
            kernel = producer.shape[2:] if producer.window is not None else ()
            weight = weight.reshape(len(weight), -1, *kernel)
        return Site(
            self.plan.graph.program,
            pair,
            producer,
            consumer,
            dense[producer.weight].flatten(1),
            inputs,
            weight,
            bias,
            dense[consumer.weight].reshape(consumer.out_features, pair.channels, pair.taps),
            _entry(dense, consumer),
            reference,
            drift,
            split,
            consumer.name not in self.pairs,
            self.how.seed,
        )

    def _widened(self, pair: Coupling, site: Site, result: Recovered) -> tuple[list[Any], list[Any]]:
        """Return both layers' arrays in the dense shape."""
        producer, consumer = site.producer, site.consumer
        weight, bias = result.weight, result.bias
        before = self._before(producer.name)
        wide = weight.new_zeros(producer.out_features, producer.in_features)
        if before is None:
            wide[result.kept] = weight.flatten(1)
        else:
            parts = weight.reshape(len(weight), -1, before.taps)
            if producer.name in self.readings:
                reading, shift = self.readings[producer.name]
                if shift is not None:
                    assert bias is not None
                    bias = bias + parts.sum(2) @ shift
                parts = recompose(parts, reading)
            full = wide.reshape(producer.out_features, before.channels, before.taps)
            full[result.kept[:, None], torch.tensor(self.kept[before.producer])] = parts
        own_bias = None
        if bias is not None:
            own_bias = bias.new_zeros(producer.out_features)
            own_bias[result.kept] = bias
        outgoing = result.outgoing.new_zeros(consumer.out_features, pair.channels, pair.taps)
        outgoing[:, result.kept] = result.outgoing
        return [wide, own_bias], [outgoing.flatten(1), result.out_bias]

    def _gather(
        self, pair: Coupling, producer: LayerSpec, consumer: LayerSpec, residual: bool
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Run both networks, and hold the producer's inputs, what the dense consumer reads, and the trunk's drift."""
        program = self.plan.graph.program
        dense = self.account.dense
        state = {
            name: self.dense[name] if tensor is dense[name] else tensor.to(self.dense[name].dtype)
            for name, tensor in self.standing.state.items()
        }
        inputs: list[Tensor] = []
        reference: list[Tensor] = []
        drift: list[Tensor] = []
        until = max(pair.stop, consumer.sum or 0) if residual else pair.stop
        for batch in self._samples(pair, producer, consumer):
            for moment in walk(program, [self.dense, state], batch, until=until):
                if moment.at == pair.start:
                    args, kwargs = moment.args[1]
                    inputs.append(args[0] if args else kwargs["input"])
                if moment.at == pair.stop:
                    reference.append(moment.values[0])
                if residual and moment.at == consumer.sum:
                    trunks = [[t for t in (*a, *k.values()) if isinstance(t, Tensor)] for a, k in moment.args]
                    drift.append(trunks[0][consumer.trunk] - trunks[1][consumer.trunk])
        return torch.cat(inputs), torch.cat(reference), torch.cat(drift) if residual else None

    def _samples(self, pair: Coupling, producer: LayerSpec, consumer: LayerSpec) -> Iterator[Batch]:
        """Iterate over the samples that fit a quarter of the memory limit; where not all do, they are drawn."""
        steps = self.plan.graph.program.steps
        sizes = [_size(steps, ref.step) for ref in steps[producer.step].refs]
        # the dense activations, the pruned ones twice, the embedding; the consumer's outputs and their drift
        entries = sum(sizes) * 2 + 4 * _size(steps, pair.stop) + 2 * _size(steps, consumer.step)
        fit = self.account.memory_limit // 4 // (entries * next(iter(self.dense.values())).element_size())
        batches = self.account.batches
        if fit < min(2, batches.rows):
            raise ProblemError(
                f"memory_limit={self.account.memory_limit} holds {fit} samples of what layers {producer.name!r} and "
                f"{consumer.name!r} read: raise it, or leave them out by ignore."
            )
        if fit >= batches.rows:
            yield from batches.chunks(self.account.at_a_time)
            return
        drawing = np.random.default_rng([self.how.seed, zlib.crc32(producer.name.encode())])
        chosen = torch.from_numpy(np.sort(drawing.choice(batches.rows, fit, replace=False, shuffle=False)))
        for at in range(0, fit, self.account.at_a_time):
            yield batches.select(chosen[at : at + self.account.at_a_time])


def _channel_moments(account: Account, dense: State, pairs: Mapping[str, Coupling]) -> dict[str, Tensor]:
    """Return ``E[y yᵀ] (C, C)`` of what every consumer reads in the dense network, over samples and pixels."""
    graph = account.graph
    ends: dict[int, list[Coupling]] = {}
    for pair in pairs.values():
        ends.setdefault(pair.stop, []).append(pair)
    sums = {name: torch.zeros(p.channels, p.channels, dtype=torch.float64) for name, p in pairs.items()}
    counts = dict.fromkeys(pairs, 0)
    for batch in account.batches.chunks(account.at_a_time):
        for moment in walk(graph.program, [dense], batch, until=max(ends)):
            for pair in ends.get(moment.at, ()):
                spec = graph.layer(pair.consumer)
                rows = planes(moment.values[0], spec, pair.taps).double().transpose(1, 2).reshape(-1, pair.channels)
                sums[pair.producer] += rows.T @ rows
                counts[pair.producer] += len(rows)
    return {name: total / counts[name] for name, total in sums.items()}


def _entry(state: Mapping[str, Tensor], spec: LayerSpec) -> Tensor | None:
    return None if spec.bias_name is None else state[spec.bias_name]


def _size(steps: Any, step: int) -> int:
    """Return the entries that one sample has in what a step gives."""
    total = 1
    for size in steps[step].shape or ():
        total *= size if isinstance(size, int) else max(size.each, 1)
    return total
