"""Finds the files of a model: in a folder of diffusers' layout, in the Hugging Face hub, in ComfyUI's single files.

Everything is checked by names before anything is loaded: a wrong id, a folder of which a part is missing or a file of
another model is one sentence. Imports neither torch nor diffusers.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from ..model_options import ModelOptions

T = TypeVar("T")

INDEX = "model_index.json"
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_WEIGHTS = ("transformer", "text_encoder", "vae")
_TOKENIZER_FILES = ("tokenizer.json", "vocab.json")


@dataclass(frozen=True)
class KnownModel:
    """A family as its files name it.

    Attributes:
        family: its name in `families`.
        pipeline: class in model_index.json.
        hub_id: its own repository.
        mark: end of the name of a tensor that only its single file has.
        tokenizer: folder of the tokenizer.
    """

    family: str
    pipeline: str
    hub_id: str
    mark: str
    tokenizer: str = "tokenizer"


KNOWN_MODELS: Sequence[KnownModel] = (
    KnownModel("z_image", "ZImagePipeline", "Tongyi-MAI/Z-Image-Turbo", "cap_embedder.1.weight"),
    KnownModel(
        "flux2_klein", "Flux2KleinPipeline", "black-forest-labs/FLUX.2-klein-4B", "single_stream_modulation.lin.weight"
    ),
    KnownModel("krea2", "Krea2Pipeline", "krea/Krea-2-Turbo", "txtfusion.projector.weight"),
    KnownModel(
        "qwen_image21", "QwenImage21Pipeline", "Qwen/Qwen-Image-2.1-Turbo", "txt_in.text_norm.weight", "processor"
    ),
)


@dataclass(frozen=True)
class ModelFiles:
    """The local files of a model, complete.

    Attributes:
        known: its family.
        base: folder in diffusers' layout.
        transformer: single file that replaces the folder's; None if there is none.
        text_encoder: the same for the text encoder.
        vae: the same for the VAE.
    """

    known: KnownModel
    base: Path
    transformer: Path | None = None
    text_encoder: Path | None = None
    vae: Path | None = None

    def weights(self, part: str) -> tuple[Path, ...]:
        """The files with the weights of "transformer", "text_encoder" or "vae"."""
        file: Path | None = getattr(self, part)
        return (file,) if file is not None else weight_files(self.base / part)

    @property
    def is_undistilled(self) -> bool:
        """Whether the folder's index says that its transformer was not distilled; single files say nothing."""
        return self.transformer is None and read_json(self.base / INDEX).get("is_distilled") is False


def find_family(options: ModelOptions) -> KnownModel:
    """The family of a model, from its index or the names of its tensors; of an id, only the index is downloaded.

    Raises:
        ValueError: it is no model of a supported family.
        OSError: it cannot be read or downloaded.
    """
    path = Path(options.model)
    if path.is_file():
        return _family_of_file(path)
    return _family_of_index(_index_of(options.model), options.model)


def find_files(options: ModelOptions, known: KnownModel) -> ModelFiles:
    """The files of the model; downloads those that are missing, if it has an id.

    Raises:
        ValueError: files do not exist or are of another family.
        OSError: files are missing or cannot be downloaded.
    """
    path = Path(options.model)
    for name in ("text_encoder", "vae"):
        file: Path | None = getattr(options, name)
        if file is not None and not file.is_file():
            raise FileNotFoundError(f"{file} does not exist; --{name.replace('_', '-')} needs a file")
    transformer = path if path.is_file() else None
    base = (options.base or known.hub_id) if transformer else options.model
    given = {"transformer": transformer, "text_encoder": options.text_encoder, "vae": options.vae}
    parts = [part for part in _WEIGHTS if given[part] is None]
    folder = _local_folder(base, parts, known)
    found = _family_of_index(read_json(folder / INDEX), base)
    if found != known:
        raise ValueError(f"{base} is a {found.pipeline}, and {options.model} needs a {known.pipeline}: choose --base")
    _require_complete(folder, parts, known)
    return ModelFiles(known, folder, transformer, options.text_encoder, options.vae)


def weight_files(folder: Path) -> tuple[Path, ...]:
    """The safetensors files of a part, in order: one, or all that its index names.

    Raises:
        FileNotFoundError: there are none, or one that the index names is missing.
    """
    indices = sorted(folder.glob("*.safetensors.index.json"))
    if indices:
        places = read_json(indices[0]).get("weight_map", {})
        names = sorted({str(name) for name in places.values()})
        missing = [name for name in names if not (folder / name).is_file()]
        if missing or not names:
            raise FileNotFoundError(
                f"{folder} is incomplete: {indices[0].name} names {(missing or ['no file'])[0]}, which is missing; "
                "download the model again"
            )
        return tuple(folder / name for name in names)
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise FileNotFoundError(f"{folder} has no safetensors files; download the model again")
    return (next((file for file in files if "fp16" not in file.name), files[0]),)


