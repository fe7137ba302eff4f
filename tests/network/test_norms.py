"""Bounds on operator norms: never below a power iteration or the written-out operator, and not far above."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from scipy.sparse.linalg import LinearOperator, eigsh

from nettrim.errors import ProblemError
from nettrim.network import norms
from nettrim.network.norms import NormBound, conv_norm, cover, frobenius_conv_norm, l1_conv_norm, linear_norm

PROPERTY = settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))


def apply(x, weight, stride, padding, dilation, groups):
    """The layer without its bias, on inputs (P, C, L) or (P, C, H, W)."""
    x = F.pad(x, [zeros for pair in reversed(padding) for zeros in pair])
    forward = F.conv1d if weight.dim() == 3 else F.conv2d
    return forward(x, weight, stride=stride, dilation=dilation, groups=groups)


def written_out(weight, size, *, stride, padding, dilation, groups):
    """The whole operator, groups and all, column by column."""
    channels = weight.shape[1] * groups
    units = torch.eye(channels * math.prod(size), dtype=torch.float64).reshape(-1, channels, *size)
    return apply(units, weight, stride, padding, dilation, groups).flatten(1)


def on_a_ring(weight, size, *, stride, dilation, groups):
    """The operator with periodic borders: its norm is at most the supremum over all frequencies."""
    channels = weight.shape[1] * groups
    units = torch.eye(channels * math.prod(size), dtype=torch.float64).reshape(-1, channels, *size)
    reach = [d * (k - 1) for d, k in zip(dilation, weight.shape[2:], strict=True)]
    for axis, extra in enumerate(reach, start=2):
        units = torch.cat([units] * (1 + -(-extra // units.shape[axis])), axis)
        units = units.narrow(axis, 0, size[axis - 2] + extra)
    return apply(units, weight, stride, [(0, 0)] * len(size), dilation, groups).flatten(1)


def norm_of(matrix):
    if matrix.numel() < 10**5:
        return float(torch.linalg.matrix_norm(matrix, ord=2))
    gram = matrix @ matrix.T if len(matrix) < matrix.shape[1] else matrix.T @ matrix  # in good time, and good to 1e-14
    return math.sqrt(float(torch.linalg.eigvalsh(gram)[-1]))


def power_iteration(weight, size, steps=200, **setting):
    """``‖K x‖ / ‖x‖`` after many steps with autograd's adjoint: at most the norm, whatever the number of steps."""
    x = torch.randn(1, weight.shape[1] * setting["groups"], *size, dtype=torch.float64)
    gain = 0.0
    for _ in range(steps):
        x = (x / x.norm()).requires_grad_()
        y = apply(x, weight, **setting)
        gain = float(y.detach().norm())
        if gain == 0.0:
            return 0.0
        (x,) = torch.autograd.grad(y, x, y.detach())
    return gain


@st.composite
def layers(draw, largest_kernel=5, channels=4):
    count = draw(st.integers(1, 2))

    def each(low, high):
        return tuple(draw(st.integers(low, high)) for _ in range(count))

    kernel, stride, dilation = each(1, largest_kernel), each(1, 3), each(1, 2)
    padding = tuple((draw(st.integers(0, 2)), draw(st.integers(0, 2))) for _ in range(count))
    groups = draw(st.integers(1, 3))
    inside = 1 if draw(st.booleans()) else draw(st.integers(1, channels))
    shape = (groups * draw(st.integers(1, channels)), inside, *kernel)
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10**6)))
    weight = torch.randn(shape, generator=generator, dtype=torch.float64)
    kind = draw(st.sampled_from(["normal", "positive", "sparse", "low rank", "zero"]))
    if kind == "positive":
        weight = weight.abs()
    elif kind == "sparse":
        weight = weight * (torch.rand(shape, generator=generator) < 0.3)
    elif kind == "low rank":
        weight = weight[:1] * torch.randn(shape[0], *[1] * (count + 1), generator=generator, dtype=torch.float64)
    elif kind == "zero" and draw(st.booleans()):
        weight = weight * 0
    return weight, {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}


def smallest(weight, setting):
    """The smallest input per dimension that holds one window."""
    return [
        max(1, d * (k - 1) + 1 - sum(pair))
        for d, k, pair in zip(setting["dilation"], weight.shape[2:], setting["padding"], strict=True)
    ]


