"""``python -m swa_fast.patch script.py [arguments]``: runs a script whose averages by
``torch.optim.swa_utils`` are made by this package, see :func:`swa_fast.patch_torch`.

``-m module`` in the place of the script runs a module, and ``torchrun -m swa_fast.patch script.py``
every process of a distributed one. With ``SWA_FAST_PATCH_REPORT=1`` in the environment each process
says at its end, on stderr, what was replaced and how often it was used.
"""

from __future__ import annotations

import atexit
import importlib.util
import os
import runpy
import sys
from collections.abc import Sequence

from swa_fast import patch_torch

__all__ = ["main"]

_USAGE = "usage: python -m swa_fast.patch (script.py | -m module) [arguments]"


def _fail(message: str) -> int:
    print(f"swa_fast.patch: {message}", file=sys.stderr)
    return 2


def main(arguments: Sequence[str] | None = None) -> int:
    """Patches and runs.

    Args:
        arguments: of the command line; None takes the process's.

    Returns:
        The exit code where the script ends by itself: 0, or 2 with one line on stderr if there is
        none.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    if not given or given == ["-m"]:
        return _fail(f"expected a script; {_USAGE}")
    if given[0] in ("-h", "--help"):
        print(_USAGE)
        return 0
    as_module = given[0] == "-m"
    target, *rest = given[1:] if as_module else given
    if as_module:
        # As python -m does, before the module is looked for.
        sys.path.insert(0, os.getcwd())
        try:
            found = importlib.util.find_spec(target) is not None
        except (ImportError, ValueError):
            found = False
        if not found:
            return _fail(f"expected a module, found none named {target!r}")
    elif not os.path.isfile(target):
        return _fail(f"expected a script, found no file {target!r}")
    patch = patch_torch()
    if os.environ.get("SWA_FAST_PATCH_REPORT") == "1":
        atexit.register(lambda: print(patch.report(), file=sys.stderr))
    sys.argv[:] = [target, *rest]
    if as_module:
        runpy.run_module(target, run_name="__main__", alter_sys=True)
    else:
        # As python does for a script; runpy does for folders alone.
        sys.path[0] = os.path.dirname(os.path.abspath(target))
        runpy.run_path(target, run_name="__main__")
    return 0


if __name__ == "__main__":
    sys.exit(main())
