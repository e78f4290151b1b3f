"""The graph that ComfyUI is running, as the node that runs sees it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from comfy_execution.graph_utils import is_link
from comfy_execution.utils import get_executing_context

GraphNode = Mapping[str, Any]
"""A node in API form: class_type and inputs."""

Follow = Callable[[GraphNode, int], bool]
"""Whether a link is followed to the node that it comes from, by that node and its output."""


def running_graph(cls: Any) -> Mapping[str, GraphNode]:
    """The whole graph by node id, also what nodes added to it while it runs; empty where nothing runs.

    cls: a node class with the hidden input dynprompt.
    """
    graph = cls.hidden.dynprompt if getattr(cls, "hidden", None) is not None else None
    return {} if graph is None else {id: graph.get_node(id) for id in graph.all_node_ids()}


def running_id(cls: Any) -> str | None:
    """The id of the node that runs; None where nothing runs.

    Loaders do not have the hidden input unique_id: with it ComfyUI would load their file again for another node.
    """
    if getattr(cls, "hidden", None) is not None and cls.hidden.unique_id is not None:
        return cls.hidden.unique_id
    context = get_executing_context()
    return None if context is None else context.node_id


def nodes_before(graph: Mapping[str, GraphNode], ids: Iterable[str], follow: Follow = lambda *_: True) -> list[str]:
    """The ids of the nodes and of all that they are computed from, each once."""
    found: dict[str, None] = {}
    rest = list(ids)
    while rest:
        id = rest.pop()
        if id in graph and id not in found:
            found[id] = None
            links = [(source, output) for source, output in links_of(graph[id]) if source in graph]
            rest += [source for source, output in links if follow(graph[source], output)]
    return list(found)


def links_of(node: GraphNode) -> Iterator[tuple[str, int]]:
    """(node id, output) of each input of the node that is a link."""
    for value in node.get("inputs", {}).values():
        if is_link(value):
            yield value[0], int(value[1])


def kind_of_output(kind: Any, output: int) -> str:
    """The socket type of an output of a node class; "" if it has none there, or the class is not known."""
    kinds: Sequence[Any] = getattr(kind, "RETURN_TYPES", ()) or ()
    return str(kinds[output]) if 0 <= output < len(kinds) else ""
