"""`prune`: a whole network, layer by layer, each on the data that its schedule gives it, and the account of it all."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from nettrim.core.problem import check_seed
from nettrim.errors import ProblemError, UnsupportedError
from nettrim.methods import Method, Shrinks
from nettrim.methods.base import needs
from nettrim.methods.masks import Pattern
from nettrim.network.batches import read_batches
from nettrim.network.edit import double_copy, frozen_copy, raw_state, write_state
from nettrim.network.modular import ProgramModule
from nettrim.network.observe import agree
from nettrim.network.samples import pieces
from nettrim.pipeline.account import Account, Standing
from nettrim.pipeline.budget import Overall
from nettrim.pipeline.chain import chained, digest_of, link, stage
from nettrim.pipeline.collect import check_rows, estimate
from nettrim.pipeline.execute import check_executor
from nettrim.pipeline.finish import Finish, check_batches, run_finish
from nettrim.pipeline.layers import How, prune_waves
from nettrim.pipeline.memory import check_bytes
from nettrim.pipeline.narrow import narrow
from nettrim.pipeline.plan import Plan
from nettrim.pipeline.proof import Proof
from nettrim.pipeline.records import LayerEvidence
from nettrim.pipeline.result import PruneResult
from nettrim.pipeline.shorten import check_units, shorten
from nettrim.pipeline.store import RunStore, describe_run, require_free, require_same, started_run
from nettrim.pipeline.widths import check_channels

_COMPARED = 8  # samples that a smaller module is held against its steps on
#: what goes -> what refuses amounts before a run directory is made, and what does it
DRIVERS: dict[str, Any] = {"channels": (check_channels, narrow), "units": (check_units, shorten)}


def prune(
    model: nn.Module | PruneResult,
    batches: Iterable[Any],
    method: str | Method | Shrinks = "net-trim",
    *,
    epsilon: float | Mapping[str, float] | None = None,
    sparsity: float | Pattern | Overall | Mapping[str, float | Pattern] | None = None,
    kept: int | Mapping[str, int] | None = None,
    lam: float | Mapping[str, float] | None = None,
    tolerance: float | Mapping[str, float] | None = None,
    channels: float | Mapping[str, float] | None = None,
    macs: float | None = None,
    units: int | None = None,
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
    forms: Mapping[str, str] | None = None,
    on_unsupported: str = "refuse",
    residual: str = "own",
    rows: int | None = None,
    memory_limit: int | str = "2 GiB",
) -> PruneResult:
    """Prune a trained network without labels, and account for it.

    Parameters
    ----------
    model : nn.Module or PruneResult
        Any network of Linear, Conv1d and Conv2d layers, whatever else lies between. Never changed. Of a result, its
        model is pruned further, and `ledger.chain` joins the evidence of all runs since the first network.
    batches : iterable
        The calibration samples: tensors, (input, label) tuples or dicts. Labels only serve to report accuracy. Read
        once; what does not fit the memory limit is spooled to temporary files.
    method : str or Method
        A name in `METHODS`, or an object such as ``NetTrim(form="halfspace")``.
    epsilon, sparsity, kept, lam, tolerance, channels, macs, units : float or dict from layer name to float
        Exactly one: the relative radius of each layer; the fraction of zeros (or ``nettrim.Pattern(2, 4)`` for N:M
        sparsity, or ``nettrim.Overall(0.95)`` for the whole network, split over the layers by what the data say); the
        number of weights that stay in a layer; ``λ``; L-OBS's tolerance of ``√L_q``, or the gain that Shallowing asks
        of a unit; the fraction of inner channels, or of the network's multiply-adds, that stays; how many units go.
        Biases are not counted. Which of them a method takes, its `amounts` say; to one that makes the network smaller,
        a sparsity is the fraction of all weights that go.
    schedule : {"cascade", "parallel"}
        In cascade each layer is fitted on what the pruned layers before it give; the last radius is then the guarantee
        for the whole network. In parallel all layers are fitted on the dense network's inputs.
    layers, ignore : "all", name, glob, class, or several
        Which layers to prune, and which not: ``"body.*"``, ``nn.Linear``, ``"Conv2d"``.
    held_out : iterable, optional
        Samples that are only measured on.
    finish : {"distill", "fine-tune", "batch-norm"} or object, optional
        Train on after pruning, pruned weights staying zero: without labels to the dense network's outputs, or with the
        labels in `batches`; or only estimate the statistics of batch norms anew; or an object such as
        ``nettrim.Distill(epochs=40)``. With a number of weights, "distill" prunes to more first and chooses on the way
        which stay. The ledger says so, and has the pruned network's as `before`.
    out_dir : path, optional
        Write a run directory; a finished layer is on disk at once.
    resume : bool
        Go on with the run in `out_dir`, if it was started with the same model, data and settings.
    executor : int, optional
        Worker processes for the layers of a wave; None works in this process.
    progress : bool
        Show a bar on stderr, if that is a terminal.
    seed : int
        Of torch's generator during the run, for methods that draw, and of the rows that are drawn. The global state is
        restored afterwards.
    forms : dict from layer name to {"ball", "halfspace", "linear"}, optional
        The form of single layers' convex programs.
    on_unsupported : {"refuse", "keep"}
        Whether a selected weight that cannot be pruned is refused, or left dense.
    residual : {"own", "sum"}
        What a layer is fitted to whose output is added to a trunk: its own dense outputs; or, in cascade, the dense sum
        less the pruned trunk, so that it makes up for the trunk's drift.
    rows : int, optional
        The most rows that a layer's convex program is made of, drawn from all samples and positions; by default as many
        as there are samples, or 16,384 for layers that meet a sample more than once.
    memory_limit : int or str
        What calibration may hold beside the networks themselves: bytes, or such as "512 MiB".

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
    amounts |= dict(channels=channels, macs=macs, units=units)
    previous = model if isinstance(model, PruneResult) else None
    dense = model.model if isinstance(model, PruneResult) else model
    if previous is not None and previous.account is None:
        raise ProblemError("model is a result that did not store its network: pass its model, without the chain.")
    limit = check_bytes(memory_limit)
    how = How(check_rows(rows), check_executor(executor), check_seed(seed), progress)
    if resume and out_dir is None:
        raise ProblemError("resume=True needs out_dir, the directory of the run to go on with.")
    if out_dir is not None and not resume:
        require_free(out_dir)
    calibration = read_batches(batches, memory_limit=limit // 2)
    held = None if held_out is None else read_batches(held_out, "held_out", memory_limit=limit // 4)
    # a caller may have switched gradients off; sensitivities and finishing need them
    with torch.inference_mode(False), torch.enable_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(how.seed)
        plan = Plan.make(
            dense, calibration, method, schedule, layers, ignore, amounts, finish, forms, on_unsupported, residual
        )
        if plan.finish is not None:
            check_batches(plan.finish, dense, calibration)
        account = Account.of(dense, plan.traced, calibration, held, limit)
        if isinstance(plan.method, Shrinks):
            DRIVERS[plan.method.removes][0](plan, account)
        ahead = estimate(plan.graph, needs(plan.method), calibration, held, how.rows, limit, account.at_a_time)
        if progress and sys.stderr.isatty():
            tqdm.write(f"nettrim: {ahead.sentence()}", file=sys.stderr)
        return _run(dense, plan, account, previous, out_dir, resume, how)


def _run(
    model: nn.Module,
    plan: Plan,
    account: Account,
    previous: PruneResult | None,
    out_dir: str | Path | None,
    resume: bool,
    how: How,
) -> PruneResult:
    started = started_run(out_dir) if resume and out_dir is not None and plan.overall else None
    if out_dir is not None and started is not None:
        # refused before the look ahead: the split that it found is taken over, and fits no other run
        require_same(
            out_dir, started, describe_run(model, plan, account, how.rows, how.seed), but=("amount", "targets")
        )
    plan = plan.settle(account, started, how.seed, how.progress)
    settings = describe_run(model, plan, account, how.rows, how.seed)
    store = None
    found: dict[str, LayerEvidence] = {}
    if out_dir is not None:
        if resume:
            store, found = RunStore.resume(out_dir, settings, account)
        else:
            store = RunStore.create(out_dir, settings, account)
    standing = account.standing()
    proofs: dict[str, Proof] = {}
    about: dict[str, Any] = {}
    if isinstance(plan.method, Shrinks):
        evidence, structure, about = DRIVERS[plan.method.removes][1](plan, account, standing, how, store, found)
        standing = standing.without(account.slimming(structure))
    else:
        evidence, proofs = prune_waves(plan, account, standing, how, store, found)
    ledger = account.ledger(plan.method.name, plan.schedule, standing, evidence, proofs)
    pruned, final = module_of(model, standing), evidence
    if plan.finish is not None:
        if isinstance(pruned, ProgramModule) and account.graph.folds:
            raise UnsupportedError(
                f"model ({type(model).__name__}) cannot be made smaller as a module of its class, so its batch norms "
                "are folded and cannot be trained on: leave finish out."
            )
        pruned, final, said = run_finish(
            plan.finish,
            plan.traced,
            account,
            model,
            pruned,
            evidence,
            plan.targets,
            how.seed,
            how.progress,
            standing.slimming,
        )
        standing = account.of_state(raw_state(double_copy(pruned)), standing.slimming)
        ledger = account.ledger(plan.method.name, plan.schedule, standing, final, {}, said, before=ledger)
    _require_same_path(account, standing, pruned)
    stored = standing.raw() if isinstance(pruned, ProgramModule) else None
    first = None
    if previous is not None:
        first, stages = chained(previous)
        own = stage(ledger, digest_of(previous.model, previous.stored), digest_of(pruned, stored), account)
        ledger = replace(ledger, chain=link(first, [*stages, own], account, standing))
    result = PruneResult(
        pruned,
        ledger,
        account.masks(final, standing.slimming),
        settings,
        evidence,
        final,
        account,
        stored,
        None if standing.slimming is None else standing.slimming.structure,
        first,
        about,
    )
    if store is not None:
        result.write_end(store)
    return result


def module_of(model: nn.Module, standing: Standing) -> nn.Module:
    """Return a network as it stands as a module: of the model's class, or one that runs steps where that cannot be."""
    if standing.slimming is None:
        pruned = frozen_copy(model)
        write_state(pruned, standing.changed)
        return pruned
    batch = standing.account.batches.first(_COMPARED)
    small = standing.slimming.module(model, standing.changed, standing.state, batch)
    return standing.steps() if small is None else small


def _require_same_path(account: Account, standing: Standing, pruned: nn.Module) -> None:
    """Refuse a pruned network whose forward, looking at values, takes another path than was accounted for."""
    if account.graph.program.reads_values:
        twin = double_copy(pruned)
        for index, batch in enumerate(account.batches):
            for piece in pieces(batch, account.at_a_time):
                agree(account.graph.program, standing.state, twin, piece, index)
