// Tells whether tensors and module dictionaries are still what they were: the host's part of an
// update that reads its sources through cached addresses. A check costs a few nanoseconds a tensor.
//
// Watched tensors are held by reference, so an assignment to `.data` is seen, and no address is
// ever that of a freed tensor that another one took over.

#include "watch.h"

#include <algorithm>
#include <memory>
#include <mutex>
#include <unordered_map>

#include "stable_compat.h"

namespace swa_fast {
namespace {

struct Facts {
  Tensor tensor;
  const void* data;
  ScalarType type;
  std::vector<int64_t> geometry;  // sizes, then strides

  explicit Facts(const Tensor& t) : tensor(t), data(t.const_data_ptr()), type(t.scalar_type()) {
    const auto sizes = t.sizes(), strides = t.strides();
    geometry.assign(sizes.begin(), sizes.end());
    geometry.insert(geometry.end(), strides.begin(), strides.end());
  }

  bool hold() const {
    if (tensor.const_data_ptr() != data || tensor.scalar_type() != type) return false;
    const auto sizes = tensor.sizes(), strides = tensor.strides();
    return sizes.size() + strides.size() == geometry.size() &&
           std::equal(sizes.begin(), sizes.end(), geometry.begin()) &&
           std::equal(strides.begin(), strides.end(), geometry.begin() + sizes.size());
  }
};

using Watch = std::shared_ptr<const std::vector<Facts>>;

std::mutex mutex;
std::unordered_map<int64_t, Watch> watches;
int64_t last_watch = 0;

int64_t watch(std::vector<Tensor> tensors) {
  auto facts = std::make_shared<const std::vector<Facts>>(tensors.begin(), tensors.end());
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
  return std::all_of(facts->begin(), facts->end(), [](const Facts& f) { return f.hold(); });
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
