"""Training continues from LoRAs of any trainer with exactly the effect that ComfyUI's own loader gives them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import klein_twins
import krea2_twins
import pytest
import torch
import twins
from graphs import training
from inprocess import ComfyUI
from loras import demo_lora, give, give_values
from safetensors.torch import save_file
from torch import Tensor

RANK, ALPHA = 4, 10.0
RUN_RANK, RUN_ALPHA = 14, 7.0


@dataclass(frozen=True, eq=False)
class Toy:
    """A MODEL, ComfyUI's own table from diffusers' names to its, the tails in ComfyUI's names of the Linears that are
    trained, and shapes of a latent and a text."""

    model: Any
    table: dict[str, Any]
    kinds: tuple[str, ...]
    latent: tuple[int, ...]
    text: tuple[int, int]

    def linears(self, native: bool) -> dict[str, tuple[int, int]]:
        """(rows, columns) of every Linear of the blocks under the original or diffusers' names; no line of ours."""
        weights = {k.removesuffix(".weight"): v.shape for k, v in self.model.model.diffusion_model.state_dict().items()}
        own = {
            name: tuple(shape)
            for name, shape in weights.items()
            if name.endswith(self.kinds) and not name.startswith("txtfusion.")
        }
        if native:
            return own
        there = {name.removesuffix(".weight") for name in self.in_diffusers()}
        found = {}
        for name, target in self.table.items():
            key, rows = (target, None) if isinstance(target, str) else (target[0], target[1] and target[1][2])
            key, name, is_weight = key.removesuffix(".weight"), name.removesuffix(".weight"), name.endswith(".weight")
            if is_weight and key in own and name in there:
                found[name] = (rows or own[key][0], own[key][1])
        return found

    def in_diffusers(self) -> Iterable[str]:
        """ComfyUI's table has names of several versions of FLUX; these are the network's."""
        if self.latent[1] == 128:
            return klein_twins.diffusers_klein(self.model).state_dict()
        if "first.weight" in self.table.values():
            return krea2_twins.diffusers_krea2(self.model).state_dict()
        return self.table


def z_image() -> Toy:
    from comfy.utils import z_image_to_diffusers

    model = twins.as_model(twins.diffusers_z_image())
    table = z_image_to_diffusers(model.model.model_config.unet_config)
    kinds = (".attention.qkv", ".attention.out", ".feed_forward.w1", ".feed_forward.w2", ".feed_forward.w3")
    return Toy(model, table, kinds, (1, 16, 10, 6), (19, 64))


def flux2_klein() -> Toy:
    from comfy.utils import flux_to_diffusers

    model = klein_twins.model()
    table = flux_to_diffusers(model.model.model_config.unet_config)
    kinds = ("_attn.qkv", "_attn.proj", "_mlp.0", "_mlp.2", ".linear1", ".linear2")
    return Toy(model, table, kinds, (1, 128, 5, 3), (512, 96))


def krea2() -> Toy:
    """The text fusion is not among the targets, and its Linears end as those of the blocks do."""
    from comfy.utils import krea2_to_diffusers

    model = krea2_twins.model()
    table = krea2_to_diffusers(model.model.model_config.unet_config)
    kinds = tuple(f".{name}" for name in ("wq", "wk", "wv", "wo", "attn.gate", "mlp.gate", "mlp.up", "mlp.down"))
    width = krea2_twins.TEXT_LAYERS * krea2_twins.TEXT_WIDTH
    return Toy(model, table, kinds, (1, 16, 10, 6), (19, width))


@pytest.fixture(scope="module", params=[z_image, flux2_klein, krea2], ids=lambda make: make.__name__)
def toy(comfyui: ComfyUI, request: pytest.FixtureRequest) -> Toy:
    return request.param()


def random_file(
    toy: Toy, native: bool, named: Callable[[str], str], down: str, up: str, alpha: float | None = None
) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    file = {}
    for name, (rows, columns) in sorted(toy.linears(native).items()):
        file[named(name) + down] = torch.randn(RANK, columns, generator=generator) * 0.1
        file[named(name) + up] = torch.randn(rows, RANK, generator=generator) * 0.1
        if alpha is not None:
            file[named(name) + ".alpha"] = torch.tensor(alpha)
    return file


