"""What a run gives, in memory or read back from its directory."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from nettrim.errors import NetTrimError, ProblemError, RunError, UnknownNameError
from nettrim.network.edit import frozen_copy
from nettrim.network.modular import ProgramModule
from nettrim.network.structure import Structure
from nettrim.pipeline.account import Account, Standing
from nettrim.pipeline.files import read_json, read_tensors
from nettrim.pipeline.finish import finished_layers
from nettrim.pipeline.records import Chain, LayerEvidence, LayerRecord, Ledger, Stage
from nettrim.pipeline.store import SCHEMA, RunStore, layer_file, read_account, read_first, read_layer


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
        The module's weights, where `model` runs steps instead of the class's forward: those have batch norms folded.
    structure : Structure or None
        Which channels and units `model` is without; None where it has all.
    first : Account or None
        Of the network that the first of several runs started from; None where this run was the first.
    about : dict
        How a structure was chosen, as JSON values: "probes" of a method that looked at features.
    """

    model: nn.Module
    ledger: Ledger
    masks: dict[str, Tensor]
    settings: dict[str, Any]
    layers: list[LayerEvidence]
    final: list[LayerEvidence]
    account: Account | None
    stored: dict[str, Tensor] | None = None
    structure: Structure | None = None
    first: Account | None = None
    about: dict[str, Any] = field(default_factory=dict)

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
        self.write_end(store)

    def write_end(self, store: RunStore) -> None:
        """Write what is known only at the end into a run directory that has the layers."""
        state = self.model.state_dict() if self.stored is None else self.stored
        structure = None if self.structure is None else self.structure.as_dict() | self.about
        store.finish(state, self.masks, self.ledger, structure, self.first)


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
    about = read_json(path / "structure.json") if "structure.json" in run["files"] else None
    structure = None if about is None else Structure.of_dict(about)
    if model is not None:
        network = frozen_copy(model)
        if structure is not None and account is not None:
            network = _smaller(model, model_standing(path, account))
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
        network = model_standing(path, account).steps()
    ledger = _ledger(read_json(path / "ledger.json"))
    stored = state if isinstance(network, ProgramModule) else None
    how = {key: value for key, value in (about or {}).items() if key not in ("channels", "removed")}
    first = None if account is None else read_first(path, run, account)
    return PruneResult(network, ledger, masks, run, layers, final, account, stored, structure, first, how)


def _smaller(model: nn.Module, standing: Standing) -> nn.Module:
    """Return a copy of a dense module's class without what is gone."""
    assert standing.slimming is not None
    try:
        found = standing.slimming.module(model, standing.changed, standing.state, standing.account.batches.first(1))
    except (ProblemError, UnknownNameError) as error:
        raise RunError(f"model is not of the dense network that was pruned: {error}") from error
    if found is None:
        raise RunError("model is of a class that cannot be made smaller: load the result without it.")
    return found


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
    slimming = None
    if (path / "structure.json").is_file():
        slimming = account.slimming(Structure.of_dict(read_json(path / "structure.json")))
    absent = set() if slimming is None else slimming.absent
    folded = {fold.folded_bias for fold in account.graph.folds}
    needed = [name for spec in account.graph.layers for name in (spec.weight, spec.bias_name) if name not in folded]
    needed += [
        name for fold in account.graph.folds for name in (fold.bias, fold.mean, fold.variance, fold.scale, fold.shift)
    ]
    # other entries may be absent: constants of the forward and buffers that a module does not save
    missing = [name for name in needed if name is not None and name not in state and name not in absent]
    if missing:
        raise KeyError(f"model.safetensors has no {', '.join(missing)}")
    return account.of_state(state, slimming)


def _chain(stored: dict[str, Any]) -> Chain:
    return Chain(**(stored | {"stages": tuple(Stage(**stage) for stage in stored["stages"])}))


def _ledger(stored: dict[str, Any]) -> Ledger:
    try:
        records = tuple(LayerRecord(**record) for record in stored["records"])
        rest = {key: value for key, value in stored.items() if key not in ("schema", "records", "before", "chain")}
        before = None if stored["before"] is None else _ledger(stored["before"])
        chain = None if stored["chain"] is None else _chain(stored["chain"])
        return Ledger(records=records, before=before, chain=chain, **rest)
    except (KeyError, TypeError) as error:
        raise RunError(f"ledger.json does not hold a ledger of this version: {error}.") from error
