"""A traced network on the samples of a run: its data layer by layer, and the ledger of any pruned version of it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from nettrim.network.batches import Batches
from nettrim.network.calibrate import samples_at_a_time
from nettrim.network.edit import raw_state
from nettrim.network.fold import Fold, fold_state, unfold
from nettrim.network.modular import ProgramModule
from nettrim.network.observe import agree
from nettrim.network.samples import pieces
from nettrim.network.slim import Slimming
from nettrim.network.structure import Structure
from nettrim.network.trace import LayerGraph, LayerSpec, Traced
from nettrim.pipeline.collect import Collected, Wanted, collect
from nettrim.pipeline.ledger import build_ledger
from nettrim.pipeline.measure import Measured, measure
from nettrim.pipeline.proof import Proof
from nettrim.pipeline.records import LayerEvidence, Ledger

State = dict[str, Tensor]


@dataclass(frozen=True, eq=False)
class Account:
    """What every figure is measured against.

    Attributes
    ----------
    graph : LayerGraph
    raw : dict of str to Tensor
        The dense network's parameters, buffers and constants in float64.
    dtypes : dict of str to dtype
        Those of the model.
    batches, held : Batches, Batches or None
        The calibration and the held-out samples.
    memory_limit : int
        Bytes.
    """

    graph: LayerGraph
    raw: State
    dtypes: dict[str, torch.dtype]
    batches: Batches
    held: Batches | None
    memory_limit: int

    @staticmethod
    def of(model: nn.Module, traced: Traced, batches: Batches, held: Batches | None, memory_limit: int) -> Account:
        """Take a traced model, and check that it does on these samples what it did when it was observed."""
        dtypes = {name: tensor.dtype for name, tensor in raw_state(model).items()}
        account = Account(traced.graph, traced.state, dtypes, batches, held, memory_limit)
        for split in (batches, held):
            if split is None:
                continue
            # a path that hangs on values is checked on all of them, any other where it cannot differ further
            for index, batch in enumerate(split):
                for piece in pieces(batch, account.at_a_time):
                    agree(traced.graph.program, account.dense, traced.double, piece, index)
                    if not traced.graph.program.reads_values:
                        break
                if not traced.graph.program.reads_values:
                    break
        return account

    @cached_property
    def dense(self) -> State:
        """The dense network's state with batch norms folded."""
        return fold_state(self.raw, self.graph.folds)

    @cached_property
    def folds(self) -> dict[str, Fold]:
        """Weight name to the batch norm behind it."""
        return {fold.weight: fold for fold in self.graph.folds}

    @cached_property
    def at_a_time(self) -> int:
        """Samples that run at a time."""
        return samples_at_a_time(self.graph, self.memory_limit // 8)

    def standing(self) -> Standing:
        """Return the network as it stands before anything is pruned."""
        return Standing(self, dict(self.dense))

    def of_state(self, state: Mapping[str, Tensor], slimming: Slimming | None = None) -> Standing:
        """Return the network of another state as it stands, such as one that was trained on; `slimming` of a smaller
        one. Entries may be absent: constants of the forward and buffers that a module does not save.
        """
        changed = {}
        for name, tensor in self.raw.items():
            if name not in self.dtypes or name not in state or (slimming is not None and name in slimming.absent):
                continue
            found = state[name].to(tensor.dtype)
            found = found if slimming is None else slimming.widen(name, found, tensor)
            if not torch.equal(found, tensor):
                changed[name] = found
        result = self.standing()
        result.set_raw(changed)
        return result if slimming is None else result.without(slimming)

    def slimming(self, structure: Structure) -> Slimming:
        """Return how a structure is cut out of the dense network."""
        return Slimming(self.graph, self.dense, structure)

    def masks(self, layers: Sequence[LayerEvidence], slimming: Slimming | None = None) -> State:
        """Return which weights of the pruned network are kept, by layer, in the shapes that they have there."""
        kept = [layer for layer in layers if layer.pruned and not layer.removed]
        if slimming is None:
            return {layer.name: layer.mask for layer in kept}
        return {layer.name: slimming.cut(self.graph.layer(layer.name).weight, layer.mask) for layer in kept}

    def collect(
        self, state: Mapping[str, Tensor], wanted: Mapping[str, Wanted], progress: bool
    ) -> dict[str, Collected]:
        """Collect the data of some layers: inputs of the network of that state, outputs of the dense one."""
        return collect(self.graph, self.dense, state, self.batches, wanted, self.at_a_time, progress)

    def ledger(
        self,
        method: str,
        schedule: str,
        standing: Standing,
        layers: Sequence[LayerEvidence],
        proofs: Mapping[str, Proof],
        finish: dict[str, Any] | None = None,
        before: Ledger | None = None,
    ) -> Ledger:
        """Return the ledger of a network with these layers; `finish` and `before` are of one that was trained on."""
        measured = self._measure(self.batches, standing, layers, ladder=True)
        held = None if self.held is None else self._measure(self.held, standing, layers, ladder=False)
        return build_ledger(
            method,
            schedule,
            self.graph,
            layers,
            proofs,
            measured,
            held,
            standing.state,
            self.dtypes,
            finish,
            before,
            {"dense": self._costs(None), "pruned": self._costs(standing.slimming)},
        )

    def _costs(self, slimming: Slimming | None) -> dict[str, int]:
        """Count the weights of all layers that are there, zeros too, and the multiply-adds of one sample."""
        weights = multiply_adds = 0
        for spec in self.graph.layers:
            if slimming is None or spec.weight not in slimming.absent:
                cuts = {} if slimming is None else slimming.cuts.get(spec.weight, {})
                numel = math.prod(len(cuts[k]) if k in cuts else size for k, size in enumerate(spec.shape))
                weights += numel
                multiply_adds += spec.positions * numel
        return {"weights": weights, "multiply_adds": multiply_adds}

    def _measure(self, batches: Batches, standing: Standing, layers: Sequence[LayerEvidence], ladder: bool) -> Measured:
        rungs = []
        if ladder:
            step = dict(self.dense)
            for layer in layers:
                spec = self.graph.layer(layer.name)
                if layer.pruned:
                    step = step | {name: standing.state[name] for name in _names(spec)}
                    rungs.append(step)
            if all(step[name] is tensor for name, tensor in standing.state.items()):
                rungs.pop()  # the last is the pruned network itself
        rows = samples_at_a_time(self.graph, self.memory_limit // 8, 2 + len(rungs))
        return measure(self.graph, self.dense, standing.state, rungs, batches, rows, gains=ladder, single=not ladder)


def _names(spec: LayerSpec) -> list[str]:
    return [spec.weight] if spec.bias_name is None else [spec.weight, spec.bias_name]


@dataclass(eq=False)
class Standing:
    """A network on its way: which entries of the dense one's state are replaced by what.

    Attributes
    ----------
    account : Account
    state : dict of str to Tensor
        Batch norms folded; entries that are the dense network's own are the same objects.
    changed : dict of str to Tensor
        What is replaced, batch norms not folded; values of the model's dtype, in float64.
    slimming : Slimming or None
        Of a network that is smaller than the dense one: what is gone, whose folded entries are in `state` alone.
    """

    account: Account
    state: State
    changed: State = field(default_factory=dict)
    slimming: Slimming | None = None

    def put(self, spec: LayerSpec, weight: Tensor, bias: Tensor | None) -> None:
        """Replace one layer by a weight ``(M, N)`` and a bias, as its batch norm and the model's dtype let it stand."""
        shaped = weight.double().reshape(spec.shape)
        fold = self.account.folds.get(spec.weight)
        if fold is not None:
            assert bias is not None
            # all of them, because an earlier weight of the layer may have changed others
            named = (fold.mean, fold.shift, fold.bias)
            entries = {name: self.account.raw[name] for name in named if name is not None and name in self.changed}
            entries |= unfold(fold, self.account.raw, shaped, bias.double())
        else:
            entries = {spec.weight: shaped}
            if spec.bias_name is not None and bias is not None:
                entries[spec.bias_name] = bias.double()
        self.set_raw(entries)

    def set_raw(self, entries: Mapping[str, Tensor]) -> None:
        """Replace entries, batch norms not folded."""
        rounded = {name: tensor.to(self.account.dtypes[name]).double() for name, tensor in entries.items()}
        self.changed |= rounded
        self.state |= rounded
        raw = {**self.account.raw, **self.changed}
        touched = [
            fold
            for fold in self.account.graph.folds
            if {fold.weight, fold.bias, fold.mean, fold.variance, fold.scale, fold.shift} & rounded.keys()
        ]
        folded = fold_state(raw, touched)
        self.state |= {name: folded[name] for fold in touched for name in (fold.weight, fold.folded_bias)}

    def without(self, slimming: Slimming) -> Standing:
        """Return the same network without what is gone, to be added to no more."""
        return Standing(self.account, self.state | slimming.gone, self.changed, slimming)

    def steps(self) -> ProgramModule:
        """Return the network as a module that runs the steps of the forward, in the model's dtypes."""
        graph, dtypes, slimming = self.account.graph, self.account.dtypes, self.slimming
        program = graph.program if slimming is None else slimming.program()
        read = dict.fromkeys(name for step in program.steps for name in step.held)
        # a folded batch norm has the dtype of the weight that it is folded into
        kinds = {layer.bias_name: dtypes[layer.weight] for layer in graph.layers} | dtypes
        cut = {name: self.state[name] if slimming is None else slimming.cut(name, self.state[name]) for name in read}
        return ProgramModule(program, {name: tensor.to(kinds.get(name, tensor.dtype)) for name, tensor in cut.items()})

    def raw(self) -> State:
        """Return parameters and buffers of the network as it stands, batch norms not folded, in the model's dtypes."""
        slimming, entries = self.slimming, self.account.raw | self.changed
        absent = set() if slimming is None else slimming.absent
        return {
            name: (entries[name] if slimming is None else slimming.cut(name, entries[name])).to(dtype)
            for name, dtype in self.account.dtypes.items()
            if name not in absent
        }

    def arrays(self, spec: LayerSpec) -> tuple[Tensor, Tensor | None]:
        """Return a layer's weight and bias as they are kept: float64 where a batch norm is folded, else the model's."""
        return _arrays(self.account, self.state, spec)

    def dense_arrays(self, spec: LayerSpec) -> tuple[Tensor, Tensor | None]:
        """Return the dense layer's in the same form."""
        return _arrays(self.account, self.account.dense, spec)


def _arrays(account: Account, state: Mapping[str, Tensor], spec: LayerSpec) -> tuple[Tensor, Tensor | None]:
    dtype = torch.float64 if spec.weight in account.folds else account.dtypes[spec.weight]
    weight, bias = state[spec.weight], None if spec.bias_name is None else state[spec.bias_name]
    return weight.to(dtype), None if bias is None else bias.to(dtype)
