"""Makes workflows/*.json and their API forms in ComfyUI's own page: python tools/make_workflows.py

Run it after a node's inputs have changed. What is written is what the page itself would save.
Thumbnails: make_images.py.
"""

from __future__ import annotations

import _paths  # noqa: F401  first: it is what finds the others

# isort: split

import argparse
import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

from browser import ComfyPage, launched
from inprocess import CHECKOUT, PACK, ROOT, new_base
from live import Server
from PIL import Image
from templates import (
    MODELS,
    Workflow,
    compare,
    z_image_turbo_sample,
    z_image_turbo_teacher_preview,
    z_image_turbo_train,
)
from templates_demo import quickstart
from templates_klein import klein_edit_sample, klein_edit_train, klein_sample, klein_train
from templates_krea2 import krea2_sample, krea2_teacher_preview, krea2_train
from templates_report_card import report_card

WORKFLOWS = {
    make.__name__: make
    for make in (
        quickstart,
        z_image_turbo_teacher_preview,
        z_image_turbo_train,
        z_image_turbo_sample,
        klein_train,
        klein_sample,
        klein_edit_train,
        klein_edit_sample,
        krea2_teacher_preview,
        krea2_train,
        krea2_sample,
        compare,
        report_card,
    )
}

BUILD = """([nodes, groups, models]) => {
    const graph = window.app.graph, made = {};
    graph.clear();
    for (const [title, [x, y, w, h], colour] of groups) {
        const group = new window.LGraphGroup(title);
        group.pos = [x, y]; group.size = [w, h]; group.color = colour;
        graph.add(group);
    }
    for (const [name, n] of Object.entries(nodes)) {
        const node = window.LiteGraph.createNode(n.kind);
        if (!node) throw new Error("no node " + n.kind);
        graph.add(node);
        node.pos = n.pos;
        if (n.title) node.title = n.title;
        for (const [key, value] of Object.entries(n.values)) {
            const widget = key ? node.widgets.find(w => w.name === key) : node.widgets[0];
            if (!widget) throw new Error(n.kind + " has no widget " + key);
            widget.value = value;
        }
        const files = Object.values(n.values).map(value => models[value]).filter(Boolean);
        if (files.length) node.properties.models = files;
        node.size = [Math.max(n.size[0], 1), Math.max(n.size[1], node.computeSize()[1])];
        made[name] = node;
    }
    for (const [name, n] of Object.entries(nodes))
        for (const [input, [from, slot]] of Object.entries(n.links)) {
            const index = made[name].inputs.findIndex(i => i.name === input);
            if (index < 0) throw new Error(n.kind + " has no input " + input);
            made[from].connect(slot, made[name], index);
        }
}"""


def build(page: ComfyPage, workflow: Workflow) -> dict[str, Any]:
    """What the page would save of the workflow: {"workflow", "output"}."""
    nodes = {name: {**vars(node)} for name, node in workflow.nodes.items()}
    page.page.evaluate(BUILD, [nodes, workflow.groups, MODELS])
    page.page.wait_for_timeout(500)
    return page.saved()


def look(page: ComfyPage, name: str) -> None:
    """A screenshot of the whole graph, to look at."""
    page.page.evaluate("() => window.app.extensionManager.command.execute('Comfy.Canvas.FitView')")
    page.page.wait_for_timeout(1500)
    page.screenshot(name)


def pretend_files(base: Path) -> None:
    """Empty files of the names that the workflows ask for, so that the page does not call them missing."""
    names = ("my_concept", "my_concept_klein", "my_edit_klein", "my_concept_krea2")
    loras = [f"loras/{name}_00001_.safetensors" for name in names]
    for name in (*(f"{model['directory']}/{file}" for file, model in MODELS.items()), *loras):
        path = base / "models" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    for name in ("my_concept", "my_edit", "my_edit/target", "my_edit/source"):
        (base / "input" / name).mkdir()
        Image.new("RGB", (64, 64)).save(base / "input" / name / "1.png")
    shutil.copy(CHECKOUT / "input" / "example.png", base / "input")


def main() -> None:
    """Writes every workflow in both forms, and a screenshot of each."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", choices=[[], *WORKFLOWS], help="only these")
    parser.add_argument("--shots", type=Path, default=Path(tempfile.mkdtemp()), help="where full screenshots go")
    args = parser.parse_args()
    args.shots.mkdir(parents=True, exist_ok=True)
    base = new_base(Path(tempfile.mkdtemp()))
    pretend_files(base)
    server = Server(base, args.shots / "server.log")
    server.send("/api/settings", {"LiteGraph.Canvas.MinFontSizeForLOD": 0})  # text at any zoom
    folder = ROOT / "workflows"
    (folder / "api").mkdir(parents=True, exist_ok=True)
    try:
        with launched() as chromium:
            for name in args.names or WORKFLOWS:
                make = WORKFLOWS[name]
                page = ComfyPage(chromium, server.url, args.shots)
                saved = build(page, make())
                saved["workflow"].get("extra", {}).pop("ds", None)  # where this page happened to look
                for path, value in (
                    (folder / f"{name}.json", saved["workflow"]),
                    (folder / "api" / f"{name}.json", saved["output"]),
                ):
                    path.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
                look(page, name)
                page.close()
    finally:
        server.stop()
    print(f"written for {PACK}; look at the screenshots in {args.shots}")


if __name__ == "__main__":
    main()
