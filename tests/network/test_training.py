"""Training learns, is the same for the same seed, and leaves the caller's random numbers alone."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from nettrim.errors import ProblemError, UnknownNameError
from nettrim.network.batches import Batch, read_batches
from nettrim.network.losses import cross_entropy
from nettrim.network.samples import joined
from nettrim.network.support import Support
from nettrim.network.training import History, run_epochs, train


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
        (X, Y[:, None], r"labels have shape \(50, 1\) where .* pass labels of shape \(50,\)"),
        (X, Y[:9], "50 rows and labels 9"),
        (X, Y + 1, r"1 \.\.\. 2 and the model scores 2"),
        (X, Y - 1, r"-1 \.\.\. 0"),
        (X[:, :3], Y, r"fails on inputs of shape \(1, 3\)"),
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


def loop(model: nn.Module, epochs: int = 6, learning_rate: float = 0.05, weight_decay: float = 0.0, **more) -> History:
    """The shared loop, at a constant rate."""
    optimiser = torch.optim.Adam(model.parameters(), lr=learning_rate, weight_decay=weight_decay)
    schedule = torch.optim.lr_scheduler.ConstantLR(optimiser, factor=1.0)
    more = {"batch_size": 8, "seed": 0, "dropout": False} | more
    return run_epochs(model, X, Y, nn.functional.cross_entropy, optimiser, schedule, epochs=epochs, **more)


def half(model: nn.Module) -> dict[str, Tensor]:
    return {"0": torch.rand(model[0].weight.shape, generator=torch.Generator().manual_seed(1)) < 0.5}


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_pruned_weights_are_zero_after_every_step(weight_decay):
    model = network()
    masks = half(model)
    dense = model[3].weight.clone()
    support = Support(model, masks)
    seen = []

    def look() -> bool:
        seen.append(torch.equal(model[0].weight != 0, masks["0"]))
        return True

    loop(model, weight_decay=weight_decay, support=support, before_step=look)
    assert len(seen) == 6 * 7
    assert all(seen)
    assert torch.equal(model[0].weight != 0, masks["0"])
    assert bool((model[3].weight != dense).all())
    assert support.counts() == {"0": int(masks["0"].sum())}


def test_masks_can_change_on_the_way():
    model = network()
    support = Support(model, half(model))
    steps = []

    def narrow() -> bool:
        steps.append(1)
        if len(steps) == 10:
            mask = support.masks["0"].clone()
            mask[0] = False
            support.set({"0": mask})
        return len(steps) >= 10

    loop(model, support=support, before_step=narrow)
    assert not model[0].weight[0].any()
    assert torch.equal(model[0].weight != 0, support.masks["0"])


def test_an_interrupt_leaves_exact_zeros_and_evaluation_mode():
    model = network()
    masks = half(model)
    support = Support(model, masks)
    calls = []

    def interrupt(*args: object) -> None:
        calls.append(1)
        if len(calls) == 12:
            with torch.no_grad():
                model[0].weight.fill_(torch.nan)  # as an optimiser's step would that was cut short
            raise KeyboardInterrupt

    handle = model.register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        loop(model, support=support, dropout=True)
    handle.remove()
    assert bool((model[0].weight[~masks["0"]] == 0).all())
    assert not model.training


def test_the_best_weights_on_the_rows_held_out_are_left():
    # so high a rate that the loss goes up and down
    model = network()
    history = loop(model, epochs=9, learning_rate=0.5, held_out=(X[:10], Y[:10]))
    assert len(history.losses) == 9
    assert len(history.held_out_losses) == 10
    assert history.best_epoch == min(range(10), key=lambda epoch: history.held_out_losses[epoch])
    assert 0 < history.best_epoch < 9
    loss = nn.functional.cross_entropy(model(X[:10]), Y[:10]).item()
    assert loss == pytest.approx(history.held_out_losses[history.best_epoch], rel=1e-6)


def test_patience_ends_it_and_nothing_better_leaves_the_start():
    model = network()
    before = weights(model)
    # labels that contradict those trained on: it only gets worse
    history = loop(model, epochs=30, held_out=(X, 1 - Y), patience=3)
    assert len(history.losses) == 3
    assert history.best_epoch == 0
    assert torch.equal(weights(model), before)


def test_epochs_before_the_support_is_settled_do_not_count():
    model = network()
    steps = []

    def before_step() -> bool:
        steps.append(1)
        return len(steps) > 2 * 7 + 3

    # the loss rises from the start on, so that the first epoch that counts is the best
    history = loop(model, epochs=8, held_out=(X, 1 - Y), patience=2, before_step=before_step)
    assert history.best_epoch == 3
    assert len(history.losses) == 5


@pytest.mark.parametrize(
    ("masks", "error", "said"),
    [
        ({}, ProblemError, "masks is empty"),
        ({"1": torch.ones(8, 4).bool()}, UnknownNameError, "no layer '1' with a weight"),
        ({"0": torch.ones(8, 4)}, ProblemError, r"layer '0' is torch.float32 of shape \(8, 4\); pass bool"),
        ({"0": torch.ones(4, 8).bool()}, ProblemError, r"\(4, 8\); pass bool of shape \(8, 4\)"),
        ({"0": [[True]]}, ProblemError, "layer '0' is list"),
    ],
)
def test_masks_that_do_not_fit_are_refused(masks, error, said):
    model = network()
    before = weights(model)
    with pytest.raises(error, match=said):
        Support(model, masks)
    assert torch.equal(weights(model), before)


# networks of other kinds ---------------------------------------------------------------------------------------------


class Tagger(nn.Module):
    """Token ids, by keyword, to an object with logits (B, T, C)."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(7, 5), nn.Linear(5, 7)

    def forward(self, ids: Tensor, shift: Tensor | None = None) -> dict[str, Tensor]:
        scores = self.head(self.embed(ids))
        return {"loss": scores.new_zeros(()), "logits": scores if shift is None else scores + shift[:, None, None]}


