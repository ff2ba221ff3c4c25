"""What the compilers made of every kernel: registers, spills, shared memory, 128-bit accesses.

    python bench/kernel_facts.py                    table; fails where a kernel is over its limits
    python bench/kernel_facts.py --record           makes what is found the limits
    python bench/kernel_facts.py --library FILE.so  of another build of swa_fast._C_cuda

For sm_80, sm_90 and sm_100, without a GPU. CUDA kernels come from the library: its own cubins where
it has them, else its PTX, assembled. Triton kernels are compiled as the package launches them, for
representative types and layouts. The limits are in bench/kernel_limits.json. A kernel is over them
when it needs more registers, more stack or local memory, more shared memory, or lost its 128-bit
loads or stores. Register numbers are compared only for the compilers that they were recorded with.
Of kernels that live on many loads in flight, the blocks that fit on a multiprocessor are compared
with what hides the memory's latency, instead of registers with a recorded number.

Needs cuobjdump and ptxas, which are taken from the triton package, CUDA_HOME or PATH. Without the
CUDA library or without Triton their kernels are left out, which --require turns into an error.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import dataclasses
import importlib.util
import json
import multiprocessing
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

__all__ = ["Facts", "main", "worse"]

ARCHES = (80, 90, 100)
LIMITS = Path(__file__).with_name("kernel_limits.json")

# Threads of a block, and how many blocks must fit on a multiprocessor. With 128 bytes a thread on
# their way, three blocks of the update hold 96 KB; an H100 needs about 20 at full bandwidth (3.35
# TB/s for 700 ns over 132 multiprocessors), a B200 about 40.
RESIDENT = {
    "update_kernel": (256, 3),
    "nonfinite_kernel": (256, 4),
    "swap_kernel": (256, 4),
    "swag_kernel": (256, 4),
    "statistics_kernel": (256, 3),
    "normalise_kernel": (256, 3),
}


@dataclasses.dataclass(frozen=True)
class Facts:
    registers: int
    stack: int  # bytes of a thread
    local: int  # instructions that read or write local memory
    shared: int  # bytes
    wide_loads: bool  # 128-bit loads from global memory
    wide_stores: bool


def worse(found: Facts, limit: Facts, registers: bool = True) -> list[str]:
    """The limits that a kernel exceeds, a line each."""
    over = []
    for name in ("registers", "stack", "local", "shared"):
        now, then = getattr(found, name), getattr(limit, name)
        if now > then and (registers or name != "registers"):
            over.append(f"{name} {now} > {then}")
    for name in ("wide_loads", "wide_stores"):
        if getattr(limit, name) and not getattr(found, name):
            over.append(f"no {name.replace('wide_', '128-bit ')} any more")
    return over


def resident_blocks(registers: int, threads: int) -> int:
    """Blocks of a multiprocessor whose registers suffice: 16,384 for each of four schedulers,
    given out to warps in units of 256."""
    warps = threads // 32
    of_a_warp = max(-(-registers * 32 // 256) * 256, 256)
    return min(16384 // of_a_warp, 16) * 4 // warps


# ---------------------------------------------------------------------------------------- tools


def _tool(*names: str) -> str:
    folders = []
    triton = importlib.util.find_spec("triton")
    if triton is not None and triton.origin is not None:
        folders += sorted(p.parent for p in Path(triton.origin).parent.rglob("bin/cuobjdump"))
    if "CUDA_HOME" in os.environ:
        folders.append(Path(os.environ["CUDA_HOME"]) / "bin")
    for name in names:
        for folder in folders:
            if os.access(folder / name, os.X_OK):
                return str(folder / name)
        found = shutil.which(name)
        if found:
            return found
    sys.exit(f"kernel_facts: {names[0]} is needed: install triton or the CUDA toolkit")


def _run(*command: str | Path, cwd: Path | None = None) -> str:
    result = subprocess.run(
        [str(c) for c in command], capture_output=True, text=True, check=False, cwd=cwd
    )
    if result.returncode:
        sys.exit(f"kernel_facts: {' '.join(map(str, command))} failed:\n{result.stderr}")
    return result.stdout


def _kernel_name(mangled: str) -> str:
    """The kernel with its template arguments, without namespaces and parameters."""
    name = mangled
    if mangled.startswith("_Z") and shutil.which("c++filt"):
        name = _run("c++filt", mangled).strip()
    name = name.removeprefix("void ").replace("(anonymous namespace)::", "")
    name = re.sub(r"\b(swa_fast|c10)::", "", name)
    return re.sub(r"\(.*", "", re.sub(r"\((bool|int|unsigned int)\)", "", name)).replace(" >", ">")


def facts_of(cubin: Path, dynamic_shared: int = 0) -> dict[str, Facts]:
    """The facts of every kernel in a cubin, by its mangled name."""
    tool = _tool("cuobjdump")
    usage = re.findall(
        r"Function (\S+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+)", _run(tool, "-res-usage", cubin)
    )
    bodies = {}
    for body in _run(tool, "-sass", cubin).split("Function : ")[1:]:
        bodies[body.split()[0]] = body
    found = {}
    for name, registers, stack, shared in usage:
        body = bodies[name]
        found[name] = Facts(
            int(registers), int(stack), len(re.findall(r"\b(?:LDL|STL)\b", body)),
            int(shared) + dynamic_shared, bool(re.search(r"\bLDG\S*\.128", body)),
            bool(re.search(r"\bSTG\S*\.128", body)),
        )  # fmt: skip
    return found


# ----------------------------------------------------------------------------------------- CUDA


def _cubins(library: Path, arch: int, scratch: Path) -> list[Path]:
    found = sorted(scratch.glob(f"*.sm_{arch}.cubin"))
    if found:
        return found
    # The newest PTX that the architecture can run.
    sources: dict[int, list[Path]] = {}
    for ptx in scratch.glob("*.ptx"):
        target = int(re.findall(r"\.sm_(\d+)", ptx.name)[-1])
        if target <= arch:
            sources.setdefault(target, []).append(ptx)
    if not sources:
        sys.exit(f"kernel_facts: {library.name} has neither code for sm_{arch} nor PTX")
    assembler = _tool(*(["ptxas-blackwell"] if arch >= 100 else []), "ptxas")
    for ptx in sources[max(sources)]:
        cubin = scratch / f"{ptx.stem}.assembled.sm_{arch}.cubin"
        _run(assembler, f"-arch=sm_{arch}", ptx, "-o", cubin)
        found.append(cubin)
    return found


def cuda_facts(library: Path) -> dict[str, Facts]:
    """The facts of all CUDA kernels, by ``cuda sm_NN kernel``."""
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        tool = _tool("cuobjdump")
        for option in ("-xelf", "-xptx"):
            _run(tool, option, "all", library.resolve(), cwd=scratch)
        for arch in ARCHES:
            for cubin in _cubins(library, arch, scratch):
                for name, facts in facts_of(cubin).items():
                    found[f"cuda sm_{arch} {_kernel_name(name)}"] = facts
    return found


# --------------------------------------------------------------------------------------- Triton


class _Driver:
    """Stands in for a GPU that Triton compiles for and never launches on."""

    def __init__(self, arch: int) -> None:
        self._arch = arch

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self._arch, 32)

    def get_current_device(self) -> int:
        return self._arch

    def get_current_stream(self, device: int) -> int:
        return 0


def _launches() -> dict[str, Callable[[], object]]:
    """What the package launches, by a name for it, on CPU tensors that nothing will read."""
    import torch

    from swa_fast import _layout
    from swa_fast.kernels import batch_norm, combine, swag, update

    def vector(dtype: torch.dtype, count: int = 4096) -> Any:
        return torch.zeros(count, dtype=dtype)

    table = torch.zeros((3, _layout.SEGMENT_HEADER + 2), dtype=torch.int64)
    rules = torch.zeros((2, _layout.RULE_COLUMNS), dtype=torch.float64)
    n_averaged, counters = torch.zeros(2, dtype=torch.int64), torch.zeros(3, dtype=torch.int64)
    fp32, bf16 = torch.float32, torch.bfloat16

    def updating(pairs: int, seed: int | None = None, skip_nonfinite: bool = False) -> Any:
        return lambda: update.update_(
            [], [], n_averaged, counters, rules, table, pairs, seed, skip_nonfinite
        )

    def capturing(pairs: int) -> Any:
        wide = torch.zeros((3, _layout.SEGMENT_HEADER + 23), dtype=torch.int64)
        return lambda: swag.swag_([], [], n_averaged[:1], counters, wide, pairs, 20)

    def collecting(dtype: torch.dtype, layout: torch.memory_format) -> Any:
        x = torch.zeros((16, 64, 16, 16), dtype=dtype).contiguous(memory_format=layout)
        batch, weight = torch.zeros((4, 64), dtype=torch.float64), vector(fp32, 64)
        return lambda: batch_norm.batch_norm_collect(
            x, weight, weight, 1e-5, True, True, batch, None
        )

    def merging() -> None:
        accumulators = torch.zeros((9, 64), dtype=torch.float64)
        batch_norm.batch_norm_merge_(accumulators, torch.zeros((4, 64), dtype=torch.float64), 2)

    def combining(dtype: torch.dtype) -> Any:
        rows, outputs = [vector(dtype) for _ in range(3)], [vector(fp32) for _ in range(4)]
        return lambda: combine.combine_(outputs, rows, torch.ones(4, 3, dtype=torch.float64))

    contiguous, last = torch.contiguous_format, torch.channels_last
    return {
        # Bit 4 a + s of the pairs: averages of type a, sources of type s.
        "fp32": updating(1 << 0),
        "fp32, skip_nonfinite": updating(1 << 0, None, True),
        "fp32 of bf16": updating(1 << 2),
        "bf16, stochastic": updating(1 << 10, 1),
        "SWAG, fp32": capturing(1 << 0),
        "SWAG, fp32 of bf16": capturing(1 << 2),
        "any": lambda: update.swap_([], [], table, 0),
        "fp32 contiguous": collecting(fp32, contiguous),
        "fp32 channels-last": collecting(fp32, last),
        "bf16 contiguous": collecting(bf16, contiguous),
        "bf16 channels-last": collecting(bf16, last),
        "fp64": merging,
        "three rows, fp32": combining(fp32),
        "three rows, bf16": combining(bf16),
    }


def triton_facts_of(arch: int) -> dict[str, Facts]:
    """By ``triton sm_NN kernel[what]``. Changes Triton for good: for a process of its own."""
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    driver.set_active(_Driver(arch))
    compiled: list[Any] = []
    run = JITFunction.run

    def compile_only(self: Any, *args: Any, warmup: bool, **kwargs: Any) -> Any:
        kernel = run(self, *args, warmup=True, **kwargs)
        compiled.append(kernel)
        return kernel

    JITFunction.run = compile_only
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        for what, launch in _launches().items():
            compiled.clear()
            launch()
            for kernel in compiled:
                cubin = Path(folder) / "kernel.cubin"
                cubin.write_bytes(kernel.asm["cubin"])
                (facts,) = facts_of(cubin, kernel.metadata.shared).values()
                found[f"triton sm_{arch} {kernel.metadata.name}[{what}]"] = facts
    return found


def triton_facts() -> dict[str, Facts]:
    workers = min(len(ARCHES), os.cpu_count() or 1)
    context = multiprocessing.get_context("spawn")
    found: dict[str, Facts] = {}
    with concurrent.futures.ProcessPoolExecutor(workers, mp_context=context) as pool:
        for part in pool.map(triton_facts_of, ARCHES):
            found |= part
    return found


# --------------------------------------------------------------------------------------- limits


def load(path: Path = LIMITS) -> tuple[dict[str, str], dict[str, Facts]]:
    if not path.exists():
        return {}, {}
    content = json.loads(path.read_text(encoding="utf-8"))
    return content["compilers"], {k: Facts(*v) for k, v in content["kernels"].items()}


def save(compilers: Mapping[str, str], found: Mapping[str, Facts], path: Path = LIMITS) -> None:
    """A line for each kernel, so that differences can be read."""
    lines = [
        f"    {json.dumps(name)}: {json.dumps(dataclasses.astuple(found[name]))}"
        for name in sorted(found)
    ]
    fields = [field.name for field in dataclasses.fields(Facts)]
    path.write_text(
        f'{{\n  "compilers": {json.dumps(dict(sorted(compilers.items())))},\n'
        f'  "columns": {json.dumps(fields)},\n'
        '  "kernels": {\n' + ",\n".join(lines) + "\n  }\n}\n",
        encoding="utf-8",
    )


def check(
    found: Mapping[str, Facts], limits: Mapping[str, Facts], same_compiler: Mapping[str, bool]
) -> list[str]:
    """A line for everything that is over the limits, or has none, or is gone."""
    problems = []
    for name, facts in found.items():
        if name not in limits:
            problems.append(f"{name} has no limits: record them (--record)")
            continue
        kind, _, kernel = name.split(maxsplit=2)
        wanted = RESIDENT.get(kernel.partition("<")[0]) if kind == "cuda" else None
        over = worse(facts, limits[name], wanted is None and same_compiler.get(kind, False))
        if wanted is not None and (fit := resident_blocks(facts.registers, wanted[0])) < wanted[1]:
            over.append(
                f"{fit} blocks a multiprocessor < {wanted[1]} ({facts.registers} registers)"
            )
        if over:
            problems.append(f"{name}: {', '.join(over)}")
    kinds = {name.split()[0] for name in found}
    gone = [n for n in limits if n.split()[0] in kinds and n not in found]
    return problems + [f"{name} is gone: record the limits (--record)" for name in gone]


def show(found: Mapping[str, Facts]) -> None:
    print(f"{'':90}{'registers':>10}{'stack':>7}{'local':>7}{'shared':>8}  128-bit")
    for name in sorted(found):
        f = found[name]
        wide = " ".join(w for w, on in (("load", f.wide_loads), ("store", f.wide_stores)) if on)
        print(f"{name:90}{f.registers:10}{f.stack:7}{f.local:7}{f.shared:8}  {wide or '-'}")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--record", action="store_true", help="write the limits")
    parser.add_argument("--library", type=Path, help="default: that of the installed swa_fast")
    parser.add_argument("--require", action="store_true", help="fail where something is missing")
    parser.add_argument("--quiet", action="store_true", help="no table")
    options = parser.parse_args(arguments)
    os.environ.pop("TRITON_INTERPRET", None)
    found: dict[str, Facts] = {}
    compilers: dict[str, str] = {}
    library = options.library
    spec = importlib.util.find_spec("swa_fast")
    if library is None and spec is not None and spec.origin is not None:
        library = Path(spec.origin).parent / "_C_cuda.abi3.so"
    missing = []
    if library is not None and library.exists():
        found |= cuda_facts(library)
        info = library.with_name("_build_info.json")
        compilers["cuda"] = json.loads(info.read_text())["cuda"] if info.exists() else ""
    else:
        missing.append("the library swa_fast._C_cuda")
    if importlib.util.find_spec("triton") is not None:
        found |= triton_facts()
        import triton

        compilers["triton"] = triton.__version__
    else:
        missing.append("triton")
    if missing:
        print(f"left out: {', '.join(missing)}")
    if not options.quiet:
        show(found)
    recorded, limits = load()
    if options.record:
        kept = {n: f for n, f in limits.items() if n.split()[0] not in compilers}
        save(recorded | compilers, kept | found)
        print(f"{len(found)} kernels recorded in {LIMITS.name}")
        return 0
    same = {kind: recorded.get(kind) == version for kind, version in compilers.items()}
    for kind, is_same in same.items():
        if not is_same:
            print(
                f"{kind} {compilers[kind]}, recorded with {recorded.get(kind)}: registers are not "
                "compared"
            )
    problems = check(found, limits, same)
    for problem in problems:
        print(f"FAIL  {problem}")
    print(f"{len(found)} kernels, {len(problems)} over their limits")
    return 1 if problems or (options.require and missing) else 0


if __name__ == "__main__":
    sys.exit(main())
