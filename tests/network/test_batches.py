"""Batches of every form are read once, checked, held or spooled within memory, and come back the same at every pass."""

from __future__ import annotations

import contextlib
import copy
import errno
import gc
import io
import itertools
import os
import pickle
import resource
import subprocess
import sys
import tempfile
import textwrap
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch.utils.data import DataLoader, TensorDataset

from nettrim.errors import ProblemError, RunError
from nettrim.network.batches import Batch, Batches, read_batches, require_finite

X = torch.randn(7, 3, generator=torch.Generator().manual_seed(0))
Y = torch.arange(7) % 2


def stream(batches):
    """The same batches, but nothing that could be held by reference."""
    yield from batches


def joined(batches):
    return torch.cat([batch.inputs[0] for batch in batches])


# ---------------------------------------------------------------------------------------------------- reading


@pytest.mark.parametrize("memory_limit", [None, 1, 4 * 48])
@pytest.mark.parametrize(
    ("batches", "labelled"),
    [
        (lambda: [X[:4], X[4:]], False),
        (lambda: (X[:4], X[4:]), False),
        (lambda: (part for part in (X[:4], X[4:])), False),
        (lambda: [(X[:4], Y[:4]), [X[4:], Y[4:]]], True),
        (lambda: stream([(X[:4], Y[:4]), [X[4:], Y[4:]]]), True),
        (lambda: [(X[:4],), (X[4:],)], False),
        (lambda: [{"x": X[:4], "target": Y[:4]}, {"inputs": X[4:], "labels": Y[4:]}], True),
        (lambda: [X[:4].numpy(), X[4:].numpy()], False),
        (lambda: stream([X[:4].numpy(), X[4:].numpy()]), False),
        (lambda: DataLoader(TensorDataset(X, Y), batch_size=4), True),
    ],
)
def test_every_form_is_read(batches, labelled, memory_limit):
    with read_batches(batches(), memory_limit=memory_limit) as read:
        assert [len(batch) for batch in read] == [4, 3]
        assert (len(read), read.rows, read.has_labels) == (2, 7, labelled)
        assert read.shapes == {"inputs[0]": (3,)}
        assert read.nbytes == 7 * 3 * 4 + (7 * 8 if labelled else 0)
        assert torch.equal(joined(read), X)
        if labelled:
            assert torch.equal(torch.cat([batch.labels for batch in read]), Y)
            assert torch.equal(read.labels(), Y)
        else:
            assert [batch.labels for batch in read] == [None, None]
            assert read.labels() is None
        assert read.digest() == read_batches([(X, Y)] if labelled else [X]).digest()


def test_other_keys_are_keyword_inputs():
    read = read_batches([{"scale": X, "mask": Y}])
    (batch,) = read
    assert batch.inputs == ()
    assert set(batch.kwargs) == {"scale", "mask"}
    assert len(batch) == 7
    assert read.shapes == {"scale": (3,), "mask": ()}


def test_read_only_and_reversed_arrays_are_copied():
    array = np.arange(6.0).reshape(3, 2)[::-1]
    array.flags.writeable = False
    (batch,) = read_batches([array])
    assert batch.inputs[0].tolist() == [[4, 5], [2, 3], [0, 1]]
    (batch,) = read_batches([np.arange(6.0).reshape(3, 2).T])
    assert batch.inputs[0].tolist() == [[0, 2, 4], [1, 3, 5]]


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.uint32, np.uint64, ">u2"])
@pytest.mark.parametrize("memory_limit", [None, 1])
def test_unsigned_labels_are_classes(dtype, memory_limit):
    pairs = [(X, Y.numpy().astype(dtype)), (X, torch.from_numpy(Y.numpy().astype(np.uint16)))]
    read = read_batches(stream(pairs), memory_limit=memory_limit)
    first, second = read
    assert torch.equal(torch.cat([first.labels, second.labels]), torch.cat([Y, Y]))
    assert second.labels.dtype == read.labels().dtype == torch.int64
    assert torch.equal(read.labels(), torch.cat([Y, Y]))
    assert torch.equal(read.select(torch.tensor([0, 1, 8])).labels, torch.tensor([0, 1, 1]))
    assert read.digest() == read_batches([(X, Y), (X, Y)]).digest()


