"""What the network makes of a layer's errors: the quadratic form in which they count at its output.

Let ``a_p`` be what a layer hands on for sample ``p`` (after its ReLU, if it has one) and ``z_p`` the network's outputs.
An error ``e_p`` of the layer moves them by about ``J_p e_p`` with ``J_p = ∂z_p/∂a_p``, so on average it costs
``e_pᵀ G e_p`` with ``G = (1/P) Σ_p J_pᵀ C J_p``. ``C`` centres the outputs, since adding the same to all of them
changes no prediction. The diagonal alone says what each neuron is worth.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from nettrim.errors import UnsupportedError
from nettrim.network.calibrate import Batch
from nettrim.network.edit import evaluating, find_linear, first_line
from nettrim.network.trace import LayerSpec

_DIRECTIONS = 32  # outputs up to which each has its own backward pass; beyond, as many random signs stand for all


def error_metrics(
    model: nn.Module, layers: Sequence[LayerSpec], batches: Sequence[Batch], seed: int = 0
) -> dict[str, Tensor]:
    """Return ``G (M, M)`` of every layer, float64: symmetric positive semi-definite.

    One forward pass a batch and one backward pass an output; with more than 32 outputs, 32 backward passes along random
    signs, which have the right mean.

    Parameters
    ----------
    model : nn.Module
        Run in evaluation mode; left as it was.
    layers : sequence of LayerSpec
    batches : sequence of Batch
    seed : int
        Of the random signs.

    Raises
    ------
    UnsupportedError
        The model does not return one tensor ``(P, C)``, or its output does not depend on a layer by gradients.
    """
    specs = {layer.name: layer for layer in layers}
    handed: dict[str, Tensor] = {}

    def hook_for(name: str) -> Callable[..., Tensor]:
        def hook(module: nn.Module, args: Any, output: Tensor) -> Tensor:
            # slopes are taken here, so no parameter and no input needs one
            start = output if output.requires_grad else output.detach().requires_grad_()
            # positive, the ReLU behind hands it on as it is: the slope at its output is the slope here
            handed[name] = start.clamp(min=torch.finfo(output.dtype).tiny) if specs[name].relu else start.clone()
            return handed[name]

        return hook

    like = find_linear(model, layers[0].name).weight
    signs = torch.Generator().manual_seed(seed)
    totals: dict[str, Tensor] = {}
    rows = dict.fromkeys(specs, 0)
    handles = [find_linear(model, name).register_forward_hook(hook_for(name)) for name in specs]
    try:
        for batch in batches:
            inputs = [_moved(tensor, like) for tensor in batch.inputs]
            kwargs = {key: _moved(tensor, like) for key, tensor in batch.kwargs.items()}
            with evaluating(model), torch.enable_grad():
                outputs = model(*inputs, **kwargs)
                if not isinstance(outputs, Tensor) or outputs.dim() < 2:
                    raise UnsupportedError(
                        "the network does not return one tensor (P, C): its errors cannot be weighed."
                    )
                centred = outputs - outputs.mean(-1, keepdim=True) if outputs.shape[-1] > 1 else outputs
                for direction in _directions(outputs.shape[-1], signs).to(outputs):
                    for name, slope in zip(specs, _slopes(centred @ direction, handed, list(specs)), strict=True):
                        flat = slope.reshape(-1, slope.shape[-1])
                        totals[name] = totals.get(name, 0) + (flat.T @ flat).double()
            for name in specs:
                rows[name] += handed[name].shape[:-1].numel()
    finally:
        for handle in handles:
            handle.remove()
    return {name: total / rows[name] for name, total in totals.items()}


def _moved(tensor: Tensor, like: Tensor) -> Tensor:
    # copied, because a first layer that works in place would otherwise change the user's data
    return tensor.to(like.device, like.dtype if tensor.is_floating_point() else tensor.dtype, copy=True)


def _slopes(values: Tensor, handed: dict[str, Tensor], names: list[str]) -> tuple[Tensor, ...]:
    """Return the gradients of the sum of some values in what each layer handed on."""
    try:
        return torch.autograd.grad(values.sum(), [handed[name] for name in names], retain_graph=True)
    except RuntimeError as error:
        raise UnsupportedError(
            f"no gradient leads from the network's output to {', '.join(names)} ({first_line(error)}): make what lies "
            "between differentiable, and nothing in it work in place on what another step needs."
        ) from error


def _directions(outputs: int, signs: torch.Generator) -> Tensor:
    """Return ``(K, C)`` with ``DᵀD = I``, or in the mean where ``C`` is large."""
    if outputs <= _DIRECTIONS:
        return torch.eye(outputs)
    drawn = torch.randint(0, 2, (_DIRECTIONS, outputs), generator=signs).float()
    signed: Tensor = (2.0 * drawn - 1.0) / math.sqrt(_DIRECTIONS)
    return signed
