"""A stored forward as a module: same outputs, same names, and inputs as the model takes them."""

from __future__ import annotations

import copy
import io

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nettrim.errors import ProblemError
from nettrim.network.batches import Batch
from nettrim.network.fold import fold_state
from nettrim.network.modular import ProgramModule
from nettrim.network.trace import trace


class Two(nn.Module):
    """Two inputs, one by keyword, a constant that is no buffer, and a whole-number buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.ReLU(inplace=True))
        self.program = nn.Linear(4, 3)
        self.register_buffer("order", torch.tensor([2, 0, 1]))
        self.scale = torch.tensor([1.0, 2.0, 3.0])

    def forward(self, x: Tensor, *, shift: Tensor) -> Tensor:
        return self.program(self.body(x))[:, self.order] * self.scale + shift


def modular(model: nn.Module, batch: Batch, dtype: torch.dtype = torch.float32) -> tuple[ProgramModule, dict]:
    traced = trace(model, batch)
    state = fold_state(traced.state, traced.graph.folds)
    read = {name for step in traced.graph.program.steps for name in step.held}
    state = {name: state[name].to(dtype) if state[name].is_floating_point() else state[name] for name in read}
    return ProgramModule(traced.graph.program, state), state


def trained(model: nn.Module) -> nn.Module:
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d):
            module.running_mean.uniform_(-1, 1)
            module.running_var.uniform_(0.5, 2)
            nn.init.uniform_(module.weight, 0.5, 2)
            nn.init.uniform_(module.bias, -1, 1)
    return model.eval()


def test_it_gives_what_the_model_gives():
    model = trained(Two())
    x, shift = torch.randn(6, 4), torch.randn(6, 3)
    module, state = modular(model, Batch((x,), {"shift": shift}))
    assert not module.training
    for rows in (1, 6):
        torch.testing.assert_close(module(x[:rows], shift=shift[:rows]), model(x[:rows], shift=shift[:rows]))
    assert set(module.state_dict()) == set(state)
    assert {"body.0.weight", "program.weight", "order", "constant.0"} <= set(state)
    assert module.state_dict()["order"].dtype is torch.int64
    assert not any(parameter.requires_grad for parameter in module.parameters())


def test_its_tensors_are_its_own():
    module, state = modular(trained(Two()), Batch((torch.randn(6, 4),), {"shift": torch.randn(6, 3)}))
    with torch.no_grad():
        for tensor in module.state_dict().values():
            tensor.zero_()
    assert all(bool((tensor != 0).any()) for tensor in state.values())


def test_it_can_be_copied_stored_and_trained():
    model = trained(Two())
    x, shift = torch.randn(6, 4), torch.randn(6, 3)
    module, _ = modular(model, Batch((x,), {"shift": shift}))
    file = io.BytesIO()
    torch.save(module.state_dict(), file)
    file.seek(0)
    twin = copy.deepcopy(module)
    with torch.no_grad():
        twin.get_parameter("body.0.weight").zero_()
    assert not torch.equal(twin(x, shift=shift), module(x, shift=shift))
    twin.load_state_dict(torch.load(file))
    assert torch.equal(twin(x, shift=shift), module(x, shift=shift))
    weight = module.get_parameter("body.0.weight").requires_grad_()
    module(x, shift=shift).sum().backward()
    assert weight.grad is not None
    assert module.double()(x, shift=shift).dtype is torch.float64


@pytest.mark.parametrize(("args", "kwargs"), [((), {}), ((1,), {}), ((1, 1), {}), ((1,), {"shift": 1, "more": 1})])
def test_other_inputs_are_refused(args, kwargs):
    module, _ = modular(trained(Two()), Batch((torch.randn(6, 4),), {"shift": torch.randn(6, 3)}))
    with pytest.raises(ProblemError, match="takes 0, shift"):
        module(*(torch.ones(2, 4) for _ in args), **{key: torch.ones(2, 3) for key in kwargs})


def test_a_weight_without_a_module_whose_batch_norm_is_folded():
    class Bare(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.randn(4, 4))
            self.norm = nn.BatchNorm1d(4)

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(F.linear(x, self.w))

    model = trained(Bare())
    x = torch.randn(6, 4)
    module, state = modular(model, Batch((x,)))
    torch.testing.assert_close(module(x), model(x))
    assert set(module.state_dict()) == set(state)
