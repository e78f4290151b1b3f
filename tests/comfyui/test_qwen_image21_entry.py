"""Qwen-Image 2.1 inside ComfyUI, on a stand-in for the model of a newer ComfyUI.

It is compared with diffusers' network and our host without ComfyUI, which have the same weights. Nothing here has run
on ComfyUI's own classes for this model.
"""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import twins
from gradient import SELECTIVE
from graphs import SHORT
from inprocess import ComfyUI
from loras import give_values, random_lora
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

pytestmark = pytest.mark.long

PROMPT, SIGMA, RANK, ALPHA = "a badge in the style of [V], top", 0.704534, 3, 6
PARTS = (
    "attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0", "img_mlp.gate_layer", "img_mlp.proj", "img_mlp.out",
)  # fmt: skip
"""The names in diffusers, and in the table of ComfyUI's LoRA loader."""

# latent (height, width), length of the text, latents of references and their places
CASES = {
    "text to image": ((4, 6), 9, [], ()),
    "a reference": ((4, 4), 12, [(2, 4)], (5,)),
    "two references": ((6, 4), 20, [(4, 4), (2, 6)], (5, 11)),
    "references side by side": ((4, 4), 8, [(2, 2), (2, 2)], (3, 3)),
}


@pytest.fixture(scope="module")
def stand_in(comfyui: ComfyUI) -> Iterator[Any]:
    import qwen_image21_stand_in

    with qwen_image21_stand_in.installed():
        yield qwen_image21_stand_in


@pytest.fixture(scope="module")
def ours(comfyui: ComfyUI, stand_in: Any) -> SimpleNamespace:
    """MODEL, CLIP and VAE as loader nodes would leave them, and the same weights in diffusers and transformers."""
    return comfyui.call(make_models, comfyui, stand_in)


def make_models(comfyui: ComfyUI, stand_in: Any) -> SimpleNamespace:
    alone = comfyui.core("standalone.hosts.qwen_image21")
    model, clip, (vae, their_vae) = stand_in.model(), stand_in.clip(), stand_in.vaes()
    network, words = stand_in.diffusers_network(model), clip.tokenizer.qwen3vl_8b.tokenizer
    encoder = comfyui.module("nodes.comfy_host.encoder").new_encoder(clip, vae, None)
    return SimpleNamespace(
        model=model, clip=clip, vae=vae, network=network, encoder=encoder,
        denoiser=alone.QwenImage21Denoiser(network),
        alone=alone.QwenImage21Encoder(stand_in.qwen3vl_twin(clip), words, their_vae, "small"),
    )  # fmt: skip


def in_comfyui(comfyui: ComfyUI, function: Any, *args: Any) -> Any:
    return comfyui.call(torch.inference_mode()(function), *args)


def pixels(height: int, width: int, seed: int = 0) -> Tensor:
    """[3, H, W] in [0, 1]."""
    coarse = torch.rand(1, 3, height // 8, width // 8, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.interpolate(coarse, size=(height, width), mode="bilinear")[0]


def inputs(comfyui: ComfyUI, case: str, seed: int = 1) -> tuple[Tensor, Any]:
    """(x [1, 64, h, w], its condition)."""
    size, length, references, slots = CASES[case]
    generator = torch.Generator().manual_seed(seed)
    x, text = torch.randn(1, 64, *size, generator=generator), torch.randn(length, 64, generator=generator)
    latents = tuple(torch.randn(64, *shape, generator=generator) for shape in references)
    return x, comfyui.core("conditioning.encode").Condition(text, latents, slots)


# -- where it is, and where it is not ----------------------------------------------------------------------------------


def test_a_comfyui_without_the_model_shows_no_trace_of_it(comfyui: ComfyUI) -> None:
    import comfy.supported_models

    families = comfyui.module("nodes.comfy_host.families")
    if hasattr(comfy.supported_models, "QwenImage21"):
        pytest.skip("this ComfyUI knows the model")
    assert "Qwen-Image" not in "".join(family.title for family in families.all_families())
    settings = comfyui.module("nodes.comfy_host.settings")
    assert "Qwen-Image" not in "".join(settings.FAMILY_TITLES)
    config = type("SDXL", (), {})()
    with pytest.raises(ValueError, match="this MODEL is a SDXL; D-OPSD trains") as caught:
        families.family_of(SimpleNamespace(model=SimpleNamespace(model_config=config)))
    assert "Qwen" not in str(caught.value)


def test_a_comfyui_with_the_model_uses_it(comfyui: ComfyUI, ours: SimpleNamespace) -> None:
    families = comfyui.module("nodes.comfy_host.families")
    family = comfyui.core("families").QWEN_IMAGE21
    assert families.family_of(ours.model) is family and families.family_of_clip(ours.clip) is family
    assert families.all_families()[-1] is family and families.in_comfyui(family).latent_axes == 2
    fits = comfyui.module("nodes.comfy_host.fits")
    fits.require_training_vae(ours.vae, ours.clip)
    assert fits.text_width(ours.model) == 64
    assert ours.encoder.family is family


def test_the_notes_say_that_it_is_untested(comfyui: ComfyUI, ours: SimpleNamespace) -> None:
    assert any("has not run in a real ComfyUI" in note for note in ours.encoder.notes)


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("qwen_image_2.1_turbo_bf16.safetensors", False),
        ("qwen_image_2.1_turbo_int8_convrot.safetensors", False),
        ("qwen_image_2.1_bf16.safetensors", True),
        ("qwen-image-2.1-Q8_0.gguf", True),
        ("my_favourite.safetensors", False),
    ],
)
def test_the_undistilled_checkpoint_is_recognised(
    comfyui: ComfyUI, stand_in: Any, ours: SimpleNamespace, name: str, found: bool
) -> None:
    distilled = comfyui.module("nodes.comfy_host.distilled")
    assert bool(distilled.why_undistilled(ours.model, name)) is found


