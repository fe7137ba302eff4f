"""What a model is, before anything is done to it: its prunable layers in execution order, or a refusal.

Pruning layer by layer is only right if each layer's input is known to be the previous layer's output. Module
order does not say that; the traced forward does.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch
import torch.nn.functional as F
from torch import nn
from torch.fx import Graph, Node, Tracer
from torch.nn.modules.lazy import LazyModuleMixin

from nettrim.errors import ProblemError, UnknownNameError, UnsupportedError
from nettrim.network.edit import evaluating, find_linear, first_line

_SUPPORTED = "nettrim prunes plain chains of Linear, ReLU, Dropout, Flatten and Identity"
_RELU_CALLS = {F.relu, torch.relu, torch.relu_, "relu", "relu_"}
_SHAPE_CALLS = {torch.flatten, torch.reshape, "flatten", "reshape", "view"}
# forwards are compared, not classes, so that a subclass is refused only if it changes what the layer does
_PASS_FORWARDS = {nn.Dropout.forward, nn.Flatten.forward, nn.Identity.forward}


@dataclass(frozen=True)
class LayerSpec:
    """One Linear layer of a traced model.

    Attributes
    ----------
    name : str
        Qualified name, as `model.named_modules()` gives it.
    in_features, out_features : int
        N and M: the weight has shape (M, N).
    bias : bool
        Whether the layer has a bias.
    relu : bool
        Whether the layer's output flows into a ReLU before the next Linear layer or the end.
    prune : bool
        Whether the layer was selected by `layers` and `ignore`.
    """

    name: str
    in_features: int
    out_features: int
    bias: bool
    relu: bool
    prune: bool


@dataclass(frozen=True)
class LayerGraph:
    """The Linear layers of a model in execution order: each one's output reaches the next one's input.

    Attributes
    ----------
    layers : tuple of LayerSpec
        At least one.
    """

    layers: tuple[LayerSpec, ...]

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

        Parameters
        ----------
        name : str
            Qualified name.

        Returns
        -------
        LayerSpec
            The layer of that name.

        Raises
        ------
        UnknownNameError
            No layer has that name.
        """
        for layer in self.layers:
            if layer.name == name:
                return layer
        raise UnknownNameError(f"no layer is called {name!r}; the layers are {_listed(self.names)}")


def trace(model: nn.Module, layers: str | Sequence[str] = "all", ignore: str | Sequence[str] = ()) -> LayerGraph:
    """Find the Linear layers of a model in execution order, and which of them are to be pruned.

    The model's forward is traced, not its module order read: nested containers, modules of one's own and
    functional calls (`F.relu`, `torch.flatten`, `x.view(x.size(0), -1)`, `F.dropout`) are all followed.

    Parameters
    ----------
    model : nn.Module
        A plain chain: every step reads just the step before it. Left as it is.
    layers : "all", or str or sequence of str
        Which Linear layers to prune: names or patterns such as ``"body.*"``.
    ignore : str or sequence of str
        Names or patterns of layers to leave alone, whatever `layers` says.

    Returns
    -------
    LayerGraph
        All Linear layers, also those that are not to be pruned.

    Raises
    ------
    UnsupportedError
        The model is not such a chain; the text names the step that is in the way.
    UnknownNameError
        A name or pattern matches no layer.
    ProblemError
        An argument is of the wrong kind, nothing is left to prune, or a weight is NaN or infinite.
    """
    if not isinstance(model, nn.Module):
        raise ProblemError(f"model is a {type(model).__name__}; pass a torch.nn.Module")
    if isinstance(model, nn.Linear):
        raise UnsupportedError("model is itself a Linear, whose only layer has no name; wrap it: nn.Sequential(model)")
    _refuse_hooks(model)
    relu = _follow(_forward_graph(model), model)
    if not relu:
        raise UnsupportedError(f"model ({type(model).__name__}) has no Linear layer to prune; {_SUPPORTED}")
    for name in relu:
        _check_parameters(model, name)
    chosen = _matching(layers, list(relu), "layers") - _matching(ignore, list(relu), "ignore")
    if not chosen:
        raise ProblemError(
            f"layers={layers!r} with ignore={ignore!r} leaves nothing to prune; select one of {_listed(relu)}"
        )
    specs = []
    for name, followed in relu.items():
        linear = find_linear(model, name)
        has_bias = linear._parameters["bias"] is not None
        specs.append(LayerSpec(name, linear.in_features, linear.out_features, has_bias, followed, name in chosen))
    return LayerGraph(tuple(specs))