def fetch(what: str, download: Callable[[Any], T]) -> T:
    """Calls `download` with the module huggingface_hub; its errors become one sentence about `what`.

    Raises:
        OSError: it does not exist, may not be read, or there is no network.
    """
    import huggingface_hub
    from huggingface_hub import errors

    try:
        return download(huggingface_hub)
    except errors.GatedRepoError as error:
        raise OSError(
            f"{what} needs your consent: accept its licence on huggingface.co, and run `hf auth login`"
        ) from error
    except (errors.RepositoryNotFoundError, errors.RevisionNotFoundError, errors.HFValidationError) as error:
        raise OSError(f"{what} is not on the Hugging Face hub, nor a file or folder here: check its name") from error
    except errors.LocalEntryNotFoundError as error:
        raise OSError(f"{what} cannot be downloaded: no connection to huggingface.co; give a local folder") from error
    except errors.EntryNotFoundError as error:
        raise OSError(f"{what} is not a repository in diffusers' layout ({str(error).splitlines()[0]})") from error
    except Exception as error:  # whatever the HTTP library in use raises without a network
        raise OSError(f"{what} cannot be downloaded ({type(error).__name__}): give a local folder") from error


def is_hub_id(name: str) -> bool:
    """Whether it has the form of a Hugging Face id: owner/name."""
    return _HUB_ID.fullmatch(name) is not None and not Path(name).exists()


def tensor_names(file: Path) -> list[str]:
    """The names of the tensors in a safetensors file.

    Raises:
        ValueError: it is no safetensors file.
    """
    try:
        with file.open("rb") as opened:
            length = int.from_bytes(opened.read(8), "little")
            if not 0 < length < 10**9:
                raise ValueError("no header")
            return [name for name in json.loads(opened.read(length)) if name != "__metadata__"]
    except (ValueError, AttributeError) as error:
        raise ValueError(f"{file} cannot be read as a safetensors file: download it again") from error


def _family_of_file(file: Path) -> KnownModel:
    if file.suffix.lower() == ".gguf":
        raise ValueError(f"{file} is a GGUF file, which only the nodes in ComfyUI read: use a safetensors file")
    names = tensor_names(file)
    for known in KNOWN_MODELS:
        if any(name.endswith(known.mark) for name in names):
            return known
    raise ValueError(
        f"{file} is not the transformer of a supported model in ComfyUI's layout: {_supported()}; of one in diffusers' "
        "layout give the whole folder"
    )


def _family_of_index(index: Mapping[str, Any], name: str) -> KnownModel:
    found = index.get("_class_name")
    for known in KNOWN_MODELS:
        if found == known.pipeline:
            return known
    raise ValueError(f"{name} is a {found or 'model without a pipeline'}; supported are {_supported()}")


def _supported() -> str:
    *others, last = (f"{known.pipeline} ({known.hub_id})" for known in KNOWN_MODELS)
    return f"{', '.join(others)} and {last}"


def _index_of(name: str) -> Mapping[str, Any]:
    folder = Path(name)
    if folder.is_dir():
        if not (folder / INDEX).is_file():
            raise FileNotFoundError(f"{folder} has no {INDEX}: it is not a model folder in diffusers' layout")
        return read_json(folder / INDEX)
    if not is_hub_id(name):
        raise FileNotFoundError(f"{name} does not exist; --model takes demo, a Hugging Face id, a folder or a file")
    return read_json(Path(fetch(name, lambda hub: hub.hf_hub_download(name, INDEX))))


def _local_folder(base: str, parts: Sequence[str], known: KnownModel) -> Path:
    if Path(base).is_dir() or not is_hub_id(base):
        _index_of(base)  # reports a folder that is none
        return Path(base)
    wanted = [INDEX, f"{known.tokenizer}/*", *(f"{part}/*.json" for part in _WEIGHTS)]
    wanted += [f"{part}/*.safetensors" for part in parts]
    return Path(fetch(base, lambda hub: hub.snapshot_download(base, allow_patterns=wanted)))


def _require_complete(folder: Path, parts: Sequence[str], known: KnownModel) -> None:
    for part in _WEIGHTS:
        if not (folder / part / "config.json").is_file():
            raise FileNotFoundError(f"{folder} is incomplete: {part}/config.json is missing; download the model again")
    for part in parts:
        weight_files(folder / part)
    if not any((folder / known.tokenizer / name).is_file() for name in _TOKENIZER_FILES):
        raise FileNotFoundError(
            f"{folder} is incomplete: {known.tokenizer}/{_TOKENIZER_FILES[0]} is missing; download the model again"
        )


def read_json(file: Path) -> dict[str, Any]:
    """The JSON object in a file of a model.

    Raises:
        ValueError: it is none.
    """
    try:
        found = json.loads(file.read_bytes())
    except ValueError as error:
        raise ValueError(f"{file} is not JSON: download the model again") from error
    if not isinstance(found, dict):
        raise ValueError(f"{file} is not a JSON object: download the model again")
    return found
