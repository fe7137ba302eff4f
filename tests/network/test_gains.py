"""Gains are never exceeded by pairs of inputs, random or sought out, and are attained where the formula is exact."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from nettrim.errors import ProblemError
from nettrim.network.batches import Batch
from nettrim.network.gains import Flow, combine, flow
from nettrim.network.observe import observe
from nettrim.network.program import Count, Held, Ref, Step, leaves, resolve, substitute

PROPERTY = settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
DOUBLE = {"dtype": torch.float64}


class Forward(nn.Module):
    """A function of the inputs and of some parameters, as a module."""

    def __init__(self, function, parameters=()):
        super().__init__()
        self.function = function
        self.weights = nn.ParameterList([nn.Parameter(p, requires_grad=False) for p in parameters])

    def forward(self, *inputs):
        return self.function(*inputs, *self.weights)


def replayed(program, state, inputs):
    """Every step with its arguments and what it gives."""
    values, calls = list(inputs), [None] * len(inputs)

    def look(leaf):
        if isinstance(leaf, Ref):
            return values[leaf.step] if leaf.item is None else values[leaf.step][leaf.item]
        if isinstance(leaf, Count):
            return leaf.fixed + leaf.each * len(inputs[0])
        return state[leaf.name] if isinstance(leaf, Held) else leaf

    for step in program.steps[len(inputs) :]:
        calls.append(substitute((step.args, step.kwargs), look))
        values.append(resolve(step.target)(*calls[-1][0], **calls[-1][1]))
    return calls, values


def norm(x, y):
    pairs = zip(leaves(x), leaves(y), strict=True)
    real = [(a, b) for a, b in pairs if isinstance(a, torch.Tensor) and a.is_floating_point()]
    return max([float((b.double() - a.double()).norm()) for a, b in real], default=0.0)


def bound_of(found, errors):
    """The bound on the result from those on what it reads."""
    terms = [0.0 if g == 0 or b == 0 else g * b for g, b in zip(found.gains, errors, strict=True)]
    return sum(terms) if found.kind == "sum" else math.hypot(*terms)


def with_weights(leaf, dense, state):
    return state[leaf.name] if isinstance(leaf, Held) else dense


def check(function, dense, pruned, parameters=(), others=None):
    """Assert every bound of a forward; return the last step's flow and which part of its bound is reached."""
    model = Forward(function, parameters).eval()
    state = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    program, constants = observe(model, state, Batch(tuple(dense), {}))
    first = {**state, **constants}
    second = {**first, **{f"weights.{k}": p for k, p in enumerate(others or parameters)}}
    return check_program(program, (first, second), (dense, pruned))


def check_program(program, states, inputs, skipped=()):
    """As `check`, of a program with the state and the inputs of either network."""
    (calls, values), (others, ends) = (replayed(program, s, x) for s, x in zip(states, inputs, strict=True))
    found, reached = None, 0.0
    for index in range(len(inputs[0]), len(program.steps)):
        step = program.steps[index]
        if step.op in skipped:
            continue
        found = flow(step, calls[index], others[index], values[index])
        assert len(found.gains) == len(step.refs)
        assert found.kind in ("sum", "stack")
        # the pruned weights on the dense inputs
        at = iter(list(leaves(calls[index])))
        mixed = substitute((step.args, step.kwargs), lambda leaf, at=at: with_weights(leaf, next(at), states[1]))
        start = resolve(step.target)(*mixed[0], **mixed[1])

        def error(ref):
            pair = [v[ref.step] if ref.item is None else v[ref.step][ref.item] for v in (values, ends)]
            return norm(*pair)

        bound, distance = bound_of(found, [error(ref) for ref in step.refs]), norm(start, ends[index])
        assert distance <= bound * (1 + 1e-8) + 1e-11, (step.target, found, distance, bound)
        assert math.isfinite(bound), (step.target, found)
        reached = distance / bound if bound else 0.0
    return found, reached


def pairs(*shapes, seed=0, scale=1.0, step=1.0):
    """Inputs of two networks."""
    generator = torch.Generator().manual_seed(seed)
    dense = [torch.randn(shape, generator=generator, **DOUBLE) * scale for shape in shapes]
    return dense, [x + step * torch.randn(x.shape, generator=generator, **DOUBLE) for x in dense]


def climb(function, shape, seed=0, steps=150):
    """The largest ``‖f(x^) − f(x)‖ / ‖x^ − x‖`` that gradient ascent finds."""
    generator = torch.Generator().manual_seed(seed)
    best = 0.0
    for scale in (0.3, 3.0):
        x = (torch.randn(shape, generator=generator, **DOUBLE) * scale).requires_grad_()
        d = torch.randn(shape, generator=generator, **DOUBLE).requires_grad_()
        optimizer = torch.optim.Adam([x, d], lr=0.1)
        for _ in range(steps):
            optimizer.zero_grad()
            ratio = (function(x + d) - function(x)).norm() / d.norm()
            best = max(best, float(ratio.detach()))
            (-ratio).backward()
            optimizer.step()
    return best


# functions of one number

