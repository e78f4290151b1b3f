"""MODEL, CLIP, VAE and conditions of different models are reported by a sentence, before anything is computed."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import krea2_twins
import pytest
import stock_files
import torch
import towers
import toy
from gradient import features
from graphs import node_of, shipped, shrunk, training
from inprocess import ComfyUI
from loras import give_values
from runs import Run

Stock = Callable[..., None]
ENCODES = ("CLIPLoader", "VAELoader", "DOPSD_LoadTeacherVision", "DOPSD_LoadDataset", "DOPSD_BuildTeacherCondition")


@pytest.fixture(scope="module")
def files(comfyui: ComfyUI, stock: Stock) -> None:
    stock()
    stock_files.write_concept(comfyui.input / "fits")


@pytest.fixture
def fits(comfyui: ComfyUI) -> Any:
    return comfyui.module("nodes.comfy_host.fits")


def made_vae(kind: str) -> Any:
    """A VAE of another model, as ComfyUI makes it of the files that users have."""
    import comfy.ldm.wan.vae
    import comfy.sd
    import comfy.taesd.taesd

    if kind == "pixels":
        return comfy.sd.VAE(sd={"pixel_space_vae": torch.tensor(1.0)})
    if kind in ("qwen image", "video"):  # the first has 16 channels at an eighth of the size, as Z-Image's
        sizes = {"dim": 96, "z_dim": 16, "dim_mult": [1, 2, 4, 4], "num_res_blocks": 2, "attn_scales": []}
        network = comfy.ldm.wan.vae.WanVAE(**sizes, temperal_downsample=[False, True, True], dropout=0.0)
        vae = comfy.sd.VAE(sd=network.state_dict())
        vae.latent_channels = 16 if kind == "qwen image" else 48  # Wan 2.2's
        return vae
    if kind == "krea 2's preview":
        import comfy.taesd.taehv

        return comfy.sd.VAE(sd=comfy.taesd.taehv.TAEHV(latent_channels=16).state_dict())
    channels = {"sdxl's preview": 4, "flux's preview": 16, "klein's preview": 128}[kind]
    network = comfy.taesd.taesd.TAESD(latent_channels=channels)
    return comfy.sd.VAE(sd=network.state_dict(), metadata={"tae_latent_channels": channels})


WRONG = {
    # a CLIP's family and a VAE; what the message calls it, and what it says to load
    ("z_image", "pixels"): ("one of 3 channels at 1/1 of the image's size", "ae.safetensors"),
    ("z_image", "qwen image"): ("Krea 2 Turbo's", "ae.safetensors.*qwen3vl_4b_fp8_scaled with type krea2"),
    ("z_image", "video"): ("one for video", "ae.safetensors"),
    ("z_image", "sdxl's preview"): ("one of 4 channels at 1/8", "ae.safetensors"),
    ("z_image", "klein's preview"): ("FLUX.2-klein's", "ae.safetensors.*qwen_3_4b or qwen_3_8b with type flux2"),
    ("klein", "sdxl's preview"): ("one of 4 channels at 1/8", "flux2-vae.safetensors"),
    ("klein", "flux's preview"): ("Z-Image-Turbo's", "flux2-vae.safetensors.*qwen_3_4b with type lumina2"),
    ("klein", "video"): ("one for video", "flux2-vae.safetensors"),
    ("z_image", "flux's preview"): (r"a small preview VAE \(TAESD\)", "ae.safetensors"),
    ("klein", "klein's preview"): (r"a small preview VAE \(TAESD\)", "flux2-vae.safetensors"),
    ("krea2", "flux's preview"): ("Z-Image-Turbo's", "qwen_image_vae.safetensors"),
    ("krea2", "video"): ("one for video", "qwen_image_vae.safetensors"),
    ("krea2", "krea 2's preview"): (r"a small preview VAE \(TAESD\)", "qwen_image_vae.safetensors"),
}


@pytest.mark.parametrize(("family", "kind"), WRONG)
def test_training_images_are_encoded_by_the_models_own_vae_only(
    comfyui: ComfyUI, family: str, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    found, wanted = WRONG[family, kind]
    make = krea2_twins.clips if family == "krea2" else lambda: (towers.clip(family),)
    (clip, *_), vae = comfyui.call(make), comfyui.call(made_vae, kind)
    monkeypatch.setattr(vae, "encode", lambda *_: pytest.fail("something was encoded"))
    with pytest.raises(ValueError, match=f"^the input vae is {found}.*{wanted}"):
        comfyui.module("nodes.comfy_host.encoder").ComfyEncoder(clip, vae, None)


@pytest.mark.parametrize(("family", "kind"), [("Z_IMAGE", "flux's preview"), ("FLUX2_KLEIN", "klein's preview")])
def test_previews_may_be_decoded_by_a_small_vae(comfyui: ComfyUI, fits: Any, family: str, kind: str) -> None:
    families, vae = comfyui.core("families"), comfyui.call(made_vae, kind)
    fits.require_vae(vae, getattr(families, family), False)
    other = families.Z_IMAGE if family == "FLUX2_KLEIN" else families.FLUX2_KLEIN
    with pytest.raises(ValueError, match="^the input vae is .*'s, the MODEL is "):
        fits.require_vae(vae, other, False)


def test_the_demos_vae_goes_with_the_demo_alone(comfyui: ComfyUI, fits: Any) -> None:
    """It has as many channels as Z-Image's; they mean something else."""
    demo, families = comfyui.module("nodes.comfy_host.demo_models"), comfyui.core("families")
    vae, other = comfyui.call(demo.load_vae), comfyui.call(made_vae, "flux's preview")
    fits.require_vae(vae, families.Z_IMAGE, True)
    with pytest.raises(ValueError, match="the demo model's, the MODEL is Z-Image-Turbo's: connect Load VAE with ae"):
        fits.require_vae(vae, families.Z_IMAGE, False)
    with pytest.raises(ValueError, match="the MODEL is the demo model's: connect Load Demo Models"):
        fits.require_vae(other, families.Z_IMAGE, True)
    encoder = comfyui.module("nodes.comfy_host.encoder").ComfyEncoder
    with pytest.raises(ValueError, match="demo model's, the input clip is Z-Image-Turbo's"):
        encoder(comfyui.call(towers.clip, "z_image"), vae, None)
    with pytest.raises(ValueError, match="the input clip is the demo model's"):
        encoder(comfyui.call(demo.load_clip), other, None)
    encoder(comfyui.call(demo.load_clip), vae, None)


