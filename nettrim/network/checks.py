"""What a model must be for its layers to be read and written one by one; everything else is refused by name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.lazy import LazyModuleMixin

from nettrim.errors import ProblemError, UnsupportedError
from nettrim.network.edit import double_copy

#: what is said of layers whose weights are no parameters
COMPUTED = (
    "computes its weight or bias from other tensors (a parametrization or a mask); make it plain first, with "
    "torch.nn.utils.parametrize.remove_parametrizations or torch.nn.utils.prune.remove"
)


def refuse_hooks(model: nn.Module) -> None:
    """Refuse code that was hung on single modules: it changes what they compute, and our copies would run it.

    Raises
    ------
    UnsupportedError
        The text names the first module.
    """
    if isinstance(model, torch.jit.ScriptModule) or hasattr(model, "_orig_mod"):
        raise UnsupportedError(
            f"model ({type(model).__name__}) is compiled; pass the plain module that it was compiled from"
        )
    for name, module in model.named_modules():
        # torch's own hooks that make weights up are refused later, in words of their own
        if _makes_up(module):
            continue
        where = f"layer {name!r}" if name else "the model"
        if isinstance(module, LazyModuleMixin):
            raise UnsupportedError(f"{where} holds no weights yet; load them, or run one batch through the model")
        hooks = [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]
        if isinstance(module, torch.fx.GraphModule):
            # an exported program checks its inputs so
            hooks = [hook for hook in hooks if not getattr(hook, "__module__", "").startswith("torch.export.")]
        if hooks:
            raise UnsupportedError(
                f"{where} ({type(module).__name__}) carries a forward hook, which would run on every copy of the "
                "model and may change what it computes; remove the hooks first, with .remove() of their handles"
            )
        generated = isinstance(module, torch.fx.GraphModule) or type(module).__module__.startswith("torch.export.")
        if "forward" in vars(module) and not generated:
            raise UnsupportedError(
                f"{where} ({type(module).__name__}) has a forward that was put on the object, not on its class; "
                "delete that attribute, or define the forward in a class"
            )


def copied(model: nn.Module) -> nn.Module:
    """Return a copy of a model in double precision.

    Raises
    ------
    UnsupportedError
        It holds something that cannot be copied; of masks and the like the text names the layer.
    """
    try:
        return double_copy(model)
    except UnsupportedError as error:
        for name, module in model.named_modules():
            if _makes_up(module):
                raise UnsupportedError(f"layer {name!r} {COMPUTED}") from error
        raise


def _makes_up(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear | nn.Conv1d | nn.Conv2d) and not {"weight", "bias"} <= module._parameters.keys()


def check_dtypes(model: nn.Module) -> None:
    """Refuse weights that are not there, or too coarse to be pruned.

    Raises
    ------
    UnsupportedError
        The text names the first.
    """
    for name, tensor in model.named_parameters():
        if tensor.is_meta:
            owner = name.rpartition(".")[0]
            raise UnsupportedError(
                f"layer {owner!r} holds no weights yet; load them, or run one batch through the model"
            )
        if tensor.dtype not in (torch.float32, torch.float64):
            owner, _, kind = name.rpartition(".")
            raise UnsupportedError(
                f"the {kind} of layer {owner!r} is {tensor.dtype}, and weights that are rounded so coarsely miss "
                "their radius; call .float() on the model first"
            )


def check_finite(state: Mapping[str, Tensor], layer: Mapping[str, Any]) -> None:
    """Refuse a layer whose weight or bias is NaN or infinite somewhere.

    Raises
    ------
    ProblemError
    """
    for key, kind in (("weight", "weight"), ("bias_name", "bias")):
        if layer[key] is None or layer[key] not in state:
            continue
        bad = int((~torch.isfinite(state[layer[key]])).sum())
        if bad:
            raise ProblemError(
                f"the {kind} of layer {layer['name']!r} has {bad} NaN or infinite entries; "
                "pass a model that was trained to finite weights"
            )
