"""The table of rules: for every torch function that is known, how it passes errors on.

A rule is given a call and returns gains by the name of the argument, or None where its setting is not covered. What a
rule does not name and carries an error has gain infinity.

Functions of one number have the largest absolute slope, functions that only move numbers gain 1. The rules of pooling,
normalisation and attention stand in `nettrim.network.gains_layers`, the formulas in `nettrim.network.gains_data`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from nettrim.network import gains_data as data
from nettrim.network.gains_call import Call, Found, one
from nettrim.network.gains_layers import LAYERS
from nettrim.network.program import Step

Rule = Callable[[Call], "Found | None"]
Table = dict[str, tuple[Sequence[str], Rule]]

_INPUT = ("input",)


def _ops(names: str) -> list[str]:
    return names.split()


#: largest slopes of functions that have no settings, rounded up; the tests search for larger ones
_SLOPES = {
    **dict.fromkeys(
        _ops(
            "relu relu6 hardtanh tanh softsign abs absolute neg negative positive sin cos atan arctan asinh arcsinh "
            "logsigmoid log_sigmoid softshrink tanhshrink"
        ),
        1.0,
    ),
    **dict.fromkeys(_ops("sigmoid special.expit"), 0.25),
    "erf": 1.1283791671,  # 2/√π
    "silu": 1.0998394,
    "mish": 1.0884982,
    "hardswish": 1.5,
    "hardsigmoid": 0.1666666667,
    "selu": 1.7580993409,  # scale · alpha, left of zero
}
#: GELU: Φ(√2) + √2 φ(√2), at √2 where the slope x φ(x) + Φ(x) is largest; and that of its approximation
_GELU = {"none": 1.1289042, "tanh": 1.1289931}
#: functions that give every number of their input at most once
_MOVED = _ops(
    "flatten ravel reshape reshape_as view_as unsafe_view unflatten squeeze unsqueeze transpose swapaxes "
    "swapdims permute movedim moveaxis t T mT contiguous clone detach alias to to_copy type type_as double float half "
    "bfloat16 cpu cuda chunk split split_with_sizes unsafe_chunk unsafe_split tensor_split hsplit vsplit dsplit unbind "
    "narrow select slice roll flip fliplr flipud rot90 diagonal tril triu pixel_shuffle pixel_unshuffle "
    "channel_shuffle constant_pad_nd data"
)
_DROPOUTS = _ops("dropout dropout1d dropout2d dropout3d alpha_dropout feature_dropout feature_alpha_dropout")
_JOINS = _ops("cat concat concatenate stack hstack vstack dstack column_stack row_stack")
_SHAPED = _ops("zeros_like ones_like full_like new_zeros new_ones new_full")
#: the largest, smallest or middle of some numbers moves by no more than one of them; sorted lists differ least of all
_ORDERED = _ops("amax amin aminmax max min median kthvalue sort msort")


def _moved(call: Call) -> Found | None:
    # of another tensor, as in type_as and view_as, only type and shape are taken
    return Found("moved", {"input": 1.0, "other": 0.0})


def _view(call: Call) -> Found | None:
    # with a type it reads the same bits as other numbers
    kinds = [*call.pruned[0], *call.pruned[1].values()]
    return None if any(isinstance(kind, torch.dtype) for kind in kinds) else _moved(call)


def _ordered(call: Call) -> Found | None:
    other = call.pair("dim")[0]
    return _joint(call) if isinstance(other, Tensor) else Found("1-Lipschitz", {"input": 1.0})


def _slope(gain: float) -> Rule:
    return lambda call: Found("1-Lipschitz" if gain == 1 else "largest slope", {"input": gain})


def _setting(name: str, default: float, gain: Callable[[float], float]) -> Rule:
    """Return the rule of a function whose slope hangs on one number."""
    return lambda call: one(gain(float(call.setting(name, default))), "largest slope")


def _gelu(call: Call) -> Found | None:
    return one(_GELU.get(call.setting("approximate", "none")), "largest slope")


def _elu(call: Call) -> Found | None:
    if any(call.setting(name, 1) != 1 for name in ("scale", "input_scale")):
        return None
    return one(max(1.0, abs(float(call.setting("alpha", 1.0)))), "largest slope")


def _rrelu(call: Call) -> Found | None:
    if call.setting("training", False):
        return None
    slope = (call.setting("lower", 1 / 8) + call.setting("upper", 1 / 3)) / 2
    return one(max(1.0, abs(slope)), "largest slope")


def _softplus(call: Call) -> Found | None:
    """Beyond the threshold it jumps to the identity: pairs on either side of it are measured."""
    beta, threshold = float(call.setting("beta", 1.0)), float(call.setting("threshold", 20.0))
    x, y = call.pair("input")
    x, y = x.double(), y.double()
    apart = (x * beta > threshold) != (y * beta > threshold)
    if not bool(apart.any()):
        return one(1.0, "1-Lipschitz")
    x, y = x[apart], y[apart]
    change = torch.nn.functional.softplus(x, beta, threshold) - torch.nn.functional.softplus(y, beta, threshold)
    return one(max(1.0, data.peak(change / (x - y))), "measured slope")


def _prelu(call: Call) -> Found | None:
    weight = call.find("weight")
    if weight is None or weight.refs:
        return None
    return one(max(1.0, data.peak(weight.pruned)), "largest slope")


def _dropout(call: Call) -> Found | None:
    training = call.setting("training", "alpha" not in call.step.op)
    return None if training and call.setting("p", 0.5) else Found("moved", {"input": 1.0})


def _softmax(call: Call) -> Found | None:
    return one(0.5, "softmax")


def _log_softmax(call: Call) -> Found | None:
    """Its Jacobian ``I − 1 pᵀ`` is a projection, of the norm of ``1 pᵀ``: at most ``√n``."""
    dim, shape = call.setting("dim"), call.out.shape
    size = max(shape, default=1) if dim is None or not shape else shape[dim]
    return one(math.sqrt(size), "log-softmax")


def _norm(call: Call) -> Found | None:
    return one(1.0, "1-Lipschitz") if call.setting("p", 2) in (2, "fro") else None


def _bounded(call: Call) -> Found | None:
    """Clamp: between numbers 1-Lipschitz; a bound that is a tensor is one of three numbers of which it gives one."""
    return _joint(call, ("input", "min", "max"))


def _joint(call: Call, names: Sequence[str] = ("input", "dim", "other")) -> Found:
    """Every number given is at most as far off as the furthest of those that it is chosen among."""
    return Found("1-Lipschitz", {name: _copies(call, name) for name in names if call.tensor(name) is not None}, "stack")


def _copies(call: Call, name: str, factor: Any = 1.0) -> float:
    """Return the gain of an operand that is broadcast to the result and multiplied with a factor."""
    own = call.tensor(name)
    if own is None:
        return 0.0
    factor = torch.as_tensor(factor, dtype=torch.float64, device=own.device)
    if factor.dim() == 0:
        # the exact one, without the 1e-9 that measured numbers are raised by
        return abs(float(factor)) * math.sqrt(call.out.numel() / own.numel()) if own.numel() else 0.0
    return data.scale_gain(factor.expand(call.out.shape), own.shape)


def _added(sign: int = 0) -> Rule:
    """Return the rule of ``input + alpha · other``; with `sign` 1 alpha belongs to the input."""

    def rule(call: Call) -> Found | None:
        alpha = float(call.setting("alpha", 1))
        factors = (alpha, 1.0) if sign else (1.0, alpha)
        gains = {name: _copies(call, name, f) for name, f in zip(("input", "other"), factors, strict=True)}
        return Found("sum", gains)

    return rule


def _double(call: Call, name: str) -> tuple[Tensor, Tensor] | None:
    """Return an operand in both networks as float64; None where it is no number."""
    pair = call.pair(name)
    if not all(isinstance(x, (Tensor, int, float)) for x in pair):
        return None
    like = call.out.device
    first, second = (torch.as_tensor(x, device=like).double() for x in pair)
    return first, second


def _product(inverse: str = "") -> Rule:
    """Return the rule of a product; of a quotient where one of the factors, `inverse`, is divided by."""

    def rule(call: Call) -> Found | None:
        left, right = _double(call, "input"), _double(call, "other")
        if left is None or right is None or call.setting("rounding_mode") is not None:
            return None
        pairs = {"input": left, "other": right}
        own = dict.fromkeys(pairs, torch.ones((), dtype=torch.float64, device=call.out.device))
        if inverse:
            x, y = pairs[inverse]
            own[inverse], pairs[inverse] = 1 / (x * y), (1 / x, 1 / y)  # 1/y − 1/x = (x − y) / (x y)
        middles = {name: data.middle(*pair) for name, pair in pairs.items()}
        factors = {"input": middles["other"] * own["input"], "other": middles["input"] * own["other"]}
        measured = all(argument is not None and argument.refs for argument in map(call.find, pairs))
        gains = {name: _copies(call, name, factor) for name, factor in factors.items()}
        return Found("measured scale" if measured or inverse == "input" else "scale", gains)

    return rule


def _measured(factor: Callable[[Tensor, Tensor], Tensor]) -> Rule:
    """Return the rule of a function of one number from a bound on its slopes between the two networks' numbers."""

    def rule(call: Call) -> Found | None:
        pair = _double(call, "input")
        return None if pair is None else one(data.peak(factor(*pair)), "measured slope")

    return rule


