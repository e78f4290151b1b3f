"""Compare LoRA: the grid shows what ComfyUI's own nodes give, and leaves the model as it was."""

from __future__ import annotations

import hashlib
from typing import Any

import pytest
import torch
import toy
from loras import demo_lora, give, random_lora
from safetensors.torch import save_file

TILE, LEFT, TOP, STEP = 128, 210, 44 + 17, 128 + 6  # the grid's geometry for 64x64 images
PROMPTS = "a [V] badge, top, on a sand background\n\n a red star badge, left, on a navy background "


@pytest.fixture(scope="module")
def tensors(comfyui) -> dict[str, torch.Tensor]:
    return demo_lora(comfyui)


def graph(**inputs: Any) -> dict:
    settings = {
        "model": ["1", 0], "clip": ["1", 1], "vae": ["1", 2], "prompts": PROMPTS, "strengths": "0.5, 1", "seed": 7,
        "steps": 0, "width": 64, "height": 64, "lora_name": "none", **inputs,
    }  # fmt: skip
    return {
        "1": {"class_type": "DOPSD_LoadDemoModels", "inputs": {}},
        "2": {"class_type": "DOPSD_CompareLoRA", "inputs": settings},
    }


def with_lora(comfyui, lora: Any, **inputs: Any) -> dict:
    return {"0": give(comfyui, lora), **graph(lora=["0", 0], **inputs)}


def cell(image: torch.Tensor, row: int, column: int) -> torch.Tensor:
    """The model's own pixels [64, 64, 3] of an image of the grid."""
    y, x = TOP + row * STEP, LEFT + column * STEP
    return image[0, y : y + TILE : 2, x : x + TILE : 2]


def sampled(comfyui, strength: float | None, prompt: str, seed: int, tensors: dict) -> torch.Tensor:
    """The same image by way of ComfyUI's loader, the Few-Step Sampler and VAE Decode."""
    steps = {"steps": 0, "width": 64, "height": 64, "batch_size": 1, "sampler": "euler"}
    nodes = {
        "1": {"class_type": "DOPSD_LoadDemoModels", "inputs": {}},
        "2": {"class_type": "CLIPTextEncode", "inputs": {"clip": ["1", 1], "text": prompt}},
        "3": {
            "class_type": "DOPSD_FewStepSampler",
            "inputs": {"model": ["1", 0], "positive": ["2", 0], "seed": seed, **steps},
        },
        "4": {"class_type": "VAEDecode", "inputs": {"samples": ["3", 0], "vae": ["1", 2]}},
        "5": {"class_type": "PreviewImage", "inputs": {"images": ["4", 0]}},
    }
    if strength is not None:
        nodes["6"] = give(comfyui, tensors)
        wanted = {"model": ["1", 0], "lora": ["6", 0], "strength_model": strength, "bypass": False}
        nodes["7"] = {"class_type": "LoraModelLoader", "inputs": wanted}
        nodes["3"]["inputs"]["model"] = ["7", 0]
    run = comfyui.execute(nodes)
    assert run.status == "success", run.error
    return (run.value("4")[0].clamp(0, 1) * 255).round() / 255


def test_each_cell_is_what_the_stock_nodes_give(comfyui, tensors, artefacts) -> None:
    run = comfyui.execute(with_lora(comfyui, tensors))
    assert run.status == "success", run.error
    image = run.value("2")
    comfyui.core("image_grid").to_images(image.permute(0, 3, 1, 2))[0].save(artefacts / "compare_lora.png")
    first, second = (line.strip() for line in PROMPTS.split("\n") if line)
    for row, (prompt, seed) in enumerate([(first, 7), (second, 8)]):
        for column, strength in enumerate([None, 0.5, 1.0]):
            wanted = sampled(comfyui, strength, prompt, seed, tensors)
            assert torch.allclose(cell(image, row, column), wanted, atol=1.5 / 255), (row, column)
    assert (cell(image, 0, 0) - cell(image, 0, 2)).abs().mean() > 0.02, "the LoRA is to be seen"
    assert (cell(image, 0, 0) - cell(image, 1, 0)).abs().mean() > 0.02
    assert run.outputs["2"]["images"] and run.of("progress", "2")[-1].data["max"] == 6
    assert run.texts("2")[0] == f"the connected LoRA: {len(tensors)} of {len(tensors)} tensors fit and are used"


