"""Round trips to global memory: the loads that a warp waits for one after another."""

import ctypes
import os
import subprocess
import sys

import gpusim
import pytest
import torch

CUDA = ctypes.CDLL("libcuda.so.1")
HEAD = """.version 8.0
.target sm_90
.address_size 64
.visible .entry k(.param .u64 px, .param .u64 po, .param .u32 pn)
{
  .reg .b32 %r<16>; .reg .b64 %rd<16>; .reg .f32 %f<16>; .reg .pred %p<8>;
  .shared .align 8 .b64 sh[32];
  ld.param.u64 %rd1, [px];
  ld.param.u64 %rd2, [po];
  ld.param.u32 %r1, [pn];
  mov.u32 %r2, %tid.x;
  mov.u32 %r3, %ctaid.x;
  mov.u32 %r4, 0;
  mov.f32 %f1, 0f00000000;
"""
TAIL = """
  st.global.f32 [%rd2], %f1;
  ret;
}
"""


def launch(body, n=0, grid=1, block=32, x=None, tail=TAIL):
    """The most round trips of any block so far of a kernel with this body. %rd1: 1024 floats, ones
    where x does not say otherwise, %rd2: the result, %r1: n, %r2: thread, %r3: block, %r4: 0."""
    x = torch.ones(1024).cuda() if x is None else x
    out = torch.zeros(1, device="cuda")
    module, function = ctypes.c_void_p(), ctypes.c_void_p()
    assert CUDA.cuModuleLoadData(ctypes.byref(module), (HEAD + body + tail).encode()) == 0
    assert CUDA.cuModuleGetFunction(ctypes.byref(function), module, b"k") == 0
    given = ctypes.c_uint64(x.data_ptr()), ctypes.c_uint64(out.data_ptr()), ctypes.c_uint32(n)
    pointers = (ctypes.c_void_p * 3)(
        *[ctypes.cast(ctypes.pointer(a), ctypes.c_void_p) for a in given]
    )
    size = grid, 1, 1, block, 1, 1
    assert CUDA.cuLaunchKernel(function, *size, 0, None, pointers, None) == 0
    return gpusim.counters()["kernels"]["k"]["load_round_trips"]


def loop(body, step=4):
    """body n times, with %rd1 moved on by step bytes in each."""
    return f"""
L: setp.ge.u32 %p1, %r4, %r1;
  @%p1 bra E;
  {body}
  add.s64 %rd1, %rd1, {step};
  add.u32 %r4, %r4, 1;
  bra L;
E:
"""


def chain(n):
    """A pointer that leads to the next in x."""
    x = torch.zeros(1024, dtype=torch.int64, device="cuda")
    x.copy_(torch.arange(1, 1025) * 8 + x.data_ptr())
    return x


LOAD, ADD = "ld.global.f32 %f2, [%rd1];", "add.f32 %f1, %f1, %f2;"
CHASE = "ld.global.u64 %rd1, [%rd1];"


def test_loads_before_their_uses_are_one_trip():
    loads = "\n".join(f"ld.global.f32 %f{i + 2}, [%rd1+{4 * i}];" for i in range(8))
    adds = "\n".join(f"add.f32 %f1, %f1, %f{i + 2};" for i in range(8))
    assert launch(loads + adds) == 1
    gpusim.reset()
    assert launch("", tail="ret; }") == 0
    # Nobody waits for what nobody uses, nor for the 8 of a vector.
    assert launch(loads, tail="ret; }") == 0
    assert launch("ld.global.v4.f32 {%f2, %f3, %f4, %f5}, [%rd1];" + adds[:23]) == 1


def test_loads_of_straight_code_move_up():
    one = "".join(
        f"ld.global.f32 %f{i + 2}, [%rd1+{4 * i}]; add.f32 %f1, %f1, %f{i + 2};\n" for i in range(8)
    )
    assert launch(one) == 1


@pytest.mark.parametrize("n", [1, 7, 100])
def test_a_serial_loop_is_as_many_trips_as_turns(n):
    """Its addresses wait for nothing, but the next turn's load lies behind this one's addition."""
    assert launch(loop(LOAD + ADD), n) == n


def test_a_loop_that_loads_eight_before_it_adds(n=5):
    loads = "\n".join(f"ld.global.f32 %f{i + 2}, [%rd1+{4 * i}];" for i in range(8))
    adds = "\n".join(f"add.f32 %f1, %f1, %f{i + 2};" for i in range(8))
    assert launch(loop(loads + adds, step=32), n) == n


def test_an_unrolled_loop_with_bounds_is_serial_where_it_adds_between():
    def turn(i, add):
        return f"""
  setp.le.u32 %p1, %r1, {i};
  @%p1 bra L{i};
  ld.global.f32 %f{i + 2}, [%rd1+{4 * i}];
  {add}
L{i}:
"""

    adds = [f"add.f32 %f1, %f1, %f{i + 2};" for i in range(8)]
    assert launch("".join(turn(i, add) for i, add in enumerate(adds)), 8) == 8
    gpusim.reset()
    assert launch("".join(turn(i, "") for i in range(8)) + "\n".join(adds), 8) == 1


def test_no_load_moves_over_a_label():
    join = "setp.eq.u32 %p2, %r1, 1; @%p2 bra D;" + LOAD + ADD + "D:" + LOAD + ADD
    assert launch(join, 1) == 1
    assert launch(join, 0) == 2


@pytest.mark.parametrize("n", [1, 6])
def test_a_pointer_chase(n):
    use = "mov.b64 {%r5, %r6}, %rd1; cvt.rn.f32.u32 %f1, %r5;"
    assert launch(loop(CHASE, step=0) + use, n, x=chain(n)) == n
    assert launch(CHASE * n + use, x=chain(n)) == n


