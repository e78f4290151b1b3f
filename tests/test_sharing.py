"""What a LoRA file says to others: ModelSpec's header with the right values, and a card that the hub can read."""

from __future__ import annotations

import ast
import base64
import datetime
import hashlib
import inspect
import io
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors import safe_open

from dopsd_core.adapters import Full, Lokr, Lora
from dopsd_core.adapters.lora_file import save_lora
from dopsd_core.conditioning.teachers import EDIT, EDIT_TARGET
from dopsd_core.config import TrainConfig
from dopsd_core.families import get_family
from dopsd_core.optimizers import Prodigy
from dopsd_core.sharing.model_card import model_card
from dopsd_core.sharing.model_spec import Description, hub_base_model, spec_header, trigger_facts
from dopsd_core.sharing.thumbnail import jpeg_thumbnail
from dopsd_core.standalone.hosts.source import KNOWN_MODELS, KnownModel

FACTS = {
    "dopsd_family": "z_image",
    "dopsd_base_model": "z_image_turbo_bf16.safetensors",
    "dopsd_trigger": "ohwx łamp",
    "dopsd_resolution": "1024x768",
    "dopsd_step": "1000",
    "dopsd_objective": "dopsd",
    "dopsd_version": "9.9",
    "dopsd_config": TrainConfig(batch_size=2, grad_accumulation=3, adapter=Lora(rank=32)).to_json(),
}
GIVEN = Description("My Lamp", "A *lamp*.", "Jo Łąka", "CC-BY-4.0", b"\xff\xd8jpeg")


# -- the header --------------------------------------------------------------------------------------------------------


def test_the_header_has_every_field_that_the_specification_requires_or_that_is_known() -> None:
    header = spec_header(FACTS, GIVEN, "lamp_00001", is_diffusers=True)
    date = header.pop("modelspec.date")
    assert (
        abs(datetime.datetime.now(datetime.timezone.utc) - datetime.datetime.fromisoformat(date)).total_seconds() < 60
    )
    assert {key: value for key, value in header.items() if not key.startswith("dopsd_")} == {
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": "z_image/lora",
        "modelspec.implementation": "diffusers",
        "modelspec.title": "My Lamp",
        "modelspec.description": "A *lamp*.",
        "modelspec.author": "Jo Łąka",
        "modelspec.license": "CC-BY-4.0",
        "modelspec.base_model": "Tongyi-MAI/Z-Image-Turbo",
        "modelspec.resolution": "1024x768",
        "modelspec.trigger_phrase": "ohwx łamp",
        "modelspec.usage_hint": "Trigger word: ohwx łamp",
        "modelspec.thumbnail": "data:image/jpeg;base64,/9hqcGVn",
        "trained_words": '["ohwx łamp"]',
    }
    assert header.items() >= FACTS.items()


def test_what_is_not_known_is_left_out() -> None:
    header = spec_header({}, Description(), "x_00001", is_diffusers=False)
    assert header.keys() == {f"modelspec.{key}" for key in ("sai_model_spec", "architecture", "title", "date")}
    assert (header["modelspec.title"], header["modelspec.architecture"]) == ("x_00001", "unknown/lora")


def test_what_the_user_says_counts_more_than_the_file_and_that_more_than_a_guess() -> None:
    facts = {"modelspec.title": "Theirs", "modelspec.author": "Them", "modelspec.architecture": "z-image/lora"}
    header = spec_header(facts, Description(title=" Mine ", author=" "), "x", is_diffusers=True)
    assert (header["modelspec.title"], header["modelspec.author"]) == ("Mine", "Them")
    assert header["modelspec.architecture"] == "z-image/lora"


