"""The error that the command line reports to its user, and imports of optional packages."""

from __future__ import annotations

import importlib
from types import ModuleType


class TrainError(Exception):
    """Something the user can put right; the message says what was found and what was expected."""


class Stopped(Exception):
    """The training was asked to stop, and its state can be saved."""


def import_extra(module: str) -> ModuleType:
    """Imports a module of a package that only the trainer needs.

    Raises:
        TrainError: the package is not installed.
    """
    try:
        return importlib.import_module(module)
    # torchvision that does not belong to this torch raises RuntimeError.
    except (ImportError, RuntimeError) as error:
        raise TrainError(
            f'{module} cannot be imported ({error}); run: pip install "swa_fast[train]"'
        ) from error


def first_line(error: Exception) -> str:
    """An error's message without its details, or its type if it has none."""
    return str(error).splitlines()[0] if str(error) else type(error).__name__