def test_a_latent_of_another_shape_is_no_latent_of_the_family(comfyui: ComfyUI) -> None:
    """For VAEs that say nothing of themselves."""

    class Unknown:
        first_stage_model = patcher = None

        def encode(self, image: torch.Tensor) -> torch.Tensor:
            return torch.zeros(1, 16, image.shape[1] // 4, image.shape[2] // 4)

    module = comfyui.module("nodes.comfy_host.encoder")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "identity_of", lambda *_: SimpleNamespace(digest="", notes=()))
        encoder = module.ComfyEncoder(comfyui.call(towers.clip, "z_image"), Unknown(), None)
    with pytest.raises(ValueError, match=r"input vae makes latents of shape \[16, 16, 16\] where .* has \[16, 8, 8\]"):
        comfyui.call(encoder.encode_latent, torch.rand(3, 64, 64))


def conditions_for(comfyui: ComfyUI, model: Any, width: int) -> Any:
    family = comfyui.module("nodes.comfy_host.families").family_of(model)
    conditioning = comfyui.core("conditioning.encode")
    condition = conditioning.Condition(torch.zeros(7, width))
    pair = conditioning.DualCondition(condition, condition, torch.zeros(family.latent_shape(64, 64)), "a", "a")
    data, teacher = comfyui.core("training.training_set").TrainingSet([pair]), comfyui.core("conditioning.teachers").VLM
    return comfyui.module("nodes.comfy_host.sockets").Conditions(family, teacher, data, (), (), "", 0.0)


@pytest.mark.parametrize(
    ("width", "given", "file"),
    [(7680, 12288, "qwen_3_4b with type flux2"), (12288, 7680, "qwen_3_8b with type flux2"), (192, 96, "its own text")],
)
def test_the_two_sizes_of_klein_read_different_text_encoders(
    comfyui: ComfyUI, fits: Any, width: int, given: int, file: str
) -> None:
    model = toy.flux2(context_in_dim=width)
    fits.require_trainable(model, conditions_for(comfyui, model, width))
    message = f"^the conditions have features of width {given}, and this MODEL reads width {width}: .*{file}"
    with pytest.raises(ValueError, match=message):
        fits.require_trainable(model, conditions_for(comfyui, model, given))


def test_conditions_of_the_demo_are_not_for_the_real_model(comfyui: ComfyUI, fits: Any) -> None:
    model = toy.real_z_image()
    with pytest.raises(ValueError, match="width 128, and this MODEL reads width 2560.*qwen_3_4b with type lumina2"):
        fits.require_trainable(model, conditions_for(comfyui, model, 128))
    demo = comfyui.call(comfyui.module("nodes.comfy_host.demo_models").load_model)
    with pytest.raises(ValueError, match=r"width 2560, and this MODEL reads width 128.*\(Load Demo Models\)"):
        fits.require_trainable(demo, conditions_for(comfyui, demo, 2560))


# -- the type of Load CLIP ---------------------------------------------------------------------------------------------


