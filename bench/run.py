"""All benchmarks, or some of them, in one run.

    python bench/run.py --quick                     what most users want to see, in three minutes
    python bench/run.py --out results.csv           everything
    python bench/run.py --ops update --models ViT-L/16
    python bench/report.py results.csv              tables and charts of the rows
    python bench/compare.py old.csv new.csv         regressions beyond the noise

Each suite is a program with the same options, for instance ``python bench/bench_swap.py``.
Packages that are not installed (timm, diffusers, ema-pytorch, torch-ema) are named and left out.
"""

from __future__ import annotations

import sys

import bench_average
import bench_batch_norm
import bench_combine
import bench_k_averages
import bench_low_precision
import bench_swap
import bench_update_bn
from harness import main

__all__ = ["SUITES"]

SUITES = [
    bench_average.SUITE,
    bench_k_averages.SUITE,
    bench_low_precision.SUITE,
    bench_swap.SUITE,
    bench_batch_norm.SUITE,
    bench_update_bn.SUITE,
    bench_combine.SUITE,
]

if __name__ == "__main__":
    sys.exit(main(SUITES, str(__doc__)))
