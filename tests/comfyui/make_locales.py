"""Writes locales/en/nodeDefs.json from what the nodes' schemas say, and tells what locales/zh lacks or has too much.

    python tests/comfyui/make_locales.py

The Python is one that ComfyUI runs in. The Chinese is written by hand.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import inprocess

LOCALES = inprocess.ROOT / "locales"
CONTROL = "control_after_generate"  # the page puts this one under a seed by itself


def locale_file(language: str) -> Path:
    return LOCALES / language / "nodeDefs.json"


def read(language: str) -> dict[str, Any]:
    """{} where there is none yet."""
    file = locale_file(language)
    return json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}


def schema_texts(nodes: Mapping[str, Any]) -> dict[str, Any]:
    """Every text of the node classes that users read, in the form of a nodeDefs.json."""
    return {name: _node_texts(node.GET_SCHEMA()) for name, node in nodes.items()}


def _node_texts(schema: Any) -> dict[str, Any]:
    inputs: dict[str, Any] = {}
    for given in schema.inputs:
        inputs[given.id] = {"name": given.display_name or given.id, "tooltip": given.tooltip}
        if getattr(given, CONTROL, None):
            inputs[CONTROL] = {"name": "control after generate"}
    outputs = {str(i): {"name": o.display_name or o.id, "tooltip": o.tooltip} for i, o in enumerate(schema.outputs)}
    texts = {"display_name": schema.display_name, "description": schema.description}
    return {**texts, **({"inputs": inputs} if inputs else {}), **({"outputs": outputs} if outputs else {})}


def places(texts: Any, place: str = "") -> dict[str, Any]:
    """Each text under the place that it stands at: {"DOPSD_SaveLoRA.inputs.lora.name": "lora"}."""
    if not isinstance(texts, Mapping):
        return {place: texts}
    return {at: text for key, value in texts.items() for at, text in places(value, f"{place}.{key}".strip(".")).items()}


def main() -> int:
    inprocess.put_first_on_path()
    with tempfile.TemporaryDirectory() as folder:
        comfyui = inprocess.ComfyUI(inprocess.new_base(Path(folder)))
        texts = schema_texts(comfyui.pack_nodes)
        comfyui.close()
    before, after, chinese = places(read("en")), places(texts), places(read("zh"))
    file = locale_file("en")
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(texts, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
    problems = [f"zh lacks {place}: {after[place]}" for place in after if not chinese.get(place)]
    problems += [f"zh has {place}, which no node has" for place in chinese if place not in after]
    changed = [place for place in after if place in before and before[place] != after[place]]
    print("\n".join([*problems, *(f"changed in en, look at zh: {place}: {after[place]}" for place in changed)]))
    print(f"{file}: {len(after)} texts of {len(texts)} nodes, {len(changed)} changed; {len(problems)} problems in zh")
    return bool(problems)


if __name__ == "__main__":
    sys.exit(main())
