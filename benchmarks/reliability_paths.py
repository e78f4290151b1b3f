"""A hundred attempts to reach outside of the folders that nodes may use, on a real server that writes down every file
that it opens.

    python -m benchmarks.reliability paths

Each attempt must be refused or stay inside: nothing of the secret is opened or listed, no file outside of ComfyUI's own
folders is written, and no answer holds the secret's text.
"""

from __future__ import annotations

import json
import os
import shutil
import urllib.error
import urllib.request
import uuid
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from benchmarks.journal import Progress
from benchmarks.reliability_attempts import (
    CANARY,
    GOOD,
    Attempt,
    Field,
    dataset_graph,
    png,
    saving_graph,
    training_graph,
)
from benchmarks.reliability_server import Server, booted, new_home
from benchmarks.reliability_trees import snapshot
from benchmarks.report import Section, Table

FORBIDDEN = ("/etc/passwd", "/proc/self/environ", "/dev/zero")
"""Read by an attempt, besides the secret, and by nothing that is in order."""


@dataclass(frozen=True)
class Answer:
    """What came of an attempt.

    Attributes:
        status: "success", "refused" or "error".
        message: the answer to the sender.
    """

    status: str
    message: str


def send(server: Server, attempt: Attempt) -> Answer:
    """Makes the attempt."""
    if attempt.upload is not None:
        return _http(_upload(server, attempt.upload))
    if attempt.view:
        return _http(urllib.request.Request(server.url + attempt.view.replace(" ", "%20")))
    run = server.run(attempt.graph or {})
    message = run.error or json.dumps(run.outputs) + " ".join(run.texts())
    return Answer("refused" if run.status == "refused" or run.refusal else run.status, message)


def _http(request: urllib.request.Request) -> Answer:
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(request, timeout=60) as answer:
            return Answer("success", answer.read().decode(errors="replace"))
    except urllib.error.HTTPError as error:
        return Answer("refused", f"{error.code} {error.read().decode(errors='replace')[:80]}")


def _upload(server: Server, fields: dict[str, str]) -> urllib.request.Request:
    mark = uuid.uuid4().hex
    form = f"--{mark}\r\nContent-Disposition: form-data; name="
    parts = [f'{form}"{name}"\r\n\r\n{value}\r\n'.encode() for name, value in fields.items()]
    head = f'{form}"image"; filename="up.png"\r\nContent-Type: image/png\r\n\r\n'
    body = b"".join(parts) + head.encode() + png() + f"\r\n--{mark}--\r\n".encode()
    return urllib.request.Request(
        f"{server.url}/upload/image", body, {"Content-Type": f"multipart/form-data; boundary={mark}"}
    )


class Audit:
    """What the server has opened, listed and changed since the last look."""

    def __init__(self, log: Path, field: Field) -> None:
        self._log, self._at = log, 0
        self._secret = (field.secret, field.base / "secret")
        self._own = field.base

    def new_lines(self) -> list[str]:
        """All of it."""
        with self._log.open("rb") as file:
            file.seek(self._at)
            lines = file.read().decode("utf-8", "surrogateescape").splitlines()
            self._at = file.tell()
        return lines

    def leaks(self) -> list[str]:
        """What must not be: the secret read, or anything outside of ComfyUI's folders changed."""
        return [line for line in self.new_lines() if self._is_leak(*line.partition("\t")[::2])]

    def _is_leak(self, event: str, path: str) -> bool:
        real = Path(os.path.realpath(path)) if "\0" not in path else Path(path)
        if any(real.is_relative_to(folder) for folder in self._secret) or path in FORBIDDEN:
            return True
        reads = event in ("open", "os.listdir", "os.scandir")
        return not reads and not real.is_relative_to(self._own) and "__pycache__" not in path


