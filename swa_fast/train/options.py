"""Settings as options of the command line: their help, and what is expected of their values."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple

from .errors import TrainError
from .factories import is_factory

#: The default of a setting that depends on others or on the machine; its help tells how.
RESOLVED = object()


class Kind(NamedTuple):
    """The name of an option's value in the help, what is expected of it, and whether it is so."""

    metavar: str
    expected: str = "anything"
    holds: Callable[[Any], bool] = lambda x: True


def one_of(*names: str) -> Kind:
    """One of a few names."""
    return Kind("NAME", f"one of {', '.join(names)}", lambda x: x in names)


def one_of_or_own(*names: str) -> Kind:
    """One of a few names, or a user's own."""
    expected = f"one of {', '.join(names)}, or package.module:factory"
    return Kind("NAME", expected, lambda x: x in names or is_factory(x))


COUNT = Kind("N", "1 or more", lambda x: x >= 1)
# More than any machine has; the operating system ends a process that asks for too many.
THREADS = Kind("N", "an integer from 1 to 1024", lambda x: 1 <= x <= 1024)
SEED = Kind("N", "an integer in [0, 2^63)", lambda x: 0 <= x < 2**63)
RATE = Kind("RATE", "a finite number above 0", lambda x: math.isfinite(x) and x > 0)
START = Kind("FRACTION", "a fraction of 0 or more", lambda x: math.isfinite(x) and x >= 0)
MOMENTUM = Kind("M", "a number in [0, 1)", lambda x: 0 <= x < 1)
DECAY = Kind("W", "a finite number of 0 or more", lambda x: math.isfinite(x) and x >= 0)


def option(group: str, kind: Kind | str, help: str, default: Any = RESOLVED) -> Any:
    """A field that is a command-line option in a group of the help."""
    if default is not RESOLVED and default is not None:
        help = f"{help} (default: {_shown(default)})".lstrip()
    kind = Kind(kind) if isinstance(kind, str) else kind
    return dataclasses.field(
        metadata={"group": group, "kind": kind, "help": help, "default": default}
    )


def _shown(value: Any) -> str:
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, tuple):
        return ",".join(map(_shown, value))
    return f"{value:g}" if isinstance(value, float) else str(value)


def option_name(field: str) -> str:
    """The command-line option that sets a field, for messages."""
    return "--" + field.replace("_", "-")


def expect(field: str, found: Any, expected: Kind | str, holds: bool = True) -> None:
    """Raises TrainError unless a value is of its kind, or what else is expected of it holds."""
    if isinstance(expected, Kind):
        holds, expected = expected.holds(found), expected.expected
    if not holds:
        shown = repr(found) if isinstance(found, str) else found
        raise TrainError(f"{option_name(field)}: expected {expected}, found {shown}")
