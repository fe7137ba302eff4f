"""What goes into and comes out of every layer on the user's data, handed on piece by piece: nothing is held here.

The dense network and the pruned one run side by side: targets are what the dense one says, inputs what reaches a layer
through the pruned prefix.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from tqdm import tqdm

from nettrim.errors import ProblemError
from nettrim.network.batches import Batch, Batches, read_batches
from nettrim.network.matrix import input_rows, output_rows
from nettrim.network.observe import call, output_of
from nettrim.network.program import Count, Program, leaves, walk
from nettrim.network.trace import LayerGraph

_CHUNK = 512  # samples that run at a time, at the most: more gain nothing


class Seen(NamedTuple):
    """What one layer saw and said on some samples.

    Attributes
    ----------
    name : str
    start : int
        The number of its first row, of all that the layer has.
    inputs : Tensor, shape (P, G · N)
        Vectors, or patches; of a network whose prefix may be pruned.
    outputs : Tensor, shape (P, M)
        Of the dense network, before any activation.
    """

    name: str
    start: int
    inputs: Tensor
    outputs: Tensor


def scan(
    graph: LayerGraph,
    dense: Mapping[str, Tensor],
    state: Mapping[str, Tensor],
    batches: Batches,
    names: Sequence[str],
    rows: int,
    progress: bool = False,
    sums: Collection[str] = (),
) -> Iterator[Seen]:
    """Run both networks on all samples and yield what goes into and comes out of some layers.

    Parameters
    ----------
    graph : LayerGraph
    dense, state : mapping from str to Tensor
        Weights of the dense network, whose outputs are yielded, and of that whose inputs are.
    batches : Batches
    names : sequence of str
        Layers.
    rows : int
        Samples that run at a time.
    progress : bool
        Show a bar on stderr, if that is a terminal.
    sums : collection of str
        Those of the layers whose outputs shall be what is missing at the sum that they flow into: the dense network's
        sum less the other network's trunk.

    Raises
    ------
    ProblemError
        An activation is NaN or infinite.
    """
    specs = {graph.layer(name).step: graph.layer(name) for name in names}
    ends = {spec.sum: spec for spec in specs.values() if spec.name in sums and spec.sum is not None}
    done = dict.fromkeys(names, 0)
    for index, batch in enumerate(_bar(batches, rows, "record", progress)):
        waiting: dict[str, Tensor] = {}
        for moment in walk(graph.program, [dense, state], batch, until=max([*specs, *ends])):
            spec = ends.get(moment.at)
            if spec is not None:
                inputs = waiting.pop(spec.name)
                given = [leaf for leaf in leaves(moment.args[1]) if isinstance(leaf, Tensor)]
                outputs = output_rows(moment.values[0] - given[spec.trunk], spec.window)
            else:
                spec = specs.get(moment.at)
                if spec is None:
                    continue
                args, kwargs = moment.args[1]
                inputs = input_rows(args[0] if args else kwargs["input"], spec.window)
                if spec.name in sums:
                    waiting[spec.name] = inputs
                    continue
                outputs = output_rows(moment.values[0], spec.window)
            for what, tensor in (("input", inputs), ("output", outputs)):
                bad = int((~torch.isfinite(tensor)).sum())
                if bad:
                    raise ProblemError(
                        f"the {what} of layer {spec.name!r} has {bad} NaN or infinite entries on samples "
                        f"{index * rows} and after; clean or rescale the data, or check the model's weights"
                    )
            yield Seen(spec.name, done[spec.name], inputs, outputs)
            done[spec.name] += len(inputs)


def outputs(
    model: nn.Module, batches: Iterable[object], dtype: torch.dtype = torch.float64, progress: bool = False
) -> Tensor:
    """Run a model and collect its outputs.

    Parameters
    ----------
    model : nn.Module
        Run in evaluation mode without gradients; left as it was.
    batches : iterable
        As `read_batches` takes them; moved to the model's device and, where floating, to its dtype.
    dtype : torch.dtype
        Of the result; the model computes in its own.
    progress : bool
        Show a bar on stderr, if that is a terminal.

    Returns
    -------
    Tensor, shape (P, C)
        Leading dimensions flattened to rows, batches joined in their order; C is 1 if the model returns one
        number for each row.

    Raises
    ------
    ProblemError
        A batch is refused, does not fit the model, or makes an output NaN or infinite.
    UnsupportedError
        The model returns no tensor that could be its output.
    """
    read = batches if isinstance(batches, Batches) else read_batches(batches)
    pieces = []
    bar: Iterable[Batch] = tqdm(read, "outputs", leave=False, disable=None if progress else True)
    for index, batch in enumerate(bar):
        result = output_of(call(model, batch, index), model).detach().to(dtype)
        bad = int((~torch.isfinite(result)).sum())
        if bad:
            raise ProblemError(
                f"the model's output on batches[{index}] has {bad} NaN or infinite entries of {result.numel()}; "
                "clean or rescale the data, or check the model's weights"
            )
        pieces.append(
            (result.unsqueeze(1) if result.dim() == 1 else result).reshape(
                -1, result.shape[-1] if result.dim() > 1 else 1
            )
        )
    return torch.cat(pieces)


def samples_at_a_time(graph: LayerGraph, budget: int, networks: int = 2) -> int:
    """Return how many samples can run at a time within a number of bytes, at least one.

    Parameters
    ----------
    graph : LayerGraph
    budget : int
        Bytes for the activations that live at the same time, and for one layer's patches.
    networks : int
        That run side by side.
    """
    patches = max(layer.positions * layer.in_features * layer.groups * 8 for layer in graph.layers)
    return max(1, min(_CHUNK, budget // (networks * _live_bytes(graph.program) + 2 * patches)))


def _live_bytes(program: Program) -> int:
    """Return the most bytes of activations that one sample needs at a time, in float64."""
    last, live, most = program.last_uses(), 0, 1
    sizes = [_entries(step.shape) * 8 for step in program.steps]
    for index in range(len(program.steps)):
        live += sizes[index]
        most = max(most, live)
        live -= sum(size for source, size in enumerate(sizes[: index + 1]) if last[source] == index)
    return most


def _entries(shape: tuple[int | Count, ...] | None) -> int:
    """Return the entries that one more sample adds to a tensor."""
    if shape is None or not any(isinstance(size, Count) for size in shape):
        return 0
    entries = 1
    for size in shape:
        entries *= size.each if isinstance(size, Count) else size
    return entries


def _bar(batches: Batches, rows: int, title: str, progress: bool) -> Iterator[Batch]:
    # disable=None hides the bar where stderr is not a terminal
    with tqdm(total=batches.rows, desc=title, unit="sample", leave=False, disable=None if progress else True) as bar:
        for batch in batches.chunks(rows):
            yield batch
            bar.update(len(batch))
