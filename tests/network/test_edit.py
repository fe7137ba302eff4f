"""Copies share nothing with the model, and what is written is what was given, or nothing."""

from __future__ import annotations

import threading

import pytest
import torch
from torch import nn

from nettrim.errors import ProblemError, UnknownNameError, UnsupportedError
from nettrim.network.edit import (
    double_copy,
    evaluating,
    find_bias,
    find_weight,
    frozen_copy,
    raw_state,
    write_state,
)


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Dropout(), nn.Linear(4, 2, bias=False))


def test_frozen_copy_shares_nothing(model):
    model(torch.ones(1, 3)).sum().backward()
    twin = frozen_copy(model)
    for ours, theirs in zip(twin.parameters(), model.parameters(), strict=True):
        assert torch.equal(ours, theirs)
        assert ours.data_ptr() != theirs.data_ptr()
        assert theirs.requires_grad
        assert theirs.grad is not None
        assert not ours.requires_grad
        assert ours.grad is None
    assert model.training
    assert not any(module.training for module in twin.modules())


def test_double_copy(model):
    twin = double_copy(model)
    assert {parameter.dtype for parameter in twin.parameters()} == {torch.float64}
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


def test_a_model_that_cannot_be_copied_is_refused(model):
    model.lock = threading.Lock()
    with pytest.raises(UnsupportedError, match="cannot be copied"):
        frozen_copy(model)


def test_evaluating_restores_each_flag_even_after_an_error(model):
    model[2].eval()

    def fail():
        with evaluating(model):
            assert not any(module.training for module in model.modules())
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert [model.training, model[0].training, model[2].training] == [True, True, False]


class Tied(nn.Module):
    """An output layer that reads the embedding's weight, beside a buffer and a bare parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(5, 3)
        self.head = nn.Linear(3, 5, bias=False)
        self.head.weight = self.embedding.weight
        self.scale = nn.Parameter(torch.ones(3))
        self.norm = nn.BatchNorm1d(3)


def test_raw_state_holds_the_objects_themselves_each_once():
    model = Tied()
    state = raw_state(model)
    assert list(state) == [
        "scale", "embedding.weight", "norm.weight", "norm.bias",
        "norm.running_mean", "norm.running_var", "norm.num_batches_tracked",
    ]  # fmt: skip
    assert state["embedding.weight"] is model.head.weight
    assert state["norm.running_var"] is model.norm.running_var


def test_weights_are_found_by_the_name_of_their_layer_or_their_own(model):
    assert find_weight(model, "3") is model[3].weight
    assert find_weight(model, "3.weight") is model[3].weight
    assert find_bias(model, "0") is model[0].bias
    assert find_bias(model, "3") is None
    assert find_weight(Tied(), "scale").shape == (3,)
    with pytest.raises(UnknownNameError, match=r"no layer '1' .*its parameters are 0\.weight, 0\.bias, 3\.weight$"):
        find_weight(model, "1")


def test_write_then_read(model):
    weight = torch.randn(4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    weight[1] = 0
    before = model[0].bias.detach().clone()
    write_state(model, {"0.weight": weight})
    assert model[0].weight.dtype == torch.float32
    assert torch.equal(model[0].weight, weight.float())
    assert torch.equal(model[0].weight == 0, weight == 0)
    assert torch.equal(model[0].bias, before)
    write_state(model, {"0.weight": weight, "0.bias": torch.zeros(4, dtype=torch.float64)})
    assert torch.equal(model[0].bias, torch.zeros(4))
    assert model[0].weight.requires_grad
    # what was written from is not what is held
    weight.fill_(7.0)
    assert float(model[0].weight.detach().abs().max()) < 7


def test_buffers_and_tied_weights_are_written_by_any_of_their_names():
    model = Tied()
    write_state(model, {"head.weight": torch.ones(5, 3), "norm.running_mean": torch.full((3,), 2.0)})
    assert torch.equal(model.embedding.weight, torch.ones(5, 3))
    assert model.head.weight is model.embedding.weight
    assert model.norm.running_mean.tolist() == [2.0, 2.0, 2.0]


@pytest.mark.parametrize(
    ("entries", "error", "said"),
    [
        ({"0.weight": torch.zeros(3, 4)}, ProblemError, r"0\.weight has shape \(3, 4\).*\(4, 3\)"),
        (
            {"0.weight": torch.zeros(4, 3), "0.bias": torch.zeros(3)},
            ProblemError,
            r"0\.bias has shape \(3,\) where the model holds \(4,\)",
        ),
        ({"0.weight": torch.full((4, 3), torch.inf)}, ProblemError, "12 NaN or infinite"),
        ({"0.weight": torch.full((4, 3), 1e300, dtype=torch.float64)}, ProblemError, "12 NaN or infinite"),
        (
            {"0.weight": torch.zeros(4, 3), "0.bias": torch.full((4,), torch.nan)},
            ProblemError,
            "bias.*4 NaN or infinite",
        ),
        (
            {"3.weight": torch.zeros(2, 4), "3.bias": torch.zeros(2)},
            UnknownNameError,
            r"no parameter '3\.bias'; its parameters are 0\.weight",
        ),
        ({"0.weight": [[0.0] * 3] * 4}, ProblemError, "is a list"),
    ],
)
def test_what_does_not_fit_is_refused_and_nothing_is_written(model, entries, error, said):
    before = [parameter.detach().clone() for parameter in model.parameters()]
    with pytest.raises(error, match=said):
        write_state(model, entries)
    for parameter, kept in zip(model.parameters(), before, strict=True):
        assert torch.equal(parameter, kept)
