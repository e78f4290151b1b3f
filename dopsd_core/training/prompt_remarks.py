"""Warnings about prompts that work against a training, or that show nothing of it."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from ..conditioning.teachers import TeacherView
from ..data.captions import check_prompts, has_trigger


def anchor_remarks(prompts: Sequence[str], names: Collection[str], captions: Collection[str] = ()) -> list[str]:
    """What in the anchor prompts is pulled both ways, to the untouched model and to the concept, one sentence each.

    Args:
        prompts: as they were given; `[V]` is the concept too.
        names: the triggers.
        captions: the training captions; none for edits, whose instructions mean nothing without an image.

    Raises:
        ValueError: a prompt has characters that are not valid.
    """
    found = check_prompts(prompts, "anchor prompt", next(iter(names), ""))
    for number, prompt in enumerate(prompts, 1):
        if has_trigger(prompt) or any(has_trigger(prompt, name) for name in names):
            found.append(
                f"anchor prompt {number}: it names the concept, so training would suppress it: remove the name"
            )
        elif prompt.strip() in captions:
            found.append(
                f"anchor prompt {number}: it is a training caption too, which pulls both ways: change one of them"
            )
    return found


def slider_remarks(anchors: Sequence[str], view: TeacherView, own: Sequence[str] = ()) -> list[str]:
    """That anchors hold a slider's word as it is, a sentence for each kind; none for another teacher.

    Args:
        anchors: the prior anchors that were given, also the captions of regularisation images.
        view: of the teacher.
        own: the dataset's captions without the trigger, which are anchors too.
    """
    kinds = (
        (anchors, "prompt contains", "prompts contain", "remove those that do not describe what has to stay"),
        (
            own,
            "caption without the trigger contains",
            "captions without the trigger contain",
            "write the captions without it and [V], and leave the trigger empty",
        ),
    )
    if not view.replaces:
        return []
    remarks = []
    for texts, one, many, advice in kinds:
        if held := [text for text in texts if view.teaches(text)]:
            remarks.append(
                f"{len(held)} anchor {one if len(held) == 1 else many} {view.replaces[0]!r}, which the slider is to "
                f"change, and training keeps what it draws there (such as for {held[0]!r}): {advice}"
            )
    return remarks


def equal_rows_remarks(prompts: Sequence[str], view: TeacherView) -> list[str]:
    """That teacher and student read the same for some prompts and draw the same, in one sentence."""
    equal = [text for text in prompts if not view.teaches(text)]
    if not equal:
        return []
    words = view.replaces[0] if view.replaces else ""
    which = "the only prompt does" if len(prompts) == 1 else f"{len(equal)} of {len(prompts)} prompts do"
    return [
        f"{which} not contain {words!r}, in whose place the teacher reads other words (such as {equal[0]!r}): teacher "
        "and student draw the same there"
    ]
