"""The files that a node may read and write.

Graphs come over the network. So a node only reads datasets below ComfyUI's input folder and the folders that the owner
of this ComfyUI allows, and only writes below its output, temp and user folders, however a path is spelled.

The owner allows folders in extra_model_paths.yaml:

    anything:
        dopsd_datasets: /data/images
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath, PureWindowsPath

import folder_paths

from ...dopsd_core.data.folder import ROW_SUFFIXES, edit_folders
from ...dopsd_core.data.images import SUFFIXES
from ...dopsd_core.data.jsonl import read_jsonl
from ...dopsd_core.data.masks import masks_beside
from ...dopsd_core.data.problems import Problems
from ...dopsd_core.demo.concept import make_concept, write_dataset
from ...dopsd_core.files.disk import writing
from ...dopsd_core.text import hashable, printable

DEMO = "demo badge (built in)"
"""The choice that needs no files: four images of a concept that the demo model does not know."""

EXTRA = "dopsd_datasets"
"""Key of the owner's folders in extra_model_paths.yaml."""

_RESERVED = re.compile(r"(?i)(con|prn|aux|nul|com[0-9¹²³]|lpt[0-9¹²³])(\..*)?")
_FORBIDDEN = re.compile(r'[<>:"|?*\\/\x00-\x1f\x7f\ud800-\udfff]')
_LONGEST_NAME = 100
_WRITTEN = ".written.json"
"""File with the sizes of the files of a stored dataset; hidden, so that it is not read as one of them."""

DIGEST_DIGITS = 8
"""Hex digits of a run's digest in the name of its folder."""

folder_paths.folder_names_and_paths.setdefault(EXTRA, ([], set()))


# -- datasets ---------------------------------------------------------------------------------------------------------


def dataset_choices() -> list[str]:
    """The choices of Load Dataset: folders with images somewhere below, .jsonl files, and the demo.

    Names are relative to the input folder; below an allowed folder they start with that folder's own name.
    """
    found = [DEMO]
    for name, root in _roots():
        inside = [PurePosixPath(name, path).as_posix() for path in _data_below(root)]
        found += [choice for choice in inside if choice != "."]
    return list(dict.fromkeys(found))


def resolve_dataset(choice: str) -> Path:
    """The folder or .jsonl file of a choice, with all links resolved; the demo's images are drawn on use.

    Raises:
        ValueError: it does not exist, or is outside of the folders that may be read.
    """
    if choice == DEMO:
        concept = make_concept(0)
        return store_dataset("dopsd-demo-badge", lambda folder: write_dataset(concept, folder))
    return locate_dataset(choice)


def locate_dataset(choice: str) -> Path:
    """Like `resolve_dataset`, for any choice but the demo; writes nothing."""
    if not isinstance(choice, str):  # a damaged graph, which ComfyUI passes on unchanged
        raise ValueError(f"the folder must be text, it is {type(choice).__name__}; {_how_to_allow()}")
    if not choice.strip() or "\0" in choice:
        raise ValueError(f"choose a dataset folder; {_how_to_allow()}")
    for candidate in _candidates(choice):
        try:
            real = candidate.resolve(strict=True)
        except (OSError, RuntimeError, ValueError):
            continue
        if not any(real.is_relative_to(root.resolve()) for _, root in _roots()):
            raise _outside(choice)
        return real
    raise ValueError(f"there is no dataset {choice!r}; {_how_to_allow()}")


def allowed_root(path: Path) -> Path | None:
    """The allowed folder that contains `path`: images named by a .jsonl file may be anywhere in it. None for a folder
    written by `store_dataset`."""
    return next((real for _, root in _roots() if path.is_relative_to(real := root.resolve())), None)


def dataset_fingerprint(choice: str) -> str:
    """Changes when a file of the dataset is added, removed or written, also one elsewhere that a .jsonl file names."""
    if choice == DEMO:
        return DEMO
    source = locate_dataset(choice)
    digest = hashlib.sha256(hashable(str(source)))
    for file in _files_of(source):
        try:
            facts = stamp_of(file)
        except (OSError, ValueError):  # missing, or a broken link
            digest.update(hashable(f"{file}|-\n"))
        else:
            digest.update(hashable(f"{file}|{facts}\n"))
    return digest.hexdigest()


