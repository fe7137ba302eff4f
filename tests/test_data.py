"""Data sets load whole or not at all; nothing is fetched unasked."""

from __future__ import annotations

import gzip
import hashlib
import io
import os
import sys
from pathlib import Path
from urllib.error import URLError

import numpy as np
import pytest
import torch

from nettrim import data
from nettrim.data import load
from nettrim.errors import DataError, MissingExtraError

REAL = Path(os.environ.get("NETTRIM_DATA", Path(__file__).resolve().parents[2] / "shared" / "data"))


def idx(array: np.ndarray) -> bytes:
    return np.array([2048 + array.ndim, *array.shape], dtype=">i4").tobytes() + array.tobytes()


def mnist_files(train: int = 5, test: int = 3) -> dict[str, bytes]:
    draw = np.random.default_rng(0)
    files = {}
    for stem, rows in (("train", train), ("t10k", test)):
        files[f"{stem}-images-idx3-ubyte"] = idx(draw.integers(0, 256, (rows, 28, 28), dtype=np.uint8))
        files[f"{stem}-labels-idx1-ubyte"] = idx(draw.integers(0, 10, rows, dtype=np.uint8))
    return files


def write(directory: Path, files: dict[str, bytes]) -> Path:
    directory.mkdir(exist_ok=True)
    for name, content in files.items():
        (directory / name).write_bytes(content)
    return directory


# ---- specs and digits ------------------------------------------------------------------------------------


@pytest.mark.parametrize("spec", ["", "digit", "mnist", "mnist:", "cifar100:here", "file.npy", Path("digits.csv")])
def test_an_unknown_spec_lists_the_forms(spec):
    with pytest.raises(DataError, match=r"digits, mnist:DIR, cifar10:DIR or FILE\.npz"):
        load(spec)


def test_digits():
    digits = load("digits")
    assert (digits.name, digits.train.name, digits.test.name) == ("digits", "train", "test")
    assert digits.train.inputs.shape == (1200, 64)
    assert digits.test.inputs.shape == (597, 64)
    assert digits.train.inputs.dtype == torch.float32
    assert digits.train.labels.dtype == torch.int64
    assert (digits.train.inputs.min(), digits.train.inputs.max()) == (0, 1)
    # every class has its tenth or so in both splits
    for split in (digits.train, digits.test):
        assert (split.labels.bincount(minlength=10) / len(split.labels) - 0.1).abs().max() < 0.03


def test_the_digits_split_is_fixed_and_loses_no_row():
    from sklearn.datasets import load_digits

    digits = load("digits")
    assert digits.test.labels[:8].tolist() == load("digits").test.labels[:8].tolist()
    rows = torch.cat([digits.train.inputs, digits.test.inputs]).mul(16).int().tolist()
    assert sorted(rows) == sorted(load_digits().data.astype(int).tolist())


def test_digits_without_scikit_learn_name_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(MissingExtraError, match=r"pip install nettrim\[demo\]"):
        load("digits")


# ---- MNIST -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("zipped", [False, True])
@pytest.mark.parametrize("dotted", [False, True])
def test_mnist_in_every_spelling(tmp_path, zipped, dotted):
    files = mnist_files()
    stored = {
        (name.replace("-idx", ".idx") if dotted else name) + (".gz" if zipped else ""): (
            gzip.compress(content) if zipped else content
        )
        for name, content in files.items()
    }
    mnist = load(f"mnist:{write(tmp_path / 'm', stored)}")
    assert mnist.name == "mnist"
    assert mnist.train.inputs.shape == (5, 1, 28, 28)
    assert mnist.test.inputs.shape == (3, 1, 28, 28)
    assert mnist.train.inputs.dtype == torch.float32
    pixels = np.frombuffer(files["train-images-idx3-ubyte"], np.uint8, offset=16)
    assert mnist.train.inputs.mul(255).round().flatten().tolist() == pixels.tolist()
    assert mnist.train.inputs.max() <= 1
    assert mnist.test.labels.tolist() == list(files["t10k-labels-idx1-ubyte"][8:])


IMAGES, LABELS = "train-images-idx3-ubyte", "train-labels-idx1-ubyte"


