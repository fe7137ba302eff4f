"""A network's forward as a list of steps that can be run, stored and reasoned about; weights are named, not held.

One list serves everything: activations are recorded, errors followed and figures replayed by running it with the dense
weights, the pruned ones, or several side by side. How it comes from a module is `nettrim.network.observe`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from nettrim.errors import ProblemError
from nettrim.network.batches import Batch
from nettrim.network.functions import SIGNATURES, resolve

__all__ = ["Count", "Held", "Moment", "Program", "Ref", "Step", "leaves", "resolve", "run", "substitute", "walk"]


class Ref(NamedTuple):
    """The value of an earlier step, or one of its values where it gives several."""

    step: int
    item: int | None = None


class Held(NamedTuple):
    """A parameter, buffer or constant, by its name in the state."""

    name: str


class Count(NamedTuple):
    """A whole number that follows the batch: ``fixed + each · B`` for ``B`` samples."""

    fixed: int
    each: int


@dataclass(frozen=True)
class Step:
    """One call of a torch function.

    Attributes
    ----------
    target : str
        Its full name, such as "torch.nn.functional.relu"; "input" for what the network is given.
    args, kwargs
        Its arguments, in which tensors are `Ref` or `Held` and numbers that follow the batch are `Count`.
    where : str
        The module whose forward made the call, for messages; "" outside of any.
    shape : tuple of int or Count, or None
        Of the tensor that it gives, None where it gives several.
    """

    target: str
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)
    where: str = ""
    shape: tuple[int | Count, ...] | None = None

    @property
    def op(self) -> str:
        """What is called, whichever of torch's names it was called by: "relu", "conv2d", "add"."""
        name = self.target.removeprefix("torch.").removeprefix("ops.")
        if name.startswith("aten."):
            return name.split(".")[1]
        for prefix in ("nn.functional.", "functional.", "Tensor."):
            name = name.removeprefix(prefix)
        name = name.removesuffix(".__get__")
        return name.strip("_") if name.startswith("__") else name

    def argument(self, name: str, default: Any = None) -> Any:
        """Return an argument by name, however it was passed; `default` where it was not.

        Raises
        ------
        KeyError
            The function is none of those whose arguments are known.
        """
        # torch.batch_norm and its operator take their arguments in another order than torch.nn.functional.batch_norm
        own = f"torch.{self.op}" if not self.target.startswith("torch.nn.functional.") else ""
        key = own if own in SIGNATURES else self.op
        position = SIGNATURES[key].index(name)
        if position < len(self.args):
            return self.args[position]
        return self.kwargs.get(name, default)

    @property
    def refs(self) -> list[Ref]:
        """The earlier values that it reads, in the order of its arguments."""
        return [leaf for leaf in leaves((self.args, self.kwargs)) if isinstance(leaf, Ref)]

    @property
    def held(self) -> list[str]:
        """The names of the parameters, buffers and constants that it reads."""
        return [leaf.name for leaf in leaves((self.args, self.kwargs)) if isinstance(leaf, Held)]


@dataclass(frozen=True)
class Program:
    """The forward of one network.

    Attributes
    ----------
    steps : tuple of Step
        The first are the inputs, in the order of `inputs`; every step reads only earlier ones.
    inputs : tuple of str or int
        Positions and keywords of what forward is given.
    output : Ref
        The one tensor that it returns.
    reads_values : bool
        Whether the forward looked at the values of tensors, so that other data may take another path.
    """

    steps: tuple[Step, ...]
    inputs: tuple[str | int, ...]
    output: Ref
    reads_values: bool = False

    def users(self) -> list[list[int]]:
        """Return for every step the later ones that read it."""
        found: list[list[int]] = [[] for _ in self.steps]
        for index, step in enumerate(self.steps):
            for source in dict.fromkeys(ref.step for ref in step.refs):
                found[source].append(index)
        return found

    def last_uses(self) -> list[int]:
        """Return for every step the last one that reads it: behind it its value can go."""
        last = list(range(len(self.steps)))
        for index, step in enumerate(self.steps):
            for ref in step.refs:
                last[ref.step] = index
        last[self.output.step] = len(self.steps)
        return last


class Moment(NamedTuple):
    """One step while it is run.

    Attributes
    ----------
    at : int
    step : Step
    args : list of (args, kwargs)
        What it was called with, for each state.
    values : list
        What it gave, for each state; one and the same object where two states cannot differ.
    """

    at: int
    step: Step
    args: list[tuple[tuple[Any, ...], dict[str, Any]]]
    values: list[Any]


