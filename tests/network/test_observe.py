"""An observed forward gives what the model gives, on any number of samples; what cannot be followed is refused."""

from __future__ import annotations

import random
import warnings
from collections import OrderedDict

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import _get_current_function_mode_stack

from nettrim.errors import NetTrimError, ProblemError, UnsupportedError
from nettrim.network.batches import Batch
from nettrim.network.edit import double_copy, raw_state
from nettrim.network.observe import agree, call, observe, output_of
from nettrim.network.program import Held, Program, run
from nettrim.network.program_json import from_json, to_json


class Body(nn.Module):
    """A Linear layer `fc` and a forward of the test's choosing."""

    def __init__(self, step, **modules: nn.Module | Tensor) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)
        for name, module in modules.items():
            if isinstance(module, nn.Module):
                self.add_module(name, module)
            else:
                self.register_buffer(name, module)
        self.step = step

    def forward(self, *inputs, **kwargs):
        return self.step(self, *inputs, **kwargs)


def observed(model: nn.Module, *inputs: Tensor, **kwargs: Tensor) -> tuple[Program, dict[str, Tensor], nn.Module]:
    """Observe a model, after a round trip of the program through JSON."""
    double = double_copy(model)
    state = raw_state(double)
    program, constants = observe(double, state, doubled(inputs, kwargs))
    stored = from_json(to_json(program))
    assert repr(stored) == repr(program)  # NaN differs from itself
    return stored, {**state, **constants}, double


def doubled(inputs, kwargs) -> Batch:
    def double(tensor: Tensor) -> Tensor:
        return tensor.double() if tensor.is_floating_point() else tensor

    return Batch(tuple(map(double, inputs)), {key: double(tensor) for key, tensor in kwargs.items()})


def check(model: nn.Module, *inputs: Tensor, **kwargs: Tensor) -> Program:
    """Hold a program that was observed on some samples against the model on others."""
    program, state, double = observed(model, *inputs, **kwargs)
    rows = len((*inputs, *kwargs.values())[0])
    generator = torch.Generator().manual_seed(0)
    for size in (1, 2, 5, rows, 3 * rows + 1):
        picked = torch.randint(0, rows, (size,), generator=generator)
        batch = doubled([tensor[picked] for tensor in inputs], {key: tensor[picked] for key, tensor in kwargs.items()})
        wanted = output_of(call(double, batch, 0), double)
        kept = {name: tensor.clone() for name, tensor in state.items()}
        given = [tensor.clone() for tensor in (*batch.inputs, *batch.kwargs.values())]
        torch.testing.assert_close(run(program, state, batch), wanted, rtol=1e-12, atol=1e-12, equal_nan=True)
        # a run changes neither what it is given nor the state
        assert all(torch.equal(state[name], tensor) for name, tensor in kept.items())
        pairs = zip((*batch.inputs, *batch.kwargs.values()), given, strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)
    return program


def ops(program: Program) -> list[str]:
    return [step.op for step in program.steps]


X = torch.randn(7, 4, generator=torch.Generator().manual_seed(1))


def loop(self, x):
    for _ in range(3):
        x = F.relu(self.fc(x)) + x
    return x


def in_place(self, x):
    y = self.fc(x)
    y += x
    y *= 2
    y -= 0.5
    y /= 3
    y **= 2
    y.clamp_(max=1).add_(1)
    return F.leaky_relu(F.relu_(y), 0.1, True)


def tuples(self, x):
    a, b = self.fc(x).chunk(2, dim=1)
    c, d, e = torch.split(self.fc(x), [1, 1, 2], dim=1)
    values, indices = torch.max(x, dim=1, keepdim=True)
    return torch.cat([a * b, c - d, e, values, indices.to(x.dtype)], dim=1)


def closures(self, x):
    mask = torch.triu(torch.ones(4, 4, dtype=torch.bool), diagonal=1)
    scores = (x[:, :, None] * x[:, None, :]).masked_fill(mask, torch.finfo(x.dtype).min)
    return self.fc(torch.softmax(scores, dim=-1).sum(1))


