"""Child processes of tests: forked from one server, which has imported what any of them needs and computed nothing."""

from __future__ import annotations

import multiprocessing
import sys
from typing import Any

_IMPORTED = ("tests.tiny", "tests.ranks", "tests.sharded_runs", "accelerate", "torch.distributed.fsdp")
"""The server is started once, so the first test that needs it imports for all."""


def forking() -> Any:
    """The context of multiprocessing that starts them; without fork each imports everything itself."""
    if sys.platform == "win32":
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(_IMPORTED))
    return context
