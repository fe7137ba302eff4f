"""Every bound on every layer against what the pruned network really does; the theorems as they are stated."""

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

import nettrim
from nettrim.network.gains import Flow
from nettrim.network.program import Held, Program, Ref, Step
from nettrim.pipeline import ledger as accounting
from nettrim.pipeline.bounds import Link, compose, telescoped
from nettrim.pipeline.measure import Passage

ROUNDING = 1 + 1e-9


def chain(seed, widths, bias, normalised=False, dead=None):
    """A random ReLU chain; with `normalised`, every weight's entrywise ℓ1 norm is 1, as the theorems ask; the layer
    number `dead` has only neurons that are never active.
    """
    generator = torch.Generator().manual_seed(seed)
    modules = []
    for n, m in pairwise(widths):
        layer = nn.Linear(n, m, bias=bias, dtype=torch.float64)
        with torch.no_grad():
            layer.weight.copy_(torch.randn(m, n, generator=generator, dtype=torch.float64))
            layer.weight /= float(layer.weight.detach().abs().sum()) if normalised else n**0.5
            if bias:
                layer.bias.copy_(0.3 * torch.randn(m, generator=generator, dtype=torch.float64))
                if len(modules) == 2 * (dead if dead is not None else -1):
                    layer.bias -= 100
        modules += [layer, nn.ReLU()]
    return nn.Sequential(*modules[:-1])


def samples(seed, count, width):
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def assert_bounds_hold(ledger):
    for record in ledger.records:
        if record.promised is not None:
            assert record.measured <= record.promised * ROUNDING, f"{record.name}: promise"
        assert {"operator", "l-obs"} <= set(record.bounds)
        for name, bound in record.bounds.items():
            assert record.network_error <= bound * ROUNDING, f"{record.name}: {name}"
    assert ledger.bound == min(ledger.bounds.values())
    for name, bound in ledger.bounds.items():
        assert ledger.measured <= bound * ROUNDING, f"output: {name}"


TRIMS = st.builds(
    nettrim.NetTrim,
    form=st.sampled_from(["ball", "halfspace"]),
    gamma=st.sampled_from([1.0, 1.1, 2.0]),
    cascade=st.sampled_from(["relative", "paper"]),
    kappa=st.sampled_from([1.0, 0.9]),
    bias=st.sampled_from(["free", "penalised", "frozen"]),
    clip_ceiling=st.booleans(),
    solver=st.sampled_from([nettrim.Admm(max_iter=1), nettrim.Admm(max_iter=300)]),
    tol=st.just(1e-2),
    # bounds must hold whether or not the iterations sufficed
    on_failure=st.just("return"),
)