def test_parts_of_krea2_are_one_sentence(comfyui: ComfyUI, ours: SimpleNamespace) -> None:
    """The two families have Qwen3-VL, and names of layers, in common."""
    import krea2_twins

    encoders, fits = (comfyui.module(f"nodes.comfy_host.{name}") for name in ("encoder", "fits"))
    model, (clip, _), (vae, _) = comfyui.call(lambda: (krea2_twins.model(), krea2_twins.clips(), krea2_twins.vaes()))
    with pytest.raises(ValueError, match="^the input vae is Krea 2 Turbo's, the input clip is Qwen-Image 2.1 Turbo's"):
        encoders.new_encoder(ours.clip, vae, None)
    with pytest.raises(ValueError, match="^the input vae is Qwen-Image 2.1 Turbo's, the input clip is Krea 2 Turbo's"):
        encoders.new_encoder(clip, ours.vae, None)
    conditions = SimpleNamespace(family=ours.encoder.family)
    with pytest.raises(ValueError, match="^the conditions are for Qwen-Image 2.1 Turbo, the MODEL is Krea 2 Turbo;"):
        fits.require_trainable(model, conditions)
    for here, there in ((ours.model, model), (model, ours.model)):
        denoiser = comfyui.module("nodes.comfy_host.denoiser").ComfyDenoiser(here)
        import_lora, targets = comfyui.core("adapters.lora_import").import_lora, denoiser.family.lora_targets
        with pytest.raises(ValueError, match=r"^the LoRA to start from is of another model: .* goes from \d+"):
            import_lora(random_lora(comfyui, there, 0.3, 2, 0), denoiser.sites(), targets)


# -- the network -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", list(CASES))
@pytest.mark.parametrize("sigma", [1.0, 0.414568])
def test_velocity(comfyui: ComfyUI, ours: SimpleNamespace, case: str, sigma: float) -> None:
    x, condition = inputs(comfyui, case)
    with comfyui.module("nodes.comfy_host.denoiser").ComfyDenoiser(ours.model).loaded(x.shape) as denoiser:
        got = in_comfyui(comfyui, denoiser.predict_x0, x, sigma, [condition])
    with torch.no_grad():
        wanted = ours.denoiser.predict_x0(x, sigma, [condition])
    assert twins.relative((x - got) / sigma, (x - wanted) / sigma) < 1e-4