def test_a_load_waits_for_the_store_before_it():
    """Which could have written the same memory, unless the load is .nc, and unless only one of them
    is to shared memory."""
    store = "st.global.f32 [%rd2], %f1;"
    turns = "".join(
        f"ld.global.f32 %f{i + 2}, [%rd1+{4 * i}]; add.f32 %f1, %f1, %f{i + 2}; {store}\n"
        for i in range(4)
    )
    assert launch(turns) == 4
    for same in (
        turns.replace("ld.global", "ld.global.nc"),
        turns.replace(store, "st.shared.f32 [sh], %f1;"),
    ):
        gpusim.reset()
        assert launch(same) == 1


def test_a_barrier_waits_for_the_slowest_warp():
    """The first warp hands an address through shared memory to the second."""
    body = """
  setp.ge.u32 %p2, %r2, 32;
  @%p2 bra B;
""" + CHASE * 5 + """
  st.shared.u64 [sh], %rd1;
B: bar.sync 0;
  setp.lt.u32 %p3, %r2, 32;
  @%p3 bra D;
  ld.shared.u64 %rd1, [sh];
  ld.global.f32 %f2, [%rd1];
  add.f32 %f1, %f1, %f2;
D:
"""  # fmt: skip
    assert launch(body, block=64, x=chain(5)) == 6
    gpusim.reset()
    assert (
        launch(
            body.replace("bar.sync 0;", "").replace("ld.shared.u64 %rd1, [sh];", ""),
            block=64,
            x=chain(5),
        )
        == 5
    )


def test_what_was_on_its_way_before_a_barrier_has_arrived_behind_it():
    body = """
  setp.ge.u32 %p2, %r2, 32;
  ld.global.f32 %f2, [%rd1];
  @%p2 bra B;
""" + CHASE * 3 + """
  st.shared.u64 [sh], %rd1;
B: bar.sync 0;
  add.f32 %f1, %f1, %f2;
"""  # fmt: skip
    assert launch(body, block=64, x=chain(3)) == 3


def test_atomics_and_fences():
    assert launch("atom.global.add.f32 %f2, [%rd1], %f1;" + ADD) == 1
    gpusim.reset()
    assert launch("red.global.add.f32 [%rd1], %f1; membar.gl;", tail="ret; }") == 0
    # A fence waits for loads that nobody has used yet; an acquiring load holds up what follows.
    assert launch(LOAD + "membar.gl; ld.global.f32 %f3, [%rd1+4]; add.f32 %f1, %f1, %f3;") == 2
    gpusim.reset()
    assert launch("ld.acquire.gpu.global.f32 %f3, [%rd1+4];" + LOAD + ADD) == 2


def test_a_branch_waits_for_its_predicate_and_a_move_for_nothing():
    assert (
        launch(LOAD + "setp.eq.f32 %p2, %f2, %f1; @%p2 bra D; ld.global.f32 %f1, [%rd1+4]; D:") == 2
    )
    gpusim.reset()
    # A turn adds what the one before the last loaded, so with its own load, which moves up, three
    # are on the way at once, and the additions of 10 turns wait for the loads 0 to 7.
    body = loop("add.f32 %f1, %f1, %f3; mov.f32 %f3, %f2; " + LOAD)
    assert launch("mov.f32 %f2, 0f00000000; mov.f32 %f3, %f2;" + body, 10) == 3


def test_other_memory_costs_no_trip():
    body = """
  st.shared.f32 [sh], %f1;
  ld.shared.f32 %f1, [sh];
  cvta.shared.u64 %rd3, %rd4;
  mov.u64 %rd3, sh;
  cvta.shared.u64 %rd3, %rd3;
  ld.f32 %f2, [%rd3];
  add.f32 %f1, %f1, %f2;
"""
    assert launch(body) == 0
    assert launch("ld.f32 %f2, [%rd1]; add.f32 %f1, %f1, %f2;") == 1


def test_the_block_with_most_counts_until_reset():
    body = "mov.u32 %r1, %ctaid.x;" + loop(LOAD + ADD)
    assert launch(body, grid=4, tail="ret; }") == 3  # blocks of 0 to 3 turns
    assert launch(LOAD + ADD) == 3
    assert gpusim.counters()["kernel_total"]["load_round_trips"] == 3
    gpusim.reset()
    assert launch(LOAD + ADD) == 1


def test_an_extension(ops):
    ops.vadd(torch.ones(1000).cuda(), torch.ones(1000).cuda())
    (vadd,) = gpusim.counters()["kernels"].values()
    assert vadd["load_round_trips"] == 1

    # A turn for every thread of the grid, behind the loads of the table.
    found = []
    for n in (1, 1024, 5 * 1024):
        x, y = torch.ones(n).cuda(), torch.zeros(n).cuda()
        table = torch.tensor([[x.data_ptr(), y.data_ptr(), n]]).cuda()
        gpusim.reset()
        ops.lerp_table(table, 0.5)
        (lerp,) = gpusim.counters()["kernels"].values()
        turns = -(-n // (lerp["grid"][0] * lerp["block"][0]))
        found.append(lerp["load_round_trips"] - turns)
    assert found[0] in (1, 2) and found == found[:1] * 3


def test_it_can_be_turned_off(extension):
    code = f"""
import gpusim, torch
torch.ops.load_library({str(extension)!r})
torch.ops.gpusim_test.vadd(torch.ones(4).cuda(), torch.ones(4).cuda())
print("load_round_trips" in gpusim.counters()["kernel_total"])
"""
    for value, there in (("0", "False"), ("1", "True")):
        r = subprocess.run(
            [sys.executable, "-c", code],
            capture_output=True,
            text=True,
            env={**os.environ, "GPUSIM_TRIPS": value},
        )
        assert r.stdout.strip() == there
