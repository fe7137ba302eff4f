"""A network from end to end: what comes out, what is left alone, what is refused."""

import copy
import json
import math

import pytest
import torch
from torch import nn

import nettrim
from nettrim.errors import NetTrimError, ProblemError, UnknownNameError, UnsupportedError


def outputs(model, batches):
    with torch.no_grad():
        return torch.cat([copy.deepcopy(model).eval()(x) for x, _ in batches])


@pytest.mark.parametrize("schedule", ["parallel", "cascade"])
def test_result_and_account_agree(network, batches, held_out, schedule):
    result = nettrim.prune(network, batches, epsilon=0.1, schedule=schedule, held_out=held_out, progress=False)
    state = result.model.state_dict()
    assert [record.name for record in result.ledger.records] == ["0", "3", "5"]
    for record in result.ledger.records:
        zeros = state[f"{record.name}.weight"] == 0
        assert record.kept == int((~zeros).sum()) < record.numel == zeros.numel()
        assert torch.equal(result.masks[record.name], ~zeros)
        assert record.gap <= 1e-3
        assert record.violation <= 1e-6
        assert record.promised == pytest.approx(0.1 * record.target_norm)
    y, y_hat = outputs(network, batches).double(), outputs(result.model, batches).double()
    assert result.ledger.measured == pytest.approx(float((y_hat - y).norm()), rel=1e-4)
    labels = torch.cat([label for _, label in batches])
    assert result.ledger.accuracy["calibration"]["pruned"] == float((y_hat.argmax(1) == labels).double().mean())
    h, h_hat = outputs(network, held_out), outputs(result.model, held_out)
    assert result.ledger.held_out == pytest.approx(float((h_hat - h).norm() / h.norm()), rel=1e-4)
    assert set(result.ledger.accuracy) == {"calibration", "held-out"}
    json.dumps(result.ledger.as_dict(), allow_nan=False)


def test_the_dense_model_is_not_changed(network, batches):
    before = copy.deepcopy(network.state_dict())
    flags = [m.training for m in network.modules()]
    nettrim.prune(network, batches, epsilon=0.2, progress=False)
    assert all(torch.equal(before[k], v) for k, v in network.state_dict().items())
    assert [m.training for m in network.modules()] == flags
    assert all(not m._forward_hooks and not m._forward_pre_hooks for m in network.modules())
    assert all(p.requires_grad for p in network.parameters())


@pytest.mark.parametrize("schedule", ["parallel", "cascade"])
def test_a_tiny_epsilon_reproduces_the_dense_outputs(network, batches, schedule):
    network = network.double()
    result = nettrim.prune(network, batches, epsilon=1e-5, schedule=schedule, progress=False)
    assert result.ledger.measured <= 1e-4 * result.ledger.output_norm
    assert all(record.gap <= 1e-3 for record in result.ledger.records)


def test_the_last_radius_of_a_cascade_is_the_guarantee(network, batches):
    ledger = nettrim.prune(network, batches, epsilon={"0": 0.2, "3": 0.1, "5": 0.15}, progress=False).ledger
    drift = ledger.records[-1].facts["drift"]
    expected = max(0.15 * ledger.output_norm, math.sqrt(1.1) * drift)
    assert ledger.records[-1].promised == pytest.approx(expected)
    assert ledger.bounds["cascade"] == pytest.approx(expected)
    assert ledger.measured <= expected


def test_the_papers_rule_follows_the_drift(network, batches):
    ledger = nettrim.prune(
        network, batches, nettrim.NetTrim(cascade="paper", gamma=1.5), epsilon=0.1, progress=False
    ).ledger
    first, *rest = ledger.records
    assert first.facts["radius"] == pytest.approx(0.1 * first.target_norm)
    for record in rest:
        assert record.facts["radius"] == pytest.approx(math.sqrt(1.5) * record.facts["drift"])


def test_a_first_layer_left_dense_does_not_make_the_radius_vanish(network, batches):
    """The first *pruned* layer takes epsilon, not the first of the network: the released scripts get this wrong."""
    method = nettrim.NetTrim(cascade="paper")
    ledger = nettrim.prune(network, batches, method, epsilon=0.1, ignore=["0"], progress=False).ledger
    assert [record.name for record in ledger.records] == ["3", "5"]
    assert ledger.records[0].facts["radius"] == pytest.approx(0.1 * ledger.records[0].target_norm)
    assert ledger.records[0].kept < ledger.records[0].numel


