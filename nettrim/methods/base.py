"""What a pruning method is: a frozen value that turns one layer's task into one layer's result.

A method sees arrays, never a module, and never another layer: where its inputs come from is the schedule's business.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from nettrim.core.moments import Moments
from nettrim.core.support import kept_count
from nettrim.errors import ProblemError
from nettrim.methods.masks import Pattern

#: what a user may say of how much goes; exactly one. "pattern" is N:M, said in place of a sparsity
AMOUNTS = ("epsilon", "sparsity", "lam", "kept", "tolerance", "pattern", "channels", "macs", "units")
#: those that are said of the whole network, for methods that make it smaller
WHOLE = ("macs", "units")
#: those that say how many weights stay, for methods that choose them freely
COUNTS = ("sparsity", "kept")
#: what a method may need of a layer beside its amount, the most first; who needs less can do with more
NEEDS = ("rows", "moments", "weight")


@dataclass(frozen=True, eq=False)
class LayerTask:
    """One layer and its data, in float64.

    Attributes
    ----------
    name : str
    relu : bool
        Whether the output flows into a ReLU.
    last : bool
        Whether it is the network's last layer.
    clean : bool
        Whether `inputs` are the dense network's own (the parallel schedule, and the first pruned layer of a cascade).
    weight : Tensor (M, N)
        The dense weight.
    bias : Tensor (M,) or None
    inputs : Tensor (P, N)
        From the dense network, or through the pruned prefix. With `moments` a sample of the rows, or none of them.
    outputs : Tensor (P, M)
        The dense network's outputs, before any ReLU, for the same rows.
    amount : str
        One of `AMOUNTS`.
    value : float or Pattern
        How much of it.
    dtype : torch.dtype
        The model's own: weights come back rounded to it.
    importance : Tensor (M, M) or None
        ``G``: errors ``e`` of this layer cost ``eᵀ G e`` at the network's output, on average. For methods that look
        ahead; None for the last layer.
    moments : Moments or None
        Of all rows, where `inputs` and `outputs` are only a sample of them; None where they are all.
    form : str or None
        The user's override of the convex program's form for this layer; None leaves it to the method.
    block : int
        Which group of a grouped convolution this is; 0 for every other layer.
    """

    name: str
    relu: bool
    last: bool
    clean: bool
    weight: Tensor
    bias: Tensor | None
    inputs: Tensor
    outputs: Tensor
    amount: str
    value: float | Pattern
    dtype: torch.dtype = torch.float32
    importance: Tensor | None = None
    moments: Moments | None = None
    form: str | None = None
    block: int = 0

    @property
    def complete(self) -> bool:
        """Whether `inputs` and `outputs` are all rows, and not a sample of those that `moments` sums up."""
        return self.moments is None or self.moments.count == len(self.inputs)

    def statistics(self) -> Moments:
        """Return the moments of all rows: `moments`, or where there are none the sums over `inputs` and `outputs`.

        Those are made anew by every call, ``2 P N (N + M)`` flops.
        """
        return Moments.of(self.inputs, self.outputs) if self.moments is None else self.moments

    @property
    def targets(self) -> Tensor:
        """The dense network's outputs ``(P, M)``, after the ReLU where there is one."""
        return self.outputs.clamp(min=0) if self.relu else self.outputs

    @property
    def pattern(self) -> Pattern | None:
        """The N:M pattern to keep, if that is what was asked for."""
        return self.value if isinstance(self.value, Pattern) else None

    @property
    def kept(self) -> int:
        """How many weights are to stay; biases are not counted. 0 of a group of a convolution that keeps nothing.

        Raises
        ------
        ProblemError
            The amount is no count.
        """
        numel = self.weight.numel()
        if isinstance(self.value, Pattern):
            return self.value.count(numel)
        if self.amount == "kept":
            return int(self.value)
        if self.amount == "sparsity":
            return kept_count(numel, self.value)
        raise ProblemError(f"layer {self.name!r}: {self.amount} says no number of weights: give sparsity or kept.")


@dataclass(frozen=True, eq=False)
class LayerResult:
    """A pruned layer, and how it came about. What it is worth is computed from these by the ledger, not said here.

    Attributes
    ----------
    weight : Tensor (M, N)
        Exactly zero where pruned.
    bias : Tensor (M,) or None
    seconds : float
    multipliers : Tensor (P, M) or None
        What a certificate can be made from; None for a method that solves no convex program.
    facts : dict
        How the problem was set up (what `verify` needs to set it up again) and how it was solved; JSON values.
    """

    weight: Tensor
    bias: Tensor | None
    seconds: float
    multipliers: Tensor | None = None
    facts: dict[str, Any] = field(default_factory=dict)


class Method(Protocol):
    """The contract of a pruning method."""

    @property
    def name(self) -> str:
        """Its name in `METHODS`."""

    @property
    def amounts(self) -> tuple[str, ...]:
        """Which of `AMOUNTS` it takes."""

    def prune_layer(self, task: LayerTask) -> LayerResult:
        """Prune one layer."""


@runtime_checkable
class Shrinks(Protocol):
    """A method that makes the network smaller instead of setting single weights to zero: it has no `prune_layer`."""

    @property
    def name(self) -> str:
        """Its name in `METHODS`."""

    @property
    def amounts(self) -> tuple[str, ...]:
        """Which of `AMOUNTS` it takes."""

    @property
    def removes(self) -> str:
        """What goes: "channels" or "units"."""


@runtime_checkable
class LooksAhead(Protocol):
    """A method that may want `LayerTask.importance`, for which the driver takes a quick look at the layers to come."""

    def looks_ahead(self, amount: str) -> bool:
        """Whether it does, for that amount."""


@runtime_checkable
class ChecksAmount(Protocol):
    """A method whose settings do not go with every amount that it takes: the driver asks before any work."""

    def check_amount(self, amount: str, biased: bool) -> None:
        """Raise `UnsupportedError` where they do not; `biased` says whether any layer to prune has a bias."""


@runtime_checkable
class SaysNeeds(Protocol):
    """A method that can do without some of a layer's rows: the driver asks `needs` before it records any."""

    def needs(self) -> str:
        """Which of `NEEDS`, with the method's settings."""


def needs(method: object) -> str:
    """Return what a method needs of a layer: the answer of its own `needs`, or "rows" where it has none.

    "rows"
        `LayerTask.inputs` and `LayerTask.outputs`: all rows, or as large a sample as its result is to rest on.
    "moments"
        `LayerTask.statistics` alone: with `LayerTask.moments` given, no row is looked at.
    "weight"
        The dense weight and bias: neither rows nor moments need be there.

    Raises
    ------
    ProblemError
        The method's answer is none of these.
    """
    if not isinstance(method, SaysNeeds):
        return "rows"
    answer = method.needs()
    if answer not in NEEDS:
        raise ProblemError(f"the method's needs()={answer!r} is unknown: return one of {', '.join(NEEDS)}.")
    return answer


def with_bias_column(inputs: Tensor) -> Tensor:
    """Return ``[X, 1] (P, N + 1)``."""
    return torch.cat([inputs, inputs.new_ones(inputs.shape[0], 1)], dim=1)
