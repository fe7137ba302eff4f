"""Batches beyond memory: their temporary files, and the fingerprint that is taken while they pass by."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
import weakref
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from nettrim.errors import RunError

#: what the labels are called among the tensors of a batch
LABELS = "labels"

_PIECE = 1 << 20  # bytes that are checked and hashed at a time, so that no second copy of a batch arises


def pieces(tensor: Tensor) -> tuple[Tensor, ...]:
    """Cut a tensor by rows to pieces of bounded size."""
    row = tensor.nbytes // max(1, tensor.shape[0]) if tensor.dim() else 0
    return torch.split(tensor, max(1, _PIECE // max(1, row))) if tensor.dim() else (tensor,)


def _bytes(tensor: Tensor) -> Tensor:
    """View a tensor as its bytes (n,), on the CPU; copied only where it is elsewhere or not contiguous."""
    return tensor.cpu().resolve_conj().resolve_neg().contiguous().reshape(-1).view(torch.uint8)


class Digest:
    """SHA-256 of all samples, one hash for each tensor of a batch, so that the batching leaves no trace."""

    def __init__(self) -> None:
        self._hashes: dict[str, hashlib._Hash] = {}

    def update(self, tensors: dict[str, Tensor]) -> None:
        """Take in one more batch."""
        for key, tensor in tensors.items():
            hash_ = self._hashes.setdefault(key, hashlib.sha256())
            for piece in pieces(tensor):
                hash_.update(_bytes(_widest(piece) if key == LABELS else piece).numpy().data)

    def finish(self, like: dict[str, Tensor], rows: int) -> str:
        """Return the hexadecimal SHA-256 of so many rows of tensors of these dtypes and sample shapes."""
        total = hashlib.sha256()
        for key in sorted(self._hashes):
            dtype = (_widest(like[key]) if key == LABELS else like[key]).dtype
            shape = (rows, *like[key].shape[1:])
            total.update(f"{key} {dtype} {shape} {self._hashes[key].hexdigest()}\n".encode())
        return total.hexdigest()


def _widest(labels: Tensor) -> Tensor:
    return labels.to(torch.float64 if labels.is_floating_point() else torch.int64)


class Spool:
    """A temporary directory of batches, which goes when this object does."""

    def __init__(self, name: str, hold: int, directory: Path | None) -> None:
        self._name, self._hold = name, hold
        try:
            self._path = Path(tempfile.mkdtemp(prefix="nettrim-", dir=directory))
        except OSError as error:
            raise self._no_room(directory or "the temporary directory", error) from error
        self._finalizer = weakref.finalize(self, _remove_tree, self._path, os.getpid())

    def write(self, index: int, tensors: dict[str, Tensor]) -> SpooledBatch:
        """Write one batch to a file of its own.

        Raises
        ------
        RunError
            The directory cannot take it.
        """
        path = self._path / f"{index}.safetensors"
        # by hand, in pieces: the library's writer takes several batches of memory, and refuses tensors that share it.
        # As bytes, because the format lacks some dtypes of torch, complex doubles say
        header, offsets, end = {}, {}, 0
        for key, tensor in tensors.items():
            offsets[key], end = end, end + tensor.nbytes
            header[key] = {"dtype": "U8", "shape": [tensor.nbytes], "data_offsets": [offsets[key], end]}
        about = json.dumps(header).encode()
        about += b" " * (-len(about) % 8)
        try:
            with path.open("wb") as file:
                file.write(len(about).to_bytes(8, "little") + about)
                for tensor in tensors.values():
                    for piece in pieces(tensor):
                        file.write(_bytes(piece).numpy().data)
        except OSError as error:
            raise self._no_room(self._path.parent, error) from error
        offsets = {key: 8 + len(about) + offset for key, offset in offsets.items()}
        # no tensors of no rows here: one small block kept from each batch would split the allocator's memory, so that
        # the next large batch would never fit where the last one was
        kinds = {key: (tensor.dtype, tuple(tensor.shape[1:]), tensor.device) for key, tensor in tensors.items()}
        return SpooledBatch(path, offsets, kinds)

    def remove(self) -> None:
        """Remove the directory with all its files."""
        self._finalizer()

    def _no_room(self, directory: Path | str, error: OSError) -> RunError:
        reason = error.strerror or str(error)
        return RunError(
            f"{self._name} takes more than the {self._hold} bytes of memory for it, and {directory} cannot take "
            f"the rest ({reason}); set TMPDIR to a directory with room, or raise memory_limit."
        )


@dataclass(frozen=True, eq=False)
class SpooledBatch:
    """One batch in a safetensors file: where its tensors begin, and their dtypes, sample shapes and devices."""

    path: Path
    offsets: dict[str, int]
    kinds: dict[str, tuple[torch.dtype, tuple[int, ...], torch.device]]

    def read(self, key: str, start: int, stop: int) -> Tensor:
        """Read some rows of one tensor.

        Raises
        ------
        RunError
            The file is not there any more, or is truncated.
        """
        dtype, shape, device = self.kinds[key]
        tensor = torch.empty((stop - start, *shape), dtype=dtype)
        content = _bytes(tensor).numpy().data
        row = tensor.nbytes // len(tensor)
        try:
            with self.path.open("rb") as file:
                file.seek(self.offsets[key] + start * row)
                found = file.readinto(content)
            reason = "it is truncated" if found < content.nbytes else ""
        except OSError as error:
            reason = error.strerror or str(error)
        if reason:
            raise RunError(
                f"{self.path} cannot be read ({reason}): temporary files of batches are there until these are closed, "
                "unless something else removes them; read the batches again."
            )
        return tensor.to(device)


def _remove_tree(path: Path, process: int) -> None:
    # a forked worker that ends must not take the files of its parent along
    if os.getpid() == process:
        shutil.rmtree(path, ignore_errors=True)