STEPS = {
    "relu of the functional": lambda self, x: F.relu(self.fc(x), inplace=True),
    "in place": in_place,
    "loop": loop,
    "tuples": tuples,
    "mask of the lowest number": closures,
    "size and view": lambda self, x: self.fc(x).view(x.size(0), 2, 2).reshape(x.shape[0] * 2, 2).view(-1, 4),
    "length": lambda self, x: self.fc(x)[: len(x) - 0].sum(1, keepdim=True).expand(len(x), 3),
    "slices": lambda self, x: self.fc(x)[:, 1:][..., None].flatten(1)[:, [2, 0]],
    "made": lambda self, x: self.fc(x) + torch.zeros(x.shape[0], 4, dtype=x.dtype) + torch.arange(4),
    "tensor": lambda self, x: self.fc(x) * torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=x.dtype),
    "filled": lambda self, x: self.fc(x) + torch.empty(4, dtype=x.dtype).fill_(2) + x.clone().zero_() + x.new_ones(4),
    "numpy constant": lambda self, x: self.fc(x) * torch.from_numpy(np.arange(4.0)),
    "numpy numbers": lambda self, x: (self.fc(x) * np.float64(2)).reshape(-1, np.int64(4)),
    "by the number of samples": lambda self, x: self.fc(x) / x.shape[0] + x.mean(0),
    "buffer": lambda self, x: self.fc(x) * self.scale,
    "branch on shape": lambda self, x: self.fc(x) if x.shape[1] == 4 else x,
    "dropped values": lambda self, x: (self.fc(x).sigmoid(), self.fc(x))[1],
    "einsum": lambda self, x: torch.einsum("bi,oi->bo", x, self.fc.weight),
    "hardswish": lambda self, x: F.hardsigmoid(F.hardswish(self.fc(x))),
    "infinite outputs": lambda self, x: self.fc(x).masked_fill(x > 0, -torch.inf),
    "whole numbers": lambda self, x: self.fc(x).argmax(1),
    "NaN as a number": lambda self, x: torch.nan_to_num(torch.full_like(x, float("nan"))) + self.fc(x),
    "indexed by a mask": lambda self, x: self.fc(x)[x[:, 0] > -9],
    "rows picked": lambda self, x: self.fc(x)[torch.arange(x.shape[0]), x.argmax(1)],
    "where": lambda self, x: torch.where(x > 0, self.fc(x), 0.0).type_as(x),
    "vmap": lambda self, x: self.fc(x) * torch.vmap(lambda row: row + 1)(torch.eye(4)).sum(0),
    "checked": lambda self, x: (self.fc(x), torch._assert(x.shape[1] == 4, "no"))[0],
}


@pytest.mark.parametrize("name", STEPS)
@pytest.mark.parametrize("rows", [7, 2])
def test_the_program_gives_what_the_model_gives(name, rows):
    check(Body(STEPS[name], scale=torch.tensor([1.0, 2.0, 3.0, 4.0])), X[:rows])


@pytest.mark.parametrize(
    "activation",
    [
        nn.ReLU(inplace=True),
        nn.ReLU6(inplace=True),
        nn.LeakyReLU(inplace=True),
        nn.ELU(inplace=True),
        nn.Hardtanh(inplace=True),
        nn.Hardswish(inplace=True),
        nn.SiLU(inplace=True),
        nn.Dropout(inplace=True),
        nn.Threshold(0.1, 0.2, inplace=True),
        nn.Softplus(),
        nn.Unflatten(1, (2, 2)),
        nn.GroupNorm(2, 4),
        nn.LayerNorm(4),
        nn.BatchNorm1d(4),
        nn.PReLU(),
    ],
    ids=lambda module: type(module).__name__,
)
def test_modules_that_work_in_place_and_others(activation):
    # first in the network too: the samples are the user's
    check(nn.Sequential(activation, nn.Flatten(), nn.Linear(4, 4), activation), X)


def test_observed_on_one_sample():
    check(nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2)), X[:1])
    program = observed(nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2)), X[:1])[0]
    assert ops(program) == ["input", "linear", "relu", "linear"]


def test_convolutions_and_pooling():
    model = nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1, padding_mode="circular"), nn.BatchNorm2d(4), nn.ReLU(inplace=True),
        nn.MaxPool2d(2), nn.Conv2d(4, 4, 3, padding="same", groups=2), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(4, 3),
    )  # fmt: skip
    check(model, torch.randn(5, 2, 6, 6))


