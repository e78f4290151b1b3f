"""Which LoRA files a run wrote itself: what someone has put in the place of one is neither used nor overwritten."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open

from ..config import TrainConfig, changes_that_forbid_resuming
from ..files.disk import writing
from ..sharing.tensor_hash import HASH, tensor_hash

log = logging.getLogger("dopsd")

_OF_THE_RUN = ("dopsd_family", "dopsd_objective", "dopsd_initial", "dopsd_base_fingerprint")


def is_foreign(path: Path, facts: Mapping[str, str], step: int | None = None) -> bool:
    """Whether a LoRA file is whole, and of another run, of another step, or changed since it was written.

    A damaged file is not foreign: it may be the run's own.

    Args:
        facts: the run's entries in the header of its LoRA files.
        step: the step that the file must be of; None for any.
    """
    header = _header(path)
    if header is None:
        return False
    if header.get("dopsd_dataset") != facts.get("dopsd_dataset"):
        return True
    if any(header[key] != facts.get(key, "") for key in _OF_THE_RUN if key in header):
        return True
    return _is_other_config(header, facts) or is_changed(path, step)


def is_changed(path: Path, step: int | None = None) -> bool:
    """Whether a whole LoRA file is of another step, or its tensors are not those that were written with its header."""
    header = _header(path)
    if header is None:
        return False
    if step is not None and header.get("dopsd_step") != str(step):
        return True
    return HASH in header and header[HASH] != tensor_hash(path.read_bytes())[HASH]


def keep_foreign(path: Path, facts: Mapping[str, str]) -> Path | None:
    """Renames a file that the run with these `facts` did not write, before the run writes its own there; warns.

    Returns its new path; None if the file is the run's own, or there is none.

    Raises:
        DiskError: it cannot be renamed.
    """
    if not path.exists() or not is_foreign(path, facts):
        return None
    kept, number = path.with_stem(f"{path.stem}-of-another-run"), 1
    while kept.exists():
        number += 1
        kept = path.with_stem(f"{path.stem}-of-another-run-{number}")
    with writing(kept):
        os.rename(path, kept)
    log.warning("%s was not written by this run: it is now %s, and the run's own is written again", path, kept.name)
    return kept


def _header(path: Path) -> dict[str, str] | None:
    """None if the file is damaged."""
    try:
        with safe_open(path, "pt") as file:
            return file.metadata() or {}
    except (OSError, SafetensorError):
        return None


def _is_other_config(header: Mapping[str, str], facts: Mapping[str, str]) -> bool:
    if header.get("dopsd_config") == facts.get("dopsd_config"):
        return False
    try:
        configs = (TrainConfig.from_json(of.get("dopsd_config", "")) for of in (header, facts))
        return bool(changes_that_forbid_resuming(*configs))
    except ValueError:
        return True
