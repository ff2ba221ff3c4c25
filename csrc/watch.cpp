// Tells whether tensors and module dictionaries are still what they were: the host's part of an
// update that reads its sources through cached addresses. A check costs a few nanoseconds a tensor.
//
// Watched tensors are held by reference, so an assignment to `.data` is seen, and no address is
// ever that of a freed tensor that another one took over. Remembered tensors are not held: whoever
// asks has the tensors at hand, and whether their memory is the same is all that is asked.

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
constexpr int64_t kAtOnce = 32;

// Tensors and what they were, in the order in which a check reads it: where thousands of small
// tensors are watched, most of its time is waiting for memory.
class Facts {
 public:
  // Appends the facts of a tensor, and the tensor itself if it is to be held.
  void add(const Tensor& tensor, bool held) {
    const auto sizes = tensor.sizes(), strides = tensor.strides();
    facts_.push_back({held ? tensor : Tensor(), tensor.const_data_ptr(), tensor.scalar_type(),
                      static_cast<int64_t>(sizes.size()), geometry_.size()});
    geometry_.insert(geometry_.end(), sizes.begin(), sizes.end());
    geometry_.insert(geometry_.end(), strides.begin(), strides.end());
    if (tensor.is_cpu()) grain_ = kGrain;
  }

  // Of tensors that are held.
  bool hold() const {
    std::atomic<bool> all{true};
    torch::stable::parallel_for(0, count(), grain_, [&](int64_t begin, int64_t end) {
      const auto held = [&](int64_t i) -> const Tensor& { return facts_[i].tensor; };
      if (!hold_between(begin, end, held)) all = false;
    });
    return all;
  }

  // Of the tensors of two lists, one after the other.
  bool hold_for(const std::vector<Tensor>& first, const std::vector<Tensor>& second) const {
    const int64_t split = static_cast<int64_t>(first.size());
    if (count() != split + static_cast<int64_t>(second.size())) return false;
    return hold_between(0, count(), [&](int64_t i) -> const Tensor& {
      return i < split ? first[i] : second[i - split];
    });
  }

 private:
  struct Fact {
    Tensor tensor;
    const void* data;
    ScalarType type;
    int64_t dim;
    size_t geometry;  // place of the sizes, which the strides follow
  };

  int64_t count() const { return static_cast<int64_t>(facts_.size()); }

  // Fact by fact over a few tensors, not tensor by tensor: each first look at a tensor waits for
  // memory, and waits that do not depend on each other are one.
  template <typename At>
  bool hold_between(int64_t begin, int64_t end, const At& tensor) const {
    for (; begin < end; begin += kAtOnce) {
      const int64_t stop = std::min(end, begin + kAtOnce);
      bool same = true;
      for (int64_t i = begin; i < stop; ++i) same &= tensor(i).scalar_type() == facts_[i].type;
      for (int64_t i = begin; i < stop; ++i) same &= tensor(i).const_data_ptr() == facts_[i].data;
      for (int64_t i = begin; same && i < stop; ++i) {
        const auto sizes = tensor(i).sizes(), strides = tensor(i).strides();
        const int64_t* was = geometry_.data() + facts_[i].geometry;
        same = static_cast<int64_t>(sizes.size()) == facts_[i].dim &&
               std::equal(sizes.begin(), sizes.end(), was) &&
               std::equal(strides.begin(), strides.end(), was + facts_[i].dim);
      }
      if (!same) return false;
    }
    return true;
  }

  std::vector<Fact> facts_;
  int64_t grain_ = kGrainOfOthers;
  std::vector<int64_t> geometry_;  // sizes, then strides, of one tensor after the other
};

using Watch = std::shared_ptr<const Facts>;

std::mutex mutex;
std::unordered_map<int64_t, Watch> watches;
int64_t last_watch = 0;

int64_t keep(Watch facts) {
  const std::lock_guard<std::mutex> lock(mutex);
  watches.emplace(++last_watch, std::move(facts));
  return last_watch;
}

Watch find(int64_t id) {
  const std::lock_guard<std::mutex> lock(mutex);
  const auto found = watches.find(id);
  return found == watches.end() ? nullptr : found->second;
}

int64_t watch(std::vector<Tensor> tensors) {
  auto facts = std::make_shared<Facts>();
  for (const Tensor& tensor : tensors) facts->add(tensor, true);
  return keep(std::move(facts));
}

int64_t remember(std::vector<Tensor> averages, std::vector<Tensor> sources) {
  auto facts = std::make_shared<Facts>();
  for (const Tensor& tensor : averages) facts->add(tensor, false);
  for (const Tensor& tensor : sources) facts->add(tensor, false);
  return keep(std::move(facts));
}

bool remembered(int64_t id, std::vector<Tensor> averages, std::vector<Tensor> sources) {
  const Watch facts = find(id);
  return facts && facts->hold_for(averages, sources);
}

}  // namespace

bool watched_tensors_hold(int64_t id) {
  const Watch facts = find(id);
  return facts && facts->hold();
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
  m.impl("remember", TORCH_BOX(&swa_fast::remember));
  m.impl("remembered", TORCH_BOX(&swa_fast::remembered));
}
