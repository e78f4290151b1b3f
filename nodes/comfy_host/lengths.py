"""Reports captions that are too long for the text encoder before training, since the end of one is not used.

Counted from the texts alone, so that cached conditions are reported like new ones.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from ...dopsd_core.conditioning.teachers import TeacherView
from ...dopsd_core.data.dataset import Pair
from ...dopsd_core.training.shown_images import TeacherImage, shown_to_teacher
from .encoder import ComfyEncoder
from .families import in_comfyui
from .vision import MAX_TOKENS

MOST_NOTES = 20
_TEMPLATE = 64
"""More tokens than a template has without text and image. A text has at most one token per byte."""


def length_notes(
    encoder: ComfyEncoder,
    teacher: TeacherView,
    pairs: Sequence[Pair],
    teacher_image: TeacherImage,
    previews: Sequence[str],
    root: Path,
) -> tuple[str, ...]:
    """A line for each caption and each preview prompt that is too long for the teacher or the model.

    Args:
        root: the dataset's folder or JSONL file; file names are relative to it.
    """
    texts: list[tuple[str, str, Sequence[Pair]]] = []
    for index, pair in enumerate(pairs):
        shown = shown_to_teacher(pairs, index, teacher_image)
        texts += [(_place(pair, text, root), text, shown) for text in dict.fromkeys(pair.captions)]
    for number, text in enumerate(previews):
        shown = shown_to_teacher(pairs, number % len(pairs), teacher_image)[:1]
        texts.append((f"preview prompt {number + 1}", text, shown))
    notes = [note for text in texts for note in _notes(encoder, teacher, *text)]
    more = len(notes) - MOST_NOTES
    return tuple(notes if more <= 0 else [*notes[:MOST_NOTES], f"{more} more texts are too long"])


def _notes(encoder: ComfyEncoder, teacher: TeacherView, place: str, text: str, shown: Sequence[Pair]) -> Iterator[str]:
    seen_text = teacher.text(text)
    longest = len(seen_text.encode("utf-8", "surrogatepass")) + _TEMPLATE
    if teacher.sees == "features":
        seen = max(encoder.count_image(pair.bucket.width, pair.bucket.height) for pair in shown)
        over = encoder.count_text(text, seen) - MAX_TOKENS if longest + seen > MAX_TOKENS else 0
        if over > 0:
            yield (
                f"{place}: {over:,} tokens more than the teacher reads ({MAX_TOKENS:,}, of which its image takes "
                f"{seen}): the end is cut off for the teacher; shorten it"
            )
    limit = in_comfyui(encoder.family).text_tokens
    length = encoder.count_text(seen_text) if longest > limit else 0
    if length > limit:
        yield (
            f"{place}: {length:,} tokens, and {encoder.family.title} was made for prompts of up to {limit}; the "
            "rest may have no effect, and programs other than ComfyUI cut it off"
        )


def _place(pair: Pair, text: str, root: Path) -> str:
    folder = root if root.is_dir() else root.parent
    file = pair.caption_file.relative_to(folder) if pair.caption_file.is_relative_to(folder) else pair.caption_file
    where = f"{file.as_posix()}{'' if pair.caption_line is None else f':{pair.caption_line}'}"
    several = len(set(pair.captions)) > 1
    return f"{where}, caption {pair.captions.index(text) + 1}" if several else where
