"""What the compilers made of every kernel: blocks that fit, loads in flight, barriers, spills.

    python bench/kernel_facts.py                    table; fails where a kernel is not as it must be
    python bench/kernel_facts.py --record           makes what is found the limits
    python bench/kernel_facts.py --library FILE.so  of another build of swa_fast._C_cuda

For the architectures of the wheel, sm_75 to sm_120, without a GPU. CUDA kernels come from the
library, for the architectures that it was built for. Triton kernels are compiled as the package
launches them, for representative types and layouts.

Two things are asked of a kernel. What makes sense, whatever it was before: no spills; as many
blocks on a multiprocessor, loads in flight (bench/sass.py) and barriers as GATES says. And what it
was: bench/kernel_limits.json has for each kernel what was found when the limits were recorded, and
it fails when it needs more registers, shared memory or barriers, or has fewer loads in flight. That
is compared only for the compilers that the limits were recorded with.

Needs cuobjdump, which is taken from the triton package, CUDA_HOME or PATH. Without the
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

import sass

__all__ = ["Facts", "Gate", "gate_of", "main", "resident_blocks", "senseless", "worse"]

ARCHES = (75, 80, 90, 100, 120)
LIMITS = Path(__file__).with_name("kernel_limits.json")
# Threads and bytes of shared memory of a multiprocessor; all have 65,536 registers. A block of the
# newer ones takes 1 KB beyond its own.
MULTIPROCESSOR = {
    75: (1024, 64 << 10), 80: (2048, 164 << 10), 90: (2048, 228 << 10), 100: (2048, 228 << 10),
    120: (1536, 100 << 10),
}  # fmt: skip
CUDA_THREADS = 256  # of a block of every CUDA kernel


@dataclasses.dataclass(frozen=True)
class Gate:
    """What a kernel that is bound by memory must have. Loads are those of a thread in flight in the
    loop of that name: of 128 bits, of fewer, and of what other blocks wrote."""

    blocks: int = 1  # of a multiprocessor
    wide: int = 0
    narrow: int = 0
    strong: int = 0
    barriers: int | None = None


# An H100 needs about 20 KB of a multiprocessor on their way at full bandwidth (3.35 TB/s for 700 ns
# over 132 multiprocessors), a B200 about 40.
GATES = {
    "cuda update_kernel": Gate(3, wide=8, narrow=16, barriers=1),
    "cuda swag_kernel": Gate(3, wide=6, narrow=6, barriers=1),
    "cuda swap_kernel": Gate(4, wide=8, narrow=8, barriers=0),
    "cuda combine_kernel": Gate(3, barriers=0),
    "cuda nonfinite_kernel": Gate(4, wide=4, narrow=4, barriers=0),
    # By how many values a thread loads at once: see gate_of. Barriers are those in the code, two of
    # block_sums and four in each of three copies of add_to_others. A block passes four of them, the
    # last one of a tile six, or ten where the blocks are divided into groups.
    "cuda statistics_kernel, wide": Gate(3, wide=4, strong=8, barriers=14),
    "cuda statistics_kernel, narrow": Gate(3, narrow=8, strong=8, barriers=14),
    # Four units are asked for, each behind its own condition. In some of the contiguous kernels
    # ptxas needs the first before the fourth load, with 48 to 60 registers of the 80 that three
    # blocks leave, so registers are not what is short. Three loads of 16 bytes are 36 KB of a
    # multiprocessor on their way; for sm_100, which needs more, all wide kernels have four.
    "cuda normalise_kernel, wide": Gate(3, wide=3, barriers=0),
    "cuda normalise_kernel, narrow": Gate(3, narrow=4, barriers=0),
    # Of 128 threads.
    "triton _update_kernel": Gate(3, wide=4, narrow=16),
    "triton _swag_kernel": Gate(3, wide=8, narrow=8),
    "triton _swap_kernel": Gate(4, wide=8),
    "triton _statistics_kernel": Gate(3, wide=8, strong=7),
    "triton _normalise_kernel": Gate(4, wide=2, barriers=0),
}


@dataclasses.dataclass(frozen=True)
class Facts:
    registers: int
    stack: int  # bytes of a thread
    local: int  # instructions that read or write local memory
    shared: int  # bytes
    threads: int  # of a block
    barriers: int
    wide: int  # loads in flight, see sass.Loads
    narrow: int
    strong: int
    wide_stores: int


def worse(found: Facts, limit: Facts, same_compiler: bool = True) -> list[str]:
    """The limits that a kernel exceeds, a line each."""
    over = []
    if same_compiler:
        for name in ("registers", "shared", "barriers"):
            now, then = getattr(found, name), getattr(limit, name)
            if now > then:
                over.append(f"{name} {now} > {then}")
        for name in ("wide", "narrow", "strong"):
            now, then = getattr(found, name), getattr(limit, name)
            if now < then:
                over.append(f"{name} loads in flight {now} < {then}")
    for name, of in (("wide", "loads"), ("wide_stores", "stores")):
        if getattr(limit, name) and not getattr(found, name):
            over.append(f"no 128-bit {of} any more")
    return over


def resident_blocks(facts: Facts, arch: int) -> int:
    """Blocks that fit on a multiprocessor by their registers, of which each of four schedulers
    gives 16,384 to warps in units of 256, their threads and their shared memory."""
    threads, shared = MULTIPROCESSOR[arch]
    warps = facts.threads // 32
    of_a_warp = max(-(-facts.registers * 32 // 256) * 256, 256)
    by_registers = 16384 // of_a_warp * 4 // warps
    of_a_block = facts.shared + (1024 if arch >= 80 else 0)
    return min(by_registers, threads // facts.threads, shared // max(of_a_block, 1), 32)


def gate_of(kind: str, kernel: str) -> Gate | None:
    """The gate of a kernel, as in ``"cuda"``, ``"update_kernel<false>"``."""
    name = re.split(r"[<[]", kernel)[0]
    packed = re.search(r"BatchNormTraits<(\w+), (\d), ", kernel)
    if packed is not None:
        sizes = {"double": 8, "float": 4}
        pack = sizes.get(packed[1], 2) * int(packed[2])
        name += ", wide" if pack == 16 else ", narrow"
    return GATES.get(f"{kind} {name}")


def senseless(found: Facts, gate: Gate | None, arch: int) -> list[str]:
    """What a kernel should not be, whatever it was when the limits were recorded, a line each."""
    problems = []
    if found.stack or found.local:
        problems.append(f"spills: {found.stack} bytes of stack, {found.local} instructions")
    if gate is None:
        return problems
    fit = resident_blocks(found, arch)
    if fit < gate.blocks:
        problems.append(
            f"{fit} blocks a multiprocessor < {gate.blocks} ({found.registers} registers)"
        )
    for name in ("wide", "narrow", "strong"):
        now, least = getattr(found, name), getattr(gate, name)
        if now < least:
            problems.append(f"{now} {name} loads before the first use < {least}")
    if gate.barriers is not None and found.barriers > gate.barriers:
        problems.append(f"{found.barriers} barriers > {gate.barriers}")
    return problems


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


def facts_of(cubin: Path, threads: int = CUDA_THREADS, dynamic_shared: int = 0) -> dict[str, Facts]:
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
        code = sass.read(bodies[name])
        found[name] = Facts(
            int(registers), int(stack), code.local, int(shared) + dynamic_shared, threads,
            code.barriers, *dataclasses.astuple(code.loads), code.wide_stores,
        )  # fmt: skip
    return found


# ----------------------------------------------------------------------------------------- CUDA


def cuda_facts(library: Path) -> dict[str, Facts]:
    """The facts of all CUDA kernels, by ``cuda sm_NN kernel``, for the architectures that the
    library has machine code for."""
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        _run(_tool("cuobjdump"), "-xelf", "all", library.resolve(), cwd=scratch)
        for arch in ARCHES:
            for cubin in sorted(scratch.glob(f"*.sm_{arch}.cubin")):
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
                threads = 32 * kernel.metadata.num_warps
                (facts,) = facts_of(cubin, threads, kernel.metadata.shared).values()
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
    if content["columns"] != [field.name for field in dataclasses.fields(Facts)]:
        return {}, {}  # of another version of this script
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
        kind, arch, kernel = name.split(maxsplit=2)
        over = senseless(facts, gate_of(kind, kernel), int(arch.removeprefix("sm_")))
        if name not in limits:
            over.append("no limits: record them (--record)")
        else:
            over += worse(facts, limits[name], same_compiler.get(kind, False))
        if over:
            problems.append(f"{name}: {', '.join(over)}")
    seen = {tuple(name.split()[:2]) for name in found}
    gone = [n for n in limits if tuple(n.split()[:2]) in seen and n not in found]
    return problems + [f"{name} is gone: record the limits (--record)" for name in gone]


def show(found: Mapping[str, Facts]) -> None:
    heads = ("registers", "stack", "local", "shared", "blocks", "barriers", "wide", "narrow")
    print(f"{'':82}" + "".join(f"{head:>10}" for head in (*heads, "strong")))
    for name in sorted(found):
        f = found[name]
        arch = int(name.split()[1].removeprefix("sm_"))
        numbers = (
            f.registers, f.stack, f.local, f.shared, resident_blocks(f, arch), f.barriers, f.wide,
            f.narrow, f.strong,
        )  # fmt: skip
        print(f"{name:82}" + "".join(f"{number:10}" for number in numbers))


def compiler_of(library: Path) -> str:
    """The release of ptxas that made the library's machine code; empty where it has none."""
    with tempfile.TemporaryDirectory() as folder:
        _run(_tool("cuobjdump"), "-xelf", "all", library.resolve(), cwd=Path(folder))
        for cubin in sorted(Path(folder).glob("*.cubin")):
            found = re.search(rb"compilation tools, release [\d.]+, V([\d.]+)", cubin.read_bytes())
            if found:
                return found[1].decode()
    return ""


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
        seen = {name.split()[1] for name in found}
        missing += [f"CUDA code for sm_{arch}" for arch in ARCHES if f"sm_{arch}" not in seen]
        compilers["cuda"] = compiler_of(library)
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
                f"{kind} {compilers[kind]}, recorded with {recorded.get(kind)}: not compared with "
                "what was recorded"
            )
    problems = check(found, limits, same)
    for problem in problems:
        print(f"FAIL  {problem}")
    print(f"{len(found)} kernels, {len(problems)} over their limits")
    return 1 if problems or (options.require and missing) else 0


if __name__ == "__main__":
    sys.exit(main())
