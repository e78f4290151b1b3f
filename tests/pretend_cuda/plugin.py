"""pytest plugin: says which device the tests ran on and what happened on it."""

from __future__ import annotations

import os

import pytest

from pretend_cuda import device


def pytest_configure() -> None:
    if not device.is_there():  # Python continues after an error in sitecustomize
        pytest.exit("the pretend CUDA device did not start; its error is above", returncode=3)


def pytest_report_header() -> str:
    major, minor = device.capability()
    return f"pretend CUDA device: mode {os.environ['PRETEND_CUDA']}, compute capability {major}.{minor}"


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    terminalreporter.write_line(f"pretend CUDA, {os.environ['PRETEND_CUDA']}: {device.counts()}")
    if os.environ["PRETEND_CUDA"] == "dynamic":
        from pretend_cuda import aimdo

        terminalreporter.write_line(f"dynamic VRAM: {dict(aimdo.count)}, pages still pinned {aimdo.still_pinned()}")
