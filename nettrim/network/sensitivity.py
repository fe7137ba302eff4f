"""What each weight counts for at the network's outputs, and pruning by it while a network is trained.

``W_mn² · E Σ_c (∂z_c/∂W_mn)²`` is what the removal of a weight adds to ``‖z − z₀‖²`` to second order, other weights
left alone: the saliency of LeCun, Denker, Solla, "Optimal Brain Damage", NIPS 1989, with the Gauss-Newton diagonal. It
takes one backward pass for each output ``z_c``. Layers are found by module hooks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from nettrim.errors import ProblemError, UnsupportedError
from nettrim.network.edit import evaluating, find_linear, first_line
from nettrim.network.training import Support, check_inputs

_ENTRIES = 2**24  # of the gradients (B, M, N) of single samples that are held at a time
_ROUNDS = 20  # at the least, in which weights are taken away


@dataclass(frozen=True, eq=False)
class _Call:
    """One call of a layer: what went in, and what came out before any activation."""

    inputs: Tensor
    pre: Tensor


def gauss_newton_saliency(
    model: nn.Module, inputs: Tensor, names: Sequence[str], *, batch_size: int = 512
) -> dict[str, Tensor]:
    """Return what each weight counts for at the outputs: ``W_mn²`` times the mean of ``Σ_c (∂z_c/∂W_mn)²``.

    For a layer on vectors that is ``W_mn² · E[a_n² Σ_c (∂z_c/∂z̄_m)²]``, with its inputs ``a`` and its outputs ``z̄``
    before any activation, and takes two products of matrices. A layer on (B, ..., N) adds up ``a_n ∂z_c/∂z̄_m`` over
    the positions of a sample before it squares, and takes the gradients of single samples.

    Parameters
    ----------
    model : nn.Module
        Maps (B, ...) to (B, C). Run in evaluation mode; left as it was, gradients included.
    inputs : Tensor, shape (P, ...)
        Floating and finite; moved to the model's device and dtype.
    names : sequence of str
        Qualified names of Linear layers, each of which forward calls exactly once.
    batch_size : int
        Samples in one pass. It decides memory and, by rounding alone, the result.

    Returns
    -------
    dict of str to Tensor, shape (M, N)
        float64, not negative, comparable between layers, in the order of `names`.

    Raises
    ------
    ProblemError
        `inputs` are refused or do not fit the model, or a derivative is NaN or infinite.
    UnknownNameError
        A name is not that of a Linear layer.
    UnsupportedError
        A layer is not called exactly once, the outputs do not depend on it, or are not one tensor (B, C).
    """
    totals = {name: torch.zeros_like(find_linear(model, name).weight, dtype=torch.float64) for name in names}
    for calls, outputs in _passes(model, inputs, names, batch_size):
        squares: dict[str, Tensor] = {}
        for gradients in _by_class(outputs, [call.pre for call in calls], names):
            for name, call, gradient in zip(names, calls, gradients, strict=True):
                if gradient.dim() == 2:
                    # the inputs are the same for every class, so their product can wait
                    squares[name] = squares[name] + gradient.square() if name in squares else gradient.square()
                else:
                    totals[name] += _squared_sample_gradients(gradient, call.inputs)
        for name, call in zip(names, calls, strict=True):
            if name in squares:
                totals[name] += squares[name].T @ call.inputs.square()
    for name, total in totals.items():
        total *= find_linear(model, name).weight.detach().double().square() / len(inputs)
        _finite(total, name)
    return totals


class GradualPruning:
    """Takes weights away round by round, the least salient first, while a model is trained; none comes back.

    Of ``K₀`` weights that compete for ``K`` places, ``K + (K₀ − K)(1 − f)³`` are left when the share ``f`` of the way
    is gone (Zhu, Gupta, "To prune, or not to prune", 2017); the power is 2 where ``K₀ ≤ 3K``.

    Parameters
    ----------
    model : nn.Module
    support : Support
        Of that model; its masks are changed.
    groups : list of pairs of list of str and int
        Layers whose weights compete with each other, and how many of them stay.
    inputs : Tensor, shape (P, ...)
        What the saliency is computed on.
    last : int
        Step, counted from 0, until which the last weight is gone.
    every : int
        Steps between two rounds; fewer, where `last` would leave less than 20 rounds.
    rows : int
        Inputs that are drawn anew in each round.
    seed : int
        Of the drawing.
    """

    def __init__(
        self,
        model: nn.Module,
        support: Support,
        groups: list[tuple[list[str], int]],
        inputs: Tensor,
        last: int,
        every: int,
        rows: int,
        seed: int,
    ) -> None:
        self.model, self.support, self.groups, self.inputs, self.rows = model, support, groups, inputs, rows
        self.last, self.every = last, min(every, max(1, last // _ROUNDS))
        counts = support.counts()
        self.held = [sum(counts[name] for name in names) for names, _ in groups]
        self.done = False
        self.step = 0
        self.drawing = torch.Generator().manual_seed(seed)

    def before_step(self) -> bool:
        """Take away what is due at this step; return whether the last weight is gone."""
        if not self.done and self.step % self.every == 0:
            self.done = self.step + self.every > self.last
            self.prune(1.0 if self.done else self.step / self.last)
        self.step += 1
        return self.done

    def prune(self, way: float) -> None:
        """Keep as many weights as are due when this share of the way, in [0, 1], is gone."""
        drawn = torch.randperm(len(self.inputs), generator=self.drawing)[: self.rows].to(self.inputs.device)
        names = [name for group, _ in self.groups for name in group]
        saliency = gauss_newton_saliency(self.model, self.inputs[drawn], names)
        masks = dict(self.support.masks)
        for (group, target), held in zip(self.groups, self.held, strict=True):
            power = 2 if held <= 3 * target else 3
            count = target + int((held - target) * (1 - way) ** power)
            masks |= keep_most(saliency, {name: masks[name] for name in group}, count)
        self.support.set(masks)


def keep_most(scores: Mapping[str, Tensor], masks: Mapping[str, Tensor], count: int) -> dict[str, Tensor]:
    """Return the masks of the `count` largest scores that lie within masks, of all layers together.

    Parameters
    ----------
    scores : mapping from str to Tensor (M, N)
        Finite.
    masks : mapping from str to bool Tensor (M, N)
        Together they hold at least `count` weights.
    count : int
        At least 1.

    Returns
    -------
    dict of str to bool Tensor (M, N)
        Exactly `count` in all; of equal scores the earlier stay.
    """
    inside = torch.cat([mask.flatten() for mask in masks.values()])
    there = torch.cat([scores[name].flatten() for name in masks])[inside]
    least = there.kthvalue(len(there) - count + 1).values
    stays = there > least
    ties = torch.nonzero(there == least)[:, 0]
    stays[ties[: count - int(stays.sum())]] = True
    kept = inside.clone()
    kept[inside] = stays
    parts = torch.split(kept, [mask.numel() for mask in masks.values()])
    return {name: part.reshape(mask.shape) for (name, mask), part in zip(masks.items(), parts, strict=True)}


def _passes(
    model: nn.Module, inputs: Tensor, names: Sequence[str], batch_size: int
) -> Iterator[tuple[list[_Call], Tensor]]:
    """Run the model on batch after batch; yield the calls of the layers, in the order of `names`, and the outputs."""
    if not isinstance(batch_size, int) or isinstance(batch_size, bool) or batch_size < 1:
        raise ProblemError(f"batch_size is {batch_size!r}; pass an integer of at least 1")
    if not names:
        raise ProblemError("names is empty; name at least one Linear layer")
    check_inputs(inputs)
    weight = find_linear(model, names[0]).weight
    for rows in torch.split(inputs.detach(), batch_size):
        # copied, because a first layer that works in place would otherwise change the caller's data
        batch = rows.to(weight.device, weight.dtype, copy=True)
        with _hooked(model, names) as calls, evaluating(model), torch.enable_grad():
            try:
                outputs = model(batch)
            except (RuntimeError, TypeError) as error:
                raise ProblemError(
                    f"model ({type(model).__name__}) fails on inputs of shape {tuple(batch.shape)} "
                    f"({first_line(error)}); pass inputs that the model can be called on"
                ) from error
        missed = [name for name in names if name not in calls]
        if missed:
            raise UnsupportedError(f"layer {missed[0]!r} is not called when the model runs; leave it out")
        if not isinstance(outputs, Tensor) or outputs.dim() != 2 or len(outputs) != len(batch):
            found = tuple(outputs.shape) if isinstance(outputs, Tensor) else type(outputs).__name__
            raise UnsupportedError(f"the model maps {len(batch)} rows to {found}; wrap it so that it returns (B, C)")
        yield [calls[name] for name in names], outputs


@contextmanager
def _hooked(model: nn.Module, names: Sequence[str]) -> Iterator[dict[str, _Call]]:
    """Note the calls of the layers for the length of a `with`, and let gradients reach them."""
    calls: dict[str, _Call] = {}

    def hook_for(name: str) -> Callable[..., Tensor]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor:
            if name in calls:
                raise UnsupportedError(f"layer {name!r} is called more than once when the model runs; leave it out")
            # in a model whose parameters need no gradient, the graph begins here
            pre = output if output.requires_grad else output.detach().requires_grad_()
            # a copy is handed on, because a ReLU that works in place would overwrite what is noted
            entering = args[0] if args else kwargs["input"]
            calls[name] = _Call(entering.detach(), pre)
            return pre.clone()

        return hook

    layers = {name: find_linear(model, name) for name in names}
    handles = [layer.register_forward_hook(hook_for(name), with_kwargs=True) for name, layer in layers.items()]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


def _by_class(outputs: Tensor, sources: Sequence[Tensor], names: Sequence[str]) -> Iterator[tuple[Tensor, ...]]:
    """Yield the derivatives of one output after the other; samples do not mix, so one pass serves all of them."""
    classes = outputs.shape[1]
    for index in range(classes):
        direction = torch.zeros_like(outputs)
        direction[:, index] = 1.0
        gradients = torch.autograd.grad(
            outputs, sources, direction, retain_graph=index < classes - 1, allow_unused=True
        )
        for name, gradient in zip(names, gradients, strict=True):
            if gradient is None:
                raise UnsupportedError(f"the model's outputs do not depend on layer {name!r}; leave it out")
        yield gradients


def _squared_sample_gradients(gradient: Tensor, inputs: Tensor) -> Tensor:
    """Return ``Σ_p (Σ_q g_pqm a_pqn)² (M, N)`` for samples ``p`` with positions ``q``."""
    left, right = gradient.flatten(1, -2), inputs.flatten(1, -2)
    total = torch.zeros(left.shape[-1], right.shape[-1], dtype=torch.float64, device=left.device)
    samples = max(1, _ENTRIES // total.numel())
    for some, others in zip(torch.split(left, samples), torch.split(right, samples), strict=True):
        total += (some.transpose(1, 2) @ others).square().sum(0)
    return total


def _finite(total: Tensor, name: str) -> Tensor:
    bad = int((~torch.isfinite(total)).sum())
    if bad:
        raise ProblemError(
            f"the derivatives of the outputs at layer {name!r} give {bad} NaN or infinite figures of "
            f"{total.numel()}; check the model's weights and the scale of the inputs"
        )
    return total