SCALAR = {
    "relu": (F.relu, 1.0),
    "relu method": (lambda x: x.relu(), 1.0),
    "relu6": (nn.ReLU6(), 1.0),
    "tanh": (torch.tanh, 1.0),
    "hardtanh": (nn.Hardtanh(), 1.0),
    "softplus": (F.softplus, 1.0),
    "softplus beta": (lambda x: F.softplus(x, 3.0), 1.0),
    "softsign": (F.softsign, 1.0),
    "softshrink": (F.softshrink, 1.0),
    "tanhshrink": (F.tanhshrink, 1.0),
    "abs": (torch.abs, 1.0),
    "clamp": (lambda x: x.clamp(-1, 2), 1.0),
    "clamp min": (lambda x: torch.clamp(x, min=0.5), 1.0),
    "leaky": (F.leaky_relu, 1.0),
    "leaky steep": (lambda x: F.leaky_relu(x, -2.5), 2.5),
    "elu": (lambda x: F.elu(x, 1.7), 1.7),
    "elu flat": (lambda x: F.elu(x, 0.3), 1.0),
    "celu": (lambda x: F.celu(x, 2.0), 1.0),
    "selu": (F.selu, 1.7580993408473766),
    "sigmoid": (torch.sigmoid, 0.25),
    "gelu": (F.gelu, 1.128904145185155),
    "gelu tanh": (lambda x: F.gelu(x, approximate="tanh"), 1.1289930687),
    "silu": (F.silu, 1.0998393201),
    "mish": (F.mish, 1.0884981613),
    "logsigmoid": (F.logsigmoid, 1.0),
    "rrelu": (lambda x: F.rrelu(x, 1.0, 4.0), 2.5),
    "sin": (torch.sin, 1.0),
    "cos": (torch.cos, 1.0),
    "neg": (lambda x: -x, 1.0),
    "erf": (torch.erf, 2 / math.sqrt(math.pi)),
    "atan": (torch.atan, 1.0),
    "minus": (lambda x: 3 - x, 1.0),
    "scaled": (lambda x: 2.5 * x, 2.5),
    "divided": (lambda x: x / -4, 0.25),
    "alpha": (lambda x: torch.sub(1.0, x, alpha=3), 3.0),
    "shifted": (lambda x: x + 3, 1.0),
}


@pytest.mark.parametrize("name", SCALAR)
def test_the_largest_slope_is_the_supremum(name):
    """Neighbours on a fine grid, and far pairs: none exceeds the gain, and some come within 1e-4 of it."""
    function, expected = SCALAR[name]
    x = torch.linspace(-12, 12, 24001, **DOUBLE)
    found, _ = check(function, [x], [x + 1e-3])
    (gain,) = found.gains
    assert expected <= gain <= expected * (1 + 1e-6)
    slopes = (function(x[1:]) - function(x[:-1])).abs() / (x[1:] - x[:-1])
    assert float(slopes.max()) <= gain * (1 + 1e-9)
    assert float(slopes.max()) >= gain * (1 - 1e-3)
    far = torch.cartesian_prod(x[::400], x[7::400])
    assert bool(
        ((function(far[:, 0]) - function(far[:, 1])).abs() <= gain * (far[:, 0] - far[:, 1]).abs() + 1e-12).all()
    )


@pytest.mark.parametrize("name", ["hardswish", "hardsigmoid"])
def test_slopes_of_functions_that_the_overrides_leave_out(name):
    x = torch.linspace(-5, 5, 10001, **DOUBLE)
    function = getattr(F, name)
    found = flow(Step(f"torch.nn.functional.{name}", (Ref(0),)), ((x,), {}), ((x + 1,), {}), function(x))
    slope = float(((function(x[1:]) - function(x[:-1])) / (x[1:] - x[:-1])).abs().max())
    assert slope <= found.gains[0] <= slope * 1.001


def test_softplus_jumps_at_its_threshold():
    dense, pruned = torch.tensor([[0.99, -3.0]], **DOUBLE), torch.tensor([[1.001, -2.0]], **DOUBLE)
    found, _ = check(lambda x: F.softplus(x, 1.0, 1.0), [dense], [pruned])
    assert found.gains[0] > 10
    assert found.method == "measured slope"
    assert check(lambda x: F.softplus(x, 1.0, 1.0), [dense], [dense - 0.5])[0].gains == (1.0,)


def test_prelu_takes_the_pruned_parameter():
    dense, pruned = pairs((6, 3, 4))
    found, _ = check(
        F.prelu, dense, pruned, [torch.tensor([0.1, 9.0, 0.2], **DOUBLE)], [torch.tensor([0.1, -3.0, 0.2], **DOUBLE)]
    )
    assert found.gains[0] == pytest.approx(3.0)


# softmax


@pytest.mark.parametrize("size", [1, 2, 3, 10])
def test_softmax_and_log_softmax_attain_the_norm_of_their_jacobians(size):
    for function, constant in [(torch.softmax, 0.5), (torch.log_softmax, math.sqrt(size)), (F.softmin, 0.5)]:
        dense, pruned = pairs((8, size, 3), scale=4, step=0.1)
        found, _ = check(lambda x, f=function: f(x, 1), dense, pruned)
        assert found.gains == (pytest.approx(constant),)
        largest = 0.0
        for top, sign in itertools.product((1, 2), (1, -1)):
            at = sign * torch.tensor([20.0] * min(top, size) + [0.0] * (size - top), **DOUBLE)
            jacobian = torch.autograd.functional.jacobian(lambda x, f=function: f(x, 0), at)
            largest = max(largest, float(torch.linalg.matrix_norm(jacobian, ord=2)))
        assert largest <= constant + 1e-9
        if size > 1:
            assert largest >= constant - 1e-6


# numbers that are moved, copied, summed, averaged

