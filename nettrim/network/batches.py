"""The samples that a network is pruned on: read once, checked, and held within a bound of memory.

Batches come in many forms, and one NaN in them would spoil every later figure, so all are checked here before any
work starts. A DataLoader may shuffle and a generator can be read only once, so what was read is kept for all later
passes: in memory while it is small, else in temporary files.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import overload

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from nettrim.errors import ProblemError
from nettrim.network.batch import Batch, as_batch, as_tensors, read_batch, require_alike, require_finite
from nettrim.network.spool import LABELS, Digest, Spool, SpooledBatch

__all__ = ["Batch", "Batches", "read_batches", "require_finite"]

_MEMORY_LIMIT = 2 << 30


class Batches(Sequence[Batch]):
    """The user's batches, the same at every pass; `read_batches` makes them.

    Indexing and iteration give the batches as they came. Those that are spooled are read from their file at every
    access, by plain reads: mapped pages would count as resident memory. The files go when the object is closed (it is
    a context manager), collected, or the interpreter exits.

    Attributes
    ----------
    rows : int
        Samples in all batches together.
    nbytes : int
        Bytes of all tensors, in memory and spooled.
    spooled : bool
        Whether some batches lie in files.
    spooled_bytes : int
        Bytes of those.
    has_labels : bool
    shapes : dict of str to tuple of int
        The shape of one sample of every input, the same in all batches: positional ones under "inputs[0]",
        "inputs[1]" and so on, keyword inputs under their names.
    chunk : int or None
        What `chunks` uses if it is not told.
    """

    def __init__(
        self,
        batches: Iterable[object],
        name: str,
        memory_limit: int = _MEMORY_LIMIT,
        chunk: int | None = None,
        directory: Path | None = None,
        progress: bool = False,
    ) -> None:
        self.chunk = chunk
        self.nbytes = 0
        self.spooled_bytes = 0
        self._name = name
        self._hold = memory_limit // 4
        self._directory = directory
        self._stored: list[Batch | SpooledBatch] = []
        self._starts = [0]
        # no rows, but shape, dtype and device of everything; the labels' dtype is that of all batches joined
        self._like: dict[str, Tensor] = {}
        self._spool: Spool | None = None
        self._digest: Digest | None = None
        self._fingerprint: str | None = None
        owned = isinstance(batches, (list, tuple))
        bar = tqdm(
            desc=f"read {name}",
            total=operator.length_hint(batches) or None if progress else None,
            unit="batch",
            leave=False,
            # None hides the bar where stderr is not a terminal
            disable=None if progress and not owned else True,
        )
        try:
            with bar:
                held = 0
                # enumerate and tqdm's own loop would keep one batch alive while the next is made
                for batch in batches:
                    held += self._add(batch, owned, held)
                    del batch
                    bar.update()
            if not self._stored:
                raise ProblemError(f"{name} holds no batch; pass at least one (a generator can be read only once)")
        except BaseException:
            self.close()
            raise
        self.rows = self._starts[-1]
        self._finish_digest()

    @property
    def spooled(self) -> bool:
        """Whether some batches lie in files."""
        return self._spool is not None

    @property
    def has_labels(self) -> bool:
        """Whether the batches have labels: all do, or none."""
        return LABELS in self._like

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of one sample of every input, without labels."""
        return {
            key.removeprefix("kwargs."): tuple(tensor.shape[1:]) for key, tensor in self._like.items() if key != LABELS
        }

    def __len__(self) -> int:
        return len(self._stored)

    @overload
    def __getitem__(self, index: int) -> Batch: ...

    @overload
    def __getitem__(self, index: slice) -> list[Batch]: ...

    def __getitem__(self, index: int | slice) -> Batch | list[Batch]:
        numbers = range(len(self))[index]
        return [self._batch(i) for i in numbers] if isinstance(numbers, range) else self._batch(numbers)

    def chunks(self, rows: int | None = None) -> Iterator[Batch]:
        """Iterate over all samples in order, in batches of a bounded size.

        Parameters
        ----------
        rows : int, at least 1, or None
            A larger batch is cut, the last piece being what is left; batches are never joined. None takes the `chunk`
            of `read_batches`; if that is None too, batches come whole.

        Returns
        -------
        iterator of Batch
            Views of what is in memory; of a spooled batch, only the rows of the piece are read.

        Raises
        ------
        ProblemError
            `rows` is not positive.
        RunError
            A spooled batch cannot be read.
        """
        most = self.chunk if rows is None else _positive(rows, "rows")
        return (
            self._batch(i, start, min(start + step, count))
            for i, count in enumerate(self._counts())
            for step in (most or count,)
            for start in range(0, count, step)
        )

    def labels(self) -> Tensor | None:
        """Return the labels of all samples, joined in order: (rows, ...), or None where there are none.

        Raises
        ------
        RunError
            A spooled batch cannot be read.
        """
        if not self.has_labels:
            return None
        joined = self._empty(LABELS, self.rows)
        for i, (start, stop) in enumerate(itertools.pairwise(self._starts)):
            joined[start:stop] = self._tensors(i, 0, stop - start, (LABELS,))[LABELS]
        return joined

    def select(self, rows: Tensor) -> Batch:
        """Return the samples with these numbers as one batch.

        Parameters
        ----------
        rows : Tensor of shape (n,), int64, n > 0
            Sample numbers in all batches joined, from 0 to `rows` - 1, ascending; the same may come several times.

        Returns
        -------
        Batch
            Of n rows, a copy. Each spooled file is read at most once.

        Raises
        ------
        ProblemError
            The numbers are not of that form.
        RunError
            A spooled batch cannot be read.
        """
        if not isinstance(rows, Tensor):
            raise ProblemError(f"rows is a {type(rows).__name__}; pass a tensor of sample numbers")
        if rows.dtype != torch.int64 or rows.dim() != 1 or not len(rows):
            raise ProblemError(
                f"rows is of {rows.dtype} and shape {tuple(rows.shape)}; pass the numbers of one or more samples, int64"
            )
        rows = rows.cpu()
        if int(rows.min()) < 0 or int(rows.max()) >= self.rows:
            raise ProblemError(
                f"rows reaches from {int(rows.min())} to {int(rows.max())} where {self._name} has {self.rows} samples; "
                f"pass numbers from 0 to {self.rows - 1}"
            )
        if bool((rows[1:] < rows[:-1]).any()):
            raise ProblemError("rows is not in ascending order; pass rows.sort().values")
        joined = {key: self._empty(key, len(rows)) for key in self._like}
        cuts = torch.searchsorted(rows, torch.tensor(self._starts)).tolist()
        for i, (start, stop) in enumerate(itertools.pairwise(cuts)):
            if start == stop:
                continue
            own = rows[start:stop] - self._starts[i]
            low = int(own[0])
            for key, tensor in self._tensors(i, low, int(own[-1]) + 1).items():
                joined[key][start:stop] = tensor[(own - low).to(tensor.device)]
        return as_batch(joined)

    def first(self, rows: int) -> Batch:
        """Return the first samples as one batch: `rows` of them, or all where there are fewer.

        Raises
        ------
        ProblemError
            `rows` is not positive.
        RunError
            A spooled batch cannot be read.
        """
        return self.select(torch.arange(min(_positive(rows, "rows"), self.rows)))

    def digest(self) -> str:
        """Return the fingerprint of the data: a hexadecimal SHA-256.

        Over the names, dtypes, shapes and bytes of all inputs and labels of the samples in order, whatever the
        batching. Labels count as int64 or float64, in whatever width they come.

        Raises
        ------
        RunError
            A spooled batch cannot be read.
        """
        if self._fingerprint is None:
            self._fingerprint = self._digest_of_stored().finish(self._like, self.rows)
        return self._fingerprint

    def close(self) -> None:
        """Remove the temporary files; spooled batches cannot be read any more, those in memory can."""
        if self._spool is not None:
            self._spool.remove()

    def __enter__(self) -> Batches:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _add(self, raw: object, owned: bool, held: int) -> int:
        """Check one more batch and store it; return by how many bytes memory grew beyond what the user holds."""
        index = len(self._stored)
        batch = read_batch(raw, f"{self._name}[{index}]", self._name)
        tensors = as_tensors(batch)
        if not self._like:
            self._like = {key: tensor.new_empty((0, *tensor.shape[1:])) for key, tensor in tensors.items()}
        require_alike(tensors, self._like, self._starts[1] if index else len(batch), self._name, index)
        if LABELS in tensors:
            wider = torch.promote_types(self._like[LABELS].dtype, tensors[LABELS].dtype)
            self._like[LABELS] = self._like[LABELS].to(wider)
        size = sum(tensor.nbytes for tensor in tensors.values())
        self.nbytes += size
        grown = 0
        if owned:
            self._stored.append(batch)
        elif held + size <= self._hold:
            # cloned, because a stream may write its next batch into the same memory, or yield views of a larger whole
            kept = {key: tensor.clone(memory_format=torch.contiguous_format) for key, tensor in tensors.items()}
            self._stored.append(as_batch(kept))
            grown = size
        else:
            if self._spool is None:
                self._spool = Spool(self._name, self._hold, self._directory)
                self._digest = self._digest_of_stored()
            self._stored.append(self._spool.write(index, tensors))
            self.spooled_bytes += size
        # where files are written, the digest is taken on the way, so that they need not be read again
        if self._digest is not None:
            self._digest.update(tensors)
        self._starts.append(self._starts[-1] + len(batch))
        return grown

    def _counts(self) -> list[int]:
        return [stop - start for start, stop in itertools.pairwise(self._starts)]

    def _empty(self, key: str, rows: int) -> Tensor:
        return self._like[key].new_empty((rows, *self._like[key].shape[1:]))

    def _batch(self, i: int, start: int = 0, stop: int | None = None) -> Batch:
        count = self._starts[i + 1] - self._starts[i]
        stop = count if stop is None else stop
        stored = self._stored[i]
        if isinstance(stored, Batch) and stop - start == count:
            return stored
        return as_batch(self._tensors(i, start, stop))

    def _tensors(self, i: int, start: int, stop: int, keys: Iterable[str] | None = None) -> dict[str, Tensor]:
        """Rows `start` to `stop` of one batch: views of what is in memory, or read."""
        stored = self._stored[i]
        wanted = self._like if keys is None else keys
        if isinstance(stored, Batch):
            tensors = as_tensors(stored)
            return {key: tensors[key][start:stop] for key in wanted}
        return {key: stored.read(key, start, stop) for key in wanted}

    def _finish_digest(self) -> None:
        # running hashes can be neither copied nor pickled
        if self._digest is not None:
            self._fingerprint, self._digest = self._digest.finish(self._like, self.rows), None

    def _digest_of_stored(self) -> Digest:
        digest = Digest()
        for i, count in enumerate(self._counts()):
            digest.update(self._tensors(i, 0, count))
        return digest