def test_kappa_shrinks_the_last_radius_alone(network, batches):
    plain, risky = (
        nettrim.prune(network, batches, nettrim.NetTrim(kappa=kappa), epsilon=0.2, progress=False).ledger.records
        for kappa in (1.0, 0.7)
    )
    assert [b.promised / a.promised for a, b in zip(plain, risky, strict=True)] == pytest.approx([1, 1, 0.7])


def test_clipping_the_ceiling_never_costs(network, batches):
    """max(V, 0) allows more than V at the same guarantee, so no norm grows."""
    norms = {}
    for clip in (True, False):
        method = nettrim.NetTrim(form="halfspace", cascade="paper", clip_ceiling=clip, tol=1e-4, on_failure="return")
        ledger = nettrim.prune(network.double(), batches, method, epsilon=0.2, layers=["0", "3"], progress=False).ledger
        norms[clip] = ledger.records[1]
    assert norms[True].lower_bound <= norms[False].objective * (1 + 1e-6)
    assert norms[True].facts["ceiling"], norms[False].facts["ceiling"] == ("clipped", "dense")


@pytest.mark.parametrize("bias", ["free", "penalised", "frozen"])
def test_bias_policies(network, batches, bias):
    result = nettrim.prune(network, batches, nettrim.NetTrim(bias=bias), epsilon=0.1, progress=False)
    same = [torch.equal(result.model[i].bias, network[i].bias) for i in (0, 3, 5)]
    assert same == [bias == "frozen"] * 3
    assert all(record.gap <= 1e-3 and record.violation <= 1e-6 for record in result.ledger.records)


def test_batching_and_workers_do_not_matter(network, batches):
    whole = [tuple(torch.cat(parts) for parts in zip(*batches, strict=True))]
    first = nettrim.prune(network, batches, epsilon=0.1, schedule="parallel", progress=False)
    for given, workers in ((whole, None), (batches, 2)):
        other = nettrim.prune(network, given, epsilon=0.1, schedule="parallel", executor=workers, progress=False)
        for key, tensor in first.model.state_dict().items():
            torch.testing.assert_close(other.model.state_dict()[key], tensor, rtol=1e-4, atol=1e-6)


def test_magnitude_keeps_the_largest(network, batches):
    result = nettrim.prune(network, batches, "magnitude", sparsity={"0": 0.5, "3": 0.9, "5": 0.0}, progress=False)
    for name, zeros in (("0", 96), ("3", 144), ("5", 0)):
        weight, dense = (m.get_submodule(name).weight.detach() for m in (result.model, network))
        assert int((weight == 0).sum()) == zeros
        assert torch.equal(weight[weight != 0], dense[weight != 0])
        if zeros:
            assert float(dense[weight == 0].abs().max()) <= float(weight[weight != 0].abs().min())
    assert all(record.gap is None and record.promised is None for record in result.ledger.records)


def test_a_layer_that_does_not_converge_is_marked_and_kept(network, batches):
    method = nettrim.NetTrim(solver=nettrim.Admm(max_iter=1))
    with pytest.warns(UserWarning, match="NOT_FEASIBLE|MAX_ITER"):
        result = nettrim.prune(network, batches, method, epsilon=0.05, progress=False)
    assert {record.facts["status"] for record in result.ledger.records} <= {"NOT_FEASIBLE", "MAX_ITER"}
    assert result.ledger.measured <= result.ledger.bound


def test_epsilon_of_one_prunes_everything_with_a_note(network, batches):
    result = nettrim.prune(network, batches, epsilon=1.0, schedule="parallel", progress=False)
    assert result.ledger.kept == 0
    assert "zero weight" in result.ledger.records[0].facts["note"]


