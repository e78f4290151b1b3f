"""Missing captions are written with [V], none is ever changed, and words that stand for the concept are pointed out."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from PIL import Image

from dopsd_core.caption_sheet import caption_sheet
from dopsd_core.data.caption_folder import CaptionList, caption_folder
from dopsd_core.data.captioning import CaptionOptions
from dopsd_core.data.captions import CaptionError
from dopsd_core.data.identity_words import shared_words, words_of_concept
from dopsd_core.files.atomic import write_new
from dopsd_core.options import ConfigError

SUBJECT = CaptionOptions(class_word="badge")


def draw(folder: Path, *names: str, size: tuple[int, int] = (48, 32)) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for shade, name in enumerate(names):
        Image.new("RGB", size, (40 * shade, 20, 200)).save(folder / name)


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def states(found: CaptionList) -> dict[str, str]:
    return {item.image.name: item.state for item in found.items}


# -- the question and the answer ---------------------------------------------------------------------------------------


def test_the_question_asks_for_the_name_and_not_for_what_it_stands_for() -> None:
    subject = CaptionOptions(class_word="dog", instruction="Name the camera angle.", max_words=25).question()
    assert "Write [V] dog for it" in subject and "Do not say what [V] looks like" in subject
    assert "25 words" in subject and "English" in subject and "\nName the camera angle.\n" in subject
    style = CaptionOptions(aim="style", language="Chinese", class_word="dog", max_words=25).question()
    assert "Do not describe the style" in style and "[V]风格" in style and "Simplified Chinese" in style
    assert "50 characters" in style and "dog" not in style  # the class is a subject's
    assert "[V] for it" in CaptionOptions().question() and "particular" not in CaptionOptions().question()


@pytest.mark.parametrize(
    ("answer", "caption"),
    [
        ("A [V] badge on a wall.", "A [V] badge on a wall."),
        ('Caption: "A [V] badge\non a wall."', "A [V] badge on a wall."),
        ("<think>\nIt is red.\n</think>\n\n**A [V] badge** on a wall", "A [V] badge on a wall"),
        ("A [v] badge and a < V > badge", "A [V] badge and a [V] badge"),
        ("“描述：[V]徽章在墙上。”", "[V]徽章在墙上。"),
    ],
)
def test_the_caption_is_the_answer_without_its_wrapping(answer: str, caption: str) -> None:
    assert SUBJECT.caption(answer) == (caption, ())


@pytest.mark.parametrize(
    ("options", "answer", "caption"),
    [
        (SUBJECT, "A Badge on a wall", "A [V] Badge on a wall"),
        (SUBJECT, "Two badgers on a wall", "[V] badge, Two badgers on a wall"),
        (CaptionOptions(), "On a wall", "[V], On a wall"),
        (CaptionOptions(class_word="徽章", language="Chinese"), "墙上的徽章", "墙上的[V]徽章"),
        (CaptionOptions(aim="style"), "A cat asleep.", "A cat asleep, in the style of [V]"),
        (CaptionOptions(aim="style", language="Chinese"), "一只猫。", "一只猫，[V]风格"),
    ],
)
def test_a_name_that_the_model_left_out_is_put_in_and_reported(options, answer: str, caption: str) -> None:
    made, remarks = options.caption(answer)
    assert made == caption and "left out [V]" in remarks[0]


@pytest.mark.parametrize("answer", ["A ohwx badge on a wall", "A OHWX badge on a wall", "A [V] badge on a wall"])
def test_an_answer_with_the_trigger_gets_no_second_name(answer: str) -> None:
    assert SUBJECT.replace(trigger="ohwx").caption(answer) == ("A [V] badge on a wall", ())


def test_an_answer_with_the_trigger_of_its_folder_gets_no_second_name(tmp_path: Path) -> None:
    for name in ("ohwx", "sks"):
        draw(tmp_path / name, f"{name}.png")
        (tmp_path / name / "trigger.txt").write_text(name, encoding="utf-8")
    found = caption_folder(tmp_path, SUBJECT, lambda image, question: "A sks badge")
    captions = {item.image.stem: item.caption for item in found.items}
    assert captions == {"ohwx": "A sks [V] badge", "sks": "A [V] badge"}
    assert {item.trigger for item in found.items} == {"ohwx", "sks"}


@pytest.mark.parametrize("answer", ["", " \n", "<think>hmm", '""', "a [V] \x00 badge"])
def test_an_answer_without_text_is_refused(answer: str) -> None:
    with pytest.raises(CaptionError):
        SUBJECT.caption(answer)


def test_options_are_checked() -> None:
    with pytest.raises(ConfigError, match="max_words is 1; set it to a value from 5 to 200"):
        CaptionOptions(max_words=1)
    with pytest.raises(ConfigError, match="aim is 'face'; choose one of subject, style"):
        CaptionOptions(aim="face")  # type: ignore[arg-type]


# -- identity words ----------------------------------------------------------------------------------------------------

RED = ("a red [V] badge on a desk", "the red [V] badge, left", "a red [V] badge in snow", "a red [V] badge on grass")


def test_what_nearly_all_captions_say_is_pointed_out() -> None:
    found = {word.word: word for word in shared_words(RED, CaptionOptions())}
    assert found.keys() == {"red", "badge"}
    assert found["badge"].is_class and not found["red"].is_class
    assert found["red"].count == found["red"].total == 4
    assert "'red' is in 4 of 4 captions" in str(found["red"]) and "delete it" in str(found["red"])
    assert shared_words(RED[:2], CaptionOptions()) == ()
    assert not shared_words(["a [V] cat on a mat", "the [V] dog on ice", "a [V] hen in the wood"], CaptionOptions())


def test_one_caption_of_five_may_lack_the_word() -> None:
    words = [word.word for word in shared_words([*RED, "a [V] badge"], CaptionOptions())]
    assert words == ["red", "badge"]
    assert [word.word for word in shared_words([*RED, "a [V] badge", "my [V] badge"], CaptionOptions())] == ["badge"]


def test_the_trigger_is_no_such_word() -> None:
    captions = [text.replace("[V]", "ohwx") for text in RED]
    assert {word.word for word in shared_words(captions, CaptionOptions(trigger="ohwx"))} == {"red", "badge"}
    assert "ohwx" in {word.word for word in shared_words(captions, CaptionOptions())}


@pytest.mark.parametrize(
    ("caption", "words"),
    [
        ("a red [V] badge on a blue wall", ("red",)),
        ("a [V] shiny red badge on a wall", ("shiny", "red")),
        ("the red and white [V] badge", ("red", "white")),
        ("a [V] badge, red wall", ()),
        ("a [V] badge on a red wall", ()),
        ("a woman holds [V] badge", ("woman", "holds")),
        ("on the table beside [V] badge", ()),
        ("red wall, [V] badge", ()),
    ],
)
def test_words_of_the_concept_are_those_beside_its_name(caption: str, words: tuple[str, ...]) -> None:
    assert words_of_concept(caption, SUBJECT) == words


def test_words_of_a_style_are_media_and_techniques() -> None:
    style = CaptionOptions(aim="style")
    assert words_of_concept("A watercolour painting of a cat, [V]", style) == ("watercolour", "painting")
    assert words_of_concept("一幅水彩画，[V]风格", style) == ("水彩",)
    assert words_of_concept("a cat, in the style of [V]", style) == ()


@pytest.mark.parametrize(
    ("caption", "words"),
    [
        ("一只红色的[V]徽章，在上面", ("红色",)),
        ("桌上的深蓝色 [V]徽章", ("深蓝色",)),
        ("一个[V]红色条纹的徽章，左边", ("红色条纹",)),
        ("[V]徽章，红色的墙", ()),
        ("红色的墙上，[V]徽章", ()),
        ("一只狗看见[V]", ()),
        ("[V]在红色的徽章旁边", ()),
    ],
)
def test_chinese_words_of_the_concept_are_colours_before_it_and_what_stands_before_its_kind(
    caption: str, words: tuple[str, ...]
) -> None:
    assert words_of_concept(caption, CaptionOptions(class_word="徽章", language="Chinese")) == words


def test_chinese_captions_share_strings() -> None:
    captions = ["桌上的红色[V]徽章", "雪地里的红色[V]徽章", "一个红色[V]徽章在草地上"]
    found = {word.word: word.is_class for word in shared_words(captions, CaptionOptions(class_word="徽章"))}
    assert found == {"红色": False, "徽章": True}


# -- the folder --------------------------------------------------------------------------------------------------------


def test_only_missing_captions_are_written(tmp_path: Path) -> None:
    draw(tmp_path, "a.png", "b.png", "c.png")
    draw(tmp_path / "10_more", "d.jpg")
    (tmp_path / "b.txt").write_text("an ugly caption", encoding="utf-8")
    (tmp_path / "c.txt").write_bytes(b"caf\xe9 [V]")  # not UTF-8: still its owner's
    before, seen, steps = files_of(tmp_path), [], []

    def ask(image: torch.Tensor, question: str) -> str:
        seen.append((tuple(image.shape), question))
        return f"A [V] badge, number {len(seen)}"

    found = caption_folder(tmp_path, SUBJECT, ask, progress=lambda done, total: steps.append((done, total)))
    assert states(found) == {"d.jpg": "written", "a.png": "written", "b.png": "kept", "c.png": "failed"}
    assert seen == [((3, 32, 48), SUBJECT.question())] * 2 and steps == [(0, 2), (1, 2), (2, 2)]
    after = files_of(tmp_path)
    assert {name: after[name] for name in before} == before
    assert after.keys() - before.keys() == {"a.txt", "10_more/d.txt"}
    written = {item.image.stem: item.caption for item in found.items if item.state == "written"}
    assert after["a.txt"].decode() == written["a"] + "\n" and after["10_more/d.txt"].decode() == written["d"] + "\n"
    text = found.describe()
    assert "4 images, 2 new, 1 already there, 1 left alone" in text and "b.png (kept): an ugly caption" in text
    assert "b.png: the caption lacks [V]" in text and "c.png: no caption was written: the text is not UTF-8" in text
    again = caption_folder(tmp_path, SUBJECT, lambda image, question: pytest.fail("nothing is missing"))
    assert states(again) == {"d.jpg": "kept", "a.png": "kept", "b.png": "kept", "c.png": "failed"}
    assert files_of(tmp_path) == after


def test_without_a_model_nothing_is_written(tmp_path: Path) -> None:
    draw(tmp_path, "a.png", "b.png", "c.png", "d.png")
    for name, text in zip("bcd", RED, strict=False):
        (tmp_path / f"{name}.txt").write_text(text, encoding="utf-8")
    before = files_of(tmp_path)
    found = caption_folder(tmp_path, CaptionOptions(), None)
    assert states(found) == {"a.png": "missing", "b.png": "kept", "c.png": "kept", "d.png": "kept"}
    assert files_of(tmp_path) == before
    remarks = found.remarks()
    assert remarks[0].startswith("warning: 'red' is in 3 of 3") and remarks[1].startswith("note: 'badge' is in 3 of 3")
    assert "warning: b.png: says 'red' of the concept itself: delete what [V] should learn" in remarks


def test_what_cannot_be_captioned_is_left_alone_and_says_why(tmp_path: Path) -> None:
    folder = tmp_path / "photos"
    draw(folder, "a.png", "b.png", "e.png", "e.jpg")
    draw(folder, "a.mask.png", "b_mask.png")
    (folder / "b.caption").write_text("mine", encoding="utf-8")
    (folder / "c.png").write_bytes(b"no image")
    draw(tmp_path, "secret.png")
    (folder / "d.png").symlink_to(tmp_path / "secret.png")
    (folder / "f.png").symlink_to(folder / "a.png")
    (folder / "f.txt").symlink_to(tmp_path / "nowhere.txt")
    asked = []
    found = caption_folder(folder, SUBJECT, lambda image, question: asked.append(image) or "a [V] badge")
    wanted = {name: "failed" for name in ("b.png", "b_mask.png", "c.png", "d.png", "f.png")}
    assert states(found) == wanted | {"a.png": "written", "e.jpg": "written", "e.png": "failed"}
    remarks = "\n".join(found.remarks())
    assert "b.png: no caption was written: there is b.caption: rename it to b.txt" in remarks
    assert "d.png: no caption was written: links out of the folder" in remarks and len(asked) == 3
    assert "e.png: no caption was written: e.txt is there meanwhile, or belongs to another image" in remarks
    assert not (tmp_path / "nowhere.txt").exists()


def test_a_folder_of_edits_and_what_is_no_folder_are_refused(tmp_path: Path) -> None:
    draw(tmp_path / "edits" / "source", "a.png")
    draw(tmp_path / "edits" / "target", "a.png")
    for folder, sentence in (
        (tmp_path / "edits", "contains edits: write their instructions yourself"),
        (tmp_path / "edits" / "source" / "a.png", "is not a folder"),
        (tmp_path / "nowhere", "is not a folder"),
    ):
        with pytest.raises(ValueError, match=sentence):
            caption_folder(folder, SUBJECT, lambda image, question: pytest.fail("nothing is asked"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="has no images"):
        caption_folder(tmp_path / "empty", SUBJECT, None)


def test_what_was_written_before_a_stop_is_kept(tmp_path: Path) -> None:
    draw(tmp_path, "a.png", "b.png")

    def stop(done: int, total: int) -> None:
        if done == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        caption_folder(tmp_path, SUBJECT, lambda image, question: "a [V] badge", progress=stop)
    assert files_of(tmp_path).keys() == {"a.png", "b.png", "a.txt"}


def test_the_sheet_shows_every_image(tmp_path: Path) -> None:
    draw(tmp_path, *(f"{name}.png" for name in "abcdef"))
    sheet = caption_sheet(caption_folder(tmp_path, SUBJECT, lambda image, question: "a [V] badge on a long wall"))
    colours = {colour for _, colour in sheet.getcolors(1 << 24) or []}
    assert {(40 * shade, 20, 200) for shade in range(6)} <= colours


# -- files -------------------------------------------------------------------------------------------------------------


def test_a_new_file_never_replaces_another(tmp_path: Path) -> None:
    assert write_new(tmp_path / "a.txt", b"1") and not write_new(tmp_path / "a.txt", b"2")
    (tmp_path / "b.txt").symlink_to(tmp_path / "elsewhere")
    assert not write_new(tmp_path / "b.txt", b"3")
    assert files_of(tmp_path) == {"a.txt": b"1"} and len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize("links", [True, False])
def test_a_file_that_appears_while_another_is_written_wins(tmp_path: Path, monkeypatch, links: bool) -> None:
    link, target = os.link, tmp_path / "a.txt"

    def late(*names) -> None:
        target.write_bytes(b"theirs")
        if not links:
            raise PermissionError("no links here")
        link(*names)

    monkeypatch.setattr(os, "link", late)
    assert not write_new(target, b"ours")
    assert files_of(tmp_path) == {"a.txt": b"theirs"}


def test_a_file_system_without_links_gets_the_file_too(tmp_path: Path, monkeypatch) -> None:
    def refuse(*names) -> None:
        raise PermissionError("no links here")

    monkeypatch.setattr(os, "link", refuse)
    assert write_new(tmp_path / "a.txt", b"ours") and files_of(tmp_path) == {"a.txt": b"ours"}