def test_a_file_and_the_connected_lora_give_the_same(comfyui, tensors) -> None:
    given = {"lora": ["0", 0], "filename_prefix": "loras/compared", "dtype": "fp32", "peft_folder": False}
    saving = {"0": give(comfyui, tensors), "1": {"class_type": "DOPSD_SaveLoRA", "inputs": given}}
    assert comfyui.execute(saving).status == "success"
    from_file = comfyui.execute(graph(lora_name="compared_00001_.safetensors", strengths="1"))
    assert from_file.status == "success", from_file.error
    connected = comfyui.execute(with_lora(comfyui, tensors, strengths="1", lora_name="compared_00001_.safetensors"))
    for row in range(2):
        assert torch.equal(cell(from_file.value("2"), row, 1), cell(connected.value("2"), row, 1))


def test_v_is_the_trigger_that_the_lora_names(comfyui, tensors) -> None:
    """Connected, and in a file; the base is drawn with the same words."""
    lora = comfyui.module("nodes.comfy_host.sockets").TrainedLora(tensors, {"dopsd_trigger": "[E6]"})
    given = {"lora": ["0", 0], "filename_prefix": "loras/named", "dtype": "fp32", "peft_folder": False}
    saving = {"0": give(comfyui, lora), "1": {"class_type": "DOPSD_SaveLoRA", "inputs": given}}
    assert comfyui.execute(saving).status == "success"
    placeholder, literal = (f"a {name} badge, top, on a sand background" for name in ("[V]", "[E6]"))
    runs = [
        comfyui.execute(with_lora(comfyui, tensors, strengths="1", prompts=literal)),
        comfyui.execute(with_lora(comfyui, lora, strengths="1", prompts=placeholder)),
        comfyui.execute(graph(lora_name="named_00001_.safetensors", strengths="1", prompts=placeholder)),
    ]
    assert all(run.status == "success" for run in runs), [run.error for run in runs]
    for column in range(2):
        wanted, *others = (cell(run.value("2"), 0, column) for run in runs)
        assert all(torch.equal(other, wanted) for other in others)


def weights_digest(model: Any) -> str:
    digest = hashlib.sha256()
    for name, value in sorted(model.model.state_dict().items()):
        digest.update(name.encode() + value.float().cpu().numpy().tobytes())
    return digest.hexdigest()


def test_the_model_is_as_it_was(comfyui, tensors) -> None:
    run = comfyui.execute(with_lora(comfyui, tensors, strengths="1, -2"))
    model = run.value("1")
    assert not model.patches
    comfyui.call(
        comfyui.module("nodes.comfy_host.denoiser").ComfyDenoiser(model).load, (1, 16, 8, 8)
    )  # takes patches off
    assert weights_digest(model) == weights_digest(
        comfyui.call(comfyui.module("nodes.comfy_host.demo_models").load_model)
    )


def test_foreign_keys_are_counted(comfyui, tensors) -> None:
    mixed = {**tensors, "transformer.nowhere.lora_A.weight": torch.ones(1, 1)}
    run = comfyui.execute(with_lora(comfyui, mixed, strengths="1", prompts="a badge"))
    assert f"{len(tensors)} of {len(mixed)} tensors" in run.texts("2")[0]


def test_a_lora_of_another_model_is_refused(comfyui) -> None:
    foreign = {f"transformer.blocks.0.lora_{part}.weight": torch.ones(2, 2) for part in "AB"}
    run = comfyui.execute(with_lora(comfyui, foreign))
    assert run.error.startswith("none of the LoRA's 2 tensors fit this model (the first is transformer.blocks.0.lora_A")


def test_the_right_names_with_the_wrong_shapes_are_refused(comfyui, tensors) -> None:
    wide = {key: torch.ones(4, 99) if ".lora_A." in key else torch.ones(99, 4) for key in tensors}
    run = comfyui.execute(with_lora(comfyui, wide))
    assert run.status == "error" and "trained for another model" in run.error, run.error


NORM, OUT = "diffusion_model.noise_refiner.0.attention.q_norm", "diffusion_model.layers.0.attention.out"
"""Of the demo model: a norm of 128 and a Linear of 256 to 256."""


def loha(rows: int, columns: int) -> dict[str, torch.Tensor]:
    sizes = {"a": (rows, 2), "b": (2, columns)}
    return {f"{OUT}.hada_w{number}_{half}": torch.ones(sizes[half]) for number in "12" for half in "ab"}