def dotted(prefix: str) -> Callable[[str], str]:
    return lambda name: prefix + name


def flat(prefix: str) -> Callable[[str], str]:
    return lambda name: prefix + name.replace(".", "_")


def without_0(prefix: str) -> Callable[[str], str]:
    return lambda name: prefix + name.replace("to_out.0", "to_out")


AB, DOWN_UP = (".lora_A.weight", ".lora_B.weight"), (".lora_down.weight", ".lora_up.weight")
OF_BOTH = {
    "ours and diffusers": (False, dotted("transformer."), *AB),
    "with alpha": (False, dotted("transformer."), *AB, ALPHA),
    "no prefix": (False, dotted(""), *AB),
    "adapter's name": (False, dotted("transformer."), ".lora_A.default.weight", ".lora_B.default.weight"),
    "comfyui's trainer": (True, dotted("diffusion_model."), *DOWN_UP, ALPHA),
    "diffusion-pipe": (True, dotted("diffusion_model."), *AB),
    "lora_unet, original names": (True, flat("lora_unet_"), *DOWN_UP, ALPHA),
    "simpletuner": (False, flat("lycoris_"), *DOWN_UP, ALPHA),
}
OF_ONE = {
    "ai-toolkit": (z_image, (False, dotted("diffusion_model."), *AB)),
    "ai-toolkit with alpha": (z_image, (False, dotted("diffusion_model."), *AB, ALPHA)),
    "ai-toolkit on krea 2": (krea2, (True, dotted("diffusion_model."), *AB)),
    "a tool that drops the 0 of to_out": (krea2, (False, without_0("transformer."), *AB, ALPHA)),
    "onetrainer": (flux2_klein, (False, flat("lora_transformer_"), *DOWN_UP, ALPHA)),
}
NOT_IN_COMFYUI = {
    "peft": (False, dotted("base_model.model."), *AB),
    "peft around a pipeline's": (False, dotted("base_model.model.transformer."), *AB),
    "diffusers' names after ComfyUI's prefix": (False, dotted("diffusion_model."), *AB),
}


@pytest.mark.parametrize("made", OF_BOTH.values(), ids=OF_BOTH.keys())
def test_the_student_starts_as_the_stock_loader_draws(comfyui: ComfyUI, toy: Toy, made: tuple) -> None:
    assert_same_start(comfyui, toy, random_file(toy, *made))


@pytest.mark.parametrize(("build", "made"), OF_ONE.values(), ids=OF_ONE.keys())
def test_formats_of_one_family(comfyui: ComfyUI, build: Callable[[], Toy], made: tuple) -> None:
    toy = build()
    assert_same_start(comfyui, toy, random_file(toy, *made))


@pytest.mark.parametrize("made", NOT_IN_COMFYUI.values(), ids=NOT_IN_COMFYUI.keys())
def test_what_comfyui_cannot_load_has_its_own_effect_all_the_same(comfyui: ComfyUI, toy: Toy, made: tuple) -> None:
    as_loaded = random_file(toy, *OF_BOTH["ours and diffusers"])
    assert_same_start(comfyui, toy, random_file(toy, *made), as_loaded=as_loaded)


def test_ai_toolkits_other_prefix_on_krea_2(comfyui: ComfyUI) -> None:
    """ComfyUI does not load it, diffusers does."""
    toy = krea2()
    as_loaded = random_file(toy, True, dotted("diffusion_model."), *AB)
    assert_same_start(comfyui, toy, random_file(toy, True, dotted("base_model.model."), *AB), as_loaded=as_loaded)


