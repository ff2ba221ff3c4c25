"""Networks and datasets that a user names as ``package.module:factory``."""

from __future__ import annotations

import importlib
import inspect
import re
import sys
from collections.abc import Callable
from typing import Any

from .errors import TrainError, first_line

_NAME = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*(\.[A-Za-z_]\w*)*")


def is_factory(name: object) -> bool:
    """Whether a text has the form ``package.module:factory``."""
    return isinstance(name, str) and _NAME.fullmatch(name) is not None


def call_factory(option: str, name: str, **arguments: Any) -> Any:
    """What a factory makes, of those arguments that its signature takes. Modules are also looked
    for in the working directory, as by ``python -m``.

    Args:
        option: for messages.
        name: ``package.module:factory``.

    Raises:
        TrainError: there is no such factory, or it raised.
    """
    module_name, _, path = name.partition(":")
    if "" not in sys.path:
        sys.path.insert(0, "")
    try:
        found: Any = importlib.import_module(module_name)
        for part in path.split("."):
            found = getattr(found, part)
        if not callable(found):
            raise TypeError(f"{path} is no function")
        return _of_signature(found, arguments)
    # The user's code may raise anything.
    except Exception as error:
        raise TrainError(
            f"{option}: expected a factory that can be called, found {name} "
            f"({type(error).__name__}: {first_line(error)})"
        ) from error


def _of_signature(factory: Callable[..., Any], arguments: dict[str, Any]) -> Any:
    parameters = inspect.signature(factory).parameters
    if not any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        arguments = {name: value for name, value in arguments.items() if name in parameters}
    return factory(**arguments)