def test_a_batch_of_different_places(comfyui: ComfyUI, ours: SimpleNamespace) -> None:
    """References of one shape at different places in texts of one length do not go through the network together."""
    condition = comfyui.core("conditioning.encode").Condition
    generator = torch.Generator().manual_seed(2)
    x, texts = torch.randn(3, 64, 4, 4, generator=generator), torch.randn(3, 9, 64, generator=generator)
    reference = torch.randn(64, 2, 2, generator=generator)
    conditions = [condition(text, (reference,), (slot,)) for text, slot in zip(texts, (2, 7, 2), strict=True)]
    with comfyui.module("nodes.comfy_host.denoiser").ComfyDenoiser(ours.model).loaded(x.shape) as denoiser:
        got = in_comfyui(comfyui, denoiser.predict_x0, x, SIGMA, conditions)
    with torch.no_grad():
        wanted = ours.denoiser.predict_x0(x, SIGMA, conditions)
    assert twins.relative(got, wanted) < 1e-5


@pytest.mark.parametrize("case", list(CASES))
@pytest.mark.parametrize("num_checkpointed", [0, 1, 2, SELECTIVE], ids=["none", "some", "all", "selective"])
def test_gradients_of_a_lora(comfyui: ComfyUI, ours: SimpleNamespace, case: str, num_checkpointed: int) -> None:
    """Ours through the stand-in in training mode, theirs through peft."""
    x, condition = inputs(comfyui, case)
    weight = torch.randn(x.shape, generator=torch.Generator().manual_seed(2))
    start = twins.random_student(comfyui, ours.model, RANK)
    got_v, got = twins.our_gradients(comfyui, ours.model, start, ALPHA, x, SIGMA, [condition], weight, num_checkpointed)

    def predict() -> Tensor:
        return (x - ours.denoiser.predict_x0(x, SIGMA, [condition])) / SIGMA

    wanted_v, wanted = twins.peft_gradients(ours.network, start, ALPHA, predict, weight)
    assert twins.relative(got_v, wanted_v) < 1e-4
    assert {key.rsplit(".lora_", 1)[0] for key in got} == {
        f"transformer_blocks.{block}.{part}" for block in range(2) for part in PARTS
    }
    errors = {key: twins.relative(got[key], wanted[key]) for key in wanted}
    assert max(errors.values()) < 1e-4, max(errors.items(), key=lambda item: item[1])


def test_nothing_of_an_earlier_step_is_kept(comfyui: ComfyUI, ours: SimpleNamespace) -> None:
    """A sampling of ComfyUI keeps keys and values of the text from its first step, which a LoRA changes."""
    x, condition = inputs(comfyui, "a reference")
    network = ours.model.model.diffusion_model
    with comfyui.module("nodes.comfy_host.denoiser").ComfyDenoiser(ours.model).loaded(x.shape) as denoiser:
        assert network.prefix_cache_enabled is False
        in_comfyui(comfyui, denoiser.predict_x0, x, SIGMA, [condition])
        assert network.prefix_cache is None
    with torch.inference_mode():
        ours.model.pre_run()
        assert network.prefix_cache_enabled is True  # of ComfyUI's own samplings it stays
        ours.model.cleanup()
    assert network.prefix_cache_enabled is False


