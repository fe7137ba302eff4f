"""A run directory: what lies where, written whole or not at all, read back without pickles.

``model.safetensors`` and ``masks.safetensors``; ``layers/NAME.safetensors`` (both weights, multipliers, how it
was solved); ``samples/`` (the rows that enter the first layer, and labels), from which `verify` replays the
chain; ``ledger.json``; ``run.json`` (settings, versions, host, fingerprints, and the digest of every other
file).
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import platform
import subprocess
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any
from urllib.parse import quote

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_bytes
from torch import Tensor, nn

from nettrim.errors import RunError
from nettrim.methods.masks import Pattern
from nettrim.pipeline.ledger import LayerEvidence, Ledger
from nettrim.pipeline.plan import Plan

SCHEMA = 2
_VERSIONED = ("nettrim", "torch", "numpy", "safetensors")


@dataclass(frozen=True, eq=False)
class Samples:
    """The rows that enter the first layer, and their labels.

    Attributes
    ----------
    name : str
        "calibration" or "held-out".
    rows : Tensor (P, N)
        float64.
    labels : Tensor (P,) or None
    """

    name: str
    rows: Tensor
    labels: Tensor | None


def describe_run(model: nn.Module, plan: Plan, seed: int) -> dict[str, Any]:
    """Return the settings of a run as JSON values: what was asked for, on what, and where."""
    return {
        "schema": SCHEMA,
        "method": plan.method.name,
        "method_settings": repr(plan.method),
        "schedule": plan.schedule,
        "amount": {plan.amount: {k: str(v) if isinstance(v, Pattern) else v for k, v in plan.values.items()}},
        "overall": plan.overall and str(plan.overall),
        "finish": plan.finish and repr(plan.finish),
        "targets": dict(plan.targets) if isinstance(plan.targets, Mapping) else plan.targets,
        "chain": [asdict(layer) for layer in plan.graph.layers],
        "seed": seed,
        "model": digest_tensors(dict(model.state_dict())),
    } | describe_place()


def describe_place() -> dict[str, Any]:
    """Return where this runs, as JSON values: versions, host, commit."""
    return {
        "versions": {name: _version(name) for name in _VERSIONED},
        "host": {
            "machine": platform.machine(),
            "system": platform.system(),
            "python": platform.python_version(),
            "processors": os.cpu_count(),
            "threads": torch.get_num_threads(),
        },
        "commit": _commit(),
    }


#: what must be the same for a run to be gone on with
_IDENTITY = (
    "schema",
    "method",
    "method_settings",
    "schedule",
    "amount",
    "overall",
    "finish",
    "targets",
    "chain",
    "seed",
    "model",
)


class RunStore:
    """One run directory that is being written."""

    def __init__(self, directory: Path, run: dict[str, Any]) -> None:
        self.directory = directory
        self.run = run

    @staticmethod
    def create(
        directory: str | Path, settings: dict[str, Any], calibration: Samples, held_out: Samples | None
    ) -> RunStore:
        """Start a run directory: its settings and samples are written at once.

        Raises
        ------
        RunError
            The directory holds something already, or cannot be written.
        """
        path = Path(directory)
        require_free(path)
        try:
            (path / "layers").mkdir(parents=True, exist_ok=True)
            (path / "samples").mkdir(exist_ok=True)
        except OSError as error:
            raise RunError(f"{path} cannot be made: {error.strerror or error}.") from error
        store = RunStore(
            path, settings | {"state": "started", "data": _data_digest(calibration, held_out), "files": {}}
        )
        store._write_run()
        store._write_samples(calibration, held_out)
        return store

    @staticmethod
    def resume(
        directory: str | Path, settings: dict[str, Any], calibration: Samples, held_out: Samples | None
    ) -> tuple[RunStore, dict[str, LayerEvidence]]:
        """Go on with a run: return its store and the layers that are finished. An empty or absent directory
        starts anew.

        Raises
        ------
        RunError
            The run differs in model, data or settings, which the text names; or it cannot be read.
        """
        path = Path(directory)
        if _is_free(path):
            return RunStore.create(path, settings, calibration, held_out), {}
        run = read_json(path / "run.json")
        require_same(path, run, settings, calibration, held_out)
        store, found = RunStore(path, run | {"state": "started"}), {}
        for name, digest in list(run["files"].items()):
            if not _holds(path / name, digest):
                # damaged since it was written: done again, as if it had never been
                del run["files"][name]
            elif name.startswith("layers/"):
                evidence = read_layer(path / name)
                found[evidence.name] = evidence
        store._write_samples(calibration, held_out)
        return store, found

    def write_layer(self, layer: LayerEvidence) -> None:
        """Write one layer's file and note it in ``run.json``."""
        tensors = {"weight": layer.weight, "dense_weight": layer.dense_weight}
        for key in ("bias", "dense_bias", "multipliers"):
            if getattr(layer, key) is not None:
                tensors[key] = getattr(layer, key)
        about = {key: getattr(layer, key) for key in ("name", "relu", "pruned", "clean", "facts", "seconds")}
        self._tensors(layer_file(layer.name), tensors, about)
        self._write_run()

    def finish(self, model: nn.Module, layers: list[LayerEvidence], ledger: Ledger) -> None:
        """Write what is known only at the end."""
        state = {key: value for key, value in model.state_dict().items() if isinstance(value, Tensor)}
        named = {
            f"{layer.name}.{key}": tensor
            for layer in layers
            for key, tensor in (("weight", layer.weight), ("bias", layer.bias))
            if tensor is not None
        }
        # a model that was read back without its class has other names for the same layers
        self._tensors("model.safetensors", state if named.keys() <= state.keys() else named)
        masks = {layer.name: layer.weight != 0 for layer in layers if layer.pruned}
        self._tensors("masks.safetensors", masks)
        self._file("ledger.json", _json({"schema": SCHEMA} | ledger.as_dict()))
        self.run["state"] = "finished"
        self._write_run()

    def _write_samples(self, calibration: Samples, held_out: Samples | None) -> None:
        for samples in filter(None, (calibration, held_out)):
            name = f"samples/{samples.name}.safetensors"
            if name not in self.run["files"]:
                tensors = {"rows": _smallest(samples.rows)}
                if samples.labels is not None:
                    tensors["labels"] = samples.labels
                self._tensors(name, tensors)
        self._write_run()

    def _tensors(self, name: str, tensors: dict[str, Tensor], about: dict[str, Any] | None = None) -> None:
        # cloned, because safetensors refuses tensors that share memory
        plain = {key: tensor.detach().cpu().clone().contiguous() for key, tensor in tensors.items()}
        self._file(name, to_bytes(plain, None if about is None else {"about": json.dumps(about)}))

    def _file(self, name: str, content: bytes) -> None:
        write_atomically(self.directory / name, content)
        self.run["files"][name] = hashlib.sha256(content).hexdigest()

    def _write_run(self) -> None:
        self.run.pop("digest", None)
        self.run["digest"] = digest_json(self.run)
        write_atomically(self.directory / "run.json", _json(self.run))


