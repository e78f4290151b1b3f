"""The kinds of input that are fuzzed without ComfyUI: good seeds, what is done to them, who reads them, and which
exceptions their docstrings allow."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Callable, Sequence
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch

from benchmarks.reliability_mutators import (
    NONSENSE,
    Chance,
    encode_text,
    mutate_bytes,
    mutate_json,
    mutate_png,
    mutate_safetensors,
    mutate_text,
    write_json,
)
from benchmarks.reliability_seeds import (
    CACHE_KEY,
    make_caption,
    make_config_file,
    make_folder,
    make_image_file,
    make_lora,
    make_rows,
    make_run,
)
from benchmarks.reliability_trees import TREE_MUTATIONS, Tree
from dopsd_core.__main__ import main
from dopsd_core.adapters import Lora
from dopsd_core.adapters.lora_file import load_lora, load_peft
from dopsd_core.adapters.lora_import import import_lora, lora_digest, read_lora, start_state
from dopsd_core.adapters.targets import match_targets, parse_targets
from dopsd_core.arguments import config_from_args, make_parser
from dopsd_core.conditioning.cache import ConditionCache
from dopsd_core.config import ConfigError, TrainConfig, changes_that_forbid_resuming
from dopsd_core.data.buckets import Bucket
from dopsd_core.data.captions import CaptionError, has_trigger, put_trigger, read_caption_file, remove_trigger
from dopsd_core.data.dataset import DatasetError, DatasetReport, read_dataset
from dopsd_core.data.encoding_plan import plan_encoding
from dopsd_core.data.images import ImageError, load_image, read_image
from dopsd_core.demo.settings import demo_config
from dopsd_core.training.checkpoint import StateError, load_checkpoint
from dopsd_core.training.log import read_log
from dopsd_core.training.rng import DataOrder
from tests.toy_denoiser import ToyDenoiser

Mutation = Callable[[Tree, Chance], None]


class Refused(Exception):
    """Raised by a reader whose input was refused as it should be, by other means than an exception; says how."""


class Broken(Exception):
    """Raised by a reader that saw what must not be; the first line of its text names the failure."""


@dataclass(frozen=True)
class Kind:
    """One kind of input.

    Attributes:
        name: for commands and tables.
        share: inputs of this kind among 50,000.
        make: a good input.
        mutations: what is done to it, one at a time.
        read: hands the folder that holds it to the public functions.
        documented: what these may raise by their docstrings, and nothing else.
        hang_seconds: what may take longer is a hang.
    """

    name: str
    share: int
    make: Callable[[Chance], Tree]
    mutations: Sequence[Mutation]
    read: Callable[[Path, Chance], None]
    documented: tuple[type[Exception], ...]
    hang_seconds: int = 10


def on_file(change: Callable[[bytes, Chance], bytes], *endings: str) -> Mutation:
    """A mutation of the bytes of one of the files with these endings."""

    def mutate(tree: Tree, chance: Chance) -> None:
        names = [name for name in sorted(tree.files) if name.endswith(tuple(map(str.encode, endings)))]
        if names:
            name = chance.choice(names)
            tree.files[name] = change(tree.files[name], chance)

    return mutate


def as_text(data: bytes, chance: Chance) -> bytes:
    """A text file mutated as text, in some encoding."""
    return encode_text(mutate_text(data.decode("utf-8", "replace"), chance), chance)


def as_json(data: bytes, chance: Chance) -> bytes:
    """A JSON file mutated as what it holds."""
    try:
        value = json.loads(data)
    except (ValueError, RecursionError):
        return mutate_bytes(data, chance)
    return write_json(mutate_json(value, chance), chance)


def as_rows(data: bytes, chance: Chance) -> bytes:
    """A JSONL with one row mutated as JSON."""
    lines = data.split(b"\n")
    at = chance.randrange(len(lines))
    lines[at] = as_json(lines[at], chance).replace(b"\n", b" ")
    return b"\n".join(lines)


# -- readers -----------------------------------------------------------------------------------------------------------


def read_captions(folder: Path, chance: Chance) -> None:
    """The caption file, and what the trigger does to its text."""
    text = read_caption_file(folder / "a.txt", chance.choice(("caption", "instruction")))
    trigger = chance.choice((*NONSENSE, "sks", "ohwx dog"))
    named = put_trigger(text, trigger)
    has_trigger(named, trigger)
    remove_trigger(named, trigger)


def read_images(folder: Path, _: Chance) -> None:
    """The image, whole and fitted to a bucket."""
    (path,) = (Path(entry) for entry in folder.iterdir())
    image = read_image(path)
    if image.mode != "RGB" or min(image.size) < 1:
        raise Broken(f"read_image gave {image.mode} {image.size}")
    load_image(path, Bucket(32, 32))


def read_folders(folder: Path, chance: Chance) -> None:
    """The folder as a dataset."""
    _read_data(folder, chance)


def read_row_file(folder: Path, chance: Chance) -> None:
    """The JSONL as a dataset; a link to a whole disk in its place is what its owner chose to read."""
    if (rows := folder / "rows.jsonl").is_symlink():
        return
    _read_data(rows, chance)


def _read_data(source: Path, chance: Chance) -> None:
    """Everything that is done with a dataset before encoding. Problems of the data are in the report alone."""
    trigger = chance.choice(("", "", "sks", *NONSENSE))
    try:
        report = read_dataset(source, pixel_budget=32 * 32, multiple=16, trigger=trigger)
    except ValueError as error:
        if str(error).startswith("the trigger"):
            raise Refused("trigger refused") from error
        raise
    report.describe()
    if chance.random() < 0.2:
        _inspect(source, chance.choice(("utf-8", "cp1252", "ascii")))
    _use_report(report, trigger)
    report.raise_for_errors()


def _inspect(source: Path, encoding: str) -> None:
    """The command line's report on a console that knows only `encoding`."""
    with (
        io.TextIOWrapper(io.BytesIO(), encoding=encoding) as out,
        io.TextIOWrapper(io.BytesIO(), encoding=encoding, errors="backslashreplace") as complaints,
        redirect_stdout(out),
        redirect_stderr(complaints),
    ):
        main(["inspect-dataset", str(source), "--resolution", "32"])
        sys.stdout.flush()


