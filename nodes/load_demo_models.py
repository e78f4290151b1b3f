"""The node Load Demo Models: ComfyUI's own loaders do not recognise the demo model."""

from __future__ import annotations

from comfy_api.latest import io

from .comfy_host import demo_models
from .comfy_host.checked_inputs import checked
from .comfy_host.sockets import CATEGORY, VisionSocket


class LoadDemoModels(io.ComfyNode):
    """MODEL, CLIP, VAE and vision tower of the demo model."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Inputs, outputs and texts of the node."""
        return io.Schema(
            node_id="DOPSD_LoadDemoModels",
            display_name="Load Demo Models",
            category=CATEGORY,
            description="A tiny, complete model that comes with this pack: a scaled-down version of Z-Image-Turbo that "
            "draws 64x64 images in 2 steps on any CPU. Try a training with it before you load a real model.",
            search_aliases=["dopsd", "tiny model"],
            outputs=[
                io.Model.Output(
                    display_name="model", tooltip="The few-step transformer. Draws 64x64 images in 2 steps at CFG 1."
                ),
                io.Clip.Output(
                    display_name="clip", tooltip="Its text encoder. It only knows the words of the demo captions."
                ),
                io.Vae.Output(display_name="vae", tooltip="Its autoencoder; one latent cell is 8x8 pixels."),
                VisionSocket.Output(display_name="vision", tooltip="Its vision tower, for Build Teacher Condition."),
            ],
            hidden=[io.Hidden.prompt, io.Hidden.dynprompt],
        )

    @classmethod
    @checked
    def execute(cls) -> io.NodeOutput:
        """Loads all four from the files in this pack."""
        return io.NodeOutput(
            demo_models.load_model(), demo_models.load_clip(), demo_models.load_vae(), demo_models.load_vision()
        )
