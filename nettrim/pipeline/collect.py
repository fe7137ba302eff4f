"""What a method needs of a layer's data, and no more: a sample of its rows, or the second moments of all of them.

A convolution meets every image at many positions, so its rows can be millions. Convex programs are made of a sample,
drawn without replacement from all images and positions alike; Gram matrices are summed up as the samples pass by.
"""

from __future__ import annotations

import heapq
import math
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from nettrim.core.moments import Moments
from nettrim.errors import ProblemError
from nettrim.network.batches import Batches
from nettrim.network.calibrate import scan
from nettrim.network.trace import LayerGraph, LayerSpec

ROWS = 16384  # of a layer that meets a sample more than once, where nothing else is asked for
_LEAST = 16  # rows below which no program is worth solving
_BLOCK = 512  # rows that are summed up at a time: fewer would be slower
_GRAMS = 7  # matrices of the Gram matrix's size that a method makes, at the most; measured


@dataclass(frozen=True, eq=False)
class Collected:
    """The data of one layer.

    Attributes
    ----------
    inputs : Tensor (P, G · N)
    outputs : Tensor (P, M)
        Rows, float64; none of a layer of which only moments were wanted.
    total : int
        Rows there are.
    moments : list of Moments, or None
        Of all rows, for each group; None where `inputs` and `outputs` are all rows.
    """

    inputs: Tensor
    outputs: Tensor
    total: int
    moments: list[Moments] | None


@dataclass(frozen=True, eq=False)
class Wanted:
    """What is to be collected of one layer.

    Attributes
    ----------
    chosen : Tensor of int64, or None
        The numbers of the rows, in order; None for all.
    moments : bool
        Moments instead of rows.
    residual : bool
        The outputs are what is missing at the sum that the layer flows into.
    """

    chosen: Tensor | None = None
    moments: bool = False
    residual: bool = False


def check_rows(rows: int | None) -> int | None:
    """Return the most rows to draw, or None.

    Raises
    ------
    ProblemError
        It is not a whole number of at least 16.
    """
    if rows is None:
        return None
    if isinstance(rows, bool) or not isinstance(rows, int) or rows < _LEAST:
        raise ProblemError(f"rows={rows!r} is out of range: give a whole number ≥ {_LEAST}, or None.")
    return rows


def choose_rows(spec: LayerSpec, samples: int, rows: int | None, memory_limit: int, seed: int) -> Tensor | None:
    """Draw the rows that a layer's program is made of, without replacement; None for all.

    Parameters
    ----------
    spec : LayerSpec
    samples : int
    rows : int or None
        The most to draw; None for as many as there are samples, or 16,384.
    memory_limit : int
        Bytes of the whole run, five eighths of which rows and what a solver holds beside them may take.
    seed : int

    Raises
    ------
    ProblemError
        The limit does not leave room for a program.
    """
    total = samples * spec.positions
    fit = max(0, _room(memory_limit) - _square_bytes(spec)) // row_bytes(spec)
    if fit < min(_LEAST, total):
        raise ProblemError(
            f"memory_limit={memory_limit} holds {fit} rows of layer {spec.name!r} with "
            f"{spec.in_features * spec.groups} inputs and {spec.out_features} outputs: raise it, or leave the layer "
            "out by ignore."
        )
    count = min(total, max(samples, ROWS) if rows is None else rows, fit)
    if count == total:
        return None
    # every layer draws for itself, so that leaving one out changes no other
    drawing = np.random.default_rng([seed, zlib.crc32(spec.name.encode())])
    return torch.from_numpy(np.sort(drawing.choice(total, count, replace=False, shuffle=False)))


def decide(spec: LayerSpec, need: str, samples: int, rows: int | None, memory_limit: int, seed: int) -> Wanted:
    """Return what a method that needs "rows", "moments" or the "weight" alone is given of a layer.

    For "moments" that is all rows while they fit beside the Gram matrices and are no more than `choose_rows` would
    draw, since a method can do more with them.

    Raises
    ------
    ProblemError
        The limit does not leave room for it.
    """
    if need == "weight":
        return Wanted(torch.empty(0, dtype=torch.int64))
    if need == "rows":
        return Wanted(choose_rows(spec, samples, rows, memory_limit, seed))
    summed = Wanted(moments=True)
    needed = _held_bytes(spec, summed, samples) + _solver_bytes(spec, summed, samples)
    if needed > _room(memory_limit):
        raise ProblemError(
            f"the Gram matrix of layer {spec.name!r} with {spec.in_features} inputs and what is made of it take "
            f"{needed / 2**20:.0f} MiB, and memory_limit={memory_limit} leaves {_room(memory_limit) / 2**20:.0f} MiB "
            f"for it: raise it to {math.ceil(needed / _room(2**20))} MiB, or leave the layer out by ignore."
        )
    total = samples * spec.positions
    most = max(samples, ROWS) if rows is None else rows
    if total <= most and _held_bytes(spec, Wanted(), samples) + needed <= _room(memory_limit):
        return Wanted()
    return summed


