"""A GPU looked at in ten minutes: one command, one machine, no questions.

    make gpu-report                                          into runs/gpu
    python -m bench.gpu_report --minutes 8 --out DIR
    python3 bench/gpu_report.py --minutes 8 --out DIR        without make, without a venv
    python3 bench/gpu_report.py --rehearse                   everything at its smallest size, on a
                                                             simulated GPU or the CPU

Steps in the order of their worth, each with its share of the minutes, each on disk before the next
one starts: a the machine and its limits, b tests, c updates of averages, d BatchNorm, e swaps,
combinations, averages on the CPU and waits, f what ncu and compute-sanitizer say, g the trainer. A
step that fails or takes too long is reported and the next one starts, in a new process where it has
to be. Ctrl-C leaves what was measured. Every contender is checked against fp64 before it is timed.

DIR gets rows.csv (the columns of all benchmarks here), report.json, report.md, report.html and
log.txt. Needed: torch with CUDA, and swa_fast built for it (``pip install dist/*.whl``, or this
checkout built in place). ncu, compute-sanitizer, timm, matplotlib and pytest are used where they
are.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.util
import json
import os
import select
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
SCHEMA = "swa_fast.gpu_report"
VERSION = 1
GRACE = 10.0  # s that a step may take beyond its share before it is ended
LEAST_FREE = 2 << 30  # bytes of a GPU's memory, below which nothing is measured
SIMULATOR = ROOT / "tests" / "gpusim"


class Refused(Exception):
    """What keeps the report from being made, in one line."""


def _prepare_imports() -> None:
    """Finds the benchmarks' modules, and an installed swa_fast before an unbuilt checkout."""
    if str(HERE) not in sys.path:
        sys.path.insert(0, str(HERE))
    if not any((ROOT / "swa_fast").glob("_C*.so")):
        # Python's own entry for this folder, with ``python -m``, would hide the installed package.
        sys.path[:] = [p for p in sys.path if Path(p or ".").resolve() != ROOT]
    elif str(ROOT) not in map(str, sys.path):
        sys.path.append(str(ROOT))
    if importlib.util.find_spec("swa_fast") is None:
        raise Refused(
            "swa_fast is neither installed nor built in this checkout: `pip install dist/*.whl`, "
            "or `pip install --no-build-isolation -e .`"
        )


def _check_device(wanted: str) -> None:
    import torch

    if wanted == "cpu":
        return
    if torch.version.cuda is None:
        raise Refused(f"torch {torch.__version__} was built without CUDA")
    try:
        torch.cuda.init()
        free, total = torch.cuda.mem_get_info()
    except (RuntimeError, AssertionError) as error:  # no driver, an old one, no device
        raise Refused(f"no GPU can be used: {str(error).splitlines()[0]}") from None
    if free < LEAST_FREE:
        raise Refused(
            f"too little memory: {free / 2**30:.1f} of {total / 2**30:.1f} GiB are free, "
            f"{LEAST_FREE / 2**30:.0f} GiB are needed; another process may hold the rest"
        )


def _check_folder(out: Path) -> None:
    try:
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out):
            pass
    except OSError as error:
        raise Refused(f"--out: {out} cannot be written: {error.strerror}") from None


# ------------------------------------------------------------------------------------ the worker


def work(device: str, small: bool, channel: int) -> int:
    """Runs the steps that arrive on standard input, a line of JSON each, and sends what they find
    through ``channel``."""
    import torch
    from gpu_steps import STEPS, Context

    by_name = {step.name: step for step in STEPS}
    with os.fdopen(channel, "w", encoding="utf-8") as out:

        def emit(message: dict[str, Any]) -> None:
            out.write(json.dumps(message) + "\n")
            out.flush()

        for line in sys.stdin:
            order = json.loads(line)
            context = Context(
                torch.device(device), small, emit, time.monotonic() + order["seconds"],
                order["copy_bandwidth"],
            )  # fmt: skip
            try:
                by_name[order["step"]].run(context)
            except Exception as error:  # the other steps go on, the report says so
                import traceback

                traceback.print_exc()
                text = (str(error) or "no message").strip().splitlines()[0][:300]
                emit({"failed": f"{type(error).__name__}: {text}"})
                if isinstance(error, torch.AcceleratorError):
                    return 1  # this process can use the device no more
            emit({"done": True, "copy_bandwidth": context.copy_bandwidth})
            sys.stdout.flush()
    return 0


