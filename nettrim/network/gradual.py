"""Pruning while a network is trained: which weights go, and when.

- Zhu, Gupta, "To prune, or not to prune", 2017: the cubic schedule of the number of weights.
- LeCun, Denker, Solla, "Optimal Brain Damage", NIPS 1989: the saliency, here with the Gauss-Newton diagonal.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from nettrim.errors import ProblemError
from nettrim.network.batches import Batch
from nettrim.network.edit import raw_state
from nettrim.network.fold import fold_state
from nettrim.network.samples import taken
from nettrim.network.sensitivity import gauss_newton_saliency
from nettrim.network.support import Support
from nettrim.network.trace import Traced
from nettrim.network.training import check_count

_ROUNDS = 20  # at the least, in which weights are taken away


class GradualPruning:
    """Takes weights away round by round, the least salient first, while a model is trained; none comes back.

    Of ``K₀`` weights that compete for ``K`` places, ``K + (K₀ − K)(1 − f)³`` are left when the share ``f`` of the way
    is gone (Zhu, Gupta, "To prune, or not to prune", 2017); the power is 2 where ``K₀ ≤ 3K``.

    Parameters
    ----------
    model : nn.Module
        Computes in evaluation mode what `traced` says.
    traced : Traced
        That model, or one of the same names, with whatever weights.
    support : Support
        Of that model; its masks are changed.
    groups : list of pairs of list of str and int
        Layers whose weights compete with each other, and how many of them stay.
    inputs : Batch
        What the saliency is computed on, in the dtype and on the device of the model.
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
        traced: Traced,
        support: Support,
        groups: list[tuple[list[str], int]],
        inputs: Batch,
        last: int,
        every: int,
        rows: int,
        seed: int,
    ) -> None:
        self.model, self.traced, self.support, self.groups = model, traced, support, groups
        self.inputs, self.rows, self.seed = inputs, rows, seed
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
        drawn = torch.randperm(len(self.inputs), generator=self.drawing)[: self.rows]
        names = [name for group, _ in self.groups for name in group]
        saliency = gauss_newton_saliency(
            self.traced.graph,
            folded_state(self.model, self.traced),
            taken(self.inputs, drawn),
            names,
            seed=self.seed + self.step,
        )
        masks = dict(self.support.masks)
        for (group, target), held in zip(self.groups, self.held, strict=True):
            power = 2 if held <= 3 * target else 3
            count = target + int((held - target) * (1 - way) ** power)
            masks |= keep_most(saliency, {name: masks[name] for name in group}, count)
        self.support.set(masks)


def competing(support: Support, choose: str, targets: Mapping[str, int] | int | None) -> list[tuple[list[str], int]]:
    """Return which layers compete with each other for how many weights, where fewer are to stay than there are.

    Parameters
    ----------
    support : Support
    choose : {"fixed", "layer", "global"}
        Whether weights are taken away, and whether within each layer or in all together.
    targets : mapping from str to int, or int, or None
        How many weights stay; of a mapping, "global" takes the sum.

    Raises
    ------
    ProblemError
        `targets` do not fit the masks, or `choose`.
    """
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


def keep_most(scores: Mapping[str, Tensor], masks: Mapping[str, Tensor], count: int) -> dict[str, Tensor]:
    """Return the masks of the `count` largest scores that lie within masks, of all layers together.

    Parameters
    ----------
    scores : mapping from str to Tensor
        Finite; each of as many entries as its mask, in the same order.
    masks : mapping from str to bool Tensor
        Together they hold at least `count` weights.
    count : int
        At least 1.

    Returns
    -------
    dict of str to bool Tensor
        In the shapes of `masks`; exactly `count` in all; of equal scores the earlier stay.
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


def folded_state(model: nn.Module, traced: Traced) -> dict[str, Tensor]:
    """Return the weights that a model has at the moment, batch norms folded, as the traced program reads them.

    Parameters
    ----------
    model : nn.Module
    traced : Traced
        That model or a copy of it, with whatever weights.

    Returns
    -------
    dict of str to Tensor
        In the model's dtype and on its device, detached: tensors that no fold touches are those of the model.
    """
    state = {name: tensor.detach() for name, tensor in raw_state(model).items()}
    like = next(tensor for tensor in state.values() if tensor.is_floating_point())
    for name, tensor in traced.state.items():
        if name not in state:  # a constant, which the model holds elsewhere than in a parameter or buffer
            state[name] = tensor.to(like.device, like.dtype if tensor.is_floating_point() else tensor.dtype)
    return fold_state(state, traced.graph.folds)