def _use_report(report: DatasetReport, trigger: str) -> None:
    plan = plan_encoding(report.pairs, trigger=trigger, caption_dropout=True)
    if not plan.examples:
        return
    shapes = tuple(str(pair.bucket) for pair in report.pairs)
    repeats = tuple(example.repeats for example in plan.examples)
    DataOrder(shapes, repeats, batch_size=2, seed=0).batch(0)
    for pair in report.pairs:
        for path in (pair.image_path, *pair.source_images):
            load_image(path, pair.bucket)


def read_loras(folder: Path, _: Chance) -> None:
    """The LoRA file or folder, by every function that takes one."""
    if (path := folder / "x.safetensors").exists():
        _import(path)
        load_lora(path)
    else:
        _import(folder)
        load_peft(folder)


def _import(path: Path) -> None:
    denoiser = _toy()
    config = Lora(rank=8, alpha=8.0, targets=("layers.*",))
    imported = import_lora(read_lora(path), denoiser.sites(), config.targets)
    lora_digest(imported.tensors)
    start_state(imported.tensors, _start(), config)


@cache
def _toy() -> ToyDenoiser:
    return ToyDenoiser()


@cache
def _start() -> dict[str, torch.Tensor]:
    from dopsd_core.adapters.adapter_set import AdapterSet

    return AdapterSet(_toy().sites(), Lora(rank=8, alpha=8.0, targets=("layers.*",))).state()


def read_configs(folder: Path, chance: Chance) -> None:
    """The configuration by the command line, back and forth, and its targets against a network's names."""
    path = folder / "config.json"
    args = make_parser().parse_args(["train", "data", "--output", "run", "--config", str(path)])
    config = config_from_args(args, demo_config())
    again = TrainConfig.from_json(config.to_json())
    if again != config or changes_that_forbid_resuming(config, again):
        raise Broken("a configuration is not what it was after a round trip through JSON")
    own = ", ".join(getattr(config.adapter, "targets", ()))
    targets = parse_targets(chance.choice((own, own, own, chance.choice(NONSENSE))))
    match_targets(("enter", "leave", *(part.name for site in _toy().sites() for part in site.parts)), targets)


def read_runs(folder: Path, _: Chance) -> None:
    """A run's log, its cache entry and its newest checkpoint."""
    read_log(folder / "train.jsonl")
    ConditionCache(folder / "cache").load(CACHE_KEY)
    load_checkpoint(folder / "checkpoints")


KINDS: tuple[Kind, ...] = (
    Kind(
        "captions",
        6_000,
        make_caption,
        [on_file(as_text, ".txt"), on_file(as_text, ".txt"), on_file(mutate_bytes, ".txt")],
        read_captions,
        (CaptionError,),
    ),
    Kind(
        "images",
        9_000,
        make_image_file,
        [on_file(mutate_bytes, ""), on_file(mutate_png, ".png"), on_file(mutate_png, ".png")],
        read_images,
        (ImageError,),
    ),
    Kind(
        "datasets",
        9_000,
        make_folder,
        [*TREE_MUTATIONS, on_file(as_text, ".txt")],
        read_folders,
        (DatasetError,),
    ),
    Kind(
        "rows",
        9_000,
        make_rows,
        [*[on_file(as_rows, ".jsonl")] * 6, on_file(mutate_bytes, ".jsonl"), *TREE_MUTATIONS[:2], TREE_MUTATIONS[6]],
        read_row_file,
        (DatasetError,),
    ),
    Kind(
        "LoRA files",
        7_000,
        make_lora,
        [
            *[on_file(mutate_safetensors, ".safetensors")] * 3,
            on_file(mutate_bytes, ".safetensors"),
            on_file(as_json, ".json"),
        ],
        read_loras,
        (ValueError, FileNotFoundError),
    ),
    Kind(
        "configs",
        4_000,
        make_config_file,
        [*[on_file(as_json, ".json")] * 4, on_file(as_text, ".json"), on_file(mutate_bytes, ".json")],
        read_configs,
        (ConfigError, ValueError, OSError),
    ),
    Kind(
        "saved runs",
        2_000,
        make_run,
        [
            on_file(mutate_bytes, ".safetensors", ".json", ".jsonl"),
            on_file(mutate_safetensors, ".safetensors"),
            on_file(as_json, ".json"),
            on_file(as_rows, ".jsonl"),
            *TREE_MUTATIONS[2:6],
        ],
        read_runs,
        (StateError,),
    ),
)
"""46,000 of 50,000 inputs; the rest are those of `reliability_inputs_comfyui`."""
