"""Bad input is refused at the door, by name; what passes is what the table of forms says."""

from __future__ import annotations

from dataclasses import FrozenInstanceError

import numpy as np
import pytest
import torch

from nettrim.core.problem import LayerProblem, build_problem
from nettrim.errors import NetTrimError, ProblemError

INF, NAN = float("inf"), float("nan")


def data(samples: int = 6, n: int = 3, m: int = 2, dtype: torch.dtype = torch.float64):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(samples, n, generator=generator, dtype=dtype)
    w = torch.randn(m, n, generator=generator, dtype=dtype)
    return x, (x @ w.T).clamp(min=0)


def spoilt(which: str, value: float):
    x, y = data()
    {"inputs": x, "targets": y}[which][4, 1] = value
    return x, y


@pytest.mark.parametrize("value", [NAN, INF, -INF])
@pytest.mark.parametrize("which", ["inputs", "targets"])
def test_nan_and_infinity(which, value):
    x, y = spoilt(which, value)
    with pytest.raises(ProblemError, match=rf"{which} holds 1 NaN or infinite entries, the first at \(4, 1\)"):
        LayerProblem(x, y, radius=1.0)


@pytest.mark.parametrize(
    ("x_shape", "y_shape", "named"),
    [
        ((0, 3), (0, 2), r"inputs has shape \(0, 3\), an empty batch"),
        ((6, 0), (6, 2), r"inputs has shape \(6, 0\), an empty batch"),
        ((6, 3), (6, 0), r"targets has shape \(6, 0\), an empty batch"),
        ((6, 3), (6,), r"targets has shape \(6,\): it must be \(P, M\)"),
        ((6, 3, 1), (6, 2), r"inputs has shape \(6, 3, 1\): it must be \(P, N\)"),
        ((6, 3), (5, 2), r"inputs has 6 rows, targets has 5.*\(6, 3\) and \(5, 2\)"),
        ((), (6, 2), r"inputs has shape \(\)"),
    ],
)
def test_shapes(x_shape, y_shape, named):
    with pytest.raises(ProblemError, match=named):
        LayerProblem(torch.ones(x_shape), torch.ones(y_shape), radius=1.0)


@pytest.mark.parametrize("dtype", [torch.int64, torch.float16, torch.bfloat16, torch.bool, torch.complex64])
@pytest.mark.parametrize("which", ["inputs", "targets"])
def test_dtypes(which, dtype):
    x, y = data()
    x, y = (x.to(dtype), y) if which == "inputs" else (x, y.to(dtype))
    with pytest.raises(ProblemError, match=rf"{which} is {dtype}: convert it to float32 or float64"):
        LayerProblem(x, y, radius=1.0)


def test_mixed_dtypes():
    x, y = data()
    with pytest.raises(ProblemError, match=r"inputs is torch\.float64 on cpu, targets is torch\.float32"):
        LayerProblem(x, y.float(), radius=1.0)


@pytest.mark.parametrize("value", ["a string", None, {"x": 1}, object(), [[1.0], [2.0, 3.0]]])
def test_what_is_no_array(value):
    _, y = data()
    with pytest.raises(ProblemError, match=f"inputs is a {type(value).__name__}: pass a torch tensor or a NumPy"):
        LayerProblem(value, y, radius=1.0)


@pytest.mark.parametrize("make", [LayerProblem, build_problem])
def test_no_amount(make):
    with pytest.raises(ProblemError, match="give exactly one of"):
        make(*data())


def test_two_amounts():
    with pytest.raises(ProblemError, match=r"exactly one of radius and lam: radius=1.0, lam=2.0 were given"):
        LayerProblem(*data(), radius=1.0, lam=2.0)
    with pytest.raises(ProblemError, match=r"epsilon=0.1 and lam=2.0 were given"):
        build_problem(*data(), epsilon=0.1, lam=2.0)
    with pytest.raises(ProblemError, match=r"epsilon=0.1 and radius=1.0 and lam=2.0 were given"):
        build_problem(*data(), epsilon=0.1, radius=1.0, lam=2.0)


@pytest.mark.parametrize("value", [0.0, -1.0, NAN, INF, -INF])
@pytest.mark.parametrize("name", ["epsilon", "radius", "lam"])
def test_amounts_out_of_range(name, value):
    with pytest.raises(ProblemError, match=rf"{name}={value:g} is out of range"):
        build_problem(*data(), **{name: value})


