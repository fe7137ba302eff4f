"""Batch norm folded into the layer before it: the same network, and zeros stay zeros when it is unfolded."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nettrim.network.batches import Batch
from nettrim.network.edit import double_copy, frozen_copy, raw_state, write_state
from nettrim.network.fold import Fold, fold, fold_state, unfold, without_unused
from nettrim.network.observe import observe
from nettrim.network.program import Held, Program, Ref, Step, run

SHAPES = {"linear": (9, 4), "conv1d": (9, 4, 7), "conv2d": (9, 4, 5, 5)}


def layer(kind: str, bias: bool, groups: int = 1) -> nn.Module:
    if kind == "linear":
        return nn.Linear(4, 6, bias=bias)
    return {"conv1d": nn.Conv1d, "conv2d": nn.Conv2d}[kind](4, 6, 3, padding=1, bias=bias, groups=groups)


def norm(kind: str, channels: int = 6, **how: bool) -> nn.Module:
    """A batch norm that has seen data."""
    made = (nn.BatchNorm2d if kind == "conv2d" else nn.BatchNorm1d)(channels, **how)
    if made.track_running_stats:
        made.running_mean.normal_()
        made.running_var.uniform_(0.2, 3)
    if made.affine:
        nn.init.normal_(made.weight)
        nn.init.normal_(made.bias)
    return made.eval()


class Folded:
    """A model, its program as observed and as folded, and its states in float64."""

    def __init__(self, model: nn.Module, *inputs: Tensor) -> None:
        self.model = model
        self.double = double_copy(model)
        self.raw = raw_state(self.double)
        self.batch = Batch(tuple(tensor.double() for tensor in inputs))
        self.observed, constants = observe(self.double, self.raw, self.batch)
        self.raw |= constants
        self.program, self.folds = fold(self.observed)
        self.state = fold_state(self.raw, self.folds)

    def ops(self) -> list[str]:
        return [step.op for step in self.program.steps]

    def check(self) -> None:
        wanted = self.double(*self.batch.inputs)
        torch.testing.assert_close(run(self.program, self.state, self.batch), wanted, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("kind", SHAPES)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("affine", [True, False])
def test_the_folded_program_gives_what_the_model_gives(kind, bias, affine):
    model = nn.Sequential(layer(kind, bias), norm(kind, affine=affine), nn.ReLU())
    folded = Folded(model, torch.randn(SHAPES[kind]))
    folded.check()
    assert folded.ops() == ["input", kind, "relu"]
    (only,) = folded.folds
    assert only.weight == "0.weight"
    assert only.bias == ("0.bias" if bias else None)
    assert only.folded_bias == "0.bias"
    assert (only.scale, only.shift) == (("1.weight", "1.bias") if affine else (None, None))
    # tensors that no fold touches are the same objects
    assert folded.state["1.running_mean"] is folded.raw["1.running_mean"]
    assert folded.state["0.weight"] is not folded.raw["0.weight"]


@pytest.mark.parametrize("kind", SHAPES)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("dead", [True, False])
def test_unfolding_a_pruned_layer(kind, bias, affine, dead):
    batch_norm = norm(kind, affine=affine)
    if dead and affine:
        with torch.no_grad():
            batch_norm.weight[[1, 4]] = 0
    model = nn.Sequential(layer(kind, bias), batch_norm)
    folded = Folded(model, torch.randn(SHAPES[kind]))
    (only,) = folded.folds
    weight, shift = folded.state["0.weight"], torch.randn(6, dtype=torch.float64)
    mask = torch.rand_like(weight) < 0.5
    pruned = torch.where(mask, 2 * weight + torch.randn_like(weight) * (weight != 0), 0)
    if dead and affine:
        pruned[[1, 4]] = 0
    entries = unfold(only, folded.raw, pruned, shift)
    assert set(entries) <= {"0.weight", "0.bias", "1.bias", "1.running_mean"}
    # exactly zero where the folded one is, and finite
    assert torch.equal(entries["0.weight"] == 0, pruned == 0)
    assert all(torch.isfinite(entry).all() for entry in entries.values())
    # folding again gives what was unfolded
    again = fold_state(folded.raw | entries, folded.folds)
    torch.testing.assert_close(again["0.weight"], pruned, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(again["0.bias"], shift, rtol=1e-12, atol=1e-12)
    # and the model, in its own dtype, gives what the folded program gives
    twin = frozen_copy(model)
    write_state(twin, entries)
    wanted = run(folded.program, folded.state | {"0.weight": pruned, "0.bias": shift}, folded.batch)
    given = twin(folded.batch.inputs[0].float())
    assert (given.double() - wanted).norm() <= 1e-6 * wanted.norm()
    assert torch.equal(twin[0].weight == 0, pruned == 0)


def test_channels_without_scale_take_any_bias():
    batch_norm = norm("linear")
    with torch.no_grad():
        batch_norm.weight.zero_()
    folded = Folded(nn.Sequential(nn.Linear(4, 6, bias=False), batch_norm), torch.randn(9, 4))
    assert not folded.state["0.weight"].any()
    torch.testing.assert_close(folded.state["0.bias"], folded.raw["1.bias"])
    entries = unfold(folded.folds[0], folded.raw, torch.ones(6, 4).double(), torch.arange(6.0).double())
    assert not entries["0.weight"].any()
    torch.testing.assert_close(entries["1.bias"], torch.arange(6.0).double())


def test_groups_and_chains():
    model = nn.Sequential(
        layer("conv2d", False), norm("conv2d"), nn.ReLU(inplace=True), nn.Conv2d(6, 6, 3, groups=6), norm("conv2d"),
        nn.ReLU6(), nn.Flatten(), nn.Linear(54, 3), norm("linear", 3),
    )  # fmt: skip
    folded = Folded(model, torch.randn(SHAPES["conv2d"]))
    folded.check()
    assert folded.ops() == ["input", "conv2d", "relu", "conv2d", "hardtanh", "flatten", "linear"]
    assert [one.weight for one in folded.folds] == ["0.weight", "3.weight", "7.weight"]


def test_the_output_itself_is_a_batch_norm():
    folded = Folded(nn.Sequential(nn.Linear(4, 6), norm("linear")), torch.randn(9, 4))
    assert folded.program.output == Ref(1)
    folded.check()


class Net(nn.Module):
    """A layer, a batch norm, and a forward of the test's choosing."""

    def __init__(self, step, **modules: nn.Module) -> None:
        super().__init__()
        self.fc, self.norm = nn.Linear(6, 6), norm("linear")
        for name, module in modules.items():
            self.add_module(name, module)
        self.step = step

    def forward(self, x: Tensor) -> Tensor:
        return self.step(self, x)


