"""The benchmarks lie beside the package, so they are on the path only where the checkout is."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
