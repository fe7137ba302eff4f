"""What a path of radii costs, against its hardest radius alone.

    python -m benchmarks.layer.path --layers fc1 fc2

solves LeNet-300-100's layers for 20 radii between 0.05 and 0.5 with `solve_path`, each from the one before, and the
smallest radius alone from cold, and prints both, the certificates with them.
"""

from __future__ import annotations

import argparse
import time

import numpy as np

import nettrim
from benchmarks.layer.datasets import SAMPLES, catalogue
from nettrim.report.text import text_table


def main() -> None:
    """Time every layer, after one solve that compiles."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", nargs="+", default=["fc1", "fc2"], choices=["fc1", "fc2"])
    parser.add_argument("--samples", type=int, default=SAMPLES)
    parser.add_argument("--radii", type=int, default=20)
    parser.add_argument("--solver", default="newton")
    options = parser.parse_args()
    radii = np.geomspace(0.05, 0.5, options.radii).tolist()
    rows = []
    for layer in options.layers:
        problem = catalogue(options.samples).instances[f"{layer}-0.1"].build().problem
        given = problem.inputs, problem.targets
        nettrim.solve_layer(*given, epsilon=0.5, solver=options.solver)
        began = time.perf_counter()
        nettrim.solve_layer(*given, epsilon=radii[0], solver=options.solver)
        alone = time.perf_counter() - began
        began = time.perf_counter()
        path = nettrim.solve_path(*given, radii, solver=options.solver)
        seconds = time.perf_counter() - began
        worst = max(solution.certificate.gap for solution in path)
        row = (layer, f"{alone:.2f}", f"{seconds:.2f}", f"{seconds / alone:.2f}", f"{worst:.1e}")
        rows.append(row)
    print(text_table(["layer", "hardest alone, s", f"{len(radii)} radii, s", "ratio", "largest gap"], rows))


if __name__ == "__main__":
    main()
