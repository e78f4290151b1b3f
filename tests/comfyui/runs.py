"""What a run of a graph gave: the same for the executor in this process and for a server."""

from __future__ import annotations

import io
import json
import struct
import time
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from PIL import Image


class Event(NamedTuple):
    """One message to the client: ComfyUI's name for it, or "text" / "preview" for the binary ones."""

    kind: str
    data: Any
    at: float


@dataclass
class Run:
    prompt_id: str
    status: str  # "success", "error", "interrupted", or "refused" when validation did not let it in
    outputs: dict[str, dict] = field(default_factory=dict)  # what the nodes show, by node id
    messages: list = field(default_factory=list)  # the history's [name, data] pairs
    events: list[Event] = field(default_factory=list)
    refusal: dict = field(default_factory=dict)  # the body of the 400: "error" and "node_errors"
    values: dict[str, list[list]] = field(default_factory=dict)  # in-process only: node id -> output slot -> values

    def value(self, node: str, slot: int = 0) -> Any:
        """The one value of an output slot, as the next node would have received it."""
        (value,) = self.values[node][slot]
        return value

    def message(self, name: str) -> dict:
        """The data of the last status message of this name, {} if there was none."""
        return next((data for kind, data in reversed(self.messages) if kind == name), {})

    @property
    def error(self) -> str:
        """The sentence the user reads, "" after success."""
        if self.refusal:
            errors = [e for node in self.refusal["node_errors"].values() for e in node["errors"]]
            return "\n".join(e["details"] or e["message"] for e in errors) or self.refusal["error"]["message"]
        return self.message("execution_error").get("exception_message", "").strip()

    def of(self, kind: str, node: str | None = None) -> list[Event]:
        """Events of one kind, of one node if given."""
        keys = ("node", "node_id")
        return [e for e in self.events if e.kind == kind and (node is None or node in [e.data.get(k) for k in keys])]

    def texts(self, node: str | None = None) -> list[str]:
        return [e.data["text"] for e in self.of("text", node)]

    def previews(self, node: str | None = None) -> list[Image.Image]:
        return [e.data["image"] for e in self.of("preview", node)]


def status_of(success: bool, messages: list) -> str:
    """The history calls an interrupt an error too."""
    if any(kind == "execution_interrupted" for kind, _ in messages):
        return "interrupted"
    return "success" if success else "error"


def text_event(body: bytes) -> Event:
    length = struct.unpack(">I", body[:4])[0]
    node, text = body[4 : 4 + length].decode(), body[4 + length :].decode()
    return Event("text", {"node": node, "text": text}, time.monotonic())


def binary_event(frame: bytes) -> Event:
    """A websocket frame: big-endian event number, then its body (1 image, 3 text, 4 image with metadata)."""
    number, body = struct.unpack(">I", frame[:4])[0], frame[4:]
    if number == 3:
        return text_event(body)
    length = struct.unpack(">I", body[:4])[0] if number == 4 else 0
    about = json.loads(body[4 : 4 + length]) if length else {}
    image = Image.open(io.BytesIO(body[4 + length :]))
    image.load()
    return Event("preview", {**about, "image": image}, time.monotonic())