def _sqrt(x: Tensor, y: Tensor) -> Tensor:
    return 1 / (x.sqrt() + y.sqrt())


def _rsqrt(x: Tensor, y: Tensor) -> Tensor:
    return 1 / ((x * y).sqrt() * (x.sqrt() + y.sqrt()))


def _power(call: Call) -> Found | None:
    """``|p| max |x|^(p − 1)`` between ``x`` and ``x^``, where no pole lies between; exact for the commonest."""
    exponent = call.setting("exponent")
    if not isinstance(exponent, (int, float)):
        return None
    exact: dict[float, Callable[[Tensor, Tensor], Tensor]] = {
        2: lambda x, y: x + y,
        0.5: _sqrt,
        -0.5: _rsqrt,
        -1: lambda x, y: 1 / (x * y),
    }

    def general(x: Tensor, y: Tensor) -> Tensor:
        if exponent != round(exponent) and bool((torch.minimum(x, y) < 0).any()):
            return torch.full((1,), math.inf)
        if exponent < 1 and bool((x * y <= 0).any()):
            return torch.full((1,), math.inf)
        return exponent * torch.maximum(x.abs() ** (exponent - 1), y.abs() ** (exponent - 1))

    return _measured(exact.get(exponent, general))(call)


def _glu(call: Call) -> Found | None:
    """``a σ(b)``: midpoints of both halves, with ``|dσ| ≤ ¼ |db|``, by Cauchy and Schwarz for each number."""
    dim = call.setting("dim", -1)
    (a, b), (c, d) = (x.double().chunk(2, dim) for x in call.pair("input"))
    slopes = torch.hypot(data.middle(b.sigmoid(), d.sigmoid()), data.middle(a, c) / 4)
    return one(data.peak(slopes), "measured scale")


