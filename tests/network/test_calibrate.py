"""Calibration reads batches of every form, records the right numbers, and leaves model and data alone."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from nettrim.errors import ProblemError, UnknownNameError, UnsupportedError
from nettrim.network.calibrate import Batch, outputs, read_batches, record

X = torch.randn(7, 3, generator=torch.Generator().manual_seed(0))
Y = torch.arange(7) % 2


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.ReLU(inplace=True), nn.Dropout(0.5), nn.Linear(4, 2))


@pytest.mark.parametrize(
    ("batches", "labelled"),
    [
        ([X[:4], X[4:]], False),
        ((part for part in (X[:4], X[4:])), False),
        ([(X[:4], Y[:4]), [X[4:], Y[4:]]], True),
        ([(X[:4],), (X[4:],)], False),
        ([{"x": X[:4], "target": Y[:4]}, {"inputs": X[4:], "labels": Y[4:]}], True),
        ([X[:4].numpy(), X[4:].numpy()], False),
        (DataLoader(TensorDataset(X, Y), batch_size=4), True),
    ],
)
def test_every_form_is_read(batches, labelled):
    read = read_batches(batches)
    assert [len(batch) for batch in read] == [4, 3]
    assert torch.equal(torch.cat([batch.inputs[0] for batch in read]), X)
    if labelled:
        assert torch.equal(torch.cat([batch.labels for batch in read]), Y)
    else:
        assert [batch.labels for batch in read] == [None, None]


def test_other_keys_are_keyword_inputs():
    (batch,) = read_batches([{"scale": X, "mask": Y}])
    assert batch.inputs == ()
    assert set(batch.kwargs) == {"scale", "mask"}
    assert len(batch) == 7


def test_read_only_and_reversed_arrays_are_copied():
    array = np.arange(6.0).reshape(3, 2)[::-1]
    array.flags.writeable = False
    (batch,) = read_batches([array])
    assert batch.inputs[0].tolist() == [[4, 5], [2, 3], [0, 1]]


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.uint32, np.uint64, ">u2"])
def test_unsigned_labels_are_classes(dtype):
    first, second = read_batches([(X, Y.numpy().astype(dtype)), (X, torch.from_numpy(Y.numpy().astype(np.uint16)))])
    assert torch.equal(torch.cat([first.labels, second.labels]), torch.cat([Y, Y]))
    assert second.labels.dtype == torch.int64


def test_long_doubles_become_doubles():
    (batch,) = read_batches([X.numpy().astype(np.longdouble)])
    assert torch.equal(batch.inputs[0], X.double())


def test_reading_twice_changes_nothing():
    read = read_batches([(X, Y)])
    assert read_batches(read)[0] is read[0]


BAD = X.clone()
BAD[2, 1] = torch.nan
BAD[5, 0] = -torch.inf


@pytest.mark.parametrize(
    ("batches", "said"),
    [
        ([], "holds no batch"),
        (iter(()), "holds no batch"),
        (X, r"\[tensor\]"),
        (X.numpy(), r"single ndarray.*\[batch\]"),
        ({"x": X}, r"single dict.*\[batch\]"),
        ("digits", "single str"),
        (3, "is a int"),
        ([X, X[:0]], r"batches\[1\].*\(0, 3\)"),
        ([torch.tensor(1.0)], "no rows"),
        ([X, BAD], r"batches\[1\].*2 NaN or infinite entries of 21"),
        ([(X, BAD[:, 0])], r"'label'.*1 NaN or infinite"),
        ([(X, Y[:5])], r"7 rows of input and 5 of 'label'"),
        ([{"x": X, "mask": Y[:2]}], r"7 rows of input and 2 of 'mask'"),
        ([(X, Y), (X, None)], "'label'.*is a NoneType"),
        ([(X, Y), X], r"batches\[0\] and batches\[1\] only one has labels"),
        ([(X, Y, Y)], "tuple of 3 entries"),
        ([()], "tuple of 0 entries"),
        ([{"label": Y}], "holds no input"),
        ([{"x": X, "input": X}], "twice, as 'input' and 'x'"),
        ([{"x": X, "label": Y, "targets": Y}], "labels twice"),
        ([[[1.0, 2.0]]], "is a list"),
        ([np.array(["a", "b"])], "is a <U1 array"),
        ([torch.arange(6).reshape(3, 2)], r"torch.int64.*\.float\(\)"),
        ((X, Y), r"write \[\(input, label\)\]"),
        ([(X, Y * 1j)], r"labels of batches\[0\] are torch.complex64; pass real numbers"),
        ([(X, Y), (X, Y[:, None])], r"batches\[0\] have shape \(7,\) and those of batches\[1\] \(7, 1\)"),
        ([(X, np.full(7, 2**63, dtype=np.uint64))], r"'label'.*holds integers of 2\*\*63 or more"),
        ([X.to_sparse()], r"batches\[0\].*is a sparse, nested, quantized or meta tensor"),
        ([torch.ones(2, 3, device="meta")], "meta tensor; pass a plain dense one"),
        ([np.ma.masked_array(X.numpy(), X.numpy() > 0)], "masked array"),
        ([np.full((2, 3), 2, dtype=np.longdouble) ** 2000], "6 NaN or infinite"),
    ],
)
def test_what_is_not_fit_is_refused(batches, said):
    with pytest.raises(ProblemError, match=said):
        read_batches(batches)


def test_the_argument_is_called_by_its_name():
    with pytest.raises(ProblemError, match=r"held_out\[0\]"):
        read_batches([BAD], name="held_out")


def test_recorded_numbers_are_those_of_the_layers(model):
    seen = record(model, [X[:4], X[4:]], ["3", "0"])
    assert list(seen) == ["3", "0"]
    first, last = seen["0"], seen["3"]
    assert first.inputs.dtype == last.outputs.dtype == torch.float64
    assert torch.equal(first.inputs, X.double())
    # raw: the ReLU that follows works in place and must not reach what was recorded
    assert first.outputs.min() < 0
    expected = X @ model[0].weight.T + model[0].bias
    torch.testing.assert_close(first.outputs, expected.double(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(last.inputs, first.outputs.relu(), rtol=0, atol=0)
    torch.testing.assert_close(last.outputs, outputs(model, [X]), rtol=1e-5, atol=1e-6)


def test_a_record_in_the_model_dtype_is_raw_too(model):
    seen = record(model, [X], ["0"], dtype=torch.float32)
    assert seen["0"].outputs.dtype == torch.float32
    assert seen["0"].outputs.min() < 0


def test_batching_does_not_matter(model):
    whole = record(model, [X], ["0", "3"])
    parts = record(model, [row[None] for row in X], ["0", "3"])
    for name in whole:
        torch.testing.assert_close(parts[name].inputs, whole[name].inputs, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(parts[name].outputs, whole[name].outputs, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(outputs(model, X.split(2)), outputs(model, [X]), rtol=1e-5, atol=1e-6)


def test_leading_dimensions_become_rows(model):
    cube = X[:6].reshape(2, 3, 3)
    assert torch.equal(record(model, [cube], ["0"])["0"].inputs, X[:6].double())
    assert outputs(model, [cube]).shape == (6, 2)


def test_one_number_for_each_row_is_one_column():
    model = nn.Sequential(nn.Linear(3, 1), nn.Flatten(0))
    assert outputs(model, [X[:5], X[5:]]).shape == (7, 1)


def test_floating_inputs_are_cast_to_the_model(model):
    seen = record(model.double(), [X], ["0"])
    assert torch.equal(seen["0"].inputs, X.double())
    assert outputs(model, [X], dtype=torch.float32).dtype == torch.float32


def test_keyword_inputs_reach_forward():
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(3, 2)

        def forward(self, x: Tensor, scale: Tensor) -> Tensor:
            return self.fc(input=x * scale)

    scale = torch.arange(7.0)[:, None]
    seen = record(Scaled(), [{"x": X, "scale": scale}], ["fc"])
    assert torch.equal(seen["fc"].inputs, (X * scale).double())


def hooks(model: nn.Module) -> int:
    return sum(len(module._forward_hooks) for module in model.modules())


def test_the_model_and_the_data_are_left_alone(model):
    model[2].eval()
    weights = [parameter.detach().clone() for parameter in model.parameters()]
    data = X.clone()
    record(model, [data], ["0", "3"])
    outputs(nn.Sequential(nn.ReLU(inplace=True), model), [data])
    assert hooks(model) == 0
    assert [model.training, model[0].training, model[2].training] == [True, True, False]
    assert torch.equal(data, X)
    for parameter, kept in zip(model.parameters(), weights, strict=True):
        assert torch.equal(parameter, kept)
        assert parameter.grad is None


def test_an_error_leaves_no_hook(model):
    with pytest.raises(ProblemError, match=r"batches\[1\] with inputs of shape \(7, 2\)"):
        record(model, [X, X[:, :2]], ["0"])
    assert hooks(model) == 0
    assert model.training


def test_activations_that_are_not_finite_name_layer_and_batch(model):
    with torch.no_grad():
        model[0].weight.fill_(1e38)
        model[3].weight.fill_(1.0)
    small, large = torch.full((2, 3), 1e-3), torch.full((2, 3), 100.0)
    with pytest.raises(ProblemError, match=r"output of layer '0' on batches\[1\] has 8 NaN or infinite"):
        record(model, [small, large], ["0", "3"])
    with pytest.raises(ProblemError, match=r"the model's output on batches\[1\]"):
        outputs(model, [small, large])
    with pytest.raises(ProblemError, match=r"input of layer '0' on batches\[0\] has 6"):
        record(model, [torch.full((2, 3), 1e300, dtype=torch.float64)], ["0"])


def test_names_and_calls_are_checked(model):
    with pytest.raises(UnknownNameError, match="'1'"):
        record(model, [X], ["1"])
    model.add_module("again", nn.Identity())
    model.again.fc = nn.Linear(2, 2)
    with pytest.raises(UnsupportedError, match=r"'again\.fc' is not called exactly once"):
        record(model, [X], ["again.fc"])


def test_a_model_that_returns_no_tensor_is_refused():
    class Pair(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return x, x

    with pytest.raises(UnsupportedError, match="returns a tuple"):
        outputs(Pair(), [X])


def test_progress_is_silent_where_stderr_is_no_terminal(model, capsys):
    record(model, [Batch((X,))], ["0"], progress=True)
    outputs(model, [X], progress=True)
    captured = capsys.readouterr()
    assert captured.out + captured.err == ""
