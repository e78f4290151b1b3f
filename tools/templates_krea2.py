"""Krea 2 Turbo's workflows: a look at the teacher, a concept, and sampling."""

from __future__ import annotations

from templates import GO, IMAGES, LOOK, Node, Workflow, conditions, data, loaders, lora_of, note, train
from templates_klein import UNTRIED

PREVIEWS = "a photo of [V] on a wooden table\na photo of [V] in the snow"


def krea2_loaders() -> dict[str, Node]:
    """Krea 2 Turbo's three files."""
    return loaders("krea2_turbo_fp8_scaled", "krea2", "qwen_image_vae", clip="qwen3vl_4b_fp8_scaled")


def begun() -> dict[str, Node]:
    """Files, dataset and conditions."""
    return {**krea2_loaders(), "data": data(480, 1260, "my_concept"), "conditions": conditions(PREVIEWS)}


def krea2_train() -> Workflow:
    """A concept of one's own on Krea 2 Turbo."""
    text = (
        f"## Your concept on Krea 2 Turbo\n\n{IMAGES}{LOOK}{GO}"
        "Krea 2's text encoder can see: the teacher reads each image through it, and no further file is needed.\n\n"
        f"{UNTRIED}"
    )
    return train(begun(), "my_concept_krea2", text)


def krea2_teacher_preview() -> Workflow:
    """What the teacher draws before any training."""
    nodes = {
        **begun(),
        "look": Node(
            "DOPSD_TeacherPreview",
            (880, 60),
            (760, 1200),
            links={"model": ("model", 0), "conditions": ("conditions", 0), "vae": ("vae", 0)},
        ),
        "note": note(
            (420, 680),
            (400, 580),
            "## Look at the teacher first\n\nTop row: your images. Second row: the teacher, what the untrained model "
            "draws when its text encoder **sees** the image and reads the caption. Third row: the student, what it "
            "draws from the caption alone.\n\nTraining brings the third row to the second, and no further.\n\n"
            "- **Good:** the second row has your concept, sharp, and follows the caption.\n"
            "- **Bad:** it looks like the third row, is blurred or garbled, or shows the wrong thing. Change images "
            "and captions before you train. If it never resembles the images, this teacher cannot teach it.\n\n"
            "Then open *krea2_train* with the same data: what was encoded here is kept on disk.",
        ),
    }
    return Workflow(nodes, [])


def krea2_sample() -> Workflow:
    """Images with the LoRA."""
    nodes = {
        **krea2_loaders(),
        "lora": lora_of("my_concept_krea2"),
        "prompt": Node(
            "CLIPTextEncode", (400, 200), (340, 160), {"text": "a photo of ohwx in the snow"}, {"clip": ("clip", 0)}
        ),
        "sample": Node(
            "DOPSD_FewStepSampler", (800, 60), (320, 300), links={"model": ("lora", 0), "positive": ("prompt", 0)}
        ),
        "decode": Node("VAEDecode", (800, 410), (320, 60), links={"samples": ("sample", 0), "vae": ("vae", 0)}),
        "save": Node(
            "SaveImage", (1180, 60), (420, 480), {"filename_prefix": "dopsd/image"}, {"images": ("decode", 0)}
        ),
        "note": note(
            (400, 410),
            (340, 130),
            "Choose your LoRA (press R after saving one). Eight steps, no guidance, no negative prompt: as the model "
            "was made.",
        ),
    }
    return Workflow(nodes, [])
