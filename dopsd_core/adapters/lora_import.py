"""LoRAs of other trainers as the start of a run, at exactly the strength that ComfyUI gives them.

    imported = import_lora(read_lora(path), denoiser.sites(), config.adapter.targets)
    train(config, denoiser, data, folder, initial=imported.tensors)

Trainers disagree about names (dots or underscores, the original network's or diffusers'), about fused projections and
about where alpha is stored. Every file is converted to "folded" tensors (lora_file.py) under our part names: the rows
of a fused projection are split among its parts, each with a copy of its A, and components that are zero there are
dropped.

Legend: A [rank, in], B [rows, rank].
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..denoiser import LinearSite, SitePart
from .lora import Lora
from .lora_file import (
    alpha_of,
    check_pair,
    parse_json_object,
    peft_scale,
    read_safetensors,
    scaled,
    shown,
    unfold_alpha,
)
from .targets import match_targets

PEFT_WEIGHTS = "adapter_model.safetensors"
_KEY = re.compile(
    r"(?P<module>.+)\.(?P<kind>lora_A|lora_B|lora_down|lora_up|lora\.down|lora\.up)(\.(?P<adapter>\w+))?\.weight"
)
_OLDER = ((re.compile(r"(?:\.lora_linear_layer|_lora)\.(up|down)\.weight$"), r".lora_\1.weight"),)
_OLDER += ((re.compile(r"(\.lora_[AB])$"), r"\1.weight"),)
"""Ends of names in older files of diffusers, and of genmo's trainer, and what they are now."""
_IS_A = {"lora_A": True, "lora_down": True, "lora.down": True, "lora_B": False, "lora_up": False, "lora.up": False}
_PREFIXES = ("base_model.model.", "model.diffusion_model.", "diffusion_model.", "transformer.")
_FLAT_PREFIXES = ("lora_unet_", "lora_transformer_", "lycoris_")  # before names with underscores for dots
_OTHER_KINDS = re.compile(r"dora_scale|magnitude_vector|hada_|lokr_|oft_|lora_mid|\.a[12]\.weight|\.b[12]\.weight")
_IT, _START = "the LoRA to start from", "start from a plain LoRA"
_LONG_NAME, _MAX_KINDS = 200, 12
_ADAPTERS = ("student", "default")  # the one to take from a file of several; the authors' scripts keep the teacher too


@dataclass(frozen=True, eq=False)
class ImportedLora:
    """A LoRA file under our part names.

    Attributes:
        tensors: folded, fp32: "<part>.lora_A.weight" [rank, in], "<part>.lora_B.weight" [rows, rank]; only parts that
            the LoRA changes; ranks may differ.
        left_out: every key of the file that is not used, or not with all of its rows, in the file's order.
    """

    tensors: Mapping[str, Tensor]
    left_out: tuple[str, ...]

    def describe_left_out(self) -> str:
        """Such as "12 tensors of it are not used: ...", each kind of name once; "" if all are used."""
        count = len(self.left_out)
        verb = "tensor of it is" if count == 1 else "tensors of it are"
        return f"{count} {verb} not used: {_kinds(self.left_out)}" if count else ""


@dataclass(frozen=True)
class _Place:
    """Rows of a Linear's output, as parts that follow one another.

    Attributes:
        in_features: size of the Linear's input.
        parts: the parts.
    """

    in_features: int
    parts: tuple[SitePart, ...]

    @property
    def first(self) -> int:
        """The first row."""
        return self.parts[0].start

    @property
    def rows(self) -> int:
        """Number of rows."""
        return self.parts[-1].stop - self.first


@dataclass(frozen=True, eq=False)
class _Pair:
    """A and B [rows, rank] with alpha folded in, fp32; the keys they came from, alpha's too."""

    a: Tensor
    b: Tensor
    alpha: float | None
    keys: tuple[str, ...]