def test_each_tensor_that_does_not_fit_is_counted(comfyui, tensors) -> None:
    """ComfyUI applies what fits and logs the rest, also where one file has both."""
    first = next(key for key in tensors if ".lora_A." in key).removesuffix(".lora_A.weight")
    mixed = {**tensors, f"{first}.lora_B.weight": torch.ones(99, 4)}
    run = comfyui.execute(with_lora(comfyui, mixed, strengths="1", prompts="a badge"))
    assert (
        f"{len(mixed) - 2} of {len(mixed)} tensors fit and are used, 2 are not, such as {first}." in run.texts("2")[0]
    )


@pytest.mark.parametrize(
    ("lora", "count"),
    [
        ({f"{NORM}.diff": torch.ones(128)}, 1),
        ({f"{NORM}.diff": torch.ones(5)}, 0),
        ({f"{OUT}.lokr_w1": torch.ones(2, 2), f"{OUT}.lokr_w2": torch.ones(128, 128)}, 2),
        ({f"{OUT}.lokr_w1": torch.ones(2, 2), f"{OUT}.lokr_w2": torch.ones(256, 256)}, 0),
        (loha(256, 256), 4),
        (loha(7, 9), 0),
        ({f"{OUT}.lora_up.weight": torch.ones(256, 2), f"{OUT}.lora_down.weight": torch.ones(2, 256)}, 2),
        ({f"{OUT}.lora_up.weight": torch.ones(256, 2), f"{OUT}.lora_down.weight": torch.ones(2, 256),
          f"{OUT}.alpha": torch.tensor(2.0), f"{OUT}.diff": torch.ones(256, 256)}, 1),
    ],
    ids=["diff", "wide diff", "LoKr", "wide LoKr", "LoHa", "wide LoHa", "LoRA", "a LoRA that a diff replaces"],
)  # fmt: skip
def test_other_kinds_than_lora_are_counted_by_what_comfyui_applies(comfyui, lora: dict, count: int) -> None:
    model = comfyui.call(comfyui.module("nodes.comfy_host.demo_models").load_model)
    used_keys = comfyui.module("nodes.comfy_host.lora_fit").used_keys
    if count:
        assert len(used_keys(model, lora)) == count
    else:
        with pytest.raises(ValueError, match=f"none of the LoRA's {len(lora)} tensors fit"):
            used_keys(model, lora)


def test_half_a_lora_is_one_sentence(comfyui) -> None:
    run = comfyui.execute(with_lora(comfyui, {f"{OUT}.hada_w1_a": torch.ones(256, 2)}))
    assert run.status == "error" and run.error.startswith("ComfyUI cannot apply this LoRA"), run.error


@pytest.mark.long
def test_a_damaged_file_is_named(comfyui) -> None:
    path = comfyui.base / "models" / "loras" / "damaged.safetensors"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("hello")
    run = comfyui.execute(graph(lora_name=path.name))
    path.unlink()
    assert run.status == "error" and run.error.startswith("damaged.safetensors cannot be read"), run.error


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("loader", [True, False], ids=["Load LoRA", "lora_name"])
def test_a_file_that_is_not_finite_is_named(comfyui, tensors, value: float, loader: bool) -> None:
    """Its images would be black or noise, without a word from ComfyUI."""
    path, key = comfyui.base / "models" / "loras" / "diverged.safetensors", min(tensors)
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({**tensors, key: torch.full_like(tensors[key], value).to(torch.bfloat16)}, path)
    nodes = graph(lora=["0", 0]) if loader else graph(lora_name=path.name)
    nodes["0"] = {"class_type": "DOPSD_LoadLoRA", "inputs": {"lora_name": path.name}}
    run = comfyui.execute(nodes)
    path.unlink()
    assert run.status == "error", run.status
    assert run.error.startswith(f"diverged.safetensors is damaged: its tensor '{key}' contains NaN or infinity")


def test_what_does_not_fit_need_not_be_finite(comfyui, tensors) -> None:
    model = comfyui.call(comfyui.module("nodes.comfy_host.demo_models").load_model)
    mixed = {**tensors, "transformer.nowhere.lora_A.weight": torch.full((1, 1), torch.nan)}
    assert "1 are not, such as" in comfyui.module("nodes.comfy_host.lora_use").used_line("it", model, mixed)


