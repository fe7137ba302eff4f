"""Finishing trains what is left, keeps exactly the count, is never worse than its start, and can be run again."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nettrim.data import load
from nettrim.errors import ProblemError, UnknownNameError
from nettrim.network.batches import read_batches
from nettrim.network.edit import find_weight, frozen_copy
from nettrim.network.finishing import Distill, FineTune, Finished
from nettrim.network.gradual import keep_most
from nettrim.network.losses import taught
from nettrim.network.trace import trace
from nettrim.network.training import train

NAMES = ["0", "3", "5"]
X = torch.randn(200, 6, generator=torch.Generator().manual_seed(0))
Y = (X[:, 0] > X[:, 1]).long() + (X[:, 2] > 0.5).long()


def fine_tune(model, inputs, labels, masks, seed=0, **settings) -> Finished:
    return FineTune(**settings).run(model, None, inputs, labels, masks, None, seed)


def distill(model, teacher, inputs, masks, targets=None, seed=0, traced=None, **settings) -> Finished:
    choose = "fixed" if targets is None else "layer" if isinstance(targets, dict) else "global"
    return Distill(**settings, choose=choose).run(model, teacher, inputs, None, masks, targets, seed, traced=traced)


def network(dropout: float = 0.3, seed: int = 3) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Linear(6, 12), nn.ReLU(), nn.Dropout(dropout), nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 3)
    )  # fmt: skip


@pytest.fixture(scope="module")
def teacher() -> nn.Module:
    model = network(0.0)
    train(model, X, Y, epochs=30, learning_rate=0.02, batch_size=20)
    return model.requires_grad_(False)


def pruned(teacher: nn.Module, share: float = 0.5) -> tuple[nn.Module, dict[str, Tensor]]:
    """By magnitude, the same share of every layer; the weights off the masks are still there."""
    model = copy.deepcopy(teacher).requires_grad_(True)
    masks = {}
    for name in NAMES:
        scores = {name: find_weight(model, name).detach().abs()}
        every = {name: torch.ones_like(scores[name], dtype=torch.bool)}
        masks |= keep_most(scores, every, math.ceil(share * scores[name].numel()))
    return model, masks


def start_of(teacher: nn.Module, masks: dict[str, Tensor]) -> nn.Module:
    model = copy.deepcopy(teacher)
    for name, mask in masks.items():
        find_weight(model, name).data.mul_(mask)
    return model


def weights(model: nn.Module) -> Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


def held_rows(fraction: float, seed: int) -> Tensor:
    drawn = torch.randperm(len(X), generator=torch.Generator().manual_seed(seed))
    return drawn[: math.ceil(fraction * len(X))]


def supports(model: nn.Module, names: list[str] = NAMES) -> dict[str, Tensor]:
    return {name: find_weight(model, name) != 0 for name in names}


def equal(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> bool:
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def error(model: nn.Module, teacher: nn.Module) -> float:
    with torch.no_grad():
        return float((model(X) - teacher(X)).norm() / teacher(X).norm())


# fixed masks ---------------------------------------------------------------------------------------------------------


def test_distillation_nears_the_dense_outputs_on_fixed_masks(teacher):
    model, masks = pruned(teacher)
    before = error(start_of(teacher, masks), teacher)
    dense = weights(teacher)
    found = distill(model, teacher, X, masks, epochs=15, learning_rate=0.02, batch_size=20)
    assert error(model, teacher) < 0.7 * before
    assert equal(found.masks, masks)
    assert equal(supports(model), masks)
    assert torch.equal(weights(teacher), dense)
    assert not model.training
    assert found.steps == 15 * 9
    assert len(found.losses) == 15
    assert len(found.validation_losses) == 16
    assert found.seconds > 0
    # biases are trained
    assert bool((model[5].bias != teacher[5].bias).all())


def test_fine_tuning_learns_the_labels_on_fixed_masks(teacher):
    model, masks = pruned(teacher, 0.3)
    del masks["3"]  # stays dense
    before = F.cross_entropy(start_of(teacher, masks)(X), Y).item()
    found = fine_tune(model, X, Y, masks, epochs=15, learning_rate=0.01, batch_size=20, weight_decay=1e-3)
    assert F.cross_entropy(model(X), Y).item() < 0.7 * before
    assert equal(supports(model, ["0", "5"]), masks)
    assert equal(found.masks, masks)
    assert bool((model[3].weight != 0).all())
    assert not model.training


@pytest.mark.parametrize("finish", [Distill(epochs=3, learning_rate=1e4), FineTune(epochs=3, learning_rate=1e4)])
def test_it_is_never_worse_than_its_start(teacher, finish):
    model, masks = pruned(teacher, 0.9)
    found = finish.run(model, teacher, X, Y, masks)
    assert found.best_epoch == 0
    assert torch.equal(weights(model), weights(start_of(teacher, masks)))


# a teacher beside the labels -----------------------------------------------------------------------------------------


def test_without_mixing_fine_tuning_is_cross_entropy_alone(teacher):
    model, masks = pruned(teacher, 1.0)
    fine_tune(model, X, Y, masks, epochs=3, learning_rate=0.01, batch_size=30, validation=0.0, seed=4)
    told, plain = copy.deepcopy(teacher).requires_grad_(True), copy.deepcopy(teacher).requires_grad_(True)
    FineTune(3, 0.01, 30, validation=0.0, mixing=0.0, temperature=7.0).run(told, network(), X, Y, masks, None, 4)
    drawn = torch.randperm(len(X), generator=torch.Generator().manual_seed(4))
    train(plain, X[drawn], Y[drawn], epochs=3, learning_rate=0.01, batch_size=30, seed=4)
    assert torch.equal(weights(model), weights(plain))
    assert torch.equal(weights(told), weights(plain))
    mixed = copy.deepcopy(teacher).requires_grad_(True)
    FineTune(3, 0.01, 30, validation=0.0, mixing=0.3).run(mixed, network(), X, Y, masks, None, 4)
    assert not torch.equal(weights(mixed), weights(plain))


@pytest.mark.parametrize(("mixing", "temperature"), [(0.0, 4.0), (0.3, 1.0), (0.9, 4.0), (1.0, 2.5)])
def test_the_loss_with_a_teacher_is_hintons(mixing, temperature):
    z, t = (torch.randn(6, 4, dtype=torch.float64).requires_grad_(k == 0) for k in range(2))
    y = torch.tensor([0, 3, 1, 1, 2, 0])
    value = taught(z, y, t, mixing, temperature, several=False)
    p, s = (torch.softmax(each / temperature, dim=1) for each in (t, z))
    chances = torch.softmax(z, dim=1)
    direct = (1 - mixing) * -chances[torch.arange(6), y].log().mean()
    direct = direct + mixing * temperature**2 * (p * (p / s).log()).sum(1).mean()
    assert value.item() == pytest.approx(direct.item(), rel=1e-12)
    value.backward()
    own = (1 - mixing) * (chances - F.one_hot(y, 4)) + mixing * temperature * (s - p)
    assert torch.allclose(z.grad, own.detach() / 6, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("mixing", [0.0, 0.6, 1.0])
def test_the_loss_of_several_labels_is_binary(mixing):
    z, t = (3 * torch.randn(5, 3, dtype=torch.float64) for _ in range(2))
    z.requires_grad_(True)
    y = torch.rand(5, 3) > 0.5
    value = taught(z, y, t, mixing, 2.0, several=True)
    p, s, own = torch.sigmoid(t / 2), torch.sigmoid(z / 2), torch.sigmoid(z)
    direct = (1 - mixing) * -torch.where(y, own, 1 - own).log().mean()
    direct = direct + mixing * 4 * (p * (p / s).log() + (1 - p) * ((1 - p) / (1 - s)).log()).mean()
    assert value.item() == pytest.approx(direct.item(), rel=1e-10)
    value.backward()
    wanted = (1 - mixing) * (own - y.double()) + mixing * 2 * (s - p)
    assert torch.allclose(z.grad, wanted.detach() / 15, rtol=1e-9, atol=1e-14)


def test_large_outputs_have_a_finite_loss_and_gradient():
    z = torch.tensor([[900.0, -900.0]]).requires_grad_(True)
    t = torch.tensor([[-900.0, 900.0]])
    for several, y in ((False, torch.tensor([0])), (True, torch.tensor([[True, False]]))):
        value = taught(z, y, t, 0.5, 4.0, several)
        (gradient,) = torch.autograd.grad(value, z)
        assert bool(value.isfinite())
        assert bool(gradient.isfinite().all())
        assert gradient[0, 0] > 0 > gradient[0, 1]  # towards the teacher


def test_a_teacher_draws_the_network_to_its_outputs(teacher):
    found = {}
    for mixing in (0.0, 1.0):
        model, masks = pruned(teacher, 0.4)
        settings = FineTune(15, 0.01, 20, mixing=mixing, temperature=2.0)
        settings.run(model, teacher, X, None if mixing == 1 else Y, masks)
        assert equal(supports(model), masks)
        with torch.no_grad():
            t, s = (torch.log_softmax(each(X), dim=1) for each in (teacher, model))
        found[mixing] = float((t.exp() * (t - s)).sum(1).mean())
    assert found[1.0] < 0.7 * found[0.0]


def test_several_labels_are_learnt(teacher):
    labels = torch.stack([X[:, 0] > 0, X[:, 1] > 0, X[:, 2] > 1], dim=1)
    for mixing in (0.0, 0.5):
        model, masks = pruned(teacher, 0.6)
        before = F.binary_cross_entropy_with_logits(start_of(teacher, masks)(X), labels.float()).item()
        FineTune(15, 0.02, 20, mixing=mixing).run(model, teacher, X, labels, masks)
        assert F.binary_cross_entropy_with_logits(model(X), labels.float()).item() < 0.7 * before


def test_what_a_teacher_or_labels_lack_is_refused(teacher):
    model, masks = pruned(teacher)
    before = weights(model)
    for wrong in (-0.1, 1.1, math.nan):
        with pytest.raises(ProblemError, match="mixing is"):
            FineTune(mixing=wrong)
    with pytest.raises(ProblemError, match="temperature is 0"):
        FineTune(mixing=0.5, temperature=0)
    with pytest.raises(ProblemError, match="needs the dense network as teacher"):
        FineTune(mixing=0.5).run(model, None, X, Y, masks)
    with pytest.raises(ProblemError, match="needs labels"):
        FineTune(mixing=0.5).run(model, teacher, X, None, masks)
    with pytest.raises(ProblemError, match="K outputs"):
        FineTune().run(model, None, X, torch.ones(200, 4), masks)
    with pytest.raises(ProblemError, match="one row for each"):
        FineTune().run(model, None, X, torch.ones(199, 3), masks)
    with pytest.raises(ProblemError, match=r"labels lie in 1 \.\.\. 2"):
        FineTune().run(model, None, X, 2 - torch.eye(3)[Y], masks)
    with pytest.raises(ProblemError, match="integer classes"):
        FineTune().run(model, None, X, Y.double(), masks)
    assert torch.equal(weights(model), before)


def test_the_rate_rises_stays_and_falls():
    parameter = nn.Parameter(torch.zeros(1))
    settings = Distill(learning_rate=2.0, final_share=0.25)
    for steps, rise in ((1000, 50), (200, 20)):
        optimiser, schedule = settings._optimiser([parameter], steps)
        rates = []
        for _ in range(steps):
            rates.append(optimiser.param_groups[0]["lr"])
            optimiser.step()
            schedule.step()
        assert rates[:rise] == pytest.approx([2 * (step + 1) / rise for step in range(rise)])
        assert rates[rise : 3 * steps // 4] == pytest.approx([2.0] * (3 * steps // 4 - rise))
        assert rates[7 * steps // 8] == pytest.approx(1.0)
        assert rates[-1] < 2 * 0.003 * 1000 / steps
        assert optimiser.param_groups[0]["lr"] == 0.0


def test_weight_decay_shrinks(teacher):
    (plain, masks), (decayed, _) = pruned(teacher), pruned(teacher)
    for model, weight_decay in ((plain, 0.0), (decayed, 0.1)):
        fine_tune(model, X, Y, masks, epochs=10, learning_rate=0.01, weight_decay=weight_decay, batch_size=10)
    assert weights(decayed).norm() < 0.9 * weights(plain).norm()


def test_without_validation_the_last_weights_are_kept(teacher):
    model, masks = pruned(teacher, 0.9)
    found = distill(model, teacher, X, masks, epochs=2, learning_rate=10.0, validation=0)
    assert found.validation_losses == ()
    assert found.best_epoch == 2
    assert not torch.equal(weights(model), weights(start_of(teacher, masks)))


def test_validation_samples_are_drawn_by_the_seed_and_not_trained_on(teacher):
    held = held_rows(0.2, seed=4)
    model, masks = pruned(teacher)
    found = fine_tune(model, X, Y, masks, epochs=1, learning_rate=1e-12, validation=0.2, seed=4)
    start = start_of(teacher, masks)
    assert found.validation_losses[0] == pytest.approx(F.cross_entropy(start(X[held]), Y[held]).item(), rel=1e-5)
    # what the labels of the samples held out are makes no difference to the training
    wrong = Y.clone()
    wrong[held] = (wrong[held] + 1) % 3
    other, _ = pruned(teacher)
    again = fine_tune(other, X, wrong, masks, epochs=1, learning_rate=1e-12, validation=0.2, seed=4)
    assert again.losses == found.losses
    assert again.validation_losses != found.validation_losses


def test_patience_ends_early(teacher):
    model, masks = pruned(teacher, 0.9)
    found = fine_tune(model, X, Y, masks, epochs=9, learning_rate=1e4, patience=2)
    assert len(found.losses) == 2
    assert found.steps == 2 * 2


# the loss ------------------------------------------------------------------------------------------------------------


def first_loss(teacher: nn.Module, **settings: object) -> tuple[float, Tensor, Tensor]:
    """The mean loss at the start, with the outputs that it is of."""
    model, masks = pruned(teacher)
    found = distill(model, teacher, X, masks, epochs=1, learning_rate=1e-12, validation=0, **settings)
    return found.losses[0], start_of(teacher, masks)(X).double(), teacher(X).double()


def test_the_kl_loss_is_its_formula(teacher):
    loss, ours, theirs = first_loss(teacher, temperature=2.0, anchor=0.3)
    p, q = (theirs / 2).softmax(1), (ours / 2).softmax(1)
    divergence = 4 * (p * (p / q).log()).sum(1).mean()
    assert loss == pytest.approx(float(0.7 * divergence + 0.3 * 0.5 * (ours - theirs).square().mean()), rel=1e-4)


def test_the_temperature_follows_the_spread_of_the_dense_outputs(teacher):
    loss, _, theirs = first_loss(teacher)
    spread = (theirs - theirs.mean(1, keepdim=True)).square().mean().sqrt()
    assert loss == pytest.approx(first_loss(teacher, temperature=float(spread) / 3)[0], rel=1e-6)
    assert loss != pytest.approx(first_loss(teacher, temperature=float(spread) / 2)[0], rel=1e-2)


def test_the_mse_loss_is_its_formula(teacher):
    loss, ours, theirs = first_loss(teacher, loss="mse")
    assert loss == pytest.approx(float((ours - theirs).square().mean()), rel=1e-4)


def test_the_anchor_ties_down_the_common_shift(teacher):
    shifted = copy.deepcopy(teacher)
    shifted[5].bias += 5.0
    model, masks = pruned(teacher, 1.0)
    loose = distill(model, shifted, X, masks, epochs=3, anchor=0.0, learning_rate=0.02)
    assert loose.validation_losses[0] < 1e-6
    model, _ = pruned(teacher, 1.0)
    found = distill(model, shifted, X, masks, epochs=30, anchor=0.5, learning_rate=0.1, batch_size=20)
    assert found.validation_losses[0] == pytest.approx(0.5 * 0.5 * 25, rel=1e-3)
    assert error(model, shifted) < 0.2


# the mask chosen on the way ------------------------------------------------------------------------------------------


def test_one_number_is_shared_among_all_layers(teacher):
    model, masks = pruned(teacher, 0.8)
    found = distill(model, teacher, X, masks, targets=70, epochs=10, learning_rate=0.01, batch_size=20)
    assert sum(int(mask.sum()) for mask in found.masks.values()) == 70
    assert equal(supports(model), found.masks)
    assert all(bool((masks[name] | ~found.masks[name]).all()) for name in NAMES)
    assert found.best_epoch > 5  # with the number that was asked for
    # against the same number by magnitude, trained just as long
    plain, fixed = pruned(teacher, 70 / 192)
    distill(plain, teacher, X, fixed, epochs=10, learning_rate=0.01, batch_size=20)
    assert error(model, teacher) < error(plain, teacher)


def test_a_dict_is_kept_within_each_layer(teacher):
    model, masks = pruned(teacher, 0.8)
    targets = {"5": 7, "0": 30}
    found = distill(model, teacher, X, masks, targets=targets, epochs=4, batch_size=20)
    counts = {name: int(mask.sum()) for name, mask in found.masks.items()}
    assert counts == {"0": 30, "3": int(masks["3"].sum()), "5": 7}
    assert torch.equal(found.masks["3"], masks["3"])
    assert equal(supports(model), found.masks)


def test_global_takes_the_sum_of_a_dict(teacher):
    (one, masks), (other, _) = pruned(teacher, 0.8), pruned(teacher, 0.8)
    settings = dict(epochs=4, batch_size=20)
    found = Distill(choose="global", **settings).run(one, teacher, X, None, masks, {"0": 40, "5": 10})
    assert equal(found.masks, distill(other, teacher, X, masks, targets=50, **settings).masks)


def test_targets_that_the_masks_hold_already_change_nothing(teacher):
    (one, masks), (other, _) = pruned(teacher), pruned(teacher)
    held = {name: int(mask.sum()) for name, mask in masks.items()}
    found = distill(one, teacher, X, masks, targets=held, epochs=3)
    assert found.losses == distill(other, teacher, X, masks, epochs=3).losses
    assert Distill(epochs=1).run(one, teacher, X, None, masks, held).steps == 1
    # as under any fixed mask, the start may be the best
    assert distill(other, teacher, X, masks, targets=sum(held.values()), epochs=2, learning_rate=1e4).best_epoch == 0


@pytest.mark.parametrize("final_share", [0.01, 1.0])
def test_the_number_is_exact_however_short_the_run(teacher, final_share):
    model, masks = pruned(teacher, 0.8)
    found = distill(model, teacher, X, masks, targets=50, epochs=1, batch_size=200, final_share=final_share)
    assert found.steps == 1
    assert sum(int(mask.sum()) for mask in supports(model).values()) == 50


def test_an_interrupt_leaves_exact_zeros(teacher):
    model, masks = pruned(teacher, 0.8)
    model.requires_grad_(False)
    traced = trace(model, read_batches([X])[0])
    calls = []

    def interrupt(*args: object) -> None:
        calls.append(1)
        if len(calls) == 40:
            raise KeyboardInterrupt

    handle = model.register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        distill(model, teacher, X, masks, targets=50, epochs=10, batch_size=20, traced=traced)
    handle.remove()
    left = supports(model)
    assert all(bool((masks[name] | ~left[name]).all()) for name in NAMES)
    assert 50 < sum(int(mask.sum()) for mask in left.values()) < sum(int(mask.sum()) for mask in masks.values())
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize(
    ("targets", "said"),
    [
        (None, r"loss is (nan|inf) in epoch 1 with learning_rate=1e\+30; lower"),
        (50, r"the derivatives .* give \d+ NaN or infinite"),
    ],
)
def test_a_loss_that_explodes_puts_the_start_back(teacher, targets, said):
    model, masks = pruned(teacher, 0.8)
    with pytest.raises(ProblemError, match=said):
        distill(model, teacher, X, masks, targets=targets, epochs=3, learning_rate=1e30, batch_size=20)
    assert torch.equal(weights(model), weights(start_of(teacher, masks)))


# what else a network holds -------------------------------------------------------------------------------------------


def test_the_seed_decides_everything(teacher):
    runs = []
    for seed, disturbance in ((5, 1), (5, 2), (6, 1)):
        model, masks = pruned(teacher, 0.8)
        torch.manual_seed(disturbance)
        before = torch.get_rng_state()
        found = distill(model, teacher, X, masks, targets=50, epochs=3, batch_size=20, saliency_rows=30, seed=seed)
        assert torch.equal(torch.get_rng_state(), before)
        runs.append((found, weights(model)))
    assert runs[0][0].losses == runs[1][0].losses
    assert torch.equal(runs[0][1], runs[1][1])
    assert not torch.equal(runs[0][1], runs[2][1])


def test_distillation_knows_no_dropout_and_fine_tuning_does(teacher):
    def run(finish: Distill | FineTune, dropout: float) -> tuple[float, ...]:
        model = network(dropout)
        model.load_state_dict(teacher.state_dict())
        return finish.run(model, teacher, X, Y, pruned(teacher)[1]).losses

    assert run(Distill(epochs=2), 0.0) == run(Distill(epochs=2), 0.5)
    assert run(FineTune(epochs=2), 0.0) != run(FineTune(epochs=2), 0.5)


def test_statistics_of_batches_are_left_to_fine_tuning():
    torch.manual_seed(0)
    dense = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))
    masks = {"0": torch.rand(8, 6) < 0.5}
    for finish, same in ((Distill(epochs=2), True), (FineTune(epochs=2, patience=None, learning_rate=0.01), False)):
        model = copy.deepcopy(dense)
        found = finish.run(model, dense, X, Y, masks)
        assert found.best_epoch > 0
        assert torch.equal(model[1].running_mean, dense[1].running_mean) == same
        assert bool((model[1].weight != dense[1].weight).all())


def test_frozen_copies_are_thawed_for_the_run_only(teacher):
    model, masks = pruned(teacher)
    model = frozen_copy(model)
    before = weights(model)
    distill(model, teacher, X, masks, epochs=3, learning_rate=0.01)
    assert not torch.equal(weights(model), before)
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert all(parameter.grad is None for parameter in model.parameters())
    # of a model that is frozen in part, that part stays
    model[0].requires_grad_(False)
    model[3].requires_grad_(True)
    first = model[0].bias.clone()
    distill(model, teacher, X, masks, epochs=3, learning_rate=0.01)
    assert torch.equal(model[0].bias, first)


def test_double_precision_and_a_teacher_in_another(teacher):
    model, masks = pruned(teacher)
    found = distill(model.double(), teacher, X.double(), masks, targets=50, epochs=2, learning_rate=0.01)
    assert isinstance(found, Finished)
    assert model[0].weight.dtype == torch.float64
    assert teacher[0].weight.dtype == torch.float32


# networks of other kinds ---------------------------------------------------------------------------------------------


def image_network() -> nn.Module:
    """Convolutions with batch norms and a residual; statistics and scales are not those of a fresh module."""

    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.norm_a = nn.Conv2d(1, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6)
            self.b, self.norm_b = nn.Conv2d(6, 6, 3, padding=1, groups=2), nn.BatchNorm2d(6)
            self.head = nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            x = F.relu(self.norm_a(self.a(x)))
            x = F.relu(x + self.norm_b(self.b(x)))
            return self.head(x.mean((2, 3)))

    torch.manual_seed(0)
    model = Residual()
    for norm in (model.norm_a, model.norm_b):
        nn.init.uniform_(norm.weight, 0.3, 2.0)
        nn.init.normal_(norm.bias)
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.5, 2.0)
    return model.eval().requires_grad_(False)


IMAGES = torch.randn(120, 1, 6, 6, generator=torch.Generator().manual_seed(6))


@pytest.mark.parametrize("targets", [None, 60, {"a": 20, "b": 30}])
def test_distillation_of_convolutions_with_batch_norms(targets):
    dense = image_network()
    model = copy.deepcopy(dense)
    masks = {}
    for name in ("a", "b", "head"):
        scores = {name: find_weight(model, name).abs()}
        masks |= keep_most(
            scores, {name: torch.ones_like(scores[name], dtype=torch.bool)}, scores[name].numel() * 2 // 3
        )
    start = copy.deepcopy(dense)
    for name, mask in masks.items():
        find_weight(start, name).mul_(mask)
    before = float((start(IMAGES) - dense(IMAGES)).norm())
    settings = dict(epochs=25, learning_rate=0.01, batch_size=16)
    found = distill(model, dense, IMAGES, masks, targets=targets, **settings)
    assert float((model(IMAGES) - dense(IMAGES)).norm()) < 0.7 * before
    for name, mask in found.masks.items():
        assert mask.shape == find_weight(model, name).shape
        assert torch.equal(find_weight(model, name) != 0, mask)
        assert bool((masks[name] | ~mask).all())
    counts = {name: int(mask.sum()) for name, mask in found.masks.items()}
    if isinstance(targets, dict):
        assert counts == targets | {"head": int(masks["head"].sum())}
    else:
        assert sum(counts.values()) == (targets or sum(int(mask.sum()) for mask in masks.values()))
    assert torch.equal(model.norm_a.running_mean, dense.norm_a.running_mean)
    # traced by the caller, and in batches, it is the same
    again = copy.deepcopy(dense)
    batches = read_batches(list(IMAGES.split(50)))
    traced = trace(dense, batches[0])
    twin = distill(again, dense, batches, masks, targets=targets, traced=traced, **settings)
    assert twin.losses == found.losses
    assert equal(twin.masks, found.masks)


def test_fine_tuning_of_convolutions_with_batch_norms():
    dense = image_network()
    model, labels = copy.deepcopy(dense), (IMAGES.mean((1, 2, 3)) > 0).long()
    masks = {"b": torch.rand(6, 3, 3, 3, generator=torch.Generator().manual_seed(0)) < 0.5}
    found = fine_tune(model, IMAGES, labels, masks, epochs=10, learning_rate=0.02, batch_size=27)
    assert found.validation_losses[found.best_epoch] < 0.7 * found.validation_losses[0]
    assert torch.equal(model.b.weight != 0, masks["b"])
    assert not torch.equal(model.norm_a.running_mean, dense.norm_a.running_mean)


class Tagger(nn.Module):
    """Token ids to an object with logits (B, T, C), by attention; `scale` is a second input."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(9, 8), nn.Linear(8, 4)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, ids: Tensor, scale: Tensor) -> dict[str, Tensor]:
        x = self.embed(ids) * scale[:, None, None]
        return {"logits": self.head(F.relu(x + self.attention(x, x, x, need_weights=False)[0]))}