def test_the_authors_checkpoint(comfyui: ComfyUI, toy: Toy) -> None:
    """Student and teacher in one file, under names that no loader knows; the student is what is continued."""
    as_loaded = random_file(toy, *OF_BOTH["ours and diffusers"])
    file = {}
    for key, value in as_loaded.items():
        name = key.replace("transformer.", "base_model.model.", 1).removesuffix("weight")
        file |= {f"{name}student.weight": value, f"{name}teacher.weight": torch.randn_like(value)}
    unused = f"{len(as_loaded)} tensors of it are not used: "
    assert_same_start(comfyui, toy, file, as_loaded=as_loaded, unused=unused)


def test_musubis_file_before_and_after_its_conversion(comfyui: ComfyUI) -> None:
    """Raw, ComfyUI loads none of its attention. Converted, q, k and v are one of three times the rank and alpha."""
    toy = z_image()
    raw = random_file(toy, False, flat("lora_unet_"), *DOWN_UP, ALPHA)
    converted = {key.replace("attention_to_out_0", "attention_out"): value for key, value in raw.items()}
    for name in [key.removesuffix("to_q.alpha") for key in raw if key.endswith("to_q.alpha")]:
        three = [[converted.pop(f"{name}to_{x}{kind}") for x in "qkv"] for kind in (*DOWN_UP, ".alpha")]
        converted[f"{name}qkv.lora_down.weight"] = torch.cat(three[0])
        converted[f"{name}qkv.lora_up.weight"] = torch.block_diag(*three[1])
        converted[f"{name}qkv.alpha"] = 3 * three[2][0]
    start = assert_same_start(comfyui, toy, converted)
    assert {value.shape[0] for key, value in start.items() if ".lora_A." in key} == {RANK}
    assert_same_start(comfyui, toy, raw, as_loaded=converted)


def assert_same_start(
    comfyui: ComfyUI, toy: Toy, file: dict[str, Tensor], as_loaded: dict[str, Tensor] | None = None, unused: str = ""
) -> dict[str, Tensor]:
    """Through Load LoRA (D-OPSD) and into a new run of another rank and alpha, against LoraLoaderModelOnly."""
    for name, tensors in (("start", file), ("stock", as_loaded or file)):
        (comfyui.output / "loras").mkdir(exist_ok=True)
        save_file(
            {key: value.clone() for key, value in tensors.items()}, comfyui.output / "loras" / f"{name}.safetensors"
        )
    model = toy.model
    graph = {
        "model": give_values(comfyui, ("MODEL",), [model]),
        "ours": {"class_type": "DOPSD_LoadLoRA", "inputs": {"lora_name": "start.safetensors"}},
        "stock": {
            "class_type": "LoraLoaderModelOnly",
            "inputs": {"model": ["model", 0], "lora_name": "stock.safetensors", "strength_model": 1.0},
        },
        "show": {"class_type": "PreviewAny", "inputs": {"source": ["ours", 0]}},
        "show_stock": {"class_type": "PreviewAny", "inputs": {"source": ["stock", 0]}},
    }
    run = comfyui.execute(graph)
    assert run.status == "success", run.error
    host, core = comfyui.module("nodes.comfy_host.denoiser"), comfyui.core
    denoiser = host.ComfyDenoiser(model)
    config = core("config").TrainConfig(adapter=denoiser.family.lora_config(RUN_RANK, RUN_ALPHA))
    start = comfyui.module("nodes.comfy_host.start").start_of(run.value("ours"), denoiser, config)
    assert all(unused and unused in note for note in start.notes) and bool(start.notes) == bool(unused)
    adapters = core("adapters.adapter_set").AdapterSet(denoiser.sites(), config.adapter, teacher="frozen")
    adapters.load_state(
        "student", core("adapters.lora_import").start_state(start.tensors, adapters.state(), config.adapter)
    )
    base, stock = predicted(comfyui, toy, model), predicted(comfyui, toy, run.value("stock"))
    with adapters.attached():
        ours = predicted(comfyui, toy, model)
    parts = [part.name for site in denoiser.sites() for part in site.parts]
    assert {key.rsplit(".lora_", 1)[0] for key in start.tensors} == core("adapters.targets").match_targets(
        parts, config.adapter.targets
    )
    assert (stock - base).norm() > 0.05 * base.norm()
    assert (ours - stock).norm() < 1e-4 * (stock - base).norm()
    return start.tensors


