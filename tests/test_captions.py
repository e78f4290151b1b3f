"""What is read as text, what as the concept, and what is named because it was meant as one of them."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dopsd_core.arguments import config_from_args, make_parser
from dopsd_core.data.captions import (
    CaptionError,
    check_prompts,
    decode_utf8,
    doubts_of,
    has_trigger,
    near_placeholder,
    put_trigger,
    remove_trigger,
)
from dopsd_core.data.encoding_plan import plan_encoding
from dopsd_core.data.triggers import checked_trigger, given_trigger
from dopsd_core.demo.settings import demo_config

from .written import image_file, only, pair, read, rows

# -- bytes -------------------------------------------------------------------------------------------------------------

TEXTS = ("a photo of a dog", "café au lait", "собака на столе 3", "一只狗 in the snow", "a 😀 dog", "a\r\nb")


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize(
    ("encoding", "reported"),
    [
        ("utf-16-le", "UTF-16 (LE) without byte-order mark"),
        ("utf-16-be", "UTF-16 (BE) without byte-order mark"),
        ("utf-32-le", "UTF-32 (LE) without byte-order mark"),
        ("utf-32-be", "UTF-32 (BE) without byte-order mark"),
        ("utf-16", "UTF-16;"),
        ("utf-32", "UTF-32;"),
    ],
)
def test_wide_encodings_are_named(tmp_path: Path, text: str, encoding: str, reported: str) -> None:
    file = pair(tmp_path, "a.png").with_suffix(".txt")
    for padding in ("", "\0", "\n"):
        file.write_bytes((text + padding).encode(encoding))
        only(read(tmp_path).errors, file, 1, f"the text is {reported}", "save it as UTF-8")
    jsonl = tmp_path / "a.jsonl"
    jsonl.write_bytes(json.dumps({"path": "a.png", "text": text}, ensure_ascii=False).encode(encoding))
    only(read(jsonl).errors, jsonl, None, f"the text is {reported}")


@pytest.mark.parametrize("blank", ["\u3000", "\u00a0 \u2003", "\u200b\u200b", "\u2060", "\u00ad", "\u2800", "\u3164\n"])
def test_a_caption_that_nobody_can_see_is_empty(tmp_path: Path, blank: str) -> None:
    file = pair(tmp_path, "a.png").with_suffix(".txt")
    file.write_text(blank, encoding="utf-8")
    only(read(tmp_path).errors, file, 1, "the caption is empty")
    jsonl = rows(tmp_path / "a.jsonl", {"path": "a.png", "caption": blank})
    only(read(jsonl).errors, jsonl, 1, "'caption' is an empty caption")
    file.write_text(f"{blank}a [V] dog", encoding="utf-8")
    assert not read(tmp_path).errors


def test_accents_are_the_same_composed_or_not(tmp_path: Path) -> None:
    """A Mac's file names are not composed, and so are texts that were copied from them."""
    composed, apart = "caf\u00e9", "cafe\u0301"
    for trigger, caption in ((composed, apart), (apart, composed), (apart, apart)):
        assert has_trigger(f"a {caption} cup", trigger) and remove_trigger(f"a {caption} cup", trigger) == "a cup"
        assert given_trigger(trigger) == checked_trigger(trigger) == composed
    assert not has_trigger(f"a {apart} cup", "cafe") and not has_trigger(f"a {composed} cup", "cafe")
    pair(tmp_path, "a.png").with_suffix(".txt").write_text(f"a {apart} cup", encoding="utf-8")
    assert not read(tmp_path, trigger=composed).warnings


def test_a_trigger_that_nobody_can_see_is_refused(tmp_path: Path) -> None:
    pair(tmp_path, "a.png")
    with pytest.raises(ValueError, match="no visible character"):
        read(tmp_path, trigger="\u200b")
    assert not read(tmp_path, trigger=" \t").errors  # none at all


@pytest.mark.parametrize("text", ["a [V] café", "ein Mädchen mit [V]", "naïve – [V] – 5 €", "a\n[V] Ærø"])
def test_text_that_was_encoded_twice_is_named(text: str) -> None:
    twice = text.encode().decode("cp1252", "ignore")
    (doubt,) = doubts_of(twice)
    assert "read in another encoding and saved again" in doubt.message and doubt.line == 1 + ("\n" in text)
    word = next(word for word in text.split() if not word.isascii())
    assert doubt.message.endswith(f"write {word!r}")
    assert doubts_of(text) == []


