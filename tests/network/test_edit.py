"""Copies share nothing with the model, and what is written is what was given, or nothing."""

from __future__ import annotations

import threading

import pytest
import torch
from torch import nn

from nettrim.errors import ProblemError, UnknownNameError, UnsupportedError
from nettrim.network.edit import double_copy, evaluating, find_linear, frozen_copy, layer_arrays, write_layer


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


def test_layer_arrays_are_clones(model):
    weight, bias = layer_arrays(model, "0")
    assert torch.equal(weight, model[0].weight)
    assert torch.equal(bias, model[0].bias)
    assert not weight.requires_grad
    weight.zero_()
    bias.zero_()
    assert model[0].weight.abs().min() > 0
    assert model[0].bias.abs().min() > 0
    assert layer_arrays(model, "3")[1] is None


def test_write_then_read(model):
    weight = torch.randn(4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    weight[1] = 0
    before = model[0].bias.detach().clone()
    write_layer(model, "0", weight)
    written, bias = layer_arrays(model, "0")
    assert written.dtype == torch.float32
    assert torch.equal(written, weight.float())
    assert torch.equal(written == 0, weight == 0)
    assert torch.equal(bias, before)
    write_layer(model, "0", weight, torch.zeros(4, dtype=torch.float64))
    assert torch.equal(model[0].bias, torch.zeros(4))
    assert model[0].weight.requires_grad


@pytest.mark.parametrize(
    ("name", "weight", "bias", "said"),
    [
        ("0", torch.zeros(3, 4), None, r"\(3, 4\).*\(4, 3\)"),
        ("0", torch.zeros(4, 3), torch.zeros(3), r"bias for layer '0' has shape \(3,\)"),
        ("0", torch.full((4, 3), torch.inf), None, "12 NaN or infinite"),
        ("0", torch.full((4, 3), 1e300, dtype=torch.float64), None, "12 NaN or infinite"),
        ("0", torch.zeros(4, 3), torch.full((4,), torch.nan), "bias.*4 NaN or infinite"),
        ("3", torch.zeros(2, 4), torch.zeros(2), "has none"),
        ("0", [[0.0] * 3] * 4, None, "is a list"),
    ],
)
def test_what_does_not_fit_is_refused_and_nothing_is_written(model, name, weight, bias, said):
    before = [parameter.detach().clone() for parameter in model.parameters()]
    with pytest.raises(ProblemError, match=said):
        write_layer(model, name, weight, bias)
    for parameter, kept in zip(model.parameters(), before, strict=True):
        assert torch.equal(parameter, kept)


def test_find_linear_lists_the_names(model):
    assert find_linear(model, "3") is model[3]
    with pytest.raises(UnknownNameError, match=r"'1'; its Linear layers are '0', '3'"):
        find_linear(model, "1")
    with pytest.raises(UnknownNameError, match="nor any other"):
        find_linear(nn.ReLU(), "fc")