@pytest.mark.long
@pytest.mark.parametrize("file", ["qwen_3_4b", "qwen3vl_4b_fp8_scaled"])
def test_a_type_of_load_clip_gives_the_right_features_or_is_refused(comfyui: ComfyUI, files: None, file: str) -> None:
    """For Qwen3-4B ComfyUI tells FLUX.2's two types from all others, which are Z-Image's to the bit."""
    families, encoder = comfyui.module("nodes.comfy_host.families"), comfyui.module("nodes.comfy_host.encoder")
    loader = comfyui.nodes.CLIPLoader

    @torch.inference_mode()
    def encoded(kind: str) -> tuple[str, torch.Tensor]:
        (clip,) = loader().load_clip(f"{file}.safetensors", kind)
        family = families.family_of_clip(clip)
        features = encoder.ComfyEncoder.encode_text(SimpleNamespace(_clip=clip), "a red lamp")  # type: ignore[arg-type]
        return family.name, features.features

    def taken(kind: str) -> tuple[str, torch.Tensor] | None:
        try:
            return comfyui.call(encoded, kind)
        except ValueError as error:
            assert str(error).startswith("the input clip ") and "with type lumina2" in str(error), kind
            assert "\n" not in str(error)
            return None

    usual = {"qwen_3_4b": ("lumina2", "flux2"), "qwen3vl_4b_fp8_scaled": ("krea2", "flux2")}[file]
    wanted = dict(filter(None, map(taken, usual)))
    assert len(wanted) == 2
    kinds = [kind for kind in loader.INPUT_TYPES()["required"]["type"][0] if kind not in usual]
    found = {kind: taken(kind) for kind in kinds}
    assert all(torch.equal(given[1], wanted[given[0]]) for given in found.values() if given is not None)
    families_of_types = {kind: given and given[0] for kind, given in found.items()}
    if file == "qwen_3_4b":
        assert set(families_of_types.values()) == {"z_image"} and "stable_diffusion" in kinds
    else:
        assert set(families_of_types.values()) == {None}


# -- the nodes --------------------------------------------------------------------------------------------------------


def refused_in(run: Run, graph: dict[str, Any], kind: str) -> str:
    """The message of a run that must end at the node of this class."""
    assert run.status == "error" and run.message("execution_error")["node_id"] == node_of(graph, kind), run.error
    return run.error


@pytest.mark.parametrize(
    ("template", "vae"), [("z_image_turbo_train", "flux2-vae"), ("klein_train", "ae"), ("klein_edit_train", "ae")]
)
def test_build_teacher_condition_refuses_the_other_familys_vae(
    comfyui: ComfyUI, files: None, template: str, vae: str
) -> None:
    graph = {key: node for key, node in shrunk(shipped(template)).items() if node["class_type"] in ENCODES}
    graph[node_of(graph, "VAELoader")]["inputs"]["vae_name"] = f"{vae}.safetensors"
    graph[node_of(graph, "DOPSD_LoadDataset")]["inputs"]["folder"] = "fits"
    build = node_of(graph, "DOPSD_BuildTeacherCondition")
    graph["show"] = {"class_type": "PreviewAny", "inputs": {"source": [build, 0]}}
    error = refused_in(comfyui.execute(graph), graph, "DOPSD_BuildTeacherCondition")
    assert error.startswith("the input vae is ") and "\n" not in error.strip()


@pytest.mark.parametrize("kind", ["DOPSD_TrainLoRA", "DOPSD_TeacherPreview"])
def test_a_vae_for_previews_is_looked_at_before_anything_is_drawn(comfyui: ComfyUI, files: None, kind: str) -> None:
    """Not at the first preview."""
    graph = training("fits-vae", steps=2)
    graph["wrong"] = {"class_type": "VAELoader", "inputs": {"vae_name": "flux2-vae.safetensors"}}
    if kind == "DOPSD_TrainLoRA":
        graph["train"]["inputs"]["vae"] = ["wrong", 0]
    else:
        del graph["train"]
        inputs = {"model": ["models", 0], "conditions": ["conditions", 0], "vae": ["wrong", 0], "seed": 0, "steps": 0}
        graph["look"] = {"class_type": kind, "inputs": {**inputs, "pictures": 1}}
    error = refused_in(comfyui.execute(graph), graph, kind)
    assert error.startswith("the input vae is FLUX.2-klein's, the MODEL is the demo model's: connect Load Demo Models")
    assert not list((comfyui.output / "dopsd").glob("fits-vae-*"))


def test_few_step_sampler_reads_the_models_own_text_encoder(comfyui: ComfyUI) -> None:
    model = toy.z_image()
    (condition,) = features(comfyui, model, 9)
    given = give_values(comfyui, ("MODEL", "CONDITIONING"), [model, [[torch.zeros(1, 9, 2560), {}]]])
    settings = {"seed": 0, "steps": 2, "width": 64, "height": 64, "batch_size": 1, "sampler": "euler"}
    inputs = {"model": ["given", 0], "positive": ["given", 1], **settings}
    graph = {
        "given": given,
        "sample": {"class_type": "DOPSD_FewStepSampler", "inputs": inputs},
        "show": {"class_type": "PreviewAny", "inputs": {"source": ["sample", 0]}},
    }
    error = refused_in(comfyui.execute(graph), graph, "DOPSD_FewStepSampler")
    assert error.startswith("positive has features of width 2560, and this MODEL reads width 64")
    graph["given"] = give_values(comfyui, ("MODEL", "CONDITIONING"), [model, [[condition.features[None], {}]]])
    assert comfyui.execute(graph).status == "success"