def test_recurrent_layers():
    check(Body(lambda self, x: self.lstm(x)[0][:, -1], lstm=nn.LSTM(4, 3, batch_first=True)), torch.randn(5, 6, 4))
    check(Body(lambda self, x: self.gru(x)[1][0], gru=nn.GRU(4, 3, batch_first=True)), torch.randn(5, 6, 4))


def test_tokens():
    model = Body(lambda self, ids: self.fc(self.emb(ids) + self.pos(torch.arange(ids.shape[1]))))
    model.emb, model.pos = nn.Embedding(9, 4), nn.Embedding(6, 4)
    check(model, torch.randint(0, 9, (5, 6)))


def test_keywords_and_several_inputs():
    model = Body(lambda self, x, y, *, scale, shift=None: self.fc(x) * scale + y + (0 if shift is None else shift))
    program = check(model, X, 2 * X, scale=X.abs())
    assert program.inputs == (0, 1, "scale")
    check(model, X, 2 * X, scale=X.abs(), shift=X)


def test_a_missing_input_is_named():
    program, state, _ = observed(Body(lambda self, x, scale: self.fc(x) * scale), X, scale=X)
    with pytest.raises(ProblemError, match="no input 'scale'"):
        run(program, state, Batch((X.double(),)))


class Output(OrderedDict):
    """As transformers return it."""

    def __getattr__(self, name):
        return self[name]


@pytest.mark.parametrize(
    "wrap",
    [
        lambda y: {"logits": y, "hidden": 2 * y},
        lambda y: {"anything": y, "loss": None},
        lambda y: Output(loss=y.sum(), logits=y),
        lambda y: Output(last_hidden_state=y, other=y + 1),
        lambda y: (y,),
        lambda y: [y, "text"],
    ],
)
def test_outputs_that_are_wrapped(wrap):
    check(Body(lambda self, x: wrap(self.fc(x))), X)


def test_several_outputs_are_refused():
    with pytest.raises(UnsupportedError, match=r"returns a tuple with 2 tensors.*returns one tensor"):
        observed(Body(lambda self, x: (self.fc(x), x)), X)


@pytest.mark.parametrize("norm_first", [False, True])
def test_attention_is_followed_call_by_call(norm_first):
    kept = F.has_torch_function
    layer = nn.TransformerEncoderLayer(4, 2, 8, batch_first=True, norm_first=norm_first)
    program = check(layer, torch.randn(5, 3, 4))
    assert ops(program).count("linear") == 4
    assert "multi_head_attention_forward" not in ops(program)
    attention = nn.MultiheadAttention(4, 2, batch_first=True)
    program = check(Body(lambda self, x: self.attention(x, x, x)[0], attention=attention), torch.randn(5, 3, 4))
    assert "baddbmm" in ops(program) or "bmm" in ops(program)
    encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    causal = nn.Transformer.generate_square_subsequent_mask(3, dtype=torch.float64)
    check(Body(lambda self, x: self.encoder(x, mask=causal, is_causal=True), encoder=encoder), torch.randn(5, 3, 4))
    assert F.has_torch_function is kept


def test_torch_is_as_it_was_after_an_attention_that_fails():
    kept = F.has_torch_function
    model = nn.MultiheadAttention(4, 2)
    with pytest.raises(ProblemError, match="fails"):
        observed(Body(lambda self, x: self.attention(x, x, x)[0], attention=model), torch.randn(5, 3, 6))
    assert F.has_torch_function is kept
    assert _get_current_function_mode_stack() == []


def test_nothing_stays_behind():
    model = nn.Sequential(nn.Linear(4, 4), nn.Dropout(), nn.BatchNorm1d(4))
    model[2].eval()
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    x = X.clone()
    double = double_copy(model)
    double.train()
    double[1].eval()
    observe(double, raw_state(double), Batch((x.double(),)))
    assert [module.training for module in double.modules()] == [True, True, False, True]
    assert _get_current_function_mode_stack() == []
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in double.modules())
    assert [module.training for module in model.modules()] == [True, True, True, False]
    assert torch.equal(x, X)
    assert all(torch.equal(state[name], tensor) for name, tensor in model.state_dict().items())


def test_nothing_stays_behind_of_a_model_that_fails():
    double = nn.Sequential(nn.Linear(4, 4), nn.Linear(3, 3)).double()
    with pytest.raises(ProblemError, match=r"Sequential\) fails on batches\[0\] with inputs of shape \(7, 4\)"):
        observe(double, raw_state(double), Batch((X.double(),)))
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in double.modules())
    assert all(module.training for module in double.modules())
    assert _get_current_function_mode_stack() == []


