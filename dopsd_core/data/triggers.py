"""Several concepts in one dataset: the trigger word of each folder.

photos/dog/trigger.txt      contains the word, such as ohwx
photos/dog/a.png            its captions write [V], or the word
photos/cat/trigger.txt      sks

The nearest trigger.txt counts, of the image's folder or one above it in the dataset. A caption of an image trigger.png
is no such file. In a JSONL file, each row may have the key "trigger".
"""

from __future__ import annotations

import unicodedata
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from .captions import PLACEHOLDER, CaptionError, check_text, decode_utf8, has_trigger, is_blank, remove_trigger
from .problems import Problems

TRIGGER_NAME = "trigger.txt"
TRIGGER_KEY = "trigger"

_LONGEST = 100
"""Characters of a trigger; a text that is longer is probably a caption."""


def checked_trigger(text: str) -> str:
    """The trigger in a file or row, without surrounding spaces, its accents composed (NFC).

    Raises:
        CaptionError: it is empty, has several lines, is too long, or has characters that are not valid.
    """
    word = unicodedata.normalize("NFC", text.strip())
    check_text(text)
    if is_blank(text):
        raise CaptionError("the trigger is empty: write a word such as ohwx")
    if has_trigger(word):
        raise CaptionError(f"the trigger contains {PLACEHOLDER}, which stands for it: write a word such as ohwx")
    if len(word.splitlines()) > 1 or len(word) > _LONGEST:
        raise CaptionError("the trigger is more than a few words: write one word such as ohwx")
    return word


def given_trigger(trigger: str) -> str:
    """The trigger that a user typed, without surrounding spaces, its accents composed (NFC); "" for none.

    Raises:
        ValueError: it contains invalid characters, or none that can be seen.
    """
    try:
        check_text(trigger)
    except CaptionError as error:
        raise ValueError(f"the trigger {trigger!r} cannot be used: {error}") from error
    if is_blank(trigger) and trigger.strip():
        raise ValueError(f"the trigger {ascii(trigger)} has no visible character: write a word such as ohwx")
    if has_trigger(trigger) and trigger.strip() != PLACEHOLDER:
        raise ValueError(
            f"the trigger {trigger!r} contains {PLACEHOLDER}, which stands for it: write a word such as ohwx"
        )
    return unicodedata.normalize("NFC", trigger.strip())


@dataclass
class NamedTriggers:
    """Reads the triggers of a dataset's folders, each once.

    Attributes:
        root: the folder of the dataset.
        files: the files named trigger.txt, in upper or lower case, that are no captions.
        problems: collects the problems.
        known: triggers read so far, by file.
    """

    root: Path
    files: Collection[Path]
    problems: Problems
    known: dict[Path, str] = field(default_factory=dict)

    def of(self, image: Path) -> str:
        """The trigger of the nearest folder that has one, from the image's up to the root; else ""."""
        for folder in image.parents:
            file = next((file for file in self.files if file.parent == folder), None)
            if file is not None:
                if file not in self.known:
                    self.known[file] = self._read(file)
                return self.known[file]
            if folder == self.root:
                break
        return ""

    def _read(self, file: Path) -> str:
        try:
            if not file.resolve().is_relative_to(self.root.resolve()):
                raise CaptionError(f"is outside of the folder {self.root}")
            return checked_trigger(decode_utf8(file.read_bytes()))
        except CaptionError as error:
            self.problems.error(file, error.line, str(error))
        except OSError as error:
            self.problems.error(file, None, f"cannot be read: {error.strerror}")
        return ""


def concepts_of(triggers: Iterable[str]) -> tuple[str, ...]:
    """The different triggers, in order, without "" ; case does not count."""
    found: dict[str, str] = {}
    for trigger in triggers:
        if trigger:
            found.setdefault(trigger.casefold(), trigger)
    return tuple(found.values())


def warn_of_unused(given: str, triggers: Collection[str], source: Path, problems: Problems) -> None:
    """Warns of a trigger that no image has, because all have their own. triggers: of all images."""
    own = concepts_of(triggers)
    if given and triggers and given.casefold() not in map(str.casefold, own):
        problems.warning(
            source, None, f"the trigger {given!r} is not used: all images have their own ({', '.join(own)})"
        )