def test_integer_and_floating_labels_join_as_floats():
    read = read_batches([(X, Y), (X, Y + 0.5)])
    assert torch.equal(read.labels(), torch.cat([Y.float(), Y + 0.5]))


def test_long_doubles_become_doubles():
    (batch,) = read_batches([X.numpy().astype(np.longdouble)])
    assert torch.equal(batch.inputs[0], X.double())


def test_reading_twice_changes_nothing():
    read = read_batches([(X, Y)])
    assert read_batches(read) is read
    assert read_batches(list(read))[0] is read[0]


BAD = X.clone()
BAD[2, 1] = torch.nan
BAD[5, 0] = -torch.inf
TOKENS = torch.arange(6).reshape(3, 2)


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
        ([(X, torch.tensor(1))], r"'label'.*shape \(\), so no rows"),
        ([{"x": X, "mask": Y[:2]}], r"7 rows of input and 2 of 'mask'"),
        ([(X, Y), (X, None)], "'label'.*is a NoneType"),
        ([(X, Y), X], r"batches\[0\] and batches\[1\] only one has labels"),
        ([X, (X, Y)], r"batches\[0\] and batches\[1\] only one has labels"),
        ([(X, Y, Y)], "tuple of 3 entries"),
        ([()], "tuple of 0 entries"),
        ([{"label": Y}], "holds no input"),
        ([{"x": X, "input": X}], "twice, as 'input' and 'x'"),
        ([{"x": X, "label": Y, "targets": Y}], "labels twice"),
        ([[[1.0, 2.0]]], "is a list"),
        ([np.array(["a", "b"])], "is a <U1 array"),
        ([TOKENS.to(torch.uint8)], r"torch.uint8.*\.float\(\)"),
        ([TOKENS > 2], r"torch.bool.*\.float\(\)"),
        ([Y], r"torch.int64.*\.float\(\)"),
        ((X, Y), r"torch.int64.*write \[\(input, label\)\]"),
        ((X, Y[:, None]), r"batches\[0\] is torch.float32 and of batches\[1\] torch.int64.*write \[\(input, label\)\]"),
        ([X, X.double()], r"batches\[1\] torch.float64; convert all batches to one dtype"),
        ([X, X[:, :2]], r"shape \(3,\) in batches\[0\] and \(2,\) in batches\[1\].*pad sequences to one length"),
        ([{"a": X, "b": X}, {"a": X, "b": X[:, None]}], r"kwargs.b has shape \(3,\).*\(1, 3\) in batches\[1\]"),
        ([{"x": X}, {"x": X, "b": X}], r"batches\[1\] inputs\[0\], kwargs.b; give all batches the same inputs"),
        ([(X, Y * 1j)], r"labels of batches\[0\] are torch.complex64; pass real numbers"),
        ([(X, Y), (X, Y[:, None])], r"batches\[0\] have shape \(7,\) and those of batches\[1\] \(7, 1\)"),
        ([(X, np.full(7, 2**63, dtype=np.uint64))], r"'label'.*holds integers of 2\*\*63 or more"),
        ([X.to_sparse()], r"batches\[0\].*is a sparse, nested, quantized or meta tensor"),
        ([torch.ones(2, 3, device="meta")], "meta tensor; pass a plain dense one"),
        ([np.ma.masked_array(X.numpy(), X.numpy() > 0)], "masked array"),
        ([np.full((2, 3), 2, dtype=np.longdouble) ** 2000], "6 NaN or infinite"),
        ([Batch(())], "holds no input"),
        ([Batch((X[:0],))], "no rows"),
        ([Batch((X, X[:5]))], r"7 rows of input and 5 of 'inputs\[1\]'"),
    ],
)
def test_what_is_not_fit_is_refused(batches, said):
    with pytest.raises(ProblemError, match=said):
        read_batches(batches)


