"""Memory of the CPU that is given back to the operating system has to be cleared page by page when it comes again.

Buffers of a training step are as large in every step, so that glibc's habit of returning large ones at once costs more
than the arithmetic of some layers (a fresh 64 MB buffer: about as long as reading it four times, measured).
"""

from __future__ import annotations

import ctypes

# From malloc.h.
_M_TRIM_THRESHOLD = -1
_M_MMAP_THRESHOLD = -3
_LARGEST_INT = 2**31 - 1


def keep_freed_memory() -> bool:
    """Make this process keep freed CPU memory for its next allocations; False where the C library is not glibc.

    The process then never shrinks below its largest need, and every allocation that follows is faster. Process-wide:
    for programs (training, benchmarks), not for libraries to call.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return False
    mallopt.argtypes, mallopt.restype = [ctypes.c_int, ctypes.c_int], ctypes.c_int
    return bool(mallopt(_M_MMAP_THRESHOLD, 2**30)) and bool(mallopt(_M_TRIM_THRESHOLD, _LARGEST_INT))
