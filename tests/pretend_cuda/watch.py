"""Who copies and who waits: every event on the device with its thread and the lines of code that caused it."""

from __future__ import annotations

import sys
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

from pretend_cuda import device

PLACES = ("dopsd_core", "nodes/", "comfy/", "torch/optim")


class Event(NamedTuple):
    """kind: "upload", "upload from pinned memory", "download", or "sync" and its cause. place: innermost line first."""

    kind: str
    in_backward: bool
    place: str


class Watch:
    """with Watch() as watch: ...; then `watch.events` counts what happened.

    marks: parts of the names of the files whose lines are reported; depth: how many of those.
    """

    def __init__(self, marks: Sequence[str] = PLACES, depth: int = 3) -> None:
        self.events: Counter[Event] = Counter()
        self._marks, self._depth, self._stack = marks, depth, ExitStack()

    def __enter__(self) -> Watch:
        self._stack.enter_context(device.listening(self._heard))
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def syncs(self, in_backward: bool | None = None) -> Counter[Event]:
        """Waits of the host, in the backward alone or outside of it alone if asked."""
        chosen = {
            event: count
            for event, count in self.events.items()
            if event.kind.startswith("sync") and in_backward in (None, event.in_backward)
        }
        return Counter(chosen)

    def describe(self, events: Counter[Event]) -> str:
        """One line for each."""
        backward = {True: " in the backward", False: ""}
        return "\n".join(f"{n} x {e.kind}{backward[e.in_backward]}: {e.place}" for e, n in events.most_common())

    def _heard(self, kind: str) -> None:
        frame, place, in_backward = sys._getframe(1), [], _is_autograds_thread()
        while frame is not None:
            code = frame.f_code
            in_backward = in_backward or code.co_name == "_engine_run_backward"
            if len(place) < self._depth and any(mark in code.co_filename for mark in self._marks):
                place.append(f"{'/'.join(code.co_filename.split('/')[-3:])}:{frame.f_lineno}")
            frame = frame.f_back
        self.events[Event(kind, in_backward, " < ".join(place))] += 1


@contextmanager
def watching(owner: Any, method: str) -> Iterator[list[Watch]]:
    """Inside, every call of this method of a class is watched; the watches come in the order of the calls."""
    watches: list[Watch] = []
    original = getattr(owner, method)

    def watched(*args: Any, **kwargs: Any) -> Any:
        with Watch() as watch:
            watches.append(watch)
            return original(*args, **kwargs)

    setattr(owner, method, watched)
    try:
        yield watches
    finally:
        setattr(owner, method, original)


def _is_autograds_thread() -> bool:
    """Autograd's threads were not started by Python."""
    return isinstance(threading.current_thread(), threading._DummyThread)
