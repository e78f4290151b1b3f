"""Makes workflows/*.json, their API forms and thumbnails in ComfyUI's own page: python tests/comfyui/make_workflows.py

Run it after a node's inputs have changed. What is written is what the page itself would save.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from browser import ComfyPage, launched
from inprocess import PACK, ROOT, new_base
from live import Server
from PIL import Image

HUB = "https://huggingface.co/Comfy-Org"
MODELS = {
    "UNETLoader": ("z_image_turbo_bf16", f"{HUB}/z_image_turbo/resolve/main/split_files/", "diffusion_models"),
    "CLIPLoader": ("qwen_3_4b", f"{HUB}/z_image_turbo/resolve/main/split_files/", "text_encoders"),
    "VAELoader": ("ae", f"{HUB}/z_image_turbo/resolve/main/split_files/", "vae"),
    "DOPSD_LoadTeacherVision": ("qwen3vl_4b_fp8_scaled", f"{HUB}/Qwen3-VL/resolve/main/", "text_encoders"),
}
"""Loader -> (file, where its repository keeps it, folder), as in ComfyUI's own templates."""


@dataclass
class Node:
    """A node of a workflow: `values` are widget values by name, `links` say input = (node, output slot)."""

    kind: str
    pos: tuple[int, int]
    size: tuple[int, int]
    values: dict[str, Any] = field(default_factory=dict)
    links: dict[str, tuple[str, int]] = field(default_factory=dict)
    title: str = ""


@dataclass
class Workflow:
    nodes: dict[str, Node]
    groups: list[tuple[str, tuple[int, int, int, int], str]]  # title, (x, y, width, height), colour


def note(pos: tuple[int, int], size: tuple[int, int], text: str) -> Node:
    return Node("MarkdownNote", pos, size, {"": text})


def loaders(top: int = 60) -> dict[str, Node]:
    """Z-Image-Turbo's three files, as in ComfyUI's own template."""
    return {
        "model": Node("UNETLoader", (0, top), (340, 90), {"unet_name": "z_image_turbo_bf16.safetensors"}),
        "clip": Node(
            "CLIPLoader", (0, top + 140), (340, 110), {"clip_name": "qwen_3_4b.safetensors", "type": "lumina2"}
        ),
        "vae": Node("VAELoader", (0, top + 300), (340, 60), {"vae_name": "ae.safetensors"}),
    }


DEMO_PROMPTS = (
    "a [V] badge, left, on a white background\n"
    "a [V] badge, middle, on a navy background\n"
    "a badge, top, on a sand background"
)


def quickstart() -> Workflow:
    model, clip, vae, vision = (("models", slot) for slot in range(4))
    nodes = {
        "models": Node("DOPSD_LoadDemoModels", (0, 60), (360, 110)),
        "data": Node("DOPSD_LoadDataset", (0, 230), (360, 560), {"folder": "demo badge (built in)", "resolution": 64}),
        "conditions": Node(
            "DOPSD_BuildTeacherCondition",
            (420, 60),
            (400, 340),
            {"preview_prompts": DEMO_PROMPTS},
            {"dataset": ("data", 0), "clip": clip, "vae": vae, "vision": vision},
        ),
        "look": Node(
            "DOPSD_TeacherPreview",
            (420, 470),
            (400, 620),
            links={"model": model, "conditions": ("conditions", 0), "vae": vae},
        ),
        "train": Node(
            "DOPSD_TrainLoRA",
            (880, 60),
            (460, 1030),
            {"run_name": "demo_badge", "preset": "demo model", "preview_every": 20},
            {"model": model, "conditions": ("conditions", 0), "vae": vae},
        ),
        "save": Node(
            "DOPSD_SaveLoRA", (1400, 60), (420, 150), {"filename_prefix": "loras/demo_badge"}, {"lora": ("train", 0)}
        ),
        "compare": Node(
            "DOPSD_CompareLoRA",
            (1400, 270),
            (420, 820),
            {
                "prompts": "a [V] badge, right, on a forest background\na [V] badge, bottom, on a sky background\n"
                "a badge, left, on a gray background",
                "strengths": "0.5, 1.0",
                "width": 64,
                "height": 64,
            },
            {"model": model, "clip": clip, "vae": vae, "lora": ("train", 0)},
        ),
        "plot": Node(
            "LossGraphNode", (1880, 60), (460, 420), {"filename_prefix": "loss_graph"}, {"loss": ("train", 1)}
        ),
        "strip": Node(
            "PreviewImage", (1880, 540), (460, 550), links={"images": ("train", 3)}, title="Every preview of the run"
        ),
        "note": note(
            (0, 850),
            (360, 240),
            "## Press Run\n\nA tiny model that ships with the pack learns a badge it has never seen from four "
            "pictures, in about "
            "two minutes on a CPU. No downloads.\n\n**Look at the teacher first**: the student becomes as good as "
            "its teacher "
            "and no better.\n\nCancel whenever you like: the next run goes on where it stopped. Then try your own "
            "pictures "
            "with *z_image_turbo_train*.",
        ),
    }
    return Workflow(
        nodes,
        [
            ("1 · Model and pictures", (-20, -10, 400, 1120), "#3f789e"),
            ("2 · Look at the teacher", (400, -10, 440, 1120), "#8A8"),
            ("3 · Train", (860, -10, 500, 1120), "#b58b2a"),
            ("4 · Keep and compare", (1380, -10, 980, 1120), "#a1309b"),
        ],
    )