def require_own_triggers(named: Iterable[tuple[str, Path, int | None, Sequence[str]]], problems: Problems) -> None:
    """Adds an error, once per folder or list, where `[V]` stands for nothing although it has a word elsewhere.

    named: (trigger, caption file, line, captions) of each image.
    """
    images = list(named)
    wrong = {(problem.file, problem.line) for problem in problems.found if problem.severity == "error"}
    if not concepts_of(trigger for trigger, *_ in images) or any(
        file.name.lower() == TRIGGER_NAME for file, _ in wrong
    ):
        return  # there is one trigger for all or none, or a trigger.txt that has to be mended first
    without: dict[Path, list[tuple[Path, int | None]]] = {}
    for trigger, file, line, captions in images:
        if not trigger and (file, line) not in wrong and any(map(has_trigger, captions)):
            without.setdefault(file if line is not None else file.parent, []).append((file, line))
    for place, found in without.items():
        where = "each row" if place == found[0][0] else f"the folder {place.name}, as {TRIGGER_NAME}"
        problems.error(
            *found[0],
            f"{PLACEHOLDER} stands for nothing here, while other images have a trigger: write one for {where}, or give "
            "the trigger of all images without their own",
        )


def warn_of_collisions(named: Iterable[tuple[str, Path, int | None, Sequence[str]]], problems: Problems) -> None:
    """Warns of triggers that prompts cannot tell apart, once for each pair of them.

    named: (trigger, caption file, line, captions) of each image.
    """
    places: dict[str, tuple[Path, int | None]] = {}
    captions: dict[str, list[str]] = {}
    for trigger, file, line, texts in named:
        if trigger:
            places.setdefault(trigger, (file, line))
            captions.setdefault(trigger, []).extend(texts)
    for place, first in enumerate(places):
        for second in [*places][place + 1 :]:
            for message in _collision(first, second, captions):
                problems.warning(*places[second], message)


def _collision(first: str, second: str, captions: Mapping[str, Sequence[str]]) -> Iterable[str]:
    """Why prompts cannot tell two triggers apart, in one sentence; none if they can. captions: of each."""
    if first.casefold() == second.casefold():
        yield f"the trigger {second!r} differs from {first!r} in case only: they count as one concept; write both alike"
        return
    short, long = sorted((first, second), key=len)
    if has_trigger(long, short):
        yield f"the trigger {short!r} is a part of the trigger {long!r}: prompts with that name both; choose another"
        return
    for word, other in ((first, second), (second, first)):
        if all(names_concept(text, word) for text in captions[other]):
            yield (
                f"every caption of the concept {other!r} contains {word!r}, the trigger of another concept: choose a "
                "word that they lack"
            )


def without_names(caption: str, names: Iterable[str]) -> str:
    """The caption without `[V]` and these triggers: with one of them left, it would be no ordinary prompt."""
    for name in sorted(dict.fromkeys(names), key=len, reverse=True):  # one may be a part of another
        caption = remove_trigger(caption, name)
    return caption


def names_concept(prompt: str, trigger: str) -> bool:
    """Whether a prompt contains the trigger itself; `[V]` does not count."""
    return has_trigger(prompt.replace(PLACEHOLDER, " ").replace(PLACEHOLDER.lower(), " "), trigger)


def require_names(prompts: Sequence[str], what: str, concepts: Sequence[str]) -> None:
    """Checks prompts of a dataset with several concepts, where `[V]` may stand for any of them.

    Args:
        prompts: the prompts.
        what: names them, such as "preview prompt".
        concepts: the triggers of the dataset.

    Raises:
        ValueError: a prompt contains `[V]`.
    """
    if len(concepts) < 2:
        return
    for number, prompt in enumerate(prompts, 1):
        if has_trigger(prompt):
            raise ValueError(
                f"{what} {number}: {PLACEHOLDER} may stand for any of {', '.join(concepts)}: write one of these words"
            )
