"""The most memory that this process has held."""

from __future__ import annotations

import sys

import psutil


def peak_rss_mb() -> float:
    """Peak resident memory in MB (10^6 bytes), on Linux, macOS and Windows."""
    info = psutil.Process().memory_info()
    if hasattr(info, "peak_wset"):
        return info.peak_wset / 1e6  # Windows
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 1e6 if sys.platform == "darwin" else peak * 1024 / 1e6
