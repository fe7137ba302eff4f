"""`prune`: a whole network, layer by layer, each on the data that its schedule gives it, and the account of it all."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from nettrim.core.problem import check_seed
from nettrim.errors import ProblemError, UnsupportedError
from nettrim.methods import LayerResult, LayerTask, Method
from nettrim.methods.masks import Pattern
from nettrim.network.calibrate import Batch, Recorded, read_batches, record
from nettrim.network.edit import double_copy, frozen_copy, layer_arrays, write_layer
from nettrim.network.trace import LayerGraph, LayerSpec
from nettrim.pipeline.account import Account
from nettrim.pipeline.budget import Overall
from nettrim.pipeline.execute import check_executor, run_all
from nettrim.pipeline.finish import Finish, check_batches, run_finish
from nettrim.pipeline.ledger import LayerEvidence, Ledger
from nettrim.pipeline.plan import Plan
from nettrim.pipeline.store import RunStore, Samples, describe_run, require_free, require_same, started_run


@dataclass(frozen=True, eq=False)
class PruneResult:
    """What `prune` returns.

    Attributes
    ----------
    model : nn.Module
        A new module with exact zeros; the dense model is as it was.
    ledger : Ledger
        `records` (one per layer), `bound` and `measured` at the output, `as_dict()`.
    masks : dict of str to bool Tensor (M, N)
        True = kept.
    settings : dict
        Everything that was asked for, and where it ran.
    layers : list of LayerEvidence
        What pruning gave, layer by layer.
    final : list of LayerEvidence
        The layers of `model`: the same, but for a network that was trained on.
    calibration : Samples
        The rows of the first layer's inputs.
    held_out : Samples or None
    """

    model: nn.Module
    ledger: Ledger
    masks: dict[str, Tensor]
    settings: dict[str, Any]
    layers: list[LayerEvidence]
    final: list[LayerEvidence]
    calibration: Samples
    held_out: Samples | None

    def save(self, directory: str | Path) -> None:
        """Write a run directory: weights, masks, evidence, ledger, settings. Files appear whole or not at all.

        Raises
        ------
        RunError
            The directory already holds something, or cannot be written.
        """
        store = RunStore.create(directory, self.settings, self.calibration, self.held_out)
        for layer in self.layers:
            store.write_layer(layer)
        store.finish(self.model, self.final, self.ledger)


def prune(
    model: nn.Module,
    batches: Iterable[Any],
    method: str | Method = "net-trim",
    *,
    epsilon: float | Mapping[str, float] | None = None,
    sparsity: float | Pattern | Overall | Mapping[str, float | Pattern] | None = None,
    kept: int | Mapping[str, int] | None = None,
    lam: float | Mapping[str, float] | None = None,
    tolerance: float | Mapping[str, float] | None = None,
    schedule: str = "cascade",
    layers: str | list[str] | tuple[str, ...] = "all",
    ignore: str | list[str] | tuple[str, ...] = (),
    held_out: Iterable[Any] | None = None,
    finish: str | Finish | None = None,
    out_dir: str | Path | None = None,
    resume: bool = False,
    executor: int | None = None,
    progress: bool = True,
    seed: int = 0,
) -> PruneResult:
    """Prune a trained network without labels, and account for it.

    Parameters
    ----------
    model : nn.Module
        A chain of Linear, ReLU, Dropout, Flatten. Never changed.
    batches : iterable
        The calibration samples: tensors, (input, label) tuples or dicts. Labels only serve to report accuracy.
    method : str or Method
        A name in `METHODS`, or an object such as ``NetTrim(form="halfspace")``.
    epsilon, sparsity, kept, lam, tolerance : float or dict from layer name to float
        Exactly one: the relative radius of each layer; the fraction of zeros (or ``nettrim.Pattern(2, 4)`` for N:M
        sparsity, or ``nettrim.Overall(0.95)`` for the whole network, split over the layers by what the data say); the
        number of weights that stay in a layer; ``λ``; or L-OBS's tolerance of ``√L_q``. Biases are not counted.
    schedule : {"cascade", "parallel"}
        In cascade each layer is fitted on what the pruned layers before it give; the last radius is then the guarantee
        for the whole network. In parallel all layers are fitted on the dense network's inputs.
    layers, ignore : "all", name, glob, or several
        Which layers to prune, and which not.
    held_out : iterable, optional
        Samples that are only measured on.
    finish : {"distill", "fine-tune"} or object, optional
        Train on after pruning, pruned weights staying zero: without labels to the dense network's outputs, or with the
        labels in `batches`; or an object such as ``nettrim.Distill(epochs=40)``. With a number of weights, "distill"
        prunes to more first and chooses on the way which stay. The ledger says so, and has the pruned network's as
        `before`.
    out_dir : path, optional
        Write a run directory; a finished layer is on disk at once.
    resume : bool
        Go on with the run in `out_dir`, if it was started with the same model, data and settings.
    executor : int, optional
        Worker processes for the layers of a wave; None works in this process.
    progress : bool
        Show a bar on stderr, if that is a terminal.
    seed : int
        Of torch's generator during the run, for methods that draw. The global state is restored afterwards.

    Returns
    -------
    PruneResult

    Raises
    ------
    ProblemError, UnsupportedError, UnknownNameError
        Before any work: two amounts or none, a layer or method that is unknown or cannot be handled, NaN in the data.
    RunError
        `out_dir` holds another run, or cannot be written.
    """
    amounts = dict(epsilon=epsilon, sparsity=sparsity, kept=kept, lam=lam, tolerance=tolerance)
    plan = Plan.make(model, method, schedule, layers, ignore, amounts, finish)
    workers = check_executor(executor)
    calibration = read_batches(batches)
    held = None if held_out is None else read_batches(held_out, "held_out")
    if plan.finish is not None:
        check_batches(plan.finish, model, calibration)
    seed = check_seed(seed)
    if resume and out_dir is None:
        raise ProblemError("resume=True needs out_dir, the directory of the run to go on with.")
    if out_dir is not None and not resume:
        require_free(out_dir)
    # a caller may have switched gradients off; sensitivities and finishing need them
    with torch.inference_mode(False), torch.enable_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return _run(model, plan, calibration, held, out_dir, resume, workers, progress, seed)


def _run(
    model: nn.Module,
    plan: Plan,
    calibration: list[Batch],
    held: list[Batch] | None,
    out_dir: str | Path | None,
    resume: bool,
    workers: int,
    progress: bool,
    seed: int,
) -> PruneResult:
    account = Account.of(model, plan.graph, calibration, held, progress)
    _require_chain(plan.graph, account.clean)
    samples, held_samples = account.samples, account.held_samples
    started = started_run(out_dir) if resume and out_dir is not None and plan.overall else None
    if out_dir is not None and started is not None:
        # refused before the look ahead: the split that it found is taken over, and fits no other run
        split = ("amount", "targets")
        require_same(out_dir, started, describe_run(model, plan, seed), samples, held_samples, but=split)
    plan = plan.settle(account.dense, calibration, started, seed, progress)
    settings = describe_run(model, plan, seed)
    store = None
    found: dict[str, LayerEvidence] = {}
    if out_dir is not None:
        if resume:
            store, found = RunStore.resume(out_dir, settings, samples, held_samples)
        else:
            store = RunStore.create(out_dir, settings, samples, held_samples)

    pruned = frozen_copy(model)
    evidence = _prune_waves(plan, account, pruned, store, found, workers, progress)
    ledger = account.ledger(plan.method.name, plan.schedule, pruned, evidence)
    final = evidence
    if plan.finish is not None:
        pruned, final, said = run_finish(
            plan.finish, model, pruned, calibration, evidence, plan.targets, seed, progress
        )
        ledger = account.ledger(plan.method.name, plan.schedule, pruned, final, said, before=ledger)
    if store is not None:
        store.finish(pruned, final, ledger)
    masks = {layer.name: layer.weight != 0 for layer in final if layer.pruned}
    return PruneResult(pruned, ledger, masks, settings, evidence, final, samples, held_samples)


def _prune_waves(
    plan: Plan,
    account: Account,
    pruned: nn.Module,
    store: RunStore | None,
    found: dict[str, LayerEvidence],
    workers: int,
    progress: bool,
) -> list[LayerEvidence]:
    """Prune wave after wave, writing each layer into `pruned`; return the evidence of all layers in execution order."""
    clean = account.clean
    evidence: dict[str, LayerEvidence] = {}
    bar = tqdm(
        total=len(plan.graph.selected),
        desc=plan.method.name,
        unit="layer",
        leave=False,
        disable=None if progress else True,
    )
    for wave in plan.waves:
        tasks = []
        for name in wave:
            if name in found:
                evidence[name] = found[name]
                bar.update()
            else:
                inputs = clean[name].inputs
                if evidence and plan.schedule == "cascade":
                    inputs = record(double_copy(pruned), account.calibration, [name])[name].inputs
                tasks.append(_task(plan, account.dense, pruned, name, inputs, clean[name].outputs, not evidence))
        bar.set_postfix_str(", ".join(task.name for task in tasks))
        for task, result in zip(tasks, run_all(plan.method.prune_layer, tasks, workers), strict=True):
            evidence[task.name] = _evidence(task, result)
            if store is not None:
                store.write_layer(evidence[task.name])
            bar.update()
        for name in wave:
            write_layer(pruned, name, evidence[name].weight, evidence[name].bias)
    bar.close()
    for spec in plan.graph.layers:
        if spec.name not in evidence:
            evidence[spec.name] = _left_dense(pruned, spec)
            if store is not None:
                store.write_layer(evidence[spec.name])
    return [evidence[name] for name in plan.graph.names]


def _task(
    plan: Plan, dense: nn.Module, pruned: nn.Module, name: str, inputs: Tensor, outputs: Tensor, first: bool
) -> LayerTask:
    spec = plan.graph.layer(name)
    weight, bias = layer_arrays(dense, name)
    return LayerTask(
        name=name,
        relu=spec.relu,
        last=name == plan.graph.names[-1],
        clean=first or plan.schedule == "parallel",
        weight=weight,
        bias=bias,
        inputs=inputs,
        outputs=outputs,
        amount=plan.amount,
        value=plan.values[name],
        dtype=layer_arrays(pruned, name)[0].dtype,
        importance=None if name == plan.graph.names[-1] else plan.metrics.get(name),
    )


def _evidence(task: LayerTask, result: LayerResult) -> LayerEvidence:
    def stored(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor.to(task.dtype).contiguous()

    weight, dense_weight = stored(result.weight), stored(task.weight)
    assert weight is not None and dense_weight is not None
    return LayerEvidence(
        name=task.name,
        relu=task.relu,
        pruned=True,
        clean=task.clean,
        dense_weight=dense_weight,
        dense_bias=stored(task.bias),
        weight=weight,
        bias=stored(result.bias),
        multipliers=result.multipliers,
        facts=result.facts | {task.amount: str(task.pattern) if task.pattern else task.value},
        seconds=result.seconds,
    )


def _left_dense(model: nn.Module, spec: LayerSpec) -> LayerEvidence:
    weight, bias = layer_arrays(model, spec.name)
    return LayerEvidence(spec.name, spec.relu, False, False, weight, bias, weight, bias)


def _require_chain(graph: LayerGraph, recorded: dict[str, Recorded]) -> None:
    """Refuse a reshape between layers that changes what a sample is: errors would not compose row by row."""
    for before, after in pairwise(graph.layers):
        outputs, inputs = recorded[before.name].outputs, recorded[after.name].inputs
        if outputs.shape != inputs.shape:
            raise UnsupportedError(
                f"between layers {before.name!r} and {after.name!r} the activations change from "
                f"{tuple(outputs.shape)} to {tuple(inputs.shape)}: a reshape must stand before the first Linear layer."
            )
