"""Which process of a launch reports an error, so that one that all of them have is read once.

The processes ask the store through which the launcher connects them (torchrun's and accelerate's own process keeps it,
so that it outlives them), also before they are connected to each other. Each different error has one reporter.
"""

from __future__ import annotations

import hashlib
import os
from datetime import timedelta
from typing import Any

from ..text import hashable
from .accelerate_world import launched_processes

_WAIT = timedelta(seconds=5)
"""How long the store may take to answer."""


def announce(error: BaseException) -> None:
    """Notes that this process failed; called before its connections break, which the others notice at once."""
    from ..training.world import PeerError

    if not isinstance(error, PeerError):
        _count("failed", 1)


def reports(error: BaseException | str) -> bool:
    """Whether this process is to report the error, or the message; each is reported by the first that asks.

    That another process failed is reported by that process; that one was lost, only if none could report why.
    """
    if launched_processes() == 1:
        return True
    from ..training.world import LostPeer, PeerError

    if isinstance(error, LostPeer):
        return not _count("failed", 0) and _is_first("lost")
    if isinstance(error, PeerError):
        return False
    described = error if isinstance(error, str) else f"{type(error).__name__}: {error}"
    return _is_first(hashlib.sha256(hashable(described)).hexdigest())


def _is_first(what: str) -> bool:
    return (_count(f"said {what}", 1) or 1) == 1  # without a store all report


def _count(what: str, added: int) -> int | None:
    """Adds to a number that all processes of this start of the launch share, and returns it; None without a store."""
    try:
        store = _store()
        return store.add(f"dopsd {os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')} {what}", added)
    except Exception:  # whatever torch raises without one
        return None


def _store() -> Any:
    from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage]

    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    return TCPStore(address, port, is_master=False, timeout=_WAIT, wait_for_workers=False)
