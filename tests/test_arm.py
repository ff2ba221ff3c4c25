"""The CPU kernels on 64-bit ARM, compiled by a cross compiler and run under qemu.

This machine's build of the operators is recorded, with its instruction sets limited to AVX2: what
each call was given, and what memory held afterwards. ``tests/arm/run.cpp``, linked with the same
``csrc/*_cpu.cpp`` and compiled for ARM, is given the same, and has to leave the same bits behind,
but for the sign and the payload of a NaN.

``make test-arm`` runs it; it takes half a minute or more, most of it the compiler's. Needed are an
x86-64 with AVX2 and Debian's packages ``g++-aarch64-linux-gnu`` and ``qemu-user``.
"""

from __future__ import annotations

import ctypes
import os
import platform
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from swa_fast import EMA, SWA, Averager
from swa_fast import _layout as layout
from swa_fast.swag import SWAG

ROOT = Path(__file__).parents[1]
FLOATING = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
# torch's own numbers, of torch/headeronly/core/ScalarType.h.
NUMBERS = {
    torch.uint8: 0, torch.int64: 4, torch.float16: 5, torch.float32: 6, torch.float64: 7,
    torch.bfloat16: 15,
}  # fmt: skip
CODES = {code: dtype for dtype, code in layout.TYPE_CODES.items()} | {layout.BYTES: torch.uint8}
COMPILER, EMULATOR = "aarch64-linux-gnu-g++", "qemu-aarch64"


def word(*values: int) -> bytes:
    return struct.pack(f"<{len(values)}q", *values)


def filled(data: bytes) -> bytes:
    return data + bytes(-len(data) % 8)


class Recorder(TorchDispatchMode):
    """Writes every call of an operator of swa_fast's into a file that ``tests/arm/run.cpp`` reads,
    and keeps what memory holds after it."""

    def __init__(self) -> None:
        super().__init__()
        self.cases: list[bytes] = []
        self.names: list[str] = []
        # For each case its blocks' contents; no type for the table of addresses.
        self.expected: list[list[tuple[torch.dtype | None, bytes]]] = []

    def __torch_dispatch__(
        self, function: Any, types: Any, arguments: Any = (), kwargs: Any = None
    ) -> Any:
        if function.namespace != "swa_fast":
            return function(*arguments, **(kwargs or {}))
        assert not kwargs
        name = f"{function._schema.name.split('::')[1]}.{function._schema.overload_name}"
        parameters = function._schema.arguments
        given = [*arguments, *(p.default_value for p in parameters[len(arguments) :])]
        memory = Blocks()
        words: list[bytes] = []
        for parameter, value in zip(parameters, given, strict=True):
            optional = isinstance(parameter.type, torch.OptionalType)
            kind = parameter.type.getElementType() if optional else parameter.type
            words += [word(optional), memory.argument(kind, value)]
        table = next((v for p, v in zip(parameters, given, strict=True) if p.name == "table"), None)
        addresses = [] if table is None else memory.addresses(table)
        returns = len(function._schema.returns)
        self.cases.append(
            b"".join(
                [
                    word(len(name)), filled(name.encode()),
                    word(len(memory.storages)), *memory.contents(),
                    word(len(memory.tensors)), *memory.tensors,
                    word(len(addresses)), *addresses,
                    word(len(given)), *words,
                    word(returns),
                ]
            )
        )  # fmt: skip
        result = function(*arguments)
        if table is not None:
            del memory.dtypes[table.untyped_storage().data_ptr()]
        after = [
            (memory.dtypes.get(start), ctypes.string_at(start, size))
            for start, size in memory.storages.items()
        ]
        if returns:
            result_bytes = result.numel() * result.element_size()
            after.append((result.dtype, ctypes.string_at(result.data_ptr(), result_bytes)))
        self.names.append(name)
        self.expected.append(after)
        return result

    def write(self, path: Path) -> None:
        path.write_bytes(word(len(self.cases)) + b"".join(self.cases))