@pytest.mark.parametrize(
    ("name", "change", "said"),
    [
        (IMAGES, lambda whole: whole[:-1], "3935 bytes where its header announces 3936"),
        (IMAGES, lambda whole: whole + b"\0", "3937 bytes"),
        (IMAGES, lambda whole: whole[:10], "announces sizes"),
        (IMAGES, lambda whole: b"", "does not start with 2051"),
        (IMAGES, lambda whole: b"<html>not found</html>", "does not start with 2051"),
        (IMAGES, lambda whole: idx(np.zeros((5, 27, 28), np.uint8)), r"sizes \[5, 27, 28\]"),
        (IMAGES, lambda whole: idx(np.zeros((0, 28, 28), np.uint8)), r"sizes \[0, 28, 28\]"),
        (IMAGES, lambda whole: idx(np.zeros((4, 28, 28), np.uint8)), "4 images.*5 labels"),
        (LABELS, lambda whole: mnist_files()[IMAGES], "does not start with 2049"),
        (LABELS, lambda whole: idx(np.full(5, 10, np.uint8)), "label 10"),
    ],
)
def test_damaged_mnist_files_are_refused_by_name(tmp_path, name, change, said):
    files = mnist_files()
    files[name] = change(files[name])
    with pytest.raises(DataError, match=f"{name}.*{said}"):
        load(f"mnist:{write(tmp_path, files)}")


@pytest.mark.parametrize(
    "damage",
    [lambda zipped: zipped[:-9], lambda zipped: zipped[:20] + b"??" + zipped[22:], lambda zipped: b"no gzip"],
)
def test_damaged_gzip_files_are_refused_by_name(tmp_path, damage):
    files = mnist_files()
    files[IMAGES + ".gz"] = damage(gzip.compress(files.pop(IMAGES)))
    with pytest.raises(DataError, match=r"train-images-idx3-ubyte\.gz cannot be read or is damaged"):
        load(f"mnist:{write(tmp_path, files)}")


def test_a_missing_file_and_a_missing_directory(tmp_path):
    files = mnist_files()
    del files["t10k-labels-idx1-ubyte"]
    with pytest.raises(DataError, match="has no t10k-labels-idx1-ubyte or"):
        load(f"mnist:{write(tmp_path, files)}")
    with pytest.raises(DataError, match=r"absent; put the four.*--download"):
        load(f"mnist:{tmp_path / 'absent'}")


@pytest.mark.data
@pytest.mark.skipif(not (REAL / "mnist").is_dir(), reason="no MNIST files in NETTRIM_DATA")
def test_the_real_mnist():
    mnist = load(f"mnist:{REAL / 'mnist'}")
    assert len(mnist.train.inputs) == 60_000
    assert len(mnist.test.inputs) == 10_000
    # the standard order: the first training digits are known to be these
    assert mnist.train.labels[:10].tolist() == [5, 0, 4, 1, 9, 2, 1, 3, 1, 4]
    assert mnist.test.labels[:5].tolist() == [7, 2, 1, 0, 4]
    assert mnist.train.inputs.mean().item() == pytest.approx(0.1307, abs=1e-4)


@pytest.mark.data
@pytest.mark.skipif(not (REAL / "mnist").is_dir(), reason="no MNIST files in NETTRIM_DATA")
def test_the_checksums_are_those_of_the_real_files():
    for stem, sha256 in data._MNIST_SHA256.items():
        content = gzip.decompress((REAL / "mnist" / f"{stem}.gz").read_bytes())
        assert hashlib.sha256(content).hexdigest() == sha256


# ---- download --------------------------------------------------------------------------------------------


class Response(io.BytesIO):
    def __init__(self, content: bytes) -> None:
        super().__init__(content)
        self.headers = {"Content-Length": str(len(content))}


@pytest.fixture
def web(monkeypatch):
    """Mirrors that hold small files under the right checksums; `web[url]` may be replaced or removed."""
    files = mnist_files()
    sums = {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}
    monkeypatch.setattr(data, "_MNIST_SHA256", sums)
    pages = {
        f"{mirror}{name}.gz": gzip.compress(content) for mirror in data._MIRRORS for name, content in files.items()
    }

    def open_url(url, timeout):
        if url not in pages:
            raise URLError("no route to host")
        return Response(pages[url])

    monkeypatch.setattr(data, "urlopen", open_url)
    return pages


def test_nothing_is_fetched_unasked(tmp_path, web):
    with pytest.raises(DataError, match="--download"):
        load(f"mnist:{tmp_path / 'm'}")
    assert not (tmp_path / "m").exists()


