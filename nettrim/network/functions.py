"""Which torch functions a program may call, and what their arguments are called.

A stored program names its functions. Only functions from tensors to tensors are found by name: none that reads or
writes files, changes what it is given, calls what it is handed, or is no function on tensors at all.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch.overrides import get_overridable_functions, resolve_name

from nettrim.errors import UnsupportedError

_POOL = ("input", "kernel_size", "stride", "padding")
_CONV = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
_MAX = (*_POOL, "dilation", "ceil_mode", "return_indices")
_NORM = ("input", "running_mean", "running_var", "weight", "bias", "training", "momentum", "eps")
#: the arguments of the functions that are looked into, in their order
SIGNATURES: dict[str, tuple[str, ...]] = {
    "linear": ("input", "weight", "bias"),
    "conv1d": _CONV,
    "conv2d": _CONV,
    "batch_norm": _NORM,
    "torch.batch_norm": ("input", "weight", "bias", "running_mean", "running_var", "training", "momentum", "eps"),
    "layer_norm": ("input", "normalized_shape", "weight", "bias", "eps"),
    "max_pool1d": _MAX,
    "max_pool2d": _MAX,
    "avg_pool1d": (*_POOL, "ceil_mode", "count_include_pad"),
    "avg_pool2d": (*_POOL, "ceil_mode", "count_include_pad", "divisor_override"),
    "adaptive_avg_pool1d": ("input", "output_size"),
    "adaptive_avg_pool2d": ("input", "output_size"),
    "adaptive_max_pool1d": ("input", "output_size", "return_indices"),
    "adaptive_max_pool2d": ("input", "output_size", "return_indices"),
    "pad": ("input", "pad", "mode", "value"),
    "mean": ("input", "dim", "keepdim"),
    "sum": ("input", "dim", "keepdim"),
    "softmax": ("input", "dim"),
    "log_softmax": ("input", "dim"),
    "leaky_relu": ("input", "negative_slope"),
    "elu": ("input", "alpha"),
    "celu": ("input", "alpha"),
    "dropout": ("input", "p", "training"),
    "cat": ("tensors", "dim"),
    "concat": ("tensors", "dim"),
    "concatenate": ("tensors", "dim"),
    "stack": ("tensors", "dim"),
    "add": ("input", "other", "alpha"),
    "sub": ("input", "other", "alpha"),
    "scaled_dot_product_attention": (
        "query",
        "key",
        "value",
        "attn_mask",
        "dropout_p",
        "is_causal",
        "scale",
        "enable_gqa",
    ),
}

#: functions that torch does not count among those on tensors: they make them, or cannot be overridden by subclasses
_MORE = {
    "torch.arange",
    "torch.as_tensor",
    "torch.empty",
    "torch.eye",
    "torch.fill",
    "torch.full",
    "torch.linspace",
    "torch.logspace",
    "torch.nn.functional.hardsigmoid",
    "torch.nn.functional.hardswish",
    "torch.ones",
    "torch.scalar_tensor",
    "torch.Tensor.new_empty",
    "torch.Tensor.new_full",
    "torch.Tensor.new_ones",
    "torch.Tensor.new_tensor",
    "torch.Tensor.new_zeros",
    "torch.Tensor.unflatten",
    "torch.tensor",
    "torch.tril_indices",
    "torch.triu_indices",
    "torch.vander",
    "torch.zeros",
}
#: methods that hand out or take something else than values
_OPAQUE = {
    "__array__",
    "__array_wrap__",
    "__deepcopy__",
    "__dlpack__",
    "__reduce_ex__",
    "__setstate__",
    "as_subclass",
    "backward",
    "module_load",
    "register_hook",
    "register_post_accumulate_grad_hook",
    "storage",
    "storage_type",
    "untyped_storage",
}
#: in-place operators, and what does the same out of place
OPERATORS = {
    "__iadd__": "add",
    "__iand__": "__and__",
    "__idiv__": "div",
    "__ifloordiv__": "floor_divide",
    "__ilshift__": "__lshift__",
    "__imod__": "remainder",
    "__imul__": "mul",
    "__ior__": "__or__",
    "__ipow__": "pow",
    "__irshift__": "__rshift__",
    "__isub__": "sub",
    "__itruediv__": "div",
    "__ixor__": "__xor__",
}


@lru_cache(maxsize=1)
def _overridable() -> dict[str, Callable[..., Any]]:
    functions = (function for group in get_overridable_functions().values() for function in group)
    return {name_of(function): function for function in functions}


def name_of(function: Any) -> str:
    """Return the full name of a torch function, "" of what is none."""
    name = str(resolve_name(function) or "")
    # torch has one function under both names, and finds the other first
    return "torch.mm" if name == "torch.spmm" else name


def works_in_place(target: str) -> bool:
    """Tell from its name whether a function changes what it is given."""
    last = target.split(".")[1] if target.startswith("aten.") else target.rpartition(".")[2]
    return last in OPERATORS or last == "__setitem__" or (last.endswith("_") and not last.endswith("__"))


@lru_cache(maxsize=4096)
def find_function(target: str) -> Callable[..., Any] | None:
    """Return the torch function of a full name, or None."""
    if not isinstance(target, str) or works_in_place(target):
        return None
    if target.startswith("aten."):
        return _find_operator(*target.split(".")[1:])
    if target.rpartition(".")[2] in _OPAQUE or "_hooks" in target:
        return None
    found: Any = _overridable().get(target)
    if found is None and target in _MORE:
        found = torch
        for part in target.split(".")[1:]:
            found = getattr(found, part, None)
    return found if callable(found) else None


def _find_operator(*names: str) -> Callable[..., Any] | None:
    """Return an operator of torch's own by its name and overload, if it only computes."""
    if len(names) != 2 or names[0] in ("from_file", "save"):
        return None
    found = getattr(getattr(torch.ops.aten, names[0], None), names[1], None)
    if not isinstance(found, torch._ops.OpOverload) or found._schema.is_mutable:
        return None
    return found


def resolve(target: str) -> Callable[..., Any]:
    """Return the torch function of a full name.

    Raises
    ------
    UnsupportedError
        There is none.
    """
    function = find_function(target)
    if function is None:
        raise UnsupportedError(
            f"{target} is no function that can be followed in this version of torch; rewrite without it"
        )
    return function
