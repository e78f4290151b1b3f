"""Who a MODEL, a CLIP, a VAE and a vision tower are: by the contents of everything that decides what they compute.

A run is resumed, and a condition taken from the cache, only where nothing of that has changed; where ComfyUI keeps what
(loaded or not, half in RAM, another clone of the model loaded) changes nothing. `TABLE` says what counts. What is not
in it counts: an attribute that a later ComfyUI or another node pack adds makes another run, never a wrong one.
"""

from __future__ import annotations

import dataclasses
import logging
import types
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import comfy.model_sampling
import comfy.sd
import comfy.supported_models_base
import comfy.weight_adapter
import torch
from comfy.model_patcher import ModelPatcher
from comfy.quant_ops import QuantizedTensor
from torch import Tensor, nn

from ...dopsd_core.identity.content_digest import Digester, name_of
from .vision import TeacherVision
from .weights import LoadedWeights

log = logging.getLogger("dopsd")

HEX_DIGITS = 16


@dataclass(frozen=True)
class Row:
    """One thing that a value holds, whether it counts, and why."""

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
        object_patches="what stands in the network's place, such as a ModelSampling or a compute dtype",
        weight_wrapper_patches="functions on weights",
        model_options="options of samplers and of the network: RoPE scales, patches of blocks, user's options",
        injections="what is put over layers when the model is loaded, such as a bypass LoRA",
        wrappers="functions around the network",
        callbacks="functions that are called at loading and sampling",
        additional_models="models that come along",
        attachments="objects that come along",
        hook_patches="LoRAs that conditions switch on",
        forced_hooks="hooks that are always on",
    ),
    *_does_not_count(
        model="the network: its weights, layers and configuration count, as rows of their own",
        backup="loaded values under patched ones: read in place of them",
        backup_buffers="the same of buffers",
        object_patches_backup="the same of objects",
        hook_backup="the same under hooks",
        hook_patches_backup="hook_patches without those of a sampling that is under way: read in place of them",
        cached_hook_patches="computed from hook_patches",
        current_hooks="which hooks are on now",
        hook_mode="speed against memory",
        size="follows from the weights",
        load_device="where it runs",
        offload_device="where it waits",
        weight_inplace_update="how patched values are written",
        force_cast_weights="follows from the compute dtype",
        patches_uuid="drawn anew for each set of patches",
        clone_base_uuid="drawn anew for each loading",
        parent="the clone that it was made of",
        pinned="what lies in pinned memory",
        is_injected="whether it is loaded now",
        skip_injection="whether it is being loaded now",
        is_clip="its class says so",
        is_multigpu_base_clone="where it runs",
        cached_patcher_init="the file it came from, by name",
        non_dynamic_delegate_model="a copy for compiled models",
        patch_on_device="ComfyUI-GGUF: where patches lie",
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
        latent_shapes="of the sampling that is under way",
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
        use_clip_schedule="conditions over a sampling's time, which training has not",
        apply_hooks_to_conds="hooks for sampling, which training has not",
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
        output_channels="channels of a picture",
        pad_channel_value="of channels that a picture lacks",
        extra_1d_channel="shape of latents",
        crop_input="whether pictures are cropped to whole latents",
        not_video="shape of latents",
        format_encoded="latents to what is handed on",
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
        lm_config="what the language model runs with while it reads a picture",
        min_pixels="the size at which a picture is seen",
        max_pixels="the size at which a picture is seen",
    ),
    *_does_not_count(model="the patcher's network"),
)

