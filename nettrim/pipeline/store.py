"""A run directory: what lies where, written whole or not at all, read back without pickles.

``model.safetensors`` and ``masks.safetensors``; ``layers/NAME.safetensors`` (both weights, multipliers, how it
was solved); ``network.json`` and ``network.safetensors`` (the dense network as a program, and its weights) and
``samples/``, from which `verify` runs everything again; ``ledger.json``; ``structure.json`` (what a smaller network is
without); ``first.json`` and ``first.safetensors`` (the network that the first of several runs started from);
``run.json`` (settings, versions, host, fingerprints, and the digest of every other file).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any
from urllib.parse import quote

import torch
from torch import Tensor, nn

from nettrim.errors import RunError, UnsupportedError
from nettrim.methods.masks import Pattern
from nettrim.network.batches import Batch, Batches, read_batches
from nettrim.network.fold import Fold
from nettrim.network.matrix import Window
from nettrim.network.program_json import from_json, to_json
from nettrim.network.trace import LayerGraph, LayerSpec
from nettrim.pipeline.account import Account
from nettrim.pipeline.files import (
    describe_place,
    digest_json,
    digest_tensors,
    json_bytes,
    read_json,
    read_tensors,
    tensor_bytes,
    write_atomically,
)
from nettrim.pipeline.plan import Plan
from nettrim.pipeline.records import LayerEvidence, Ledger

SCHEMA = 4
_SPLITS = ("calibration", "held-out")


def describe_run(model: nn.Module, plan: Plan, account: Account, rows: int | None, seed: int) -> dict[str, Any]:
    """Return the settings of a run as JSON values: what was asked for, on what, and where."""
    return {
        "schema": SCHEMA,
        "method": plan.method.name,
        "method_settings": repr(plan.method),
        "schedule": plan.schedule,
        "amount": {plan.amount: {k: str(v) if isinstance(v, Pattern) else v for k, v in plan.values.items()}},
        "overall": plan.overall and str(plan.overall),
        "forms": dict(plan.forms),
        "residual": plan.residual,
        "finish": plan.finish and repr(plan.finish),
        "targets": dict(plan.targets) if isinstance(plan.targets, Mapping) else plan.targets,
        "layers": json.loads(json.dumps([asdict(layer) for layer in plan.graph.layers])),
        "rows": rows,
        "memory_limit": account.memory_limit,
        "seed": seed,
        "model": digest_tensors(dict(model.state_dict())),
        "data": {split: batches.digest() for split, batches in _splits(account)},
    } | describe_place()


#: what must be the same for a run to be gone on with
_IDENTITY = (
    "schema",
    "method",
    "method_settings",
    "schedule",
    "amount",
    "overall",
    "forms",
    "residual",
    "finish",
    "targets",
    "layers",
    "rows",
    "memory_limit",
    "seed",
    "model",
    "data",
)


class RunStore:
    """One run directory that is being written."""

    def __init__(self, directory: Path, run: dict[str, Any]) -> None:
        self.directory = directory
        self.run = run

    @staticmethod
    def create(directory: str | Path, settings: dict[str, Any], account: Account) -> RunStore:
        """Start a run directory: its settings, network and samples are written at once.

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
        store = RunStore(path, settings | {"state": "started", "not_stored": _not_stored(account), "files": {}})
        store._write_run()
        store._write_network(account)
        return store

    @staticmethod
    def resume(
        directory: str | Path, settings: dict[str, Any], account: Account
    ) -> tuple[RunStore, dict[str, LayerEvidence]]:
        """Go on with a run: return its store and the layers that are finished. An empty or absent directory
        starts anew.

        Raises
        ------
        RunError
            The run differs in model, data, settings or schema, which the text names; or it cannot be read.
        """
        path = Path(directory)
        if is_free(path):
            return RunStore.create(path, settings, account), {}
        run = read_json(path / "run.json")
        require_same(path, run, settings)
        store, found = RunStore(path, run | {"state": "started"}), {}
        for name, digest in list(run["files"].items()):
            if not _holds(path / name, digest):
                # damaged since it was written: done again, as if it had never been
                del run["files"][name]
            elif name.startswith("layers/"):
                evidence = read_layer(path / name)
                found[evidence.name] = evidence
        # what was being written when the run was killed; whatever it was, it is written again
        for part in path.rglob("*.part"):
            part.unlink(missing_ok=True)
        store._write_network(account)
        return store, found

    def write_layer(self, layer: LayerEvidence) -> None:
        """Write one layer's file and note it in ``run.json``."""
        tensors = {"weight": layer.weight, "dense_weight": layer.dense_weight}
        for key in ("bias", "dense_bias", "multipliers"):
            if getattr(layer, key) is not None:
                tensors[key] = getattr(layer, key)
        about = {key: getattr(layer, key) for key in ("name", "relu", "pruned", "clean", "facts", "seconds")}
        self._file(layer_file(layer.name), tensor_bytes(tensors, about))
        self._write_run()

    def finish(
        self,
        state: Mapping[str, Any],
        masks: Mapping[str, Tensor],
        ledger: Ledger,
        structure: Mapping[str, Any] | None = None,
        first: Account | None = None,
    ) -> None:
        """Write what is known only at the end.

        `state` is that of the pruned module, `structure` what it is without, `first` the network that the first of
        several runs started from.
        """
        tensors = {key: value for key, value in state.items() if isinstance(value, Tensor)}
        self._file("model.safetensors", tensor_bytes(tensors))
        self._file("masks.safetensors", tensor_bytes(dict(masks)))
        if structure is not None:
            self._file("structure.json", json_bytes(dict(structure)))
        if first is not None and "network" not in self.run["not_stored"]:
            self._file("first.json", json_bytes(network_json(first.graph)))
            self._file("first.safetensors", _network_bytes(first))
        self._file("ledger.json", json_bytes({"schema": SCHEMA} | ledger.as_dict()))
        self.run["state"] = "finished"
        self._write_run()

    def _write_network(self, account: Account) -> None:
        wanted: dict[str, bytes] = {}
        if "network" not in self.run["not_stored"]:
            wanted["network.json"] = json_bytes(network_json(account.graph))
            wanted["network.safetensors"] = _network_bytes(account)
            if "samples" not in self.run["not_stored"]:
                wanted |= {
                    f"samples/{split}.safetensors": _sample_bytes(batches) for split, batches in _splits(account)
                }
        for name, content in wanted.items():
            if name not in self.run["files"]:
                self._file(name, content)
        self._write_run()

    def _file(self, name: str, content: bytes) -> None:
        write_atomically(self.directory / name, content)
        self.run["files"][name] = hashlib.sha256(content).hexdigest()

    def _write_run(self) -> None:
        self.run.pop("digest", None)
        self.run["digest"] = digest_json(self.run)
        write_atomically(self.directory / "run.json", json_bytes(self.run))


