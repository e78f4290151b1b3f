"""The name of the file that a MODEL comes from, by loader and by what lies between loader and training.

ComfyUI's own loaders leave it on the MODEL. Those that build the MODEL from tensors, such as ComfyUI-GGUF's, do not:
then the graph names it, or nobody does.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import gguf_files
import pytest
import stock_files
import torch
from conftest import give_up
from inprocess import ComfyUI
from loras import give, random_lora
from safetensors.torch import save_file

GGUF, FILE, WHOLE = "z-image-Q8_0.gguf", "z_image_turbo_bf16.safetensors", "all in one.safetensors"

Graph = dict[str, dict[str, Any]]


def node(kind: str, **inputs: Any) -> dict[str, Any]:
    return {"class_type": kind, "inputs": inputs}


LOADERS: Mapping[str, tuple[dict[str, Any], str]] = {
    # the loader, and the name that is found
    "Load Diffusion Model": (node("UNETLoader", unet_name=FILE, weight_dtype="default"), FILE),
    "Load Diffusion Model in fp8": (node("UNETLoader", unet_name=FILE, weight_dtype="fp8_e4m3fn"), FILE),
    "Load Checkpoint": (node("CheckpointLoaderSimple", ckpt_name=f"sub/{WHOLE}"), WHOLE),
    "Load Demo Models": (node("DOPSD_LoadDemoModels"), "dopsd_demo_turbo_bf16.safetensors"),
    "GGUF": (node("UnetLoaderGGUF", unet_name=GGUF), GGUF),
    "GGUF/Advanced": (
        node(
            "UnetLoaderGGUFAdvanced", unet_name=GGUF, dequant_dtype="float32", patch_dtype="default",
            patch_on_device=False,
        ),
        GGUF,
    ),
    "from tensors": (node("TestFromTensors", file=f"sub/{FILE}"), FILE),
    "from tensors, with no name": (node("TestFromTensors", file="elsewhere"), ""),
}  # fmt: skip

BETWEEN: Mapping[str, dict[str, Any]] = {
    "LoRA": node("LoraLoaderModelOnly", model=["load", 0], lora_name="between.safetensors", strength_model=0.5),
    "LoRA and CLIP": node(
        "LoraLoader", model=["load", 0], clip=["checkpoint", 0], lora_name="between.safetensors", strength_model=0.5,
        strength_clip=1.0,
    ),
    "LoRA of a link": node("LoraModelLoader", model=["load", 0], lora=["lora", 0], strength_model=0.5, bypass=False),
    "sampling": node("ModelSamplingAuraFlow", model=["load", 0], shift=4.0),
    "merge with itself": node("ModelMergeSimple", model1=["load", 0], model2=["load", 0], ratio=0.5),
    "reroute of any kind": node("TestAny", value=["load", 0]),
    "a node that another one added": node("TestExpand", model=["load", 0]),
}  # fmt: skip


def make_probes(comfyui: ComfyUI) -> dict[str, Any]:
    """Nodes that say a MODEL's name, load one without leaving its name, pass one on, and add a node to the graph."""
    import comfy.sd
    from comfy_api.latest import io

    base_name = comfyui.module("nodes.comfy_host.base_name").base_name

    class Probe(io.ComfyNode):
        @classmethod
        def define_schema(cls) -> io.Schema:
            return io.Schema(
                node_id="TestProbe", inputs=[io.Model.Input("model")], outputs=[io.String.Output()],
                hidden=[io.Hidden.unique_id, io.Hidden.dynprompt], is_output_node=True,
            )  # fmt: skip

        @classmethod
        def execute(cls, model: Any) -> io.NodeOutput:
            return io.NodeOutput(base_name(model, cls))

    class FromTensors:
        RETURN_TYPES, FUNCTION, CATEGORY = ("MODEL",), "load", "tests"

        @classmethod
        def INPUT_TYPES(cls) -> dict:
            return {"required": {"file": ("STRING", {})}}

        def load(self, file: str) -> tuple:
            return (comfy.sd.load_diffusion_model_state_dict(stock_files.z_image()),)

    class Clip(FromTensors):
        RETURN_TYPES = ("CLIP",)

        def load(self, file: str) -> tuple:
            return (comfyui.module("nodes.comfy_host.demo_models").load_clip(),)

    class PassOn:
        RETURN_TYPES, FUNCTION, CATEGORY = ("*",), "give", "tests"

        @classmethod
        def INPUT_TYPES(cls) -> dict:
            return {"required": {"value": ("*", {})}}

        @classmethod
        def VALIDATE_INPUTS(cls, input_types: Any) -> bool:
            return True

        def give(self, value: Any) -> tuple:
            return (value,)

    class Expand:
        RETURN_TYPES, FUNCTION, CATEGORY = ("MODEL",), "give", "tests"

        @classmethod
        def INPUT_TYPES(cls) -> dict:
            return {"required": {"model": ("MODEL", {"rawLink": True})}}

        def give(self, model: Any) -> dict:
            added = node("ModelSamplingAuraFlow", model=model, shift=4.0)
            return {"result": (["added", 0],), "expand": {"added": added}}

    return {
        "TestProbe": Probe, "TestFromTensors": FromTensors, "TestClip": Clip, "TestAny": PassOn, "TestExpand": Expand,
    }  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def files(comfyui: ComfyUI) -> Iterator[None]:
    """The pack, the probes and small files under the names above."""
    if reason := gguf_files.why_not():
        give_up(reason)
    gguf_files.load_pack(comfyui)
    probes = comfyui.call(make_probes, comfyui)
    comfyui.nodes.NODE_CLASS_MAPPINGS.update(probes)
    models = comfyui.base / "models"
    folder, checkpoint = models / "diffusion_models", models / "checkpoints" / "sub" / WHOLE
    with stock_files.thin():
        written = stock_files.write(models, "diffusion_models/z_image_turbo_bf16")
        gguf_files.write(folder / GGUF, stock_files.z_image(), "lumina2", "Q8_0")
        for path in (folder / "sub" / FILE, folder / "other.safetensors", checkpoint, models / "loras" / "x"):
            path.parent.mkdir(parents=True, exist_ok=True)
        state = {f"model.diffusion_model.{key}": value for key, value in stock_files.z_image().items()}
        save_file(state, checkpoint)
        (folder / "sub" / FILE).write_bytes((folder / FILE).read_bytes())
        (folder / "other.safetensors").write_bytes((folder / FILE).read_bytes())
        halves = {"A": torch.ones(2, 256), "B": torch.ones(256, 2)}
        lora = {f"diffusion_model.layers.0.attention.out.lora_{half}.weight": value for half, value in halves.items()}
        save_file(lora, models / "loras" / "between.safetensors")
        yield
    own = (folder / GGUF, folder / "sub" / FILE, folder / "other.safetensors", checkpoint)
    for path in (*written, *own, models / "loras" / "between.safetensors"):
        path.unlink()
    for kind in probes:
        del comfyui.nodes.NODE_CLASS_MAPPINGS[kind]


