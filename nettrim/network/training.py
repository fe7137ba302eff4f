"""The one training loop, so that every network trained here is trained the same way and can be trained again.

Shuffling and dropout draw from a seed of their own: the result depends on the arguments alone, and the
caller's random numbers are left where they were.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from nettrim.errors import ProblemError
from nettrim.network.edit import evaluating, first_line


def train(
    model: nn.Module,
    inputs: Tensor,
    labels: Tensor,
    *,
    epochs: int,
    learning_rate: float = 1e-3,
    batch_size: int = 64,
    weight_decay: float = 0.0,
    seed: int = 0,
    progress: bool = False,
) -> list[float]:
    """Train a classifier in place: cross entropy, Adam, a learning rate that falls to zero along a cosine.

    Parameters
    ----------
    model : nn.Module
        Maps (B, ...) to (B, C) scores. Changed in place, and left in evaluation mode.
    inputs : Tensor, shape (P, ...)
        Floating and finite; moved to the model's device and dtype.
    labels : Tensor of integers, shape (P,)
        Classes in 0 ... C - 1.
    epochs : int
        Passes over the data, at least 1.
    learning_rate : float
        Of the first step, positive.
    batch_size : int
        Rows in one step, at least 1; the last step of an epoch takes what is left.
    weight_decay : float
        Adam's quadratic penalty on the weights, not negative.
    seed : int
        Decides shuffling and dropout. The same seed on the same machine gives the same weights, bit for bit.
    progress : bool
        Show a bar on stderr, if that is a terminal.

    Returns
    -------
    list of float
        Mean loss over the rows of each epoch.

    Raises
    ------
    ProblemError
        An argument is out of its range, rows do not match, or the loss ceases to be finite.
    """
    _check_settings(epochs, learning_rate, batch_size, weight_decay)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not parameters:
        raise ProblemError("model has no parameter that requires a gradient; call model.requires_grad_(True)")
    device = parameters[0].device
    _check_data(inputs, labels)
    inputs, labels = inputs.detach().to(device, parameters[0].dtype), labels.to(device, torch.int64)
    _check_classes(model, inputs, labels)

    rows = len(inputs)
    steps = epochs * math.ceil(rows / batch_size)
    optimiser = torch.optim.Adam(parameters, lr=learning_rate, weight_decay=weight_decay)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, T_max=steps)
    shuffling = torch.Generator().manual_seed(seed)
    graphics = [device] if device.type == "cuda" else []
    losses = []
    # dropout can draw only from the global generators, so these are lent to it and put back
    with torch.random.fork_rng(devices=graphics):
        torch.default_generator.manual_seed(seed)
        for card in graphics:
            with torch.cuda.device(card):
                torch.cuda.manual_seed(seed)
        model.train()
        try:
            for epoch in tqdm(range(epochs), "training", leave=False, disable=None if progress else True):
                total = 0.0
                order = torch.randperm(rows, generator=shuffling).to(device)
                for start in range(0, rows, batch_size):
                    chosen = order[start : start + batch_size]
                    loss = F.cross_entropy(model(inputs[chosen]), labels[chosen])
                    optimiser.zero_grad()
                    loss.backward()  # type: ignore[no-untyped-call]
                    optimiser.step()
                    decay.step()
                    total += loss.item() * len(chosen)
                if not math.isfinite(total):
                    raise ProblemError(
                        f"the training loss is {total} in epoch {epoch + 1} with "
                        f"learning_rate={learning_rate}; lower the learning rate"
                    )
                losses.append(total / rows)
        finally:
            model.eval()
    return losses


def _check_settings(epochs: int, learning_rate: float, batch_size: int, weight_decay: float) -> None:
    for name, count in (("epochs", epochs), ("batch_size", batch_size)):
        if not isinstance(count, int) or isinstance(count, bool) or count < 1:
            raise ProblemError(f"{name} is {count!r}; pass an integer of at least 1")
    if not (math.isfinite(learning_rate) and learning_rate > 0):
        raise ProblemError(f"learning_rate is {learning_rate!r}; pass a positive number such as 1e-3")
    if not (math.isfinite(weight_decay) and weight_decay >= 0):
        raise ProblemError(f"weight_decay is {weight_decay!r}; pass 0 or a small positive number")


def _check_data(inputs: Tensor, labels: Tensor) -> None:
    if inputs.dim() < 2 or len(inputs) == 0 or not inputs.is_floating_point():
        raise ProblemError(
            f"inputs are {inputs.dtype} of shape {tuple(inputs.shape)}; "
            "pass at least one floating row, of shape (P, ...)"
        )
    bad = int((~torch.isfinite(inputs)).sum())
    if bad:
        raise ProblemError(f"inputs have {bad} NaN or infinite entries; clean the data")
    if labels.dim() != 1 or labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise ProblemError(
            f"labels are {labels.dtype} of shape {tuple(labels.shape)}; pass integer classes of shape (P,)"
        )
    if len(labels) != len(inputs):
        raise ProblemError(f"inputs have {len(inputs)} rows and labels {len(labels)}; pass one label for each row")


def _check_classes(model: nn.Module, inputs: Tensor, labels: Tensor) -> None:
    """Compare the labels with the model's outputs: on a GPU, a class out of range ends the whole process."""
    try:
        with evaluating(model), torch.no_grad():
            scores = model(inputs[:1])
    except (RuntimeError, TypeError, ValueError) as error:
        raise ProblemError(
            f"model ({type(model).__name__}) fails on inputs of shape {tuple(inputs.shape)} "
            f"({first_line(error)}); pass inputs that the model can be called on"
        ) from error
    if not isinstance(scores, Tensor) or scores.dim() != 2:
        found = tuple(scores.shape) if isinstance(scores, Tensor) else type(scores).__name__
        raise ProblemError(f"the model maps one row to {found}; pass a model that returns scores of shape (B, C)")
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= scores.shape[1]:
        raise ProblemError(
            f"labels lie in {low} ... {high} and the model scores {scores.shape[1]} classes; pass classes in "
            f"0 ... {scores.shape[1] - 1}"
        )