def _network_bytes(account: Account) -> bytes:
    return tensor_bytes({name: t.to(account.dtypes.get(name, t.dtype)) for name, t in account.raw.items()})


def _splits(account: Account) -> list[tuple[str, Batches]]:
    pairs = zip(_SPLITS, (account.batches, account.held), strict=True)
    return [(split, batches) for split, batches in pairs if batches is not None]


def _not_stored(account: Account) -> dict[str, str]:
    """Return what `verify` will lack, and why."""
    found = {}
    try:
        to_json(account.graph.program)
    except UnsupportedError as error:
        found["network"] = str(error)
    for split, batches in _splits(account):
        if batches.spooled:
            found["samples"] = f"the {split} samples are {batches.nbytes / 2**20:.0f} MiB, more than is held in memory."
    return found


def _sample_bytes(batches: Batches) -> bytes:
    whole = batches.select(torch.arange(batches.rows))
    tensors = {f"inputs.{k}": tensor for k, tensor in enumerate(whole.inputs)}
    tensors |= {f"kwargs.{key}": tensor for key, tensor in whole.kwargs.items()}
    labels = batches.labels()
    if labels is not None:
        tensors["labels"] = labels
    return tensor_bytes(tensors, {"batches": [len(batch) for batch in batches]})


def network_json(graph: LayerGraph) -> dict[str, Any]:
    """Return a network's forward and layers as JSON values."""
    return {
        "program": to_json(graph.program),
        "folds": [asdict(fold) for fold in graph.folds],
        "layers": [asdict(layer) for layer in graph.layers],
        "unsupported": [list(pair) for pair in graph.unsupported],
    }