@PROPERTY
@given(layers(), st.data())
def test_the_operator_of_a_small_input_is_exact(layer, data):
    weight, setting = layer
    size = tuple(low + data.draw(st.integers(0, 5)) for low in smallest(weight, setting))
    assume(weight.shape[1] * math.prod(size) <= 600)
    truth = norm_of(written_out(weight, size, **setting))
    bound = conv_norm(weight, input_size=size, **setting)
    assert truth <= bound.value <= truth * (1 + 1e-7) + 1e-12
    assert bound.method in ("operator eigenvalue", "singular value", "absolute taps", "frobenius")


@PROPERTY
@given(layers(), st.data())
def test_no_input_size_exceeds_the_bound_for_all(layer, data):
    weight, setting = layer
    size = tuple(low + data.draw(st.integers(0, 9)) for low in smallest(weight, setting))
    assume(setting["groups"] * weight.shape[1] * math.prod(size) <= 1500)
    truth = norm_of(written_out(weight, size, **setting))
    bound = conv_norm(weight, **setting).value
    assert truth <= bound
    crude = frobenius_conv_norm(weight, stride=setting["stride"], dilation=setting["dilation"])
    assert bound <= min(crude, l1_conv_norm(weight)) * (1 + 1e-12)


@PROPERTY
@given(layers())
def test_never_below_a_power_iteration(layer):
    weight, setting = layer
    size = (60,) if weight.dim() == 3 else (17, 22)
    reached = power_iteration(weight, size, steps=60, **setting)
    assert reached <= conv_norm(weight, input_size=size, **setting).value
    assert reached <= conv_norm(weight, **setting).value


