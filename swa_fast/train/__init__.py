"""Trainer that reproduces the SWA paper's recipe: ``swa-fast train``, and from Python
:func:`~swa_fast.train.api.train`."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .api import Outcome as Outcome
    from .api import train as train

__all__ = ["Outcome", "train"]


def __getattr__(name: str) -> Any:
    # Not before it is asked for: parts of this package are imported without the rest.
    if name in __all__:
        from . import api

        return getattr(api, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
