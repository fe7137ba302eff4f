"""The losses of training, for outputs of any shape: scores of classes (B, C), (B, T, C) or (B, C, height, width)."""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor

from nettrim.errors import ProblemError

Loss = Callable[[Tensor, Tensor], Tensor]

_SPREAD = 1 / 3  # the temperature, in units of the spread of the dense network's outputs


def classes_last(outputs: Tensor) -> Tensor:
    """Return outputs with their classes as the last dimension.

    Parameters
    ----------
    outputs : Tensor
        (B,) is one output of each sample; (B, C) and (B, T, C) have the classes last as they are; with four and more
        dimensions the classes are taken for channels, (B, C, ...).
    """
    if outputs.dim() < 2:
        return outputs.unsqueeze(-1)
    return outputs if outputs.dim() < 4 else outputs.movedim(1, -1)


def class_rows(outputs: Tensor) -> Tensor:
    """Return outputs as rows (R, C), one for every sample and position."""
    last = classes_last(outputs)
    return last.reshape(-1, last.shape[-1])


def centred(outputs: Tensor) -> Tensor:
    """Return outputs without their mean over the classes, classes last; a single output stays as it is."""
    last = classes_last(outputs)
    return last - last.mean(-1, keepdim=True) if last.shape[-1] > 1 else last


def cross_entropy(outputs: Tensor, labels: Tensor) -> Tensor:
    """Return the mean cross entropy over all samples and positions; labels of -100 do not count."""
    return F.cross_entropy(class_rows(outputs), labels.flatten())


def squared_error(outputs: Tensor, targets: Tensor) -> Tensor:
    """Return the mean squared difference."""
    return F.mse_loss(outputs, targets)


def taught(
    outputs: Tensor, labels: Tensor | None, teacher: Tensor, mixing: float, temperature: float, several: bool
) -> Tensor:
    """Return ``(1 − a) CE(z, labels) + a T² KL(softmax(t/T) ‖ softmax(z/T))`` of outputs ``z`` and a teacher's ``t``.

    Hinton, Vinyals, Dean, "Distilling the Knowledge in a Neural Network", 2015. With several labels to a sample, both
    terms are binary, label by label: ``(1 − a) BCE(σ(z), labels) + a T² KL(σ(t/T) ‖ σ(z/T))``. As in `cross_entropy`,
    the mean is over samples and positions; of several labels, over these too.

    Parameters
    ----------
    outputs, teacher : Tensor
        Of the same shape.
    labels : Tensor or None
        Integer classes, those of −100 not counting in the first term; or 0 and 1 of the shape of the outputs, floating
        or bool. None where ``a = 1``.
    mixing, temperature : float
        ``a`` in [0, 1] and ``T > 0``.
    several : bool
        Whether a sample has several labels.
    """
    own: Tensor | float = 0.0
    if mixing < 1:
        assert labels is not None
        own = several_entropy(outputs, labels) if several else cross_entropy(outputs, labels)
    if several:
        divergence = _binary_divergence(teacher / temperature, outputs / temperature).mean()
    else:
        ours, theirs = (F.log_softmax(class_rows(each) / temperature, dim=1) for each in (outputs, teacher))
        divergence = F.kl_div(ours, theirs, reduction="batchmean", log_target=True)
    return (1 - mixing) * own + mixing * temperature**2 * divergence


def several_entropy(outputs: Tensor, labels: Tensor) -> Tensor:
    """Return the mean binary cross entropy over all samples and labels; labels are 0 and 1, of the outputs' shape."""
    return F.binary_cross_entropy_with_logits(outputs, labels.to(outputs.dtype))


def _binary_divergence(theirs: Tensor, ours: Tensor) -> Tensor:
    """Return ``KL(σ(theirs) ‖ σ(ours))``, entry by entry."""
    there = theirs.sigmoid() * (F.logsigmoid(theirs) - F.logsigmoid(ours))
    absent = (-theirs).sigmoid() * (F.logsigmoid(-theirs) - F.logsigmoid(-ours))
    return there + absent


def softened(wanted: Tensor, temperature: float | None, anchor: float) -> Loss:
    """Return the loss ``(1 − anchor) T² KL(softmax(z/T) ‖ softmax(ẑ/T)) + anchor ½ mean (ẑ − z)²`` of ``ẑ`` and ``z``.

    Hinton, Vinyals, Dean, "Distilling the Knowledge in a Neural Network", 2015; the mean is over samples and positions.

    Parameters
    ----------
    wanted : Tensor
        All outputs ``z`` that are to be met.
    temperature : float or None
        ``T``; None takes a third of the root mean square of ``wanted``, centred over the classes.
    anchor : float

    Raises
    ------
    ProblemError
        There is a single output, or all outputs of a sample are the same.
    """
    if classes_last(wanted).shape[-1] < 2:
        raise ProblemError("loss='kl' compares classes and there is a single output; pass loss='mse'")
    scale = temperature or _SPREAD * float(centred(wanted).double().square().mean().sqrt())
    if not scale > 0:
        raise ProblemError("the teacher's outputs are the same for every class; pass the trained, dense network")

    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        ours, theirs = (F.log_softmax(class_rows(each) / scale, dim=1) for each in (outputs, targets))
        divergence = F.kl_div(ours, theirs, reduction="batchmean", log_target=True)
        return (1 - anchor) * scale**2 * divergence + anchor * 0.5 * F.mse_loss(outputs, targets)

    return loss
