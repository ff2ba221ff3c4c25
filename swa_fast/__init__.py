"""Fast weight averaging: a drop-in for :mod:`torch.optim.swa_utils` with fused kernels.

``import swa_fast as swa_utils`` and everything that :mod:`torch.optim.swa_utils` offers works.
"""

from typing import TYPE_CHECKING, Any

from ._backends import BackendError, choose_backend
from ._ops import combine_
from .averaged_model import AveragedModel
from .averager import Averager
from .avg_fns import (
    get_ema_avg_fn,
    get_ema_multi_avg_fn,
    get_swa_avg_fn,
    get_swa_multi_avg_fn,
)
from .batch_norm import BNReport, RepairReport, repair, update_bn
from .by_name import ByName
from .rules import EMA, SWA, Power, Warmup, Window
from .schedules import SWALR, DelayedSWALR

if TYPE_CHECKING:
    from .integrations.torch_patch import patch_torch
    from .swag import SWAG

__version__ = "0.2.0"

__all__ = [
    "EMA",
    "SWA",
    "SWAG",
    "SWALR",
    "AveragedModel",
    "Averager",
    "BNReport",
    "BackendError",
    "ByName",
    "DelayedSWALR",
    "Power",
    "RepairReport",
    "Warmup",
    "Window",
    "choose_backend",
    "combine_",
    "get_ema_avg_fn",
    "get_ema_multi_avg_fn",
    "get_swa_avg_fn",
    "get_swa_multi_avg_fn",
    "patch_torch",
    "repair",
    "update_bn",
]


def __getattr__(name: str) -> Any:
    if name == "SWAG":  # which few need
        from .swag import SWAG

        return SWAG
    # It stands on the names above, which have to be there first.
    if name == "patch_torch":
        from .integrations.torch_patch import patch_torch

        return patch_torch
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
