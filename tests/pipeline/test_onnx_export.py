"""ONNX files answer as the model does, hold its zeros, and refuse in one sentence what they cannot hold."""

import copy
import math
import sys

import numpy as np
import pytest
import torch
from torch import nn

import nettrim
from nettrim.errors import MissingExtraError, ProblemError, RunError, UnsupportedError
from nettrim.network.modular import ProgramModule
from nettrim.pipeline import onnx_export
from nettrim.pipeline.onnx_export import export_onnx


def sparse(*shape, zeros):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(shape, generator=generator)
    return weight.where(torch.rand(shape, generator=generator) >= zeros, 0.0)


class Convolutional(nn.Module):
    """A small network with a convolution, batch norm (an integer buffer) and a linear layer; exact zeros."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.fc = nn.Conv2d(2, 6, 3), nn.BatchNorm2d(6), nn.Linear(6 * 16, 5)
        with torch.no_grad():
            self.conv.weight.copy_(sparse(6, 2, 3, 3, zeros=0.7))
            self.fc.weight.copy_(sparse(5, 96, zeros=0.9))

    def forward(self, images):
        return self.fc(torch.relu(self.norm(self.conv(images))).flatten(1))


def initialisers(path):
    import onnx

    return {entry.name: onnx.numpy_helper.to_array(entry) for entry in onnx.load(path).graph.initializer}


def test_onnx_has_the_zeros_and_any_number_of_rows(tmp_path):
    import onnxruntime

    model = Convolutional()
    model.norm.running_mean.normal_()
    before = copy.deepcopy(model.state_dict())
    path = tmp_path / "a.onnx"
    difference = export_onnx(model, torch.randn(3, 2, 6, 6), path)
    assert 0 <= difference <= 1e-5
    assert [file.name for file in tmp_path.iterdir()] == ["a.onnx"]
    stored = initialisers(path)
    linear = next(array for array in stored.values() if sorted(array.shape) == [5, 96])
    linear = linear if linear.shape == (5, 96) else linear.T
    assert np.array_equal(linear, model.fc.weight.detach().numpy())
    # batch norm is folded into the kernel, row by row: its zeros stay where they are
    kernel = next(array for array in stored.values() if array.shape == (6, 2, 3, 3))
    assert np.array_equal(kernel == 0, (model.conv.weight == 0).numpy())
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert model.training
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    more = torch.randn(7, 2, 6, 6)
    (found,) = session.run(None, {session.get_inputs()[0].name: more.numpy()})
    assert torch.allclose(torch.from_numpy(found), model.eval()(more), atol=1e-5)


def test_onnx_of_a_run_that_was_read_back(tmp_path):
    """Of the stored forward, whose inputs have no names."""
    x = torch.randn(12, 2, 6, 6)
    given = dict(sparsity=0.5, out_dir=tmp_path / "run", progress=False)
    expected = nettrim.prune(Convolutional(), [x], "magnitude", **given).model
    back = nettrim.load_result(tmp_path / "run").model
    assert isinstance(back, ProgramModule)
    assert export_onnx(back, x[:3], tmp_path / "a.onnx") <= 1e-5
    import onnxruntime

    session = onnxruntime.InferenceSession(tmp_path / "a.onnx", providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    torch.testing.assert_close(torch.from_numpy(found), expected(x), rtol=1e-4, atol=1e-5)


class Some(nn.Module):
    """An input by name, and any number of others."""

    def forward(self, first, *others):
        return first + sum(other.sum(1) for other in others)


def test_onnx_of_any_number_of_inputs(tmp_path):
    inputs = (torch.randn(3), torch.randn(3, 2), torch.randn(3, 4))
    assert export_onnx(Some(), inputs, tmp_path / "a.onnx") <= 1e-6


class Two(nn.Module):
    """Two inputs, one of them of another length, and two outputs."""

    def forward(self, first, second):
        return first * 2, first.sum() + second


def test_onnx_of_several_inputs_and_outputs(tmp_path):
    assert export_onnx(Two(), (torch.randn(3, 4), torch.randn(4)), tmp_path / "a.onnx") <= 1e-6


class Deaf(nn.Module):
    """One of its inputs changes nothing; the example has one row."""

    def forward(self, first, second):
        return first + 1


def test_onnx_of_an_input_that_is_not_used(tmp_path):
    assert export_onnx(Deaf(), (torch.randn(1, 4), torch.randn(1, 2)), tmp_path / "a.onnx") <= 1e-6


def test_onnx_that_answers_otherwise_is_not_written(tmp_path, network, monkeypatch):
    export = torch.onnx.export

    def wrong(model, *args, **kwargs):
        twin = copy.deepcopy(model)
        twin[5].bias.data[0] += 1e-2
        return export(twin, *args, **kwargs)

    monkeypatch.setattr(torch.onnx, "export", wrong)
    with pytest.raises(RunError, match=r"differs from the model by 0\.0\d"):
        export_onnx(network, torch.randn(3, 12), tmp_path / "a.onnx")
    assert list(tmp_path.iterdir()) == []


def test_nan_and_other_shapes_are_a_difference():
    one = torch.ones(3)
    assert onnx_export._difference([one], [one]) == 0
    assert onnx_export._difference([4 * one], [4 * one + 1]) == 0.25
    assert onnx_export._difference([0 * one], [one]) == 1
    assert onnx_export._difference([one, one], [one]) == math.inf
    assert math.isnan(onnx_export._difference([one * math.nan, one], [one, one]))
    assert math.isnan(onnx_export._difference([one, one], [one * math.nan, one]))


class Asks(nn.Module):
    """What no graph can hold: a branch on the numbers."""

    def forward(self, inputs):
        return inputs if inputs.sum() > 0 else -inputs


class Names(nn.Module):
    """Outputs that are no tensors."""

    def forward(self, inputs):
        return {"a": inputs + 1}


@pytest.mark.parametrize(
    ("model", "example", "error", "named"),
    [
        (Asks(), torch.ones(3, 4), UnsupportedError, r"Asks cannot be exported to ONNX \(.*data-dependent"),
        (Names(), torch.ones(3, 4), UnsupportedError, "something else than tensors"),
        (nn.Linear(5, 2), torch.ones(3, 4), UnsupportedError, "Linear cannot be exported"),
        (nn.Linear(5, 2), torch.ones(0, 5), ProblemError, "at least one row"),
        (nn.Linear(5, 2), "abc", ProblemError, "example_inputs holds a str"),
        (nn.Linear(5, 2), (torch.ones(1, 5), 3), ProblemError, "example_inputs holds a int"),
    ],
)
def test_what_onnx_does_not_take_is_refused_in_one_sentence(model, example, error, named, tmp_path):
    with pytest.raises(error, match=named) as caught:
        export_onnx(model, example, tmp_path / "a.onnx")
    assert "\n" not in str(caught.value)
    assert "\x1b" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_a_model_beyond_one_file_is_refused_first(tmp_path, network, monkeypatch):
    monkeypatch.setattr(onnx_export, "_LIMIT", 100)
    with pytest.raises(UnsupportedError, match="2 GiB"):
        export_onnx(network, torch.randn(3, 12), tmp_path / "a.onnx")


@pytest.mark.parametrize("library", ["onnx", "onnxscript", "onnxruntime"])
def test_a_missing_library_names_the_extra(library, network, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(MissingExtraError, match=rf"{library}: pip install 'nettrim\[onnx\]'"):
        export_onnx(network, torch.randn(3, 12), tmp_path / "a.onnx")
