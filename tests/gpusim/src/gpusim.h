// gpusim: shared declarations of the simulated device.
#pragma once
#include <cstddef>
#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <unordered_map>
#include <vector>

namespace gs {

// ---------------------------------------------------------------- options
struct Options {
  bool uninit = true;                // GPUSIM_UNINIT: report reads of never-written device memory
  bool race = true;                  // GPUSIM_RACE: report races between blocks
  uint64_t race_threads = 1u << 20;  // GPUSIM_RACE_THREADS: biggest launch that is race-checked
  uint64_t race_bytes = 64u << 20;   // GPUSIM_RACE_BYTES: biggest allocation that gets a shadow
  uint64_t max_instr = 40000000000ull;  // GPUSIM_MAX_INSTR: per launch, then "does not end"
  bool trips = true;                    // GPUSIM_TRIPS: count round trips to global memory
  bool trace = false;                   // GPUSIM_TRACE: one line per launch
  bool report = false;                  // GPUSIM_REPORT: counters at exit
};
extern Options opt;
extern std::recursive_mutex g_mu;  // one big lock: the device is sequential
void init();                       // idempotent

// ---------------------------------------------------------------- memory
struct ShadowCell {
  uint32_t w, wt, r, rt;
};  // race shadow of one 4-byte granule
enum AllocKind { A_DEVICE, A_HOST, A_MODULE, A_MANAGED };
struct Alloc {
  uintptr_t lo = 0, hi = 0;  // usable range
  void* base = nullptr;      // what to free
  size_t total = 0;
  AllocKind kind = A_DEVICE;
  bool freed = false;
  uint64_t id = 0;
  ShadowCell* shadow = nullptr;
  size_t shadow_bytes = 0;
  bool shadow_dirty = false;
  unsigned flags = 0;
};
void* mem_alloc(size_t n, AllocKind kind, unsigned flags = 0);
bool mem_free(void* p);           // false: not the start of a live allocation
Alloc* mem_find(uintptr_t a);     // allocation (live or quarantined) whose range holds a
Alloc* mem_nearest(uintptr_t a);  // for messages
Alloc* mem_register(void* p, size_t n, AllocKind kind, unsigned flags);  // foreign memory
void mem_unregister(void* p);
size_t mem_in_use();
void mem_reset_peak();
void mem_check_range(const void* p, size_t n, const char* what);  // host-side copies
extern const size_t kTotalMem;
inline uint32_t poison(uintptr_t granule_addr) {
  uint32_t h = (uint32_t)((granule_addr >> 2) * 0x9E3779B1u) >> 12;
  return 0x7FF00000u | (h == 0xFFFFFu ? 0x5A5A5u : h);
}

// ---------------------------------------------------------------- faults
void fault(const std::string& what, int cuda_error);  // report + sticky error + exit status
int take_sticky();                                    // error to return at a sync (0: none)
extern int g_fail_count;
std::vector<std::string>& fault_log();

// ---------------------------------------------------------------- counters
struct KernelStat {
  uint64_t launches = 0, instr = 0, warp_instr = 0;
  uint64_t ld_bytes = 0, st_bytes = 0, ld_req = 0, st_req = 0, ld_sectors = 0, st_sectors = 0;
  uint64_t atomics = 0, atom_sectors = 0, shared_ld = 0, shared_st = 0, local_bytes = 0;
  uint32_t widest_ld = 0, widest_st = 0;
  uint32_t load_round_trips = 0;  // of the block with most
  uint64_t threads = 0, blocks = 0, smem = 0;
  uint32_t grid[3] = {0, 0, 0}, block[3] = {0, 0, 0};
};
extern std::map<std::string, KernelStat> g_kernels;
extern std::map<std::string, uint64_t> g_count;  // everything that is not per kernel
extern std::map<std::string, uint64_t> g_aten;
extern std::map<std::string, uint64_t> g_foreign;
std::string counters_json();
void print_report();

// ---------------------------------------------------------------- kernels
struct Dim {
  uint32_t x = 1, y = 1, z = 1;
  uint64_t n() const { return (uint64_t)x * y * z; }
};
struct Module;
struct Kernel;
struct Function;
Module* module_from_ptx(const std::string& text, const std::string& origin);
Kernel* module_kernel(Module*, const std::string& name);  // nullptr if absent; decodes on first use
bool module_has(Module*, const std::string& name);
std::vector<std::string> module_entries(Module*);
void* module_global(Module*, const std::string& name, size_t* size);
struct ParamInfo {
  uint32_t offset, size;
};
const std::vector<ParamInfo>& kernel_params(Kernel*);
uint32_t kernel_param_bytes(Kernel*);
const std::string& kernel_name(Kernel*);
struct KernelInfo {
  uint32_t static_smem, local_bytes, regs, max_threads;
};
KernelInfo kernel_info(Kernel*);
// executes now; params is a packed buffer of kernel_param_bytes()
void kernel_run(Kernel*, Dim grid, Dim block, uint32_t dyn_smem, const void* params,
                bool cooperative);
std::string demangle(const std::string&);
[[noreturn]] void die(const std::string& msg);  // tool error: cannot go on
extern thread_local bool soft_die;              // die() throws instead (used by the check command)

// ---------------------------------------------------------------- streams and graphs
struct Graph {
  std::vector<std::pair<std::string, std::function<void()>>> nodes;
  int refs = 1;
};
struct Stream {
  bool capturing = false, invalid = false;
  Graph* graph = nullptr;
  unsigned long long id = 0;
  unsigned flags = 0;
  int prio = 0;
  Stream* origin = nullptr;
  int mode = 0;
};
Stream* stream_of(void* handle);  // 0, 1 (legacy), 2 (per thread) -> default stream
bool enqueue(void* stream, const char* kind, std::function<void()> fn);  // true: recorded, not run
int sync_check(void* stream);  // error code when a sync is not allowed now, or sticky error
int launch(Kernel*, Dim grid, Dim block, uint32_t smem, void* stream, void** args, void** extra,
           bool coop);
void* rt_kernel_from_host(
    const void* host_fn);  // Kernel* of a registered host stub, for the driver API

}  // namespace gs
