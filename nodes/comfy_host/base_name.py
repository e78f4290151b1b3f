"""The name of the file that a MODEL was loaded from: for headers and reports, and to recognise undistilled checkpoints.

It identifies nothing (that is `identity.py`, by content).

| loader | where the name is |
|---|---|
| Load Diffusion Model (any weight_dtype), Load Checkpoint and its relatives, Load Demo Models | on the MODEL |
| GGUF and others that build the MODEL from tensors | in the graph: the one file that is named before the MODEL |
| the same behind a switch or a merge of two files, or outside of a graph | unknown, and the node says so |

LoRAs, samplings, compilation and other patches between loader and training clone the MODEL, and its name with it. The
files of CLIP and VAE are not named anywhere: their contents are in the identity of the conditions.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from functools import partial
from typing import Any

import execution
import folder_paths

from .running_graph import GraphNode, kind_of_output, links_of, nodes_before, running_graph, running_id

UNKNOWN = (
    "the file name of this MODEL is not known: its loader does not record it, and the graph does not name exactly one "
    "file before it; so the LoRA's header does not name its base model, and an undistilled checkpoint is not "
    "recognised by its name"
)
"""The note on a MODEL without a name, and the entry in the header of its LoRA."""

_FOLDERS = ("diffusion_models", "checkpoints")
_MODEL_KINDS = ("MODEL", "*", "COMFY_MATCHTYPE_V3")
"""Socket types over which a MODEL may come; the last two are those of switches."""

_TEXT_KINDS = ("STRING", "COMBO", "*")


def base_name(model: Any, node: Any = None) -> str:
    """The name of the file that the MODEL was loaded from; "" if that is not known.

    node: the node class that runs, with the hidden input dynprompt; None to look at the MODEL alone.
    """
    made_by = getattr(model, "cached_patcher_init", None)
    first = made_by[1][0] if made_by and made_by[1] else ""
    if isinstance(first, str) and first:
        return _last_part(first)
    return _named_in_graph(running_graph(node), running_id(node))


def _named_in_graph(graph: Mapping[str, GraphNode], id: str | None) -> str:
    """The one model file that is named by the nodes which the MODEL of node `id` comes from; "" for none or several."""
    if id is None:
        return ""
    sources = nodes_before(graph, [id], partial(_gives, _MODEL_KINDS))
    names = {name for source in sources if source != id for name in _files_of(graph, source)}
    return _last_part(names.pop()) if len(names) == 1 else ""


def _files_of(graph: Mapping[str, GraphNode], id: str) -> Iterator[str]:
    """The model files that a node names itself, or gets the names of from the nodes at its inputs."""
    links = [(source, output) for source, output in links_of(graph[id]) if source in graph]
    for place in (id, *(source for source, output in links if _gives(_TEXT_KINDS, graph[source], output))):
        for value in graph[place].get("inputs", {}).values():
            if isinstance(value, str) and any(folder_paths.get_full_path(folder, value) for folder in _FOLDERS):
                yield value


def _gives(kinds: Collection[str], node: GraphNode, output: int) -> bool:
    """Whether this output of the node is of one of these socket types."""
    return kind_of_output(execution.nodes.NODE_CLASS_MAPPINGS.get(node.get("class_type")), output) in kinds


def _last_part(path: str) -> str:
    return path.replace("\\", "/").rpartition("/")[2]
