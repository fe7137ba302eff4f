"""The units of a network: what can be taken out whole, in plain networks a layer, in residual ones a branch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from nettrim.network.matrix import Window
from nettrim.network.program import Count, Program, Ref
from nettrim.network.trace import LayerGraph, LayerSpec

#: what gives no negative number
_RECTIFIES = {"relu", "relu6", "hardsigmoid", "sigmoid", "softmax"}
#: what gives none where it is given none
_KEEPS_SIGNS = {"max_pool1d", "max_pool2d", "avg_pool1d", "avg_pool2d", "mean", "dropout", "dropout1d", "dropout2d"}
_KEEPS_SIGNS |= {"adaptive_avg_pool1d", "adaptive_avg_pool2d", "adaptive_max_pool1d", "adaptive_max_pool2d"}
_KEEPS_SIGNS |= {"flatten", "reshape", "view", "unflatten", "squeeze", "unsqueeze", "contiguous"}


@dataclass(frozen=True)
class Unit:
    """One unit of a network.

    Attributes
    ----------
    name : str
        Of its layer where it is plain; of the module that holds its branch, else of the branch's last layer.
    kind : str
        "plain": a layer and its ReLU. "residual": a branch that is added to its own input.
    layers : tuple of str
        The layers that are gone with it, in execution order.
    ends : tuple of str
        Those of them that are zero in the dense shape for the unit to be gone (residual: the layer before the sum), or
        the identity (plain: the layer itself).
    entry : int
        The step whose value it reads.
    exit : int
        The step that is replaced by that value: of a plain unit its layer, of a residual one the sum.
    output : int
        The step whose value is its features: that of the ReLU behind it, where there is one.
    stage : int
        Units of one stage follow each other with outputs of the same shape.
    removable : bool
        Whether input and output have the same shape and leaving it out is the identity.
    why : str or None
        Why it is not.
    """

    name: str
    kind: str
    layers: tuple[str, ...]
    ends: tuple[str, ...]
    entry: int
    exit: int
    output: int
    stage: int
    removable: bool
    why: str | None = None


def find_units(graph: LayerGraph, state: Mapping[str, Tensor]) -> tuple[Unit, ...]:
    """Return the units of a network, in execution order.

    Only what everything flows through is a unit, so that each reads what the one before it gives: layers within a
    branch are none of their own, nor are sums inside the branch of a larger sum. In a network with residual units, what
    lies before the first of them is the stem, as in the published curves, and no unit.

    Parameters
    ----------
    graph : LayerGraph
    state : mapping from str to Tensor
        Of the dense network, batch norms folded.

    Returns
    -------
    tuple of Unit
        Empty where the network has none.
    """
    program = graph.program
    before = _dominators(program)
    through = _through(program, before)
    plain = {spec.step: spec for spec in graph.layers if spec.step in through and _is_plain(program, spec)}
    found: list[Unit] = []
    taken: set[str] = set()
    for index in through:
        if index in plain:
            unit = _plain(program, plain[index], state)
        elif program.steps[index].op == "add" and before[index] >= 0:
            residual = _residual(graph, index, before[index], through, taken)
            if residual is None:
                continue
            unit = residual
        else:
            continue
        if _batched(program, unit.output) and _batched(program, unit.entry):
            taken.add(unit.name)
            found.append(unit)
    first = next((place for place, unit in enumerate(found) if unit.kind == "residual"), 0)
    return _staged(program, found[first:])


def middle_tap(window: Window) -> tuple[int, ...] | None:
    """Return the entry of a kernel that lies over the position that it computes; None where none does."""
    taps = []
    for size, dilation, (ahead, _) in zip(window.kernel, window.dilation, window.padding, strict=True):
        if ahead % dilation or ahead // dilation >= size:
            return None
        taps.append(ahead // dilation)
    return tuple(taps)


def _dominators(program: Program) -> list[int]:
    """Return for every step the last one before it that all its data flow through; −1 where there is none, −2 of a step
    that does not depend on what the network is given.
    """
    before: list[int] = []
    for index, step in enumerate(program.steps):
        if index < len(program.inputs):
            before.append(-1)
            continue
        sources = [ref.step for ref in step.refs if before[ref.step] != -2]
        if not sources:
            before.append(-2)
            continue
        common = sources[0]
        for source in sources[1:]:
            while common != source:  # the later of the two goes back, until both are the same
                if common > source:
                    common = before[common]
                else:
                    source = before[source]
        before.append(common)
    return before


def _through(program: Program, before: list[int]) -> list[int]:
    """Return the steps that everything flows through, in execution order."""
    chain = [program.output.step]
    while chain[-1] >= 0:
        chain.append(before[chain[-1]])
    return [index for index in reversed(chain) if index >= 0]


def _is_plain(program: Program, spec: LayerSpec) -> bool:
    return spec.relu and spec.groups == 1 and spec.output != program.output.step


def _plain(program: Program, spec: LayerSpec, state: Mapping[str, Tensor]) -> Unit:
    """Return a layer and its ReLU."""
    entry = program.steps[spec.step].argument("input")
    same = program.steps[entry.step].shape == program.steps[spec.step].shape
    why = None
    if not same or state[spec.weight].shape[0] != state[spec.weight].shape[1]:
        why = "it changes the width or the size"
    elif spec.window is not None and (set(spec.window.stride) != {1} or middle_tap(spec.window) is None):
        why = "no kernel of its size is the identity"
    elif not _nonnegative(program, entry):
        why = "what it reads may be negative, and its ReLU would cut that off"
    elif not spec.prune:
        why = f"layer {spec.name!r} is not selected"
    names = (spec.name,)
    return Unit(spec.name, "plain", names, names, entry.step, spec.step, spec.output, 0, why is None, why)


def _residual(graph: LayerGraph, index: int, entry: int, through: list[int], taken: set[str]) -> Unit | None:
    """Return the branches between a sum and the value that all of them read; None where no layer lies there."""
    program = graph.program
    step = program.steps[index]
    within = _between(program, entry, index)
    layers = [spec for spec in graph.layers if spec.step in within]
    if not layers or len(step.refs) != 2:
        return None
    ends = [spec for spec in layers if spec.sum == index and step.refs[spec.trunk] == Ref(entry)]
    unselected = next((spec.name for spec in layers if not spec.prune), None)
    why = None
    if Ref(entry) not in step.refs:
        why = "its shortcut is no identity: it changes the width or the size"
    elif program.steps[entry].shape != step.shape or step.argument("alpha", 1) != 1:
        why = "its sum is not of two values of the same shape"
    elif not ends:
        why = "its branch ends in no layer, so that zero weights do not make it vanish"
    elif unselected is not None:
        why = f"layer {unselected!r} is not selected"
    users = program.users()[index]
    behind = program.output.step != index and len(users) == 1 and program.steps[users[0]].op == "relu"
    holder, last = step.where, layers[-1].name
    # a module of several sums names none of them
    alone = sum(program.steps[at].op == "add" and program.steps[at].where == holder for at in through) == 1
    named = bool(holder) and alone and all(spec.name.startswith(f"{holder}.") for spec in layers)
    return Unit(
        name=holder if named and holder not in taken else last,
        kind="residual",
        layers=tuple(spec.name for spec in layers),
        ends=tuple(spec.name for spec in ends) if why is None else (),
        entry=entry,
        exit=index,
        output=users[0] if behind else index,
        stage=0,
        removable=why is None,
        why=why,
    )


def _between(program: Program, entry: int, index: int) -> set[int]:
    """Return the steps that lead from one step to another, without both."""
    found: set[int] = set()
    pending = [ref.step for ref in program.steps[index].refs]
    while pending:
        step = pending.pop()
        if step > entry and step not in found:
            found.add(step)
            pending += [ref.step for ref in program.steps[step].refs]
    return found


def _nonnegative(program: Program, ref: Ref) -> bool:
    """Tell whether a value is known to have no negative entry."""
    while True:
        step = program.steps[ref.step]
        if ref.item is not None:
            return False
        if step.op in _RECTIFIES:
            return True
        if step.op in ("clamp", "clip", "clamp_min"):
            low = step.kwargs.get("min", step.args[1] if len(step.args) > 1 else None)
            return isinstance(low, (int, float)) and low >= 0
        if step.op not in _KEEPS_SIGNS or len(step.refs) != 1:
            return False
        ref = step.refs[0]


def _batched(program: Program, index: int) -> bool:
    """Tell whether a value has one entry of its first dimension for every sample, and channels."""
    shape = program.steps[index].shape
    return shape is not None and len(shape) > 1 and shape[0] == Count(0, 1)


def _staged(program: Program, units: Sequence[Unit]) -> tuple[Unit, ...]:
    """Return the units with the numbers of their stages."""
    found: list[Unit] = []
    stage = 0
    for unit in units:
        if found and program.steps[found[-1].output].shape != program.steps[unit.output].shape:
            stage += 1
        found.append(replace(unit, stage=stage))
    return tuple(found)