def test_the_argument_is_called_by_its_name():
    with pytest.raises(ProblemError, match=r"held_out\[0\]"):
        read_batches([BAD], name="held_out")


@pytest.mark.parametrize("key", ["memory_limit", "chunk"])
@pytest.mark.parametrize("value", [0, -1, 1.5, True])
def test_settings_are_positive(key, value):
    with pytest.raises(ProblemError, match=f"{key} is {value}; pass a whole number"):
        read_batches([X], **{key: value})


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_token_ids_are_inputs(dtype):
    tokens = TOKENS.to(dtype)
    assert torch.equal(read_batches([tokens])[0].inputs[0], tokens)
    read = read_batches([{"input_ids": tokens, "attention_mask": tokens > 1}])
    assert read[0].inputs == ()
    assert read.shapes == {"input_ids": (2,), "attention_mask": (2,)}


def test_bad_entries_are_counted_in_every_piece():
    large = torch.zeros(3, 1 << 20, 4)  # 16 MiB a row, so three pieces
    large[0, 0, 0] = large[2, -1, -1] = torch.inf
    with pytest.raises(ProblemError, match=r"^it has 2 NaN or infinite entries of 12582912"):
        require_finite(large, "it")
    with pytest.raises(ProblemError, match=r"^it has 1 NaN or infinite entries of 1"):
        require_finite(torch.tensor(torch.nan), "it")
    with pytest.raises(ProblemError, match=r"^it has 1 NaN or infinite entries of 21"):
        require_finite(torch.where(BAD.isnan(), BAD, X).to(torch.float8_e4m3fn), "it")
    require_finite(X.to(torch.float8_e4m3fn), "it")


# ------------------------------------------------------------------------------------------- holding and spooling


def test_a_list_is_held_by_reference_whatever_its_size(tmp_path):
    array = X[4:].numpy().copy()
    read = read_batches([X[:4], array], memory_limit=1, directory=tmp_path)
    assert not read.spooled
    assert list(tmp_path.iterdir()) == []
    assert read[0].inputs[0].data_ptr() == X.data_ptr()
    assert read[1].inputs[0].data_ptr() == array.ctypes.data
    assert read[1] is read[1]


def test_what_fits_is_held_and_the_rest_spooled(tmp_path):
    size = X.nbytes
    read = read_batches(stream([X + i for i in range(5)]), memory_limit=4 * 3 * size, directory=tmp_path)
    assert read.spooled
    (directory,) = tmp_path.iterdir()
    assert sorted(path.name for path in directory.iterdir()) == ["3.safetensors", "4.safetensors"]
    assert not read_batches(stream([X] * 3), memory_limit=4 * 3 * size).spooled
    assert read_batches(stream([X] * 3), memory_limit=4 * 3 * size - 1).spooled
    for i in (0, 3, 4, -1, -5):
        assert torch.equal(read[i].inputs[0], X + i % 5)
    assert [torch.equal(batch.inputs[0], X + i) for i, batch in zip((1, 3), read[1:4:2], strict=True)] == [True, True]
    with pytest.raises(IndexError):
        read[5]
    assert torch.equal(joined(read), joined(read))


def test_a_stream_may_reuse_its_memory(tmp_path):
    def reusing():
        buffer = torch.empty(2, 3)
        for i in range(4):
            yield buffer.fill_(i)

    for limit in (4 * 2 * 24, 1 << 20):
        read = read_batches(reusing(), memory_limit=limit)
        assert joined(read)[:, 0].tolist() == [0, 0, 1, 1, 2, 2, 3, 3]


def test_a_batch_is_let_go_before_the_next_is_made():
    # an iterator of objects, because a generator would hold what it yielded by its own name while it is asked for more
    class Made:
        def __init__(self):
            self.last = None
            self.left = 4

        def __iter__(self):
            return self

        def __next__(self):
            assert self.last is None or self.last() is None
            if not self.left:
                raise StopIteration
            self.left -= 1
            made = np.ones((2, 3))
            self.last = weakref.ref(made)
            return made

    for limit in (1, None):
        assert read_batches(Made(), memory_limit=limit).rows == 8