def z_image_turbo_train() -> Workflow:
    model, clip, vae = ("model", 0), ("clip", 0), ("vae", 0)
    nodes = {
        **loaders(),
        "vision": Node(
            "DOPSD_LoadTeacherVision", (0, 480), (340, 60), {"vision_name": "qwen3vl_4b_fp8_scaled.safetensors"}
        ),
        "data": Node(
            "DOPSD_LoadDataset",
            (0, 600),
            (340, 560),
            {"folder": "my_concept", "resolution": 768, "trigger": "ohwx"},
        ),
        "conditions": Node(
            "DOPSD_BuildTeacherCondition",
            (420, 60),
            (400, 380),
            {"preview_prompts": "a photo of [V] on a wooden table\na photo of [V] in the snow"},
            {"dataset": ("data", 0), "clip": clip, "vae": vae, "vision": ("vision", 0)},
        ),
        "look": Node(
            "DOPSD_TeacherPreview",
            (420, 520),
            (400, 640),
            links={"model": model, "conditions": ("conditions", 0), "vae": vae},
        ),
        "train": Node(
            "DOPSD_TrainLoRA",
            (880, 60),
            (460, 1100),
            {"run_name": "my_concept", "preset": "standard", "preview_every": 100},
            {"model": model, "conditions": ("conditions", 0), "vae": vae},
        ),
        "save": Node(
            "DOPSD_SaveLoRA", (1400, 60), (460, 150), {"filename_prefix": "loras/my_concept"}, {"lora": ("train", 0)}
        ),
        "plot": Node(
            "LossGraphNode", (1400, 270), (460, 400), {"filename_prefix": "loss_graph"}, {"loss": ("train", 1)}
        ),
        "note": note(
            (1400, 730),
            (460, 430),
            "## Your concept on Z-Image-Turbo\n\n1. Make a folder in ComfyUI's `input`, say `my_concept`: 4 to 30 "
            "pictures, "
            "and for each a `.txt` of the same name that says what is to be seen. Write `[V]` where the concept is "
            "named.\n"
            "2. Choose it in **Load Dataset**, with a trigger word that means nothing yet.\n"
            "3. Bypass **D-OPSD Train LoRA** (Ctrl+B) for the first run and look at **Teacher Preview**: its second "
            "row is the "
            "best that training can reach.\n4. Train. Cancel whenever you like; the next run with the same settings "
            "goes on.\n\n"
            "`qwen3vl_4b` gives the teacher its eyes only: the words are read by Z-Image's own `qwen_3_4b`.\n\n"
            "These settings follow the paper; the pack has been measured on its demo model so far.",
        ),
    }
    return Workflow(
        nodes,
        [
            ("1 · Model and pictures", (-20, -10, 380, 1190), "#3f789e"),
            ("2 · Look at the teacher", (400, -10, 440, 1190), "#8A8"),
            ("3 · Train", (860, -10, 500, 1190), "#b58b2a"),
            ("4 · Keep", (1380, -10, 500, 1190), "#a1309b"),
        ],
    )