@pytest.mark.parametrize("name", ["epsilon", "radius", "lam"])
def test_amounts_that_are_no_number(name):
    with pytest.raises(ProblemError, match=rf"{name}='much' is no number"):
        build_problem(*data(), **{name: "much"})


@pytest.mark.parametrize("radius", [[1.0, -1.0], [1.0, NAN], [INF, 1.0], [0.0, 0.0]])
def test_radii_per_neuron_out_of_range(radius):
    with pytest.raises(ProblemError, match="radius has negative or non-finite entries, or no positive one"):
        LayerProblem(*data(), radius=torch.tensor(radius))


def test_radii_for_another_number_of_neurons():
    with pytest.raises(ProblemError, match="radius has 3 entries for 2 output neurons"):
        LayerProblem(*data(), radius=torch.ones(3))


def test_per_neuron_with_lam():
    with pytest.raises(ProblemError, match="the neurons are independent already"):
        build_problem(*data(), lam=1.0, per_neuron=True)


@pytest.mark.parametrize("form", ["cone", "", "BALL", None])
def test_unknown_form(form):
    with pytest.raises(ProblemError, match=f"form={form!r} is unknown: use one of ball, halfspace, linear"):
        LayerProblem(*data(), form=form, radius=1.0)


def test_ceiling_of_another_shape():
    with pytest.raises(ProblemError, match=r"ceiling has shape \(6, 3\), targets has \(6, 2\)"):
        LayerProblem(*data(), form="halfspace", radius=1.0, ceiling=torch.zeros(6, 3))


def test_ceiling_with_nan():
    with pytest.raises(ProblemError, match="ceiling holds 12 NaN"):
        LayerProblem(*data(), form="halfspace", radius=1.0, ceiling=torch.full((6, 2), NAN))


def test_linear_has_neither_ceiling_nor_inactive_samples():
    x, y = data()
    with pytest.raises(ProblemError, match="leave ceiling out"):
        LayerProblem(x, y, form="linear", radius=1.0, ceiling=torch.zeros(6, 2))
    with pytest.raises(ProblemError, match="leave active out"):
        LayerProblem(x, y, form="linear", radius=1.0, active=y > 0)


@pytest.mark.parametrize("active", [torch.ones(6, 2), torch.ones(6, 3, dtype=torch.bool)])
def test_active_of_another_kind(active):
    with pytest.raises(ProblemError, match=r"active has dtype .*: it must be bool and \(6, 2\)"):
        LayerProblem(*data(), radius=1.0, active=active)


@pytest.mark.parametrize("penalty", [-1.0, [1.0, -1e-9, 1.0], [1.0, NAN, 1.0], [INF, 1.0, 1.0]])
def test_penalty_out_of_range(penalty):
    with pytest.raises(ProblemError, match="penalty has negative or non-finite entries"):
        LayerProblem(*data(), radius=1.0, penalty=torch.tensor(penalty))


@pytest.mark.parametrize("shape", [(2,), (3, 2), (1, 3), (2, 3, 1)])
def test_penalty_of_another_shape(shape):
    with pytest.raises(ProblemError, match=r"penalty has shape .*: it must be a number, \(3,\) or \(2, 3\)"):
        LayerProblem(*data(), radius=1.0, penalty=torch.ones(shape))


@pytest.mark.parametrize("form", ["ball", "halfspace"])
def test_negative_targets_of_a_relu(form):
    x, y = data()
    with pytest.raises(ProblemError, match=r"targets has negative entries \(minimum -1\)"):
        LayerProblem(x, y - 1, form=form, radius=1.0)


def test_errors_are_of_one_tree():
    assert issubclass(ProblemError, NetTrimError)
    assert issubclass(ProblemError, ValueError)


def test_a_problem_is_frozen():
    problem = LayerProblem(*data(), radius=1.0)
    with pytest.raises(FrozenInstanceError, match="radius"):
        problem.radius = 2.0


