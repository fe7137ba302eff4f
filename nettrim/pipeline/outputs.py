"""The forms in which a pruned network leaves the package: packed files, CSR, torch's own masks; and their sizes.

Files keep every bit. What is left out of them is the floating-point number ``+0.0`` alone: ``-0.0`` and NaN are values
like any other. A weight that was multiplied by its mask holds ``-0.0`` wherever it was negative; ``weight + 0.0`` turns
those into ``+0.0``.
"""

from __future__ import annotations

import copy
import gzip
import json
import math
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import save as to_bytes
from torch import Tensor, nn
from torch.nn.utils import prune as torch_prune

from nettrim.errors import ProblemError, RunError, UnknownNameError, UnsupportedError
from nettrim.network.edit import first_line
from nettrim.pipeline.files import read_tensors, write_atomically

#: what zeros do and do not buy in speed
SPEED = (
    "Zeros make files smaller, but a dense runtime (PyTorch, ONNX Runtime) not faster: that takes one that leaves them "
    "out, such as CSR products on a CPU above about 90 % zeros, OpenVINO's sparse weight decompression for "
    "memory-bound int8 networks on 4th-generation Xeons and later, or hardware synthesis (hls4ml)."
)

_FLOATS = {str(kind).removeprefix("torch."): kind for kind in (torch.float64, torch.float32, torch.float16)}
_FLOATS["bfloat16"] = torch.bfloat16
_INTEGERS = {8: torch.int64, 4: torch.int32, 2: torch.int16}
_VERSION = 1


def sizes(tensors: Tensor | Mapping[str, Tensor] | nn.Module, compressed: bool = True) -> dict[str, int]:
    """Return the bytes of a weight, or of a whole state, in each form; names and headers are not counted.

    ``dense``: as it is. ``csr``: values, int32 columns and int32 row starts of the matrix ``(M, -1)``. ``bitmask``: one
    bit per weight, and the values that are not ``+0.0``. ``gzip``: the dense bytes, compressed for this answer (level
    6), which takes 1-2 s for 20 MB. A tensor that a form does not take (integers; vectors in CSR) counts as
    dense there.

    Parameters
    ----------
    tensors : Tensor of any shape, mapping from name to Tensor, or nn.Module
        Of a mapping or a module, what the files hold: a tensor that a form would make larger counts as dense.
    compressed : bool
        Whether to compress.

    Returns
    -------
    dict
        ``{"dense", "csr", "bitmask"}``, and "gzip" where it is asked for, to bytes.

    Raises
    ------
    ProblemError
        Something in it is no dense tensor.
    """
    if isinstance(tensors, Tensor):
        return _sizes(_plain("tensors", tensors), compressed)
    total = dict.fromkeys(("dense", "csr", "bitmask", *(["gzip"] if compressed else [])), 0)
    for tensor in plain_state(tensors).values():
        found = _sizes(tensor, compressed)
        for form in total:
            total[form] += found[form] if form == "gzip" else min(found[form], found["dense"])
    return total


def write_packed(path: str | Path, state: Mapping[str, Tensor] | nn.Module) -> None:
    """Write a state as safetensors in which zeros take one bit each.

    A floating tensor ``NAME`` that gets smaller by it is stored as ``NAME:bitmask``, uint8 ``(⌈numel / 8⌉,)``, bit
    ``i mod 8`` (least significant first) of byte ``⌊i / 8⌋`` set where entry ``i`` in row-major order is stored, and
    ``NAME:values``, those entries. The metadata entry ``about`` holds shapes and dtypes as JSON. Every other tensor is
    stored under its own name as it is.

    Parameters
    ----------
    path : path
        A file there is replaced whole, or left as it is.
    state : mapping from name to Tensor, or nn.Module

    Raises
    ------
    ProblemError
        The state holds something that is no dense tensor, or two names collide.
    RunError
        The file cannot be written.
    """
    _write(Path(path), _PACKED, state)


def read_packed(path: str | Path) -> dict[str, Tensor]:
    """Read what `write_packed` wrote, bit for bit.

    Raises
    ------
    RunError
        The file is missing, truncated, damaged, or of another form.
    """
    return _read(Path(path), _PACKED)