class Worker:
    """The process that measures; replaced when it dies or has to be ended."""

    def __init__(self, device: str, small: bool, log: Any) -> None:
        self._read, write = os.pipe()
        command = [
            sys.executable, str(HERE / "gpu_report.py"), "--worker", str(write), "--device", device,
        ]  # fmt: skip
        if small:
            command.append("--rehearse")
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=log, stderr=log, pass_fds=[write], text=True
        )
        os.close(write)
        self._rest = b""

    def order(self, message: dict[str, Any]) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(message) + "\n")
        self._process.stdin.flush()

    def messages(self, timeout: float) -> list[dict[str, Any]] | None:
        """What came within ``timeout`` seconds; None when the process has ended."""
        ready, _, _ = select.select([self._read], [], [], max(0.0, timeout))
        if not ready:
            return []
        data = os.read(self._read, 1 << 16)
        if not data:
            return None
        *lines, self._rest = (self._rest + data).split(b"\n")
        return [json.loads(line) for line in lines]

    def end(self) -> int:
        self._process.kill()
        code = self._process.wait()
        os.close(self._read)
        return code


# --------------------------------------------------------------------------------- the supervisor


class Report:
    """All that was found, and its files."""

    def __init__(self, out: Path, small: bool, minutes: float) -> None:
        from gpu_steps import STEPS

        self.out = out
        self.data: dict[str, Any] = {
            "schema": SCHEMA,
            "schema_version": VERSION,
            "started": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
            "minutes": minutes,
            "rehearsal": small,
            "complete": False,
            "steps": [
                {"name": s.name, "title": s.title, "status": "not reached", "seconds": 0.0,
                 "allowed": 0.0, "remarks": [], "facts": [], "ncu": []}
                for s in STEPS
            ],
            "rows": [],
        }  # fmt: skip

    def take(self, step: dict[str, Any], message: dict[str, Any]) -> None:
        if "row" in message:
            self.data["rows"].append({"step": step["name"], **message["row"]})
        elif "fact" in message:
            step["facts"].append(
                {"name": message["fact"], "value": message["value"], "unit": message["unit"],
                 "note": message["note"]}
            )  # fmt: skip
        elif "remark" in message:
            step["remarks"].append(message["remark"])
        elif "ncu" in message:
            step["ncu"].append(message["ncu"])
        elif "failed" in message:
            step["status"] = "failed"
            step["remarks"].append(message["failed"])

    def write(self) -> None:
        import gpu_pages
        import rows as row_files

        gpu_pages.write(self.out, self.data)
        rows = [
            row_files.Row(**{k: v for k, v in r.items() if k != "step"}) for r in self.data["rows"]
        ]
        row_files.write(self.out / "rows.csv", rows)


