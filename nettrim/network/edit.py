"""The one place that touches a user's module, so that reading it shows that the dense model is never changed.

Copies to prune and to measure on, a temporary evaluation mode, reading and writing weights by name.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from nettrim.errors import ProblemError, UnknownNameError, UnsupportedError


@contextmanager
def evaluating(model: nn.Module) -> Iterator[nn.Module]:
    """Put a model in evaluation mode for the length of a `with`, then give every module its own flag back.

    Parameters
    ----------
    model : nn.Module
        Dropout and the like are switched off inside the block.

    Yields
    ------
    nn.Module
        The same model.
    """
    flags = [(module, module.training) for module in model.modules()]
    _switch_off_training(model)
    try:
        yield model
    finally:
        # not model.train(): parts of a network may be meant to stay in evaluation mode
        for module, training in flags:
            module.training = training


def frozen_copy(model: nn.Module) -> nn.Module:
    """Copy a model, in evaluation mode and without gradients.

    Parameters
    ----------
    model : nn.Module
        Left as it is.

    Returns
    -------
    nn.Module
        A deep copy that shares no tensor with `model`; `requires_grad` is False everywhere.

    Raises
    ------
    UnsupportedError
        The model holds something that cannot be copied.
    """
    try:
        twin = copy.deepcopy(model)
    except (RuntimeError, TypeError) as error:
        raise UnsupportedError(
            f"model ({type(model).__name__}) cannot be copied ({first_line(error)}); "
            "detach tensors that it keeps from earlier runs and remove what copy.deepcopy cannot copy"
        ) from error
    for parameter in twin.parameters():
        parameter.grad = None
    _switch_off_training(twin)
    return twin.requires_grad_(False)


def _switch_off_training(model: nn.Module) -> None:
    try:
        model.eval()
    except NotImplementedError:
        # exported programs refuse: their mode is fixed, whatever the flags say
        for module in model.modules():
            module.training = False


def double_copy(model: nn.Module) -> nn.Module:
    """Copy a model in double precision, to measure what rounding would hide.

    Parameters
    ----------
    model : nn.Module
        Left as it is.

    Returns
    -------
    nn.Module
        As `frozen_copy`, with every floating parameter and buffer in float64.

    Raises
    ------
    UnsupportedError
        The model holds something that cannot be copied.
    """
    return frozen_copy(model).double()


def raw_state(model: nn.Module) -> dict[str, Tensor]:
    """Return the parameters and buffers of a model by name: the objects themselves, each once."""
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def find_weight(model: nn.Module, name: str) -> nn.Parameter:
    """Look up the weight of a layer.

    Parameters
    ----------
    model : nn.Module
    name : str
        The layer's qualified name, for instance ``"body.0"``, or that of the weight itself.

    Raises
    ------
    UnknownNameError
        The model has no such parameter.
    """
    found = dict(model.named_parameters())
    weight = found.get(f"{name}.weight", found.get(name))
    if weight is None:
        raise UnknownNameError(f"the model has no layer {name!r} with a weight; its parameters are {', '.join(found)}")
    return weight


def find_bias(model: nn.Module, name: str) -> nn.Parameter | None:
    """Look up the bias of a layer; None where it has none. The name is that of `find_weight`."""
    return dict(model.named_parameters()).get(f"{name}.bias")


def write_state(model: nn.Module, entries: Mapping[str, Tensor]) -> None:
    """Write parameters and buffers into a model, in place. Exact zeros stay exact zeros in every dtype.

    Nothing is written unless everything can be.

    Parameters
    ----------
    model : nn.Module
        Changed in place: pass a copy.
    entries : mapping from str to Tensor
        Finite; cast to the dtype and device of what they replace.

    Raises
    ------
    UnknownNameError
        The model has no parameter or buffer of a name.
    ProblemError
        A shape does not fit, or an entry is not finite in the model's dtype.
    """
    present = {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers())}
    fitted = {}
    for name, value in entries.items():
        if name not in present:
            raise UnknownNameError(f"the model has no parameter {name!r}; its parameters are {', '.join(present)}")
        fitted[name] = _fitted(value, present[name], name)
    with torch.no_grad():
        for name, value in fitted.items():
            present[name].copy_(value)


def _fitted(value: Tensor, like: Tensor, what: str) -> Tensor:
    """Cast `value` to the kind of `like`, or refuse it."""
    if not isinstance(value, Tensor):
        raise ProblemError(f"{what} is a {type(value).__name__}; pass a torch.Tensor")
    if value.shape != like.shape:
        raise ProblemError(
            f"{what} has shape {tuple(value.shape)} where the model holds {tuple(like.shape)}; pass one of that shape"
        )
    cast = value.detach().to(device=like.device, dtype=like.dtype)
    # counted after the cast: a value may be finite in float64 and overflow in the model's dtype
    bad = int((~torch.isfinite(cast)).sum())
    if bad:
        raise ProblemError(
            f"{what} has {bad} NaN or infinite entries in {like.dtype}; write finite values within its range"
        )
    return cast


def first_line(error: BaseException) -> str:
    """Shorten another library's message to its first line, to quote it in a sentence.

    Parameters
    ----------
    error : BaseException
        What the other library raised.

    Returns
    -------
    str
        The line, or the name of the error's class if it says nothing.
    """
    return (str(error).splitlines() or [type(error).__name__])[0]
