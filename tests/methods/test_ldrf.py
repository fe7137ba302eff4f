"""The pieces of LDRF: decomposition and recomposition, least squares, gradient steps, settings."""

import pytest
import torch
import torch.nn.functional as F

from nettrim.core.moments import Moments
from nettrim.errors import ProblemError, UnknownNameError, UnsupportedError
from nettrim.methods.decompose import decompose, recompose
from nettrim.methods.ldrf import Ldrf
from nettrim.methods.recover import least_squares, some_patches
from nettrim.methods.squeeze import squeeze
from nettrim.network.matrix import Window, patches

CLOSE = dict(rtol=1e-9, atol=1e-9)


def random(*shape, seed=0):
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("shape", [(5, 8, 9), (8, 5, 9), (4, 9, 1), (9, 4, 1)])
def test_the_factors_make_the_weight_again(shape):
    weight = random(*shape)
    split = decompose(weight)
    assert torch.allclose(split.weight(), weight, **CLOSE)
    assert split.rank == min(shape[1], shape[0] * shape[2])
    # orthonormal over outputs and taps, so that a linear layer passes an error of the embedding on as it is
    flat = split.making.permute(0, 2, 1).reshape(-1, split.rank)
    assert torch.allclose(flat.T @ flat, torch.eye(split.rank, dtype=torch.float64), **CLOSE)
    e = random(split.rank, 7, seed=1)
    if shape[2] == 1:
        assert torch.allclose((split.making[:, :, 0] @ e).norm(dim=0), e.norm(dim=0), **CLOSE)


def test_of_a_lower_rank_it_is_the_nearest_weight():
    weight = random(6, 5, 4)
    split = decompose(weight)
    unfolded = weight.permute(0, 2, 1).reshape(24, 5)
    values = torch.linalg.svdvals(unfolded)
    for rank in (1, 3, 5):
        off = float((split.truncated(rank).weight() - weight).norm())
        assert off == pytest.approx(float(values[rank:].norm()), abs=1e-9)
    shares = values.square().cumsum(0) / values.square().sum()
    assert split.rank_at(1.0) == 5
    assert split.rank_at(float(shares[2]) - 1e-9) == 3
    assert split.rank_at(float(shares[2]) + 1e-9) == 4
    assert split.rank_at(1e-9) == 1


def test_a_weight_without_full_rank_has_that_rank():
    weight = torch.einsum("okt,ck->oct", random(6, 2, 4), random(5, 2, seed=1))
    split = decompose(weight)
    assert split.rank == 2
    assert torch.allclose(split.weight(), weight, **CLOSE)


def test_the_response_basis_orders_by_what_reaches_the_outputs():
    weight, y = random(6, 5, 1), random(300, 5, seed=1) * torch.tensor([3.0, 1.0, 0.3, 1.0, 0.0], dtype=torch.float64)
    split = decompose(weight, y.T @ y / len(y))
    outputs = y @ weight[:, :, 0].T
    assert split.rank == 4  # a channel is never active
    assert torch.allclose(y @ split.weight()[:, :, 0].T, outputs, **CLOSE)
    values = torch.linalg.svdvals(outputs)
    by_weight = decompose(weight)
    for rank in (1, 2, 3):
        off = float((y @ split.truncated(rank).weight()[:, :, 0].T - outputs).norm())
        assert off == pytest.approx(float(values[rank:].norm()), rel=1e-6)  # the best of any rank
        assert off < float((y @ by_weight.truncated(rank).weight()[:, :, 0].T - outputs).norm())


def test_a_weight_that_is_not_finite_is_refused():
    with pytest.raises(ProblemError, match="NaN or infinity"):
        decompose(random(2, 2, 1) * float("nan"))


def test_recomposition_is_exact_with_zeros_padded_and_an_intercept_is_not():
    making, reading, y = random(4, 3, 9), random(5, 3, seed=1), random(2, 5, 6, 6, seed=2)
    one = recompose(making, reading).reshape(4, 5, 3, 3)
    shift = random(3, seed=3)
    embedded = torch.einsum("ck,bchw->bkhw", reading, y)
    kernel = making.reshape(4, 3, 3, 3)
    assert torch.allclose(F.conv2d(y, one, padding=1), F.conv2d(embedded, kernel, padding=1), **CLOSE)
    folded = making.sum(2) @ shift
    two = F.conv2d(embedded + shift[:, None, None], kernel, padding=1)
    found = F.conv2d(y, one, folded, padding=1)
    assert torch.allclose(found[..., 1:-1, 1:-1], two[..., 1:-1, 1:-1], **CLOSE)
    assert float((found - two).abs().max()) > 0.1  # on the border
    valid = F.conv2d(embedded + shift[:, None, None], kernel)
    assert torch.allclose(F.conv2d(y, one, folded), valid, **CLOSE)