def row_bytes(spec: LayerSpec) -> int:
    """Return the bytes that one row takes while its layer is solved, in float64, as measured.

    The data, and of one group at a time three times its inputs and eleven times its outputs.
    """
    wide, tall = spec.in_features, spec.out_features // spec.groups
    return 8 * (wide * spec.groups + spec.out_features + 3 * (wide + 1) + 11 * tall)


def _square_bytes(spec: LayerSpec) -> int:
    """What a convex program takes whatever its rows: seven Gram matrices, and Newton's Hessians, as measured."""
    square = (spec.in_features + 1) ** 2
    return 8 * _GRAMS * square + min(2**30, 4 * (spec.out_features // spec.groups) * square)


def _room(memory_limit: int) -> int:
    """What collected data and the solver may take; the rest is for samples that are held, and what allocators keep."""
    return 5 * memory_limit // 8


def packs(
    graph: LayerGraph, wanted: Mapping[str, Wanted], samples: int, memory_limit: int, workers: int = 1
) -> Iterator[list[str]]:
    """Split layers so that what is collected of each pack, and what solvers hold beside it, stays within the limit."""
    pack: list[str] = []
    held, beside = 0, [0]
    for name, want in wanted.items():
        spec = graph.layer(name)
        size, more = _held_bytes(spec, want, samples), _solver_bytes(spec, want, samples)
        if pack and held + size + sum(heapq.nlargest(workers, [*beside, more])) > _room(memory_limit):
            yield pack
            pack, held, beside = [], 0, [0]
        pack.append(name)
        held += size
        beside.append(more)
    if pack:
        yield pack


def _row_count(spec: LayerSpec, want: Wanted, samples: int) -> int:
    if want.moments:
        return 0
    return samples * spec.positions if want.chosen is None else len(want.chosen)


def _held_bytes(spec: LayerSpec, want: Wanted, samples: int) -> int:
    """What is collected of a layer."""
    if want.moments:
        side = spec.in_features + 1
        return 8 * spec.groups * (side + _BLOCK) * (side + spec.out_features // spec.groups)
    return 8 * _row_count(spec, want, samples) * (spec.in_features * spec.groups + spec.out_features)


def _solver_bytes(spec: LayerSpec, want: Wanted, samples: int) -> int:
    """What the solver of a layer holds beside that."""
    if want.moments:
        return 8 * _GRAMS * (spec.in_features + 1) ** 2
    count = _row_count(spec, want, samples)
    return count * row_bytes(spec) - _held_bytes(spec, want, samples) + (_square_bytes(spec) if count else 0)


@dataclass(frozen=True)
class Estimate:
    """What a run will hold, known before any layer is solved.

    Attributes
    ----------
    layers : dict of str to (str, int)
        For each layer what is taken of it in words, and the bytes of that with what its solver holds beside it.
    at_a_time : int
        Samples that run at a time.
    spooled : int
        Bytes of samples in temporary files.
    memory_limit : int
        Bytes.
    """

    layers: dict[str, tuple[str, int]]
    at_a_time: int
    spooled: int
    memory_limit: int

    def sentence(self) -> str:
        """Return it in one line."""
        parts = [f"{name}: {what}, {_size(size)}" for name, (what, size) in self.layers.items()]
        spool = f"; {_size(self.spooled)} of samples in temporary files" if self.spooled else ""
        return (
            f"at most {_size(self.memory_limit)} beside the networks, {self.at_a_time} samples at a time{spool}; "
            + "; ".join(parts)
        )


def estimate(
    graph: LayerGraph, need: str, batches: Batches, held: Batches | None, rows: int | None, limit: int, at_a_time: int
) -> Estimate:
    """Find what a run will hold, and refuse what cannot fit.

    Parameters
    ----------
    graph : LayerGraph
    need : str
        What the method needs of a layer: one of `nettrim.methods.base.NEEDS`.
    batches, held : Batches, Batches or None
        The calibration and the held-out samples.
    rows : int or None
        The most rows of a convex program.
    limit : int
        Bytes.
    at_a_time : int
        Samples that run at a time.

    Raises
    ------
    ProblemError
        The limit does not leave room for a layer, which the text names.
    """
    found = {}
    for spec in graph.selected:
        wanted, total = decide(spec, need, batches.rows, rows, limit, 0), batches.rows * spec.positions
        size = _held_bytes(spec, wanted, batches.rows) + _solver_bytes(spec, wanted, batches.rows)
        if need == "weight":
            what = "its weight"
        elif wanted.moments:
            what = f"moments of {total:,} rows"
        else:
            what = f"{_row_count(spec, wanted, batches.rows):,} of {total:,} rows"
        found[spec.name] = (what, size)
    spooled = batches.spooled_bytes + (0 if held is None else held.spooled_bytes)
    return Estimate(found, at_a_time, spooled, limit)


def _size(count: int) -> str:
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"


def collect(
    graph: LayerGraph,
    dense: Mapping[str, Tensor],
    state: Mapping[str, Tensor],
    batches: Batches,
    wanted: Mapping[str, Wanted],
    at_a_time: int,
    progress: bool = False,
) -> dict[str, Collected]:
    """Run the networks over all samples once, and keep what is wanted of each layer.

    Parameters
    ----------
    graph : LayerGraph
    dense, state : mapping from str to Tensor
        Outputs are the first one's, inputs the second one's.
    batches : Batches
    wanted : mapping from str to Wanted
    at_a_time : int
        Samples that run at a time.
    progress : bool
    """
    specs = {name: graph.layer(name) for name in wanted}
    like = next(iter(dense.values()))
    rows: dict[str, tuple[Tensor, Tensor]] = {}
    sums_of: dict[str, list[_Sums]] = {}
    sums = {name for name, want in wanted.items() if want.residual}
    for name, want in wanted.items():
        spec = specs[name]
        count = 0 if want.moments else batches.rows * spec.positions if want.chosen is None else len(want.chosen)
        wide = spec.in_features * spec.groups
        rows[name] = (like.new_empty(count, wide), like.new_empty(count, spec.out_features))
    # a method that looks at weights alone wants no row: then nothing runs
    names = [name for name, want in wanted.items() if want.moments or want.chosen is None or len(want.chosen)]
    for seen in scan(graph, dense, state, batches, names, at_a_time, progress, sums) if names else ():
        want, spec = wanted[seen.name], specs[seen.name]
        if want.moments:
            if seen.name not in sums_of:
                sums_of[seen.name] = [_Sums(spec, like) for _ in range(spec.groups)]
            for total, x, y in zip(sums_of[seen.name], *_split(seen.inputs, seen.outputs, spec.groups), strict=True):
                total.add(x, y)
            continue
        inputs, outputs = rows[seen.name]
        stop = seen.start + len(seen.inputs)
        if want.chosen is None:
            inputs[seen.start : stop], outputs[seen.start : stop] = seen.inputs, seen.outputs
            continue
        first, last = torch.searchsorted(want.chosen, torch.tensor([seen.start, stop])).tolist()
        own = (want.chosen[first:last] - seen.start).to(seen.inputs.device)
        inputs[first:last], outputs[first:last] = seen.inputs[own], seen.outputs[own]
    moments = {name: [total.moments() for total in several] for name, several in sums_of.items()}
    return {name: Collected(*rows[name], batches.rows * specs[name].positions, moments.get(name)) for name in wanted}


class _Sums:
    """Sums up the moments of one group's rows, which are gathered first: a sum costs the same for one row as for many.

    Parameters
    ----------
    spec : LayerSpec
    like : Tensor
        Of the dtype and device of the rows.
    """

    def __init__(self, spec: LayerSpec, like: Tensor) -> None:
        side, neurons = spec.in_features + 1, spec.out_features // spec.groups
        self._rows, self._outputs = like.new_ones(_BLOCK, side), like.new_empty(_BLOCK, neurons)
        self._filled = self._count = 0
        self._gram, self._cross = like.new_zeros(side, side), like.new_zeros(side, neurons)
        self._power = like.new_zeros(())

    def add(self, inputs: Tensor, outputs: Tensor) -> None:
        """Take in rows (P, N) and (P, M)."""
        start = 0
        while start < len(inputs):
            size = min(_BLOCK - self._filled, len(inputs) - start)
            place, cut = slice(self._filled, self._filled + size), slice(start, start + size)
            self._rows[place, :-1], self._outputs[place] = inputs[cut], outputs[cut]
            self._filled, start = self._filled + size, start + size
            if self._filled == _BLOCK:
                self._sum()

    def moments(self) -> Moments:
        """Return the moments of all rows."""
        self._sum()
        # products are symmetric but for their rounding
        self._gram[:-1, -1] = self._gram[-1, :-1]
        return Moments(self._count, self._gram, self._cross, self._power)

    def _sum(self) -> None:
        x, y = self._rows[: self._filled], self._outputs[: self._filled]
        self._gram.addmm_(x.T, x)
        self._cross.addmm_(x.T, y)
        self._power.add_(y.square().sum())
        self._count, self._filled = self._count + self._filled, 0


def _split(inputs: Tensor, outputs: Tensor, groups: int) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
    return inputs.chunk(groups, 1), outputs.chunk(groups, 1)
