"""The shipped workflows: which nodes, where, with which values, and where to download the models' files.

`make_workflows.py` builds them in ComfyUI's page. The quickstart is in `templates_demo.py`, FLUX.2-klein's are in
`templates_klein.py`, Krea 2's in `templates_krea2.py`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

HUB = "https://huggingface.co/Comfy-Org"
_PLACES = (
    ("diffusion_models", "z_image_turbo_bf16", "z_image_turbo/resolve/main/split_files"),
    ("diffusion_models", "flux-2-klein-4b", "flux2-klein/resolve/main/split_files"),
    ("text_encoders", "qwen_3_4b", "z_image_turbo/resolve/main/split_files"),
    ("text_encoders", "qwen3vl_4b_fp8_scaled", "Qwen3-VL/resolve/main"),
    ("diffusion_models", "krea2_turbo_fp8_scaled", "Krea-2/resolve/main"),
    ("vae", "ae", "z_image_turbo/resolve/main/split_files"),
    ("vae", "flux2-vae", "flux2-dev/resolve/main/split_files"),
    ("vae", "qwen_image_vae", "Krea-2/resolve/main"),
)
MODELS = {
    f"{file}.safetensors": {
        "name": f"{file}.safetensors",
        "url": f"{HUB}/{repository}/{folder}/{file}.safetensors",
        "directory": folder,
    }
    for folder, file, repository in _PLACES
}
"""File -> what a loader's node says of it, as in ComfyUI's own templates."""

COLOURS = ("#3f789e", "#8A8", "#b58b2a", "#a1309b")


@dataclass
class Node:
    """A node of a workflow.

    Attributes:
        kind: its class, such as "VAEDecode".
        pos: x and y of its top left corner.
        size: width and height; the height grows to what the page needs.
        values: its widgets' values by name; under "" that of the first widget.
        links: for each input the name of the node that it comes from, and which of that node's outputs.
        title: "" for the node's own.
    """

    kind: str
    pos: tuple[int, int]
    size: tuple[int, int]
    values: dict[str, Any] = field(default_factory=dict)
    links: dict[str, tuple[str, int]] = field(default_factory=dict)
    title: str = ""


@dataclass
class Workflow:
    """A graph.

    Attributes:
        nodes: by a name of their own, which the links use.
        groups: title, (x, y, width, height) and colour of each frame.
    """

    nodes: dict[str, Node]
    groups: list[tuple[str, tuple[int, int, int, int], str]] = field(default_factory=list)


def note(pos: tuple[int, int], size: tuple[int, int], text: str) -> Node:
    """A text on the canvas, in Markdown."""
    return Node("MarkdownNote", pos, size, {"": text})


def loaders(model: str, clip_type: str, vae: str, top: int = 60, clip: str = "qwen_3_4b") -> dict[str, Node]:
    """A family's three files, as in ComfyUI's own template."""
    return {
        "model": Node("UNETLoader", (0, top), (340, 90), {"unet_name": f"{model}.safetensors"}),
        "clip": Node("CLIPLoader", (0, top + 140), (340, 110), {"clip_name": f"{clip}.safetensors", "type": clip_type}),
        "vae": Node("VAELoader", (0, top + 300), (340, 60), {"vae_name": f"{vae}.safetensors"}),
    }


def z_image_loaders() -> dict[str, Node]:
    """Z-Image-Turbo's three files."""
    return loaders("z_image_turbo_bf16", "lumina2", "ae")


def z_image_vision() -> Node:
    """The file with the vision tower for Z-Image's teacher."""
    return Node("DOPSD_LoadTeacherVision", (0, 480), (340, 60), {"vision_name": "qwen3vl_4b_fp8_scaled.safetensors"})


def data(top: int, bottom: int, folder: str, trigger: str = "ohwx") -> Node:
    """Load Dataset for one's own images, from y = top to bottom."""
    values = {"folder": folder, "resolution": 768, "trigger": trigger}
    return Node("DOPSD_LoadDataset", (0, top), (340, bottom - top), values)


def conditions(previews: str, vision: tuple[str, int] | None = None) -> Node:
    """Build Teacher Condition behind "data", "clip" and "vae"; vision: the node and output of the vision tower."""
    links = {"dataset": ("data", 0), "clip": ("clip", 0), "vae": ("vae", 0)}
    if vision is not None:
        links["vision"] = vision
    return Node("DOPSD_BuildTeacherCondition", (420, 60), (400, 540), {"preview_prompts": previews}, links)


def train(begun: dict[str, Node], run_name: str, text: str, preset: str = "subject", steps: int = 1500) -> Workflow:
    """Teacher Preview, training and saving behind `begun`: the loaders, "data" and "conditions"."""
    model, encoded, vae = ("model", 0), ("conditions", 0), ("vae", 0)
    nodes = {
        **begun,
        "look": Node(
            "DOPSD_TeacherPreview", (420, 680), (400, 580), links={"model": model, "conditions": encoded, "vae": vae}
        ),
        "train": Node(
            "DOPSD_TrainLoRA",
            (880, 60),
            (460, 1200),
            {"run_name": run_name, "preset": preset, "steps": steps, "preview_every": 100},
            {"model": model, "conditions": encoded, "vae": vae},
        ),
        "save": Node(
            "DOPSD_SaveLoRA", (1400, 60), (460, 350), {"filename_prefix": f"loras/{run_name}"}, {"lora": ("train", 0)}
        ),
        "plot": Node(
            "LossGraphNode", (1400, 470), (460, 220), {"filename_prefix": "loss_graph"}, {"loss": ("train", 1)}
        ),
        "note": note((1400, 730), (460, 530), text),
    }
    return Workflow(nodes, frames("4 · Save", (380, 440, 500, 500), 1290))