def read_lora(path: Path | str) -> dict[str, Tensor]:
    """Reads the tensors of a LoRA file, or of a peft folder or reference script's checkpoint, under their own names.

    A is [rank, in], B [rows, rank], in the file's dtype unless a scale is folded in.

    The scale that is stored beside the tensors is folded into them: peft's adapter_config.json, and diffusers'
    `lora_adapter_metadata` in the header.

    Raises:
        ValueError: it is not a safetensors file, or an adapter of another kind.
        FileNotFoundError: there is no such file.
    """
    path = Path(path)
    path = path / PEFT_WEIGHTS if path.is_dir() else path
    tensors, metadata = read_safetensors(path)
    beside = path.with_name("adapter_config.json")
    if path.name == PEFT_WEIGHTS and beside.is_file():
        return _with_strength(tensors, parse_json_object(beside.read_bytes(), beside), beside)
    if stated := metadata.get("lora_adapter_metadata"):
        return _with_strength(tensors, parse_json_object(stated, path), path)
    return tensors


def import_lora(tensors: Mapping[str, Tensor], sites: Sequence[LinearSite], targets: Sequence[str]) -> ImportedLora:
    """Maps the `tensors` of any trainer's LoRA to the parts of `sites` that `targets` select.

    tensors: A [rank, in] and B [rows, rank] under the file's own names, from `read_lora`.

    Raises:
        ValueError: it is not a plain LoRA, belongs to another model, or changes nothing that is trained.
    """
    places, chosen = _places(sites), match_targets([part.name for site in sites for part in site.parts], targets)
    found: dict[str, list[tuple[Tensor, Tensor]]] = {}
    pairs, unused = _pairs(tensors)
    _require_once(pairs, places)
    for module, pair in pairs.items():
        place = places.get(_flat(module))
        trained = [part for part in place.parts if part.name in chosen] if place else []
        if place is None or len(trained) < len(place.parts) or pair.alpha == 0:
            unused.update(pair.keys)
        if place is not None and trained:
            _check_shapes(module, pair, place)
            for part in trained:
                rows = pair.b[part.start - place.first : part.stop - place.first]
                used = rows.any(dim=0)
                if used.any():
                    found.setdefault(part.name, []).append((pair.a[used], rows[:, used]))
    if not found:
        raise ValueError(f"{_IT} changes nothing that is trained here: {_why_nothing(tensors, pairs, places, chosen)}")
    result = {}
    for name, several in found.items():
        result[f"{name}.lora_A.weight"] = torch.cat([a for a, _ in several])
        result[f"{name}.lora_B.weight"] = torch.cat([b for _, b in several], dim=1)
    return ImportedLora(result, tuple(key for key in tensors if key in unused))


def start_state(initial: Mapping[str, Tensor], start: Mapping[str, Tensor], config: Lora) -> dict[str, Tensor]:
    """Puts the folded tensors of `initial` into `start`, the raw state of a new adapter set; raw, with the same keys.

    All tensors are A [rank, in] and B [rows, rank]; those of `start` have the configuration's rank.

    A smaller rank is filled up with components of `start`: their B is zero, so they add nothing but can learn. Parts
    that `initial` lacks keep the weights of `start`.

    Raises:
        ValueError: a part that is not trained, or a larger rank than the configuration's.
    """
    if unknown := sorted(initial.keys() - start.keys()):
        raise ValueError(
            f"the LoRA to start from has {len(unknown)} tensors that are not trained, such as {unknown[0]}"
        )
    config.check_start(initial)
    state = {key: value.clone() for key, value in start.items()}
    for key, value in unfold_alpha(initial, config).items():
        if ".lora_A." in key:
            state[key][: value.shape[0]] = value
        else:
            state[key][:, : value.shape[1]] = value
    return state


def lora_digest(tensors: Mapping[str, Tensor]) -> str:
    """A digest of 64 hex digits, equal for the same tensors, of any shape, under the same names."""
    digest = hashlib.sha256()
    for key in sorted(tensors):
        value = tensors[key].detach().cpu().float().contiguous()
        digest.update(f"{key}|{tuple(value.shape)}\n".encode())
        digest.update(value.numpy().tobytes())
    return digest.hexdigest()


# -- names -------------------------------------------------------------------------------------------------------------