def walk(
    program: Program, states: Sequence[Mapping[str, Tensor]], batch: Batch, until: int | None = None
) -> Iterator[Moment]:
    """Run a program on one batch with several states side by side, and stop at every step.

    What cannot differ is computed once: a step whose arguments are the same objects for two states. So networks of
    which only the last layers differ share all that comes before. Values are dropped behind their last reader.

    Parameters
    ----------
    program : Program
    states : sequence of mapping from str to Tensor
        Weights by name; tensors that states share must be the same objects.
    batch : Batch
        Moved to the state's device and, where floating, to its dtype.
    until : int, optional
        The last step to run.

    Yields
    ------
    Moment
        Every step but the inputs. The values belong to the walk: nothing may be changed in place.
    """
    last = program.last_uses()
    values = [given and given * len(states) for given in _given(program, states[0], batch)]
    stop = len(program.steps) if until is None else until + 1
    with torch.no_grad():
        for index in range(len(program.inputs), stop):
            step = program.steps[index]
            reads = [leaf for leaf in leaves((step.args, step.kwargs)) if isinstance(leaf, (Ref, Held))]
            calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
            results: list[Any] = []
            first: dict[tuple[int, ...], int] = {}
            for k, state in enumerate(states):
                twin = first.setdefault(tuple(id(_lookup(leaf, values, k, state)) for leaf in reads), k)
                if twin < k:
                    calls.append(calls[twin])
                    results.append(results[twin])
                    continue
                args, kwargs = _called(step, values, k, state, len(batch))
                calls.append((args, kwargs))
                results.append(resolve(step.target)(*args, **kwargs))
            yield Moment(index, step, calls, results)
            values.append(results)
            for source in {ref.step for ref in step.refs} | {index}:
                if last[source] <= index:
                    values[source] = None


def run(
    program: Program,
    state: Mapping[str, Tensor],
    batch: Batch,
    change: Callable[[int, Any], Any] | None = None,
) -> Tensor:
    """Return the network's output on one batch.

    Parameters
    ----------
    program : Program
    state : mapping from str to Tensor
    batch : Batch
    change : callable, optional
        Is handed the number of every step and what it gave, and returns what the later steps shall read instead. With
        it gradients are followed where they are switched on.
    """
    last, values = program.last_uses(), _given(program, state, batch)
    for index in range(len(program.inputs), program.output.step + 1):
        step = program.steps[index]
        args, kwargs = _called(step, values, 0, state, len(batch))
        with torch.set_grad_enabled(change is not None and torch.is_grad_enabled()):
            result = resolve(step.target)(*args, **kwargs)
        values.append([result if change is None else change(index, result)])
        for source in {ref.step for ref in step.refs} | {index}:
            if last[source] <= index:
                values[source] = None
    picked: Tensor = _lookup(program.output, values, 0, state)
    return picked


def _given(program: Program, state: Mapping[str, Tensor], batch: Batch) -> list[list[Any] | None]:
    """Return the inputs of a program, on the state's device and, where floating, in its dtype."""
    like = _like(state)
    given: dict[str | int, Tensor] = dict(enumerate(batch.inputs)) | batch.kwargs
    missing = [name for name in program.inputs if name not in given]
    if missing:
        raise ProblemError(f"a batch has no input {missing[0]!r}, which batches[0] had; give all batches the same")
    return [[_moved(given[name], like)] for name in program.inputs]


def _moved(tensor: Tensor, like: Tensor | None) -> Tensor:
    if like is None:
        return tensor
    return tensor.to(like.device, like.dtype if tensor.is_floating_point() else tensor.dtype)


def _called(
    step: Step, values: list[list[Any] | None], k: int, state: Mapping[str, Tensor], batch: int
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the real arguments of a step in the k-th of the networks."""
    called: tuple[tuple[Any, ...], dict[str, Any]] = substitute(
        (step.args, step.kwargs), lambda leaf: _fitting(_lookup(leaf, values, k, state, batch), state)
    )
    return called


def _fitting(leaf: Any, state: Mapping[str, Tensor]) -> Any:
    """Return a dtype, device or number as it is on the state's device and in its dtype: observed was float64."""
    if not (leaf is torch.float64 or isinstance(leaf, (torch.device, float))):
        return leaf
    like = _like(state)
    if like is None:
        return leaf
    if isinstance(leaf, torch.device):
        return like.device
    if isinstance(leaf, float):
        # what masks are filled with may be the lowest number there is
        most = torch.finfo(like.dtype).max
        return max(-most, min(most, leaf)) if math.isfinite(leaf) else leaf
    return like.dtype


def _like(state: Mapping[str, Tensor]) -> Tensor | None:
    return next((tensor for tensor in state.values() if tensor.is_floating_point()), None)


def _lookup(leaf: Any, values: list[list[Any] | None], k: int, state: Mapping[str, Tensor], batch: int = 0) -> Any:
    if isinstance(leaf, Ref):
        held = values[leaf.step]
        assert held is not None
        return held[k] if leaf.item is None else held[k][leaf.item]
    if isinstance(leaf, Held):
        return state[leaf.name]
    if isinstance(leaf, Count):
        return leaf.fixed + leaf.each * batch
    return leaf


def leaves(value: Any) -> Iterator[Any]:
    """Yield what arguments are made of, through tuples, lists, dicts and slices."""
    if isinstance(value, (Ref, Held, Count)):
        yield value
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from leaves(item)
    elif isinstance(value, dict):
        for item in value.values():
            yield from leaves(item)
    elif isinstance(value, slice):
        yield from leaves((value.start, value.stop, value.step))
    else:
        yield value


def substitute(value: Any, change: Callable[[Any], Any]) -> Any:
    """Return arguments with every leaf changed."""
    if isinstance(value, (Ref, Held, Count)):
        return change(value)
    if isinstance(value, (tuple, list)):
        changed = [substitute(item, change) for item in value]
        return tuple(changed) if isinstance(value, tuple) else changed
    if isinstance(value, dict):
        return {key: substitute(item, change) for key, item in value.items()}
    if isinstance(value, slice):
        return slice(*(substitute(item, change) for item in (value.start, value.stop, value.step)))
    return change(value)
