// Executor: warp scheduling, barriers, memory with its checks and counters.
#include <sys/mman.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>

#include "trips.h"

namespace gs {
uint64_t g_clock = 0;

// ---------------------------------------------------------------- messages
std::string inst_where(Warp& w, const Inst& I, int lane) {
  Block& b = *w.blk;
  Launch& L = *b.L;
  uint32_t t = w.id * 32 + lane;
  uint32_t tx = t % L.block.x, ty = t / L.block.x % L.block.y, tz = t / L.block.x / L.block.y;
  char buf[512];
  snprintf(buf, sizeof buf, "block (%u,%u,%u) thread (%u,%u,%u)", b.idx.x, b.idx.y, b.idx.z, tx, ty,
           tz);
  return "\n    kernel " + demangle(L.k->name) + "\n    " + buf + "\n    PTX line " +
         std::to_string(I.line) + ": " + module_line(L.k->mod, I.line);
}
void report(Warp& w, const Inst& I, int lane, const std::string& what, int err, bool fatal) {
  Launch& L = *w.blk->L;
  int& n = L.reported[{I.line, err}];
  if (fatal || (n++ == 0 && L.reports++ < 8)) fault(what + inst_where(w, I, lane), err);
  if (fatal) throw Fatal();
}
static std::string describe(uintptr_t a) {
  char b[256];
  Alloc* x = mem_nearest(a);
  if (!x) return "";
  if (a >= x->hi)
    snprintf(b, sizeof b, "; %zu bytes past the end of allocation #%llu (%zu bytes)",
             (size_t)(a - x->hi), (unsigned long long)x->id, (size_t)(x->hi - x->lo));
  else if (a < x->lo)
    snprintf(b, sizeof b, "; %zu bytes before allocation #%llu (%zu bytes)", (size_t)(x->lo - a),
             (unsigned long long)x->id, (size_t)(x->hi - x->lo));
  else
    snprintf(b, sizeof b, "; at offset %zu of allocation #%llu (%zu bytes)", (size_t)(a - x->lo),
             (unsigned long long)x->id, (size_t)(x->hi - x->lo));
  return b;
}
static std::string hex(uint64_t v) {
  char b[32];
  snprintf(b, sizeof b, "0x%llx", (unsigned long long)v);
  return b;
}

// ---------------------------------------------------------------- addresses
static inline void addresses(Warp& w, const Inst& I, uint32_t m, uint64_t* ad) {
  if (I.a.size == 8) {
    const uint64_t* p = (const uint64_t*)(w.R + I.a.off);
    if (m == ~0u)
      for (int l = 0; l < 32; ++l) ad[l] = p[l] + I.imm;
    else
      GS_LANES(m, l) ad[l] = p[l] + I.imm;
  } else
    GS_LANES(m, l) ad[l] = rd(w, I.a, l) + I.imm;
}
enum Acc { ACC_LD, ACC_ST, ACC_AT };

// ---------------------------------------------------------------- race shadow
static bool ordered(Launch& L, Block& b, uint32_t other,
                    uint32_t t) {  // other's access at time t happens before b now
  auto& rel = L.releases[other];
  auto it = std::upper_bound(rel.begin(), rel.end(), t);
  return it != rel.end() && b.acquire_at > *it;
}
static ShadowCell* shadow_of(Launch& L, Alloc* a) {
  if (!a->shadow) {
    a->shadow_bytes = ((a->hi - a->lo) / 4 + 2) * sizeof(ShadowCell);
    a->shadow = (ShadowCell*)mmap(nullptr, a->shadow_bytes, PROT_READ | PROT_WRITE,
                                  MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  }
  if (!a->shadow_dirty) {
    a->shadow_dirty = true;
    L.shadowed.push_back(a);
  }
  return a->shadow;
}
static const uint32_t kMulti = 0x0FFFFFFF;
static void race_access(Warp& w, const Inst& I, int lane, Alloc* a, uint64_t ad, uint32_t size,
                        Acc kind) {
  Launch& L = *w.blk->L;
  Block& b = *w.blk;
  ShadowCell* sh = shadow_of(L, a);
  uint32_t me = b.linear + 1;
  uint64_t g0 = (ad >> 2) - (a->lo >> 2), g1 = ((ad + size - 1) >> 2) - (a->lo >> 2);
  for (uint64_t g = g0; g <= g1; ++g) {
    ShadowCell& c = sh[g];
    uint32_t mask = 15;
    if (size < 4) mask = ((1u << size) - 1) << (ad & 3);
    uint32_t wb = c.w & 0x0FFFFFFF, wm = c.w >> 28, rb = c.r & 0x0FFFFFFF, rm = c.r >> 28;
    bool watomic = c.wt >> 31, bad = false;
    const char* kindname = "";
    uint32_t other = 0;
    if (wb && wb != me && (wm & mask) && !(kind == ACC_AT && watomic) &&
        !ordered(L, b, wb - 1, c.wt & 0x7fffffff)) {
      bad = true;
      other = wb;
      kindname = kind == ACC_LD ? "read of a location written" : "write to a location written";
    }
    if (kind != ACC_LD && !bad && rb && rb != me && (rm & mask)) {
      bool ok = rb == kMulti ? b.acquire_at > (c.rt) : ordered(L, b, rb - 1, c.rt);
      if (!ok) {
        bad = true;
        other = rb;
        kindname = "write to a location read";
      }
    }
    if (bad) {
      char s[256];
      if (other == kMulti)
        snprintf(s, sizeof s,
                 "data race between blocks: %s by several blocks, no synchronization between",
                 kindname);
      else {
        uint32_t o = other - 1;
        snprintf(s, sizeof s,
                 "data race between blocks: %s by block (%u,%u,%u), no synchronization between",
                 kindname, o % L.grid.x, o / L.grid.x % L.grid.y, o / L.grid.x / L.grid.y);
      }
      report(w, I, lane, std::string(s) + "\n    address " + hex(ad) + describe(ad), 719, false);
    }
    if (kind == ACC_LD) {
      bool before = rb && rb != me &&
                    (rb == kMulti ? b.acquire_at > c.rt
                                  : ordered(L, b, rb - 1,
                                            c.rt));  // earlier readers are ordered before this one
      if (!rb || before) {
        c.r = me | mask << 28;
        c.rt = L.clock;
      } else {
        if (rb != me)
          c.r = kMulti | (rm | mask) << 28;
        else
          c.r |= mask << 28;
        c.rt = L.clock;
      }
    } else {
      bool at = kind == ACC_AT;
      if (wb == me && watomic == at) {
        c.w |= mask << 28;
        c.wt = L.clock | (at ? 1u << 31 : 0);
      } else {
        c.w = me | mask << 28;
        c.wt = L.clock | (at ? 1u << 31 : 0);
      }
      if (rb == me) c.r = 0;
    }
  }
}
// a synchronization event of this block: fences arm it, atomics and acquiring/volatile accesses
// perform it
static void sync_event(Block& b, bool release, bool acquire) {
  Launch& L = *b.L;
  ++L.clock;
  if (acquire) b.acquire_at = L.clock;
  if (release) L.releases[b.linear].push_back(L.clock);
  ++L.clock;
}
void fence_event(Warp& w, const Inst&, uint32_t) { w.blk->fence = true; }

// ---------------------------------------------------------------- global access check + counters
static uint32_t sectors(uint32_t m, const uint64_t* ad, uint32_t size) {
  uint32_t n = 0;
  uint64_t mx = 0;
  bool mono = true, first = true;
  GS_LANES(m, l) {
    uint64_t s0 = ad[l] >> 5, s1 = (ad[l] + size - 1) >> 5;
    if (first) {
      n = (uint32_t)(s1 - s0 + 1);
      mx = s1;
      first = false;
    } else if (s0 > mx) {
      n += (uint32_t)(s1 - s0 + 1);
      mx = s1;
    } else if (s0 == mx) {
      n += (uint32_t)(s1 - s0);
      mx = s1;
    } else {
      mono = false;
      break;
    }
  }
  if (mono) return n;
  uint64_t v[64 + 2];
  int k = 0;
  GS_LANES(m, l)
  for (uint64_t s = ad[l] >> 5; s <= (ad[l] + size - 1) >> 5 && k < 66; ++s) v[k++] = s;
  std::sort(v, v + k);
  return (uint32_t)(std::unique(v, v + k) - v);
}
static void check_global(Warp& w, const Inst& I, uint32_t m, const uint64_t* ad, uint32_t size,
                         Acc kind) {
  if (!m) return;
  Launch& L = *w.blk->L;
  uint64_t lo = ~0ull, hi = 0, orv = 0;
  if (m == ~0u)
    for (int l = 0; l < 32; ++l) {
      lo = std::min(lo, ad[l]);
      hi = std::max(hi, ad[l]);
      orv |= ad[l];
    }
  else
    GS_LANES(m, l) {
      lo = std::min(lo, ad[l]);
      hi = std::max(hi, ad[l]);
      orv |= ad[l];
    }
  uint32_t al = std::min<uint32_t>(size, 32);
  if (orv & (al - 1)) GS_LANES(m, l)
  if (ad[l] & (al - 1))
    report(w, I, l,
           "misaligned global access of " + std::to_string(size) + " bytes at " + hex(ad[l]), 716,
           true);
  Alloc* a = I.cache;
  bool one = a && lo >= a->lo && hi + size <= a->hi && !a->freed;
  if (!one) {
    a = mem_find(lo);
    one = a && hi + size <= a->hi && !a->freed;
    if (one)
      I.cache = a;
    else
      GS_LANES(m, l) {
        Alloc* x = mem_find(ad[l]);
        if (!x || ad[l] + size > x->hi || ad[l] < x->lo || x->freed) {
          const char* op = kind == ACC_LD ? "read" : kind == ACC_ST ? "write" : "atomic";
          report(w, I, l,
                 (x && x->freed ? std::string("use after free: global ")
                                : std::string("out-of-bounds global ")) +
                     op + " of " + std::to_string(size) + " bytes at " + hex(ad[l]) +
                     describe(ad[l]),
                 700, true);
        }
      }
  }
  KernelStat& st = *L.st;
  uint32_t n = __builtin_popcount(m), sec = sectors(m, ad, size);
  if (kind == ACC_LD) {
    st.ld_bytes += n * size;
    st.ld_req++;
    st.ld_sectors += sec;
    st.widest_ld = std::max(st.widest_ld, size);
  } else if (kind == ACC_ST) {
    st.st_bytes += n * size;
    st.st_req++;
    st.st_sectors += sec;
    st.widest_st = std::max(st.widest_st, size);
  } else {
    st.atomics += n;
    st.atom_sectors += sec;
  }
  if (L.uninit && kind != ACC_ST) {
    GS_LANES(m, l) {
      uint64_t g = ad[l] & ~3ull;
      bool bad = false;
      for (; g < ad[l] + size; g += 4) bad |= *(uint32_t*)g == poison(g);
      if (__builtin_expect(bad, 0)) {
        Alloc* x = one ? a : mem_find(ad[l]);
        if (x->kind == A_DEVICE || x->kind == A_MANAGED) {
          uint64_t tail = x->hi & ~3ull;  // a partial last granule carries only part of the pattern
          (void)tail;
          report(w, I, l,
                 "read of never-written device memory: " + std::to_string(size) + " bytes at " +
                     hex(ad[l]) + describe(ad[l]),
                 719, false);
        }
      }
    }
  }
  if (L.race) {
    GS_LANES(m, l) {
      Alloc* x = one ? a : mem_find(ad[l]);
      if (x->hi - x->lo <= opt.race_bytes) {
        if (kind == ACC_LD && (I.flags & (FL_VOL | FL_ACQ)))
          continue;  // treated as synchronization, not as data
        if (kind == ACC_ST && (I.flags & (FL_VOL | FL_REL))) {
          race_access(w, I, l, x, ad[l], size, ACC_AT);
          continue;
        }
        race_access(w, I, l, x, ad[l], size, kind);
      }
    }
    if (kind == ACC_AT)
      sync_event(*w.blk, w.blk->fence || (I.flags & FL_REL), true);
    else if (kind == ACC_LD && (I.flags & (FL_VOL | FL_ACQ)))
      sync_event(*w.blk, false, true);
    else if (kind == ACC_ST && (I.flags & (FL_VOL | FL_REL)))
      sync_event(*w.blk, w.blk->fence || (I.flags & FL_REL), false);
  }
}

// ---------------------------------------------------------------- resolve to host pointers, any
// space
static void resolve(Warp& w, const Inst& I, uint32_t m, uint64_t* ad, uint32_t size, Acc kind) {
  Block& b = *w.blk;
  Launch& L = *b.L;
  Kernel& k = *L.k;
  uint8_t sp = I.space;
  if (sp == SP_GENERIC) {
    uint32_t gm = 0;
    uint64_t s0 = (uint64_t)b.smem, s1 = s0 + b.smem_size, l0 = (uint64_t)b.local,
             l1 = l0 + b.local_size, p0 = (uint64_t)k.param_buf, p1 = p0 + 65536;
    GS_LANES(m, l) {
      uint64_t a = ad[l];
      if (a >= s0 && a < s1) {
        uint64_t o = a - s0;
        if (!((o >= kSmemStatic && o + size <= k.smem_static) ||
              (o >= kSmemDyn && o + size <= kSmemDyn + (uint64_t)L.dyn)))
          report(w, I, l,
                 "out-of-bounds shared access (generic address) of " + std::to_string(size) +
                     " bytes at shared offset " + hex(o),
                 700, true);
        if (a & (size - 1)) report(w, I, l, "misaligned shared access", 716, true);
        (kind == ACC_LD ? L.st->shared_ld : L.st->shared_st) += size;
      } else if (a >= l0 && a < l1) {
        L.st->local_bytes += size;
      } else if (a >= p0 && a < p1) {
        if (kind != ACC_LD) report(w, I, l, "write to kernel parameters", 700, true);
        if (a + size > p0 + k.param_bytes)
          report(w, I, l, "out-of-bounds parameter read", 700, true);
      } else
        gm |= 1u << l;
    }
    check_global(w, I, gm, ad, size, kind);
    return;
  }
  if (sp == SP_GLOBAL) {
    check_global(w, I, m, ad, size, kind);
    return;
  }
  if (sp == SP_SHARED) {
    GS_LANES(m, l) {
      uint64_t o = ad[l];
      if (o >= (uint64_t)b.smem) o -= (uint64_t)b.smem;  // a generic address used as a shared one
      if (!((o >= kSmemStatic && o + size <= k.smem_static) ||
            (o >= kSmemDyn && o + size <= kSmemDyn + (uint64_t)L.dyn))) {
        char s[256];
        snprintf(s, sizeof s,
                 "out-of-bounds shared access of %u bytes at offset %lld (static %u bytes, dynamic "
                 "%u bytes)",
                 size, o >= kSmemDyn ? (long long)o - kSmemDyn : (long long)o - kSmemStatic,
                 k.smem_static - kSmemStatic, L.dyn);
        report(w, I, l, s, 700, true);
      }
      if (o & (size - 1))
        report(w, I, l,
               "misaligned shared access of " + std::to_string(size) + " bytes at offset " + hex(o),
               716, true);
      ad[l] = (uint64_t)b.smem + o;
    }
    (kind == ACC_LD ? L.st->shared_ld : L.st->shared_st) += (uint64_t)size * __builtin_popcount(m);
    return;
  }
  if (sp == SP_LOCAL) {
    GS_LANES(m, l) {
      if (ad[l] + size > k.local_bytes)
        report(w, I, l, "out-of-bounds local access at offset " + hex(ad[l]), 700, true);
      ad[l] += (uint64_t)b.local + (uint64_t)(w.id * 32 + l) * k.local_bytes;
    }
    L.st->local_bytes += (uint64_t)size * __builtin_popcount(m);
    return;
  }
  if (sp == SP_PARAM) {
    uint64_t p0 = (uint64_t)k.param_buf, p1 = p0 + k.param_bytes;
    GS_LANES(m, l)
    if (ad[l] < p0 || ad[l] + size > p1)
      report(w, I, l, "out-of-bounds kernel parameter read", 700, true);
    return;
  }
  GS_LANES(m, l) {  // const
    Alloc* x =
        I.cache && ad[l] >= I.cache->lo && ad[l] + size <= I.cache->hi ? I.cache : mem_find(ad[l]);
    if (!x || ad[l] + size > x->hi)
      report(w, I, l, "out-of-bounds constant read at " + hex(ad[l]), 700, true);
    I.cache = x;
  }
}
void atom_addresses(Warp& w, const Inst& I, uint32_t m, uint32_t bytes, uint8_t** ptr) {
  uint64_t ad[32];
  addresses(w, I, m, ad);
  resolve(w, I, m, ad, bytes, ACC_AT);
  GS_LANES(m, l) ptr[l] = (uint8_t*)ad[l];
}

struct B16B {
  uint64_t lo, hi;
};
template <class T>
static inline void put(Warp& w, const Inst& I, Opn o, int l, const T* p) {
  if (o.size == sizeof(T)) {
    memcpy(w.R + o.off + l * sizeof(T), p, sizeof(T));
    return;
  }
  uint64_t v = 0;
  memcpy(&v, p, sizeof(T) < 8 ? sizeof(T) : 8);
  if ((I.flags & FL_SIGNED) && sizeof(T) < 8)
    v = (uint64_t)((int64_t)(v << (64 - 8 * sizeof(T))) >> (64 - 8 * sizeof(T)));
  wr(w, o, l, v);
}
template <class T, int V>
static void h_ld(Warp& w, const Inst& I, uint32_t m) {
  uint64_t ad[32];
  addresses(w, I, m, ad);
  resolve(w, I, m, ad, sizeof(T) * V, ACC_LD);
  for (int v = 0; v < V; ++v) {
    Opn o = I.ops[v];
    if (o.size == sizeof(T)) {
      T* d = (T*)(w.R + o.off);
      if (m == ~0u)
        for (int l = 0; l < 32; ++l) d[l] = ((const T*)ad[l])[v];
      else
        GS_LANES(m, l) d[l] = ((const T*)ad[l])[v];
    } else
      GS_LANES(m, l) put<T>(w, I, o, l, (const T*)ad[l] + v);
  }
}
template <class T, int V>
static void h_st(Warp& w, const Inst& I, uint32_t m) {
  uint64_t ad[32];
  addresses(w, I, m, ad);
  resolve(w, I, m, ad, sizeof(T) * V, ACC_ST);
  for (int v = 0; v < V; ++v) {
    Opn o = I.ops[v];
    if (o.size == sizeof(T)) {
      const T* s = (const T*)(w.R + o.off);
      GS_LANES(m, l)((T*)ad[l])[v] = s[l];
    } else
      GS_LANES(m, l) {
        uint64_t x = rd(w, o, l);
        memcpy((T*)ad[l] + v, &x, sizeof(T) < 8 ? sizeof(T) : 8);
      }
  }
}
// ldmatrix and stmatrix: I.vec matrices of 8 x 8 values of 16 bits in shared memory, of which lane
// 8 i + r gives the address of row r of matrix i. A lane's register of matrix i holds the values
// (lane / 4, 2 (lane % 4)) and the one right of it; sub 1: of the transposed matrix.
void matrices(Warp& w, const Inst& I, uint32_t m) {
  if (m != ~0u)
    report(w, I, __builtin_ctz(m), "a matrix is loaded or stored by a warp with missing lanes", 719,
           true);
  const bool load = I.kind == K_LD;
  uint64_t ad[32];
  addresses(w, I, m, ad);
  const uint32_t rows = I.vec == 4 ? ~0u : (1u << 8 * I.vec) - 1;
  resolve(w, I, rows, ad, 16, load ? ACC_LD : ACC_ST);
  for (int v = 0; v < I.vec; ++v) {
    uint32_t* r = (uint32_t*)(w.R + I.ops[v].off);
    for (int l = 0; l < 32; ++l)
      for (int half = 0; half < 2; ++half) {
        int row = l / 4, column = l % 4 * 2 + half;
        if (I.sub & 1) std::swap(row, column);
        uint16_t* at = (uint16_t*)ad[8 * v + row] + column;
        uint16_t* of = (uint16_t*)&r[l] + half;
        if (load)
          *of = *at;
        else
          *at = *of;
      }
  }
}
template <class T>
static Fn ld_fn_of(int v) {
  return v == 1   ? h_ld<T, 1>
         : v == 2 ? h_ld<T, 2>
         : v == 4 ? h_ld<T, 4>
         : v == 8 ? h_ld<T, 8>
                  : nullptr;
}
Fn ld_fn(int s, int v) {
  switch (s) {
    case 1:
      return ld_fn_of<uint8_t>(v);
    case 2:
      return ld_fn_of<uint16_t>(v);
    case 4:
      return ld_fn_of<uint32_t>(v);
    case 8:
      return ld_fn_of<uint64_t>(v);
    case 16:
      return ld_fn_of<B16B>(v);
    default:
      return nullptr;
  }
}
template <class T>
static Fn st_fn_of(int v) {
  return v == 1   ? h_st<T, 1>
         : v == 2 ? h_st<T, 2>
         : v == 4 ? h_st<T, 4>
         : v == 8 ? h_st<T, 8>
                  : nullptr;
}
Fn st_fn(int s, int v) {
  switch (s) {
    case 1:
      return st_fn_of<uint8_t>(v);
    case 2:
      return st_fn_of<uint16_t>(v);
    case 4:
      return st_fn_of<uint32_t>(v);
    case 8:
      return st_fn_of<uint64_t>(v);
    case 16:
      return st_fn_of<B16B>(v);
    default:
      return nullptr;
  }
}
// a: shared destination, b: global source (offset in target), size, c: source size
void cp_async(Warp& w, const Inst& I, uint32_t m) {
  Inst g = I;
  g.a = I.b;
  g.imm = (int64_t)(int32_t)I.target;
  g.space = SP_GLOBAL;
  g.cache = nullptr;
  uint64_t sa[32], ga[32];
  addresses(w, I, m, sa);
  Inst s = I;
  s.space = SP_SHARED;
  resolve(w, s, m, sa, I.size, ACC_ST);
  addresses(w, g, m, ga);
  uint32_t full = 0;
  GS_LANES(m, l) {
    uint64_t n = I.c.off >= 0 ? rd(w, I.c, l) : I.size;
    if (n >= I.size) full |= 1u << l;
  }
  resolve(w, g, full, ga, I.size, ACC_LD);
  GS_LANES(m, l) {
    if (full >> l & 1)
      memcpy((void*)sa[l], (void*)ga[l], I.size);
    else {
      uint64_t n = rd(w, I.c, l);
      memset((void*)sa[l], 0, I.size);
      if (n) {
        for (uint64_t i = 0; i < n; ++i) {
          uint64_t one[32];
          one[l] = ga[l] + i;
          resolve(w, g, 1u << l, one, 1, ACC_LD);
          ((uint8_t*)sa[l])[i] = *(uint8_t*)one[l];
        }
      }
    }
  }
}
// cvta{.to}.space: d = f(a).  sub: 1 when ".to"
void cvta(Warp& w, const Inst& I, uint32_t m) {
  Block& b = *w.blk;
  GS_LANES(m, l) {
    uint64_t v = rd(w, I.a, l);
    if (I.space == SP_SHARED)
      v = I.sub ? v - (uint64_t)b.smem : v + (uint64_t)b.smem;
    else if (I.space == SP_LOCAL) {
      uint64_t base = (uint64_t)b.local + (uint64_t)(w.id * 32 + l) * b.L->k->local_bytes;
      v = I.sub ? v - base : v + base;
    }
    wr(w, I.d, l, v);
  }
}
void isspacep(Warp& w, const Inst& I, uint32_t m) {
  Block& b = *w.blk;
  GS_LANES(m, l) {
    uint64_t v = rd(w, I.a, l);
    bool s = v >= (uint64_t)b.smem && v < (uint64_t)b.smem + b.smem_size;
    bool lo = v >= (uint64_t)b.local && v < (uint64_t)b.local + b.local_size;
    bool p = v >= (uint64_t)b.L->k->param_buf && v < (uint64_t)b.L->k->param_buf + 65536;
    wr(w, I.d, l,
       I.space == SP_SHARED  ? s
       : I.space == SP_LOCAL ? lo
       : I.space == SP_PARAM ? p
                             : !s && !lo && !p);
  }
}
// vprintf / __assertfail; arguments are frame parameters (I.ops: local offsets)
static uint64_t frame_arg(Warp& w, const Inst& I, int lane, int i) {
  uint64_t off = rd(w, I.ops[i], 0), v;
  memcpy(&v, w.blk->local + (size_t)(w.id * 32 + lane) * w.blk->L->k->local_bytes + off, 8);
  return v;
}
void h_syscall(Warp& w, const Inst& I, uint32_t m) {
  GS_LANES(m, l) {
    if (I.sub == 2) {
      uint32_t line = (uint32_t)frame_arg(w, I, l, 2);
      report(w, I, l,
             std::string("device assertion failed: ") + (const char*)frame_arg(w, I, l, 0) +
                 "\n    at " + (const char*)frame_arg(w, I, l, 1) + ":" + std::to_string(line) +
                 " in " + (const char*)frame_arg(w, I, l, 3),
             710, true);
    }
    const char* f = (const char*)frame_arg(w, I, l, 0);
    const uint8_t* a = (const uint8_t*)frame_arg(w, I, l, 1);
    std::string out;
    size_t pos = 0;
    auto next = [&](size_t n) {
      pos = (pos + n - 1) / n * n;
      uint64_t v = 0;
      memcpy(&v, a + pos, n);
      pos += n;
      return v;
    };
    for (; *f; ++f) {
      if (*f != '%') {
        out += *f;
        continue;
      }
      if (f[1] == '%') {
        out += '%';
        ++f;
        continue;
      }
      std::string sp = "%";
      int longs = 0;
      ++f;
      while (*f && strchr("-+ #0123456789.lhzjt*", *f)) {
        if (*f == 'l' || *f == 'z' || *f == 'j' || *f == 't')
          ++longs;
        else if (*f == '*')
          sp += std::to_string((int)next(4));
        else if (*f != 'h')
          sp += *f;
        ++f;
      }
      char b[512];
      b[0] = 0;
      switch (*f) {
        case 'd':
        case 'i': {
          int64_t v = longs ? (int64_t)next(8) : (int32_t)next(4);
          snprintf(b, sizeof b, (sp + "lld").c_str(), (long long)v);
          break;
        }
        case 'u':
        case 'x':
        case 'X':
        case 'o': {
          uint64_t v = longs ? next(8) : (uint32_t)next(4);
          snprintf(b, sizeof b, (sp + "ll" + *f).c_str(), (unsigned long long)v);
          break;
        }
        case 'c':
          snprintf(b, sizeof b, (sp + "c").c_str(), (int)next(4));
          break;
        case 's':
          snprintf(b, sizeof b, (sp + "s").c_str(), (const char*)next(8));
          break;
        case 'p':
          snprintf(b, sizeof b, "%p", (void*)next(8));
          break;
        default: {
          uint64_t v = next(8);
          double dd;
          memcpy(&dd, &v, 8);
          snprintf(b, sizeof b, (sp + *f).c_str(), dd);
        }
      }
      out += b;
      if (!*f) break;
    }
    fputs(out.c_str(), stdout);
    uint64_t ro = I.d.off >= 0 ? rd(w, I.d, 0) : 0;
    int one = 1;
    if (I.d.off >= 0)
      memcpy(w.blk->local + (size_t)(w.id * 32 + l) * w.blk->L->k->local_bytes + ro, &one, 4);
  }
}

// ---------------------------------------------------------------- control
static inline uint32_t pred_mask(const Warp& w, const Inst& I) {
  const uint8_t* p = w.R + I.pred;
  uint32_t r = 0;
#ifdef __AVX2__
  typedef char v32 __attribute__((vector_size(32)));
  v32 v = *(const v32*)p;
  r = (uint32_t)__builtin_ia32_pmovmskb256((v32)(v > 0));
#else
  for (int l = 0; l < 32; ++l) r |= (uint32_t)(p[l] != 0) << l;
#endif
  return I.pred_neg ? ~r : r;
}
static Inst exit_inst;

static bool bar_complete(Block& b, Barrier& br, uint64_t count) {
  if (!br.arrived) return false;
  if (count) return br.arrived >= count;
  for (auto& w : b.warps)
    if (w.live & ~br.mask[w.id]) return false;
  return true;
}
static void bar_release(Block& b, Barrier& br, uint32_t id) {
  for (auto& w : b.warps) {
    uint32_t m = br.mask[w.id];
    if (!m) continue;
    uint32_t waiting = m & w.barwait;
    const Inst* first = nullptr;
    int fl = 0;
    uint32_t fpc = 0;
    bool div = false;
    GS_LANES(waiting, l) {
      const Inst& I = b.L->k->code[w.pc[l]];
      if (!first) {
        first = &I;
        fl = l;
        fpc = w.pc[l];
      } else if (w.pc[l] != fpc && (I.flags & FL_ALIGNED))
        div = true;
      if (I.sub == 2) {  // red: result
        uint64_t v;
        if (I.imm == 1)
          v = br.red_cnt;  // popc
        else if (I.imm == 2)
          v = br.red_cnt == br.arrived;  // and
        else
          v = br.red_cnt != 0;  // or
        wr(w, I.d, l, v);
      }
      w.pc[l]++;
    }
    if (first && (first->flags & FL_ALIGNED) && (div || (first->imm >= 0 && m != w.init_mask))) {
      uint32_t missing = w.init_mask & ~m;
      std::string s = "divergent barrier: ";
      s += div ? "threads of one warp wait at different barrier instructions"
               : "thread(s) of a warp exited (first: lane " +
                     std::to_string(__builtin_ctz(missing ? missing : 1)) +
                     ") before an aligned barrier that the others wait at";
      report(w, *first, fl, s, 719, false);
    }
    w.barwait &= ~m;
    if (waiting) {
      w.trips.last = std::max(w.trips.last, br.trips);
      trips_end_segment(w.trips);
    }
  }
  (void)id;
  br = Barrier();
  br.mask.assign(b.warps.size(), 0);
}
static void bar_check_all(Block& b) {
  for (uint32_t i = 0; i < 16; ++i)
    if (b.bars[i].arrived && b.bars[i].line == 0 && bar_complete(b, b.bars[i], 0))
      bar_release(b, b.bars[i], i);
}
// I.a: barrier id, I.b: thread count (off<0: all), sub: 0 sync, 1 arrive, 2 red (c: predicate)
static void do_bar(Warp& w, const Inst& I, uint32_t m) {
  Block& b = *w.blk;
  int l0 = __builtin_ctz(m);
  uint32_t id = I.a.off >= 0 ? (uint32_t)rd(w, I.a, l0) : 0;
  uint64_t cnt = I.b.off >= 0 ? rd(w, I.b, l0) : 0;
  if (id >= 16) report(w, I, l0, "barrier number out of range", 719, true);
  Barrier& br = b.bars[id];
  if (cnt && (I.flags & FL_ALIGNED)) {
  }
  GS_LANES(m, l) {
    if (I.sub == 2 && (bool)rd(w, I.c, l) != I.c.neg) br.red_cnt++;
    w.bar_id[l] = id;
  }
  br.mask[w.id] |= m;
  br.arrived += __builtin_popcount(m);
  br.line = cnt ? (uint32_t)cnt : 0;
  br.trips = std::max(br.trips, w.trips.last);
  if (I.sub == 1) {
    GS_LANES(m, l) w.pc[l]++;
  } else
    w.barwait |= m;
  // with a count, a partial last warp counts as a whole one
  uint64_t arrived = br.arrived;
  if (cnt) {
    arrived = 0;
    for (auto& x : b.warps)
      if (br.mask[x.id])
        arrived += br.mask[x.id] == x.live ? 32 : __builtin_popcount(br.mask[x.id]);
    if (arrived >= cnt) bar_release(b, br, id);
  } else if (bar_complete(b, br, 0))
    bar_release(b, br, id);
}

enum RunResult { R_BLOCKED, R_DONE, R_QUANTUM };
static RunResult run_warp(Warp& w, int64_t quantum) {
  Block& b = *w.blk;
  Launch& L = *b.L;
  const Inst* code = L.k->code.data();
  const TripStep* steps = opt.trips ? L.k->trip_steps.data() : nullptr;
  const uint32_t* slots = L.k->trip_slots.data();
  uint64_t ti = 0, wi = 0;
  struct Flush {
    Launch& L;
    uint64_t &ti, &wi;
    ~Flush() {
      L.st->instr += ti;
      L.st->warp_instr += wi;
      L.instr += ti;
      g_clock += wi;
    }
  } flush{L, ti, wi};
  bool rotate = false;
  while (true) {
    if (w.syncwait) {  // lanes at a warp-level sync: complete when all named lanes are there
      bool progress = true;
      while (w.syncwait && progress) {
        progress = false;
        uint32_t todo = w.syncwait;
        while (todo) {
          int l0 = __builtin_ctz(todo);
          uint32_t pc = w.pc[l0], grp = 0;
          GS_LANES(todo, l) if (w.pc[l] == pc) grp |= 1u << l;
          todo &= ~grp;
          const Inst& I = code[pc];
          uint32_t M = (uint32_t)rd(w, I.e, l0) & w.live;
          if ((M & ~grp) == 0) {
            w.group = grp;
            I.fn(w, I, grp);
            GS_LANES(grp, l) w.pc[l]++;
            w.syncwait &= ~grp;
            progress = true;
          } else if ((M & ~w.syncwait) == 0)
            report(w, I, l0,
                   "warp-level synchronization reached at different instructions by lanes of one "
                   "member mask (not supported)",
                   719, true);
        }
      }
    }
    uint32_t run = w.live & ~w.barwait & ~w.syncwait;
    if (!run) return w.live ? R_BLOCKED : R_DONE;
    if (quantum <= 0) return R_QUANTUM;
    uint32_t pc, mask = 0, limit = ~0u;
    {
      int l0 = __builtin_ctz(run);
      pc = w.pc[l0];
      bool same = true;
      GS_LANES(run, l) if (w.pc[l] != pc) {
        same = false;
        break;
      }
      if (same)
        mask = run;
      else {
        if (rotate) {  // the lowest group spins: let another one go
          w.rot = (w.rot + 1) & 31;
          while (!(run >> w.rot & 1)) w.rot = (w.rot + 1) & 31;
          pc = w.pc[w.rot];
        } else {
          pc = ~0u;
          GS_LANES(run, l) pc = std::min(pc, w.pc[l]);
        }
        GS_LANES(run, l) if (w.pc[l] == pc) mask |= 1u << l;
        else if (w.pc[l] > pc) limit = std::min(limit, w.pc[l]);
      }
    }
    rotate = false;
    int n = __builtin_popcount(mask);
    int budget = mask == run ? 1 << 20 : 4096;
    // run this group until it diverges, blocks, meets another group, or has had its share
    bool out = false;
    while (!out) {
      if (pc >= limit) {
        GS_LANES(mask, l) w.pc[l] = pc;
        break;
      }
      const Inst& I = code[pc];
      ++wi;
      ti += n;
      --quantum;
      if (--budget <= 0) {
        GS_LANES(mask, l) w.pc[l] = pc;
        rotate = mask != run;
        if (rotate || quantum <= 0) {
          --wi;
          ti -= n;
          break;
        }
        budget = 1 << 20;
      }
      uint32_t m = mask;
      if (I.pred >= 0) m &= pred_mask(w, I);
      if (steps) trips_step(w, I, m, steps[pc], slots);
      if (I.ctl == C_NONE) {
        if (m) {
          w.group = m;
          I.fn(w, I, m);
        }
        ++pc;
        continue;
      }
      switch (I.ctl) {
        case C_BRA:
          if (m == mask) {
            bool back = I.target <= pc;
            pc = I.target;
            if (back && quantum <= 0) {
              GS_LANES(mask, l) w.pc[l] = pc;
              out = true;
            }
          } else if (!m)
            ++pc;
          else {
            GS_LANES(mask, l) w.pc[l] = (m >> l & 1) ? I.target : pc + 1;
            out = true;
          }
          break;
        case C_BRX:
          GS_LANES(mask, l) {
            if (!(m >> l & 1)) {
              w.pc[l] = pc + 1;
              continue;
            }
            uint64_t i = rd(w, I.a, l);
            if (i >= I.targets.size()) report(w, I, l, "brx.idx index out of range", 719, true);
            w.pc[l] = I.targets[i];
          }
          out = true;
          break;
        case C_EXIT:
          w.live &= ~m;
          GS_LANES(mask & ~m, l) w.pc[l] = pc + 1;
          if (m) bar_check_all(b);
          out = true;
          break;
        case C_CALL:
          GS_LANES(mask, l) {
            if (m >> l & 1) {
              w.stack[l].push_back(pc + 1);
              w.pc[l] = I.target;
            } else
              w.pc[l] = pc + 1;
          }
          out = true;
          break;
        case C_RET:
          GS_LANES(mask, l) {
            if (m >> l & 1) {
              w.pc[l] = w.stack[l].back();
              w.stack[l].pop_back();
            } else
              w.pc[l] = pc + 1;
          }
          out = true;
          break;
        case C_BAR:
          GS_LANES(mask, l) w.pc[l] = (m >> l & 1) ? pc : pc + 1;
          if (m) do_bar(w, I, m);
          out = true;
          break;
        case C_WSYNC: {
          if (!m) {
            ++pc;
            break;
          }
          uint32_t M = (uint32_t)rd(w, I.e, __builtin_ctz(m));
          GS_LANES(m, l)
          if (!((uint32_t)rd(w, I.e, l) >> l & 1))
            report(w, I, l,
                   "warp-level instruction executed by a lane that its member mask does not name",
                   719, true);
          if (((M & w.live) & ~m) == 0) {
            w.group = m;
            I.fn(w, I, m);
            ++pc;
            break;
          }
          GS_LANES(mask, l) w.pc[l] = (m >> l & 1) ? pc : pc + 1;
          w.syncwait |= m;
          out = true;
          break;
        }
        case C_YIELD:
          GS_LANES(mask, l) w.pc[l] = pc + 1;
          if (mask == run) {
            return R_QUANTUM;
          }
          rotate = true;
          out = true;
          break;
        case C_TRAP:
          if (m) report(w, I, __builtin_ctz(m), "trap instruction executed", 719, true);
          ++pc;
          break;
        default:
          break;
      }
    }
    if (L.instr + ti > opt.max_instr)
      report(w, code[pc < L.k->code.size() ? pc : 0], __builtin_ctz(mask),
             "kernel does not end (GPUSIM_MAX_INSTR reached)", 702, true);
  }
}

// ---------------------------------------------------------------- blocks and launches
static uint8_t* new_regfile(Kernel& k, Launch& L) {
  uint8_t* r = (uint8_t*)aligned_alloc(64, (k.reg_bytes + 127) / 64 * 64);
  memset(r, 0, k.reg_bytes);
  for (auto& c : k.consts)
    for (int l = 0; l < 32; ++l) memcpy(r + c.off + l * c.size, &c.bits, c.size);
  return r;
}
enum SCode {
  S_TX,
  S_TY,
  S_TZ,
  S_NTX,
  S_NTY,
  S_NTZ,
  S_CX,
  S_CY,
  S_CZ,
  S_NCX,
  S_NCY,
  S_NCZ,
  S_LANE,
  S_WARP,
  S_NWARP,
  S_SM,
  S_NSM,
  S_LEQ,
  S_LLT,
  S_LLE,
  S_LGT,
  S_LGE,
  S_DSM,
  S_TSM,
  S_ZERO,
  S_ONE,
  S_WSHI,
  S_WSLO
};
static int sreg_code(const std::string& n, const Kernel& k) {
  static const std::map<std::string, int> t = {{"%tid.x", S_TX},
                                               {"%tid.y", S_TY},
                                               {"%tid.z", S_TZ},
                                               {"%ntid.x", S_NTX},
                                               {"%ntid.y", S_NTY},
                                               {"%ntid.z", S_NTZ},
                                               {"%ctaid.x", S_CX},
                                               {"%ctaid.y", S_CY},
                                               {"%ctaid.z", S_CZ},
                                               {"%nctaid.x", S_NCX},
                                               {"%nctaid.y", S_NCY},
                                               {"%nctaid.z", S_NCZ},
                                               {"%laneid", S_LANE},
                                               {"%warpid", S_WARP},
                                               {"%nwarpid", S_NWARP},
                                               {"%smid", S_SM},
                                               {"%nsmid", S_NSM},
                                               {"%gridid", S_ONE},
                                               {"%lanemask_eq", S_LEQ},
                                               {"%lanemask_lt", S_LLT},
                                               {"%lanemask_le", S_LLE},
                                               {"%lanemask_gt", S_LGT},
                                               {"%lanemask_ge", S_LGE},
                                               {"%dynamic_smem_size", S_DSM},
                                               {"%total_smem_size", S_TSM},
                                               {"%aggr_smem_size", S_TSM},
                                               {"%clusterid.x", S_CX},
                                               {"%clusterid.y", S_CY},
                                               {"%clusterid.z", S_CZ},
                                               {"%nclusterid.x", S_NCX},
                                               {"%nclusterid.y", S_NCY},
                                               {"%nclusterid.z", S_NCZ},
                                               {"%cluster_ctaid.x", S_ZERO},
                                               {"%cluster_ctaid.y", S_ZERO},
                                               {"%cluster_ctaid.z", S_ZERO},
                                               {"%cluster_ctarank", S_ZERO},
                                               {"%cluster_nctaid.x", S_ONE},
                                               {"%cluster_nctaid.y", S_ONE},
                                               {"%cluster_nctaid.z", S_ONE},
                                               {"%cluster_nctarank", S_ONE},
                                               {"%gpusim_carry", S_ZERO}};
  auto i = t.find(n);
  if (i != t.end()) return i->second;
  if (n == "%envreg1") return S_WSHI;  // address of the grid workspace that cooperative groups use
  if (n == "%envreg2") return S_WSLO;
  if (n.compare(0, 7, "%envreg") == 0) return S_ZERO;
  die("unknown register or special register " + n + " in kernel " + demangle(k.name));
}
static void set_sregs(Kernel& k, Launch& L, Warp& w, bool all) {
  Block& b = *w.blk;
  for (auto& s : k.sreg_codes) {
    Opn o = s.second;
    bool per_block = (s.first >= S_CX && s.first <= S_CZ) || s.first == S_SM;
    if (!all && !per_block) continue;
    for (uint32_t l = 0; l < 32; ++l) {
      uint32_t t = w.id * 32 + l;
      uint64_t v = 0;
      switch (s.first) {
        case S_TX:
          v = t % L.block.x;
          break;
        case S_TY:
          v = t / L.block.x % L.block.y;
          break;
        case S_TZ:
          v = t / L.block.x / L.block.y;
          break;
        case S_NTX:
          v = L.block.x;
          break;
        case S_NTY:
          v = L.block.y;
          break;
        case S_NTZ:
          v = L.block.z;
          break;
        case S_CX:
          v = b.idx.x;
          break;
        case S_CY:
          v = b.idx.y;
          break;
        case S_CZ:
          v = b.idx.z;
          break;
        case S_NCX:
          v = L.grid.x;
          break;
        case S_NCY:
          v = L.grid.y;
          break;
        case S_NCZ:
          v = L.grid.z;
          break;
        case S_LANE:
          v = l;
          break;
        case S_WARP:
          v = w.id;
          break;
        case S_NWARP:
          v = (L.block.n() + 31) / 32;
          break;
        case S_SM:
          v = b.linear % 132;
          break;
        case S_NSM:
          v = 132;
          break;
        case S_LEQ:
          v = 1u << l;
          break;
        case S_LLT:
          v = (1u << l) - 1;
          break;
        case S_LLE:
          v = (uint32_t)((2ull << l) - 1);
          break;
        case S_LGT:
          v = ~(uint32_t)((2ull << l) - 1);
          break;
        case S_LGE:
          v = ~((1u << l) - 1);
          break;
        case S_DSM:
          v = L.dyn;
          break;
        case S_TSM:
          v = L.dyn + k.smem_static - kSmemStatic;
          break;
        case S_ONE:
          v = 1;
          break;
        case S_WSHI:
          v = (uint64_t)L.grid_ws >> 32;
          break;
        case S_WSLO:
          v = (uint32_t)(uint64_t)L.grid_ws;
          break;
      }
      wr(w, o, l, v);
    }
  }
}
static Block* new_block(Kernel& k, Launch& L) {
  auto* b = new Block;
  b->L = &L;
  b->smem_size = kSmemDyn + L.dyn + 64;
  b->smem = (uint8_t*)aligned_alloc(1024, (b->smem_size + 1023) / 1024 * 1024);
  memset(b->smem, 0, b->smem_size);
  uint32_t nw = (uint32_t)((L.block.n() + 31) / 32);
  b->local_size = (size_t)k.local_bytes * nw * 32;
  b->local =
      b->local_size ? (uint8_t*)aligned_alloc(64, (b->local_size + 8 + 63) / 64 * 64) : nullptr;
  if (b->local) memset(b->local, 0, b->local_size + 8);
  b->warps.resize(nw);
  for (uint32_t i = 0; i < nw; ++i) {
    b->warps[i].R = new_regfile(k, L);
    b->warps[i].blk = b;
    b->warps[i].id = i;
  }
  return b;
}
static void start_block(Kernel& k, Launch& L, Block* b, uint32_t linear) {
  b->linear = linear;
  b->idx = Dim{linear % L.grid.x, linear / L.grid.x % L.grid.y, linear / L.grid.x / L.grid.y};
  b->fence = false;
  b->acquire_at = 0;
  if (opt.trips) trips_start(*b);
  // shared memory starts out as signalling garbage, so that a read before any write shows up in
  // results
  if (k.smem_static > kSmemStatic) memset(b->smem + kSmemStatic, 0xFF, k.smem_static - kSmemStatic);
  if (L.dyn) memset(b->smem + kSmemDyn, 0xFF, L.dyn);
  b->bars.assign(16, Barrier());
  for (auto& br : b->bars) br.mask.assign(b->warps.size(), 0);
  uint64_t nt = L.block.n();
  for (auto& w : b->warps) {
    uint64_t left = nt - (uint64_t)w.id * 32;
    w.init_mask = w.live = left >= 32 ? ~0u : (1u << left) - 1;
    w.barwait = w.syncwait = 0;
    w.rot = 0;
    for (int l = 0; l < 32; ++l) {
      w.pc[l] = k.entry;
      w.stack[l].clear();
    }
    set_sregs(k, L, w, b->fresh);
  }
  b->fresh = false;
}
static void free_block(Block* b) {
  for (auto& w : b->warps) free(w.R);
  free(b->smem);
  free(b->local);
  delete b;
}
// true: finished; false: out of quantum
static bool run_block(Block* b, int64_t warp_quantum, int rounds) {
  for (int r = 0; r < rounds; ++r) {
    bool all_done = true, progress = false;
    for (auto& w : b->warps) {
      if (!w.live) continue;
      uint32_t before = w.live & ~w.barwait & ~w.syncwait;
      if (!before && !w.syncwait) {
        all_done = false;
        continue;
      }
      RunResult q = run_warp(w, warp_quantum);
      if (before) progress = true;
      if (q != R_DONE) all_done = false;
    }
    if (all_done) {
      bool live = false;
      for (auto& w : b->warps) live |= w.live != 0;
      if (!live) {
        if (opt.trips) trips_finish(*b);
        return true;
      }
    }
    if (!progress) {
      bool any = false;
      for (auto& w : b->warps)
        if (w.live & ~w.barwait & ~w.syncwait) any = true;
      if (!any)
        for (auto& w : b->warps)
          if (w.live) {
            int l = __builtin_ctz(w.live);
            report(w, b->L->k->code[w.pc[l]], l,
                   (w.syncwait >> l & 1)
                       ? "deadlock: warp-level synchronization waits for lanes that never arrive"
                       : "divergent barrier: deadlock, some threads of the block never arrive at "
                         "this barrier",
                   719, true);
          }
    }
  }
  return false;
}

void kernel_run(Kernel* kp, Dim grid, Dim block, uint32_t dyn, const void* params, bool coop) {
  Kernel& k = *kp;
  Launch L;
  L.k = kp;
  L.grid = grid;
  L.block = block;
  L.dyn = dyn;
  L.st = &g_kernels[k.name];
  KernelStat& st = *L.st;
  st.launches++;
  st.blocks += grid.n();
  st.threads += grid.n() * block.n();
  st.smem = dyn;
  uint32_t g3[3] = {grid.x, grid.y, grid.z}, b3[3] = {block.x, block.y, block.z};
  memcpy(st.grid, g3, 12);
  memcpy(st.block, b3, 12);
  g_count["kernel_launches"]++;
  if (opt.trace)
    fprintf(stderr, "gpusim: launch %s grid (%u,%u,%u) block (%u,%u,%u) smem %u\n",
            demangle(k.name).c_str(), grid.x, grid.y, grid.z, block.x, block.y, block.z, dyn);
  memcpy(k.param_buf, params, k.param_bytes);
  L.uninit = opt.uninit;
  L.race = opt.race && grid.n() > 1 && grid.n() * block.n() <= opt.race_threads;
  if (L.race) L.releases.resize(grid.n());
  for (auto& I : k.code) I.cache = nullptr;
  if (opt.trips && k.trip_steps.empty()) trips_prepare(k);
  if (k.sreg_codes.empty())
    for (auto& s : k.sregs) k.sreg_codes.push_back({sreg_code(s.first, k), s.second});
  if (coop) {
    static uint32_t* ws = (uint32_t*)mem_alloc(4096, A_MODULE);
    memset(ws, 0, 4096);
    ws[0] = 4096;
    L.grid_ws = ws;
  }
  std::vector<Block*> active, pool;
  uint64_t next = 0, total = grid.n();
  try {
    if (coop) {
      // all blocks resident, small quanta, round robin
      for (; next < total; ++next) {
        Block* b = new_block(k, L);
        active.push_back(b);
        start_block(k, L, b, (uint32_t)next);
      }
      while (!active.empty()) {
        for (size_t i = 0; i < active.size();) {
          if (run_block(active[i], 2000, 4)) {
            pool.push_back(active[i]);
            active.erase(active.begin() + i);
          } else
            ++i;
        }
      }
    } else {
      while (next < total || !active.empty()) {
        // a block runs to its end; one that spins (waiting for another block) is set aside
        if (next < total) {
          Block* b;
          if (!pool.empty()) {
            b = pool.back();
            pool.pop_back();
          } else
            b = new_block(k, L);
          start_block(k, L, b, (uint32_t)next++);
          active.push_back(b);
          if (run_block(b, 200000, active.size() > 1 ? 8 : 64)) {
            active.pop_back();
            pool.push_back(b);
          }
          if (active.size() < 4) continue;
        }
        for (size_t i = 0; i < active.size();) {
          if (run_block(active[i], 20000, 4)) {
            pool.push_back(active[i]);
            active.erase(active.begin() + i);
          } else
            ++i;
        }
      }
    }
  } catch (Fatal&) {
  }
  for (auto* b : active) free_block(b);
  for (auto* b : pool) free_block(b);
  for (Alloc* a : L.shadowed) {
    madvise(a->shadow, a->shadow_bytes, MADV_DONTNEED);
    a->shadow_dirty = false;
  }
  fflush(stdout);
}
}  // namespace gs
