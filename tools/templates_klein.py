"""FLUX.2-klein's workflows: a concept, an edit, and sampling of either."""

from __future__ import annotations

from templates import (
    GO,
    IMAGES,
    LOOK,
    PREVIEWS,
    Node,
    Workflow,
    conditions,
    data,
    decoded,
    loaders,
    lora_of,
    note,
    prompt_of,
    sample,
    train,
)

UNTRIED = "These settings follow the paper. Nobody has trained the real model with this pack yet."


def klein_loaders() -> dict[str, Node]:
    """FLUX.2-klein's three files."""
    return loaders("flux-2-klein-4b", "flux2", "flux2-vae")


def klein_train() -> Workflow:
    """A concept of one's own on FLUX.2-klein."""
    begun = {
        **klein_loaders(),
        "data": data(480, 1260, "my_concept"),
        "conditions": conditions(PREVIEWS),
    }
    text = (
        f"## Your concept on FLUX.2-klein\n\n{IMAGES}{LOOK}{GO}"
        "The teacher is klein's own editing branch, with your image as reference: no further file is "
        "needed. If it copies places and poses that the caption does not name, set **teacher_image** of Build Teacher "
        f"Condition to *other*.\n\n{UNTRIED}"
    )
    return train(begun, "my_concept_klein", text)


def klein_edit_train() -> Workflow:
    """An edit of one's own on FLUX.2-klein."""
    begun = {
        **klein_loaders(),
        "data": data(480, 1260, "my_edit", trigger=""),
        "conditions": conditions(""),
    }
    text = (
        "## An edit of your own on FLUX.2-klein\n\n"
        "1. Make a folder in ComfyUI's `input`, say `my_edit`, with two folders in it. `target/01.png` is a result "
        "that you want, `target/01.txt` the instruction that asks for it, `source/01.png` the image that it starts "
        "from. Several such triples that differ in everything but the edit.\n"
        f"2. Choose it in **Load Dataset**.\n{LOOK}{GO}"
        "Student and teacher both have the source as their reference; the teacher has the target too. Previews are "
        "drawn from the sources of your data, in order: without **preview_prompts** by their own instructions.\n\n"
        f"{UNTRIED}"
    )
    return train(begun, "my_edit_klein", text, "edit", 1000)


def klein_sample() -> Workflow:
    """Images with the LoRA of a concept."""
    return sample(klein_loaders(), "my_concept_klein", "Four")


def klein_edit_sample() -> Workflow:
    """An image edited with the LoRA of an edit."""
    nodes = {
        **klein_loaders(),
        "source": Node("LoadImage", (0, 480), (340, 380), {"image": "example.png"}),
        "lora": lora_of("my_edit_klein"),
        "prompt": prompt_of("make it winter"),
        "scale": Node(
            "ImageScaleToTotalPixels",
            (400, 480),
            (340, 130),
            {"upscale_method": "nearest-exact", "megapixels": 1.0, "resolution_steps": 16},
            {"image": ("source", 0)},
        ),
        "size": Node("GetImageSize", (400, 660), (340, 70), links={"image": ("scale", 0)}),
        "encode": Node("VAEEncode", (400, 790), (340, 60), links={"pixels": ("scale", 0), "vae": ("vae", 0)}),
        "reference": Node(
            "ReferenceLatent", (800, 60), (320, 60), links={"conditioning": ("prompt", 0), "latent": ("encode", 0)}
        ),
        "sample": Node(
            "DOPSD_FewStepSampler",
            (800, 180),
            (320, 300),
            links={"model": ("lora", 0), "positive": ("reference", 0), "width": ("size", 0), "height": ("size", 1)},
        ),
        "decode": decoded(530),
        "save": Node("SaveImage", (1180, 60), (480, 800), {"filename_prefix": "dopsd/edit"}, {"images": ("decode", 0)}),
        "note": note(
            (800, 650),
            (320, 210),
            "Choose your LoRA and an image. The instruction as in training; the result has the image's size, about "
            "one megapixel.\n\nMore images: another VAE Encode and Reference Latent each, one behind the other.",
        ),
    }
    return Workflow(nodes)
