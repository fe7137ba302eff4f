"""Input of every shape and kind that a script may hold: taken as meant, or refused in one sentence."""

from __future__ import annotations

import warnings
from collections import UserDict

import numpy as np
import pytest
import torch

import nettrim
from nettrim.core.problem import LayerProblem, build_problem, check_seed
from nettrim.core.solve import solve_layer, solve_path
from nettrim.core.solvers import Admm, make_solver
from nettrim.errors import NetTrimError, ProblemError, SolverError
from nettrim.methods import NetTrim, make_method

GENERATOR = np.random.default_rng(0)
X = GENERATOR.standard_normal((20, 4))
Y = np.maximum(X @ GENERATOR.standard_normal((4, 3)), 0)


def read_only(array):
    array = array.copy()
    array.flags.writeable = False
    return array


def unaligned(array):
    """A column of records, whose strides are no multiple of the number's size."""
    packed = np.zeros(array.shape, dtype=np.dtype([("number", array.dtype), ("flag", np.int8)]))
    packed["number"] = array
    return packed["number"]


@pytest.mark.parametrize(
    "stored",
    [
        lambda array: array[::-1].copy()[::-1],
        lambda array: array[:, ::-1].copy()[:, ::-1],
        lambda array: array.astype(">f8"),
        np.asfortranarray,
        read_only,
        unaligned,
    ],
)
def test_arrays_count_by_their_numbers_not_by_their_memory(stored):
    plain = build_problem(X, Y, epsilon=0.1, penalty=X[:1].repeat(3, 0) ** 2, ceiling=Y)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        problem = build_problem(
            stored(X), stored(Y), epsilon=0.1, penalty=stored(X[:1].repeat(3, 0) ** 2), ceiling=stored(Y)
        )
    for name in ("inputs", "targets", "penalty", "ceiling", "active"):
        assert torch.equal(getattr(problem, name), getattr(plain, name))


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (torch.from_numpy(X).to_sparse(), "inputs is a sparse tensor"),
        (torch.ones(20, 4, device="meta"), "inputs is a tensor on the meta device"),
        (np.ma.masked_array(X, X > 1), "inputs is a masked array"),
        (X.astype(object), "inputs is an array of object"),
        (X.astype(str), "inputs is an array of <U"),
        (X.astype(np.longdouble), "inputs is float128, wider than torch knows"),
        (X.astype(complex), "inputs is torch.complex128"),
        ([[1.0], [1.0, 2.0]], "inputs is a list"),
    ],
)
def test_what_holds_no_plain_numbers(value, said):
    with pytest.raises(ProblemError, match=said):
        build_problem(value, Y, epsilon=0.1)


@pytest.mark.parametrize(
    ("penalty", "said"),
    [
        (1j, "penalty is torch.complex"),
        (np.ones(4, dtype=complex), "penalty is torch.complex128"),
        ("heavy", "penalty is a str"),
        (np.array(["1", "1", "1", "1"]), "penalty is an array of <U1"),
        ([[1.0], [1.0, 2.0]], "penalty is a list"),
        (torch.ones(4).to_sparse(), "penalty is a sparse tensor"),
    ],
)
def test_penalties_that_are_no_real_numbers(penalty, said):
    with pytest.raises(ProblemError, match=said):
        build_problem(X, Y, epsilon=0.1, penalty=penalty)


def test_a_list_of_penalties_is_not_rounded():
    assert build_problem(X, Y, epsilon=0.1, penalty=[0.1, 1, 1, 1]).penalty[0, 0] == 0.1


@pytest.mark.parametrize("make", [LayerProblem, build_problem])
@pytest.mark.parametrize(
    "kind", [np.array, list, tuple, torch.tensor, lambda r: np.array(r, ">f8"), lambda r: np.array(r[::-1])[::-1]]
)
def test_radii_of_every_kind(make, kind):
    problem = make(X, Y, radius=kind([0.3, 0.2, 0.1]))
    assert problem.per_neuron
    torch.testing.assert_close(problem.radius, torch.tensor([0.3, 0.2, 0.1], dtype=torch.float64))


@pytest.mark.parametrize("per_neuron", [False, True])
@pytest.mark.parametrize("radius", [0.3, np.float64(0.3), np.array(0.3), torch.tensor(0.3, dtype=torch.float64)])
def test_one_radius_of_every_kind(radius, per_neuron):
    problem = build_problem(X, Y, radius=radius, per_neuron=per_neuron)
    assert torch.as_tensor(problem.radius, dtype=torch.float64).tolist() == ([0.3] * 3 if per_neuron else 0.3)


@pytest.mark.parametrize(
    ("radius", "said"),
    [
        (np.full((3, 1), 0.3), r"radius is torch.float64 of shape \(3, 1\)"),
        (torch.full((2, 2), 0.3), r"radius is torch.float32 of shape \(2, 2\)"),
        (np.full(3, 0.3j), "radius is torch.complex128"),
        ([0.1, [0.2]], "radius is a list"),
        (["0.1", "0.2", "0.3"], "radius is a list"),
        ("0.3", "radius='0.3' is no number"),
        ([0.3, 0.3], "radius has 2 entries for 3 output neurons"),
    ],
)
def test_radii_that_are_none(radius, said):
    for per_neuron in (False, True):
        with pytest.raises(ProblemError, match=said):
            build_problem(X, Y, radius=radius, per_neuron=per_neuron)


