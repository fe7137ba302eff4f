"""What the units of a network give, made small enough to hold: pooled features, and how far each turns its input.

Pooling over positions is our reading of the published probe curves: probes of the first layers reach 34 %, which fits a
mean over all pixels and no whole map.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from nettrim.errors import UnsupportedError
from nettrim.network.batches import Batch, Batches
from nettrim.network.program import walk
from nettrim.network.samples import taken
from nettrim.network.trace import LayerGraph
from nettrim.network.units import Unit

STEM = "stem"  # what the first unit reads


def pooled_features(
    graph: LayerGraph,
    state: Mapping[str, Tensor],
    batches: Batches,
    units: Sequence[Unit],
    rows: Tensor | None = None,
    at_a_time: int = 256,
    progress: bool = False,
) -> dict[str, Tensor]:
    """Return the features of all units, by one pass in float32.

    Parameters
    ----------
    graph : LayerGraph
    state : mapping from str to Tensor
        Batch norms folded.
    batches : Batches
    units : sequence of Unit
        In execution order, at least one.
    rows : Tensor (P,), int64, ascending, optional
        The samples to take; all by default.
    at_a_time : int
        Samples that run at a time.
    progress : bool
        Show a bar on stderr, if that is a terminal.

    Returns
    -------
    dict of str to Tensor (P, C)
        By the names of the units, each the mean of its output over all positions, or all tokens, padding included;
        under "stem" that of the value which the first of them reads.

    Raises
    ------
    UnsupportedError
        What the first unit reads is no feature map.
    """
    wanted = {unit.output: (unit.name, _channels_first(graph, unit)) for unit in units}
    wanted[units[0].entry] = STEM, _channels_first(graph, units[0])
    found: dict[str, list[Tensor]] = {name: [] for name in (STEM, *(unit.name for unit in units))}
    for values in _values(graph, state, batches, sorted(wanted), rows, at_a_time, "features", progress):
        for index, (name, first) in wanted.items():
            found[name].append(_pooled(values[index], first))
    return {name: torch.cat(parts) for name, parts in found.items()}


def block_influence(
    graph: LayerGraph,
    state: Mapping[str, Tensor],
    batches: Batches,
    units: Sequence[Unit],
    at_a_time: int = 256,
    progress: bool = False,
) -> dict[str, float]:
    """Return for every unit one less the mean cosine between what it reads and what it gives, by one pass in float32.

    Block influence is that of Men et al., "ShortGPT", 2024, who take it over tokens; here a sample's whole value is one
    vector, which is our reading for feature maps. Units that change the shape, which cannot be removed, have none.
    """
    shapes = graph.program.steps
    like = [unit for unit in units if shapes[unit.entry].shape == shapes[unit.output].shape]
    totals = dict.fromkeys((unit.name for unit in like), 0.0)
    wanted = sorted({index for unit in like for index in (unit.entry, unit.output)})
    for values in _values(graph, state, batches, wanted, None, at_a_time, "influence", progress):
        for unit in like:
            before, after = (values[index].flatten(1) for index in (unit.entry, unit.output))
            totals[unit.name] += float(torch.cosine_similarity(before, after).double().sum())
    return {name: 1 - total / batches.rows for name, total in totals.items()}


def _values(
    graph: LayerGraph,
    state: Mapping[str, Tensor],
    batches: Batches,
    wanted: Sequence[int],
    rows: Tensor | None,
    at_a_time: int,
    title: str,
    progress: bool,
) -> Iterator[dict[int, Tensor]]:
    """Yield what some steps give on the samples, piece after piece."""
    if not wanted:
        return
    program = graph.program
    single = {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in state.items()}
    chosen = torch.arange(batches.rows) if rows is None else rows
    start = 0
    with tqdm(total=len(chosen), desc=title, unit="sample", leave=False, disable=None if progress else True) as bar:
        for batch in batches.chunks(at_a_time):
            inside = chosen[(chosen >= start) & (chosen < start + len(batch))] - start
            start += len(batch)
            if not len(inside):
                continue
            piece = batch if len(inside) == len(batch) else taken(batch, inside)
            values = {index: _given(piece, program.inputs[index]) for index in wanted if index < len(program.inputs)}
            for moment in walk(program, [single], piece, until=wanted[-1]):
                if moment.at in wanted:
                    values[moment.at] = moment.values[0]
            yield values
            bar.update(len(piece))


def _given(batch: Batch, name: str | int) -> Tensor:
    given = batch.inputs[name] if isinstance(name, int) else batch.kwargs[name]
    return given.float()


def _channels_first(graph: LayerGraph, unit: Unit) -> bool:
    """Whether the channels of a unit's values lie before the positions, as a convolution's do."""
    return graph.layer(unit.layers[-1]).window is not None


def _pooled(value: Any, first: bool) -> Tensor:
    """Return the mean over all positions (B, C)."""
    if not isinstance(value, Tensor) or value.dim() < 2:
        raise UnsupportedError("what the first unit reads is no feature map (B, C, ...); select other layers")
    if value.dim() == 2:
        return value.float()
    return value.float().flatten(2).mean(2) if first else value.float().flatten(1, -2).mean(1)