def test_what_a_good_problem_holds():
    x, y = data()
    problem = LayerProblem(x, y, radius=1)
    assert (problem.samples, problem.n_inputs, problem.n_outputs) == (6, 3, 2)
    assert problem.form == "ball"
    assert not problem.per_neuron
    assert torch.equal(problem.active, y > 0)
    assert torch.equal(problem.penalty, torch.ones(2, 3, dtype=torch.float64))
    assert torch.equal(problem.anchor, y)


@pytest.mark.parametrize(("dtype", "expected"), [(np.float32, torch.float32), (np.float64, torch.float64)])
def test_numpy_keeps_its_dtype(dtype, expected):
    x, y = (a.numpy().astype(dtype) for a in data())
    problem = build_problem(x, y, epsilon=0.1, penalty=np.array([1, 0, 2]), ceiling=0 * y)
    assert problem.inputs.dtype == problem.targets.dtype == problem.ceiling.dtype == expected
    assert problem.penalty.dtype == torch.float64
    assert problem.penalty.tolist() == [[1.0, 0.0, 2.0]] * 2


def test_epsilon_is_relative_to_the_frobenius_norm():
    x, y = data()
    assert build_problem(x, y, epsilon=0.25).radius == pytest.approx(0.25 * float((y**2).sum()) ** 0.5)
    per_neuron = build_problem(x, y, epsilon=0.25, per_neuron=True)
    assert per_neuron.per_neuron
    torch.testing.assert_close(per_neuron.radius, 0.25 * (y**2).sum(0).sqrt())


def test_one_radius_for_each_neuron():
    assert build_problem(*data(), radius=0.5, per_neuron=True).radius.tolist() == [0.5, 0.5]


@pytest.mark.parametrize("per_neuron", [False, True])
def test_targets_that_are_all_zero_take_an_epsilon(per_neuron):
    x, y = data()
    problem = build_problem(x, 0 * y, epsilon=0.1, per_neuron=per_neuron)
    assert torch.as_tensor(problem.radius, dtype=torch.float64).max() > 0


@pytest.mark.parametrize("unit", [1e-50, 1e-20, 1e20, 1e50])
def test_epsilon_is_relative_in_any_unit(unit):
    x, y = data()
    expected = 0.1 * unit * float((y**2).sum()) ** 0.5
    assert build_problem(x, unit * y, epsilon=0.1).radius == pytest.approx(expected, rel=1e-12, abs=0)


def test_anchor_and_residual_by_hand():
    x = torch.eye(2, dtype=torch.float64)
    y = torch.tensor([[2.0, 0.0], [0.0, 3.0]], dtype=torch.float64)
    ceiling = torch.tensor([[9.0, 1.0], [-1.0, 9.0]], dtype=torch.float64)
    z = torch.tensor([[1.0, 4.0], [-3.0, 5.0]], dtype=torch.float64)
    ball = LayerProblem(x, y, radius=1.0, ceiling=ceiling)
    assert ball.anchor.tolist() == [[2.0, 1.0], [-1.0, 3.0]]
    assert ball.residual(z).tolist() == [[-1.0, 3.0], [0.0, 2.0]]
    linear = LayerProblem(x, y, form="linear", radius=1.0)
    assert linear.residual(z).tolist() == [[-1.0, 4.0], [-3.0, 2.0]]


def test_active_may_be_given_where_targets_were_shifted():
    x, y = data()
    problem = LayerProblem(x, y - 1, radius=1.0, active=y > 0)
    assert torch.equal(problem.active, y > 0)
    assert torch.equal(problem.anchor, torch.where(y > 0, y - 1, 0.0))


@pytest.mark.parametrize("form", ["ball", "halfspace", "linear"])
@pytest.mark.parametrize("radius", [2.0, torch.tensor([2.0, 4.0], dtype=torch.float64)])
def test_tightened_shrinks_the_radius_alone(form, radius):
    problem = LayerProblem(*data(), form=form, radius=radius)
    tight = problem.tightened(0.25)
    assert torch.as_tensor(tight.radius).tolist() == (torch.as_tensor(radius) * 0.75).tolist()
    assert torch.equal(tight.active, problem.active)
    regularised = LayerProblem(*data(), form=form, lam=2.0)
    assert regularised.tightened(0.25).lam == 2.0


def test_gradients_are_left_behind():
    x, y = data()
    assert not LayerProblem(x.requires_grad_(), y, radius=1.0).inputs.requires_grad
