"""From a layer's data to its tasks, from the results to its evidence, wave after wave.

A grouped convolution is as many layers as it has groups: each is a task of its own, and what is proven of them adds up.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from nettrim.methods import LayerResult, LayerTask, Shrinks
from nettrim.methods.base import COUNTS, needs
from nettrim.methods.masks import keep_largest
from nettrim.network.slim import Slimming
from nettrim.network.trace import LayerGraph, LayerSpec
from nettrim.pipeline.account import Account, Standing
from nettrim.pipeline.collect import Collected, Wanted, choose_rows, decide, packs
from nettrim.pipeline.execute import run_all
from nettrim.pipeline.memory import trim
from nettrim.pipeline.plan import Plan
from nettrim.pipeline.proof import Proof, prove
from nettrim.pipeline.records import LayerEvidence
from nettrim.pipeline.schedule import waves
from nettrim.pipeline.store import RunStore


@dataclass(frozen=True)
class How:
    """How a run is carried out.

    Attributes
    ----------
    rows : int or None
        The most rows that a layer's program is made of.
    workers : int
    seed : int
    progress : bool
    """

    rows: int | None
    workers: int
    seed: int
    progress: bool


def prune_waves(
    plan: Plan,
    account: Account,
    standing: Standing,
    how: How,
    store: RunStore | None = None,
    found: Mapping[str, LayerEvidence] | None = None,
) -> tuple[list[LayerEvidence], dict[str, Proof]]:
    """Prune wave after wave, putting each layer into `standing`; return the evidence of all, and what it proves.

    Parameters
    ----------
    plan : Plan
    account : Account
    standing : Standing
        Changed in place.
    how : How
    store : RunStore, optional
        A finished layer is written at once.
    found : mapping from str to LayerEvidence, optional
        Layers that are finished already.
    """
    graph, found = plan.graph, found or {}
    assert not isinstance(plan.method, Shrinks)
    evidence: dict[str, LayerEvidence] = {}
    proofs: dict[str, Proof] = {}
    soiled = behind_pruned(graph) if plan.schedule == "cascade" else set()
    bar = tqdm(
        total=len(graph.selected),
        desc=plan.method.name,
        unit="layer",
        leave=False,
        disable=None if how.progress else True,
    )
    for wave in plan.waves:
        wanted = {name: wanted_of(plan, account, graph.layer(name), how) for name in wave}
        if plan.residual == "sum" and plan.schedule == "cascade":
            due = set().union(*plan.waves[plan.waves.index(wave) :])
            wanted = {name: replace(want, residual=at_sum(graph, name, due)) for name, want in wanted.items()}
        state = dict(standing.state) if plan.schedule == "cascade" else account.dense
        for pack in packs(graph, wanted, account.batches.rows, account.memory_limit, how.workers):
            bar.set_postfix_str(", ".join(pack))
            data = account.collect(state, {name: wanted[name] for name in pack}, how.progress)
            pending = [name for name in pack if name not in found]
            tasks = {
                name: layer_tasks(plan, account, name, data[name], name not in soiled and not wanted[name].residual)
                for name in pending
            }
            results = run_all(plan.method.prune_layer, [task for own in tasks.values() for task in own], how.workers)
            for name in pack:
                spec = graph.layer(name)
                if name in tasks:
                    solved = [next(results) for _ in tasks[name]]
                    evidence[name] = layer_evidence(plan, account, spec, tasks[name], solved, wanted[name].residual)
                    if store is not None:
                        store.write_layer(evidence[name])
                else:
                    evidence[name] = found[name]
                proof = proof_of(spec, evidence[name], data[name])
                if proof is not None:
                    proofs[name] = proof
                bar.update()
            # before the next are collected, or both would be held
            del data, tasks, results
            trim()
        for name in wave:
            standing.put(graph.layer(name), evidence[name].weight, evidence[name].bias)
    bar.close()
    for spec in graph.layers:
        if spec.name not in evidence:
            arrays = standing.dense_arrays(spec)
            evidence[spec.name] = LayerEvidence(spec.name, spec.relu, False, False, *arrays, *arrays)
            if store is not None:
                store.write_layer(evidence[spec.name])
    return [evidence[name] for name in graph.names], proofs


def replay(
    account: Account,
    layers: Sequence[LayerEvidence],
    schedule: str,
    rows: int | None,
    seed: int,
    slimming: Slimming | None = None,
) -> tuple[Standing, dict[str, Proof]]:
    """Put finished layers into the dense network, wave after wave as they were solved, and return what they prove.

    What is gone of a smaller network is put in as it is, not through its batch norms.
    """
    graph, standing = account.graph, account.standing()
    evidence = {layer.name: layer for layer in layers}
    proofs: dict[str, Proof] = {}
    for wave in waves(graph, schedule):
        solved = [name for name in wave if evidence[name].multipliers is not None]
        wanted = {
            name: Wanted(
                choose_rows(graph.layer(name), account.batches.rows, rows, account.memory_limit, seed),
                residual=evidence[name].facts.get("residual", False),
            )
            for name in solved
        }
        state = dict(standing.state) if schedule == "cascade" else account.dense
        for pack in packs(graph, wanted, account.batches.rows, account.memory_limit):
            data = account.collect(state, {name: wanted[name] for name in pack}, progress=False)
            found = {name: proof_of(graph.layer(name), evidence[name], data[name]) for name in pack}
            proofs |= {name: proof for name, proof in found.items() if proof is not None}
            del data
            trim()
        for name in wave:
            standing.put(graph.layer(name), evidence[name].weight, evidence[name].bias)
    return standing if slimming is None else standing.without(slimming), proofs


def at_sum(graph: LayerGraph, name: str, due: set[str]) -> bool:
    """Whether a layer can make up for the drift of the trunk that it is added to: what leads there is pruned already.

    `due` are the layers that are not. Where nothing that leads there is pruned at all, there is no drift.
    """
    spec, program = graph.layer(name), graph.program
    if spec.sum is None or program.steps[spec.sum].kwargs.get("alpha", 1) != 1:
        return False  # torch.add(x, y, alpha=…) adds another multiple of y
    pending = [program.steps[spec.sum].refs[spec.trunk].step]
    steps, seen = {graph.layer(other).step for other in due}, set()
    while pending:
        step = pending.pop()
        if step in steps:
            return False
        if step not in seen:
            seen.add(step)
            pending += [ref.step for ref in program.steps[step].refs]
    return any(layer.step in seen for layer in graph.selected)


def behind_pruned(graph: LayerGraph) -> set[str]:
    """Return the layers that pruned layers lie before: what reaches them is not the dense network's."""
    program, chosen = graph.program, {layer.step for layer in graph.selected}
    names = {layer.step: layer.name for layer in graph.layers}
    soiled: list[bool] = []
    result = set()
    for index, step in enumerate(program.steps):
        before = any(soiled[ref.step] for ref in step.refs)
        if before and index in names:
            result.add(names[index])
        soiled.append(before or index in chosen)
    return result