IDS = torch.randint(0, 7, (40, 6), generator=torch.Generator().manual_seed(2))


def test_labels_of_every_position_are_learnt_by_the_loop():
    torch.manual_seed(0)
    model = Tagger()
    optimiser = torch.optim.Adam(model.parameters(), lr=0.05)
    schedule = torch.optim.lr_scheduler.ConstantLR(optimiser, factor=1.0)
    batch = joined(read_batches([{"ids": IDS[:30], "shift": X[:30, 0]}, {"ids": IDS[30:], "shift": X[30:40, 0]}]))
    wanted = (IDS + 1) % 7
    history = run_epochs(
        model, batch, wanted, cross_entropy, optimiser, schedule,
        epochs=30, batch_size=8, seed=0, held_out=(batch, wanted),
    )  # fmt: skip
    assert history.held_out_losses[0] > 1.5
    assert history.held_out_losses[-1] < 0.05
    assert bool((model(IDS)["logits"].argmax(-1) == wanted).all())


def images() -> tuple[Tensor, Tensor]:
    inputs = torch.randn(33, 2, 5, 5, generator=torch.Generator().manual_seed(5))
    return inputs, (inputs.mean((1, 2, 3)) > 0).long()


def convolutions() -> nn.Module:
    torch.manual_seed(4)
    return nn.Sequential(
        nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3, groups=2), nn.Flatten(), nn.Linear(4, 2)
    )  # fmt: skip


