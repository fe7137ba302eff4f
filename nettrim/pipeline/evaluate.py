"""Accuracy on one named split at a time: the dense and the pruned network on the very same rows."""

from __future__ import annotations

from torch import Tensor

from nettrim.errors import ProblemError


def accuracy(outputs: Tensor, labels: Tensor) -> float:
    """Return the fraction of rows whose largest output is the label.

    Parameters
    ----------
    outputs : Tensor (P, C)
    labels : Tensor (P,)
        Class indices.

    Raises
    ------
    ProblemError
        The labels are no class index for every row.
    """
    if labels.dim() != 1 or labels.shape[0] != outputs.shape[0] or labels.is_floating_point():
        raise ProblemError(
            f"labels has shape {tuple(labels.shape)} and dtype {labels.dtype}: accuracy needs one class index for each "
            f"of the {outputs.shape[0]} rows."
        )
    return float((outputs.argmax(1) == labels.to(outputs.device)).double().mean())