LINEAR = {
    "flatten": (lambda x: x.flatten(1), 1.0),
    "reshape": (lambda x: x.reshape(len(x), -1), 1.0),
    "view": (lambda x: x.view(len(x), -1), 1.0),
    "transpose": (lambda x: x.transpose(1, 2), 1.0),
    "permute": (lambda x: x.permute(0, 3, 1, 2), 1.0),
    "mT": (lambda x: x.mT, 1.0),
    "slice": (lambda x: x[:, 1:], 1.0),
    "integer": (lambda x: x[..., 0], 1.0),
    "narrow": (lambda x: x.narrow(1, 0, 2), 1.0),
    "roll": (lambda x: x.roll(1, 2), 1.0),
    "flip": (lambda x: x.flip(1), 1.0),
    "zero pad": (lambda x: F.pad(x, (1, 2)), 1.0),
    "crop": (lambda x: F.pad(x, (-1, 2)), 1.0),
    "value pad": (lambda x: F.pad(x, (1, 2), value=7.0), 1.0),
    "dropout": (nn.Dropout(0.5).eval(), 1.0),
    "dropout2d": (lambda x: F.dropout2d(x, 0.5, False), 1.0),
    "pixel shuffle": (lambda x: F.pixel_shuffle(x, 2), 1.0),
    "split": (lambda x: x.split(2, 1)[1], 1.0),
    "chunk": (lambda x: x.chunk(2, 1)[0], 1.0),
    "unbind": (lambda x: x.unbind(1)[2], 1.0),
    "torch split": (lambda x: torch.split(x, 3, 1)[0], 1.0),
    "double": (lambda x: x.double(), 1.0),
    "reflect": (lambda x: F.pad(x, (2, 1, 0, 0), mode="reflect"), math.sqrt(3)),
    "replicate": (lambda x: F.pad(x, (2, 1, 3, 0), mode="replicate"), math.sqrt(12)),
    "circular": (lambda x: F.pad(x, (4, 3, 1, 1), mode="circular"), math.sqrt(6)),
    "index": (lambda x: x[:, torch.tensor([0, 2, 0, 0])], math.sqrt(3)),
    "index select": (lambda x: x.index_select(1, torch.tensor([1, 1])), math.sqrt(2)),
    "expand": (lambda x: x[:, :, None].expand(-1, -1, 5, -1, -1), math.sqrt(5)),
    "repeat": (lambda x: x.repeat(1, 2, 1, 3), math.sqrt(6)),
    "tile": (lambda x: torch.tile(x, (1, 2)), math.sqrt(2)),
    "interleave": (lambda x: x.repeat_interleave(3, 1), math.sqrt(3)),
    "sum": (lambda x: x.sum((1, 2)), math.sqrt(12)),
    "sum all": (lambda x: x.sum(), None),
    "mean": (lambda x: x.mean(1, keepdim=True), 0.5),
    "mean torch": (lambda x: torch.mean(x, dim=(2, 3)), 1 / math.sqrt(12)),
    "nearest": (lambda x: F.interpolate(x, scale_factor=2), 2.0),
    "nearest uneven": (lambda x: F.interpolate(x, size=(5, 6)), 2.0),
    "bilinear": (lambda x: F.interpolate(x, scale_factor=3, mode="bilinear"), None),
    "area": (lambda x: F.interpolate(x, size=(2, 2), mode="area"), None),
    "cumsum": (lambda x: x.cumsum(1), None),
    "stack": (lambda x: torch.stack([x, x], 1), 1.0),
    "cat": (lambda x: torch.cat([x, x, x], 1), 1.0),
}


@pytest.mark.parametrize("name", LINEAR)
def test_linear_functions_against_the_written_out_operator(name):
    function, expected = LINEAR[name]
    dense, pruned = pairs((3, 4, 3, 4))
    found, _ = check(function, dense, pruned)
    if expected is not None:
        assert max(found.gains) == pytest.approx(expected, rel=1e-8)
    shape = (3, 4, 3, 4)
    matrix = torch.autograd.functional.jacobian(function, torch.zeros(shape, **DOUBLE)).reshape(-1, math.prod(shape))
    truth = float(torch.linalg.matrix_norm(matrix, ord=2))
    whole = found.gains[0] if len(found.gains) == 1 else bound_of(found, [1.0] * len(found.gains))
    assert truth <= whole * (1 + 1e-9)
    assert truth >= whole * (0.6 if name in ("bilinear", "area", "cumsum") else 1 - 1e-8)


ORDER = {
    "amax": lambda x: x.amax(1),
    "max dim": lambda x: x.max(1)[0],
    "max all": lambda x: torch.max(x),
    "min": lambda x: torch.min(x, 1).values,
    "sort": lambda x: x.sort(1)[0],
    "median": lambda x: x.median(1).values,
    "norm": lambda x: x.norm(dim=1),
    "vector norm": lambda x: torch.linalg.vector_norm(x, dim=1),
    "logsumexp": lambda x: x.logsumexp(1),
}


@pytest.mark.parametrize("name", ORDER)
def test_functions_of_several_numbers_that_gain_one(name):
    for seed, step in itertools.product(range(3), (1e-3, 1.0, 30.0)):
        found, _ = check(ORDER[name], *pairs((5, 6), seed=seed, step=step))
        assert found.gains == (1.0,)
    assert 0.8 <= climb(ORDER[name], (2, 4)) <= 1 + 1e-9


# windows


