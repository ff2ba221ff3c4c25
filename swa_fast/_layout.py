"""The numbers on which engine, rules, reference and kernels agree, each of them here.

``csrc/layout.h`` repeats those that C++ needs, and a test compares the two. The Triton kernels
import them from here.

**Table of segments**, int64 [segments, SEGMENT_HEADER + k] for k averages. A segment is a run of
consecutive elements: a whole tensor or a part of one.

==================  ===============================================================================
word                meaning
==================  ===============================================================================
``SOURCE``          address of the first element of the source
``PACKED``          the fields below
``PLACE``           number of the first element within its average; random bits depend on it
``SEGMENT_HEADER``  address of the first element of average 0; those of averages 1 to k - 1 follow
==================  ===============================================================================

================  ====  ===========================================================================
field             bits  meaning
================  ====  ===========================================================================
count             0-31  elements
``AVERAGE_TYPE``  8     type code of the averages
``SOURCE_TYPE``   8     type code of the source
``COPIED``        1     the source is copied whatever the rule says
``ALIGNMENT``     3     binary logarithm of what divides the address of every average, 16 at most
================  ====  ===========================================================================
"""

from __future__ import annotations

import torch

MAX_AVERAGES = 16  # of one update: their rules travel as kernel arguments

# Type codes.
FLOAT, DOUBLE, BFLOAT16, HALF, BYTES = range(
    5
)  # BYTES: any type, copied unchanged; elements are bytes
TYPE_CODES = {
    torch.float32: FLOAT,
    torch.float64: DOUBLE,
    torch.bfloat16: BFLOAT16,
    torch.float16: HALF,
}

# Words of a segment.
SOURCE, PACKED, PLACE, SEGMENT_HEADER = range(4)

# Where the fields of the word PACKED begin.
AVERAGE_TYPE, SOURCE_TYPE, COPIED, ALIGNMENT = 32, 40, 48, 49

# Columns of the rules, float64 [k, RULE_COLUMNS], and the kinds in the first of them.
KIND, DECAY, MIN_DECAY, GAMMA, POWER, UPDATE_AFTER_STEP = range(6)
RULE_COLUMNS = 8
SWA, CONSTANT, INVERSE_GAMMA, RATIO, EXTERNAL = range(5)
POWER_LAW, EXPONENTIAL, DEBIASED, RING, FILLED = range(5, 10)

# Counters of a device, int64: blocks that are done, whether the sources hold an infinity or NaN,
# and how many updates were skipped for that.
TICKET, NON_FINITE, SKIPPED, COUNTERS = range(4)

# How the statistics of batches are merged into those of a BatchNorm pass.
ESTIMATORS = ("torch", "weighted", "pooled")
TORCH, WEIGHTED, POOLED = range(3)
# Rows of a batch's statistics, float64 [BATCH_ROWS, channels]: values, samples, mean, and the sum
# of squared deviations from it.
BATCH_VALUES, BATCH_SAMPLES, BATCH_MEAN, BATCH_M2, BATCH_ROWS = range(5)
# Rows of the pass' accumulators, float64 [ACCUMULATOR_ROWS, channels]. SPREAD is the variance, or
# with the pooled estimator the sum of squared deviations; the last four are mean and sum of squared
# deviations, over the batches, of the batches' means and of their variances.
VALUES, SAMPLES, BATCHES, MEAN, SPREAD = range(5)
MEAN_MEAN, MEAN_M2, VAR_MEAN, VAR_M2, ACCUMULATOR_ROWS = range(5, 10)

# Bytes that divide the place of a tensor in memory that the averages of many tensors share.
ROW_ALIGNMENT = 128

# Most elements of a segment; the CPU's threads cut segments by themselves. On a GPU a block or
# program takes a segment, in CUDA of as many bytes of the larger type as its threads load at once.
CPU_SEGMENT = 1 << 30
TRITON_SEGMENT = 4096
CUDA_SEGMENT_BYTES = 16384
# Such a segment is short: one warp loads it at once, and it comes last in the table.
CUDA_SHORT_BYTES = 2048
