"""LoRAs of other trainers as the start of a run, at exactly the strength that ComfyUI gives them.

    imported = import_lora(read_lora(path), denoiser.sites(), config.adapter.targets)
    train(config, denoiser, data, folder, initial=imported.tensors)

Trainers disagree about names (dots or underscores, the original network's or diffusers'), about fused projections and
about where alpha stands. Here every file becomes "folded" tensors (lora_file.py) under our part names: rows of a fused
projection go to their parts with a copy of its A, and components that do nothing there are dropped.

Legend: A [rank, in], B [rows, rank].
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..denoiser import LinearSite, SitePart
from .lora import Lora
from .lora_file import by_pattern, read_safetensors, unfold_alpha
from .targets import match_targets

PEFT_WEIGHTS = "adapter_model.safetensors"
_KEY = re.compile(
    r"(?P<module>.+)\.(?P<kind>lora_A|lora_B|lora_down|lora_up|lora\.down|lora\.up)(\.(?P<adapter>\w+))?\.weight"
)
_IS_A = {"lora_A": True, "lora_down": True, "lora.down": True, "lora_B": False, "lora_up": False, "lora.up": False}
_PREFIXES = ("base_model.model.", "model.diffusion_model.", "diffusion_model.", "transformer.")
_FLAT_PREFIXES = ("lora_unet_", "lora_transformer_", "lycoris_")  # before names with underscores for dots
_OTHER_KINDS = re.compile(r"dora_scale|magnitude_vector|hada_|lokr_|oft_|lora_mid|\.a[12]\.weight|\.b[12]\.weight")
_ADAPTERS = ("student", "default")  # the one to take from a file of several; the authors' scripts keep the teacher too


@dataclass(frozen=True, eq=False)
class ImportedLora:
    """tensors: folded, fp32, under part names; only parts on which the LoRA does something, ranks may differ.
    left_out: the file's keys that belong to nothing that is trained."""

    tensors: Mapping[str, Tensor]
    left_out: tuple[str, ...]


@dataclass(frozen=True)
class _Place:
    """Rows of a Linear's output, as parts that follow one another."""

    in_features: int
    parts: tuple[SitePart, ...]

    @property
    def first(self) -> int:
        return self.parts[0].start

    @property
    def rows(self) -> int:
        return self.parts[-1].stop - self.first


@dataclass(frozen=True, eq=False)
class _Pair:
    """A and B [rows, rank] with alpha folded in, fp32; the keys they came from."""

    a: Tensor
    b: Tensor
    keys: tuple[str, ...]


def read_lora(path: Path | str) -> dict[str, Tensor]:
    """The tensors of a LoRA file under its own names, or of a peft folder (the reference scripts' checkpoints).

    Strength that stands beside the tensors is folded into them: peft's adapter_config.json, and diffusers'
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
        return _with_told_strength(tensors, _parse(beside.read_text(encoding="utf-8"), beside))
    if told := metadata.get("lora_adapter_metadata"):
        return _with_told_strength(tensors, _parse(told, path))
    return tensors


def import_lora(tensors: Mapping[str, Tensor], sites: Sequence[LinearSite], targets: Sequence[str]) -> ImportedLora:
    """`tensors` of any trainer, put on the parts of `sites` that `targets` choose.

    Raises:
        ValueError: not a plain LoRA, of another model, or of nothing that is trained.
    """
    places, chosen = _places(sites), match_targets([part.name for site in sites for part in site.parts], targets)
    found: dict[str, list[tuple[Tensor, Tensor]]] = {}
    pairs, left_out = _pairs(tensors)
    for module, pair in pairs.items():
        place = places.get(_bare(module))
        trained = [part for part in place.parts if part.name in chosen] if place else []
        if place is None or len(trained) < len(place.parts):
            left_out += pair.keys
        if place is not None and trained:
            _check_shapes(module, pair, place)
            for part in trained:
                rows = pair.b[part.start - place.first : part.stop - place.first]
                used = rows.any(dim=0)
                if used.any():
                    found.setdefault(part.name, []).append((pair.a[used], rows[:, used]))
    if not found:
        raise ValueError(
            f"the LoRA to start from changes nothing that is trained here (it has {len(tensors)} tensors, the first "
            f"is {next(iter(tensors), 'none')!r}); take one that was trained for this model"
        )
    result = {}
    for name, several in found.items():
        result[f"{name}.lora_A.weight"] = torch.cat([a for a, _ in several])
        result[f"{name}.lora_B.weight"] = torch.cat([b for _, b in several], dim=1)
    return ImportedLora(result, tuple(left_out))


def start_state(initial: Mapping[str, Tensor], start: Mapping[str, Tensor], config: Lora) -> dict[str, Tensor]:
    """`start`, the raw state of a new adapter set, with the folded tensors of `initial` in it; raw, the same keys.

    A smaller rank is filled up with components of `start`, whose B is zero: they add nothing, and can learn. Parts
    that `initial` lacks stay as they are.

    Raises:
        ValueError: a part that is not trained, or a larger rank than the configuration's.
    """
    if unknown := sorted(initial.keys() - start.keys()):
        raise ValueError(
            f"the LoRA to start from has {len(unknown)} tensors that are not trained, such as {unknown[0]}"
        )
    rank = max((t.shape[0] for key, t in initial.items() if ".lora_A." in key), default=0)
    if rank > config.rank:
        raise ValueError(f"the LoRA to start from has rank {rank}, the run has rank {config.rank}; set rank to {rank}")
    state = {key: value.clone() for key, value in start.items()}
    for key, value in unfold_alpha(initial, config).items():
        if ".lora_A." in key:
            state[key][: value.shape[0]] = value
        else:
            state[key][:, : value.shape[1]] = value
    return state


def lora_digest(tensors: Mapping[str, Tensor]) -> str:
    """64 hex digits: equal for the same tensors under the same names."""
    digest = hashlib.sha256()
    for key in sorted(tensors):
        value = tensors[key].detach().cpu().float().contiguous()
        digest.update(f"{key}|{tuple(value.shape)}\n".encode())
        digest.update(value.numpy().tobytes())
    return digest.hexdigest()


# -- names -------------------------------------------------------------------------------------------------------------


def _places(sites: Sequence[LinearSite]) -> dict[str, _Place]:
    """Every name of a Linear, or of a part of one, with dots and with underscores -> its place."""
    places: dict[str, _Place] = {}
    for site in sites:
        for name, parts in {site.name: site.parts, **{part.name: (part,) for part in site.parts}}.items():
            places[name] = places[name.replace(".", "_")] = _Place(site.in_features, parts)
    return places


def _bare(module: str) -> str:
    for prefix in _FLAT_PREFIXES:
        if module.startswith(prefix):
            return module.removeprefix(prefix)
    for prefix in _PREFIXES:  # peft may have been put around a network with a prefix of its own
        module = module.removeprefix(prefix)
    return module


# -- tensors -----------------------------------------------------------------------------------------------------------


def _pairs(tensors: Mapping[str, Tensor]) -> tuple[dict[str, _Pair], list[str]]:
    """A and B by the file's module names, and the keys that are neither."""
    halves: dict[str, dict[bool, dict[str, str]]] = {}
    left_out = []
    for key in tensors:
        if _OTHER_KINDS.search(key):
            raise ValueError(f"the LoRA to start from holds {key!r}, of DoRA, LoHa, LoKr or the like; only plain LoRA")
        match = _KEY.fullmatch(key)
        if match is not None:
            found = halves.setdefault(match["module"], {}).setdefault(_IS_A[match["kind"]], {})
            found[match["adapter"] or ""] = key
        elif not key.endswith(".alpha"):
            left_out.append(key)
    return {module: _fold(module, kinds, tensors) for module, kinds in halves.items()}, left_out


