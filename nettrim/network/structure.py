"""What of a network is gone for good: channels of layers, whole units; and the step between both ways to write it.

A network without some channels or units is also the dense network with other weights: a channel that is gone is a zero
row of its layer and zero columns of the next; a residual branch that is gone ends in a zero layer; a plain unit that is
gone is the identity, because what reaches it is not negative. `nettrim.network.slim` goes from one to the other.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from nettrim.network.trace import LayerGraph
from nettrim.network.units import Unit, middle_tap


@dataclass(frozen=True)
class Structure:
    """What stays of a network's channels, and which units are gone.

    Attributes
    ----------
    channels : dict of str to tuple of int
        Layer to its output channels that stay, ascending and at least one; layers that are not named keep all.
    removed : tuple of str
        Names of units, in execution order.
    """

    channels: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    removed: tuple[str, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """Return it as JSON values."""
        return {"channels": {name: list(kept) for name, kept in self.channels.items()}, "removed": list(self.removed)}

    @staticmethod
    def of_dict(stored: Mapping[str, Any]) -> Structure:
        """Read what `as_dict` wrote."""
        return Structure({name: tuple(kept) for name, kept in stored["channels"].items()}, tuple(stored["removed"]))


def gone(graph: LayerGraph, unit: Unit, device: torch.device | None = None) -> dict[str, Tensor]:
    """Return what makes a unit vanish in the dense shape: entries of the folded state, in float64.

    A plain unit's layer is the identity: its kernel is one where a channel meets itself in the tap over its own
    position, else zero. All layers of a residual unit are zero, which the one before the sum has to be. Biases are
    zero.

    Parameters
    ----------
    graph : LayerGraph
    unit : Unit
        That is removable.
    device : torch.device, optional
        Of the entries.
    """
    entries: dict[str, Tensor] = {}
    for name in unit.layers:
        spec = graph.layer(name)
        weight = torch.zeros(spec.shape, dtype=torch.float64, device=device)
        if unit.kind == "plain":
            taps = () if spec.window is None else middle_tap(spec.window)
            assert taps is not None
            over = weight
            for tap in reversed(taps):
                over = over[..., tap]
            over.copy_(torch.eye(len(weight)))
        entries[spec.weight] = weight
        if spec.bias_name is not None:
            entries[spec.bias_name] = torch.zeros(spec.out_features, dtype=torch.float64, device=device)
    return entries
