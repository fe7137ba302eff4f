"""The data that commands and examples run on, checked to the byte: a damaged file must not become a figure.

Splits are named and keep their standard order; nothing is fetched unless the user asked for it.
"""

from __future__ import annotations

import gzip
import hashlib
import http.client
import tempfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from urllib.request import urlopen

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from tqdm import tqdm

from nettrim.errors import DataError, MissingExtraError

_FORMS = "digits, mnist:DIR, cifar10:DIR or FILE.npz"
_MIRRORS = (
    "https://ossci-datasets.s3.amazonaws.com/mnist/",
    "https://storage.googleapis.com/cvdf-datasets/mnist/",
)
# SHA-256 of the *uncompressed* files: mirrors compress anew now and then, which changes the sums of the .gz
_MNIST_SHA256 = {
    "train-images-idx3-ubyte": "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
    "train-labels-idx1-ubyte": "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
    "t10k-images-idx3-ubyte": "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
    "t10k-labels-idx1-ubyte": "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
}
_CIFAR_RECORD = 1 + 3 * 32 * 32


@dataclass(frozen=True, eq=False)
class Split:
    """One named part of a data set.

    Attributes
    ----------
    name : str
        "train" or "test".
    inputs : Tensor, shape (n, ...)
        Floating and finite.
    labels : Tensor of int64, shape (n,), or None
        Classes, counted from 0.
    """

    name: str
    inputs: Tensor
    labels: Tensor | None


@dataclass(frozen=True, eq=False)
class Data:
    """A data set.

    Attributes
    ----------
    name : str
        "digits", "mnist", "cifar10", or the name of the file.
    train : Split
        What is trained and calibrated on.
    test : Split or None
        What figures are held out on, if there is one.
    """

    name: str
    train: Split
    test: Split | None


def load(spec: str | Path, download: bool = False) -> Data:
    """Load a data set.

    Parameters
    ----------
    spec : str or Path
        - ``digits``: scikit-learn's 1,797 digits, inputs in [0, 1] of shape (n, 64), split into 1,200 and 597
          rows by a fixed permutation;
        - ``mnist:DIR``: the four IDX files, gzipped or not, inputs in [0, 1] of shape (n, 1, 28, 28);
        - ``cifar10:DIR``: the binary batches, gzipped or not, inputs in [0, 1] of shape (n, 3, 32, 32), from
          as many training batches as are there;
        - ``FILE.npz``: floating `inputs` and optionally `labels`, `test_inputs`, `test_labels`.

        Inputs are float32, except float64 arrays from a FILE.npz, which stay.
    download : bool
        Fetch MNIST if DIR does not exist or holds none of its files.

    Returns
    -------
    Data
        Train and test split.

    Raises
    ------
    DataError
        The spec is of no known form; a file or directory is missing, truncated, damaged or something else; a
        download failed.
    MissingExtraError
        `digits` was asked for and scikit-learn is absent.
    """
    kind, colon, directory = str(spec).partition(":")
    if spec == "digits":
        return _digits()
    if colon and directory and kind == "mnist":
        return _mnist(Path(directory).expanduser(), download)
    if colon and directory and kind == "cifar10":
        return _cifar10(Path(directory).expanduser())
    if Path(spec).suffix == ".npz":
        return _npz(Path(spec).expanduser())
    raise DataError(f"data {str(spec)!r} is of no known form; pass {_FORMS}")


def download_mnist(directory: str | Path) -> None:
    """Fetch the four MNIST files (11 MB) from the usual mirrors; all are verified before any is written.

    Parameters
    ----------
    directory : str or Path
        Made if it does not exist. Files of the same names in it are replaced.

    Raises
    ------
    DataError
        No mirror gave a file with the right checksum, or the directory cannot be written.
    """
    directory = Path(directory).expanduser()
    fetched = {f"{stem}.gz": _fetch(f"{stem}.gz", sha256) for stem, sha256 in _MNIST_SHA256.items()}
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=directory, prefix=".partial-") as partial:
            for name, content in fetched.items():
                (Path(partial) / name).write_bytes(content)
            for name in fetched:
                (Path(partial) / name).replace(directory / name)
    except OSError as error:
        raise DataError(f"MNIST cannot be written to {directory} ({error}); choose another directory") from error


