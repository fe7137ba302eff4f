"""Read a run directory back, and hold every stored figure against one that is computed anew.

`verify` replays the chain in float64 from the stored rows and weights, rebuilds the ledger from that, and
compares. Nothing is solved, and no figure of the ledger is used to make another.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nettrim.errors import NetTrimError, ProblemError, RunError
from nettrim.network.edit import frozen_copy
from nettrim.pipeline.finish import overstepped, with_weights
from nettrim.pipeline.ledger import (
    Activations,
    LayerEvidence,
    LayerRecord,
    Ledger,
    build_ledger,
)
from nettrim.pipeline.prune import PruneResult
from nettrim.pipeline.store import (
    SCHEMA,
    Samples,
    digest_json,
    layer_file,
    read_json,
    read_layer,
    read_samples,
    read_tensors,
)

_ERRORS = ("measured", "_error", "_change", "promised", "bound", "drift", "ceiling_norm", "radius", "asked")
_CLOSE = 1e-6  # relative; figures are float64 sums over up to 1e8 terms, on another processor perhaps


@dataclass(frozen=True)
class Verification:
    """What `verify` found.

    Attributes
    ----------
    checked : int
        Figures that were recomputed and files whose digests were taken.
    failures : tuple of str
        One sentence for each thing that does not hold; empty where everything does.
    state : str
        "finished", or how far the run got.
    """

    checked: int
    failures: tuple[str, ...]
    state: str

    @property
    def holds(self) -> bool:
        """Whether everything held."""
        return not self.failures


def verify(directory: str | Path) -> Verification:
    """Recompute every figure of a run directory from its stored weights, multipliers and samples.

    Raises
    ------
    RunError
        A file is missing, truncated, or not of a run: nothing can be said about what cannot be read.
    """
    path = Path(directory)
    with _run_of_this_version(path):
        return _verify(path)


def _verify(path: Path) -> Verification:
    run = _read_run(path)
    failures: list[str] = []
    checked = 1
    body = {key: value for key, value in run.items() if key != "digest"}
    if digest_json(body) != run["digest"]:
        failures.append("run.json: its own digest does not hold, so something in it was changed.")
    for name, digest in run["files"].items():
        checked += 1
        try:
            found = hashlib.sha256((path / name).read_bytes()).hexdigest()
        except OSError as error:
            raise RunError(f"{path / name} cannot be read: {error.strerror or error}.") from error
        if found != digest:
            failures.append(f"{name}: it is not the file that the run wrote (its SHA-256 differs).")
    known = {*run["files"], "run.json", "report.html"}
    for file in sorted(p for p in path.rglob("*") if p.is_file()):
        if file.relative_to(path).as_posix() not in known:
            failures.append(f"{file.relative_to(path).as_posix()}: the run did not write this file.")
    if run["state"] != "finished":
        return Verification(checked, tuple(failures), _progress(path, run))
    stored = read_json(path / "ledger.json")
    layers = [_layer(path, spec["name"]) for spec in run["chain"]]
    try:
        final = _final(path, run, layers)
        rebuilt = _rebuild(path, run, layers, final)
    except (ProblemError, KeyError, RuntimeError) as error:
        failures.append(f"the stored layers do not fit together: {str(error).splitlines()[0]}")
        return Verification(checked, tuple(failures), "finished")
    # errors are differences of outputs, so they carry the rounding of outputs
    rounding = 1e-10 * max([rebuilt.output_norm, *(record.target_norm for record in rebuilt.records)])
    checks = [
        _compare(_plain({"schema": SCHEMA} | rebuilt.as_dict()), stored, "ledger.json", rounding),
        _check_model(path, final),
        _check_finish(run, stored, layers, final),
        _check_amounts(run, layers),
        _check_promises(rebuilt),
    ]
    return Verification(
        checked + sum(count for count, _ in checks),
        (*failures, *(sentence for _, wrong in checks for sentence in wrong)),
        "finished",
    )


def load_result(directory: str | Path, model: nn.Module | None = None) -> PruneResult:
    """Read a finished run directory.

    Parameters
    ----------
    directory : path
    model : nn.Module, optional
        A module of the pruned network's class, into a copy of which the weights are loaded. Without it, the
        result's model is an `nn.Sequential` that computes the same: no class is ever stored.

    Raises
    ------
    RunError
        The run is not finished, a file cannot be read, or `model` does not take the weights.
    """
    path = Path(directory)
    with _run_of_this_version(path):
        return _load(path, model)


def _load(path: Path, model: nn.Module | None) -> PruneResult:
    run = _read_run(path)
    if run["state"] != "finished":
        raise RunError(f"{path} holds an unfinished run ({_progress(path, run)}): go on with it by resume=True.")
    layers = [_layer(path, spec["name"]) for spec in run["chain"]]
    state, _ = read_tensors(path / "model.safetensors")
    masks, _ = read_tensors(path / "masks.safetensors")
    if model is None:
        network: nn.Module = _chain_module(_final(path, run, layers))
    else:
        network = frozen_copy(model)
        try:
            network.load_state_dict(state)
        except RuntimeError as error:
            raise RunError(
                f"model does not take the weights in {path}: {str(error).splitlines()[-1].strip()}"
            ) from error
    calibration, held_out = _samples(path, run)
    ledger, final = _ledger(read_json(path / "ledger.json")), _final(path, run, layers)
    return PruneResult(network, ledger, masks, run, layers, final, calibration, held_out)


@contextmanager
def _run_of_this_version(path: Path) -> Iterator[None]:
    """Say of JSON of the wrong shape what it is, whatever it makes the code stumble on."""
    try:
        yield
    except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
        if isinstance(error, NetTrimError):
            raise
        raise RunError(
            f"{path} does not hold a run of this version: {type(error).__name__}, {str(error).splitlines()[0]}"
        ) from error


def _read_run(path: Path) -> dict[str, Any]:
    run = read_json(path / "run.json")
    missing = [key for key in ("schema", "state", "chain", "files", "digest", "method", "schedule") if key not in run]
    if missing:
        raise RunError(f"{path / 'run.json'} has no {', '.join(missing)}, so it is not of a run directory.")
    if run["schema"] != SCHEMA:
        raise RunError(
            f"{path} is of schema {run['schema']}, this version reads {SCHEMA}: use the version that wrote it."
        )
    return run


def _progress(path: Path, run: dict[str, Any]) -> str:
    done = [name for name in run["files"] if name.startswith("layers/")]
    return f"{len(done)} of {len(run['chain'])} layers finished"


def _layer(path: Path, name: str) -> LayerEvidence:
    layer = read_layer(path / layer_file(name))
    if layer.name != name:
        raise RunError(f"{path / layer_file(name)} holds layer {layer.name!r}: it is of another run or layer.")
    return layer


def _samples(path: Path, run: dict[str, Any]) -> tuple[Samples, Samples | None]:
    calibration = read_samples(path / "samples/calibration.safetensors")
    held = "samples/held-out.safetensors"
    return calibration, read_samples(path / held) if held in run["files"] else None


def _rebuild(path: Path, run: dict[str, Any], layers: list[LayerEvidence], final: list[LayerEvidence]) -> Ledger:
    ledger = _account(path, run, layers, None, None)
    if run["finish"] is None:
        return ledger
    return _account(path, run, final, read_json(path / "ledger.json")["finish"], ledger)


def _account(
    path: Path,
    run: dict[str, Any],
    layers: list[LayerEvidence],
    finish: dict[str, Any] | None,
    before: Ledger | None,
) -> Ledger:
    """Replay the chain with these layers and make its ledger; how it was finished is taken over, not recomputed."""
    calibration, held = _samples(path, run)
    dense = _replay(layers, calibration, 0)
    count = sum(layer.pruned for layer in layers)
    # the outputs alone are kept of the networks in between
    ladder = [_output(layers, _replay(layers, calibration, k)) for k in range(count + 1)]
    held_out = None
    if held is not None:
        held_out = (_replay(layers, held, 0), _replay(layers, held, count), held.labels)
    return build_ledger(
        run["method"],
        run["schedule"],
        layers,
        dense,
        _replay(layers, calibration, count),
        ladder,
        calibration.labels,
        held_out,
        finish,
        before,
    )


def _final(path: Path, run: dict[str, Any], layers: list[LayerEvidence]) -> list[LayerEvidence]:
    """Return the layers of the network that came out: of one that was trained on, the weights are the model's."""
    if run["finish"] is None:
        return layers
    state, _ = read_tensors(path / "model.safetensors")
    return [with_weights(layer, state[f"{layer.name}.weight"], state.get(f"{layer.name}.bias")) for layer in layers]


