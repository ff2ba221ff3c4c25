"""Checks a built wheel: size, tag, contents, ABI, libraries, device code, no path of its builder.

    python .ci/check_wheel.py dist/swa_fast-*.whl

Needs torch-abi-audit, and for the CUDA library NVIDIA's cuobjdump, which is taken from PATH, from
CUDA_HOME, or from the triton package. Exits with 1 and a line for each failed check.
"""

from __future__ import annotations

import getpass
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

MODULES = (
    "swa_fast/__init__.py",
    "swa_fast/py.typed",
    "swa_fast/_build_info.json",
    "swa_fast/batch_norm/run.py",
    "swa_fast/checkpoints/averaging.py",
    "swa_fast/kernels/update.py",
    "swa_fast/train/cli.py",
    "swa_fast/train/data/memory.py",
)
MAX_BYTES = 25_000_000
OLDEST_TORCH = "2.10.0"
# Whatever a machine with torch on it has: libtorch_cuda is not there with a torch for the CPU, and
# is reached through libtorch. The CUDA runtime is the one that torch came with.
SYSTEM = {"libc.so.6", "libm.so.6", "libgcc_s.so.1", "libstdc++.so.6", "libpthread.so.0"}
SYSTEM |= {"libgomp.so.1", "ld-linux-x86-64.so.2"}
NEEDED = {"_C": {"libc10.so", "libtorch.so", "libtorch_cpu.so"}}
NEEDED["_C_cuda"] = NEEDED["_C"] | {"libcudart.so"}
# Architectures on which no kernel may spill. On sm_75, which nothing was tuned for, one does.
SPILL_FREE = ("80", "90", "100", "120")
problems: list[str] = []


def version(text: str) -> tuple[int, ...]:
    return tuple(map(int, text.split(".")))


def check(condition: bool, message: str) -> None:
    print(("ok    " if condition else "FAIL  ") + message)
    if not condition:
        problems.append(message)


def cuobjdump() -> str | None:
    candidates = [shutil.which("cuobjdump")]
    if "CUDA_HOME" in os.environ:
        candidates.append(os.path.join(os.environ["CUDA_HOME"], "bin", "cuobjdump"))
    triton = importlib.util.find_spec("triton")
    if triton is not None and triton.origin is not None:
        candidates += [str(p) for p in Path(triton.origin).parent.rglob("bin/cuobjdump")]
    return next((c for c in candidates if c and os.access(c, os.X_OK)), None)


def listed(tool: str, option: str, library: Path) -> set[str]:
    output = subprocess.run(
        [tool, option, str(library)], capture_output=True, text=True, check=True
    )
    return set(re.findall(r"\bsm_(\d+[af]?)\b", output.stdout))


def check_device_code(library: Path, arch_list: str) -> None:
    tool = cuobjdump()
    if tool is None:
        check(False, "cuobjdump is needed to list the device code of _C_cuda")
        return
    arches = arch_list.replace(" ", ";").split(";")
    expected = {a.removesuffix("+PTX").replace(".", "") for a in arches}
    expected_ptx = {a.removesuffix("+PTX").replace(".", "") for a in arches if a.endswith("+PTX")}
    found, found_ptx = listed(tool, "--list-elf", library), listed(tool, "--list-ptx", library)
    check(found == expected, f"cubins of {library.name}: {sorted(found)}, asked {arch_list}")
    check(found_ptx == expected_ptx, f"PTX of {library.name}: {sorted(found_ptx)}")
    check_kernels(tool, library)


def check_kernels(tool: str, library: Path) -> None:
    """No spilled registers, and 128-bit accesses in the update's kernels."""
    usage = subprocess.run(
        [tool, "--dump-resource-usage", str(library)], capture_output=True, text=True, check=True
    ).stdout
    registers, spilled, kernels = 0, [], 0
    for part in re.split(r"^arch = ", usage, flags=re.MULTILINE)[1:]:
        arch = part.split()[0].removeprefix("sm_")
        found = re.findall(r"Function (\S+):\s+REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", part)
        for name, used, stack, local in found:
            if re.search(r"\d(update|swap|nonfinite|statistics|normalise|merge)_kernel", name):
                kernels += 1
                registers = max(registers, int(used))
                if int(stack) or int(local):
                    spilled.append((arch, name, f"{stack} bytes of stack"))
    check(kernels > 0, f"{kernels} kernels of averages and BatchNorm")
    known = [entry for entry in spilled if entry[0] in SPILL_FREE]
    check(not known, f"at most {registers} registers, none spilled {known or ''}")
    for entry in spilled:
        if entry not in known:
            print("note  spilled, sm_" + ", ".join(entry))
    code = subprocess.run([tool, "-sass", str(library)], capture_output=True, text=True, check=True)
    for function in code.stdout.split("Function : ")[1:]:
        name = function.split()[0]
        if re.search(r"\d(update|swap)_kernel", name):
            wide = all(f"{access}.E.128" in function for access in ("LDG", "STG"))
            if not wide:
                check(False, f"128-bit accesses to global memory in {name}")


