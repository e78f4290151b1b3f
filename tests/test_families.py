"""Families are data: geometry, targets, and the names of fused projections."""

import itertools

import pytest
import torch

from dopsd_core.adapters.targets import match_targets
from dopsd_core.conditioning.encode import Condition
from dopsd_core.denoiser import plain_linear_sites
from dopsd_core.families import FAMILIES, FLUX2_KLEIN, KREA2, QWEN_IMAGE21, Z_IMAGE, get_family


def test_registry_is_by_name():
    assert get_family("z_image") is Z_IMAGE
    assert all(name == family.name for name, family in FAMILIES.items())
    with pytest.raises(ValueError, match="'flux1'; known families: flux2_klein, krea2, qwen_image21, z_image"):
        get_family("flux1")


def test_grids():
    assert Z_IMAGE.sigmas(4, 64, 64) == pytest.approx((1, 0.9, 0.75, 0.5, 0))
    assert Z_IMAGE.sigmas(4, 64, 64) == Z_IMAGE.sigmas(4, 1024, 1024)
    assert FLUX2_KLEIN.sigmas(4, 512, 512)[1] < FLUX2_KLEIN.sigmas(4, 1024, 1024)[1]
    eight = (1, 0.956724, 0.904531, 0.840349, 0.759511, 0.654567, 0.512844, 0.310901, 0)
    assert KREA2.sigmas(8, 64, 64) == pytest.approx(eight, abs=1e-6)
    assert KREA2.sigmas(4, 1024, 512) == pytest.approx(eight[::2], abs=1e-6)


@pytest.mark.parametrize(
    ("family", "shape"), [(Z_IMAGE, (16, 96, 64)), (FLUX2_KLEIN, (128, 48, 32)), (KREA2, (16, 96, 64))]
)
def test_latent_shape(family, shape):
    assert family.latent_shape(512, 768) == shape
    with pytest.raises(ValueError, match="multiples of 16 pixels, got 500x768"):
        family.latent_shape(500, 768)


def test_references_are_tokens_of_the_image():
    """klein has one token per latent pixel, Z-Image one per 2 x 2; references may have sizes of their own."""
    text = torch.zeros(7, 3)
    assert Z_IMAGE.tokens((16, 8, 6), Condition(text)) == (12, 7)
    assert KREA2.tokens((16, 8, 6), Condition(text)) == (12, 7)
    assert QWEN_IMAGE21.tokens((64, 8, 6), Condition(text, (torch.zeros(64, 2, 4),))) == (48 + 8, 7)
    references = (torch.zeros(128, 4, 5), torch.zeros(128, 2, 2))
    assert FLUX2_KLEIN.tokens((128, 8, 6), Condition(text, references)) == (48 + 20 + 4, 7)


def test_steps_that_the_models_were_distilled_for():
    """Krea 2's and Qwen-Image 2.1's are 8; training takes 4 of its own."""
    assert [family.sample_steps for family in (KREA2, QWEN_IMAGE21)] == [8, 8]
    assert {family.rollout_steps for family in FAMILIES.values()} == {4}


def test_teachers_of_the_families_with_a_vision_tower():
    """The first is the default. Krea 2 reads no reference images."""
    assert KREA2.teachers == ("vlm",)
    assert QWEN_IMAGE21.teachers == ("edit", "vlm", "edit_target")


@pytest.mark.parametrize("family", FAMILIES.values(), ids=lambda f: f.name)
def test_default_lora_keeps_the_papers_scale(family):
    assert (family.lora_config().rank, family.lora_config().scale) == (64, 2.0)
    assert family.lora_config(rank=16).scale == 2.0
    assert family.lora_config(rank=16, alpha=16.0).scale == 1.0


def test_z_image_names():
    parts = Z_IMAGE.native_parts("noise_refiner.1.attention.qkv", 96)
    assert [(p.name, p.start, p.stop) for p in parts] == [
        ("noise_refiner.1.attention.to_q", 0, 32),
        ("noise_refiner.1.attention.to_k", 32, 64),
        ("noise_refiner.1.attention.to_v", 64, 96),
    ]
    assert Z_IMAGE.native_parts("layers.0.attention.out", 32)[0].name == "layers.0.attention.to_out.0"
    assert Z_IMAGE.native_parts("layers.0.feed_forward.w2", 32)[0].name == "layers.0.feed_forward.w2"
    with pytest.raises(ValueError, match="97 rows"):
        Z_IMAGE.native_parts("layers.0.attention.qkv", 97)


@pytest.mark.parametrize(
    ("native", "names"),
    [
        ("double_blocks.3.img_attn.qkv", ["attn.to_q", "attn.to_k", "attn.to_v"]),
        ("double_blocks.3.txt_attn.qkv", ["attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"]),
        ("double_blocks.3.img_attn.proj", ["attn.to_out.0"]),
        ("double_blocks.3.txt_attn.proj", ["attn.to_add_out"]),
        ("double_blocks.3.img_mlp.0", ["ff.linear_in"]),
        ("double_blocks.3.txt_mlp.2", ["ff_context.linear_out"]),
        ("single_blocks.3.linear1", ["attn.to_qkv_mlp_proj"]),
        ("single_blocks.3.linear2", ["attn.to_out"]),
    ],
)
def test_klein_names(native, names):
    stem = "transformer_blocks.3." if native.startswith("double") else "single_transformer_blocks.3."
    parts = FLUX2_KLEIN.native_parts(native, 96)
    assert [p.name for p in parts] == [stem + name for name in names]
    assert (parts[0].start, parts[-1].stop) == (0, 96)