def wanted_of(plan: Plan, account: Account, spec: LayerSpec, how: How) -> Wanted:
    """Return what the method needs of a layer: rows while all of them fit, else a sample or moments."""
    return decide(spec, needs(plan.method), account.batches.rows, how.rows, account.memory_limit, how.seed)


def layer_tasks(plan: Plan, account: Account, name: str, data: Collected, clean: bool) -> list[LayerTask]:
    """Return the tasks of a layer, one for each group."""
    spec, standing = plan.graph.layer(name), account.standing()
    weight, bias = standing.dense_arrays(spec)
    matrix = weight.double().reshape(spec.out_features, spec.in_features)
    last = spec.output == plan.graph.program.output.step
    metric = None if last else plan.metrics.get(name)
    value = plan.values[name]
    task = LayerTask(
        name=name,
        relu=spec.relu,
        last=last,
        clean=clean,
        weight=matrix,
        bias=None if bias is None else bias.double(),
        inputs=data.inputs,
        outputs=data.outputs,
        amount=plan.amount,
        value=value,
        dtype=weight.dtype,
        importance=metric,
        moments=None if data.moments is None else data.moments[0],
        form=plan.forms.get(name),
    )
    if spec.groups == 1:
        return [task]
    counts = _block_counts(spec, task, data) if plan.amount in COUNTS else None
    wide, tall = spec.in_features, spec.out_features // spec.groups
    tasks = []
    for g in range(spec.groups):
        columns, rows = slice(g * wide, (g + 1) * wide), slice(g * tall, (g + 1) * tall)
        tasks.append(
            replace(
                task,
                weight=matrix[rows],
                bias=None if task.bias is None else task.bias[rows],
                inputs=data.inputs[:, columns].contiguous(),
                outputs=data.outputs[:, rows].contiguous(),
                importance=None if metric is None else metric[rows, rows],
                moments=None if data.moments is None else data.moments[g],
                amount=plan.amount if counts is None else "kept",
                value=value if counts is None else counts[g],
                block=g,
            )
        )
    return tasks


