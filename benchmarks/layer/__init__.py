"""Solvers on one layer, side by side: certified gap against seconds and GEMM pairs."""
