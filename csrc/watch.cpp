// Tells whether tensors and module dictionaries are still what they were: the host's part of an
// update that reads its sources through cached addresses. A check costs a few nanoseconds a tensor.
//
// Watched tensors are held by reference, so an assignment to `.data` is seen, and no address is
// ever that of a freed tensor that another one took over.

#include "watch.h"

#include <algorithm>
#include <atomic>
#include <memory>
#include <mutex>
#include <unordered_map>

#include "stable_compat.h"

namespace swa_fast {
namespace {

// Tensors of a thread below which a second one does not pay. Beside a model on another device the
// CPU's threads are asleep, and waking them takes longer than looking at a thousand tensors.
constexpr int64_t kGrain = 256, kGrainOfOthers = 4096;

// Tensors and what they were, in the order in which a check reads it: where thousands of small
// tensors are watched, most of its time is waiting for memory.
class Facts {
 public:
  explicit Facts(const std::vector<Tensor>& tensors) {
    for (const Tensor& tensor : tensors) {
      const auto sizes = tensor.sizes(), strides = tensor.strides();
      facts_.push_back({tensor, tensor.const_data_ptr(), tensor.scalar_type(),
                        static_cast<int64_t>(sizes.size()), geometry_.size()});
      geometry_.insert(geometry_.end(), sizes.begin(), sizes.end());
      geometry_.insert(geometry_.end(), strides.begin(), strides.end());
      if (tensor.is_cpu()) grain_ = kGrain;
    }
  }

  bool hold() const {
    std::atomic<bool> all{true};
    const int64_t count = static_cast<int64_t>(facts_.size());
    torch::stable::parallel_for(0, count, grain_, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        if (!holds(facts_[i])) {
          all = false;
          return;
        }
      }
    });
    return all;
  }

 private:
  struct Fact {
    Tensor tensor;
    const void* data;
    ScalarType type;
    int64_t dim;
    size_t geometry;  // place of the sizes, which the strides follow
  };

  bool holds(const Fact& fact) const {
    if (fact.tensor.const_data_ptr() != fact.data || fact.tensor.scalar_type() != fact.type) {
      return false;
    }
    const auto sizes = fact.tensor.sizes(), strides = fact.tensor.strides();
    const int64_t* was = geometry_.data() + fact.geometry;
    return static_cast<int64_t>(sizes.size()) == fact.dim &&
           std::equal(sizes.begin(), sizes.end(), was) &&
           std::equal(strides.begin(), strides.end(), was + fact.dim);
  }

  std::vector<Fact> facts_;
  int64_t grain_ = kGrainOfOthers;
  std::vector<int64_t> geometry_;  // sizes, then strides, of one tensor after the other
};

using Watch = std::shared_ptr<const Facts>;

std::mutex mutex;
std::unordered_map<int64_t, Watch> watches;
int64_t last_watch = 0;

int64_t watch(std::vector<Tensor> tensors) {
  auto facts = std::make_shared<const Facts>(tensors);
  const std::lock_guard<std::mutex> lock(mutex);
  watches.emplace(++last_watch, std::move(facts));
  return last_watch;
}

}  // namespace

bool watched_tensors_hold(int64_t id) {
  Watch facts;
  {
    const std::lock_guard<std::mutex> lock(mutex);
    const auto found = watches.find(id);
    if (found == watches.end()) return false;
    facts = found->second;
  }
  return facts->hold();
}

void forget_watch(int64_t id) {
  Watch released;  // destroyed after the lock
  const std::lock_guard<std::mutex> lock(mutex);
  const auto found = watches.find(id);
  if (found == watches.end()) return;
  released = std::move(found->second);
  watches.erase(found);
}

}  // namespace swa_fast

STABLE_TORCH_LIBRARY_IMPL(swa_fast, CompositeExplicitAutograd, m) {
  m.impl("watch", TORCH_BOX(&swa_fast::watch));
}
