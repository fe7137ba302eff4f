"""What retraining leaves behind beside the weights themselves."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, eq=False)
class Finished:
    """What retraining did; the weights are in the model.

    Attributes
    ----------
    masks : dict of str to bool Tensor
        Of the shapes of the weights; True = kept.
    losses : tuple of float
        Mean training loss of each epoch.
    validation_losses : tuple of float
        Of the start, then after each epoch; empty without validation.
    steps : int
        Steps that were taken.
    best_epoch : int
        The epoch after which the weights that are kept were seen; 0 is the start.
    seconds : float
    """

    masks: dict[str, Tensor]
    losses: tuple[float, ...]
    validation_losses: tuple[float, ...]
    steps: int
    best_epoch: int
    seconds: float
