"""The files of a run: written atomically, read with care."""

from __future__ import annotations

import errno
import fcntl
import io
import json
import os
import re
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch

from .defaults import METHODS
from .errors import TrainError, first_line
from .files import open_regular, write_atomically
from .results import RESULTS_SCHEMA, RESULTS_VERSION, problem_of

_CHECKPOINT = "swa_fast.train.checkpoint"
_CHECKPOINT_VERSION = 2

#: Names of the files that a run writes: below its folder, in checkpoints, and in the folders of
#: tensorboard. What is called otherwise is somebody else's.
_TRAJECTORY = "|".join(METHODS)
_MODEL = rf"model_(merged|(capture-)?({_TRAJECTORY})(-[0-9.e+-]+)?)\.pt"
_FILE = rf"results\.json|curves\.png|log\.txt|{_MODEL}"
_STATE = rf"({_TRAJECTORY})-([0-9]{{5,}}-[0-9]{{7,}}|branch-[0-9]{{5,}}(-copy)?)\.pt"
_EVENTS = r"events\.out\.tfevents\..*"
_OWN = {
    "": re.compile(_FILE),
    "checkpoints": re.compile(_STATE),
    "tensorboard": re.compile(rf"({_TRAJECTORY})(-average)?/{_EVENTS}"),
}
_UNFINISHED = re.compile(rf"\.({_FILE}|{_STATE})\.[0-9]+\.tmp")

#: Checkpoints kept per trajectory: if the newest cannot be read, the one before it can.
KEEP = 2


