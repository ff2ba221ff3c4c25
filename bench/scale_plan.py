"""What an average costs where the parameters are sharded, from 7 to 405 billion of them, on paper.

    python bench/scale_plan.py          prints the table of docs/sharding.md

Nothing here was run at these sizes. Bytes are those that the kernels move and the files hold, which
the simulator counts for small models; the update's rate is the measured one of 10^9 parameters on
an H100 (bench/results/gpu/h100); links, disks and host memory are the round numbers below.
"""

from __future__ import annotations

import csv
from pathlib import Path

__all__ = ["table"]

ROWS = Path(__file__).parent / "results" / "gpu" / "h100" / "rows.csv"
MODELS = (7e9, 13e9, 70e9, 405e9)
GPUS = (8, 64, 256, 1024)
GPU_BYTES = 80e9
NODE = 8  # GPUs that share a host
TRAINING = 16  # bytes a parameter: fp32 weight and gradient, two moments of Adam
AVERAGE = 4  # an fp32 average
UPDATE = 12  # read weight and average, write the average
PCIE4, PCIE5 = 25e9, 50e9  # bytes a second from pinned memory, each GPU its own link
HOST = 300e9  # bytes a second of a host's memory
DISK = 2e9  # bytes a second that a host writes
COLUMNS = (
    "parameters", "GPUs", "average, GB a GPU", "update, ms", "applied, ms a swap",
    "offloaded: PCIe 4, ms", "PCIe 5, ms", "host kernel, ms", "host memory, GB a host",
    "file, GB", "written, s",
)  # fmt: skip


def _rate() -> float:
    """Measured bytes a second of an update of 10^9 fp32 parameters by one average."""
    with ROWS.open(newline="") as file:
        for row in csv.DictReader(file):
            key = row["op"], row["contender"], row["model"], row["mode"]
            if key == ("update", "Averager SWA", "10^9 in 300 tensors", "graph cold"):
                return float(row["bytes"]) / float(row["median"])
    raise ValueError(f"{ROWS}: no row of the update of 10^9 parameters")


def table() -> list[str]:
    """The lines of the table, in Markdown."""
    rate = _rate()
    lines = ["| " + " | ".join(COLUMNS) + " |", "|" + " --: |" * len(COLUMNS)]
    for parameters in MODELS:
        for gpus in GPUS:
            own = parameters / gpus
            if (TRAINING + AVERAGE) * own > GPU_BYTES:
                needed = (TRAINING + AVERAGE) * own / 1e9
                cells = [f"does not fit: {needed:,.0f} GB a GPU", *[""] * (len(COLUMNS) - 3)]
            else:
                hosts = gpus / NODE
                numbers = (
                    AVERAGE * own / 1e9,
                    1e3 * UPDATE * own / rate,
                    1e3 * 2 * 2 * AVERAGE * own / rate,  # both are read and written
                    1e3 * AVERAGE * own / PCIE4,
                    1e3 * AVERAGE * own / PCIE5,
                    1e3 * UPDATE * NODE * own / HOST,
                    # Two rounds of pinned copies and the average.
                    3 * AVERAGE * NODE * own / 1e9,
                    AVERAGE * parameters / 1e9,
                    AVERAGE * parameters / hosts / DISK,
                )
                cells = [f"{number:,.3g}" if number < 1000 else f"{number:,.0f}"
                         for number in numbers]  # fmt: skip
            lines.append("| " + " | ".join([f"{parameters / 1e9:.0f} B", str(gpus), *cells]) + " |")
    return lines


if __name__ == "__main__":
    print("\n".join(table()))