class _LinearTracer(Tracer):
    """Keeps subclasses of Linear whole, so that a refusal can name them."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, nn.Linear) or super().is_leaf_module(m, module_qualified_name)


def _refuse_hooks(model: nn.Module) -> None:
    """Refuse code that was hung on single modules: it changes what they compute, and our copies would run it."""
    if isinstance(model, torch.jit.ScriptModule) or hasattr(model, "_orig_mod"):
        raise UnsupportedError(
            f"model ({type(model).__name__}) is compiled; pass the plain module that it was compiled from"
        )
    for name, module in model.named_modules():
        # torch's own hooks that make weights up are refused later, in words of their own
        made_up = isinstance(module, nn.Linear) and "weight" not in module._parameters
        if made_up or isinstance(module, LazyModuleMixin):
            continue
        where = f"layer {name!r}" if name else "the model"
        if module._forward_hooks or module._forward_pre_hooks:
            raise UnsupportedError(
                f"{where} ({type(module).__name__}) carries a forward hook, which would run on every copy of the "
                "model and may change what it computes; remove the hooks first, with .remove() of their handles"
            )
        if "forward" in vars(module):
            raise UnsupportedError(
                f"{where} ({type(module).__name__}) has a forward that was put on the object, not on its class; "
                "delete that attribute, or define the forward in a class"
            )


def _forward_graph(model: nn.Module) -> Graph:
    # in evaluation mode: F.dropout(x, training=self.training) enters the graph with the flag of the moment
    with evaluating(model):
        try:
            return _LinearTracer().trace(model)
        except Exception as error:  # whatever the user's forward raises when it is handed a proxy
            raise UnsupportedError(
                f"the forward of {type(model).__name__} cannot be traced by torch.fx ({first_line(error)}), "
                "most often because it branches or loops on values or shapes; rewrite it without"
            ) from error


def _follow(graph: Graph, model: nn.Module) -> dict[str, bool]:
    """Walk the traced forward; return whether each Linear layer, in execution order, flows into a ReLU."""
    relu: dict[str, bool] = {}
    current: Node | None = None
    for node in graph.nodes:
        if node.op == "placeholder":
            if node.users and current is not None:
                raise UnsupportedError(
                    f"forward reads several inputs ({current.target!r} and {node.target!r}); "
                    f"{_SUPPORTED} with one input"
                )
            current = node if node.users else current
            continue
        if _is_size(node):
            continue
        if node.op != "output":
            _apply(node, model, relu)
        sources = [source for source in node.all_input_nodes if not _is_size(source)]
        returns_more = node.op == "output" and not isinstance(node.args[0], Node)
        if sources != [current] or returns_more:
            raise UnsupportedError(
                f"{_described(node, model)} does not take just the result of the step before it, so the "
                f"model branches, drops a result or returns several; {_SUPPORTED}"
            )
        current = node
    return relu


def _apply(node: Node, model: nn.Module, relu: dict[str, bool]) -> None:
    """Note what one step of the forward means for the layers found so far, or refuse it."""
    if node.op == "call_module":
        module = model.get_submodule(str(node.target))
        forward = type(module).forward
        if forward is nn.Linear.forward:
            name = str(node.target)
            if name in relu:
                raise UnsupportedError(
                    f"layer {name!r} (Linear) is called twice in one forward, so no single input decides its "
                    "weights; give each call its own layer"
                )
            relu[name] = False
            return
        passes, is_relu = forward in _PASS_FORWARDS, forward is nn.ReLU.forward
    elif node.target is F.dropout:
        if node.kwargs.get("training", True):
            raise UnsupportedError(
                "a call of F.dropout stays random in evaluation mode; pass it training=self.training"
            )
        passes, is_relu = True, False
    else:
        passes = node.op != "get_attr" and node.target in _SHAPE_CALLS
        is_relu = node.op != "get_attr" and node.target in _RELU_CALLS
    if not passes and not is_relu:
        raise UnsupportedError(f"{_described(node, model)} cannot be handled; {_SUPPORTED}")
    if is_relu and relu:
        relu[next(reversed(relu))] = True


def _is_size(node: Node) -> bool:
    """Tell whether a step only reads or reckons with sizes, as in `x.view(x.size(0), -1)`."""
    if node.op == "call_method":
        return node.target in ("size", "dim")
    if node.op != "call_function":
        return False
    if node.target is getattr:
        return node.args[1] in ("shape", "ndim")
    return bool(node.all_input_nodes) and all(_is_size(source) for source in node.all_input_nodes)


def _described(node: Node, model: nn.Module) -> str:
    """Name a step of the forward so that its author recognises it."""
    if node.op == "call_module":
        return f"layer {str(node.target)!r} ({type(model.get_submodule(str(node.target))).__name__})"
    if node.op == "call_method":
        return f"the tensor method {str(node.target)!r} in forward"
    if node.op == "get_attr":
        return f"the direct use of {str(node.target)!r} in forward"
    if node.op == "output":
        return "the output of forward"
    return f"the call of {getattr(node.target, '__name__', node.target)!r} in forward"


def _check_parameters(model: nn.Module, name: str) -> None:
    """Refuse a layer whose weights cannot simply be read and written."""
    own = model.get_submodule(name)._parameters
    weight = own.get("weight")
    if weight is None or "bias" not in own:
        raise UnsupportedError(
            f"layer {name!r} computes its weight or bias from other tensors (a parametrization or a mask); "
            "make it plain first, with torch.nn.utils.parametrize.remove_parametrizations or "
            "torch.nn.utils.prune.remove"
        )
    if isinstance(weight, nn.parameter.UninitializedParameter) or weight.is_meta:
        raise UnsupportedError(f"layer {name!r} holds no weights yet; load them, or run one batch through the model")
    for kind, parameter in own.items():
        if parameter is None:
            continue
        if parameter.dtype not in (torch.float32, torch.float64):
            raise UnsupportedError(
                f"the {kind} of layer {name!r} is {parameter.dtype}, and weights that are rounded so coarsely miss "
                "their radius; call .float() on the model first"
            )
        bad = int((~torch.isfinite(parameter.detach())).sum())
        if bad:
            raise ProblemError(
                f"the {kind} of layer {name!r} has {bad} NaN or infinite entries; "
                "pass a model that was trained to finite weights"
            )
        for other_name, other in model.named_modules():
            if other_name != name and any(shared is parameter for shared in other._parameters.values()):
                raise UnsupportedError(
                    f"layers {name!r} and {other_name!r} share one {kind} (tied weights), so they cannot be "
                    "pruned one by one; give each its own copy"
                )


def _matching(patterns: str | Sequence[str], names: list[str], argument: str) -> set[str]:
    """Return the names that any of the patterns matches; each must match one."""
    if isinstance(patterns, str):
        if argument == "layers" and patterns == "all":
            return set(names)
        patterns = [patterns]
    if not isinstance(patterns, Sequence) or not all(isinstance(pattern, str) for pattern in patterns):
        raise ProblemError(f"{argument} is {patterns!r}; pass a name, or a list of names or patterns")
    chosen: set[str] = set()
    for pattern in patterns:
        matched = {name for name in names if name == pattern or fnmatchcase(name, pattern)}
        if not matched:
            raise UnknownNameError(
                f"{argument} names {pattern!r}, which matches no layer; the layers are {_listed(names)}"
            )
        chosen |= matched
    return chosen


def _listed(names: Sequence[str] | dict[str, bool]) -> str:
    return ", ".join(map(repr, names))
