"""Makes sure that no node of ours is silently left out of a run.

ComfyUI validates each output node of a prompt separately: it drops the invalid ones, runs the others and reports
success. Load Dataset and Teacher Preview are output nodes, so a run with an invalid D-OPSD Train LoRA would succeed
without a LoRA. Here such a prompt is rejected as a whole, with HTTP 400 and ComfyUI's own list of errors. If a prompt
reaches ComfyUI's executor without its server, the first of our nodes that runs raises an error instead.
"""

from __future__ import annotations

import asyncio
import copy
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import execution
from comfy_execution.graph_utils import is_link
from server import PromptServer

from .sent_values import OURS, checked_graph

Graph = Mapping[str, Mapping[str, Any]]
"""A prompt in API form: node id -> class_type and inputs."""

_CHECKED = "dopsd_checked"
"""Key in a prompt's extra_data: it has been checked by `refuse_in_part`."""


class LeftOutError(ValueError):
    """Nodes of ours are invalid, and ComfyUI would run the rest of the graph without them."""


@dataclass(frozen=True)
class LeftOut:
    """What ComfyUI would drop of a prompt.

    Attributes:
        outputs: ids of dropped output nodes that need a node of ours.
        errors: ComfyUI's `node_errors`, by node id.
    """

    outputs: tuple[str, ...]
    errors: Mapping[str, Mapping[str, Any]]

    def describe(self, graph: Graph) -> str:
        """One line: which nodes are dropped, and which inputs are invalid."""
        return (
            f"{'; '.join(_sentences(graph, self.errors))}. ComfyUI would leave {_titles(graph, self.outputs)} out of "
            "this run without an error: correct the input, or remove the node"
        )


def find_left_out(graph: Graph, targets: Collection[str] | None = None) -> LeftOut | None:
    """The output nodes that ComfyUI would drop and that need a node of ours; None if there are none, or if ComfyUI
    rejects the whole graph anyway.

    Args:
        targets: the only output nodes to run; None for all.
    """
    if not any(_is_ours(graph, node) for node in graph):
        return None
    valid, _, good, errors = _validate(copy.deepcopy(dict(graph)), targets)
    if not valid or not errors:
        return None
    runs = _needed(graph, good)
    dropped = [node for node in graph if _is_output(graph, node) and node not in good]
    asked = [node for node in dropped if targets is None or node in targets]
    outputs = [node for node in asked if any(_is_ours(graph, part) for part in _needed(graph, [node]) - runs)]
    return LeftOut(tuple(outputs), errors) if outputs else None


def register() -> None:
    """Checks every prompt that ComfyUI's server receives with `refuse_in_part`, after the handlers of other packs.

    Those may change the graph. They are registered while packs load, so this one is registered with the first prompt.
    """
    server, joined = PromptServer.instance, []

    def join(request: dict[str, Any]) -> dict[str, Any]:
        if not joined:
            joined.append(True)
            server.add_on_prompt_handler(refuse_in_part)
        return request

    server.add_on_prompt_handler(join)


def refuse_in_part(request: dict[str, Any]) -> dict[str, Any]:
    """The body of POST /prompt, with the constants of our nodes in their kinds (`sent_values`).

    If ComfyUI would drop output nodes that need a node of ours, it then only validates these nodes and answers with
    HTTP 400 and their errors.
    """
    graph, extra = request.get("prompt"), request.setdefault("extra_data", {})
    if not isinstance(graph, dict) or not isinstance(extra, dict):
        return request
    graph = copy.deepcopy(graph)
    PromptServer.instance.node_replace_manager.apply_replacements(graph)
    graph = checked_graph(graph)
    found = find_left_out(graph, request.get("partial_execution_targets"))
    extra[_CHECKED] = True
    request = request | {"prompt": graph}
    return request | {"partial_execution_targets": list(found.outputs)} if found else request


def require_whole_graph(node: Any) -> None:
    """Checks the graph that is running.

    Args:
        node: a node class with the hidden input prompt; every output node has it.

    Raises:
        LeftOutError: ComfyUI has dropped nodes of ours as invalid.
    """
    graph = node.hidden.prompt if node.hidden is not None else None
    if not graph or _is_checked():
        return
    if found := find_left_out(_as_sent(graph)):
        raise LeftOutError(found.describe(graph))


def _is_checked() -> bool:
    """Whether `refuse_in_part` has checked the running prompt; nodes that nobody asked for may be left out then."""
    running, _ = PromptServer.instance.prompt_queue.get_current_queue_volatile()
    return any(_CHECKED in item[3] for item in running)


def _validate(graph: Graph, targets: Collection[str] | None) -> tuple[bool, Any, list[str], dict[str, Any]]:
    """ComfyUI's own validation, which may change the graph; in a thread without an event loop."""
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(asyncio.run, execution.validate_prompt("dopsd", graph, targets)).result()  # type: ignore


def _as_sent(graph: Graph) -> Graph:
    """The running graph as its client sent it: validation has unwrapped lists, and would now read them as links.

    No input of our own nodes is a list.
    """
    return {
        id: node if _is_ours(graph, id) else {**node, "inputs": _wrapped(node.get("inputs", {}))}
        for id, node in graph.items()
    }


def _wrapped(inputs: Mapping[str, Any]) -> dict[str, Any]:
    return {
        name: {"__value__": value} if isinstance(value, list) and not is_link(value) else value
        for name, value in inputs.items()
    }


def _is_ours(graph: Graph, node: str) -> bool:
    return str(graph[node].get("class_type", "")).startswith(OURS)


def _is_output(graph: Graph, node: str) -> bool:
    kind = execution.nodes.NODE_CLASS_MAPPINGS.get(graph[node].get("class_type"))
    return getattr(kind, "OUTPUT_NODE", False) is True


def _needed(graph: Graph, wanted: Iterable[str]) -> set[str]:
    """The nodes that `wanted` are computed from, including `wanted`."""
    found: set[str] = set()
    rest = list(wanted)
    while rest:
        node = rest.pop()
        if node not in found and node in graph:
            found.add(node)
            rest += [value[0] for value in graph[node].get("inputs", {}).values() if is_link(value)]
    return found


def _titles(graph: Graph, ids: Iterable[str]) -> str:
    """The titles of nodes as the page shows them, with their ids."""
    return ", ".join(f"{_title(graph, node)} (node {node})" for node in ids)


def _title(graph: Graph, node: str) -> str:
    kind = graph[node].get("class_type", "")
    return execution.nodes.NODE_DISPLAY_NAME_MAPPINGS.get(kind) or kind


def _sentences(graph: Graph, errors: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Each node, input and problem once."""
    lines = []
    for node, of in errors.items():
        shared = Counter(_own_message(error) for error in of["errors"])
        lines += [f"{_titles(graph, [node])}: {_sentence(error, shared)}" for error in of["errors"]]
    return list(dict.fromkeys(lines))


def _own_message(error: Mapping[str, Any]) -> str:
    """The message of a node's own check, which ComfyUI gives for each input that the check names; else ""."""
    name, details = error.get("extra_info", {}).get("input_name", ""), str(error["details"])
    return details.removeprefix(f"{name} - ") if error["type"] == "custom_validation_failed" else ""


def _sentence(error: Mapping[str, Any], shared: Counter[str]) -> str:
    name, details = error.get("extra_info", {}).get("input_name", ""), str(error["details"])
    if own := _own_message(error):
        return own if shared[own] > 1 else f"{name}: {own}"
    about = f" ({details})" if details not in ("", name) else ""
    return f"{name}: {error['message']}{about}" if name else f"{error['message']}{about}"
