"""Reads what a command line names: a network by its factory, weights and arrays by their files."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import json
import logging
import os
import re
import sys
import warnings
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from nettrim.errors import DataError, NetTrimError, ProblemError, UnknownNameError

# a size as sympy writes it: names, numbers, calls, and names in quotes
_FORMULA = re.compile(r"(?!.*__)(?:[A-Za-z0-9_ +\-*/%(),=<>&|~]|'\w+')*")
_CALL = re.compile(r"([A-Za-z_]\w*)\s*\(")


def load_model(spec: str, weights: str | None) -> nn.Module:
    """Return the network that ``package.module:function`` or ``path/file.py:function`` makes, with weights from a file.

    ``FILE.pt2`` is an archive of `torch.export.save`. A function is the user's own code, and runs; an archive is data:
    what in it would run code (pickled objects, compiled parts) is refused, and the rest left to torch's readers.

    Raises
    ------
    ProblemError, UnknownNameError, DataError
        The text names the option and what is wrong with it, whatever the user's own code raises.
    """
    if spec.endswith(".pt2"):
        return _weighted(_read_archive(Path(spec)), weights)
    where, colon, name = spec.rpartition(":")
    if not colon or not where or not name:
        raise ProblemError(
            f"--model {spec!r} names no factory: write package.module:function or path/file.py:function."
        )
    try:
        module = _import_file(Path(where)) if where.endswith(".py") else _import_module(where)
        factory = getattr(module, name, None)
        if factory is None:
            raise UnknownNameError(f"--model {spec}: {where} has no {name}.")
        model = factory()
    except NetTrimError:
        raise
    except SystemExit as stop:
        raise ProblemError(f"--model {spec} ends the program (SystemExit: {stop}): it must return a network.") from stop
    except Exception as error:  # a user's own code: whatever it raises is said in one line, and --debug shows it all
        said = " ".join(str(error).split())
        raise ProblemError(f"--model {spec} fails: {type(error).__name__}: {said}") from error
    if not isinstance(model, nn.Module):
        raise ProblemError(f"--model {spec} returns a {type(model).__name__}, and must return a torch.nn.Module.")
    return _weighted(model, weights)


def _read_archive(path: Path) -> nn.Module:
    """Read an archive of `torch.export.save`, running nothing that it brings along.

    What torch would unpickle, execute or evaluate from it is refused before: compiled code, objects other than tensors,
    calls of anything but tensor operations, and sizes that are no plain formula. Example inputs are only read as
    tensors, and guards, which are Python code, not at all. What remains is trusted to torch's own readers.
    """
    if not path.is_file():
        raise DataError(f"--model: {path} is no file.")
    try:
        _check_archive(path)
        with _tensors_only(), warnings.catch_warnings():
            # of torch, about torch
            warnings.simplefilter("ignore")
            return torch.export.load(path).module(check_guards=False)
    except Exception as error:  # on a foreign or damaged archive, torch and zipfile raise many kinds
        said = (str(error) or type(error).__name__).splitlines()[0].rstrip(".")
        raise DataError(f"--model {path} cannot be read as an archive of torch.export.save: {said}.") from error


def _check_archive(path: Path) -> None:
    """Raise `ValueError` where a file holds anything but tensors and a graph of tensor operations."""
    with zipfile.ZipFile(path) as archive:
        damaged = archive.testzip()
        if damaged is not None:
            raise ValueError(f"{damaged} is damaged")
        names = archive.namelist()
        inside = {name.partition("/")[2]: name for name in names}
        if len(inside) < len(names) or "models/model.json" not in inside:
            raise ValueError("it holds no exported program, or not in this version's form")
        if any(name.startswith("data/aotinductor/") for name in inside):
            raise ValueError("it holds compiled code")
        for name in inside:
            if name.startswith(("data/weights/", "data/constants/")) and name.endswith((".json", ".pt")):
                entries = json.loads(archive.read(inside[name])).get("config") if name.endswith(".json") else None
                if entries is None or any(entry.get("use_pickle", True) for entry in entries.values()):
                    raise ValueError(f"{name} holds pickled objects, which are not read")
        for key, text in _strings(json.loads(archive.read(inside["models/model.json"]))):
            calls = _CALL.findall(text)
            if key == "target" and not text.startswith(("torch.ops.aten.", "torch.ops.higher_order.", "_operator.")):
                raise ValueError(f"its graph calls {text!r}, which is no tensor operation")
            if key == "expr_str" and not (_FORMULA.fullmatch(text) and all(name[0].isupper() for name in calls)):
                raise ValueError(f"its graph has a size that is no plain formula: {text[:60]!r}")


def _strings(value: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """Yield every text in nested JSON values, with the name that it stands under."""
    if isinstance(value, dict):
        for name, item in value.items():
            yield from _strings(item, name)
    elif isinstance(value, list):
        for item in value:
            yield from _strings(item, key)
    elif isinstance(value, str):
        yield key, value


@contextlib.contextmanager
def _tensors_only() -> Iterator[None]:
    """Have `torch.load` refuse everything but tensors, also where its caller asks for more."""
    name = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
    before, level = os.environ.get(name), logging.getLogger("torch.export").level
    os.environ[name] = "1"
    # it prints whole tracebacks of what is raised to us as well
    logging.getLogger("torch.export").setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logging.getLogger("torch.export").setLevel(level)
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def _weighted(model: nn.Module, weights: str | None) -> nn.Module:
    """Return a model with weights from a file, if one is named."""
    if weights is not None:
        try:
            model.load_state_dict(load_file(weights))
        except (OSError, SafetensorError) as error:
            raise DataError(f"--weights {weights} cannot be read: {error}") from error
        except RuntimeError as error:
            raise DataError(f"--weights {weights} does not fit the model: {' '.join(str(error).split())}") from error
    return model


def _import_module(name: str) -> Any:
    if str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    return importlib.import_module(name)


def _import_file(path: Path) -> Any:
    if not path.is_file():
        raise DataError(f"--model: {path} is no file.")
    folder = str(path.resolve().parent)
    if folder not in sys.path:
        sys.path.insert(0, folder)
    # a file that is called like a loaded module must not take its place
    present = sys.modules.get(path.stem)
    name = path.stem if getattr(present, "__nettrim_model__", present is None) else f"nettrim_model_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    vars(module)["__nettrim_model__"] = True
    # dataclasses and pickle look a class's module up there, so it has to be there before it runs
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def read_arrays(path: Path) -> dict[str, Any]:
    """Return the arrays of a layer file: inputs and targets, and ceiling and penalty where they are there.

    Raises
    ------
    DataError
        The file is missing, truncated, foreign, or holds other arrays.
    """
    try:
        # opened here, since np.load leaves a damaged file open
        with path.open("rb") as opened, np.load(opened, allow_pickle=False) as file:
            arrays = {key: file[key] for key in file.files}
    except Exception as error:  # on a foreign or damaged file, NumPy, zipfile and zlib raise a dozen kinds
        said = " ".join(str(error).split()) or type(error).__name__
        raise DataError(f"{path} cannot be read as an .npz file ({said}): write it with numpy.savez.") from error
    missing = [key for key in ("inputs", "targets") if key not in arrays]
    unknown = sorted(set(arrays) - {"inputs", "targets", "ceiling", "penalty"})
    if missing or unknown:
        raise DataError(
            f"{path} holds {', '.join(arrays) or 'nothing'}: it needs inputs and targets, "
            "and may hold ceiling and penalty."
        )
    return arrays
