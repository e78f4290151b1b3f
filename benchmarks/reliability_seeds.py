"""Small valid inputs of every fuzzed kind: captions, images, datasets, LoRA files, runs."""

from __future__ import annotations

import io
import json
import tempfile
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch
from PIL import Image, PngImagePlugin
from safetensors.torch import save as format_safetensors

from benchmarks.reliability_mutators import Chance
from benchmarks.reliability_trees import Tree
from dopsd_core.adapters import Lora
from dopsd_core.adapters.lora_file import save_lora
from dopsd_core.conditioning.cache import ConditionCache, cache_key
from dopsd_core.options import changed
from dopsd_core.training.checkpoint import Checkpoint, save_checkpoint
from tests.tiny import killable_config
from tests.toy_denoiser import ToyDenoiser


@cache
def images() -> Mapping[str, bytes]:
    """Small images of every form that is read, by file name."""
    return {name: _encoded(name, mode, kind, **options) for name, (mode, kind, options) in _FORMS.items()}


_EXIF = Image.Exif()
_EXIF[0x0112] = 6
_TEXT = PngImagePlugin.PngInfo()
_TEXT.add_text("workflow", "{}" * 500)

_FORMS: Mapping[str, tuple[str, str, dict[str, Any]]] = {
    "rgb.png": ("RGB", "PNG", {}),
    "text.png": ("RGB", "PNG", {"pnginfo": _TEXT, "exif": _EXIF}),
    "rgba.png": ("RGBA", "PNG", {}),
    "palette.png": ("P", "PNG", {"transparency": 0}),
    "deep.png": ("I;16", "PNG", {}),
    "grey.png": ("LA", "PNG", {}),
    "bits.png": ("1", "PNG", {}),
    "animated.png": ("RGB", "PNG", {"save_all": True, "append_images": [Image.new("RGB", (24, 16))]}),
    "rgb.jpg": ("RGB", "JPEG", {}),
    "turned.jpg": ("RGB", "JPEG", {"exif": _EXIF, "progressive": True}),
    "cmyk.jpg": ("CMYK", "JPEG", {}),
    "lossy.webp": ("RGB", "WEBP", {}),
    "lossless.webp": ("RGBA", "WEBP", {"lossless": True}),
    "rgb.bmp": ("RGB", "BMP", {}),
    "palette.bmp": ("P", "BMP", {}),
}


def _encoded(name: str, mode: str, kind: str, **options: Any) -> bytes:
    chance, stream = Chance(name), io.BytesIO()
    image = Image.frombytes("RGB", (24, 16), chance.randbytes(24 * 16 * 3))
    deep = Image.frombytes("I;16", (24, 16), chance.randbytes(24 * 16 * 2)) if mode == "I;16" else None
    (deep or image.convert(mode)).save(stream, kind, **options)
    return stream.getvalue()


CAPTIONS = (
    "a [V] dog on a lawn",
    "ein [V] H\u00fcndchen\nzweite Zeile",
    "\u4e00\u53ea[V]\u72d7",
    "a sks dog, sks, [V]",
)


def make_caption(chance: Chance) -> Tree:
    """One caption file."""
    return Tree({b"a.txt": chance.choice(CAPTIONS).encode()})


def make_image_file(chance: Chance) -> Tree:
    """One image file."""
    name = chance.choice(sorted(images()))
    return Tree({name.encode(): images()[name]})


def make_folder(chance: Chance) -> Tree:
    """A dataset of images, or of edits."""
    names = chance.sample(sorted(images()), 3)
    texts = [chance.choice(CAPTIONS).encode() for _ in names]
    first, second, third = (images()[name] for name in names)
    stems = [name.partition(".")[0] + str(at) for at, name in enumerate(names)]
    files = {f"{stem}.{name.rpartition('.')[2]}": images()[name] for stem, name in zip(stems, names, strict=True)}
    files |= {f"{stem}.txt": text for stem, text in zip(stems, texts, strict=True)}
    if chance.random() < 0.4:
        files = {"target/a.png": first, "target/a.txt": texts[0], "source/a.jpg": second, "source/b.png": third}
        files |= {"target/b.png": second, "target/b.txt": texts[1]}
    elif chance.random() < 0.5:
        files = {f"10_dogs/{name}": data for name, data in files.items()}
    return Tree({name.encode(): data for name, data in files.items()})