@pytest.mark.parametrize(
    ("family", "file", "repository"),
    [
        ("z_image", "z_image_turbo_fp8_scaled", "Tongyi-MAI/Z-Image-Turbo"),
        ("z_image", "Z-Image-Turbo-Q4_K_M", "Tongyi-MAI/Z-Image-Turbo"),
        ("flux2_klein", "flux-2-klein-4b", "black-forest-labs/FLUX.2-klein-4B"),
        ("flux2_klein", "flux-2-klein-9b-fp8", "black-forest-labs/FLUX.2-klein-9B"),
        ("krea2", "krea2_turbo_fp8_scaled", "krea/Krea-2-Turbo"),
        ("krea2", "Krea-2-Turbo-Q8_0", "krea/Krea-2-Turbo"),
        ("krea2", "krea2_raw_bf16", ""),
        ("krea2", "my_krea2_mix", ""),
        ("z_image", "my_zimageturbo_merge", ""),
        ("z_image", "z_image_turbo_dedistilled_bf16", ""),
        ("z_image", "z_image_turbo_bf16.gguf", "Tongyi-MAI/Z-Image-Turbo"),
        ("z_image", "z_image_turbo_fp8_e4m3fn", "Tongyi-MAI/Z-Image-Turbo"),
        ("flux2_klein", "flux-2-klein-base-4b", ""),
        ("flux2_klein", "FLUX.2-klein-4B", "black-forest-labs/FLUX.2-klein-4B"),
        ("qwen_image21", "qwen_image_2.1_turbo_int8_convrot", "Qwen/Qwen-Image-2.1-Turbo"),
        ("z_image", "dopsd_demo_turbo_bf16", ""),
        ("flux2_klein", "z_image_turbo_bf16", ""),
        ("another", "z_image_turbo_bf16", ""),
    ],
)
def test_the_base_on_the_hub_is_only_named_where_it_is_known(family: str, file: str, repository: str) -> None:
    facts = {"dopsd_family": family, "dopsd_base_model": f"{file}.safetensors"}
    assert hub_base_model(facts) == repository
    header = spec_header(facts, Description(), "x", is_diffusers=True)
    assert header["modelspec.base_model"] == (repository or f"{file}.safetensors")


def test_the_hash_is_that_of_the_tensors_without_the_header(tmp_path: Path) -> None:
    tensors = {"q.lora_A.weight": torch.ones(2, 5), "q.lora_B.weight": torch.ones(7, 2)}
    found = {}
    for name, title in (("one", "a"), ("two", "another title"), ("three", "a")):
        path = tmp_path / f"{name}.safetensors"
        given = {**tensors, "q.lora_B.weight": torch.zeros(7, 2)} if name == "three" else tensors
        header = spec_header({}, Description(title=title), "x", is_diffusers=True)
        save_lora(path, given, Lora(rank=2, alpha=2.0), prefix="", metadata=header)
        data = path.read_bytes()
        content = data[8 + int.from_bytes(data[:8], "little") :]
        with safe_open(path, "pt") as file:
            found[name] = file.metadata()["modelspec.hash_sha256"]
        assert found[name] == f"0x{hashlib.sha256(content).hexdigest()}"
    assert found["one"] == found["two"] != found["three"]


def test_a_file_without_the_specification_gets_no_hash(tmp_path: Path) -> None:
    save_lora(tmp_path / "x.safetensors", {"q.lora_A.weight": torch.ones(2, 5)}, Lora(rank=2), metadata={"a": "b"})
    with safe_open(tmp_path / "x.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt", "a": "b"}


def test_the_thumbnail_is_the_middle_of_the_image() -> None:
    image = torch.zeros(100, 300, 3)
    image[:, 100:200, 1] = 1.0
    image[:, 200:, 0] = 1.5  # beyond white
    opened = Image.open(io.BytesIO(jpeg_thumbnail(image)))
    assert (opened.format, opened.size) == ("JPEG", (256, 256))
    pixels = opened.convert("RGB")
    for place in ((10, 10), (128, 128), (245, 245)):
        red, green, blue = pixels.getpixel(place)  # pyright: ignore[reportGeneralTypeIssues]
        assert red < 30 and green > 225 and blue < 30


@pytest.mark.parametrize(("colour", "shade"), [((0.0,), 0), ((1.0, 0.0, 0.0, 0.0), 255), ((0.0, 0.0, 0.0, 0.5), 128)])
def test_grey_and_transparent_images_have_thumbnails(colour: tuple[float, ...], shade: int) -> None:
    """What is transparent is white, as where managers show it."""
    image = torch.tensor(colour).expand(40, 60, len(colour))
    pixels = Image.open(io.BytesIO(jpeg_thumbnail(image))).convert("RGB")
    red, green, blue = pixels.getpixel((128, 128))  # pyright: ignore[reportGeneralTypeIssues]
    assert all(abs(value - shade) < 5 for value in (red, green, blue))


