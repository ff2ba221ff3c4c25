"""Re-estimation of BatchNorm statistics for averaged weights."""

from .report import BNReport
from .update import update_bn

__all__ = ["BNReport", "update_bn"]
