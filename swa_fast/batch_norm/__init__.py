"""Re-estimation of BatchNorm statistics for averaged weights, and re-normalisation without."""

from .repair import RepairReport, repair
from .report import BNReport
from .update import update_bn

__all__ = ["BNReport", "RepairReport", "repair", "update_bn"]
