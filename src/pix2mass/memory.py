"""What the C library does with memory that large arrays have freed."""

from __future__ import annotations

import ctypes
import sys

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
"""Names of mallopt(3)."""
_KEPT_BYTES = 1 << 30


def keep_freed_memory() -> None:
    """Keep up to 1 GiB of freed memory for the next arrays, in this process and from now on.

    The GNU C library gives the memory of arrays above some MB back to the system when they are freed and asks for it
    anew at the next step, and the system clears each page. Training on images of 256 pixels spends 40% of its time so.
    Other C libraries are left as they are.
    """
    if sys.platform == "linux":
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
        if mallopt is not None:
            mallopt(_M_MMAP_THRESHOLD, _KEPT_BYTES)
            mallopt(_M_TRIM_THRESHOLD, _KEPT_BYTES)
