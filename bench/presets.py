"""Time and peak memory of every preset at a small scale, on made-up images of its dataset's shape.

Each preset runs in a process of its own, on one thread, as ``swa-fast run PRESET --scale S`` would.
Prints a line for each, and at the end the processor.

usage: python bench/presets.py [SCALE] [PRESET ...]
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from swa_fast.train import cli, data
from swa_fast.train.data.memory import MemoryDataset
from swa_fast.train.machine import cpu_name
from swa_fast.train.presets import PRESETS


def made_up(name: str, folder: object) -> MemoryDataset:
    """As many images, classes and pixels as the dataset has."""
    classes = 100 if name == "cifar100" else 10
    channels, side, count = (1, 28, 60_000) if name == "fashion-mnist" else (3, 32, 50_000)
    parts = []
    for images in (count, 10_000):
        parts.append(torch.randint(256, (images, channels, side, side), dtype=torch.uint8))
        parts.append(torch.arange(images) % classes)
    return MemoryDataset(tuple(map(str, range(classes))), *parts, pad=4, flip=True)


def image_folder(root: Path) -> None:
    """1,000 classes like ImageNet's, of three small images each."""
    import numpy as np
    from PIL import Image

    generator = np.random.default_rng(0)
    for part in ("train", "val"):
        for number in range(1000):
            folder = root / part / f"n{number:08d}"
            folder.mkdir(parents=True)
            for index in range(3):
                pixels = generator.integers(256, size=(64, 64, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{index}.jpg")


def one(preset: str, scale: str) -> None:
    """Trains in this process, and prints seconds and bytes."""
    data.load_torchvision = made_up
    with tempfile.TemporaryDirectory() as folder:
        argv = ["run", preset, "--scale", scale, "--threads", "1", "--quiet", "--out", folder]
        if preset.startswith("imagenet"):
            image_folder(Path(folder, "images"))
            argv += ["--data-dir", str(Path(folder, "images")), "--workers", "0"]
        begin = time.perf_counter()
        assert cli.main(argv) == 0
        seconds = time.perf_counter() - begin
        results = json.loads(Path(folder, "seed1/results.json").read_text())
        print(f"\n{seconds:.0f} s {results['peak_memory']['host'] / 2**30:.2f} GiB")


def main() -> None:
    scale, *names = sys.argv[1:] or ["0.0001"]
    print(f"{'preset':36} time and peak memory at scale {scale}")
    for name in names or PRESETS:
        command = [sys.executable, __file__, "--one", name, scale]
        answer = subprocess.run(command, capture_output=True, text=True)
        last = (answer.stdout if answer.returncode == 0 else answer.stderr).splitlines()[-1]
        print(f"{name:36} {last}", flush=True)
    print(f"one thread of: {cpu_name()}")


if __name__ == "__main__":
    one(*sys.argv[2:]) if sys.argv[1:2] == ["--one"] else main()
