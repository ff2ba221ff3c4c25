"""Averages of checkpoints on disk: time and memory beside other ways, and what reading alone takes.

    python bench/bench_checkpoints.py --inputs 4 --gib 1 --folder DIR --out rows.csv
    python bench/bench_checkpoints.py --mergekit VENV/bin/mergekit-yaml
    python bench/bench_checkpoints.py --synthesis         errors of post-hoc EMA

Makes folders of the Llama architecture in fp32 in DIR (a temporary one by default), reads them once
so that they lie in memory, and averages them with equal weights by each contender in a process of
its own, in turns. Every result is checked against fp64. Memory is what no file backs (RssAnon),
above what the process had before the work.

``readv`` reads all files into one buffer and does nothing else; ``readv and write`` also writes as
many bytes as the average has and waits for the disk: what any tool does at least.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from harness import facts
from rows import write_table
from safetensors import safe_open
from safetensors.torch import load_file, save_file

COLUMNS = [
    "contender", "inputs", "GiB each", "seconds", "fastest", "slowest", "GB/s read", "peak MiB",
    "device", "threads", "torch", "commit", "date",
]  # fmt: skip
HIDDEN, INNER, VOCABULARY = 1024, 4096, 32000


def anonymous(pid: int | str = "self") -> int:
    """RssAnon of a process and those it started, in bytes; 0 once it has ended."""
    total = 0
    try:
        text = Path(f"/proc/{pid}/status").read_text(encoding="ascii")
        total = next(int(x.split()[1]) << 10 for x in text.splitlines() if x.startswith("RssAnon"))
        for task in Path(f"/proc/{pid}/task").iterdir():
            children = (task / "children").read_text(encoding="ascii").split()
            total += sum(anonymous(int(child)) for child in children)
    except (OSError, StopIteration):
        pass
    return total


def make(folder: Path, gib: float, seed: int) -> None:
    """A network of the Llama architecture of about ``gib`` in fp32."""
    generator = torch.Generator().manual_seed(seed)

    def tensor(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator) * 0.02

    per_layer = 4 * HIDDEN**2 + 3 * HIDDEN * INNER
    layers = max(1, round((gib * 2**30 / 4 - 2 * VOCABULARY * HIDDEN) / per_layer))
    tensors = {"model.embed_tokens.weight": tensor(VOCABULARY, HIDDEN)}
    for i in range(layers):
        prefix = f"model.layers.{i}."
        for name in "qkvo":
            tensors[f"{prefix}self_attn.{name}_proj.weight"] = tensor(HIDDEN, HIDDEN)
        for name in ("gate", "up"):
            tensors[f"{prefix}mlp.{name}_proj.weight"] = tensor(INNER, HIDDEN)
        tensors[f"{prefix}mlp.down_proj.weight"] = tensor(HIDDEN, INNER)
        for name in ("input", "post_attention"):
            tensors[f"{prefix}{name}_layernorm.weight"] = 1 + tensor(HIDDEN)
    tensors["model.norm.weight"] = 1 + tensor(HIDDEN)
    tensors["lm_head.weight"] = tensor(VOCABULARY, HIDDEN)
    folder.mkdir(parents=True)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "torch_dtype": "float32",
        "hidden_size": HIDDEN, "intermediate_size": INNER, "num_attention_heads": 16,
        "num_key_value_heads": 16, "num_hidden_layers": layers, "vocab_size": VOCABULARY,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))


def files_of(folders: list[Path]) -> list[Path]:
    return [folder / "model.safetensors" for folder in folders]


def readv(folders: list[Path], out: Path, chunk: int = 1 << 20) -> None:
    buffer = memoryview(bytearray(chunk))
    for path in files_of(folders):
        descriptor, at = os.open(path, os.O_RDONLY), 0
        while count := os.preadv(descriptor, [buffer], at):
            at += count
        os.close(descriptor)


def readv_and_write(folders: list[Path], out: Path, chunk: int = 1 << 20) -> None:
    readv(folders, out)
    size, buffer = files_of(folders)[0].stat().st_size, memoryview(bytearray(chunk))
    descriptor = os.open(out, os.O_CREAT | os.O_RDWR)
    os.posix_fallocate(descriptor, 0, size)
    for at in range(0, size, chunk):
        os.pwrite(descriptor, buffer[: size - at], at)
    os.fsync(descriptor)
    os.close(descriptor)


def ours(folders: list[Path], out: Path, **options: Any) -> None:
    from swa_fast.checkpoints import average

    average(list(folders), out, **options)


def ours_without_checksums(folders: list[Path], out: Path) -> None:
    ours(folders, out, checksums=False)


def torch_loop(folders: list[Path], out: Path) -> None:
    """What one would write."""
    paths = files_of(folders)
    total = load_file(paths[0])
    for path in paths[1:]:
        for name, tensor in load_file(path).items():
            total[name].add_(tensor)
    for tensor in total.values():
        tensor.div_(len(paths))
    save_file(total, out)


def timm(folders: list[Path], out: Path) -> None:
    """The method of timm's avg_checkpoints.py, which its package does not hold: whole state dicts,
    summed up in fp64."""
    total: dict[str, torch.Tensor] = {}
    for path in files_of(folders):
        for name, tensor in load_file(path).items():
            wide = tensor.to(torch.float64)
            total[name] = total[name] + wide if name in total else wide
    state = {name: (t / len(folders)).float() for name, t in total.items()}
    save_file(state, out)


CONTENDERS: dict[str, Callable[[list[Path], Path], None]] = {
    "readv": readv,
    "readv and write": readv_and_write,
    "swa_fast": ours,
    "swa_fast, no checksums": ours_without_checksums,
    "torch loop": torch_loop,
    "timm's method": timm,
}


def check(result: Path, folders: list[Path]) -> None:
    """Raises unless the average is right to fp32's rounding."""
    with safe_open(result, "pt") as found:
        parts = [safe_open(path, "pt") for path in files_of(folders)]
        for name in found.keys():  # noqa: SIM118
            exact = sum(part.get_tensor(name).double() for part in parts) / len(parts)
            error = (found.get_tensor(name).double() - exact).abs().max()
            if error > 4 * torch.finfo(torch.float32).eps * exact.abs().max():
                raise AssertionError(f"{result}: {name} is off by {error:.2g}")


