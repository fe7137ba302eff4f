"""Retraining after pruning: fine-tuning with labels, or distillation to the dense network's outputs without any.

Weights that are pruned stay exactly zero, and the rest of the network, biases included, is trained. Distillation can
also take weights away as it goes, from a mask that holds more than is to stay: so the network as a whole decides which,
and how many of each layer.

Hinton, Vinyals, Dean, "Distilling the Knowledge in a Neural Network", 2015.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR, LRScheduler

from nettrim.errors import ProblemError
from nettrim.network.batches import Batch, Batches
from nettrim.network.finished import Finished
from nettrim.network.gradual import GradualPruning, competing
from nettrim.network.labels import check_targets, is_several
from nettrim.network.losses import Loss, cross_entropy, several_entropy, softened, squared_error, taught
from nettrim.network.samples import dense_outputs, joined, moved, taken
from nettrim.network.support import Support
from nettrim.network.trace import Traced, trace
from nettrim.network.training import (
    check_count,
    check_labels,
    check_rates,
    run_epochs,
    trained_parameters,
)

__all__ = ["Distill", "FineTune", "Finished"]

_TRACED = 64  # samples that a model is traced on
_WARM_UP = 50  # steps over which the learning rate rises
_EPOCHS, _STEPS = 20, 4000  # unless the user says how many epochs: the more of the two


@dataclass(frozen=True)
class FineTune:
    """Cross entropy under fixed masks: Adam, a learning rate that falls to zero along a cosine.

    With `mixing` the dense network is a teacher beside the labels, as Shallowing recovers what it removed: the loss is
    ``(1 − mixing) CE + mixing T² KL(softmax(t/T) ‖ softmax(z/T))`` of its outputs ``t``; of several labels to a sample,
    (P, K) and floating or bool, it is binary for each. Hinton's formula and these defaults are our reading.
    Trained as `nettrim.network.training.train` does it, in training mode: dropout is on, and batch normalisation goes
    on with its statistics. The weights of the best epoch on the validation samples are kept; the start is one of them.

    Parameters
    ----------
    epochs : int or None
        At most, at least 1. None takes 20, or as many as make 4,000 steps where the samples are few.
    learning_rate : float
        Of the first step, positive.
    batch_size : int
        Rows in one step, at least 1.
    weight_decay : float
        Adam's quadratic penalty, not negative.
    validation : float
        Fraction of the samples, drawn by the seed, that is not trained on and decides which epoch is best; in [0, 1).
        With 0 the last epoch is kept.
    patience : int or None
        Stop after so many epochs without a better one; None goes on to the end.
    mixing : float
        In [0, 1]. With 0 there is no teacher; with 1 labels are not needed.
    temperature : float
        ``T``, positive.

    Raises
    ------
    ProblemError
        A setting is out of its range.
    """

    epochs: int | None = None
    learning_rate: float = 3e-3
    batch_size: int = 128
    weight_decay: float = 0.0
    validation: float = 0.1
    patience: int | None = 5
    mixing: float = 0.0
    temperature: float = 4.0

    name: ClassVar[str] = "fine-tune"
    choose: ClassVar[str] = "fixed"
    headroom: ClassVar[float] = 1.0

    def __post_init__(self) -> None:
        """Refuse settings out of range."""
        _check_common(self)
        check_rates(self.learning_rate, self.weight_decay)
        if not 0 <= self.mixing <= 1:
            raise ProblemError(f"mixing is {self.mixing!r}; pass the teacher's share of the loss, in [0, 1]")
        if not 0 < self.temperature < math.inf:
            raise ProblemError(f"temperature is {self.temperature!r}; pass a positive number such as 4")

    def run(
        self,
        model: nn.Module,
        teacher: nn.Module | None,
        inputs: Tensor | Batch | Batches,
        labels: Tensor | None,
        masks: Mapping[str, Tensor],
        targets: Mapping[str, int] | int | None = None,
        seed: int = 0,
        progress: bool = False,
        traced: Traced | None = None,
    ) -> Finished:
        """Fine-tune `model` in place; the arguments are those of `Distill.run`; `traced` is not used.

        Raises
        ------
        ProblemError
            There are no labels, or no teacher, and `mixing` needs them; `targets` are not what the masks keep, data or
            masks do not fit the model, or the loss ceases to be finite.
        """
        if labels is None and self.mixing < 1:
            raise ProblemError("fine-tuning needs labels and there are none; pass labels, or distil without any")
        if teacher is None and self.mixing > 0:
            raise ProblemError(f"mixing={self.mixing} needs the dense network as teacher; pass it, or mixing=0")
        samples = joined(inputs)
        if labels is not None and not is_several(labels):
            check_labels(samples, labels)
        with trained_parameters(model) as parameters:
            samples, several = moved(samples, parameters[0]), labels is not None and is_several(labels)
            if labels is not None:
                labels = labels.to(parameters[0].device, parameters[0].dtype if several else torch.int64)
                check_targets(model, samples, labels)
            support = Support(model, masks)
            competing(support, self.choose, targets)
            wanted, loss = self._wanted(model, teacher, samples, labels, several)
            return _finish(model, samples, wanted, loss, support, None, self, parameters, seed, progress)

    def _wanted(
        self, model: nn.Module, teacher: nn.Module | None, samples: Batch, labels: Tensor | None, several: bool
    ) -> tuple[Tensor, Loss]:
        """Return what goes into the loss of each sample, and the loss: with a teacher that is the sample's number."""
        if teacher is None or self.mixing == 0:
            assert labels is not None
            return labels, several_entropy if several else cross_entropy
        told = dense_outputs(teacher, model, samples)

        def loss(outputs: Tensor, rows: Tensor) -> Tensor:
            own = None if labels is None else labels[rows]
            return taught(outputs, own, told[rows], self.mixing, self.temperature, several)

        return torch.arange(len(told), device=told.device), loss

    def _optimiser(self, parameters: list[Tensor], steps: int) -> tuple[Optimizer, LRScheduler]:
        optimiser = torch.optim.Adam(parameters, lr=self.learning_rate, weight_decay=self.weight_decay)
        return optimiser, CosineAnnealingLR(optimiser, T_max=steps)