def _files_of(source: Path) -> Iterator[str]:
    """All files below a dataset's folder, and those elsewhere in the allowed folder that a .jsonl file names."""
    folder = source if source.is_dir() else source.parent
    for parent, folders, names in os.walk(folder):
        folders.sort()
        yield from (os.path.join(parent, name) for name in sorted(names))
    is_rows = source.suffix.lower() in ROW_SUFFIXES and source.is_file()  # no pipe, and no large file of another kind
    if is_rows and (root := allowed_root(source)):
        entries = read_jsonl(source, Problems())
        named = {os.path.normpath(path) for entry in entries for path in (entry.image, *entry.source_images)}
        images = sorted(
            path for path in named if Path(path).is_relative_to(root) and not Path(path).is_relative_to(folder)
        )
        yield from images
        yield from (str(mask) for image in images for mask in masks_beside(Path(image)))


def stamp_of(path: Path | str) -> tuple[str, int, int, int]:
    """(name, size, modification time, change time) of a file; different after it was replaced.

    Raises:
        OSError: it does not exist.
    """
    facts = os.stat(path)
    return str(path), facts.st_size, facts.st_mtime_ns, facts.st_ctime_ns


def never_the_same() -> float:
    """For `fingerprint_inputs`: equals no other value, so that ComfyUI runs the node again.

    ComfyUI does not say which file is meant if its name comes over a link, so whether it has changed is not known.
    """
    return float("nan")


def store_dataset(name: str, write: Callable[[Path], None]) -> Path:
    """The folder `name` in ComfyUI's temp folder, written atomically by `write` if it is not there as it was written.

    Systems remove files from temporary folders, which would silently leave fewer images.

    Raises:
        DiskError: it cannot be written.
    """
    folder = Path(folder_paths.get_temp_directory()) / name
    if not _is_whole(folder):
        draft = folder.with_name(f".{name}.{secrets.token_hex(4)}")
        try:
            with writing(folder):
                draft.mkdir(parents=True)
                write(draft)
                (draft / _WRITTEN).write_text(json.dumps(_sizes(draft)), encoding="utf-8")
                shutil.rmtree(folder, ignore_errors=True)
                draft.rename(folder)
        except BaseException:
            shutil.rmtree(draft, ignore_errors=True)
            raise
    return folder.resolve()


def _is_whole(folder: Path) -> bool:
    try:
        return json.loads((folder / _WRITTEN).read_bytes()) == _sizes(folder)
    except (OSError, ValueError):
        return False


def _sizes(folder: Path) -> dict[str, int]:
    """The size in bytes of each file by its path in the folder."""
    files = [file for file in sorted(folder.rglob("*")) if file.is_file() and file.name != _WRITTEN]
    return {file.relative_to(folder).as_posix(): file.stat().st_size for file in files}


def _roots() -> list[tuple[str, Path]]:
    """(start of its choices' names, folder) of every folder that may contain datasets."""
    extra = [Path(os.path.abspath(folder)) for folder in folder_paths.folder_names_and_paths[EXTRA][0]]
    return [("", Path(os.path.abspath(folder_paths.get_input_directory()))), *((root.name, root) for root in extra)]


def _data_below(root: Path) -> list[PurePosixPath]:
    """Folders with images, their parents, and .jsonl files, relative to the root; without hidden ones, and without the
    two halves of a folder of edits."""
    found: set[PurePosixPath] = set()
    for parent, folders, names in os.walk(root):
        folders[:] = [name for name in folders if not name.startswith(".")]
        here = PurePosixPath(Path(parent).relative_to(root).as_posix())
        endings = {os.path.splitext(name)[1].lower() for name in names}
        halves = edit_folders(Path(parent)) if here.name else None  # the root is not a dataset
        if halves:
            folders[:] = [name for name in folders if name not in {half.name for half in halves}]
        if halves or not endings.isdisjoint(SUFFIXES):
            found.update((here, *here.parents))
        found.update(here / name for name in names if name.lower().endswith(ROW_SUFFIXES) and not name.startswith("."))
    return sorted(found)


def _candidates(choice: str) -> Iterator[Path]:
    """Possible places of a choice, from its spelling alone: nothing outside the allowed folders is accessed.

    Raises:
        ValueError: it leads outside.
    """
    if os.path.isabs(choice):
        path = Path(os.path.normpath(choice))
        if not any(path.is_relative_to(root) or path.is_relative_to(root.resolve()) for _, root in _roots()):
            raise _outside(choice)
        yield path
        return
    windows = PureWindowsPath(choice)  # handles both kinds of slashes, and drives
    if windows.anchor or ".." in windows.parts or any(":" in part for part in windows.parts):
        raise _outside(choice)
    for name, root in _roots():
        if not name:
            yield root.joinpath(*windows.parts)
        elif windows.parts[:1] == (name,):
            yield root.joinpath(*windows.parts[1:])