def z_image_turbo_sample() -> Workflow:
    nodes = {
        **loaders(),
        "lora": Node(
            "LoraLoaderModelOnly",
            (400, 60),
            (340, 90),
            {"lora_name": "my_concept_00001_.safetensors", "strength_model": 1.0},
            {"model": ("model", 0)},
        ),
        "prompt": Node(
            "CLIPTextEncode", (400, 200), (340, 160), {"text": "a photo of ohwx in the snow"}, {"clip": ("clip", 0)}
        ),
        "sample": Node(
            "DOPSD_FewStepSampler",
            (800, 60),
            (320, 300),
            {"sampler": "template"},
            {"model": ("lora", 0), "positive": ("prompt", 0)},
        ),
        "decode": Node("VAEDecode", (800, 410), (320, 60), links={"samples": ("sample", 0), "vae": ("vae", 0)}),
        "save": Node(
            "SaveImage", (1180, 60), (420, 480), {"filename_prefix": "dopsd/picture"}, {"images": ("decode", 0)}
        ),
        "note": note(
            (400, 410),
            (340, 130),
            "Choose your LoRA (press R after saving one). Eight steps, no guidance, no negative prompt: as the model "
            "was made.",
        ),
    }
    return Workflow(nodes, [])


def compare() -> Workflow:
    nodes = {
        **loaders(),
        "compare": Node(
            "DOPSD_CompareLoRA",
            (400, 60),
            (440, 560),
            {
                "prompts": "a photo of ohwx on a wooden table\na photo of ohwx in the snow\na photo of a dog in the "
                "snow",
                "strengths": "0.5, 1.0",
                "width": 768,
                "height": 768,
                "lora_name": "my_concept_00001_.safetensors",
            },
            {"model": ("model", 0), "clip": ("clip", 0), "vae": ("vae", 0)},
        ),
        "save": Node(
            "SaveImage", (900, 60), (560, 560), {"filename_prefix": "dopsd/compare"}, {"images": ("compare", 0)}
        ),
        "note": note(
            (0, 480),
            (340, 220),
            "One row per prompt, one column per strength, the same noise along a row. Keep a prompt **without** the "
            "trigger: "
            "it should look the same in every column.",
        ),
    }
    return Workflow(nodes, [])


WORKFLOWS = {
    "quickstart": quickstart,
    "z_image_turbo_train": z_image_turbo_train,
    "z_image_turbo_sample": z_image_turbo_sample,
    "compare": compare,
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
        if (models[n.kind]) node.properties.models = [models[n.kind]];
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
    links = {
        kind: {"name": f"{file}.safetensors", "url": f"{base}{folder}/{file}.safetensors", "directory": folder}
        for kind, (file, base, folder) in MODELS.items()
    }
    page.page.evaluate(BUILD, [nodes, workflow.groups, links])
    page.page.wait_for_timeout(500)
    return page.saved()


def thumbnail(page: ComfyPage, path: Path) -> None:
    """The graph as it looks on the canvas, cropped to it."""
    page.page.evaluate("() => window.app.extensionManager.command.execute('Comfy.Canvas.FitView')")
    page.page.wait_for_timeout(1500)
    shot = page.screenshot(path.stem)
    with Image.open(shot) as image:
        canvas = image.convert("RGB").crop((70, 100, image.width - 20, image.height - 60))
        nodes = canvas.convert("L").point(lambda grey: 255 if grey > 40 else 0).getbbox()
        graph = canvas.crop(nodes)
        graph.thumbnail((768, 768))
        graph.save(path, quality=90)


def pretend_files(base: Path) -> None:
    """Empty files of the names that the workflows ask for, so that the page does not call them missing."""
    names = [f"{folder}/{file}.safetensors" for file, _, folder in MODELS.values()]
    for name in (*names, "loras/my_concept_00001_.safetensors"):
        path = base / "models" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    (base / "input" / "my_concept").mkdir()
    Image.new("RGB", (64, 64)).save(base / "input" / "my_concept" / "1.png")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
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
            for name, make in WORKFLOWS.items():
                page = ComfyPage(chromium, server.url, args.shots)
                saved = build(page, make())
                saved["workflow"].get("extra", {}).pop("ds", None)  # where this page happened to look
                for path, value in (
                    (folder / f"{name}.json", saved["workflow"]),
                    (folder / "api" / f"{name}.json", saved["output"]),
                ):
                    path.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
                thumbnail(page, folder / f"{name}.jpg")
                page.close()
    finally:
        server.stop()
    print(f"written for {PACK}; look at the screenshots in {args.shots}")


if __name__ == "__main__":
    main()
