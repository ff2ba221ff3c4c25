"""The files of a run: written atomically, read with care."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, Any

import torch

from .errors import TrainError

__all__ = ["RunFolder", "write_atomically"]

_CHECKPOINT = "swa_fast.train.checkpoint"
_CHECKPOINT_VERSION = 1

RESULTS_SCHEMA = "swa_fast.train.results"
RESULTS_VERSION = 1


def write_atomically(path: Path, write: Callable[[IO[bytes]], object]) -> None:
    """Writes a file so that at any moment, also after a power cut, ``path`` holds either its old
    content or all of the new one.

    Args:
        path: the file.
        write: writes the content to the binary file it is given.
    """
    descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
    try:
        with os.fdopen(descriptor, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        # mkstemp makes files private; these should be as readable as any other.
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(name, 0o666 & ~umask)
        os.replace(name, path)
    except BaseException:
        if os.path.exists(name):
            os.unlink(name)
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


class RunFolder:
    """The folder of a run.

    ======================== ===================================================================
    ``results.json``         settings, environment, records and summary; see ``report.py``
    ``curves.png``           accuracy and learning rate over the epochs
    ``sgd.pt``, ``swa.pt``   training states after the last finished epoch of each run
    ``model_*.pt``           ``state_dict`` of the final networks (the average in model_swa.pt)
    ======================== ===================================================================
    """

    NAMES = ("results.json", "curves.png", "sgd.pt", "swa.pt", "model_sgd.pt", "model_swa.pt")

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    def file(self, name: str) -> Path:
        """Path of one of :attr:`NAMES`."""
        assert name in self.NAMES
        return self.path / name

    def create(self, *, overwrite: bool) -> None:
        """Makes the folder, for a new run. Removes nothing: see :meth:`clear`.

        Args:
            overwrite: accept that it already holds a run.

        Raises:
            TrainError: it holds a run and ``overwrite`` is false, or it cannot be made.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise TrainError(f"--out: expected a folder, found {self.path} ({error})") from error
        existing = [name for name in self.NAMES if self.file(name).exists()]
        if existing and not overwrite:
            raise TrainError(
                f"--out: expected a folder without a run, found {', '.join(existing)} in "
                f"{self.path}; continue it with --resume {self.path}, replace it with --overwrite, "
                f"or choose another folder"
            )

    def clear(self) -> None:
        """Removes the files of an earlier run; others stay."""
        for name in self.NAMES:
            self.file(name).unlink(missing_ok=True)

    def write_results(self, results: Mapping[str, Any]) -> None:
        """Replaces results.json."""
        text = json.dumps(
            {"schema": RESULTS_SCHEMA, "schema_version": RESULTS_VERSION, **results},
            indent=1,
            allow_nan=False,
        )
        write_atomically(self.file("results.json"), lambda f: f.write(text.encode() + b"\n"))

    def read_results(self) -> dict[str, Any]:
        """Content of results.json.

        Raises:
            TrainError: it is missing, or not a results file of this version.
        """
        path = self.file("results.json")
        expected = f"expected {RESULTS_SCHEMA} version {RESULTS_VERSION}"
        try:
            results = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError as error:
            raise TrainError(
                f"--resume: expected the folder of a run, found no results.json in {self.path}"
            ) from error
        except (OSError, ValueError) as error:
            raise TrainError(f"{path}: {expected}, found unreadable JSON ({error})") from error
        if not isinstance(results, dict) or results.get("schema") != RESULTS_SCHEMA:
            raise TrainError(f"{path}: {expected}, found another kind of file")
        if results.get("schema_version") != RESULTS_VERSION:
            raise TrainError(f"{path}: {expected}, found version {results.get('schema_version')}")
        missing = {"status", "config", "environment", "data", "records", "summary"} - set(results)
        if missing:
            raise TrainError(f"{path}: {expected}, found no {', '.join(sorted(missing))}")
        return results

    def save_checkpoint(self, method: str, content: Mapping[str, Any]) -> None:
        """Replaces the checkpoint of a method ("sgd" or "swa")."""
        payload = {
            "format": _CHECKPOINT,
            "version": _CHECKPOINT_VERSION,
            "method": method,
            **content,
        }
        write_atomically(self.file(f"{method}.pt"), lambda f: torch.save(payload, f))

    def load_checkpoint(self, method: str, device: torch.device) -> dict[str, Any] | None:
        """The checkpoint of a method, its tensors on ``device``; None if there is none.

        Only tensors and plain values are read, no code is run.

        Raises:
            TrainError: the file is not a complete checkpoint of this version and method.
        """
        path = self.file(f"{method}.pt")
        expected = (
            f"expected a {method} checkpoint of swa_fast.train, version {_CHECKPOINT_VERSION}"
        )
        if not path.exists():
            return None
        try:
            payload = torch.load(path, map_location=device, weights_only=True)
        # torch.load has no error of its own: UnpicklingError, RuntimeError, EOFError, KeyError...
        except Exception as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise TrainError(
                f"{path}: {expected}, found a truncated or foreign file ({reason})"
            ) from error
        if not isinstance(payload, dict) or payload.get("format") != _CHECKPOINT:
            raise TrainError(f"{path}: {expected}, found another kind of file")
        for key, value in (("version", _CHECKPOINT_VERSION), ("method", method)):
            if payload.get(key) != value:
                raise TrainError(f"{path}: {expected}, found {key} {payload.get(key)}")
        return payload

    def save_model(self, method: str, state: Mapping[str, torch.Tensor]) -> None:
        """Replaces the final weights of a method."""
        write_atomically(self.file(f"model_{method}.pt"), lambda f: torch.save(dict(state), f))