def require_free(directory: str | Path) -> None:
    """Refuse a directory that holds something: nothing of anybody's is ever written over.

    Raises
    ------
    RunError
        It does, or cannot be looked into.
    """
    if not _is_free(Path(directory)):
        raise RunError(f"{directory} already holds something: choose another directory, or resume the run in it.")


def require_same(
    directory: str | Path,
    run: Mapping[str, Any],
    settings: dict[str, Any],
    calibration: Samples,
    held_out: Samples | None,
    but: tuple[str, ...] = (),
) -> None:
    """Refuse a run that was started with other settings, model or data; `but` are not known yet.

    Raises
    ------
    RunError
        It was, and the text names in what it differs.
    """
    wanted = json.loads(json.dumps(settings)) | {"data": _data_digest(calibration, held_out)}
    differs = [key for key in (*_IDENTITY, "data") if key not in but and run.get(key) != wanted[key]]
    if differs:
        raise RunError(
            f"{directory} holds a run with another {', '.join(differs)}: resume with the same, or use another "
            "directory."
        )


def started_run(directory: str | Path) -> dict[str, Any] | None:
    """Return the settings of the run in a directory, or None where none was started.

    Raises
    ------
    RunError
        They cannot be read.
    """
    path = Path(directory) / "run.json"
    return read_json(path) if path.is_file() else None


def _is_free(path: Path) -> bool:
    """Whether nothing stands there but folders: what a run leaves that was killed before it wrote its first file."""
    try:
        if path.exists() and not path.is_dir():
            raise RunError(f"{path} is a file: choose a directory.")
        return all(inside.is_dir() for inside in path.rglob("*"))
    except OSError as error:
        raise RunError(f"{path} cannot be read: {error.strerror or error}.") from error