def _matmul(left: str = "input", right: str = "other", added: str = "") -> Rule:
    """Return the rule of a matrix product, and of ``beta · added + alpha · left @ right``."""

    def rule(call: Call) -> Found | None:
        if call.tensor(left) is None or call.tensor(right) is None:
            return None
        arguments = [call.find(left), call.find(right)]
        which = tuple(argument is not None and bool(argument.refs) for argument in arguments)
        gains = data.matmul_gains(call.pair(left), call.pair(right), (which[0], which[1]))
        scale = abs(float(call.setting("alpha", 1)))
        found = {left: gains[0] * scale, right: gains[1] * scale} if scale else {left: 0.0, right: 0.0}
        if added:
            found[added] = _copies(call, added, float(call.setting("beta", 1)))
        return Found("measured scale" if all(which) else "singular value", found)

    return rule


def _joined(call: Call) -> Found | None:
    return Found("joined", {"tensors": 1.0}, "stack")


def _sum(call: Call) -> Found | None:
    own = call.tensor()
    return None if own is None or not own.numel() else one(math.sqrt(own.numel() / call.out.numel()), "sum")


def _mean(call: Call) -> Found | None:
    own = call.tensor()
    return None if own is None or not own.numel() else one(math.sqrt(call.out.numel() / own.numel()), "mean")