def test_klein_leaves_other_names_alone():
    assert FLUX2_KLEIN.native_parts("img_in", 8)[0].name == "img_in"


def test_krea2_names():
    """The gate of the attention and that of the MLP have the same name in the original network."""
    tails = {
        "attn.wq": "attn.to_q", "attn.wk": "attn.to_k", "attn.wv": "attn.to_v", "attn.gate": "attn.to_gate",
        "attn.wo": "attn.to_out.0", "mlp.gate": "ff.gate", "mlp.up": "ff.up", "mlp.down": "ff.down",
    }  # fmt: skip
    places = {
        "blocks.3": "transformer_blocks.3",
        "txtfusion.layerwise_blocks.1": "text_fusion.layerwise_blocks.1",
        "txtfusion.refiner_blocks.0": "text_fusion.refiner_blocks.0",
    }
    for (native, place), (tail, name) in itertools.product(places.items(), tails.items()):
        (part,) = KREA2.native_parts(f"{native}.{tail}", 96)
        assert (part.name, part.start, part.stop) == (f"{place}.{name}", 0, 96)
    for name in ("first", "tmlp.0", "txtfusion.projector", "last.linear"):
        assert KREA2.native_parts(name, 8)[0].name == name


def test_krea2_trains_the_blocks_and_not_the_text_fusion():
    """Whose Linears end as those of the blocks do; a pattern selects them."""
    tails = ("attn.wq", "attn.gate", "mlp.gate")
    lists = ("blocks.11", "txtfusion.refiner_blocks.1")
    names = [KREA2.native_parts(f"{place}.{tail}", 8)[0].name for place in lists for tail in tails]
    of_these = tuple(t for t in KREA2.lora_targets if t.endswith(("to_q", "to_gate", "ff.gate")))
    assert match_targets(names, of_these) == frozenset(names[:3])
    assert match_targets([*names, "text_fusion.projector"], ["text_fusion.*_blocks.*"]) == frozenset(names[3:])


def test_qwen_image21_names_and_grid():
    """ComfyUI fuses the MLP's halves, the gate first. The published list is the grid; fewer steps are read from it."""
    parts = QWEN_IMAGE21.native_parts("transformer_blocks.3.img_mlp.gate_up", 96)
    stem = "transformer_blocks.3.img_mlp."
    assert [(p.name, p.start, p.stop) for p in parts] == [(f"{stem}gate_layer", 0, 48), (f"{stem}proj", 48, 96)]
    assert QWEN_IMAGE21.native_parts(f"{stem}out", 8)[0].name == f"{stem}out"
    eight = (1, 0.978453, 0.95418, 0.926626, 0.89508, 0.845148, 0.704534, 0.414568, 0)
    assert QWEN_IMAGE21.sigmas(8, 1024, 1024) == eight
    assert QWEN_IMAGE21.sigmas(4, 64, 64) == eight[::2]
    three = QWEN_IMAGE21.sigmas(3, 64, 64)
    assert three == pytest.approx((1, 0.95418 + 2 / 3 * (0.926626 - 0.95418), 0.845148 + (0.704534 - 0.845148) / 3, 0))
    assert QWEN_IMAGE21.latent_shape(64, 96) == (64, 6, 4)
    with pytest.raises(ValueError, match="multiples of 32"):
        QWEN_IMAGE21.latent_shape(48, 64)
    with pytest.raises(ValueError, match="num_steps"):
        QWEN_IMAGE21.sigmas(0, 64, 64)


@pytest.mark.parametrize(
    ("family", "kind", "modules", "parameters"),
    [
        (KREA2, "krea2.Krea2Transformer2DModel", 224, 214_695_936),
        (QWEN_IMAGE21, "qwenimage21.QwenImage21Transformer2DModel", 224, 167_772_160),
    ],
)
def test_the_lora_of_the_real_network(family, kind, modules, parameters):
    """Counted by peft, on diffusers' network without weights; rank * (inputs + outputs), summed."""
    peft = pytest.importorskip("peft")
    module, name = kind.split(".")
    network = getattr(pytest.importorskip(f"diffusers.models.transformers.transformer_{module}"), name)
    with torch.device("meta"):
        made = network()
    assert family.lora_config().size(plain_linear_sites(made)) == (modules, parameters)
    tails = {target.rpartition("*.")[2] for target in family.lora_targets}
    chosen = [n for n, _ in made.named_modules() if n.startswith("transformer_blocks.") and _tail_of(n) in tails]
    config = peft.LoraConfig(r=64, target_modules=chosen)
    peft.inject_adapter_in_model(config, made, low_cpu_mem_usage=True)
    counted = [value.numel() for n, value in made.named_parameters() if ".lora_" in n]
    assert (len(counted), sum(counted)) == (2 * modules, parameters)


def _tail_of(name: str) -> str:
    return name.split(".", 2)[2] if name.count(".") > 1 else ""
