"""The workflow that scores a LoRA."""

from __future__ import annotations

from templates import Node, Workflow, conditions, data, note, z_image_loaders, z_image_vision

PROMPTS = (
    "a photo of [V] on a wooden table\na photo of [V] in the snow\na photo of a dog in a park\n"
    "a portrait of an old fisherman\na street at night in the rain\na bowl of fruit, oil painting"
)


def report_card() -> Workflow:
    """LoRA Report Card on the LoRA of z_image_turbo_train."""
    nodes = {
        **z_image_loaders(),
        "vision": z_image_vision(),
        "data": data(600, 1260, "my_concept"),
        "conditions": conditions("a photo of [V] on a wooden table\na photo of [V] in the snow", ("vision", 0)),
        "card": Node(
            "DOPSD_LoRAReportCard",
            (880, 60),
            (460, 1200),
            {
                "prompts": PROMPTS,
                "strengths": "0.5, 1.0",
                "resolution": 768,
                "lora_name": "my_concept_00001_.safetensors",
            },
            {
                "model": ("model", 0), "clip": ("clip", 0), "vae": ("vae", 0), "dataset": ("data", 0),
                "conditions": ("conditions", 0),
            },
        ),
        "save": Node(
            "SaveImage", (1400, 60), (560, 1200), {"filename_prefix": "dopsd/report_card"}, {"images": ("card", 0)}
        ),
        "note": note(
            (420, 680),
            (400, 580),
            "## Score a LoRA\n\nChoose the dataset that it was trained on, the same trigger, and the LoRA. Each prompt "
            "is drawn with and without it from the same noise.\n\n"
            "- **Concept:** the gap to the teacher falls; with weights of DINO or LPIPS, images are close to their "
            "source.\n"
            "- **Following:** needs weights of CLIP.\n"
            "- **Few steps:** as sharp as before.\n"
            "- **Retention:** ordinary prompts give almost the same image; 100 % of the noise floor means as far as "
            "with other noise.\n\n"
            "Weights of metrics go into `models/dopsd_metrics` (Node Info says which). **judge** takes a Qwen3-VL from "
            "Load CLIP.",
        ),
    }  # fmt: skip
    return Workflow(nodes, [])