@pytest.mark.parametrize(
    "step",
    [
        # not directly behind
        lambda self, x: self.norm(self.fc(x).relu()),
        lambda self, x: self.norm(self.fc(x) + x),
        lambda self, x: self.norm(x) + self.fc(x),
        # the layer's output is read by others, or handed back
        lambda self, x: (lambda y: self.norm(y) + y)(self.fc(x)),
        lambda self, x: (lambda y: self.norm(y) * y.shape[1] + self.fc.weight[0])(self.fc(x)),
        # called twice
        lambda self, x: self.norm(self.fc(self.norm(self.fc(x)))),
        lambda self, x: self.fc(self.norm(self.fc(x))),
        lambda self, x: self.norm(self.fc(x)) + self.norm(self.other(x)),
        # another part reads what would be folded
        lambda self, x: self.norm(self.fc(x)) * self.norm.weight,
        lambda self, x: self.norm(self.fc(x)) + self.norm.running_mean,
        lambda self, x: self.norm(self.fc(x)) + self.fc.bias,
        lambda self, x: self.norm(F.linear(x, self.fc.weight)) + self.fc.bias,
        # computed weights
        lambda self, x: self.norm(F.linear(x, 2 * self.fc.weight, self.fc.bias)),
        # batch statistics
        lambda self, x: F.batch_norm(self.fc(x), None, None, training=True),
    ],
)
def test_others_are_left_alone_and_still_right(step):
    folded = Folded(Net(step, other=nn.Linear(6, 6)), torch.randn(9, 6))
    folded.check()
    assert folded.folds == ()
    assert folded.program == folded.observed
    assert "batch_norm" in folded.ops()


