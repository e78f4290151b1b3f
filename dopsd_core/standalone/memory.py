"""Peak memory of this process."""

from __future__ import annotations

import sys

import psutil


def peak_rss_mb() -> float:
    """Peak resident memory in MB (10^6 bytes), on Linux, macOS and Windows."""
    on_windows = getattr(psutil.Process().memory_info(), "peak_wset", None)
    if on_windows is not None:
        return on_windows / 1e6
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 1e6 if sys.platform == "darwin" else peak * 1024 / 1e6