class Blocks:
    """The memory behind one call's tensors, and the call in terms of it."""

    def __init__(self) -> None:
        self.storages: dict[int, int] = {}  # bytes by address
        self.dtypes: dict[int, torch.dtype] = {}
        self.tensors: list[bytes] = []

    def argument(self, kind: Any, value: Any) -> bytes:
        if value is None:
            return word(0)
        if isinstance(kind, torch.BoolType):
            return word(3, value)
        if isinstance(kind, torch.FloatType):
            return word(2) + struct.pack("<d", value)
        if isinstance(kind, torch.IntType):
            return word(1, value)
        if isinstance(value, Tensor):
            return word(4, self.add(value))
        return word(5, len(value), *(self.add(tensor) for tensor in value))

    def add(self, tensor: Tensor) -> int:
        storage = tensor.untyped_storage()
        start = storage.data_ptr()
        self.storages[start] = storage.nbytes()
        self.dtypes.setdefault(start, tensor.dtype)
        self.tensors.append(
            word(
                list(self.storages).index(start), tensor.storage_offset() * tensor.element_size(),
                NUMBERS[tensor.dtype], tensor.dim(), *tensor.shape, *tensor.stride(),
            )
        )  # fmt: skip
        return len(self.tensors) - 1

    def addresses(self, table: Tensor) -> list[bytes]:
        """Where the table holds the address of a segment's memory, which becomes a block."""
        block = list(self.storages).index(table.untyped_storage().data_ptr())
        places = []
        for row, words in enumerate(table.tolist()):
            packed = words[layout.PACKED]
            for column in (layout.SOURCE, *range(layout.SEGMENT_HEADER, table.shape[1])):
                field = layout.SOURCE_TYPE if column == layout.SOURCE else layout.AVERAGE_TYPE
                dtype = CODES[packed >> field & 0xFF]
                start = words[column]
                self.storages[start] = (packed & 0xFFFFFFFF) * dtype.itemsize
                self.dtypes[start] = dtype
                place = list(self.storages).index(start)
                places.append(word(block, 8 * (row * table.shape[1] + column), place, 0))
        return places

    def contents(self) -> Iterator[bytes]:
        for start, size in self.storages.items():
            yield word(size, start % 64) + filled(ctypes.string_at(start, size))


class Odd(nn.Module):
    """Tensors of sizes that are no multiple of anything, in all four dtypes or of one, some with
    values that are special, and a counter that is copied."""

    def __init__(self, *dtypes: torch.dtype) -> None:
        super().__init__()
        for i, size in enumerate((1, 7, 8, 63, 64, 65, 1021)):
            tensor = torch.randn(size).to(dtypes[i % len(dtypes)])
            self.register_parameter(f"p{i}", nn.Parameter(tensor))
        self.register_buffer("counter", torch.tensor(5))

    def step(self, i: int) -> None:
        special = [float("inf"), -0.0, 1e-40, -float("inf"), float("nan"), 3e38, 6e-8]
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(torch.randn(parameter.shape) * 10.0 ** (i - 1))
                if i == 2 and parameter.numel() > 60:
                    parameter[: len(special)] = torch.tensor(special).to(parameter.dtype)


def averages() -> None:
    kept: tuple[tuple[torch.dtype, ...], ...] = (*((dtype,) for dtype in FLOATING), FLOATING)
    for dtypes in kept:
        for dtype in (None, torch.float32, torch.float64, torch.bfloat16, torch.float16):
            model = Odd(*dtypes)
            rules: dict[str, Any] = {"ema": EMA(0.9375), "early": EMA(0.25)}
            if dtype in (torch.float32, torch.float64):
                rules["swa"] = SWA()
            averager = Averager(model, rules, dtype=dtype)
            for i in range(4):
                model.step(i)
                averager.update()
            if dtype is None:
                with averager.applied("ema"):
                    pass
    model = Odd(torch.float32)
    averager = Averager(model, {"ema": EMA(0.9)}, on_nonfinite="skip")
    for i in range(4):
        model.step(i)
        averager.update()


