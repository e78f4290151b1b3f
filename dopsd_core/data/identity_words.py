"""Words of captions that may stand for the concept itself, next to `[V]`.

What nearly all captions say beside `[V]` is learned together with it, and a word that describes the concept takes over
what `[V]` should learn: with "a red [V] badge" for a badge that is red, `[V]` does not learn the colour. Chinese is
written without spaces, so there the longest common strings take the place of words.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from .captioning import CaptionOptions
from .captions import PLACEHOLDER, around_concept, remove_trigger

NEARLY_ALL = 0.8
"""Share of the captions from which on a word counts as said by nearly all."""

FEWEST = 3
"""With fewer captions, nothing is said about what they share."""

_HAN = "\u3400-\u4dbf\u4e00-\u9fff"
_WORD = re.compile(rf"[^\W\d_{_HAN}]+(?:['’-][^\W\d_{_HAN}]+)*")
_HAN_RUN = re.compile(f"[{_HAN}]+")
_LONGEST_HAN = 6
_PUNCTUATION = re.compile(r"[^\w\s'’-]")
_PHRASE = 4

_ARTICLES_TEXT = "a an the this that his her its my your their our one"

_FUNCTION_WORDS_TEXT = """
about above across after against along among and are around as at away back be before behind being below beneath beside
between beyond but by down during each every for from front has have having he in inside into is it left middle near
next no not of off on onto or other out outside over right she side so some than there they through to top toward
towards two under up upon was were where which while who with within without photo photograph image shot view close-up
closeup style
"""

_MEDIA_TEXT = """
3d acrylic anime art artwork brushstrokes cartoon cel-shaded charcoal claymation collage comic crayon digital drawing
drawn engraving etching flat gouache hand-drawn illustrated illustration impressionist ink line-art linocut lithograph
low-poly manga monochrome oil-painting painted painterly painting pastel pencil pixel-art pixelated poster render
rendered rendering sketch sketched stylized stylised vector vintage watercolor watercolour woodcut
"""

_ARTICLES = frozenset(_ARTICLES_TEXT.split())
_FUNCTION_WORDS = _ARTICLES | {*_FUNCTION_WORDS_TEXT.split(), "picture"}
_MEDIA = frozenset(_MEDIA_TEXT.split())

_HAN_FUNCTIONS = re.compile("[的了在是和与及或着过被把对从到向为以于其这那有上下里外中前后左右旁边一个张只位条片幅款]")
"""Characters that do not describe anything; common strings end at them."""
_HAN_COLOUR = re.compile(r"([深浅亮暗]?[红橙黄绿青蓝紫粉黑白灰棕褐金银米]色)的?\s*$")
_HAN_VERBS = re.compile("[在是有和与及被把对从到向为看穿戴拿站坐躺放]")
"""Between the name and a kind of thing, these make it another thing."""
_HAN_MEDIA = re.compile("水彩|油画|插画|漫画|素描|版画|水墨|卡通|动漫|像素|手绘|铅笔|线稿|渲染|赛璐璐|国画|蜡笔|剪纸")


@dataclass(frozen=True)
class Shared:
    """A word or Chinese string that nearly all captions have besides the concept's name.

    Attributes:
        word: the word.
        count: number of captions with it.
        total: number of captions.
        is_class: whether it says what kind of thing the concept is.
    """

    word: str
    count: int
    total: int
    is_class: bool

    def __str__(self) -> str:
        place = f"'{self.word}' is in {self.count} of {self.total} captions"
        if self.is_class:
            return f"{place} and says what {PLACEHOLDER} is: write it into every prompt too, or into none"
        return (
            f"{place}, besides {PLACEHOLDER}: if it is part of the concept, delete it, for the word learns what "
            f"{PLACEHOLDER} should; if not, vary it"
        )


def shared_words(captions: Sequence[str], options: CaptionOptions) -> tuple[Shared, ...]:
    """The words that nearly all captions share, the concept's name and function words aside; those of every caption
    first. Empty for fewer than `FEWEST` captions."""
    total = len(captions)
    if total < FEWEST:
        return ()
    least = math.ceil(NEARLY_ALL * total)
    texts = [remove_trigger(caption, options.trigger) for caption in captions]
    counts = Counter(word for text in texts for word in dict.fromkeys(_words(text)) if word not in _FUNCTION_WORDS)
    found = {word: count for word, count in counts.items() if count >= least} | _shared_han(texts, least)
    kinds = _class_words(captions, options, found)
    ranked = sorted(found.items(), key=lambda item: (item[0] in kinds, -item[1]))
    return tuple(Shared(word, count, total, word in kinds) for word, count in ranked)


def words_of_concept(caption: str, options: CaptionOptions, shared: Sequence[Shared] = ()) -> tuple[str, ...]:
    """The words with which a caption describes the concept itself.

    For a subject these are the words between `[V]` and what kind of thing it is ("a [V] red badge"), and between an
    article and both ("a red [V] badge"); for a style those for a medium or technique ("a watercolour of"). In Chinese
    these are strings between `[V]` and the kind of thing, and colours before `[V]`.

    shared: what the captions of the dataset share, from `shared_words`.
    """
    if options.aim == "style":
        media = [word for word in _words(caption) if word in _MEDIA]
        return tuple(dict.fromkeys((*media, *_HAN_MEDIA.findall(caption))))
    named = {*_words(options.class_word), *_HAN_RUN.findall(options.class_word)}
    kinds = {word.word for word in shared if word.is_class} | named
    found: list[str] = []
    for before, behind in around_concept(caption, options.trigger):
        after = _phrase(_PUNCTUATION.split(behind)[0], backwards=False)
        places = [i for i, word in enumerate(after) if word in kinds]
        if places:
            found += _phrase(_PUNCTUATION.split(before)[-1], backwards=True) if places[0] == 0 else ()
            found += after[: places[-1]]
        found += _han_of_concept(before, behind, kinds)
    return tuple(word for word in dict.fromkeys(found) if word not in kinds)


def _han_of_concept(before: str, behind: str, kinds: Collection[str]) -> list[str]:
    """A colour right before the name, and what is written between the name and the kind of thing, in Chinese."""
    colour = _HAN_COLOUR.search(before)
    found = [colour.group(1)] if colour else []
    run = _HAN_RUN.match(behind.lstrip())
    for kind in sorted(filter(_HAN_RUN.fullmatch, kinds), key=len, reverse=True):
        describing, there, _ = (run.group() if run else "").partition(kind)
        if there:
            describing = describing.rstrip("的")
            is_description = describing and not _HAN_VERBS.search(describing)
            return [*found, describing] if is_description else found
    return found


def _words(text: str) -> list[str]:
    """The words of a text that are not Chinese, in lower case."""
    return [word.casefold() for word in _WORD.findall(text)]


def _phrase(text: str, *, backwards: bool) -> list[str]:
    """The words that describe a thing, next to its name: up to the first function word other than "and"; before the
    name, up to an article, without which they may be anything ("a dog sees [V]")."""
    words = _words(text)
    nearest = words[::-1] if backwards else words
    end = next((i for i, word in enumerate(nearest) if word in _FUNCTION_WORDS - {"and"}), None)
    if backwards and (end is None or nearest[end] not in _ARTICLES):
        return []
    phrase = [word for word in nearest[:end] if word != "and"][:_PHRASE]
    return phrase[::-1] if backwards else phrase


def _class_words(captions: Sequence[str], options: CaptionOptions, shared: dict[str, int]) -> set[str]:
    """The shared words that say what kind of thing the concept is: those given, or else the last one behind `[V]`."""
    given = options.class_word.strip().casefold()
    if given:
        return {word for word in shared if word in _words(given) or (word in given and _HAN_RUN.fullmatch(word))}
    last: Counter[str] = Counter()
    for caption in captions:
        for _, behind in around_concept(caption, options.trigger)[:1]:
            after = _phrase(_PUNCTUATION.split(behind)[0], backwards=False)
            last.update([word for word in after if word in shared][-1:])
    return {word for word, count in last.items() if count >= NEARLY_ALL * len(captions)}


def _shared_han(texts: Sequence[str], least: int) -> dict[str, int]:
    """The longest Chinese strings of two or more characters that at least so many texts have, with their counts."""
    counts: Counter[str] = Counter()
    for text in texts:
        runs = [part for run in _HAN_RUN.findall(text) for part in _HAN_FUNCTIONS.split(run)]
        counts.update({part for run in runs for part in _parts(run)})
    found = {part: count for part, count in counts.items() if count >= least}
    return {
        part: count
        for part, count in found.items()
        if not any(part != other and part in other and found[other] == count for other in found)
    }


def _parts(run: str) -> list[str]:
    """The strings of two to `_LONGEST_HAN` characters in a run."""
    lengths = range(2, min(_LONGEST_HAN, len(run)) + 1)
    return [run[i : i + length] for length in lengths for i in range(len(run) - length + 1)]
