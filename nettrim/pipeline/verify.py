"""Hold every stored figure of a run directory against one that is computed anew.

`verify` puts the stored layers into the stored network, runs both on the stored samples in float64, rebuilds the ledger
from that, and compares. Nothing is solved, and no figure of the ledger is used to make another.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from nettrim.errors import ProblemError, RunError
from nettrim.pipeline.account import Account, Standing
from nettrim.pipeline.chain import link, stage
from nettrim.pipeline.files import digest_json, digest_tensors, read_json, read_tensors
from nettrim.pipeline.finish import finished_layers, overstepped
from nettrim.pipeline.layers import replay
from nettrim.pipeline.records import LayerEvidence, Ledger, Stage
from nettrim.pipeline.result import model_standing, progress_of, read_run, run_layer, run_of_this_version
from nettrim.pipeline.store import SCHEMA, layer_file, read_account, read_first

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
    with run_of_this_version(path):
        return _verify(path)


def _verify(path: Path) -> Verification:
    run = read_run(path)
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
        return Verification(checked, tuple(failures), progress_of(run))
    layers = [run_layer(path, spec["name"]) for spec in run["layers"]]
    checks = [_check_amounts(run, layers)]
    if run["not_stored"]:
        why = "; ".join(f"{what}: {reason}" for what, reason in run["not_stored"].items())
        state = f"finished, and only its files and amounts could be checked, because not all was stored ({why})"
    else:
        state = "finished"
        stored = read_json(path / "ledger.json")
        try:
            account = read_account(path, run)
            done, final = _final(path, run, layers, account)
            rebuilt = _rebuild(path, run, stored, layers, done, final, account)
        except (ProblemError, KeyError, RuntimeError) as error:
            failures.append(f"the stored layers do not fit together: {str(error).splitlines()[0]}")
            return Verification(checked, tuple(failures), "finished")
        # errors are differences of outputs, so they carry the rounding of outputs
        rounding = 1e-10 * max([rebuilt.output_norm, *(record.target_norm for record in rebuilt.records)])
        checks += [
            _compare(_plain({"schema": SCHEMA} | rebuilt.as_dict()), stored, "ledger.json", rounding),
            _check_model(path, done, final, account),
            _check_finish(run, stored, layers, final),
            _check_promises(rebuilt),
        ]
    return Verification(
        checked + sum(count for count, _ in checks),
        (*failures, *(sentence for _, wrong in checks for sentence in wrong)),
        state,
    )


def _rebuild(
    path: Path,
    run: dict[str, Any],
    stored: dict[str, Any],
    layers: list[LayerEvidence],
    done: Standing,
    final: list[LayerEvidence],
    account: Account,
) -> Ledger:
    """Put the stored layers into the stored network, and make the ledger of that; nothing is solved."""
    standing, proofs = replay(account, layers, run["schedule"], run["rows"], run["seed"], done.slimming)
    ledger = account.ledger(run["method"], run["schedule"], standing, layers, proofs)
    if run["finish"] is not None:
        # how it was trained on is taken over, not recomputed
        ledger = account.ledger(run["method"], run["schedule"], done, final, {}, stored["finish"], ledger)
    first = read_first(path, run, account)
    if first is None:
        return ledger
    # earlier runs have directories of their own; that each started where the one before it ended, their digests say
    *earlier, last = (Stage(**said) for said in stored["chain"]["stages"])
    state, _ = read_tensors(path / "model.safetensors")
    own = stage(ledger, last.before, digest_tensors(state), account)
    return replace(ledger, chain=link(first, [*earlier, own], account, done))


def _final(
    path: Path, run: dict[str, Any], layers: list[LayerEvidence], account: Account
) -> tuple[Standing, list[LayerEvidence]]:
    """Return the network that came out, and its layers: of one that was trained on, the weights are the model's."""
    standing = model_standing(path, account)
    return standing, layers if run["finish"] is None else finished_layers(layers, standing)


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


def _check_model(
    path: Path, standing: Standing, layers: list[LayerEvidence], account: Account
) -> tuple[int, list[str]]:
    """Hold model and masks against the layers' files."""
    masks, _ = read_tensors(path / "masks.safetensors")
    wanted = account.masks(layers, standing.slimming)
    wrong = [
        f"masks.safetensors: {name} is not where the weight is kept."
        for name in sorted({*masks, *wanted})
        if name not in masks or name not in wanted or not torch.equal(masks[name], wanted[name])
    ]
    for layer in layers:
        spec = account.graph.layer(layer.name)
        for key, kept, given in zip(("weight", "bias"), standing.arrays(spec), (layer.weight, layer.bias), strict=True):
            # folded in float64, on another processor perhaps
            if (kept is None) != (given is None) or (
                kept is not None and given is not None and not torch.allclose(kept, given, rtol=1e-12, atol=0)
            ):
                wrong.append(f"model.safetensors: {key} of {layer.name} is not the one in {layer_file(layer.name)}.")
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
    # what is promised of a sample of the rows does not bound what was measured on all
    pairs = [
        ("measured", f"{r.name}: promised", r.measured, r.promised)
        for r in ledger.records
        if r.promised is not None and r.rows == r.total_rows
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