@st.composite
def pools(draw):
    count = draw(st.integers(1, 2))
    kernel = tuple(draw(st.integers(1, 4)) for _ in range(count))
    stride = tuple(draw(st.integers(1, 4)) for _ in range(count))
    padding = tuple(draw(st.integers(0, k // 2)) for k in kernel)
    dilation = tuple(draw(st.integers(1, 2)) for _ in range(count))
    size = tuple(d * (k - 1) + 1 + draw(st.integers(0, 6)) for k, d in zip(kernel, dilation, strict=True))
    return kernel, stride, padding, dilation, size, draw(st.booleans())


@PROPERTY
@given(pools())
def test_max_pooling_counts_the_windows_of_a_pixel(pool):
    """One raised pixel raises all windows that cover it, and nothing else does more."""
    kernel, stride, padding, dilation, size, ceil = pool
    function = {1: F.max_pool1d, 2: F.max_pool2d}[len(size)]

    def apply(x):
        return function(x, kernel, stride, padding, dilation, ceil)

    dense, pruned = pairs((2, 1, *size))
    found, _ = check(apply, dense, pruned)
    zeros, raised = torch.zeros(1, math.prod(size), **DOUBLE), torch.eye(math.prod(size), **DOUBLE)
    distance = apply(raised.reshape(-1, 1, *size)) - apply(zeros.reshape(-1, 1, *size))
    assert found.gains[0] == pytest.approx(float(distance.flatten(1).norm(dim=1).max()))
    assert found.method == "windows per pixel"


@PROPERTY
@given(pools(), st.booleans(), st.sampled_from([None, 1, 3, 20]))
def test_average_pooling_sums_the_weights_of_a_pixel(pool, include, divisor):
    kernel, stride, padding, _, size, ceil = pool
    if len(size) == 1:
        divisor = None

    def apply(x):
        if len(size) == 1:
            return F.avg_pool1d(x, kernel, stride, padding, ceil, include)
        return F.avg_pool2d(x, kernel, stride, padding, ceil, include, divisor)

    dense, pruned = pairs((2, 1, *size))
    found, _ = check(apply, dense, pruned)
    rows = apply(torch.eye(math.prod(size), **DOUBLE).reshape(-1, 1, *size)).flatten(1).T
    assert float(torch.linalg.matrix_norm(rows, ord=2)) <= found.gains[0]
    # pixel by pixel, window by window
    squares = [sum(float(row[p]) * float(row.sum()) for row in rows if row[p] > 0) for p in range(rows.shape[1])]
    assert found.gains[0] == pytest.approx(math.sqrt(max(squares)))


def test_average_pooling_without_overlap_is_attained():
    dense, pruned = pairs((2, 3, 6, 6))
    assert check(nn.AvgPool2d(3), dense, pruned)[0].gains[0] == pytest.approx(1 / 3)
    assert check(lambda x: x.mean((2, 3)), dense, pruned)[0].gains[0] == pytest.approx(1 / 6)
    assert check(nn.AdaptiveAvgPool2d(1), dense, [x + 1 for x in dense])[1] == pytest.approx(1.0)


@pytest.mark.parametrize(("size", "windows"), [((7, 5), (3, 2)), ((4, 4), (4, 1)), ((5, 3), (8, 3)), ((9, 9), 4)])
def test_adaptive_pooling(size, windows):
    dense, pruned = pairs((2, 1, *size))
    eye = torch.eye(math.prod(size), **DOUBLE).reshape(-1, 1, *size)
    found, _ = check(lambda x: F.adaptive_max_pool2d(x, windows), dense, pruned)
    distance = F.adaptive_max_pool2d(eye, windows)
    assert found.gains[0] == pytest.approx(float(distance.flatten(1).norm(dim=1).max()))
    found, _ = check(lambda x: F.adaptive_avg_pool2d(x, windows), dense, pruned)
    truth = float(torch.linalg.matrix_norm(F.adaptive_avg_pool2d(eye, windows).flatten(1), ord=2))
    assert truth <= found.gains[0] <= 1.5 * truth
    found, _ = check(lambda x: F.adaptive_max_pool1d(x, 3), *pairs((2, 2, 7)))
    assert found.gains[0] == pytest.approx(math.sqrt(2))


# sums and products


def test_sums_broadcast():
    dense, pruned = pairs((5, 4, 3), (5, 1, 3), seed=1)
    found, _ = check(lambda x, y: torch.add(x, y, alpha=-2), dense, pruned)
    assert found == Flow("sum", (1.0, 2 * math.sqrt(4)), "sum")
    found, reached = check(lambda x, y: x - y, dense, [dense[0] + 1, dense[1] - 1])
    assert found.gains == (1.0, 2.0)
    assert reached == pytest.approx(1.0)
    found, _ = check(lambda x, w: w + x, [dense[1]], [pruned[1]], [torch.ones(4, 1, **DOUBLE)])
    assert found.gains == (2.0,)
    assert check(lambda x, y: torch.rsub(x, y, alpha=3), dense, pruned)[0].gains == (3.0, 2.0)


def test_products_with_weights_take_the_pruned_ones():
    dense, pruned = pairs((5, 4, 3))
    old, new = torch.tensor([9.0, 9.0, 9.0], **DOUBLE), torch.tensor([0.5, -2.0, 1.0], **DOUBLE)
    found, _ = check(lambda x, w: x * w, dense, pruned, [old], [new])
    assert found.gains[0] == pytest.approx(2.0)
    found, _ = check(lambda x, w: x / w, dense, pruned, [old], [new])
    assert found.gains[0] == pytest.approx(2.0)
    found, _ = check(lambda x, w: x[:, :1] * w, dense, pruned, [old.expand(4, 3)], [new.expand(4, 3)])
    assert found.gains[0] == pytest.approx(4.0)  # each number meets four weights of at most 2
    found, _ = check(lambda x, w: x @ w, dense, pruned, [torch.eye(3, **DOUBLE)], [torch.diag(new)])
    assert found.gains[0] == pytest.approx(2.0)


PRODUCTS = {
    "mul": (lambda x, y: x * y, (4, 3, 5), (4, 3, 5)),
    "mul broadcast": (lambda x, y: x * y, (4, 3, 5), (4, 3, 1)),
    "mul both": (lambda x, y: x * y, (4, 1, 5), (4, 3, 1)),
    "div": (lambda x, y: x / (y.abs() + 1), (4, 3, 5), (4, 1, 5)),
    "rdiv": (lambda x, y: (2 / (x.abs() + 1)) - y, (4, 3), (4, 3)),
    "matmul": (lambda x, y: x @ y, (4, 3, 5), (4, 5, 2)),
    "matmul four": (lambda x, y: x @ y, (4, 3, 2, 5), (4, 1, 5, 6)),
    "matmul shared": (lambda x, y: x[:, None] @ y, (4, 3, 5), (4, 2, 5, 3)),
    "bmm": (lambda x, y: torch.bmm(x, y.mT), (4, 3, 5), (4, 7, 5)),
    "one for all": (lambda x, y: x @ y[0], (4, 3, 5), (4, 5, 6)),
    "vector": (lambda x, y: x @ y[0], (4, 3, 5), (4, 5)),
    "addmm": (lambda x, y: torch.addmm(x[0], x, y[0], beta=2, alpha=-3), (4, 4), (4, 4, 4)),
    "baddbmm": (lambda x, y: torch.baddbmm(y, x, y), (4, 3, 3), (4, 3, 3)),
    "rmatmul": (lambda x, y: x.__rmatmul__(y), (4, 3, 5), (4, 2, 3)),
    "maximum": (lambda x, y: torch.maximum(x, y), (4, 3), (4, 1)),
    "max of two": (lambda x, y: torch.max(x, y), (4, 3), (4, 3)),
    "clamp tensor": (lambda x, y: x.clamp(min=y), (4, 3), (4, 1)),
    "cat": (lambda x, y: torch.cat((x, y), 1), (4, 3), (4, 5)),
    "expand as": (lambda x, y: x.expand_as(y), (4, 1), (4, 5)),
    "type and view as": (lambda x, y: x.type_as(y).view_as(y), (4, 6), (4, 2, 3)),
    "filled with a mean": (lambda x, y: x.masked_fill(torch.ones(4, 3).tril().bool()[:1], y.mean()), (4, 3), (4, 5)),
    "filled shape": (lambda x, y: torch.zeros_like(x) + y, (4, 3), (4, 3)),
    "square": (lambda x, y: x.square() + y**2, (4, 3), (4, 3)),
    "powers": (lambda x, y: x**3 + (y.abs() + 0.1) ** 1.5, (4, 3), (4, 3)),
    "roots": (lambda x, y: (x.abs() + 0.1).sqrt() * (y.square() + 0.1).rsqrt(), (4, 3), (4, 3)),
    "more roots": (lambda x, y: (x.abs() + 0.1) ** 0.5 + (y.abs() + 0.1) ** -0.5, (4, 3), (4, 3)),
    "poles": (lambda x, y: (x.abs() + 0.1) ** -2.5 + (y.abs() + 0.1).reciprocal(), (4, 3), (4, 3)),
    "exp and log": (lambda x, y: x.exp() + (y.abs() + 0.1).log(), (4, 3), (4, 3)),
    "glu": (lambda x, y: F.glu(x) + y, (4, 6), (4, 3)),
    "own rms": (lambda x, y: x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) + y, (4, 6), (4, 6)),
}  # fmt: skip


@pytest.mark.parametrize("name", PRODUCTS)
def test_measured_products_are_never_exceeded(name):
    function, *shapes = PRODUCTS[name]
    best = 0.0
    for seed, scale, step in itertools.product(range(6), (0.1, 1.0, 5.0), (1e-4, 0.3, 4.0)):
        dense, pruned = pairs(*shapes, seed=seed, scale=scale, step=step)
        best = max(best, check(function, dense, pruned)[1])
        best = max(best, check(function, dense, [pruned[0], dense[1]])[1])
        best = max(best, check(function, dense, [dense[0], pruned[1]])[1])
    assert best > 0.3


@PROPERTY
@given(st.integers(0, 10**6), st.integers(1, 4), st.integers(1, 4), st.booleans(), st.booleans())
def test_the_worst_matrix_error_is_attained(seed, rows, columns, batched, large):
    """An error along the top singular vector, or the top eigenvector of what a shared operand meets."""
    dense, _ = pairs((6, rows, 3), (6, 3, columns), seed=seed)
    right = dense[1] if batched else dense[1][:1]
    if large:
        dense[0][2] *= 50  # the item that decides
    gram = dense[0].mT @ dense[0]
    gram = gram if batched else gram.sum(0, keepdim=True)
    levels, vectors = torch.linalg.eigh(gram)
    item = int(levels[:, -1].argmax())
    error = torch.zeros_like(right)
    error[item, :, 0] = vectors[item, :, -1]
    step = Step("torch.matmul", (Ref(0), Ref(1)))
    found = flow(step, ((dense[0], right), {}), ((dense[0], right + error), {}), dense[0] @ right)
    assert float((dense[0] @ error).norm()) == pytest.approx(found.gains[1], rel=1e-7)


def test_large_matrices_are_bounded_by_powers():
    x = torch.randn(1, 700, 600, **DOUBLE)
    found = flow(Step("torch.matmul", (Ref(0), Ref(1))), ((x, x.mT), {}), ((x, x.mT + 1), {}), x @ x.mT)
    truth = float(torch.linalg.matrix_norm(x, ord=2).max())
    assert truth <= found.gains[1] <= 1.06 * truth


def test_a_square_is_exact():
    dense, pruned = torch.tensor([[1.0, 2.0]], **DOUBLE), torch.tensor([[1.0, 5.0]], **DOUBLE)
    for function in (lambda x: x * x, lambda x: x**2, lambda x: x.square()):
        found, reached = check(function, [dense], [pruned])
        assert reached == pytest.approx(1.0)
        assert sum(found.gains) == pytest.approx(7.0)


def test_a_gated_unit_passes_on_what_its_gate_lets_through():
    """One number and its gate, far apart and near: each of the two decides somewhere."""
    for a, b in itertools.product((-9.0, 0.0, 9.0), (-4.0, 0.0, 4.0)):
        x = torch.tensor([[a, b]], **DOUBLE)
        for da, db in [(1e-6, 0.0), (0.0, 1e-6), (3.0, 5.0), (a * 1e-6, 1e-6)]:
            check(F.glu, [x], [x + torch.tensor([[da, db]], **DOUBLE)])
    x = torch.tensor([[9.0, 0.0]], **DOUBLE)
    worst = torch.tensor([[0.5, 9 / 4]], **DOUBLE) * 1e-6
    assert check(F.glu, [x], [x + worst])[1] == pytest.approx(1.0, rel=1e-5)


# attention

ATTENTION = {
    "plain": ({}, (5, 2, 6, 3), (5, 2, 4, 3), (5, 2, 4, 7)),
    "causal": ({"is_causal": True}, (5, 2, 4, 3), (5, 2, 4, 3), (5, 2, 4, 3)),
    "scale": ({"scale": 3.0}, (5, 6, 3), (5, 4, 3), (5, 4, 2)),
    "shared keys": ({}, (5, 3, 6, 3), (5, 1, 4, 3), (5, 1, 4, 3)),
    "grouped": ({"enable_gqa": True}, (5, 4, 6, 3), (5, 2, 4, 3), (5, 2, 4, 3)),
    "one key": ({}, (5, 6, 3), (5, 1, 3), (5, 1, 3)),
}


@pytest.mark.parametrize("name", ATTENTION)
def test_attention_is_never_exceeded(name):
    options, *shapes = ATTENTION[name]

    def function(q, k, v):
        return F.scaled_dot_product_attention(q, k, v, **options)

    best = torch.zeros(3)
    for seed, scale, step in itertools.product(range(5), (0.1, 1.0, 4.0), (1e-3, 0.5, 5.0)):
        dense, pruned = pairs(*shapes, seed=seed, scale=scale, step=step)
        found, _ = check(function, dense, pruned)
        assert found.method == "measured scale"
        for at in range(3):
            one = [pruned[k] if k == at else dense[k] for k in range(3)]
            best[at] = max(best[at], check(function, dense, one)[1])
    assert float(best[2]) > 0.5
    if name != "one key":
        assert float(best[:2].min()) > 0.02
    else:
        assert found.gains[:2] == (pytest.approx(0.0, abs=1e-6),) * 2  # a softmax over one key is constant


def test_attention_masks():
    dense, pruned = pairs((5, 2, 6, 3), (5, 2, 4, 3), (5, 2, 4, 7), seed=3)
    seen = torch.rand(6, 4) > 0.4
    seen[:, 0] = True
    added = torch.randn(2, 6, 4, **DOUBLE)
    attend = F.scaled_dot_product_attention
    check(lambda q, k, v: attend(q, k, v, seen), dense, pruned)
    check(lambda q, k, v: attend(q, k, v, attn_mask=added), dense, pruned)
    # a mask that is computed carries an error itself
    dense, pruned = pairs((5, 2, 6, 3), (5, 2, 4, 3), (5, 2, 4, 7), (5, 1, 6, 4), seed=4)
    found, _ = check(lambda q, k, v, m: attend(q, k, v, m), dense, pruned)
    assert found.gains[3] > 0
    found, reached = check(lambda q, k, v, m: attend(q, k, v, m), dense, [*dense[:3], pruned[3]])
    assert 0.01 < reached < 1
    first = attend(*dense[:3], dense[3])
    step = Step("torch.nn.functional.scaled_dot_product_attention", (Ref(0), Ref(1), Ref(2)), {"dropout_p": 0.5})
    assert (
        flow(step, (tuple(dense[:3]), {"dropout_p": 0.5}), (tuple(pruned[:3]), {"dropout_p": 0.5}), first).gains
        == (math.inf,) * 3
    )


def test_the_value_gain_of_uniform_attention_is_attained():
    """All queries look at the first key: its value counts once per query."""
    q, k, v = torch.ones(1, 9, 2, **DOUBLE), torch.zeros(1, 3, 2, **DOUBLE), torch.randn(1, 3, 4, **DOUBLE)
    k[0, 0] = 40.0
    other = v.clone()
    other[0, 0] += 1
    found, reached = check(F.scaled_dot_product_attention, [q, k, v], [q, k, other])
    assert found.gains[2] == pytest.approx(3.0)
    assert reached == pytest.approx(1.0)


def test_grouped_heads_read_the_same_values():
    """Three query heads read one value, so its error counts √3 times; the same of keys."""
    q, k = torch.zeros(1, 3, 1, 1, **DOUBLE), torch.tensor([[[[1.0], [-1.0]]]], **DOUBLE)
    function = lambda q, k, v: F.scaled_dot_product_attention(q, k, v, enable_gqa=True)  # noqa: E731
    found, reached = check(function, [q, k, k], [q, k, k + 1])
    assert found.gains[2] == pytest.approx(math.sqrt(3 / 2))
    assert reached == pytest.approx(1.0)
    found, reached = check(function, [q + 1e-3, k * 1e-6, k], [q + 1e-3, k * 2e-6, k])
    assert found.gains[1] == pytest.approx(math.sqrt(3) * 1e-3 * math.sqrt(2) / 2)
    assert reached == pytest.approx(1.0, rel=1e-5)


def test_the_query_gain_is_attained_by_two_keys():
    q, k = torch.zeros(1, 1, 1, **DOUBLE), torch.tensor([[[1.0], [-1.0]]], **DOUBLE)
    found, reached = check(lambda q, k, v: F.scaled_dot_product_attention(q, k, v), [q, k, k], [q + 1e-4, k, k])
    assert reached == pytest.approx(1.0, rel=1e-6)
    assert found.gains[0] == pytest.approx(1.0)


# normalisation


def test_batch_norm_takes_the_pruned_parameters():
    dense, pruned = pairs((6, 3, 4))
    mean, variance = torch.zeros(3, **DOUBLE), torch.tensor([1.0, 4.0, 9.0], **DOUBLE)

    def function(x, m, v, w):
        return F.batch_norm(x, m, v, w, None, False, 0.1, 1e-3)

    old, new = torch.full((3,), 50.0, **DOUBLE), torch.tensor([1.0, -8.0, 3.0], **DOUBLE)
    found, _ = check(function, dense, pruned, [mean, variance, old], [mean, variance, new])
    assert found.gains[0] == pytest.approx(8 / math.sqrt(4.001))

    def plain(x, m, v, w):
        return torch.batch_norm(x, w, None, m, v, False, 0.1, 1e-3, False)

    assert check(plain, dense, pruned, [mean, variance, old], [mean, variance, new])[0].gains[0] == found.gains[0]
    step = Step("torch.nn.functional.batch_norm", (Ref(0), None, None), {"training": True})
    dense, pruned = (((x[0], None, None), {"training": True}) for x in (dense, pruned))
    assert flow(step, dense, pruned, dense[0][0]).gains == (math.inf,)


NORMS = {
    "layer": (lambda x: F.layer_norm(x, (6,)), (5, 4, 6)),
    "layer of two": (lambda x: F.layer_norm(x, (4, 6), eps=0.1), (5, 4, 6)),
    "group": (lambda x: F.group_norm(x, 2), (5, 4, 6)),
    "instance": (lambda x: F.instance_norm(x), (5, 4, 6)),
    "rms": (lambda x: F.rms_norm(x, (6,)), (5, 4, 6)),
    "rms eps": (lambda x: F.rms_norm(x, (6,), eps=0.5), (5, 4, 6)),
    "unit": (lambda x: F.normalize(x, dim=-1), (5, 4, 6)),
    "unit eps": (lambda x: F.normalize(x, dim=1, eps=2.0), (5, 4, 6)),
}


@pytest.mark.parametrize("name", NORMS)
def test_normalisation_is_never_exceeded(name):
    function, shape = NORMS[name]
    best = 0.0
    for seed, scale, step in itertools.product(range(8), (1e-3, 0.3, 1.0, 5.0), (1e-4, 0.3, 4.0)):
        dense, pruned = pairs(shape, seed=seed, scale=scale, step=step)
        best = max(best, check(function, dense, pruned)[1])
        check(function, dense, [-x for x in dense])
        check(function, dense, [x * 1.5 for x in dense])
    assert best > 0.3


@pytest.mark.parametrize("name", NORMS)
def test_normalisation_against_gradient_ascent(name):
    """Ascent on the ratio to the gain at the very pair of points."""
    function, shape = NORMS[name]
    x, y = (pairs(shape, seed=s)[0][0].requires_grad_() for s in (1, 2))
    optimizer = torch.optim.Adam([x, y], lr=0.05)
    for _ in range(60):
        optimizer.zero_grad()
        found, reached = check(function, [x.detach()], [y.detach()])
        assert reached <= 1 + 1e-9
        (-(function(x) - function(y)).norm() / (x - y).norm()).backward()
        optimizer.step()
    assert found.method == "measured norm"


def test_the_layer_norm_gain_is_attained_by_turning():
    """Equal norms, another direction: the inequality of Dunkl and Williams is an equality."""
    x = torch.tensor([[1.0, -1.0, 0.0, 0.0]], **DOUBLE)
    y = torch.tensor([[0.0, 0.0, 1.0, -1.0]], **DOUBLE)
    weight, old = torch.full((4,), 3.0, **DOUBLE), torch.ones(4, **DOUBLE)
    found, reached = check(lambda a, w: F.layer_norm(a, (4,), w, None, 0.0), [x], [y], [old], [weight])
    assert reached == pytest.approx(1.0)
    assert found.gains[0] == pytest.approx(3 * 2 / (2 * math.sqrt(0.5)))


def test_epsilon_counts_with_the_norms():
    x, y = torch.tensor([[3.0, -3.0]], **DOUBLE), torch.tensor([[1.0, -1.0]], **DOUBLE)
    for function in (lambda a: F.layer_norm(a, (2,), eps=7.0), lambda a: F.rms_norm(a, (2,), eps=7.0)):
        assert check(function, [x], [y])[0].gains[0] == pytest.approx(2 / (4 + math.sqrt(8)))
    function = lambda a: F.normalize(a, dim=1, eps=8.0)  # noqa: E731
    found, reached = check(function, [x], [y])
    assert found.gains[0] == pytest.approx(1 / 8)
    assert reached == pytest.approx(1.0)
    # from inside of the ball to the outside
    for factor in (1.0, -1.0, 0.1):
        assert check(function, [x], [20 * factor * x])[0].gains[0] == pytest.approx(1 / 8)


# integers, choices, types


def test_choices_with_the_same_mask():
    dense, pruned = pairs((5, 4, 3), (5, 1, 3))
    mask = torch.rand(4, 3) > 0.5
    mask[:, 0] = True
    found, _ = check(lambda x, y: torch.where(mask, y, x), dense, pruned)
    assert found.kind == "stack"
    assert found.gains == (pytest.approx(2.0), pytest.approx(1.0))
    found, _ = check(lambda x, y: x.where(mask, y), dense, pruned)
    assert found.gains[0] == pytest.approx(1.0)
    found, _ = check(lambda x, y: x.masked_fill(mask, -1e9) + y, dense, pruned)
    found, _ = check(lambda x, y: torch.where(mask, x, 0.0), dense, pruned)
    assert found.gains == (pytest.approx(1.0),)


def test_comparisons_that_agree_pass_nothing_on():
    dense, pruned = pairs((5, 4), step=1e-9)
    found, _ = check(lambda x: (x > 0).double(), dense, pruned)
    assert found.gains == (0.0,)
    found, _ = check(lambda x: torch.where(x > 0, x, -x), dense, pruned)
    assert found.gains[0] == 0.0


def test_comparisons_that_differ_are_not_bounded():
    dense, pruned = pairs((5, 4), step=3.0)
    for function in (lambda x: x > 0, lambda x: x.argmax(1), lambda x: torch.where(x > 0, x, -x)):
        program, state = observe(Forward(lambda x, f=function: x + 0 * f(x).sum()), {}, Batch(tuple(dense), {}))
        calls, others = (replayed(program, state, x) for x in (dense, pruned))
        step = next(k for k, s in enumerate(program.steps) if s.op in ("gt", "argmax"))
        found = flow(program.steps[step], calls[0][step], others[0][step], calls[1][step])
        assert found == Flow("sum", (math.inf,), "integers differ")


def test_lookups_by_the_same_integers():
    index = torch.randint(0, 7, (6, 3))
    weight = torch.randn(7, 4, **DOUBLE)
    found, _ = check(lambda i, w: F.embedding(i, w), [index], [index.clone()], [weight], [weight * 2])
    assert found.gains == (0.0,)
    step = Step("torch.nn.functional.embedding", (Ref(0), Held("w")))
    first, second = ((index, weight), {}), ((index + 1, weight), {})
    assert flow(step, first, second, F.embedding(index, weight)).gains == (math.inf,)
    dense, pruned = pairs((6, 5))
    found, _ = check(lambda x, i: torch.gather(x, 1, i * 0), [*dense, index], [*pruned, index.clone()])
    assert found.gains == (pytest.approx(math.sqrt(3)), 0.0)


def test_nothing_is_known_of_rounding():
    x = torch.randn(3, 4)
    for step, value in [
        (Step("torch.Tensor.half", (Ref(0),)), x.half()),
        (Step("torch.Tensor.bfloat16", (Ref(0),)), x.bfloat16()),
    ]:
        assert flow(step, ((x,), {}), ((x + 1,), {}), value) == Flow("sum", (math.inf,), "unknown")
    assert flow(Step("torch.Tensor.double", (Ref(0),)), ((x,), {}), ((x + 1,), {}), x.double()).gains == (1.0,)
    bits = ((x, torch.float64), {}), ((x + 1, torch.float64), {})
    assert flow(Step("torch.Tensor.view", (Ref(0), torch.float64)), *bits, x.view(torch.float64)).gains == (math.inf,)


UNKNOWN = {
    "hardshrink": lambda x: F.hardshrink(x),
    "threshold": lambda x: F.threshold(x, 0.5, -3.0),
    "celu": lambda x: F.celu(x, -1.0),
    "bicubic": lambda x: F.interpolate(x[:, None, None, :].expand(-1, 1, 4, 4), scale_factor=2, mode="bicubic"),
    "floor division": lambda x: torch.div(x, 0.3, rounding_mode="floor"),
    "tan": lambda x: torch.tan(x),
    "pole": lambda x: 1 / x,
    "root of zero": lambda x: (x * 0 + x.relu()).sqrt(),
    "einsum": lambda x: torch.einsum("ij,kj->ik", x, x),
    "norm of another order": lambda x: x.norm(p=1, dim=1),
}


@pytest.mark.parametrize("name", UNKNOWN)
def test_nothing_is_claimed_of_other_functions(name):
    x, y = torch.tensor([[-1.0, 0.5, 0.0, 2.0]] * 3, **DOUBLE), torch.tensor([[1.0, 0.5, 0.0, 2.5]] * 3, **DOUBLE)
    program, state = observe(Forward(UNKNOWN[name]), {}, Batch((x,), {}))
    (calls, values), (others, _) = (replayed(program, state, [a]) for a in (x, y))
    found = flow(program.steps[-1], calls[-1], others[-1], values[-1])
    assert max(found.gains) == math.inf


def test_dropout_in_training_is_not_known():
    x, y = torch.randn(3, 4), torch.randn(3, 4)
    step = Step("torch.nn.functional.dropout", (Ref(0), 0.5, True))
    assert max(flow(step, ((x, 0.5, True), {}), ((y, 0.5, True), {}), x).gains) == math.inf


def test_what_a_rule_does_not_name_is_not_known():
    x, y = torch.randn(3, 4), torch.tensor(1.0)
    found = flow(Step("torch.full_like", (Ref(0), Ref(1))), ((x, y), {}), ((x + 1, y + 1), {}), torch.full_like(x, 1.0))
    assert found.gains == (0.0, math.inf)


def test_the_same_inputs_give_the_same():
    x = torch.randn(3, 3)
    found = flow(Step("torch.tan", (Ref(0),)), ((x,), {}), ((x,), {}), x.tan())
    assert found == Flow("sum", (0.0,), "equal inputs")


# chunks


def test_flows_of_two_chunks_join_to_the_larger():
    first, second = Flow("sum", (1.0, 3.0), "a"), Flow("sum", (2.0, math.inf), "b")
    assert combine(first, second) == Flow("sum", (2.0, math.inf), "b")
    assert combine(Flow("stack", (1.0,), "a"), Flow("stack", (0.5,), "b")) == Flow("stack", (1.0,), "a")
    assert combine(Flow("stack", (1.0,), "a"), Flow("sum", (0.5,), "b")).kind == "sum"
    with pytest.raises(ProblemError, match="second has 1 gains and first 2"):
        combine(first, Flow("sum", (1.0,), "a"))


def test_the_gain_of_all_chunks_holds_for_the_whole():
    dense, pruned = pairs((12, 4, 5), (12, 5, 3), seed=8)
    step = Step("torch.matmul", (Ref(0), Ref(1)))
    parts = []
    for rows in (slice(0, 5), slice(5, 12)):
        x, y = ([t[rows] for t in pair] for pair in (dense, pruned))
        parts.append(flow(step, (tuple(x), {}), (tuple(y), {}), x[0] @ x[1]))
    whole = combine(*parts)
    distance = norm(dense[0] @ dense[1], pruned[0] @ pruned[1])
    assert distance <= bound_of(whole, [norm(a, b) for a, b in zip(dense, pruned, strict=True)])
    assert whole.gains == flow(step, (tuple(dense), {}), (tuple(pruned), {}), dense[0] @ dense[1]).gains


# whole networks

NETWORKS = {
    "transformer": (lambda: nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, activation="gelu"), (5, 6, 8)),
    "attention with weights": (lambda: _Attention(), (5, 6, 8)),
    "convolutions": (
        lambda: nn.Sequential(
            nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(3, 2), nn.Conv2d(4, 4, 2),
            nn.GroupNorm(2, 4), nn.SiLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5), nn.LogSoftmax(1)),
        (5, 3, 12, 12),
    ),
}  # fmt: skip


class _Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x):
        return self.attention(x, x, x)[0] + x


@pytest.mark.parametrize("name", NETWORKS)
def test_every_step_of_a_network_is_known_and_holds(name):
    make, shape = NETWORKS[name]
    model = make().double().eval()
    state = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    state = {key: value.detach() for key, value in state.items()}
    for key, value in model.state_dict(keep_vars=True).items():
        state[key] = value
    x = torch.randn(shape, **DOUBLE)
    program, constants = observe(model, state, Batch((x,), {}))
    state = {key: value.detach() for key, value in {**state, **constants}.items()}
    other = {
        key: value * (torch.rand(value.shape) > 0.3) if value.is_floating_point() and "running" not in key else value
        for key, value in state.items()
    }
    check_program(program, (state, other), ([x], [x.clone()]), skipped=("linear", "conv2d"))
