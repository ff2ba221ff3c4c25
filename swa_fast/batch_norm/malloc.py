"""glibc's malloc for the time of a pass."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import platform
from collections.abc import Iterator

# Parameters of glibc's mallopt, and their values in a process that works with large tensors: the
# thresholds are dynamic until somebody sets them, and grow to these values.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_MMAP_MAX = -1, -3, -4
_LIMITS = ((_M_MMAP_MAX, 65536), (_M_MMAP_THRESHOLD, 32 << 20), (_M_TRIM_THRESHOLD, 64 << 20))


@functools.cache
def _libc() -> str:
    return platform.libc_ver()[0]  # reads the interpreter's file


@contextlib.contextmanager
def kept_memory(on: bool) -> Iterator[None]:
    """Has glibc's malloc keep what is freed, instead of returning every large block to the system.

    Otherwise each activation is a fresh mapping, and clearing its pages takes as long as computing
    it: half of the time of a PreResNet-164. The memory is returned at the end. Environment
    variables by which the user sets malloc are respected.

    The setting is the process's: mallopt has no narrower one, most of the memory is that of torch's
    own operators, and what was set before cannot be asked for. ``SWA_FAST_KEEP_MEMORY=0`` leaves
    malloc alone.
    """
    keep = os.environ.get("SWA_FAST_KEEP_MEMORY", "1")
    if keep not in ("0", "1"):
        raise ValueError(f"SWA_FAST_KEEP_MEMORY: expected 0 or 1, found {keep!r}")
    chosen = (
        keep == "0"
        or any(name.startswith("MALLOC_") for name in os.environ)
        or ("malloc" in os.environ.get("GLIBC_TUNABLES", ""))
    )
    if not on or chosen or _libc() != "glibc":
        yield
        return
    libc = ctypes.CDLL(None)
    libc.mallopt(_M_MMAP_MAX, 0)
    libc.mallopt(_M_TRIM_THRESHOLD, -1)
    try:
        yield
    finally:
        for parameter, value in _LIMITS:
            libc.mallopt(parameter, value)
        libc.malloc_trim(0)