_RUN = (
    *_counts(
        images="Load Dataset: their bytes; a folder's own name does not count",
        texts="Load Dataset: captions, as they are trained",
        trigger="Load Dataset: as far as it is in captions",
        resolution="Load Dataset: the size of the images",
        repeats="Load Dataset: how often each is seen",
        caption_dropout="Load Dataset: the share of visits without a caption",
        clip="Build Teacher Condition: as in the table of CLIP",
        vae="Build Teacher Condition: as in the table of VAE. Train LoRA's, which draws previews, does not count",
        vision="Build Teacher Condition: as in the table of vision",
        mode="Build Teacher Condition: the teacher that it comes to",
        teacher_image="Build Teacher Condition: what the teacher is shown",
        teacher_sentence="Build Teacher Condition: what the teacher is told besides",
        anchor_prompts="Build Teacher Condition: they are trained on",
        model="Train LoRA: as in the tables of patcher, network and config",
        initial_lora="Train LoRA: the weights that it starts from",
        preset="Train LoRA: the settings that it stands for",
        seed="Train LoRA: the LoRA's start, the order of the images and all noise",
        learning_rate="Train LoRA: a setting",
        rank="Train LoRA: a setting",
        alpha="Train LoRA: a setting",
        batch_size="Train LoRA: a setting",
        grad_accumulation="Train LoRA: a setting",
        warmup="Train LoRA: a setting",
        rollout_steps="Train LoRA: a setting",
        grad_steps="Train LoRA: a setting",
        loss="Train LoRA: a setting",
        teacher="Train LoRA: a setting",
        ema_decay="Train LoRA: a setting",
        anchor_probability="Train LoRA: a setting",
        objective="Train LoRA: a setting",
        schedule="Train LoRA: a setting",
        optimizer="Train LoRA: a setting",
        targets="Train LoRA: a setting",
        deterministic="Train LoRA: a setting",
        memory="Train LoRA: the settings that it trades for memory",
    ),
    *_does_not_count(
        folder="Load Dataset: where the images are",
        dataset="Build Teacher Condition: Load Dataset's, read above",
        conditions="Train LoRA: Build Teacher Condition's, read above",
        preview_prompts="Build Teacher Condition: they are drawn and measured, not trained on",
        run_name="Train LoRA: the folder's name begins with it",
        steps="Train LoRA: a run may be made longer",
        preview_every="Train LoRA: what is drawn meanwhile",
        checkpoint_every="Train LoRA: what is kept meanwhile",
        probe_every="Train LoRA: what is measured meanwhile",
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
"""By what holds it: a run, by the inputs of its nodes (put together in `run_digest` and `TrainingSet.fingerprint`); a
ModelPatcher (MODEL), the network in it, the network's configuration, a CLIP, a VAE, a vision tower. The weights, layers
and functions of a network are read in `weights.py`. Of network and config only what counts here is read."""


@dataclass(frozen=True)
class Identity:
    """digest: equal for what computes the same. unknown: kinds of objects inside that cannot be compared; with any the
    digest is another each time."""

    digest: str
    unknown: tuple[str, ...] = ()

    @property
    def notes(self) -> tuple[str, ...]:
        """For the user, if anything cannot be compared."""
        if not self.unknown:
            return ()
        kinds = ", ".join(self.unknown)
        return (f"what is put on MODEL, CLIP or VAE holds {kinds}, which cannot be compared: every run starts anew",)


def identity_of(*values: Any) -> Identity:
    """Of ModelPatchers (MODEL), CLIPs, VAEs and vision towers together; logs what cannot be compared."""
    reader = _Reader()
    found = Identity(reader.digester.digest(values)[:HEX_DIGITS], tuple(reader.digester.unknown))
    for note in found.notes:
        log.warning(note)
    return found


def fingerprint(value: Any) -> str:
    """`identity_of` one value, in hex."""
    return identity_of(value).digest


# -- reading ----------------------------------------------------------------------------------------------------------


_STATE = ("comfy_", "prev_comfy_", "_v", "_pin", "_prefetch", "_resident")
_STATE_NAMES = {"weight_function", "bias_function", "weight_lowvram_function", "bias_lowvram_function", "seed_key"}


def _is_state(name: str) -> bool:
    return name.startswith(_STATE) or name.endswith("_comfy_model_dtype") or name in _STATE_NAMES


class _Reader:
    """Reads ComfyUI's objects for a `Digester`, which asks for every object whether it is one."""

    def __init__(self) -> None:
        self.digester = Digester(self._substitute, _is_state)
        self._modules: dict[int, tuple[int, str]] = {}  # by id(): of which model, and its name there
        self._kinds: tuple[tuple[Any, Callable[[Any], Any]], ...] = (
            (ModelPatcher, self._patcher),
            (comfy.sd.CLIP, _clip),
            (comfy.sd.VAE, _vae),
            (TeacherVision, lambda vision: ("vision", _counted("vision", vars(vision)))),
            (comfy.supported_models_base.BASE, _config),
            (comfy.weight_adapter.WeightAdapterBase, _adapter),
            (comfy.weight_adapter.BypassInjectionManager, lambda manager: ("bypass", manager.hooks)),
            (comfy.weight_adapter.BypassForwardHook, _bypass),
            (_SHIFTED, _sampling),
            (QuantizedTensor, _quantized),
            (Tensor, _tensor),
            (nn.Module, self._module),
            (types.MethodType, _method),
        )

    def _substitute(self, value: Any) -> Any:
        for kind, read in self._kinds:
            if isinstance(value, kind):
                return read(value)
        own = getattr(value, "__dict__", None)  # other packs' classes that stand for a CLIP or a VAE
        if isinstance(own, dict) and isinstance(own.get("patcher"), ModelPatcher):
            return _clip(value) if "cond_stage_model" in own else _vae(value) if "first_stage_model" in own else value
        return value

    def _patcher(self, patcher: Any) -> Any:
        weights, number = LoadedWeights(patcher), len(self._modules)
        for module, name in weights.names.items():
            self._modules.setdefault(module, (number, name))
        return "patcher", weights.digest(self.digester), _network(patcher), _counted("patcher", _settled(patcher))

    def _module(self, module: Any) -> Any:
        if hasattr(module, "_orig_mod"):  # what torch.compile gives
            return "compiled", module._orig_mod
        place = self._modules.get(id(module))
        return module if place is None else ("layer", place)


def _counted(owner: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """Without what the table says not to count."""
    left_out = {row.what for row in TABLE[owner] if not row.counts}
    return {name: values[name] for name in sorted(values) if name not in left_out}


# -- MODEL ------------------------------------------------------------------------------------------------------------


def _settled(patcher: Any) -> dict[str, Any]:
    """The patcher's attributes as they are between two samplings, without empty places."""
    values = dict(vars(patcher))
    if patcher.hook_patches_backup is not None:
        values["hook_patches"] = patcher.hook_patches_backup
    values["hook_patches"] = [_by_name(patches) for patches in values["hook_patches"].values()]
    for name in ("patches", "object_patches", "weight_wrapper_patches", "injections", "attachments"):
        values[name] = _by_name(values[name])
    for name in ("wrappers", "callbacks"):
        calls = values[name].items()
        values[name] = [(kind, key, own) for kind, keys in calls for key, own in keys.items() if own]
    companions = values["additional_models"]  # "multigpu": the same model for other devices
    values["additional_models"] = _by_name({key: own for key, own in companions.items() if key != "multigpu"})
    return values


def _by_name(values: Mapping[Any, Any]) -> dict[Any, Any]:
    """In an order of its own, without empty lists."""
    return {key: values[key] for key in sorted(values, key=str) if values[key] not in ([], ())}


def _network(patcher: Any) -> dict[str, Any]:
    """What counts of the network besides its layers, as the patcher will have it."""
    names = [row.what for row in TABLE["network"] if row.counts]
    there = [name for name in names if name in patcher.object_patches or hasattr(patcher.model, name)]
    return {name: patcher.get_model_object(name) for name in there}


def _config(config: Any) -> Any:
    names = [row.what for row in TABLE["config"] if row.counts]
    return "config", name_of(type(config)), {name: getattr(config, name) for name in names}


_SHIFTED = (comfy.model_sampling.ModelSamplingDiscreteFlow, comfy.model_sampling.ModelSamplingFlux)
_OF_MODULES = vars(nn.Module()).keys()


def _sampling(sampling: Any) -> Any:
    """Without the table of noise levels, which follows from the shift: dynamic VRAM may leave it another clone's."""
    own = {name: value for name, value in vars(sampling).items() if name not in _OF_MODULES and not _is_state(name)}
    return "sampling", type(sampling), own


# -- what patches are made of -----------------------------------------------------------------------------------------


_WHERE_IT_IS_PUT = {"multiplier", "is_conv", "conv_dim", "kernel_size", "in_channels", "out_channels", "kw_dict"}
_CASTS = (torch.float32, torch.float16, torch.bfloat16)


def _adapter(adapter: Any) -> Any:
    """A LoRA or the like for one weight: without the names of its tensors in the file, and without a bypass's notes."""
    own = {name: value for name, value in vars(adapter).items() if name not in {"loaded_keys", *_WHERE_IT_IS_PUT}}
    return "adapter", name_of(type(adapter)), own


def _bypass(hook: Any) -> Any:
    """A LoRA beside a layer, its tensors in the dtype that ComfyUI brings them to when it first puts them there."""
    dtype = getattr(getattr(hook.module, "weight", None), "dtype", None)
    tensors = getattr(hook.adapter, "weights", None)
    if isinstance(hook.adapter, nn.Module) or not isinstance(tensors, (list, tuple)):
        return "bypass", hook.module, hook.multiplier, hook.adapter
    cast = [value.to(dtype) if isinstance(value, Tensor) and dtype in _CASTS else value for value in tensors]
    return "bypass", hook.module, hook.multiplier, name_of(type(hook.adapter)), cast


def _quantized(value: Any) -> Any:
    fields = {field.name: getattr(value._params, field.name) for field in dataclasses.fields(value._params)}
    return "quantised", value._layout_cls, fields, value._qdata


def _tensor(value: Any) -> Any:
    if hasattr(value, "tensor_type"):  # ComfyUI-GGUF's: bytes, and how to read them
        return "gguf", str(value.tensor_type), tuple(value.shape), value.as_subclass(Tensor)
    return value


def _method(method: types.MethodType) -> Any:
    """How a merge reads a weight of another model: not the layer itself, which may be patched now."""
    layer, name = method.__self__, method.__func__.__name__
    if isinstance(layer, nn.Module) and name in ("convert_weight", "set_weight"):
        return "conversion", name_of(type(layer)), name
    return method


# -- CLIP and VAE -----------------------------------------------------------------------------------------------------


def _vae(vae: Any) -> Any:
    return "VAE", _counted("VAE", vars(vae))


def _clip(clip: Any) -> Any:
    tokenizer = vars(clip).get("tokenizer")
    return "CLIP", _counted("CLIP", {**vars(clip), "tokenizer": tokenizer and _tokenizer(tokenizer)})


def _tokenizer(tokenizer: Any) -> Any:
    """Class, numbers and texts of it and of the tokenizers in it; the vocabulary goes with the class."""
    plain = {name: value for name, value in vars(tokenizer).items() if isinstance(value, (str, int, float, type(None)))}
    inner = {n: _tokenizer(v) for n, v in vars(tokenizer).items() if hasattr(v, "tokenize_with_weights")}
    plain.pop("embedding_directory", None)
    return name_of(type(tokenizer)), plain, inner, getattr(tokenizer, "state_dict", dict)()