@pytest.mark.parametrize("loss", ["kl", "mse"])
def test_distillation_of_token_ids_to_scores_of_every_position(loss):
    torch.manual_seed(1)
    dense = Tagger().eval().requires_grad_(False)
    ids = torch.randint(0, 9, (60, 5), generator=torch.Generator().manual_seed(3))
    batches = read_batches([{"ids": ids, "scale": 1 + X[:60, 0].abs()}])
    names = ["attention.in_proj_weight", "attention.out_proj", "head"]
    masks = {name: torch.ones_like(find_weight(dense, name), dtype=torch.bool) for name in names}
    total = sum(mask.numel() for mask in masks.values())
    model = copy.deepcopy(dense)
    found = distill(
        model, dense, batches, masks, targets=total // 2, epochs=20, learning_rate=0.01, batch_size=10, loss=loss
    )
    assert sum(int((find_weight(model, name) != 0).sum()) for name in names) == total // 2
    assert equal({name: find_weight(model, name) != 0 for name in names}, found.masks)
    # against the same number by magnitude, which is not trained
    plain = copy.deepcopy(dense)
    kept = keep_most({name: find_weight(plain, name).abs() for name in names}, masks, total // 2)
    for name, mask in kept.items():
        find_weight(plain, name).mul_(mask)

    def distance(model: nn.Module) -> float:
        given = batches[0].kwargs
        return float((model(**given)["logits"] - dense(**given)["logits"]).norm())

    assert distance(model) < 0.3 * distance(plain)


def test_the_kl_loss_of_positions_is_that_of_its_rows():
    torch.manual_seed(1)
    dense, model = Tagger().eval(), Tagger().eval()
    ids = torch.randint(0, 9, (60, 5), generator=torch.Generator().manual_seed(3))
    given = {"ids": ids, "scale": torch.ones(60)}
    theirs = dense(**given)["logits"].detach().double().reshape(300, 4)
    ours = model(**given)["logits"].detach().double().reshape(300, 4)
    masks = {"head": torch.ones(4, 8, dtype=torch.bool)}
    found = distill(
        model, dense, read_batches([given]), masks,
        epochs=1, learning_rate=1e-12, validation=0, temperature=2.0, anchor=0.3,
    )  # fmt: skip
    p, q = (theirs / 2).softmax(1), (ours / 2).softmax(1)
    expected = 0.7 * 4 * (p * (p / q).log()).sum(1).mean() + 0.3 * 0.5 * (ours - theirs).square().mean()
    assert found.losses[0] == pytest.approx(float(expected), rel=1e-4)


def test_a_teacher_that_gives_nan_is_refused(teacher):
    model, masks = pruned(teacher)
    broken = copy.deepcopy(teacher)
    broken[5].bias[0] = torch.nan
    with pytest.raises(ProblemError, match="what the teacher returns has 200 NaN"):
        distill(model, broken, X, masks)


# refusals ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("finish", "settings", "said"),
    [
        (Distill, {"epochs": 0}, "epochs is 0"),
        (Distill, {"batch_size": 1.5}, "batch_size is 1.5"),
        (Distill, {"learning_rate": -1.0}, "learning_rate is -1.0"),
        (Distill, {"loss": "l1"}, "loss is 'l1'; pass 'kl' or 'mse'"),
        (Distill, {"temperature": 0.0}, "temperature is 0.0 with loss='kl'"),
        (Distill, {"temperature": 2.0, "loss": "mse"}, "temperature is 2.0 with loss='mse'"),
        (Distill, {"anchor": 1.0}, "anchor is 1.0"),
        (Distill, {"choose": "all"}, "choose is 'all'"),
        (Distill, {"headroom": 0.5}, "headroom is 0.5"),
        (Distill, {"every": 0}, "every is 0"),
        (Distill, {"saliency_rows": 0}, "saliency_rows is 0"),
        (Distill, {"final_share": 0.0}, "final_share is 0.0"),
        (Distill, {"validation": 1.0}, "validation is 1.0"),
        (Distill, {"patience": 0}, "patience is 0"),
        (FineTune, {"epochs": True}, "epochs is True"),
        (FineTune, {"weight_decay": -1.0}, "weight_decay is -1.0"),
        (FineTune, {"validation": -0.1}, "validation is -0.1"),
    ],
)
def test_settings_out_of_range_are_refused(finish, settings, said):
    with pytest.raises(ProblemError, match=said):
        finish(**settings)


