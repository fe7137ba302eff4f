"""Statistics of batch norms estimated anew: against sums made by hand, and that nothing else is touched."""

from __future__ import annotations

import copy
from functools import cache

import pytest
import torch
from networks import call, seeded
from torch import nn

import nettrim
from nettrim.errors import ProblemError, UnsupportedError
from nettrim.network.batches import Batch, read_batches
from nettrim.network.reestimate import Reestimate, reinsert_norms


def plain():
    """Convolution and Linear, a batch norm behind each; dropout, which statistics must not see."""
    return seeded(
        nn.Sequential(
            nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.5),
            nn.Flatten(), nn.Linear(100, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 3),
        ), 5,
    )  # fmt: skip


def samples(count=96):
    x = torch.randn(count, 2, 5, 5, generator=torch.Generator().manual_seed(6))
    return 1.5 * x + 0.4


def settled():
    """A network whose statistics are those of its own samples, as after training."""
    model = plain()
    Reestimate(batch_size=32).run(model, None, Batch((samples(),)), None, {})
    return model


def statistics(model):
    return {key: tensor.clone() for key, tensor in model.state_dict().items() if "running" in key}


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("batch_size", [24, 96, 1000])
def test_the_first_batch_norm_gets_the_mean_of_its_batches_statistics(batch_size, double):
    model, x = plain(), samples()
    if double:
        model, x = model.double(), x.double()
    outputs = call(model[:1], [x])
    found = Reestimate(batch_size).run(model, None, Batch((x,)), None, {})
    assert found.steps == -(-96 // batch_size)
    channels = [piece.transpose(0, 1).flatten(1) for piece in outputs.split(batch_size)]
    mean = torch.stack([c.mean(1) for c in channels]).mean(0)
    # unbiased within a batch, as torch keeps it
    variance = torch.stack([c.var(1, unbiased=True) for c in channels]).mean(0)
    close = 1e-12 if double else 1e-5
    assert torch.allclose(model[1].running_mean.double(), mean, atol=close, rtol=close)
    assert torch.allclose(model[1].running_var.double(), variance, atol=close, rtol=close)
    assert int(model[1].num_batches_tracked) == found.steps


def test_a_later_batch_norm_reads_what_the_batch_itself_normalised():
    model, x = plain().double(), samples().double()
    Reestimate(96).run(model, None, Batch((x,)), None, {})
    # one batch: its own statistics are the new ones, and dropout is off
    before = call(model[:6], [x])
    assert torch.allclose(model[6].running_mean, before.mean(0), atol=2e-4)
    h = call(model[:1], [x])
    axes = (0, 2, 3)
    middle, spread = h.mean(axes, keepdim=True), h.var(axes, unbiased=False, keepdim=True)
    gamma, beta = (p.detach().reshape(1, 4, 1, 1) for p in (model[1].weight, model[1].bias))
    normal = ((h - middle) / (spread + model[1].eps).sqrt() * gamma + beta).clamp(min=0)
    exact = normal.flatten(1) @ model[5].weight.detach().T + model[5].bias.detach()
    assert torch.allclose(model[6].running_mean, exact.mean(0), atol=1e-12)
    assert torch.allclose(model[6].running_var, exact.var(0, unbiased=True), atol=1e-12)


def test_a_last_batch_of_less_than_half_is_left_out():
    x = samples(70)
    whole, cut, more = (plain() for _ in range(3))
    assert Reestimate(32).run(whole, None, Batch((x[:64],)), None, {}).steps == 2
    assert Reestimate(32).run(cut, None, Batch((x,)), None, {}).steps == 2
    assert Reestimate(32).run(more, None, Batch((torch.cat([x, x[:10]]),)), None, {}).steps == 3
    for key, tensor in statistics(whole).items():
        assert torch.equal(tensor, statistics(cut)[key])
        assert not torch.equal(tensor, statistics(more)[key])


def test_the_batches_of_the_user_play_no_part():
    x = samples()
    one, other = plain(), plain()
    Reestimate(32).run(one, None, read_batches([x]), None, {})
    Reestimate(32).run(other, None, read_batches([x[:5], x[5:50], x[50:]]), None, {})
    for key, tensor in statistics(one).items():
        assert torch.equal(tensor, statistics(other)[key]), key


def test_a_dense_network_on_its_own_samples_stays_about_the_same():
    model, x = settled(), samples()
    before, outputs = statistics(model), call(model, [x])
    Reestimate(48).run(model, None, Batch((x,)), None, {})
    for key, tensor in statistics(model).items():
        assert float((tensor - before[key]).norm()) < 0.05 * float(before[key].norm()), key
    assert float((call(model, [x]) - outputs).norm()) < 0.05 * float(outputs.norm())


def test_only_statistics_change_and_masks_come_back():
    model, x = plain(), samples()
    before = copy.deepcopy(model.state_dict())
    masks = {"0": model[0].weight != 0}
    data = x.clone()
    found = Reestimate(32).run(model, None, Batch((x,)), None, masks)
    changed = {key for key, tensor in model.state_dict().items() if not torch.equal(tensor, before[key])}
    names = ("running_mean", "running_var", "num_batches_tracked")
    assert changed == {f"{norm}.{name}" for norm in (1, 6) for name in names}
    assert torch.equal(x, data)
    assert found.masks == masks
    assert (tuple(found.losses), found.best_epoch) == ((), 0)
    assert not any(parameter.requires_grad and parameter.grad is not None for parameter in model.parameters())


class Stumbles(nn.Module):
    """Fails in the middle of the second batch."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        if self.calls == 2:
            raise RuntimeError("out of memory")
        return x


@pytest.mark.parametrize("fails", [False, True])
def test_momenta_and_flags_are_given_back(fails):
    model = plain()
    model.train()
    model[1].eval()
    model[6].momentum = 0.37
    model[1].momentum = None
    if fails:
        model[7] = Stumbles()
    flags, before = [module.training for module in model.modules()], statistics(model)
    run = Reestimate(32).run
    if fails:
        with pytest.raises(RuntimeError, match="out of memory"):
            run(model, None, Batch((samples(),)), None, {})
        # those of the first batch alone would be nobody's
        assert all(torch.equal(tensor, before[key]) for key, tensor in statistics(model).items())
        assert model[7].calls == 2
    else:
        run(model, None, Batch((samples(),)), None, {})
    assert [module.training for module in model.modules()] == flags
    assert (model[1].momentum, model[6].momentum) == (None, 0.37)
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize(
    "model",
    [nn.Sequential(nn.Linear(4, 3)), nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3, track_running_stats=False))],
    ids=["none", "no statistics"],
)
def test_without_statistics_there_is_nothing_to_do(model):
    with pytest.raises(UnsupportedError, match="needs a model with batch norms: leave finish out"):
        Reestimate().run(model, None, Batch((torch.randn(8, 4),)), None, {})


@pytest.mark.parametrize("size", [1, 0, -3, 2.0, True, "64"])
def test_a_size_without_a_spread_is_refused(size):
    with pytest.raises(ProblemError, match=r"batch_size=.* is out of range: give at least 2"):
        Reestimate(batch_size=size)


def test_a_single_row_has_no_spread():
    model, x = plain(), samples(5)
    before = statistics(model)
    with pytest.raises(ProblemError, match="has one sample in batches"):
        Reestimate().run(model, None, Batch((x[:1],)), None, {})
    assert all(torch.equal(tensor, before[key]) for key, tensor in statistics(model).items())
    # the last of five, where two are taken at a time
    assert Reestimate(batch_size=2).run(model, None, Batch((x,)), None, {}).steps == 2


def test_a_batch_norm_without_scale_and_shift():
    model = seeded(nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3, affine=False), nn.ReLU()), 1)
    x = torch.randn(40, 4)
    Reestimate().run(model, None, Batch((x,)), None, {})
    assert torch.allclose(model[1].running_mean.double(), call(model[:1], [x]).mean(0), atol=1e-6)


def scenes(seed, count):
    """Images of four classes: where the light is."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, 4, (count,), generator=generator)
    x = 0.7 * torch.randn(count, 2, 6, 6, generator=generator)
    for label, (row, column) in enumerate(((0, 0), (0, 3), (3, 0), (3, 3))):
        x[labels == label, :, row : row + 3, column : column + 3] += 0.6
    return x, labels


@cache
def trained():
    """Four convolutions with batch norms, trained for a second."""
    layers, width = [], 2
    for after in (10, 12, 12, 12):
        layers += [nn.Conv2d(width, after, 3, padding=1, bias=False), nn.BatchNorm2d(after), nn.ReLU()]
        width = after
    torch.manual_seed(3)
    model = nn.Sequential(*layers, nn.MaxPool2d(3), nn.Flatten(), nn.Linear(48, 4))
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    x, labels = scenes(2, 1200)
    for step in range(60):
        rows = slice(60 * (step % 20), 60 * (step % 20) + 60)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x[rows]), labels[rows]).backward()
        optimizer.step()
    for parameter in model.parameters():
        parameter.grad = None
    return model.eval()


