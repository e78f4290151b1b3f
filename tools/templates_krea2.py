"""Krea 2 Turbo's workflows: a look at the teacher, a concept, and sampling."""

from __future__ import annotations

from templates import GO, IMAGES, LOOK, PREVIEWS, Node, Workflow, conditions, data, loaders, preview, sample, train
from templates_klein import UNTRIED


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
    return preview(
        begun(),
        "## Look at the teacher first\n\nTop row: your images. Second row: the teacher, what the untouched model "
        "draws when its text encoder **sees** the image and reads the caption. Third row: the student, what it "
        "draws from the caption alone.\n\nTraining brings the third row to the second, and no further.\n\n"
        "- **Good:** the second row has your concept, sharp, and follows the caption.\n"
        "- **Bad:** it looks like the third row, is blurred or garbled, or shows the wrong thing. Change images "
        "and captions before you train. If it never resembles the images, this teacher cannot teach it.\n\n"
        "Then open *krea2_train* with the same data: what was encoded here is kept on disk.",
    )


def krea2_sample() -> Workflow:
    """Images with the LoRA."""
    return sample(krea2_loaders(), "my_concept_krea2", "Eight")