def test_a_generator_is_read_once_and_a_shuffling_loader_gives_one_order():
    calls = []

    def counted():
        for i in range(4):
            calls.append(i)
            yield X + i

    read = read_batches(counted(), memory_limit=1)
    assert torch.equal(joined(read), torch.cat([X + i for i in range(4)]))
    read.digest()
    assert calls == [0, 1, 2, 3]
    loader = DataLoader(TensorDataset(torch.arange(64.0)[:, None]), batch_size=8, shuffle=True)
    for limit in (1, None):
        read = read_batches(loader, memory_limit=limit)
        order = joined(read)
        assert not torch.equal(order, order.sort(0).values)
        assert torch.equal(joined(read), order)
        assert torch.equal(order.sort(0).values[:, 0], torch.arange(64.0))


def test_the_spool_goes_on_close_and_on_collection(tmp_path):
    read = read_batches(stream([X, X]), memory_limit=4 * X.nbytes, directory=tmp_path)
    assert len(list(tmp_path.rglob("*.safetensors"))) == 1
    read.close()
    read.close()
    assert list(tmp_path.iterdir()) == []
    assert torch.equal(read[0].inputs[0], X)
    with pytest.raises(RunError, match=r"1\.safetensors cannot be read.*read the batches again"):
        read[1]
    with read_batches(stream([X]), memory_limit=1, directory=tmp_path):
        assert len(list(tmp_path.iterdir())) == 1
    assert list(tmp_path.iterdir()) == []
    read = read_batches(stream([X]), memory_limit=1, directory=tmp_path)
    assert len(list(tmp_path.iterdir())) == 1
    del read
    gc.collect()
    assert list(tmp_path.iterdir()) == []


