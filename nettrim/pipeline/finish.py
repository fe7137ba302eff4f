"""Training on after pruning: what `finish=` asks for, and the evidence of the network that comes out.

A network that was trained on is never reported as merely pruned: its ledger says how it was finished, and carries the
ledger of the pruned network, whose certificates are of other weights, as `before`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from nettrim.errors import ProblemError, UnknownNameError, UnsupportedError
from nettrim.methods.base import COUNTS
from nettrim.network.calibrate import Batch
from nettrim.network.edit import frozen_copy, layer_arrays
from nettrim.network.finishing import Distill, FineTune, Finished
from nettrim.pipeline.ledger import LayerEvidence

FINISHES = ("distill", "fine-tune")


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
        inputs: Tensor,
        labels: Tensor | None,
        masks: Mapping[str, Tensor],
        targets: Mapping[str, int] | int | None,
        seed: int,
        progress: bool,
    ) -> Finished:
        """Train `model` in place."""


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
        return Distill(choose="fixed" if not counts else "global" if overall else "layer")
    if isinstance(finish, type) or not isinstance(finish, Finish):
        raise ProblemError(f"finish is a {type(finish).__name__}: use {' or '.join(FINISHES)}, or Distill().")
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


def check_batches(finish: Finish, batches: Sequence[Batch]) -> None:
    """Refuse batches that cannot be trained on, before any work.

    Raises
    ------
    UnsupportedError
        A batch has other than one positional input.
    ProblemError
        Fine-tuning needs labels and there are none.
    """
    if any(len(batch.inputs) != 1 or batch.kwargs for batch in batches):
        raise UnsupportedError(f"finish={finish.name!r} needs batches of one input tensor: leave finish out.")
    if finish.name == "fine-tune" and batches[0].labels is None:
        raise ProblemError("finish='fine-tune' needs labels in batches: pass (input, label) pairs, or use 'distill'.")


def run_finish(
    finish: Finish,
    dense: nn.Module,
    pruned: nn.Module,
    batches: Sequence[Batch],
    layers: Sequence[LayerEvidence],
    targets: Mapping[str, int] | int | None,
    seed: int,
    progress: bool,
) -> tuple[nn.Module, list[LayerEvidence], dict[str, Any]]:
    """Train a copy of the pruned network on; return it, its layers, and what was done as JSON values."""
    model = frozen_copy(pruned)
    labels = None
    if batches[0].labels is not None:
        labels = torch.cat([batch.labels for batch in batches if batch.labels is not None])
    masks = {layer.name: layer.weight != 0 for layer in layers if layer.pruned}
    inputs = torch.cat([batch.inputs[0] for batch in batches])
    done = finish.run(model, frozen_copy(dense), inputs, labels, masks, targets, seed, progress)
    model.requires_grad_(False)
    said = {
        "kind": finish.name,
        "settings": repr(finish),
        "samples": len(inputs),
        "labels": finish.name == "fine-tune",
        "targets": dict(targets) if isinstance(targets, Mapping) else targets,
        "epochs": len(done.losses),
        "steps": done.steps,
        "best_epoch": done.best_epoch,
        "seconds": done.seconds,
    }
    return model, finished_layers(layers, model), said


def finished_layers(layers: Sequence[LayerEvidence], model: nn.Module) -> list[LayerEvidence]:
    """Return the layers with a model's weights; what certified the old ones is left out."""
    return [with_weights(layer, *layer_arrays(model, layer.name)) for layer in layers]


def with_weights(layer: LayerEvidence, weight: Tensor, bias: Tensor | None) -> LayerEvidence:
    """Return a layer with other weights, which nothing certifies; one that was left dense and changed counts too."""
    unchanged = torch.equal(weight, layer.dense_weight) and (
        bias is None or layer.dense_bias is None or torch.equal(bias, layer.dense_bias)
    )
    pruned = layer.pruned or not unchanged
    return replace(layer, weight=weight, bias=bias, pruned=pruned, multipliers=None, facts={}, seconds=0.0)