def _saved(content: Mapping[str, Any]) -> memoryview:
    """The bytes of :func:`torch.save`. It does not write the file itself, because it hides the
    reason of a failed write behind errors of its own."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getbuffer()


class RunFolder:
    """The folder of a run.

    =============================== ============================================================
    ``results.json``                settings, environment, records and summary; see ``results.py``
    ``curves.png``                  accuracy and learning rate over the epochs
    ``log.txt``                     what was printed, with the time
    ``model_METHOD.pt``             ``state_dict`` of the final network of a method (for fge one
                                    file per member; ``model_METHOD-BUDGET.pt`` for lesser budgets)
    ``checkpoints/``                training states: ``TRAJECTORY-EPOCH-STEP.pt``, the last two of
                                    each trajectory, and ``TRAJECTORY-branch-EPOCH.pt``, from which
                                    other trajectories go on, with a copy
    ``tensorboard/``                event files, a folder per curve
    =============================== ============================================================

    Where the disk is full or cannot be written, methods that write raise TrainError, and what was
    there before is intact.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.checkpoints = self.path / "checkpoints"
        self.tensorboard = self.path / "tensorboard"

    def file(self, name: str) -> Path:
        return self.path / name

    def existing(self) -> list[str]:
        """Names of what is there and called like the files and folders of a run."""
        found = [
            *(self.path / name for name in ("results.json", "curves.png", "log.txt")),
            *sorted(self.path.glob("model_*.pt")),
            self.checkpoints,
            self.tensorboard,
        ]
        return [path.name for path in found if os.path.lexists(path)]

    def _own(self) -> list[Path]:
        """The files of the run that is there, results.json last: without it they would be nobody's.
        None where that is no file of a run, damaged or not."""
        results = self.file("results.json")
        try:
            with open_regular(results) as file:
                content = json.load(file)
        except (OSError, ValueError, RecursionError):
            return []
        if not isinstance(content, dict) or content.get("schema") != RESULTS_SCHEMA:
            return []
        found = []
        for below, name in _OWN.items():
            top = self.path / below
            pattern = "*/*" if below == "tensorboard" else "*"
            found += [
                path
                for path in sorted(top.glob(pattern))
                if name.fullmatch(str(path.relative_to(top))) and path.is_file()
            ]
        return [path for path in found if path != results] + [results]

    def create(self, *, overwrite: bool) -> None:
        """Makes the folder, for a new run. Removes nothing: see :meth:`clear`.

        Raises:
            TrainError: it holds a run and ``overwrite`` is false, or files that have the names of a
                run's but belong to none; or it cannot be made or written.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self.path):
                pass
        except OSError as error:
            raise TrainError(
                f"--out: expected a folder that can be written, found {self.path} ({error})"
            ) from error
        existing = self.existing()
        if existing and not self._own():
            raise TrainError(
                f"--out: expected a folder without a run or with one, found {', '.join(existing)} "
                f"in {self.path}, but no readable results.json of a run that they could belong to; "
                f"move them away, or choose another folder"
            )
        if existing and not overwrite:
            raise TrainError(
                f"--out: expected a folder without a run, found {', '.join(existing)} in "
                f"{self.path}; continue it with --resume {self.path}, replace it with --overwrite, "
                f"or choose another folder"
            )

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keeps the folder for this process, and removes the files that a killed one was writing.

        Raises:
            TrainError: another process trains in it.
        """
        folder = os.open(self.path, os.O_RDONLY)
        try:
            try:
                fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise TrainError(
                    f"{self.path}: expected a folder in which nothing is trained at present, found "
                    f"that another process does; wait for its end or choose another folder"
                ) from error
            except OSError:
                pass  # Not every network file system has locks.
            else:
                for where in (self.path, self.checkpoints):
                    for path in where.glob(".*.tmp"):
                        if _UNFINISHED.fullmatch(path.name) and path.is_file():
                            path.unlink(missing_ok=True)
            yield
        finally:
            os.close(folder)

    def clear(self) -> None:
        """Removes the files of an earlier run, and its folders if nothing else is in them; what it
        has not written stays.

        Raises:
            TrainError: they cannot be removed.
        """
        own = self._own()
        for path in own:
            try:
                path.unlink()
            except OSError as error:
                raise TrainError(f"{path}: cannot be removed ({error})") from error
        for folder in sorted({path.parent for path in own} | {self.tensorboard}, reverse=True):
            if folder != self.path:
                with suppress(OSError):
                    folder.rmdir()

    def log(self, text: str) -> None:
        """Appends to log.txt; a disk that is full costs the line, not the run."""
        with suppress(OSError), open(self.file("log.txt"), "ab") as file:
            # Names of files may hold bytes that are no text.
            file.write(text.encode(errors="backslashreplace"))

    def write_results(self, results: Mapping[str, Any]) -> None:
        """Replaces results.json."""
        text = json.dumps(
            {"schema": RESULTS_SCHEMA, "schema_version": RESULTS_VERSION, **results},
            indent=1,
            allow_nan=False,
        )
        self.write(self.file("results.json"), text.encode() + b"\n")

    def read_results(self) -> dict[str, Any]:
        """Content of results.json.

        Raises:
            TrainError: it is missing, or not a results file of this version.
        """
        path = self.file("results.json")
        expected = f"expected {RESULTS_SCHEMA} version {RESULTS_VERSION}"
        try:
            with open_regular(path) as file:
                results = json.loads(file.read().decode())
        except FileNotFoundError as error:
            raise TrainError(
                f"expected the folder of a run, found no results.json in {self.path}"
            ) from error
        except (OSError, ValueError, RecursionError) as error:
            raise TrainError(
                f"{path}: {expected}, found unreadable JSON ({first_line(error)})"
            ) from error
        if not isinstance(results, dict) or results.get("schema") != RESULTS_SCHEMA:
            raise TrainError(f"{path}: {expected}, found another kind of file")
        version = results.get("schema_version")
        if version not in (2, RESULTS_VERSION):
            raise TrainError(f"{path}: {expected}, found version {version}")
        if problem := problem_of(results):
            raise TrainError(f"{path}: {expected}, found {problem}")
        images = results["config"].get("dataset")
        if version == 2 and images == "imagenet" and results["status"] == "running":
            raise TrainError(
                f"{path}: {expected}, found version 2, whose random crops of imagenet were others; "
                f"start the run anew with --overwrite"
            )
        return results

    def save_checkpoint(
        self, trajectory: str, epoch: int, step: int, content: Mapping[str, Any]
    ) -> None:
        """Adds a checkpoint and removes all but the last :data:`KEEP` of the trajectory. Later ones
        go, too: they are damaged, or training would not be here again.
        ``epoch`` epochs and ``step`` steps of the next one are finished."""
        path = self.checkpoints / f"{trajectory}-{epoch:05d}-{step:07d}.pt"
        self._save(path, trajectory, content)
        states = self._states(trajectory)
        last = states.index(path)
        for stale in (*states[:last], *states[last + KEEP :]):
            stale.unlink(missing_ok=True)

    def save_branch(self, trajectory: str, epoch: int, content: Mapping[str, Any]) -> None:
        """Writes the state after ``epoch`` epochs from which other trajectories go on. In two
        files: for a damaged checkpoint its predecessor stands in, and here there is none."""
        for path in self._branches(trajectory, epoch):
            self._save(path, trajectory, content)

    def load_checkpoint(
        self, trajectory: str, device: torch.device, warn: Callable[[str], object]
    ) -> tuple[Path, dict[str, Any]] | None:
        """The newest checkpoint of a trajectory that can be read, its tensors on ``device``; None
        if there is none. Only tensors and plain values are read, no code is run. ``warn`` is told
        of a checkpoint that cannot be read, if an earlier one can.

        Raises:
            TrainError: no file is a complete checkpoint of this version and trajectory.
        """
        return self._load_first(self._states(trajectory), trajectory, device, warn)

    def load_branch(
        self, trajectory: str, epoch: int, device: torch.device, warn: Callable[[str], object]
    ) -> tuple[Path, dict[str, Any]]:
        """What :meth:`save_branch` wrote; the arguments are :meth:`load_checkpoint`'s.

        Raises:
            TrainError: it is missing, or neither file is a complete checkpoint of this version.
        """
        paths = self._branches(trajectory, epoch)
        there = [path for path in paths if path.exists()]
        found = self._load_first(there, trajectory, device, warn)
        if found is None:
            raise TrainError(f"{paths[0]}: expected the state after epoch {epoch}, found no file")
        return found

    def save_model(self, name: str, state: Mapping[str, torch.Tensor]) -> None:
        """Replaces ``model_NAME.pt``, the final weights of a method."""
        self.write(self.file(f"model_{name}.pt"), _saved(dict(state)))

    def _load_first(
        self,
        paths: Sequence[Path],
        trajectory: str,
        device: torch.device,
        warn: Callable[[str], object],
    ) -> tuple[Path, dict[str, Any]] | None:
        """The first of the files that can be read; None if there are none."""
        failures: list[TrainError] = []
        for path in paths:
            try:
                state = self._load(path, trajectory, device)
            except TrainError as error:
                failures.append(error)
                continue
            for failure in failures:
                warn(f"note: {failure}; going on from {path.name} instead")
            return path, state
        if failures:
            raise failures[0]
        return None

    def _branches(self, trajectory: str, epoch: int) -> list[Path]:
        """The files of one state."""
        name = f"{trajectory}-branch-{epoch:05d}"
        return [self.checkpoints / f"{name}.pt", self.checkpoints / f"{name}-copy.pt"]

    def _states(self, trajectory: str) -> list[Path]:
        """Checkpoints of a trajectory, the newest first."""
        own = re.compile(rf"{re.escape(trajectory)}-[0-9]{{5,}}-[0-9]{{7,}}\.pt")
        there = self.checkpoints.glob(f"{trajectory}-*.pt")
        return sorted((path for path in there if own.fullmatch(path.name)), reverse=True)

    def _save(self, path: Path, trajectory: str, content: Mapping[str, Any]) -> None:
        kind = {"format": _CHECKPOINT, "version": _CHECKPOINT_VERSION, "trajectory": trajectory}
        self.write(path, _saved({**kind, **content}))

    def write(self, path: Path, content: bytes | memoryview) -> None:
        """Writes a file of the folder by :func:`write_atomically`, and makes its parent folder."""
        try:
            path.parent.mkdir(exist_ok=True)
            write_atomically(path, content)
        except OSError as error:
            full = error.errno in (errno.ENOSPC, errno.EDQUOT)
            raise TrainError(
                f"{path}: cannot be written ({error}); {'the disk is full, ' if full else ''}what "
                f"was saved before is intact: make room and continue with --resume {self.path}"
            ) from error

    def _load(self, path: Path, trajectory: str, device: torch.device) -> dict[str, Any]:
        expected = (
            f"expected a checkpoint of swa_fast.train, version {_CHECKPOINT_VERSION}, of the "
            f"trajectory {trajectory}"
        )
        try:
            # torch.load does not compare checksums: a flipped bit would go unnoticed.
            with open_regular(path) as file:
                with zipfile.ZipFile(file) as archive:
                    if (damaged := archive.testzip()) is not None:
                        raise ValueError(f"wrong checksum of {damaged}")
                file.seek(0)
                payload = torch.load(file, map_location=device, weights_only=True)
        # Neither has an error of its own: BadZipFile, UnpicklingError, RuntimeError, KeyError...
        except Exception as error:
            raise TrainError(
                f"{path}: {expected}, found a damaged or foreign file ({first_line(error)})"
            ) from error
        if not isinstance(payload, dict) or payload.get("format") != _CHECKPOINT:
            raise TrainError(f"{path}: {expected}, found another kind of file")
        for key, value in (("version", _CHECKPOINT_VERSION), ("trajectory", trajectory)):
            if payload.get(key) != value:
                raise TrainError(f"{path}: {expected}, found {key} {payload.get(key)}")
        return payload
