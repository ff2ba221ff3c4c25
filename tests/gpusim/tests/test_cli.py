"""The command line: exit status, error messages, the check command."""

import os
import subprocess
import sys

from gpusim.build import cuda_home


def run(code, **env):
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, **env}
    )


def test_fault_makes_the_process_fail(extension):
    start = f"import torch; torch.ops.load_library({str(extension)!r})\n"
    start += "ops = torch.ops.gpusim_test\n"
    r = run(start + "ops.oob(torch.zeros(4, device='cuda')); print('end')")
    assert r.returncode == 86 and "out-of-bounds" in r.stderr and r.stdout == "end\n"
    r = run(
        start + "x = torch.ones(4, device='cuda'); print(ops.vadd(x, x).sum().item())",
        GPUSIM_REPORT="1",
    )
    assert r.returncode == 0 and r.stdout == "8.0\n" and "k_vadd" in r.stderr


def test_check(extension):
    env = {k: v for k, v in os.environ.items() if k not in ("LD_PRELOAD", "GPUSIM_ACTIVE")}
    r = subprocess.run(
        [sys.executable, "-m", "gpusim", "check", str(extension)],
        capture_output=True,
        text=True,
        env=env,
    )
    assert r.returncode == 0 and "k_welford" in r.stdout and "FAIL" not in r.stdout


def test_unimplemented_function_aborts():
    r = run("import torch, ctypes; ctypes.CDLL(None).cudaMallocMipmappedArray()")
    assert r.returncode < 0 and "cudaMallocMipmappedArray is not implemented" in r.stderr


def test_library_kernel_is_an_error():
    r = run(
        "import torch, torchvision\n"
        "boxes, scores = torch.rand(4, 4, device='cuda'), torch.rand(4, device='cuda')\n"
        "torchvision.ops.nms(boxes, scores, 0.5)"
    )
    assert r.returncode != 0 and (
        "library kernel" in r.stderr or "No module named 'torchvision'" in r.stderr
    )


def test_no_ptx_is_an_error(tmp_path):
    (tmp_path / "a.cu").write_text(
        "#include <cstdio>\n__global__ void k(int* x) { *x = 1; }\n"
        "int main() { int* x; cudaMalloc(&x, 4); k<<<1, 1>>>(x);\n"
        "  puts(cudaGetErrorName(cudaGetLastError())); }\n"
    )
    nvcc = str(cuda_home() / "bin" / "nvcc")
    for flag, good in (
        ("-gencode=arch=compute_90,code=sm_90", False),
        ("-gencode=arch=compute_90,code=compute_90", True),
    ):
        subprocess.run(
            [nvcc, "-cudart", "shared", flag, "a.cu", "-o", "a.out"], cwd=tmp_path, check=True
        )
        r = subprocess.run(["./a.out"], cwd=tmp_path, capture_output=True, text=True)
        assert (
            (r.returncode == 0 and "cudaSuccess" in r.stdout)
            if good
            else (
                r.returncode == 86 and "has no PTX embedded" in r.stderr and "9.0+PTX" in r.stderr
            )
        )