@contextmanager
def field_of(work: Path) -> Iterator[tuple[Server, Field, Audit]]:
    """A server with everything laid out, and its audit."""
    base = new_home(work / "home")
    field = Field(base, work / "secret", work / "sets")
    for folder in (field.secret, field.extra):
        shutil.rmtree(folder, ignore_errors=True)
    field.lay_out()
    paths, log = work / "extra.yaml", work / "audit.log"
    paths.write_text(f"owner:\n    dopsd_datasets: {field.extra}\n", encoding="utf-8")
    log.unlink(missing_ok=True)
    os.environ["DOPSD_AUDIT"] = str(log)
    try:
        with booted(base, "--extra-model-paths-config", str(paths)) as server:
            yield server, field, Audit(log, field)
    finally:
        del os.environ["DOPSD_AUDIT"]


def controls(server: Server) -> list[str]:
    """What is allowed and fails all the same; the attempts would prove nothing then."""
    graphs = {
        "a folder in input/": dataset_graph(GOOD), "the owner's folder": dataset_graph("sets/cats"),
        "saving": saving_graph("loras/x"), "a training": training_graph(),
    }  # fmt: skip
    runs = {name: server.run(graph) for name, graph in graphs.items()}
    return [f"{name}: {run.status} {run.error}" for name, run in runs.items() if run.status != "success"]


def measure(work: Path, limit: int = 0) -> Section:
    """Makes every attempt, or the first of each kind if `limit` is 1, and so on."""
    work = work / "paths"
    work.mkdir(parents=True, exist_ok=True)
    with field_of(work) as (server, field, audit):
        attempts = _first_of_each(field.attempts(), limit)
        failed = controls(server)
        seen = "\n".join(audit.new_lines())
        failed += [
            f"the audit did not see {name}" for name in (f"{GOOD}/a.png", "fine.safetensors") if name not in seen
        ]
        before = snapshot(field.secret), snapshot(field.base / "secret")
        progress, rows = Progress("attempts", len(attempts)), []
        for number, attempt in enumerate(attempts, 1):
            answer = send(server, attempt)
            leaks = audit.leaks() + (["the answer holds the secret"] if CANARY in answer.message else [])
            rows.append((attempt, Answer(answer.status, field.as_on_the_page(answer.message)), leaks))
            progress.show(number)
        if (snapshot(field.secret), snapshot(field.base / "secret")) != before:
            failed.append("the secret's folder was changed")
    return summary(rows, failed)


def _first_of_each(attempts: Sequence[Attempt], limit: int) -> list[Attempt]:
    seen: Counter[str] = Counter()
    chosen = []
    for attempt in attempts:
        seen[attempt.kind] += 1
        if not limit or seen[attempt.kind] <= limit:
            chosen.append(attempt)
    return chosen


def summary(rows: Sequence[tuple[Attempt, Answer, list[str]]], failed: Sequence[str]) -> Section:
    """The section of the page: every attempt with what came of it."""
    table = [(attempt.kind, _quoted(attempt.what), _shown(answer), _leak(leaks)) for attempt, answer, leaks in rows]
    leaking = sum(bool(leaks) for _, _, leaks in rows)
    refused = sum(answer.status != "success" for _, answer, _ in rows)
    notes = (
        f"{len(rows)} attempts: {refused} refused, {len(rows) - refused} stayed inside, {leaking} leaked. SECRET is a "
        "good dataset outside of everything that may be read, BASE is ComfyUI's base folder. Not the pack's, and left "
        "out: ComfyUI's own upload writes through a link that its owner has put into the input folder.",
        *(f"CONTROL FAILED: {one}" for one in failed),
    )
    return Section(
        key="paths",
        title="Attempts to reach outside",
        command="python -m benchmarks.reliability paths",
        passed=not leaking and not failed,
        table=Table(("what is abused", "how", "what came of it", "leak"), tuple(table)),
        notes=notes,
    )


def _quoted(text: str) -> str:
    text = text.encode("unicode_escape").decode()
    return f"`{text}`" if len(text) < 100 else f"`{text[:40]}...` ({len(text)} characters)"


def _shown(answer: Answer) -> str:
    if answer.status == "success":
        return "stays inside"
    first = answer.message.splitlines()[0] if answer.message else ""
    return f"{answer.status}: {first[:100]}"


def _leak(leaks: Sequence[str]) -> str:
    return f"LEAK: {leaks[0]}" if leaks else "none"
