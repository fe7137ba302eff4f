"""`compare`: methods × budgets × schedules on one network and the same data, one row for each.

A row is on disk as soon as it is finished, and one that fails says why and does not lose the others.
"""

from __future__ import annotations

import json
import math
import os
import platform
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import Field, asdict, dataclass, fields, is_dataclass, replace
from numbers import Real
from pathlib import Path
from typing import Any

from torch import nn
from tqdm import tqdm

from nettrim.core.problem import check_seed
from nettrim.errors import NetTrimError, ProblemError, RunError
from nettrim.methods import METHODS, Method, Shrinks, make_method
from nettrim.network.batches import Batches, read_batches
from nettrim.network.observe import call
from nettrim.network.trace import LayerGraph
from nettrim.pipeline.files import describe_place, digest_tensors
from nettrim.pipeline.finish import FINISHES, check_batches, make_finish
from nettrim.pipeline.memory import PeakMemory, check_bytes
from nettrim.pipeline.plan import Plan
from nettrim.pipeline.prune import prune
from nettrim.pipeline.result import PruneResult
from nettrim.pipeline.rows import FILE, IDENTITY, SCHEMA, Comparison, LayerRow, Row, load_comparison, write_comparison
from nettrim.pipeline.speed import speed
from nettrim.pipeline.store import require_free


@dataclass(frozen=True, eq=False)
class Cell:
    """One row that is asked for: checked, and not yet run."""

    method: Method | Shrinks
    value: Any
    row: Row