def test_pooling_and_embedding_do_not_commute():
    """What is fitted before the pooling is another least squares, and worse behind it."""
    y, reading = random(200, 6, 4, 4).relu(), random(6, 4, seed=1)
    kept = y[:, :3]
    target = torch.einsum("ck,bchw->bkhw", reading, F.max_pool2d(y, 2)).permute(0, 2, 3, 1).reshape(-1, 4)
    pooled = F.max_pool2d(kept, 2).permute(0, 2, 3, 1).reshape(-1, 3)
    behind = torch.linalg.lstsq(pooled, target).solution
    rows = kept.permute(0, 2, 3, 1).reshape(-1, 3)
    wanted = torch.einsum("ck,bchw->bkhw", reading, y).permute(0, 2, 3, 1).reshape(-1, 4)
    before = torch.linalg.lstsq(rows, wanted).solution
    assert float((pooled @ before - target).norm()) > 1.01 * float((pooled @ behind - target).norm())


@pytest.mark.parametrize("intercept", [True, False])
def test_least_squares_is_that_of_the_rows(intercept):
    x, y = random(60, 7) + 0.5, random(60, 3, seed=1)
    weight, bias = least_squares(Moments.of(x, y), 0.0, intercept)
    rows = torch.cat([x, torch.ones(60, 1, dtype=torch.float64)], 1) if intercept else x
    wanted = torch.linalg.lstsq(rows, y).solution.T
    assert torch.allclose(weight, wanted[:, :7], **CLOSE)
    assert torch.allclose(bias, wanted[:, 7], **CLOSE) if intercept else bias is None


def test_least_squares_of_inputs_that_hang_together_is_the_smallest():
    x, y = random(40, 5), random(40, 2, seed=1)
    x = torch.cat([x, x[:, :2], torch.zeros(40, 1, dtype=torch.float64)], 1)
    weight, _ = least_squares(Moments.of(x, y), 0.0, False)
    assert torch.allclose(weight, torch.linalg.lstsq(x, y, driver="gelsd").solution.T, rtol=1e-6, atol=1e-8)


def test_ridge_is_relative_and_spares_the_intercept():
    x, y = random(60, 4) + 1, random(60, 2, seed=1) + 5
    for scale in (1.0, 1e3):
        weight, bias = least_squares(Moments.of(scale * x, y), 0.1, True)
        centred, out = x - x.mean(0), y - y.mean(0)
        size = 0.1 * float(centred.square().mean()) * len(x)
        gram = centred.T @ centred + size * torch.eye(4, dtype=torch.float64)
        wanted = torch.linalg.solve(gram, centred.T @ out).T
        assert torch.allclose(scale * weight, wanted, **CLOSE)
        assert torch.allclose(bias, y.mean(0) - wanted @ x.mean(0), **CLOSE)


def test_survivors_by_least_squares_are_those_of_block_obs():
    x, weight = random(80, 6) @ random(6, 6, seed=2), random(3, 6, seed=1)
    kept, gone = torch.tensor([0, 2, 3, 5]), torch.tensor([1, 4])
    moments = Moments.of(x[:, kept], x @ weight.T)
    hessian = x.T @ x / len(x)
    update = weight[:, kept] + weight[:, gone] @ hessian[gone][:, kept] @ torch.linalg.inv(hessian[kept][:, kept])
    found, _ = least_squares(moments, 0.0, False)
    assert torch.allclose(found, update, rtol=1e-7, atol=1e-9)
    inverse = torch.linalg.inv(hessian)
    saliency = (weight[:, gone] @ torch.linalg.inv(inverse[gone][:, gone]) @ weight[:, gone].T).diagonal().sum()
    assert moments.error(found, None) == pytest.approx(float(saliency), rel=1e-7)


