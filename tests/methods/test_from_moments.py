"""Methods that need no rows: the same weight from the moments of the rows as from the rows themselves."""

from dataclasses import dataclass, replace
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nettrim.core.moments import Moments
from nettrim.errors import ProblemError, UnsupportedError
from nettrim.methods import METHODS, Alps, LObs, Magnitude, NetTrim, Obs, SparseGpt, Wanda, tolerance_curve
from nettrim.methods.base import LayerTask, Shrinks, needs
from nettrim.methods.fit import check_task, mean_error, shortfall_moment
from nettrim.methods.masks import Pattern

#: every method that can do without rows, as it is by default, and with the settings that change what is read
WITHOUT_ROWS = [
    *(make() for make in METHODS.values() if needs(make()) != "rows" and not isinstance(make(), Shrinks)),
    Magnitude(refit=True), Wanda(refit=True), Wanda(group="layer"), LObs(bias="frozen"),
    LObs(bias="pooled", refit=True), LObs(relative_damping=0.01, rerank=True), Obs(bias="frozen"),
    SparseGpt(targets="dense"), Alps(targets="dense"), Alps(bias="kept"), Alps(targets="dense", bias="kept"),
]  # fmt: skip
AMOUNTS = [("sparsity", 0.6), ("kept", 17), ("pattern", Pattern(2, 4)), ("tolerance", 0.4), ("epsilon", 0.5)]
TAKEN = [(method, amount) for method in WITHOUT_ROWS for amount in AMOUNTS if amount[0] in method.amounts]