def preview(begun: dict[str, Node], text: str) -> Workflow:
    """Teacher Preview alone behind `begun`: the loaders, "data" and "conditions"."""
    links = {"model": ("model", 0), "conditions": ("conditions", 0), "vae": ("vae", 0)}
    nodes = {
        **begun,
        "look": Node("DOPSD_TeacherPreview", (880, 60), (760, 1200), links=links),
        "note": note((420, 680), (400, 580), text),
    }
    return Workflow(nodes)


def frames(last: str, widths: tuple[int, ...], height: int) -> list[tuple[str, tuple[int, int, int, int], str]]:
    """The four frames of a training from left to right; last: the title of the last one."""
    titles = ("1 · Model and images", "2 · Look at the teacher", "3 · Train", last)
    places = zip(titles, (-20, 400, 860, 1380), widths, COLOURS, strict=True)
    return [(title, (x, -10, width, height), colour) for title, x, width, colour in places]


def lora_of(name: str) -> Node:
    """The loader of the LoRA that the training with this run name saves."""
    values = {"lora_name": f"{name}_00001_.safetensors", "strength_model": 1.0}
    return Node("LoraLoaderModelOnly", (400, 60), (340, 90), values, {"model": ("model", 0)})


def prompt_of(text: str) -> Node:
    """A prompt behind "clip"."""
    return Node("CLIPTextEncode", (400, 200), (340, 160), {"text": text}, {"clip": ("clip", 0)})


def decoded(top: int) -> Node:
    """The image of the latent that "sample" gives."""
    return Node("VAEDecode", (800, top), (320, 60), links={"samples": ("sample", 0), "vae": ("vae", 0)})


def sample(begun: dict[str, Node], run_name: str, steps: str, **values: str) -> Workflow:
    """Sampling with the LoRA of a run behind the loaders; steps: how many, as a word; values: the sampler's."""
    nodes = {
        **begun,
        "lora": lora_of(run_name),
        "prompt": prompt_of("a photo of ohwx in the snow"),
        "sample": Node(
            "DOPSD_FewStepSampler", (800, 60), (320, 300), {**values}, {"model": ("lora", 0), "positive": ("prompt", 0)}
        ),
        "decode": decoded(410),
        "save": Node(
            "SaveImage", (1180, 60), (420, 480), {"filename_prefix": "dopsd/image"}, {"images": ("decode", 0)}
        ),
        "note": note(
            (400, 410),
            (340, 130),
            f"Choose your LoRA (press R after saving one). {steps} steps, no guidance, no negative prompt: as the "
            "model was made.",
        ),
    }
    return Workflow(nodes)


PREVIEWS = "a photo of [V] on a wooden table\na photo of [V] in the snow"
IMAGES = (
    "1. Make a folder in ComfyUI's `input`, say `my_concept`: 4 to 30 images, and for each a `.txt` of the same name "
    "with its caption. Write `[V]` where the concept is named.\n"
    "2. Choose it in **Load Dataset**, with a trigger word that means nothing yet.\n"
)
LOOK = (
    "3. Select **Teacher Preview** and press the ▶ above it: only what it needs runs. The second row is the best that "
    "training can reach.\n"
)
GO = (
    "4. Press **Run**. Cancel at any time: the next run with the same settings resumes. For more options add a "
    "**Training Settings** node.\n\n"
)


def z_image_begun() -> dict[str, Node]:
    """Files, dataset and conditions."""
    return {
        **z_image_loaders(),
        "vision": z_image_vision(),
        "data": data(600, 1260, "my_concept"),
        "conditions": conditions(PREVIEWS, ("vision", 0)),
    }


def z_image_turbo_train() -> Workflow:
    """A concept of one's own on Z-Image-Turbo."""
    text = (
        f"## Your concept on Z-Image-Turbo\n\n{IMAGES}{LOOK}{GO}"
        "Of `qwen3vl_4b` only the vision encoder is used, for the teacher; prompts are read by Z-Image's own "
        "`qwen_3_4b`.\n\n"
        "These settings follow the paper. Nobody has trained the real model with this pack yet."
    )
    return train(z_image_begun(), "my_concept", text)


def z_image_turbo_teacher_preview() -> Workflow:
    """Only the teacher's images for that."""
    return preview(
        z_image_begun(),
        "## Look at the teacher first\n\nTop row: your images. Second row: the teacher, what the untouched model "
        "draws when it **sees** the image and reads the caption. Third row: the student, what it draws from the "
        "caption alone.\n\nTraining brings the third row to the second, and no further.\n\n"
        "- **Good:** the second row has your concept, sharp, and follows the caption.\n"
        "- **Bad:** it looks like the third row, is blurred or garbled, or shows the wrong thing. Change images "
        "and captions before you train.\n\n"
        "Then open *z_image_turbo_train* with the same data: what was encoded here is kept on disk.",
    )


def z_image_turbo_sample() -> Workflow:
    """Images with the LoRA of that training."""
    return sample(z_image_loaders(), "my_concept", "Eight", sampler="template")


def compare() -> Workflow:
    """A grid of prompts and strengths with a saved LoRA."""
    nodes = {
        **z_image_loaders(),
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
            "trigger: it should look the same in every column.",
        ),
    }
    return Workflow(nodes)
