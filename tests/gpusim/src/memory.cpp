// Device memory (host memory with bookkeeping), faults, counters.
#include <cxxabi.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <sstream>
#include <stdexcept>

#include "gpusim.h"

namespace gs {
Options opt;
std::recursive_mutex g_mu;
const size_t kTotalMem = 80ull << 30;
int g_fail_count = 0;
std::map<std::string, KernelStat> g_kernels;
std::map<std::string, uint64_t> g_count, g_aten, g_foreign;

static const size_t kGuard = 512, kQuarantine = 256u << 20;
static std::map<uintptr_t, Alloc*>& table() {
  static auto* t = new std::map<uintptr_t, Alloc*>;
  return *t;
}
static std::deque<Alloc*>& quarantine() {
  static auto* q = new std::deque<Alloc*>;
  return *q;
}
static size_t q_bytes = 0, in_use = 0, peak_use = 0;
static uint64_t next_id = 1;
static int sticky = 0;

static bool env_flag(const char* n, bool d) {
  const char* e = getenv(n);
  return e && *e ? strcmp(e, "0") != 0 : d;
}
static uint64_t env_num(const char* n, uint64_t d) {
  const char* e = getenv(n);
  return e && *e ? strtoull(e, nullptr, 0) : d;
}

static void at_end() {
  if (opt.report) print_report();
  if (g_fail_count) {
    fprintf(stderr,
            "gpusim: %d device fault(s) were reported in this process; exit status forced to 86\n",
            g_fail_count);
    fflush(stdout);
    fflush(stderr);
    _exit(86);
  }
}
void init() {
  static bool done = [] {
    opt.uninit = env_flag("GPUSIM_UNINIT", true);
    opt.race = env_flag("GPUSIM_RACE", true);
    opt.trips = env_flag("GPUSIM_TRIPS", true);
    opt.race_threads = env_num("GPUSIM_RACE_THREADS", opt.race_threads);
    opt.race_bytes = env_num("GPUSIM_RACE_BYTES", opt.race_bytes);
    opt.max_instr = env_num("GPUSIM_MAX_INSTR", opt.max_instr);
    opt.trace = env_flag("GPUSIM_TRACE", false);
    opt.report = env_flag("GPUSIM_REPORT", false);
    atexit(at_end);
    return true;
  }();
  (void)done;
}

thread_local bool soft_die = false;
void die(const std::string& m) {
  if (soft_die) throw std::runtime_error(m);
  fflush(stdout);
  fprintf(stderr, "\ngpusim: FATAL: %s\n", m.c_str());
  fflush(stderr);
  abort();
}
std::string demangle(const std::string& n) {
  int st = 0;
  char* d = abi::__cxa_demangle(n.c_str(), nullptr, nullptr, &st);
  std::string r = st == 0 && d ? d : n;
  free(d);
  return r;
}

// ---------------------------------------------------------------- allocation
static void poison_fill(uintptr_t lo, uintptr_t hi) {
  for (uintptr_t a = lo & ~3ull; a < hi; a += 4) *(uint32_t*)a = poison(a);
}
void* mem_alloc(size_t n, AllocKind kind, unsigned flags) {
  std::lock_guard<std::recursive_mutex> g(g_mu);
  init();
  size_t body = (n + 511) / 512 * 512;
  size_t total = body + 2 * kGuard;
  if (in_use + n > kTotalMem) return nullptr;
  void* base = nullptr;
  if (posix_memalign(&base, 512, total)) return nullptr;
  auto* a = new Alloc;
  a->base = base;
  a->total = total;
  a->kind = kind;
  a->flags = flags;
  a->id = next_id++;
  a->lo = (uintptr_t)base + kGuard;
  a->hi = a->lo + n;
  memset(base, 0xA5, kGuard);
  memset((void*)a->hi, 0xA5, total - kGuard - n);
  if (kind == A_DEVICE || kind == A_MANAGED) poison_fill(a->lo, a->hi & ~3ull);
  if ((kind == A_DEVICE || kind == A_MANAGED) && (a->hi & 3)) {
    uint32_t p = poison(a->hi & ~3ull);
    memcpy((void*)(a->hi & ~3ull), &p, a->hi & 3);
  }
  table()[a->lo] = a;
  if (kind == A_DEVICE || kind == A_MANAGED) {
    in_use += n;
    peak_use = std::max(peak_use, in_use);
  }
  return (void*)a->lo;
}
static void really_free(Alloc* a) {
  table().erase(a->lo);
  if (a->shadow) munmap(a->shadow, a->shadow_bytes);
  free(a->base);
  delete a;
}
bool mem_free(void* p) {
  std::lock_guard<std::recursive_mutex> g(g_mu);
  auto it = table().find((uintptr_t)p);
  if (it == table().end() || it->second->freed || !it->second->base) return false;
  Alloc* a = it->second;
  bool bad = false;
  for (auto* c = (unsigned char*)a->base; c < (unsigned char*)a->lo; ++c) bad |= *c != 0xA5;
  for (auto* c = (unsigned char*)a->hi; c < (unsigned char*)a->base + a->total; ++c)
    bad |= *c != 0xA5;
  if (bad) {
    char b[160];
    snprintf(b, sizeof b,
             "guard zone of allocation #%llu (%zu bytes at %p) was overwritten by host code (found "
             "when freed)",
             (unsigned long long)a->id, (size_t)(a->hi - a->lo), p);
    fault(b, 700);
  }
  a->freed = true;
  if (a->kind == A_DEVICE || a->kind == A_MANAGED) {
    in_use -= a->hi - a->lo;
    poison_fill(a->lo, a->hi);
  }
  quarantine().push_back(a);
  q_bytes += a->total;
  while (q_bytes > kQuarantine && !quarantine().empty()) {
    Alloc* o = quarantine().front();
    quarantine().pop_front();
    q_bytes -= o->total;
    really_free(o);
  }
  return true;
}
Alloc* mem_find(uintptr_t x) {
  auto& t = table();
  auto it = t.upper_bound(x);
  if (it == t.begin()) return nullptr;
  Alloc* a = std::prev(it)->second;
  return x < a->hi || (x == a->lo) ? a : nullptr;
}
Alloc* mem_nearest(uintptr_t x) {
  auto& t = table();
  if (t.empty()) return nullptr;
  auto it = t.upper_bound(x);
  Alloc* hi = it == t.end() ? nullptr : it->second;
  Alloc* lo = it == t.begin() ? nullptr : std::prev(it)->second;
  if (!lo) return hi;
  if (!hi || x < lo->hi) return lo;
  return x - lo->hi < hi->lo - x ? lo : hi;
}
Alloc* mem_register(void* p, size_t n, AllocKind kind, unsigned flags) {
  std::lock_guard<std::recursive_mutex> g(g_mu);
  auto* a = new Alloc;
  a->lo = (uintptr_t)p;
  a->hi = a->lo + n;
  a->kind = kind;
  a->flags = flags;
  a->id = next_id++;
  table()[a->lo] = a;
  return a;
}
void mem_unregister(void* p) {
  std::lock_guard<std::recursive_mutex> g(g_mu);
  auto it = table().find((uintptr_t)p);
  if (it != table().end() && !it->second->base) {
    delete it->second;
    table().erase(it);
  }
}
size_t mem_in_use() { return in_use; }
void mem_reset_peak() { peak_use = in_use; }
void mem_check_range(const void* p, size_t n, const char* what) {
  if (!n) return;
  Alloc* a = mem_find((uintptr_t)p);
  if (!a) return;  // plain host memory
  char b[256];
  if (a->freed) {
    snprintf(b, sizeof b, "%s of %zu bytes at %p: use after free (allocation #%llu)", what, n, p,
             (unsigned long long)a->id);
    fault(b, 700);
  } else if ((uintptr_t)p + n > a->hi) {
    snprintf(b, sizeof b,
             "%s of %zu bytes at %p runs past the end of allocation #%llu (%zu bytes at %p)", what,
             n, p, (unsigned long long)a->id, (size_t)(a->hi - a->lo), (void*)a->lo);
    fault(b, 700);
    die("host-side copy out of bounds: not performed");
  }
}

// ---------------------------------------------------------------- faults
std::vector<std::string>& fault_log() {
  static auto* v = new std::vector<std::string>;
  return *v;
}
void fault(const std::string& what, int err) {
  std::lock_guard<std::recursive_mutex> g(g_mu);
  g_fail_count++;
  if (!sticky) sticky = err;
  fault_log().push_back(what);
  if (fault_log().size() <= 50) fprintf(stderr, "\n==== gpusim fault: %s\n", what.c_str());
  fflush(stderr);
}
int take_sticky() {
  int s = sticky;
  sticky = 0;
  return s;
}

// ---------------------------------------------------------------- counters
static std::string q(const std::string& s) {
  std::string r = "\"";
  for (char c : s) {
    if (c == '"' || c == '\\') r += '\\';
    if ((unsigned char)c < 32) continue;
    r += c;
  }
  return r + "\"";
}
static void kv(std::ostringstream& o, const char* k, uint64_t v, bool& first) {
  o << (first ? "" : ",") << q(k) << ":" << v;
  first = false;
}
static void stat_json(std::ostringstream& o, const KernelStat& s) {
  bool f = true;
  o << "{";
  kv(o, "launches", s.launches, f);
  kv(o, "instructions", s.instr, f);
  kv(o, "warp_instructions", s.warp_instr, f);
  kv(o, "ld_bytes", s.ld_bytes, f);
  kv(o, "st_bytes", s.st_bytes, f);
  kv(o, "ld_requests", s.ld_req, f);
  kv(o, "st_requests", s.st_req, f);
  kv(o, "ld_sectors", s.ld_sectors, f);
  kv(o, "st_sectors", s.st_sectors, f);
  kv(o, "atomics", s.atomics, f);
  kv(o, "atomic_sectors", s.atom_sectors, f);
  kv(o, "shared_ld_bytes", s.shared_ld, f);
  kv(o, "shared_st_bytes", s.shared_st, f);
  kv(o, "local_bytes", s.local_bytes, f);
  kv(o, "widest_ld", s.widest_ld, f);
  kv(o, "widest_st", s.widest_st, f);
  if (opt.trips) kv(o, "load_round_trips", s.load_round_trips, f);
  kv(o, "threads", s.threads, f);
  kv(o, "blocks", s.blocks, f);
  kv(o, "dynamic_smem", s.smem, f);
  o << ",\"grid\":[" << s.grid[0] << "," << s.grid[1] << "," << s.grid[2] << "]";
  o << ",\"block\":[" << s.block[0] << "," << s.block[1] << "," << s.block[2] << "]";
  double b = (double)s.ld_bytes, sec = 32.0 * s.ld_sectors;
  o << ",\"ld_efficiency\":" << (sec ? b / sec : 1.0);
  b = (double)s.st_bytes;
  sec = 32.0 * s.st_sectors;
  o << ",\"st_efficiency\":" << (sec ? b / sec : 1.0) << "}";
}
std::string counters_json() {
  std::lock_guard<std::recursive_mutex> g(g_mu);
  std::ostringstream o;
  KernelStat tot;
  o << "{\"kernels\":{";
  bool first = true;
  for (auto& k : g_kernels) {
    o << (first ? "" : ",") << q(k.first) << ":";
    first = false;
    stat_json(o, k.second);
    auto& s = k.second;
    tot.launches += s.launches;
    tot.instr += s.instr;
    tot.warp_instr += s.warp_instr;
    tot.ld_bytes += s.ld_bytes;
    tot.st_bytes += s.st_bytes;
    tot.ld_req += s.ld_req;
    tot.st_req += s.st_req;
    tot.ld_sectors += s.ld_sectors;
    tot.st_sectors += s.st_sectors;
    tot.atomics += s.atomics;
    tot.atom_sectors += s.atom_sectors;
    tot.shared_ld += s.shared_ld;
    tot.shared_st += s.shared_st;
    tot.local_bytes += s.local_bytes;
    tot.widest_ld = std::max(tot.widest_ld, s.widest_ld);
    tot.widest_st = std::max(tot.widest_st, s.widest_st);
    tot.load_round_trips = std::max(tot.load_round_trips, s.load_round_trips);
    tot.threads += s.threads;
    tot.blocks += s.blocks;
  }
  o << "},\"kernel_total\":";
  stat_json(o, tot);
  auto dump = [&](const char* name, std::map<std::string, uint64_t>& m) {
    o << ",\"" << name << "\":{";
    bool f = true;
    for (auto& e : m) kv(o, e.first.c_str(), e.second, f);
    o << "}";
  };
  dump("aten", g_aten);
  dump("foreign", g_foreign);
  dump("total", g_count);
  o << ",\"memory\":{\"in_use\":" << in_use << ",\"peak\":" << peak_use << "}";
  o << ",\"faults\":" << g_fail_count << "}";
  return o.str();
}
void print_report() {
  std::lock_guard<std::recursive_mutex> g(g_mu);
  if (g_kernels.empty() && g_count.empty() && g_aten.empty()) return;
  fprintf(stderr, "\n==== gpusim report (pid %d)\n", (int)getpid());
  for (auto& e : g_count)
    fprintf(stderr, "  %-28s %llu\n", e.first.c_str(), (unsigned long long)e.second);
  for (auto& e : g_foreign)
    fprintf(stderr, "  foreign launch %-13s %llu\n", e.first.c_str(), (unsigned long long)e.second);
  for (auto& e : g_kernels) {
    auto& s = e.second;
    fprintf(stderr,
            "  kernel %s\n    launches %llu  last grid (%u,%u,%u) block (%u,%u,%u)  instr %llu\n"
            "    loads  %llu B in %llu requests, %llu sectors (%.0f%% useful, widest %u B)\n"
            "    stores %llu B in %llu requests, %llu sectors (%.0f%% useful, widest %u B)  "
            "atomics %llu  round trips %u\n",
            demangle(e.first).c_str(), (unsigned long long)s.launches, s.grid[0], s.grid[1],
            s.grid[2], s.block[0], s.block[1], s.block[2], (unsigned long long)s.instr,
            (unsigned long long)s.ld_bytes, (unsigned long long)s.ld_req,
            (unsigned long long)s.ld_sectors,
            s.ld_sectors ? 100.0 * s.ld_bytes / (32.0 * s.ld_sectors) : 100.0, s.widest_ld,
            (unsigned long long)s.st_bytes, (unsigned long long)s.st_req,
            (unsigned long long)s.st_sectors,
            s.st_sectors ? 100.0 * s.st_bytes / (32.0 * s.st_sectors) : 100.0, s.widest_st,
            (unsigned long long)s.atomics, s.load_round_trips);
  }
  uint64_t n = 0;
  for (auto& e : g_aten) n += e.second;
  if (n) {
    fprintf(stderr, "  aten ops on the device: %llu\n", (unsigned long long)n);
    for (auto& e : g_aten)
      fprintf(stderr, "    %-40s %llu\n", e.first.c_str(), (unsigned long long)e.second);
  }
  fflush(stderr);
}
}  // namespace gs

