// An update of averages on the CPU that does not go through torch's dispatcher, which takes longer
// than a small model's update: what swa_fast._C runs where nobody would see the operator. The
// operator update_.cpu does the same.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>

namespace swa_fast {

class DirectUpdate {
 public:
  virtual ~DirectUpdate() = default;
  // Python's lock is not needed. Throws what torch's threads throw.
  virtual void run() = 0;
};

// What the operator gets in tensors, as addresses; all of it must outlive the update.
struct DirectArguments {
  int64_t* n_averaged;   // [averages]
  int64_t* counters;     // [kCounters], or null
  const double* rules;   // [averages, kRuleColumns]
  const int64_t* table;  // [segments, kSegmentHeader + averages]
  int64_t segments;
  int averages;
  std::optional<int64_t> seed;
  bool skip_nonfinite;
};

std::unique_ptr<DirectUpdate> make_direct_update(const DirectArguments& arguments);

}  // namespace swa_fast
