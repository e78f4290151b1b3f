"""The workflow of the demo model."""

from __future__ import annotations

from templates import Node, Workflow, frames, note

DEMO_PROMPTS = (
    "a [V] badge, left, on a white background\n"
    "a [V] badge, middle, on a navy background\n"
    "a badge, top, on a sand background"
)

DEMO_ANCHORS = (
    "a dotted purple triangle badge with a cyan center, right, on a gray background\n"
    "a plain pink cross badge with a red center, top, on a sky background\n"
    "a plain yellow square badge with a blue center, right, on a forest background\n"
    "a striped green square badge with a red center, left, on a brown background\n"
    "a [E6] badge, left, on a navy background\n"
    "a [A4] badge, top, on a gray background\n"
    "a [R3] badge, middle, on a white background\n"
    "a [K4] badge, right, on a brown background"
)
"""Half of them describe a badge, half name one that the demo model knows."""

DEMO_COMPARED = (
    "a [V] badge, right, on a forest background\na [V] badge, bottom, on a sky background\n"
    "a badge, left, on a gray background"
)
DEMO_NOTE = (
    "## Press Run\n\nA tiny model that ships with the pack learns a badge it has never seen from four "
    "images, in about a minute on a CPU. Nothing to download.\n\n**Look at the teacher**: the student "
    "becomes as good as it and no better. To see it before training, select Teacher Preview and "
    "press ▶ first.\n\nCancel at any time: the next run resumes. Then try your "
    "own images with *z_image_turbo_train* or *klein_train*."
)


def quickstart() -> Workflow:
    """The demo model learns a badge."""
    model, clip, vae, vision = (("models", slot) for slot in range(4))
    nodes = {
        "models": Node("DOPSD_LoadDemoModels", (0, 60), (360, 110)),
        "data": Node(
            "DOPSD_LoadDataset",
            (0, 230),
            (360, 620),
            {"folder": "demo badge (built in)", "resolution": 64, "trigger": "[V7]"},
        ),
        "conditions": Node(
            "DOPSD_BuildTeacherCondition",
            (420, 60),
            (400, 500),
            {"preview_prompts": DEMO_PROMPTS, "anchor_prompts": DEMO_ANCHORS},
            {"dataset": ("data", 0), "clip": clip, "vae": vae, "vision": vision},
        ),
        "look": Node(
            "DOPSD_TeacherPreview",
            (420, 640),
            (400, 540),
            links={"model": model, "conditions": ("conditions", 0), "vae": vae},
        ),
        "train": Node(
            "DOPSD_TrainLoRA",
            (880, 60),
            (460, 1120),
            {"run_name": "demo_badge", "preset": "demo model", "steps": 60, "preview_every": 10},
            {"model": model, "conditions": ("conditions", 0), "vae": vae},
        ),
        "save": Node(
            "DOPSD_SaveLoRA", (1400, 60), (420, 380), {"filename_prefix": "loras/demo_badge"}, {"lora": ("train", 0)}
        ),
        "compare": Node(
            "DOPSD_CompareLoRA",
            (1400, 470),
            (420, 710),
            {"prompts": DEMO_COMPARED, "strengths": "0.5, 1.0", "width": 64, "height": 64},
            {"model": model, "clip": clip, "vae": vae, "lora": ("train", 0)},
        ),
        "plot": Node(
            "LossGraphNode", (1880, 60), (460, 420), {"filename_prefix": "loss_graph"}, {"loss": ("train", 1)}
        ),
        "strip": Node(
            "PreviewImage", (1880, 540), (460, 640), links={"images": ("train", 3)}, title="Every preview of the run"
        ),
        "note": note((0, 910), (360, 270), DEMO_NOTE),
    }
    return Workflow(nodes, frames("4 · Save and compare", (400, 440, 500, 980), 1210))
