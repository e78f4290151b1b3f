"""The header (metadata) of LoRA files: kept from file to file, and filled in where values are known."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from ...dopsd_core import __version__
from ...dopsd_core.sharing.model_spec import Description, concepts_in, has_diffusers_names, spec_header, trigger_of

__all__ = ["concepts_in", "header_for", "kept_header", "trigger_of"]

_PEFT = "lora_adapter_metadata"
_OF_THE_BYTES = ("format", "modelspec.hash_sha256", "sshs_model_hash", "sshs_legacy_hash")
"""Only valid for one file: written anew or not at all."""


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


def header_for(title: str, keys: Iterable[str], facts: Mapping[str, str], given: Description) -> dict[str, str]:
    """The header of a new file: what the user says, all of `facts`, and the fields of ModelSpec that they lack.

    Args:
        title: used if there is none.
        keys: names of the tensors; the implementation is diffusers only if all of them are diffusers' names.
        given: what the user says; replaces what `facts` say.
    """
    header = spec_header(kept_header(facts)[0], given, title, has_diffusers_names(keys))
    ours = {"dopsd_version": __version__} if "dopsd_family" in facts else {}
    return ours | header
