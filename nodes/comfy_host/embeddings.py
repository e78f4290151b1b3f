"""Embeddings (`embedding:name` in a text): those that ComfyUI leaves out, of which it only logs that it does not find
them, and whether their files have changed.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator
from typing import Any

import folder_paths
from torch import Tensor

from ...dopsd_core.text import hashable
from .paths import stamp_of

EMBEDDING = "embedding:"
_NAMED = re.compile(rf"(?:(?<=\s)|^){EMBEDDING}([^\s,<\[]+)")


def embeddings_fingerprint() -> str:
    """For `fingerprint_inputs`: changes when a file in models/embeddings is added, removed or replaced.

    Which of them the texts name is not known beforehand: captions come over a link.
    """
    digest = hashlib.sha256()
    for name in folder_paths.get_filename_list("embeddings"):
        try:
            facts = stamp_of(folder_paths.get_full_path_or_raise("embeddings", name))
        except OSError:  # removed since the list was made
            continue
        digest.update(hashable(f"{facts}\n"))
    return digest.hexdigest()


def embedding_notes(clip: Any, texts: Iterable[tuple[str, str]]) -> tuple[str, ...]:
    """A line for each embedding that is not used.

    Args:
        clip: ComfyUI's CLIP.
        texts: (what it is, the text) of every text that is encoded.
    """
    named: dict[str, str] = {}
    for place, text in texts:
        for name in _NAMED.findall(text):
            named.setdefault(name, place)
    return tuple(note for name, place in named.items() for note in _notes(clip, name, place))


def _notes(clip: Any, name: str, place: str) -> Iterator[str]:
    found = [token for token in _tokens(clip, f"{EMBEDDING}{name}") if isinstance(token, Tensor)]
    wanted = _width(clip)
    if not found:
        yield f"warning: {place}: the embedding {name} is not used: there is no such file in models/embeddings"
    elif wanted is not None and found[0].shape[-1] != wanted:
        yield (
            f"warning: {place}: the embedding {name} is not used: it has the width {found[0].shape[-1]}, this CLIP "
            f"{wanted}: use one that was made for it"
        )


def _tokens(clip: Any, text: str) -> list[Any]:
    return [token[0] for rows in clip.tokenize(text).values() for row in rows for token in row]


def _width(clip: Any) -> int | None:
    """The width of a token in the CLIP's text encoder; None if it is not known."""
    model = clip.cond_stage_model
    try:
        return int(getattr(model, model.clip).transformer.get_input_embeddings().weight.shape[-1])
    except AttributeError:
        return None
