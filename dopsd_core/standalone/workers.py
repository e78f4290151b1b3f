"""Worker processes that end with the process that started them."""

from __future__ import annotations

import os
import threading
from multiprocessing import connection, parent_process


def end_with_parent() -> None:
    """Ends this process when its parent has ended, however it did; for the initializer of a pool of processes.

    A worker of a pool waits for work for ever if its parent was killed: the other workers hold the same pipe open.
    """
    parent = parent_process()
    if parent is None:
        return

    def watch(sentinel: int) -> None:
        connection.wait([sentinel])
        os._exit(1)

    threading.Thread(target=watch, args=(parent.sentinel,), daemon=True).start()