def check_needed(name: str, library: Path) -> None:
    output = subprocess.run(
        ["readelf", "-d", str(library)], capture_output=True, text=True, check=True
    ).stdout
    needed = set(re.findall(r"\(NEEDED\).*\[(.+)\]", output))
    torch = {n.removesuffix(".13").removesuffix(".12") for n in needed - SYSTEM}
    check(torch <= NEEDED[name], f"{name} needs {', '.join(sorted(needed))}")
    if name == "_C_cuda":
        check("libtorch.so" in torch, "_C_cuda finds libtorch_cuda through libtorch")


def check_no_build_path(file: Path, shown: str) -> None:
    content = file.read_bytes()
    roots = {str(Path.cwd()), str(Path.home()), sys.prefix, sys.base_prefix, tempfile.gettempdir()}
    # Directories every machine has say nothing about this one.
    roots -= {"/", "/usr", "/usr/local", "/root"}
    roots |= {f"/home/{getpass.getuser()}/", "/root/", "site-packages/"}
    leaked = sorted(root for root in roots if root.encode() in content)
    check(not leaked, f"no path of the build machine in {shown} {leaked or ''}")


def main(wheel: Path) -> int:
    size = wheel.stat().st_size
    check(size <= MAX_BYTES, f"{size / 1e6:.1f} MB, at most {MAX_BYTES / 1e6:.0f}")
    with zipfile.ZipFile(wheel) as archive, tempfile.TemporaryDirectory() as scratch:
        archive.extractall(scratch)
        names = archive.namelist()
        root = Path(scratch)
        libraries = sorted(n for n in names if n.endswith(".so"))
        info = json.loads((root / "swa_fast" / "_build_info.json").read_text())

        tag = "-".join(wheel.stem.split("-")[-3:])
        platforms = r"(linux_\w+|manylinux_2_\d+_\w+(\.manylinux_2_\d+_\w+)*)"
        pattern = f"cp310-abi3-{platforms}" if libraries else "py3-none-any"
        check(re.fullmatch(pattern, tag) is not None, f"tag {tag}")
        check(all(m in names for m in MODULES), "package files are there")
        stray = [n for n in names if not n.startswith(("swa_fast/", "swa_fast-"))]
        check(not stray, f"nothing outside the package {stray or ''}")

        built = {"_C", "_C_cuda"} - set(info.get("skipped", {}))
        expected = sorted(f"swa_fast/{name}.abi3.so" for name in built)
        check(libraries == expected, f"libraries {libraries}, build facts say {expected}")
        for name in libraries:
            audit = subprocess.run(
                [Path(sys.executable).parent / "torch-abi-audit", "--check", "both", root / name],
                capture_output=True,
                text=True,
                check=False,
            )
            print(audit.stdout)
            check(audit.returncode == 0, f"torch-abi-audit accepts {name}")
            newest = re.search(r"Min torch: +([\d.]+)", audit.stdout)
            check(
                newest is not None and version(newest.group(1)) <= version(OLDEST_TORCH),
                f"{name} needs no torch after {OLDEST_TORCH}",
            )
            check_needed(Path(name).name.split(".")[0], root / name)
        for name in names:
            if not name.endswith("/"):
                check_no_build_path(root / name, name)
        if "_C_cuda" in built:
            check_device_code(root / "swa_fast" / "_C_cuda.abi3.so", info["arch_list"])
    print(f"{wheel.name}: {len(problems)} problems")
    return 1 if problems else 0


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: check_wheel.py WHEEL")
    sys.exit(main(Path(sys.argv[1])))
