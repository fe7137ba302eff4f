"""What a model is, before anything is done to it: a program, its layers, and what each layer's output flows into.

Pruning layer by layer is only right if each layer's input is known to come from the layers before it. Module order does
not say that; the observed forward does.
"""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from nettrim.errors import ProblemError, UnknownNameError, UnsupportedError
from nettrim.network.batches import Batch
from nettrim.network.behind import positions, relu_behind, sum_behind
from nettrim.network.checks import COMPUTED, check_dtypes, check_finite, copied, refuse_hooks
from nettrim.network.edit import raw_state
from nettrim.network.fold import Fold, fold
from nettrim.network.matrix import Window
from nettrim.network.observe import observe
from nettrim.network.program import Held, Program, Ref, Step
from nettrim.network.selection import listed, matching

#: functions that nettrim prunes the weight of
_LAYERS = {"linear", "conv1d", "conv2d"}
#: functions that multiply activations with a weight in a way that is not pruned
_WEIGHING = {"matmul", "rmatmul", "mm", "bmm", "mv", "dot", "inner", "outer", "einsum", "tensordot", "bilinear"}
_WEIGHING |= {"addmm", "addmv", "addbmm", "baddbmm", "chain_matmul", "linalg.matmul", "linalg.multi_dot"}
_WEIGHING |= {"conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d", "conv_tbc", "convolution"}
_WEIGHING |= {"lstm", "gru", "rnn_tanh", "rnn_relu", "lstm_cell", "gru_cell", "rnn_tanh_cell", "rnn_relu_cell"}


@dataclass(frozen=True)
class LayerSpec:
    """One layer of a traced model.

    Attributes
    ----------
    name : str
        Qualified name of its module, as `model.named_modules()` gives it; of its weight, where that is not called so.
    kind : str
        "linear", "conv1d" or "conv2d".
    step : int
        Where it is called.
    output : int
        The step whose output is compared: that of its ReLU, or its own.
    weight : str
        The name of its weight.
    bias_name : str or None
        The name of its bias, after batch norms are folded.
    shape : tuple of int
        Of its weight.
    in_features, out_features : int
        N and M of its matrix, N for one group.
    groups : int
    bias : bool
        Whether it has a bias, after batch norms are folded.
    relu : bool
        Whether its output flows into a ReLU and nowhere else.
    prune : bool
        Whether it was selected by `layers` and `ignore`.
    window : Window or None
        Of a convolution.
    positions : int
        How often a sample meets it.
    generation : int
        Layers of one generation do not read each other.
    sum : int or None
        The step that adds its output, which flows nowhere else, to a trunk.
    trunk : int
        Which of the two that the sum reads is the trunk; 0 where there is no sum.
    """

    name: str
    kind: str
    step: int
    output: int
    weight: str
    bias_name: str | None
    shape: tuple[int, ...]
    in_features: int
    out_features: int
    groups: int
    bias: bool
    relu: bool
    prune: bool
    window: Window | None
    positions: int
    generation: int
    sum: int | None = None
    trunk: int = 0

    @property
    def numel(self) -> int:
        """How many weights it has."""
        return self.in_features * self.out_features


@dataclass(frozen=True)
class LayerGraph:
    """A network's forward and its layers.

    Attributes
    ----------
    program : Program
        With batch norms folded.
    folds : tuple of Fold
    layers : tuple of LayerSpec
        In execution order; at least one.
    unsupported : tuple of (str, str)
        Weights that were left dense because they cannot be pruned, and why.
    """

    program: Program
    folds: tuple[Fold, ...]
    layers: tuple[LayerSpec, ...]
    unsupported: tuple[tuple[str, str], ...] = ()

    @property
    def names(self) -> tuple[str, ...]:
        """Names of all layers, in execution order."""
        return tuple(layer.name for layer in self.layers)

    @property
    def selected(self) -> tuple[LayerSpec, ...]:
        """The layers to prune, in execution order."""
        return tuple(layer for layer in self.layers if layer.prune)

    def layer(self, name: str) -> LayerSpec:
        """Look up a layer.

        Raises
        ------
        UnknownNameError
            No layer has that name.
        """
        for layer in self.layers:
            if layer.name == name:
                return layer
        raise UnknownNameError(f"no layer is called {name!r}; the layers are {listed(self.names)}")