@dataclass(frozen=True)
class Distill:
    """Without labels, to the dense network's outputs: Adam, constant rate, then a cosine to zero.

    The loss is ``(1 − anchor) T² KL(softmax(z/T) ‖ softmax(ẑ/T)) + anchor ½ mean (ẑ − z)²`` for the dense outputs
    ``z`` and those of the pruned network ``ẑ``. For a large temperature ``T`` the first term approaches the second,
    with centred outputs; a smaller one weighs the classes that compete. Both networks run in evaluation mode: dropout
    is off, and the statistics of batch normalisation stay as they are. The weights of the best epoch on the validation
    samples are kept, among those with the final number of weights; where the mask is fixed, the start is one of them.

    Parameters
    ----------
    epochs : int or None
        At least 1. None takes 20, or as many as make 4,000 steps where the samples are few.
    learning_rate : float
        After 50 steps of warm-up, positive.
    batch_size : int
        Rows in one step, at least 1.
    loss : {"kl", "mse"}
        "mse" is ``anchor = 1``, without the ½.
    temperature : float or None
        Of "kl", positive, in the units of the outputs. None takes a third of the root mean square of the dense
        outputs, centred over the classes.
    anchor : float
        Share of the squared error in "kl", in [0, 1). It ties down what no class depends on.
    choose : {"fixed", "layer", "global"}
        Which weights stay: those of the masks, or those of the largest Gauss-Newton saliency, taken away step by step
        within each layer, or in all layers together.
    headroom : float
        How many times the budget the masks to start from should hold, at least 1, for "layer" and "global". What
        prunes before follows it; `run` itself takes the masks as they are.
    every : int
        Steps between two rounds of taking weights away, at most.
    saliency_rows : int
        Training samples, drawn anew in each round, that the saliency is the mean of.
    final_share : float
        Share of all steps, in (0, 1], in which the rate falls to zero and no weight is taken away any more.
    validation : float
        Fraction of the samples, drawn by the seed, that is not trained on and decides which epoch is best; in [0, 1).
        With 0 the last epoch is kept.
    patience : int or None
        Stop after so many epochs without a better one; None goes on to the end.

    Raises
    ------
    ProblemError
        A setting is out of its range.
    """

    epochs: int | None = None
    learning_rate: float = 5e-3
    batch_size: int = 256
    loss: str = "kl"
    temperature: float | None = None
    anchor: float = 0.02
    choose: str = "fixed"
    headroom: float = 3.0
    every: int = 40
    saliency_rows: int = 1000
    final_share: float = 0.4
    validation: float = 0.1
    patience: int | None = None

    name: ClassVar[str] = "distill"

    def __post_init__(self) -> None:
        """Refuse settings out of range."""
        _check_common(self)
        check_rates(self.learning_rate, 0.0)
        if self.loss not in ("kl", "mse"):
            raise ProblemError(f"loss is {self.loss!r}; pass 'kl' or 'mse'")
        if self.temperature is not None and (self.loss == "mse" or not 0 < self.temperature < math.inf):
            raise ProblemError(
                f"temperature is {self.temperature!r} with loss={self.loss!r}; pass a positive number for 'kl', or None"
            )
        if not 0 <= self.anchor < 1:
            raise ProblemError(f"anchor is {self.anchor!r}; pass a share in [0, 1), or loss='mse'")
        if self.choose not in ("fixed", "layer", "global"):
            raise ProblemError(f"choose is {self.choose!r}; pass 'fixed', 'layer' or 'global'")
        if not 1 <= self.headroom < math.inf:
            raise ProblemError(f"headroom is {self.headroom!r}; pass a factor of at least 1")
        check_count("every", self.every)
        check_count("saliency_rows", self.saliency_rows)
        if not 0 < self.final_share <= 1:
            raise ProblemError(f"final_share is {self.final_share!r}; pass a share of the steps in (0, 1]")

    def run(
        self,
        model: nn.Module,
        teacher: nn.Module,
        inputs: Tensor | Batch | Batches,
        labels: Tensor | None,
        masks: Mapping[str, Tensor],
        targets: Mapping[str, int] | int | None = None,
        seed: int = 0,
        progress: bool = False,
        traced: Traced | None = None,
    ) -> Finished:
        """Distil `teacher` into `model`, in place.

        Parameters
        ----------
        model : nn.Module
            Changed in place, and left in evaluation mode. Its parameters that require a gradient are trained; if none
            does, all are. Whatever ends the run early, pruned weights are exactly zero.
        teacher : nn.Module
            The dense network; left as it is.
        inputs : Tensor of shape (P, ...), Batch or Batches
            Floating and finite, or token ids; moved to the model's device and, where floating, to its dtype.
        labels : Tensor or None
            Not used.
        masks : mapping from str to bool Tensor
            Of each pruned layer's weight, of any kind and in its own shape; True = kept. Layers that are not named stay
            dense.
        targets : mapping from str to int, or int, or None
            How many weights stay: of each layer with "layer", of all masked layers together with "global" (of a
            mapping, the sum). Layers that a mapping leaves out keep their masks with "layer". With "fixed" None, or
            what the masks hold.
        seed : int
            Decides the split, the shuffling and the samples of the saliency. The same seed on the same machine gives
            the same weights, bit for bit.
        progress : bool
            Show a bar on stderr, if that is a terminal.
        traced : Traced, optional
            What `trace` says of this model, whatever its weights are by now; needed where weights are taken away, and
            traced then if it is not given.

        Returns
        -------
        Finished

        Raises
        ------
        ProblemError
            Data, masks or targets do not fit the model or each other, the outputs leave nothing to distil, or the loss
            ceases to be finite; in the last case the model is put back to its start.
        UnknownNameError
            A mask is of no layer of the model.
        UnsupportedError
            Weights are to be taken away, and what the model computes cannot be followed.
        """
        samples = joined(inputs)
        with trained_parameters(model) as parameters:
            samples = moved(samples, parameters[0])
            wanted = dense_outputs(teacher, model, samples)
            loss = squared_error if self.loss == "mse" else softened(wanted, self.temperature, self.anchor)
            support = Support(model, masks)
            groups = competing(support, self.choose, targets)
            choice = None
            if groups:
                some = taken(samples, slice(0, _TRACED))
                choice = groups, trace(model, some, on_unsupported="keep") if traced is None else traced
            return _finish(model, samples, wanted, loss, support, choice, self, parameters, seed, progress)

    def _optimiser(self, parameters: list[Tensor], steps: int) -> tuple[Optimizer, LRScheduler]:
        rise = min(_WARM_UP, max(1, steps // 10))

        def factor(step: int) -> float:
            left = min(1.0, (1 - step / steps) / self.final_share)
            return min(1.0, (step + 1) / rise) * 0.5 * (1 - math.cos(math.pi * left))

        optimiser = torch.optim.Adam(parameters, lr=self.learning_rate, betas=(0.9, 0.99))
        return optimiser, LambdaLR(optimiser, factor)


def _finish(
    model: nn.Module,
    samples: Batch,
    targets: Tensor,
    loss: Loss,
    support: Support,
    choice: tuple[list[tuple[list[str], int]], Traced] | None,
    settings: FineTune | Distill,
    parameters: list[Tensor],
    seed: int,
    progress: bool,
) -> Finished:
    """Split, train, and leave the best weights in the model."""
    began = time.monotonic()
    drawn = torch.randperm(len(samples), generator=torch.Generator().manual_seed(seed)).to(targets.device)
    apart = math.ceil(settings.validation * len(samples))
    if apart == len(samples):
        raise ProblemError(
            f"validation={settings.validation} of {len(samples)} rows leaves none to train on; pass more rows, or 0"
        )
    held, rows = drawn[:apart], drawn[apart:]
    inputs, wanted = taken(samples, rows), targets[rows]
    per_epoch = math.ceil(len(inputs) / settings.batch_size)
    epochs = settings.epochs or max(_EPOCHS, math.ceil(_STEPS / per_epoch))
    steps = epochs * per_epoch
    optimiser, schedule = settings._optimiser(parameters, steps)
    gradual = None
    if choice is not None and isinstance(settings, Distill):
        last = int((1 - settings.final_share) * steps)
        gradual = GradualPruning(
            model, choice[1], support, choice[0], inputs, last, settings.every, settings.saliency_rows, seed
        )
    start, masks = copy.deepcopy(model.state_dict()), support.masks
    try:
        history = run_epochs(
            model, inputs, wanted, loss, optimiser, schedule,
            epochs=epochs, batch_size=settings.batch_size, seed=seed,
            dropout=isinstance(settings, FineTune), support=support,
            before_step=None if gradual is None else gradual.before_step,
            held_out=(taken(samples, held), targets[held]) if apart else None, patience=settings.patience,
            title=settings.name, progress=progress,
        )  # fmt: skip
    except ProblemError:
        # most often the rate was too high: what came of it is worth nothing
        model.load_state_dict(start)
        support.set(masks)
        raise
    counts = support.counts()
    assert all(sum(counts[name] for name in names) == count for names, count in (choice[0] if choice else []))
    return Finished(
        masks=support.masks,
        losses=history.losses,
        validation_losses=history.held_out_losses,
        steps=len(history.losses) * per_epoch,
        best_epoch=history.best_epoch,
        seconds=time.monotonic() - began,
    )


def _check_common(settings: FineTune | Distill) -> None:
    if settings.epochs is not None:
        check_count("epochs", settings.epochs)
    check_count("batch_size", settings.batch_size)
    if not 0 <= settings.validation < 1:
        raise ProblemError(f"validation is {settings.validation!r}; pass a fraction of the samples in [0, 1)")
    if settings.patience is not None:
        check_count("patience", settings.patience)