@settings(max_examples=120, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(
    method=TRIMS,
    schedule=st.sampled_from(["parallel", "cascade"]),
    epsilon=st.sampled_from([0.02, 0.1, 0.4]),
    bias=st.booleans(),
    dead=st.sampled_from([None, None, 0, 1]),
    seed=st.integers(0, 1000),
)
def test_net_trim_never_exceeds_a_bound(method, schedule, epsilon, bias, dead, seed):
    model = chain(seed, [6, 8, 7, 4], bias, dead=dead)
    result = nettrim.prune(
        model, [samples(seed + 1, 40, 6)], method, epsilon=epsilon, schedule=schedule, progress=False
    )
    assert_bounds_hold(result.ledger)
    expected = {"operator", "l-obs", "l-obs spectral", "paper", "telescoped"}
    assert set(result.ledger.bounds) == expected | ({"cascade", "cascade product"} if schedule == "cascade" else set())


@settings(max_examples=10, deadline=None, derandomize=True)
@given(method=st.sampled_from(["magnitude", "l-obs"]), sparsity=st.sampled_from([0.3, 0.8]), seed=st.integers(0, 1000))
@pytest.mark.parametrize("schedule", ["parallel", "cascade"])
def test_other_methods_never_exceed_a_bound(method, schedule, sparsity, seed):
    model = chain(seed, [6, 8, 7, 4], True)
    result = nettrim.prune(model, [samples(seed, 40, 6)], method, sparsity=sparsity, schedule=schedule, progress=False)
    assert_bounds_hold(result.ledger)


@pytest.mark.parametrize("schedule", ["parallel", "cascade"])
def test_bounds_hold_with_layers_left_dense_and_with_lam(schedule):
    model = chain(8, [6, 8, 7, 9, 4], True)
    x = [samples(9, 40, 6)]
    assert_bounds_hold(nettrim.prune(model, x, epsilon=0.1, schedule=schedule, ignore="2", progress=False).ledger)
    ledger = nettrim.prune(model, x, lam=0.05, schedule=schedule, progress=False).ledger
    assert_bounds_hold(ledger)
    assert ("cascade" in ledger.bounds) == (schedule == "cascade")


@settings(max_examples=10, deadline=None, derandomize=True)
@given(seed=st.integers(0, 1000), epsilon=st.sampled_from([0.02, 0.1, 0.3]))
def test_theorem_1_on_a_link_normalised_network(seed, epsilon):
    model = chain(seed, [6, 9, 7, 4], False, normalised=True)
    ledger = nettrim.prune(
        model, [samples(seed + 1, 50, 6)], nettrim.NetTrim(form="halfspace", on_failure="return"),
        epsilon=epsilon, schedule="parallel", progress=False,
    ).ledger  # fmt: skip
    reached = 0.0
    for record in ledger.records:
        reached += record.facts["radius"] * (1 + record.violation)
        assert record.network_error <= reached * ROUNDING
        # the un-normalised form is the theorem itself where every norm is 1
        assert record.bounds["paper"] == pytest.approx(sum(r.promised for r in ledger.records if r.name <= record.name))


@settings(max_examples=10, deadline=None, derandomize=True)
@given(seed=st.integers(0, 1000), gamma=st.sampled_from([1.0, 1.1, 1.5]), clip=st.booleans())
def test_theorem_2_on_a_link_normalised_network(seed, gamma, clip):
    model = chain(seed, [6, 9, 7, 4], False, normalised=True)
    method = nettrim.NetTrim(form="halfspace", cascade="paper", gamma=gamma, clip_ceiling=clip, on_failure="return")
    ledger = nettrim.prune(model, [samples(seed + 1, 50, 6)], method, epsilon=0.1, progress=False).ledger
    reached = ledger.records[0].facts["radius"]
    for i, record in enumerate(ledger.records):
        slack = 1 + record.violation
        reached *= slack if i == 0 else slack * math.sqrt(gamma)
        assert record.network_error <= reached * ROUNDING
        assert record.bounds["paper"] == pytest.approx(reached, rel=1e-5)


@settings(max_examples=10, deadline=None, derandomize=True)
@given(seed=st.integers(0, 1000))
def test_rescaling_to_link_normalised_weights_rescales_the_paper_bound(seed):
    """Dividing every weight by its ℓ1 norm divides errors and the general bound by the norms' product."""
    model = chain(seed, [6, 8, 4], False)
    norms = [float(layer.weight.detach().abs().sum()) for layer in model if isinstance(layer, nn.Linear)]
    normalised = chain(seed, [6, 8, 4], False, normalised=True)
    x = [samples(seed + 1, 40, 6)]
    ledgers = [
        nettrim.prune(m, x, nettrim.NetTrim(tol=1e-5), epsilon=0.1, schedule="parallel", progress=False).ledger
        for m in (model, normalised)
    ]
    factor = math.prod(norms)
    assert ledgers[1].bounds["paper"] * factor == pytest.approx(ledgers[0].bounds["paper"], rel=1e-9)


def test_the_check_sees_a_bound_that_is_too_small(network, batches):
    from dataclasses import replace

    ledger = nettrim.prune(network, batches, epsilon=0.1, progress=False).ledger
    assert_bounds_hold(ledger)
    first = ledger.records[0]
    small = replace(first, bounds=first.bounds | {"operator": 0.99 * first.network_error})
    with pytest.raises(AssertionError, match="operator"):
        assert_bounds_hold(replace(ledger, records=(small, *ledger.records[1:])))
    with pytest.raises(AssertionError, match="promise"):
        assert_bounds_hold(
            replace(ledger, records=(replace(first, promised=0.9 * first.measured), *ledger.records[1:]))
        )


# ---- the recursion itself


def recursion(links, schedule):
    """The bounds of a chain, layer by layer, as the module's table states them; one that fails at a layer is None."""
    found = []
    names = ["operator", "l-obs", "l-obs spectral", "paper"]
    for name in names + (["cascade product", "cascade"] if schedule == "cascade" else []):
        b, values = 0.0, []
        for link in links:
            if b is not None:
                b = one_layer(name, schedule, link, b)
            values.append(b)
        found.append((name, values))
    return dict(found)


def one_layer(name, schedule, link, b):
    if name == "operator":
        return link.clean_error + link.pruned_l2 * b
    if name.startswith("l-obs"):
        return link.clean_change + (link.pruned_fro if name == "l-obs" else link.pruned_l2) * b
    norm = link.dense_l1 if name == "paper" else link.dense_l2
    if not link.pruned:
        return norm * b
    if link.promised is None:
        return None
    if name == "cascade":
        return link.promised
    if schedule == "parallel":
        return link.promised + max(link.dense_l1, link.pruned_l1) * b
    if link.clean and b == 0:
        return link.promised
    if link.asked is None:
        return None
    if link.halfspace:
        ceiling = max(link.kappa * math.sqrt(link.gamma), 1.0) * norm * b
        ball = max(link.kappa * link.asked, link.floor)
        return (1 + link.violation) * math.sqrt(ball**2 + ceiling**2) + link.excess
    return (1 + link.violation) * max(
        link.floor, link.kappa * link.asked, link.kappa * math.sqrt(link.gamma) * norm * b
    )


def assert_same(bounds, expected, outputs):
    assert set(bounds) == set(expected)
    for name, values in expected.items():
        for at, value in zip(outputs, values, strict=True):
            wanted = math.inf if value is None else value
            # each step adds the rounding of one sum
            assert bounds[name][at] == pytest.approx(wanted, rel=1e-10), f"{name} at step {at}"
            assert bounds[name][at] >= wanted, f"{name} at step {at}"


@pytest.fixture
def composed(monkeypatch):
    """What every ledger was composed from, and what came of it."""
    calls, plain = [], accounting.compose

    def watched(program, passages, links, schedule):
        calls.append((links, schedule, plain(program, passages, links, schedule)))
        return calls[-1][2]

    monkeypatch.setattr(accounting, "compose", watched)
    return calls


@pytest.mark.parametrize("schedule", ["parallel", "cascade"])
@pytest.mark.parametrize("ignore", [(), ("0",), ("2",), ("0", "6")], ids=str)
@pytest.mark.parametrize(
    ("method", "amount"),
    [
        (nettrim.NetTrim(), {"epsilon": 0.1}),
        (nettrim.NetTrim(form="halfspace", on_failure="return"), {"epsilon": 0.2}),
        (nettrim.NetTrim(cascade="paper", gamma=1.5, kappa=0.9), {"epsilon": 0.1}),
        (nettrim.NetTrim(solver=nettrim.Admm(max_iter=1), on_failure="return"), {"epsilon": 0.1}),
        (nettrim.NetTrim(), {"lam": 0.05}),
        ("l-obs", {"sparsity": 0.6}),
        ("magnitude", {"sparsity": 0.99}),
    ],
    ids=["ball", "halfspace", "paper", "rough", "lam", "l-obs", "magnitude"],
)
def test_on_a_chain_the_bounds_are_the_recursion_layer_by_layer(composed, method, amount, schedule, ignore):
    model = chain(3, [6, 8, 7, 9, 4], True)
    nettrim.prune(model, [samples(9, 40, 6)], method, **amount, schedule=schedule, ignore=ignore, progress=False)
    ((links, _, bounds),) = composed
    assert [link.pruned for link in links] == [name not in ignore for name in ("0", "2", "4", "6")]
    assert all(link.clean_error == link.clean_change == 0 for link in links if not link.pruned)
    assert_same(bounds, recursion(links, schedule), [link.output for link in links])


SIZES = st.floats(0, 10)
LINKS = st.builds(
    dict,
    pruned=st.booleans(),
    promised=SIZES,
    asked=SIZES,
    floor=st.sampled_from([0.0, 1e-3]),
    gamma=st.sampled_from([1.0, 1.1, 2.0]),
    kappa=st.sampled_from([1.0, 0.8]),
    violation=st.sampled_from([0.0, 0.1]),
    halfspace=st.booleans(),
    excess=SIZES,
    clean_error=SIZES,
    clean_change=SIZES,
    dense_l1=SIZES,
    dense_l2=SIZES,
    pruned_l1=SIZES,
    pruned_l2=SIZES,
    pruned_fro=SIZES,
)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(
    made=st.lists(LINKS, min_size=1, max_size=4),
    solved=st.booleans(),
    asked=st.booleans(),
    schedule=st.sampled_from(["parallel", "cascade"]),
)
def test_any_numbers_compose_as_the_recursion_says(made, solved, asked, schedule):
    links, steps, passages, clean = [], [Step("input")], [Passage()], True
    for given_numbers in made:
        at = len(steps)
        steps.append(Step("torch.nn.functional.linear", (Ref(at - 1), Held(f"{at}.weight"))))
        steps.append(Step("torch.nn.functional.relu", (Ref(at),)))
        passages += [Passage(error=1.0), Passage(error=1.0, flow=Flow("sum", (1.0,), "relu"))]
        numbers = dict(given_numbers)
        if not numbers["pruned"]:
            numbers |= {"clean_error": 0.0, "clean_change": 0.0, "excess": 0.0}
        # a ReLU cannot make an error larger, and clean_error is behind it
        numbers["clean_error"] = min(numbers["clean_error"], numbers["clean_change"])
        if not solved or not numbers["pruned"]:
            numbers["promised"] = None
        if not asked:
            numbers["asked"] = None
        numbers |= {"clean": clean or schedule == "parallel", "whole": True, "promised_at": at + 1}
        links.append(Link(step=at, output=at + 1, **numbers))
        clean = clean and not numbers["pruned"]
    program = Program(tuple(steps), (0,), Ref(len(steps) - 1))
    assert_same(compose(program, passages, links, schedule), recursion(links, schedule), [k.output for k in links])


def link(step, output, **numbers):
    """A pruned layer whose every norm is 2 and that errs by 1 on clean inputs."""
    norms = dict.fromkeys(("dense_l1", "dense_l2", "pruned_l1", "pruned_l2", "pruned_fro"), 2.0)
    made = dict(pruned=True, clean=False, promised=1.0, whole=True, asked=1.0, floor=0.0, gamma=1.0, kappa=1.0)
    made |= dict(violation=0.0, halfspace=False, excess=0.0, clean_error=1.0, clean_change=1.0)
    return Link(step=step, output=output, **(made | norms | {"promised_at": output} | numbers))


def test_branches_add_up_and_concatenation_stacks():
    """x -> l1 -> {l2, skip} -> l2 + skip, and beside it cat(l1, l1)."""
    linear = "torch.nn.functional.linear"
    steps = (
        Step("input"),
        Step(linear, (Ref(0), Held("1"))),
        Step(linear, (Ref(1), Held("2"))),
        Step("torch.add", (Ref(2), Ref(1))),
        Step("torch.cat", ([Ref(1), Ref(1)],)),
    )
    passages = [Passage(), *(Passage(error=1.0) for _ in range(2))]
    passages += [Passage(error=1.0, flow=Flow("sum", (1.0, 1.0), "add"))]
    passages += [Passage(error=1.0, flow=Flow("stack", (1.0, 1.0), "cat"))]
    program = Program(steps, (0,), Ref(3))
    bounds = compose(program, passages, [link(1, 1), link(2, 2)], "cascade")
    assert bounds["operator"] == pytest.approx([0, 1, 3, 4, math.sqrt(2)])
    assert bounds["cascade"] == pytest.approx([0, 1, 1, 2, math.sqrt(2)])


def test_what_is_not_known_is_infinite_until_a_promise_or_a_zero_weight_ends_it():
    linear = "torch.nn.functional.linear"
    steps = (Step("input"), Step(linear, (Ref(0), Held("1"))), Step("torch.foo", (Ref(1),)))
    steps += (Step(linear, (Ref(2), Held("2"))),)
    flow = Flow("sum", (math.inf,), "unknown")
    passages = [Passage(), Passage(error=1.0), Passage(error=1.0, flow=flow), Passage(error=1.0)]
    program = Program(steps, (0,), Ref(3))
    bounds = compose(program, passages, [link(1, 1), link(3, 3)], "cascade")
    assert bounds["operator"][2:] == [math.inf, math.inf]
    assert bounds["paper"][2:] == [math.inf, math.inf]
    # measured on what the pruned layers before really give, whatever that is
    assert bounds["cascade"][2:] == pytest.approx([math.inf, 1.0])
    # a layer of which nothing is left hands no error on
    nothing = link(3, 3, pruned_l2=0.0, pruned_fro=0.0, dense_l1=0.0)
    bounds = compose(program, passages, [link(1, 1), nothing], "cascade")
    assert [bounds[name][3] for name in ("operator", "l-obs", "l-obs spectral", "paper")] == pytest.approx([1.0] * 4)
    # indices that differ: nothing is known, whatever the bound before
    passages[2] = Passage(error=math.inf, flow=Flow("sum", (1.0,), "known"))
    assert compose(program, passages, [link(1, 1), link(3, 3)], "cascade")["operator"][2] == math.inf


def test_a_promise_about_a_sample_of_the_rows_bounds_nothing_in_cascade():
    steps = (Step("input"), Step("torch.nn.functional.linear", (Ref(0), Held("1"))))
    program, passages = Program(steps, (0,), Ref(1)), [Passage(), Passage(error=1.0)]
    part = link(1, 1, whole=False, promised=0.5, clean=True, clean_error=0.75)
    bounds = compose(program, passages, [part], "cascade")
    assert [bounds[name][1] for name in ("paper", "cascade product", "cascade")] == [math.inf] * 3
    assert bounds["operator"][1] == pytest.approx(0.75)
    # in parallel what was measured on all rows takes its place
    assert compose(program, passages, [part], "parallel")["paper"][1] == pytest.approx(0.75)


def test_a_promise_about_a_sum_holds_at_the_sum_alone():
    """x -> l1 -> {l2, skip} -> l2 + skip: l2 was fitted to what the sum lacks."""
    linear = "torch.nn.functional.linear"
    steps = (Step("input"), Step(linear, (Ref(0), Held("1"))), Step(linear, (Ref(1), Held("2"))))
    steps += (Step("torch.add", (Ref(2), Ref(1))),)
    passages = [Passage(), *(Passage(error=1.0) for _ in range(2))]
    passages += [Passage(error=1.0, flow=Flow("sum", (1.0, 1.0), "add"))]
    links = [link(1, 1), link(2, 2, promised_at=3, promised=0.25)]
    bounds = compose(Program(steps, (0,), Ref(3)), passages, links, "cascade")
    assert bounds["cascade"] == pytest.approx([0, 1, math.inf, 0.25])
    # those that rest on no promise go through the branches as ever
    assert bounds["operator"] == pytest.approx([0, 1, 3, 4])


def test_telescoped_is_the_sum_of_the_rungs():
    assert telescoped([4.0, 0.0, 9.0]) == pytest.approx(5.0)
    assert telescoped([]) == 0.0