NAN = [torch.full((3, 12), float("nan"))]
REFUSALS = {
    "no amount": ({}, ProblemError, "exactly one of epsilon"),
    "two amounts": ({"epsilon": 0.1, "sparsity": 0.5}, ProblemError, "epsilon=0.1 and sparsity=0.5"),
    "epsilon zero": ({"epsilon": 0}, ProblemError, "epsilon=0"),
    "epsilon negative": ({"epsilon": -1.0}, ProblemError, "epsilon=-1"),
    "epsilon nan": ({"epsilon": float("nan")}, ProblemError, "epsilon=nan"),
    "sparsity one": ({"method": "magnitude", "sparsity": 1.0}, ProblemError, "fraction of zeros"),
    "wrong amount": ({"epsilon": 0.5, "method": "magnitude"}, UnsupportedError, "magnitude' takes sparsity or kept"),
    "method": ({"epsilon": 0.1, "method": "net-trm"}, UnknownNameError, "net-trim, l-obs, magnitude"),
    "schedule": ({"epsilon": 0.1, "schedule": "both"}, UnknownNameError, "parallel or cascade"),
    "layer": ({"epsilon": 0.1, "layers": ["fc9"]}, UnknownNameError, "fc9"),
    "amount for no layer": ({"epsilon": {"0": 0.1, "3": 0.1, "5": 0.1, "x": 1}}, UnknownNameError, "names x"),
    "amount missing": ({"epsilon": {"0": 0.1}}, ProblemError, "no entry for 3, 5"),
    "nan": ({"epsilon": 0.1, "batches": NAN}, ProblemError, "NaN"),
    "infinity": ({"epsilon": 0.1, "batches": [torch.full((3, 12), float("inf"))]}, ProblemError, "infinite"),
    "empty batch": ({"epsilon": 0.1, "batches": [torch.zeros(0, 12)]}, ProblemError, "row"),
    "no batches": ({"epsilon": 0.1, "batches": []}, ProblemError, "no batch"),
    "shape": ({"epsilon": 0.1, "batches": [torch.zeros(3, 11)]}, ProblemError, r"\(3, 11\)"),
    "held-out nan": ({"epsilon": 0.1, "held_out": NAN}, ProblemError, "held_out"),
    "resume nowhere": ({"epsilon": 0.1, "resume": True}, ProblemError, "out_dir"),
    "executor": ({"epsilon": 0.1, "executor": 0}, ProblemError, "executor=0"),
    "token ids": ({"epsilon": 0.1, "batches": [torch.zeros(3, 12).long()]}, ProblemError, r"fails on batches\[0\]"),
    "two shapes": (
        {"epsilon": 0.1, "batches": [torch.zeros(3, 12), torch.zeros(3, 1, 12)]}, ProblemError, "all samples one shape"
    ),
    "held-out shape": ({"epsilon": 0.1, "held_out": [torch.zeros(3, 11)]}, ProblemError, r"\(3, 11\)"),
    "rows": ({"epsilon": 0.1, "rows": 15}, ProblemError, "rows=15"),
    "rows, no number": ({"epsilon": 0.1, "rows": "all"}, ProblemError, "rows='all'"),
    "memory limit": ({"epsilon": 0.1, "memory_limit": "much"}, ProblemError, "memory_limit='much'"),
    "memory too small": ({"epsilon": 0.1, "memory_limit": 1000}, ProblemError, "memory_limit=1000"),
    "on_unsupported": ({"epsilon": 0.1, "on_unsupported": "skip"}, UnknownNameError, "on_unsupported='skip'"),
    "form": ({"epsilon": 0.1, "forms": {"0": "round"}}, UnknownNameError, "'round' for layer '0'"),
    "form of no layer": ({"epsilon": 0.1, "forms": {"x": "ball"}}, UnknownNameError, "forms names x"),
    "form without a ReLU": ({"epsilon": 0.1, "forms": {"5": "ball"}}, UnsupportedError, "flows into no ReLU"),
    "form of no program": (
        {"sparsity": 0.5, "method": "magnitude", "forms": {"0": "ball"}}, UnsupportedError, "no convex program"
    ),
    "class": ({"epsilon": 0.1, "layers": nn.Conv2d}, UnknownNameError, "Conv2d"),
}  # fmt: skip


@pytest.mark.parametrize(("arguments", "error", "text"), REFUSALS.values(), ids=REFUSALS)
def test_refused_before_any_work(network, batches, monkeypatch, arguments, error, text):
    def fail(*_args):
        raise RuntimeError("work was started")

    for method in (nettrim.NetTrim, nettrim.Magnitude):
        monkeypatch.setattr(method, "prune_layer", fail)
    with pytest.raises(error, match=text) as caught:
        nettrim.prune(network, arguments.pop("batches", batches), progress=False, **arguments)
    assert isinstance(caught.value, NetTrimError)