def test_allocations_are_not_replayed_while_training(
    comfyui: ComfyUI, ours: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    import comfy.cli_args

    denoiser = comfyui.module("nodes.comfy_host.denoiser").ComfyDenoiser(ours.model)
    before = getattr(comfy.cli_args.args, "disable_comfy_compiler", None)
    if before is None:
        with torch.inference_mode(False), denoiser.trainable((1, 64, 4, 4)):
            assert not hasattr(comfy.cli_args.args, "disable_comfy_compiler")
    monkeypatch.setattr(comfy.cli_args.args, "disable_comfy_compiler", False, raising=False)
    with torch.inference_mode(False), denoiser.trainable((1, 64, 4, 4)):
        assert comfy.cli_args.args.disable_comfy_compiler is True
    assert comfy.cli_args.args.disable_comfy_compiler is False


# -- conditions --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", [PROMPT, "[V] " * 60])
def test_texts(comfyui: ComfyUI, ours: SimpleNamespace, text: str) -> None:
    got = in_comfyui(comfyui, ours.encoder.encode_text, text).features
    assert twins.relative(got, ours.alone.encode_text(text).features) < 1e-5


def test_another_image_changes_the_teachers_features(comfyui: ComfyUI, ours: SimpleNamespace) -> None:
    """The features of the image stay, and those of the caption have read it."""
    first, second = (
        in_comfyui(comfyui, ours.encoder.encode_image_text, pixels(512, 512, seed), PROMPT).features for seed in (1, 2)
    )
    wanted = ours.alone.encode_image_text(pixels(512, 512, 1), PROMPT).features
    assert twins.relative(first, wanted) < 1e-4
    assert twins.relative(first, second) > 0.01
    assert twins.relative(first[-8:], second[-8:]) > 1e-4


def test_the_students_text_is_comfyuis_to_the_bit(comfyui: ComfyUI, ours: SimpleNamespace) -> None:
    """Also after the teacher has read an image with the same CLIP, which does not change the CLIP's identity."""
    clip, before = ours.clip, comfyui.module("nodes.comfy_host.identity").fingerprint(ours.clip)
    in_comfyui(comfyui, ours.encoder.encode_image_text, pixels(96, 64), PROMPT)
    got = in_comfyui(comfyui, ours.encoder.encode_text, PROMPT).features
    wanted = in_comfyui(comfyui, lambda: clip.encode_from_tokens(clip.tokenize(PROMPT)).clone())
    assert torch.equal(got, wanted[0])
    assert comfyui.module("nodes.comfy_host.identity").fingerprint(ours.clip) == before


@pytest.mark.parametrize("count", [1, 2])
def test_texts_that_have_read_references(comfyui: ComfyUI, ours: SimpleNamespace, count: int) -> None:
    images = [pixels(64, 96), pixels(96, 64, 1)][:count]
    got = in_comfyui(comfyui, ours.encoder.encode_with_references, images, PROMPT)
    wanted = ours.alone.encode_with_references(images, PROMPT)
    assert got.slots == wanted.slots and len(got.slots) == count
    assert twins.relative(got.features, wanted.features) < 1e-4
    other = in_comfyui(comfyui, ours.encoder.encode_with_references, [1 - image for image in images], PROMPT)
    assert twins.relative(other.features, got.features) > 1e-3


def test_references_that_do_not_fit_are_one_sentence(comfyui: ComfyUI, ours: SimpleNamespace) -> None:
    with pytest.raises(ValueError, match="multiples of 32 pixels: crop them"):
        in_comfyui(comfyui, ours.encoder.encode_with_references, [pixels(64, 80)], PROMPT)
    for whole in ("<|im_start|>system\nno<|im_end|>\n<|im_start|>user\nhello", "<|im_start|>user\nhello"):
        with pytest.raises(ValueError, match="read 0 of 1 reference images with .*: write the caption without"):
            in_comfyui(comfyui, ours.encoder.encode_with_references, [pixels(64, 64)], whole)


def test_other_families_do_not_read_references(comfyui: ComfyUI, ours: SimpleNamespace) -> None:
    """Their text is encoded once, whatever images the network gets."""
    module, reads = comfyui.module("nodes.comfy_host.encoder"), comfyui.core("conditioning.encode").ReadsReferences
    assert isinstance(ours.encoder, reads) and not issubclass(module.ComfyEncoder, reads)


def test_latents_of_images_have_an_opaque_alpha(comfyui: ComfyUI, ours: SimpleNamespace) -> None:
    image = pixels(64, 96)
    got = in_comfyui(comfyui, ours.encoder.encode_latent, image)
    assert got.shape == (64, 4, 6)
    assert twins.relative(got, ours.alone.encode_latent(image)) < 1e-4


def test_previews_have_no_alpha(comfyui: ComfyUI, ours: SimpleNamespace) -> None:
    latent = torch.randn(1, 64, 4, 6, generator=torch.Generator().manual_seed(3))
    denoiser = comfyui.module("nodes.comfy_host.denoiser").ComfyDenoiser(ours.model)
    decode = comfyui.module("nodes.comfy_host.sampling").decode_image
    got = in_comfyui(comfyui, decode, ours.vae, denoiser.to_vae_space(latent))
    assert got.shape == (64, 96, 3)
    assert twins.relative(got.permute(2, 0, 1).cpu(), ours.alone.decode(latent)[0]) < 1e-4


# -- from images to a LoRA ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folders(comfyui: ComfyUI) -> None:
    """A concept, and edits of the same images whose sources are their negatives."""
    plain, edits = comfyui.input / "qwen", comfyui.input / "qwen-edits"
    for folder in (plain, edits / "source", edits / "target"):
        folder.mkdir(parents=True)
    for name, colour in {"one": (200, 40, 40), "two": (40, 40, 200)}.items():
        image = Image.linear_gradient("L").resize((64, 64)).convert("RGB")
        image.paste(colour, (16, 16, 48, 48))
        for place in (plain, edits / "target"):
            image.save(place / f"{name}.png")
            (place / f"{name}.txt").write_text("a [V] badge" if place == plain else "negate it")
        image.point(lambda value: 255 - value).save(edits / "source" / f"{name}.png")


def graph_of(comfyui: ComfyUI, ours: SimpleNamespace, folder: str, mode: str) -> dict[str, Any]:
    """From the dataset to the saved LoRA, with a look at the teacher."""
    inputs = comfyui.pack_nodes["DOPSD_TrainLoRA"].GET_SCHEMA().inputs
    defaults = {part.id: part.default for part in inputs if getattr(part, "default", None) is not None}
    everything = {"model": ["given", 0], "conditions": ["conditions", 0], "vae": ["given", 2]}
    return {
        "given": give_values(comfyui, ("MODEL", "CLIP", "VAE"), [ours.model, ours.clip, ours.vae]),
        "data": {
            "class_type": "DOPSD_LoadDataset",
            "inputs": {"folder": folder, "resolution": 64, "trigger": "", "repeats": 1, "caption_dropout": 0.0},
        },
        "conditions": {
            "class_type": "DOPSD_BuildTeacherCondition",
            "inputs": {
                "dataset": ["data", 0], "clip": ["given", 1], "vae": ["given", 2], "mode": mode,
                "preview_prompts": "", "anchor_prompts": "",
            },
        },
        "look": {"class_type": "DOPSD_TeacherPreview", "inputs": {**everything, "seed": 0, "steps": 0, "pictures": 2}},
        "train": {
            "class_type": "DOPSD_TrainLoRA",
            "inputs": {
                **defaults, **SHORT, **everything, "preset": "quick look", "learning_rate": 2e-3, "steps": 3,
                "run_name": f"{folder}-{mode}", "preview_every": 2,
            },
        },
        "save": {
            "class_type": "DOPSD_SaveLoRA",
            "inputs": {"lora": ["train", 0], "filename_prefix": f"loras/{folder}-{mode}", "dtype": "fp32"},
        },
        "show": {"class_type": "PreviewAny", "inputs": {"source": ["look", 0]}},
    }  # fmt: skip


@pytest.mark.parametrize(
    ("folder", "mode", "name", "references"),
    [
        ("qwen", "auto", "edit", (0, 1)),
        ("qwen", "vlm", "vlm", (0, 0)),
        ("qwen-edits", "auto", "edit_target", (1, 2)),
    ],
)
def test_training(
    comfyui: ComfyUI, ours: SimpleNamespace, folders: None, folder: str, mode: str, name: str, references: Any
) -> None:
    """Of every teacher through the nodes: what each condition sees, previews, a LoRA file, an untouched MODEL."""
    fingerprint = comfyui.module("nodes.comfy_host.identity").fingerprint
    before = comfyui.call(fingerprint, ours.model)
    run = comfyui.execute(graph_of(comfyui, ours, folder, mode))
    assert run.status == "success", run.error
    conditions = run.value("conditions")
    assert conditions.teacher.name == name
    for pair in conditions.data.pairs:
        found = [(len(c.slots), len(c.reference_latents)) for c in (pair.student, pair.teacher)]
        assert found == [(count, count) for count in references]
    assert any("has not run in a real ComfyUI" in text for text in run.texts("train"))
    saved = load_file(run.value("save"))
    names = {key.removeprefix("transformer.").rsplit(".lora_", 1)[0] for key in saved}
    assert names == {f"transformer_blocks.{block}.{part}" for block in range(2) for part in PARTS}
    assert all(bool(value.any()) for value in saved.values())  # every layer has been trained
    assert comfyui.call(fingerprint, ours.model) == before
    assert "forward" not in vars(ours.model.model.diffusion_model.transformer_blocks[0].img_norm1)


def keys_of(model: Any) -> dict[str, Any]:
    """As the table of ComfyUI's LoRA loader for this model: the halves of `gate_up` have names of their own."""
    table: dict[str, Any] = {}
    for key, value in model.model.state_dict().items():
        name, half = key.removeprefix("diffusion_model.").removesuffix(".weight"), value.shape[0] // 2
        stem = f"transformer.{name.removesuffix('gate_up')}"
        if name.endswith("img_mlp.gate_up"):
            table[f"{stem}gate_layer"], table[f"{stem}proj"] = (key, (0, 0, half)), (key, (0, half, half))
        else:
            table[stem] = key
    return table


def test_a_lora_file_in_comfyui_is_what_was_trained(comfyui: ComfyUI, ours: SimpleNamespace) -> None:
    """Every key is used, and the patched MODEL predicts what the LoRA in the trainer does."""
    import comfy.lora
    from comfy.model_patcher import ModelPatcher

    denoisers = comfyui.module("nodes.comfy_host.denoiser")
    x, condition = inputs(comfyui, "a reference")
    start = twins.random_student(comfyui, ours.model, RANK)
    denoiser = denoisers.ComfyDenoiser(ours.model)
    adapters = twins.new_adapters(comfyui, denoiser, RANK, ALPHA)
    adapters.load_state("student", start)
    with torch.inference_mode(False), torch.no_grad(), denoiser.trainable(x.shape):
        base = denoiser.predict_x0(x, SIGMA, [condition])
        with adapters.attached():
            wanted = denoiser.predict_x0(x, SIGMA, [condition])
    folded = comfyui.core("adapters.lora_file").fold_alpha(adapters.state(), adapters.config)
    file = {f"{denoiser.family.key_prefix}{key}": value for key, value in folded.items()}
    patches = comfy.lora.load_lora(dict(file), keys_of(ours.model))
    assert len(patches) == 2 * len(PARTS)
    patched: ModelPatcher = ours.model.clone()
    assert set(patched.add_patches(patches, 1.0)) == set(patches)
    with denoisers.ComfyDenoiser(patched).loaded(x.shape) as other:
        got = in_comfyui(comfyui, other.predict_x0, x, SIGMA, [condition])
    assert twins.relative(wanted, base) > 0.01
    assert (got - wanted).norm() < 1e-3 * (wanted - base).norm()


FORMATS = {
    "diffusers": ("transformer.{}", ("lora_A", "lora_B"), False, False),
    "no prefix, with alpha": ("{}", ("lora_A", "lora_B"), False, True),
    "comfyui's trainer": ("diffusion_model.{}", ("lora_down", "lora_up"), True, True),
    "ai-toolkit": ("diffusion_model.{}", ("lora_A", "lora_B"), False, False),
    "kohya": ("lora_unet_{}", ("lora_down", "lora_up"), True, True),
    "simpletuner": ("lycoris_{}", ("lora_down", "lora_up"), False, True),
}


@pytest.mark.parametrize("kind", list(FORMATS))
def test_loras_of_other_trainers(comfyui: ComfyUI, ours: SimpleNamespace, kind: str) -> None:
    """Whole as an initial LoRA, at the strength that the file states; native files have both halves as one."""
    named, (down, up), is_native, has_alpha = FORMATS[kind]
    is_flat = named.startswith(("lora_unet_", "lycoris_"))
    sites = comfyui.module("nodes.comfy_host.denoiser").ComfyDenoiser(ours.model).sites()
    generator, file, wanted = torch.Generator().manual_seed(7), {}, {}
    for site in sites:
        if not site.name.startswith("transformer_blocks."):
            continue
        whole = torch.zeros(site.out_features, site.in_features)
        places = {site.name: slice(None)} if is_native else {part.name: part.rows for part in site.parts}
        for name, rows in places.items():
            key = named.format(name.replace(".", "_") if is_flat else name)
            a = torch.randn(4, site.in_features, generator=generator)
            b = torch.randn(len(whole[rows]), 4, generator=generator)
            file |= {f"{key}.{down}.weight": a, f"{key}.{up}.weight": b}
            file |= {f"{key}.alpha": torch.tensor(2.0)} if has_alpha else {}
            whole[rows] = b @ a * (2.0 / 4 if has_alpha else 1)
        wanted |= {part.name: whole[part.rows] for part in site.parts}
    targets = comfyui.core("families").QWEN_IMAGE21.lora_targets
    imported = comfyui.core("adapters.lora_import").import_lora(file, sites, targets)
    assert imported.left_out == () and len(imported.tensors) == 2 * len(wanted) == 2 * 2 * len(PARTS)
    for name, delta in wanted.items():
        got = imported.tensors[f"{name}.lora_B.weight"] @ imported.tensors[f"{name}.lora_A.weight"]
        assert twins.relative(got, delta) < 1e-5, name


# -- sampling, settings, memory ----------------------------------------------------------------------------------------


def test_images(comfyui: ComfyUI, ours: SimpleNamespace) -> None:
    """Few-Step Sampler in ComfyUI's own sampling, which caches the prefix, against our host without ComfyUI."""
    width, height, seed = 96, 64, 5
    model = ours.model.clone()  # ComfyUI 0.28's own attention on a CPU adds boolean masks as numbers
    plain = comfyui.module("nodes.comfy_host.gradients").plain_attention
    model.model_options["transformer_options"] = {"optimized_attention_override": plain}
    graph: dict[str, Any] = {
        "given": give_values(comfyui, ("MODEL", "CLIP", "VAE"), [model, ours.clip, ours.vae]),
        "text": {"class_type": "CLIPTextEncode", "inputs": {"clip": ["given", 1], "text": PROMPT}},
        "sample": {
            "class_type": "DOPSD_FewStepSampler",
            "inputs": {
                "model": ["given", 0], "positive": ["text", 0], "seed": seed, "steps": 0, "width": width,
                "height": height, "batch_size": 1, "sampler": "template",
            },
        },
        "decode": {"class_type": "VAEDecode", "inputs": {"samples": ["sample", 0], "vae": ["given", 2]}},
        "show": {"class_type": "PreviewAny", "inputs": {"source": ["decode", 0]}},
    }  # fmt: skip
    run = comfyui.execute(graph)
    assert run.status == "success", run.error
    family, core = ours.encoder.family, comfyui.core("rollout")
    noise = torch.randn(1, *family.latent_shape(width, height), generator=torch.manual_seed(seed))
    with torch.no_grad():
        condition = ours.alone.encode_text(PROMPT)
        wanted = core.sample(ours.denoiser, [condition], noise, family.sigmas(8, width, height))
    latents = ours.model.model.process_latent_in(run.value("sample")["samples"])
    assert twins.relative(latents, wanted) < 1e-4
    assert twins.relative(run.value("decode")[0, ..., :3].permute(2, 0, 1), ours.alone.decode(wanted)[0]) < 1e-3


def test_training_settings_and_presets_know_it(comfyui: ComfyUI, ours: SimpleNamespace) -> None:
    settings, presets = (comfyui.module(f"nodes.comfy_host.{name}") for name in ("settings", "presets"))
    for preset in presets.PRESETS:
        values = settings.filled(preset, ours.encoder.family)
        assert values["targets"] == ours.encoder.family.lora_targets and values["lr"] > 0


def test_saved_bytes_are_not_more_than_planned(comfyui: ComfyUI, ours: SimpleNamespace, stand_in: Any) -> None:
    """The memory plan uses the formula of diffusers' network."""
    saved = [saved_bytes(comfyui, stand_in.model(layers)) for layers in (2, 3)]
    denoiser, family = comfyui.module("nodes.comfy_host.denoiser").ComfyDenoiser(ours.model), ours.encoder.family
    (planned, *_) = comfyui.core("memory.activation_checkpointing").block_bytes(
        denoiser.blocks(), denoiser.sites(), family, family.lora_config(4), 96, 40, itemsize=4
    )
    assert 0.6 * planned.kept < saved[1] - saved[0] < planned.kept


def saved_bytes(comfyui: ComfyUI, model: Any) -> int:
    """Bytes of the distinct storages that autograd saves in a forward, weights left out."""
    denoiser = comfyui.module("nodes.comfy_host.denoiser").ComfyDenoiser(model)
    condition = comfyui.core("conditioning.encode").Condition(torch.randn(40, 64))
    kept: dict[int, Tensor] = {}

    def pack(value: Tensor) -> Tensor:
        kept[value.untyped_storage().data_ptr()] = value
        return value

    with torch.inference_mode(False), torch.enable_grad(), denoiser.trainable((1, 64, 8, 12)):
        adapters = twins.new_adapters(comfyui, denoiser, 4, 8.0)
        known = {p.untyped_storage().data_ptr() for p in adapters.parameters()}
        with adapters.attached(), torch.autograd.graph.saved_tensors_hooks(pack, lambda value: value):
            denoiser.predict_x0(torch.randn(1, 64, 8, 12), SIGMA, [condition])
    sizes = {place: value.untyped_storage().nbytes() for place, value in kept.items() if place not in known}
    return sum(sizes.values())
