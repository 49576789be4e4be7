"""Peak memory of this process."""

from __future__ import annotations

import sys


def peak_memory() -> int | None:
    """Peak resident bytes since the process began; None where the system does not report it (Windows)."""
    try:
        import resource
    except ImportError:
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
