"""In which order layers are pruned, and how much of each: what a user says once, resolved to every layer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from nettrim.core.problem import check_amount
from nettrim.errors import ProblemError, UnknownNameError, UnsupportedError
from nettrim.methods import AMOUNTS, Method
from nettrim.network.trace import LayerGraph

SCHEDULES = ("parallel", "cascade")


def waves(graph: LayerGraph, schedule: str) -> list[list[str]]:
    """Return the names of the layers to prune, wave by wave; the layers of a wave do not wait for each other.

    "parallel": one wave, every layer on the dense network's inputs. "cascade": one layer a wave, each on the inputs
    that come through the pruned layers before it.

    Raises
    ------
    UnknownNameError
        `schedule` is neither.
    """
    if schedule not in SCHEDULES:
        raise UnknownNameError(f"schedule={schedule!r} is unknown: use {' or '.join(SCHEDULES)}.")
    names = [layer.name for layer in graph.selected]
    return [names] if schedule == "parallel" else [[name] for name in names]


def resolve_amount(graph: LayerGraph, method: Method, amounts: Mapping[str, Any]) -> tuple[str, dict[str, float]]:
    """Return which amount was given, and its value for every layer to prune.

    Parameters
    ----------
    graph : LayerGraph
    method : Method
    amounts : mapping
        "epsilon", "sparsity" and "lam", exactly one not None: a number for every layer, or a dict from layer
        name to number.

    Raises
    ------
    ProblemError
        None or two were given, or a value is out of range: ``epsilon > 0``, ``lam > 0``, ``0 ≤ sparsity < 1``.
    UnsupportedError
        The method does not take that amount.
    UnknownNameError
        A dict names a layer that is not pruned.
    """
    given = {kind: amounts[kind] for kind in AMOUNTS if amounts.get(kind) is not None}
    if len(given) != 1:
        found = "none was given" if not given else " and ".join(f"{k}={v}" for k, v in given.items()) + " were given"
        raise ProblemError(f"give exactly one of epsilon, sparsity and lam: {found}.")
    kind, value = next(iter(given.items()))
    if kind not in method.amounts:
        raise UnsupportedError(
            f"method {method.name!r} takes {' or '.join(method.amounts)}, and {kind}={value} was given."
        )
    names = [layer.name for layer in graph.selected]
    if isinstance(value, Mapping):
        unknown = sorted(set(value) - set(names))
        missing = [name for name in names if name not in value]
        if unknown:
            raise UnknownNameError(f"{kind} names {', '.join(unknown)}: the layers to prune are {', '.join(names)}.")
        if missing:
            raise ProblemError(
                f"{kind} has no entry for {', '.join(missing)}: give every layer one, or a single number."
            )
        per_layer = {name: value[name] for name in names}
    else:
        per_layer = dict.fromkeys(names, value)
    return kind, {name: _checked(kind, number) for name, number in per_layer.items()}


def _checked(kind: str, number: Any) -> float:
    if kind != "sparsity":
        return check_amount(kind, number)
    try:
        sparsity = float(number)
    except (TypeError, ValueError) as error:
        raise ProblemError(f"sparsity={number!r} is no number: give one in [0, 1).") from error
    if not 0 <= sparsity < 1:
        raise ProblemError(f"sparsity={sparsity:g} is out of range: it is the fraction of zeros, in [0, 1).")
    return sparsity