def test_every_strength_has_a_column(comfyui, tensors) -> None:
    few, many = (
        comfyui.execute(with_lora(comfyui, tensors, strengths=strengths, prompts="a badge", steps=1)).value("2")
        for strengths in ("0.1", "0.1, 0.10000001")
    )
    assert many.shape[2] == few.shape[2] + STEP


@pytest.mark.parametrize(
    ("inputs", "sentence"),
    [
        ({}, "there is no LoRA to compare: choose a file in lora_name, or connect lora"),
        ({"prompts": " \n "}, "prompts: give 1 to 32 prompts, one per line, there are 0"),
        ({"prompts": "x\n" * 33}, "prompts: give 1 to 32 prompts, one per line, there are 33"),
        ({"prompts": "a badge\na\0b"}, "prompts: line 2: the text contains NUL characters"),
    ],
    ids=["no lora", "no prompts", "many prompts", "no text"],
)
def test_what_is_missing_is_one_sentence(comfyui, inputs: dict, sentence: str) -> None:
    run = comfyui.execute(graph(**inputs))
    assert run.status in ("error", "refused") and sentence in run.error


@pytest.mark.parametrize(
    ("strengths", "sentence"),
    [
        ("", "strengths: give 1 to 8 numbers separated by commas, there are 0"),
        ("0.5, strong", "strengths: 'strong' is not a number; write numbers separated by commas: 0.5, 1.0"),
        ("1 2", "strengths: '1 2' is not a number"),
        ("1_0", "strengths: '1_0' is not a number"),
        ("11", "strengths: 11 is not within -10..10"),
        ("nan", "strengths: 'nan' is not a number"),
        ("1,2,3,4,5,6,7,8,9", "there are 9"),
    ],
)
def test_bad_strengths_are_refused_before_anything_runs(comfyui, strengths: str, sentence: str) -> None:
    run = comfyui.execute(graph(strengths=strengths))
    assert run.status == "refused" and sentence in run.error and not run.events


def test_strengths_are_read_generously(comfyui) -> None:
    parse = comfyui.module("nodes.comfy_host.lora_use").parse_strengths
    assert parse("1; .5,\n 0,1.0,") == [1.0, 0.5, 0.0]


def test_cancelling_stops_between_images(comfyui, tensors) -> None:
    def cancel(event) -> None:
        if event.kind == "progress":
            comfyui.interrupt()

    run = comfyui.execute(with_lora(comfyui, tensors), on_event=cancel)
    assert run.status == "interrupted" and len(run.of("progress", "2")) == 1


def test_real_sizes_are_scaled_down(comfyui) -> None:
    columns = [[torch.rand(3, 768, 1280)] * 2 for _ in range(3)]
    image = comfyui.module("nodes.compare_lora").draw_grid("title", ["one", "two"], ["base", "a", "b"], columns)
    assert image.width < 1700 and image.height < 700


KLEIN = {
    "image_model": "flux2", "axes_dim": [32, 32, 32, 32], "num_heads": 1, "mlp_ratio": 3.0, "theta": 2000,
    "out_channels": 128, "global_modulation": True, "mlp_silu_act": True, "qkv_bias": False, "ops_bias": False,
    "default_ref_method": "index", "ref_index_scale": 10.0, "txt_ids_dims": [3], "in_channels": 128, "hidden_size": 128,
    "context_in_dim": 192, "patch_size": 1, "vec_in_dim": None, "depth": 1, "depth_single_blocks": 2,
    "guidance_embed": False, "yak_mlp": False, "txt_norm": False,
}  # fmt: skip


def test_kleins_names_are_counted_too(comfyui, tensors) -> None:
    import comfy.model_patcher
    import comfy.supported_models

    config = comfy.supported_models.Flux2(KLEIN)
    config.set_inference_dtype(torch.float32, None)
    cpu = torch.device("cpu")
    model = comfy.model_patcher.ModelPatcher(toy.network(config), load_device=cpu, offload_device=cpu)
    lora = random_lora(comfyui, model, 0.3, 4, 0)
    used_keys = comfyui.module("nodes.comfy_host.lora_fit").used_keys
    assert used_keys(model, lora) == lora.keys() and len(lora) > 20
    demo = comfyui.call(comfyui.module("nodes.comfy_host.demo_models").load_model)
    for other, foreign in ((model, tensors), (demo, lora)):
        with pytest.raises(ValueError, match="trained for another model"):
            used_keys(other, foreign)