# -- the card ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("known", KNOWN_MODELS, ids=lambda known: known.family)
def test_the_cards_code_is_for_the_familys_own_pipeline(known: KnownModel) -> None:
    """With arguments that it has; its repository is the one that the command line knows."""
    pipeline = getattr(pytest.importorskip("diffusers"), known.pipeline)
    family = get_family(known.family)
    assert known.hub_id in family.hub_models.values()
    name = known.hub_id.rpartition("/")[2]
    card = made_card({**FACTS, "dopsd_family": family.name, "dopsd_base_model": name}, GIVEN)
    code = re.search(r"```python\n(.*?)```", card, flags=re.DOTALL)
    assert code is not None and f'from_pretrained("{known.hub_id}"' in code[1]
    (call,) = (node for node in ast.walk(ast.parse(code[1])) if isinstance(node, ast.Call) and _is_pipe(node))
    given = {word.arg for word in call.keywords}
    assert "num_inference_steps" in given and given <= inspect.signature(pipeline.__call__).parameters.keys()


def _is_pipe(call: ast.Call) -> bool:
    return isinstance(call.func, ast.Name) and call.func.id == "pipe"


def front_matter(card: str) -> dict[str, Any]:
    yaml = pytest.importorskip("yaml")
    start, front, _ = re.split(r"^---\n", card, maxsplit=2, flags=re.MULTILINE)
    assert start == ""
    return yaml.safe_load(front)


def made_card(facts: dict[str, str], given: Description, thumbnail: str = "") -> str:
    return model_card(spec_header(facts, given, "lamp", is_diffusers=True), "lamp.safetensors", thumbnail)


def test_the_front_matter_is_what_the_hub_reads() -> None:
    assert front_matter(made_card(FACTS, GIVEN, "thumbnail.jpg")) == {
        "library_name": "diffusers",
        "pipeline_tag": "text-to-image",
        "tags": ["text-to-image", "lora", "diffusers", "template:diffusion-lora", "d-opsd"],
        "base_model": "Tongyi-MAI/Z-Image-Turbo",
        "base_model_relation": "adapter",
        "instance_prompt": "ohwx łamp",
        "license": "cc-by-4.0",
        "widget": [{"text": "ohwx łamp", "output": {"url": "thumbnail.jpg"}}],
    }
    bare = front_matter(made_card({}, Description()))
    assert not bare.keys() & {"base_model", "base_model_relation", "instance_prompt", "license", "widget"}


@pytest.mark.parametrize(
    ("given", "lines"),
    [
        ("CC-BY-4.0", {"license": "cc-by-4.0"}),
        ("CC BY-NC 4.0", {"license": "cc-by-nc-4.0"}),
        ("Apache 2.0", {"license": "apache-2.0"}),
        ("Apache License, Version 2.0", {"license": "apache-2.0"}),
        ("The MIT License", {"license": "mit"}),
        ("OpenRAIL++", {"license": "openrail++"}),
        ("deepfloyd-if-license", {"license": "deepfloyd-if-license"}),
        ("FLUX [dev] Non-Commercial", {"license": "other", "license_name": "FLUX [dev] Non-Commercial"}),
        ("私有: #1", {"license": "other", "license_name": "私有: #1"}),
        ("", {}),
    ],
)
def test_a_licence_is_one_that_the_hub_knows(given: str, lines: dict[str, str]) -> None:
    found = front_matter(made_card(FACTS, replace(GIVEN, license=given)))
    assert {name: value for name, value in found.items() if name.startswith("license")} == lines


def test_the_hubs_own_reader_takes_the_card(tmp_path: Path) -> None:
    hub = pytest.importorskip("huggingface_hub")
    (tmp_path / "README.md").write_text(made_card(FACTS, GIVEN, "thumbnail.jpg"), encoding="utf-8")
    data = hub.ModelCard.load(tmp_path / "README.md").data
    assert data.base_model == "Tongyi-MAI/Z-Image-Turbo" and data.license == "cc-by-4.0"


@pytest.mark.parametrize(
    "trigger",
    ['a: "b"', "- x", "'", "x\x7f", "x\x85y\x9f", "\u2028x", "ohwx #1", "!tag", "null", "1e3", "a\nb", "日本"],
)
def test_no_trigger_breaks_the_front_matter(trigger: str) -> None:
    assert front_matter(made_card({**FACTS, "dopsd_trigger": trigger}, GIVEN))["instance_prompt"] == trigger


