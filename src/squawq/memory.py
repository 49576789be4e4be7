"""How much memory this process has held at most. Knows nothing of what it was for."""

from __future__ import annotations

import sys


def peak_memory() -> int | None:
    """Bytes that were resident at once since the process began; None where the system does not say (Windows)."""
    try:
        import resource
    except ImportError:
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