def _check_finish(
    run: dict[str, Any], stored: dict[str, Any], layers: list[LayerEvidence], final: list[LayerEvidence]
) -> tuple[int, list[str]]:
    """Hold how the ledger says that the network was trained on, and what that left, against what was asked for."""
    if run["finish"] is None:
        return 0, []
    if stored["finish"] is None:
        return 1, ["ledger.json: finish is missing, and run.json asked for it."]
    wrong = [
        f"ledger.json: finish.{key} is stored as {stored['finish'][key]!r}, and run.json asked for {asked!r}."
        for key, asked in (("settings", run["finish"]), ("targets", run["targets"]))
        if stored["finish"][key] != asked
    ]
    wrong += [f"model.safetensors: {sentence}." for sentence in overstepped(layers, final, run["targets"])]
    return 2 + sum(layer.pruned for layer in layers), wrong


def _replay(layers: list[LayerEvidence], samples: Samples, pruned: int) -> Activations:
    """Run the chain with its first `pruned` pruned layers in place and the rest dense."""
    inputs, outputs = [], []
    x = samples.rows
    for layer in layers:
        use = layer.pruned and pruned > 0
        pruned -= layer.pruned
        weight, bias = (layer.weight, layer.bias) if use else (layer.dense_weight, layer.dense_bias)
        z = x @ weight.double().T
        if bias is not None:
            z = z + bias.double()
        inputs.append(x)
        outputs.append(z)
        x = z.clamp(min=0) if layer.relu else z
    return Activations(samples.name, inputs, outputs)


