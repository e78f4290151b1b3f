"""Stability AI's ModelSpec 1.0.1 (https://github.com/Stability-AI/ModelSpec): the header that managers show.

Also the keys that ComfyUI's asset browser reads: `modelspec.base_model` and `trained_words`.
"""

from __future__ import annotations

import base64
import datetime
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from ..families import FAMILIES

VERSION = "1.0.1"

_PRECISION = re.compile(
    r"[\W_]+(?:(?:bf|fp|int|nf|nvfp|mxfp)\d+|e\dm\d(?:fn)?|i?q\d(?:[\W_]+(?:k(?:[\W_]+[sml])?|[01]|x?xs|nl))?"
    r"|scaled|mixed|convrot|fast|safetensors|gguf)(?=[\W_]|$)"
)
"""What publishers add to a model's name for a file of it: "_fp8_scaled.safetensors"."""

_TRIGGERS = ("dopsd_trigger", "modelspec.trigger_phrase")
_CONCEPTS = "dopsd_concepts"
_DIFFUSERS = (
    *(f".lora_{half}.weight" for half in "AB"),
    *(f".lokr_{factor}" for factor in ("w1", "w2", "w2_a", "w2_b")),
    ".lora_magnitude_vector",
    ".dora_scale",
)
"""Ends of the names that diffusers loads; dora_scale is ComfyUI's, and beside the magnitudes diffusers skips it."""


@dataclass(frozen=True)
class Description:
    """What the user says of a LoRA; empty for what is not said.

    Attributes:
        title: its name for others.
        description: what it does, in Markdown.
        author: who made it.
        license: its licence.
        thumbnail: a JPEG, see `jpeg_thumbnail`.
    """

    title: str = ""
    description: str = ""
    author: str = ""
    license: str = ""
    thumbnail: bytes = b""


def spec_header(facts: Mapping[str, str], given: Description, title: str, is_diffusers: bool) -> dict[str, str]:
    """The header of a new file: what the user says, then the file's own `facts`, then what follows from these.

    The hash of the tensors is added when the file is written (`tensor_hash.py`).

    Args:
        facts: the header that the LoRA has already, such as that of a run.
        given: what the user says; replaces what `facts` say.
        title: used if neither has one.
        is_diffusers: whether all tensors have diffusers' names.
    """
    known = {
        "modelspec.sai_model_spec": VERSION,
        "modelspec.architecture": f"{facts.get('dopsd_family', 'unknown')}/lora",
        "modelspec.title": title,
        "modelspec.date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }
    if is_diffusers:
        known["modelspec.implementation"] = "diffusers"
    if base := facts.get("dopsd_base_model"):
        known["modelspec.base_model"] = hub_base_model(facts) or base
    if resolution := facts.get("dopsd_resolution"):
        known["modelspec.resolution"] = resolution
    if trigger := trigger_of(facts):
        known["modelspec.trigger_phrase"] = trigger
        words = concepts_in(facts) or (trigger,)
        known["modelspec.usage_hint"] = f"Trigger word{'s' * (len(words) > 1)}: {trigger}"
        known["trained_words"] = json.dumps(words, ensure_ascii=False)
    if words := slider_words(facts):
        known["modelspec.usage_hint"] = f"Slider: {words}; the LoRA's strength is how much, below 0 the opposite"
    return known | dict(facts) | _said(given)


def has_diffusers_names(keys: Iterable[str]) -> bool:
    """Whether all tensors of a file have names that diffusers loads."""
    return all(key.startswith("transformer.") and key.endswith(_DIFFUSERS) for key in keys)


def trigger_of(header: Mapping[str, str]) -> str:
    """The trigger word of a LoRA; "" if its header has none."""
    return next((header[key] for key in _TRIGGERS if header.get(key)), "")


def trigger_facts(trigger: str, concepts: Sequence[str]) -> dict[str, str]:
    """What a header says of the trigger words of a run: one, or those of several concepts."""
    if len(concepts) < 2:
        return {"dopsd_trigger": trigger}
    return {"dopsd_trigger": ", ".join(concepts), _CONCEPTS: json.dumps(list(concepts), ensure_ascii=False)}


def concepts_in(header: Mapping[str, str]) -> tuple[str, ...]:
    """The trigger words of a LoRA with several concepts; empty for others."""
    try:
        words = json.loads(header.get(_CONCEPTS, "[]"))
    except ValueError:
        return ()
    return tuple(words) if isinstance(words, list) and all(isinstance(word, str) for word in words) else ()


def slider_words(header: Mapping[str, str]) -> str:
    """What the teacher of a slider read, such as "face -> smiling face"; "" for a LoRA that is no slider."""
    return header.get("dopsd_teacher_sentence", "") if header.get("dopsd_teacher_sees") == "words" else ""


def hub_base_model(facts: Mapping[str, str]) -> str:
    """The base model's repository on the Hugging Face Hub, from the name of its file; "" if that is not known."""
    file = facts.get("dopsd_base_model", "").rpartition("/")[2].lower()
    name = "".join(letter for letter in _PRECISION.sub("", file) if letter.isalnum())
    family = FAMILIES.get(facts.get("dopsd_family", ""))
    return family.hub_models.get(name, "") if family else ""


def _said(given: Description) -> dict[str, str]:
    said = {
        "modelspec.title": given.title,
        "modelspec.description": given.description,
        "modelspec.author": given.author,
        "modelspec.license": given.license,
    }
    if given.thumbnail:
        said["modelspec.thumbnail"] = f"data:image/jpeg;base64,{base64.b64encode(given.thumbnail).decode()}"
    return {key: value.strip() for key, value in said.items() if value.strip()}
