"""glibc's malloc for the time of a pass."""

from __future__ import annotations

import ctypes
import functools
import os
import platform
import threading
from types import TracebackType
from typing import Any

# Parameters of glibc's mallopt, and their values in a process that works with large tensors: the
# thresholds are dynamic until somebody sets them, and grow to these values.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_MMAP_MAX = -1, -3, -4
_LIMITS = ((_M_MMAP_MAX, 65536), (_M_MMAP_THRESHOLD, 32 << 20), (_M_TRIM_THRESHOLD, 64 << 20))
# Freeing that many bytes has malloc look whether it can return some.
_LARGE = 128 << 10

_lock = threading.Lock()
_users = 0  # passes under way, in any thread
# Blocks of the heaps from which passes that have ended allocated, while others go on.
_blocks: list[int] = []


@functools.cache
def _libc() -> str:
    return platform.libc_ver()[0]  # reads the interpreter's file


def _wanted() -> bool:
    keep = os.environ.get("SWA_FAST_KEEP_MEMORY", "1")
    if keep not in ("0", "1"):
        raise ValueError(f"SWA_FAST_KEEP_MEMORY: expected 0 or 1, found {keep!r}")
    chosen = any(name.startswith("MALLOC_") for name in os.environ) or (
        "malloc" in os.environ.get("GLIBC_TUNABLES", "")
    )
    return keep == "1" and not chosen and _libc() == "glibc"


class KeptMemory:
    """Has glibc's malloc keep what is freed, instead of returning every large block to the system.

    Otherwise each activation is a fresh mapping, and clearing its pages takes as long as computing
    it: half of the time of a PreResNet-164. The memory is returned at the end: of the last block of
    several that overlap in threads, for the heaps of all their threads. Resident memory is then
    within 1 % of what it was, and 4 % where torch's own worker threads freed at the ends of theirs.
    What an exception still refers to cannot be returned; it is when this object goes, which the
    frames of the traceback hold that enclose the block.

    The setting is the process's: mallopt has no narrower one, most of the memory is that of torch's
    own operators, and what was set before cannot be asked for.

    Args:
        on: False leaves malloc alone, as do ``SWA_FAST_KEEP_MEMORY=0`` and environment variables by
            which the user sets malloc.

    Raises:
        ValueError: ``SWA_FAST_KEEP_MEMORY`` is neither 0 nor 1.
    """

    def __init__(self, on: bool) -> None:
        self._libc: Any = None
        self._failed = False
        if on and _wanted():
            self._libc = ctypes.CDLL(None)
            self._libc.malloc.restype = ctypes.c_void_p

    def __enter__(self) -> None:
        global _users
        if self._libc is None:
            return
        with _lock:
            _users += 1
            if _users == 1:
                self._libc.mallopt(_M_MMAP_MAX, 0)
                self._libc.mallopt(_M_TRIM_THRESHOLD, -1)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        global _users
        if self._libc is None:
            return
        with _lock:
            _users -= 1
            # malloc_trim returns the free end of the main thread's heap only. A large block that is
            # freed does it for the heap that it is of, whoever frees it: this thread's may go on to
            # free what was the pass's until the last pass ends.
            self._libc.mallopt(_M_TRIM_THRESHOLD, _LARGE)
            self._libc.free(ctypes.c_void_p(self._libc.malloc(_LARGE)))
            if _users:
                _blocks.append(self._libc.malloc(_LARGE))
                self._libc.mallopt(_M_TRIM_THRESHOLD, -1)
            else:
                while _blocks:
                    self._libc.free(ctypes.c_void_p(_blocks.pop()))
                for parameter, value in _LIMITS:
                    self._libc.mallopt(parameter, value)
                self._libc.malloc_trim(0)
        self._failed = error is not None

    def __del__(self) -> None:
        if self._failed and _users == 0:
            self._libc.malloc_trim(0)