def read_batches(
    batches: Iterable[object],
    name: str = "batches",
    *,
    memory_limit: int | None = None,
    chunk: int | None = None,
    directory: Path | None = None,
    progress: bool = False,
) -> Batches:
    """Read and check batches of any of the accepted forms.

    Parameters
    ----------
    batches : iterable
        Read once, to its end: a list, a generator, a DataLoader. Each batch is a tensor of inputs, an
        (input, label) pair, a dict, or a `Batch`, which is taken as it is. In a dict, the keys "input",
        "inputs" and "x" hold the positional input, "label", "labels", "target" and "targets" the labels, and
        every other key a keyword input of forward. NumPy arrays are converted. `Batches` are handed back as they are,
        whatever the other arguments.
    name : str
        What errors call the argument.
    memory_limit : int, bytes, or None
        A quarter of it is for batches; None stands for 2 GiB. What a list or tuple holds is in memory already, so it
        is kept there by reference, whatever its size, and counts nothing; only NumPy arrays in it that torch cannot
        share (read-only, of another byte order, reversed) are copied. Of anything else, batches are copied to memory
        as long as they fit, and every other one is spooled to a file of its own; reading then holds no more than that
        quarter and one batch.
    chunk : int or None
        The most samples that `Batches.chunks` gives at a time if it is not told.
    directory : Path or None
        Where the temporary directory of spooled batches is made; None stands for that of the system, which the
        environment variable TMPDIR sets.
    progress : bool
        Show a bar on stderr while a stream is read, if that is a terminal.

    Returns
    -------
    Batches
        At least one, each with at least one row. Tensors keep their dtype and device.

    Raises
    ------
    ProblemError
        There is no batch; a batch is empty, not of an accepted form, holds NaN or infinity, or its rows do
        not match; labels are no real numbers, differ in shape between batches, or are missing in some; inputs
        differ in name, dtype or sample shape between batches; or a setting is not positive.
    RunError
        Batches must be spooled and the directory cannot be written, or is full; nothing is left behind.
    """
    if isinstance(batches, Batches):
        return batches
    if isinstance(batches, (Tensor, np.ndarray, dict, str, Batch)):
        raise ProblemError(
            f"{name} is a single {type(batches).__name__} where an iterable of batches is expected; "
            f"put it in a list: [{'tensor' if isinstance(batches, Tensor) else 'batch'}]"
        )
    if not isinstance(batches, Iterable):
        raise ProblemError(f"{name} is a {type(batches).__name__}; pass a list of batches or a DataLoader")
    limit = _MEMORY_LIMIT if memory_limit is None else _positive(memory_limit, "memory_limit")
    chunk = None if chunk is None else _positive(chunk, "chunk")
    return Batches(batches, name, limit, chunk, directory, progress)


def _positive(value: int, name: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ProblemError(f"{name} is {value!r}; pass a whole number of at least 1")
    return value