@pytest.mark.parametrize("dropout", [False, True])
def test_masks_of_convolutions_and_bare_weights_hold(dropout):
    inputs, labels = images()
    model = convolutions()
    generator = torch.Generator().manual_seed(1)
    masks = {name: torch.rand(model[int(name)].weight.shape, generator=generator) < 0.5 for name in ("0", "3")}
    before = weights(model)
    optimiser = torch.optim.Adam(model.parameters(), lr=0.01, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.ConstantLR(optimiser, factor=1.0)
    seen = []

    def look() -> bool:
        seen.append(all(torch.equal(model[int(name)].weight != 0, mask) for name, mask in masks.items()))
        return True

    statistics = model[1].running_mean.clone()
    run_epochs(
        model, inputs, labels, nn.functional.cross_entropy, optimiser, schedule,
        epochs=3, batch_size=8, seed=0, dropout=dropout, support=Support(model, masks), before_step=look,
    )  # fmt: skip
    assert len(seen) == 3 * 5
    assert all(seen)
    assert look()
    assert all(seen)
    assert not torch.equal(weights(model), before)
    # statistics follow the batches in training mode only
    assert torch.equal(model[1].running_mean, statistics) != dropout

    attention = nn.MultiheadAttention(4, 2)
    mask = torch.rand(12, 4, generator=generator) < 0.5
    support = Support(attention, {"in_proj_weight": mask, "out_proj": torch.eye(4).bool()})
    support.apply()
    assert torch.equal(attention.in_proj_weight != 0, mask)
    assert torch.equal(attention.out_proj.weight != 0, torch.eye(4).bool())


def test_a_single_row_is_not_left_over_for_batch_normalisation():
    """33 rows by 8 leave one, of which a layer on vectors has no variance; others' steps are not cut otherwise."""
    seen = []

    class Watched(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            if self.training:
                seen.append(len(x))
            return super().forward(x)

    inputs, labels = images()
    flat = inputs.flatten(1)
    normed = Watched(nn.Linear(50, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    assert len(train(normed, flat, labels, epochs=1, batch_size=8)) == 1
    assert seen == [8, 8, 8, 7, 2]
    seen.clear()
    train(Watched(nn.Linear(50, 2)), flat, labels, epochs=1, batch_size=8)
    assert seen == [8, 8, 8, 8, 1]
    with pytest.raises(ProblemError, match=r"cannot be trained on a batch of one row .*raise batch_size"):
        train(normed, flat, labels, epochs=1, batch_size=1)


def test_a_classifier_of_positions_is_trained_and_checked():
    model = nn.Conv2d(2, 3, 1)
    inputs = images()[0]
    labels = (inputs[:, 0] > inputs[:, 1]).long() + (inputs[:, 0] > 1).long()
    labels[:, 0] = -100  # does not count
    losses = train(model, inputs, labels, epochs=60, learning_rate=0.1, batch_size=8)
    assert losses[-1] < 0.5 * losses[0]
    with pytest.raises(ProblemError, match=r"shape \(33,\) where the model scores \(1, 5, 5, 3\) of one row"):
        train(model, inputs, labels[:, 0, 0], epochs=1)
    with pytest.raises(ProblemError, match="labels are -100 throughout"):
        train(model, inputs, torch.full_like(labels, -100), epochs=1)
    with pytest.raises(ProblemError, match=r"0 \.\.\. 3 and the model scores 3"):
        train(model, inputs, labels.clamp(min=0) + (labels == 2).long(), epochs=1)


def test_data_are_not_changed_by_a_first_layer_that_works_in_place():
    inputs, labels = data()
    before = inputs.clone()
    model = nn.Sequential(nn.ReLU(inplace=True), nn.Linear(4, 2))
    train(model, inputs, labels, epochs=1)
    loop(model, epochs=1, held_out=(inputs[:10], labels[:10]))
    assert torch.equal(inputs, before)


@pytest.mark.parametrize(
    ("inputs", "said"),
    [
        (X.bool(), "inputs are torch.bool"),
        (Batch((X,), {"mask": torch.full((50, 2), torch.nan)}), "an input has 100 NaN"),
        (IDS[:0], r"shape \(0, 6\); pass at least one row"),
    ],
)
def test_samples_that_cannot_be_used_are_refused(inputs, said):
    with pytest.raises(ProblemError, match=said):
        joined(inputs)


def test_samples_are_joined_in_their_order():
    batch = joined(read_batches([{"ids": IDS[:30], "x": X[:30]}, {"ids": IDS[30:], "x": X[30:40]}]))
    assert torch.equal(batch.kwargs["ids"], IDS)
    assert torch.equal(batch.inputs[0], X[:40])
    assert joined(IDS).inputs[0] is IDS
