"""The demo's commands in this process, on concepts with few prompts: as the commands, in seconds instead of minutes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from typing import Any

import pytest
import torch

from dopsd_core.demo.concept import make_concept
from dopsd_core.standalone import cli, jobs
from dopsd_core.standalone.comparison import experiment, sheet

FEW: dict[str, Any] = {"num_unseen": 20, "num_prior": 8, "num_anchors": 4}


class OneThread(ThreadPoolExecutor):
    """In the place of ProcessPoolExecutor."""

    def __init__(
        self, jobs: int, context: object, initializer: Callable[..., None], arguments: tuple[Any, ...]
    ) -> None:
        super().__init__(1, initializer=initializer, initargs=arguments)


@contextmanager
def small_demo() -> Iterator[None]:
    """Inside, `demo` and `compare` run here."""
    threads = torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        for module in (jobs, experiment):
            patch.setattr(module, "ProcessPoolExecutor", OneThread)
        for module in (jobs, experiment, cli, sheet):
            patch.setattr(module, "make_concept", partial(make_concept, **FEW))
        yield
    torch.set_num_threads(threads)