def _places(sites: Sequence[LinearSite]) -> dict[str, _Place]:
    """Every name of a Linear, or of a part of one, with underscores for dots -> its place."""
    places: dict[str, _Place] = {}
    for site in sites:
        for name, parts in {site.name: site.parts, **{part.name: (part,) for part in site.parts}}.items():
            places[name.replace(".", "_")] = _Place(site.in_features, parts)
    # some tools write to_out for to_out.0; in FLUX.2 the single-stream blocks have a to_out of their own
    short = {name.removesuffix("_0"): place for name, place in places.items() if name.endswith("_to_out_0")}
    return short | places


def _flat(module: str) -> str:
    """A file's module name in the form of `_places`; names that mix dots and underscores work too."""
    return _unprefixed(module).replace(".", "_")


def _match(key: str) -> re.Match[str] | None:
    """The parts of the name of an A or B; None for other tensors."""
    for older, usual in _OLDER:
        key = older.sub(usual, key)
    return _KEY.fullmatch(key)


def _unprefixed(module: str) -> str:
    for prefix in _FLAT_PREFIXES:
        if module.startswith(prefix):
            return module.removeprefix(prefix)
    for prefix in _PREFIXES:  # peft may have been put around a network with a prefix of its own
        module = module.removeprefix(prefix)
    return module


def _require_once(modules: Iterable[str], places: Mapping[str, _Place]) -> None:
    """Refuses a layer under two names: ComfyUI applies only the last of them, and others add them."""
    named: dict[tuple[str, ...], str] = {}
    for module in modules:
        if (place := places.get(_flat(module))) is not None:
            other = named.setdefault(tuple(part.name for part in place.parts), module)
            if other != module:
                raise ValueError(
                    f"{_IT} has one layer under two names, {shown(other)} and {shown(module)}, which programs read "
                    "differently: use a file with one of them"
                )


def _why_nothing(
    tensors: Mapping[str, Tensor], pairs: Mapping[str, _Pair], places: Mapping[str, _Place], chosen: Collection[str]
) -> str:
    """Why no part of the network is changed, and what to do."""
    if not pairs:
        return f"use a LoRA file; none of its {len(tensors)} tensors belongs to a LoRA ({_kinds(tensors)})"
    known = {module: pair for module, pair in pairs.items() if _flat(module) in places}
    unknown = [module for module in pairs if module not in known]
    trained = [m for m in known if any(part.name in chosen for part in places[_flat(m)].parts)]
    if trained and all(known[module].alpha == 0 for module in trained):
        return f"its alpha is 0, a strength of 0; use the file with the alpha of its training ({_kinds(trained)})"
    if trained:
        return f"its B is zero, as before the first training step; use a LoRA that was trained ({_kinds(trained)})"
    recognised = f"{len(known)} of its {len(pairs)} modules are recognised{_listed(known)}"
    if known:
        return (
            "none of its layers is among the targets: change targets, or use another LoRA; "
            f"{recognised}, not recognised are {len(unknown)}{_listed(unknown)}"
        )
    return f"use a LoRA that was trained for this model; {recognised}, not recognised are {_kinds(unknown)}"


def _listed(names: Collection[str]) -> str:
    return f" ({_kinds(names)})" if names else ""


def _kinds(names: Iterable[str]) -> str:
    """The names, those that differ in their numbers as one: "layers.N.w1 (x34)"."""
    kinds = Counter(re.sub(r"(?<![A-Za-z0-9])[0-9]+(?![A-Za-z0-9])", "N", name[:_LONG_NAME]) for name in names)
    shown_kinds = [shown(kind) + (f" (x{count})" if count > 1 else "") for kind, count in kinds.items()]
    return ", ".join(shown_kinds[:_MAX_KINDS]) + (
        f" and {len(shown_kinds) - _MAX_KINDS} more kinds" if len(shown_kinds) > _MAX_KINDS else ""
    )


# -- tensors -----------------------------------------------------------------------------------------------------------