@pytest.mark.parametrize(
    ("settings", "targets", "said"),
    [
        ({}, 9, r"targets=9 with fixed masks that hold \d+"),
        ({}, {"0": 9}, r"targets={'0': 9} with fixed masks that hold {'0': \d+}"),
        ({"choose": "layer"}, None, "targets=None with choose='layer'; pass a dict"),
        ({"choose": "layer"}, 9, "targets=9 with choose='layer'; pass a dict"),
        ({"choose": "global"}, None, "targets=None with choose='global'"),
        ({"choose": "global"}, 10_000, r"targets=10000 of 0, 3, 5, whose masks hold \d+; start from more"),
        ({"choose": "layer"}, {"5": 10_000}, r"targets=10000 of 5, whose masks hold \d+"),
        ({"choose": "layer"}, {"1": 3}, r"targets name \['1'\], which have no mask"),
        ({"choose": "global"}, 0, "targets of 0, 3, 5 is 0"),
        ({"validation": 0.999}, None, "leaves none to train on"),
    ],
)
def test_targets_that_do_not_fit_are_refused(teacher, settings, targets, said):
    model, masks = pruned(teacher)
    before = weights(model)
    with pytest.raises(ProblemError, match=said):
        Distill(**settings).run(model, teacher, X, None, masks, targets)
    assert torch.equal(weights(model), before)