@PROPERTY
@given(layers(largest_kernel=4, channels=2))
def test_close_to_the_supremum_that_rings_approach(layer):
    """A ring of 12 or 96 points samples the symbol on its own frequencies, strides and dilations in their place."""
    weight, setting = layer
    size = (96,) if weight.dim() == 3 else (12, 12)
    setting = {key: setting[key] for key in ("stride", "dilation", "groups")}
    supremum = norm_of(on_a_ring(weight, size, **setting))
    bound = conv_norm(weight, padding=[(0, 0)] * len(size), **setting)
    assert supremum <= bound.value
    # the ring's own frequencies miss the supremum by what Ehlich and Zeller allow; a dilation skips some of them
    worst = 1.0
    for k, s, d, points in zip(weight.shape[2:], setting["stride"], setting["dilation"], size, strict=True):
        common = math.gcd(s, d)
        degree, seen = (-(-k * common // s) - 1) / 2, points // s // math.gcd(d // common, points // s)
        assume(degree < seen / 3)
        worst /= math.cos(math.pi * degree / seen)
    assert bound.value <= 1.01 * worst * supremum + 1e-12


# the parts


def test_cover_counts_the_windows():
    """One column of the unfolding operator is one pixel: its entries are the windows that read it."""
    for k, s, d in itertools.product(range(1, 7), range(1, 5), range(1, 4)):
        size = 40
        seen = written_out(torch.eye(k, dtype=torch.float64)[:, None], (size,), stride=(s,), padding=[(9, 9)],
                           dilation=(d,), groups=1)  # fmt: skip
        assert cover((k,), (s,), (d,)) == int(seen.sum(1).max()), (k, s, d)
    assert cover((5, 3), (2, 1), (1, 1)) == 9


@pytest.mark.parametrize(("kernel", "stride"), [((3, 3), (1, 1)), ((5, 4), (2, 3)), ((2, 2), (3, 3)), ((5, 5), (2, 2))])
def test_unfolding_gains_at_most_the_root_of_the_cover(kernel, stride):
    """``fold(unfold(1))`` is the diagonal of the operator's Gram matrix."""
    pixels = torch.ones(1, 1, 30, 30, dtype=torch.float64)
    counts = F.fold(F.unfold(pixels, kernel, stride=stride), (30, 30), kernel, stride=stride)
    assert cover(kernel, stride, (1, 1)) == int(counts.max())


@pytest.mark.parametrize("taps", range(2, 9))
def test_a_grid_misses_the_maximum_by_no_more_than_the_cosine(taps):
    """Even numbers of taps have a half-integer degree; ``cos(d ω)`` between two points of the grid attains it."""
    generator = np.random.default_rng(taps)
    everywhere = np.linspace(0, 2 * np.pi, 4001)
    worst = 0.0
    for size in (taps, 3 * taps + 1, 2 * (taps - 1), 5 * (taps - 1), 8 * (taps - 1)):
        if size < taps:
            continue
        factor = 1 / math.cos(math.pi * (taps - 1) / (2 * size))
        grid = 2 * np.pi * np.arange(size) / size
        turned = np.exp(1j * np.pi / size * np.arange(taps)) * ([1] + [0] * (taps - 2) + [1])
        tried = [generator.normal(size=(taps, 3, 2)) + 1j * generator.normal(size=(taps, 3, 2)) for _ in range(30)]
        for coefficients in [turned[:, None, None], *tried]:

            def gain(frequencies, c=coefficients):
                symbols = np.tensordot(np.exp(1j * np.outer(frequencies, np.arange(taps))), c, 1)
                return np.linalg.norm(symbols, 2, axis=(1, 2)).max()

            ratio = gain(everywhere) / gain(grid)
            assert ratio <= factor * (1 + 1e-9)
            worst = max(worst, ratio / factor)
    assert worst >= 1 - 1e-5  # the inequality cannot be improved


@pytest.mark.parametrize("sizes", [[1], [6], [7], [1, 5], [4, 1], [4, 6], [5, 5], [3, 4]])
def test_half_of_the_grid_stands_for_all(sizes):
    half = norms._half_grid(sizes)
    whole = {
        tuple(round(sign * float(w) * n / (2 * math.pi)) % n for w, n in zip(point, sizes, strict=True))
        for point in half
        for sign in (1, -1)
    }
    assert len(whole) == math.prod(sizes)
    assert len(half) <= math.prod(sizes) / 2 + 2


@pytest.mark.parametrize("shape", [(2, 3, 5, 3), (1, 4, 4, 2, 3), (3, 1, 1, 4, 3), (1, 6, 2, 1, 4), (2, 2, 3, 3, 3)])
def test_the_symbol_bound_is_the_largest_of_the_grid_times_the_factor(shape, monkeypatch):
    monkeypatch.setattr(norms, "_FINENESS", (7,))
    monkeypatch.setattr(norms, "_CHUNK", 100)
    kernel = torch.randn(shape, dtype=torch.float64)
    bound = norms._symbol_norm(kernel)
    sizes = [max(1, 7 * (k - 1)) for k in shape[3:]]
    assert bound.method == f"symbol {'x'.join(map(str, sizes))}"
    top = 0.0
    for point in itertools.product(*map(range, sizes)):
        symbols = torch.zeros(shape[:3], dtype=torch.complex128)
        for tap in itertools.product(*map(range, shape[3:])):
            angle = sum(2 * math.pi * j * k / n for j, k, n in zip(point, tap, sizes, strict=True))
            symbols += kernel[(..., *tap)] * complex(math.cos(angle), math.sin(angle))
        top = max(top, float(torch.linalg.matrix_norm(symbols, ord=2).max()))
    truth = top * math.prod(1 / math.cos(math.pi * (k - 1) / (2 * n)) for k, n in zip(shape[3:], sizes, strict=True))
    assert truth <= bound.value <= truth * (1 + 1e-4)


def test_a_certified_level_exceeds_every_eigenvalue_and_hardly_more():
    grams = torch.randn(40, 9, 9, dtype=torch.complex128)
    grams = grams @ grams.mH * torch.linspace(0.1, 1, 40)[torch.randperm(40)][:, None, None]
    top = float(torch.linalg.eigvalsh(grams).max())
    assert top <= norms._raised(top / 9, grams) <= top * (1 + 2e-4)
    assert norms._raised(top * 1.5, grams) == top * 1.5
    assert top <= norms._raised(top * 0.999, grams) <= top * (1 + 2e-4)


# known layers and known answers

PLAIN = {"stride": (1, 1), "padding": ((1, 1), (1, 1)), "dilation": (1, 1), "groups": 1}


def test_a_matrix():
    weight = torch.randn(30, 20)
    truth = norm_of(weight.double())
    assert linear_norm(weight).method == "singular value"
    assert truth <= linear_norm(weight).value <= truth * (1 + 2e-9)
    assert linear_norm(torch.zeros(3, 2)).value == 0.0
    assert linear_norm(torch.diag(torch.tensor([3.0, -4.0, 0.5]))).value == pytest.approx(4.0, rel=1e-8)


def test_one_tap_is_the_matrix_whatever_the_stride():
    weight = torch.randn(12, 7, 1, 1)
    truth = norm_of(weight.double().flatten(1))
    for stride, padding in [((1, 1), ((0, 0), (0, 0))), ((2, 3), ((1, 0), (2, 2)))]:
        bound = conv_norm(weight, stride=stride, padding=padding, dilation=(1, 1))
        assert bound.method == "singular value"
        assert truth <= bound.value <= truth * (1 + 1e-8)


def test_windows_that_do_not_overlap_are_a_matrix():
    weight = torch.randn(10, 3, 4, 4)
    bound = conv_norm(weight, stride=(4, 5), padding=((0, 0), (0, 0)), dilation=(1, 1))
    assert bound.method == "singular value"
    assert bound.value == pytest.approx(norm_of(weight.double().flatten(1)), rel=1e-8)


def test_a_mean_of_nine_pixels():
    """All taps positive: their sum is the norm, without a grid's loss."""
    bound = conv_norm(torch.full((1, 1, 3, 3), 1 / 9), **PLAIN)
    assert 1.0 <= bound.value <= 1 + 1e-7
    assert bound.method in ("absolute taps", "frobenius")


def test_a_difference_of_neighbours():
    """``x_{i+1} − x_i`` gains ``|exp(iω) − 1| ≤ 2``; on 10 pixels and zeros around them ``2 cos(π / 22)``."""
    setting = {"stride": (1,), "padding": ((1, 1),), "dilation": (1,)}
    weight = torch.tensor([[[-1.0, 1.0]]])
    assert 2.0 <= conv_norm(weight, **setting).value <= 2.01
    exact = conv_norm(weight, input_size=(10,), **setting)
    assert exact.value == pytest.approx(2 * math.cos(math.pi / 22), rel=1e-7)
    assert exact.method == "operator eigenvalue"


def test_a_symbol_that_is_zero_where_the_grid_starts(monkeypatch):
    """Differences, one frequency at a time: nothing to start from at ``ω = 0``."""
    monkeypatch.setattr(norms, "_CHUNK", 1)
    weight = torch.ones(2, 2, 1) * torch.tensor([-1.0, 0.0, 1.0])
    bound = norms._symbol_norm(weight[None].double())
    assert 4.0 <= bound.value <= 4.0 * 1.006


def test_groups_are_bounded_by_the_largest():
    weight = torch.randn(24, 2, 3, 3) * torch.arange(1, 25)[:, None, None, None]
    alone = [conv_norm(part, **PLAIN).value for part in weight.split(6)]
    together = conv_norm(weight, **{**PLAIN, "groups": 4})
    assert together.value == pytest.approx(max(alone), rel=2e-4)
    assert max(alone) == alone[-1]


def test_hundreds_of_channels_by_themselves():
    weight = torch.randn(512, 1, 3, 3, dtype=torch.float64)
    bound = conv_norm(weight, **{**PLAIN, "groups": 512})
    symbols = torch.fft.fft2(weight, s=(128, 128)).abs().max()
    assert float(symbols) <= bound.value <= 1.011 * float(symbols)


def test_a_large_operator_of_few_rows_is_written_out_by_its_adjoint():
    weight = torch.randn(8, 64, 4, 3, dtype=torch.float64)
    setting = {"stride": (3, 2), "padding": ((1, 0), (0, 2)), "dilation": (1, 2), "groups": 2}
    bound = conv_norm(weight, input_size=(9, 8), **setting)
    truth = norm_of(written_out(weight, (9, 8), **setting))
    assert bound.method == "operator eigenvalue"
    assert truth <= bound.value <= truth * (1 + 1e-6)
    assert bound.value < conv_norm(weight, **setting).value


def test_the_first_layer_of_lenet():
    weight = torch.randn(20, 1, 5, 5, dtype=torch.float64)
    setting = {**PLAIN, "padding": ((0, 0), (0, 0))}
    exact, general = conv_norm(weight, input_size=(28, 28), **setting), conv_norm(weight, **setting)
    assert (exact.method, general.method) == ("operator eigenvalue", "symbol 128x128")
    truth = norm_of(written_out(weight, (28, 28), **setting))
    assert truth <= exact.value <= truth * (1 + 1e-7)
    assert exact.value <= general.value <= 1.05 * exact.value


@pytest.mark.parametrize("scale", [1e-200, 1e200])
def test_scale(scale):
    weight = torch.randn(4, 3, 3, 3, dtype=torch.float64)
    assert conv_norm(weight * scale, **PLAIN).value == pytest.approx(conv_norm(weight, **PLAIN).value * scale, rel=1e-8)


def test_zeros_are_bounded_by_zero():
    for size in (None, (8, 8)):
        assert conv_norm(torch.zeros(4, 3, 3, 3), input_size=size, **PLAIN).value == 0.0
    assert frobenius_conv_norm(torch.zeros(2, 1, 3), stride=(1,), dilation=(1,)) == 0.0


def test_the_weight_is_neither_changed_nor_followed_by_gradients():
    weight = torch.nn.Parameter(torch.randn(4, 3, 3, 3))
    before = weight.detach().clone()
    assert isinstance(conv_norm(weight, **PLAIN), NormBound)
    assert weight.grad is None
    assert torch.equal(weight, before)
    assert conv_norm(weight, **PLAIN) == conv_norm(before.double(), **PLAIN)


def test_the_crude_bounds():
    weight = torch.tensor([[[1.0, -2.0, 2.0]]])
    assert l1_conv_norm(weight) == pytest.approx(5.0)
    assert frobenius_conv_norm(weight, stride=(1,), dilation=(1,)) == pytest.approx(3 * math.sqrt(3))
    assert frobenius_conv_norm(weight, stride=(2,), dilation=(1,)) == pytest.approx(3 * math.sqrt(2))
    assert frobenius_conv_norm(weight, stride=(2,), dilation=(2,)) == pytest.approx(3 * math.sqrt(3))


# refusals


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_nan_and_infinity_are_refused(bad):
    weight = torch.randn(4, 3, 3, 3)
    weight[1, 2, 0, 1] = bad
    for call in (
        lambda: conv_norm(weight, **PLAIN),
        lambda: linear_norm(weight.flatten(1)),
        lambda: l1_conv_norm(weight),
        lambda: frobenius_conv_norm(weight, stride=(1, 1), dilation=(1, 1)),
    ):
        with pytest.raises(ProblemError, match="1 NaN or infinite"):
            call()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"stride": (1,)}, "stride"),
        ({"stride": (0, 1)}, "stride"),
        ({"stride": (1.5, 1)}, "stride"),
        ({"dilation": (1, 0)}, "dilation"),
        ({"padding": ((1, 1),)}, "padding"),
        ({"padding": ((1, -1), (0, 0))}, "padding"),
        ({"groups": 3}, "groups"),
        ({"groups": 0}, "groups"),
        ({"input_size": (8,)}, "input_size"),
        ({"input_size": (0, 8)}, "input_size"),
        ({"input_size": (8, 2), "dilation": (1, 2)}, "input_size .* smaller than one window"),
    ],
)
def test_wrong_settings_are_refused(change, message):
    with pytest.raises(ProblemError, match=message):
        conv_norm(torch.randn(4, 3, 3, 3), **(PLAIN | change))


