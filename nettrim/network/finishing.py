"""Retraining after pruning: fine-tuning with labels, or distillation to the dense network's outputs without any.

Weights that are pruned stay exactly zero, and the rest of the network, biases included, is trained. Distillation can
also take weights away as it goes, from a mask that holds more than is to stay: so the network as a whole decides which,
and how many of each layer.

- Hinton, Vinyals, Dean, "Distilling the Knowledge in a Neural Network", 2015: the loss between softened outputs.
- Zhu, Gupta, "To prune, or not to prune", 2017: the cubic schedule of the number of weights.
- LeCun, Denker, Solla, "Optimal Brain Damage", NIPS 1989: the saliency, here with the Gauss-Newton diagonal.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR, LRScheduler

from nettrim.errors import ProblemError
from nettrim.network.calibrate import outputs
from nettrim.network.edit import evaluating
from nettrim.network.sensitivity import GradualPruning
from nettrim.network.training import (
    Support,
    check_classes,
    check_count,
    check_inputs,
    check_labels,
    check_rates,
    run_epochs,
)

Loss = Callable[[Tensor, Tensor], Tensor]

_WARM_UP = 50  # steps over which the learning rate rises
_EPOCHS, _STEPS = 20, 4000  # unless the user says how many epochs: the more of the two
_BLOCK = 4096  # rows in one pass without gradients
_SPREAD = 1 / 3  # the temperature, in units of the spread of the dense network's outputs


@dataclass(frozen=True, eq=False)
class Finished:
    """What retraining did; the weights are in the model.

    Attributes
    ----------
    masks : dict of str to bool Tensor (M, N)
        True = kept.
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


@dataclass(frozen=True)
class FineTune:
    """Cross entropy under fixed masks: Adam, a learning rate that falls to zero along a cosine.

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

    name: ClassVar[str] = "fine-tune"
    choose: ClassVar[str] = "fixed"
    headroom: ClassVar[float] = 1.0

    def __post_init__(self) -> None:
        """Refuse settings out of range."""
        _check_common(self)
        check_rates(self.learning_rate, self.weight_decay)

    def run(
        self,
        model: nn.Module,
        teacher: nn.Module | None,
        inputs: Tensor,
        labels: Tensor | None,
        masks: Mapping[str, Tensor],
        targets: Mapping[str, int] | int | None = None,
        seed: int = 0,
        progress: bool = False,
    ) -> Finished:
        """Fine-tune `model` in place; the arguments are those of `Distill.run`, and `teacher` is not used.

        Raises
        ------
        ProblemError
            There are no labels, `targets` are not what the masks keep, data or masks do not fit the model, or the loss
            ceases to be finite.
        """
        if labels is None:
            raise ProblemError("fine-tuning needs labels and there are none; pass labels, or distil without any")
        check_inputs(inputs)
        check_labels(inputs, labels)
        with _trained(model) as parameters:
            samples, classes = inputs.detach().to(parameters[0]), labels.to(parameters[0].device, torch.int64)
            check_classes(model, samples, classes)
            support = Support(model, masks)
            _groups(support, self.choose, targets)
            return _finish(model, samples, classes, F.cross_entropy, support, [], self, parameters, seed, progress)

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
        inputs: Tensor,
        labels: Tensor | None,
        masks: Mapping[str, Tensor],
        targets: Mapping[str, int] | int | None = None,
        seed: int = 0,
        progress: bool = False,
    ) -> Finished:
        """Distil `teacher` into `model`, in place.

        Parameters
        ----------
        model : nn.Module
            Changed in place, and left in evaluation mode. Its parameters that require a gradient are trained; if none
            does, all are. Whatever ends the run early, pruned weights are exactly zero.
        teacher : nn.Module
            The dense network; left as it is.
        inputs : Tensor, shape (P, ...)
            Floating and finite; moved to the model's device and dtype.
        labels : Tensor or None
            Not used.
        masks : mapping from str to bool Tensor (M, N)
            Of each pruned layer's weight, True = kept. Layers that are not named stay dense.
        targets : mapping from str to int, or int, or None
            How many weights stay: of each layer with "layer", of all masked layers together with "global" (of a
            mapping, the sum). Layers that a mapping leaves out keep their masks with "layer". With "fixed" None, or
            what the masks hold.
        seed : int
            Decides the split, the shuffling and the samples of the saliency. The same seed on the same machine gives
            the same weights, bit for bit.
        progress : bool
            Show a bar on stderr, if that is a terminal.

        Returns
        -------
        Finished

        Raises
        ------
        ProblemError
            Data, masks or targets do not fit the model or each other, the outputs leave nothing to distil, or the loss
            ceases to be finite; in the last case the model is put back to its start.
        UnknownNameError
            A mask is of no Linear layer of the model.
        """
        check_inputs(inputs)
        with _trained(model) as parameters:
            samples = inputs.detach().to(parameters[0])
            wanted = _dense_outputs(teacher, model, samples)
            loss = self._loss(wanted)
            support = Support(model, masks)
            groups = _groups(support, self.choose, targets)
            return _finish(model, samples, wanted, loss, support, groups, self, parameters, seed, progress)

    def _optimiser(self, parameters: list[Tensor], steps: int) -> tuple[Optimizer, LRScheduler]:
        rise = min(_WARM_UP, max(1, steps // 10))

        def factor(step: int) -> float:
            left = min(1.0, (1 - step / steps) / self.final_share)
            return min(1.0, (step + 1) / rise) * 0.5 * (1 - math.cos(math.pi * left))

        optimiser = torch.optim.Adam(parameters, lr=self.learning_rate, betas=(0.9, 0.99))
        return optimiser, LambdaLR(optimiser, factor)

    def _loss(self, wanted: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
        """Return the loss for a batch of the pruned network's outputs and the dense ones."""
        if self.loss == "mse":
            return F.mse_loss
        if wanted.shape[1] < 2:
            raise ProblemError("loss='kl' compares classes and there is a single output; pass loss='mse'")
        centred = wanted - wanted.mean(1, keepdim=True)
        temperature = self.temperature or _SPREAD * float(centred.double().square().mean().sqrt())
        if not temperature > 0:
            raise ProblemError("the teacher's outputs are the same for every class; pass the trained, dense network")

        def softened(outputs: Tensor, targets: Tensor) -> Tensor:
            ours, theirs = (F.log_softmax(each / temperature, dim=1) for each in (outputs, targets))
            divergence = F.kl_div(ours, theirs, reduction="batchmean", log_target=True)
            pull = 0.5 * F.mse_loss(outputs, targets)
            return (1 - self.anchor) * temperature**2 * divergence + self.anchor * pull

        return softened


