// Round trips to global memory: what an instruction reads and writes, and what control does. The
// model is described in trips.h.
#include "trips.h"

#include <unordered_set>

namespace gs {

static const uint32_t kSlot = 64;  // registers are aligned to this many bytes of a register file

void trips_prepare(Kernel& k) {
  std::unordered_set<int32_t> constants;
  for (auto& c : k.consts) constants.insert((int32_t)c.off);
  k.trip_steps.assign(k.code.size(), TripStep());
  k.trip_slots.clear();
  for (size_t i = 0; i < k.code.size(); ++i) {
    const Inst& I = k.code[i];
    TripStep& s = k.trip_steps[i];
    std::vector<uint32_t> reads, writes;
    auto read = [&](int32_t off) {
      if (off >= 0 && !constants.count(off)) reads.push_back((uint32_t)off / kSlot);
    };
    auto write = [&](int32_t off) {
      if (off >= 0 && !constants.count(off)) writes.push_back((uint32_t)off / kSlot);
    };
    read(I.pred);
    for (const Opn* o : {&I.a, &I.b, &I.c, &I.e}) read(o->off);
    const bool into_ops = I.kind == K_LD || I.unpacks;
    for (auto& o : I.ops) into_ops ? write(o.off) : read(o.off);
    write(I.d.off);
    write(I.d2.off);
    if (I.kind == K_ATOM && I.d.off >= 0)
      for (uint32_t off : I.targets) write((int32_t)off);
    s.slots = (uint32_t)k.trip_slots.size();
    s.reads = (uint16_t)reads.size();
    s.writes = (uint16_t)writes.size();
    k.trip_slots.insert(k.trip_slots.end(), reads.begin(), reads.end());
    k.trip_slots.insert(k.trip_slots.end(), writes.begin(), writes.end());
  }
  for (size_t i = 0; i < k.code.size(); ++i) {
    const Inst& I = k.code[i];
    if (I.ctl == C_BRA || I.ctl == C_CALL) k.trip_steps[I.target].leads = true;
    if (I.ctl == C_BRX)
      for (uint32_t to : I.targets) k.trip_steps[to].leads = true;
  }
}

// Registers of the block before keep their times, none of which lies behind the start of this one.
void trips_start(Block& b) {
  uint32_t from = 0;
  for (auto& w : b.warps) from = std::max({from, w.trips.last, w.trips.horizon});
  for (auto& w : b.warps) {
    TripState& t = w.trips;
    if (t.ready.empty()) t.ready.assign(b.L->k->reg_bytes / kSlot + 1, 0);
    t.horizon = t.last = from;
    trips_end_segment(t);
  }
  b.trips_from = from;
}
void trips_finish(Block& b) {
  uint32_t last = 0;
  for (auto& w : b.warps) last = std::max(last, w.trips.last);
  uint32_t& most = b.L->st->load_round_trips;
  most = std::max(most, last - b.trips_from);
}

// Whether an access goes to global memory; a generic address tells only when it is there.
bool trips_global(const Warp& w, const Inst& I, uint32_t m) {
  if (I.kind == K_ASYNC || I.space == SP_GLOBAL) return true;
  if (I.space != SP_GENERIC) return false;
  const Block& b = *w.blk;
  const uint64_t a = rd(w, I.a, __builtin_ctz(m)) + (uint64_t)I.imm;
  auto within = [a](const void* start, size_t size) { return a - (uint64_t)start < size; };
  return !within(b.smem, b.smem_size) && !within(b.local, b.local_size) &&
         !within(b.L->k->param_buf, 65536);
}

void trips_control(Warp& w, const Inst& I) {
  TripState& t = w.trips;
  switch (I.ctl) {
    case C_WSYNC:
      // bar.warp; shuffles, votes and matrices move as others do
      if (I.d.off < 0 && I.kind == K_PLAIN) trips_end_segment(t);
      break;
    case C_YIELD:
    case C_NONE:
      break;
    default:
      trips_end_segment(t);
  }
}

}  // namespace gs