@pytest.mark.parametrize("finish", ["batch-norm", Reestimate(batch_size=32)], ids=["name", "object"])
def test_it_lowers_the_error_of_a_network_pruned_by_magnitude(finish, tmp_path):
    model, (x, _), (fresh, _) = trained(), scenes(0, 200), scenes(1, 200)
    result = nettrim.prune(
        model,
        [x],
        "magnitude",
        sparsity=0.75,
        finish=finish,
        held_out=[fresh],
        out_dir=tmp_path / "run",
        progress=False,
    )  # fmt: skip
    before = result.ledger.before
    assert result.ledger.measured < 0.8 * before.measured
    assert result.ledger.held_out < before.held_out
    assert result.ledger.finish["kind"] == "batch-norm"
    assert result.ledger.finish["epochs"] == 0
    for layer in result.layers:
        kept = result.model.get_submodule(layer.name).weight
        # no weight is other than pruned
        assert torch.equal(kept != 0, layer.weight != 0)
    dense = model.state_dict()
    for key, tensor in result.model.state_dict().items():
        same = torch.equal(tensor, dense[key])
        mask = result.masks.get(key.removesuffix(".weight"))
        if mask is not None:
            assert torch.equal(tensor[mask], dense[key][mask])
        else:
            assert same == ("running" not in key and "num_batches" not in key), key
    checked = nettrim.verify(tmp_path / "run")
    assert checked.holds, checked.failures


def test_reinserted_norms_compute_the_same_with_the_statistics_of_what_they_read():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(2, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 3, 3), nn.BatchNorm2d(3)
    )
    inputs = torch.rand(40, 2, 8, 8)
    with torch.no_grad():
        for norm in (model[1], model[4]):
            (
                norm.weight.uniform_(0.5, 2),
                norm.bias.normal_(),
                norm.running_mean.normal_(),
                norm.running_var.uniform_(1, 3),
            )
        model[1].weight[2] = 0
    model.double().eval()
    before = model(inputs.double())
    reinsert_norms(model, inputs.double(), batch_size=16)
    assert torch.allclose(model(inputs.double()), before, rtol=0, atol=1e-12)
    read = model[0](inputs.double())
    assert torch.allclose(model[1].running_mean, read.mean((0, 2, 3)), atol=1e-12)
    assert torch.allclose(model[1].running_var, read.var((0, 2, 3), unbiased=False), atol=1e-12)
    # in training mode, on the same samples, it does not jump
    assert torch.allclose(model.train()(inputs.double()), before, atol=1e-9)
    assert not model[1]._forward_pre_hooks