def child(contender: str, out: str, folders: list[str]) -> None:
    """In a process of its own: prints time and growth of memory."""
    if contender.startswith("swa_fast"):
        import swa_fast.checkpoints  # noqa: F401
    before, peak, done = anonymous(), 0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.005):
            peak = max(peak, anonymous())

    watcher = threading.Thread(target=watch)
    watcher.start()
    start = time.perf_counter()
    CONTENDERS[contender]([Path(f) for f in folders], Path(out))
    seconds = time.perf_counter() - start
    done.set()
    watcher.join()
    print(json.dumps([seconds, max(0, peak - before)]))


def run_child(contender: str, out: Path, folders: list[Path]) -> tuple[float, int]:
    command = [sys.executable, __file__, "--child", contender, str(out), *map(str, folders)]
    found = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    seconds, peak = json.loads(found.splitlines()[-1])
    return seconds, peak


def run_mergekit(program: str, out: Path, folders: list[Path]) -> tuple[float, int]:
    """Its whole process: it has no function to time alone."""
    config = out.with_suffix(".yml")
    models = [{"model": str(f), "parameters": {"weight": 1.0}} for f in folders]
    content = {"merge_method": "linear", "dtype": "float32", "models": models}
    config.write_text(json.dumps(content))  # JSON is YAML
    start, peak = time.perf_counter(), 0
    process = subprocess.Popen(
        [program, str(config), str(out), "--no-copy-tokenizer"],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    while process.poll() is None:
        peak = max(peak, anonymous(process.pid))
        time.sleep(0.02)
    if process.returncode:
        raise SystemExit(f"{program} {config}: exit code {process.returncode}")
    return time.perf_counter() - start, peak


def synthesis() -> None:
    """The relative L2 error of averages made from snapshots of sigma_rel 0.05 and 0.10."""
    from swa_fast import Power
    from swa_fast.post_hoc import coefficients

    targets, updates = (0.075, 0.15, 0.20, 0.25), 4096
    print(
        "| snapshots | " + " | ".join(f"sigma_rel {s}" for s in targets) + " | largest sum of |c| |"
    )
    print("| --- |" + " --- |" * (len(targets) + 1))
    for count in (4, 8, 16, 32):
        times = [updates * i / count for i in range(1, count + 1) for _ in range(2)]
        gammas = [Power(sigma_rel=s).gamma for s in (0.05, 0.10)] * count
        solved = [coefficients(times, gammas, updates, Power(sigma_rel=s).gamma) for s in targets]
        errors = " | ".join(f"{error:.2g}" for _, error in solved)
        print(f"| {count} | {errors} | {max(abs(c).sum() for c, _ in solved):.2f} |")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, help="where to put the files (default: temporary)")
    parser.add_argument("--inputs", type=int, default=4)
    parser.add_argument("--gib", type=float, default=1.0, help="of each input (default: 1)")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--mergekit", metavar="PROGRAM", help="mergekit-yaml, to be timed too")
    parser.add_argument("--out", type=Path, help="CSV file of the rows")
    parser.add_argument("--synthesis", action="store_true", help="errors of post-hoc EMA instead")
    parser.add_argument("--child", nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.child:
        child(options.child[0], options.child[1], options.child[2:])
        return 0
    if options.synthesis:
        synthesis()
        return 0
    base = Path(tempfile.mkdtemp(prefix="averages-", dir=options.folder))
    try:
        rows = measure(base, options)
    finally:
        shutil.rmtree(base)
    print("| contender | seconds | GB/s read | peak MiB |\n| --- | ---: | ---: | ---: |")
    for row in rows:
        print("| {contender} | {seconds} | {GB/s read} | {peak MiB} |".format(**row))
    if options.out:
        write_table(options.out, COLUMNS, rows)
    return 0


def measure(base: Path, options: Any) -> list[dict[str, Any]]:
    folders = [base / f"model-{i}" for i in range(options.inputs)]
    for seed, folder in enumerate(folders):
        make(folder, options.gib, seed)
    readv(folders, base)
    names = [*CONTENDERS, *(["mergekit linear"] if options.mergekit else [])]
    found: dict[str, list[tuple[float, int]]] = {name: [] for name in names}
    for number in range(options.rounds):
        for name in names:
            out = base / "out.safetensors"
            if name == "mergekit linear":
                out = base / "out"
                found[name].append(run_mergekit(options.mergekit, out, folders))
            else:
                found[name].append(run_child(name, out, folders))
            if number == 0 and "readv" not in name:
                made = sorted(out.glob("*.safetensors")) if out.is_dir() else [out]
                for path in made:
                    check(path, folders)
            if out.exists():
                shutil.rmtree(out) if out.is_dir() else out.unlink()
            os.sync()
    total = sum(path.stat().st_size for path in files_of(folders))
    rows = []
    for name in names:
        times = [seconds for seconds, _ in found[name]]
        seconds = statistics.median(times)
        rows.append({
            "contender": name, "inputs": options.inputs,
            "GiB each": round(total / options.inputs / 2**30, 2), "seconds": f"{seconds:.2f}",
            "fastest": f"{min(times):.2f}", "slowest": f"{max(times):.2f}",
            "GB/s read": f"{total / seconds / 1e9:.2f}",
            "peak MiB": round(max(peak for _, peak in found[name]) / 2**20),
            **facts(torch.device("cpu")),
        })  # fmt: skip
    return rows


if __name__ == "__main__":
    sys.exit(main())
