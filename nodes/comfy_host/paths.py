"""What a node may read and write.

Graphs come over the network: a node reads data sets below ComfyUI's input folder and the folders that the owner of
this ComfyUI names, and writes below its output, temp and user folders. Nothing else, however it is spelled.

The owner names folders in extra_model_paths.yaml:

    anything:
        dopsd_datasets: /data/pictures
"""

from __future__ import annotations

import hashlib
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
from ...dopsd_core.data.problems import Problems
from ...dopsd_core.demo.concept import make_concept, write_dataset
from ...dopsd_core.files.disk import writing
from ...dopsd_core.text import hashable, printable

DEMO = "demo badge (built in)"
"""The choice that needs no files: four pictures of a concept that the demo model has never seen."""

EXTRA = "dopsd_datasets"
"""Key of the owner's folders in extra_model_paths.yaml."""

_RESERVED = re.compile(r"(?i)(con|prn|aux|nul|com[0-9¹²³]|lpt[0-9¹²³])(\..*)?")
_FORBIDDEN = re.compile(r'[<>:"|?*\\/\x00-\x1f\x7f\ud800-\udfff]')
_LONGEST_NAME = 100

folder_paths.folder_names_and_paths.setdefault(EXTRA, ([], set()))


# -- data sets ---------------------------------------------------------------------------------------------------------


def dataset_choices() -> list[str]:
    """What Load Dataset offers: folders with pictures somewhere below, .jsonl files, and the demo.

    Names are relative to the input folder; below an owner's folder they begin with that folder's own name.
    """
    found = [DEMO]
    for name, root in _roots():
        inside = [PurePosixPath(name, path).as_posix() for path in _data_below(root)]
        found += [choice for choice in inside if choice != "."]
    return list(dict.fromkeys(found))


def resolve_dataset(choice: str) -> Path:
    """The folder or .jsonl file of a choice, all links followed; the demo's pictures are drawn on use.

    Raises:
        ValueError: it is not there, or outside of the folders that may be read.
    """
    if choice == DEMO:
        concept = make_concept(0)
        return store_dataset("dopsd-demo-badge", lambda folder: write_dataset(concept, folder))
    return locate_dataset(choice)


def locate_dataset(choice: str) -> Path:
    """As `resolve_dataset`, for any choice but the demo; touches nothing."""
    if not isinstance(choice, str):  # a damaged graph; ComfyUI hands it on as it is
        raise ValueError(f"the folder must be text, it is {type(choice).__name__}; {_how_to_allow()}")
    if not choice.strip() or "\0" in choice:
        raise ValueError(f"choose a data set folder; {_how_to_allow()}")
    for candidate in _candidates(choice):
        try:
            real = candidate.resolve(strict=True)
        except (OSError, RuntimeError, ValueError):
            continue
        if not any(real.is_relative_to(root.resolve()) for _, root in _roots()):
            raise _outside(choice)
        return real
    raise ValueError(f"there is no data set {choice!r}; {_how_to_allow()}")


def allowed_root(path: Path) -> Path | None:
    """The folder of the owner's or of ComfyUI's that `path` lies in: pictures named by a .jsonl may lie anywhere in
    it. None for what was written by `store_dataset`."""
    return next((real for _, root in _roots() if path.is_relative_to(real := root.resolve())), None)


def dataset_fingerprint(choice: str) -> str:
    """Changes when a file of the data set comes, goes, grows or is written, wherever a .jsonl has it."""
    if choice == DEMO:
        return DEMO
    source = locate_dataset(choice)
    digest = hashlib.sha256(hashable(str(source)))
    for file in _files_of(source):
        try:
            facts = stamp_of(file)
        except (OSError, ValueError):  # not there, or a link to nothing
            digest.update(hashable(f"{file}|-\n"))
        else:
            digest.update(hashable(f"{file}|{facts}\n"))
    return digest.hexdigest()


def _files_of(source: Path) -> Iterator[str]:
    """All files below a data set's folder, and what the rows of a .jsonl name in the rest of the allowed folder."""
    folder = source if source.is_dir() else source.parent
    for parent, folders, names in os.walk(folder):
        folders.sort()
        yield from (os.path.join(parent, name) for name in sorted(names))
    if source != folder and (root := allowed_root(source)):
        entries = read_jsonl(source, Problems())
        named = {os.path.normpath(path) for entry in entries for path in (entry.image, *entry.source_images)}
        yield from sorted(
            path for path in named if Path(path).is_relative_to(root) and not Path(path).is_relative_to(folder)
        )


def stamp_of(path: Path | str) -> tuple[str, int, int, int]:
    """(name, size, times of the last writing and of the last change of any kind): others once the file was exchanged.

    Raises:
        OSError: it is not there.
    """
    facts = os.stat(path)
    return str(path), facts.st_size, facts.st_mtime_ns, facts.st_ctime_ns


def store_dataset(name: str, write: Callable[[Path], None]) -> Path:
    """The folder `name` in ComfyUI's temp folder, filled by `write` if it is not there yet; whole or not there.

    Raises:
        DiskError: it cannot be written.
    """
    folder = Path(folder_paths.get_temp_directory()) / name
    if not folder.is_dir():
        draft = folder.with_name(f".{name}.{secrets.token_hex(4)}")
        try:
            with writing(folder):
                draft.mkdir(parents=True)
                write(draft)
                draft.rename(folder)
        except BaseException:
            shutil.rmtree(draft, ignore_errors=True)
            raise
    return folder.resolve()


