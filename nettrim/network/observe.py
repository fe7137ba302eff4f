"""A module's forward, observed while it runs, as a `Program`.

Every call of a torch function is intercepted on its way (`torch.overrides.TorchFunctionMode`), so that Python control
flow, modules of one's own and functional calls are all followed, and nothing stays behind when the run is over. It is
run twice, with another number of samples each time: numbers that differ between the runs follow the batch.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from nettrim.errors import NetTrimError, ProblemError, UnsupportedError
from nettrim.network.batches import Batch
from nettrim.network.edit import evaluating, first_line
from nettrim.network.fold import without_unused
from nettrim.network.functions import OPERATORS, find_function, name_of, resolve, works_in_place
from nettrim.network.program import Program, Ref, Step, leaves, run, substitute
from nettrim.network.watched import Watched, inside, merged

_ROWS = 64  # samples that a forward is observed on, at the most
#: what reads values out of tensors, so that the path may hang on them
_READS = {"bool", "item", "tolist", "numpy", "float", "int", "long", "index", "array", "complex", "contains", "format"}
_READS |= {"equal", "allclose", "is_nonzero", "nonzero", "_local_scalar_dense"}
#: what gives tensors whose shape hangs on values
_SELECTS = {"nonzero", "argwhere", "masked_select", "unique", "unique_consecutive", "bincount", "repeat_interleave"}
#: what writes into a part of a tensor, or makes it another one
_WRITERS = {"__setitem__", "copy_", "set_", "index_put_", "set_data"}
#: what a model's own forward may fail with
_FAILURES = (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)


def observe(model: nn.Module, state: Mapping[str, Tensor], batch: Batch) -> tuple[Program, dict[str, Tensor]]:
    """Return the forward of a model as a program.

    Parameters
    ----------
    model : nn.Module
        Run in evaluation mode without gradients; left as it was.
    state : mapping from str to Tensor
        Its parameters and buffers: the objects themselves, under the names that the program shall use.
    batch : Batch
        Up to 64 of its samples are used, in the dtype of the model.

    Returns
    -------
    program : Program
    constants : dict of str to Tensor
        Tensors that the forward takes from elsewhere, under names that `state` does not have.

    Raises
    ------
    ProblemError
        The model fails on the batch.
    UnsupportedError
        What it does cannot be followed, is random, or hangs on the number of samples; the text names the step.
    """
    rows = min(len(batch), _ROWS)
    # one sample alone is no sign of what many do: a squeeze would take it for a dimension to drop
    sizes = (rows, rows - 1, rows // 2) if rows > 3 else (rows, rows + 1, rows + 2)
    first, other, third = (_taken(batch, torch.arange(size) % rows) for size in sizes)
    one = _watched(model, state, first)
    try:
        two = _watched(model, state, other)
    except ProblemError as error:
        raise UnsupportedError(
            f"model ({type(model).__name__}) takes {len(first)} samples and fails on {len(other)} "
            f"({first_line(error.__cause__ or error)}); pass one that takes any number of them, exported with "
            "dynamic_shapes, say"
        ) from error
    program, constants = merged(one, two, len(first), len(other))
    program = without_unused(program)
    for step in program.steps[len(program.inputs) :]:
        resolve(step.target)
    # two sizes cannot tell B from B², nor show that a tensor was changed behind the back of a later step
    agree(program, {**state, **constants}, model, third, 0)
    return program, constants


def agree(program: Program, state: Mapping[str, Tensor], model: nn.Module, batch: Batch, index: int) -> None:
    """Refuse a batch on which the model does not give what the program gives: its forward takes another path.

    Raises
    ------
    UnsupportedError
        It does not.
    """
    wanted = output_of(call(model, batch, index), model)
    try:
        same = _same(run(program, state, batch), wanted)
    except _FAILURES:
        same = False
    if not same:
        raise UnsupportedError(
            f"the forward of {type(model).__name__} does not do on batches[{index}] what it did when it was observed: "
            "its path hangs on the data, or it changes tensors in place that other steps read; rewrite that"
        )


def _same(given: Tensor, wanted: Tensor) -> bool:
    if given.shape != wanted.shape:
        return False
    given, wanted = given.double(), wanted.double()
    equal = (given == wanted) | (given.isnan() & wanted.isnan())
    gap = torch.where(equal, 0, given - wanted).norm()
    return bool(gap <= 1e-9 * torch.where(wanted.isfinite(), wanted, 0).norm())


def call(model: nn.Module, batch: Batch, index: int) -> Any:
    """Run a model on one batch in evaluation mode; what the model itself raises comes back naming the batch.

    Raises
    ------
    ProblemError
        The model fails.
    """
    like = next((p for p in (*model.parameters(), *model.buffers()) if p.is_floating_point()), None)

    def moved(tensor: Tensor) -> Tensor:
        # copied, because a first layer that works in place would otherwise change the user's data
        if like is None:
            return tensor.clone()
        return tensor.to(like.device, like.dtype if tensor.is_floating_point() else tensor.dtype, copy=True)

    inputs = [moved(tensor) for tensor in batch.inputs]
    kwargs = {key: moved(tensor) for key, tensor in batch.kwargs.items()}
    try:
        with evaluating(model), torch.no_grad():
            return model(*inputs, **kwargs)
    except NetTrimError:
        raise
    except _FAILURES as error:
        shapes = ", ".join(str(tuple(tensor.shape)) for tensor in (*inputs, *kwargs.values()))
        raise ProblemError(
            f"model ({type(model).__name__}) fails on batches[{index}] with inputs of shape {shapes} "
            f"({first_line(error)}); pass batches that the model can be called on"
        ) from error


def output_of(result: Any, model: nn.Module) -> Tensor:
    """Return the one tensor that a model's result is about: itself, its ``logits``, or the only tensor in it.

    Raises
    ------
    UnsupportedError
        There is no such tensor.
    """
    if isinstance(result, Tensor):
        return result
    entries = dict(result) if isinstance(result, Mapping) else None
    for name in ("logits", "last_hidden_state"):
        found = entries.get(name) if entries is not None else getattr(result, name, None)
        if isinstance(found, Tensor):
            return found
    inside = entries.values() if entries is not None else result if isinstance(result, (tuple, list)) else ()
    tensors = [value for value in inside if isinstance(value, Tensor)]
    if len(tensors) == 1:
        return tensors[0]
    raise UnsupportedError(
        f"model ({type(model).__name__}) returns a {type(result).__name__} with {len(tensors)} tensors, none of "
        "them called logits; wrap it so that it returns one tensor"
    )


class _Mode(TorchFunctionMode):
    """Notes every call of a torch function that gives tensors."""

    def __init__(self, watched: Watched, where: list[str]) -> None:
        super().__init__()
        self.watched, self.where = watched, where

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.multi_head_attention_forward:
            with self, _opened():
                return func(*args, **kwargs)
        if torch._C._functorch.maybe_current_level() is not None:
            return func(*args, **kwargs)
        # named before the call: afterwards a step that works in place has changed what it was given
        target = name_of(func)
        step, pure = self._step(target, args, kwargs) if target else (None, True)
        tensors = [leaf for leaf in leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        versions, dice = [_version(tensor) for tensor in tensors], _dice(tensors)
        result = func(*args, **kwargs)
        if step is None:
            return result
        if any(not torch.equal(a, b) for a, b in zip(dice, _dice(tensors), strict=True)):
            raise UnsupportedError(
                f"forward{inside(step.where)} draws random numbers ({step.op}), also in evaluation mode; make that "
                "hang on self.training, or register what was drawn as a buffer"
            )
        changed = [tensor for tensor, version in zip(tensors, versions, strict=True) if _version(tensor) != version]
        if changed and (pure or any(tensor is not tensors[0] for tensor in changed)):
            _refuse_writing(step.where, step.op)
        given = [result] if isinstance(result, Tensor) else result if isinstance(result, (tuple, list)) else []
        if not any(isinstance(value, Tensor) for value in given):
            self.watched.reads |= step.op in _READS
            return result
        self.watched.reads |= step.op in _SELECTS or _by_mask(step.op, tensors)
        self.watched.add(step, result)
        if changed:
            # the same tensor, which only some functions return
            self.watched.source[id(tensors[0])] = Ref(len(self.watched.steps) - 1)
        return result

    def _step(self, target: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Step, bool]:
        """Return the step that gives what a call gives without changing what it is handed, and whether it is it."""
        where = self.where[-1] if self.where else ""
        last = target.split(".")[1] if target.startswith("aten.") else target.rpartition(".")[2]
        if last in _WRITERS or kwargs.get("out") is not None:
            _refuse_writing(where, last.strip("_"))
        named_args, named_kwargs = substitute((args, kwargs), self.watched.named)
        asked = bool(kwargs.get("inplace"))
        if asked:
            named_kwargs["inplace"] = False
        step = Step(_out_of_place(target, last), named_args, named_kwargs, where)
        return step, not asked and step.target == target


def _refuse_writing(where: str, op: str) -> None:
    raise UnsupportedError(
        f"forward{inside(where)} writes into a tensor in place ({op}), which cannot be followed; "
        "use torch.where or torch.cat"
    )


def _out_of_place(target: str, last: str) -> str:
    """Return the name of the function that gives the same and leaves its arguments alone."""
    if not works_in_place(target):
        return target
    if last in OPERATORS:
        return f"torch.Tensor.{OPERATORS[last]}"
    if target.startswith("aten."):
        return target.replace(f".{last}.", f".{last[:-1]}.")
    names = (target[:-1], f"torch.Tensor.{last[:-1]}", f"torch.{last[:-1]}", f"torch.{last[:-1]}s_like")
    return next((name for name in names if find_function(name)), target)


def _version(tensor: Tensor) -> int:
    """Return how often a tensor was written into."""
    return 0 if tensor.is_inference() else int(tensor._version)


def _dice(tensors: list[Tensor]) -> list[Tensor]:
    """Return the state of all random generators that a function of some tensors may draw from."""
    devices = {tensor.device for tensor in tensors if tensor.device.type == "cuda"}
    return [torch.get_rng_state(), *(torch.cuda.get_rng_state(device) for device in sorted(devices, key=str))]


def _by_mask(op: str, tensors: list[Tensor]) -> bool:
    return op == "getitem" and any(tensor.dtype in (torch.bool, torch.uint8) for tensor in tensors[1:])


@contextmanager
def _opened() -> Iterator[None]:
    """Let attention be followed call by call, which torch otherwise hands over as one."""
    functional: Any = F
    kept = functional.has_torch_function
    functional.has_torch_function = lambda *_: False
    try:
        yield
    finally:
        functional.has_torch_function = kept


def _watched(model: nn.Module, state: Mapping[str, Tensor], batch: Batch) -> Watched:
    """Run a model once and return what it did."""
    watched = Watched(state)
    where: list[str] = []
    names = {id(module): name for name, module in model.named_modules()}
    given: dict[str | int, Tensor] = dict(enumerate(batch.inputs)) | batch.kwargs
    for key, tensor in given.items():
        watched.inputs.append(key)
        watched.add(Step("input", where=str(key)), tensor)

    def enter(module: nn.Module, args: Any) -> None:
        where.append(names.get(id(module), ""))

    def leave(module: nn.Module, args: Any, result: Any) -> None:
        where.pop()

    handles = [module.register_forward_pre_hook(enter) for module in model.modules()]
    handles += [module.register_forward_hook(leave, always_call=True) for module in model.modules()]
    mode = _Mode(watched, where)
    try:
        with mode:
            result = _plain_call(model, batch)
    finally:
        for handle in handles:
            handle.remove()
    found = watched.source.get(id(output_of(result, model)))
    if not isinstance(found, Ref):
        raise UnsupportedError(
            f"the output of {type(model).__name__} does not come from its input, step by step; wrap it so that it does"
        )
    watched.output = found
    return watched


def _plain_call(model: nn.Module, batch: Batch) -> Any:
    """Run a model on the very tensors of a batch, which are told apart by identity."""
    try:
        with evaluating(model), torch.no_grad():
            return model(*batch.inputs, **batch.kwargs)
    except NetTrimError:
        raise
    except _FAILURES as error:
        shapes = ", ".join(str(tuple(tensor.shape)) for tensor in (*batch.inputs, *batch.kwargs.values()))
        raise ProblemError(
            f"model ({type(model).__name__}) fails on batches[0] with inputs of shape {shapes} "
            f"({first_line(error)}); pass batches that the model can be called on"
        ) from error


def _taken(batch: Batch, rows: Tensor) -> Batch:
    return Batch(
        tuple(tensor[rows.to(tensor.device)] for tensor in batch.inputs),
        {key: tensor[rows.to(tensor.device)] for key, tensor in batch.kwargs.items()},
    )