def _outside(choice: str) -> ValueError:
    return ValueError(f"the dataset {choice!r} is outside of the folders that D-OPSD may read; {_how_to_allow()}")


def _how_to_allow() -> str:
    return printable(
        f"put it into its own folder in {folder_paths.get_input_directory()}, or ask the owner of this ComfyUI to "
        f"allow its folder under {EXTRA} in extra_model_paths.yaml"
    )


# -- results -----------------------------------------------------------------------------------------------------------


def run_folder(name: str) -> Path:
    """output/dopsd/<name>.

    Raises:
        ValueError: the name is empty, or not a valid folder name on every system.
    """
    if not isinstance(name, str):  # a damaged graph, which ComfyUI passes on unchanged
        raise ValueError(f"the run name must be text, it is {type(name).__name__}")
    return Path(folder_paths.get_output_directory()).resolve() / "dopsd" / _checked(name.strip(), "run name")


def require_run_name(name: str) -> None:
    """Checks the start of a run folder's name, to which the run's digest is added; writes nothing.

    Raises:
        ValueError: it is empty, too long, or not a valid folder name on every system.
    """
    run_folder(name)
    _checked(name.strip(), "run name", _LONGEST_NAME - len("-") - DIGEST_DIGITS)


def shown(path: Path) -> str:
    """A path as shown to users: output/... inside ComfyUI's output folder."""
    output = Path(folder_paths.get_output_directory())
    for root in (output, output.resolve()):
        if path.is_relative_to(root):
            return f"output/{path.relative_to(root).as_posix()}"
    return str(path)


def lora_file_path(prefix: str) -> Path:
    """output/<prefix>_00001_.safetensors with the next free number; creates its folder. %year% and the like are filled
    in as in ComfyUI's own save nodes.

    Raises:
        ValueError: the prefix is empty, absolute, leads outside or is not a valid name on every system.
        DiskError: its folder cannot be created.
    """
    parts = require_lora_name(prefix)
    output = folder_paths.get_output_directory()
    with writing(Path(output, *parts)):
        folder, name, counter, _, _ = folder_paths.get_save_image_path("/".join(parts), output)
    return Path(folder) / f"{name}_{counter:05}_.safetensors"


def saving_lock() -> Path:
    """The file that is locked while a LoRA is saved into ComfyUI's output folder; creates its folder.

    Raises:
        DiskError: it cannot be created.
    """
    folder = Path(folder_paths.get_output_directory()) / "dopsd"
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / ".saving").touch()
    return folder / ".saving"


def require_lora_name(prefix: str) -> list[str]:
    """The parts of a `filename_prefix` for `lora_file_path`; writes nothing.

    Raises:
        ValueError: it is empty, absolute, leads outside or is not a valid name on every system.
    """
    parts = prefix.strip().replace("\\", "/").split("/")
    return [_checked(part, "filename_prefix") for part in parts]


def condition_cache() -> Path:
    """The folder where encoded pairs are cached."""
    return Path(folder_paths.get_user_directory()) / "dopsd" / "conditions"


def known_weights() -> Path:
    """The file where digests of large weight files are cached."""
    return Path(folder_paths.get_user_directory()) / "dopsd" / "weights.json"


def _checked(name: str, what: str, longest: int = _LONGEST_NAME) -> str:
    """The name, if it is a valid file or folder name, on Windows too."""
    if not name:
        raise ValueError(f"the {what} is empty or has an empty part; write a name such as my_concept")
    bad = _FORBIDDEN.search(name)
    if bad:
        raise ValueError(f"the {what} {name!r} may not contain {bad.group()!r}; use letters, digits, - and _")
    if set(name) == {"."} or name.endswith((".", " ")) or name.startswith((".", " ")):
        raise ValueError(f"the {what} {name!r} may not start or end with a dot or a space")
    if _RESERVED.fullmatch(name):
        raise ValueError(f"the {what} may not be {name!r}: Windows reserves that name")
    if len(name.encode(errors="replace")) > longest:
        raise ValueError(f"the {what} is longer than {longest} bytes; shorten {name[:20]!r}...")
    return name
