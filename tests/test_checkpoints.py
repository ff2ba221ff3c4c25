"""Averages of checkpoints on disk: weights, formats, what is refused, what is left behind."""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import signal
import struct
import subprocess
import sys
import textwrap
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import BACKENDS, DTYPES, assert_as_accurate, extended, need, unaligned
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from swa_fast import SWA, Averager, BackendError, Power, _ops
from swa_fast.checkpoints import (
    CheckpointError,
    average,
    expand,
    greedy,
    merge_weights,
    reader,
    select,
)
from swa_fast.checkpoints import output as output_module
from swa_fast.checkpoints import stream as stream_module
from swa_fast.checkpoints.entries import Boxes
from swa_fast.train.cli import main

# Weights ------------------------------------------------------------------------------------------


def test_merge_weights_are_the_known_ones() -> None:
    for kind, expected in (
        ("minus-sqrt", [0.5, 0.20710678, 0.15891862, 0.1339746]),
        (
            "minus-sqrt",
            [0.35355339, 0.14644661, 0.11237244, 0.09473435, 0.08346263, 0.07545599, 0.06938894,
             0.06458565],
        ),
        ("cosine", [0.14644661, 0.35355339, 0.35355339, 0.14644661]),
        ("linear", [0.25] * 4),
        ("uniform", [1 / 3] * 3),
        ("power:2", [1 / 16, 3 / 16, 5 / 16, 7 / 16]),
        ("ema:0.5", [0.25, 0.25, 0.5]),
        ("1,2,1", [0.25, 0.5, 0.25]),
        ([3, 1], [0.75, 0.25]),
        ("window:10:30", [-0.5, 1.5]),
    ):  # fmt: skip
        found = merge_weights(kind, len(expected))
        assert found == pytest.approx(expected, abs=6e-9), kind
        assert math.fsum(found) == pytest.approx(1.0, abs=1e-15)
    # Rules of the averager are the same without a horizon.
    for kind, rule in (("minus-sqrt", Power(-0.5)), ("power:3.5", Power(2.5)), ("linear", SWA())):
        x = torch.zeros(100, dtype=torch.float64)
        averager = Averager([x], {"a": rule})
        for i in range(100):
            x.zero_()[i] = 1
            averager.update()
        found = torch.tensor(merge_weights(kind, 100), dtype=torch.float64)
        torch.testing.assert_close(averager.averages["a"]["0"], found, rtol=1e-12, atol=0)


@pytest.mark.parametrize("kind", ["linear", "minus-sqrt", "cosine"])
def test_a_merge_is_the_decayed_run(kind: str) -> None:
    """SGD on one parameter whose gradient is constant: the merge of iterates at a constant rate is
    the last iterate of a run whose rate decays."""
    shape = {
        "linear": lambda x: 1 - x,
        "minus-sqrt": lambda x: 1 - math.sqrt(x),
        "cosine": lambda x: (1 + math.cos(math.pi * x)) / 2,
    }[kind]
    n, gradient = 16, 0.75

    def run(rate: Callable[[int], float]) -> list[float]:
        weight = nn.Parameter(torch.tensor(2.0, dtype=torch.float64))
        optimizer = torch.optim.SGD([weight], lr=1.0)
        found = []
        for i in range(n):
            found.append(weight.item())
            weight.grad = torch.tensor(gradient, dtype=torch.float64)
            optimizer.param_groups[0]["lr"] = rate(i)
            optimizer.step()
        return found

    constant = run(lambda i: 0.125)
    decayed = run(lambda i: 0.125 * shape((i + 1) / n))
    merged = math.fsum(c * x for c, x in zip(merge_weights(kind, n), constant, strict=True))
    assert merged == pytest.approx(decayed[-1], abs=1e-14)
    # And not only where the gradients are the same: s_i is what each of them is weighed by.
    for i in range(1, n):
        assert math.fsum(merge_weights(kind, n)[i:]) == pytest.approx(shape(i / n), abs=1e-14)


def test_weights_that_cannot_be_right() -> None:
    for kind, n, problem in (
        ("quadratic", 3, "expected uniform, linear"),
        ("power:0", 3, "power:P with a number above 0"),
        ("power:x", 3, "power:P with a number above 0"),
        ("ema:1.5", 3, r"ema:D with a number in \[0, 1\], found '1.5'"),
        ("1,2", 3, "expected 3, one for each input, found 2"),
        ("1,-2,3", 3, "expected numbers of at least 0, found -2.0 at 1"),
        ([0.0, 0.0], 2, "expected a sum above 0"),
        ([math.nan, 1.0], 2, "at least 0, found nan"),
        ("window:5:5", 2, "0 < A < B"),
        ("window:1:2", 3, "expects two inputs"),
        ("uniform", 0, "at least one checkpoint"),
    ):
        with pytest.raises(CheckpointError, match=problem):
            merge_weights(kind, n)


def test_which_inputs(tmp_path: Path) -> None:
    for step in (1, 2, 9, 10, 11, 100):
        (tmp_path / f"checkpoint-{step}.pt").touch()
    names = lambda paths: [int(p.stem.split("-")[1]) for p in paths]  # noqa: E731
    every = expand(str(tmp_path / "checkpoint-*.pt"))
    assert names(every) == [1, 2, 9, 10, 11, 100]
    assert names(expand([every[5], every[0]])) == [100, 1]
    assert names(expand([every[5], every[0]], sort=True)) == [1, 100]
    assert names(select(every, last=2)) == [11, 100]
    assert names(select(every, every=2)) == [2, 10, 100]
    assert names(select(every, window=(2, 11))) == [9, 10, 11]
    assert names(select(every, window=(2, 100), every=2, last=1)) == [100]
    for problem, arguments in (
        ("last: expected at least 1", {"last": 0}),
        ("last: expected at most 6 inputs, found 7", {"last": 7}),
        ("every: expected at least 1", {"every": 0}),
        ("window: expected A < B", {"window": (3, 3)}),
        (r"a step in \(11, 99\], found none", {"window": (11, 99)}),
    ):
        with pytest.raises(CheckpointError, match=problem):
            select(every, **arguments)  # type: ignore[arg-type]
    with pytest.raises(CheckpointError, match=r"expected a step in the name, found best.pt"):
        select([tmp_path / "best.pt"], window=(1, 2))
    with pytest.raises(CheckpointError, match="found nothing at"):
        expand(str(tmp_path / "model-*"))