def _fetch(name: str, sha256: str) -> bytes:
    """Download one gzipped file, from the first mirror that has it whole."""
    failures = []
    for mirror in _MIRRORS:
        content = bytearray()
        try:
            with urlopen(mirror + name, timeout=30) as response:
                length = int(response.headers.get("Content-Length") or 0)
                with tqdm(desc=name, total=length, unit="B", unit_scale=True, leave=False, disable=None) as bar:
                    while piece := response.read(1 << 16):
                        content += piece
                        bar.update(len(piece))
            found = hashlib.sha256(gzip.decompress(content)).hexdigest()
        except (OSError, EOFError, ValueError, zlib.error, http.client.HTTPException) as error:
            failures.append(f"{mirror}: {str(error) or type(error).__name__}")
            continue
        if found == sha256:
            return bytes(content)
        failures.append(f"{mirror}: wrong checksum {found}")
    raise DataError(
        f"{name} could not be downloaded ({'; '.join(failures)}); check the network, or put the four MNIST "
        "files into the directory by hand"
    )


def _digits() -> Data:
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise MissingExtraError(
            "the digits data comes with scikit-learn, which is not installed; run: pip install nettrim[demo]"
        ) from error
    digits = load_digits()
    # permuted, because neighbouring rows are by the same writer
    order = np.random.default_rng(0).permutation(len(digits.target))
    inputs = torch.from_numpy((digits.data[order] / 16).astype(np.float32))
    labels = torch.from_numpy(digits.target[order].astype(np.int64))
    return Data(
        "digits",
        Split("train", inputs[:1200].clone(), labels[:1200].clone()),
        Split("test", inputs[1200:].clone(), labels[1200:].clone()),
    )


def _mnist(directory: Path, download: bool) -> Data:
    if not any(directory.glob("*-ubyte*")):
        if not download:
            raise DataError(
                f"there are no MNIST files in {directory}; put the four IDX files there, or pass --download "
                "(in Python, download=True) to have them fetched"
            )
        download_mnist(directory)
    splits = []
    for name, stem in (("train", "train"), ("test", "t10k")):
        images, labels = f"{stem}-images-idx3-ubyte", f"{stem}-labels-idx1-ubyte"
        image_file, label_file = _find(directory, images), _find(directory, labels)
        pixels, classes = _idx(image_file, 2051, (28, 28)), _idx(label_file, 2049, ())
        if len(pixels) != len(classes):
            raise DataError(
                f"{image_file} holds {len(pixels)} images and {label_file} {len(classes)} labels; fetch both again"
            )
        splits.append(_image_split(name, pixels[:, None], classes, label_file))
    return Data("mnist", splits[0], splits[1])


def _find(directory: Path, name: str) -> Path:
    """Find a file under either spelling of its name, gzipped or not."""
    for spelling in (name, name.replace("-idx", ".idx")):
        for suffix in ("", ".gz"):
            path = directory / (spelling + suffix)
            if path.is_file():
                return path
    raise DataError(f"MNIST directory {directory} has no {name} or {name}.gz; put all four files there")


