"""ComfyUI's own page in headless chromium, driven through what the page itself offers (window.app)."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

FLAGS = [
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",
]
ENDS = ["execution_success", "execution_error", "execution_interrupted"]
READY = "() => window.app && window.app.vueAppReady && window.app.graph && window.app.api?.clientId"
LISTEN = """kinds => {
    window.heard = [];
    const keep = e => window.heard.push([e.type, JSON.parse(JSON.stringify(e.detail ?? null))]);
    for (const kind of kinds) window.app.api.addEventListener(kind, keep);
}"""


def chromium_path() -> str | None:
    return shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


def why_not() -> str:
    try:
        import playwright.sync_api  # noqa: F401
    except ImportError:
        return "THE PAGE WAS NOT TESTED: no playwright in this Python, run `make comfyui`"
    if chromium_path() is None:
        return "THE PAGE WAS NOT TESTED: no chromium, run `make browser` as root or install it"
    return ""


@contextmanager
def launched() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as p:
        chromium = p.chromium.launch(executable_path=chromium_path(), args=FLAGS)
        yield chromium
        chromium.close()


class ComfyPage:
    """The `page` fixture. `.page` is playwright's own page, for everything that is not here."""

    def __init__(self, chromium: Any, url: str, artefacts: Path) -> None:
        self.artefacts = artefacts
        self.errors: list[str] = []  # of the page's scripts; a few are ComfyUI's own, so no test fails on them alone
        self._context = chromium.new_context(viewport={"width": 1500, "height": 950}, locale="en-US")
        self.page = self._context.new_page()
        self.page.on("pageerror", lambda e: self.errors.append(str(e)))
        self.page.goto(url, wait_until="domcontentloaded")
        self.page.wait_for_function(READY, timeout=90_000)
        self.page.evaluate(LISTEN, [*ENDS, "executed", "progress_text", "progress_state"])
        self.page.wait_for_timeout(800)  # extensions settle

    def load_api(self, graph: dict, name: str = "test.json") -> None:
        """An API-format graph; the page lays the nodes out."""
        self.page.evaluate("([g, name]) => window.app.loadApiJson(g, name)", [graph, name])
        self.page.wait_for_timeout(500)

    def load_workflow(self, workflow: dict, name: str = "test") -> None:
        """A workflow as users save it."""
        self.page.evaluate("([w, name]) => window.app.loadGraphData(w, true, true, name)", [workflow, name])
        self.page.wait_for_timeout(800)

    def saved(self) -> dict:
        """{"workflow": what users save, "output": the API graph} of what is on the canvas."""
        return self.page.evaluate(
            "async () => JSON.parse(JSON.stringify(await window.app.graphToPrompt()))",
        )

    def set_widget(self, node_type: str, widget: str, value: object) -> None:
        self.page.evaluate(
            """([type, name, value]) => {
                const node = window.app.graph.nodes.find(n => n.type === type);
                node.widgets.find(w => w.name === name).value = value;
            }""",
            [node_type, widget, value],
        )

    def choose(self, node_type: str, widget: str, value: object) -> None:
        """As a user does: the widget's value, then its callback."""
        self.page.evaluate(
            """([type, name, value]) => {
                const node = window.app.graph.nodes.find(n => n.type === type);
                const widget = node.widgets.find(w => w.name === name);
                widget.value = value;
                widget.callback?.(value, app.canvas, node);
            }""",
            [node_type, widget, value],
        )

    def start(self) -> None:
        """Press Run. With unchanged inputs ComfyUI answers from its cache."""
        self.page.evaluate("() => { window.heard.length = 0; return window.app.queuePrompt(0, 1); }")

    def wait_for_end(self, timeout: float = 300) -> str:
        """The event the run ended with."""
        ended = "ends => window.heard.find(e => ends.includes(e[0]))?.[0]"
        return self.page.wait_for_function(ended, arg=ENDS, timeout=timeout * 1000).json_value()

    def run(self, timeout: float = 300) -> str:
        self.start()
        end = self.wait_for_end(timeout)
        self.page.wait_for_timeout(1000)  # images load
        return end

    def heard(self) -> list[tuple[str, Any]]:
        """[event, its detail] since Run was pressed."""
        return [(kind, detail) for kind, detail in self.page.evaluate("() => window.heard")]

    def browse_templates(self) -> None:
        self.page.evaluate("() => window.app.extensionManager.command.execute('Comfy.BrowseTemplates')")

    def screenshot(self, name: str) -> Path:
        path = self.artefacts / f"{name}.png"
        self.page.screenshot(path=path)
        return path

    def close(self) -> None:
        self._context.close()