def test_data_that_do_not_fit_are_refused(teacher):
    model, masks = pruned(teacher)
    before = weights(model)
    with pytest.raises(ProblemError, match="NaN or infinite"):
        distill(model, teacher, torch.where(X > 2, torch.nan, X), masks)
    with pytest.raises(ProblemError, match=r"fails on inputs of shape \(200, 5\)"):
        distill(model, teacher, X[:, :5], masks)
    with pytest.raises(ProblemError, match=r"shape \(200, 3\) and the model one row to \(1, 12\)"):
        distill(model[:2], teacher, X, {"0": masks["0"]})
    with pytest.raises(ProblemError, match="single output; pass loss='mse'"):
        distill(nn.Sequential(nn.Linear(6, 1)), nn.Sequential(nn.Linear(6, 1)), X, {"0": torch.ones(1, 6).bool()})
    with pytest.raises(UnknownNameError, match="no layer 'fc' with a weight"):
        distill(model, teacher, X, {"fc": masks["0"]})
    dead = copy.deepcopy(teacher)
    for tensor in (dead[5].weight, dead[5].bias):
        tensor.zero_()
    with pytest.raises(ProblemError, match="same for every class"):
        distill(model, dead, X, masks)
    with pytest.raises(ProblemError, match="needs labels"):
        FineTune().run(model, None, X, None, masks)
    with pytest.raises(ProblemError, match="200 rows and labels 9"):
        fine_tune(model, X, Y[:9], masks)
    with pytest.raises(ProblemError, match=r"labels lie in 0 \.\.\. 4 and the model scores 3"):
        fine_tune(model, X, 2 * Y, masks)
    with pytest.raises(ProblemError, match="no parameters to train"):
        distill(nn.Sequential(nn.Flatten()), teacher, X, masks)
    assert torch.equal(weights(model), before)