def run(options: argparse.Namespace) -> int:
    from gpu_steps import STEPS

    small: bool = options.rehearse
    begin = time.monotonic()
    report = Report(options.out, small, options.minutes)
    steps = [s for s in STEPS if options.steps is None or s.name in options.steps]
    entries = {entry["name"]: entry for entry in report.data["steps"]}
    until = begin + 60 * options.minutes
    bandwidth: float | None = None
    worker: Worker | None = None
    interrupted = False
    with (options.out / "log.txt").open("w", encoding="utf-8") as log:
        try:
            for index, step in enumerate(steps):
                entry = entries[step.name]
                left = until - time.monotonic()
                if left < 2 and not small:
                    entry["status"] = "no time left"
                    continue
                shares = sum(s.share for s in steps[index:])
                allowed = 600.0 if small else left * step.share / shares
                entry["allowed"] = round(allowed, 1)
                log.write(f"=== {step.name} {step.title}\n")
                log.flush()
                print(f"{step.name}  {step.title} ({allowed:.0f} s)", flush=True)
                if worker is None:
                    worker = Worker(options.device, small, log)
                start = time.monotonic()
                worker.order({"step": step.name, "seconds": allowed, "copy_bandwidth": bandwidth})
                entry["status"] = "running"
                hard = start + allowed + min(GRACE, 0.5 * allowed)
                ended = False
                while not ended:
                    messages = worker.messages(min(1.0, hard - time.monotonic()))
                    if messages is None:
                        code = worker.end()
                        worker = None
                        if entry["status"] == "running":
                            entry["status"] = "failed"
                            entry["remarks"].append(f"its process ended with {code}, see log.txt")
                        break
                    for message in messages:
                        report.take(entry, message)
                        if "row" in message and message["row"]["side"] == "swa_fast":
                            _tell(message["row"])
                        if message.get("done"):
                            bandwidth = message["copy_bandwidth"]
                            ended = True
                    if not ended and time.monotonic() > hard:
                        worker.end()
                        worker = None
                        entry["status"] = "overran"
                        break
                if entry["status"] == "running":
                    entry["status"] = "done"
                entry["seconds"] = round(time.monotonic() - start, 1)
                print(f"   {entry['status']} after {entry['seconds']:.0f} s", flush=True)
                for remark in entry["remarks"]:
                    print(f"   {remark}", flush=True)
                report.write()
        except KeyboardInterrupt:
            interrupted = True
            print("interrupted: what was measured is kept", flush=True)
        finally:
            if worker is not None:
                worker.end()
            report.data["complete"] = not interrupted
            report.data["seconds"] = round(time.monotonic() - begin, 1)
            report.write()
    import gpu_pages

    print(gpu_pages.summary(report.data))
    print(f"report: {options.out / 'report.md'}, report.html, report.json, rows.csv, log.txt")
    if interrupted:
        return 130
    wrong = [r for r in report.data["rows"] if r["side"] == "swa_fast" and r["status"] == "wrong"]
    for row in wrong:
        print(f"wrong: {row['op']}, {row['model']}, {row['contender']}: {row['reason']}")
    failed = any(e["status"] in ("failed", "overran") for e in report.data["steps"])
    return 1 if wrong or (small and failed) else 0


def _tell(row: dict[str, Any]) -> None:
    if row["mode"] not in ("graph cold", "queued cold", "pass"):
        return
    time_ = row["status"] if row["median"] is None else f"{1e6 * row['median']:.1f} us"
    share = "" if not row["limit_median"] else f", {100 / row['limit_median']:.0f} % of a copy"
    print(f"   {row['op']}: {row['model']}, {row['dtype']}, {row['contender']}: {time_}{share}")


def _simulate() -> int | None:
    """Starts again under the simulator where there is no GPU but a simulator; else None."""
    import torch

    if torch.cuda.is_available() or torch.version.cuda is None or not SIMULATOR.is_dir():
        return None
    command = [sys.executable, str(SIMULATOR), "run", sys.executable, *sys.argv]
    return subprocess.run(command, check=False).returncode


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=8.0, help="in all (default: 8)")
    parser.add_argument("--out", type=Path, default=Path("runs/gpu"), help="default: runs/gpu")
    parser.add_argument("--steps", metavar="abc", help="only these steps, such as acd")
    parser.add_argument(
        "--rehearse", action="store_true",
        help="every step at its smallest size; times mean nothing",
    )  # fmt: skip
    parser.add_argument(
        "--device", choices=["cuda", "cpu"], default="cuda", help="cpu: for a rehearsal alone"
    )
    parser.add_argument("--kernels", choices=["cuda", "triton", "all"], help=argparse.SUPPRESS)
    parser.add_argument("--worker", type=int, metavar="FD", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.minutes <= 0:
        parser.error(f"--minutes: expected a positive number, found {options.minutes:g}")
    unknown = set(options.steps or "") - set("abcdefg")
    if unknown:
        parser.error(f"--steps: expected letters of abcdefg, found {''.join(sorted(unknown))!r}")
    if options.device == "cpu" and not options.rehearse:
        parser.error("--device cpu: only with --rehearse; bench/run.py times the CPU")
    try:
        _prepare_imports()
        if options.worker is not None:
            return work(options.device, options.rehearse, options.worker)
        if options.kernels:
            from gpu_steps import run_kernels

            backends = ("cuda", "triton") if options.kernels == "all" else (options.kernels,)
            run_kernels(options.rehearse, backends)
            return 0
        if options.rehearse and options.device == "cuda":
            code = _simulate()
            if code is not None:
                return code
        _check_device(options.device)
        _check_folder(options.out)
        return run(options)
    except Refused as refusal:
        print(f"gpu_report: {refusal}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