def fine_tune(
    model: nn.Module,
    inputs: Tensor,
    labels: Tensor,
    masks: Mapping[str, Tensor],
    *,
    seed: int = 0,
    progress: bool = False,
    **settings: Any,
) -> Finished:
    """Train with labels under fixed masks, in place: `FineTune` with these settings, run."""
    return FineTune(**settings).run(model, None, inputs, labels, masks, None, seed, progress)


def distill(
    model: nn.Module,
    teacher: nn.Module,
    inputs: Tensor,
    masks: Mapping[str, Tensor],
    *,
    targets: Mapping[str, int] | int | None = None,
    seed: int = 0,
    progress: bool = False,
    **settings: Any,
) -> Finished:
    """Train to the outputs of `teacher`, in place: `Distill` with these settings, run.

    What is chosen follows from `targets`: nothing where None, within layers by a mapping, over all layers by a number.
    """
    choose = "fixed" if targets is None else "layer" if isinstance(targets, Mapping) else "global"
    return Distill(**settings, choose=choose).run(model, teacher, inputs, None, masks, targets, seed, progress)


def _groups(support: Support, choose: str, targets: Mapping[str, int] | int | None) -> list[tuple[list[str], int]]:
    """Return which layers compete with each other for how many weights, where fewer are to stay than there are."""
    counts = support.counts()
    if isinstance(targets, Mapping) and not set(targets) <= set(counts):
        raise ProblemError(f"targets name {sorted(set(targets) - set(counts))}, which have no mask; add their masks")
    if choose == "fixed":
        held = {name: counts[name] for name in targets} if isinstance(targets, Mapping) else sum(counts.values())
        if targets is not None and held != (dict(targets) if isinstance(targets, Mapping) else targets):
            raise ProblemError(f"targets={targets} with fixed masks that hold {held}; prune to the targets first")
        return []
    if isinstance(targets, Mapping):
        groups = [([name], count) for name, count in targets.items()]
        if choose == "global":
            groups = [(list(counts), sum(targets.values()))]
    elif targets is None or choose == "layer":
        raise ProblemError(f"targets={targets} with choose={choose!r}; pass a dict from layer to number of weights")
    else:
        groups = [(list(counts), targets)]
    for names, count in groups:
        held = sum(counts[name] for name in names)
        check_count(f"targets of {', '.join(names)}", count)
        if count > held:
            raise ProblemError(f"targets={count} of {', '.join(names)}, whose masks hold {held}; start from more")
    return [(names, count) for names, count in groups if count < sum(counts[name] for name in names)]