def unlike(outputs=5):
    """A network with a weight that cannot be pruned in the middle of it."""
    return nn.Sequential(
        nn.Linear(12, 16), nn.Unflatten(1, (1, 16)), nn.ConvTranspose1d(1, 1, 3), nn.Flatten(), nn.Linear(18, outputs)
    )


def test_a_layer_that_cannot_be_handled_is_named(batches):
    with pytest.raises(UnsupportedError, match=r"layer '2' is used by conv_transpose1d, .*on_unsupported=\"keep\""):
        nettrim.prune(unlike(), batches, epsilon=0.1, progress=False)


@pytest.mark.parametrize("how", [{"on_unsupported": "keep"}, {"ignore": ["2"]}], ids=["keep", "ignore"])
def test_a_layer_that_cannot_be_handled_is_left_dense(batches, how):
    model = unlike()
    result = nettrim.prune(model, batches, epsilon=0.1, progress=False, **how)
    assert torch.equal(result.model[2].weight, model[2].weight)
    assert [record.name for record in result.ledger.records] == ["0", "4"]
    assert list(result.ledger.unsupported) == ["2"]
    assert result.ledger.measured <= result.ledger.bound


@pytest.mark.parametrize("schedule", ["parallel", "cascade"])
@pytest.mark.parametrize("between", [nn.Sigmoid(), nn.Tanh(), nn.LeakyReLU(), nn.Hardtanh()], ids=str)
def test_what_lies_between_layers_may_be_any_function(batches, between, schedule):
    """The targets of a layer without a ReLU are its outputs themselves; its bound goes through the slope behind it."""
    model = nn.Sequential(nn.Linear(12, 6), between, nn.Linear(6, 4))
    result = nettrim.prune(model, batches, epsilon=0.1, schedule=schedule, progress=False)
    y, y_hat = outputs(model, batches).double(), outputs(result.model, batches).double()
    first, last = result.ledger.records
    assert first.measured <= first.promised * (1 + 1e-9)
    with torch.no_grad():
        x = torch.cat([x for x, _ in batches])
        own = float((result.model[0](x) - model[0](x)).norm())
    assert first.measured == pytest.approx(own, rel=1e-4)
    assert result.ledger.measured == pytest.approx(float((y_hat - y).norm()), rel=1e-4)
    assert all(result.ledger.measured <= bound * (1 + 1e-9) for bound in result.ledger.bounds.values())
    assert {"operator", "l-obs"} <= set(last.bounds)


def test_a_reshape_between_layers_is_followed():
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Flatten(), nn.Linear(18, 2))
    x = torch.randn(40, 3, 4)
    result = nettrim.prune(model, [x], epsilon=0.1, progress=False)
    first, last = result.ledger.records
    assert (first.total_rows, last.total_rows) == (120, 40)
    with torch.no_grad():
        error, own = ((result.model[:k](x) - model[:k](x)).norm() for k in (4, 2))
    assert result.ledger.measured == pytest.approx(float(error), rel=1e-4)
    assert first.measured == pytest.approx(float(own), rel=1e-4)
    assert result.ledger.measured <= last.promised * (1 + 1e-9)


@pytest.mark.parametrize(
    "settings",
    [
        {"form": "round"},
        {"gamma": 0.9},
        {"kappa": 0.0},
        {"cascade": "x"},
        {"bias": "none"},
        {"gamma": math.nan},
        {"tol": 0},
        {"solver": "x"},
    ],
)
def test_net_trim_refuses_settings_out_of_range(settings):
    with pytest.raises(NetTrimError, match=next(iter(settings))):
        nettrim.NetTrim(**settings)


def test_accuracy_is_of_the_outputs_also_after_a_last_relu():
    model = nn.Sequential(nn.Linear(8, 4), nn.ReLU())
    with torch.no_grad():
        model[0].bias.fill_(-1.5)
    x = torch.randn(60, 8)
    labels = torch.zeros(60, dtype=torch.int64)
    ledger = nettrim.prune(model, [(x, labels)], epsilon=0.1, progress=False).ledger
    with torch.no_grad():
        assert ledger.accuracy["calibration"]["dense"] == float((model(x).argmax(1) == labels).double().mean())


