"""How this process gets its memory from the system."""

from __future__ import annotations

import ctypes

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h
LARGEST, ALLOWED_BY_OLDER = 2**30, 2**25  # bytes; glibc before 2.35 refuses more as M_MMAP_THRESHOLD


def keep_freed_memory() -> bool:
    """Have what one step frees lie ready for the next; False where the C library is not glibc.

    By default glibc gives large blocks back to the kernel, which clears every page of theirs when they are asked for
    again: several per cent of a step on a CPU.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # musl, macOS, Windows
        return False
    keeps = mallopt(M_TRIM_THRESHOLD, LARGEST)
    return bool(mallopt(M_MMAP_THRESHOLD, LARGEST) or mallopt(M_MMAP_THRESHOLD, ALLOWED_BY_OLDER)) and bool(keeps)
