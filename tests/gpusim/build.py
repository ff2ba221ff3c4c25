"""Builds the simulator libraries on first use, into a cache folder."""

import contextlib
import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

SRC = Path(__file__).resolve().parent / "src"
CORE = ["memory", "ptx_parse", "ptx_exec", "ptx_ops", "trips", "cudart", "cuda_driver", "stubs"]


def cache_dir():
    d = Path(os.environ.get("GPUSIM_CACHE") or Path.home() / ".cache" / "gpusim")
    d.mkdir(parents=True, exist_ok=True)
    return d


def cuda_home():
    for c in (os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"):
        if c and Path(c, "include", "cuda.h").exists():
            return Path(c)
    nvcc = shutil.which("nvcc")
    if nvcc and Path(nvcc).resolve().parent.parent.joinpath("include", "cuda.h").exists():
        return Path(nvcc).resolve().parent.parent
    for c in sorted(Path("/usr/local").glob("cuda-*"), reverse=True):
        if (c / "include" / "cuda.h").exists():
            return c
    return None


def cuda_include():
    h = cuda_home()
    if h:
        return h / "include"
    for p in sys.path:  # headers of the nvidia-cuda-runtime wheel
        for c in Path(p or ".").glob("nvidia/cu*/include"):
            if (c / "cuda.h").exists():
                return c
    raise SystemExit("gpusim: CUDA headers not found; set CUDA_HOME")


def cuobjdump():
    """A cuobjdump: GPUSIM_CUOBJDUMP, the toolkit's, PATH's, or the one in the triton wheel."""
    if os.environ.get("GPUSIM_CUOBJDUMP"):
        return os.environ["GPUSIM_CUOBJDUMP"]
    h = cuda_home()
    cands = [h / "bin" / "cuobjdump"] if h else []
    w = shutil.which("cuobjdump")
    if w:
        cands.append(Path(w))
    for p in sys.path:
        cands.append(Path(p or ".") / "triton/backends/nvidia/bin/cuobjdump")
    for c in cands:
        if c.exists():
            return str(c)
    return ""


def _flags():
    info = ""
    with contextlib.suppress(OSError):
        info = Path("/proc/cpuinfo").read_text()
    flags = next((line for line in info.splitlines() if line.startswith("flags")), "")
    if not {"avx2", "fma", "f16c"} <= set(flags.split()):
        raise SystemExit("gpusim needs a CPU with AVX2, FMA and F16C")
    return [
        "-std=c++17",
        "-O3",
        "-march=x86-64-v3",
        "-fPIC",
        "-ffp-contract=off",
        "-fno-strict-aliasing",
        "-w",
    ]


def _clean_env():
    e = dict(os.environ)
    e.pop("LD_PRELOAD", None)
    return e


def _run(cmd):
    r = subprocess.run([str(c) for c in cmd], capture_output=True, text=True, env=_clean_env())
    if r.returncode:
        raise SystemExit(
            "gpusim: build failed:\n" + " ".join(map(str, cmd)) + "\n" + r.stdout + r.stderr
        )


def digest(files, extra):
    h = hashlib.sha256()
    for f in files:
        h.update(f.read_bytes())
    h.update(repr(extra).encode())
    return h.hexdigest()[:16]


def _locked(name, make):
    """Calls make(tmpdir) once for a folder name in the cache; the folder appears whole."""
    dest = cache_dir() / name
    if dest.exists():
        return dest
    with open(cache_dir() / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not dest.exists():
            tmp = Path(tempfile.mkdtemp(dir=cache_dir()))
            try:
                make(tmp)
                tmp.chmod(0o755)
                tmp.rename(dest)
            finally:
                if tmp.exists():
                    shutil.rmtree(tmp)
    return dest


def core():
    """Folder with libcudart.so.13 and libcuda.so.1 of the simulator."""
    files = sorted(p for p in SRC.iterdir() if p.name != "aten.cpp")
    flags = _flags()
    inc = cuda_include()

    def make(tmp):
        print("gpusim: building the simulator (once)...", file=sys.stderr, flush=True)
        with ThreadPoolExecutor(2) as ex:
            list(
                ex.map(
                    lambda n: _run(
                        [
                            "g++",
                            *flags,
                            "-I",
                            SRC,
                            "-isystem",
                            inc,
                            "-c",
                            SRC / f"{n}.cpp",
                            "-o",
                            tmp / f"{n}.o",
                        ]
                    ),
                    CORE,
                )
            )
        _run(
            [
                "g++",
                "-shared",
                "-o",
                tmp / "libcudart.so.13",
                *[tmp / f"{n}.o" for n in CORE],
                "-Wl,-soname,libcudart.so.13",
                f"-Wl,--version-script={SRC / 'exports.map'}",
                "-ldl",
                "-lpthread",
            ]
        )
        for o in tmp.glob("*.o"):
            o.unlink()
        (tmp / "libcuda.so.1").symlink_to("libcudart.so.13")
        (tmp / "libcuda.so").symlink_to("libcudart.so.13")

    return _locked("core-" + digest(files, (flags, str(inc))), make)


def aten():
    """Path of the library that runs torch's own CUDA ops on the CPU (needs torch's headers)."""
    import torch
    from torch.utils import cpp_extension as ce

    files = [SRC / "aten.cpp"]
    flags = [
        "-std=c++20",
        "-O1",
        "-fPIC",
        "-w",
        f"-D_GLIBCXX_USE_CXX11_ABI={int(torch._C._GLIBCXX_USE_CXX11_ABI)}",
    ]
    lib = Path(torch.__file__).parent / "lib"
    incs = [x for p in ce.include_paths() for x in ("-isystem", p)]

    def make(tmp):
        print(
            "gpusim: building the aten layer for torch " + torch.__version__ + " (once)...",
            file=sys.stderr,
            flush=True,
        )
        _run(
            [
                "g++",
                *flags,
                *incs,
                "-isystem",
                cuda_include(),
                "-shared",
                files[0],
                "-o",
                tmp / "libgpusim_aten.so",
                "-L",
                lib,
                "-lc10",
                "-lc10_cuda",
                "-ltorch_cpu",
                "-ltorch_cuda",
                "-L",
                core(),
                "-l:libcudart.so.13",
            ]
        )

    return _locked("aten-" + digest(files, (flags, torch.__version__)), make) / "libgpusim_aten.so"