@dataclass(frozen=True, eq=False)
class Traced:
    """A model as `prune` works on it.

    Attributes
    ----------
    graph : LayerGraph
    state : dict of str to Tensor
        Its parameters, buffers and constants in float64, batch norms not folded.
    double : nn.Module
        The copy that they belong to.
    """

    graph: LayerGraph
    state: dict[str, Tensor]
    double: nn.Module


def trace(
    model: nn.Module,
    batch: Batch,
    layers: Any = "all",
    ignore: Any = (),
    on_unsupported: str = "refuse",
) -> Traced:
    """Find the layers of a model in execution order, and which of them are to be pruned.

    Parameters
    ----------
    model : nn.Module
        Left as it is.
    batch : Batch
        Samples to observe the forward on.
    layers : "all", or str, type, or sequence of them
        Which layers to prune: names, patterns such as ``"body.*"``, classes of modules such as ``nn.Linear`` or
        ``"Linear"``.
    ignore : str, type, or sequence of them
        Layers to leave alone, whatever `layers` says.
    on_unsupported : {"refuse", "keep"}
        What to do about selected weights that cannot be pruned.

    Raises
    ------
    UnsupportedError
        What the forward does cannot be followed, or a weight that is selected cannot be pruned; the text names it.
    UnknownNameError
        A name or pattern matches no layer.
    ProblemError
        An argument is of the wrong kind, nothing is left to prune, or a weight is NaN or infinite.
    """
    if not isinstance(model, nn.Module):
        raise ProblemError(f"model is a {type(model).__name__}; pass a torch.nn.Module")
    if on_unsupported not in ("refuse", "keep"):
        raise UnknownNameError(f"on_unsupported={on_unsupported!r} is unknown: use refuse or keep.")
    if isinstance(model, nn.Linear | nn.Conv1d | nn.Conv2d):
        raise UnsupportedError(
            f"model is itself a {type(model).__name__}, whose only layer has no name; wrap it: nn.Sequential(model)"
        )
    refuse_hooks(model)
    check_dtypes(model)
    double = copied(model)
    state = raw_state(double)
    doubled = Batch(
        tuple(t.double() if t.is_floating_point() else t for t in batch.inputs),
        {key: t.double() if t.is_floating_point() else t for key, t in batch.kwargs.items()},
    )
    program, constants = observe(double, state, doubled)
    program, folds = fold(program)
    state |= constants
    modules = dict(model.named_modules())
    found, cannot = _layers(program, state, _aliases(double), constants)
    if not found and not cannot:
        raise UnsupportedError(f"model ({type(model).__name__}) has no Linear or convolutional layer to prune")
    names = [*(layer["name"] for layer in found), *cannot]
    chosen = matching(layers, names, modules, "layers") - matching(ignore, names, modules, "ignore")
    refused = {name: why for name, why in cannot.items() if name in chosen}
    if refused and on_unsupported == "refuse":
        name, why = next(iter(refused.items()))
        raise UnsupportedError(
            f'layer {name!r} {why}; or leave such layers dense: ignore them, or on_unsupported="keep"'
        )
    chosen -= set(cannot)
    if not chosen:
        raise ProblemError(
            f"layers={layers!r} with ignore={ignore!r} leaves nothing to prune; select one of {listed(names)}"
        )
    for layer in found:
        check_finite(state, layer)
    specs = tuple(LayerSpec(**layer, prune=layer["name"] in chosen) for layer in found)
    return Traced(LayerGraph(program, folds, specs, tuple(cannot.items())), state, double)


def weight_of(step: Step) -> str | None:
    """Return the name of the weight that a step of a kind that can be pruned applies, or None."""
    weight = step.argument("weight") if step.op in _LAYERS else None
    return weight.name if isinstance(weight, Held) else None


def window_of(step: Step, shape: Sequence[int]) -> tuple[Window | None, int]:
    """Return the window and the number of groups of such a step, for a weight of that shape."""
    if step.op == "linear":
        return None, 1
    stride, padding, dilation = step.argument("stride", 1), step.argument("padding", 0), step.argument("dilation", 1)
    return Window.of(tuple(shape[2:]), stride, padding, dilation), int(step.argument("groups", 1))