@pytest.mark.data
def test_a_tenth_of_a_large_network_is_as_good_as_all_of_it(data_directory):
    """LeNet-300-100 at 7 % by magnitude: hardly better than chance, until it is distilled without labels."""
    layers = []
    for i in (1, 2, 3):
        weight, bias = (np.load(data_directory / "lenet300-100" / f"{kind}_layer{i}.npy") for kind in "wb")
        linear = nn.Linear(*weight.shape)
        linear.weight.data = torch.from_numpy(weight.T.copy()).float()
        linear.bias.data = torch.from_numpy(bias.reshape(-1).copy()).float()
        layers += [linear, nn.ReLU()]
    dense = nn.Sequential(*layers[:-1])
    data = load(f"mnist:{data_directory / 'mnist'}")
    assert data.test is not None
    inputs, held, labels = data.train.inputs[:5000].flatten(1), data.test.inputs.flatten(1), data.test.labels
    model = copy.deepcopy(dense)
    names = ["0", "2", "4"]
    masks = {name: torch.ones_like(find_weight(model, name), dtype=torch.bool) for name in names}
    found = distill(model, dense, inputs, masks, targets=18634, epochs=8, batch_size=128)
    assert sum(int(mask.sum()) for mask in supports(model, names).values()) == 18634
    assert found.seconds < 60
    accuracy = float((model(held).argmax(1) == labels).double().mean())
    assert accuracy > 0.97


def test_few_samples_are_gone_through_more_often(teacher):
    """By default the training is as long as it needs to be in steps, and no shorter than 20 epochs."""
    model, masks = pruned(teacher)
    few = Distill(validation=0.0, batch_size=50).run(model, teacher, X[:100], None, masks)
    assert (len(few.losses), few.steps) == (2000, 4000)
    many = Distill(validation=0.0, batch_size=1).run(model, teacher, X[:201], None, masks)
    assert (len(many.losses), many.steps) == (20, 4000)
    once = Distill(validation=0.0, batch_size=50, epochs=1).run(model, teacher, X[:100], None, masks)
    assert once.steps == 2
