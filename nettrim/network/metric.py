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
from nettrim.network.edit import evaluating, find_linear
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
            # positive, the ReLU behind hands it on as it is: the slope at its output is the slope here
            tiny = torch.finfo(output.dtype).tiny
            handed[name] = output.clamp(min=tiny) if specs[name].relu else output.clone()
            return handed[name]

        return hook

    like = find_linear(model, layers[0].name).weight
    signs = torch.Generator().manual_seed(seed)
    totals: dict[str, Tensor] = {}
    rows = 0
    handles = [find_linear(model, name).register_forward_hook(hook_for(name)) for name in specs]
    try:
        for batch in batches:
            # gradients flow back from the outputs through the inputs: no parameter needs one
            inputs = [tensor.to(like.device, like.dtype).requires_grad_() for tensor in batch.inputs]
            kwargs = {key: tensor.to(like.device) for key, tensor in batch.kwargs.items()}
            with evaluating(model), torch.enable_grad():
                outputs = model(*inputs, **kwargs)
            if not isinstance(outputs, Tensor) or outputs.dim() != 2:
                raise UnsupportedError("the network does not return one tensor (P, C): its errors cannot be weighed.")
            centred = outputs - outputs.mean(1, keepdim=True) if outputs.shape[1] > 1 else outputs
            for direction in _directions(outputs.shape[1], signs).to(outputs):
                slopes = torch.autograd.grad(
                    centred @ direction, [handed[name] for name in specs], torch.ones(len(batch)).to(outputs), True
                )
                for name, slope in zip(specs, slopes, strict=True):
                    flat = slope.reshape(-1, slope.shape[-1])
                    totals[name] = totals.get(name, 0) + (flat.T @ flat).double()
            rows += len(batch)
    finally:
        for handle in handles:
            handle.remove()
    return {name: total / rows for name, total in totals.items()}


def _directions(outputs: int, signs: torch.Generator) -> Tensor:
    """Return ``(K, C)`` with ``DᵀD = I``, or in the mean where ``C`` is large."""
    if outputs <= _DIRECTIONS:
        return torch.eye(outputs)
    drawn = torch.randint(0, 2, (_DIRECTIONS, outputs), generator=signs).float()
    signed: Tensor = (2.0 * drawn - 1.0) / math.sqrt(_DIRECTIONS)
    return signed
