"""Pieces of a program on their own, with gradients: one layer with other arrays, and the steps behind it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from nettrim.network.program import Count, Held, Program, Ref, Step, resolve, substitute


def applied(step: Step, value: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Apply a layer's step to other inputs, with other arrays; the stride, padding and dilation are its own.

    Parameters
    ----------
    step : Step
        Of a layer without groups.
    value : Tensor (B, ...)
    weight : Tensor (M, C, *kernel)
        As many channels as `value` has.
    bias : Tensor (M,) or None
    """
    held, bias_held = step.argument("weight"), step.argument("bias")

    def change(leaf: Any) -> Any:
        if isinstance(leaf, Ref):
            return value
        if isinstance(leaf, Held):
            return weight if leaf == held else bias if leaf == bias_held else leaf
        return leaf

    args, kwargs = substitute((step.args, step.kwargs), change)
    result: Tensor = resolve(step.target)(*args, **kwargs)
    return result


def between(program: Program, start: int, stop: int, value: Tensor) -> Tensor:
    """Run the steps behind `start` up to `stop` on what `start` shall have given.

    Parameters
    ----------
    program : Program
    start, stop : int
        Of a `Coupling`: each of the steps in between reads the one before it alone, and acts on every channel alone,
        so there may be fewer channels than were observed.
    value : Tensor (B, ...)
        Of any floating dtype; gradients are followed where they are switched on.
    """
    first = (program.steps[start].shape or (Count(0, 1),))[0]
    samples = len(value) // (first.each if isinstance(first, Count) else 1)
    for step in chain(program, start, stop):

        def change(leaf: Any, current: Tensor = value) -> Any:
            if isinstance(leaf, Ref):
                return current
            if isinstance(leaf, Count):
                return leaf.fixed + leaf.each * samples
            if leaf is torch.float64:  # what was observed in it
                return current.dtype
            return current.device if isinstance(leaf, torch.device) else leaf

        args, kwargs = substitute((step.args, step.kwargs), change)
        value = resolve(step.target)(*args, **kwargs)
    return value


def chain(program: Program, start: int, stop: int) -> list[Step]:
    """Return the steps behind `start` up to `stop`, in order, other branches left out."""
    found: list[Step] = []
    while stop != start:
        found.append(program.steps[stop])
        stop = program.steps[stop].refs[0].step
    return found[::-1]
