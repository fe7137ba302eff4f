"""One batch: the forms that it comes in, and what is checked of it."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from nettrim.errors import ProblemError
from nettrim.network.spool import LABELS, pieces

_LABEL_KEYS = ("label", "labels", "target", "targets")
_INPUT_KEYS = ("input", "inputs", "x")
_UNSIGNED = (torch.uint16, torch.uint32, torch.uint64)
_TOKENS = (torch.int32, torch.int64)  # what an embedding takes


@dataclass(frozen=True, eq=False)
class Batch:
    """One checked batch; its length is its number of rows.

    Attributes
    ----------
    inputs : tuple of Tensor, each of shape (P, ...)
        Positional inputs of forward: floating, or token ids.
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


def require_finite(tensor: Tensor, what: str) -> None:
    """Refuse a tensor that holds NaN or infinity.

    Raises
    ------
    ProblemError
        It does; the text begins with `what` and says how many.
    """
    if not (tensor.is_floating_point() or tensor.is_complex()):
        return
    # torch cannot tell for floats of one byte
    wide = (piece.float() if piece.element_size() == 1 else piece for piece in pieces(tensor))
    bad = sum(int((~torch.isfinite(piece)).sum()) for piece in wide)
    if bad:
        raise ProblemError(
            f"{what} has {bad} NaN or infinite entries of {tensor.numel()}; "
            "clean or rescale the data, or check the model's weights"
        )


def read_batch(batch: object, where: str, name: str) -> Batch:
    """Turn one batch of any accepted form into a checked `Batch`."""
    result = batch if isinstance(batch, Batch) else _from_entries(batch, where, name)
    if not result.inputs and not result.kwargs:
        raise ProblemError(f"{where} holds no input; give one under the key 'input'")
    others = {f"inputs[{i}]": tensor for i, tensor in enumerate(result.inputs)} | result.kwargs
    if result.labels is not None:
        others["label"] = result.labels
    for key, tensor in others.items():
        _require_rows(tensor, f"{where} ({key!r})")
        if tensor.shape[0] != len(result):
            raise ProblemError(
                f"{where} has {len(result)} rows of input and {tensor.shape[0]} of {key!r}; "
                "pass as many of one as of the other"
            )
    return result


def as_tensors(batch: Batch) -> dict[str, Tensor]:
    """All tensors of a batch by a name that is theirs alone: a keyword input may be called "labels"."""
    tensors = {f"inputs[{i}]": tensor for i, tensor in enumerate(batch.inputs)}
    tensors |= {f"kwargs.{key}": tensor for key, tensor in batch.kwargs.items()}
    if batch.labels is not None:
        tensors[LABELS] = batch.labels
    return {key: tensor.detach() for key, tensor in tensors.items()}


def as_batch(tensors: dict[str, Tensor]) -> Batch:
    """Undo `as_tensors`."""
    return Batch(
        tuple(tensor for key, tensor in tensors.items() if key.startswith("inputs[")),
        {key.removeprefix("kwargs."): tensor for key, tensor in tensors.items() if key.startswith("kwargs.")},
        tensors.get(LABELS),
    )


def require_alike(tensors: dict[str, Tensor], first: dict[str, Tensor], rows: int, name: str, index: int) -> None:
    """Refuse a batch that cannot be joined with the first.

    Parameters
    ----------
    tensors, first : dict of str to Tensor
        What `as_tensors` gives of this batch; of the first, no more than dtypes and shapes of single samples are read.
    rows : int
        Of the first batch.
    name : str
        What errors call the batches.
    index : int
        The number of this one.

    Raises
    ------
    ProblemError
        Only one of them has labels, or inputs or labels differ in name, dtype or shape.
    """
    labels = tensors.get(LABELS)
    if (labels is None) != (LABELS not in first):
        raise ProblemError(
            f"of {name}[0] and {name}[{index}] only one has labels; give labels to all batches or to none"
        )
    if labels is not None:
        if labels.is_complex():
            raise ProblemError(f"the labels of {name}[{index}] are {labels.dtype}; pass real numbers or classes")
        if labels.shape[1:] != first[LABELS].shape[1:]:
            raise ProblemError(
                f"the labels of {name}[0] have shape {(rows, *first[LABELS].shape[1:])} and those of {name}[{index}] "
                f"{tuple(labels.shape)}; give all batches labels of one shape but for the rows"
            )
    if tensors.keys() != first.keys():
        was, found = (", ".join(sorted(keys - {LABELS})) for keys in (first.keys(), tensors.keys()))
        raise ProblemError(
            f"{name}[0] has the inputs {was}, and {name}[{index}] {found}; give all batches the same inputs"
        )
    for key in tensors.keys() - {LABELS}:
        if tensors[key].dtype != first[key].dtype:
            pair = f", and if {name} was meant as one (input, label) pair, write [(input, label)]"
            raise ProblemError(
                f"{key} of {name}[0] is {first[key].dtype} and of {name}[{index}] {tensors[key].dtype}; "
                f"convert all batches to one dtype{pair if first[key].is_floating_point() else ''}"
            )
        if tensors[key].shape[1:] != first[key].shape[1:]:
            raise ProblemError(
                f"one sample of {key} has shape {tuple(first[key].shape[1:])} in {name}[0] and "
                f"{tuple(tensors[key].shape[1:])} in {name}[{index}]; give all samples one shape "
                "(pad sequences to one length)"
            )


def _from_entries(batch: object, where: str, name: str) -> Batch:
    """Name what a batch of any other form holds, and check each of it."""
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
            # token ids have two dimensions or more; integers of one dimension are labels in the wrong place
            if not tensor.is_floating_point() and not (tensor.dtype in _TOKENS and tensor.dim() >= 2):
                raise ProblemError(
                    f"{what} is {tensor.dtype} where floating inputs are needed; convert with .float(), "
                    f"and if {name} was meant as one (input, label) pair, write [(input, label)]"
                )
            inputs = (tensor,)
        else:
            kwargs[key] = tensor
    return Batch(inputs, kwargs, labels)


def _tensor(value: object, what: str) -> Tensor:
    """Take a tensor, or convert a NumPy array; it must have rows and finite entries."""
    if isinstance(value, np.ma.MaskedArray):
        raise ProblemError(f"{what} is a masked array, whose mask would be lost; pass array.filled(value)")
    if isinstance(value, np.ndarray) and value.dtype.kind in "fiub":
        tensor = _from_numpy(value)
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
    _require_rows(tensor, what)
    require_finite(tensor, what)
    return tensor


def _require_rows(tensor: Tensor, what: str) -> None:
    if tensor.dim() == 0 or tensor.shape[0] == 0:
        raise ProblemError(f"{what} has shape {tuple(tensor.shape)}, so no rows; pass at least one row")


def _from_numpy(array: np.ndarray) -> Tensor:
    """Share an array's memory where torch can, else copy it."""
    dtype = array.dtype.newbyteorder("=")
    # torch has no long double; what float64 cannot hold becomes infinite and is refused by the check
    dtype = np.dtype(np.float64) if dtype.kind == "f" and dtype.itemsize > 8 else dtype
    flags = array.flags
    if array.dtype == dtype and flags.writeable and flags.aligned and flags.c_contiguous:
        return torch.from_numpy(np.asarray(array))
    # torch warns of read-only memory and refuses negative strides and foreign byte orders
    with np.errstate(over="ignore"):
        return torch.from_numpy(np.array(array, dtype=dtype, order="C"))
