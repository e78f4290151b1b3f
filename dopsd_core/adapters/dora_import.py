"""DoRA files of D-OPSD, peft and diffusers as the start of a run.

Legend: A [rank, in], B [rows, rank], magnitude [rows], the norms of the rows of the trained weight.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ..denoiser import LinearSite
from .lora_file import shown
from .lora_import import _IT, ImportedLora, _flat, _Place, _places, import_lora
from .targets import match_targets

_MAGNITUDE = re.compile(r"(?P<module>.+)\.lora_magnitude_vector(\.\w+)*")
_COMFYUI = ".dora_scale"


def import_dora(tensors: Mapping[str, Tensor], sites: Sequence[LinearSite], targets: Sequence[str]) -> ImportedLora:
    """Maps the `tensors` of a DoRA file, of any shape, to the parts of `sites` that `targets` select.

    The result also has "<part>.lora_magnitude_vector" [rows], fp32.

    Raises:
        ValueError: it is not a DoRA, belongs to another model, or changes nothing that is trained.
    """
    keys = {key: match["module"] for key in tensors if (match := _MAGNITUDE.fullmatch(key))}
    if not keys:
        raise ValueError(f"{_IT} {_what_it_is(tensors)}")
    if len(set(keys.values())) < len(keys):
        raise ValueError(f"{_IT} holds several magnitudes of a layer; use a file of one DoRA")
    rest = {key: value for key, value in tensors.items() if key not in keys and not key.endswith(_COMFYUI)}
    imported = import_lora(rest, sites, targets)
    found, unused = _magnitudes({module: tensors[key] for key, module in keys.items()}, sites, targets)
    lacking = [key for key in imported.tensors if _magnitude_key(key) not in found]
    if lacking:
        raise ValueError(f"{_IT} has no magnitude for {shown(lacking[0])}; use a file in which every layer is a DoRA")
    left_out = {key for key, module in keys.items() if module in unused} | set(imported.left_out)
    return replace(
        imported,
        tensors={**imported.tensors, **found},
        left_out=tuple(key for key in tensors if key in left_out),
    )


def _magnitudes(
    by_module: Mapping[str, Tensor], sites: Sequence[LinearSite], targets: Sequence[str]
) -> tuple[dict[str, Tensor], set[str]]:
    """The magnitudes of the trained parts, and the modules of which not all rows are used."""
    places, chosen = _places(sites), match_targets([part.name for site in sites for part in site.parts], targets)
    found: dict[str, Tensor] = {}
    unused: set[str] = set()
    for module, given in by_module.items():
        place = places.get(_flat(module))
        trained = [part for part in place.parts if part.name in chosen] if place else []
        if place is None or len(trained) < len(place.parts):
            unused.add(module)
        if place is not None and trained:
            magnitude = _checked(module, given, place)
            for part in trained:
                rows = magnitude[part.start - place.first : part.stop - place.first]
                found[f"{part.name}.lora_magnitude_vector"] = rows
    return found, unused


def _checked(module: str, given: Tensor, place: _Place) -> Tensor:
    magnitude = given.detach().cpu().float().flatten()
    if not given.is_floating_point() or not torch.isfinite(magnitude).all():
        raise ValueError(f"{_IT} is damaged: the magnitude of {shown(module)} is not finite floating-point numbers")
    if len(magnitude) != place.rows:
        raise ValueError(
            f"{_IT} is of another model: the magnitude of {shown(module)} has {len(magnitude)} rows, here "
            f"it has {place.rows}"
        )
    return magnitude


def _magnitude_key(key: str) -> str:
    return f"{key.rpartition('.lora_')[0]}.lora_magnitude_vector"


def _what_it_is(tensors: Mapping[str, Tensor]) -> str:
    if any(key.endswith(_COMFYUI) for key in tensors):
        return (
            "has dora_scale without lora_magnitude_vector, which programs read differently; start from a DoRA of "
            "D-OPSD, peft or diffusers"
        )
    if any(".lokr_" in key for key in tensors):
        return "is a LoKr; set adapter to lokr, or start from a DoRA"
    return "is not a DoRA; set adapter to lora, or start from a DoRA"