def read_account(path: Path, run: Mapping[str, Any]) -> Account:
    """Return the dense network and the samples of a run directory.

    Raises
    ------
    RunError
        A file is missing, truncated, or of something else.
    """
    graph, raw, dtypes = _read_network(path, "network")
    limit = run["memory_limit"]
    splits = [
        _read_samples(path / f"samples/{split}.safetensors", limit) if split in run["data"] else None
        for split in _SPLITS
    ]
    if splits[0] is None:
        raise RunError(f"{path / 'run.json'} names no calibration samples, so it is not of a run directory.")
    return Account(graph, raw, dtypes, splits[0], splits[1], limit)


def read_first(path: Path, run: Mapping[str, Any], account: Account) -> Account | None:
    """Return the network that the first of several runs started from, on this run's samples; None if this was it.

    Raises
    ------
    RunError
        A file is missing, truncated, or of something else.
    """
    if "first.json" not in run["files"]:
        return None
    return Account(*_read_network(path, "first"), account.batches, account.held, account.memory_limit)


def _read_network(path: Path, name: str) -> tuple[LayerGraph, dict[str, Tensor], dict[str, torch.dtype]]:
    stored = read_json(path / f"{name}.json")
    tensors, _ = read_tensors(path / f"{name}.safetensors")
    graph = LayerGraph(
        from_json(stored["program"]),
        tuple(Fold(**fold) for fold in stored["folds"]),
        tuple(_layer_spec(layer) for layer in stored["layers"]),
        tuple((name, why) for name, why in stored["unsupported"]),
    )
    raw = {name: tensor.double() if tensor.is_floating_point() else tensor for name, tensor in tensors.items()}
    return graph, raw, {name: tensor.dtype for name, tensor in tensors.items()}


def _layer_spec(stored: Mapping[str, Any]) -> LayerSpec:
    window = stored["window"]
    if window is not None:
        sides = tuple((before, after) for before, after in window["padding"])
        window = Window(tuple(window["kernel"]), tuple(window["stride"]), tuple(window["dilation"]), sides)
    return LayerSpec(**{**stored, "shape": tuple(stored["shape"]), "window": window})


def _read_samples(path: Path, memory_limit: int) -> Batches:
    tensors, about = read_tensors(path)
    inputs = tuple(tensors[f"inputs.{k}"] for k in range(sum(key.startswith("inputs.") for key in tensors)))
    kwargs = {key.removeprefix("kwargs."): tensor for key, tensor in tensors.items() if key.startswith("kwargs.")}
    if not inputs and not kwargs:
        raise RunError(f"{path} holds no inputs, so it is not of a run directory.")
    batches, start = [], 0
    # as they came: what a layer's rows are numbered by
    for size in about["batches"]:
        cut = slice(start, start + size)
        labels = tensors["labels"][cut] if "labels" in tensors else None
        batches.append(Batch(tuple(t[cut] for t in inputs), {key: t[cut] for key, t in kwargs.items()}, labels))
        start += size
    return read_batches(batches, path.stem, memory_limit=memory_limit)


def require_free(directory: str | Path) -> None:
    """Refuse a directory that holds something: nothing of anybody's is ever written over.

    Raises
    ------
    RunError
        It does, or cannot be looked into.
    """
    if not is_free(Path(directory)):
        raise RunError(f"{directory} already holds something: choose another directory, or resume the run in it.")


def require_same(
    directory: str | Path, run: Mapping[str, Any], settings: Mapping[str, Any], but: tuple[str, ...] = ()
) -> None:
    """Refuse a run that was started with other settings, model, data or schema; `but` are not known yet.

    Raises
    ------
    RunError
        It was, and the text names in what it differs.
    """
    wanted = json.loads(json.dumps(dict(settings)))
    differs = [key for key in _IDENTITY if key not in but and run.get(key) != wanted[key]]
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


def is_free(path: Path) -> bool:
    """Whether nothing stands there but folders: what a run leaves that was killed before it wrote its first file."""
    try:
        if path.exists() and not path.is_dir():
            raise RunError(f"{path} is a file: choose a directory.")
        # a file that was being written when the run was killed is nobody's
        return all(inside.is_dir() or inside.name.endswith(".part") for inside in path.rglob("*"))
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
