"""Two networks side by side, against their forwards written out by hand."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from networks import seeded
from torch import Tensor, nn

from nettrim.network.batches import read_batches
from nettrim.network.trace import trace
from nettrim.pipeline.account import Account
from nettrim.pipeline.measure import measure

SAMPLES = 23
OPS = ["input", "conv2d", "relu", "conv2d", "add", "relu", "flatten", "linear"]
ORDER = ["stem", "body", "head"]


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(2, 3, 3, padding=1)
        self.body = nn.Conv2d(3, 3, 3, padding=1, bias=False)
        self.head = nn.Linear(48, 4)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.stem(x))
        return self.head(torch.flatten(torch.relu(self.body(h) + h), 1))


def by_hand(state, x):
    """The value of every step."""
    stem = F.conv2d(x, state["stem.weight"], state["stem.bias"], padding=1)
    h = stem.clamp(min=0)
    body = F.conv2d(h, state["body.weight"], padding=1)
    joined = body + h
    after = joined.clamp(min=0)
    flat = after.reshape(len(x), -1)
    return [x, stem, h, body, joined, after, flat, flat @ state["head.weight"].T + state["head.bias"]]


@pytest.fixture
def given():
    """The traced network, its samples, and states of the dense network with the first 0, 1, 2, 3 layers changed."""
    generator = torch.Generator().manual_seed(2)
    model = seeded(Residual(), 3).double()
    x = torch.randn(SAMPLES, 2, 4, 4, generator=generator, dtype=torch.float64)
    labels = torch.randint(0, 4, (SAMPLES,), generator=generator)
    batches = read_batches([(x[:9], labels[:9]), (x[9:], labels[9:])])
    account = Account.of(model, trace(model, batches.first(8)), batches, None, 1 << 30)
    states = [account.dense]
    for name in ORDER:
        changed = {}
        for key in (f"{name}.weight", f"{name}.bias"):
            if key in account.dense:
                tensor = account.dense[key]
                mask = torch.rand(tensor.shape, generator=generator) < 0.6
                changed[key] = tensor * mask if tensor.dim() > 1 else 1.1 * tensor
        states.append(states[-1] | changed)
    return account, batches, x, labels, states


def measured_of(given, rows=100, **settings):
    account, batches, _, _, (dense, *rungs, pruned) = given
    return measure(account.graph, dense, pruned, rungs, batches, rows, **settings)


def square(a, b=0.0):
    return float((a - b).square().sum())


def test_every_figure_is_that_of_the_forward_by_hand(given):
    account, _, x, labels, states = given
    assert [step.op for step in account.graph.program.steps] == OPS
    found = measured_of(given)
    values = [by_hand(state, x) for state in states]
    dense, pruned = values[0], values[-1]
    assert found.samples == SAMPLES
    for index in range(1, len(OPS)):
        assert found.passages[index].error == pytest.approx(square(pruned[index], dense[index]), rel=1e-12), OPS[index]
        assert found.passages[index].norm == pytest.approx(square(dense[index]), rel=1e-12), OPS[index]
    # the pruned layer on what the dense network gives it, before and behind the ReLU that alone reads it
    state = states[-1]
    clean = {
        1: F.conv2d(x, state["stem.weight"], state["stem.bias"], padding=1),
        3: F.conv2d(dense[2], state["body.weight"], padding=1),
        7: dense[6] @ state["head.weight"].T + state["head.bias"],
    }
    for index, value in clean.items():
        own = square(value, dense[index])
        after = square(value.clamp(min=0), dense[index].clamp(min=0)) if index == 1 else own
        assert found.passages[index].own == pytest.approx(own, rel=1e-12)
        assert found.passages[index].own_after == pytest.approx(after, rel=1e-12)
        assert after < own or index != 1
    assert all(p.own == p.own_after == 0 for index, p in enumerate(found.passages) if index not in clean)
    ladder = [square(after[-1], before[-1]) for before, after in pairwise(values)]
    assert found.ladder == pytest.approx(ladder, rel=1e-12)
    right = tuple(int((value[-1].argmax(1) == labels).sum()) for value in (dense, pruned))
    assert (found.right, found.labels) == (right, SAMPLES)
    assert found.accuracy == {"dense": right[0] / SAMPLES, "pruned": right[1] / SAMPLES}


def test_gains_carry_the_errors_that_were_measured(given):
    """Every step but layers passes on no more than its gains say, on the very errors that came in."""
    account = given[0]
    found = measured_of(given)
    layers = {layer.step for layer in account.graph.layers}
    for index, (step, passage) in enumerate(zip(account.graph.program.steps, found.passages, strict=True)):
        if index in layers or step.op == "input":
            assert passage.flow is None
            continue
        incoming = [math.sqrt(found.passages[ref.step].error) for ref in step.refs]
        assert passage.flow.kind == "sum"
        passed = sum(gain * error for gain, error in zip(passage.flow.gains, incoming, strict=True))
        assert math.sqrt(passage.error) <= passed * (1 + 1e-12)
    assert found.passages[4].flow.gains == (1.0, 1.0)  # the addition
    assert all(p.flow is None for p in measured_of(given, gains=False).passages)


@pytest.mark.parametrize("rows", [1, 4, 9])
def test_how_many_samples_run_at_a_time_does_not_matter(given, rows):
    whole, cut = measured_of(given, single=True), measured_of(given, rows, single=True)
    for a, b in zip(whole.passages, cut.passages, strict=True):
        for name in ("error", "norm", "own", "own_after"):
            assert getattr(b, name) == pytest.approx(getattr(a, name), rel=1e-11)
        assert (a.flow is None) == (b.flow is None)
    assert cut.ladder == pytest.approx(whole.ladder, rel=1e-11)
    assert (cut.samples, cut.right, cut.labels) == (whole.samples, whole.right, whole.labels)
    cut_errors, errors = (torch.cat([part.errors for part in found.figures]) for found in (cut, whole))
    assert torch.allclose(cut_errors, errors, rtol=1e-11)


@pytest.mark.parametrize("copied", [False, True])
def test_networks_that_are_the_same_are_nowhere_apart(given, copied):
    account, batches, _, _, states = given
    twin = {name: tensor.clone() if copied else tensor for name, tensor in states[0].items()}
    found = measure(account.graph, states[0], twin, [twin, twin], batches, 10)
    assert all(p.error == p.own == p.own_after == 0 for p in found.passages)
    assert all(passage.norm > 0 for passage in found.passages[1:])
    assert found.ladder == [0.0, 0.0, 0.0]
    assert found.right[0] == found.right[1]


def test_a_share_is_zero_where_a_layer_was_not_changed(given):
    account, batches, _, _, (dense, first, _second, last) = given
    found = measure(account.graph, dense, last, [first, first], batches, 10)
    assert found.ladder[1] == 0
    assert min(found.ladder[0], found.ladder[2]) > 0


class Squared(nn.Module):
    """How much a product passes on hangs on the samples."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        h = self.fc(x)
        return h * h