@pytest.mark.parametrize(
    "value", ["0.1", b"1", True, np.bool_(True), 1j, np.complex128(1), torch.ones(3), np.ones(2), 10**400, {}]
)
@pytest.mark.parametrize("name", ["epsilon", "lam", "tol", "max_seconds"])
def test_amounts_that_are_no_number(name, value):
    given = {name: value} if name in ("epsilon", "lam") else {"epsilon": 0.1, name: value}
    with pytest.raises(ProblemError, match=f"{name}=.* is no number") as caught:
        solve_layer(X, Y, **given)
    assert "\n" not in str(caught.value)


def test_a_path_takes_any_iterable_of_numbers():
    expected = [s.certificate.objective for s in solve_path(X, Y, [0.5, 0.2])]
    for epsilons in ((e for e in (0.5, 0.2)), np.array([0.5, 0.2]), torch.tensor([0.5, 0.2], dtype=torch.float64)):
        assert [s.certificate.objective for s in solve_path(X, Y, epsilons)] == expected


@pytest.mark.parametrize("epsilons", [0.1, np.float64(0.1), torch.tensor(0.1), None])
def test_a_path_of_a_single_number_is_refused(epsilons):
    with pytest.raises(ProblemError, match=r"epsilons=.* is no list: pass several numbers"):
        solve_path(X, Y, epsilons)


def test_a_path_of_what_is_no_number_is_refused():
    with pytest.raises(ProblemError, match=r"epsilons=.* is no number"):
        solve_path(X, Y, "0.1")
    with pytest.raises(ProblemError, match=r"epsilons=.* is no number"):
        solve_path(X, Y, [[0.1]])


class NoRun:
    def refuses(self, problem):
        return None


@pytest.mark.parametrize("solver", [None, Admm, NoRun(), 3, UserDict()])
def test_what_is_no_solver(solver):
    for use in (
        make_solver,
        lambda solver: solve_layer(X, Y, epsilon=0.1, solver=solver),
        lambda solver: solve_path(X, Y, [0.1], solver=solver),
        lambda solver: NetTrim(solver=solver),
    ):
        with pytest.raises(ProblemError, match=r"solver is .*, and no solver object: use one of auto.*Admm\(\)"):
            use(solver)


@pytest.mark.parametrize("method", [None, NetTrim, Admm(), 3])
def test_what_is_no_method(method):
    model = torch.nn.Sequential(torch.nn.Linear(4, 3))
    for use in (make_method, lambda method: nettrim.prune(model, [X], method, epsilon=0.1)):
        with pytest.raises(ProblemError, match=r"method is .*, and no method object: use one of net-trim.*NetTrim\(\)"):
            use(method)


def test_whole_floats_are_iterations():
    solver = Admm(max_iter=1e4, check_every=np.int64(20), relaxation=np.float64(1.5))
    assert repr(solver) == repr(Admm(max_iter=10_000, check_every=20, relaxation=1.5))
    assert solve_layer(X, Y, epsilon=0.1, solver=solver).status is nettrim.Status.SOLVED


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_iter", 0),
        ("max_iter", 10.5),
        ("max_iter", "many"),
        ("max_iter", None),
        ("max_iter", float("inf")),
        ("check_every", True),
        ("check_every", float("nan")),
        ("relaxation", "1.8"),
        ("relaxation", 2.0),
        ("relaxation", None),
        ("ratio", float("inf")),
        ("ratio", 1j),
        ("dtype", []),
        ("dtype", torch.float32),
    ],
)
def test_settings_of_admm_that_make_no_sense(name, value):
    with pytest.raises(ProblemError, match=f"Admm's {name}=.* is (no number|out of range|unknown)"):
        Admm(**{name: value})


@pytest.mark.parametrize("given", [lambda a: a, torch.from_numpy])
def test_the_solution_of_an_error_is_of_the_kind_of_the_inputs(given):
    kind = type(given(X))
    for solve in (
        lambda **k: solve_layer(given(X), given(Y), epsilon=0.1, **k),
        lambda **k: solve_path(given(X), given(Y), [0.1], **k),
    ):
        with pytest.raises(SolverError) as caught:
            solve(solver=Admm(max_iter=1))
        assert type(caught.value.solution.weight) is type(caught.value.solution.multipliers) is kind


@pytest.mark.parametrize("seed", [2**64, -(2**63) - 1, 1.0, "1", None, True])
def test_seeds_that_torch_does_not_take(seed):
    with pytest.raises(NetTrimError, match=r"seed=.* is out of range"):
        check_seed(seed)


@pytest.mark.parametrize("seed", [0, 2**64 - 1, -(2**63), np.int32(5)])
def test_seeds_that_torch_takes(seed):
    torch.Generator().manual_seed(check_seed(seed))
