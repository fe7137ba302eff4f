"""Training on after pruning: what `finish=` asks for, and the evidence of the network that comes out.

A network that was trained on is never reported as merely pruned: its ledger says how it was finished, and carries the
ledger of the pruned network, whose certificates are of other weights, as `before`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from nettrim.errors import ProblemError, UnknownNameError, UnsupportedError
from nettrim.methods.base import COUNTS
from nettrim.network.batches import Batches
from nettrim.network.edit import double_copy, find_weight, frozen_copy, raw_state
from nettrim.network.finishing import Distill, FineTune, Finished
from nettrim.network.labels import check_targets, is_several
from nettrim.network.observe import call, output_of
from nettrim.network.reestimate import Reestimate, reinsert_norms
from nettrim.network.slim import Slimming
from nettrim.network.trace import Traced
from nettrim.network.training import check_classes, check_labels
from nettrim.pipeline.account import Account, Standing
from nettrim.pipeline.records import LayerEvidence

FINISHES = ("distill", "fine-tune", "batch-norm")


@runtime_checkable
class Finish(Protocol):
    """What trains a network on: `Distill`, `FineTune`, or the like."""

    @property
    def name(self) -> str:
        """Its name in `FINISHES`."""

    @property
    def choose(self) -> str:
        """Whether it takes weights away, and among which it chooses: "fixed", "layer" or "global"."""

    @property
    def headroom(self) -> float:
        """How many times the number of weights it wants to start from, where it chooses."""

    def run(
        self,
        model: nn.Module,
        teacher: nn.Module,
        inputs: Batches,
        labels: Tensor | None,
        masks: Mapping[str, Tensor],
        targets: Mapping[str, int] | int | None,
        seed: int,
        progress: bool,
        traced: Traced,
    ) -> Finished:
        """Train `model` in place; `traced` is the dense network."""


def make_finish(finish: str | Finish | None, amount: str, overall: bool) -> Finish | None:
    """Return what was asked for, as an object.

    By name, "distill" chooses the weights that stay on the way, if a number of them was asked for: in all layers
    together where the number is of all layers, else within each.

    Raises
    ------
    UnknownNameError
        The name is none of `FINISHES`.
    ProblemError
        The object has no `run`.
    UnsupportedError
        It chooses weights, and no number of them was asked for.
    """
    if finish is None:
        return None
    counts = amount in COUNTS
    if isinstance(finish, str):
        if finish not in FINISHES:
            raise UnknownNameError(f"finish={finish!r} is unknown: use {' or '.join(FINISHES)}, or None.")
        if finish == "fine-tune":
            return FineTune()
        if finish == "batch-norm":
            return Reestimate()
        return Distill(choose="fixed" if not counts else "global" if overall else "layer")
    if isinstance(finish, type) or not isinstance(finish, Finish):
        found = f"the class {finish.__name__}" if isinstance(finish, type) else f"a {type(finish).__name__}"
        raise ProblemError(f"finish is {found}: use {' or '.join(FINISHES)}, or an object such as Distill().")
    if finish.choose != "fixed" and not counts:
        raise UnsupportedError(
            f"finish chooses weights ({finish.choose}) and {amount} says no number of them: give sparsity or kept."
        )
    return finish


def headroomed(finish: Finish | None, kept: Mapping[str, int], sizes: Mapping[str, int]) -> dict[str, int]:
    """Return how many weights each layer keeps at first, so that finishing has some to choose from."""
    if finish is None or finish.choose == "fixed":
        return dict(kept)
    return {name: min(sizes[name], round(finish.headroom * count)) for name, count in kept.items()}


def check_batches(finish: Finish, model: nn.Module, batches: Batches) -> None:
    """Refuse what cannot be trained on, before any work; one row goes through the model.

    Raises
    ------
    UnsupportedError
        The model does not map (P, ...) to (P, ..., C).
    ProblemError
        Fine-tuning needs classes as labels and there are none; the loss compares classes and there is a single output;
        or no row is left to train on.
    """
    taught = isinstance(finish, FineTune) and finish.mixing == 1  # by the dense network alone
    if finish.name == "fine-tune" and not taught and not batches.has_labels:
        raise ProblemError("finish='fine-tune' needs labels in batches: pass (input, label) pairs, or use 'distill'.")
    first = batches.first(1)
    shape = tuple(output_of(call(model, first, 0), model).shape)
    if len(shape) < 2 or shape[0] != 1:
        raise UnsupportedError(
            f"finish={finish.name!r} needs a model that maps (P, ...) to (P, ..., C), and one row of batches becomes "
            f"{shape}: leave finish out."
        )
    if isinstance(finish, Distill) and finish.loss == "kl" and shape[-1] == 1:
        raise ProblemError("finish='distill' compares classes and there is one output: use Distill(loss='mse').")
    if isinstance(finish, (Distill, FineTune)):
        rows = batches.rows
        if math.ceil(finish.validation * rows) == rows:
            raise ProblemError(
                f"finish has validation={finish.validation} of {rows} rows in batches, which leaves none to train on: "
                "pass more rows, or a smaller validation."
            )
    if finish.name == "fine-tune":
        labels = batches.labels()
        # that there is one for each row was seen when the batches were read
        if labels is not None and is_several(labels):
            check_targets(model, first, labels[:1])
        elif labels is not None:
            check_labels(labels, labels)
            check_classes(model, first, labels)


def run_finish(
    finish: Finish,
    traced: Traced,
    account: Account,
    dense: nn.Module,
    pruned: nn.Module,
    layers: Sequence[LayerEvidence],
    targets: Mapping[str, int] | int | None,
    seed: int,
    progress: bool,
    slimming: Slimming | None = None,
) -> tuple[nn.Module, list[LayerEvidence], dict[str, Any]]:
    """Train a copy of the pruned network on; return it, its layers, and what was done as JSON values.

    Of a smaller network, of which `slimming` says what is gone, all that is left is trained, but for zeros.

    Raises
    ------
    ProblemError
        The object did not do what finishing is: pruned weights came back, or more are left than was said.
    """
    model, batches = frozen_copy(pruned), account.batches
    if slimming is not None and slimming.structure.channels:
        reinsert_norms(model, batches)
    labels = batches.labels()
    if slimming is None:
        masks = {layer.name: layer.mask for layer in layers if layer.pruned}
    else:
        left = [layer.name for layer in layers if not layer.removed]
        masks = {name: find_weight(model, name).detach() != 0 for name in left}
    held = {name: int(mask.sum()) for name, mask in masks.items()}
    # a weight may be zero without having been pruned, and what is not there cannot be left
    if isinstance(targets, Mapping):
        goal: Mapping[str, int] | int | None = {name: min(held[name], count) for name, count in targets.items()}
    else:
        goal = targets if targets is None else min(sum(held.values()), targets)
    done = finish.run(model, frozen_copy(dense), batches, labels, masks, goal, seed, progress, traced)
    model.requires_grad_(False).eval()
    final = finished_layers(layers, account.of_state(raw_state(double_copy(model)), slimming))
    wrong = overstepped(layers, final, targets)
    if wrong:
        raise ProblemError(f"finish={finish.name!r} is not what finishing may be: {wrong[0]}.")
    said = {
        "kind": finish.name,
        "settings": repr(finish),
        "samples": batches.rows,
        "labels": finish.name == "fine-tune" and labels is not None,
        "targets": dict(targets) if isinstance(targets, Mapping) else targets,
        "epochs": len(done.losses),
        "steps": done.steps,
        "best_epoch": done.best_epoch,
        "seconds": done.seconds,
    }
    return model, final, said


def finished_layers(layers: Sequence[LayerEvidence], standing: Standing) -> list[LayerEvidence]:
    """Return the layers with the weights of another network; what certified the old ones is left out."""
    graph = standing.account.graph
    return [with_weights(layer, *standing.arrays(graph.layer(layer.name))) for layer in layers]


def overstepped(
    layers: Sequence[LayerEvidence], final: Sequence[LayerEvidence], targets: Mapping[str, int] | int | None
) -> list[str]:
    """Return in what a network that was trained on keeps more than it may; layers that were left dense do not count."""
    pairs = [(before, after) for before, after in zip(layers, final, strict=True) if before.pruned]
    back = {after.name: int((after.mask & ~before.mask).sum()) for before, after in pairs}
    wrong = [f"{name} has {count} weights back that were pruned" for name, count in back.items() if count]
    kept = {after.name: int(after.mask.sum()) for _, after in pairs}
    if isinstance(targets, Mapping):
        more = [(name, kept[name], count) for name, count in targets.items()]
    else:
        more = [] if targets is None else [("all together", sum(kept.values()), targets)]
    return wrong + [
        f"{name} keeps {held} weights, and finishing was to leave {count}" for name, held, count in more if held > count
    ]


def with_weights(layer: LayerEvidence, weight: Tensor, bias: Tensor | None) -> LayerEvidence:
    """Return a layer with other weights, which nothing certifies; one that was left dense and changed counts too."""
    unchanged = torch.equal(weight, layer.dense_weight) and (
        bias is None or layer.dense_bias is None or torch.equal(bias, layer.dense_bias)
    )
    pruned = layer.pruned or not unchanged
    facts = {"removed": True} if layer.removed else {}
    return replace(layer, weight=weight, bias=bias, pruned=pruned, multipliers=None, facts=facts, seconds=0.0)
