"""gpusim: run PyTorch CUDA extensions on a machine without a GPU.

Under ``python tests/gpusim run CMD...`` the functions below reach the simulator; elsewhere active()
is False.
"""

import ctypes
import json
from collections import defaultdict

__all__ = ["active", "counters", "reset", "take_faults"]
_lib = None


def _load():
    global _lib
    if _lib is None:
        try:
            lib = ctypes.CDLL(None)  # the simulator is preloaded
            lib.gpusim_counters.restype = ctypes.c_char_p
            lib.gpusim_take_faults.restype = ctypes.c_char_p
            _lib = lib
        except (OSError, AttributeError):
            _lib = False
    return _lib


def active():
    """True when this process runs on the simulated device."""
    return bool(_load())


def _need():
    lib = _load()
    if not lib:
        raise RuntimeError("not running under gpusim; start with: python tests/gpusim run ...")
    return lib


def counters():
    """Everything counted since the start or the last reset().

    Keys: ``kernels`` (by mangled name), ``kernel_total``, ``aten`` (torch's own device ops by
    name), ``foreign`` (library kernels that were launched), ``total`` (cudaMalloc, memcpy_*,
    memset, host_syncs, graph_launches, kernel_launches, aten_ops, ...), ``memory`` (device bytes in
    use, and their peak since reset()), ``faults``. Absent keys of ``total`` mean zero.
    """
    c = json.loads(_need().gpusim_counters().decode("utf-8", "replace"))
    for k in ("aten", "foreign", "total"):
        c[k] = defaultdict(int, c[k])
    return c


def reset():
    """Sets all counters to zero (faults stay)."""
    _need().gpusim_reset()


def take_faults():
    """The reports of all faults so far, as a list of strings; clears them, and with them the
    failing exit status."""
    s = _need().gpusim_take_faults().decode("utf-8", "replace")
    return [x.rstrip("\n") for x in s.split("\x1e") if x.strip()]
