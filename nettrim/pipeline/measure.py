"""Two networks side by side on the same samples: how far apart they are at every step, and how each passes errors on.

Nothing is held but sums. The networks in between (the first so many layers pruned, the rest dense) run along, so that
the error at the output can be attributed to layers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from nettrim.network.batches import Batch, Batches
from nettrim.network.gains import Flow, combine, flow
from nettrim.network.program import Held, Moment, Program, leaves, resolve, substitute, walk
from nettrim.network.trace import LayerGraph
from nettrim.pipeline.guarantees import HeldOut, SampleFigures

State = Mapping[str, Tensor]


@dataclass
class Passage:
    """What one step does with errors, over all samples; sums of squares.

    Attributes
    ----------
    error : float
        ``‖v̂ − v‖²`` between the networks.
    norm : float
        ``‖v‖²`` of the dense one.
    own : float
        ``‖f(x; θ̂) − f(x; θ)‖²`` on the dense network's inputs.
    own_after : float
        The same behind the layer's ReLU; as `own` where it has none.
    flow : Flow or None
        How errors of what it reads pass on; None of layers, and where no error comes in.
    """

    error: float = 0.0
    norm: float = 0.0
    own: float = 0.0
    own_after: float = 0.0
    flow: Flow | None = None


@dataclass
class Measured:
    """All of it.

    Attributes
    ----------
    passages : list of Passage
        Of every step.
    ladder : list of float
        ``‖h_l − h_{l−1}‖²`` at the output, for every pruned layer and then for whatever else differs.
    samples : int
    right : tuple of (int, int)
        Labels that the dense and the pruned network hit, and how many there are in `labels`.
    labels : int
    figures : list of SampleFigures
        What is known of single samples, where they are held out.
    """

    passages: list[Passage]
    ladder: list[float] = field(default_factory=list)
    samples: int = 0
    right: tuple[int, int] = (0, 0)
    labels: int = 0
    figures: list[SampleFigures] = field(default_factory=list)

    @property
    def guarantee(self) -> HeldOut | None:
        """What the samples prove about new ones of their distribution, where they were kept apart."""
        return None if not self.figures else SampleFigures.joined(self.figures).guarantee()

    @property
    def accuracy(self) -> dict[str, float] | None:
        """The share of right answers, where there are labels."""
        if not self.labels:
            return None
        return {"dense": self.right[0] / self.labels, "pruned": self.right[1] / self.labels}


def measure(
    graph: LayerGraph,
    dense: State,
    pruned: State,
    rungs: Sequence[State],
    batches: Batches,
    rows: int,
    *,
    gains: bool = True,
    single: bool = False,
) -> Measured:
    """Run the networks side by side.

    Parameters
    ----------
    graph : LayerGraph
    dense, pruned : state
        Entries that are the same must be the same objects.
    rungs : sequence of state
        The networks in between, from the dense end.
    batches : Batches
    rows : int
        Samples that run at a time.
    gains : bool
        Whether to find what each step adds of its own, and how it passes errors on: what bounds are made of.
    single : bool
        Whether to keep what is known of single samples.
    """
    program = graph.program
    result = Measured([Passage() for _ in program.steps])
    behind = {layer.step: layer.relu for layer in graph.layers}
    states = [dense, pruned, *rungs]
    result.ladder = [0.0] * (len(rungs) + 1)
    for batch in batches.chunks(rows):
        for moment in walk(program, states, batch):
            passage = result.passages[moment.at]
            _note(passage, moment, states, behind, gains)
            if moment.at == program.output.step:
                _note_output(result, program, moment, batch, single)
        result.samples += len(batch)
    return result


def _note(passage: Passage, moment: Moment, states: Sequence[State], behind: Mapping[int, bool], gains: bool) -> None:
    ours, theirs = moment.values[0], moment.values[1]
    tensors = list(zip(_tensors(ours), _tensors(theirs), strict=True))
    passage.norm += sum(_square(a) for a, _ in tensors)
    if ours is theirs:
        return
    same = True
    for a, b in tensors:
        if a.is_floating_point():
            passage.error += _square(b - a)
        elif a.shape != b.shape or not torch.equal(a, b):
            same = False
    if not same:
        passage.error = math.inf  # indices that differ: nothing is known of what they pick
    if gains and _differs(moment, states):
        crossed = _crossed(moment, states)
        for a, b in zip(_tensors(ours), _tensors(crossed), strict=True):
            if a.is_floating_point():
                passage.own += _square(b - a)
                if behind.get(moment.at):
                    b, a = b.clamp(min=0), a.clamp(min=0)
                passage.own_after += _square(b - a)
    if gains and moment.at not in behind:
        found = flow(moment.step, moment.args[0], moment.args[1], ours)
        passage.flow = found if passage.flow is None else combine(passage.flow, found)


def _differs(moment: Moment, states: Sequence[State]) -> bool:
    return any(states[0][name] is not states[1][name] for name in moment.step.held)


def _crossed(moment: Moment, states: Sequence[State]) -> object:
    """Return what the step gives with the pruned network's parameters on the dense network's inputs."""
    real = iter(list(leaves(moment.args[0])))

    def change(leaf: object) -> object:
        value = next(real)
        return states[1][leaf.name] if isinstance(leaf, Held) else value

    args, kwargs = substitute((moment.step.args, moment.step.kwargs), change)
    return resolve(moment.step.target)(*args, **kwargs)


def _note_output(result: Measured, program: Program, moment: Moment, batch: Batch, single: bool) -> None:
    item = program.output.item
    values: list[Tensor] = [v if item is None else v[item] for v in moment.values]
    dense, pruned, *rungs = values
    chain = [dense, *rungs, pruned]
    for k in range(len(chain) - 1):
        if chain[k + 1] is not chain[k]:
            result.ladder[k] += _square(chain[k + 1] - chain[k])
    if batch.labels is not None and are_classes(dense, batch.labels):
        labels = batch.labels.to(dense.device)
        hits = tuple(int((v.argmax(-1) == labels).sum()) for v in (dense, pruned))
        result.right = (result.right[0] + hits[0], result.right[1] + hits[1])
        result.labels += labels.numel()
    if single:
        result.figures.append(SampleFigures.of(dense, pruned))


def are_classes(outputs: Tensor, labels: Tensor) -> bool:
    """Whether labels are class indices of the rows of the outputs; accuracy has no meaning otherwise."""
    return outputs.dim() == labels.dim() + 1 and outputs.shape[:-1] == labels.shape and not labels.is_floating_point()


def _tensors(value: object) -> list[Tensor]:
    return [leaf for leaf in leaves(value) if isinstance(leaf, Tensor)]


def _square(tensor: Tensor) -> float:
    if not tensor.is_floating_point():
        return 0.0
    flat = tensor.double().flatten()
    return float(flat @ flat)