def _output(layers: list[LayerEvidence], activations: Activations) -> Tensor:
    last = activations.outputs[-1]
    return last.clamp(min=0) if layers[-1].relu else last


def _check_model(path: Path, layers: list[LayerEvidence]) -> tuple[int, list[str]]:
    """Hold model and masks against the layers' files."""
    state, _ = read_tensors(path / "model.safetensors")
    masks, _ = read_tensors(path / "masks.safetensors")
    wrong = []
    for layer in layers:
        for key, tensor in (("weight", layer.weight), ("bias", layer.bias)):
            name = f"{layer.name}.{key}"
            if tensor is not None and (name not in state or not torch.equal(state[name], tensor)):
                wrong.append(f"model.safetensors: {name} is not the one in {layer_file(layer.name)}.")
        if layer.pruned and (layer.name not in masks or not torch.equal(masks[layer.name], layer.weight != 0)):
            wrong.append(f"masks.safetensors: {layer.name} is not where the weight is kept.")
    return 3 * len(layers), wrong


def _check_amounts(run: dict[str, Any], layers: list[LayerEvidence]) -> tuple[int, list[str]]:
    """Hold what each layer was solved for against what was asked for."""
    ((kind, values),) = run["amount"].items()
    wrong = [
        f"{layer_file(name)}: it was solved for {kind}={layer.facts.get(kind)}, and run.json asked for {values[name]}."
        for layer in layers
        for name in [layer.name]
        if layer.pruned and layer.facts.get(kind) != values[name]
    ]
    return len(values), wrong


