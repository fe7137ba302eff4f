"""Reads what a command line names: a network by its factory, weights and arrays by their files."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from nettrim.errors import DataError, NetTrimError, ProblemError, UnknownNameError


def load_model(spec: str, weights: str | None) -> nn.Module:
    """Return the network that ``package.module:function`` or ``path/file.py:function`` makes, with weights from a file.

    Raises
    ------
    ProblemError, UnknownNameError, DataError
        The text names the option and what is wrong with it, whatever the user's own code raises.
    """
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