@pytest.mark.parametrize(
    ("size", "kernel", "stride", "padding", "dilation"),
    [((7, 6), (3, 2), (2, 1), ((1, 1), (0, 0)), (1, 2)), ((9,), (3,), (2,), ((1, 2),), (1,))],
)
def test_some_patches_are_those_rows_of_all(size, kernel, stride, padding, dilation):
    inputs, window = random(4, 3, *size), Window(kernel, stride, dilation, padding)
    every = patches(inputs, window).flatten(0, 1)
    for first in (0, len(every) // 2):
        chosen = torch.arange(first, len(every) - 1, 3)
        assert torch.equal(some_patches(inputs, window, chosen), every[chosen])


def lines():
    x = random(100, 4)
    return x, (x @ random(4, 3, seed=1)).relu()


def descend(steps, learning_rate, start, inputs=None, target=None):
    x, y = lines()
    held = torch.arange(90, 100)
    generator = torch.Generator().manual_seed(0)
    return squeeze(
        lambda v, p: (v @ p[0]).relu(), x if inputs is None else inputs, y if target is None else target, [start],
        held, steps, learning_rate, 1, generator,
    )  # fmt: skip


def test_steps_come_nearer_and_the_start_is_left_as_it_is():
    start = random(4, 3, seed=1) + 0.3 * random(4, 3, seed=2)
    before = start.clone()
    found = descend(300, 0.01, start)
    assert torch.equal(start, before)
    assert found.held_end < 0.01 * found.held_start
    assert 0 < found.step <= 300
    x, y = lines()
    left = ((x[90:] @ found.parameters[0]).relu() - y[90:]).square().sum()
    assert float(left / (y[90:] - y[90:].mean(0)).square().sum()) == pytest.approx(found.held_end, rel=1e-9)
    again = descend(300, 0.01, start)
    assert torch.equal(found.parameters[0], again.parameters[0])


@pytest.mark.parametrize("learning_rate", [1e3, float("1e30")])
def test_wild_steps_are_not_taken(learning_rate):
    start = random(4, 3, seed=1)
    found = descend(50, learning_rate, start)
    assert found.step == 0
    assert torch.equal(found.parameters[0], start)
    assert found.held_end == found.held_start


def test_held_out_samples_are_not_trained_on():
    x, y = lines()
    numbered, trained = torch.cat([x, torch.arange(100.0, dtype=torch.float64)[:, None]], 1), set()

    def forward(v, p):
        if torch.is_grad_enabled():
            trained.update(v[:, 4].int().tolist())
        return (v[:, :4] @ p[0]).relu()

    held = torch.tensor([3, 50, 99])
    squeeze(forward, numbered, y, [random(4, 3)], held, 50, 0.01, 1, torch.Generator().manual_seed(0))
    assert trained == set(range(100)) - {3, 50, 99}


def test_presets_are_the_baselines_on_the_same_footing():
    assert (Ldrf.thinet().selector, Ldrf.thinet().steps, Ldrf.thinet().refit) == ("thinet", 0, True)
    assert (Ldrf.lasso(ridge=0.0).selector, Ldrf.lasso(ridge=0.0).ridge) == ("lasso", 0.0)
    assert (Ldrf.cut().steps, Ldrf.cut().refit) == (0, False)
    assert (Ldrf.control().target, Ldrf.control().steps) == ("outputs", Ldrf().steps)
    assert Ldrf().as_dict() == {
        "variant": "direct", "selector": "l1", "steps": 1000, "learning_rate": 1e-2, "target": "embedding",
        "basis": "weight", "energy": 1.0, "capacity_tolerance": None, "allocate": "uniform", "ridge": 1e-6,
        "rows": None, "held": 0.1, "refit": True, "head": "fit",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("settings", "error", "text"),
    [
        ({"variant": "published"}, UnknownNameError, "direct or core"),
        ({"selector": "l2"}, UnknownNameError, "l1"),
        ({"steps": -1}, ProblemError, "steps=-1"),
        ({"steps": True}, ProblemError, "whole number"),
        ({"steps": 2.5}, ProblemError, "whole number"),
        ({"learning_rate": 0}, ProblemError, "learning_rate=0"),
        ({"learning_rate": "fast"}, ProblemError, "learning_rate='fast'"),
        ({"energy": 0.0}, ProblemError, "energy"),
        ({"energy": float("nan")}, ProblemError, "energy"),
        ({"ridge": -1.0}, ProblemError, "ridge"),
        ({"held": 0.6}, ProblemError, "held"),
        ({"rows": 3}, ProblemError, "rows"),
        ({"capacity_tolerance": 1.0}, ProblemError, "capacity_tolerance"),
        ({"capacity_tolerance": 0.01, "energy": 0.9}, ProblemError, "both say the rank"),
        ({"variant": "core", "target": "outputs"}, UnsupportedError, "no factors"),
        ({"refit": False}, UnsupportedError, "steps=0"),
        ({"refit": False, "steps": 0, "variant": "core"}, UnsupportedError, "direct"),
    ],
)
def test_settings_that_make_no_method_are_refused(settings, error, text):
    with pytest.raises(error, match=text):
        Ldrf(**settings)
