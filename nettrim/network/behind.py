"""What lies behind a layer in a program: a ReLU that its output flows into, a sum that it is added to."""

from __future__ import annotations

from nettrim.network.program import Count, Program, Step

#: what leaves every number as it is, so that a ReLU behind it is a ReLU before it
_CARRIES = {"flatten", "reshape", "view", "unflatten", "squeeze", "unsqueeze", "transpose", "permute", "contiguous"}
_DROPS = {"dropout", "dropout1d", "dropout2d", "feature_dropout", "alpha_dropout"}
_CARRIES |= _DROPS | {"to", "identity", "T"}


def positions(step: Step) -> int:
    """Return how many rows one sample gives a layer."""
    assert step.shape is not None
    spatial = step.shape[:-1] if step.op == "linear" else (step.shape[0], *step.shape[2:])
    rows = 1
    for size in spatial:
        rows *= size.each if isinstance(size, Count) else size
    return rows


def relu_behind(program: Program, users: list[list[int]], index: int) -> int | None:
    """Return the ReLU that a step's output flows into and nowhere else, or None."""
    while True:
        if len(users[index]) != 1 or program.output.step == index:
            return None
        index = users[index][0]
        step = program.steps[index]
        if step.op == "relu" or (step.op in ("clamp", "clip", "clamp_min") and _is_relu(step)):
            return index
        if step.op not in _CARRIES:
            return None


def sum_behind(program: Program, users: list[list[int]], index: int) -> dict[str, int]:
    """Return the step that adds a step's output, and nothing else of it, to a tensor of the same shape, and which of
    the two that one is; nothing where there is none.
    """
    here = index
    while True:
        if len(users[here]) != 1 or program.output.step == here:
            return {}
        before, here = here, users[here][0]
        step = program.steps[here]
        if step.op not in _DROPS:  # which does nothing in evaluation mode
            break
    refs = step.refs
    plain = step.op == "add" and len(refs) == 2 and refs[0] != refs[1] and not step.held and len(step.args) == 2
    if not plain or step.shape != program.steps[index].shape:
        return {}
    return {"sum": here, "trunk": int(refs[0].step == before)}


def _is_relu(step: Step) -> bool:
    """Tell whether a clamp is at zero from below and nowhere from above."""
    low, high = (*step.args[1:], None, None)[:2]
    return step.kwargs.get("min", low) == 0 and step.kwargs.get("max", high) is None