@given(st.text().filter(lambda text: not text.startswith("\ufeff")))
def test_utf8_is_never_taken_for_another_encoding(text: str) -> None:
    if "\0" not in text:
        assert decode_utf8(text.encode()) == text == decode_utf8(b"\xef\xbb\xbf" + text.encode())


@pytest.mark.parametrize(
    ("character", "reported"),
    [
        ("\0" * 9, "NUL characters"),
        ("\x07", "the control character U+0007"),
        ("\x92", "the control character U+0092"),  # ’ of cp1252 read as Latin-1
        ("\x7f", "the control character U+007F"),
        ("\ufeff", "a byte-order mark (U+FEFF) inside"),
        ("\uffff", "the control character U+FFFF"),
    ],
)
def test_characters_that_are_no_text(tmp_path: Path, character: str, reported: str) -> None:
    file = pair(tmp_path, "a.png").with_suffix(".txt")
    for place, line in ((f"a dog\rx\r\n\nrunning{character}", 4), (f"a{character}dog\n", 1)):
        file.write_bytes(place.encode())
        only(read(tmp_path).errors, file, line, f"the text contains {reported}")
        assert read(tmp_path).pairs == ()
    jsonl = rows(tmp_path / "a.jsonl", {"path": "a.png", "text": "fine", "short_en": f"a{character}dog"})
    jsonl.write_text(json.dumps(json.loads(jsonl.read_text("utf-8"))))  # every character as an escape
    only(read(jsonl).errors, jsonl, 1, f"'short_en': the text contains {reported}")


def test_a_mark_at_the_beginning_is_no_part_of_the_text(tmp_path: Path) -> None:
    pair(tmp_path, "a.png").with_suffix(".txt").write_bytes(b"\xef\xbb\xbfa dog")
    assert read(tmp_path).pairs[0].captions == ("a dog",)
    file = rows(tmp_path / "a.jsonl", {"path": "a.png", "text": "\ufeffa dog", "short_en": "\ufeff"})
    assert read(file).pairs[0].captions == ("a dog",)
    only(read(file).problems, file, 1, "'short_en' is an empty caption")


def test_half_a_character(tmp_path: Path) -> None:
    image_file(tmp_path / "a.png")
    file = rows(tmp_path / "a.jsonl", r'{"path": "a.png", "text": "a dog \ud83d"}')
    only(read(file).errors, file, 1, "'text': the text contains half a character (U+D83D)")
    rows(file, r'{"path": "a.png", "text": "a dog \ud83d\ude00"}')
    assert read(file).pairs[0].captions == ("a dog 😀",)
    with pytest.raises(ValueError, match=r"the trigger '\\ud83d' cannot be used: the text contains half a character"):
        read(file, trigger="\ud83d")


def test_a_lost_character_is_a_warning(tmp_path: Path) -> None:
    file = pair(tmp_path, "a.png", "\n\na dog\na caf\ufffd").with_suffix(".txt")
    only(read(tmp_path).problems, file, 4, "U+FFFD")
    assert read(tmp_path).errors == ()


def test_a_caption_of_many_megabytes(tmp_path: Path) -> None:
    file = pair(tmp_path, "a.png", "a dog " * 400_000).with_suffix(".txt")
    only(read(tmp_path).errors, file, 1, "has 2 MB, too large for one caption")


def test_a_configuration_in_another_encoding(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}", encoding="utf-16")
    words = ["train", "photos", "--output", "run", "--config", str(tmp_path / "config.json")]
    with pytest.raises(ValueError, match="config.json: the text is UTF-16; save it as UTF-8"):
        config_from_args(make_parser().parse_args(words), demo_config())


