"""What is to be done to a network, resolved and checked before any work: method, layers, waves, amounts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor, nn

from nettrim.core.problem import FORMS
from nettrim.core.support import kept_count
from nettrim.errors import ProblemError, UnknownNameError, UnsupportedError
from nettrim.methods import AMOUNTS, Method, Shrinks, make_method
from nettrim.methods.base import COUNTS, ChecksAmount, LooksAhead
from nettrim.methods.masks import Pattern
from nettrim.network.batches import Batches
from nettrim.network.trace import LayerGraph, Traced, trace
from nettrim.pipeline.account import Account
from nettrim.pipeline.budget import Overall, allocate
from nettrim.pipeline.finish import Finish, headroomed, make_finish
from nettrim.pipeline.schedule import per_layer, resolve_amount, waves
from nettrim.pipeline.scout import Scout

_OBSERVED = 64  # samples that the forward is observed on, at the most
_ROWS = 5000  # samples of a look ahead: a split or a sensitivity is known well enough from these


@dataclass(frozen=True, eq=False)
class Plan:
    """One pruning run.

    Attributes
    ----------
    method : Method or Shrinks
    schedule : str
    traced : Traced
        The model, observed on the first of the samples.
    waves : list of list of str
    amount : str
        Of `nettrim.methods.AMOUNTS`.
    values : dict of str to float or Pattern
        For every layer; empty until `settle` where only the whole network's sparsity was said.
    overall : Overall or None
    metrics : dict of str to Tensor (M, M)
        What the network makes of each layer's errors, for methods that look ahead; known after `settle`.
    finish : Finish or None
        How the network is trained on.
    targets : dict of str to int, or int, or None
        How many weights finishing leaves, of each layer or in all; None where it takes none away.
    forms : dict of str to str
        The form of single layers' programs, where it was said.
    residual : {"own", "sum"}
        Whether a layer that is added to a trunk is fitted to its own dense outputs, or, in cascade, to the dense sum
        less the pruned trunk.
    """

    method: Method | Shrinks
    schedule: str
    traced: Traced
    waves: list[list[str]]
    amount: str
    values: Mapping[str, float | Pattern]
    overall: Overall | None = None
    metrics: Mapping[str, Tensor] = field(default_factory=dict)
    finish: Finish | None = None
    targets: Mapping[str, int] | int | None = None
    forms: Mapping[str, str] = field(default_factory=dict)
    residual: str = "own"

    @property
    def graph(self) -> LayerGraph:
        """The network's forward and its layers."""
        return self.traced.graph

    @staticmethod
    def make(
        model: nn.Module,
        batches: Batches,
        method: str | Method | Shrinks,
        schedule: str,
        layers: Any,
        ignore: Any,
        amounts: dict[str, Any],
        finish: str | Finish | None = None,
        forms: Mapping[str, str] | None = None,
        on_unsupported: str = "refuse",
        residual: str = "own",
    ) -> Plan:
        """Resolve what the user said.

        Raises
        ------
        ProblemError, UnsupportedError, UnknownNameError
            As `nettrim.prune`.
        """
        chosen = make_method(method)
        traced = trace(model, batches.first(_OBSERVED), layers, ignore, on_unsupported)
        graph = traced.graph
        order = waves(graph, schedule)
        said = _forms(graph, chosen, forms)
        if residual not in ("own", "sum"):
            raise UnknownNameError(f"residual={residual!r} is unknown: use own or sum.")
        if isinstance(chosen, Shrinks) and schedule != "cascade":
            raise UnsupportedError(
                f"method {chosen.name!r} makes the network smaller from its input to its output, and "
                f"schedule={schedule!r} was given: use cascade."
            )
        overall = amounts.get("sparsity")
        if not isinstance(overall, Overall):
            kind, values = resolve_amount(graph, chosen, amounts)
            _check_settings(chosen, kind, graph)
            # what is left of a smaller network is dense: finishing has no weights to choose
            made = make_finish(finish, "channels" if isinstance(chosen, Shrinks) else kind, overall=False)
            plan = Plan(chosen, schedule, traced, order, kind, values, finish=made, forms=said, residual=residual)
            if plan.finish is not None and plan.finish.choose != "fixed":
                final = plan.counts()
                if "kept" not in chosen.amounts:
                    raise UnsupportedError(
                        f"finish chooses weights ({plan.finish.choose}), for which the method must take kept, and "
                        f"{chosen.name!r} takes {' or '.join(chosen.amounts)}: use Distill(), which chooses none."
                    )
                plan = replace(plan, amount="kept", values=headroomed(plan.finish, final, plan.sizes), targets=final)
            return plan
        others = [kind for kind in AMOUNTS if kind != "sparsity" and amounts.get(kind) is not None]
        if others:
            raise ProblemError(f"give exactly one amount: sparsity={overall} and {', '.join(others)} were given.")
        if "kept" not in chosen.amounts:
            raise UnsupportedError(
                f"method {chosen.name!r} takes {' or '.join(chosen.amounts)}, and sparsity={overall} was given."
            )
        _check_settings(chosen, "kept", graph)
        total = overall.kept(sum(layer.numel for layer in graph.selected))
        if total < len(graph.selected):
            raise ProblemError(f"{overall} leaves {total} weights for {len(graph.selected)} layers: lower it.")
        made = make_finish(finish, "kept", overall=True)
        return Plan(chosen, schedule, traced, order, "kept", {}, overall, finish=made, forms=said, residual=residual)

    def settle(
        self,
        account: Account,
        started: Mapping[str, Any] | None,
        seed: int,
        progress: bool,
    ) -> Plan:
        """Return the plan with what only the data can tell: the split over the layers, and the errors' metrics.

        Parameters
        ----------
        account : Account
        started : mapping or None
            Settings of a run to go on with, the same but for the split that it found, which is taken over.
        seed : int
        progress : bool
        """
        ahead = isinstance(self.method, LooksAhead) and self.method.looks_ahead(self.amount)
        if not self.overall and not ahead:
            return self
        scout = Scout.of(account, _ROWS, seed)
        plan = self
        if self.overall:
            total = self.overall.kept(sum(self.sizes.values()))
            choose = "fixed" if self.finish is None else self.finish.choose
            if started is not None:
                plan = replace(plan, values=started["amount"]["kept"], targets=started["targets"])
            elif choose == "global" and self.finish is not None:
                # the split that finishing starts from is that of the larger number: it chooses the final one itself
                more = min(sum(self.sizes.values()), round(self.finish.headroom * total))
                plan = replace(plan, values=allocate(scout, more, progress=progress), targets=total)
            else:
                final = allocate(scout, total, progress=progress)
                targets = None if choose == "fixed" else final
                plan = replace(plan, values=headroomed(self.finish, final, self.sizes), targets=targets)
        if ahead and len(self.graph.layers) > 1:
            plan = replace(plan, metrics=scout.look_ahead(plan.counts()))
        return plan

    @property
    def sizes(self) -> dict[str, int]:
        """How many weights each layer to prune has."""
        return {layer.name: layer.numel for layer in self.graph.selected}

    def counts(self) -> dict[str, int]:
        """Return how many weights each layer keeps.

        Raises
        ------
        ProblemError
            The amount says no count.
        """
        if self.amount not in (*COUNTS, "pattern"):
            raise ProblemError(f"{self.amount} says no number of weights: give sparsity or kept.")
        kept = {}
        for name, numel in self.sizes.items():
            value = self.values[name]
            if isinstance(value, Pattern):
                kept[name] = value.count(numel)
            else:
                kept[name] = int(value) if self.amount == "kept" else kept_count(numel, value)
        return kept


def _check_settings(method: Method | Shrinks, amount: str, graph: LayerGraph) -> None:
    """Let a method refuse, before any work, an amount that does not go with its settings."""
    if isinstance(method, ChecksAmount):
        method.check_amount(amount, any(layer.bias for layer in graph.selected))


def _forms(graph: LayerGraph, method: Method | Shrinks, forms: Mapping[str, str] | None) -> dict[str, str]:
    """Return the forms that were said of single layers.

    Raises
    ------
    UnknownNameError, UnsupportedError
        There is no such form or layer, the method has no forms, or a layer has no ReLU to allow for.
    """
    if not forms:
        return {}
    found = per_layer([layer.name for layer in graph.selected], forms, "forms", complete=False)
    if not hasattr(method, "form"):
        raise UnsupportedError(f"forms is given, and method {method.name!r} solves no convex program: leave it out.")
    for name, form in found.items():
        if form not in FORMS:
            raise UnknownNameError(f"forms has {form!r} for layer {name!r}: use one of {', '.join(FORMS)}.")
        if form != "linear" and not graph.layer(name).relu:
            raise UnsupportedError(
                f"forms has {form!r} for layer {name!r}, whose output flows into no ReLU: only 'linear' is right there."
            )
    return found
