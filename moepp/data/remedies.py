"""What to do about a file that could not be read: it follows from what the system said."""

from __future__ import annotations

import errno


def read_remedy(error: OSError) -> str:
    """End of a message about a failed read."""
    remedies = {
        errno.EMFILE: "raise the limit of open files (ulimit -n)",
        errno.ENFILE: "the system has too many open files: close some",
        errno.ENOMEM: "free memory, or raise vm.max_map_count",
        errno.EIO: "the disk reports an error: copy the file anew",
        errno.ENOENT: "it was removed meanwhile: restore it",
        errno.ESTALE: "it was replaced meanwhile: start again",
    }
    return remedies.get(error.errno or 0, "check its permissions")