def test_a_download_is_loaded_and_leaves_just_the_files(tmp_path, web):
    mnist = load(f"mnist:{tmp_path / 'deep' / 'm'}", download=True)
    assert len(mnist.train.inputs) == 5
    assert sorted(path.name for path in (tmp_path / "deep" / "m").iterdir()) == sorted(
        f"{name}.gz" for name in mnist_files()
    )


def test_files_that_are_there_are_not_fetched_again(tmp_path, web):
    web.clear()
    assert len(load(f"mnist:{write(tmp_path, mnist_files(7))}", download=True).train.inputs) == 7


def test_the_second_mirror_steps_in(tmp_path, web):
    del web[f"{data._MIRRORS[0]}{IMAGES}.gz"]
    web[f"{data._MIRRORS[0]}{LABELS}.gz"] = gzip.compress(b"something else")
    assert len(load(f"mnist:{tmp_path / 'm'}", download=True).train.inputs) == 5


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (gzip.compress(b"something else"), "wrong checksum"),
        (b"<html>", "Not a gzipped file"),
        (gzip.compress(mnist_files()[LABELS])[:-4], "ended before"),
        (None, "no route to host"),
    ],
    # compressed bytes hold the time, and the tests are collected by several processes
    ids=["another file", "a page", "cut short", "nothing"],
)
def test_a_failed_download_leaves_nothing_behind(tmp_path, web, content, said):
    for mirror in data._MIRRORS:
        url = f"{mirror}t10k-labels-idx1-ubyte.gz"
        del web[url]
        if content is not None:
            web[url] = content
    with pytest.raises(DataError, match=rf"t10k-labels-idx1-ubyte\.gz could not be downloaded.*{said}"):
        load(f"mnist:{tmp_path / 'm'}", download=True)
    assert list(tmp_path.iterdir()) == []


def test_a_directory_that_cannot_be_made(tmp_path, web):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(DataError, match="cannot be written"):
        load(f"mnist:{tmp_path / 'file' / 'm'}", download=True)


# ---- CIFAR-10 --------------------------------------------------------------------------------------------


def cifar(labels: list[int]) -> bytes:
    draw = np.random.default_rng(len(labels))
    return b"".join(bytes([label]) + draw.integers(0, 256, 3072, dtype=np.uint8).tobytes() for label in labels)


def test_cifar10(tmp_path):
    second = cifar([4, 5, 6])
    write(
        tmp_path,
        {
            "data_batch_1.bin": cifar([1, 2]),
            "data_batch_2.bin.gz": gzip.compress(second),
            "test_batch.bin.gz": gzip.compress(cifar([9])),
        },
    )
    cifar10 = load(f"cifar10:{tmp_path}")
    assert cifar10.train.inputs.shape == (5, 3, 32, 32)
    assert cifar10.train.labels.tolist() == [1, 2, 4, 5, 6]
    assert cifar10.test.labels.tolist() == [9]
    assert cifar10.train.inputs[2].mul(255).round().flatten().tolist() == list(second[1:3073])


def test_a_batch_in_both_forms_is_read_once(tmp_path):
    whole = cifar([1, 2])
    files = {"data_batch_1.bin": whole, "data_batch_1.bin.gz": gzip.compress(whole), "test_batch.bin": whole}
    assert load(f"cifar10:{write(tmp_path, files)}").train.labels.tolist() == [1, 2]


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ({}, r"lacks.*cifar-10-binary\.tar\.gz"),
        ({"data_batch_1.bin": cifar([1])}, "lacks"),
        ({"test_batch.bin": cifar([1])}, "lacks"),
        ({"data_batch_1.bin": cifar([1])[:-1], "test_batch.bin": cifar([1])}, r"data_batch_1\.bin has 3072"),
        ({"data_batch_1.bin": b"", "test_batch.bin": cifar([1])}, r"data_batch_1\.bin has 0"),
        ({"data_batch_1.bin": cifar([1]), "test_batch.bin": cifar([10])}, r"test_batch\.bin has a label 10"),
        ({"data_batch_1.bin": cifar([1]), "test_batch.bin.gz": b"?"}, r"test_batch\.bin\.gz cannot be read"),
    ],
)
def test_damaged_cifar10_is_refused(tmp_path, files, said):
    with pytest.raises(DataError, match=said):
        load(f"cifar10:{write(tmp_path, files)}")


