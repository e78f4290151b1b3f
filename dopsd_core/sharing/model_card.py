"""The card (README.md) of a LoRA for the Hugging Face Hub, from the header of its file."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ..conditioning.teachers import EDIT_TARGET
from ..families import FAMILIES, Family
from ..text import quoted
from .licenses import license_lines
from .model_spec import concepts_in, hub_base_model, slider_words, trigger_of

_ADAPTER = ("rank", "alpha", "factor")

_PAPER = "https://arxiv.org/abs/2605.05204"


def model_card(header: Mapping[str, str], file_name: str, thumbnail: str = "") -> str:
    """The card: YAML front matter, and how to use the LoRA in ComfyUI and diffusers.

    Args:
        header: the file's header (`spec_header`).
        file_name: of the LoRA, beside the card.
        thumbnail: file name of an image beside the card; "" for none.
    """
    front = "\n".join(_front_matter(header, thumbnail))
    body = "\n\n".join(section for section in _sections(header, file_name, thumbnail) if section)
    return f"---\n{front}\n---\n\n{body}\n"


def _front_matter(header: Mapping[str, str], thumbnail: str) -> Iterator[str]:
    """Lines of YAML; every text is quoted as in JSON, which is YAML too."""
    trigger, base = _first_trigger(header), hub_base_model(header)
    yield "library_name: diffusers"
    task = "image-to-image" if header.get("dopsd_teacher_sees") == EDIT_TARGET.name else "text-to-image"
    yield f"pipeline_tag: {task}"
    yield from ("tags:", f"- {task}", "- lora", "- diffusers", "- template:diffusion-lora", "- d-opsd")
    if base:
        yield f"base_model: {quoted(base)}"
        yield "base_model_relation: adapter"
    if trigger:
        yield f"instance_prompt: {quoted(trigger)}"
    yield from license_lines(header.get("modelspec.license", ""))
    if thumbnail:
        yield from ("widget:", f"- text: {quoted(trigger or '-')}", "  output:", f"    url: {quoted(thumbnail)}")


def _sections(header: Mapping[str, str], file_name: str, thumbnail: str) -> Iterator[str]:
    family = FAMILIES.get(header.get("dopsd_family", ""))
    words = concepts_in(header) or tuple(filter(None, (trigger_of(header),)))
    yield f"# {_line(header.get('modelspec.title', '') or file_name)}"
    yield "<Gallery />" if thumbnail else ""
    yield header.get("modelspec.description", "")
    if len(words) > 1:
        yield f"**Trigger words:** {', '.join(map(_code, words))}, one per concept. Write that of the one you want."
    elif words:
        yield f"**Trigger word:** write {_code(words[0])} in the prompt."
    if slider := slider_words(header):
        yield f"**Slider:** {_code(slider)}. The strength is how much of it, and below 0 the opposite."
    yield _usage(header, file_name, family)
    yield _training(header, family)


def _usage(header: Mapping[str, str], file_name: str, family: Family | None) -> str:
    few = f"Sample with the model's own {family.sample_steps} steps and no guidance (cfg 1). " if family else ""
    comfyui = (
        f"**ComfyUI:** put `{file_name}` into `models/loras` and load it with *Load LoRA*, strength 1. {few}".strip()
    )
    base = hub_base_model(header)
    if family is None or not base:
        return f"## Use\n\n{comfyui}"
    prompt = f"{_first_trigger(header)} ...".strip()
    code = (
        "import torch",
        "from diffusers import DiffusionPipeline",
        "",
        f'pipe = DiffusionPipeline.from_pretrained({quoted(base)}, torch_dtype=torch.bfloat16).to("cuda")',
        f'pipe.load_lora_weights(".", weight_name={quoted(file_name)})  # or the name of this repository',
        f"image = pipe({quoted(prompt)}, num_inference_steps={family.sample_steps}, {family.unguided}).images[0]",
    )
    return f"## Use\n\n{comfyui}\n\n**diffusers:**\n\n```python\n" + "\n".join(code) + "\n```"


def _training(header: Mapping[str, str], family: Family | None) -> str:
    if "dopsd_family" not in header:
        return ""
    objective = header.get("dopsd_objective", "")
    how = f"on-policy self-distillation ([D-OPSD]({_PAPER}))" if objective == "dopsd" else objective
    base = hub_base_model(header) or header.get("dopsd_base_model", "")
    rows = [
        ("method", how),
        ("base model", base or (family.title if family else "")),
        ("steps", header.get("dopsd_step", "")),
        ("resolution", header.get("dopsd_resolution", "")),
        *_configured(header.get("dopsd_config", "")),
        ("trained with", f"ComfyUI-DOPSD {header['dopsd_version']}" if "dopsd_version" in header else ""),
    ]
    return "## Training\n\n" + _table([(name, value) for name, value in rows if value])


def _configured(text: str) -> list[tuple[str, str]]:
    """Adapter, optimizer and batch from a run's config.json, of any release; [] if it cannot be read."""
    try:
        config: Any = json.loads(text)
        adapter, optimizer = config["adapter"], config["optimizer"]
        batch = config["batch_size"] * config["grad_accumulation"]
        parts = [adapter["name"], *(f"{name} {adapter[name]:g}" for name in _ADAPTER if name in adapter)]
        rate = "factor of its own learning rate" if optimizer["name"] == "prodigy" else "learning rate"
        return [
            ("adapter", ", ".join(parts)),
            ("optimizer", f"{optimizer['name']}, {rate} {optimizer['lr']:g}"),
            ("batch size", str(batch)),
        ]
    except (ValueError, TypeError, KeyError, RecursionError):
        return []


def _table(rows: Sequence[tuple[str, str]]) -> str:
    return "\n".join(["| | |", "|---|---|", *(f"| {name} | {_cell(value)} |" for name, value in rows)])


def _cell(text: str) -> str:
    return _line(text).replace("|", "\\|")


def _first_trigger(header: Mapping[str, str]) -> str:
    """The trigger word for an example; of several concepts the first one's, since together they ask for all at once."""
    return next(iter(concepts_in(header)), trigger_of(header))


def _code(text: str) -> str:
    """A text as code in Markdown, also one with backticks."""
    line = _line(text)
    longest = max(map(len, re.findall("`+", line)), default=0)
    fence, space = "`" * (longest + 1), " " * (longest > 0)
    return f"{fence}{space}{line}{space}{fence}"


def _line(text: str) -> str:
    return " ".join(text.split())
