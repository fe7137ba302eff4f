"""What goes into and comes out of every layer on the user's data: the numbers that all pruning starts from.

Batches come in many forms, and one NaN in them would spoil every later figure, so they are read and checked
here, once, before any work starts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from nettrim.errors import NetTrimError, ProblemError, UnsupportedError
from nettrim.network.edit import evaluating, find_linear, first_line

_LABEL_KEYS = ("label", "labels", "target", "targets")
_INPUT_KEYS = ("input", "inputs", "x")
_UNSIGNED = (torch.uint16, torch.uint32, torch.uint64)


@dataclass(frozen=True, eq=False)
class Batch:
    """One checked batch; its length is its number of rows.

    Attributes
    ----------
    inputs : tuple of Tensor, each of shape (P, ...)
        Positional inputs of forward, floating.
    kwargs : dict of str to Tensor, each of shape (P, ...)
        Keyword inputs of forward.
    labels : Tensor of shape (P, ...), or None
        What forward is not given.
    """

    inputs: tuple[Tensor, ...]
    kwargs: dict[str, Tensor] = field(default_factory=dict)
    labels: Tensor | None = None

    def __len__(self) -> int:
        return next(tensor.shape[0] for tensor in (*self.inputs, *self.kwargs.values()))


@dataclass(frozen=True, eq=False)
class Recorded:
    """What one Linear layer saw and said on all batches together.

    Attributes
    ----------
    inputs : Tensor, shape (P, N)
        One row for each time that the layer was applied to a vector.
    outputs : Tensor, shape (P, M)
        The raw outputs, before any activation.
    """

    inputs: Tensor
    outputs: Tensor


def read_batches(batches: Iterable[object], name: str = "batches") -> list[Batch]:
    """Read and check batches of any of the accepted forms.

    Parameters
    ----------
    batches : iterable
        Read once, to its end: a list, a generator, a DataLoader. Each batch is a tensor of inputs, an
        (input, label) pair, a dict, or a `Batch`, which is taken as it is. In a dict, the keys "input",
        "inputs" and "x" hold the positional input, "label", "labels", "target" and "targets" the labels, and
        every other key a keyword input of forward. NumPy arrays are converted.
    name : str
        What errors call the argument.

    Returns
    -------
    list of Batch
        At least one, each with at least one row. Tensors keep their dtype and device.

    Raises
    ------
    ProblemError
        There is no batch; a batch is empty, not of an accepted form, holds NaN or infinity, or its rows do
        not match; or labels are no real numbers, differ in shape between batches, or are missing in some.
    """
    if isinstance(batches, (Tensor, np.ndarray, dict, str, Batch)):
        raise ProblemError(
            f"{name} is a single {type(batches).__name__} where an iterable of batches is expected; "
            f"put it in a list: [{'tensor' if isinstance(batches, Tensor) else 'batch'}]"
        )
    if not isinstance(batches, Iterable):
        raise ProblemError(f"{name} is a {type(batches).__name__}; pass a list of batches or a DataLoader")
    result = [_read(batch, f"{name}[{index}]", name) for index, batch in enumerate(batches)]
    if not result:
        raise ProblemError(f"{name} holds no batch; pass at least one (a generator can be read only once)")
    for index, batch in enumerate(result):
        if (batch.labels is None) != (result[0].labels is None):
            raise ProblemError(
                f"of {name}[0] and {name}[{index}] only one has labels; give labels to all batches or to none"
            )
        _check_labels(batch.labels, result[0].labels, name, index)
    return result


def record(
    model: nn.Module,
    batches: Iterable[object],
    names: Sequence[str],
    dtype: torch.dtype = torch.float64,
    progress: bool = False,
) -> dict[str, Recorded]:
    """Run a model and record what goes into and comes out of its Linear layers.

    Parameters
    ----------
    model : nn.Module
        Run in evaluation mode without gradients; left as it was.
    batches : iterable
        As `read_batches` takes them; moved to the model's device and, where floating, to its dtype.
    names : sequence of str
        Qualified names of Linear layers, each of which forward calls exactly once.
    dtype : torch.dtype
        Of the recorded numbers; the model computes in its own.
    progress : bool
        Show a bar on stderr, if that is a terminal.

    Returns
    -------
    dict of str to Recorded
        In the order of `names`. Leading dimensions are flattened to rows and batches are joined in their
        order, so the numbers depend on the batching only by rounding.

    Raises
    ------
    ProblemError
        A batch is refused, does not fit the model, or makes an activation NaN or infinite.
    UnknownNameError
        A name is not that of a Linear layer.
    UnsupportedError
        A layer is not called exactly once in a forward.
    """
    checked = read_batches(batches)
    seen: dict[str, list[tuple[Tensor, Tensor]]] = {name: [] for name in names}

    def hook_for(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> None:
            entering = args[0] if args else kwargs["input"]
            seen[name].append((_as_rows(entering, dtype), _as_rows(output, dtype)))

        return hook

    layers = {name: find_linear(model, name) for name in names}
    handles = [layer.register_forward_hook(hook_for(name), with_kwargs=True) for name, layer in layers.items()]
    try:
        for index, batch in enumerate(_bar(checked, "calibration", progress)):
            _forward(model, batch, index)
            for name, pairs in seen.items():
                if len(pairs) != index + 1:
                    raise UnsupportedError(
                        f"layer {name!r} is not called exactly once when the model runs on batches[{index}]; "
                        "leave it out of the layers to prune"
                    )
                for tensor, side in zip(pairs[-1], ("input", "output"), strict=True):
                    _require_finite(tensor, f"the {side} of layer {name!r} on batches[{index}]")
    finally:
        for handle in handles:
            handle.remove()
    recorded = {}
    for name in list(seen):
        # each layer's pieces are let go as soon as they are joined, or the peak would be twice the whole
        inputs, outputs_ = zip(*seen.pop(name), strict=True)
        recorded[name] = Recorded(torch.cat(inputs), torch.cat(outputs_))
    return recorded


def outputs(
    model: nn.Module, batches: Iterable[object], dtype: torch.dtype = torch.float64, progress: bool = False
) -> Tensor:
    """Run a model and collect its outputs.

    Parameters
    ----------
    model : nn.Module
        Run in evaluation mode without gradients; left as it was.
    batches : iterable
        As `read_batches` takes them; moved to the model's device and, where floating, to its dtype.
    dtype : torch.dtype
        Of the result; the model computes in its own.
    progress : bool
        Show a bar on stderr, if that is a terminal.

    Returns
    -------
    Tensor, shape (P, C)
        Leading dimensions flattened to rows, batches joined in their order; C is 1 if the model returns one
        number for each row.

    Raises
    ------
    ProblemError
        A batch is refused, does not fit the model, or makes an output NaN or infinite.
    UnsupportedError
        The model returns anything else than one tensor.
    """
    pieces = []
    for index, batch in enumerate(_bar(read_batches(batches), "outputs", progress)):
        result = _forward(model, batch, index)
        if not isinstance(result, Tensor):
            raise UnsupportedError(
                f"model ({type(model).__name__}) returns a {type(result).__name__}; "
                "wrap it so that it returns one tensor"
            )
        rows = _as_rows(result.unsqueeze(1) if result.dim() == 1 else result, dtype)
        _require_finite(rows, f"the model's output on batches[{index}]")
        pieces.append(rows)
    return torch.cat(pieces)


def _read(batch: object, where: str, name: str) -> Batch:
    """Turn one batch of any accepted form into a checked `Batch`."""
    if isinstance(batch, Batch):
        return batch
    entries: dict[str, object]
    if isinstance(batch, dict):
        entries = dict(batch)
    elif isinstance(batch, (tuple, list)):
        if len(batch) not in (1, 2):
            raise ProblemError(
                f"{where} is a {type(batch).__name__} of {len(batch)} entries; pass (input, label) or, "
                "for more inputs, a dict"
            )
        entries = dict(zip(("input", "label"), batch, strict=False))
    else:
        entries = {"input": batch}
    for keys, role in ((_INPUT_KEYS, "input"), (_LABEL_KEYS, "labels")):
        given = [key for key in keys if key in entries]
        if len(given) > 1:
            raise ProblemError(f"{where} holds the {role} twice, as {given[0]!r} and {given[1]!r}; drop one")

    inputs: tuple[Tensor, ...] = ()
    kwargs: dict[str, Tensor] = {}
    labels = None
    for key, value in entries.items():
        what = f"{where} ({key!r})"
        tensor = _tensor(value, what)
        if key in _LABEL_KEYS:
            labels = tensor
        elif key in _INPUT_KEYS:
            if not tensor.is_floating_point():
                raise ProblemError(
                    f"{what} is {tensor.dtype} where floating inputs are needed; convert with .float(), "
                    f"and if {name} was meant as one (input, label) pair, write [(input, label)]"
                )
            inputs = (tensor,)
        else:
            kwargs[key] = tensor
    if not inputs and not kwargs:
        raise ProblemError(f"{where} holds no input; give one under the key 'input'")
    result = Batch(inputs, kwargs, labels)
    others = kwargs if labels is None else {**kwargs, "label": labels}
    for key, tensor in others.items():
        if tensor.shape[0] != len(result):
            raise ProblemError(
                f"{where} has {len(result)} rows of input and {tensor.shape[0]} of {key!r}; "
                "pass as many of one as of the other"
            )
    return result


def _check_labels(labels: Tensor | None, first: Tensor | None, name: str, index: int) -> None:
    """Refuse labels that cannot be joined with those of the first batch."""
    if labels is None or first is None:
        return
    if labels.is_complex():
        raise ProblemError(f"the labels of {name}[{index}] are {labels.dtype}; pass real numbers or classes")
    if labels.shape[1:] != first.shape[1:]:
        raise ProblemError(
            f"the labels of {name}[0] have shape {tuple(first.shape)} and those of {name}[{index}] "
            f"{tuple(labels.shape)}; give all batches labels of one shape but for the rows"
        )


def _tensor(value: object, what: str) -> Tensor:
    """Take a tensor, or convert a NumPy array; it must have rows and finite entries."""
    if isinstance(value, np.ma.MaskedArray):
        raise ProblemError(f"{what} is a masked array, whose mask would be lost; pass array.filled(value)")
    if isinstance(value, np.ndarray) and value.dtype.kind in "fiub":
        dtype = value.dtype.newbyteorder("=")
        # torch has no long double; what float64 cannot hold becomes infinite and is refused below
        dtype = np.dtype(np.float64) if dtype.kind == "f" and dtype.itemsize > 8 else dtype
        with np.errstate(over="ignore"):
            # copied: torch warns of read-only memory and refuses negative strides and foreign byte orders
            tensor = torch.from_numpy(np.array(value, dtype=dtype, order="C"))
    elif isinstance(value, Tensor):
        if value.layout is not torch.strided or value.is_nested or value.is_quantized or value.is_meta:
            raise ProblemError(f"{what} is a sparse, nested, quantized or meta tensor; pass a plain dense one")
        tensor = value.detach()
    else:
        found = f"{value.dtype} array" if isinstance(value, np.ndarray) else type(value).__name__
        raise ProblemError(f"{what} is a {found}; pass torch tensors or numeric NumPy arrays")
    if tensor.dtype in _UNSIGNED:
        # torch can neither compare nor join these; the widest may hold what int64 cannot
        tensor = tensor.to(torch.int64)
        if bool((tensor < 0).any()):
            raise ProblemError(f"{what} holds integers of 2**63 or more; pass smaller ones")
    if tensor.dim() == 0 or tensor.shape[0] == 0:
        raise ProblemError(f"{what} has shape {tuple(tensor.shape)}, so no rows; pass at least one row")
    _require_finite(tensor, what)
    return tensor


def _require_finite(tensor: Tensor, what: str) -> None:
    bad = int((~torch.isfinite(tensor)).sum())
    if bad:
        raise ProblemError(
            f"{what} has {bad} NaN or infinite entries of {tensor.numel()}; "
            "clean or rescale the data, or check the model's weights"
        )


def _forward(model: nn.Module, batch: Batch, index: int) -> Any:
    """Run one batch; what the model itself raises comes back naming the batch."""
    like = next((parameter for parameter in model.parameters() if parameter.is_floating_point()), torch.empty(0))

    def moved(tensor: Tensor) -> Tensor:
        # copied, because a first layer that works in place would otherwise change the user's data
        return tensor.to(like.device, like.dtype if tensor.is_floating_point() else tensor.dtype, copy=True)

    inputs = [moved(tensor) for tensor in batch.inputs]
    kwargs = {key: moved(tensor) for key, tensor in batch.kwargs.items()}
    try:
        with evaluating(model), torch.no_grad():
            return model(*inputs, **kwargs)
    except NetTrimError:
        raise
    except (RuntimeError, TypeError, ValueError) as error:
        shapes = ", ".join(str(tuple(tensor.shape)) for tensor in (*inputs, *kwargs.values()))
        raise ProblemError(
            f"model ({type(model).__name__}) fails on batches[{index}] with inputs of shape {shapes} "
            f"({first_line(error)}); pass batches that the model can be called on"
        ) from error


def _as_rows(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    # copied, because a ReLU that works in place would otherwise overwrite what was recorded
    return tensor.detach().to(dtype, copy=True).reshape(-1, tensor.shape[-1])


def _bar(batches: list[Batch], title: str, progress: bool) -> Iterable[Batch]:
    # disable=None hides the bar where stderr is not a terminal
    bar: Iterable[Batch] = tqdm(batches, title, leave=False, disable=None if progress else True)
    return bar