def write_csr(path: str | Path, state: Mapping[str, Tensor] | nn.Module) -> None:
    """Write a state as safetensors with compressed sparse rows.

    A floating tensor ``NAME (M, ...)`` that gets smaller by it is stored as the matrix ``(M, -1)``:
    ``NAME:crow_indices`` int32 ``(M + 1,)``, ``NAME:col_indices`` int32 and ``NAME:values``. Every other tensor is
    stored under its own name as it is. `to_csr` makes torch's sparse tensor of what is read.

    Parameters
    ----------
    path : path
        A file there is replaced whole, or left as it is.
    state : mapping from name to Tensor, or nn.Module

    Raises
    ------
    ProblemError
        The state holds something that is no dense tensor, or two names collide.
    RunError
        The file cannot be written.
    """
    _write(Path(path), _CSR, state)


def read_csr(path: str | Path) -> dict[str, Tensor]:
    """Read what `write_csr` wrote, bit for bit, as dense tensors in their own shapes.

    Raises
    ------
    RunError
        The file is missing, truncated, damaged, or of another form.
    """
    return _read(Path(path), _CSR)


def to_csr(weight: Tensor) -> Tensor:
    """Return a weight as `torch.sparse_csr_tensor` with int32 indices, for products such as ``to_csr(w) @ x.T``.

    Parameters
    ----------
    weight : Tensor (M, ...)
        At least two dimensions; of a convolution the matrix ``(M, -1)`` is taken.

    Raises
    ------
    ProblemError
        It is no dense floating tensor of at least two dimensions.
    """
    plain = _plain("weight", weight)
    if not _is_matrix(plain):
        raise ProblemError(
            f"weight has shape {tuple(plain.shape)} and dtype {plain.dtype}: CSR takes a floating weight of at least "
            "two dimensions and less than 2³¹ entries."
        )
    parts = _encode_csr(plain)
    with warnings.catch_warnings():
        # torch calls every CSR tensor a beta feature
        warnings.simplefilter("ignore", UserWarning)
        return torch.sparse_csr_tensor(
            parts["crow_indices"], parts["col_indices"], parts["values"], size=_matrix_shape(plain.shape)
        ).to(weight.device)


def apply_prune_masks(model: nn.Module, masks: Mapping[str, Tensor]) -> nn.Module:
    """Return a copy whose masks torch itself keeps (`torch.nn.utils.prune.custom_from_mask`), to be trained on.

    Each masked parameter becomes ``NAME_orig`` and the buffer ``NAME_mask``, and its product is set before every
    forward; `torch.nn.utils.prune.remove` makes it a plain parameter again. A parameter that several modules share is
    masked in all of them.

    Parameters
    ----------
    model : nn.Module
        Left as it is. Modes and `requires_grad` are copied too.
    masks : mapping from name to bool Tensor
        True = kept. The name of a layer, as ``model.named_modules()`` gives it, stands for its ``weight``; the name of
        a parameter for itself.

    Raises
    ------
    ProblemError
        A mask has another shape or is not bool, or two masks are given for one parameter.
    UnknownNameError
        The model has no such layer or parameter.
    UnsupportedError
        The model cannot be copied.
    """
    try:
        twin = copy.deepcopy(model)
    except (RuntimeError, TypeError) as error:
        raise UnsupportedError(
            f"model ({type(model).__name__}) cannot be copied ({first_line(error)}): detach the tensors that it keeps, "
            "and call torch.nn.utils.prune.remove on what is masked already."
        ) from error
    taken: dict[nn.Parameter, str] = {}
    for name, mask in masks.items():
        parameter = _parameter(twin, name)
        if not isinstance(mask, Tensor) or mask.dtype is not torch.bool or mask.shape != parameter.shape:
            found = f"shape {tuple(mask.shape)} and dtype {mask.dtype}" if isinstance(mask, Tensor) else repr(mask)
            raise ProblemError(
                f"masks[{name!r}] has {found}: it needs torch.bool and the parameter's shape {tuple(parameter.shape)}."
            )
        if parameter in taken:
            raise ProblemError(f"masks {taken[parameter]!r} and {name!r} are of one parameter: give one of them.")
        taken[parameter] = name
    for parameter, name in taken.items():
        holders = [
            (module, key)
            for module in twin.modules()
            for key, held in module.named_parameters(recurse=False, remove_duplicate=False)
            if held is parameter
        ]
        for module, key in holders:
            torch_prune.custom_from_mask(module, key, masks[name].to(parameter.device))  # type: ignore[no-untyped-call]
    return twin


