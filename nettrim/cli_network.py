"""What the commands that work on a network share, and ``nettrim export``: the forms in which one leaves."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from nettrim.core.problem import check_seed
from nettrim.errors import ProblemError, RunError, UnsupportedError
from nettrim.loading import load_model
from nettrim.pipeline.files import read_tensors, tensor_bytes, write_atomically
from nettrim.pipeline.onnx_export import export_onnx
from nettrim.pipeline.outputs import SPEED, sizes, write_csr, write_packed
from nettrim.pipeline.result import load_result, progress_of, read_run, run_of_this_version

FORMS = ("packed", "csr", "masks", "onnx")
_EXAMPLES = 4  # samples on which an ONNX file is checked; from two on their number stays free


def add_network_options(parser: argparse.ArgumentParser) -> None:
    """Add what says how any network is read and how much memory its calibration may take."""
    parser.add_argument(
        "--on-unsupported",
        choices=("refuse", "keep"),
        default="refuse",
        help="what to do about selected weights that cannot be pruned: refuse them by name, or keep them dense",
    )
    parser.add_argument(
        "--rows", type=int, metavar="R", help="the most rows of a layer's program, drawn from samples and positions"
    )
    parser.add_argument(
        "--memory-limit",
        default="2 GiB",
        metavar="SIZE",
        help="what calibration may hold beside the networks, default %(default)s",
    )


def network_options(options: argparse.Namespace) -> dict[str, Any]:
    """Return them as keywords of `prune` and `compare`."""
    return {
        "on_unsupported": options.on_unsupported,
        "rows": options.rows,
        "memory_limit": options.memory_limit,
    }


def read_forms(text: str) -> dict[str, str]:
    """Read ``conv1=linear,fc1=halfspace``.

    Raises
    ------
    ArgumentTypeError
        What the command line then shows as one line.
    """
    parts = [part.strip().rpartition("=") for part in text.split(",")]
    if not all(name and form for name, _, form in parts):
        raise argparse.ArgumentTypeError(f"{text!r} does not give layers a form: write NAME=linear,NAME=halfspace")
    return {name: form for name, _, form in parts}


def add_export_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``nettrim export``."""
    parser.add_argument("directory", metavar="DIR", help="a finished run")
    parser.add_argument(
        "--form",
        required=True,
        choices=FORMS,
        help="packed: bitmask and values; csr: compressed rows; masks: what stays, as bools; onnx: dense with its "
        "zeros, checked in ONNX Runtime on stored samples",
    )
    parser.add_argument("--out", required=True, metavar="FILE", help="a new file")
    parser.add_argument(
        "--model",
        metavar="MODULE:FACTORY",
        help="of onnx: the module to export, or FILE.pt2; without it the stored forward is, batch norms folded",
    )


def run_export(options: argparse.Namespace) -> tuple[dict[str, Any], str]:
    """Write one form; return what was done as JSON values, and as text."""
    path, out = Path(options.directory), Path(options.out)
    if options.model is not None and options.form != "onnx":
        raise ProblemError(f"--model {options.model} is given, which only --form onnx reads: leave it out.")
    if out.exists() or not out.absolute().parent.is_dir():
        raise ProblemError(f"--out {out} exists, or lies in no existing directory: name a new file.")
    with run_of_this_version(path):
        run = read_run(path)
        if run["state"] != "finished":
            raise RunError(f"{path} holds an unfinished run ({progress_of(run)}): go on with it by --resume.")
    state, _ = read_tensors(path / "model.safetensors")
    found: dict[str, Any] = {"form": options.form, "file": str(out), "sizes": sizes(state)}
    if options.form == "onnx":
        found["difference"] = _export_onnx(options, out)
    elif options.form == "masks":
        write_atomically(out, tensor_bytes(read_tensors(path / "masks.safetensors")[0]))
    else:
        (write_csr if options.form == "csr" else write_packed)(out, state)
    found["bytes"] = out.stat().st_size
    known = ", ".join(f"{count:,} {form}" for form, count in found["sizes"].items())
    checked = (
        f"\nlargest relative difference in ONNX Runtime: {found['difference']:.2g}" if "difference" in found else ""
    )
    # of a smaller network, what is left is dense
    speed = "" if "structure.json" in run["files"] else f"\n{SPEED}"
    return found, f"{out}: {found['bytes']:,} bytes (all weights: {known}){checked}{speed}"


def _export_onnx(options: argparse.Namespace, out: Path) -> float:
    model = None if options.model is None else load_model(options.model, None)
    result = load_result(options.directory, model)
    if result.account is None:
        raise RunError(
            f"{options.directory} stored no samples, on which an ONNX file is checked: export_onnx takes some."
        )
    batch = result.account.batches.first(_EXAMPLES)
    if batch.kwargs:
        raise UnsupportedError(
            f"the network takes {', '.join(batch.kwargs)} by name, and an ONNX file takes inputs by place: wrap it "
            "so that all come by place, and call export_onnx."
        )
    return export_onnx(result.model, batch.inputs, out)


def batches_of(split: Any, count: int, size: int = 1000) -> list[Any]:
    """Return the first so many samples of a split, with their labels if there are any, in batches."""
    inputs, labels = split.inputs[:count], split.labels
    pieces = range(0, len(inputs), size)
    if labels is None:
        return [inputs[i : i + size] for i in pieces]
    return [(inputs[i : i + size], labels[:count][i : i + size]) for i in pieces]


def check_numbers(options: argparse.Namespace) -> None:
    """Refuse numbers out of range before anything is read."""
    if options.samples < 1:
        raise ProblemError(f"--samples {options.samples} is out of range: at least 1.")
    check_seed(options.seed)