def predicted(comfyui: ComfyUI, toy: Toy, model: Any) -> Tensor:
    generator = torch.Generator().manual_seed(2)
    x, features = torch.randn(toy.latent, generator=generator), torch.randn(toy.text, generator=generator)
    condition = comfyui.core("conditioning.encode").Condition(features)
    with (
        torch.inference_mode(),
        comfyui.module("nodes.comfy_host.denoiser").ComfyDenoiser(model).loaded(x.shape) as denoiser,
    ):
        return denoiser.predict_x0(x, 0.75, [condition])


# -- D-OPSD Train LoRA -------------------------------------------------------------------------------------------------


def with_start(comfyui: ComfyUI, name: str, lora: dict[str, Tensor], **settings: Any) -> dict:
    graph = training(name, preview_every=0, probe_every=0, warmup=0, **settings)
    graph["start"] = give(comfyui, lora)
    graph["train"]["inputs"]["initial_lora"] = ["start", 0]
    return graph


def test_a_run_continues_from_the_lora(comfyui: ComfyUI) -> None:
    lora = demo_lora(comfyui, rank=4)
    still = comfyui.execute(with_start(comfyui, "still", lora, steps=1, rank=6, alpha=3.0, learning_rate=1e-9))
    assert still.status == "success", still.error
    out = still.value("train")
    assert out.keys() == lora.keys()
    for name in {key.rsplit(".lora_", 1)[0] for key in lora}:
        before, after = (t[f"{name}.lora_B.weight"].float() @ t[f"{name}.lora_A.weight"].float() for t in (lora, out))
        assert twins.relative(after, before) < 1e-2  # bf16 at most lies between
    assert "initial_lora" not in "".join(still.texts("train"))


@pytest.mark.long
def test_the_lora_is_a_setting_of_the_run(comfyui: ComfyUI) -> None:
    loras = [demo_lora(comfyui, rank=4, seed=seed) for seed in (0, 1)]
    runs = [comfyui.execute(with_start(comfyui, "setting", lora, steps=1, rank=4)) for lora in (loras[0], *loras)]
    plain = comfyui.execute(training("setting", preview_every=0, probe_every=0, warmup=0, steps=1, rank=4))
    folders = [Path(run.value("train", 2)).name for run in (*runs, plain)]
    assert folders[0] == folders[1] and len(set(folders)) == 3


def test_what_is_left_out_is_said_on_the_node(comfyui: ComfyUI) -> None:
    lora = {**demo_lora(comfyui, rank=4), "diffusion_model.x_embedder.diff_b": torch.ones(256)}
    run = comfyui.execute(with_start(comfyui, "left_out", lora, steps=1, rank=4))
    assert run.status == "success", run.error
    assert any(
        "initial_lora: 1 tensor of it is not used: 'diffusion_model.x_embedder.diff_b'" in text
        for text in run.texts("train")
    )


@pytest.mark.parametrize(
    ("change", "rank", "sentence"),
    [
        ({}, 3, "the LoRA to start from has rank 4, the run has rank 3; set rank to 4"),
        ({"x.lokr_w1": torch.ones(1)}, 4, "of LoKr: set adapter to lokr, or start from a plain LoRA"),
        ({"transformer.layers.0.attention.to_q.lora_A.weight": torch.ones(4, 3840)}, 4, "of another model"),
    ],
    ids=["rank", "LoKr", "the real model's"],
)
def test_what_does_not_fit_is_one_sentence(comfyui: ComfyUI, change: dict, rank: int, sentence: str) -> None:
    run = comfyui.execute(with_start(comfyui, "refused", {**demo_lora(comfyui, rank=4), **change}, steps=1, rank=rank))
    assert run.status == "error" and sentence in run.error and "\n" not in run.error
    assert not list((comfyui.output / "dopsd").glob("refused-*/checkpoints"))
