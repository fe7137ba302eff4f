"""Every form gives back every bit, is as small as it says, and refuses what it did not write."""

import copy
import gzip
import json
import math

import numpy as np
import pytest
import scipy.sparse
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.utils import prune as torch_prune

from nettrim.errors import ProblemError, RunError, UnknownNameError, UnsupportedError
from nettrim.pipeline.outputs import (
    SPEED,
    apply_prune_masks,
    read_csr,
    read_packed,
    sizes,
    to_csr,
    write_csr,
    write_packed,
)

FORMS = {"packed": (write_packed, read_packed), "csr": (write_csr, read_csr)}
INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
FLOATS = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


@pytest.fixture(params=FORMS)
def form(request):
    return FORMS[request.param]


def sparse(*shape, zeros=0.8, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(shape, generator=generator)
    return weight.where(torch.rand(shape, generator=generator) >= zeros, 0.0).to(dtype)


def same_bits(first, second):
    """Equal in dtype, shape and every bit: NaN payloads and the sign of zero count."""
    if first.dtype != second.dtype or first.shape != second.shape:
        return False
    first, second = (tensor.contiguous().reshape(-1).view(torch.uint8) for tensor in (first, second))
    return torch.equal(first, second)


def assert_same(state, found):
    assert found.keys() == state.keys()
    for name, tensor in state.items():
        assert same_bits(tensor.detach(), found[name]), name


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


# round trips


def odd_state():
    """Everything that tempts a packer to lose something."""
    special = torch.tensor([0.0, -0.0, math.nan, math.inf, -math.inf, 1e-45, 0.0, 0.0] + 56 * [0.0])
    signalling = torch.zeros(64, dtype=torch.int32).index_fill_(0, torch.tensor([5]), 0x7F800001).view(torch.float32)
    return {
        **{f"{dtype} matrix": sparse(9, 17, dtype=dtype) for dtype in FLOATS},
        **{f"{dtype} special": special.to(dtype).reshape(4, 16) for dtype in FLOATS},
        "signalling nan": signalling.reshape(8, 8),
        "kernel": sparse(4, 3, 3, 3),
        "dense": torch.randn(7, 5),
        "all zeros": torch.zeros(6, 6),
        "vector": sparse(40),
        "transposed": sparse(12, 30).T,
        "every second": sparse(12, 30)[:, ::2],
        "empty": torch.zeros(0),
        "no rows": torch.zeros(0, 4),
        "no columns": torch.zeros(4, 0),
        "zero": torch.tensor(0.0),
        "one": torch.tensor(1.5, dtype=torch.bfloat16),
        "count": torch.tensor(7),
        "indices": torch.arange(12).reshape(3, 4),
        "mask": torch.rand(3, 5) > 0.5,
        "complex": torch.zeros(3, 3, dtype=torch.complex64),
    }


def test_every_bit_comes_back(form, tmp_path):
    write, read = form
    state = odd_state()
    write(tmp_path / "a.safetensors", state)
    assert_same(state, read(tmp_path / "a.safetensors"))


@settings(max_examples=80, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    shape=st.lists(st.integers(0, 9), max_size=4),
    zeros=st.floats(0, 1),
    dtype=st.sampled_from(FLOATS),
    name=st.sampled_from(sorted(FORMS)),
)
def test_every_bit_comes_back_whatever_the_bits(seed, shape, zeros, dtype, name, tmp_path_factory):
    rng = np.random.default_rng(seed)
    item = torch.zeros(0, dtype=dtype).element_size()
    bits = torch.from_numpy(
        rng.integers(-(2 ** (8 * item - 1)), 2 ** (8 * item - 1), size=shape, dtype=f"int{8 * item}")
    )
    bits = bits.where(torch.from_numpy(rng.random(shape)) >= zeros, 0).to(INTEGERS[item])
    write, read = FORMS[name]
    path = tmp_path_factory.mktemp("bits") / "a"
    write(path, {"w": bits.view(dtype)})
    found = read(path)["w"]
    assert found.dtype is dtype
    assert torch.equal(found.view(INTEGERS[item]), bits)


def test_a_model_goes_out_and_comes_back(form, tmp_path):
    write, read = form
    model = Convolutional()
    write(str(tmp_path / "a"), model)
    other = Convolutional()
    torch.nn.init.ones_(other.fc.weight)
    other.load_state_dict(read(str(tmp_path / "a")))
    assert_same(dict(model.state_dict()), dict(other.state_dict()))
    assert model.norm.num_batches_tracked.dtype is other.norm.num_batches_tracked.dtype


def test_tied_weights_are_stored_under_both_names(form, tmp_path):
    write, read = form
    weight = torch.randn(4, 4)
    write(tmp_path / "a", {"a": weight, "b": weight})
    assert_same({"a": weight, "b": weight}, read(tmp_path / "a"))


def test_the_packed_layout_is_as_written_down(tmp_path):
    """Read by hand: bit i mod 8 of byte i // 8, least significant first, and the values in row-major order."""
    weight = sparse(5, 13, dtype=torch.float16)
    write_packed(tmp_path / "a", {"w": weight})
    stored = load_file(tmp_path / "a")
    assert stored.keys() == {"w:bitmask", "w:values"}
    values, flat = iter(stored["w:values"].tolist()), []
    for i in range(65):
        flat.append(next(values) if int(stored["w:bitmask"][i // 8]) >> (i % 8) & 1 else 0.0)
    assert flat == weight.flatten().tolist()
    assert next(values, None) is None


def test_the_csr_layout_is_everybodys(tmp_path):
    weight = sparse(6, 2, 3, 3)
    write_csr(tmp_path / "a", {"w": weight, "b": sparse(6)})
    stored = load_file(tmp_path / "a")
    assert stored.keys() == {"w:crow_indices", "w:col_indices", "w:values", "b"}
    reference = scipy.sparse.csr_array(weight.reshape(6, -1).numpy())
    for part, expected in zip(("crow_indices", "col_indices", "values"), ("indptr", "indices", "data"), strict=True):
        assert np.array_equal(stored[f"w:{part}"].numpy(), getattr(reference, expected))
    assert stored["w:crow_indices"].dtype is stored["w:col_indices"].dtype is torch.int32
    ours = to_csr(weight)
    assert ours.crow_indices().dtype is torch.int32
    assert torch.equal(ours.to_dense(), weight.reshape(6, -1))
    inputs = torch.randn(7, 18)
    assert torch.allclose((ours @ inputs.T).T, inputs @ weight.reshape(6, -1).T, atol=1e-5)


@pytest.mark.parametrize("weight", [torch.zeros(3), torch.tensor(1.0), torch.zeros(3, 3).long()])
def test_csr_takes_matrices_of_numbers(weight):
    with pytest.raises(ProblemError, match="CSR takes a floating weight"):
        to_csr(weight)


# sizes


@pytest.mark.parametrize("dtype", FLOATS)
def test_sizes_of_a_matrix_are_counted_and_gzip_is_gzip(dtype):
    weight = sparse(30, 70, dtype=dtype)
    found = sizes(weight)
    item, kept = torch.finfo(dtype).bits // 8, int((weight != 0).sum())
    assert found["dense"] == 2100 * item
    assert found["csr"] == kept * (item + 4) + 4 * 31
    assert found["bitmask"] == kept * item + 263
    content = weight.view(torch.int16).numpy().tobytes() if dtype is torch.bfloat16 else weight.numpy().tobytes()
    assert found["gzip"] == len(gzip.compress(content, 6))
    assert found["gzip"] < found["dense"]


def test_a_kernel_counts_as_its_matrix():
    assert sizes(sparse(6, 2, 3, 3)) == sizes(sparse(6, 2, 3, 3).reshape(6, 18))


@pytest.mark.parametrize(
    ("tensor", "expected"),
    [
        (torch.tensor(0.0), {"dense": 4, "csr": 4, "bitmask": 1}),
        (torch.zeros(0, 3), {"dense": 0, "csr": 4, "bitmask": 0}),
        (torch.zeros(16), {"dense": 64, "csr": 64, "bitmask": 2}),
        (-torch.zeros(2, 8), {"dense": 64, "csr": 140, "bitmask": 66}),
        (torch.zeros(2, 8, dtype=torch.int64), {"dense": 128, "csr": 128, "bitmask": 128}),
    ],
)
def test_sizes_of_the_odd_ones(tensor, expected):
    found = sizes(tensor)
    assert found.pop("gzip") > 0
    assert found == expected


def test_sizes_of_a_state_are_the_bytes_in_the_files(tmp_path):
    """What pays is decided per tensor; a state is never larger in a form than dense."""
    state = odd_state()
    found = sizes(state)
    for (write, _), name in zip(FORMS.values(), ("bitmask", "csr"), strict=True):
        write(tmp_path / name, state)
        assert found[name] == sum(tensor.nbytes for tensor in load_file(tmp_path / name).values())
        assert found[name] < found["dense"]
    assert found["dense"] == sum(tensor.nbytes for tensor in state.values())
    assert found["gzip"] == sum(sizes(tensor)["gzip"] for tensor in state.values())
    model = Convolutional()
    assert sizes(model) == sizes(model.state_dict())


def test_the_file_is_smaller_on_the_disk(tmp_path):
    state = {"w": sparse(200, 300, zeros=0.9)}
    save_file(state, tmp_path / "dense")
    write_packed(tmp_path / "packed", state)
    assert (tmp_path / "packed").stat().st_size < 0.15 * (tmp_path / "dense").stat().st_size


# what is refused


@pytest.mark.parametrize(
    ("state", "named"),
    [
        ({"w": [1.0]}, "w is a list"),
        ({"w": torch.eye(3).to_sparse()}, "w is a sparse"),
        ({"w": torch.zeros(3, device="meta")}, "meta"),
        ({"w": torch.zeros(9, 9), "w:values": torch.zeros(3, dtype=torch.int64)}, "'w:values'"),
    ],
)
def test_states_that_cannot_be_written_leave_no_file(form, state, named, tmp_path):
    with pytest.raises(ProblemError, match=named):
        form[0](tmp_path / "a", state)
    assert list(tmp_path.iterdir()) == []


def test_a_file_is_replaced_whole_or_not_at_all(form, tmp_path, monkeypatch):
    write, read = form
    state = {"w": sparse(4, 40)}
    write(tmp_path / "a", state)

    def full(number):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(RunError, match="No space left"):
        write(tmp_path / "a", {"w": torch.ones(4, 40)})
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    assert_same(state, read(tmp_path / "a"))
    with pytest.raises(RunError, match="cannot be written"):
        write(tmp_path / "no folder" / "a", state)


def test_every_truncation_is_refused(form, tmp_path):
    write, read = form
    write(tmp_path / "a", {"w": sparse(4, 40), "b": torch.ones(4)})
    content = (tmp_path / "a").read_bytes()
    for length in range(len(content)):
        (tmp_path / "cut").write_bytes(content[:length])
        with pytest.raises(RunError):
            read(tmp_path / "cut")


def test_foreign_files_are_refused(form, tmp_path):
    write, read = form
    other = next(pair[0] for pair in FORMS.values() if pair[0] is not write)
    other(tmp_path / "other form", {"w": sparse(4, 40)})
    save_file({"w": torch.ones(3)}, tmp_path / "plain")
    save_file({"w": torch.ones(3)}, tmp_path / "list", {"about": "[]"})
    save_file({"w": torch.ones(3)}, tmp_path / "no json", {"about": "{"})
    (tmp_path / "text").write_text("hello, this is no tensor")
    (tmp_path / "folder").mkdir()
    for name in ("other form", "plain", "list", "no json", "text", "folder", "missing"):
        with pytest.raises(RunError, match=str(tmp_path / name)) as caught:
            read(tmp_path / name)
        assert "\n" not in str(caught.value)


DAMAGE = {
    "version": lambda t, a: a.update(version=2),
    "tensors": lambda t, a: a.update(tensors=["w"]),
    "no tensors": lambda t, a: a.pop("tensors"),
    "shape": lambda t, a: a["tensors"]["w"].update(shape=[5, 40]),
    "shape of one more row": lambda t, a: a["tensors"]["w"].update(shape=[5, 39]),
    "negative": lambda t, a: a["tensors"]["w"].update(shape=[-4, -40]),
    "text": lambda t, a: a["tensors"]["w"].update(shape="4, 40"),
    "none": lambda t, a: a["tensors"]["w"].update(shape=None),
    "scalar": lambda t, a: a["tensors"]["w"].update(shape=[]),
    "dtype": lambda t, a: a["tensors"]["w"].update(dtype="float16"),
    "unknown dtype": lambda t, a: a["tensors"]["w"].update(dtype="float7"),
    "entry": lambda t, a: a["tensors"].update(w=3),
    "unknown": lambda t, a: a["tensors"].update(v={"shape": [1], "dtype": "float32"}),
    "twice": lambda t, a: t.update(w=torch.ones(4, 40)),
    "values": lambda t, a: t.update({"w:values": t["w:values"][:-1].clone()}),
    "values as a matrix": lambda t, a: t.update({"w:values": t["w:values"][None]}),
}
DAMAGE_PACKED = {
    "wider": lambda t, a: a["tensors"]["w"].update(shape=[4, 41]),
    "bit": lambda t, a: t["w:bitmask"].__setitem__(3, t["w:bitmask"][3] ^ 1),
    "behind": lambda t, a: t["w:bitmask"].__setitem__(-1, t["w:bitmask"][-1] | 128),
    "mask kind": lambda t, a: t.update({"w:bitmask": t["w:bitmask"].char()}),
    "mask missing": lambda t, a: t.pop("w:bitmask"),
}
DAMAGE_CSR = {
    # one number is stretched over all columns by whoever adds without counting
    "one column, and more of them": lambda t, a: (
        t["w:crow_indices"].copy_(torch.tensor([0, 1, 1, 1, 1])),
        t["w:col_indices"].copy_(torch.arange(len(t["w:values"]))),
    ),
    "start": lambda t, a: t["w:crow_indices"].__setitem__(0, 1),
    "end": lambda t, a: t["w:crow_indices"].__setitem__(-1, 2),
    "falling": lambda t, a: t["w:crow_indices"].__setitem__(1, t["w:crow_indices"][2] + 1),
    "starts kind": lambda t, a: t.update({"w:crow_indices": t["w:crow_indices"].long()}),
    "below": lambda t, a: t["w:col_indices"].__setitem__(0, -1),
    # which would be the first place of the next row
    "above": lambda t, a: t["w:col_indices"].__setitem__(int(t["w:crow_indices"][1]) - 1, 39),
    "column twice": lambda t, a: t["w:col_indices"].__setitem__(1, t["w:col_indices"][0]),
    "columns kind": lambda t, a: t.update({"w:col_indices": t["w:col_indices"].long()}),
    "columns as a matrix": lambda t, a: t.update({"w:col_indices": t["w:col_indices"][:, None]}),
}


@pytest.mark.parametrize(
    ("name", "damage"),
    [(name, damage) for name in FORMS for damage in DAMAGE]
    + [("packed", damage) for damage in DAMAGE_PACKED]
    + [("csr", damage) for damage in DAMAGE_CSR],
)
def test_damage_is_refused_in_one_sentence(name, damage, tmp_path):
    write, read = FORMS[name]
    # 39 columns: the last byte of the bitmask is not full
    write(tmp_path / "a", {"w": sparse(4, 39)})
    tensors = load_file(tmp_path / "a")
    # the same keys as the damages name
    about = {"form": f"nettrim {name}", "version": 1, "tensors": {"w": {"shape": [4, 39], "dtype": "float32"}}}
    save_file(tensors, tmp_path / "b", {"about": json.dumps(about)})
    assert torch.equal(read(tmp_path / "b")["w"], sparse(4, 39))
    (DAMAGE | DAMAGE_PACKED | DAMAGE_CSR)[damage](tensors, about)
    save_file(tensors, tmp_path / "b", {"about": json.dumps(about)})
    with pytest.raises(RunError, match=r"is damaged|is not of the form") as caught:
        read(tmp_path / "b")
    assert "\n" not in str(caught.value)


# torch's own masks


def test_torch_keeps_the_zeros_while_it_trains():
    model = Convolutional()
    model.norm.eval()
    before = copy.deepcopy(model.state_dict())
    masks = {
        "conv": model.conv.weight != 0,
        "fc.weight": model.fc.weight != 0,
        "fc.bias": torch.tensor([True] * 4 + [False]),
    }
    tuned = apply_prune_masks(model, masks)
    assert torch_prune.is_pruned(tuned)
    assert not torch_prune.is_pruned(model)
    assert not tuned.norm.training
    assert tuned.conv.training
    images = torch.randn(8, 2, 6, 6)
    optimiser = torch.optim.SGD(tuned.parameters(), lr=1e-3, momentum=0.9)
    for _ in range(3):
        optimiser.zero_grad()
        tuned(images).square().sum().backward()
        optimiser.step()
    tuned(images)  # torch multiplies by the mask before a forward
    for layer, parameter, mask in ((tuned.conv, "weight", masks["conv"]), (tuned.fc, "weight", masks["fc.weight"])):
        torch_prune.remove(layer, parameter)
        weight = getattr(layer, parameter)
        assert (weight[~mask] == 0).all()
        assert (weight[mask] != 0).all()
    assert float(tuned.fc.bias.detach()[4]) == 0
    assert not torch.equal(tuned.conv.weight, model.conv.weight)
    assert_same(dict(before), dict(model.state_dict()))


def test_the_outputs_are_those_of_the_pruned_model(network):
    with torch.no_grad():
        network[0].weight.copy_(sparse(16, 12))
    network.eval()
    masks = {"0": network[0].weight != 0}
    inputs = torch.randn(5, 12)
    assert torch.equal(apply_prune_masks(network, masks)(inputs), network(inputs))


def test_a_model_that_is_one_layer_has_the_empty_name():
    layer = nn.Linear(6, 3)
    mask = torch.rand(3, 6) > 0.5
    for name in ("", "weight"):
        twin = apply_prune_masks(layer, {name: mask})
        assert torch.equal(twin.weight != 0, mask)


def tied():
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    model[2].weight = model[0].weight
    return model


def test_a_shared_weight_is_masked_wherever_it_stands():
    mask = torch.eye(4) > 0
    twin = apply_prune_masks(tied(), {"2": mask})
    twin(torch.randn(2, 4)).sum().backward()
    for layer in (twin[0], twin[2]):
        assert torch.equal(layer.weight != 0, mask)
    assert twin[0].weight_orig is twin[2].weight_orig
    with pytest.raises(ProblemError, match=r"'0' and '2.weight' are of one parameter"):
        apply_prune_masks(tied(), {"0": mask, "2.weight": mask})


@pytest.mark.parametrize(
    ("masks", "error", "named"),
    [
        ({"9": torch.ones(2, 2) > 0}, UnknownNameError, "'9'"),
        ({"1": torch.ones(2, 2) > 0}, UnknownNameError, "neither a layer with a weight"),
        ({"0": torch.ones(16, 12)}, ProblemError, "torch.float32"),
        ({"0": torch.ones(12, 16) > 0}, ProblemError, r"\(16, 12\)"),
        ({"0": None}, ProblemError, "None"),
        ({"0": torch.ones(16, 12) > 0, "0.weight": torch.ones(16, 12) > 0}, ProblemError, "one parameter"),
    ],
)
def test_masks_that_do_not_fit_are_refused(network, masks, error, named):
    with pytest.raises(error, match=named):
        apply_prune_masks(network, masks)


def test_what_is_masked_already_is_refused(network):
    twin = apply_prune_masks(network, {"0": torch.ones(16, 12) > 0})
    twin.train()(torch.randn(2, 12))
    with pytest.raises(UnsupportedError, match=r"prune\.remove"):
        apply_prune_masks(twin, {"0": torch.ones(16, 12) > 0})


def test_the_sentence_on_speed_is_one():
    assert SPEED.count(". ") == 0
    assert SPEED.endswith(".")
    assert "90 % zeros" in SPEED
