"""Every bound on every layer against what the pruned network really does; the theorems as they are stated."""

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

import nettrim
from nettrim.pipeline.bounds import spectral_norm

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


def test_spectral_norm_is_an_upper_bound():
    weight = torch.randn(30, 50)
    direction = torch.randn(50, dtype=torch.float64)
    for _ in range(300):
        direction = weight.double().T @ (weight.double() @ direction)
        direction /= direction.norm()
    attained = float((weight.double() @ direction).norm())
    assert attained <= spectral_norm(weight) <= attained * (1 + 1e-6)