def _parameter(model: nn.Module, name: str) -> nn.Parameter:
    modules = dict(model.named_modules(remove_duplicate=False))
    parameters = dict(model.named_parameters(remove_duplicate=False))
    found = getattr(modules[name], "weight", None) if name in modules else parameters.get(name)
    if not isinstance(found, nn.Parameter):
        raise UnknownNameError(
            f"masks names {name!r}, which is neither a layer with a weight nor a parameter of the model; its "
            f"parameters are {', '.join(map(repr, parameters)) or 'none'}."
        )
    return found


def _plain(name: str, tensor: object) -> Tensor:
    """Return a tensor as a contiguous one on the CPU, or refuse it."""
    if not isinstance(tensor, Tensor):
        raise ProblemError(f"{name} is a {type(tensor).__name__}: only tensors can be stored.")
    if tensor.layout is not torch.strided or tensor.is_meta or tensor.is_quantized:
        raise ProblemError(f"{name} is a sparse, quantised or meta tensor: give it as a dense one with values.")
    return tensor.detach().cpu().contiguous()


def plain_state(state: Mapping[str, Tensor] | nn.Module) -> dict[str, Tensor]:
    """Return the tensors of a state, contiguous and on the CPU.

    Raises
    ------
    ProblemError
        Something in it is no dense tensor.
    """
    named = state.state_dict() if isinstance(state, nn.Module) else state
    return {name: _plain(name, tensor) for name, tensor in named.items()}


def _bits(tensor: Tensor) -> Tensor:
    """Return a vector of integers of the same bits: 0 is ``+0.0`` and nothing else."""
    return tensor.reshape(-1).view(_INTEGERS[tensor.element_size()])


def _is_packable(tensor: Tensor) -> bool:
    return tensor.dtype in _FLOATS.values()


def _is_matrix(tensor: Tensor) -> bool:
    return _is_packable(tensor) and tensor.dim() >= 2 and tensor.numel() < 2**31


def _matrix_shape(shape: torch.Size | list[int]) -> tuple[int, int]:
    return shape[0], math.prod(shape[1:])


