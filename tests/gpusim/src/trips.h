// Round trips to global memory: how many loads a warp has to wait for one after another.
//
// An SM issues the instructions of a warp in order and stops at the first one that needs a value
// that a load has not brought yet; that wait is over for every load issued before. What counts is
// therefore not the number of loads but the number of such waits, and time here is counted in them:
// the result of a load from global memory exists one trip after the load was issued, every other
// result as soon as its operands do.
//
// PTX is not what runs: ptxas moves loads up, so their order in the PTX says little. The model lets
// each instruction of a segment issue as soon as its operands exist, and holds up a load only for
// the stores before it that may write the same memory (.nc loads: for none). A segment ends at
// branches, labels, barriers and fences, over which ptxas moves no load; there the next one begins
// when the last instruction of this one has issued. Moves between registers cost nothing, and wait
// for nothing.
#pragma once
#include <algorithm>

#include "ptx.h"

namespace gs {

void trips_prepare(Kernel&);
void trips_start(Block&);
void trips_finish(Block&);
void trips_control(Warp&, const Inst&);
bool trips_global(const Warp&, const Inst&, uint32_t m);

// Segments end here: nothing behind may issue before everything in front has.
inline void trips_end_segment(TripState& t) { t.floor = t.stored[0] = t.stored[1] = t.last; }

// One instruction of a warp; m: the lanes that execute it, none where a predicate turns all off.
inline void trips_step(Warp& w, const Inst& I, uint32_t m, const TripStep& s, const uint32_t* all) {
  TripState& t = w.trips;
  if (s.leads) trips_end_segment(t);
  const uint32_t* slot = all + s.slots;
  uint32_t at = t.floor;
  for (uint32_t i = 0; i < s.reads; ++i) at = std::max(at, t.ready[slot[i]]);
  uint32_t result = at;
  if (I.kind != K_PLAIN) {
    const bool load = I.kind == K_LD || I.kind == K_ATOM || I.kind == K_ASYNC;
    const bool store = I.kind == K_ST || I.kind == K_ATOM;
    if (load || store) {
      const bool nc = I.flags & FL_NC;
      const bool may_global = I.space == SP_GLOBAL || I.space == SP_GENERIC;
      const bool may_other = I.space == SP_GENERIC || I.space == SP_SHARED || I.space == SP_LOCAL;
      if (load && !nc && may_global) at = std::max(at, t.stored[0]);
      if (load && !nc && may_other) at = std::max(at, t.stored[1]);
      if (I.flags & (FL_VOL | FL_ACQ | FL_REL)) at = std::max(at, t.last);
      if (store && may_global) t.stored[0] = std::max(t.stored[0], at);
      if (store && may_other) t.stored[1] = std::max(t.stored[1], at);
      result = at;
      // A reduction returns nothing that could be waited for.
      if (load && m && (s.writes || I.kind == K_ASYNC) && trips_global(w, I, m))
        t.horizon = std::max(t.horizon, result = at + 1);
    } else if (I.kind == K_FENCE) {
      at = std::max(at, t.horizon);
    }
    if (I.kind != K_MOVE) t.last = std::max(t.last, at);
    if (I.kind == K_FENCE || (load && (I.flags & FL_ACQ))) {
      t.last = std::max(t.last, result);
      trips_end_segment(t);
    }
  } else {
    t.last = std::max(t.last, at);
  }
  if (I.ctl != C_NONE) trips_control(w, I);
  if (!m) return;
  // Lanes that take no part keep what they wait for, and a warp waits for all of its lanes.
  const bool whole = m == w.live;
  for (const uint32_t *d = slot + s.reads, *end = d + s.writes; d < end; ++d)
    t.ready[*d] = whole ? result : std::max(t.ready[*d], result);
}

}  // namespace gs
