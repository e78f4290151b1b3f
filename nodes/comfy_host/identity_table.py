"""What counts towards the identity of a run, a MODEL, a CLIP, a VAE and a vision tower, and what does not."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from .former_inputs import FORMER_INPUTS
from .settings import OPTIONS


@dataclass(frozen=True)
class Row:
    """One part of a value, whether it counts, and why.

    Attributes:
        what: the attribute or input.
        counts: whether a change of it changes the identity.
        why: what it is, or why it does not count.
    """

    what: str
    counts: bool
    why: str


def _counts(**rows: str) -> tuple[Row, ...]:
    return tuple(Row(what, True, why) for what, why in rows.items())


def _does_not_count(**rows: str) -> tuple[Row, ...]:
    return tuple(Row(what, False, why) for what, why in rows.items())


_PATCHER = (
    *_counts(
        patches="LoRAs and merges, each with its own tensors and strengths",
        object_patches="objects that replace parts of the network, such as a ModelSampling or a compute dtype",
        weight_wrapper_patches="functions on weights",
        model_options="options of samplers and of the network: RoPE scales, block patches, user options",
        injections="hooks on layers that are added when the model is loaded, such as a bypass LoRA",
        wrappers="functions around the network",
        callbacks="functions that are called at loading and sampling",
        additional_models="further models on the patcher",
        attachments="further objects on the patcher",
        hook_patches="LoRAs that conditions switch on",
        forced_hooks="hooks that are always on",
    ),
    *_does_not_count(
        model="the network: its weights, layers and configuration count, as rows of their own",
        backup="the loaded values that patched ones have replaced: read instead of those",
        backup_buffers="the same of buffers",
        object_patches_backup="the same of objects",
        hook_backup="the same under hooks",
        hook_patches_backup="hook_patches without those of a sampling in progress: read instead of those",
        cached_hook_patches="computed from hook_patches",
        current_hooks="which hooks are on now",
        hook_mode="speed against memory",
        size="follows from the weights",
        load_device="where it runs",
        offload_device="where it waits",
        weight_inplace_update="how patched values are written",
        force_cast_weights="follows from the compute dtype",
        patches_uuid="random, new for each set of patches",
        clone_base_uuid="random, new for each loading",
        parent="the clone that it was made from",
        pinned="what is in pinned memory",
        is_injected="whether it is loaded now",
        skip_injection="whether it is being loaded now",
        is_clip="its class says so",
        is_multigpu_base_clone="where it runs",
        cached_patcher_init="the file it came from, by name",
        non_dynamic_delegate_model="a copy for compiled models",
        patch_on_device="ComfyUI-GGUF: the device of patches",
        mmap_released="ComfyUI-GGUF: whether it was loaded once",
        named_modules_to_munmap="ComfyUI-GGUF: the same",
        _last_prepare_log_key="what was logged last",
        _free_methods="what was logged last",
        _last_free_log_time="what was logged last",
    ),
)

_NETWORK = (
    *_counts(
        model_config="the architecture's sizes and dtypes",
        model_type="how its output is read",
        model_sampling="noise levels and their shift",
        latent_format="scale and shift of latents",
        manual_cast_dtype="what it computes in",
    ),
    *_does_not_count(
        device="where it is now",
        current_patcher="the clone that is loaded now",
        current_weight_patches_uuid="the same",
        model_loaded_weight_memory="how much is loaded now",
        model_offload_buffer_memory="the same",
        model_lowvram="whether part of it is in RAM now",
        lowvram_patch_counter="the same",
        dynamic_vbars="ComfyUI's dynamic VRAM",
        dynamic_pins="ComfyUI's dynamic VRAM",
        dynamic_patchers="ComfyUI's dynamic VRAM",
        memory_usage_factor="an estimate of memory",
        memory_usage_factor_conds="an estimate of memory",
        memory_usage_shape_process="an estimate of memory",
        latent_shapes="of the sampling in progress",
        adm_channels="follows from the configuration",
        concat_keys="follows from the class",
    ),
)

_CONFIG = (
    *_counts(
        unet_config="sizes, and the dtype of the weights",
        sampling_settings="shift of the noise levels",
        latent_format="scale and shift of latents",
        manual_cast_dtype="what it computes in",
        optimizations="8-bit products",
    ),
    *_does_not_count(
        custom_operations="the layers' classes: read in the network",
        quant_config="how weights are quantised: read in the network",
        supported_inference_dtypes="the dtypes were chosen from them",
        memory_usage_factor="an estimate of memory",
    ),
)

_CLIP = (
    *_counts(
        patcher="weights, LoRAs, hooks: a ModelPatcher",
        tokenizer="its class, template and lengths",
        tokenizer_options="lengths",
        layer_idx="CLIP Set Last Layer",
    ),
    *_does_not_count(
        cond_stage_model="the patcher's network",
        use_clip_schedule="conditions over a sampling's time; training has none",
        apply_hooks_to_conds="hooks for sampling; training has none",
    ),
)

_VAE = (
    *_counts(
        patcher="weights: a ModelPatcher",
        vae_dtype="what it computes in",
        process_input="pixels to what it encodes",
        downscale_ratio="pixels per latent",
        downscale_index_formula="pixels per latent",
        latent_channels="shape of latents",
        latent_dim="shape of latents",
        output_channels="channels of an image",
        pad_channel_value="for channels that an image does not have",
        extra_1d_channel="shape of latents",
        crop_input="whether images are cropped to whole latents",
        not_video="shape of latents",
        format_encoded="conversion of encoded latents",
    ),
    *_does_not_count(
        first_stage_model="the patcher's network",
        process_output="decoding",
        upscale_ratio="decoding",
        upscale_index_formula="decoding",
        memory_used_encode="an estimate of memory",
        memory_used_decode="an estimate of memory",
        handles_tiling="how memory is saved",
        disable_offload="where it waits",
        working_dtypes="vae_dtype was chosen from them",
        device="where it runs",
        output_device="where its output goes",
        size="follows from the weights",
        audio_sample_rate="sound",
    ),
)

_VISION = (
    *_counts(
        patcher="weights: a ModelPatcher",
        lm_config="the language model's configuration while it reads an image",
        min_pixels="the size at which an image is seen",
        max_pixels="the size at which an image is seen",
    ),
    *_does_not_count(model="the patcher's network"),
)

_RUN = (
    *_counts(
        images="Load Dataset: their bytes; the name of the folder does not count",
        texts="Load Dataset: captions, as they are trained on",
        trigger="Load Dataset: where it occurs in captions",
        resolution="Load Dataset: the size of the images",
        resolutions="Load Dataset: the sizes of the images and their shares",
        repeats="Load Dataset: how often each image is used",
        caption_dropout="Load Dataset: the share of samples without a caption",
        clip="Build Teacher Condition: as in the table of CLIP",
        vae="Build Teacher Condition: as in the table of VAE. Train LoRA has one for previews, which does not count",
        vision="Build Teacher Condition: as in the table of vision",
        mode="Build Teacher Condition: the teacher that it selects",
        teacher_image="Build Teacher Condition: which image the teacher sees",
        teacher_background="Build Teacher Condition: what the teacher sees around the subject, and the masks",
        teacher_sentence="Build Teacher Condition: the sentence that only the teacher reads",
        anchor_prompts="Build Teacher Condition: they are trained on",
        regularisation="Build Teacher Condition: its images and captions, which may be trained on",
        model="Train LoRA: as in the tables of patcher, network and config",
        initial_lora="Train LoRA: the initial weights",
        preset="Train LoRA: the settings that it sets",
        seed="Train LoRA: the LoRA's initial weights, the order of the images and all noise",
        memory="Train LoRA: the settings that it changes to save memory",
        settings="Train LoRA: the options of Training Settings",
    ),
    *_does_not_count(
        folder="Load Dataset: where the images are",
        dataset="Build Teacher Condition: Load Dataset's, read above",
        conditions="Train LoRA: Build Teacher Condition's, read above",
        preview_prompts="Build Teacher Condition: drawn and measured, not trained on",
        run_name="Train LoRA: the start of the folder's name",
        steps="Train LoRA: a run may be extended",
        preview_every="Train LoRA: when previews are drawn",
    ),
    *(
        Row(name, not OPTIONS[entry.option].hint.may_change, "Train LoRA: an option of release 0.2")
        for name, entry in FORMER_INPUTS.items()
    ),
)

TABLE: Mapping[str, tuple[Row, ...]] = {
    "run": _RUN,
    "patcher": _PATCHER,
    "network": _NETWORK,
    "config": _CONFIG,
    "CLIP": _CLIP,
    "VAE": _VAE,
    "vision": _VISION,
}
"""By owner: a run, by the inputs of its nodes (combined in `run_digest` and `TrainingSet.fingerprint`); a ModelPatcher
(MODEL), its network, the network's configuration, a CLIP, a VAE, a vision tower. The weights, layers and functions of a
network are read in `weights.py`. Of network and config, only the rows that count are read."""
