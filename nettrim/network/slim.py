"""From the dense shape to the smaller network and back: tensors, forward, module.

The dense shape, with zeros for what is gone, is what is measured and certified. What is handed out is smaller: its
tensors are cut along the channels that stay, its forward passes over the units that are gone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from nettrim.errors import RunError
from nettrim.network.batches import Batch
from nettrim.network.channels import couplings
from nettrim.network.edit import double_copy, frozen_copy, write_state
from nettrim.network.fold import Fold, rewired, without_unused
from nettrim.network.observe import call, output_of
from nettrim.network.program import Program, run
from nettrim.network.structure import Structure, gone
from nettrim.network.trace import LayerGraph
from nettrim.network.units import Unit, find_units

_CLOSE = 1e-9  # relative, in float64: sums over fewer terms come in another order


@dataclass(frozen=True, eq=False)
class Slimming:
    """How one structure is cut out of one network.

    Attributes
    ----------
    graph : LayerGraph
        Of the dense network.
    dense : mapping from str to Tensor
        Its state, batch norms folded.
    structure : Structure

    Raises
    ------
    RunError
        The structure names a layer, channel or unit that the network does not have, or that cannot go.
    """

    graph: LayerGraph
    dense: Mapping[str, Tensor]
    structure: Structure

    def __post_init__(self) -> None:
        """Refuse a structure of another network."""
        pairs, _ = couplings(self.graph)
        for name, kept in self.structure.channels.items():
            channels = pairs[name].channels if name in pairs else 0
            if not kept or list(kept) != sorted(set(kept)) or kept[0] < 0 or kept[-1] >= channels:
                raise RunError(
                    f"the structure keeps channels {kept} of layer {name!r}, which has {channels} to choose."
                )
        found = {unit.name for unit in find_units(self.graph, self.dense) if unit.removable}
        unknown = [name for name in self.structure.removed if name not in found]
        if unknown:
            raise RunError(f"the structure is without unit {unknown[0]!r}, which the network cannot do without.")

    @cached_property
    def units(self) -> list[Unit]:
        """The units that are gone."""
        return [u for u in find_units(self.graph, self.dense) if u.name in self.structure.removed]

    @cached_property
    def gone(self) -> dict[str, Tensor]:
        """The folded entries, in the dense shape, of the units that are gone."""
        device = next(iter(self.dense.values())).device
        return {name: tensor for unit in self.units for name, tensor in gone(self.graph, unit, device).items()}

    @cached_property
    def absent(self) -> set[str]:
        """The names, folded or not, of tensors that the smaller network does not have."""
        names = set(self.gone)
        return names | {part for f in self.graph.folds if f.weight in names for part in _parts(f) if part is not None}

    @cached_property
    def cuts(self) -> dict[str, dict[int, Tensor]]:
        """Name of a tensor, folded or not, to dimension to the indices that stay."""
        pairs, _ = couplings(self.graph)
        folds = {f.weight: f for f in self.graph.folds}
        found: dict[str, dict[int, Tensor]] = {}
        for name, kept in self.structure.channels.items():
            pair, stays = pairs[name], torch.tensor(kept)
            before, after = self.graph.layer(pair.producer), self.graph.layer(pair.consumer)
            names = {before.weight, before.bias_name}
            if before.weight in folds:
                names |= set(_parts(folds[before.weight]))
            for part in names - {None}:
                found.setdefault(str(part), {})[0] = stays
            if after.kind == "linear":
                stays = (stays[:, None] * pair.taps + torch.arange(pair.taps)).flatten()
            found.setdefault(after.weight, {})[1] = stays
        return found

    def cut(self, name: str, tensor: Tensor) -> Tensor:
        """Return what stays of a tensor; the same object where all does."""
        for dimension, stays in self.cuts.get(name, {}).items():
            tensor = tensor.index_select(dimension, stays.to(tensor.device))
        return tensor

    def widen(self, name: str, tensor: Tensor, like: Tensor) -> Tensor:
        """Return a tensor of the smaller network in the dense shape, zero where it was cut; a variance is one there."""
        wide, dimensions = tensor, self.cuts.get(name, {})
        variances = {f.variance for f in self.graph.folds}
        for dimension, stays in dimensions.items():
            size = (*wide.shape[:dimension], like.shape[dimension], *wide.shape[dimension + 1 :])
            empty = wide.new_ones(size) if name in variances else wide.new_zeros(size)
            if len(stays) != wide.shape[dimension]:
                raise RunError(f"{name} has {wide.shape[dimension]} channels, and the structure keeps {len(stays)}.")
            wide = empty.index_copy(dimension, stays.to(wide.device), wide)
        return wide

    def program(self) -> Program:
        """Return the forward that passes over the units that are gone."""
        place = {unit.exit: unit.entry for unit in self.units}
        while any(value in place for value in place.values()):  # units that follow each other
            place = {key: place.get(value, value) for key, value in place.items()}
        program = self.graph.program
        steps = tuple(rewired(step, place) for step in program.steps)
        output = program.output._replace(step=place.get(program.output.step, program.output.step))
        return without_unused(replace(program, steps=steps, output=output))

    def module(
        self,
        model: nn.Module,
        changed: Mapping[str, Tensor],
        state: Mapping[str, Tensor],
        batch: Batch,
    ) -> nn.Module | None:
        """Return the smaller network as a module of the model's own class; None where that computes something else.

        Parameters
        ----------
        model : nn.Module
            The dense one; left as it is.
        changed : mapping from str to Tensor
            Entries of its state to replace, in the dense shape, batch norms not folded.
        state : mapping from str to Tensor
            The folded state in the dense shape, float64: what must be computed.
        batch : Batch
            Samples to hold both against each other on: parts of the class may be such that they cannot be exchanged.
        """
        small = frozen_copy(model)
        write_state(small, {name: tensor for name, tensor in changed.items() if name not in self.absent})
        for name in self.cuts:
            if name not in self.absent:
                _cut_entry(small, name, self)
        for unit in self.units:
            self._bypass(small, unit)
        return small if self._same(small, state, batch) else None

    def _same(self, small: nn.Module, state: Mapping[str, Tensor], batch: Batch) -> bool:
        wanted = run(self.graph.program, state, batch)
        try:
            twin = double_copy(small)
            found = output_of(call(twin, batch, 0), twin)
        except Exception:  # whatever a class does when parts of it are exchanged
            return False
        return found.shape == wanted.shape and float((found - wanted).norm()) <= _CLOSE * float(wanted.norm())

    def _bypass(self, small: nn.Module, unit: Unit) -> None:
        """Exchange the modules of a unit for the identity, where its modules can be told."""
        modules = dict(small.named_modules())
        names = [unit.name] if unit.kind == "residual" else []
        if unit.kind == "plain":
            layer = self.graph.layer(unit.layers[0])
            folds = [f for f in self.graph.folds if f.weight == layer.weight]
            names = [layer.name, *(f.mean.rpartition(".")[0] for f in folds)]
        for name in names:
            if name and name in modules:
                owner, _, last = name.rpartition(".")
                setattr(small.get_submodule(owner), last, nn.Identity())


def _parts(fold: Fold) -> tuple[str | None, ...]:
    return fold.weight, fold.bias, fold.folded_bias, fold.mean, fold.variance, fold.scale, fold.shift


def _cut_entry(model: nn.Module, name: str, slimming: Slimming) -> None:
    """Cut one parameter or buffer of a module, and the numbers by which the module knows its size."""
    owner, _, last = name.rpartition(".")
    try:
        module = model.get_submodule(owner)
    except AttributeError:
        return
    if isinstance(module._parameters.get(last), Tensor):
        found = module._parameters[last]
        assert found is not None
        module._parameters[last] = nn.Parameter(slimming.cut(name, found.detach()), requires_grad=found.requires_grad)
    elif isinstance(module._buffers.get(last), Tensor):
        buffer = module._buffers[last]
        assert buffer is not None
        module._buffers[last] = slimming.cut(name, buffer)
    else:
        return  # a folded bias, which the module does not have
    if isinstance(module, nn.Linear):
        module.out_features, module.in_features = module.weight.shape
    elif isinstance(module, _ConvNd):
        module.out_channels, module.in_channels = module.weight.shape[:2]
    elif isinstance(module, _BatchNorm):
        module.num_features = len(slimming.cuts[name][0])
