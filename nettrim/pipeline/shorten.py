"""The driver of Shallowing: what the units of a network are worth on the calibration samples, and which of them go."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from nettrim.errors import ProblemError, UnsupportedError
from nettrim.methods.probes import ProbeCurve, check_labels, probe, require_sklearn
from nettrim.methods.shallowing import Shallowing
from nettrim.methods.unit_choice import (
    accumulated,
    accumulated_until,
    below,
    check_count,
    drawn,
    least,
    magnitude,
)
from nettrim.network.features import block_influence, pooled_features
from nettrim.network.structure import Structure, gone
from nettrim.network.trace import LayerGraph
from nettrim.network.units import Unit, find_units
from nettrim.pipeline.account import Account, Standing
from nettrim.pipeline.layers import How
from nettrim.pipeline.plan import Plan
from nettrim.pipeline.records import LayerEvidence
from nettrim.pipeline.store import RunStore


def shorten(
    plan: Plan,
    account: Account,
    standing: Standing,
    how: How,
    store: RunStore | None = None,
    found: Mapping[str, LayerEvidence] | None = None,
) -> tuple[list[LayerEvidence], Structure, dict[str, Any]]:
    """Choose the units that go, and put what makes them vanish into `standing`.

    Parameters
    ----------
    plan : Plan
        Of a `Shallowing`.
    account : Account
    standing : Standing
        Its folded state is changed in place, in the dense shape and in float64: a removed plain unit's layer is the
        identity, a removed residual unit's layers are zero. `changed` stays, because no batch norm need be undone.
    how : How
    store : RunStore, optional
        All layers are written.
    found : mapping from str to LayerEvidence, optional
        Not used: the choice is one step, which is taken again, the same for the same samples and seed.

    Returns
    -------
    evidence : list of LayerEvidence
        Of every layer in execution order; those that are removed are the pruned ones.
    structure : Structure
    about : dict
        "probes": the curve as JSON values, where probes were trained.

    Raises
    ------
    ProblemError
        Probes need labels and there are none, or no such number of units, or share of the weights, can go.
    UnsupportedError
        The network has no units.
    MissingExtraError
        Probes are to be trained and scikit-learn is not installed.
    """
    method, graph = plan.method, plan.graph
    assert isinstance(method, Shallowing)
    began = time.monotonic()
    units = check_units(plan, account)
    value: Any = next(iter(plan.values.values()))
    curve, going = _going(method, plan.amount, value, account, units, how)
    seconds = time.monotonic() - began
    structure = Structure(removed=tuple(unit.name for unit in going))
    for unit in going:
        standing.state |= gone(graph, unit, next(iter(account.dense.values())).device)
    evidence = _evidence(plan.amount, value, graph, standing, units, going, seconds)
    if store is not None:
        for layer in evidence:
            store.write_layer(layer)
    if curve is None:
        return evidence, structure, {}
    curve = replace(curve, stages=tuple(unit.stage for unit in units), removed=structure.removed)
    return evidence, structure, {"probes": curve.as_dict()}


def check_units(plan: Plan, account: Account) -> tuple[Unit, ...]:
    """Return the network's units, and refuse what the network or the samples do not allow: nothing is computed yet.

    Raises
    ------
    ProblemError, UnsupportedError, MissingExtraError
        As `shorten`.
    """
    method = plan.method
    assert isinstance(method, Shallowing)
    units = find_units(plan.graph, account.dense)
    if not units:
        raise UnsupportedError(
            "the network has no units: neither a layer with a ReLU nor a sum of branches that all its data flow through"
        )
    value: Any = next(iter(plan.values.values()))
    goal = _Goal(plan.amount, value, plan.graph)
    if plan.amount == "units":
        check_count(units, value)
    elif plan.amount == "sparsity":
        # the most that can go: the largest first, so that the smallest of a stage stays
        goal.require(units, least(units, {unit.name: -float(goal.weights([unit])) for unit in units}))
    if method.probes:
        check_labels(account.batches.labels(), method.choice)
        require_sklearn()
    return units


def _going(
    method: Shallowing, amount: str, value: Any, account: Account, units: Sequence[Unit], how: How
) -> tuple[ProbeCurve | None, tuple[Unit, ...]]:
    """Return the probes, where they were asked for, and the units that go."""
    graph = account.graph
    goal = _Goal(amount, value, graph)
    curve = _curve(method, account, units, how) if method.probes else None
    if method.rule == "accumulate" and curve is not None:
        loss = method.choice == "probe-loss"
        heights = {point.name: -point.loss if loss else point.score for point in curve.points}
        start = heights.pop(curve.points[0].name)
        if amount == "tolerance":
            return curve, accumulated(units, heights, start, value)
        going = accumulated_until(units, heights, start, goal.reached)
    else:
        worth = _worth(method, account, units, how, curve)
        if amount == "tolerance":
            return curve, below(units, worth, value)
        going = least(units, worth, goal.reached)
    goal.require(units, going)
    return curve, going


class _Goal:
    """How much is to go: a number of units, or a share of the weights of all layers that are selected."""

    def __init__(self, amount: str, value: Any, graph: LayerGraph) -> None:
        self.amount, self.value, self.graph = amount, value, graph
        self.total = sum(spec.numel for spec in graph.selected)

    def weights(self, going: Sequence[Unit]) -> int:
        """Return how many weights go with some units."""
        return sum(self.graph.layer(name).numel for unit in going for name in unit.layers)

    def reached(self, going: Sequence[Unit]) -> bool:
        """Say whether some units are enough."""
        reached = len(going) if self.amount == "units" else self.weights(going) / self.total
        return bool(reached >= self.value)

    def require(self, units: Sequence[Unit], going: Sequence[Unit]) -> None:
        """Refuse what cannot be reached."""
        if not self.reached(going):
            share = self.weights(going) / self.total
            raise ProblemError(
                f"{self.amount}={self.value} cannot be reached by taking units out: the {len(going)} of {len(units)} "
                f"that can go hold {share:.4f} of the weights; lower it."
            )


def _curve(method: Shallowing, account: Account, units: Sequence[Unit], how: How) -> ProbeCurve:
    """Train probes on calibration samples, never on held-out ones."""
    labels = check_labels(account.batches.labels(), method.choice)
    require_sklearn()
    rows = torch.arange(account.batches.rows)
    if len(rows) > method.probe_samples:
        generator = torch.Generator().manual_seed(how.seed)
        rows = torch.randperm(len(rows), generator=generator)[: method.probe_samples].sort().values
    features = pooled_features(
        account.graph, account.dense, account.batches, units, rows, account.at_a_time, how.progress
    )
    return probe(
        features, labels[rows.to(labels.device)], method.probe_seeds, method.regularisation, method.held, how.seed
    )


def _worth(
    method: Shallowing, account: Account, units: Sequence[Unit], how: How, curve: ProbeCurve | None
) -> dict[str, float]:
    """Return what every unit is worth: the least goes first."""
    if curve is not None:
        sign = -1.0 if method.choice == "largest" else 1.0
        loss = method.choice == "probe-loss"
        return {point.name: sign * (point.loss_gain if loss else point.gain) for point in curve.points[1:]}
    if method.choice == "block-influence":
        return block_influence(account.graph, account.dense, account.batches, units, account.at_a_time, how.progress)
    if method.choice == "magnitude":
        return magnitude(account.graph, account.dense, units)
    if method.choice == "random":
        return drawn(units, how.seed)
    sign = -1.0 if method.choice == "reverse" else 1.0
    return {unit.name: sign * place for place, unit in enumerate(units)}


def _evidence(
    amount: str,
    value: Any,
    graph: LayerGraph,
    standing: Standing,
    units: Sequence[Unit],
    going: Sequence[Unit],
    seconds: float,
) -> list[LayerEvidence]:
    """Return the evidence of all layers."""
    holders = {name: unit for unit in units for name in unit.layers}
    removed = {name for unit in going for name in unit.layers}
    found = []
    for spec in graph.layers:
        holder, out = holders.get(spec.name), spec.name in removed
        facts: dict[str, Any] = {}
        if spec.prune:
            facts = {amount: value, "removed": out, "unit": None if holder is None else holder.name}
        dense = standing.dense_arrays(spec)
        found.append(
            LayerEvidence(
                name=spec.name,
                relu=spec.relu,
                pruned=out,
                clean=False,
                dense_weight=dense[0],
                dense_bias=dense[1],
                weight=standing.arrays(spec)[0] if out else dense[0],
                bias=standing.arrays(spec)[1] if out else dense[1],
                facts=facts,
                seconds=seconds / len(removed) if out else 0.0,
            )
        )
    return found