@pytest.mark.parametrize(
    "step",
    [
        lambda self: self.fc.weight,
        lambda self, x: self.missing(x),
        lambda self, x: 1 / 0,
        lambda self, x: x.reshape(3, 3),
        lambda self, x: {}["key"],
    ],
)
def test_a_model_that_fails_names_the_shapes(step):
    with pytest.raises(ProblemError, match=r"model \(Body\) fails on batches\[0\] with inputs of shape \(7, 4\)"):
        observed(Body(step), X)


def test_errors_of_ones_own_pass():
    def refuse(self, x):
        raise NetTrimError("mine")

    with pytest.raises(NetTrimError, match=r"^mine$"):
        observed(Body(refuse), X)


def test_steps_that_do_not_reach_the_output_are_dropped():
    program, *_ = observed(Body(lambda self, x: (self.fc(x).sigmoid(), self.fc(x).relu())[1]), X)
    assert ops(program) == ["input", "linear", "relu"]
    assert [step.where for step in program.steps] == ["0", "fc", ""]
    # dead steps may be of functions that cannot be followed
    assert ops(check(Body(lambda self, x: (torch.asarray([1.0]), self.fc(x))[1]), X)) == ["input", "linear"]


def test_weights_keep_their_names():
    model = nn.Sequential(OrderedDict(body=nn.Sequential(nn.Linear(4, 4)), head=nn.Linear(4, 2)))
    program = check(model, X)
    assert [step.held for step in program.steps] == [[], ["body.0.weight", "body.0.bias"], ["head.weight", "head.bias"]]


def test_constants_are_captured_under_names_of_their_own():
    constant = torch.randn(4, dtype=torch.float64)
    program, state, _ = observed(Body(lambda self, x: self.fc(x) * constant), X)
    assert program.steps[-1].args[1] == Held("constant.0")
    assert torch.equal(state["constant.0"], constant)


def test_reading_values_is_noted_and_shapes_are_not():
    assert observed(Body(lambda self, x: self.fc(x) if x.sum() > -99 else x), X)[0].reads_values
    assert observed(Body(lambda self, x: self.fc(x) * (1 if x.abs().max().item() > 0 else 2)), X)[0].reads_values
    assert observed(Body(lambda self, x: self.fc(x) * (2 if 9.0 in x else 1)), X)[0].reads_values
    assert observed(Body(lambda self, x: self.fc(x)[x[:, 0] > -99]), X)[0].reads_values
    assert not observed(Body(lambda self, x: self.fc(x) * (x > 0).float() * (x.shape[0] > 1)), X)[0].reads_values
    assert not observed(Body(lambda self, x: self.fc(x).int().bool().double()), X)[0].reads_values


@pytest.mark.parametrize(
    "step",
    [
        lambda self, x: self.fc(x) if x.sum() > 0 else x,
        lambda self, x: self.fc(x) if bool((x > 0).all()) else self.fc(x) + 1,
        lambda self, x: self.fc(x) * round(x.mean().tolist()),
        lambda self, x: self.fc(x) * torch.from_numpy(np.sign(x[0].numpy())),
    ],
)
def test_a_batch_that_takes_another_path_is_refused(step):
    program, state, double = observed(Body(step), 1 + X.abs() * 0)
    assert program.reads_values
    agree(program, state, double, Batch((1.0 + torch.zeros(9, 4).double(),)), 3)
    with pytest.raises(UnsupportedError, match=r"forward of Body does not do on batches\[4\] what it did"):
        agree(program, state, double, Batch((-3 - X.double().abs(),)), 4)


@pytest.mark.parametrize(
    ("step", "said"),
    [
        (lambda self, x: F.dropout(self.fc(x)), r"draws random numbers \(dropout\)"),
        (lambda self, x: self.fc(x) + torch.rand(4), r"draws random numbers \(rand\)"),
        (lambda self, x: self.fc(x) + torch.randn_like(x), r"draws random numbers \(randn_like\)"),
        (lambda self, x: self.fc(x).bernoulli_(0.5), r"draws random numbers \(bernoulli\)"),
        (lambda self, x: torch.multinomial(x.abs(), 1), "draws random numbers"),
        (lambda self, x: F.gumbel_softmax(self.fc(x)), "draws random numbers"),
        (lambda self, x: self.fc(x).normal_(), r"draws random numbers"),
        (lambda self, x: self.fc(x) * random.random(), "has 0.*for 7 samples and"),
        (lambda self, x: self.fc(x) * torch.from_numpy(np.random.default_rng().random(4)), "makes out of sight"),
        (lambda self, x: self.fc(x) + torch.rand(4, generator=torch.Generator()), r"torch\.rand has <torch.*Generator"),
    ],
)
def test_random_forwards_are_refused(step, said):
    with pytest.raises(UnsupportedError, match=said):
        observed(Body(step), X)


