"""What one run of a forward was made of, and two such runs joined: what differs between them follows the batch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nettrim.errors import UnsupportedError
from nettrim.network.program import Count, Held, Program, Ref, Step


class Watched:
    """What one run of a forward was made of.

    Attributes
    ----------
    steps : list of Step
    inputs : list of str or int
    constants : list of Tensor
        What it took from elsewhere.
    output : Ref or None
    reads : bool
        Whether it looked at values.
    source : dict of int to Ref or Held
        What the tensor of an `id` is.
    """

    def __init__(self, state: Mapping[str, Tensor]) -> None:
        self.steps: list[Step] = []
        self.inputs: list[str | int] = []
        self.constants: list[Tensor] = []
        self.output: Ref | None = None
        self.reads = False
        # tensors are told apart by identity, so each must live until the run is over
        self.alive: list[Any] = list(state.values())
        self.source: dict[int, Ref | Held] = {}
        for name, tensor in state.items():
            self.source.setdefault(id(tensor), Held(name))

    def add(self, step: Step, result: Any) -> None:
        """Note a step and whatever tensors it gave."""
        index = len(self.steps)
        shape = tuple(result.shape) if isinstance(result, Tensor) else None
        self.steps.append(replace(step, shape=shape))
        self.alive.append(result)
        if isinstance(result, Tensor):
            self.source[id(result)] = Ref(index)
        else:
            for item, value in enumerate(result):
                if isinstance(value, Tensor):
                    self.source[id(value)] = Ref(index, item)

    def named(self, leaf: Any) -> Any:
        """Return what an argument stands for."""
        if isinstance(leaf, np.generic):
            return leaf.item()
        if not isinstance(leaf, Tensor):
            return leaf
        if id(leaf) not in self.source:
            # made where nothing was seen, by NumPy or under vmap: whether it hangs on the data is checked by running
            self.reads = True
            self.source[id(leaf)] = Held(f"constant.{len(self.constants)}")
            self.constants.append(leaf)
            self.alive.append(leaf)
        return self.source[id(leaf)]


def merged(one: Watched, two: Watched, first: int, second: int) -> tuple[Program, dict[str, Tensor]]:
    """Join two runs of a forward, of `first` and `second` samples, to a program for any number of them.

    Returns
    -------
    program : Program
    constants : dict of str to Tensor

    Raises
    ------
    UnsupportedError
        They do not do the same.
    """
    constants: dict[str, Tensor] = {}
    for k, (here, there) in enumerate(zip(one.constants, two.constants, strict=False)):
        if here.shape != there.shape or not torch.equal(here, there):
            raise UnsupportedError(
                f"forward uses a tensor of shape {tuple(here.shape)} that it makes out of sight, anew for each batch; "
                "make it with torch functions of the input, or register it as a buffer"
            )
        constants[f"constant.{k}"] = here
    names = [[(step.target, step.where) for step in run.steps] for run in (one, two)]
    if names[0] != names[1] or one.output != two.output or len(one.constants) != len(two.constants):
        at = next((a for a, b in zip(*names, strict=False) if a != b), names[0][-1])
        raise UnsupportedError(
            f"forward does not do the same for {first} and for {second} samples (from {at[0]}{inside(at[1])} on); "
            "rewrite what hangs on the number of samples, or on their values"
        )
    steps = []
    for a, b in zip(one.steps, two.steps, strict=True):
        args, kwargs, shape = _joined((a.args, a.kwargs, a.shape), (b.args, b.kwargs, b.shape), first, second, a)
        steps.append(replace(a, args=args, kwargs=kwargs, shape=shape))
    assert one.output is not None
    program = Program(tuple(steps), tuple(one.inputs), one.output, one.reads or two.reads)
    return program, constants


def _joined(a: Any, b: Any, first: int, second: int, step: Step) -> Any:
    """Join the arguments of one step in two runs of numbers of samples that differ by one."""
    if type(a) is int and type(b) is int and a != b:
        each = (a - b) // (first - second)
        return Count(a - each * first, each)
    if type(a) is type(b) and not isinstance(a, (Ref, Held)):
        if isinstance(a, slice):
            ends = zip((a.start, a.stop, a.step), (b.start, b.stop, b.step), strict=True)
            return slice(*(_joined(x, y, first, second, step) for x, y in ends))
        if isinstance(a, dict) and a.keys() == b.keys():
            return {key: _joined(a[key], b[key], first, second, step) for key in a}
        if isinstance(a, (tuple, list)) and len(a) == len(b):
            items = [_joined(x, y, first, second, step) for x, y in zip(a, b, strict=True)]
            return tuple(items) if isinstance(a, tuple) else items
        if a != a and b != b:  # NaN
            return a
    if type(a) is not type(b) or a != b:
        raise UnsupportedError(
            f"{step.target}{inside(step.where)} has {a!r} for {first} samples and {b!r} for {second}; rewrite "
            "what hangs on the number of samples"
        )
    return a


def inside(where: str) -> str:
    """Return the words that say in which module something happened."""
    return f" in {where!r}" if where else ""