// ---------------------------------------------------------------- C interface for the Python
// package
extern "C" {
const char* gpusim_counters() {
  static thread_local std::string s;
  s = gs::counters_json();
  return s.c_str();
}
void gpusim_reset() {
  std::lock_guard<std::recursive_mutex> g(gs::g_mu);
  gs::g_kernels.clear();
  gs::g_count.clear();
  gs::g_aten.clear();
  gs::g_foreign.clear();
  gs::mem_reset_peak();
}
void gpusim_count(const char* what, unsigned long long n) {
  std::lock_guard<std::recursive_mutex> g(gs::g_mu);
  gs::g_count[what] += n;
}
void gpusim_count_aten(const char* op) {
  std::lock_guard<std::recursive_mutex> g(gs::g_mu);
  gs::g_aten[op]++;
  gs::g_count["aten_ops"]++;
}
// faults: text of all reports joined by newlines; taking them clears them and the exit status
const char* gpusim_take_faults() {
  std::lock_guard<std::recursive_mutex> g(gs::g_mu);
  static thread_local std::string s;
  s.clear();
  for (auto& f : gs::fault_log()) s += f + "\n\x1e";
  gs::fault_log().clear();
  gs::g_fail_count = 0;
  gs::take_sticky();
  return s.c_str();
}
}
