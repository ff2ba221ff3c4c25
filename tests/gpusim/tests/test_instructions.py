"""Instruction coverage of the interpreter."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from gpusim.build import cuda_home

EXT = Path(__file__).resolve().parent / "ext"


def nvcc(*args):
    subprocess.run(
        [str(cuda_home() / "bin" / "nvcc"), "-w", "-arch=sm_90", "-std=c++17", *map(str, args)],
        check=True,
    )


def test_results_equal_the_host(tmp_path):
    nvcc("-cudart", "shared", EXT / "instructions.cu", "-o", tmp_path / "a.out")
    r = subprocess.run([tmp_path / "a.out"], capture_output=True, text=True)
    assert r.returncode == 0 and r.stdout == "done: no error\n", r.stdout[-2000:] + r.stderr[-2000:]


@pytest.mark.parametrize("flags", [[], ["-use_fast_math", "-lineinfo"]])
def test_everything_decodes(tmp_path, flags):
    nvcc(*flags, "-ptx", EXT / "decode.cu", "-o", tmp_path / "a.ptx")
    env = {k: v for k, v in os.environ.items() if k not in ("LD_PRELOAD", "GPUSIM_ACTIVE")}
    r = subprocess.run(
        [sys.executable, "-m", "gpusim", "check", str(tmp_path / "a.ptx")],
        capture_output=True,
        text=True,
        env=env,
    )
    bad = "\n".join(line for line in r.stdout.splitlines() if not line.startswith("ok"))
    assert r.returncode == 0, bad[-3000:]


BRX = b""".version 8.0
.target sm_90
.address_size 64
.visible .entry k(.param .u64 p0)
{
  .reg .b32 %r<5>; .reg .b64 %rd<4>; .reg .pred %p<3>;
  mov.u32 %r1, %tid.x;
  ld.param.u64 %rd1, [p0];
  mul.wide.u32 %rd2, %r1, 4;
  add.s64 %rd3, %rd1, %rd2;
  and.b32 %r2, %r1, 3;
  ts: .branchtargets A, B, C, A;
  brx.idx %r2, ts;
A: mov.u32 %r3, 10; bra D;
B: mov.u32 %r3, 20; bra.uni D;
C: mov.u32 %r3, 30;
D: setp.ne.u32 _|%p1, %r2, 0;
  @%p1 add.u32 %r3, %r3, 1;
  st.global.b32 [%rd3], %r3;
  ret;
}
"""


def test_indexed_branch_through_the_driver_api():
    import ctypes

    import torch

    x = torch.zeros(32, dtype=torch.int32, device="cuda")
    lib = ctypes.CDLL("libcuda.so.1")
    m, f = ctypes.c_void_p(), ctypes.c_void_p()
    assert (
        lib.cuModuleLoadData(ctypes.byref(m), BRX) == 0
        and lib.cuModuleGetFunction(ctypes.byref(f), m, b"k") == 0
    )
    p = ctypes.c_uint64(x.data_ptr())
    args = (ctypes.c_void_p * 1)(ctypes.cast(ctypes.pointer(p), ctypes.c_void_p))
    assert lib.cuLaunchKernel(f, 1, 1, 1, 32, 1, 1, 0, None, args, None) == 0
    assert x.tolist() == [11, 20, 30, 10] * 8


def test_unknown_instruction_is_a_launch_error():
    import ctypes

    import gpusim

    lib = ctypes.CDLL("libcuda.so.1")
    m, f = ctypes.c_void_p(), ctypes.c_void_p()
    bad = BRX.replace(b"and.b32 %r2, %r1, 3;", b"frob.b32 %r2, %r1, 3;")
    assert (
        lib.cuModuleLoadData(ctypes.byref(m), bad) == 0
        and lib.cuModuleGetFunction(ctypes.byref(f), m, b"k") != 0
    )
    faults = gpusim.take_faults()
    assert len(faults) == 1 and "frob.b32" in faults[0] and "not implemented" in faults[0]


MATRIX = """.version 8.0
.target sm_90
.address_size 64
.visible .entry k(.param .u64 px, .param .u64 po)
{
  .reg .b32 %%r<16>; .reg .b64 %%rd<8>;
  .shared .align 16 .b8 sh[512];
  mov.u32 %%r1, %%tid.x;
  ld.param.u64 %%rd1, [px];
  ld.param.u64 %%rd2, [po];
  mul.wide.u32 %%rd3, %%r1, 16;
  add.s64 %%rd1, %%rd1, %%rd3;
  add.s64 %%rd2, %%rd2, %%rd3;
  mov.u32 %%r2, sh;
  mad.lo.u32 %%r3, %%r1, 16, %%r2;
  %s
  ret;
}
"""
LOADED = """
  ld.global.v4.b32 {%%r4, %%r5, %%r6, %%r7}, [%%rd1];
  st.shared.v4.b32 [%%r3], {%%r4, %%r5, %%r6, %%r7};
  bar.sync 0;
  ldmatrix.sync.aligned.m8n8.x%d%s.shared.b16 {%s}, [%%r3];
  st.global.v4.b32 [%%rd2], {%%r4, %%r5, %%r6, %%r7};
