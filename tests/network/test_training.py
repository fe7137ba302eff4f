"""Training learns, is the same for the same seed, and leaves the caller's random numbers alone."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from nettrim.errors import ProblemError
from nettrim.network.training import train


def data() -> tuple[Tensor, Tensor]:
    inputs = torch.randn(50, 4, generator=torch.Generator().manual_seed(0))
    return inputs, (inputs[:, 0] > inputs[:, 1]).long()


def network() -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Dropout(0.2), nn.Linear(8, 2))


def weights(model: nn.Module) -> Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


def test_it_learns_and_ends_in_evaluation_mode():
    inputs, labels = data()
    model = network()
    losses = train(model, inputs, labels, epochs=40, learning_rate=0.02, batch_size=16)
    assert len(losses) == 40
    assert losses[-1] < 0.5 * losses[0]
    assert (model(inputs).argmax(1) == labels).float().mean() > 0.9
    assert not any(module.training for module in model.modules())


def test_the_seed_decides_everything():
    runs = []
    for seed, disturbance in ((5, 1), (5, 2), (6, 1)):
        model = network()
        torch.manual_seed(disturbance)
        losses = train(model, *data(), epochs=3, batch_size=8, seed=seed)
        runs.append((losses, weights(model)))
    assert runs[0][0] == runs[1][0]
    assert torch.equal(runs[0][1], runs[1][1])
    assert not torch.equal(runs[0][1], runs[2][1])


def test_the_global_random_state_is_untouched():
    model = network()
    before = torch.get_rng_state()
    train(model, *data(), epochs=1)
    assert torch.equal(torch.get_rng_state(), before)


def test_the_loss_is_the_mean_over_rows():
    # so small a rate changes nothing within the epoch: the mean over uneven batches is that over all rows
    inputs, labels = data()
    model = network()[0:2]
    expected = nn.functional.cross_entropy(model(inputs), labels).item()
    (loss,) = train(model, inputs, labels, epochs=1, learning_rate=1e-12, batch_size=16)
    assert loss == pytest.approx(expected, rel=1e-5)


def test_weight_decay_shrinks():
    plain, decayed = network(), network()
    train(plain, *data(), epochs=20, learning_rate=0.02)
    train(decayed, *data(), epochs=20, learning_rate=0.02, weight_decay=0.1)
    assert weights(decayed).norm() < 0.8 * weights(plain).norm()


def test_inputs_are_cast_to_the_model():
    inputs, labels = data()
    model = network().double()
    train(model, inputs, labels.int(), epochs=1)
    assert weights(model).dtype == torch.float64


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"epochs": 0}, "epochs is 0"),
        ({"epochs": 1.5}, "epochs is 1.5"),
        ({"epochs": 1, "batch_size": 0}, "batch_size is 0"),
        ({"epochs": 1, "learning_rate": 0.0}, "learning_rate is 0.0"),
        ({"epochs": 1, "learning_rate": math.nan}, "learning_rate is nan"),
        ({"epochs": 1, "weight_decay": -1.0}, "weight_decay is -1.0"),
    ],
)
def test_settings_out_of_range_are_refused(settings, said):
    with pytest.raises(ProblemError, match=said):
        train(network(), *data(), **settings)


X, Y = data()


@pytest.mark.parametrize(
    ("inputs", "labels", "said"),
    [
        (X[:0], Y[:0], r"shape \(0, 4\)"),
        (X.long(), Y, "torch.int64"),
        (torch.where(X > 2, torch.nan, X), Y, "NaN or infinite"),
        (X, Y.float(), "labels are torch.float32"),
        (X, Y[:, None], r"labels.*\(50, 1\)"),
        (X, Y[:9], "50 rows and labels 9"),
        (X, Y + 1, r"1 \.\.\. 2 and the model scores 2"),
        (X, Y - 1, r"-1 \.\.\. 0"),
        (X[:, :3], Y, r"fails on inputs of shape \(50, 3\)"),
    ],
)
def test_data_that_do_not_fit_are_refused_before_any_step(inputs, labels, said):
    model = network()
    before = weights(model)
    with pytest.raises(ProblemError, match=said):
        train(model, inputs, labels, epochs=1)
    assert torch.equal(weights(model), before)


def test_models_that_cannot_be_trained_are_refused():
    with pytest.raises(ProblemError, match="requires_grad_"):
        train(network().requires_grad_(False), X, Y, epochs=1)
    with pytest.raises(ProblemError, match=r"maps one row to \(8,\)"):
        train(nn.Sequential(nn.Linear(4, 8), nn.Flatten(0)), X, Y, epochs=1)


def test_a_loss_that_explodes_says_so_and_leaves_evaluation_mode():
    model = network()
    with pytest.raises(ProblemError, match=r"loss is (nan|inf) in epoch"):
        train(model, X * 1e20, Y, epochs=5, learning_rate=1e30, batch_size=8)
    assert not model.training