def make_task(seed=0, samples=80, neurons=5, columns=8, dead=(), bias=True, clean=True, amount="kept", value=17):
    """Correlated inputs of nonzero mean; in a cascade they are not those that the outputs came from."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    inputs = normal(samples, columns) @ normal(columns, columns) + 0.3
    inputs[:, list(dead)] = 0
    weight, b = normal(neurons, columns), normal(neurons) if bias else None
    outputs = inputs @ weight.T + (b if bias else 0.0)
    if not clean:
        inputs = inputs + 0.3 * normal(samples, columns) * (inputs != 0)
    return LayerTask("conv", True, False, clean, weight, b, inputs, outputs, amount, value, torch.float64)


def alone(task):
    """The task with the moments of its rows, summed up in uneven batches, and no rows."""
    edges = [0, 1, 20, 21, len(task.inputs)]
    total = Moments.zeros(task.weight.shape[1], len(task.weight))
    for start, stop in pairwise(edges):
        total = total + Moments.of(task.inputs[start:stop], task.outputs[start:stop])
    return replace(task, inputs=task.inputs[:0], outputs=task.outputs[:0], moments=total)


def assert_same(found, expected, rtol=1e-7, atol=1e-9):
    assert torch.equal(found.weight != 0, expected.weight != 0)
    torch.testing.assert_close(found.weight, expected.weight, rtol=rtol, atol=atol)
    assert (found.bias is None) == (expected.bias is None)
    if found.bias is not None:
        torch.testing.assert_close(found.bias, expected.bias, rtol=rtol, atol=atol)
    for fact in ("E", "floor", "predicted_E", "damping"):
        assert (fact in found.facts) == (fact in expected.facts)
        if fact in found.facts:
            assert found.facts[fact] == pytest.approx(expected.facts[fact], rel=1e-6, abs=1e-9)


def test_every_method_is_covered():
    names = {method.name for method in WITHOUT_ROWS}
    assert names == {"l-obs", "magnitude", "obs", "wanda", "sparsegpt", "alps"}


@pytest.mark.parametrize(("method", "amount"), TAKEN, ids=lambda one: one[0] if isinstance(one, tuple) else repr(one))
@pytest.mark.parametrize("clean", [True, False], ids=["clean", "cascade"])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "none"])
@pytest.mark.parametrize("dead", [(), (2, 5)], ids=["live", "dead"])
def test_moments_alone_give_the_weight_of_their_rows(method, amount, clean, bias, dead):
    task = make_task(clean=clean, bias=bias, dead=dead, amount=amount[0], value=amount[1])
    found, expected = method.prune_layer(alone(task)), method.prune_layer(task)
    assert 0 < int((expected.weight != 0).sum()) < 40
    assert_same(found, expected)


@pytest.mark.parametrize("clean", [True, False], ids=["clean", "cascade"])
@pytest.mark.parametrize("method", WITHOUT_ROWS, ids=repr)
def test_all_rows_count_and_not_the_sample(method, clean):
    """The sample is the tenth of the rows with other inputs than the rest: what is made of it alone is different."""
    task = make_task(samples=600, clean=clean)
    task.inputs[:60] *= torch.linspace(0.05, 4, 8).double()
    task = replace(task, outputs=task.inputs @ task.weight.T + task.bias if clean else task.outputs)
    few = replace(task, inputs=task.inputs[:60], outputs=task.outputs[:60])
    sampled = replace(few, moments=Moments.of(task.inputs, task.outputs))
    expected, found = method.prune_layer(task), method.prune_layer(sampled)
    assert_same(found, expected)
    if needs(method) != "weight":
        off = method.prune_layer(few)
        assert not torch.allclose(off.weight, expected.weight, rtol=1e-3, atol=1e-3)


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10**6), kept=st.integers(1, 39), bias=st.booleans(), clean=st.booleans(),
    samples=st.sampled_from([22, 40, 300]), dead=st.lists(st.integers(0, 7), max_size=4),
    method=st.sampled_from([SparseGpt(), Alps(bias="kept"), Wanda(), Wanda("layer", refit=True), Magnitude(True),
                            LObs(relative_damping=0.01), Obs(relative_damping=0.01)]),
)  # fmt: skip
def test_whatever_the_layer(seed, kept, bias, clean, samples, dead, method):
    task = make_task(seed, samples, bias=bias, clean=clean, dead=dead, value=kept)
    assert_same(method.prune_layer(alone(task)), method.prune_layer(task), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("method", [SparseGpt(targets="dense"), Alps(targets="dense"), LObs(), Obs()], ids=repr)
def test_fewer_rows_than_inputs(method):
    """A singular Gram matrix: what its inverse makes of rounding must not show on clean inputs."""
    task = make_task(samples=22, columns=32, value=60)
    assert_same(method.prune_layer(alone(task)), method.prune_layer(task), rtol=1e-4, atol=1e-5)


def test_dense_targets_are_the_own_ones_on_clean_inputs_to_the_last_digit():
    task = alone(make_task(samples=22, columns=32, value=60))
    for kind, setting in ((SparseGpt, {"relative_damping": 0.0}), (Alps, {})):
        own, dense = (kind(targets=targets, **setting).prune_layer(task) for targets in ("own", "dense"))
        assert torch.equal(own.weight, dense.weight)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("clean", [True, False])
def test_the_helpers_say_the_same_of_moments_as_of_rows(bias, clean):
    task = make_task(clean=clean, bias=bias)
    weight = task.weight + 0.1 * torch.randn(5, 8).double()
    after = None if task.bias is None else task.bias + 0.1
    for u, b in ((weight, after), (weight, task.bias), (weight, None), (weight * 0, torch.ones(5).double())):
        assert mean_error(alone(task), u, b) == pytest.approx(mean_error(task, u, b), rel=1e-9)
    for ones in (False, True):
        found, expected = shortfall_moment(alone(task), ones), shortfall_moment(task, ones)
        assert found.shape == (5, 8 + ones)
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
        assert bool(found.any()) != clean


def test_a_small_error_on_clean_inputs_is_not_lost_in_rounding():
    """1e-20 of the power, far below what a difference of sums could tell."""
    task = make_task(samples=500)
    change = 1e-10 * torch.randn(5, 8).double()
    exact = float((task.inputs @ change.T).square().sum()) / 500
    moved = replace(task, weight=task.weight.round(decimals=3), bias=task.bias.round(decimals=3))
    moved = replace(moved, outputs=moved.inputs @ moved.weight.T + moved.bias)
    assert mean_error(alone(moved), moved.weight + change, moved.bias) == pytest.approx(exact, rel=1e-4, abs=0)


def test_statistics_are_given_or_made_of_the_rows():
    task = make_task()
    made = task.statistics()
    assert made.count == 80
    torch.testing.assert_close(made.gram[:-1, :-1], task.inputs.T @ task.inputs)
    task.inputs[:, 1] = 0
    assert task.statistics().dead.tolist() == [False, True, *[False] * 6]  # no memory of what the rows were
    given = alone(task)
    assert given.statistics() is given.moments
    assert task.complete
    assert not given.complete
    assert replace(task, moments=given.moments).complete
    assert not replace(task, inputs=task.inputs[:5], outputs=task.outputs[:5], moments=given.moments).complete


def test_what_methods_need():
    expected = {
        "net-trim": "rows", "l-obs": "moments", "magnitude": "weight", "obs": "moments", "wanda": "moments",
        "sparsegpt": "moments", "alps": "moments", "ldrf": "rows", "shallowing": "weight",
    }  # fmt: skip
    assert {name: needs(make()) for name, make in METHODS.items()} == expected
    assert needs(Magnitude(refit=True)) == "moments"
    assert needs(LObs(inverse="recursive")) == "rows"
    assert needs(NetTrim()) == "rows"

    class Silent:
        name, amounts = "silent", ("kept",)

        def prune_layer(self, task):
            raise NotImplementedError

    @dataclass
    class Says(Silent):
        answer: str

        def needs(self):
            return self.answer

    assert needs(Silent()) == "rows"
    assert needs(Says("weight")) == "weight"
    with pytest.raises(ProblemError, match=r"needs\(\)='everything' is unknown: return one of rows, moments, weight"):
        needs(Says("everything"))


def test_magnitude_looks_at_nothing_but_the_weight():
    task = make_task()
    bare = replace(task, inputs=task.inputs[:0], outputs=task.outputs[:0])
    assert torch.equal(Magnitude().prune_layer(bare).weight, Magnitude().prune_layer(task).weight)
    with pytest.raises(ProblemError, match="no sample"):
        Magnitude(refit=True).prune_layer(bare)
    with pytest.raises(ProblemError, match="weight holds NaN"):
        Magnitude().prune_layer(replace(bare, weight=bare.weight * torch.nan))


@pytest.mark.parametrize("method", [m for m in WITHOUT_ROWS if needs(m) == "moments"], ids=repr)
def test_neither_rows_nor_moments_is_no_sample(method):
    task = make_task()
    for moments in (None, Moments.zeros(8, 5)):
        with pytest.raises(ProblemError, match="'conv' has no sample"):
            method.prune_layer(replace(task, inputs=task.inputs[:0], outputs=task.outputs[:0], moments=moments))


def test_the_recursive_inverse_wants_every_row():
    task = make_task(samples=40, bias=True)
    method = LObs(damping=1e-2, inverse="recursive")
    sampled = replace(task, inputs=task.inputs[:7], outputs=task.outputs[:7], moments=task.statistics())
    for sums, count in ((alone(task), 0), (sampled, 7)):
        sentence = rf"'conv': inverse='recursive' goes through every row, and {count} of 40 .* inverse='cholesky'"
        with pytest.raises(UnsupportedError, match=sentence):
            method.prune_layer(sums)
    assert_same(method.prune_layer(replace(task, moments=task.statistics())), method.prune_layer(task))


def test_a_tolerance_curve_needs_no_rows():
    task = make_task(samples=200, clean=False)
    found, expected = tolerance_curve(alone(task), points=9), tolerance_curve(task, points=9)
    assert torch.equal(found.kept, expected.kept)
    torch.testing.assert_close(found.error, expected.error, rtol=1e-7, atol=1e-9)
    torch.testing.assert_close(found.relative, expected.relative, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("name", ["gram", "cross", "power"])
def test_moments_are_checked(name):
    task = alone(make_task())
    check_task(task)
    wrong = getattr(task.moments, name).clone()
    wrong.view(-1)[-1] = torch.nan
    with pytest.raises(ProblemError, match="'conv': moments hold NaN or infinity"):
        check_task(replace(task, moments=replace(task.moments, **{name: wrong})))


@pytest.mark.parametrize(("columns", "neurons"), [(7, 5), (8, 4)])
def test_moments_of_another_layer_are_refused(columns, neurons):
    task = alone(make_task())
    other = replace(Moments.zeros(columns, neurons), count=3)
    with pytest.raises(ProblemError, match=f"moments are of {columns} inputs and {neurons} outputs: its weight has 8"):
        check_task(replace(task, moments=other))
    with pytest.raises(ProblemError, match="inputs has shape"):
        check_task(replace(task, inputs=torch.zeros(0, 7).double()))
