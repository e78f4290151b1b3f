"""Constants of a prompt as its client sent them.

ComfyUI turns each constant into the input's kind before any node sees it: 2.9 steps are 2, `true` is 1 and "1_0" is 10,
a `null` for text is the word None, and "false" is true. The page sends the right kinds; a script may not. Here a value
that does not fit becomes one that ComfyUI reports, with HTTP 400.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from typing import Any, NoReturn

import execution

from ...dopsd_core.number_text import read_float, read_int
from ...dopsd_core.text import printable
from .running_graph import GraphNode, nodes_before, running_graph, running_id

OURS = "DOPSD_"
"""Start of the class types of our nodes."""


class Unfit(str):
    """A value that ComfyUI cannot convert: it answers with the message."""

    message: str

    @classmethod
    def of(cls, value: object, message: str) -> Unfit:
        """The value as text for the report, with what is wrong with it."""
        made = cls(value if isinstance(value, str) else repr(value))
        made.message = message
        return made

    def _refused(self) -> NoReturn:
        raise ValueError(self.message)

    __int__ = __float__ = __bool__ = __str__ = _refused  # type: ignore[assignment]

    def __format__(self, spec: str) -> str:
        return format("".join(self), spec)  # str.__format__ would ask __str__

    def __deepcopy__(self, memo: object) -> Unfit:
        return self


def checked_graph(graph: Mapping[str, Any]) -> dict[str, Any]:
    """The graph in API form, in which each constant of our nodes has its input's kind or is `Unfit`."""
    return {id: _checked_node(node) if is_ours(node) else node for id, node in graph.items()}


def is_ours(node: Any) -> bool:
    """Whether a node of a graph is of a class of ours that this ComfyUI knows, and has inputs."""
    kind = node.get("class_type") if isinstance(node, dict) else None
    known = isinstance(kind, str) and kind.startswith(OURS) and kind in execution.nodes.NODE_CLASS_MAPPINGS
    return known and isinstance(node.get("inputs"), dict)


def unread_inputs(cls: Any) -> tuple[str, ...]:
    """A note for each input of the running node that its class does not have.

    cls: the class, with the hidden input dynprompt.
    """
    return _unread(running_graph(cls).get(running_id(cls) or ""))


def unread_before(cls: Any) -> tuple[str, ...]:
    """The same for those of our nodes that the running one depends on, with their titles."""
    graph, id = running_graph(cls), running_id(cls) or ""
    titles, notes = execution.nodes.NODE_DISPLAY_NAME_MAPPINGS, []
    for before in sorted(set(nodes_before(graph, [id])) - {id}):
        kind = graph[before].get("class_type", "")
        notes += [f"{titles.get(kind, kind)}: {note}" for note in _unread(graph[before])]
    return tuple(notes)


def _unread(node: GraphNode | None) -> tuple[str, ...]:
    if node is None or not is_ours(node):
        return ()
    return tuple(f"{printable(name)} is not used: there is no such input" for name in unknown_inputs(node))


def unknown_inputs(node: Mapping[str, Any]) -> tuple[str, ...]:
    """The inputs that a node of a graph has and its class has not."""
    declared = _declared(node)
    return tuple(name for name in node["inputs"] if name not in declared)


def _checked_node(node: Mapping[str, Any]) -> dict[str, Any]:
    declared = _declared(node)
    inputs = {
        name: _checked_value(declared[name].get_io_type(), value) if name in declared else value
        for name, value in node["inputs"].items()
        if value is not None or name not in declared  # null: not given
    }
    return {**node, "inputs": inputs | dict(_misspelt(node, declared))}


def _declared(node: Mapping[str, Any]) -> dict[str, Any]:
    kind = execution.nodes.NODE_CLASS_MAPPINGS[node["class_type"]]
    return {declared.id: declared for declared in kind.define_schema().inputs}


def _misspelt(node: Mapping[str, Any], declared: Mapping[str, Any]) -> Iterator[tuple[str, Unfit]]:
    """An input that has no name of ours but nearly one: reported at that one, or at any that ComfyUI converts."""
    converted = [name for name, entry in declared.items() if entry.get_io_type() in _READERS]
    for name in unknown_inputs(node):
        near = difflib.get_close_matches(name, declared, n=1, cutoff=0.75)
        if near and converted:
            message = f"there is no input {name}; did you mean {near[0]}?"
            yield near[0] if near[0] in converted else converted[0], Unfit.of(name, message)


def _checked_value(kind: str, value: Any) -> Any:
    if kind not in _READERS or isinstance(value, list):  # a link
        return value
    if isinstance(value, dict) and "__value__" in value:  # how a client sends a list
        return {"__value__": _checked_value(kind, value["__value__"])}
    try:
        return _READERS[kind](value)
    except ValueError as error:
        return Unfit.of(value, str(error))


def _whole(value: Any) -> int:
    if isinstance(value, str):
        return read_int(value)
    if isinstance(value, bool) or not isinstance(value, int | float) or value != value // 1:
        raise ValueError("it must be a whole number")
    return int(value)


def _number(value: Any) -> float:
    if isinstance(value, str):
        return read_float(value)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError("it must be a number")
    return value


def _text(value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise ValueError("it must be text")
    return str(value)


def _truth(value: Any) -> bool:
    words = {"true": True, "false": False}
    if isinstance(value, str) and value.lower() in words:
        return words[value.lower()]
    if not isinstance(value, bool):
        raise ValueError("it must be true or false")
    return value


_READERS: Mapping[str, Any] = {"INT": _whole, "FLOAT": _number, "STRING": _text, "BOOLEAN": _truth}
"""By the kind of an input; what they raise is what is wrong."""
