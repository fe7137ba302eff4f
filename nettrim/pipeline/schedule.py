"""In which order layers are pruned, and how much of each: what a user says once, resolved to every layer."""

from __future__ import annotations

from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import Any

from nettrim.core.problem import check_amount, check_count
from nettrim.errors import ProblemError, UnknownNameError, UnsupportedError
from nettrim.methods import AMOUNTS, Method, Shrinks
from nettrim.methods.base import WHOLE
from nettrim.methods.masks import Pattern
from nettrim.network.trace import LayerGraph, LayerSpec

SCHEDULES = ("parallel", "cascade")


def waves(graph: LayerGraph, schedule: str) -> list[list[str]]:
    """Return the names of the layers to prune, wave by wave; the layers of a wave do not wait for each other.

    "parallel": one wave, every layer on the dense network's inputs. "cascade": generation by generation, each on the
    inputs that come through the pruned layers before it; layers of one generation, such as those of two branches, do
    not read each other.

    Raises
    ------
    UnknownNameError
        `schedule` is neither.
    """
    if schedule not in SCHEDULES:
        raise UnknownNameError(f"schedule={schedule!r} is unknown: use {' or '.join(SCHEDULES)}.")
    if schedule == "parallel":
        return [[layer.name for layer in graph.selected]]
    found: dict[int, list[str]] = {}
    for layer in graph.selected:
        found.setdefault(layer.generation, []).append(layer.name)
    return [found[generation] for generation in sorted(found)]


def per_layer(names: list[str], value: Mapping[str, Any], kind: str, complete: bool = True) -> dict[str, Any]:
    """Return what a dict says of each layer: by its name, else by the first pattern, such as "body.*", that fits.

    Raises
    ------
    UnknownNameError
        An entry fits no layer.
    ProblemError
        A layer has none, and `complete` asks for all.
    """
    unknown = sorted(str(key) for key in value if not any(name == key or fnmatchcase(name, key) for name in names))
    if unknown:
        raise UnknownNameError(f"{kind} names {', '.join(unknown)}: the layers to prune are {', '.join(names)}.")
    found = {}
    for name in names:
        keys = [name] if name in value else [key for key in value if fnmatchcase(name, key)]
        if keys:
            found[name] = value[keys[0]]
    missing = [name for name in names if name not in found]
    if missing and complete:
        raise ProblemError(f"{kind} has no entry for {', '.join(missing)}: give every layer one, or a single number.")
    return found


def resolve_amount(
    graph: LayerGraph, method: Method | Shrinks, amounts: Mapping[str, Any]
) -> tuple[str, dict[str, float | Pattern]]:
    """Return which amount was given, and its value for every layer to prune.

    Parameters
    ----------
    graph : LayerGraph
    method : Method
    amounts : mapping
        By kind, exactly one not None: a number for every layer, or a dict from layer name or pattern to number; of
        "channels" a dict may leave layers out, which keep all. What is said of the whole network is said of every
        layer.

    Raises
    ------
    ProblemError
        None or two were given, or a value is out of range: ``epsilon, lam, tolerance > 0``, ``0 ≤ sparsity < 1``,
        ``1 ≤ kept ≤`` the layer's weights, ``0 < channels, macs ≤ 1``, ``units ≥ 1``; or an N:M pattern does not divide
        a layer's rows.
    UnsupportedError
        The method does not take that amount.
    UnknownNameError
        A dict names a layer that is not pruned.
    """
    given = {kind: amounts[kind] for kind in AMOUNTS if amounts.get(kind) is not None}
    if len(given) != 1:
        found = "none was given" if not given else " and ".join(f"{k}={v}" for k, v in given.items()) + " were given"
        kinds = ", ".join(method.amounts)
        raise ProblemError(f"give exactly one of {kinds} to method {method.name!r}: {found}.")
    kind, value = next(iter(given.items()))
    names = [layer.name for layer in graph.selected]
    whole = kind in WHOLE or (isinstance(method, Shrinks) and kind != "channels")
    if isinstance(value, Mapping) and whole:
        raise ProblemError(f"{kind}={value!r} is said of single layers: method {method.name!r} takes a single number.")
    values: dict[str, Any] = dict.fromkeys(names, 1.0 if isinstance(value, Mapping) else value)
    if isinstance(value, Mapping):
        values |= per_layer(names, value, kind, complete=kind != "channels")
    if kind == "sparsity" and any(isinstance(number, Pattern) for number in values.values()):
        kind = "pattern"
    if kind not in method.amounts:
        raise UnsupportedError(
            f"method {method.name!r} takes {' or '.join(method.amounts)}, and {kind}={value} was given."
        )
    return kind, {layer.name: _checked(kind, values[layer.name], layer) for layer in graph.selected}


def _checked(kind: str, number: Any, layer: LayerSpec) -> float | Pattern:
    if kind == "pattern":
        if not isinstance(number, Pattern):
            raise ProblemError(f"sparsity of layer {layer.name!r} is {number!r}: give every layer a pattern, or none.")
        if layer.in_features % number.of:
            raise ProblemError(
                f"pattern {number} does not divide the {layer.in_features} inputs of layer {layer.name!r}: "
                "leave that layer out by ignore."
            )
        return number
    if kind == "kept":
        count, numel = check_count(kind, number), layer.numel
        if count > numel:
            raise ProblemError(f"kept={count} is out of range: layer {layer.name!r} has {numel} weights.")
        return count
    if kind == "units":
        return check_count(kind, number)
    if kind in ("channels", "macs"):
        if not check_amount(kind, number) <= 1:
            raise ProblemError(f"{kind}={number:g} is out of range: it is the fraction that stays, in (0, 1].")
        return float(number)
    if kind != "sparsity":
        return check_amount(kind, number)
    try:
        sparsity = float(number)
    except (TypeError, ValueError) as error:
        raise ProblemError(f"sparsity={number!r} is no number: give one in [0, 1).") from error
    if not 0 <= sparsity < 1:
        raise ProblemError(f"sparsity={sparsity:g} is out of range: it is the fraction of zeros, in [0, 1).")
    return sparsity