@pytest.mark.data
@pytest.mark.skipif(not (REAL / "cifar10").is_dir(), reason="no CIFAR-10 files in NETTRIM_DATA")
def test_the_real_cifar10(tmp_path):
    # the test batch stands in for the training batches, which would only take memory
    for name in ("test_batch.bin.gz", "data_batch_1.bin.gz"):
        (tmp_path / name).symlink_to(REAL / "cifar10" / "test_batch.bin.gz")
    test = load(f"cifar10:{tmp_path}").test
    assert test.inputs.shape[1:] == (3, 32, 32)
    assert len(test.inputs) == len(test.labels) >= 1000
    # photographs: every class is there, and neighbours in a row are alike, as in no other layout of the bytes
    assert sorted(set(test.labels.tolist())) == list(range(10))
    assert (test.inputs[..., 1:] - test.inputs[..., :-1]).abs().mean() < 0.08


# ---- npz -------------------------------------------------------------------------------------------------

ROWS = np.arange(12.0, dtype=np.float32).reshape(4, 3)
CLASSES = np.array([0, 1, 1, 0])


def test_npz_with_everything(tmp_path):
    path = tmp_path / "mine.npz"
    np.savez(path, inputs=ROWS, labels=CLASSES.astype(np.uint8), test_inputs=ROWS[:2], test_labels=CLASSES[:2])
    mine = load(str(path))
    assert mine.name == "mine.npz"
    assert torch.equal(mine.train.inputs, torch.from_numpy(ROWS))
    assert mine.train.labels.dtype == torch.int64
    assert mine.train.labels.tolist() == [0, 1, 1, 0]
    assert mine.test.labels.tolist() == [0, 1]


def test_npz_with_inputs_only(tmp_path):
    path = tmp_path / "mine.npz"
    np.savez_compressed(path, inputs=ROWS.astype(">f8"))
    mine = load(path)
    assert mine.train.inputs.dtype == torch.float64
    assert mine.train.labels is None
    assert mine.test is None


def test_npz_half_precision_becomes_single(tmp_path):
    np.savez(tmp_path / "mine.npz", inputs=ROWS.astype(np.float16))
    assert load(tmp_path / "mine.npz").train.inputs.dtype == torch.float32


@pytest.mark.parametrize(
    ("arrays", "said"),
    [
        ({"labels": CLASSES}, r"holds \['labels'\]"),
        ({"inputs": ROWS, "targets": ROWS}, r"holds \['inputs', 'targets'\]"),
        ({"inputs": ROWS, "test_labels": CLASSES}, "test_labels without test_inputs"),
        ({"inputs": ROWS.astype(int)}, "inputs in .* are int64"),
        ({"inputs": ROWS[0]}, r"shape \(3,\)"),
        ({"inputs": ROWS[:0]}, r"shape \(0, 3\)"),
        ({"inputs": np.where(ROWS > 9, np.nan, ROWS)}, "2 NaN or infinite"),
        ({"inputs": np.full((2, 2), 1e4000, np.longdouble)}, "4 NaN or infinite"),
        ({"inputs": ROWS, "labels": CLASSES[:3]}, r"labels in .* shape \(3,\).* 4 rows"),
        ({"inputs": ROWS, "labels": CLASSES / 2}, "float64"),
        ({"inputs": ROWS, "labels": CLASSES - 1}, "counted from 0"),
        ({"inputs": ROWS, "test_inputs": ROWS[:, :2]}, r"\(4, 3\) and test_inputs of shape \(4, 2\)"),
        ({"inputs": ROWS, "test_inputs": ROWS + np.inf}, "test_inputs in .* NaN"),
        ({"inputs": np.array([[{}]])}, "plain arrays"),
    ],
)
def test_npz_that_does_not_fit_is_refused(tmp_path, arrays, said):
    path = tmp_path / "mine.npz"
    np.savez(path, **arrays)
    with pytest.raises(DataError, match=said):
        load(path)


def test_foreign_and_damaged_npz_files_are_refused(tmp_path):
    whole = io.BytesIO()
    np.savez(whole, inputs=ROWS)
    bare = io.BytesIO()
    np.save(bare, ROWS)
    flipped = bytearray(whole.getvalue())
    flipped[160] ^= 255
    contents = (b"", b"text", whole.getvalue()[:-30], bytes(flipped), bare.getvalue())
    for number, content in enumerate(contents):
        path = tmp_path / f"{number}.npz"
        path.write_bytes(content)
        with pytest.raises(DataError, match=rf"{number}\.npz is not a whole"):
            load(path)
    with pytest.raises(DataError, match="does not exist"):
        load(tmp_path / "absent.npz")