def _sizes(tensor: Tensor, compressed: bool) -> dict[str, int]:
    dense, item = tensor.nbytes, tensor.element_size()
    kept = int(_bits(tensor).count_nonzero()) if _is_packable(tensor) else 0
    found = {
        "dense": dense,
        "csr": kept * (item + 4) + 4 * (tensor.shape[0] + 1) if _is_matrix(tensor) else dense,
        "bitmask": kept * item + math.ceil(tensor.numel() / 8) if _is_packable(tensor) else dense,
    }
    if compressed:
        content = tensor.reshape(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b""
        found["gzip"] = len(gzip.compress(content, compresslevel=6))
    return found


def _encode_packed(tensor: Tensor) -> dict[str, Tensor]:
    bits = _bits(tensor)
    keep = bits != 0
    mask = torch.from_numpy(np.packbits(keep.numpy(), bitorder="little"))
    return {"bitmask": mask, "values": bits[keep].view(tensor.dtype)}


def _decode_packed(parts: dict[str, Tensor], shape: list[int]) -> tuple[Tensor, Tensor]:
    mask, count = parts["bitmask"], math.prod(shape)
    if mask.dtype is not torch.uint8 or mask.shape != (math.ceil(count / 8),):
        raise ValueError(f"its bitmask does not fit the shape {tuple(shape)}")
    bits = torch.from_numpy(np.unpackbits(mask.numpy(), bitorder="little"))
    if bits[count:].any():
        raise ValueError("its bitmask goes on behind its end")
    return bits[:count].nonzero()[:, 0], parts["values"]


def _encode_csr(tensor: Tensor) -> dict[str, Tensor]:
    bits = _bits(tensor).reshape(_matrix_shape(tensor.shape))
    keep = bits != 0
    starts = torch.zeros(len(bits) + 1, dtype=torch.int32)
    starts[1:] = keep.sum(1).cumsum(0)
    columns = keep.nonzero()[:, 1].int()
    return {"crow_indices": starts, "col_indices": columns, "values": bits[keep].view(tensor.dtype)}


def _decode_csr(parts: dict[str, Tensor], shape: list[int]) -> tuple[Tensor, Tensor]:
    starts, columns, values = parts["crow_indices"], parts["col_indices"], parts["values"]
    rows, width = _matrix_shape(shape)
    if starts.dtype is not torch.int32 or columns.dtype is not torch.int32 or starts.shape != (rows + 1,):
        raise ValueError(f"its row starts do not fit the shape {tuple(shape)}")
    counts = starts.diff()
    if starts[0] != 0 or starts[-1] != len(columns) or (counts < 0).any():
        raise ValueError("its row starts do not rise from 0 to the number of columns")
    if ((columns < 0) | (columns >= width)).any():
        raise ValueError(f"a column lies outside of 0 to {width - 1}")
    places = torch.arange(rows).repeat_interleave(counts.long()) * width + columns
    if (places.diff() <= 0).any():
        raise ValueError("the columns of a row do not rise")
    return places, values


@dataclass(frozen=True)
class _Form:
    """How one tensor becomes several and back; `decode` returns where the values stand, and the values."""

    name: str
    takes: Callable[[Tensor], bool]
    encode: Callable[[Tensor], dict[str, Tensor]]
    decode: Callable[[dict[str, Tensor], list[int]], tuple[Tensor, Tensor]]
    parts: tuple[str, ...]


_PACKED = _Form("nettrim packed", _is_packable, _encode_packed, _decode_packed, ("bitmask", "values"))
_CSR = _Form("nettrim csr", _is_matrix, _encode_csr, _decode_csr, ("crow_indices", "col_indices", "values"))


def _write(path: Path, form: _Form, state: Mapping[str, Tensor] | nn.Module) -> None:
    tensors: dict[str, Tensor] = {}
    about: dict[str, dict[str, Any]] = {}
    for name, tensor in plain_state(state).items():
        parts = form.encode(tensor) if form.takes(tensor) else {}
        if parts and sum(part.nbytes for part in parts.values()) < tensor.nbytes:
            about[name] = {"shape": list(tensor.shape), "dtype": str(tensor.dtype).removeprefix("torch.")}
            stored = {f"{name}:{part}": content for part, content in parts.items()}
        else:
            # cloned, because safetensors refuses tensors that share memory
            stored = {name: tensor.clone()}
        double = sorted(stored.keys() & tensors.keys())
        if double:
            raise ProblemError(f"two tensors would be stored as {double[0]!r}: rename one of them.")
        tensors |= stored
    said = json.dumps({"form": form.name, "version": _VERSION, "tensors": about})
    try:
        content = to_bytes(tensors, {"about": said})
    except (SafetensorError, KeyError, ValueError) as error:
        raise ProblemError(f"safetensors cannot store this state ({first_line(error)}).") from error
    write_atomically(path, content)


def _read(path: Path, form: _Form) -> dict[str, Tensor]:
    tensors, about = read_tensors(path)
    if not isinstance(about, dict) or about.get("form") != form.name or about.get("version") != _VERSION:
        raise RunError(f"{path} is not of the form {form.name!r}, version {_VERSION}: read it with what wrote it.")
    try:
        for name, entry in about["tensors"].items():
            parts = {part: tensors.pop(f"{name}:{part}") for part in form.parts}
            if name in tensors:
                raise ValueError("it is there twice")
            tensors[name] = _restore(form, parts, entry["shape"], _FLOATS[entry["dtype"]])
    # RuntimeError is torch's, where a shape is beyond all memory
    except (AttributeError, LookupError, TypeError, ValueError, RuntimeError) as error:
        raise RunError(f"{path} is damaged: what it says of its tensors does not fit them ({error}).") from error
    return tensors


def _restore(form: _Form, parts: dict[str, Tensor], shape: list[int], dtype: torch.dtype) -> Tensor:
    if not all(type(size) is int and size >= 0 for size in shape) or parts["values"].dtype is not dtype:
        raise ValueError(f"shape {shape} or dtype {dtype} is not that of its values")
    places, values = form.decode(parts, shape)
    if values.shape != places.shape:
        raise ValueError(f"it has {values.numel()} values for {len(places)} places")
    dense = torch.zeros(shape, dtype=dtype)
    _bits(dense)[places] = _bits(values)
    return dense
