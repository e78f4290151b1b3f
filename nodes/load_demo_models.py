"""The node that loads the demo model, which ComfyUI's own loaders cannot."""

from __future__ import annotations

from comfy_api.latest import io

from .comfy_host import demo_models
from .comfy_host.checked_inputs import checked
from .comfy_host.sockets import CATEGORY, VisionSocket


class LoadDemoModels(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DOPSD_LoadDemoModels",
            display_name="Load Demo Models",
            category=CATEGORY,
            description="A tiny model that comes with this pack, complete: Z-Image-Turbo's architecture in small, "
            "64x64 pictures in 4 steps on any CPU. Try a training with it before loading a real one.",
            search_aliases=["dopsd", "tiny model"],
            outputs=[
                io.Model.Output(
                    display_name="model", tooltip="The few-step transformer. Draws 64x64 pictures in 4 steps at CFG 1."
                ),
                io.Clip.Output(
                    display_name="clip", tooltip="Its text encoder. It knows the words of the demo's captions only."
                ),
                io.Vae.Output(display_name="vae", tooltip="Its autoencoder, 8 pixels per latent."),
                VisionSocket.Output(display_name="vision", tooltip="Its vision tower, for Build Teacher Condition."),
            ],
            hidden=[io.Hidden.prompt],
        )

    @classmethod
    @checked
    def execute(cls) -> io.NodeOutput:
        return io.NodeOutput(
            demo_models.load_model(), demo_models.load_clip(), demo_models.load_vae(), demo_models.load_vision()
        )
