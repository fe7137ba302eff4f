"""How many channels of each layer stay: from a fraction, or from a budget for the whole network."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from nettrim.errors import ProblemError, UnsupportedError
from nettrim.methods.decompose import Decomposition
from nettrim.methods.ldrf import Ldrf
from nettrim.network.channels import Coupling, couplings
from nettrim.network.program import run
from nettrim.network.trace import LayerGraph
from nettrim.pipeline.account import Account
from nettrim.pipeline.plan import Plan

_HALVINGS = 50  # of a budget's factor
_LEVELS = 12  # of the energy
_SAMPLES = 1000  # that decide the energy
_WHAT = {"macs": "multiply-adds", "sparsity": "weights"}


def check_couplings(graph: LayerGraph) -> dict[str, Coupling]:
    """Return whose channels can go, by producer in execution order.

    Raises
    ------
    ProblemError
        No selected layer's can.
    """
    pairs, why = couplings(graph)
    if not pairs:
        reasons = "; ".join(f"{name!r}: {reason}" for name, reason in why.items())
        raise ProblemError(f"no selected layer has channels that can go ({reasons}); select others.")
    return pairs


def check_channels(plan: Plan, account: Account) -> None:
    """Refuse amounts by which this network cannot be made narrower.

    Raises
    ------
    ProblemError, UnsupportedError
        As `check_couplings` and `widths`.
    """
    pairs = check_couplings(plan.graph)
    assert isinstance(plan.method, Ldrf)
    # which budgets can be reached at all does not hang on how they are split
    capacities = {name: pair.channels for name, pair in pairs.items()}
    widths(plan.graph, pairs, plan.amount, plan.values, capacities if plan.method.allocate == "capacity" else None)


def widths(
    graph: LayerGraph,
    pairs: Mapping[str, Coupling],
    amount: str,
    values: Mapping[str, Any],
    capacities: Mapping[str, int] | None = None,
) -> dict[str, int]:
    """Return how many channels of each producer stay.

    Parameters
    ----------
    graph : LayerGraph
    pairs : dict of str to Coupling
    amount : {"channels", "macs", "sparsity"}
        The fraction of channels that stays in a layer, at least one; the fraction of the network's multiply-adds that
        stays; the fraction of its weights that goes. The latter two count all layers, what is not pruned too.
    values : dict of str to float
        Of every layer; for a budget of the whole network the same.
    capacities : dict of str to int, optional
        A budget is split in proportion to these, instead of to the numbers of channels.

    Raises
    ------
    ProblemError
        An amount is out of range, or a budget that one channel for each layer is too much for.
    UnsupportedError
        A fraction of channels is to be split by capacities.
    """
    for name in pairs:
        value = values[name]
        fits = isinstance(value, int | float) and not isinstance(value, bool)
        inside = fits and (0 < value <= 1 if amount != "sparsity" else 0 <= value < 1)
        if not inside:
            where = "[0, 1)" if amount == "sparsity" else "(0, 1]"
            raise ProblemError(f"{amount}={value!r} of layer {name!r} is out of range: give a fraction in {where}.")
    if amount == "channels":
        if capacities is not None:
            raise UnsupportedError("allocate='capacity' splits a budget, and channels says a fraction: give macs.")
        return {name: max(1, _round(values[name] * pair.channels)) for name, pair in pairs.items()}
    if len({float(values[name]) for name in pairs}) > 1:
        raise ProblemError(f"{amount} is a budget of the whole network: give one number for all layers.")
    share = next((float(values[name]) for name in pairs), 1.0)
    if amount == "sparsity":
        share = 1 - share
    most = cost(graph, pairs, {}, amount)
    every = {name: pair.channels for name, pair in pairs.items()}
    weight = every if capacities is None else capacities

    def at(factor: float) -> dict[str, int]:
        return {name: min(max(1, _round(factor * weight[name])), count) for name, count in every.items()}

    least = cost(graph, pairs, at(0.0), amount)
    if least > share * most:
        raise ProblemError(
            f"{amount}={_said(amount, share)} cannot be reached: with one channel in each of {len(pairs)} layers "
            f"{least / most:.3g} of the network's {_WHAT[amount]} stay, so give "
            f"{'at least' if amount == 'macs' else 'at most'} {_said(amount, math.ceil(1e4 * least / most) / 1e4)}."
        )
    low, high = 0.0, max(count / weight[name] for name, count in every.items()) if every else 1.0
    if cost(graph, pairs, at(high), amount) <= share * most:
        return at(high)
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if cost(graph, pairs, at(middle), amount) <= share * most else (low, middle)
    return at(low)


def cost(graph: LayerGraph, pairs: Mapping[str, Coupling], counts: Mapping[str, int], amount: str) -> int:
    """Return the multiply-adds of one sample ("macs"), or the number of weights, of a network of these widths."""
    reads = {pair.consumer: pair for pair in pairs.values()}
    total = 0
    for layer in graph.layers:
        wide, tall = layer.in_features, counts.get(layer.name, layer.out_features)
        if layer.name in reads:
            pair = reads[layer.name]
            wide = counts.get(pair.producer, pair.channels) * pair.taps
        total += wide * tall * (layer.positions if amount == "macs" else 1)
    return total


def valid_energy(
    account: Account, pairs: Mapping[str, Coupling], splits: Mapping[str, Decomposition], tolerance: float
) -> float:
    """Return the least energy that all consumers can be truncated at, at most `tolerance` of the samples changing.

    The lowering of the rank to a layer's "valid capacity" is the paper's; the common energy and the measure are our
    reading. Samples are the first 1000; those that change are the loss of accuracy where there are labels, else where
    the class differs from the dense network's.

    Raises
    ------
    ProblemError
        The network gives no classes: its output has one column, or none.
    """
    graph, batch = account.graph, account.batches.first(_SAMPLES)
    state = {name: t.float() if t.is_floating_point() else t for name, t in account.dense.items()}

    def classes(changed: Mapping[str, Tensor]) -> Tensor:
        found = run(graph.program, {**state, **changed}, batch)
        if found.dim() != 2 or found.shape[1] < 2:
            raise ProblemError(
                f"capacity_tolerance counts samples by class, and the output has shape {tuple(found.shape)}: give "
                "energy instead."
            )
        return found.argmax(1)

    dense = classes({})
    labels = batch.labels
    counted = labels is not None and labels.shape == dense.shape

    def lost(energy: float) -> float:
        changed = {}
        for pair in pairs.values():
            spec, split = graph.layer(pair.consumer), splits[pair.consumer]
            changed[spec.weight] = split.truncated(split.rank_at(energy)).weight().reshape(spec.shape).float()
        found = classes(changed)
        if counted and labels is not None:
            return float((dense == labels).double().mean() - (found == labels).double().mean())
        return float((found != dense).double().mean())

    # the share that goes, on a logarithmic scale: 1e-6 ... 0.9
    low, high = -6.0, math.log10(0.9)
    if lost(1 - 10**low) > tolerance:
        return 1.0
    for _ in range(_LEVELS):
        middle = (low + high) / 2
        low, high = (middle, high) if lost(1 - 10**middle) <= tolerance else (low, middle)
    return 1 - 10**low


def _round(value: float) -> int:
    """Round to the nearest, halves up."""
    return math.floor(value + 0.5)


def _said(amount: str, share: float) -> float:
    return round(share if amount == "macs" else 1 - share, 4)