def stochastic_averages() -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        model = Odd(dtype)
        averager = Averager(
            model, {"swa": SWA(), "ema": EMA(0.9375)}, dtype=torch.bfloat16, rounding="stochastic",
            seed=-3,
        )  # fmt: skip
        for i in range(4):
            model.step(i)
            averager.update()


def gaussians() -> None:
    for dtype in FLOATING:
        model = Odd(dtype)
        swag = SWAG(model, k=2)
        for i in range(4):
            model.step(i % 2)
            swag.update()


def combinations() -> None:
    run = torch.ops.swa_fast.combine_.cpu
    for sources, outputs, double in (
        ((torch.float32,) * 3, (torch.float32,), False),
        ((torch.float32,) * 9, (torch.float32,) * 6, False),
        ((torch.float32,) * 5, (torch.float32,) * 13, False),
        (FLOATING, FLOATING, False),
        ((torch.float32, torch.bfloat16, torch.float16), FLOATING[2:], False),
        ((torch.float32, torch.bfloat16, torch.float16), FLOATING, True),
    ):
        # Thirteen outputs of a megabyte and more are stored past the caches, where there is a way.
        count = 1307 if len(outputs) < 13 else 262_149
        rows = [torch.randn(count).to(dtype) for dtype in sources]
        sums = [torch.zeros(count, dtype=dtype) for dtype in outputs]
        run(sums, rows, torch.randn(len(outputs), len(sources), dtype=torch.float64), double)


def statistics() -> None:
    shapes: list[tuple[int, ...]] = [(3, 5), (129, 24, 4, 4), (9, 19, 3, 5), (2, 3, 140, 145)]
    shapes += [(70, 128, 2, 2), (2, 300, 3, 3), (1, 2, 300, 500)]
    run, merge = torch.ops.swa_fast.batch_norm_collect.cpu, torch.ops.swa_fast.batch_norm_merge_.cpu
    for shape in shapes:
        for dtype in FLOATING:
            if len(shape) > 2 and shape[2] > 100 and dtype == torch.float16:
                continue  # as slow to emulate as the rest together, and the same but for loads
            for last in (False, True)[: len(shape) - 1]:
                channels = (-1, *[1] * (len(shape) - 2))
                scale, mean = torch.rand(shape[1]), 100 * torch.randn(shape[1])
                x = torch.randn(shape) * scale.view(channels) + mean.view(channels)
                x = x.to(dtype)
                if last and len(shape) == 4:
                    x = x.contiguous(memory_format=torch.channels_last)
                weight, bias = torch.randn(shape[1]), torch.randn(shape[1]).to(torch.bfloat16)
                batch = torch.zeros(layout.BATCH_ROWS, shape[1], dtype=torch.float64)
                accumulators = torch.rand(layout.ACCUMULATOR_ROWS, shape[1], dtype=torch.float64)
                run(x, weight, bias, 1e-5, last, True, batch, None)
                for estimator in range(len(layout.ESTIMATORS)):
                    merge(accumulators, batch.clone(), estimator)
                run(x, None, None, 1e-5, False, False, batch, None)


RECORDED: tuple[Callable[[], None], ...] = (
    averages, stochastic_averages, gaussians, combinations, statistics,
)  # fmt: skip


