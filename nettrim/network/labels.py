"""The labels that a network can be trained on: one class to a sample or position, or several labels to a sample."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from nettrim.errors import ProblemError
from nettrim.network.batches import Batch
from nettrim.network.edit import evaluating
from nettrim.network.samples import forward_checked, taken
from nettrim.network.training import check_classes, check_labels


def is_several(labels: Tensor) -> bool:
    """Tell from their form whether a sample has several labels: (P, K), floating or bool."""
    return labels.dim() == 2 and (labels.is_floating_point() or labels.dtype == torch.bool)


def check_targets(model: nn.Module, inputs: Batch, labels: Tensor) -> None:
    """Refuse labels that a model cannot be trained on with a cross-entropy; one row goes through the model.

    Parameters
    ----------
    model : nn.Module
    inputs : Batch
    labels : Tensor
        Integer classes, as `check_labels` and `check_classes` take them; or (P, K), floating or bool, in [0, 1].

    Raises
    ------
    ProblemError
        They do not fit.
    """
    if not is_several(labels):
        check_labels(inputs, labels)
        check_classes(model, inputs, labels)
        return
    if len(labels) != len(inputs):
        raise ProblemError(f"inputs have {len(inputs)} rows and labels {len(labels)}; pass one row for each")
    with evaluating(model), torch.no_grad():
        scores = forward_checked(model, taken(inputs, slice(0, 1)))
    if scores.shape != labels[:1].shape:
        raise ProblemError(
            f"labels have shape {tuple(labels.shape)} and the model maps one row to {tuple(scores.shape)}; pass (P, K) "
            "labels of 0 and 1 to a model with K outputs, or integer classes"
        )
    low, high = labels.min().item(), labels.max().item()
    if not (low >= 0 and high <= 1):
        raise ProblemError(f"labels lie in {low:g} ... {high:g}; pass 0 and 1, which label a sample has")
