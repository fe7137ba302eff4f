"""What a run gives, in memory or read back from its directory."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nettrim.errors import NetTrimError, RunError
from nettrim.network.edit import frozen_copy
from nettrim.network.modular import ProgramModule
from nettrim.pipeline.account import Account, Standing
from nettrim.pipeline.files import read_json, read_tensors
from nettrim.pipeline.finish import finished_layers
from nettrim.pipeline.records import LayerEvidence, LayerRecord, Ledger
from nettrim.pipeline.store import SCHEMA, RunStore, layer_file, read_account, read_layer


@dataclass(frozen=True, eq=False)
class PruneResult:
    """What `prune` returns.

    Attributes
    ----------
    model : nn.Module
        A new module with exact zeros; the dense model is as it was.
    ledger : Ledger
        `records` (one per layer), `bound` and `measured` at the output, `as_dict()`.
    masks : dict of str to bool Tensor, of the weight's shape
        True = kept.
    settings : dict
        Everything that was asked for, and where it ran.
    layers : list of LayerEvidence
        What pruning gave, layer by layer.
    final : list of LayerEvidence
        The layers of `model`: the same, but for a network that was trained on.
    account : Account or None
        The traced network and its samples; None of a run that was read back and had them not stored.
    stored : dict of str to Tensor, or None
        The module's weights as they were read, where `model` runs the stored steps: these have batch norms folded.
    """

    model: nn.Module
    ledger: Ledger
    masks: dict[str, Tensor]
    settings: dict[str, Any]
    layers: list[LayerEvidence]
    final: list[LayerEvidence]
    account: Account | None
    stored: dict[str, Tensor] | None = None

    def save(self, directory: str | Path) -> None:
        """Write a run directory: weights, masks, evidence, ledger, settings. Files appear whole or not at all.

        Raises
        ------
        RunError
            The directory already holds something, or cannot be written.
        """
        if self.account is None:
            raise RunError("this result was read back from a run that did not store its network: copy its directory.")
        store = RunStore.create(directory, self.settings, self.account)
        for layer in self.layers:
            store.write_layer(layer)
        state = self.model.state_dict() if self.stored is None else self.stored
        store.finish(state, self.final, self.ledger)


def load_result(directory: str | Path, model: nn.Module | None = None) -> PruneResult:
    """Read a finished run directory.

    Parameters
    ----------
    directory : path
    model : nn.Module, optional
        A module of the pruned network's class, into a copy of which the weights are loaded. Without it, the
        result's model runs the stored steps of the forward and computes the same: no class is ever stored.

    Raises
    ------
    RunError
        The run is not finished, a file cannot be read, or `model` does not take the weights.
    """
    path = Path(directory)
    with run_of_this_version(path):
        return _load(path, model)


def _load(path: Path, model: nn.Module | None) -> PruneResult:
    run = read_run(path)
    if run["state"] != "finished":
        raise RunError(f"{path} holds an unfinished run ({progress_of(run)}): go on with it by resume=True.")
    layers = [run_layer(path, spec["name"]) for spec in run["layers"]]
    state, _ = read_tensors(path / "model.safetensors")
    masks, _ = read_tensors(path / "masks.safetensors")
    account = None if run["not_stored"] else read_account(path, run)
    final = layers
    if run["finish"] is not None and account is not None:
        final = finished_layers(layers, model_standing(path, account))
    if model is not None:
        network = frozen_copy(model)
        try:
            network.load_state_dict(state)
        except RuntimeError as error:
            raise RunError(
                f"model does not take the weights in {path}: {str(error).splitlines()[-1].strip()}"
            ) from error
    elif account is None:
        why = "; ".join(run["not_stored"].values())
        raise RunError(f"{path} does not hold the network's forward ({why}): pass model, a module of its class.")
    else:
        program, standing = account.graph.program, model_standing(path, account)
        read = dict.fromkeys(name for step in program.steps for name in step.held)
        # a folded batch norm has the dtype of the weight that it is folded into
        kinds = {layer.bias_name: account.dtypes[layer.weight] for layer in account.graph.layers} | account.dtypes
        network = ProgramModule(program, {name: standing.state[name].to(kinds[name]) for name in read})
    ledger = _ledger(read_json(path / "ledger.json"))
    return PruneResult(network, ledger, masks, run, layers, final, account, state if model is None else None)


@contextmanager
def run_of_this_version(path: Path) -> Iterator[None]:
    """Say of JSON of the wrong shape what it is, whatever it makes the code stumble on."""
    try:
        yield
    except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
        if isinstance(error, NetTrimError):
            raise
        raise RunError(
            f"{path} does not hold a run of this version: {type(error).__name__}, {str(error).splitlines()[0]}"
        ) from error


def read_run(path: Path) -> dict[str, Any]:
    """Read the settings of a run directory.

    Raises
    ------
    RunError
        They cannot be read, or are of another schema.
    """
    run = read_json(path / "run.json")
    missing = [
        key
        for key in ("schema", "state", "layers", "files", "not_stored", "digest", "method", "schedule")
        if key not in run
    ]
    if missing:
        raise RunError(f"{path / 'run.json'} has no {', '.join(missing)}, so it is not of a run directory.")
    if run["schema"] != SCHEMA:
        raise RunError(
            f"{path} is of schema {run['schema']}, this version reads {SCHEMA}: use the version that wrote it."
        )
    return run


def progress_of(run: dict[str, Any]) -> str:
    """Say how far a run got."""
    done = [name for name in run["files"] if name.startswith("layers/")]
    return f"{len(done)} of {len(run['layers'])} layers finished"


def run_layer(path: Path, name: str) -> LayerEvidence:
    """Read one layer of a run directory.

    Raises
    ------
    RunError
        It cannot be read, or is of another run or layer.
    """
    layer = read_layer(path / layer_file(name))
    if layer.name != name:
        raise RunError(f"{path / layer_file(name)} holds layer {layer.name!r}: it is of another run or layer.")
    return layer


def model_standing(path: Path, account: Account) -> Standing:
    """Return the stored model as a state of the stored network.

    Raises
    ------
    KeyError
        A layer's weight or bias, or its batch norm, is missing in the stored model.
    """
    state, _ = read_tensors(path / "model.safetensors")
    folded = {fold.folded_bias for fold in account.graph.folds}
    needed = [name for spec in account.graph.layers for name in (spec.weight, spec.bias_name) if name not in folded]
    needed += [
        name for fold in account.graph.folds for name in (fold.bias, fold.mean, fold.variance, fold.scale, fold.shift)
    ]
    # other entries may be absent: constants of the forward and buffers that a module does not save
    missing = [name for name in needed if name is not None and name not in state]
    if missing:
        raise KeyError(f"model.safetensors has no {', '.join(missing)}")
    changed = {}
    for name, tensor in account.raw.items():
        if name in account.dtypes and name in state and not torch.equal(state[name].to(tensor.dtype), tensor):
            changed[name] = state[name].to(tensor.dtype)
    standing = account.standing()
    standing.set_raw(changed)
    return standing


def _ledger(stored: dict[str, Any]) -> Ledger:
    try:
        records = tuple(LayerRecord(**record) for record in stored["records"])
        rest = {key: value for key, value in stored.items() if key not in ("schema", "records", "before")}
        before = None if stored["before"] is None else _ledger(stored["before"])
        return Ledger(records=records, before=before, **rest)
    except (KeyError, TypeError) as error:
        raise RunError(f"ledger.json does not hold a ledger of this version: {error}.") from error