# -- the concept -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["[V]", "[v]"])
@pytest.mark.parametrize("around", ["a {} dog", "{}", "一只{}狗", "({}:1.2), {}{}", "a\n{} {}s"])
def test_the_placeholder_in_any_case_is_the_trigger(around: str, name: str) -> None:
    text = around.replace("{}", name)
    for trigger in ("ohwx", "a\\1 dog", "[v]"):
        assert put_trigger(text, trigger) == around.replace("{}", trigger)
    assert put_trigger(text, "") == around.replace("{}", "[V]")
    assert has_trigger(text) and near_placeholder(text) is None
    assert "V" not in remove_trigger(text).upper()


def test_small_letters_in_folders_rows_and_anchors(tmp_path: Path) -> None:
    pair(tmp_path, "a.png", "a [v] dog")
    file = rows(tmp_path / "a.jsonl", {"path": "a.png", "short_en": "a [v] dog", "short_zh": "[V]狗"})
    assert read(tmp_path, trigger="ohwx").pairs[0].captions == ("a ohwx dog",)
    report = read(file, trigger="ohwx")
    assert report.pairs[0].captions == ("a ohwx dog", "ohwx狗") and report.problems == ()
    assert plan_encoding(report.pairs, trigger="ohwx").anchors == ("a dog", "狗")
    assert plan_encoding(read(file).pairs).anchors == ("a dog", "狗")


@pytest.mark.parametrize(
    "near",
    [
        "[ V ]", "[ v]", "[V\u200b]", r"\[V\]", r"\[V]", r"[V\]", "[[V]]", "[V]]", "[V", "[ V", "V]", "<V>", "{v}",
        "{{V}}",
        "［V］", "[Ｖ]", "【V】", "〔v〕", "[Ⅴ]", "(V)", "[V*]", "[trigger]", "[Trigger]", "<trigger word>",
        "{trigger_word}", "[name]", "[concept]",
    ],
)  # fmt: skip
def test_near_misses_are_named_and_not_replaced(tmp_path: Path, near: str) -> None:
    text = f"\na photo\nof {near} on a rock"
    file = pair(tmp_path, "a.png", text).with_suffix(".txt")
    assert put_trigger(text, "ohwx") == text and not has_trigger(text, "ohwx")
    for trigger in ("ohwx", ""):
        report = read(tmp_path, trigger=trigger)
        only(report.problems, file, 3, " is not read as the concept: write [V]")
        assert report.errors == () and report.pairs[0].captions == (text.strip(),)
    if near.isprintable():
        assert f"'{near}' is not read" in report.problems[0].message
    both = rows(tmp_path / "a.jsonl", {"path": "a.png", "text": text, "short_en": text, "medium_en": "a [V] dog"})
    only(read(both, trigger="ohwx").problems, both, 1, "is not read as the concept: write [V]")


@pytest.mark.parametrize(
    "text",
    ["a video", "[video]", "type (v) of it", "V", "[V]", "<b>V</b>", "[vase]", "I [v]ow", "name", "a [red] V-neck"],
)
def test_what_is_no_near_miss(text: str) -> None:
    assert near_placeholder(text) is None


def test_a_trigger_in_brackets_is_the_trigger(tmp_path: Path) -> None:
    pair(tmp_path, "a.png", "a photo of <name> and [V]")
    report = read(tmp_path, trigger="<name>")
    assert report.problems == () and report.pairs[0].captions == ("a photo of <name> and <name>",)


def test_several_near_misses_are_one_sentence(tmp_path: Path) -> None:
    file = pair(tmp_path, "a.png", "<V> with {V}, <V>").with_suffix(".txt")
    only(read(tmp_path).problems, file, 1, "'<V>', '{V}' are not read as the concept: write [V]")


def test_prompts_that_a_user_typed() -> None:
    assert check_prompts(["a [V] dog", "a dog"], "preview prompt") == []
    said = check_prompts(["a [v] dog", "a [ V ] dog"], "preview prompt", "ohwx")
    assert said == ["preview prompt 2: '[ V ]' is not read as the concept: write [V]"]
    with pytest.raises(ValueError, match="^anchor prompt 1: the text contains half a character"):
        check_prompts(["\udc00"], "anchor prompt")


def test_errors_keep_their_line() -> None:
    with pytest.raises(CaptionError) as caught:
        decode_utf8(b"fine\nfine\xe9")
    assert caught.value.line == 2
