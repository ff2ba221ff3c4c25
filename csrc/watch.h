// watch.cpp for module_cpu.cpp, which knows Python and not torch.
#pragma once

#include <cstdint>

namespace swa_fast {

// True while every tensor of the watch has the address, type, sizes and strides it had at first.
bool watched_tensors_hold(int64_t id);

void forget_watch(int64_t id);

}  // namespace swa_fast
