"""A hundred attempts to make a node read or write outside of its folders: names, links, rows, prefixes, API calls.

`Field.attempts()` lays out the folders and files that they need and lists them. What they aim at is `Field.secret`, a
good dataset with a LoRA outside of everything that a node may read, whose texts hold `CANARY`.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors.torch import save_file

CANARY = "CANARY-5c1e"
GOOD = "good"
"""A dataset in the input folder that may be read; written out in the names below."""


FOLDERS = (
    "../secret", "..", "../..", "../../secret", "good/../../secret", "good/./../../secret", "SECRET", "SECRET/", "/",
    "/etc", "/proc/self/cwd", "/SECRET", "//server/share", "\\\\server\\share", "C:\\Users", "C:secret", "c:/secret",
    "..\\secret", "good\\..\\..\\secret", "file://SECRET", "good/\0/../../secret", "\0", "~", "~root", "$HOME",
    "%2e%2e/secret", "..%2fsecret", "\uff0e\uff0e/secret", "....//secret", " ../secret", "../secret ", "link_out",
    "link_out/.", "link_link", "sets/../../secret", "sets/link_out", "BASE/input/../secret", "BASE/output", "secret",
    "linked_image", "linked_caption", "linked_both", "linked_source", "linked_target", "linked_folder",
    "rows_out.jsonl", "rows_out.jsonl/../link_out",
)  # fmt: skip
"""Names of datasets. Here and below SECRET and BASE stand for those folders, as on the page."""

IMAGES = (
    "SECRET/a.png", "../secret/a.png", "../../secret/a.png", "good/../../secret/a.png", "link_image.png",
    "link_out/a.png", "file://SECRET/a.png", "//server/share/a.png", "\\\\server\\share\\a.png", "C:\\a.png",
    "~/a.png", "$HOME/a.png", "a\0.png", "/dev/zero", "/proc/self/environ", "/etc/passwd", "%2e%2e/secret/a.png",
    "x" * 5000,
)  # fmt: skip
ROWS: tuple[dict[str, Any], ...] = (
    *({"image_path": path, "caption": "a [V] badge"} for path in IMAGES),
    {"local_path_list": ["SECRET/a.png", "good/a.png"], "short_en": "a [V] badge"},
    {"ref_img": ["SECRET/a.png"], "target_img": "good/a.png", "user_prompt_en": "x"},
    {"ref_img": ["good/a.png", "../secret/a.png"], "target_img": "good/a.png", "user_prompt_en": "x"},
    {"ref_img": ["good/a.png"], "target_img": "link_out/a.png", "user_prompt_en": "x"},
)

RUN_NAMES = (
    "../x", "..", "x/../../y", "/tmp/x", "SECRET/x", "a/b", "a\\b", "..\\x", "C:\\x", "CON", "x.", ".x", "a\0b", "a:b",
    " ", "%date%/../x", "x" * 300,
)  # fmt: skip

PREFIXES = (
    "../x", "..", "loras/../../x", "SECRET/x", "/tmp/x", "%date%/../../x", "%date:yyyy/../../..%/x",
    "%year%/../../../x", "%KSampler.seed%/../x", "..\\x", "C:/x", "loras/\0x", "loras/con", "loras//x", "", "x" * 300,
    "~/x", "%2e%2e/x",
)  # fmt: skip

LORAS = (
    "../../secret/secret.safetensors", "SECRET/secret.safetensors", "..\\..\\..\\secret\\secret.safetensors",
    "file://SECRET/secret.safetensors", "fine.safetensors/../../../../secret/secret.safetensors", "fine\0.safetensors",
    ".",
)  # fmt: skip

VISIONS = ("SECRET/secret.safetensors", "../../secret/secret.safetensors", "file://SECRET/secret.safetensors")
PARTS = (*VISIONS[:2], "C:\\x.safetensors", "a\0.safetensors", "sub/x.safetensors")
TEXTS = ("SECRET/a.txt", "@SECRET/a.txt", "file://SECRET/a.txt")
UPLOADS = ("../secret", "../../secret", "SECRET")
VIEWS = ("filename=a.txt&subfolder=../secret", "filename=SECRET/a.txt")


@dataclass(frozen=True)
class Attempt:
    """One attempt to leave the allowed folders.

    Attributes:
        kind: what is abused.
        what: how, for the page.
        graph: what is posted to /prompt, if anything is.
        upload: what is uploaded instead.
        view: what is asked of /view instead.
    """

    kind: str
    what: str
    graph: dict[str, Any] | None = None
    upload: dict[str, str] | None = None
    view: str = ""


@dataclass(frozen=True)
class Field:
    """Where the attempts are made.

    Attributes:
        base: ComfyUI's base folder.
        secret: what must not be touched.
        extra: an owner's folder that may be read, under its own name.
    """

    base: Path
    secret: Path
    extra: Path

    def lay_out(self) -> None:
        """Writes the secret, good data, and the links and files that the attempts use."""
        for folder, text in (
            (self.secret, CANARY),
            (self.base / "secret", CANARY),
            (self.base / "input" / GOOD, "a [V] badge"),
            (self.extra / "cats", "a [V] cat"),
        ):
            write_pair(folder, text)
        _write_lora(self.secret / "secret.safetensors")
        _write_lora(self.base / "models" / "loras" / "fine.safetensors")
        (self.secret / "rows.jsonl").write_text(json.dumps({"path": "a.png", "caption": CANARY}))
        self._lay_links()

    def _lay_links(self) -> None:
        source = self.base / "input"
        for name, target in (
            ("link_out", self.secret),
            ("link_link", source / "link_out"),
            ("rows_out.jsonl", self.secret / "rows.jsonl"),
            ("link_image.png", self.secret / "a.png"),
        ):
            (source / name).symlink_to(target)
        (self.extra / "link_out").symlink_to(self.secret)
        folders = {
            "linked_image": ("a.png",), "linked_caption": ("a.txt",), "linked_both": ("a.png", "a.txt"),
            "linked_source": ("source/a.png",), "linked_target": ("target/a.png", "target/a.txt"),
        }  # fmt: skip
        for name, links in folders.items():
            edits = "source" in name or "target" in name
            for half in ("source", "target") if edits else ("",):
                write_pair(source / name / half, "a [V] badge", "blue" if half == "target" else "red")
            for link in links:
                (source / name / link).unlink()
                (source / name / link).symlink_to(self.secret / Path(link).name)
        write_pair(source / "linked_folder", "a [V] badge")
        (source / "linked_folder" / "10_more").symlink_to(self.secret)

    def attempts(self) -> list[Attempt]:
        """All of them."""
        return [
            *self._folders(), *self._rows(), *self._run_names(), *self._prefixes(), *self._loras(), *self._visions(),
            *self._prompts(), *self._calls(),
        ]  # fmt: skip

    def _folders(self) -> Iterator[Attempt]:
        for name in FOLDERS:
            yield Attempt("Load Dataset, folder", name, dataset_graph(self._filled(name)))
        for value in (["../secret", 0], {"__value__": "../secret"}):
            yield Attempt("Load Dataset, folder", json.dumps(value), dataset_graph(value))

    def _rows(self) -> Iterator[Attempt]:
        for number, row in enumerate(ROWS):
            file = self.base / "input" / f"rows_{number}.jsonl"
            file.write_text(self._filled(json.dumps(row)) + "\n", encoding="utf-8")
            images = {key: value for key, value in row.items() if key not in ("caption", "short_en", "user_prompt_en")}
            yield Attempt("a .jsonl's row", json.dumps(images), dataset_graph(file.name))

    def _run_names(self) -> Iterator[Attempt]:
        for name in RUN_NAMES:
            yield Attempt("D-OPSD Train LoRA, run_name", name, training_graph(run_name=self._filled(name)))

    def _prefixes(self) -> Iterator[Attempt]:
        for prefix in PREFIXES:
            yield Attempt("Save LoRA, filename_prefix", prefix, saving_graph(self._filled(prefix)))

    def _loras(self) -> Iterator[Attempt]:
        for name in LORAS:
            yield Attempt("Load LoRA, lora_name", name, saving_graph("loras/x", self._filled(name)))

    def _visions(self) -> Iterator[Attempt]:
        for name in VISIONS:
            yield Attempt("Load Teacher Vision, vision_name", name, vision_graph(self._filled(name)))
        folder = self.base / "models" / "text_encoders"
        for number, part in enumerate(PARTS):
            name = f"m{number}-00001-of-00002.safetensors"
            _write_lora(folder / name)
            index = {"weight_map": {"model.visual.pos_embed.weight": self._filled(part)}}
            (folder / f"m{number}.safetensors.index.json").write_text(json.dumps(index))
            yield Attempt("an index.json's file name", part, vision_graph(name))

    def _prompts(self) -> Iterator[Attempt]:
        for name in ("preview_prompts", "anchor_prompts"):
            for text in TEXTS:
                yield Attempt(f"a path as {name}", text, training_graph(conditions={name: self._filled(text)}))

    def _calls(self) -> Iterator[Attempt]:
        for subfolder in UPLOADS:
            fields = {"subfolder": self._filled(subfolder)}
            yield Attempt("POST /upload/image, subfolder", subfolder, upload=fields)
        for query in VIEWS:
            yield Attempt("GET /view", query, view=f"/view?{self._filled(query)}&type=output")

    def _filled(self, text: str) -> str:
        return text.replace("SECRET", str(self.secret)).replace("BASE", str(self.base))

    def as_on_the_page(self, text: str) -> str:
        """The same on every machine."""
        return text.replace(str(self.secret), "SECRET").replace(str(self.base), "BASE")


# -- graphs ------------------------------------------------------------------------------------------------------------


def dataset_graph(folder: Any) -> dict[str, Any]:
    """Load Dataset, and its report shown."""
    inputs = {"folder": folder, "resolution": 64, "trigger": "", "repeats": 1, "caption_dropout": 0.0}
    return {
        "data": {"class_type": "DOPSD_LoadDataset", "inputs": inputs},
        "show": {"class_type": "PreviewAny", "inputs": {"source": ["data", 1]}},
    }


def training_graph(run_name: str = "attempt", conditions: dict[str, str] | None = None) -> dict[str, Any]:
    """A training of one step."""
    from benchmarks.reliability_server import QUICK, training

    graph = training(run_name, **{**QUICK, "steps": 1, "preview_every": 0, "warmup": 0})
    graph["conditions"]["inputs"].update(conditions or {})
    return graph


def saving_graph(prefix: str, lora: str = "fine.safetensors") -> dict[str, Any]:
    """Load LoRA into Save LoRA, with a peft folder."""
    saving = {"lora": ["load", 0], "filename_prefix": prefix, "dtype": "bf16", "peft_folder": True}
    return {
        "load": {"class_type": "DOPSD_LoadLoRA", "inputs": {"lora_name": lora}},
        "save": {"class_type": "DOPSD_SaveLoRA", "inputs": saving},
    }


def vision_graph(name: str) -> dict[str, Any]:
    """A vision file, and what uses it."""
    graph = training_graph()
    graph["vision"] = {"class_type": "DOPSD_LoadTeacherVision", "inputs": {"vision_name": name}}
    graph["conditions"]["inputs"]["vision"] = ["vision", 0]
    return graph


# -- files -------------------------------------------------------------------------------------------------------------


def write_pair(folder: Path, text: str, colour: str = "red") -> None:
    """One image with its caption."""
    folder.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (64, 64), colour).save(folder / "a.png")
    (folder / "a.txt").write_text(text, encoding="utf-8")


def png() -> bytes:
    """A small image, to upload."""
    stream = io.BytesIO()
    Image.new("RGB", (8, 8), "green").save(stream, "PNG")
    return stream.getvalue()


def _write_lora(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    shapes = {"lora_A": (2, 8), "lora_B": (8, 2)}
    tensors = {
        f"transformer.layers.0.attention.to_q.{half}.weight": torch.ones(shape) for half, shape in shapes.items()
    }
    save_file(tensors, path)