def test_tied_weights_are_left_alone():
    model = nn.Sequential(nn.Linear(6, 6), norm("linear"), nn.ReLU(), nn.Linear(6, 6), norm("linear"))
    model[3].weight = model[0].weight
    folded = Folded(model, torch.randn(9, 6))
    folded.check()
    assert folded.folds == ()
    model = nn.Sequential(nn.Linear(6, 6), norm("linear"), nn.ReLU(), nn.Linear(6, 6), norm("linear"))
    model[4].weight = model[1].weight
    assert Folded(model, torch.randn(9, 6)).folds == ()


def test_channels_are_second_and_features_last():
    # of (B, T, C), batch norm takes the T as channels: that cannot be folded into C outputs
    folded = Folded(nn.Sequential(nn.Linear(4, 6), norm("linear", 6)), torch.randn(9, 6, 4))
    folded.check()
    assert folded.folds == ()
    transposed = Net(lambda self, x: self.norm(self.fc(x).transpose(1, 2)))
    folded = Folded(transposed, torch.randn(9, 5, 6))
    folded.check()
    assert folded.folds == ()


def test_a_layer_norm_and_a_frozen_statistic():
    folded = Folded(nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6)), torch.randn(9, 4))
    assert folded.folds == ()
    untracked = nn.Sequential(nn.Linear(4, 6), norm("linear", track_running_stats=False))
    folded = Folded(untracked, torch.randn(9, 4))
    assert folded.folds == ()


def test_every_spelling_of_batch_norm():
    def plain(self, x):
        n = self.norm
        return torch.batch_norm(self.fc(x), n.weight, n.bias, n.running_mean, n.running_var, False, 0.1, n.eps, False)

    def keywords(self, x):
        n = self.norm
        return F.batch_norm(
            self.fc(x), running_var=n.running_var, running_mean=n.running_mean, bias=n.bias, weight=n.weight, eps=0.1
        )

    for step, eps in ((plain, 1e-5), (keywords, 0.1)):
        folded = Folded(Net(step), torch.randn(9, 6))
        folded.check()
        expected = Fold(
            "fc.weight", "fc.bias", "fc.bias", "norm.running_mean", "norm.running_var", "norm.weight", "norm.bias", eps
        )
        assert folded.folds == (expected,)


def test_a_bias_that_a_layer_gets_does_not_take_anothers_name():
    class Bare(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w, self.norm = nn.Parameter(torch.randn(6, 4)), norm("linear")

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(F.linear(x, self.w))

    folded = Folded(Bare(), torch.randn(9, 4))
    folded.check()
    assert folded.folds[0].folded_bias == "w_bias"
    assert folded.program.steps[1].held == ["w", "w_bias"]


def test_steps_that_nothing_reads_go():
    steps = (
        Step("input"),
        Step("input"),
        Step("torch.sigmoid", (Ref(0),)),
        Step("torch.relu", (Ref(0),)),
        Step("torch.tanh", (Ref(2),)),
        Step("torch.add", (Ref(3), Held("b"))),
    )
    kept = without_unused(Program(steps, (0, 1), Ref(5)))
    assert [step.op for step in kept.steps] == ["input", "input", "relu", "add"]
    assert kept.steps[3].args == (Ref(2), Held("b"))
    assert kept.output == Ref(3)
    assert without_unused(kept) == kept