def _pairs(tensors: Mapping[str, Tensor]) -> tuple[dict[str, _Pair], set[str]]:
    """A and B by the file's module names, and the keys that belong to no pair."""
    halves: dict[str, dict[bool, dict[str, str]]] = {}
    for key in tensors:
        if _OTHER_KINDS.search(key):
            raise ValueError(f"{_IT} holds {shown(key)}, {_other_kind(key, tensors)}")
        match = _match(key)
        if match is not None:
            found = halves.setdefault(match["module"], {}).setdefault(_IS_A[match["kind"]], {})
            if found.setdefault(match["adapter"] or "", key) != key:
                raise ValueError(f"{_IT} holds several LoRAs: {shown(key)} is the second of its kind")
    pairs = {module: _fold(module, kinds, tensors) for module, kinds in halves.items()}
    return pairs, tensors.keys() - {key for pair in pairs.values() for key in pair.keys}


def _other_kind(key: str, keys: Iterable[str]) -> str:
    if ".lokr_" in key:
        return "of LoKr: set adapter to lokr, or start from a plain LoRA"
    if any("magnitude_vector" in other for other in keys):
        return "of DoRA: set adapter to dora, or start from a plain LoRA"
    return f"of {'a DoRA without lora_magnitude_vector' if 'dora' in key else 'LoHa, OFT or the like'}: {_START}"


def _fold(module: str, kinds: Mapping[bool, Mapping[str, str]], tensors: Mapping[str, Tensor]) -> _Pair:
    adapters = sorted({name for found in kinds.values() for name in found})
    adapter = adapters[0] if len(adapters) == 1 else next((name for name in _ADAPTERS if name in adapters), None)
    key_a, key_b = (kinds.get(is_a, {}).get(adapter or "") for is_a in (True, False))
    if key_a is None or key_b is None:
        raise ValueError(f"{_IT} is incomplete: {shown(module)} lacks its A or B, or has several")
    check_pair(module, tensors[key_a], tensors[key_b], _IT)
    a, b = (tensors[key].detach().cpu().float().flatten(1) for key in (key_a, key_b))
    key_alpha = f"{module}.alpha"
    if key_alpha not in tensors:
        return _Pair(a, b, None, (key_a, key_b))
    alpha = alpha_of(key_alpha, tensors[key_alpha], _IT)
    return _Pair(a, scaled(module, b, alpha / a.shape[0], _IT), alpha, (key_a, key_b, key_alpha))


def _check_shapes(module: str, pair: _Pair, place: _Place) -> None:
    if (pair.a.shape[1], pair.b.shape[0]) != (place.in_features, place.rows):
        raise ValueError(
            f"{_IT} is of another model: {shown(module)} goes from {pair.a.shape[1]} to {pair.b.shape[0]}, "
            f"here it goes from {place.in_features} to {place.rows}"
        )


def _with_strength(tensors: Mapping[str, Tensor], stated: Mapping[str, object], source: Path) -> dict[str, Tensor]:
    """Multiplies B by the scale in peft's configuration, or in diffusers' header, which prefixes its fields."""
    config = {key.removeprefix("transformer."): value for key, value in stated.items()}
    if config.get("lora_bias") or (config.get("use_dora") and not any("magnitude_vector" in key for key in tensors)):
        option = "lora_bias" if config.get("lora_bias") else "use_dora, but no lora_magnitude_vector,"
        raise ValueError(f"{_IT} has {option} set: {_START}")
    if config.get("lora_alpha") is None or any(key.endswith(".alpha") for key in tensors):
        return dict(tensors)
    result = {}
    for key, tensor in tensors.items():
        match = _match(key)
        if match is not None and not _IS_A[match["kind"]]:
            if tensor.ndim < 2 or tensor.shape[1] == 0 or not tensor.is_floating_point():
                raise ValueError(f"{source}: {shown(key)} is {tensor.dtype} {tuple(tensor.shape)}, not the B of a LoRA")
            scale = peft_scale(config, _unprefixed(match["module"]), tensor.shape[1], source)
            tensor = scaled(match["module"], tensor.float(), scale, source)
        result[key] = tensor
    return result
