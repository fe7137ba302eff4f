"""The ledger on networks that are no chain: that its bounds can be missed by a wrong one, and what it says of itself.

The nets here are linear and their errors aligned: every bound is reached, so that one that is a little too small is
exceeded.
"""

from __future__ import annotations

import math
import re
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from networks import assert_bounds_hold, call, seeded
from torch import Tensor, nn

import nettrim
from nettrim.network.gains import Flow
from nettrim.pipeline import bounds, ledger
from nettrim.pipeline.records import LayerEvidence

SCHEDULES = ("parallel", "cascade")


class Aligned(nn.Module):
    """Two 1x1 convolutions of two channels; `join` says what becomes of the second one's output.

    On ``x = s (1, 1)`` pruning takes 0.1 from the first and 0.2 from the second: errors are ``−0.1 s`` and then
    ``−(0.2 + 3 · 0.1) s``, all in the channel that the second layer stretches most.
    """

    def __init__(self, join=None) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(2, 2, 1, bias=False), nn.Conv2d(2, 2, 1, bias=False)
        self.join = join
        with torch.no_grad():
            self.one.weight.copy_(torch.tensor([[1.0, 0.1], [0.0, 1.0]]).reshape(2, 2, 1, 1))
            self.two.weight.copy_(torch.tensor([[3.0, 0.2], [0.0, 1.0]]).reshape(2, 2, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        h = self.one(x)
        return self.two(h) if self.join is None else self.join(self.two(h), h)


def add(two, one):
    return two + one


def side_by_side(two, one):
    return torch.cat([two, one], 1)


#: the error at the output, over s
REACHED = {None: 0.5, add: 0.6, side_by_side: math.hypot(0.5, 0.1)}


def samples():
    # both channels are the same everywhere
    return torch.randn(6, 1, 3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).expand(
        -1, 2, -1, -1
    )


def aligned(join=None, schedule="parallel"):
    return nettrim.prune(
        Aligned(join).double(), [samples()], "magnitude", sparsity=0.5, schedule=schedule, progress=False
    ).ledger


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("join", REACHED)
def test_the_bounds_of_aligned_networks_are_reached(join, schedule):
    found = aligned(join, schedule)
    size = float(samples()[:, 0].norm())
    assert found.measured == pytest.approx(REACHED[join] * size)
    for name in ("operator", "l-obs spectral"):
        assert found.bounds[name] == pytest.approx(found.measured, rel=1e-5), name
    assert [record.network_error for record in found.records] == pytest.approx([0.1 * size, 0.5 * size])
    assert [record.clean_error for record in found.records] == pytest.approx([0.1 * size, 0.2 * size])
    assert all(record.remark is None for record in found.records)
    assert_bounds_hold(found)


def without_a_skip(flow: Flow | None, incoming):
    return TRUE_PASSED(flow, [*incoming[:1], *[0.0] * (len(incoming) - 1)])


def stacked(flow: Flow | None, incoming):
    return TRUE_PASSED(None if flow is None else replace(flow, kind="stack"), incoming)


def too_small_a_norm(weight, **settings):
    found = TRUE_NORM(weight, **settings)
    return replace(found, value=0.9 * found.value)


def without_own_errors(spec, layer, proof, norms, measured):
    return replace(TRUE_LINK(spec, layer, proof, norms, measured), clean_change=0.0, clean_error=0.0)


def one_rung_short(ladder):
    return TRUE_SUM(ladder[:-1])


TRUE_PASSED, TRUE_NORM, TRUE_LINK, TRUE_SUM = bounds.passed, ledger.conv_norm, ledger._link, ledger.telescoped
PLANTED = {
    "norm": (ledger, "conv_norm", too_small_a_norm, None, "two: operator"),
    "skip": (bounds, "passed", without_a_skip, add, "output: operator"),
    "branch": (bounds, "passed", without_a_skip, side_by_side, "output: operator"),
    "stack": (bounds, "passed", stacked, add, "output: operator"),
    "own error": (ledger, "_link", without_own_errors, None, "one: operator"),
    "rung": (ledger, "telescoped", one_rung_short, add, "output: telescoped"),
}


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize(("module", "name", "planted", "join", "place"), PLANTED.values(), ids=PLANTED)
def test_a_wrong_bound_is_seen(monkeypatch, module, name, planted, join, place, schedule):
    monkeypatch.setattr(module, name, planted)
    with pytest.raises(AssertionError, match=f"^{place}"):
        assert_bounds_hold(aligned(join, schedule))


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_verify_sees_a_wrong_bound_too(monkeypatch, schedule, tmp_path):
    monkeypatch.setattr(ledger, "conv_norm", too_small_a_norm)
    result = nettrim.prune(
        Aligned().double(), [samples()], "magnitude", sparsity=0.5, schedule=schedule, progress=False
    )
    result.save(tmp_path / "run")
    said = nettrim.verify(tmp_path / "run").failures
    assert any("exceeds" in sentence and "two: operator" in sentence for sentence in said)
    monkeypatch.undo()
    said = nettrim.verify(tmp_path / "run").failures
    assert any("operator is stored as" in sentence for sentence in said)


class Unknown(nn.Module):
    """Nothing is known of how a running product passes errors on."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.three = nn.Linear(4, 5), nn.Linear(5, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.one(x))
        return self.three(torch.cumprod(self.two(h), 1))


class Picked(nn.Module):
    """The largest output decides which row of a table comes next."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.table, self.two = nn.Linear(4, 5), nn.Embedding(5, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.two(self.table(self.one(x).argmax(1)))


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize(
    ("network", "step", "bounded"),
    [(Unknown, r"cumprod in forward \(unknown\)", ["one", "two"]), (Picked, r"argmax in forward", ["one"])],
)
def test_behind_a_step_of_unknown_gain_only_the_telescoped_bound_is_left(network, step, bounded, schedule):
    model = seeded(network(), 5)
    x = torch.randn(40, 4, generator=torch.Generator().manual_seed(2))
    method = nettrim.NetTrim(tol=1e-2, on_failure="return")
    found = nettrim.prune(model, [x], method, epsilon=0.3, schedule=schedule, progress=False).ledger
    assert re.search(step, found.unbounded)
    assert_bounds_hold(found)
    for record in found.records:
        if record.name in bounded:
            assert set(record.bounds) >= {"operator", "l-obs", "l-obs spectral", "paper"}
        else:
            assert not set(record.bounds) & {"operator", "l-obs", "l-obs spectral"}
    # a promise of the last layer of a cascade is about its output, however its inputs came about
    own = {"cascade"} if schedule == "cascade" else set()
    assert set(found.bounds) == {"telescoped"} | own
    assert all(math.isfinite(bound) for bound in found.bounds.values())


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("amount", [{"epsilon": 0.2}, {"lam": 0.3}])
def test_the_proofs_of_a_grouped_convolution_are_those_of_its_groups_together(relu, amount):
    x = torch.randn(12, 4, 5, 5, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    behind = [nn.ReLU()] if relu else []
    whole = seeded(nn.Sequential(nn.Conv2d(4, 6, 3, groups=2), *behind), 6).double()
    method = nettrim.NetTrim(tol=1e-3)

    def pruned(model, inputs):
        return nettrim.prune(model, [inputs], method, **amount, schedule="parallel", progress=False)

    result = pruned(whole, x)
    parts = []
    for g in range(2):
        part = nn.Sequential(nn.Conv2d(2, 3, 3), *behind).double()
        with torch.no_grad():
            part[0].weight.copy_(whole[0].weight[3 * g : 3 * g + 3])
            part[0].bias.copy_(whole[0].bias[3 * g : 3 * g + 3])
        parts.append(pruned(part, x[:, 2 * g : 2 * g + 2]))
    assert torch.allclose(result.model[0].weight, torch.cat([part.model[0].weight for part in parts]), atol=1e-12)
    (record,), records = result.ledger.records, [part.ledger.records[0] for part in parts]
    for name in ("objective", "lower_bound"):
        assert getattr(record, name) == pytest.approx(sum(getattr(r, name) for r in records), rel=1e-9), name
    for name in ("promised", "measured", "network_error", "clean_error", "target_norm"):
        assert getattr(record, name) == pytest.approx(math.hypot(*(getattr(r, name) for r in records)), rel=1e-9), name
    assert record.gap == pytest.approx((record.objective - record.lower_bound) / record.objective)
    assert record.violation == max(r.violation for r in records)
    assert record.kept == sum(r.kept for r in records)
    assert record.rows == record.total_rows == 12 * 9
    assert [block["status"] for block in record.facts["blocks"]] == [r.facts["status"] for r in records]
    if "epsilon" in amount:
        assert record.objective == pytest.approx(float(result.model[0].weight.abs().sum()))
        assert record.promised == pytest.approx(math.hypot(*(0.2 * r.target_norm for r in records)))
    assert_bounds_hold(result.ledger)


def test_one_group_that_is_not_solved_leaves_the_layer_unsolved():
    x = torch.randn(12, 4, 5, 5, generator=torch.Generator().manual_seed(3))
    model = seeded(nn.Sequential(nn.Conv2d(4, 6, 3, groups=2), nn.ReLU()), 6)
    rough = nettrim.NetTrim(solver=nettrim.Admm(max_iter=1), tol=1e-9, on_failure="return")
    record = nettrim.prune(model, [x], rough, epsilon=0.2, progress=False).ledger.records[0]
    assert len(record.facts["blocks"]) == 2
    assert record.facts["status"] in ("MAX_ITER", "NOT_FEASIBLE")
    assert (record.lower_bound is None) == (record.gap is None)


class Stretched(nn.Module):
    """The second layer stretches a direction in which the first one's error does not lie."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False)
        with torch.no_grad():
            self.one.weight.copy_(torch.tensor([[1.0, 0.0], [0.1, 1.0]]))
            self.two.weight.copy_(torch.tensor([[100.0, 0.0], [0.0, 1.0]]))

    def forward(self, x: Tensor) -> Tensor:
        return self.two(self.one(x))


def test_a_bound_that_is_more_than_tenfold_is_explained():
    found = nettrim.prune(
        Stretched().double(), [torch.ones(5, 2)], "magnitude", sparsity=0.5, schedule="parallel", progress=False
    ).ledger
    one, two = found.records
    assert one.remark is None
    assert two.bounds["operator"] == pytest.approx(100 * two.network_error, rel=1e-5)
    assert two.remark.startswith(f"bound {two.bounds['operator']:.3g}")
    assert f"measured {two.network_error:.3g}" in two.remark
    assert "a norm of 100" in two.remark


class Level(nn.Module):
    """What two branches give is almost the same, and the last layer takes the difference."""

    def __init__(self, bias: float) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(3, 1, bias=False), nn.Linear(3, 1, bias=False)
        self.last = nn.Linear(2, 1)
        with torch.no_grad():
            self.left.weight.copy_(torch.tensor([[1.0, 0.5, 0.2]]))
            self.right.weight.copy_(torch.tensor([[1.0, 0.51, 0.2]]))
            self.last.weight.copy_(torch.tensor([[1.0, -1.0]]))
            self.last.bias.fill_(bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.cat([self.left(x), self.right(x)], 1))


@pytest.mark.parametrize(
    ("bias", "epsilon", "why"),
    [
        (1.0, {"left": 1e-3, "right": 1e-3, "last": 0.5}, "the radius is loose"),
        (0.0, {"left": 1e-3, "right": 0.9, "last": 1e-3}, "the dense weights' own error on the pruned inputs"),
    ],
)
def test_a_promise_that_is_more_than_tenfold_is_explained(bias, epsilon, why):
    x = torch.randn(40, 3, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    method = nettrim.NetTrim(tol=1e-3, bias="frozen", on_failure="return")
    found = nettrim.prune(Level(bias).double(), [x], method, epsilon=epsilon, progress=False).ledger
    last = found.records[-1]
    # no weight at all is near enough
    assert last.kept == 0
    assert last.promised > 10 * last.measured
    assert last.remark.startswith(f"promised {last.promised:.3g}, measured {last.measured:.3g}: ")
    assert why in last.remark
    assert all(record.remark is None for record in found.records[:2])
    assert_bounds_hold(found)


class Weighted(nn.Module):
    """One weight is used twice, so it is left dense; its norm is needed all the same."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.shared, self.two = nn.Linear(4, 5), nn.Linear(5, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.one(x))
        return self.two(self.shared(torch.tanh(self.shared(h))))


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_weights_that_are_kept_dense_pass_errors_on(schedule):
    model = seeded(Weighted(), 7).double()
    x = torch.randn(40, 4, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    result = nettrim.prune(
        model, [x], "alps", sparsity=0.5, schedule=schedule, on_unsupported="keep", progress=False
    )  # fmt: skip
    assert list(result.ledger.unsupported) == ["shared"]
    assert "called 2 times" in result.ledger.unsupported["shared"]
    assert result.ledger.unbounded is None
    assert_bounds_hold(result.ledger)
    one, two = result.ledger.records
    norm = float(torch.linalg.matrix_norm(model.shared.weight.detach(), 2))
    after = float(torch.linalg.matrix_norm(result.model.two.weight, 2))
    # through the shared layer twice, and tanh is 1-Lipschitz
    expected = two.clean_error + after * norm**2 * one.bounds["operator"]
    assert two.bounds["operator"] == pytest.approx(expected, rel=1e-5)
    assert float((call(result.model, [x]) - call(model, [x])).norm()) == pytest.approx(result.ledger.measured)


class Scaled(nn.Module):
    """A parameter that no layer has."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.scale = nn.Linear(4, 3), nn.Parameter(torch.ones(3))

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x) * self.scale


def test_other_parameters_that_differ_add_errors_of_their_own():
    """As where a network was trained on, normalisation layers and all."""
    model = seeded(Scaled(), 8).double()
    x = torch.randn(20, 4, generator=torch.Generator().manual_seed(6), dtype=torch.float64)
    account = nettrim.prune(model, [x], "magnitude", sparsity=0.5, progress=False).account
    standing = account.standing()
    standing.set_raw({"scale": 1.5 * model.scale.detach()})
    layer = LayerEvidence("fc", False, False, False, *(2 * standing.dense_arrays(account.graph.layer("fc"))))
    found = account.ledger("none", "parallel", standing, [layer], {})
    assert found.measured == pytest.approx(0.5 * float(call(model, [x]).norm()))
    assert found.bounds["operator"] == pytest.approx(found.measured)
    assert_bounds_hold(found)