"""
STORED = """
  ld.global.v4.b32 {%%r4, %%r5, %%r6, %%r7}, [%%rd1];
  stmatrix.sync.aligned.m8n8.x%d%s.shared.b16 [%%r3], {%s};
  bar.sync 0;
  ld.shared.v4.b32 {%%r4, %%r5, %%r6, %%r7}, [%%r3];
  st.global.v4.b32 [%%rd2], {%%r4, %%r5, %%r6, %%r7};
"""


@pytest.mark.parametrize("trans", [False, True])
@pytest.mark.parametrize("n", [1, 2, 4])
@pytest.mark.parametrize("load", [True, False])
def test_matrices(load, n, trans):
    """The fragments of 8 x 8 matrices, by the layout that the PTX manual draws: register i of the
    lane 4 r + c holds the values (r, 2 c) and (r, 2 c + 1) of matrix i."""
    import ctypes

    import torch

    registers = ", ".join(f"%r{4 + i}" for i in range(n))
    body = (LOADED if load else STORED) % (n, ".trans" if trans else "", registers)
    lib = ctypes.CDLL("libcuda.so.1")
    module, function = ctypes.c_void_p(), ctypes.c_void_p()
    assert lib.cuModuleLoadData(ctypes.byref(module), (MATRIX % body).encode()) == 0
    assert lib.cuModuleGetFunction(ctypes.byref(function), module, b"k") == 0
    given = torch.arange(256, dtype=torch.int16)
    x, out = given.cuda(), torch.zeros(256, dtype=torch.int16, device="cuda")
    addresses = ctypes.c_uint64(x.data_ptr()), ctypes.c_uint64(out.data_ptr())
    args = (ctypes.c_void_p * 2)(
        *[ctypes.cast(ctypes.pointer(a), ctypes.c_void_p) for a in addresses]
    )
    assert lib.cuLaunchKernel(function, 1, 1, 1, 32, 1, 1, 0, None, args, None) == 0

    def of_fragments(values):  # [lane, register, half] -> [matrix, row, column]
        return values.view(8, 4, 4, 2).permute(2, 0, 1, 3).reshape(4, 8, 8)

    def to_fragments(matrices):
        return matrices.view(4, 8, 4, 2).permute(1, 2, 0, 3).reshape(256)

    def turned(matrices):
        return matrices.mT.contiguous() if trans else matrices

    if load:
        expected = to_fragments(turned(given.view(4, 8, 8))).view(32, 4, 2)
        unread = given.view(32, 4, 2)
        expected = torch.cat([expected[:, :n], unread[:, n:]], 1).flatten()
        assert torch.equal(out.cpu(), expected)
    else:
        expected = turned(of_fragments(given))[:n].flatten()
        assert torch.equal(out.cpu()[: 64 * n], expected)
