"""Fixtures that run the pack inside real ComfyUI: `comfyui` in this process, `server` in another, `page` in a browser.

ComfyUI is looked for at $COMFYUI_PATH, else ~/comfy/ComfyUI. Without it everything here is skipped, with one line that
says so; with DOPSD_REQUIRE_COMFYUI=1 that is a failure instead. Logs and screenshots go to $DOPSD_ARTEFACTS, else to
pytest's temporary folder.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"

import inprocess  # noqa: E402  after the thread count, which torch reads once
from bases import half_in_ram, load  # noqa: E402, F401  fixtures
from inprocess import ComfyUI, new_base, why_not  # noqa: E402
from live import Server  # noqa: E402

NOT_TESTED = why_not()
if not NOT_TESTED:
    inprocess.put_first_on_path()


def give_up(reason: str) -> None:
    """Skip, and never quietly: where ComfyUI was promised, a skip is a failure."""
    if os.environ.get("DOPSD_REQUIRE_COMFYUI", "") not in ("", "0"):
        pytest.fail(reason, pytrace=False)
    pytest.skip(reason)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        item.add_marker("comfyui")
        if "page" in getattr(item, "fixturenames", ()):
            item.add_marker("browser")


def pytest_runtest_setup() -> None:
    if NOT_TESTED:
        give_up(NOT_TESTED)


@pytest.fixture(scope="session")
def artefacts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where logs and images that a person should look at are kept."""
    wanted = os.environ.get("DOPSD_ARTEFACTS")
    folder = Path(wanted).absolute() if wanted else tmp_path_factory.mktemp("artefacts")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@pytest.fixture(scope="session")
def comfyui(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ComfyUI]:
    """ComfyUI in this process with our pack loaded; see inprocess.ComfyUI."""
    comfyui = ComfyUI(new_base(tmp_path_factory.mktemp("comfyui")))
    yield comfyui
    comfyui.close()


@pytest.fixture(scope="module")
def stock(comfyui: ComfyUI) -> Iterator[Callable[..., None]]:
    """stock(*names): small files under their official names (all of stock_files.FILES without any), which ComfyUI's own
    loader nodes take as long as the module's tests run."""
    import stock_files

    written: list[Path] = []
    with stock_files.thin():
        yield lambda *names: written.extend(stock_files.write(comfyui.base / "models", *names))
    for path in written:
        path.unlink()


@pytest.fixture(scope="session")
def start_server(tmp_path_factory: pytest.TempPathFactory, artefacts: Path) -> Iterator[Callable[..., Server]]:
    """start_server(base=None, flags=(), threads=1): another server, over a new base directory if none is given."""
    started: list[Server] = []

    def start(base: Path | None = None, flags: tuple[str, ...] = (), threads: int = 1) -> Server:
        log = artefacts / f"server-{os.getpid()}-{len(started)}.log"  # other runs of pytest may use the same folder
        log.unlink(missing_ok=True)
        started.append(Server(base or new_base(tmp_path_factory.mktemp("server")), log, flags, threads))
        return started[-1]

    yield start
    for server in started:
        server.stop()


@pytest.fixture(scope="session")
def server(start_server: Callable[..., Server]) -> Server:
    """A ComfyUI server with our pack, shared by all tests; see live.Server."""
    return start_server()


@pytest.fixture(scope="session")
def chromium() -> Iterator[object]:
    import browser

    if reason := browser.why_not():
        give_up(reason)
    with browser.launched() as chromium:
        yield chromium


@pytest.fixture
def page(chromium, server: Server, artefacts: Path) -> Iterator[object]:
    """ComfyUI's own page of `server`, ready to be used; see browser.ComfyPage."""
    import browser

    page = browser.ComfyPage(chromium, server.url, artefacts)
    yield page
    page.close()
