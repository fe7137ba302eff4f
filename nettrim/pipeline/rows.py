"""What a comparison holds: rows of figures, and the one file that they are kept in."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from nettrim.errors import RunError
from nettrim.pipeline.files import read_json, write_atomically

SCHEMA = 2
#: rows of the first version lack `costs` and `latency`, and are read without
_READ = (1, SCHEMA)
#: the one file that a comparison keeps in its directory
FILE = "compare.json"
#: what must be the same for rows to stand in one table
IDENTITY = ("model", "data", "seed", "chain")


@dataclass(frozen=True)
class LayerRow:
    """One pruned layer of a row. Errors are relative to the norm of the dense network's outputs there.

    Attributes
    ----------
    name : str
    kept, numel : int
        Weights that are not zero, and all; biases are not counted.
    error : float
        ``e_l / ‖Y_l‖`` at this layer's output in the pruned network, calibration samples.
    held_out : float or None
        The same on the held-out samples.
    seconds : float
        Of the method.
    certified : bool
        False where a method that certifies its answers ended without a certificate within its tolerance.
    """

    name: str
    kept: int
    numel: int
    error: float
    held_out: float | None
    seconds: float
    certified: bool


@dataclass(frozen=True)
class Row:
    """One method at one budget in one schedule.

    Attributes
    ----------
    method : str
        Its name, and the settings that are not the default ones.
    settings : str
        The method's `repr`: all its settings.
    budget : str
        The sparsity as it was asked for: "0.9", "2:4", "fc1=0.9,fc2=0.8".
    schedule : str
    finish : str or None
        How the pruned network was trained on afterwards, if it was.
    failure : str or None
        Why there is no result: every figure but `seconds` and `peak_mib` is then empty.
    layers : tuple of LayerRow
        In execution order.
    kept, numel : int
        Of all layers to prune.
    accuracy : dict
        Split ("calibration", "held-out") to {"dense", "pruned"}, fractions, where there are labels.
    error : dict
        Split to ``‖ŷ − y‖_F / ‖y‖_F`` at the network's output.
    bound : float or None
        The ledger's tightest bound on the calibration error, in the same units.
    layer_seconds : float
        Of the method on all layers, and of training on.
    seconds : float
        Of the whole call of `prune`: recording, measuring and bounds too.
    peak_mib : float
        Rise of the process's resident set during that call, in MiB; sampled.
    costs : dict
        "dense" and "pruned" to {"weights", "multiply_adds"}: entries of the weights of all layers that are there, zeros
        too, and multiply-adds of one sample.
    latency : dict or None
        Of a module that is smaller, measured against the dense one on this CPU: "speedup", the ratio of the times, its
        quartiles "lower" and "upper", "dense_seconds", "pruned_seconds", "samples" of the batch, "threads".
    host : dict or None
        Host, commit and versions that this row was made with, where they are not those of the comparison.
    """

    method: str
    settings: str
    budget: str
    schedule: str
    finish: str | None = None
    failure: str | None = None
    layers: tuple[LayerRow, ...] = ()
    kept: int = 0
    numel: int = 0
    accuracy: dict[str, dict[str, float]] = field(default_factory=dict)
    error: dict[str, float] = field(default_factory=dict)
    bound: float | None = None
    layer_seconds: float = 0.0
    seconds: float = 0.0
    peak_mib: float = 0.0
    costs: dict[str, dict[str, int]] = field(default_factory=dict)
    latency: dict[str, float] | None = None
    host: dict[str, Any] | None = None

    @property
    def key(self) -> tuple[str, str, str, str | None]:
        """What makes it another row than the others."""
        return self.settings, self.budget, self.schedule, self.finish

    @property
    def certified(self) -> bool:
        """Whether no layer missed the tolerance of a method that certifies its answers."""
        return all(layer.certified for layer in self.layers)


@dataclass(frozen=True)
class Comparison:
    """What `compare` returns.

    Attributes
    ----------
    rows : tuple of Row
        In the order in which they were first asked for.
    about : dict
        "schema"; "host", "commit"; "seed"; "model" and "data" (fingerprints); "chain" (the layers, and which are
        pruned); "samples" (rows of each split).
    """

    rows: tuple[Row, ...]
    about: dict[str, Any]

    def as_dict(self) -> dict[str, Any]:
        """Return everything as plain JSON values."""
        return self.about | {"rows": [asdict(row) for row in self.rows]}


def load_comparison(directory: str | Path) -> Comparison:
    """Read the comparison that a directory holds.

    Raises
    ------
    RunError
        There is none, or it is truncated, foreign or of another schema.
    """
    path = Path(directory) / FILE
    about = read_json(path)
    if about.get("schema") not in _READ:
        raise RunError(f"{path} is of schema {about.get('schema')!r}, and {SCHEMA} is read: use another directory.")
    about["schema"] = SCHEMA
    try:
        rows = tuple(
            Row(**(row | {"layers": tuple(LayerRow(**layer) for layer in row["layers"])})) for row in about.pop("rows")
        )
        missing = [key for key in (*IDENTITY, "host", "commit", "samples") if key not in about]
    except (KeyError, TypeError) as error:
        raise RunError(f"{path} holds rows that are none of a comparison: {error}.") from error
    if missing:
        raise RunError(f"{path} lacks {', '.join(missing)}, so it is no comparison.")
    return Comparison(rows, about)


def write_comparison(directory: Path, comparison: Comparison) -> None:
    """Write the comparison's file, whole or not at all; the directory is made where it is absent.

    Raises
    ------
    RunError
        It cannot be written.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunError(f"{directory} cannot be made: {error.strerror or error}.") from error
    content = json.dumps(comparison.as_dict(), indent=1, allow_nan=False) + "\n"
    write_atomically(directory / FILE, content.encode())