def test_dropout_that_is_off_is_not_random():
    check(Body(lambda self, x: F.dropout(self.fc(x), training=self.training)), X)


def behind(self, x):
    y = self.fc(x)
    y.view(-1).relu_()
    return y


def part(self, x):
    y = self.fc(x)
    y[0] = 1
    return y


def augmented_part(self, x):
    y = self.fc(x)
    y[:, 0] += 1
    return y


def copied(self, x):
    return torch.empty_like(x).copy_(self.fc(x))


def counted(self, x):
    self.count += 1
    return self.fc(x) * self.count


@pytest.mark.parametrize(
    ("step", "said"),
    [
        (part, r"writes into a tensor in place \(setitem\).*torch\.where or torch\.cat"),
        (augmented_part, r"writes into a tensor in place \(setitem\)"),
        (copied, r"writes into a tensor in place \(copy\)"),
        (lambda self, x: torch.add(x, x, out=torch.empty_like(x)), r"writes into a tensor in place \(add\)"),
        (behind, "changes tensors in place that other steps read"),
        (counted, "changes tensors in place that other steps read"),
    ],
)
def test_writing_that_cannot_be_followed_is_refused(step, said):
    with pytest.raises(UnsupportedError, match=said):
        observed(Body(step, count=torch.zeros(4)), X)


@pytest.mark.parametrize(
    "step",
    [
        lambda self, x: torch.stack([self.fc(row) for row in x]),
        lambda self, x: self.fc(x) * (1 / x.shape[0]),
        lambda self, x: self.fc(x).repeat(x.shape[0], 1)[: x.shape[0] ** 2 // 2].sum(0) + x,
        lambda self, x: self.fc(x) if x.shape[0] % 2 else x,
    ],
)
def test_what_hangs_on_the_number_of_samples_otherwise_is_refused(step):
    with pytest.raises(UnsupportedError, match=r"number of samples|batches"):
        observed(Body(step), X)


def test_a_squeeze_that_would_drop_the_samples_is_refused():
    with pytest.raises(UnsupportedError, match=r"squeeze.*has \(4,\) for 1 samples and \(2, 4\) for 2"):
        observed(Body(lambda self, x: self.fc(x).squeeze()), X[:1])


def test_an_output_that_does_not_come_from_a_step_is_refused():
    with pytest.raises(UnsupportedError, match="does not come from its input"):
        observed(Body(lambda self, x: self.fc.weight), X)


def test_custom_functions_and_subclasses():
    class Straight(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.sign() * 2

        @staticmethod
        def backward(ctx, gradient):
            return gradient

    check(Body(lambda self, x: self.fc(Straight.apply(x))), X)


class Masked(nn.Module):
    """With an operator whose name ends in underscores."""

    def forward(self, x: Tensor) -> Tensor:
        return x * ((x > 0) & (x < 1))


def exported(model: nn.Module, x: Tensor, dynamic: bool) -> nn.Module:
    dims = ({0: torch.export.Dim("rows")},) if dynamic else None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.export.export(model.eval(), (x,), dynamic_shapes=dims).module()


@pytest.mark.filterwarnings("ignore::FutureWarning")  # of torch's own copying
def test_exported_programs():
    model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(48, 4))
    x = torch.randn(5, 2, 6, 6)
    program = check(exported(model, x, dynamic=True), x)
    assert ops(program) == ["input", "conv2d", "batch_norm", "relu", "flatten", "linear"]
    assert program.steps[-1].held == ["4.weight", "4.bias"]
    check(exported(Masked(), X, dynamic=True), X)
    with pytest.raises(UnsupportedError, match=r"takes 5 samples and fails on 4.*dynamic_shapes"):
        observed(exported(model, x, dynamic=False), x)
