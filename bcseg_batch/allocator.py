"""Keeps glibc from giving large tensors back to the kernel at every free.

By default each activation of the network is mapped afresh from the kernel and faulted in page by
page, which costs a run on the CPU up to a third of its time.
"""

import ctypes
import platform

# From <malloc.h>.
_M_TRIM_THRESHOLD = -1
_M_MMAP_MAX = -4
_M_ARENA_MAX = -8
_TRIM_THRESHOLD_BYTES = 1 << 30


def keep_freed_memory() -> bool:
    """Let the process reuse freed memory up to a gibibyte; harmless to call twice.

    Returns:
        False where the C library is not glibc, and nothing was changed.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    libc = ctypes.CDLL(None)
    # One pool for all threads: each thread's own would keep the largest that it ever had.
    return bool(
        libc.mallopt(_M_ARENA_MAX, 1)
        and libc.mallopt(_M_MMAP_MAX, 0)
        and libc.mallopt(_M_TRIM_THRESHOLD, _TRIM_THRESHOLD_BYTES)
    )