@pytest.mark.parametrize("factors", [(0.01, 100.0), (100.0, 0.01)])
def test_a_gain_holds_for_the_samples_that_need_the_largest(factors):
    model = seeded(Squared(), 2).double()
    x = torch.randn(10, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    batches = read_batches([factor * x for factor in factors])
    account = Account.of(model, trace(model, batches.first(8)), batches, None, 1 << 30)
    state = account.dense | {"fc.weight": 0.9 * account.dense["fc.weight"]}
    before, after = measure(account.graph, account.dense, state, [], batches, 10).passages[1:]
    assert math.sqrt(after.error) <= sum(after.flow.gains) * math.sqrt(before.error)


class Picking(nn.Module):
    """A row of a table is picked by the index of the largest output."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 5)
        self.table = nn.Parameter(torch.zeros(5, 3))

    def forward(self, x: Tensor) -> Tensor:
        return F.embedding(self.fc(x).argmax(1), self.table)


def test_an_index_that_differs_is_an_infinite_error():
    model = seeded(Picking(), 1).double()
    batches = read_batches([torch.randn(30, 4, generator=torch.Generator().manual_seed(0))])
    account = Account.of(model, trace(model, batches.first(8)), batches, None, 1 << 30)
    place = [step.op for step in account.graph.program.steps].index("argmax")
    for factor, infinite in ((1.001, False), (-1.0, True)):
        state = account.dense | {"fc.weight": factor * account.dense["fc.weight"]}
        passage = measure(account.graph, account.dense, state, [], batches, 10).passages[place]
        assert math.isinf(passage.error) is infinite