def _copied(call: Call) -> Found | None:
    """Every number is copied as often as every other; what only gives a shape passes nothing on."""
    own = call.tensor()
    if own is None or not own.numel():
        return None
    return Found("copies", {"input": math.sqrt(call.out.numel() / own.numel()), "other": 0.0})


def _picked(call: Call) -> Found | None:
    """Numbers are taken by integers that are the same in both networks: counted how often each."""
    return one(call.linear(), "copies")


def _getitem(call: Call) -> Found | None:
    index = call.setting("index")
    simple = all(
        part is None or part is Ellipsis or isinstance(part, (slice, int))
        for part in (index if isinstance(index, tuple) else (index,))
    )
    return _moved(call) if simple else _picked(call)


def _where(call: Call) -> Found | None:
    condition = call.setting("condition")
    if not isinstance(condition, Tensor):
        return None
    gains = {"input": _copies(call, "input", condition.bool()), "other": _copies(call, "other", ~condition.bool())}
    return Found("chosen", {name: gain for name, gain in gains.items() if call.tensor(name) is not None}, "stack")


def _masked_fill(call: Call) -> Found | None:
    mask = call.setting("mask")
    if not isinstance(mask, Tensor):
        return None
    gains = {"input": _copies(call, "input", ~mask.bool()), "value": _copies(call, "value", mask.bool())}
    return Found("chosen", {name: gain for name, gain in gains.items() if call.tensor(name) is not None}, "stack")


def _without(call: Call) -> Found | None:
    """The result hangs on shapes only."""
    return one(0.0, "shape only")


def _same_for(names: Sequence[str], rule: Rule, ops: Sequence[str]) -> Table:
    return dict.fromkeys(ops, (names, rule))


