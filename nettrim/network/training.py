"""The one training loop, so that every network trained here is trained the same way and can be trained again.

It keeps pruned weights at zero where it is told which they are.

Shuffling and dropout draw from a seed of their own: the result depends on the arguments alone, and the
caller's random numbers are left where they were.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from tqdm import tqdm

from nettrim.errors import ProblemError
from nettrim.network.batches import Batch
from nettrim.network.edit import evaluating, first_line
from nettrim.network.losses import Loss, classes_last, cross_entropy
from nettrim.network.samples import BLOCK, check_inputs, forward, forward_checked, pieces, taken
from nettrim.network.support import Support


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
        Maps (B, ...) to scores (B, C), (B, T, C) or (B, C, height, width), or to an object that holds them as `logits`.
        Changed in place, and left in evaluation mode.
    inputs : Tensor, shape (P, ...)
        Floating and finite; moved to the model's device and dtype.
    labels : Tensor of integers, shape (P,), (P, T) or (P, height, width)
        Classes in 0 ... C - 1; with several positions, those of -100 do not count.
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
    check_count("epochs", epochs)
    check_count("batch_size", batch_size)
    check_rates(learning_rate, weight_decay)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not parameters:
        raise ProblemError("model has no parameter that requires a gradient; call model.requires_grad_(True)")
    check_inputs(inputs)
    check_labels(inputs, labels)
    inputs, labels = inputs.detach().to(parameters[0]), labels.to(parameters[0].device, torch.int64)
    check_classes(model, inputs, labels)

    optimiser = torch.optim.Adam(parameters, lr=learning_rate, weight_decay=weight_decay)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, T_max=epochs * math.ceil(len(inputs) / batch_size))
    history = run_epochs(
        model, inputs, labels, cross_entropy, optimiser, decay,
        epochs=epochs, batch_size=batch_size, seed=seed, progress=progress,
    )  # fmt: skip
    return list(history.losses)


@dataclass(frozen=True)
class History:
    """What a training loop saw.

    Attributes
    ----------
    losses : tuple of float
        Mean loss over the rows trained on, of each epoch.
    held_out_losses : tuple of float
        Mean loss over the rows held out, before the first epoch and after each; empty where none are.
    best_epoch : int
        After which epoch the weights that are left in the model were seen; 0 is before the first.
    """

    losses: tuple[float, ...]
    held_out_losses: tuple[float, ...]
    best_epoch: int


def run_epochs(
    model: nn.Module,
    inputs: Tensor | Batch,
    targets: Tensor,
    loss: Loss,
    optimiser: Optimizer,
    schedule: LRScheduler,
    *,
    epochs: int,
    batch_size: int,
    seed: int,
    dropout: bool = True,
    support: Support | None = None,
    before_step: Callable[[], bool] | None = None,
    held_out: tuple[Tensor | Batch, Tensor] | None = None,
    patience: int | None = None,
    title: str = "training",
    progress: bool = False,
) -> History:
    """Take shuffled batches and step, epoch after epoch. All training in this package goes through here.

    Parameters
    ----------
    model : nn.Module
        Changed in place, and left in evaluation mode.
    inputs : Tensor, shape (P, ...), or Batch
        Where floating in the model's dtype, and on its device.
    targets : Tensor, shape (P, ...)
        What goes into the loss beside the outputs.
    loss : callable
        From outputs and targets of a batch to their mean loss.
    optimiser : Optimizer
        Over the parameters to train.
    schedule : LRScheduler
        Of that optimiser; advanced after every step.
    epochs, batch_size : int
        At least 1; the last step of an epoch takes the rows that are left.
    seed : int
        Decides shuffling and dropout.
    dropout : bool
        Train in training mode: dropout is on, and batch normalisation uses and updates the statistics of batches; a
        last step of a single row, which has no variance, then takes one more from the step before. Else in evaluation
        mode, where both are as they will be in use.
    support : Support, optional
        The weights that there are: all others are zero from the start on, after every step, and whatever ends the loop.
    before_step : callable, optional
        Called before every step. May change the support; returns whether that is done with.
    held_out : pair of Tensor, optional
        Inputs and targets that are not trained on. The weights that are best on them are left in the model, from the
        start on, or from the epoch on in which `before_step` is done. Without them it is the last weights.
    patience : int, optional
        Stop after so many epochs without a better one on `held_out`.
    title : str
        Of the progress bar.
    progress : bool
        Show a bar on stderr, if that is a terminal.

    Returns
    -------
    History

    Raises
    ------
    ProblemError
        The loss ceases to be finite, or batch normalisation has a single row to work with.
    """
    samples = Batch((inputs,)) if isinstance(inputs, Tensor) else inputs
    rows, device = len(samples), targets.device
    cuts = _cuts(rows, batch_size, apart=not (dropout and any(isinstance(m, _BatchNorm) for m in model.modules())))
    shuffling = torch.Generator().manual_seed(seed)
    graphics = [device] if device.type == "cuda" else []
    losses: list[float] = []
    settled = before_step is None
    watch = None if held_out is None else _Watch(model, loss, *held_out)
    # dropout can draw only from the global generators, so these are lent to it and put back
    with torch.random.fork_rng(devices=graphics):
        torch.default_generator.manual_seed(seed)
        for card in graphics:
            with torch.cuda.device(card):
                torch.cuda.manual_seed(seed)
        model.train(dropout)
        try:
            if support is not None:
                support.clear()
            if watch is not None:
                watch.look(settled)
            for epoch in tqdm(range(epochs), title, leave=False, disable=None if progress else True):
                total = 0.0
                order = torch.randperm(rows, generator=shuffling).to(device)
                for start, stop in cuts:
                    if before_step is not None:
                        settled = before_step()
                    chosen = order[start:stop]
                    value = loss(_step_forward(model, taken(samples, chosen)), targets[chosen])
                    optimiser.zero_grad()
                    value.backward()  # type: ignore[no-untyped-call]
                    optimiser.step()
                    schedule.step()
                    if support is not None:
                        support.apply()
                    total += value.item() * len(chosen)
                    if not math.isfinite(total):
                        raise ProblemError(
                            f"the training loss is {total} in epoch {epoch + 1} with "
                            f"learning_rate={optimiser.param_groups[0]['initial_lr']}; lower the learning rate"
                        )
                losses.append(total / rows)
                if watch is not None:
                    watch.look(settled)
                    if patience is not None and watch.waited >= patience:
                        break
            if watch is not None:
                watch.restore()
        finally:
            if support is not None:
                support.clear()
            model.eval()
    if watch is None:
        return History(tuple(losses), (), len(losses))
    return History(tuple(losses), tuple(watch.losses), watch.epoch)


def _cuts(rows: int, batch_size: int, apart: bool) -> list[tuple[int, int]]:
    """Return where the batches of an epoch begin and end; a single row may stand `apart`, or takes another with it."""
    starts = list(range(0, rows, batch_size))
    if not apart and len(starts) > 1 and rows - starts[-1] == 1 and batch_size > 2:
        starts[-1] -= 1
    return list(zip(starts, [*starts[1:], rows], strict=True))


def _step_forward(model: nn.Module, batch: Batch) -> Tensor:
    """Return the outputs of one step; what was chosen is a copy already."""
    try:
        return forward(model, batch)
    except ValueError as error:
        if len(batch) > 1 or not model.training:
            raise
        raise ProblemError(
            f"model ({type(model).__name__}) cannot be trained on a batch of one row ({first_line(error)}); "
            "raise batch_size, or pass more rows"
        ) from error


class _Watch:
    """Measures the loss on rows held out, and holds on to the best weights."""

    def __init__(self, model: nn.Module, loss: Loss, inputs: Tensor | Batch, targets: Tensor) -> None:
        self.model, self.loss, self.targets = model, loss, targets
        self.inputs = Batch((inputs,)) if isinstance(inputs, Tensor) else inputs
        self.losses: list[float] = []
        self.epoch = 0
        self.best: dict[str, Any] | None = None

    def look(self, counts: bool) -> None:
        """Measure; where this epoch counts, it may be the best."""
        total = 0.0
        with evaluating(self.model), torch.no_grad():
            for rows, wanted in zip(pieces(self.inputs, BLOCK), torch.split(self.targets, BLOCK), strict=True):
                total += float(self.loss(forward_checked(self.model, rows), wanted)) * len(rows)
        self.losses.append(total / len(self.inputs))
        if counts and (self.best is None or self.losses[-1] < self.losses[self.epoch]):
            self.epoch = len(self.losses) - 1
            self.best = copy.deepcopy(self.model.state_dict())

    @property
    def waited(self) -> int:
        """Epochs since the best one."""
        return 0 if self.best is None else len(self.losses) - 1 - self.epoch

    def restore(self) -> None:
        """Put the best weights into the model."""
        if self.best is not None:
            self.model.load_state_dict(self.best)


@contextmanager
def trained_parameters(model: nn.Module) -> Iterator[list[Tensor]]:
    """Yield the parameters to train, which are all if none requires a gradient; then put the flags back."""
    chosen = [parameter for parameter in model.parameters() if parameter.requires_grad]
    thawed = [] if chosen else [parameter for parameter in model.parameters() if parameter.is_floating_point()]
    if not chosen and not thawed:
        raise ProblemError(f"model ({type(model).__name__}) has no parameters to train; pass a network")
    for parameter in thawed:
        parameter.requires_grad_(True)
    try:
        yield [*chosen, *thawed]
    finally:
        for parameter in thawed:
            parameter.requires_grad_(False)
        for parameter in (*chosen, *thawed):
            parameter.grad = None


def check_count(name: str, count: int) -> None:
    """Refuse what is no integer of at least 1.

    Raises
    ------
    ProblemError
        `count` is none.
    """
    if not isinstance(count, int) or isinstance(count, bool) or count < 1:
        raise ProblemError(f"{name} is {count!r}; pass an integer of at least 1")


def check_rates(learning_rate: float, weight_decay: float) -> None:
    """Refuse a learning rate that is not positive, or a weight decay that is negative.

    Raises
    ------
    ProblemError
        Either is out of its range, or not finite.
    """
    if not (math.isfinite(learning_rate) and learning_rate > 0):
        raise ProblemError(f"learning_rate is {learning_rate!r}; pass a positive number such as 1e-3")
    if not (math.isfinite(weight_decay) and weight_decay >= 0):
        raise ProblemError(f"weight_decay is {weight_decay!r}; pass 0 or a small positive number")


def check_labels(inputs: Tensor | Batch, labels: Tensor) -> None:
    """Refuse labels that are not integer classes for each row of the inputs.

    Raises
    ------
    ProblemError
        They are not.
    """
    if labels.dim() < 1 or labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise ProblemError(
            f"labels are {labels.dtype} of shape {tuple(labels.shape)}; pass integer classes of shape (P,)"
        )
    if len(labels) != len(inputs):
        raise ProblemError(f"inputs have {len(inputs)} rows and labels {len(labels)}; pass one label for each row")


def check_classes(model: nn.Module, inputs: Tensor | Batch, labels: Tensor) -> None:
    """Refuse a model that does not score the labels' classes: on a GPU, a class out of range ends the whole process.

    Raises
    ------
    ProblemError
        The model fails on the inputs, returns no scores for what has labels, or has fewer classes.
    """
    first = taken(Batch((inputs,)) if isinstance(inputs, Tensor) else inputs, slice(0, 1))
    with evaluating(model), torch.no_grad():
        scores = forward_checked(model, first)
    if scores.dim() < 2 or len(scores) != 1:
        raise ProblemError(
            f"the model maps one row to {tuple(scores.shape)}; pass a model that returns scores of shape (B, C)"
        )
    scores = classes_last(scores)
    if scores.shape[1:-1] != labels.shape[1:]:
        raise ProblemError(
            f"labels have shape {tuple(labels.shape)} where the model scores {tuple(scores.shape)} of one row, classes "
            f"last; pass labels of shape {(len(labels), *scores.shape[1:-1])}"
        )
    counted = labels if labels.dim() == 1 else labels[labels != -100]
    if counted.numel() == 0:
        raise ProblemError("labels are -100 throughout, so none counts; pass some that do")
    low, high = int(counted.min()), int(counted.max())
    if low < 0 or high >= scores.shape[-1]:
        raise ProblemError(
            f"labels lie in {low} ... {high} and the model scores {scores.shape[-1]} classes; pass classes in "
            f"0 ... {scores.shape[-1] - 1}"
        )
