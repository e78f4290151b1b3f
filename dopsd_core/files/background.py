"""Writes files in a thread, one write at a time, while the caller goes ahead."""

from __future__ import annotations

import threading
from collections.abc import Callable


class BackgroundWrite:
    """The write in progress, if there is one. What it writes must not be changed meanwhile."""

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def start(self, write: Callable[[], None]) -> None:
        """Calls `write` in a thread, after the one before it has ended."""
        self.wait()
        self._thread = threading.Thread(target=self._run, args=(write,), name="dopsd-save")
        self._thread.start()

    def _run(self, write: Callable[[], None]) -> None:
        try:
            write()
        except BaseException as error:
            self._error = error

    def wait(self) -> None:
        """Returns when nothing is being written; an error stays for `raise_error`."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def raise_error(self) -> None:
        """Raises the error of a write that has ended, once; does not wait."""
        error, self._error = self._error, None
        if error is not None:
            raise error

    def forget_error(self) -> None:
        """For a caller that writes the same again itself."""
        self._error = None
