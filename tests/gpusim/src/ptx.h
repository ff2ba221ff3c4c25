// PTX interpreter internals shared by the parser, the instruction binder and the executor.
//
// A kernel is decoded to a flat vector<Inst>.  A warp executes one Inst for a group of lanes at
// once; every lane has its own pc, the group with the lowest pc runs first (which reconverges
// structured code), and a group that spins without merging is rotated out, so lanes are
// independent threads.  Registers are arrays of 32 lanes, addressed by byte offset in the warp's
// register file; constants and special registers live in the same file.
#pragma once
#include <cstring>
#include <string_view>

#include "gpusim.h"

namespace gs {

enum Ty : uint8_t {
  T_NONE,
  B8,
  B16,
  B32,
  B64,
  B128,
  U8,
  U16,
  U32,
  U64,
  S8,
  S16,
  S32,
  S64,
  F16,
  F16X2,
  BF16,
  BF16X2,
  F32,
  F64,
  F32X2,
  U16X2,
  S16X2,
  PRED,
  TF32,
  E4M3X2,
  E5M2X2
};
int ty_size(Ty);
Ty ty_parse(std::string_view);

struct Operand {
  enum K { NONE, REG, IMM, SYM, MEM, VEC, LIST, SINK } k = NONE;
  std::string s;     // register or symbol name (REG, SYM, MEM base; empty: MEM [imm])
  bool neg = false;  // !%p
  int fk = 0;        // IMM: 0 integer, 1 0f bits, 2 0d bits, 3 decimal float
  uint64_t bits = 0;
  double dec = 0;
  int64_t off = 0;
  std::vector<Operand> v;  // VEC / LIST elements; REG: second destination of a|b
};

struct Opn {
  int32_t off = -1;
  uint8_t size = 0;
  bool neg = false;
};
struct Warp;
struct Inst;
typedef void (*Fn)(Warp&, const Inst&, uint32_t);
enum Ctl : uint8_t { C_NONE, C_BRA, C_EXIT, C_RET, C_CALL, C_BAR, C_WSYNC, C_YIELD, C_BRX, C_TRAP };
enum Space : uint8_t { SP_GENERIC, SP_GLOBAL, SP_SHARED, SP_LOCAL, SP_PARAM, SP_CONST };
enum {
  FL_FTZ = 1,
  FL_SAT = 2,
  FL_VOL = 4,
  FL_ACQ = 8,
  FL_REL = 16,
  FL_SIGNED = 32,
  FL_NAN = 64,
  FL_ATOMICLD = 128,
  FL_RELU = 256,
  FL_ALIGNED = 512,
  FL_COUNT = 1024,
  FL_NC = 2048
};
enum Kind : uint8_t { K_PLAIN, K_MOVE, K_LD, K_ST, K_ATOM, K_ASYNC, K_FENCE };  // for trips.h
struct Inst {
  Fn fn = nullptr;
  int32_t pred = -1;
  bool pred_neg = false;
  Ctl ctl = C_NONE;
  Kind kind = K_PLAIN;
  bool unpacks = false;  // a move into several registers, ops
  uint8_t size = 0, vec = 1, space = SP_GENERIC, sub = 0;
  uint32_t flags = 0, line = 0, target = 0;
  Opn d, d2, a, b, c, e;
  int64_t imm = 0;
  std::vector<Opn> ops;
  std::vector<uint32_t> targets;
  mutable Alloc* cache = nullptr;
};

// An instruction's place in the count of round trips (trips.h).
struct TripStep {
  uint32_t slots = 0;  // in Kernel::trip_slots: registers read, then registers written
  uint16_t reads = 0, writes = 0;
  bool leads = false;  // the target of a branch
};
// Times of a warp, in round trips.
struct TripState {
  uint32_t floor = 0;           // when the segment began: nothing of it issues earlier
  uint32_t last = 0;            // when the last instruction so far issued
  uint32_t horizon = 0;         // when all loads so far have arrived
  uint32_t stored[2] = {0, 0};  // when the last store issued: global, shared and local
  std::vector<uint32_t> ready;  // when the value of a register exists
};

struct Module;
struct Kernel {
  std::string name;
  Module* mod = nullptr;
  std::vector<Inst> code;
  uint32_t entry = 0;
  std::vector<ParamInfo> params;
  uint32_t param_bytes = 0;
  uint8_t* param_buf = nullptr;  // 64 KB, fixed address, so that parameter addresses are constants
  uint32_t reg_bytes = 0;
  struct Const {
    uint32_t off;
    uint8_t size;
    uint64_t bits;
  };
  std::vector<Const> consts;
  std::map<std::string, Opn> sregs;  // special registers used: %tid.x ...
  std::vector<std::pair<int, Opn>> sreg_codes;
  uint32_t smem_static = 0, local_bytes = 0;
  uint32_t max_threads = 1024;
  uint32_t nregs = 0;
  std::vector<TripStep> trip_steps;  // one for each of code; empty until they are counted
  std::vector<uint32_t> trip_slots;
};
static const uint32_t kSmemDyn = 0x10000,
                      kSmemStatic = 0x400;  // offsets of dynamic and static shared memory

// What the binder needs from the function being decoded.
struct Builder {
  virtual ~Builder() {}
  virtual Opn reg(const Operand&,
                  int size_hint) = 0;         // register, immediate or symbol address as a slot
  virtual Opn typed(const Operand&, Ty) = 0;  // same, immediates converted to the type
  virtual Opn scratch(int size) = 0;          // for "_"
  virtual Opn sreg(const std::string&) = 0;
  virtual Opn cst(uint64_t bits, int size) = 0;
  virtual bool is_sreg(const Operand&) = 0;
  virtual void mem(Inst&, const Operand&,
                   bool param_space) = 0;  // fills a (base), imm, may set space
  [[noreturn]] virtual void fail(const std::string& why) = 0;
};
void bind(Builder&, Inst&, const std::vector<std::string_view>& op, std::vector<Operand>& args);

struct Barrier {
  uint32_t arrived = 0;
  std::vector<uint32_t> mask;
  uint64_t red_cnt = 0;
  bool any = false;
  uint32_t line = 0;
  uint32_t trips = 0;  // the latest arrival
};
struct Block;
struct Warp {
  uint8_t* R = nullptr;
  uint32_t pc[32];
  uint32_t live = 0, barwait = 0, syncwait = 0, init_mask = 0;
  std::vector<uint32_t> stack[32];
  Block* blk = nullptr;
  uint32_t id = 0;
  uint32_t bar_id[32];
  uint32_t rot = 0;
  uint32_t group = 0;  // lanes executing now, before predication (activemask)
  TripState trips;
};
struct Launch;
struct Block {
  Launch* L = nullptr;
  Dim idx;
  uint32_t linear = 0;
  uint8_t* smem = nullptr;
  uint32_t smem_size = 0;
  uint8_t* local = nullptr;
  size_t local_size = 0;  // whole block
  std::vector<Warp> warps;
  std::vector<Barrier> bars;
  bool fresh = true;        // special registers not yet filled in
  bool fence = false;       // a gpu-scope fence was executed
  uint32_t acquire_at = 0;  // time of the last acquire
  uint32_t trips_from = 0;  // round trips at its start
};
struct Launch {
  Kernel* k;
  Dim grid, block;
  uint32_t dyn = 0;
  KernelStat* st = nullptr;
  bool race = false, uninit = false;
  uint32_t clock = 1;                           // synchronization events so far
  std::vector<std::vector<uint32_t>> releases;  // per block: times of its releases
  std::vector<Alloc*> shadowed;
  uint64_t instr = 0;
  void* grid_ws = nullptr;  // cooperative launches
  int reports = 0;
  std::map<std::pair<uint32_t, int>, int> reported;  // (line, kind) -> count
};
struct Fatal {};  // thrown after a fault that ends the kernel
std::string inst_where(Warp& w, const Inst& I, int lane);
void report(Warp& w, const Inst& I, int lane, const std::string& what, int err, bool fatal);
std::string module_line(Module*, uint32_t line);
void exec_wsync(Warp&, const Inst&, uint32_t);
void fence_event(Warp&, const Inst&, uint32_t);

// memory instructions (ptx_exec.cpp)
Fn ld_fn(int elem_size, int vec);
Fn st_fn(int elem_size, int vec);
void atom_addresses(Warp& w, const Inst& I, uint32_t m, uint32_t bytes, uint8_t** ptr);
void matrices(Warp& w, const Inst& I, uint32_t m);
void cp_async(Warp& w, const Inst& I, uint32_t m);
void cvta(Warp& w, const Inst& I, uint32_t m);
void isspacep(Warp& w, const Inst& I, uint32_t m);
extern uint64_t g_clock;

#define GS_LANES(m, l) \
  for (uint32_t _mm = (m), l; _mm && ((l = (uint32_t)__builtin_ctz(_mm)), true); _mm &= _mm - 1)

// ---- operand access: direct when the register has the type's size, converted otherwise
inline uint64_t rd(const Warp& w, Opn o, int l) {
  const uint8_t* p = w.R + o.off;
  switch (o.size) {
    case 1:
      return p[l];
    case 2:
      return ((const uint16_t*)p)[l];
    case 4:
      return ((const uint32_t*)p)[l];
    default:
      return ((const uint64_t*)p)[l];
  }
}
inline void wr(Warp& w, Opn o, int l, uint64_t v) {
  uint8_t* p = w.R + o.off;
  switch (o.size) {
    case 1:
      p[l] = v != 0;
      break;
    case 2:
      ((uint16_t*)p)[l] = (uint16_t)v;
      break;
    case 4:
      ((uint32_t*)p)[l] = (uint32_t)v;
      break;
    case 16:
      ((uint64_t*)p)[2 * l] = v;
      ((uint64_t*)p)[2 * l + 1] = 0;
      break;
    default:
      ((uint64_t*)p)[l] = v;
  }
}
template <class T>
inline const T* src(const Warp& w, Opn o, T* tmp) {
  if (o.size == sizeof(T)) return (const T*)(w.R + o.off);
  for (int l = 0; l < 32; ++l) {
    uint64_t v = rd(w, o, l);
    memcpy(&tmp[l], &v, sizeof(T) < 8 ? sizeof(T) : 8);
  }
  return tmp;
}
template <class T>
struct is_signed_int {
  static const bool v = false;
};
template <>
struct is_signed_int<int8_t> {
  static const bool v = true;
};
template <>
struct is_signed_int<int16_t> {
  static const bool v = true;
};
template <>
struct is_signed_int<int32_t> {
  static const bool v = true;
};
template <>
struct is_signed_int<int64_t> {
  static const bool v = true;
};
template <class T>
struct Dst {
  T tmp[32];
  T* p;
  Warp& w;
  Opn o;
  uint32_t m;
  Dst(Warp& w_, Opn o_, uint32_t m_) : w(w_), o(o_), m(m_) {
    p = o.size == sizeof(T) ? (T*)(w.R + o.off) : tmp;
  }
  ~Dst() {
    if (p == tmp) GS_LANES(m, l) {
        uint64_t v = 0;
        memcpy(&v, &tmp[l], sizeof(T) < 8 ? sizeof(T) : 8);
        if (is_signed_int<T>::v && sizeof(T) < 8)
          v = (uint64_t)((int64_t)(v << (64 - 8 * sizeof(T))) >> (64 - 8 * sizeof(T)));
        wr(w, o, l, v);
      }
  }
};
}  // namespace gs