def compare(
    model: nn.Module,
    batches: Iterable[Any],
    methods: Sequence[str | Method | Shrinks],
    budgets: Sequence[Any],
    *,
    schedules: Sequence[str] = ("cascade",),
    layers: str | list[str] | tuple[str, ...] = "all",
    ignore: str | list[str] | tuple[str, ...] = (),
    held_out: Iterable[Any] | None = None,
    out_dir: str | Path | None = None,
    resume: bool = False,
    finish: str | Sequence[str | None] | None = None,
    seed: int = 0,
    progress: bool = True,
    on_unsupported: str = "refuse",
    rows: int | None = None,
    memory_limit: int | str = "2 GiB",
) -> Comparison:
    """Prune one network by every method, to every budget, in every schedule, on the same samples.

    Parameters
    ----------
    model : nn.Module
        As `prune` takes it. Never changed.
    batches : iterable
        The calibration samples, as `prune` takes them. Read once.
    methods : sequence of str or Method
        Names in `METHODS`, or objects; each must take a sparsity.
    budgets : sequence
        Sparsities, whatever ``prune(sparsity=...)`` takes: fractions of zeros in [0, 1), ``Pattern(2, 4)``, dicts from
        layer name to either.
    schedules : sequence of {"cascade", "parallel"}
    layers, ignore : "all", name, glob, or several
        Which layers to prune, and which not.
    held_out : iterable, optional
        Samples that are only measured on.
    out_dir : path, optional
        Keep ``compare.json`` there, written anew after every row.
    resume : bool
        Go on with the comparison in `out_dir`: rows that are finished are not run again, those that failed are.
        Methods, budgets and schedules may be others than before; what is there stays. Where there is none, one is
        started.
    finish : {"distill", "fine-tune"} or None, or several
        As `prune` takes it; with ``(None, "distill")`` every row comes both merely pruned and trained on, all alike.
    seed : int
        Of every row.
    progress : bool
        Show bars on stderr, if that is a terminal.
    on_unsupported, rows, memory_limit
        As `prune` takes them.

    Returns
    -------
    Comparison

    Raises
    ------
    ProblemError, UnsupportedError, UnknownNameError
        Before any work: nothing to compare, the same twice, a method or schedule that is unknown, a budget that a
        method or layer does not take, data that do not fit the model.
    RunError
        `out_dir` holds something, or, with `resume`, a comparison of another model, data, seed or choice of layers.

    Notes
    -----
    What happens once in a process (libraries that are loaded or compiled on first use) is counted in the row that
    happens to be the first to need it.
    """
    seed = check_seed(seed)
    limit = check_bytes(memory_limit)
    if resume and out_dir is None:
        raise ProblemError("resume=True needs out_dir, the directory of the comparison to go on with.")
    if out_dir is not None and not resume:
        require_free(out_dir)
    splits = {"calibration": read_batches(batches, memory_limit=limit // 2)}
    if held_out is not None:
        splits["held-out"] = read_batches(held_out, "held_out", memory_limit=limit // 4)
    calibration = splits["calibration"]
    graph, cells = plan_grid(
        model, calibration, methods, budgets, schedules, layers, ignore, finish, on_unsupported=on_unsupported
    )
    for kind in {cell.row.finish for cell in cells}:
        trained = make_finish(kind, "kept", overall=False)
        if trained is not None:
            check_batches(trained, model, calibration)
    for split in splits.values():
        call(model, split.first(1), 0)  # data that do not fit the model are refused here, not in every row

    about = _describe(model, graph, splits, seed)
    found_rows: dict[tuple[str, str, str, str | None], Row] = {}
    directory = None if out_dir is None else Path(out_dir)
    here: dict[str, Any] | None = None
    if directory is not None and resume and (directory / FILE).exists():
        found = load_comparison(directory)
        _require_same(directory, found.about, about)
        here = {key: about[key] for key in ("host", "commit")}
        here = None if all(found.about[key] == value for key, value in here.items()) else here
        about, found_rows = found.about, {row.key: row for row in found.rows}
    if directory is not None:
        write_comparison(directory, Comparison(tuple(found_rows.values()), about))

    pending = [cell for cell in cells if cell.row.key not in found_rows or found_rows[cell.row.key].failure is not None]
    options = {"layers": layers, "ignore": ignore, "held_out": splits.get("held-out"), "seed": seed}
    options |= {"progress": progress, "rows": rows, "memory_limit": limit, "on_unsupported": on_unsupported}
    with tqdm(total=len(pending), desc="compare", unit="row", leave=False, disable=None if progress else True) as bar:
        for cell in pending:
            bar.set_postfix_str(f"{cell.row.method}, {cell.row.budget}, {cell.row.schedule}")
            found_rows[cell.row.key] = replace(_run(cell, model, calibration, options), host=here)
            if directory is not None:
                write_comparison(directory, Comparison(tuple(found_rows.values()), about))
            bar.update()
    return Comparison(tuple(found_rows.values()), about)


def plan_grid(
    model: nn.Module,
    batches: Batches,
    methods: Sequence[str | Method | Shrinks],
    budgets: Sequence[Any],
    schedules: Sequence[str] = ("cascade",),
    layers: str | list[str] | tuple[str, ...] = "all",
    ignore: str | list[str] | tuple[str, ...] = (),
    finish: str | Sequence[str | None] | None = None,
    on_unsupported: str = "refuse",
) -> tuple[LayerGraph, list[Cell]]:
    """Check everything that `compare` is asked for but the data: budget by budget, method by method.

    The arguments and errors are those of `compare`; the model need not be trained yet.
    """
    kinds = _kinds(finish)
    chosen = [make_method(method) for method in _several("methods", methods)]
    named = {repr(method): _label(method) for method in chosen}
    cells = []
    for budget in _several("budgets", budgets):
        for method in chosen:
            for schedule in _several("schedules", schedules):
                for kind in kinds:
                    graph = Plan.make(
                        model,
                        batches,
                        method,
                        schedule,
                        layers,
                        ignore,
                        {"sparsity": budget},
                        kind,
                        on_unsupported=on_unsupported,
                    ).graph
                    row = Row(named[repr(method)], repr(method), _budget_text(budget), schedule, kind)
                    cells.append(Cell(method, budget, row))
    names = list(named.values())
    alike = [name for i, name in enumerate(names) if name in names[:i]]
    if alike:
        raise ProblemError(f"two methods are both called {alike[0]!r}: give one another name.")
    keys = [cell.row.key for cell in cells]
    twice = [cell.row for i, cell in enumerate(cells) if keys[i] in keys[:i]]
    if twice:
        row = twice[0]
        raise ProblemError(f"{row.method} at sparsity {row.budget}, {row.schedule}, is asked for twice: leave one out.")
    return graph, cells


def _require_same(directory: Path, found: dict[str, Any], wanted: dict[str, Any]) -> None:
    differs = [key for key in IDENTITY if found[key] != wanted[key]]
    if differs:
        raise RunError(
            f"{directory} holds a comparison that differs in {', '.join(differs)}: resume with the same, or use "
            "another directory."
        )


def _run(cell: Cell, model: nn.Module, calibration: Batches, options: dict[str, Any]) -> Row:
    """Prune once and keep the figures; the weights are let go."""
    memory, pruned = PeakMemory(), None
    with memory:
        began = time.monotonic()
        try:
            how = {"sparsity": cell.value, "schedule": cell.row.schedule, "finish": cell.row.finish}
            pruned = prune(model, calibration, cell.method, **how, **options)
            row = _measured(cell.row, pruned)
        except Exception as error:  # whatever a method raises, the other rows do not suffer
            said = " ".join(str(error).split())
            kind = "" if isinstance(error, NetTrimError) and said else type(error).__name__
            row = replace(cell.row, failure=": ".join(part for part in (kind, said) if part))
        seconds = time.monotonic() - began
    latency = None if pruned is None or row.failure is not None else _latency(model, pruned)
    return replace(row, seconds=seconds, peak_mib=memory.rise, latency=latency)


def _latency(model: nn.Module, pruned: PruneResult) -> dict[str, float] | None:
    """Return the measured latency of a smaller module against the dense one as JSON values."""
    found = speed(model, pruned)
    if found is None:
        return None
    lower, upper = found.quartiles
    return {
        "speedup": found.speedup,
        "lower": lower,
        "upper": upper,
        "dense_seconds": found.dense.seconds,
        "pruned_seconds": found.pruned.seconds,
        "samples": found.dense.samples,
        "threads": found.dense.threads,
    }


def _measured(row: Row, result: PruneResult) -> Row:
    ledger = result.ledger
    assert result.account is not None
    numels = {spec.name: spec.numel for spec in result.account.graph.selected}
    # a layer without a record is as it was
    gone = sum(record.numel - record.kept for record in ledger.records if record.name in numels)
    numel = sum(numels.values())
    size = ledger.output_norm or 1.0
    error = {"calibration": ledger.measured / size}
    if ledger.held_out is not None:
        error["held-out"] = ledger.held_out
    # what the method did is of the network that it pruned, which may have been trained on since
    pruned = ledger if ledger.before is None else ledger.before
    seconds = {record.name: record.seconds for record in pruned.records}
    if not all(math.isfinite(value) for value in error.values()):
        raise ProblemError(f"the error of the pruned network is {error}: its outputs are too large to be measured.")
    return replace(
        row,
        layers=tuple(
            LayerRow(
                name=record.name,
                kept=record.kept,
                numel=record.numel,
                error=record.network_error / (record.target_norm or 1.0),
                held_out=record.held_out,
                seconds=seconds.get(record.name, 0.0),
                certified=record.name not in ledger.uncertified,
            )
            for record in ledger.records
        ),
        kept=numel - gone,
        numel=numel,
        accuracy=ledger.accuracy,
        error=error,
        bound=ledger.bound / size if math.isfinite(ledger.bound) else None,
        layer_seconds=sum(seconds.values()),
        costs=ledger.costs,
    )


def _describe(model: nn.Module, graph: LayerGraph, splits: dict[str, Batches], seed: int) -> dict[str, Any]:
    place = describe_place()
    host = {"processor": _processor(), "cores": os.cpu_count()}
    host |= {key: place["host"][key] for key in ("threads", "machine", "system", "python")}
    return {
        "schema": SCHEMA,
        "host": host | {"versions": place["versions"]},
        "commit": place["commit"],
        "seed": seed,
        "model": digest_tensors(dict(model.state_dict())),
        "data": {split: batches.digest() for split, batches in splits.items()},
        "chain": json.loads(json.dumps([asdict(layer) for layer in graph.layers])),
        "samples": {split: batches.rows for split, batches in splits.items()},
    }


def _kinds(finish: Any) -> list[str | None]:
    """Return how rows are finished; each must be a name, because rows are told apart by it."""
    kinds = [finish] if finish is None or isinstance(finish, str) else finish
    if not isinstance(kinds, (list, tuple)) or not kinds or not all(k is None or isinstance(k, str) for k in kinds):
        found = repr(finish) if isinstance(finish, (list, tuple)) and not finish else f"a {type(finish).__name__}"
        raise ProblemError(f"finish is {found}: give {' or '.join(FINISHES)}, None, or a list of these names.")
    return list(kinds)


def _several(name: str, values: Any) -> list[Any]:
    """Return the values of an argument that takes several."""
    if isinstance(values, (str, Mapping)) or not isinstance(values, Iterable):
        raise ProblemError(f"{name} is a single {type(values).__name__}: put it in a list, [{values!r}].")
    found = list(values)
    if not found or any(value is None for value in found):
        raise ProblemError(f"{name} is {found!r}: give at least one, and no None.")
    return found


def _label(method: Method | Shrinks) -> str:
    """Return a method's name, and the settings that are not those that the name alone stands for."""
    settings: tuple[Field[Any], ...] = fields(method) if is_dataclass(method) else ()
    plain = METHODS[method.name]() if method.name in METHODS else None
    changed = [
        f"{part.name}={getattr(method, part.name)}"
        for part in settings
        if part.name not in ("name", "amounts")
        and getattr(method, part.name) != (getattr(plain, part.name) if type(plain) is type(method) else part.default)
    ]
    return f"{method.name} ({', '.join(changed)})" if changed else method.name


def _budget_text(budget: Any) -> str:
    """Return a sparsity as it is written on the command line; equal ones are written alike."""
    if isinstance(budget, Mapping):
        return ",".join(f"{name}={_budget_text(budget[name])}" for name in sorted(budget))
    return f"{float(budget):.12g}" if isinstance(budget, Real) else str(budget)


def _processor() -> str:
    """Return the processor's name, where the system tells it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()