@pytest.mark.parametrize("shape", [(3, 3), (2, 2, 2, 2, 2), (0, 3, 3)])
def test_what_is_no_kernel_is_refused(shape):
    with pytest.raises(ProblemError, match="weight has shape"):
        l1_conv_norm(torch.ones(shape))
    with pytest.raises(ProblemError, match="weight has shape"):
        linear_norm(torch.ones(*shape, 1))
    with pytest.raises(ProblemError, match="complex64"):
        linear_norm(torch.ones(2, 2, dtype=torch.complex64))


# 512 x 512 x 3 x 3


def kernels_at_random(kind, width=512):
    """Ten kernels of a wide layer: normal, as initialised, and with structure that trained ones show."""
    shape, generator = (width, width, 3, 3), torch.Generator().manual_seed(len(kind))
    normal = torch.randn(shape, generator=generator)
    smooth = torch.tensor([1.0, 2.0, 1.0])
    if kind == "normal":
        return normal
    if kind == "kaiming":
        return normal * math.sqrt(2 / (9 * width))
    if kind == "uniform":
        return torch.rand(shape, generator=generator) * 2 - 1
    if kind == "with a mean":
        return normal + 0.05
    if kind == "pruned":
        return normal * (torch.rand(shape, generator=generator) < 0.1)
    if kind == "smooth":
        return normal[..., :1, :1] * smooth * smooth[:, None]
    if kind == "edges":
        return normal[..., :1, :1] * torch.tensor([-1.0, 0.0, 1.0]) * smooth[:, None] + 0.1 * normal
    if kind == "identity":
        middle = torch.zeros(3, 3)
        middle[1, 1] = 1.0
        return normal / math.sqrt(9 * width) + torch.eye(width)[..., None, None] * middle
    if kind == "low rank":
        return torch.einsum("mrij,rc->mcij", normal[:, :20], normal[:20, :, 0, 0])
    assert kind == "decaying channels"
    return normal * torch.logspace(0, -2, width)[:, None, None, None]