def _fold(module: str, kinds: Mapping[bool, Mapping[str, str]], tensors: Mapping[str, Tensor]) -> _Pair:
    adapters = sorted({name for found in kinds.values() for name in found})
    adapter = adapters[0] if len(adapters) == 1 else next((name for name in _ADAPTERS if name in adapters), None)
    key_a, key_b = (kinds.get(is_a, {}).get(adapter or "") for is_a in (True, False))
    if key_a is None or key_b is None:
        raise ValueError(f"the LoRA to start from is not whole: {module} lacks its A or B, or has several")
    a, b = (tensors[key].detach().cpu().float().flatten(1) for key in (key_a, key_b))
    if a.shape[0] != b.shape[1]:
        raise ValueError(f"the LoRA to start from is damaged: A {tuple(a.shape)} and B {tuple(b.shape)} of {module}")
    if not (torch.isfinite(a).all() and torch.isfinite(b).all()):
        raise ValueError(f"the LoRA to start from is not finite in {module}")
    alpha = tensors.get(f"{module}.alpha")
    return _Pair(a, b if alpha is None else b * (float(alpha) / a.shape[0]), (key_a, key_b))


def _check_shapes(module: str, pair: _Pair, place: _Place) -> None:
    if (pair.a.shape[1], pair.b.shape[0]) != (place.in_features, place.rows):
        raise ValueError(
            f"the LoRA to start from is of another model: {module} goes from {pair.a.shape[1]} to {pair.b.shape[0]}, "
            f"here it goes from {place.in_features} to {place.rows}"
        )


def _parse(text: str, source: Path) -> Mapping[str, object]:
    try:
        parsed = json.loads(text)
    except ValueError as error:
        raise ValueError(f"{source}: what stands beside the LoRA's weights is no JSON: {error}") from error
    if not isinstance(parsed, dict):
        raise ValueError(f"{source}: what stands beside the LoRA's weights is no JSON object")
    return parsed


def _with_told_strength(tensors: Mapping[str, Tensor], told: Mapping[str, object]) -> dict[str, Tensor]:
    """B times the scale of peft's configuration, or of diffusers' header, which prefixes its fields."""
    config = {key.removeprefix("transformer."): value for key, value in told.items()}
    for option in ("use_dora", "lora_bias"):
        if config.get(option):
            raise ValueError(f"the LoRA to start from has {option} set; only plain LoRA can be continued")
    alphas, alpha = config.get("alpha_pattern"), config.get("lora_alpha")
    if alpha is None or any(key.endswith(".alpha") for key in tensors):
        return dict(tensors)
    result = {}
    for key, tensor in tensors.items():
        match = _KEY.fullmatch(key)
        if match is not None and not _IS_A[match["kind"]]:
            own = by_pattern(alphas if isinstance(alphas, dict) else {}, _bare(match["module"]), alpha)
            rank = tensor.shape[1]
            tensor = tensor.float() * (float(own) / (rank**0.5 if config.get("use_rslora") else rank))
        result[key] = tensor
    return result
