"""The header (metadata) of LoRA files: kept from file to file, and filled in where values are known."""

from __future__ import annotations

import datetime
from collections.abc import Iterable, Mapping

from ...dopsd_core import __version__

_PEFT = "lora_adapter_metadata"
_OF_THE_BYTES = ("format", "modelspec.hash_sha256", "sshs_model_hash", "sshs_legacy_hash")
"""Only valid for one file: written anew or not at all."""

_DIFFUSERS = (
    *(f".lora_{half}.weight" for half in "AB"),
    *(f".lokr_{factor}" for factor in ("w1", "w2", "w2_a", "w2_b")),
    ".lora_magnitude_vector",
    ".dora_scale",
)
"""Ends of the names that diffusers loads; dora_scale is ComfyUI's, and beside the magnitudes diffusers skips it."""

_TRIGGERS = ("dopsd_trigger", "modelspec.trigger_phrase")


def kept_header(header: Mapping[str, str]) -> tuple[dict[str, str], tuple[str, ...]]:
    """The entries of a file's header that stay valid for its tensors in memory, and a line for each other entry.

    diffusers multiplies by the alpha of `lora_adapter_metadata`; `read_lora` has folded it into the tensors.
    """
    kept = {key: value for key, value in header.items() if key not in (*_OF_THE_BYTES, _PEFT)}
    notes = []
    if _PEFT in header:
        notes.append(f"{_PEFT} is not kept: its alpha is folded into the tensors")
    hashes = [key for key in _OF_THE_BYTES[1:] if key in header]
    if hashes:
        notes.append(f"{', '.join(hashes)} not kept: only valid for that file")
    return kept, tuple(notes)


def header_for(title: str, keys: Iterable[str], facts: Mapping[str, str]) -> dict[str, str]:
    """The header of a new file: all of `facts`, and the fields of Stability AI's ModelSpec that they lack.

    Args:
        title: used if `facts` have none.
        keys: names of the tensors; the implementation is diffusers only if all of them are diffusers' names.
    """
    ours = "dopsd_family" in facts
    known = {
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": f"{facts.get('dopsd_family', 'unknown')}/lora",
        "modelspec.title": title,
        "modelspec.date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }
    if all(key.startswith("transformer.") and key.endswith(_DIFFUSERS) for key in keys):
        known["modelspec.implementation"] = "diffusers"
    if ours:
        known["dopsd_version"] = __version__
    if trigger := trigger_of(facts):
        known["modelspec.trigger_phrase"] = trigger
    return known | dict(kept_header(facts)[0])


def trigger_of(header: Mapping[str, str]) -> str:
    """The trigger word of a LoRA; "" if its header has none."""
    return next((header[key] for key in _TRIGGERS if header.get(key)), "")