def kernel_by_training(task, width=512, steps=12):
    """A kernel after some steps of a task on smooth images: to take noise away, to move them, to find their edges."""
    generator = torch.Generator().manual_seed(len(task))
    kernel = torch.randn(width, width, 3, 3, generator=generator) * math.sqrt(1 / (9 * width))
    kernel.requires_grad_()
    optimizer = torch.optim.Adam([kernel], lr=1e-3)
    first = last = None
    for _ in range(steps):
        coarse = torch.randn(4, width // 8, 4, 4, generator=generator).repeat_interleave(8, 1)
        clean = F.interpolate(coarse, size=(12, 12), mode="bilinear", align_corners=False)
        noisy = clean + 0.5 * torch.randn(clean.shape, generator=generator)
        target = {"denoise": clean, "shift": clean.roll(1, 3), "edges": clean - F.avg_pool2d(clean, 3, 1, 1)}[task]
        loss = F.mse_loss(F.conv2d(noisy, kernel, padding=1), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        first, last = first or loss.item(), loss.item()
    assert last < 0.7 * first, "it did learn"
    return kernel.detach()


def gain_on(weight, size, steps=12):
    """``‖K x‖ / ‖x‖`` for the best direction of restarted Lanczos: more than a power iteration finds in many steps."""
    shape = (1, weight.shape[1], *size)
    single = weight.float()

    def gram(x):
        y = F.conv2d(torch.from_numpy(x.astype(np.float32)).reshape(shape), single, padding=1)
        return F.conv_transpose2d(y, single, padding=1).flatten().numpy()

    operator = LinearOperator((math.prod(shape),) * 2, matvec=gram, dtype=np.float32)
    start = np.random.default_rng(0).normal(size=math.prod(shape)).astype(np.float32)
    _, vectors = eigsh(operator, k=1, ncv=steps, v0=start, tol=2e-3)
    # the quotient itself in float64: below the norm, however rough the direction
    x = torch.from_numpy(vectors[:, 0]).double().reshape(shape)
    return float(F.conv2d(x, weight.double(), padding=1).norm() / x.norm())


KINDS = ("normal", "kaiming", "uniform", "with a mean", "pruned", "smooth", "edges", "identity", "low rank")
KINDS = (*KINDS, "decaying channels")


@pytest.mark.parametrize("kind", KINDS)
def test_kernels_of_a_narrow_layer(kind):
    weight = kernels_at_random(kind, width=48)
    reached = gain_on(weight, (32, 32))
    assert reached <= conv_norm(weight, **PLAIN).value <= 1.05 * reached


WIDE = [*KINDS, "train denoise", "train shift", "train edges"]
ALWAYS = ("normal", "low rank", "train edges")  # one of each sort; the others take minutes together


@pytest.mark.parametrize(
    "kind", [kind if kind in ALWAYS else pytest.param(kind, marks=pytest.mark.slow) for kind in WIDE]
)
def test_kernels_of_a_wide_layer(kind, record_property):
    weight = kernel_by_training(kind.split()[1]) if kind.startswith("train") else kernels_at_random(kind)
    reached, bound = gain_on(weight, (32, 32)), conv_norm(weight, **PLAIN)
    record_property("ratio", bound.value / reached)
    print(f"{kind}: {bound.value / reached:.4f} by {bound.method}")
    assert reached <= bound.value <= 1.05 * reached