_PAIR = ("input", "other")
_RULES: Table = {
    **{op: (_INPUT, _slope(gain)) for op, gain in _SLOPES.items()},
    **_same_for(_PAIR, _moved, _MOVED),
    **_same_for(("input", "dim"), _ordered, _ORDERED),
    **_same_for(("input", "p", "training"), _dropout, _DROPOUTS),
    "view": (_PAIR, _view),
    "leaky_relu": (("input", "negative_slope"), _setting("negative_slope", 0.01, lambda a: max(1.0, abs(a)))),
    "celu": (("input", "alpha"), _setting("alpha", 1.0, lambda a: 1.0 if a > 0 else math.inf)),
    "elu": (("input", "alpha"), _elu),
    "rrelu": (("input", "lower", "upper", "training"), _rrelu),
    "gelu": (("input", "approximate"), _gelu),
    "softplus": (("input", "beta", "threshold"), _softplus),
    "prelu": (("input", "weight"), _prelu),
    "glu": (("input", "dim"), _glu),
    "softmax": (("input", "dim"), _softmax),
    "softmin": (("input", "dim"), _softmax),
    "log_softmax": (("input", "dim"), _log_softmax),
    "logsumexp": (("input", "dim"), _slope(1.0)),  # the gradient of each is a row of probabilities
    **_same_for(("input", "p"), _norm, ("norm", "linalg.norm", "linalg.vector_norm")),
    **_same_for(("input", "min", "max"), _bounded, ("clamp", "clip")),
    "clamp_min": (("input", "min"), _bounded),
    "clamp_max": (("input", "max"), _bounded),
    **_same_for(_PAIR, _joint, ("maximum", "minimum", "fmax", "fmin")),
    **_same_for(("input", "other", "alpha"), _added(), ("add", "radd", "sub", "subtract")),
    "rsub": (("input", "other", "alpha"), _added(1)),
    **_same_for(_PAIR, _product(), ("mul", "rmul", "multiply")),
    **_same_for(_PAIR, _product("other"), ("div", "divide", "truediv", "true_divide")),
    **_same_for(_PAIR, _product("input"), ("rdiv", "rtruediv")),
    "square": (_INPUT, _measured(torch.add)),
    "sqrt": (_INPUT, _measured(_sqrt)),
    "rsqrt": (_INPUT, _measured(_rsqrt)),
    "reciprocal": (_INPUT, _measured(lambda x, y: 1 / (x * y))),
    "exp": (_INPUT, _measured(lambda x, y: torch.maximum(x, y).exp())),
    "expm1": (_INPUT, _measured(lambda x, y: torch.maximum(x, y).exp())),
    "log": (_INPUT, _measured(lambda x, y: 1 / torch.minimum(x, y).clamp(min=0.0))),
    "pow": (("input", "exponent"), _power),
    **_same_for(_PAIR, _matmul(), ("matmul", "mm", "bmm", "mv", "dot", "vdot")),
    "rmatmul": (_PAIR, _matmul("other", "input")),
    "addmm": (("input", "mat1", "mat2", "beta", "alpha"), _matmul("mat1", "mat2", "input")),
    "baddbmm": (("input", "batch1", "batch2", "beta", "alpha"), _matmul("batch1", "batch2", "input")),
    **_same_for(("tensors", "dim"), _joined, _JOINS),
    "sum": (_INPUT, _sum),
    "mean": (_INPUT, _mean),
    **_same_for(_PAIR, _copied, ("expand", "expand_as", "repeat", "tile", "broadcast_to")),
    **_same_for(("input", "repeats", "dim"), _picked, ("repeat_interleave",)),
    **_same_for(_INPUT, _picked, ("gather", "index_select", "take", "take_along_dim", "unfold", "cumsum", "trace")),
    "getitem": (("input", "index"), _getitem),
    "where": (("condition", "input", "other"), _where),
    "masked_fill": (("input", "mask", "value"), _masked_fill),
    **_same_for(_INPUT, _without, _SHAPED),
    **LAYERS,
}
#: where torch itself and methods of tensors order their arguments in another way than torch.nn.functional
_PLAIN = {
    "batch_norm": ("input", "weight", "bias", "running_mean", "running_var", "training", "momentum", "eps"),
    "instance_norm": ("input", "weight", "bias", "running_mean", "running_var", "use_input_stats", "momentum", "eps"),
}
_METHODS = {"where": ("input", "condition", "other")}
_ATEN = {"elu": ("input", "alpha", "scale", "input_scale")}


def find_rule(step: Step) -> tuple[Sequence[str], Rule | None]:
    """Return the names of a step's positional arguments and its rule; none of an unknown function."""
    op = step.op.removeprefix("functional.").lstrip("_")
    names, rule = _RULES.get(op, ((), None))
    if "nn.functional." not in step.target:
        names = _PLAIN.get(op, names)
    if step.target.startswith("torch.Tensor."):
        names = _METHODS.get(op, names)
    if step.target.startswith("aten."):
        names = _ATEN.get(op, names)
    return names, rule
