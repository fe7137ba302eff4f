"""Files that appear whole or not at all, tensors without pickles, and digests that tell whether anything changed."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_bytes
from torch import Tensor

from nettrim.errors import RunError

_VERSIONED = ("nettrim", "torch", "numpy", "safetensors")


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file so that it is there whole, or not at all.

    Raises
    ------
    RunError
        It cannot be written: a full disk, a missing permission. What was there before stays.
    """
    part = path.with_name(path.name + ".part")
    try:
        with part.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    except OSError as error:
        raise RunError(f"{path} cannot be written: {error.strerror or error}.") from error
    finally:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises
    ------
    RunError
        It is missing, truncated, or no JSON object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise RunError(f"{path} cannot be read: {error.strerror or error}.") from error
    except ValueError as error:
        raise RunError(f"{path} is truncated or no JSON file: {error}.") from error
    if not isinstance(value, dict):
        raise RunError(f"{path} holds no JSON object, so it is not of a run directory.")
    return value


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read a safetensors file: its tensors, and what is said about them.

    Raises
    ------
    RunError
        It is missing, truncated, or of another format.
    """
    try:
        with safe_open(path, framework="pt") as file:
            about = (file.metadata() or {}).get("about", "{}")
            return {key: file.get_tensor(key) for key in file.keys()}, json.loads(about)  # noqa: SIM118
    except OSError as error:
        raise RunError(f"{path} cannot be read: {error.strerror or error}.") from error
    except (SafetensorError, ValueError) as error:
        raise RunError(f"{path} is truncated or no safetensors file: {error}.") from error


def tensor_bytes(tensors: dict[str, Tensor], about: dict[str, Any] | None = None) -> bytes:
    """Return the content of a safetensors file with these tensors, and what is said about them."""
    # cloned, because safetensors refuses tensors that share memory
    plain = {key: tensor.detach().cpu().clone().contiguous() for key, tensor in tensors.items()}
    content: bytes = to_bytes(plain, None if about is None else {"about": json.dumps(about)})
    return content


def digest_tensors(tensors: dict[str, Tensor]) -> str:
    """Return a SHA-256 of names, dtypes, shapes and values."""
    total = hashlib.sha256()
    for name, tensor in sorted((key, value) for key, value in tensors.items() if isinstance(value, Tensor)):
        total.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        total.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return total.hexdigest()


def digest_json(value: dict[str, Any]) -> str:
    """Return a SHA-256 of a JSON object, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def json_bytes(value: dict[str, Any]) -> bytes:
    """Return the content of a JSON file."""
    # NaN and infinity are no JSON, and no figure may be either
    return (json.dumps(value, indent=1, sort_keys=True, allow_nan=False) + "\n").encode()


def describe_place() -> dict[str, Any]:
    """Return where this runs, as JSON values: versions, host, commit."""
    return {
        "versions": {name: _version(name) for name in _VERSIONED},
        "host": {
            "machine": platform.machine(),
            "system": platform.system(),
            "python": platform.python_version(),
            "processors": os.cpu_count(),
            "threads": torch.get_num_threads(),
        },
        "commit": _commit(),
    }


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "not installed"


def _commit() -> str | None:
    """Return the commit of the checkout that nettrim runs from, or None where it is an installed package."""
    here = Path(__file__).resolve().parents[2]
    if not (here / ".git").exists():
        return None
    try:
        done = subprocess.run(
            ["git", "-C", str(here), "describe", "--always", "--dirty"],
            capture_output=True,
            text=True,
            check=False,
        )
    except OSError:
        return None
    return done.stdout.strip() or None
