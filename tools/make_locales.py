"""Writes locales/en/nodeDefs.json from the nodes' schemas, and the options table of Training Settings' help
page from their declarations; lists what locales/zh lacks or has too much.

    python tools/make_locales.py

The Python is one that ComfyUI runs in. The Chinese is written by hand.
"""

from __future__ import annotations

import _paths  # noqa: F401  first: it is what finds the others

# isort: split

import json
import sys
import tempfile
from collections.abc import Mapping
from itertools import dropwhile
from pathlib import Path
from typing import Any

import inprocess

LOCALES = inprocess.ROOT / "locales"
SETTINGS_HELP = inprocess.ROOT / "web" / "docs" / "DOPSD_TrainingSettings.md"
TABLE_HEAD = "| input | values | what it does |\n|---|---|---|\n"
CONTROL = "control_after_generate"  # a widget that the page adds under a seed


def locale_file(language: str) -> Path:
    """The texts of a language, "en" or "zh"."""
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


def options_table(comfyui: inprocess.ComfyUI) -> str:
    """The table of all options for the help page of Training Settings: id, choices or bounds and default, help."""
    settings, options = comfyui.module("nodes.comfy_host.settings"), comfyui.core("options")
    rows = (" | ".join(_escaped(cell) for cell in row) for row in options.help_rows(settings.shown_options()))
    return TABLE_HEAD + "".join(f"| {row} |\n" for row in rows)


def with_table(page: str, table: str) -> str:
    """The help page with this table in the place of its table of options."""
    before, head, rest = page.partition(TABLE_HEAD)
    if not head:
        raise ValueError(f"the help page has no table that starts with {TABLE_HEAD.splitlines()[0]!r}")
    after = dropwhile(lambda line: line.startswith("|"), rest.splitlines(keepends=True))
    return before + table + "".join(after)


def _escaped(cell: str) -> str:
    """As text of a Markdown table: no emphasis, no further column."""
    return cell.replace("*", r"\*").replace("|", r"\|")


def places(texts: Any, place: str = "") -> dict[str, Any]:
    """Each text under the place that it stands at: {"DOPSD_SaveLoRA.inputs.lora.name": "lora"}."""
    if not isinstance(texts, Mapping):
        return {place: texts}
    return {at: text for key, value in texts.items() for at, text in places(value, f"{place}.{key}".strip(".")).items()}


def main() -> int:
    """Writes the files; 1 if the Chinese lacks a text or has one too many, else 0."""
    inprocess.put_first_on_path()
    with tempfile.TemporaryDirectory() as folder:
        comfyui = inprocess.ComfyUI(inprocess.new_base(Path(folder)))
        texts, table = schema_texts(comfyui.pack_nodes), options_table(comfyui)
        comfyui.close()
    SETTINGS_HELP.write_text(with_table(SETTINGS_HELP.read_text(encoding="utf-8"), table), encoding="utf-8")
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