def make_rows(chance: Chance) -> Tree:
    """A JSONL of images or of edits, with its files."""
    files = {f"p{at}.png": images()[name] for at, name in enumerate(("rgb.png", "rgba.png", "palette.png"))}
    plain: list[dict[str, Any]] = [
        {"local_path_list": ["p0.png"], "h*w": "16*24", "short_en": "a [V] dog", "detailed_zh": "\u72d7"},
        {"image_path": "p1.png", "caption": "a [V] cat", "repeats": 3},
        {"file_name": "./p2.png", "text": "a [V] cow"},
    ]
    edits: list[dict[str, Any]] = [
        {"ref_img": ["p0.png"], "target_img": "p1.png", "user_prompt_en": "make it winter"},
        {"ref_img": ["p0.png", "p2.png"], "target_img": "p1.png", "user_prompt_en": "mix", "h*w": ["16*24", "16*24"]},
    ]
    rows = edits if chance.random() < 0.4 else plain
    files["rows.jsonl"] = "\n".join(json.dumps(row, ensure_ascii=False) for row in rows).encode()
    return Tree({name.encode(): data for name, data in files.items()})


@cache
def _lora_files() -> Mapping[str, bytes]:
    """LoRA files of several trainers for the toy network, by name."""
    sites = ToyDenoiser().sites()
    parts = {part.name: (site.in_features, part.out_features) for site in sites for part in site.parts}
    generator = torch.Generator().manual_seed(0)
    raw = {
        f"{name}.{half}.weight": torch.randn(shape, generator=generator)
        for name, (columns, rows) in list(parts.items())[:4]
        for half, shape in (("lora_A", (3, columns)), ("lora_B", (rows, 3)))
    }
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "own.safetensors"
        save_lora(path, raw, Lora(rank=3, alpha=6.0, targets=("*",)))
        own = path.read_bytes()
    kohya = {f"lora_unet_{key.replace('.', '_', key.count('.') - 2)}": value for key, value in raw.items()}
    kohya = {key.replace("lora_A", "lora_down").replace("lora_B", "lora_up"): value for key, value in kohya.items()}
    kohya |= {key.replace("lora_down.weight", "alpha"): torch.tensor(6.0) for key in kohya if "lora_down" in key}
    header = {"lora_adapter_metadata": json.dumps({"transformer.lora_alpha": 6, "transformer.r": 3})}
    peft = {f"base_model.model.{key}": value for key, value in raw.items()}
    return {
        "own": own,
        "kohya": format_safetensors(kohya),
        "diffusers": format_safetensors(raw, header),
        "peft": format_safetensors(peft),
    }


def make_lora(chance: Chance) -> Tree:
    """A LoRA file, or a peft folder."""
    kind = chance.choice(sorted(_lora_files()))
    if kind != "peft":
        return Tree({b"x.safetensors": _lora_files()[kind]})
    config = {
        "r": 3,
        "lora_alpha": 6,
        "use_rslora": False,
        "alpha_pattern": {"to_q": 3},
        "base_model_name_or_path": "m",
    }
    return Tree(
        {b"adapter_model.safetensors": _lora_files()[kind], b"adapter_config.json": json.dumps(config).encode()}
    )


def make_config_file(chance: Chance) -> Tree:
    """A run's config.json."""
    changes: dict[str, Any] = chance.choice(({}, {"objective": "sft"}))
    return Tree({b"config.json": changed(killable_config(60), changes).to_json().encode()})


@cache
def _run_files() -> Mapping[bytes, bytes]:
    """A run's folder with two checkpoints, and an entry of the condition cache."""
    tensors = {"a.lora_A.weight": torch.arange(6.0).reshape(2, 3)}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for step in (3, 6):
            facts = {"config": "{}", "data": "x", "optimizer": {"0/step": step}, "start": None, "last": None}
            save_checkpoint(folder / "checkpoints", Checkpoint(step, tensors, {}, tensors, facts))
        (folder / "train.jsonl").write_text("".join(f'{{"step": {step}, "loss": 0.5}}\n' for step in range(7)))
        ConditionCache(folder / "cache").store(CACHE_KEY, {"features": torch.ones(2, 3)})
        return {bytes(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


CACHE_KEY = cache_key("text", "", "a dog", "me", {})


def make_run(_: Chance) -> Tree:
    """A run's folder."""
    return Tree(dict(_run_files()))
