"""One call in two networks side by side, its arguments by name: what the rules about gains read."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nettrim.network.gains_data import linear_gain
from nettrim.network.program import Held, Ref, Step, leaves, resolve

Arguments = tuple[tuple[Any, ...], dict[str, Any]]


@dataclass(frozen=True)
class Argument:
    """One argument of a call: in both networks, where it is, and which references of the step are in it."""

    dense: Any
    pruned: Any
    key: int | str
    refs: tuple[int, ...]

    @property
    def pair(self) -> tuple[Any, Any]:
        """The function that is bounded has the pruned weights on both sides."""
        return (self.dense, self.pruned) if self.refs else (self.pruned, self.pruned)


@dataclass(frozen=True)
class Found:
    """What a rule found: gains by the name of the argument."""

    method: str
    gains: dict[str, float]
    kind: str = "sum"


class Call:
    """A step with its arguments in both networks, by name.

    Parameters
    ----------
    step : Step
    names : sequence of str
        Of its positional arguments.
    dense, pruned : (args, kwargs)
        What it is called with, tensors in the place of references and names.
    value
        What it gives in the dense network.

    Attributes
    ----------
    refs : list of (dense, pruned)
        The values of the references of the step, in their order.
    """

    def __init__(self, step: Step, names: Sequence[str], dense: Arguments, pruned: Arguments, value: Any) -> None:
        self.step, self.names, self.pruned, self.value = step, names, pruned, value
        self.refs: list[tuple[Any, Any]] = []
        self._held: list[tuple[Any, Any]] = []
        self._arguments: dict[int | str, Argument] = {}
        keyed: list[tuple[int | str, Any]] = [*enumerate(step.args), *step.kwargs.items()]
        for key, spec in keyed:
            one, two = (call[0][key] if isinstance(key, int) else call[1][key] for call in (dense, pruned))
            start = len(self.refs)
            for leaf, x, y in zip(leaves(spec), leaves(one), leaves(two), strict=True):
                if isinstance(leaf, Ref):
                    self.refs.append((x, y))
                elif isinstance(leaf, Held):
                    self._held.append((x, y))
            self._arguments[key] = Argument(one, two, key, tuple(range(start, len(self.refs))))

    def find(self, name: str) -> Argument | None:
        """Return an argument by name, or None where it is not given."""
        if name in self.names and self.names.index(name) in self._arguments:
            return self._arguments[self.names.index(name)]
        known_as = {"input": ("self",), "training": ("train",), "dim": ("axis",), "p": ("ord",)}.get(name, ())
        return next((self._arguments[key] for key in (name, *known_as) if key in self._arguments), None)

    def setting(self, name: str, default: Any = None) -> Any:
        """Return the value of an argument that is no tensor of another step."""
        given = self.find(name)
        return default if given is None or given.pruned is None else given.pruned

    def pair(self, name: str) -> tuple[Any, Any]:
        """Return an argument in the two networks; both None where it is not given."""
        given = self.find(name)
        return (None, None) if given is None else given.pair

    def tensor(self, name: str = "input") -> Tensor | None:
        """Return an argument of the dense network if it is a real tensor."""
        found = self.pair(name)[0]
        return found if isinstance(found, Tensor) and found.is_floating_point() else None

    @property
    def out(self) -> Tensor:
        """The first tensor that the step gives."""
        return next(leaf for leaf in leaves(self.value) if isinstance(leaf, Tensor))

    def widens(self, dtype: torch.dtype) -> bool:
        """Whether a result of this type holds every number of the inputs: nothing is rounded off."""
        return all(
            torch.promote_types(x.dtype, dtype) == dtype for x, _ in self.refs if isinstance(x, Tensor) and is_real(x)
        )

    def results_same(self) -> bool:
        """Whether the step has the same weights and gives the same in the pruned network."""
        if not all(same(x, y) for x, y in self._held):
            return False
        with torch.no_grad():
            other = resolve(self.step.target)(*self.pruned[0], **self.pruned[1])
        return all(same(x, y) for x, y in zip(leaves(self.value), leaves(other), strict=True) if isinstance(x, Tensor))

    def linear(self, name: str = "input", keep: int | None = None) -> float:
        """Return the gain of a linear step with coefficients of at least 0, by its last `keep` dimensions alone."""
        argument = self.find(name)
        like = self.tensor(name)
        if argument is None or like is None:
            return math.inf
        size = like.shape if keep is None else (1,) * (like.dim() - keep) + like.shape[like.dim() - keep :]
        ones = torch.ones(size, dtype=torch.float64, device=like.device)

        def function(given: Tensor) -> Tensor:
            args, kwargs = list(self.pruned[0]), dict(self.pruned[1])
            place: Any = args if isinstance(argument.key, int) else kwargs
            place[argument.key] = given
            result: Tensor = resolve(self.step.target)(*args, **kwargs)
            return result

        return linear_gain(function, ones)


def one(gain: float | None, method: str) -> Found | None:
    """Return the finding about the input alone, or None of none."""
    return None if gain is None else Found(method, {"input": gain})


def is_real(value: Any) -> bool:
    """Whether a value carries errors: floating numbers do, and whatever is not known."""
    return not isinstance(value, Tensor) or value.is_floating_point() or value.is_complex()


def same(x: Any, y: Any) -> bool:
    """Whether two values are one, or tensors that are equal entry by entry."""
    return x is y or (isinstance(x, Tensor) and isinstance(y, Tensor) and bool(torch.equal(x, y)))