def test_the_spool_goes_when_the_interpreter_ends(tmp_path):
    code = """
        import sys, torch
        from pathlib import Path
        from nettrim.network.batches import read_batches
        kept = read_batches((torch.ones(2, 3) for _ in range(2)), memory_limit=1, directory=Path(sys.argv[1]))
        print(len(list(Path(sys.argv[1]).iterdir())))
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), str(tmp_path)], capture_output=True, text=True, check=True
    )
    assert done.stdout == "1\n"
    assert done.stderr == ""
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_worker_leaves_the_spool(tmp_path):
    read = read_batches(stream([X]), memory_limit=1, directory=tmp_path)
    worker = os.fork()
    if not worker:
        read.close()
        os._exit(0)
    assert os.waitpid(worker, 0)[1] == 0
    assert torch.equal(read[0].inputs[0], X)


@pytest.mark.parametrize("limit", [1, None])
def test_a_copy_reads_the_same_files_and_leaves_them(limit):
    read = read_batches(stream([(X, Y)]), memory_limit=limit)
    known = read.digest()
    for copied in (copy.deepcopy(read), pickle.loads(pickle.dumps(read))):
        assert torch.equal(copied[0].inputs[0], X)
        assert copied.digest() == known
        copied.close()
    del copied
    gc.collect()
    assert torch.equal(read[0].inputs[0], X)


class Odd(BaseException):
    pass


@pytest.mark.parametrize("error", [Odd("mine"), ValueError("mine"), OSError(errno.ENOSPC, "mine")])
def test_the_exception_of_a_stream_passes_unchanged_and_leaves_nothing(tmp_path, error):
    def failing():
        yield X
        assert len(list(tmp_path.rglob("*.safetensors"))) == 1
        raise error

    with pytest.raises(type(error)) as caught:
        read_batches(failing(), memory_limit=1, directory=tmp_path)
    assert caught.value is error
    assert list(tmp_path.iterdir()) == []


def test_a_refused_batch_leaves_nothing(tmp_path):
    with pytest.raises(ProblemError, match=r"batches\[2\]"):
        read_batches(stream([X, X, BAD]), memory_limit=1, directory=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_directory_that_cannot_be_written_is_named(tmp_path, monkeypatch):
    wanted = tmp_path / "absent"
    with pytest.raises(RunError, match=rf"{wanted} cannot take the rest \(No such file.*TMPDIR") as caught:
        read_batches(stream([X]), memory_limit=1, directory=wanted)
    assert str(caught.value).count(". ") == 0
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", None)
    with read_batches(stream([X]), memory_limit=1) as read:
        assert read.spooled
        assert len(list(tmp_path.iterdir())) == 1
    assert not (tmp_path / "absent").exists()


@contextlib.contextmanager
def files_of_at_most(count):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (count, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_is_one_sentence_and_leaves_nothing(tmp_path):
    # a limit of the size of files fails in the middle of writing, as a full disk does
    with files_of_at_most(1 << 16), pytest.raises(RunError) as caught:
        read_batches(stream([X, torch.ones(1 << 15, 3)]), "held_out", memory_limit=1, directory=tmp_path)
    said = str(caught.value)
    assert said.startswith("held_out takes more")
    assert str(tmp_path) in said
    assert "File too large" in said
    assert "TMPDIR" in said
    assert list(tmp_path.iterdir()) == []


def test_the_files_are_safetensors(tmp_path):
    read = read_batches(stream([(X.T, Y[:3])]), memory_limit=1, directory=tmp_path)
    (path,) = tmp_path.rglob("*.safetensors")
    stored = load_file(path)
    assert torch.equal(stored["inputs[0]"].view(torch.float32).reshape(3, 7), X.T)
    assert torch.equal(stored["labels"].view(torch.int64), Y[:3])
    assert torch.equal(read[0].inputs[0], X.T)


def test_a_truncated_file_is_not_read_as_numbers(tmp_path):
    read = read_batches(stream([X]), memory_limit=1, directory=tmp_path)
    (path,) = tmp_path.rglob("*.safetensors")
    os.truncate(path, path.stat().st_size - 1)
    with pytest.raises(RunError, match="it is truncated"):
        read[0]


@pytest.mark.parametrize(
    "dtype",
    [
        *(torch.float64, torch.float16, torch.bfloat16, torch.float8_e4m3fn),
        *(torch.bool, torch.uint8, torch.int32, torch.complex128),
    ],
)
@pytest.mark.parametrize("shape", [(5,), (5, 2, 3), (5, 0)])
def test_every_dtype_and_shape_survives_the_spool(dtype, shape):
    value = (torch.randn(shape) * 3).to(dtype)
    with read_batches(stream([{"x": X[:5], "value": value}]), memory_limit=1) as read:
        found = read[0].kwargs["value"]
        assert found.dtype == dtype
        assert found.shape == value.shape
        assert found.tolist() == value.tolist()
        assert [chunk.kwargs["value"].tolist() for chunk in read.chunks(2)] == [
            value[:2].tolist(),
            value[2:4].tolist(),
            value[4:].tolist(),
        ]


def test_views_and_shared_memory_survive_the_spool():
    wide = torch.randn(4, 6)
    z = torch.randn(4, 2, dtype=torch.complex64)
    kwargs = {"odd": wide[:, 1::2], "again": wide[:, 1::2], "same": wide, "wide": z[:1].expand(4, 2), "conj": z.conj()}
    batch = Batch((wide, wide.T[:4]), kwargs, wide[:, 0].requires_grad_())
    (read,) = read_batches(stream([batch]), memory_limit=1)
    assert len(read.inputs) == 2
    assert torch.equal(read.inputs[1], wide.T[:4])
    assert list(read.kwargs) == list(kwargs)
    for key, tensor in kwargs.items():
        assert torch.equal(read.kwargs[key], tensor), key
    assert torch.equal(read.labels, batch.labels)
    assert not read.labels.requires_grad


def test_a_keyword_input_may_be_called_labels():
    for limit in (1, None):
        read = read_batches(stream([Batch((X,), {"labels": X * 2}, Y)]), memory_limit=limit)
        assert torch.equal(read[0].kwargs["labels"], X * 2)
        assert torch.equal(read.labels(), Y)
        assert read.shapes == {"inputs[0]": (3,), "labels": (3,)}


# ------------------------------------------------------------------------------------------- chunks, select, first


PARTS = [{"x": X[a:b], "mask": Y[a:b] > 0, "label": Y[a:b]} for a, b in ((0, 1), (1, 5), (5, 7))]
LIMITS = [None, 1, 4 * 21]  # all held; all spooled; the first batch (21 bytes) held


@pytest.mark.parametrize("limit", LIMITS)
@pytest.mark.parametrize(
    ("rows", "sizes"), [(1, [1] * 7), (2, [1, 2, 2, 2]), (3, [1, 3, 1, 2]), (4, [1, 4, 2]), (99, [1, 4, 2])]
)
def test_chunks_cut_but_never_join(limit, rows, sizes):
    read = read_batches(stream(PARTS), memory_limit=limit, chunk=rows)
    for chunks in (list(read.chunks(rows)), list(read.chunks())):
        assert [len(chunk) for chunk in chunks] == sizes
        assert torch.equal(joined(chunks), X)
        assert torch.equal(torch.cat([chunk.kwargs["mask"] for chunk in chunks]), Y > 0)
        assert torch.equal(torch.cat([chunk.labels for chunk in chunks]), Y)


def test_chunks_of_what_is_in_memory_are_views():
    read = read_batches([X])
    assert [chunk is read[0] for chunk in read.chunks()] == [True]
    pointers = [chunk.inputs[0].data_ptr() for chunk in read.chunks(3)]
    assert pointers == [X[i].data_ptr() for i in (0, 3, 6)]
    with pytest.raises(ProblemError, match="rows is 0"):
        read.chunks(0)


@given(st.lists(st.integers(0, 6), min_size=1, max_size=12), st.sampled_from(LIMITS))
def test_select_is_indexing_of_all_samples(chosen, limit):
    rows = torch.tensor(sorted(chosen))
    with read_batches(stream(PARTS), memory_limit=limit) as read:
        batch = read.select(rows)
    assert torch.equal(batch.inputs[0], X[rows])
    assert torch.equal(batch.kwargs["mask"], Y[rows] > 0)
    assert torch.equal(batch.labels, Y[rows])


def test_select_reads_no_file_twice_and_no_other(monkeypatch):
    read = read_batches(stream([X[i : i + 1] for i in range(7)]), memory_limit=1)
    opened, real = [], Path.open

    def spy(self, *args, **kwargs):
        opened.append(self.name)
        return real(self, *args, **kwargs)

    monkeypatch.setattr(Path, "open", spy)
    read.select(torch.tensor([2, 2, 5]))
    assert opened == ["2.safetensors", "5.safetensors"]


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        (torch.tensor([1, 0]), "ascending"),
        (torch.tensor([0, 7]), "from 0 to 7 where batches has 7 samples"),
        (torch.tensor([-1, 0]), "from -1 to 0"),
        (torch.tensor([], dtype=torch.int64), r"shape \(0,\)"),
        (torch.tensor([[1]]), r"shape \(1, 1\)"),
        (torch.tensor([1.0]), "torch.float32"),
        (torch.ones(7, dtype=torch.bool), "torch.bool"),
        ([0, 1], "is a list"),
    ],
)
def test_select_refuses_what_are_no_sample_numbers(rows, said):
    with pytest.raises(ProblemError, match=said):
        read_batches(PARTS).select(rows)


@pytest.mark.parametrize("limit", LIMITS)
def test_first_gives_the_first_samples_or_all(limit):
    read = read_batches(stream(PARTS), memory_limit=limit)
    for rows in (1, 3, 6, 7, 100):
        assert torch.equal(read.first(rows).inputs[0], X[:rows])
        assert torch.equal(read.first(rows).labels, Y[:rows])
    with pytest.raises(ProblemError, match="rows is 0"):
        read.first(0)


# ----------------------------------------------------------------------------------------------------- fingerprint


@given(st.sets(st.integers(1, 6)), st.sampled_from(LIMITS), st.booleans())
def test_the_digest_does_not_depend_on_the_batching(cuts, limit, listed):
    bounds = [0, *sorted(cuts), 7]
    parts = [{"x": X[a:b], "label": Y[a:b], "m": (Y > 0)[a:b]} for a, b in itertools.pairwise(bounds)]
    whole = read_batches([{"m": Y > 0, "x": X.clone(), "target": Y.to(torch.uint8)}]).digest()
    with read_batches(parts if listed else stream(parts), memory_limit=limit) as read:
        assert read.digest() == read.digest() == whole
    assert len(whole) == 64


def changed_bit():
    changed = X.clone()
    changed.view(torch.int32)[6, 2] ^= 1
    return changed


@pytest.mark.parametrize(
    "other",
    [
        {"x": changed_bit(), "label": Y},
        {"x": X.flip(0), "label": Y},
        {"x": X.double(), "label": Y},
        {"x": X.view(torch.int32), "label": Y},
        {"x": X[:, None], "label": Y},
        {"x": X[:6], "label": Y[:6]},
        {"x": X, "label": Y.flip(0) + 1},
        {"x": X, "label": Y.float()},
        {"x": X, "label": Y[:, None]},
        {"x": X},
        {"y": X, "label": Y},
        {"x": X, "label": Y, "m": Y},
    ],
)
def test_the_digest_sees_every_change(other):
    known = read_batches([{"x": X, "label": Y}]).digest()
    found = {read_batches(stream([other]), memory_limit=limit).digest() for limit in (1, None)}
    assert len(found) == 1
    assert known not in found


def test_a_large_batch_is_hashed_in_pieces_as_one():
    large = torch.arange(3 << 20, dtype=torch.float64).reshape(-1, 4)  # 24 MiB
    assert read_batches([large]).digest() == read_batches([large[:1], large[1:]]).digest()


# ---------------------------------------------------------------------------------------------- memory and the bar


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_a_stream_stays_within_its_memory_limit(tmp_path):
    # the kernel's own figure, as that of getrusage begins with this process's; 20 * 64 MiB in batches of 4 MiB,
    # then two passes, the labels, and a selection
    code = """
        import sys, torch
        from pathlib import Path
        from nettrim.network.batches import read_batches

        def peak():
            status = Path("/proc/self/status").read_text()
            return 1024 * int(status.split("VmHWM:")[1].split()[0])

        def batches(count):
            for i in range(count):
                yield torch.full((1024, 1024), float(i)), torch.full((1024,), i)

        limit = 64 << 20
        read_batches(batches(1)).digest()
        before = peak()
        with read_batches(batches(320), memory_limit=limit, directory=Path(sys.argv[1])) as read:
            spooling = peak() - before
            assert read.nbytes > 20 * limit and read.spooled
            total = sum(float(batch.inputs[0][0, 0]) for batch in read)
            total += sum(float(chunk.inputs[0][0, 0]) for chunk in read.chunks(512))
            assert total == 3 * sum(range(320)), total
            assert read.labels()[::1024].tolist() == list(range(320))
            assert read.select(torch.arange(0, 320 * 1024, 1024)).inputs[0][:, 0].tolist() == list(range(320))
        print(spooling, peak() - before)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), str(tmp_path)],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    print(done.stdout)
    spooling, whole = map(int, done.stdout.split())
    # the quarter for batches, the batch at hand, and the allocator's slack
    assert spooling < (16 + 4 + 8) * 2**20
    assert whole < 64 * 2**20
    assert list(tmp_path.iterdir()) == []


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize(
    ("error_stream", "progress", "shown"),
    [(Terminal, True, True), (Terminal, False, False), (io.StringIO, True, False)],
)
def test_a_bar_is_shown_on_a_terminal_that_asked_for_it(monkeypatch, error_stream, progress, shown):
    screen = error_stream()
    monkeypatch.setattr(sys, "stderr", screen)
    read_batches(stream([X, X]), "held_out", progress=progress)
    assert ("read held_out" in screen.getvalue()) is shown
    assert isinstance(read_batches([X], progress=progress), Batches)