def _roots() -> list[tuple[str, Path]]:
    """(name that choices begin with, folder) of every folder that data sets may lie in."""
    extra = [Path(os.path.abspath(folder)) for folder in folder_paths.folder_names_and_paths[EXTRA][0]]
    return [("", Path(os.path.abspath(folder_paths.get_input_directory()))), *((root.name, root) for root in extra)]


def _data_below(root: Path) -> list[PurePosixPath]:
    """Folders that hold pictures, those above them, and .jsonl files, relative to the root; hidden ones left out, and
    the halves of a folder of edits."""
    found: set[PurePosixPath] = set()
    for parent, folders, names in os.walk(root):
        folders[:] = [name for name in folders if not name.startswith(".")]
        here = PurePosixPath(Path(parent).relative_to(root).as_posix())
        endings = {os.path.splitext(name)[1].lower() for name in names}
        halves = edit_folders(Path(parent)) if here.name else None  # the root is no data set
        if halves:
            folders[:] = [name for name in folders if name not in {half.name for half in halves}]
        if halves or not endings.isdisjoint(SUFFIXES):
            found.update((here, *here.parents))
        found.update(here / name for name in names if name.lower().endswith(ROW_SUFFIXES) and not name.startswith("."))
    return sorted(found)


def _candidates(choice: str) -> Iterator[Path]:
    """Where a choice may lie, by its spelling alone: nothing outside is even looked for.

    Raises:
        ValueError: the spelling leads outside.
    """
    if os.path.isabs(choice):
        path = Path(os.path.normpath(choice))
        if not any(path.is_relative_to(root) or path.is_relative_to(root.resolve()) for _, root in _roots()):
            raise _outside(choice)
        yield path
        return
    windows = PureWindowsPath(choice)  # reads both kinds of slashes, and knows drives
    if windows.anchor or ".." in windows.parts or any(":" in part for part in windows.parts):
        raise _outside(choice)
    for name, root in _roots():
        if not name:
            yield root.joinpath(*windows.parts)
        elif windows.parts[:1] == (name,):
            yield root.joinpath(*windows.parts[1:])


def _outside(choice: str) -> ValueError:
    return ValueError(f"the data set {choice!r} lies outside of the folders that D-OPSD may read; {_how_to_allow()}")


def _how_to_allow() -> str:
    return printable(
        f"put it into a folder of its own in {folder_paths.get_input_directory()}, or have the owner of this ComfyUI "
        f"name the folder it is in under {EXTRA} in extra_model_paths.yaml"
    )


# -- results -----------------------------------------------------------------------------------------------------------


def run_folder(name: str) -> Path:
    """output/dopsd/<name>.

    Raises:
        ValueError: the name is empty or no plain name of a folder on every system.
    """
    if not isinstance(name, str):  # a damaged graph; ComfyUI hands it on as it is
        raise ValueError(f"the run name must be text, it is {type(name).__name__}")
    return Path(folder_paths.get_output_directory()).resolve() / "dopsd" / _checked(name.strip(), "run name")


def shown(path: Path) -> str:
    """A path as users see it: output/... for what lies in ComfyUI's output folder."""
    output = Path(folder_paths.get_output_directory())
    for root in (output, output.resolve()):
        if path.is_relative_to(root):
            return f"output/{path.relative_to(root).as_posix()}"
    return str(path)


def lora_file_path(prefix: str) -> Path:
    """output/<prefix>_00001_.safetensors with the next free number, its folder made; %year% and the like are filled in
    as ComfyUI's own savers do.

    Raises:
        ValueError: the prefix is empty, absolute, leads outside or is no name on some system.
    """
    parts = require_lora_name(prefix)
    output = folder_paths.get_output_directory()
    folder, name, counter, _, _ = folder_paths.get_save_image_path("/".join(parts), output)
    return Path(folder) / f"{name}_{counter:05}_.safetensors"


def require_lora_name(prefix: str) -> list[str]:
    """The parts of a `filename_prefix` for `lora_file_path`; touches nothing.

    Raises:
        ValueError: it is empty, absolute, leads outside or is no name on some system.
    """
    parts = prefix.strip().replace("\\", "/").split("/")
    return [_checked(part, "filename_prefix") for part in parts]


def condition_cache() -> Path:
    """Where encoded pairs are kept between sessions."""
    return Path(folder_paths.get_user_directory()) / "dopsd" / "conditions"


def known_weights() -> Path:
    """Where digests of large weight files are kept between sessions."""
    return Path(folder_paths.get_user_directory()) / "dopsd" / "weights.json"


def _checked(name: str, what: str) -> str:
    """A plain name for a file or folder, on Windows too."""
    if not name:
        raise ValueError(f"the {what} is empty or has an empty part; write a name such as my_concept")
    bad = _FORBIDDEN.search(name)
    if bad:
        raise ValueError(f"the {what} may not hold {bad.group()!r}, {name!r} does; use letters, digits, - and _")
    if set(name) == {"."} or name.endswith((".", " ")) or name.startswith((".", " ")):
        raise ValueError(f"the {what} may not begin or end with a dot or a space, {name!r} does")
    if _RESERVED.fullmatch(name):
        raise ValueError(f"the {what} may not be {name!r}: Windows keeps that name for itself")
    if len(name.encode(errors="replace")) > _LONGEST_NAME:
        raise ValueError(f"the {what} is longer than {_LONGEST_NAME} bytes; shorten {name[:20]!r}...")
    return name