def named(comfyui: ComfyUI, **nodes: dict[str, Any]) -> str:
    """What the probe at node "last" finds."""
    run = comfyui.execute({**nodes, "probe": node("TestProbe", model=["last", 0])})
    assert run.status == "success", run.error or run.refusal
    return run.value("probe")


@pytest.mark.parametrize("loader", LOADERS)
def test_each_loader(comfyui: ComfyUI, loader: str) -> None:
    made, name = LOADERS[loader]
    assert named(comfyui, last=made) == name


@pytest.mark.parametrize("loader", ["Load Diffusion Model", "GGUF"])
@pytest.mark.parametrize("between", BETWEEN)
def test_what_lies_between_keeps_the_name(comfyui: ComfyUI, loader: str, between: str) -> None:
    if (loader, between) == ("GGUF", "merge with itself"):
        loader = "from tensors"  # ComfyUI-GGUF's weights cannot be merged
    made, name = LOADERS[loader]
    graph = {"load": made, "last": BETWEEN[between]}
    if between == "LoRA and CLIP":  # whose file is none of the MODEL
        graph["checkpoint"] = node("TestClip", file=f"sub/{WHOLE}")
    if between == "LoRA of a link":
        model = comfyui.call(lambda: comfyui.nodes.UNETLoader().load_unet(FILE, "default")[0])
        graph["lora"] = give(comfyui, random_lora(comfyui, model, 0.5, 4, 0))
    assert named(comfyui, **graph) == name


def test_a_name_that_comes_over_a_link(comfyui: ComfyUI) -> None:
    text = node("PrimitiveString", value=f"sub/{FILE}")
    assert named(comfyui, text=text, last=node("TestFromTensors", file=["text", 0])) == FILE


def test_one_of_two_files_is_not_guessed(comfyui: ComfyUI) -> None:
    files = {"a": node("TestFromTensors", file=FILE), "b": node("TestFromTensors", file="other.safetensors")}
    merge = node("ModelMergeSimple", model1=["a", 0], model2=["b", 0], ratio=0.5)
    assert named(comfyui, **files, last=merge) == ""
    same = files | {"b": node("TestFromTensors", file=FILE)}
    assert named(comfyui, **same, last=merge) == FILE
    merge["inputs"] |= {"model1": ["stock", 0], "model2": ["a", 0]}
    assert named(comfyui, **files, stock=LOADERS["Load Diffusion Model"][0], last=merge) == FILE


def test_outside_of_a_graph_only_the_model_is_asked(comfyui: ComfyUI) -> None:
    base_name = comfyui.module("nodes.comfy_host.base_name").base_name
    model = comfyui.call(lambda: comfyui.nodes.UNETLoader().load_unet(FILE, "default")[0])
    assert base_name(model) == FILE
    model.cached_patcher_init = None
    assert base_name(model) == base_name(model, comfyui.pack_nodes["DOPSD_TrainLoRA"]) == ""
