"""Memory that stays with the process, so that a training loop meets no page faults."""

from __future__ import annotations

import ctypes

__all__ = ["keep_memory"]

# glibc's names for what mallopt sets (malloc.h)
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_MAX = -1, -2, -4
_MOST = 2**31 - 1


def keep_memory() -> bool:
    """Let the process keep freed memory of tensors on the CPU, instead of giving it back at every step.

    glibc returns large freed blocks to the operating system.  A training step that frees its activations and makes them
    again then gets them as fresh pages, one page fault for each 4 KiB, which takes as long as the arithmetic of a small
    flow.  After this call freed memory, up to 2 GiB of it, is used again.  The process does not shrink, which is why
    nothing of this package but ``pyflowkern.train`` and the command line does it by itself.  It concerns all
    of the process, whatever allocates, and cannot be undone.  Memory of GPUs is not concerned: torch keeps it anyway.

    Returns:
        Whether the C library took the settings, as glibc does (Linux).  They have no effect on an allocator that was
        loaded in the place of glibc's.

    Example:
        >>> import pyflowkern
        >>> pyflowkern.keep_memory() in (True, False)
        True
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # not glibc; Windows has no library None
        return False
    settings = ((_MMAP_MAX, 0), (_TRIM_THRESHOLD, _MOST), (_TOP_PAD, 64 << 20))
    return all(mallopt(name, value) == 1 for name, value in settings)