def test_the_card_says_how_to_use_it_and_how_it_was_trained() -> None:
    card = made_card(FACTS, GIVEN, "thumbnail.jpg")
    assert "# My Lamp\n\n<Gallery />\n\nA *lamp*.\n\n**Trigger word:** write `ohwx łamp` in the prompt." in card
    assert "put `lamp.safetensors` into `models/loras`" in card and "own 8 steps and no guidance" in card
    code = re.search(r"```python\n(.*?)```", card, flags=re.DOTALL)
    assert code is not None
    compile(code[1], "card", "exec")
    assert (
        'from_pretrained("Tongyi-MAI/Z-Image-Turbo"' in code[1]
        and "num_inference_steps=8, guidance_scale=0.0" in code[1]
    )
    rows = dict(re.findall(r"^\| ([a-z ]+) \| (.+) \|$", card, flags=re.MULTILINE))
    assert rows == {
        "method": "on-policy self-distillation ([D-OPSD](https://arxiv.org/abs/2605.05204))",
        "base model": "Tongyi-MAI/Z-Image-Turbo",
        "steps": "1000",
        "resolution": "1024x768",
        "adapter": "lora, rank 32, alpha 64",
        "optimizer": "adamw, learning rate 0.0001",
        "batch size": "6",
        "trained with": "ComfyUI-DOPSD 9.9",
    }


def test_of_several_concepts_each_trigger_is_offered_alone() -> None:
    card = made_card(FACTS | trigger_facts("", ["ohwx lamp", "zwx dog"]), GIVEN, "thumbnail.jpg")
    assert "**Trigger words:** `ohwx lamp`, `zwx dog`, one per concept. Write that of the one you want." in card
    front = front_matter(card)
    assert front["instance_prompt"] == front["widget"][0]["text"] == "ohwx lamp" and 'pipe("ohwx lamp ..."' in card


def test_an_edits_card_is_found_among_those_that_change_images() -> None:
    assert front_matter(made_card(FACTS | EDIT_TARGET.facts, GIVEN))["pipeline_tag"] == "image-to-image"
    assert front_matter(made_card(FACTS | EDIT.facts, GIVEN))["pipeline_tag"] == "text-to-image"


def test_backticks_in_a_trigger_stay_code() -> None:
    card = made_card({**FACTS, "dopsd_trigger": "`ohwx``"}, GIVEN)
    assert "write ``` `ohwx`` ``` in the prompt" in card


@pytest.mark.parametrize(
    ("config", "adapter", "optimizer"),
    [
        (TrainConfig(adapter=Lokr(rank=32)), "lokr, rank 32, alpha 64, factor 8", "adamw, learning rate 0.0001"),
        (TrainConfig(adapter=Full()), "full", "adamw, learning rate 0.0001"),
        (
            TrainConfig(optimizer=Prodigy(), adapter=Lora(rank=8, alpha=4.5)),
            "lora, rank 8, alpha 4.5",
            "prodigy, factor of its own learning rate 1",
        ),
    ],
)
def test_the_card_has_what_each_adapter_and_optimizer_has(config: TrainConfig, adapter: str, optimizer: str) -> None:
    card = made_card({**FACTS, "dopsd_config": config.to_json()}, GIVEN)
    assert f"| adapter | {adapter} |" in card and f"| optimizer | {optimizer} |" in card


@pytest.mark.parametrize("config", ["", "{", "[]", json.dumps({"lora": {"rank": 4}}), json.dumps({"adapter": 3})])
def test_a_configuration_that_cannot_be_read_is_left_out(config: str) -> None:
    card = made_card({**FACTS, "dopsd_config": config}, Description())
    assert "| steps | 1000 |" in card and "| adapter |" not in card


def test_the_card_of_another_trainers_lora_claims_nothing_of_its_training() -> None:
    card = made_card({"modelspec.title": "Theirs", "modelspec.trigger_phrase": "zwx"}, Description())
    assert "# Theirs" in card and "`zwx`" in card and "Training" not in card and "diffusers:**" not in card


def test_base64_is_decoded_to_the_same_thumbnail() -> None:
    data = jpeg_thumbnail(torch.rand(8, 8, 3, generator=torch.Generator().manual_seed(0)))
    header = spec_header({}, Description(thumbnail=data), "x", is_diffusers=True)
    prefix, _, encoded = header["modelspec.thumbnail"].partition(",")
    assert prefix == "data:image/jpeg;base64" and base64.b64decode(encoded) == data and len(encoded) < 100_000
