"""Code that averages by ``torch.optim.swa_utils`` made to use this package: :func:`patch_torch`.

Example::

    import lightning  # or any code that averages by torch.optim.swa_utils
    import swa_fast

    with swa_fast.patch_torch() as patch:
        train()  # every AveragedModel that is made in here is swa_fast's
    print(patch.report())
"""

from __future__ import annotations

import functools
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import torch.optim.swa_utils as stock

import swa_fast

__all__ = ["Patch", "patch_torch"]

# Constructions and calls, by name, since the first patch.
_used: Counter[str] = Counter()


# Classes and functions of their own, so that what a patch put somewhere is told from what a user
# imported from swa_fast, and in a module, so that pickles find them.
class AveragedModel(swa_fast.AveragedModel):
    """:class:`swa_fast.AveragedModel` in the place of torch's class."""

    @functools.wraps(swa_fast.AveragedModel.__init__)  # type: ignore[misc]
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        _used["AveragedModel"] += 1
        super().__init__(*args, **kwargs)


class SWALR(swa_fast.SWALR):
    """:class:`swa_fast.SWALR` in the place of torch's class."""

    @functools.wraps(swa_fast.SWALR.__init__)  # type: ignore[misc]
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        _used["SWALR"] += 1
        super().__init__(*args, **kwargs)


def _counted(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        _used[function.__name__] += 1
        return function(*args, **kwargs)

    # Pickled by reference to this module, as the classes are.
    call.__module__, call.__qualname__ = __name__, function.__name__
    return call


update_bn = _counted(swa_fast.update_bn)
get_swa_avg_fn = _counted(swa_fast.get_swa_avg_fn)
get_ema_avg_fn = _counted(swa_fast.get_ema_avg_fn)
get_swa_multi_avg_fn = _counted(swa_fast.get_swa_multi_avg_fn)
get_ema_multi_avg_fn = _counted(swa_fast.get_ema_multi_avg_fn)

_NAMES = (
    "AveragedModel", "SWALR", "update_bn", "get_swa_avg_fn", "get_ema_avg_fn",
    "get_swa_multi_avg_fn", "get_ema_multi_avg_fn",
)  # fmt: skip
# Read before anything is replaced.
_PAIRS = [(getattr(stock, name), globals()[name]) for name in _NAMES]
_patches: list[Patch] = []  # those in force


def _places() -> Iterator[tuple[str, dict[str, Any]]]:
    """The namespaces of all loaded modules but our own."""
    for name, module in list(sys.modules.items()):
        # Not getattr, which has modules that load lazily load everything.
        if isinstance(module, ModuleType) and name.partition(".")[0] != "swa_fast":
            yield name, module.__dict__


def _replace(pairs: list[tuple[Any, Any]]) -> list[str]:
    """Replaces objects wherever a loaded module has them, under whatever name.

    Returns:
        ``module.name`` of each place.
    """
    by_id = {id(old): new for old, new in pairs}
    places = []
    for module, namespace in _places():
        for name, value in list(namespace.items()):
            if id(value) in by_id:
                namespace[name] = by_id[id(value)]
                places.append(f"{module}.{name}")
    return places


def _unreachable() -> list[str]:
    """Classes that were derived from torch's before the patch, which stay as they are."""
    found: list[str] = []
    classes: list[type[Any]] = [old for old, _ in _PAIRS if isinstance(old, type)]
    while classes:
        for derived in classes.pop().__subclasses__():
            if derived.__module__.partition(".")[0] != "swa_fast":
                found.append(f"{derived.__module__}.{derived.__qualname__}")
                classes.append(derived)
    return sorted(set(found))


class Patch:
    """What :func:`patch_torch` returns. Also a context manager, which undoes it at its end.

    Attributes:
        replaced: ``module.name`` of each place that was changed.
        unreachable: classes that were derived from torch's before, which average as before.
    """

    def __init__(self) -> None:
        self._before = Counter(_used)
        _patches.append(self)
        self.unreachable = _unreachable()
        self.replaced = _replace(_PAIRS)

    @property
    def used(self) -> dict[str, int]:
        """How often each name was constructed or called since."""
        return dict(_used - self._before)

    def report(self) -> str:
        """What was replaced, and how often it was used, in a few lines."""
        used = ", ".join(f"{name} {count}" for name, count in sorted(self.used.items()))
        lines = [
            f"swa_fast: replaced {len(self.replaced)} names: {', '.join(self.replaced) or 'none'}",
            f"swa_fast: used: {used or 'nothing'}",
        ]
        if self.unreachable:
            lines.append(
                "swa_fast: left as they are, derived from torch's before the patch: "
                + ", ".join(self.unreachable)
            )
        return "\n".join(lines)

    def undo(self) -> None:
        """Puts torch's own back, also into modules that were loaded since; objects that were made
        meanwhile stay what they are. Twice is as good as once. Where patches overlap, torch's own
        are back after the last of them was undone."""
        if self in _patches:
            _patches.remove(self)
            if not _patches:
                _replace([(new, old) for old, new in _PAIRS])

    def __enter__(self) -> Patch:
        return self

    def __exit__(self, *_: object) -> None:
        self.undo()


def patch_torch() -> Patch:
    """Puts this package's classes and functions in the place of ``torch.optim.swa_utils``'s,
    there and in every module that has imported them, under whatever name.

    Found by identity: ``from torch.optim.swa_utils import AveragedModel as Average`` counts, and so
    does a module that is imported later. What cannot be reached: classes derived from torch's
    before the patch, which the report names, and functions that hold torch's in a default argument
    or closure. Instances that exist already stay torch's, and are none of the new class to
    ``isinstance``.

    ``python -m swa_fast.patch script.py`` patches a script without a change of it.

    Returns:
        A handle with ``undo()``, ``report()`` and the counts.
    """
    return Patch()
