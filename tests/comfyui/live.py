"""A real ComfyUI server as a process of its own, and the little client that the tests talk to it with."""

from __future__ import annotations

import asyncio
import importlib.metadata
import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from inprocess import CHECKOUT, FLAGS
from runs import Event, Run, binary_event, status_of

# Without these the first visit shows tours and dialogs over the page.
QUIET_PAGE = {
    "Comfy.TutorialCompleted": True,
    "Comfy.Workflow.Persist": False,
    "Comfy.Minimap.Visible": False,
    "Comfy.Notification.ShowVersionUpdates": False,
    "Comfy.Graph.CanvasInfo": False,
}


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


class Server:
    """The `server` fixture: ComfyUI on a free loopback port over the folder `base`."""

    def __init__(self, base: Path, log: Path, flags: tuple[str, ...] = (), threads: int = 1) -> None:
        self.base, self.input, self.output, self.log = base, base / "input", base / "output", log
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self._http = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # never through a proxy
        settings = base / "user" / "default" / "comfy.settings.json"
        if not settings.exists():
            version = importlib.metadata.version("comfyui_frontend_package")
            settings.write_text(json.dumps({**QUIET_PAGE, "Comfy.InstalledVersion": version}), encoding="utf-8")
        command = [sys.executable, "main.py", "--listen", "127.0.0.1", "--port", str(self.port)]
        command += ["--base-directory", str(base), "--database-url", "sqlite:///:memory:"]
        command += ["--disable-auto-launch", "--disable-api-nodes", *FLAGS, *flags]
        env = {**os.environ, "OMP_NUM_THREADS": str(threads), "PYTHONUNBUFFERED": "1", "HF_HUB_OFFLINE": "1"}
        started = time.monotonic()
        with log.open("ab") as out:
            self.process = subprocess.Popen(command, cwd=CHECKOUT, env=env, stdout=out, stderr=subprocess.STDOUT)
        try:
            self._wait_until_up(300)
        except BaseException:
            self.stop()
            raise
        self.boot_seconds = time.monotonic() - started

    def _wait_until_up(self, timeout: float) -> None:
        deadline = time.monotonic() + timeout
        while True:
            try:
                return self.get("/system_stats") and None
            except OSError:
                assert self.process.poll() is None and time.monotonic() < deadline, self.log_tail()
                time.sleep(0.1)

    def log_tail(self, lines: int = 40) -> str:
        return "\n".join(self.log.read_text(encoding="utf-8", errors="replace").splitlines()[-lines:])

    def get(self, path: str) -> Any:
        """The JSON at a path."""
        return json.loads(self.get_bytes(path))

    def get_bytes(self, path: str) -> bytes:
        with self._http.open(self.url + path, timeout=60) as answer:
            return answer.read()

    def send(self, path: str, body: dict) -> tuple[int, dict]:
        """POST JSON: the status and the JSON that came back ({} when nothing did)."""
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(self.url + path, json.dumps(body).encode(), headers)
        try:
            with self._http.open(request, timeout=60) as answer:
                status, content = answer.status, answer.read()
        except urllib.error.HTTPError as e:
            status, content = e.code, e.read()
        return status, json.loads(content) if content else {}

    def post(self, graph: dict, **extra: Any) -> str | dict:
        """Queue a graph: its prompt_id, or the body of the 400 that refuses it."""
        status, body = self.send("/prompt", {"prompt": graph, **extra})
        self.node_errors = body.get("node_errors", {})  # ComfyUI also takes a graph of which only some outputs can run
        return body["prompt_id"] if status == 200 else body

    def interrupt(self) -> None:
        self.send("/interrupt", {})

    def history(self, prompt_id: str) -> dict:
        return self.get(f"/history/{prompt_id}")[prompt_id]

    def rss(self) -> int:
        """Resident memory of the server, in bytes."""
        import psutil

        return psutil.Process(self.process.pid).memory_info().rss

    def run(
        self, graph: dict, on_event: Callable[[Event], None] | None = None, timeout: float = 300, **extra: Any
    ) -> Run:
        """Queue a graph and listen on the websocket until it ended in whatever way."""
        with ThreadPoolExecutor(1) as thread:  # playwright's event loop owns the main thread
            return thread.submit(asyncio.run, self._run(graph, on_event, timeout, extra)).result()

    async def _run(self, graph: dict, on_event: Callable | None, timeout: float, extra: dict) -> Run:
        import aiohttp

        client_id, events, deadline = uuid.uuid4().hex, [], time.monotonic() + timeout
        async with (
            aiohttp.ClientSession() as session,
            session.ws_connect(f"{self.url}/ws?clientId={client_id}", max_msg_size=0) as ws,
        ):
            # the first message must be this one, or no previews are sent
            await ws.send_json({"type": "feature_flags", "data": {"supports_preview_metadata": True}})
            answer = self.post(graph, client_id=client_id, **extra)
            if isinstance(answer, dict):
                return Run("", "refused", refusal=answer)
            while True:
                left = deadline - time.monotonic()
                try:
                    message = await asyncio.wait_for(ws.receive(), max(left, 0.01))
                except asyncio.TimeoutError:  # noqa: UP041  another class until Python 3.11
                    raise AssertionError(f"no end after {timeout} s; the log ends\n{self.log_tail()}") from None
                assert message.type in (aiohttp.WSMsgType.TEXT, aiohttp.WSMsgType.BINARY), self.log_tail()
                if message.type == aiohttp.WSMsgType.BINARY:
                    event = binary_event(message.data)
                else:
                    said = json.loads(message.data)
                    event = Event(said["type"], said["data"], time.monotonic())
                events.append(event)
                if on_event is not None:
                    on_event(event)
                if event.kind == "executing" and event.data["node"] is None and event.data["prompt_id"] == answer:
                    break
        past = self.history(answer)
        messages = past["status"]["messages"]
        refusal = {"node_errors": self.node_errors} if self.node_errors else {}
        return Run(answer, status_of(past["status"]["completed"], messages), past["outputs"], messages, events, refusal)

    def kill(self) -> None:
        """As a power cut would."""
        self.process.kill()
        self.process.wait()

    def stop(self) -> None:
        self.process.terminate()
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.kill()