def _holds(path: Path, digest: str) -> bool:
    return path.is_file() and hashlib.sha256(path.read_bytes()).hexdigest() == digest


def layer_file(name: str) -> str:
    """Return the file of a layer, relative to the run directory: its name, percent-encoded, cut where it is long."""
    safe = quote(name, safe=" ")
    if len(safe) > 150:
        safe = f"{safe[:100]}-{hashlib.sha256(name.encode()).hexdigest()[:16]}"
    return f"layers/{safe}.safetensors"


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file so that it is there whole, or not at all.

    Raises
    ------
    RunError
        It cannot be written: a full disk, a missing permission. What was there before stays.
    """
    part = path.with_name(path.name + ".part")
    try:
        with part.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    except OSError as error:
        raise RunError(f"{path} cannot be written: {error.strerror or error}.") from error
    finally:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises
    ------
    RunError
        It is missing, truncated, or no JSON object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise RunError(f"{path} cannot be read: {error.strerror or error}.") from error
    except ValueError as error:
        raise RunError(f"{path} is truncated or no JSON file: {error}.") from error
    if not isinstance(value, dict):
        raise RunError(f"{path} holds no JSON object, so it is not of a run directory.")
    return value


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read a safetensors file: its tensors, and what is said about them.

    Raises
    ------
    RunError
        It is missing, truncated, or of another format.
    """
    try:
        with safe_open(path, framework="pt") as file:
            about = (file.metadata() or {}).get("about", "{}")
            return {key: file.get_tensor(key) for key in file.keys()}, json.loads(about)  # noqa: SIM118
    except OSError as error:
        raise RunError(f"{path} cannot be read: {error.strerror or error}.") from error
    except (SafetensorError, ValueError) as error:
        raise RunError(f"{path} is truncated or no safetensors file: {error}.") from error


def read_layer(path: Path) -> LayerEvidence:
    """Read one layer's file.

    Raises
    ------
    RunError
        It is missing, truncated, or not a layer of a run.
    """
    tensors, about = read_tensors(path)
    try:
        return LayerEvidence(
            dense_weight=tensors["dense_weight"],
            dense_bias=tensors.get("dense_bias"),
            weight=tensors["weight"],
            bias=tensors.get("bias"),
            multipliers=tensors.get("multipliers"),
            **about,
        )
    except (KeyError, TypeError) as error:
        raise RunError(f"{path} is not the file of a pruned layer: {error}.") from error


def read_samples(path: Path) -> Samples:
    """Read the rows and labels of one split.

    Raises
    ------
    RunError
        The file is missing, truncated, or holds no rows.
    """
    tensors, _ = read_tensors(path)
    if "rows" not in tensors:
        raise RunError(f"{path} holds no rows, so it is not of a run directory.")
    return Samples(path.stem, tensors["rows"].double(), tensors.get("labels"))


def digest_tensors(tensors: dict[str, Tensor]) -> str:
    """Return a SHA-256 of names, dtypes, shapes and values."""
    total = hashlib.sha256()
    for name, tensor in sorted((key, value) for key, value in tensors.items() if isinstance(value, Tensor)):
        total.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        total.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return total.hexdigest()


def digest_json(value: dict[str, Any]) -> str:
    """Return a SHA-256 of a JSON object, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _data_digest(calibration: Samples, held_out: Samples | None) -> str:
    tensors = {}
    for samples in filter(None, (calibration, held_out)):
        tensors[samples.name] = samples.rows
        if samples.labels is not None:
            tensors[f"{samples.name} labels"] = samples.labels
    return digest_tensors(tensors)


def _smallest(rows: Tensor) -> Tensor:
    """Return float32 rows where that loses nothing, as with images, else the rows."""
    small = rows.float()
    return small if torch.equal(small.double(), rows) else rows


def _json(value: dict[str, Any]) -> bytes:
    # NaN and infinity are no JSON, and no figure may be either
    return (json.dumps(value, indent=1, sort_keys=True, allow_nan=False) + "\n").encode()


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "not installed"


def _commit() -> str | None:
    """Return the commit of the checkout that nettrim runs from, or None where it is an installed package."""
    here = Path(__file__).resolve().parents[2]
    if not (here / ".git").exists():
        return None
    try:
        done = subprocess.run(
            ["git", "-C", str(here), "describe", "--always", "--dirty"],
            capture_output=True,
            text=True,
            check=False,
        )
    except OSError:
        return None
    return done.stdout.strip() or None
