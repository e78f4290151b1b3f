"""The node that samples a few-step model on its own grid."""

from __future__ import annotations

import comfy.model_management
import comfy.sample
import comfy.samplers
import comfy.utils
import latent_preview
import torch
from comfy_api.latest import io

from .comfy_host.checked_inputs import checked
from .comfy_host.denoiser import default_steps, send_text
from .comfy_host.families import family_of
from .comfy_host.model_patches import unused_schedule
from .comfy_host.sampling import few_step_sample, sampler_name
from .comfy_host.sockets import CATEGORY


class FewStepSampler(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DOPSD_FewStepSampler",
            display_name="Few-Step Sampler",
            category=CATEGORY,
            description="Samples a few-step model the way it is trained: on its own noise grid for the picture's size, "
            "by Euler steps, without guidance. Equals KSampler (euler, simple, CFG 1) for Z-Image-Turbo, and "
            "SamplerCustom with Flux2Scheduler for FLUX.2-klein.",
            search_aliases=["dopsd", "turbo sampler", "klein sampler"],
            inputs=[
                io.Model.Input("model", tooltip="Z-Image-Turbo, FLUX.2-klein or the demo model, LoRAs and all."),
                io.Conditioning.Input(
                    "positive", tooltip="The prompt. There is no negative one: few-step models run at CFG 1."
                ),
                io.Int.Input(
                    "seed", default=0, min=0, max=0xFFFFFFFFFFFFFFFF, control_after_generate=True, optional=True,
                    tooltip="Of the noise, which is KSampler's for the same seed.",
                ),
                io.Int.Input(
                    "steps", default=0, min=0, max=64, optional=True,
                    tooltip="Sampling steps; 0 takes what the model was made for: Z-Image-Turbo 8, FLUX.2-klein 4, "
                    "the demo model 4.",
                ),
                io.Int.Input(
                    "width", default=1024, min=16, max=8192, step=16, optional=True,
                    tooltip="In pixels; 64 for the demo model.",
                ),
                io.Int.Input(
                    "height", default=1024, min=16, max=8192, step=16, optional=True,
                    tooltip="In pixels; 64 for the demo model.",
                ),
                io.Int.Input(
                    "batch_size", default=1, min=1, max=4096, optional=True, tooltip="Pictures from one seed."
                ),
                io.Combo.Input(
                    "sampler", options=["euler", "template"], default="euler", optional=True,
                    tooltip="euler is what training uses. template is what ComfyUI's own workflow for the model uses: "
                    "res_multistep for Z-Image-Turbo, euler for FLUX.2-klein.",
                ),
            ],
            outputs=[
                io.Latent.Output(display_name="latent", tooltip="For VAE Decode."),
                io.Sigmas.Output(display_name="sigmas", tooltip="The noise grid that was used, for other samplers."),
            ],
            hidden=[io.Hidden.unique_id, io.Hidden.prompt],
        )  # fmt: skip

    @classmethod
    @checked
    def execute(cls, model, positive, seed, steps, width, height, batch_size, sampler) -> io.NodeOutput:
        family = family_of(model)
        sigmas = family.sigmas(steps or default_steps(model), width, height)
        shape = (batch_size, *family.latent_shape(width, height))
        latent = torch.zeros(shape, device=comfy.model_management.intermediate_device())
        callback = latent_preview.prepare_callback(model, len(sigmas) - 1)
        if notes := unused_schedule(model):
            send_text(cls, "\n".join(notes))
        samples = few_step_sample(model, positive, latent, seed, sigmas, sampler_name(sampler, family), callback)
        return io.NodeOutput({"samples": samples}, torch.tensor(sigmas))