def _idx(path: Path, magic: int, shape: tuple[int, ...]) -> npt.NDArray[np.uint8]:
    """Parse an IDX file of bytes: big-endian magic number, row count, the shape of a row, then the rows."""
    content = _read(path)
    header = 4 * (2 + len(shape))
    fields = np.frombuffer(content[: min(header, len(content) // 4 * 4)], dtype=">i4").tolist()
    if not fields or fields[0] != magic:
        raise DataError(f"{path} does not start with {magic}, so it is another kind of file; fetch it again")
    if len(fields) < 2 + len(shape) or tuple(fields[2:]) != shape or fields[1] < 1:
        raise DataError(f"{path} announces sizes {fields[1:]} where (n, 28, 28) or (n,) is due; fetch it again")
    expected = header + fields[1] * int(np.prod(shape))
    if len(content) != expected:
        raise DataError(f"{path} has {len(content)} bytes where its header announces {expected}; fetch it again")
    return np.frombuffer(content, dtype=np.uint8, offset=header).reshape(fields[1:])


def _cifar10(directory: Path) -> Data:
    # keyed by the name without .gz, so that a batch that lies there in both forms is read once
    found = {path.name.removesuffix(".gz"): path for path in sorted(directory.glob("*.bin*"), reverse=True)}
    training = [found[name] for name in sorted(found) if name.startswith("data_batch_")]
    if not training or "test_batch.bin" not in found:
        raise DataError(
            f"CIFAR-10 directory {directory} lacks data_batch_*.bin or test_batch.bin (or .bin.gz); unpack "
            "cifar-10-binary.tar.gz from https://www.cs.toronto.edu/~kriz/cifar.html there"
        )
    splits = []
    for name, paths in (("train", training), ("test", [found["test_batch.bin"]])):
        parts = [_cifar_split(name, path) for path in paths]
        labels = torch.cat([part.labels for part in parts if part.labels is not None])
        splits.append(Split(name, torch.cat([part.inputs for part in parts]), labels))
    return Data("cifar10", splits[0], splits[1])


def _cifar_split(name: str, path: Path) -> Split:
    content = _read(path)
    if not content or len(content) % _CIFAR_RECORD:
        raise DataError(f"{path} has {len(content)} bytes, not whole records of {_CIFAR_RECORD}; fetch it again")
    records = np.frombuffer(content, dtype=np.uint8).reshape(-1, _CIFAR_RECORD)
    return _image_split(name, records[:, 1:].reshape(-1, 3, 32, 32), records[:, 0], path)


def _image_split(name: str, pixels: npt.NDArray[np.uint8], classes: npt.NDArray[np.uint8], label_file: Path) -> Split:
    if classes.max() > 9:
        raise DataError(f"{label_file} has a label {classes.max()} where 0 ... 9 are due; fetch the file again")
    inputs = torch.from_numpy(pixels.astype(np.float32)).div_(255)
    return Split(name, inputs, torch.from_numpy(classes.astype(np.int64)))


def _read(path: Path) -> bytes:
    """Read a file whole, gzipped or not."""
    try:
        return gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(
            f"{path} cannot be read or is damaged ({str(error) or type(error).__name__}); fetch it again"
        ) from error


def _npz(path: Path) -> Data:
    known = ("inputs", "labels", "test_inputs", "test_labels")
    try:
        # opened here, since np.load leaves a damaged file open; no pickles, which can run anybody's code
        with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
            arrays = {key: np.asarray(archive[key]) for key in archive.files}
    except FileNotFoundError as error:
        raise DataError(f"data file {path} does not exist; pass {_FORMS}") from error
    except Exception as error:  # on a foreign or damaged file, numpy and zipfile raise a dozen kinds
        raise DataError(
            f"{path} is not a whole .npz archive of plain arrays ({str(error) or type(error).__name__}); "
            "write it with numpy.savez"
        ) from error
    if "inputs" not in arrays or not set(arrays) <= set(known):
        raise DataError(
            f"{path} holds {sorted(arrays)} where inputs is needed and {', '.join(known[1:])} are taken; "
            "rename its arrays"
        )
    if "test_labels" in arrays and "test_inputs" not in arrays:
        raise DataError(f"{path} holds test_labels without test_inputs; add the inputs or leave the labels out")
    train = _npz_split("train", path, arrays["inputs"], arrays.get("labels"), "")
    if "test_inputs" not in arrays:
        return Data(path.name, train, None)
    test = _npz_split("test", path, arrays["test_inputs"], arrays.get("test_labels"), "test_")
    if test.inputs.shape[1:] != train.inputs.shape[1:]:
        raise DataError(
            f"{path} has inputs of shape {tuple(train.inputs.shape)} and test_inputs of shape "
            f"{tuple(test.inputs.shape)}; give their rows one shape"
        )
    return Data(path.name, train, test)


def _npz_split(
    name: str,
    path: Path,
    inputs: npt.NDArray[np.generic],
    labels: npt.NDArray[np.generic] | None,
    prefix: str,
) -> Split:
    if inputs.dtype.kind != "f" or inputs.ndim < 2 or inputs.size == 0:
        raise DataError(
            f"{prefix}inputs in {path} are {inputs.dtype} of shape {inputs.shape}; "
            "store floats of shape (n, ...), at least one row"
        )
    with np.errstate(over="ignore"):
        # float64 stays, everything else becomes float32; what that overflows is caught as infinite below
        numbers = inputs.astype(np.float64 if inputs.dtype.itemsize == 8 else np.float32)
    bad = int((~np.isfinite(numbers)).sum())
    if bad:
        raise DataError(f"{prefix}inputs in {path} have {bad} NaN or infinite entries; clean the data")
    if labels is None:
        return Split(name, torch.from_numpy(numbers), None)
    if labels.dtype.kind not in "iu" or labels.shape != inputs.shape[:1] or int(labels.min()) < 0:
        raise DataError(
            f"{prefix}labels in {path} are {labels.dtype} of shape {labels.shape}; "
            f"store one integer class, counted from 0, for each of the {len(inputs)} rows"
        )
    return Split(name, torch.from_numpy(numbers), torch.from_numpy(labels.astype(np.int64)))
