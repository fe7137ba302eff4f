"""How a network's outputs follow from what its layers hand on: one forward pass, and back along directions.

The program is run, not the module, so that nothing is hooked and every layer is found, whatever module it lies in.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from nettrim.errors import NetTrimError, ProblemError, UnsupportedError
from nettrim.network.batches import Batch
from nettrim.network.edit import first_line
from nettrim.network.program import Count, Program, Ref, run
from nettrim.network.trace import LayerGraph

DIRECTIONS = 32  # outputs of a sample up to which each has its own backward pass; beyond, so many random signs
_ENTRIES = 2**25  # of all activations that a backward pass needs, which are held at a time


@dataclass(frozen=True, eq=False)
class Pass:
    """One forward pass that gradients can be followed back through.

    Attributes
    ----------
    outputs : Tensor (B, ...)
    handed : dict of str to Tensor
        What each layer gave, in the layout of its step: before its ReLU, or behind one that is open everywhere.
    inputs : dict of str to Tensor
        What went into each layer, in the layout of its step.
    """

    outputs: Tensor
    handed: dict[str, Tensor]
    inputs: dict[str, Tensor]


def follow(
    graph: LayerGraph, state: Mapping[str, Tensor], batch: Batch, names: Sequence[str], behind_relu: bool = False
) -> Pass:
    """Run a network so that gradients lead back to what some layers hand on.

    Parameters
    ----------
    graph : LayerGraph
    state : mapping from str to Tensor
        Folded; no tensor of it needs a gradient.
    batch : Batch
    names : sequence of str
        Layers.
    behind_relu : bool
        Start at a layer's ReLU, where it has one, not before it.

    Raises
    ------
    ProblemError
        The network fails on the batch.
    UnsupportedError
        Its output has no row for each sample.
    """
    program = graph.program
    specs = {graph.layer(name).step: graph.layer(name) for name in names}
    sources = {spec.name: program.steps[index].argument("input") for index, spec in specs.items()}
    noted: dict[int, object] = {ref.step: None for ref in sources.values()}
    handed: dict[str, Tensor] = {}

    def change(index: int, value: object) -> object:
        if index in specs:
            assert isinstance(value, Tensor)
            # slopes are taken here, so no weight and no input needs one
            start = value if value.requires_grad else value.detach().requires_grad_()
            if behind_relu and specs[index].relu:
                # positive, the ReLU behind hands it on as it is: the slope at its output is the slope here
                start = start.clamp(min=torch.finfo(start.dtype).tiny)
            handed[specs[index].name] = value = start
        if index in noted:
            noted[index] = value
        return value

    try:
        with torch.enable_grad():
            outputs = run(program, state, batch, change)
    except NetTrimError:
        raise
    except (RuntimeError, IndexError, ValueError) as error:
        shapes = ", ".join(str(tuple(tensor.shape)) for tensor in (*batch.inputs, *batch.kwargs.values()))
        raise ProblemError(
            f"the network fails on inputs of shape {shapes} ({first_line(error)}); pass inputs that it can be called on"
        ) from error
    if outputs.dim() == 0 or len(outputs) != len(batch):
        raise UnsupportedError(
            f"the model maps {len(batch)} rows to {tuple(outputs.shape)}; wrap it so that it returns (B, C)"
        )
    given: dict[str | int, Tensor] = dict(enumerate(batch.inputs))
    given.update(batch.kwargs)
    inputs = {}
    for name, ref in sources.items():
        known = ref.step >= len(program.inputs)
        value = _item(noted[ref.step], ref) if known else given[program.inputs[ref.step]]
        inputs[name] = value.detach().to(handed[name].device, handed[name].dtype)
    return Pass(outputs, handed, inputs)


def _item(value: object, ref: Ref) -> Tensor:
    picked = value if ref.item is None else value[ref.item]  # type: ignore[index]
    assert isinstance(picked, Tensor)
    return picked


class Directions:
    """The directions that outputs are followed along.

    With up to 32 outputs of a sample each of them in turn; with more, 32 vectors ``r`` of random signs over the root of
    32, drawn for every sample anew: ``E Σ (rᵀ J)² = Σ_c J_c²`` (Hutchinson, "A stochastic estimator of the trace of
    the influence matrix", 1990). What is drawn hangs on the seed and the order of the samples, not on the batches.

    Parameters
    ----------
    seed : int
    """

    def __init__(self, seed: int) -> None:
        self._drawing = [torch.Generator().manual_seed(seed * DIRECTIONS + k) for k in range(DIRECTIONS)]

    def of(self, outputs: Tensor) -> Iterator[Tensor]:
        """Yield tensors like the outputs."""
        rows, each = len(outputs), outputs[0].numel()
        if each <= DIRECTIONS:
            for k in range(each):
                direction = torch.zeros(rows, each)
                direction[:, k] = 1.0
                yield direction.to(outputs).reshape(outputs.shape)
            return
        for generator in self._drawing:
            drawn = torch.randint(0, 2, (rows, each), generator=generator, dtype=torch.int8)
            yield (drawn.to(outputs) * 2.0 - 1.0).div_(math.sqrt(DIRECTIONS)).reshape(outputs.shape)


def slopes(outputs: Tensor, sources: Mapping[str, Tensor], directions: Directions) -> Iterator[dict[str, Tensor]]:
    """Yield, direction after direction, the derivative of the outputs along it in each source.

    Samples do not mix, so one backward pass serves all of them.

    Raises
    ------
    UnsupportedError
        No gradient leads from the outputs to a source.
    """
    following = list(sources.values())
    for direction in directions.of(outputs):
        try:
            found = torch.autograd.grad(outputs, following, direction, retain_graph=True, allow_unused=True)
        except RuntimeError as error:
            raise UnsupportedError(_cut(list(sources), f" ({first_line(error)})")) from error
        missed = [name for name, slope in zip(sources, found, strict=True) if slope is None]
        if missed:
            raise UnsupportedError(_cut(missed, ""))
        yield dict(zip(sources, found, strict=True))


def _cut(names: Sequence[str], why: str) -> str:
    return (
        f"no gradient leads from the network's output to {', '.join(names)}{why}: make what lies between "
        "differentiable, and detach nothing there"
    )


def rows_at_a_time(program: Program, most: int, more: int = 0) -> int:
    """Return how many samples can be followed at a time, at least one.

    Parameters
    ----------
    program : Program
    most : int
    more : int
        Entries that are held for each sample beside its activations.
    """
    each = more + sum(_entries(step.shape) for step in program.steps)
    return max(1, min(most, _ENTRIES // max(1, each)))


def _entries(shape: tuple[int | Count, ...] | None) -> int:
    sizes = [size.fixed + size.each if isinstance(size, Count) else size for size in shape or (0,)]
    return math.prod(sizes)
