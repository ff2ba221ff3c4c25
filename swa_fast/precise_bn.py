"""fvcore's names: :mod:`swa_fast.batch_norm.precise_bn` under a short import path."""

from .batch_norm.precise_bn import BN_MODULE_TYPES, get_bn_modules, update_bn_stats

__all__ = ["BN_MODULE_TYPES", "get_bn_modules", "update_bn_stats"]
