"""What an aim expects of the dataset and of what the teacher sees, beyond settings: one sentence for what does not fit.

The aims are the presets subject, style, character and edit; and a slider, which is a teacher's view.
"""

from __future__ import annotations

from collections.abc import Sequence

from ..conditioning.teachers import TeacherView
from ..data.dataset import Pair
from ..objectives import DOPSD, Objective
from .shown_images import TeacherImage


def aim_remarks(
    preset: str, pairs: Sequence[Pair], view: TeacherView, teacher_image: TeacherImage, *, names_others: bool
) -> list[str]:
    """What does not fit the aim, one sentence each; none for a preset without an aim.

    Args:
        preset: its name in `presets.PRESETS`.
        pairs: the dataset.
        view: what the teacher sees.
        teacher_image: whether it sees the image that is trained or others.
        names_others: whether there are prior anchors besides the dataset's own captions, or none are used.
    """
    are_edits = any(pair.source_images for pair in pairs)
    remarks = []
    if preset == "edit" and not are_edits:
        remarks.append(
            "the preset edit is for pairs of source and target, and this dataset has no source images: choose subject, "
            "style or character"
        )
    if preset in ("subject", "style", "character") and are_edits:
        remarks.append(f"the dataset has source images: the preset is {preset}, and edit is the one for edits")
    if preset == "style" and teacher_image == "other":
        remarks.append(
            "the images of a style show different things, and teacher_image other shows the teacher another thing than "
            "the caption describes: set it to own"
        )
    if preset == "character" and not names_others:
        remarks.append(
            "a character is one among others, and no anchor_prompts are given: prompts that describe or name other "
            "people keep them as they are"
        )
    if preset == "style" and view.background != "keep":
        remarks.append(
            f"a style is in the whole image, and teacher_background {view.background} hides a part of it from the "
            "teacher: set it to keep"
        )
    return remarks


def require_taught(view: TeacherView, objective: Objective) -> None:
    """Checks that the objective learns from the teacher, where that is all that there is to learn: for a slider.

    Raises:
        ValueError: it learns from the images, which do not show the slider's other words.
    """
    learns = isinstance(objective, DOPSD) and objective.regression_target == "teacher"
    if view.sees == "nothing" and not learns:
        raise ValueError(
            f"the teacher {view.name} makes a slider, and objective {objective.name} "
            f"{'with regression_target ground_truth ' if isinstance(objective, DOPSD) else ''}trains on the images, "
            "which ignores its words: choose objective dopsd with regression_target teacher, or another teacher"
        )