# The kernel ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("backend", "device"), BACKENDS)
@pytest.mark.parametrize("double_precision", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_combine(backend: str, device: str, double_precision: bool, dtype: torch.dtype) -> None:
    need(backend, device)
    for count, r, mixed in (
        *((0, 5, False), (1, 3, False), (7, 1, False), (515, 2, False), (513, 4, False)),
        *((2049, 5, True), (515, 9, False), (2049, 3, True)),
        # CUDA takes 16 outputs and 24 sources at a time.
        *(((70, 50, False), (66, 26, True)) if backend == "cuda" else ()),
    ):
        points = 18 if r > 24 else 11
        c = torch.randn(points, r, dtype=torch.float64)
        sources = [torch.randn(count).to(dtype) for _ in range(r)]
        if mixed:
            sources[1] = sources[1].to(torch.bfloat16)  # another type than the rest
        # Every other time on aligned bases, where accesses are wider.
        place = unaligned if r % 2 else torch.clone
        there = [place(torch.zeros(count, dtype=dtype, device=device)) for _ in range(points)]
        rows = [place(x.to(device)) for x in sources]
        _ops.combine_(there, rows, c, double_precision=double_precision, backend=backend)
        outputs = [x.cpu() for x in there]
        exact = [sum(extended(w) * extended(s) for w, s in zip(row, sources, strict=True))
                 for row in c]  # fmt: skip
        math_dtype = torch.float64 if dtype == torch.float64 else torch.float32
        by_torch = []
        for row in c:
            total = torch.zeros(count, dtype=math_dtype)
            for w, s in zip(row, sources, strict=True):
                total = total + w.to(math_dtype) * s.to(math_dtype)
            by_torch.append(total.to(dtype))
        assert_as_accurate(outputs, by_torch, exact, f"{backend} {dtype} {count}")
        if double_precision and dtype == torch.float32 and count:
            # As good as the type allows.
            for found, true in zip(outputs, exact, strict=True):
                assert torch.equal(found, torch.from_numpy(true.astype("f4")))


@pytest.mark.parametrize(("outputs", "r"), [(1, 2), (5, 1), (5, 9)])
def test_combine_into_outputs_larger_than_the_caches(outputs: int, r: int) -> None:
    """They are stored in another way, and hold the same bits as if they were made in parts."""
    need("cpu", "cpu")
    second_level = max(torch.cpu.get_capabilities().get("l2_cache_size", 0), 1 << 20)
    count = 13 * second_level // (4 * outputs) + 5
    c = torch.randn(outputs, r, dtype=torch.float64)
    # Each begins elsewhere in a line of memory.
    there = [torch.full((count + 16,), 7.0)[i : i + count] for i in range(outputs)]
    rows = [torch.randn(count) for _ in range(r)]
    _ops.combine_(there, rows, c, backend="cpu")
    for i in range(0, count, count // 7):
        part = [torch.empty(len(rows[0][i : i + count // 7])) for _ in range(outputs)]
        _ops.combine_(part, [row[i : i + count // 7] for row in rows], c, backend="cpu")
        for k, expected in enumerate(part):
            assert torch.equal(there[k][i : i + count // 7], expected), (k, i)
    for row in there:
        around = row.as_strided((16 + count,), (1,), 0)
        outside = torch.cat(
            (around[: row.storage_offset()], around[row.storage_offset() + count :])
        )
        assert (outside == 7).all()


def test_combine_refuses_what_does_not_fit() -> None:
    x, c = torch.zeros(4), torch.ones(1, 1, dtype=torch.float64)
    for problem, kind, arguments in (
        ("at least one output and one source", ValueError, ([], [x], c)),
        (r"sources\[0\]: expected 4 contiguous elements", ValueError, ([x], [x[:3]], c)),
        (r"sources\[0\]: expected dtype", TypeError, ([x], [x.int()], c)),
        ("coefficients: expected dtype float64", TypeError, ([x], [x], c.float())),
        (r"expected shape \(1, 2\)", ValueError, ([x], [x, x], c)),
    ):
        with pytest.raises(kind, match=problem):
            _ops.combine_(*arguments)  # type: ignore[arg-type]
    with pytest.raises(BackendError, match="backend=cuda"):
        _ops.combine_([x], [x], c, backend="cuda")
    with pytest.raises(ValueError, match="backend: expected one of"):
        _ops.combine_([x], [x], c, backend="cpp")


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_opcheck(backend: str) -> None:
    _ops.combine_([torch.zeros(1)], [torch.zeros(1)], torch.ones(1, 1, dtype=torch.float64))
    operator = getattr(torch.ops.swa_fast.combine_, backend)
    c = torch.ones(2, 3, dtype=torch.float64)
    rows = [torch.randn(5) for _ in range(5)]
    torch.library.opcheck(operator, (rows[:2], rows[2:], c, False))


@pytest.mark.gpu
@pytest.mark.parametrize("count", [4 << 10, (4 << 10) + 3])
def test_combine_is_one_launch_of_few_waits(simulator: Any, count: int) -> None:
    """On a GPU, without a copy: addresses and coefficients are arguments. Loads of eight sources
    are on their way together, and every byte is read once for four outputs."""
    need("cuda", "cuda")
    c = torch.randn(4, 16, dtype=torch.float64)
    sources = [torch.randn(count).cuda() for _ in range(16)]
    outputs = [torch.empty(count, device="cuda") for _ in range(4)]
    torch.cuda.synchronize()
    simulator.reset()
    _ops.combine_(outputs, sources, c)
    counters = simulator.counters()
    ((name, kernel),) = counters["kernels"].items()
    assert "combine_kernel" in name and kernel["launches"] == 1
    total = counters["total"]
    assert not any(total.get(f"memcpy_{kind}", 0) for kind in ("HtoD", "DtoH", "DtoD"))
    assert total.get("host_syncs", 0) == 0 and total.get("cudaMalloc", 0) == 0
    assert (kernel["ld_bytes"], kernel["st_bytes"]) == (4 * 16 * count, 4 * 4 * count)
    assert kernel["load_round_trips"] == 2 and kernel["widest_ld"] == 16


@pytest.mark.gpu
def test_combine_in_a_captured_graph() -> None:
    """A replay reads the sources' new values."""
    need("cuda", "cuda")
    c = torch.tensor([[2.0, -1.0]], dtype=torch.float64)
    sources = [torch.full((9,), x, device="cuda") for x in (1.0, 3.0)]
    (out,) = [torch.zeros(9, device="cuda")]
    _ops.combine_([out], sources, c, backend="cuda")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        _ops.combine_([out], sources, c, backend="cuda")
    sources[1].fill_(5.0)
    graph.replay()
    assert torch.equal(out.cpu(), torch.full((9,), -3.0))


# Formats ------------------------------------------------------------------------------------------


def weights_of(seed: int) -> dict[str, Tensor]:
    """Odd sizes and all dtypes, 0-dim, empty, integers that agree and such that do not."""
    torch.manual_seed(seed)
    return {
        "embed.weight": torch.randn(33, 7),
        "half": torch.randn(5).half(),
        "block.0.weight": torch.randn(4, 3, 3, 3).bfloat16(),
        "wide": torch.randn(1001).double(),
        "scalar": torch.randn(()),
        "empty": torch.zeros(0, 3),
        "phase": torch.randn(5, dtype=torch.complex64),
        "steps": torch.tensor(100 + seed),
        "mask": torch.tensor([True, False, True]),
    }


def oracle(members: list[dict[str, Tensor]], weights: list[float]) -> dict[str, Tensor]:
    """In fp64, rounded once."""
    result = {}
    for name, last in members[-1].items():
        if not (last.is_floating_point() or last.is_complex()):
            result[name] = last
            continue
        wide = torch.complex128 if last.is_complex() else torch.float64
        result[name] = sum(w * m[name].to(wide) for w, m in zip(weights, members, strict=True)).to(
            last.dtype
        )
    return result


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, true in expected.items():
        assert found[name].dtype == true.dtype and found[name].shape == true.shape, name
        # 16-bit results are rounded by way of fp32; fp64's order of additions is its own.
        rtol = {torch.bfloat16: 2**-8, torch.float16: 2**-11, torch.float64: 1e-14}
        torch.testing.assert_close(
            found[name], true, rtol=rtol.get(true.dtype, 0), atol=1e-15 if true.dtype ==
            torch.float64 else 0,
        )  # fmt: skip


def read_all(path: Path) -> dict[str, Tensor]:
    with reader(path) as found:
        return {name: found.read(name) for name in found.names()}


@pytest.fixture
def three(tmp_path: Path) -> list[dict[str, Tensor]]:
    """Three checkpoints, as c-9, c-10 and c-11, in all file formats."""
    members = [weights_of(seed) for seed in range(3)]
    for step, tensors in zip((9, 10, 11), members, strict=True):
        save_file(tensors, tmp_path / f"c-{step}.safetensors", {"note": "kept"})
        torch.save({"epoch": step, "state_dict": tensors}, tmp_path / f"c-{step}.pt")
        torch.save(tensors, tmp_path / f"c-{step}.bin", _use_new_zipfile_serialization=False)
    return members


@pytest.mark.parametrize("suffix", ["safetensors", "pt", "bin"])
@pytest.mark.parametrize("target", ["a.safetensors", "a.pth", "folder"])
def test_formats(three: list[dict[str, Tensor]], tmp_path: Path, suffix: str, target: str) -> None:
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    report = average(str(tmp_path / f"c-*.{suffix}"), tmp_path / target, weights="minus-sqrt")
    expected = oracle(three, merge_weights("minus-sqrt", 3))
    out = tmp_path / target
    if target == "a.pth":
        found = torch.load(out, weights_only=True)
        assert_same(torch.load(out, weights_only=True, mmap=True), expected)
        with zipfile.ZipFile(out) as archive:
            assert archive.testzip() is None
    else:
        found = load_file(out if out.is_file() else out / "model.safetensors")
    assert_same(found, expected)
    assert_same(read_all(out), expected)
    inputs = [tmp_path / f"c-{step}.{suffix}" for step in (9, 10, 11)]
    assert report.inputs == [str(path) for path in inputs]
    assert (report.tensors, report.copied, report.differing) == (7, 2, ["steps"])
    digests = {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in inputs}
    assert report.sha256 == digests
    if target != "a.pth":
        with reader(out) as made:
            facts = json.loads(made.metadata["swa_fast"])
            assert made.metadata["format"] == "pt"
        assert facts["sha256"] == digests and facts["inputs"] == report.inputs
        assert facts["weights"] == report.weights
    # Nothing is left behind, and the inputs are what they were.
    assert {path.name for path in tmp_path.iterdir()} == {p.name for p in before} | {target}
    assert all(path.read_bytes() == content for path, content in before.items())


@pytest.mark.parametrize("accumulate", ["fp32", "fp64"])
def test_the_result_does_not_depend_on_chunks(
    three: list[dict[str, Tensor]], tmp_path: Path, accumulate: str
) -> None:
    results = []
    for chunk in (1, 100, 4097, 1 << 23, None):
        out = tmp_path / "a.safetensors"
        average(
            str(tmp_path / "c-*.safetensors"), out, weights="1,2,4", chunk=chunk,
            accumulate=accumulate, overwrite=True,
        )  # fmt: skip
        results.append(out.read_bytes())
    assert len(set(results)) == 1


def test_equal_checkpoints_are_their_own_average(tmp_path: Path) -> None:
    tensors = weights_of(1)
    for i in range(7):
        save_file(tensors, tmp_path / f"{i}.safetensors")
    average(str(tmp_path / "?.safetensors"), tmp_path / "a.safetensors")
    for name, found in load_file(tmp_path / "a.safetensors").items():
        if found.dtype != torch.float64:
            assert torch.equal(found, tensors[name]), name


def test_other_dtypes(three: list[dict[str, Tensor]], tmp_path: Path) -> None:
    save_file({n: t.bfloat16() if t.dtype == torch.float32 else t for n, t in three[1].items()},
              tmp_path / "c-10.safetensors")  # fmt: skip
    inputs, out = str(tmp_path / "c-*.safetensors"), tmp_path / "a.safetensors"
    with pytest.raises(CheckpointError, match=r"dtypes of .*embed.weight float32 and bfloat16"):
        average(inputs, out)
    average(inputs, out, dtype="fp32")
    found = load_file(out)
    members = [load_file(tmp_path / f"c-{step}.safetensors") for step in (9, 10, 11)]
    expected = sum(m["embed.weight"].double() for m in members) / 3
    torch.testing.assert_close(found["embed.weight"], expected.float(), rtol=1e-7, atol=1e-8)
    assert {t.dtype for n, t in found.items() if t.is_floating_point()} == {torch.float32}
    assert found["steps"].dtype == torch.int64
    average(str(tmp_path / "c-*.pt"), tmp_path / "b.pt", dtype="bf16")
    assert torch.load(tmp_path / "b.pt")["wide"].dtype == torch.bfloat16


def test_keys_prefixes_and_layouts_of_torch_files(tmp_path: Path) -> None:
    turned = torch.randn(6, 4).t()
    channels_last = torch.randn(2, 3, 4, 4).contiguous(memory_format=torch.channels_last)
    base = torch.randn(10)
    state = {"module.t": turned, "module.c": channels_last, "module.part": base[3:7],
             "module.tied": base[3:7], "n": torch.tensor(1), "fp8._extra_state": None}  # fmt: skip
    content = {"run": {"a.model": state}, "state_dict_ema": {"w": torch.ones(2)}, "lr": 0.1}
    for name in "xy":
        torch.save(content, tmp_path / f"{name}.pt")
    inputs = [tmp_path / "x.pt", tmp_path / "y.pt"]
    out = tmp_path / "o.safetensors"
    report = average(inputs, out, key="run.a.model", strip="module.")
    found = load_file(out)
    assert report.tied == {"tied": "part"} and report.left_out == ["fp8._extra_state"]
    assert set(found) == {"t", "c", "part", "n"}
    for name, expected in (("t", turned), ("c", channels_last), ("part", base[3:7])):
        torch.testing.assert_close(found[name], expected)
    with reader(out) as made:
        assert made.metadata["tied"] == "part"
    average(inputs, tmp_path / "o.pt", key="run.a.model")
    loaded = torch.load(tmp_path / "o.pt", weights_only=True)
    assert loaded["module.tied"].data_ptr() == loaded["module.part"].data_ptr()
    average(inputs, tmp_path / "ema.safetensors", ema=True)
    assert load_file(tmp_path / "ema.safetensors")["w"].tolist() == [1, 1]
    for problem, options in (
        ("say where they are with key", {}),
        ("key 'b' is not among 'a.model'", {"key": "run.b"}),
        ("no name begins with strip='model.'", {"key": "run.a.model", "strip": "model."}),
        ("lr: expected a tensor|expected tensors by name, found float", {"key": "lr"}),
    ):
        with pytest.raises(CheckpointError, match=problem):
            average(inputs, tmp_path / "no.pt", **options)  # type: ignore[arg-type]


def hugging_face(folder: Path, tensors: dict[str, Tensor], shards: int = 2) -> None:
    folder.mkdir()
    names = list(tensors)
    where = {}
    for i in range(shards):
        file = f"model-{i + 1:05d}-of-{shards:05d}.safetensors"
        part = {name: tensors[name] for name in names[i::shards]}
        save_file(part, folder / file, {"format": "pt"})
        where.update(dict.fromkeys(part, file))
    index = {"metadata": {}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text('{"model_type": "x", "torch_dtype": "float32"}')
    (folder / "tokenizer.json").write_text("{}")
    (folder / "trainer_state.json").write_text("{}")
    (folder / "optimizer.pt").write_text("large")


def test_hugging_face_folders(tmp_path: Path) -> None:
    members = [weights_of(seed) for seed in range(2)]
    for step, tensors in zip((5, 10), members, strict=True):
        hugging_face(tmp_path / f"checkpoint-{step}", tensors)
    inputs, out = str(tmp_path / "checkpoint-*"), tmp_path / "merged"
    average(inputs, out, shard_size=5000)
    names = {path.name for path in out.iterdir()}
    shards = sorted(n for n in names if n.endswith(".safetensors"))
    assert len(shards) > 1 and shards[0] == f"model-00001-of-{len(shards):05d}.safetensors"
    companions = {"config.json", "tokenizer.json", "model.safetensors.index.json"}
    assert names == {*shards, *companions}
    assert_same(read_all(out), oracle(members, [0.5, 0.5]))
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in members[0].values())
    with pytest.raises(CheckpointError, match="expected nothing there, found a folder"):
        average(inputs, out)
    # What is not ours stays, old shards do not.
    (out / "notes.txt").write_text("mine")
    average(inputs, out, dtype="bf16", overwrite=True)
    kept = {path.name for path in out.iterdir()}
    assert kept == {"notes.txt", "model.safetensors", "config.json", "tokenizer.json"}
    assert json.loads((out / "config.json").read_text())["torch_dtype"] == "bfloat16"
    # And back from a folder with one file.
    average([out, out], tmp_path / "b.safetensors")
    assert load_file(tmp_path / "b.safetensors")["wide"].dtype == torch.bfloat16


def test_folders_with_torch_shards(tmp_path: Path) -> None:
    folder = tmp_path / "old"
    folder.mkdir()
    torch.save({"a": torch.ones(3)}, folder / "pytorch_model-1.bin")
    torch.save({"b": torch.ones(2)}, folder / "pytorch_model-2.bin")
    index = {"weight_map": {"a": "pytorch_model-1.bin", "b": "pytorch_model-2.bin"}}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    average([folder], tmp_path / "new")
    assert set(load_file(tmp_path / "new" / "model.safetensors")) == {"a", "b"}


def test_distributed_checkpoints(tmp_path: Path) -> None:
    """What several ranks saved: rows, columns and whole tensors, read without a process group."""
    script = """
        import sys, torch, torch.distributed as dist, torch.distributed.checkpoint as dcp
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.tensor import Replicate, Shard, distribute_tensor
        folder, rank = sys.argv[1], int(sys.argv[2])
        dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank,
                                world_size=2)
        mesh = init_device_mesh("cpu", (2,))
        for seed in range(2):
            torch.manual_seed(seed)
            whole = {"rows": torch.randn(5, 3), "columns": torch.randn(4, 6, 2),
                     "same": torch.randn(7).bfloat16(), "thin": torch.randn(1, 3)}
            kinds = {"rows": Shard(0), "columns": Shard(1), "same": Replicate(), "thin": Shard(0)}
            state = {n: distribute_tensor(t, mesh, [kinds[n]]) for n, t in whole.items()}
            dcp.save({"model": state, "step": seed}, checkpoint_id=f"{folder}/step-{seed}")
            if rank == 0:
                torch.save(whole, f"{folder}/whole-{seed}.pt")
        dist.destroy_process_group()
    """
    (tmp_path / "save.py").write_text(textwrap.dedent(script))
    ranks = [
        subprocess.Popen([sys.executable, tmp_path / "save.py", tmp_path, str(rank)],
                         stderr=subprocess.PIPE)
        for rank in range(2)
    ]  # fmt: skip
    for rank in ranks:
        assert rank.communicate(timeout=100) and rank.returncode == 0
    members = [torch.load(tmp_path / f"whole-{seed}.pt") for seed in range(2)]
    out = tmp_path / "a.safetensors"
    for chunk in (8, None):
        report = average(
            str(tmp_path / "step-*"), out, key="model", weights="3,1", chunk=chunk, overwrite=True
        )
        assert_same(load_file(out), oracle(members, [0.75, 0.25]))
    assert len(report.sha256) == 6
    with pytest.raises(CheckpointError, match="expected tensors at key 'net', found model"):
        average(str(tmp_path / "step-*"), out, key="net", overwrite=True)
    (tmp_path / "step-1" / "__1_0.distcp").rename(tmp_path / "away")
    with pytest.raises(CheckpointError, match=r"__1_0.distcp is missing"):
        average(str(tmp_path / "step-*"), out, key="model", overwrite=True)


def test_parts_that_overlap_are_noticed(tmp_path: Path) -> None:
    place = Boxes((4, 2), 4, [(tmp_path, 0, (0, 0), (3, 2)), (tmp_path, 99, (1, 0), (1, 2))])
    with pytest.raises(CheckpointError, match="overlap or leave a hole"):
        list(place.runs(0, 32))


def test_average_keeps_memory_low(tmp_path: Path) -> None:
    """256 MiB are averaged within the buffers and what Python takes by the way."""
    code = """
        import sys, torch
        from pathlib import Path
        from safetensors.torch import save_file
        from swa_fast.checkpoints import average
        from swa_fast.checkpoints.stream import anonymous_bytes
        folder = Path(sys.argv[1])
        x = torch.randn(1 << 24)
        for i in range(2):
            save_file({"w": x, "v": x[: 1 << 20].clone()}, folder / f"{i}.safetensors")
        del x
        average([folder / "0.safetensors"], folder / "warm.safetensors")
        before = anonymous_bytes()
        for kind in ("safetensors", "pt"):
            report = average(str(folder / "?.safetensors"), folder / f"out.{kind}")
            print(report.peak_bytes, anonymous_bytes() - before)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), str(tmp_path)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    for line in done.stdout.splitlines():
        for grown in map(int, line.split()):
            assert grown < 96 << 20


# What is refused ----------------------------------------------------------------------------------


def safetensors_with(header: Any, data: bytes = b"\0" * 16, length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def entry(first: int, end: int, shape: list[int] | None = None, dtype: str = "F32") -> dict:
    shape = [(end - first) // 4] if shape is None else shape
    return {"dtype": dtype, "shape": shape, "data_offsets": [first, end]}


@pytest.mark.parametrize(
    "content, problem",
    [
        (b"", "at least 8 bytes"),
        (struct.pack("<Q", 1 << 63) + b"{}", "found a length of 9223372036854775808"),
        (safetensors_with({"a": entry(0, 16)}, length=5000), "found a length of 5000"),
        (safetensors_with(b"[1, 2]  ", b""), "is not a JSON object"),
        (safetensors_with(b"{\xff}", b""), "is not JSON"),
        (safetensors_with({"a": entry(0, 16)}, b"\0" * 15), "is truncated"),
        (safetensors_with({"a": entry(0, 12)}), "bytes of no tensor at its end"),
        (safetensors_with({"a": entry(0, 4), "b": entry(8, 16)}), "b, at 8, leaves a hole after a"),
        (safetensors_with({"a": entry(0, 12), "b": entry(8, 16)}), "b, at 8, overlaps a"),
        (safetensors_with({"a": entry(0, 16, [3])}), "takes 12 bytes, its data_offsets 16"),
        (safetensors_with({"a": entry(0, 16, [-4])}), "expected a shape"),
        (safetensors_with({"a": entry(16, 0, [4])}), "takes 16 bytes, its data_offsets -16"),
        (safetensors_with({"a": entry(0, 16, [16], "F8_E4M3")}), "a: expected a dtype .*F8_E4M3"),
        (safetensors_with({"a": {"dtype": "F32"}}), "a: expected dtype, shape and data_offsets"),
        (safetensors_with({"__metadata__": {"x": 1}}, b""), "__metadata__: expected text"),
        (
            safetensors_with(b'{"a": %s, "a": %s}' % ((json.dumps(entry(0, 16)).encode(),) * 2)),
            "the name 'a' appears twice",
        ),
        (safetensors_with({}, b""), "expected tensors, found none"),
    ],
)  # fmt: skip
def test_broken_safetensors(content: bytes, problem: str, tmp_path: Path) -> None:
    (tmp_path / "a.safetensors").write_bytes(content)
    with pytest.raises(CheckpointError, match=problem):
        average([tmp_path / "a.safetensors"], tmp_path / "o.safetensors")
    assert [path.name for path in tmp_path.iterdir()] == ["a.safetensors"]


class Evil:
    def __reduce__(self) -> Any:
        return os.system, ("touch hacked",)


# Older torch warns of every sparse tensor that it reads.
@pytest.mark.filterwarnings("ignore:Sparse invariant checks")
def test_broken_and_hostile_torch_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"a": torch.ones(1000)}, "good.pt")
    whole = Path("good.pt").read_bytes()
    Path("short.pt").write_bytes(whole[: len(whole) // 2])
    Path("text.pt").write_text("not a checkpoint")
    torch.save({"a": torch.ones(3), "b": Evil()}, "evil.pt")
    torch.save({"a": torch.ones(3).to_sparse()}, "sparse.pt")
    torch.save({"a": torch.ones(3), "b": {"x": 1}}, "mixed.pt")
    for name, problem in (
        ("short.pt", "truncated"),
        ("text.pt", "expected a file of torch.save|could run code"),
        ("evil.pt", "found something that could run code"),
        ("sparse.pt", "sparse"),
        ("mixed.pt", "b: expected a tensor, found dict"),
    ):
        with pytest.raises(CheckpointError, match=problem):
            average([name], "o.safetensors")
    assert not Path("hacked").exists() and not Path("o.safetensors").exists()


def test_hostile_folders(tmp_path: Path) -> None:
    save_file({"a": torch.ones(2)}, tmp_path / "outside.safetensors")
    folder = tmp_path / "f"
    folder.mkdir()
    index = folder / "model.safetensors.index.json"
    for content, problem in (
        ({"weight_map": {"a": "../outside.safetensors"}}, "points outside its folder"),
        ({"weight_map": {"a": str(tmp_path / "outside.safetensors")}}, "points outside"),
        ({"weight_map": {"a": "m.safetensors"}}, "its shard m.safetensors is missing"),
        ({"weights": {}}, "expected an index with weight_map"),
    ):
        index.write_text(json.dumps(content))
        with pytest.raises(CheckpointError, match=problem):
            average([folder], tmp_path / "o.safetensors")
    save_file({"b": torch.ones(2)}, folder / "m.safetensors")
    index.write_text(json.dumps({"weight_map": {"a": "m.safetensors"}}))
    with pytest.raises(CheckpointError, match=r"a of m.safetensors is in the index alone"):
        average([folder], tmp_path / "o.safetensors")
    index.unlink()
    (folder / "m.safetensors").unlink()
    with pytest.raises(CheckpointError, match="found none of them"):
        average([folder], tmp_path / "o.safetensors")
    import pickle

    (folder / ".metadata").write_bytes(pickle.dumps(Evil()))
    with pytest.raises(CheckpointError, match=r"expected the metadata of torch.distributed"):
        average([folder], tmp_path / "o.safetensors")


def test_checkpoints_that_differ(tmp_path: Path) -> None:
    first, out = tmp_path / "1.safetensors", tmp_path / "o.safetensors"
    save_file({"a": torch.ones(2), "b": torch.ones(2)}, first)
    for tensors, problem in (
        ({"a": torch.ones(2)}, "found it without b"),
        ({"a": torch.ones(2), "b": torch.ones(2), "c": torch.ones(1)}, "with c besides"),
        ({"a": torch.ones(2), "b": torch.ones(3)}, r"shapes of b \(2,\) and \(3,\)"),
        ({"a": torch.ones(2), "b": torch.ones(2).int()}, "dtypes of b float32 and int32"),
    ):
        save_file(tensors, tmp_path / "2.safetensors")
        with pytest.raises(CheckpointError, match=problem):
            average([first, tmp_path / "2.safetensors"], out)
    save_file({"l.qweight": torch.ones(2).int(), "l.scales": torch.ones(2)}, first)
    with pytest.raises(CheckpointError, match=r"l.qweight belongs to quantised weights"):
        average([first], out)
    torch.save({"w": torch.ones(2).to(torch.float8_e4m3fn)}, tmp_path / "q.pt")
    with pytest.raises(CheckpointError, match="w is float8_e4m3fn"):
        average([tmp_path / "q.pt"], out)
    assert not out.exists()


def test_outputs_that_would_harm(tmp_path: Path) -> None:
    a = tmp_path / "a.safetensors"
    save_file({"w": torch.ones(2)}, a)
    hugging_face(tmp_path / "hf", {"w": torch.ones(2)}, 1)
    os.link(a, tmp_path / "link.safetensors")
    for inputs, out, problem in (
        ([a], a, "another place than the inputs'"),
        ([a], tmp_path / "link.safetensors", "another place than the inputs'"),
        ([tmp_path / "hf"], tmp_path / "hf" / "new.safetensors", "outside of the input"),
        ([tmp_path / "hf" / "config.json"], tmp_path / "o.pt", "expected a folder or a file"),
        ([a], tmp_path, "does not hold the input"),
    ):
        with pytest.raises(CheckpointError, match=problem):
            average(inputs, out, overwrite=True)
    (tmp_path / "there.safetensors").write_text("mine")
    with pytest.raises(CheckpointError, match="expected nothing there, found a file"):
        average([a], tmp_path / "there.safetensors")
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "notes.txt").write_text("mine")
    with pytest.raises(CheckpointError, match="expected a folder with weights to replace"):
        average([a], tmp_path / "docs", overwrite=True)
    assert (tmp_path / "docs" / "notes.txt").read_text() == "mine"
    for problem, options in (
        ("accumulate: expected one of fp32, fp64", {"accumulate": "bf16"}),
        ("dtype: expected one of keep", {"dtype": "int8"}),
        ("max_memory: expected at least", {"max_memory": 10}),
        ("shard_size: expected at least 1", {"shard_size": 0}),
    ):
        with pytest.raises(CheckpointError, match=problem):
            average([a], tmp_path / "o.safetensors", **options)  # type: ignore[arg-type]


def test_windows_of_running_means(tmp_path: Path) -> None:
    """Captures A + 1 to B from the means after A and B, where their dtype allows it."""
    captures = torch.randn(30, 50, dtype=torch.float64)
    a, b = tmp_path / "10.safetensors", tmp_path / "30.safetensors"
    for path, count in ((a, 10), (b, 30)):
        save_file({"w": captures[:count].mean(0)}, path)
    average([a, b], tmp_path / "w.safetensors", weights="window:10:30")
    found = load_file(tmp_path / "w.safetensors")["w"]
    torch.testing.assert_close(found, captures[10:].mean(0), rtol=0, atol=1e-14)
    for path in (a, b):
        save_file({"w": torch.ones(2)}, path)
    with pytest.raises(CheckpointError, match=r"relative error of 1e-05, because they are float32"):
        average([a, b], tmp_path / "x.safetensors", weights="window:990:1000")


# What is left behind ------------------------------------------------------------------------------


@pytest.mark.parametrize("target", ["o.safetensors", "o.pt", "folder"])
@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError(errno.ENOSPC, "full")])
def test_an_interruption_leaves_nothing(
    target: str, error: Any, three: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = sorted(path.name for path in tmp_path.iterdir())
    (tmp_path / "c-9.safetensors").chmod(0o444)
    # At every write, of header, data and the final metadata.
    real, calls = os.pwrite, 0
    for fatal in range(1, 40):
        calls = 0

        def pwrite(*arguments: Any, fatal: int = fatal) -> int:
            nonlocal calls
            calls += 1
            if calls == fatal:
                raise error
            return real(*arguments)

        with monkeypatch.context() as patch:
            patch.setattr(os, "pwrite", pwrite)
            try:
                average(str(tmp_path / "c-*.safetensors"), tmp_path / target, chunk=2048)
            except (KeyboardInterrupt, OSError, CheckpointError):
                assert sorted(path.name for path in tmp_path.iterdir()) == before
                continue
            break
    assert fatal > 10 and (tmp_path / target).exists()


def test_a_full_disk_is_known_before_the_work(
    three: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fallocate(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", fallocate)
    with pytest.raises(CheckpointError, match=r"expected room for 9,.* bytes on its disk, found"):
        average(str(tmp_path / "c-*.pt"), tmp_path / "o.safetensors")
    assert not list(tmp_path.glob("*o.safetensors*"))


def test_kill_9_leaves_no_output_and_the_next_run_clears_up(three: Any, tmp_path: Path) -> None:
    code = """
        import os, signal, sys
        from swa_fast.checkpoints import average, stream
        stream.Digest.finish = lambda self: os.kill(os.getpid(), signal.SIGKILL)
        average(sys.argv[1], sys.argv[2])
    """
    for target in ("o.safetensors", "folder"):
        done = subprocess.run(
            [sys.executable, "-c", textwrap.dedent(code), str(tmp_path / "c-*.safetensors"),
             str(tmp_path / target)], check=False,
        )  # fmt: skip
        assert done.returncode == -signal.SIGKILL
        assert not (tmp_path / target).exists()
        assert (tmp_path / f".{target}.swa_fast-partial").exists()
        average(str(tmp_path / "c-*.safetensors"), tmp_path / target)
        assert not list(tmp_path.glob(".*"))


def test_two_processes_do_not_share_an_output(three: Any, tmp_path: Path) -> None:
    out = tmp_path / "o.safetensors"
    layout = output_module.Layout([("w", torch.float32, (3,))], out, "model", 1)
    with output_module.Output(out, layout, {}, overwrite=False) as first:
        first.open({})
        with pytest.raises(CheckpointError, match="another process is writing it"):
            average(str(tmp_path / "c-*.safetensors"), out)
        first.write("w", 0, memoryview(struct.pack("3f", 1, 2, 3)))
        first.commit({}, [], "keep")
    assert load_file(out)["w"].tolist() == [1, 2, 3]


def test_a_file_that_shrinks_is_noticed(
    three: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = stream_module.Stream.run

    def run(self: Any, outputs: Any) -> Any:
        os.truncate(tmp_path / "c-9.safetensors", 3000)
        return real(self, outputs)

    monkeypatch.setattr(stream_module.Stream, "run", run)
    with pytest.raises(CheckpointError, match=r"c-9.safetensors: .* the file is truncated"):
        average(str(tmp_path / "c-*.safetensors"), tmp_path / "o.safetensors")
    assert not (tmp_path / "o.safetensors").exists()


# Soups, BatchNorm, the command --------------------------------------------------------------------


def test_greedy_soup(tmp_path: Path) -> None:
    """The rule of the model soups: best first, and kept only if strictly better."""
    values = {"a": 1.0, "b": 4.0, "c": -3.0, "d": 4.5, "e": 2.0}
    for name, value in values.items():
        save_file({"w": torch.tensor([value])}, tmp_path / f"{name}.safetensors")
    calls = []

    def score(path: Path) -> float:
        calls.append(path)
        assert path.name == "soup.safetensors"
        return -abs(load_file(path)["w"].item() - 3.0)  # 3 is best

    report = greedy(str(tmp_path / "?.safetensors"), tmp_path / "soup.safetensors", score)
    ranked = sorted(values, key=lambda n: abs(values[n] - 3))
    kept, best = ranked[:1], -abs(values[ranked[0]] - 3)
    for name in ranked[1:]:
        mean = sum(values[n] for n in [*kept, name]) / (len(kept) + 1)
        if -abs(mean - 3) > best:
            kept, best = [*kept, name], -abs(mean - 3)
    assert [Path(path).stem for path in report.kept] == kept and len(kept) > 1
    assert report.score == pytest.approx(best)
    assert [Path(path).stem for path in report.scores] == ranked
    made = load_file(tmp_path / "soup.safetensors")["w"].item()
    assert made == pytest.approx(sum(values[n] for n in kept) / len(kept))
    assert not list(tmp_path.glob(".*")) and len(calls) == 9
    with pytest.raises(CheckpointError, match="weights: not together with greedy"):
        greedy([tmp_path / "a.safetensors"], tmp_path / "s.pt", score, weights="linear")


def test_a_greedy_soup_goes_on_after_an_interruption(tmp_path: Path) -> None:
    for i in range(4):
        save_file({"w": torch.tensor([float(i)])}, tmp_path / f"{i}.safetensors")
    calls = 0

    def score(path: Path) -> float:
        nonlocal calls
        calls += 1
        if calls == 6:
            raise KeyboardInterrupt
        return load_file(path)["w"].item()

    out = tmp_path / "soup.safetensors"
    with pytest.raises(KeyboardInterrupt):
        greedy(str(tmp_path / "?.safetensors"), out, score)
    assert not out.exists()
    report = greedy(str(tmp_path / "?.safetensors"), out, score)
    assert calls == 8 and report.kept == [str(tmp_path / "3.safetensors")]


def factory() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))


def data() -> list[Tensor]:
    torch.manual_seed(3)
    return [torch.randn(16, 3) for _ in range(4)]


@pytest.mark.parametrize("target", ["o.safetensors", "o.pt"])
def test_batch_norm_of_the_average(tmp_path: Path, target: str) -> None:
    states = [factory().state_dict() for _ in range(2)]
    for i, state in enumerate(states):
        torch.save(state, tmp_path / f"{i}.pt")
    out = tmp_path / target
    average(str(tmp_path / "?.pt"), out, update_bn=(factory(), data()))
    found = read_all(out)
    hidden = torch.cat(data()) @ found["0.weight"].t() + found["0.bias"]
    torch.testing.assert_close(found["1.running_mean"], hidden.mean(0))
    torch.testing.assert_close(found["1.running_var"], hidden.var(0))
    factory().load_state_dict(found)
    with pytest.raises(CheckpointError, match="the model does not fit the average"):
        average(str(tmp_path / "?.pt"), tmp_path / "p.pt", update_bn=(nn.Linear(2, 2), []))
    assert not (tmp_path / "p.pt").exists()


def test_the_command(
    three: list[dict[str, Tensor]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = [str(tmp_path / f"c-{step}.safetensors") for step in (10, 11, 9)]  # as a shell sorts
    out = tmp_path / "o.safetensors"
    command = ["average", *files, "-o", str(out)]
    assert main([*command, "--dry-run"]) == 0 and not out.exists()
    assert "7 tensors of 1,351 elements to average" in capsys.readouterr().out
    assert main([*command, "--weights", "ema:0.5", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert [Path(path).stem for path in report["inputs"]] == ["c-9", "c-10", "c-11"]
    assert_same(load_file(out), oracle(three, [0.25, 0.25, 0.5]))
    assert main(command) == 2
    assert "expected nothing there" in capsys.readouterr().err
    assert main([*command, "--force", "--weights", "0,0,1", "--max-memory", "1MiB"]) == 0
    assert_same(load_file(out), three[0])
    assert main([*command, "--force", "--last", "1", "--no-checksums"]) == 0
    assert_same(load_file(out), three[2])
    assert main([*command, "--force", "--window", "8", "10", "--every", "2"]) == 0
    assert_same(load_file(out), three[1])
    assert main([*command, "--force", "--lower"]) == 2
    with pytest.raises(SystemExit):
        main([*command, "--shard-size", "big"])


def test_the_command_makes_soups_and_batch_norm(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for i in range(3):
        torch.save(factory().state_dict(), tmp_path / f"{i}.pt")
    score = tmp_path / "score.py"
    score.write_text("import os, sys; print('score', os.path.getsize(sys.argv[1]))")
    out = str(tmp_path / "soup.pt")
    inputs = str(tmp_path / "?.pt")
    command = f"{sys.executable} {score} {{file}}"
    assert main(["average", inputs, "-o", out, "--greedy", command, "--lower", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert len(report["kept"]) == 1 and len(report["tried"]) == 2  # equal is not better
    for bad, problem in (
        ("python", "expected {file} in the command"),
        (f"{sys.executable} -c pass {{file}}", "expected a number from"),
        (f"{sys.executable} -c 1/0 {{file}}", "found exit code 1"),
    ):
        assert main(["average", inputs, "-o", out, "--force", "--greedy", bad]) == 2
        assert problem in capsys.readouterr().err
    assert main(["average", inputs, "-o", out, "--greedy", command, "--last", "2"]) == 2
    (tmp_path / "parts.py").write_text("from test_checkpoints import data, factory")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    bn = ["--update-bn", "parts:factory", "parts:data"]
    assert main(["average", inputs, "-o", out, "--force", *bn]) == 0
    assert torch.load(out)["1.num_batches_tracked"] == 4
    for names in (["parts", "parts:data"], ["parts:none", "parts:data"]):
        assert main(["average", inputs, "-o", out, "--force", "--update-bn", *names]) == 2


def test_the_command_needs_no_extras(three: Any, tmp_path: Path) -> None:
    code = """
        import sys
        for name in ("torchvision", "matplotlib", "tabulate", "tqdm", "PIL", "sklearn",
                     "tensorboard", "safetensors"):
            sys.modules[name] = None
        from swa_fast.train.cli import main
        sys.exit(main(["average", sys.argv[1], "-o", sys.argv[2]]))
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), str(tmp_path / "c-*.safetensors"),
         str(tmp_path / "o.safetensors")], capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stderr == "" and (tmp_path / "o.safetensors").exists()