def _layers(
    program: Program, state: Mapping[str, Tensor], aliases: Mapping[str, list[str]], constants: Container[str]
) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """Return what is known of every layer that can be pruned, and why others cannot."""
    users = program.users()
    fed = _fed(program)
    reads: dict[str, int] = {}
    for step in program.steps:
        for held in step.held:
            reads[held] = reads.get(held, 0) + 1
    found: list[dict[str, Any]] = []
    cannot: dict[str, str] = {}
    depth = [0] * len(program.steps)
    for index, step in enumerate(program.steps):
        depth[index] = max((depth[ref.step] for ref in step.refs), default=0)
        if step.op not in _LAYERS:
            if step.op in _WEIGHING and fed[index]:
                _note_weights(program, step, fed, state, cannot)
            continue
        weight, bias = step.argument("weight"), step.argument("bias")
        used = [weight] if bias is None else [weight, bias]
        if not all(isinstance(held, Held) and held.name not in constants for held in used):
            cannot[step.where or _computed_from(program, step)] = COMPUTED
            continue
        # a weight of several names goes by that of the module that applies it
        names = aliases.get(weight.name, [weight.name])
        name = next((n for n in names if n.rpartition(".")[0] == step.where), names[0]).removesuffix(".weight")
        shared = next((held for held in used if len(aliases.get(held.name, "")) > 1), None)
        if shared is not None:
            owners = " and ".join(repr(alias.rpartition(".")[0]) for alias in aliases[shared.name])
            cannot[name] = (
                f"shares its {'weight' if shared == weight else 'bias'} with another ({owners}; tied weights), so they "
                "cannot be pruned one by one; give each its own copy"
            )
            continue
        if any(reads[held.name] > 1 for held in used):
            calls = sum(s.op in _LAYERS and s.argument("weight") == weight for s in program.steps)
            cannot[name] = (
                f"is called {calls} times in one forward, so no single input decides its weights; give each call its "
                "own layer"
                if calls > 1
                else "shares its weight or bias with another part of the model; give each its own copy"
            )
            continue
        source = step.argument("input")
        if not isinstance(source, Ref) or not fed[source.step]:
            continue  # it acts on parameters alone
        shape = tuple(state[weight.name].shape)
        window, groups = window_of(step, shape)
        output = relu_behind(program, users, index)
        found.append(
            {
                "name": name,
                "kind": step.op,
                "step": index,
                "output": index if output is None else output,
                "weight": weight.name,
                "bias_name": None if bias is None else bias.name,
                "shape": shape,
                "in_features": state[weight.name][0].numel(),
                "out_features": shape[0],
                "groups": groups,
                "bias": bias is not None,
                "relu": output is not None,
                "window": window,
                "positions": positions(step),
                "generation": depth[index],
            }
            | sum_behind(program, users, index)
        )
        depth[index] += 1
    return found, cannot


def _fed(program: Program) -> list[bool]:
    """Return for every step whether it depends on what the network is given."""
    fed: list[bool] = []
    for index, step in enumerate(program.steps):
        fed.append(index < len(program.inputs) or any(fed[ref.step] for ref in step.refs))
    return fed


def _note_weights(
    program: Program, step: Step, fed: list[bool], state: Mapping[str, Tensor], cannot: dict[str, str]
) -> None:
    """Note the matrices that a step multiplies activations with."""
    pending, seen = [*step.refs], set()
    names = list(step.held)
    while pending:
        ref = pending.pop()
        if fed[ref.step] or ref.step in seen:
            continue
        seen.add(ref.step)
        names += program.steps[ref.step].held
        pending += program.steps[ref.step].refs
    for name in names:
        if state[name].dim() >= 2 and state[name].is_floating_point() and not name.startswith("constant."):
            cannot[name.removesuffix(".weight")] = f"is used by {step.op}, which cannot be pruned"


def _computed_from(program: Program, step: Step) -> str:
    """Return the name of the first parameter that a step's weight or bias is computed from."""
    pending = [ref for ref in step.refs if ref != step.argument("input")]
    names = list(step.held)
    while pending and not names:
        source = program.steps[pending.pop(0).step]
        names, pending = list(source.held), pending + source.refs
    return names[0].removesuffix(".weight") if names else step.op


def _aliases(model: nn.Module) -> dict[str, list[str]]:
    """Return all names of every parameter, under the first of them; a module of several names counts once."""
    owners: dict[int, list[str]] = {}
    for name, module in model.named_modules():
        for key, parameter in module.named_parameters(recurse=False):
            owners.setdefault(id(parameter), []).append(f"{name}.{key}" if name else key)
    return {names[0]: names for names in owners.values()}
