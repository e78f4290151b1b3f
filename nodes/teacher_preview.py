"""The node Teacher Preview: what the teacher draws, before any training."""

from __future__ import annotations

from comfy_api.latest import io, ui

from ..dopsd_core.image_grid import to_pixels
from .comfy_host.base_name import base_name
from .comfy_host.checked_inputs import checked
from .comfy_host.denoiser import ComfyDenoiser, default_steps, send_text
from .comfy_host.distilled import warn_if_undistilled
from .comfy_host.fits import require_trainable
from .comfy_host.model_patches import require_own_sampling, unused_patches
from .comfy_host.previews import PreviewPainter, teacher_sheet
from .comfy_host.shared_inputs import conditions_input, sampling_steps_input, seed_input
from .comfy_host.sockets import CATEGORY


class TeacherPreview(io.ComfyNode):
    """Target, teacher and student of the untouched model, side by side."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Inputs, outputs and texts of the node."""
        return io.Schema(
            node_id="DOPSD_TeacherPreview",
            display_name="Teacher Preview",
            category=CATEGORY,
            description="Draws what the TEACHER draws, before any training: the untouched model that reads the caption "
            "and sees the image. The student can only become as good as its teacher, so look here first.",
            search_aliases=["d-opsd", "teacher", "preview"],
            is_output_node=True,
            inputs=[
                io.Model.Input("model", tooltip="The step-distilled model that will be trained."),
                conditions_input(),
                io.Vae.Input("vae", tooltip="The model's own VAE, to decode the images."),
                seed_input("Noise of the images; all rows share it."),
                sampling_steps_input(),
                io.Int.Input(
                    "pictures",
                    display_name="images",
                    default=4,
                    min=1,
                    max=16,
                    optional=True,
                    tooltip="How many of the training images to show.",
                ),
            ],
            outputs=[
                io.Image.Output(
                    display_name="image",
                    tooltip="The preview sheet: one column per image with target, teacher and student.",
                )
            ],
            hidden=[io.Hidden.unique_id, io.Hidden.dynprompt],
        )

    @classmethod
    @checked
    def execute(cls, model, conditions, vae, seed, steps, pictures) -> io.NodeOutput:
        """Draws the sheet for the first images of the dataset."""
        require_trainable(model, conditions, vae)
        require_own_sampling(model)
        painter = PreviewPainter(ComfyDenoiser(model), vae, steps or default_steps(model), seed)
        image = to_pixels(teacher_sheet(painter, conditions, pictures))
        name = base_name(model, cls)
        notes = [warn_if_undistilled(model, name), *conditions.notes, *unused_patches(model)]
        notes.append("the student can only become as good as the teacher row")
        send_text(cls, "\n".join(filter(None, notes)))
        return io.NodeOutput(image, ui=ui.PreviewImage(image, cls=cls))
