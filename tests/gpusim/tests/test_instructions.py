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
