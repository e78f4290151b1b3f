"""LoKr files of other trainers as the start of a run, at exactly the strength that ComfyUI gives them.

Legend: w1 [o1, i1], w2 [o2, i2] or w2_a [o2, rank] w2_b [rank, i2], with o1 o2 = rows and i1 i2 = in.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ..denoiser import LinearSite
from .lokr import Lokr
from .lora_file import alpha_of, scaled, shown, unfold_alpha
from .lora_import import _IT, ImportedLora, _flat, _kinds, _Place, _places
from .targets import match_targets

_FACTOR = re.compile(r"(?P<module>.+)\.lokr_(?P<kind>w1|w1_a|w1_b|w2|w2_a|w2_b)")
_UNKNOWN = re.compile(r"\.lokr_|\.dora_scale$|magnitude_vector")


def import_lokr(tensors: Mapping[str, Tensor], sites: Sequence[LinearSite], targets: Sequence[str]) -> ImportedLora:
    """Maps the `tensors` of any trainer's LoKr, of any shape, to the parts of `sites` that `targets` select.

    The result has "<part>.lokr_w1" and "<part>.lokr_w2" or "<part>.lokr_w2_a" and "_b", fp32, with a scale of 1.

    Raises:
        ValueError: it is not a LoKr, belongs to another model, or changes nothing that is trained.
    """
    by_module = _by_module(tensors)
    places, chosen = _places(sites), match_targets([part.name for site in sites for part in site.parts], targets)
    result: dict[str, Tensor] = {}
    used: set[str] = set()
    for module, factors in by_module.items():
        place = places.get(_flat(module))
        trained = [part for part in place.parts if part.name in chosen] if place else []
        if place is None or not trained:
            continue
        if len(place.parts) > 1:
            raise ValueError(f"{_IT} has one LoKr for the fused {shown(module)}, which cannot be split among its parts")
        folded = _folded(module, factors, tensors, place)
        result |= {f"{trained[0].name}.{name}": value for name, value in folded.items()}
        used |= {key for key in tensors if key.rpartition(".")[0] == module}
    if not result:
        raise ValueError(
            f"{_IT} changes nothing that is trained here: its layers are {_kinds(by_module)}; use a LoKr that was "
            "trained for this model"
        )
    return ImportedLora(result, tuple(key for key in tensors if key not in used))


def lokr_start_state(initial: Mapping[str, Tensor], fresh: Mapping[str, Tensor], config: Lokr) -> dict[str, Tensor]:
    """Puts the folded factors of `initial` into the raw state `fresh`; raw, with the keys and shapes of `fresh`.

    A smaller rank is filled up with components of `fresh`, whose w2_a is zero.

    Raises:
        ValueError: a part that is not trained, another factor, or a larger rank.
    """
    state = {key: value.clone() for key, value in fresh.items()}
    raw = unfold_alpha(initial, config)
    for part in dict.fromkeys(key.rpartition(".lokr_")[0] for key in raw):
        w1 = f"{part}.lokr_w1"
        if w1 not in state:
            raise ValueError(f"{_IT} has a LoKr for {part}, which is not trained; add it to targets")
        if state[w1].shape != raw[w1].shape:
            ours, theirs = (" x ".join(map(str, t.shape)) for t in (state[w1], raw[w1]))
            raise ValueError(
                f"{_IT} has a first factor of {theirs} in {part}, the run one of {ours}; set factor to {len(raw[w1])}"
            )
        state[w1] = raw[w1]
        _put_second(part, raw, state)
    return state


def _put_second(part: str, raw: Mapping[str, Tensor], state: dict[str, Tensor]) -> None:
    whole, left, right = (f"{part}.lokr_{name}" for name in ("w2", "w2_a", "w2_b"))
    if whole in state:
        state[whole] = raw[whole] if whole in raw else raw[left] @ raw[right]
    elif whole in raw:
        needed = math.ceil(max(raw[whole].shape) / 2)
        raise ValueError(f"{_IT} has a second factor in one piece in {part}; set rank to {needed} or more")
    else:
        rank, ours = raw[right].shape[0], state[right].shape[0]
        if rank > ours:
            raise ValueError(f"{_IT} has rank {rank}, the run has rank {ours}; set rank to {rank}")
        state[left][:, :rank] = raw[left]
        state[right][:rank] = raw[right]


def _by_module(tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """The file's factors by module and kind ("w1", "w2_a")."""
    found: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        match = _FACTOR.fullmatch(key)
        if match is not None:
            found.setdefault(match["module"], {})[match["kind"]] = tensor
        elif _UNKNOWN.search(key):
            raise ValueError(f"{_IT} holds {shown(key)}, which adapter lokr cannot start from; use a plain LoKr")
    if not found:
        example = f" (it holds {shown(next(iter(tensors)))})" if tensors else ""
        raise ValueError(f"{_IT} is not a LoKr; set adapter to lora, or start from a LoKr{example}")
    return found


def _folded(
    module: str, factors: Mapping[str, Tensor], tensors: Mapping[str, Tensor], place: _Place
) -> dict[str, Tensor]:
    """w1, and w2 or w2_a and w2_b, fp32, with the file's scale: alpha / rank if a factor is a product."""
    pieces = {kind: _checked(module, kind, factor) for kind, factor in factors.items()}
    w1 = pieces["w1"] if "w1" in pieces else _joined(module, pieces, "w1")
    w2 = pieces["w2"] if "w2" in pieces else _joined(module, pieces, "w2")
    if (len(w1) * len(w2), w1.shape[1] * w2.shape[1]) != (place.rows, place.in_features):
        raise ValueError(
            f"{_IT} is of another model: {shown(module)} goes from {w1.shape[1] * w2.shape[1]} to "
            f"{len(w1) * len(w2)}, here it goes from {place.in_features} to {place.rows}"
        )
    rank = next((len(pieces[kind]) for kind in ("w2_b", "w1_b") if kind in pieces), None)
    key_alpha = f"{module}.alpha"
    if rank is not None and key_alpha in tensors:
        w1 = scaled(module, w1, alpha_of(key_alpha, tensors[key_alpha], _IT) / rank, _IT)
    halves = {"lokr_w2": w2} if "w2" in pieces else {f"lokr_{half}": pieces[half] for half in ("w2_a", "w2_b")}
    return {"lokr_w1": w1, **halves}


def _joined(module: str, pieces: Mapping[str, Tensor], name: str) -> Tensor:
    left, right = pieces.get(f"{name}_a"), pieces.get(f"{name}_b")
    if left is None or right is None or left.shape[1] != right.shape[0]:
        raise ValueError(f"{_IT} is incomplete: {shown(module)} lacks its {name}, or the halves do not fit")
    return left @ right


def _checked(module: str, kind: str, factor: Tensor) -> Tensor:
    value = factor.detach().cpu().float()
    if factor.ndim != 2 or 0 in factor.shape or not factor.is_floating_point() or not torch.isfinite(value).all():
        raise ValueError(
            f"{_IT}: {kind} of {shown(module)} is {factor.dtype} {tuple(factor.shape)}; it must be a finite matrix"
        )
    return value