@pytest.mark.parametrize("seed", [2**70, "a", 1.5, None])
def test_a_seed_that_is_none_is_refused(network, batches, seed):
    with pytest.raises(ProblemError, match="seed"):
        nettrim.prune(network, batches, epsilon=0.1, seed=seed, progress=False)


@pytest.mark.parametrize(
    ("layers", "names"), [(nn.Linear, ["0", "3", "5"]), ("Linear", ["0", "3", "5"]), ("[03]", ["0", "3"])]
)
def test_layers_are_selected_by_class_or_pattern(network, batches, layers, names):
    result = nettrim.prune(network, batches, "magnitude", sparsity=0.5, layers=layers, progress=False)
    assert list(result.masks) == names


def test_the_form_of_a_single_layer(network, batches):
    ledger = nettrim.prune(network, batches, epsilon=0.2, forms={"3": "halfspace"}, progress=False).ledger
    assert [record.facts["form"] for record in ledger.records] == ["ball", "halfspace", "linear"]
    assert ledger.measured <= ledger.bound


def test_a_program_of_a_sample_of_the_rows_promises_nothing_about_the_others(network, batches):
    result = nettrim.prune(network, batches, epsilon=0.2, rows=20, progress=False)
    first = result.ledger.records[0]
    assert (first.rows, first.total_rows) == (20, 60)
    assert not {"paper", "cascade", "cascade product"} & set(first.bounds)
    assert all(record.network_error <= bound * (1 + 1e-9) for record in result.ledger.records
               for bound in record.bounds.values())  # fmt: skip
    again, other = (
        nettrim.prune(network, batches, epsilon=0.2, rows=20, seed=seed, progress=False).model for seed in (0, 1)
    )
    assert torch.equal(again[0].weight, result.model[0].weight)
    assert not torch.equal(other[0].weight, result.model[0].weight)


class Residual(nn.Module):
    """A convolution with a batch norm, a grouped one beside a skip connection, two branches that are joined."""

    def __init__(self):
        super().__init__()
        self.one, self.norm = nn.Conv2d(2, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)
        self.two = nn.Conv2d(4, 4, 3, padding=1, groups=2)
        self.left, self.right = nn.Linear(4, 6), nn.Linear(4, 6)
        self.head = nn.Linear(12, 5)

    def forward(self, x):
        x = self.norm(self.one(x)).relu()
        x = (x + self.two(x)).relu().mean((2, 3))
        return self.head(torch.cat([self.left(x).relu(), self.right(x).tanh()], 1))


@pytest.mark.parametrize("schedule", ["parallel", "cascade"])
@pytest.mark.parametrize(
    ("method", "amount"),
    [("net-trim", {"epsilon": 0.2}), ("l-obs", {"sparsity": 0.5}), ("magnitude", {"sparsity": 0.5})],
)
def test_branches_and_convolutions_are_pruned_and_accounted_for(method, amount, schedule):
    torch.manual_seed(1)
    model, x = Residual(), torch.randn(60, 2, 6, 6)
    with torch.no_grad():
        model.norm.running_mean.normal_()
        model.norm.running_var.uniform_(0.5, 2.0)
    result = nettrim.prune(model, [x[:25], x[25:]], method, **amount, schedule=schedule, progress=False)
    assert [record.name for record in result.ledger.records] == ["one", "two", "left", "right", "head"]
    dense, pruned = (copy.deepcopy(m).double().eval() for m in (model, result.model))
    with torch.no_grad():
        y, y_hat = dense(x.double()), pruned(x.double())
    assert result.ledger.measured == pytest.approx(float((y_hat - y).norm()), rel=1e-6)
    assert all(result.ledger.measured <= bound * (1 + 1e-9) for bound in result.ledger.bounds.values())
    for record in result.ledger.records:
        weight = result.model.get_submodule(record.name).weight
        assert result.masks[record.name].shape == weight.shape
        assert torch.equal(result.masks[record.name], weight != 0)
        assert record.kept == int((weight != 0).sum()) < record.numel
        assert all(record.network_error <= bound * (1 + 1e-9) for bound in record.bounds.values())
        assert record.promised is None or record.measured <= record.promised * (1 + 1e-9)
