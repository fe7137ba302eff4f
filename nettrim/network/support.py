"""Which weights a pruned network has: masks that are held while it is trained."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from nettrim.errors import ProblemError
from nettrim.network.edit import find_weight


class Support:
    """Which weights of a model there are: the masks of its pruned layers, held at the moment.

    Parameters
    ----------
    model : nn.Module
        Weights off the masks are set to zero by `set`, `apply` and `clear`, not before.
    masks : mapping from str to bool Tensor
        From the names of layers of any kind; each of the shape of its layer's weight, True = kept. Layers that are not
        named are dense.

    Attributes
    ----------
    masks : dict of str to bool Tensor

    Raises
    ------
    ProblemError
        There is no mask, or one is not bool or not of its weight's shape.
    UnknownNameError
        A name is that of no layer with a weight.
    """

    def __init__(self, model: nn.Module, masks: Mapping[str, Tensor]) -> None:
        if not masks:
            raise ProblemError("masks is empty; give the mask of at least one pruned layer")
        self._weights = {name: find_weight(model, name) for name in masks}
        for name, mask in masks.items():
            shape = tuple(self._weights[name].shape)
            if not isinstance(mask, Tensor) or mask.dtype != torch.bool or mask.shape != shape:
                found = (
                    f"{mask.dtype} of shape {tuple(mask.shape)}" if isinstance(mask, Tensor) else type(mask).__name__
                )
                raise ProblemError(f"the mask of layer {name!r} is {found}; pass bool of shape {shape}")
        self._take(masks)

    def set(self, masks: Mapping[str, Tensor]) -> None:
        """Take other masks of the same layers, and set the weights off them to zero."""
        self._take(masks)
        self.clear()

    def apply(self) -> None:
        """Set the finite weights off the masks to zero, fast."""
        with torch.no_grad():
            for weight, factor in zip(self._weights.values(), self._factors, strict=True):
                weight.mul_(factor)

    def clear(self) -> None:
        """Set all weights off the masks to zero, also NaN."""
        with torch.no_grad():
            for name, weight in self._weights.items():
                weight.masked_fill_(~self.masks[name], 0.0)

    def counts(self) -> dict[str, int]:
        """Return how many weights each mask holds."""
        return {name: int(mask.sum()) for name, mask in self.masks.items()}

    def _take(self, masks: Mapping[str, Tensor]) -> None:
        self.masks = {name: mask.to(self._weights[name].device, copy=True) for name, mask in masks.items()}
        self._factors = [self.masks[name].to(weight.dtype) for name, weight in self._weights.items()]