def _block_counts(spec: LayerSpec, task: LayerTask, data: Collected) -> list[int]:
    """Share a layer's count out over its groups: by the largest ``|w| ‖x‖`` of all, and at least one for each.

    Where there are not as many, those groups that have the largest keep one each, and the others nothing.
    """
    if data.moments is not None:
        norms = torch.stack([moments.norms for moments in data.moments])
    elif len(data.inputs):
        norms = data.inputs.norm(dim=0).reshape(spec.groups, spec.in_features)
    else:
        norms = data.inputs.new_ones(spec.groups, spec.in_features)
    scores = (task.weight.abs().reshape(spec.groups, -1, spec.in_features) * norms[:, None]).flatten(1)
    best = scores.max(dim=1, keepdim=True)
    if task.kept < spec.groups:
        chosen = keep_largest(best.values, task.kept)
    else:
        chosen = keep_largest(scores.scatter(1, best.indices, torch.inf), task.kept)
    return [int(count) for count in chosen.sum(1)]


def layer_evidence(
    plan: Plan,
    account: Account,
    spec: LayerSpec,
    tasks: Sequence[LayerTask],
    results: Sequence[LayerResult],
    residual: bool = False,
) -> LayerEvidence:
    """Return what is kept of a solved layer, as its batch norm and the model's dtype let it stand."""
    weight = torch.cat([result.weight for result in results])
    biases = [result.bias for result in results if result.bias is not None]
    standing = account.standing()
    standing.put(spec, weight, torch.cat(biases) if biases else None)
    own: dict[str, Any]
    if len(results) == 1:
        own = dict(results[0].facts)
    else:
        own = {"blocks": [result.facts | {"kept": task.value} for task, result in zip(tasks, results, strict=True)]}
    value = plan.values[spec.name]
    own["residual"] = residual
    own[plan.amount] = value if isinstance(value, (int, float)) else str(value)
    multipliers = [result.multipliers for result in results if result.multipliers is not None]
    kept, bias = standing.arrays(spec)
    return LayerEvidence(
        name=spec.name,
        relu=spec.relu,
        pruned=True,
        clean=tasks[0].clean,
        dense_weight=standing.dense_arrays(spec)[0],
        dense_bias=standing.dense_arrays(spec)[1],
        weight=kept,
        bias=bias,
        multipliers=torch.cat(multipliers, 1) if len(multipliers) == len(results) else None,
        facts=own,
        seconds=sum(result.seconds for result in results),
    )


def proof_of(spec: LayerSpec, layer: LayerEvidence, data: Collected) -> Proof | None:
    """Return what a layer's multipliers prove on its rows; None where its method solves no convex program."""
    if layer.multipliers is None:
        return None

    def matrix(weight: Tensor) -> Tensor:
        return weight.reshape(spec.out_features, spec.in_features)

    dense, found = (matrix(layer.dense_weight), layer.dense_bias), (matrix(layer.weight), layer.bias)
    return prove(layer.facts, layer.clean, layer.relu, data.inputs, data.outputs, dense, found, layer.multipliers)