def compile_for(compiler: str, folder: Path) -> Path:
    """The program of ``tests/arm/run.cpp`` and the kernels, by the options of ``setup.py``."""
    from torch.utils import cpp_extension

    options = [
        "-std=c++20", "-O3", "-Wall", "-Werror", "-ffp-contract=off", "-DTORCH_STABLE_ONLY",
        "-DTORCH_TARGET_VERSION=0x020b000000000000", f"-I{ROOT / 'csrc'}",
    ]  # fmt: skip
    options += [f"-isystem{path}" for path in cpp_extension.include_paths()]
    sources = [ROOT / "tests/arm/run.cpp", *sorted((ROOT / "csrc").glob("*_cpu.cpp"))]
    objects = []
    for source in sources:
        if source.name == "module_cpu.cpp":  # Python's part
            continue
        objects.append(folder / f"{source.stem}.o")
        subprocess.run([compiler, *options, "-c", source, "-o", objects[-1]], check=True)
    program = folder / "run"
    subprocess.run([compiler, *objects, "-o", program], check=True)
    return program


def same(dtype: torch.dtype, found: bytes, expected: bytes) -> bool:
    if found == expected:
        return True
    if not dtype.is_floating_point:
        return False
    a, b = (torch.frombuffer(bytearray(data), dtype=dtype) for data in (found, expected))
    if not torch.equal(a.isnan(), b.isnan()):
        return False
    integers = {2: torch.int16, 4: torch.int32, 8: torch.int64}[a.element_size()]
    return torch.equal(a[~a.isnan()].view(integers), b[~b.isnan()].view(integers))


def compare(recorder: Recorder, results: bytes) -> list[str]:
    """What differs, a line for each block."""
    at, differences = 0, []
    for case, (name, blocks) in enumerate(zip(recorder.names, recorder.expected, strict=True)):
        for i, (dtype, expected) in enumerate(blocks):
            if dtype is None:
                at += len(filled(expected))
                continue
            if name.startswith("batch_norm_collect") and i == len(blocks) - 1:
                at += 8  # how many bytes follow
            found = results[at : at + len(expected)]
            if not same(dtype, found, expected):
                differences.append(f"case {case}, {name}: block {i}, {dtype}, differs")
            at += len(filled(expected))
    if at != len(results):
        differences.append(f"expected {at} bytes of results, found {len(results)}")
    return differences


@contextmanager
def recording() -> Iterator[Recorder]:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    recorder = Recorder()
    with recorder:
        yield recorder


def record_and_compare(folder: Path, command: list[str]) -> None:
    """In a process of its own, whose instruction sets are limited from its start."""
    with recording() as recorder:
        for function in RECORDED:
            function()
    recorder.write(folder / "cases")
    subprocess.run([*command, str(folder / "cases"), str(folder / "results")], check=True)
    differences = compare(recorder, (folder / "results").read_bytes())
    print(f"{len(recorder.cases)} calls of {', '.join(sorted(set(recorder.names)))}")
    if differences:
        raise SystemExit("\n".join(differences))


def need_tools() -> None:
    if os.environ.get("SWA_FAST_TEST_ARM") != "1":
        pytest.skip("SWA_FAST_TEST_ARM=1, or make test-arm, compiles for ARM, which takes a minute")
    if platform.machine() != "x86_64" or not (ROOT / "csrc").exists():
        pytest.fail("expected an x86-64 and the sources beside the tests")
    for tool, package in ((COMPILER, "g++-aarch64-linux-gnu"), (EMULATOR, "qemu-user")):
        if shutil.which(tool) is None:
            pytest.fail(f"{tool} is not installed (Debian's package {package})")


def test_arm_computes_the_same_bits(tmp_path: Path) -> None:
    need_tools()
    compile_for(COMPILER, tmp_path)
    finished = subprocess.run(
        [sys.executable, __file__, str(tmp_path), EMULATOR, "-L", "/usr/aarch64-linux-gnu",
         str(tmp_path / "run")],
        env={**os.environ, "ATEN_CPU_CAPABILITY": "avx2"}, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert finished.returncode == 0, finished.stdout + finished.stderr
    for operator in ("update_", "swap_", "swag_", "combine_", "batch_norm_collect"):
        assert f"{operator}.cpu" in finished.stdout


if __name__ == "__main__":
    record_and_compare(Path(sys.argv[1]), sys.argv[2:])
