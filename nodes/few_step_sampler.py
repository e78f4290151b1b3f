"""The node Few-Step Sampler: samples a few-step model on its own noise schedule."""

from __future__ import annotations

import comfy.model_management
import comfy.sample
import comfy.samplers
import comfy.utils
import latent_preview
import torch
from comfy_api.latest import io

from ..dopsd_core.demo.settings import SAMPLE_STEPS
from ..dopsd_core.families import FLUX2_KLEIN, KREA2, Z_IMAGE
from .comfy_host.checked_inputs import checked
from .comfy_host.denoiser import default_steps, send_text
from .comfy_host.families import family_of
from .comfy_host.model_patches import unused_schedule
from .comfy_host.sampling import few_step_sample, sampler_name
from .comfy_host.shared_inputs import sampling_steps_input, seed_input, size_inputs
from .comfy_host.sockets import CATEGORY


class FewStepSampler(io.ComfyNode):
    """Samples the way the model was distilled and is trained here."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Inputs, outputs and texts of the node."""
        return io.Schema(
            node_id="DOPSD_FewStepSampler",
            display_name="Few-Step Sampler",
            category=CATEGORY,
            description="Samples a few-step model the way it is trained: its own noise schedule for the image size, "
            "Euler steps, no guidance. Same result as KSampler (euler, simple, CFG 1) for Z-Image-Turbo and Krea 2 "
            "Turbo, and as SamplerCustom with Flux2Scheduler for FLUX.2-klein.",
            search_aliases=["dopsd", "turbo sampler", "klein sampler"],
            inputs=[
                io.Model.Input(
                    "model",
                    tooltip="Z-Image-Turbo, FLUX.2-klein, Krea 2 Turbo or the demo model, with or without LoRAs.",
                ),
                io.Conditioning.Input(
                    "positive", tooltip="The prompt. There is no negative prompt: few-step models run at CFG 1."
                ),
                seed_input(
                    "Seed of the noise; the same seed gives the same noise as in KSampler.", changes_after_run=True
                ),
                sampling_steps_input(
                    f"Z-Image-Turbo {Z_IMAGE.sample_steps}, FLUX.2-klein {FLUX2_KLEIN.sample_steps}, "
                    f"Krea 2 Turbo {KREA2.sample_steps}, demo model {SAMPLE_STEPS}"
                ),
                *size_inputs(16, 8192, "In pixels; 64 for the demo model."),
                io.Int.Input(
                    "batch_size", default=1, min=1, max=4096, optional=True,
                    tooltip="How many images to draw from one seed.",
                ),
                io.Combo.Input(
                    "sampler", options=["euler", "template"], default="euler", optional=True,
                    tooltip="euler: as in training. template: as in ComfyUI's own workflow for the model "
                    "(res_multistep for Z-Image-Turbo, euler for FLUX.2-klein and Krea 2 Turbo).",
                ),
            ],
            outputs=[
                io.Latent.Output(display_name="latent", tooltip="For VAE Decode."),
                io.Sigmas.Output(display_name="sigmas", tooltip="The noise schedule used, for other samplers."),
            ],
            hidden=[io.Hidden.unique_id, io.Hidden.prompt, io.Hidden.dynprompt],
        )  # fmt: skip

    @classmethod
    @checked
    def execute(cls, model, positive, seed, steps, width, height, batch_size, sampler) -> io.NodeOutput:
        """Samples from noise; `width` and `height` in pixels."""
        family = family_of(model)
        sigmas = family.sigmas(steps or default_steps(model), width, height)
        shape = (batch_size, *family.latent_shape(width, height))
        latent = torch.zeros(shape, device=comfy.model_management.intermediate_device())
        callback = latent_preview.prepare_callback(model, len(sigmas) - 1)
        if notes := unused_schedule(model):
            send_text(cls, "\n".join(notes))
        samples = few_step_sample(model, positive, latent, seed, sigmas, sampler_name(sampler, family), callback)
        return io.NodeOutput({"samples": samples}, torch.tensor(sigmas))
