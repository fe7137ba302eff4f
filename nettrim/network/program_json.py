"""A program as JSON values, and back: what a run directory keeps of a network's forward."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from types import NoneType
from typing import Any

import torch

from nettrim.errors import RunError, UnsupportedError
from nettrim.network.edit import first_line
from nettrim.network.functions import resolve
from nettrim.network.program import Count, Held, Program, Ref, Step

_NAMED = {"dtype": torch.dtype, "layout": torch.layout, "memory_format": torch.memory_format}


def to_json(program: Program) -> dict[str, Any]:
    """Return a program as JSON values.

    Raises
    ------
    UnsupportedError
        An argument of a step has no such form.
    """
    return {
        "steps": [
            {"target": s.target, "where": s.where}
            | {key: _encode(getattr(s, key), s) for key in ("args", "kwargs", "shape")}
            for s in program.steps
        ],
        "inputs": list(program.inputs),
        "output": list(program.output),
        "reads_values": program.reads_values,
    }


def from_json(stored: Mapping[str, Any]) -> Program:
    """Return the program that `to_json` wrote.

    Raises
    ------
    RunError
        It is none.
    """
    try:
        steps = tuple(
            Step(s["target"], _decode(s["args"]), _decode(s["kwargs"]), s["where"], _decode(s["shape"]))
            for s in stored["steps"]
        )
        program = Program(steps, tuple(stored["inputs"]), Ref(*stored["output"]), stored["reads_values"])
        _check(program)
        return program
    except (
        LookupError,
        RecursionError,
        RuntimeError,
        TypeError,
        UnsupportedError,
        ValueError,
        AttributeError,
    ) as error:
        said = first_line(error)
        raise RunError(f"the stored network is no program of this version: {type(error).__name__}, {said}.") from error


def _check(program: Program) -> None:
    """Refuse a program that cannot have been written by `to_json`."""
    for index, step in enumerate(program.steps):
        if not (isinstance(step.args, tuple) and isinstance(step.kwargs, dict) and isinstance(step.where, str)):
            raise TypeError(f"step {index} has no arguments or no place")
        if not isinstance(step.shape, (tuple, NoneType)):
            raise TypeError(f"step {index} has a shape of type {type(step.shape).__name__}")
        if (step.target == "input") != (index < len(program.inputs)):
            raise ValueError(f"step {index} is {step.target}, and there are {len(program.inputs)} inputs")
        _check_refs(step.refs, index)
        if step.target != "input":
            resolve(step.target)
    _check_refs([program.output], len(program.steps))
    if not all(isinstance(name, (int, str)) for name in program.inputs) or not isinstance(program.reads_values, bool):
        raise TypeError("its inputs have no names")


def _check_refs(refs: list[Ref], end: int) -> None:
    for ref in refs:
        whole = type(ref.step) is int and (ref.item is None or type(ref.item) is int)
        if not whole or not 0 <= ref.step < end:
            raise ValueError(f"{ref} does not read a step before {end}")


def _encode(value: Any, step: Step) -> Any:
    if isinstance(value, Ref):
        return {"ref": list(value)}
    if isinstance(value, Held):
        return {"held": value.name}
    if isinstance(value, Count):
        return {"count": list(value)}
    if isinstance(value, tuple):
        return {"tuple": [_encode(item, step) for item in value]}
    if isinstance(value, list):
        return [_encode(item, step) for item in value]
    if isinstance(value, dict):
        return {"dict": {key: _encode(item, step) for key, item in value.items()}}
    if isinstance(value, slice):
        return {"slice": [_encode(item, step) for item in (value.start, value.stop, value.step)]}
    if value is Ellipsis:
        return {"ellipsis": True}
    if isinstance(value, torch.device):
        return {"device": str(value)}
    if isinstance(value, float) and not math.isfinite(value):
        return {"float": str(value)}
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    for kind, of in _NAMED.items():
        if isinstance(value, of):
            return {kind: str(value).removeprefix("torch.")}
    raise UnsupportedError(
        f"{step.target} in {step.where or 'forward'} takes a {type(value).__name__}, which cannot be stored"
    )


def _decode(value: Any) -> Any:
    if isinstance(value, list):
        return [_decode(item) for item in value]
    if not isinstance(value, dict):
        return value
    ((kind, inner),) = value.items()
    if kind == "tuple":
        return tuple(_decode(item) for item in inner)
    if kind == "dict":
        return {key: _decode(item) for key, item in inner.items()}
    if kind == "slice":
        return slice(*(_decode(item) for item in inner))
    if kind in _NAMED:
        found = getattr(torch, inner)
        if not isinstance(found, _NAMED[kind]):
            raise ValueError(f"{inner} is no {kind}")
        return found
    makers: dict[str, Callable[[Any], Any]] = {
        "ref": lambda v: Ref(*v),
        "held": Held,
        "count": lambda v: Count(*v),
        "ellipsis": lambda v: Ellipsis,
        "device": torch.device,
        "float": float,
    }
    return makers[kind](inner)