def _check_promises(ledger: Ledger) -> tuple[int, list[str]]:
    """Hold what was measured against what was promised and bounded."""
    if ledger.before is not None:
        count, said = _check_promises(ledger.before)
        own, wrong = _check_promises(replace(ledger, before=None))
        return count + own, said + wrong
    pairs = [
        ("measured", f"{r.name}: promised", r.measured, r.promised) for r in ledger.records if r.promised is not None
    ]
    pairs += [
        ("the network's error", f"{r.name}: {name}", r.network_error, bound)
        for r in ledger.records
        for name, bound in r.bounds.items()
    ]
    pairs += [("measured", f"the output: {name}", ledger.measured, bound) for name, bound in ledger.bounds.items()]
    wrong = [
        f"{what} {error!r} exceeds {limit!r} ({place})."
        for what, place, error, limit in pairs
        if error > limit * (1 + 1e-9)
    ]
    return len(pairs), wrong


def _compare(new: Any, stored: Any, where: str, rounding: float) -> tuple[int, list[str]]:
    """Compare two JSON values leaf by leaf; numbers to a relative 1e-6 of the larger, gaps to 1e-6 of one, errors to
    the rounding of outputs.
    """
    if isinstance(new, dict) and isinstance(stored, dict):
        count, wrong = 0, [f"{where}: {key} is missing or unknown." for key in sorted(set(new) ^ set(stored))]
        for key in new.keys() & stored.keys():
            below = f"{where}: {key}" if where.endswith(".json") else f"{where}.{key}"
            c, w = _compare(new[key], stored[key], below, rounding)
            count, wrong = count + c, wrong + w
        return count, wrong
    if isinstance(new, list) and isinstance(stored, list) and len(new) == len(stored):
        count, wrong = 0, []
        for i, (a, b) in enumerate(zip(new, stored, strict=True)):
            label = a["name"] if isinstance(a, dict) and "name" in a else str(i)
            c, w = _compare(a, b, f"{where}[{label}]", rounding)
            count, wrong = count + c, wrong + w
        return count, wrong
    numbers = all(isinstance(v, (int, float)) and not isinstance(v, bool) for v in (new, stored))
    if numbers and math.isclose(new, stored, rel_tol=_CLOSE, abs_tol=_CLOSE * _CLOSE):
        return 1, []
    # a gap is a difference of two nearly equal figures, so it carries their rounding
    if numbers and where.endswith(".gap") and abs(new - stored) <= _CLOSE:
        return 1, []
    if numbers and any(word in where for word in _ERRORS) and abs(new - stored) <= rounding:
        return 1, []
    if new == stored:
        return 1, []
    return 1, [f"{where} is stored as {stored!r}, and recomputed as {new!r}."]


def _plain(value: Any) -> Any:
    """Return what JSON would give back: tuples as lists."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value


def _ledger(stored: dict[str, Any]) -> Ledger:
    try:
        records = tuple(LayerRecord(**record) for record in stored["records"])
        rest = {key: value for key, value in stored.items() if key not in ("schema", "records", "before")}
        before = None if stored["before"] is None else _ledger(stored["before"])
        return Ledger(records=records, before=before, **rest)
    except (KeyError, TypeError) as error:
        raise RunError(f"ledger.json does not hold a ledger of this version: {error}.") from error


def _chain_module(layers: list[LayerEvidence]) -> nn.Sequential:
    modules: list[nn.Module] = [nn.Flatten()]
    for layer in layers:
        linear = nn.Linear(
            layer.weight.shape[1],
            layer.weight.shape[0],
            bias=layer.bias is not None,
            dtype=layer.weight.dtype,
        )
        named = {"weight": layer.weight, "bias": layer.bias}
        linear.load_state_dict({key: tensor for key, tensor in named.items() if tensor is not None})
        modules += [linear, nn.ReLU()] if layer.relu else [linear]
    return nn.Sequential(*modules).requires_grad_(False).eval()