def _finish(
    model: nn.Module,
    samples: Tensor,
    targets: Tensor,
    loss: Loss,
    support: Support,
    groups: list[tuple[list[str], int]],
    settings: FineTune | Distill,
    parameters: list[Tensor],
    seed: int,
    progress: bool,
) -> Finished:
    """Split, train, and leave the best weights in the model."""
    began = time.monotonic()
    drawn = torch.randperm(len(samples), generator=torch.Generator().manual_seed(seed)).to(samples.device)
    apart = math.ceil(settings.validation * len(samples))
    if apart == len(samples):
        raise ProblemError(
            f"validation={settings.validation} of {len(samples)} rows leaves none to train on; pass more rows, or 0"
        )
    held, rows = drawn[:apart], drawn[apart:]
    inputs, wanted = samples[rows], targets[rows]
    per_epoch = math.ceil(len(inputs) / settings.batch_size)
    epochs = settings.epochs or max(_EPOCHS, math.ceil(_STEPS / per_epoch))
    steps = epochs * per_epoch
    optimiser, schedule = settings._optimiser(parameters, steps)
    gradual = None
    if groups and isinstance(settings, Distill):
        last = int((1 - settings.final_share) * steps)
        gradual = GradualPruning(model, support, groups, inputs, last, settings.every, settings.saliency_rows, seed)
    start, masks = copy.deepcopy(model.state_dict()), support.masks
    try:
        history = run_epochs(
            model, inputs, wanted, loss, optimiser, schedule,
            epochs=epochs, batch_size=settings.batch_size, seed=seed,
            dropout=isinstance(settings, FineTune), support=support,
            before_step=None if gradual is None else gradual.before_step,
            held_out=(samples[held], targets[held]) if apart else None, patience=settings.patience,
            title=settings.name, progress=progress,
        )  # fmt: skip
    except ProblemError:
        # most often the rate was too high: what came of it is worth nothing
        model.load_state_dict(start)
        support.set(masks)
        raise
    counts = support.counts()
    assert all(sum(counts[name] for name in names) == count for names, count in groups)
    return Finished(
        masks=support.masks,
        losses=history.losses,
        validation_losses=history.held_out_losses,
        steps=len(history.losses) * per_epoch,
        best_epoch=history.best_epoch,
        seconds=time.monotonic() - began,
    )


@contextmanager
def _trained(model: nn.Module) -> Iterator[list[Tensor]]:
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


def _dense_outputs(teacher: nn.Module, model: nn.Module, samples: Tensor) -> Tensor:
    """Return the teacher's outputs (P, C), in the dtype and on the device of the samples."""
    wanted = outputs(teacher, torch.split(samples, _BLOCK), dtype=samples.dtype).to(samples.device)
    outputs(model, [samples[:1]])  # refuses what cannot be run
    with evaluating(model), torch.no_grad():
        found = model(samples[:1].clone())
    if len(wanted) != len(samples) or found.shape != wanted[:1].shape:
        raise ProblemError(
            f"the teacher maps {len(samples)} rows to outputs of shape {tuple(wanted.shape)} and the model one row to "
            f"{tuple(found.shape)}; pass networks that both map (P, ...) to (P, C)"
        )
    return wanted


def _check_common(settings: FineTune | Distill) -> None:
    if settings.epochs is not None:
        check_count("epochs", settings.epochs)
    check_count("batch_size", settings.batch_size)
    if not 0 <= settings.validation < 1:
        raise ProblemError(f"validation is {settings.validation!r}; pass a fraction of the samples in [0, 1)")
    if settings.patience is not None:
        check_count("patience", settings.patience)
