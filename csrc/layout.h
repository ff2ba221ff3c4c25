// The numbers of swa_fast/_layout.py that C++ needs, under the same names: MAX_AVERAGES is
// kMaxAverages. A test compares the two files line by line.
#pragma once

#include <cstdint>

namespace swa_fast {

constexpr int kMaxAverages = 16;

// Type codes.
constexpr int kFloat = 0;
constexpr int kDouble = 1;
constexpr int kBfloat16 = 2;
constexpr int kHalf = 3;
constexpr int kBytes = 4;

// Words of a segment, and where the fields of the second begin.
constexpr int kSource = 0;
constexpr int kPacked = 1;
constexpr int kPlace = 2;
constexpr int kSegmentHeader = 3;
constexpr int kAverageType = 32;
constexpr int kSourceType = 40;
constexpr int kCopied = 48;
constexpr int kAlignment = 49;

// Rules.
constexpr int kRuleColumns = 8;
constexpr int kSwa = 0;
constexpr int kConstant = 1;
constexpr int kInverseGamma = 2;
constexpr int kRatio = 3;
constexpr int kExternal = 4;
constexpr int kPowerLaw = 5;
constexpr int kExponential = 6;
constexpr int kDebiased = 7;
constexpr int kRing = 8;
constexpr int kFilled = 9;

// Counters.
constexpr int kTicket = 0;
constexpr int kNonFinite = 1;
constexpr int kSkipped = 2;
constexpr int kCounters = 3;

// Estimators of a BatchNorm pass.
constexpr int kTorch = 0;
constexpr int kWeighted = 1;
constexpr int kPooled = 2;

// Rows of a batch's statistics, and of the pass' accumulators.
constexpr int kBatchValues = 0;
constexpr int kBatchSamples = 1;
constexpr int kBatchMean = 2;
constexpr int kBatchM2 = 3;
constexpr int kBatchRows = 4;
constexpr int kValues = 0;
constexpr int kSamples = 1;
constexpr int kBatches = 2;
constexpr int kMean = 3;
constexpr int kSpread = 4;
constexpr int kMeanMean = 5;
constexpr int kMeanM2 = 6;
constexpr int kVarMean = 7;
constexpr int kVarM2 = 8;
constexpr int kAccumulatorRows = 9;

}  // namespace swa_fast
