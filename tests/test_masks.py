"""Masks: found beside their images, checked, used for what the teacher sees; the image that is learned stays whole."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from dopsd_core.__main__ import main
from dopsd_core.conditioning.cache import ConditionCache
from dopsd_core.conditioning.encode import Condition
from dopsd_core.conditioning.teachers import EDIT, EDIT_TARGET, VLM, Background, TeacherView
from dopsd_core.data.buckets import Bucket
from dopsd_core.data.dataset import DatasetReport, Pair
from dopsd_core.data.images import load_image
from dopsd_core.data.masks import load_mask, subject_alone
from dopsd_core.training.shown_images import encode_request, mask_remarks, seen_by_teacher, seen_images
from dopsd_core.training.training_set import TrainingSet, build_training_set
from tests.tiny import CHANNELS, FEATURES
from tests.written import image_file, pair, read, rows

BACKGROUNDS: tuple[Background, ...] = ("blur", "grey", "remove")


def mask_file(path: Path, size: tuple[int, int] = (64, 64), box: tuple[int, int, int, int] = (0, 0, 32, 64)) -> Path:
    """White in the box, black elsewhere."""
    image = Image.new("L", size)
    image.paste(255, box)
    image.save(path)
    return path


def with_mask(folder: Path, name: str = "a", **mask: Any) -> Path:
    pair(folder, f"{name}.png", "a [V] emblem, " + name)
    return mask_file(folder / f"{name}.mask.png", **mask)


class Seeing:
    """Features are the mean colour of the image, and what was seen is kept."""

    identity = "seeing"

    def __init__(self) -> None:
        self.seen: list[Tensor] = []
        self.latents: list[Tensor] = []

    def encode_text(self, caption: str) -> Condition:
        return Condition(torch.full((2, FEATURES), float(len(caption))))

    def encode_image_text(self, image: Tensor, caption: str) -> Condition:
        self.seen.append(image)
        return Condition(torch.full((3, FEATURES), float(image.mean())))

    def encode_latent(self, image: Tensor) -> Tensor:
        self.latents.append(image)
        return torch.nn.functional.avg_pool2d(image.mean(0, keepdim=True), 8).expand(CHANNELS, -1, -1)


def built(
    pairs: tuple[Pair, ...], background: Background, encoder: Any = None, view: TeacherView = VLM, **options: Any
) -> TrainingSet:
    return build_training_set(pairs, encoder or Seeing(), teacher=view.with_background(background), **options)


# -- finding them ------------------------------------------------------------------------------------------------------


def test_a_mask_is_no_image_of_its_own(tmp_path: Path) -> None:
    mask = with_mask(tmp_path)
    pair(tmp_path, "b.png", "a [V] emblem, b")
    report = read(tmp_path)
    assert [one.image_path.name for one in report.pairs] == ["a.png", "b.png"] and report.problems == ()
    assert [one.mask for one in report.pairs] == [mask, None]
    assert "   1 with a mask" in report.describe()


def test_the_caption_of_a_mask_is_not_used(tmp_path: Path) -> None:
    mask = with_mask(tmp_path)
    mask.with_suffix(".txt").write_text("a white half")
    report = read(tmp_path)
    assert [(one.image_path.name, one.mask) for one in report.pairs] == [("a.png", mask)] and report.errors == ()
    (warning,) = report.warnings
    assert warning.file.name == "a.mask.txt"
    assert warning.message == "not used: a.mask.png is the mask of a.png; delete this caption"


def test_images_named_as_masks_are_warned_of(tmp_path: Path) -> None:
    for name in ("a.png", "a_mask.PNG", "b.mask.png"):
        pair(tmp_path, name)
    report = read(tmp_path)
    found = {warning.file.name: warning.message for warning in report.warnings}
    assert len(report.pairs) == 3 and report.errors == ()
    assert "if it is a mask, rename it to a.mask.png and delete the caption" in found["a_mask.PNG"]
    assert found["b.mask.png"] == "named as a mask, but there is no image b beside it: it is used as an image"


@pytest.mark.parametrize("end", [".mask.PNG", ".MASK.png", ".MASK.PNG"])
def test_a_mask_with_capitals_in_its_name_is_found(tmp_path: Path, end: str) -> None:
    mask = with_mask(tmp_path).rename(tmp_path / f"a{end}")
    report = read(tmp_path)
    assert [one.mask and one.mask.samefile(mask) for one in report.pairs] == [True] and report.problems == ()


@pytest.mark.parametrize("opacity, is_refused", [(0, True), (100, False), (200, False)])
def test_an_image_without_subject_and_background_has_no_mask(tmp_path: Path, opacity: int, is_refused: bool) -> None:
    pair(tmp_path, "a.png", mode="RGBA", colour=(200, 10, 10, opacity))
    report = read(tmp_path)
    if is_refused:
        assert report.errors[0].message.startswith("is fully transparent: it would be a white image")
    else:
        assert [one.mask for one in report.pairs] == [None] and report.errors == ()
        said = [warning.message for warning in report.warnings]
        assert [text.startswith("is nowhere more than 39% opaque") for text in said] == [True] * (opacity < 128)


def test_a_mask_without_its_image_is_an_image_without_a_caption(tmp_path: Path) -> None:
    mask_file(tmp_path / "a.mask.png")
    (error,) = read(tmp_path).errors
    assert error.file.name == "a.mask.png" and error.message.startswith("no caption")
    assert "it is no mask: there is no image a beside it" in error.message


def test_masks_of_other_names_are_pointed_out(tmp_path: Path) -> None:
    pair(tmp_path, "a.png")
    mask_file(tmp_path / "a-masklabel.png")
    (error,) = read(tmp_path).errors
    assert "a mask of a.png? rename it to a.mask.png" in error.message


def test_masks_of_a_jsonl_are_found_too(tmp_path: Path) -> None:
    mask = with_mask(tmp_path / "images")
    report = read(rows(tmp_path / "rows.jsonl", {"path": "images/a.png", "text": "a [V] emblem"}))
    assert [one.mask for one in report.pairs] == [mask]


def test_transparency_is_a_mask_unless_there_is_a_file(tmp_path: Path) -> None:
    for name, alpha in (("clear", 0), ("opaque", 255)):
        image = Image.new("RGBA", (64, 64), (200, 10, 10, 255))
        image.paste((10, 200, 10, alpha), (32, 0, 64, 64))
        image.save(tmp_path / f"{name}.png")
        (tmp_path / f"{name}.txt").write_text(f"a [V] emblem, {name}")
    clear, opaque = read(tmp_path).pairs
    assert (clear.mask, opaque.mask) == (clear.image_path, None)
    assert load_mask(clear.image_path, clear.image_path, clear.bucket)[0, 0].tolist() == [1.0] * 32 + [0.0] * 32
    mask = mask_file(tmp_path / "clear.mask.png")
    assert read(tmp_path).pairs[0].mask == mask


def wrong_masks() -> dict[str, tuple[Image.Image, str]]:
    half = Image.new("RGBA", (64, 64), (255, 255, 255, 0))
    half.paste((255, 255, 255, 255), (0, 0, 32, 64))
    return {
        "shape": (Image.new("L", (64, 32), 255), "the mask is 64x32 and its image 64x64: make it of the image's size"),
        "black": (Image.new("L", (64, 64), 0), "the mask has no subject: make it white where the subject is"),
        "white": (Image.new("L", (64, 64), 255), "the mask is white everywhere: make it black where the background is"),
        "transparent": (half, "the mask is transparent: save it in black and white"),
    }


@pytest.mark.parametrize("kind", list(wrong_masks()))
def test_a_mask_that_cannot_be_used_is_an_error(tmp_path: Path, kind: str) -> None:
    image, sentence = wrong_masks()[kind]
    pair(tmp_path, "a.png")
    image.save(tmp_path / "a.mask.png")
    (error,) = read(tmp_path).errors
    assert error.file.name == "a.mask.png" and error.message.startswith(sentence)


def test_a_damaged_mask_and_two_masks_are_errors(tmp_path: Path) -> None:
    with_mask(tmp_path).write_bytes(b"\x89PNG\r\n\x1a\n")
    assert [error.file.name for error in read(tmp_path).errors] == ["a.mask.png"]
    mask_file(tmp_path / "a.mask.png")
    mask_file(tmp_path / "a.mask.bmp")
    (error,) = read(tmp_path).errors
    assert error.message == "2 masks: a.mask.png, a.mask.bmp; keep one"


def test_a_mask_that_leads_out_of_the_dataset_is_an_error(tmp_path: Path) -> None:
    pair(tmp_path / "data", "a.png")
    (tmp_path / "data" / "a.mask.png").symlink_to(mask_file(tmp_path / "secret.png"))
    report = read(tmp_path / "data")
    assert any("is outside of the folder" in error.message for error in report.errors)


# -- the pixels --------------------------------------------------------------------------------------------------------


def test_the_mask_is_cropped_as_the_image_is(tmp_path: Path) -> None:
    """Also a mask of half the size; the image shows where it is white."""
    for name, size in (("a", (120, 60)), ("b", (60, 30))):
        image = Image.new("RGB", (120, 60))
        image.paste("white", (0, 0, 50, 60))
        image.save(tmp_path / f"{name}.png")
        mask = mask_file(tmp_path / f"{name}.mask.png", size, (0, 0, size[0] * 50 // 120, size[1]))
        bucket = Bucket(48, 48)
        whole, subject = load_image(tmp_path / f"{name}.png", bucket), load_mask(mask, tmp_path / f"{name}.png", bucket)
        assert subject.shape == (1, 48, 48) and (whole[:1] - subject).abs().mean() < 0.02


@pytest.mark.parametrize("background", BACKGROUNDS)
def test_the_subject_stays_and_the_background_goes(background: Background) -> None:
    generator = torch.Generator().manual_seed(0)
    image, mask = torch.rand(3, 48, 60, generator=generator), torch.zeros(1, 48, 60)
    mask[:, 10:30, 20:40] = 1
    shown = subject_alone(image, mask, background)
    inside = mask.bool().expand_as(image)
    assert torch.equal(shown[inside], image[inside]) and shown.min() >= 0 and shown.max() <= 1
    rest, before = shown[~inside], image[~inside]
    assert rest.std() < before.std() / 2
    if background != "blur":
        assert rest.unique().tolist() == [{"grey": 0.5, "remove": 1.0}[background]]


def test_the_blurred_background_has_nothing_of_the_subject() -> None:
    """A red subject before black, whose colour an ordinary blur would spread."""
    image, mask = torch.zeros(3, 48, 48), torch.zeros(1, 48, 48)
    mask[:, 16:32, 16:32] = 1
    image[0] = mask[0]
    assert subject_alone(image, mask, "blur")[0][mask[0] == 0].max() < 1e-4


def test_keep_is_the_image_itself() -> None:
    image = torch.rand(3, 8, 8)
    assert subject_alone(image, torch.zeros(1, 8, 8), "keep") is image


def test_half_transparent_edges_are_mixed() -> None:
    shown = subject_alone(torch.zeros(3, 4, 4), torch.full((1, 4, 4), 0.25), "remove")
    assert torch.allclose(shown, torch.full((3, 4, 4), 0.75))


# -- what the teacher sees ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("background", BACKGROUNDS)
def test_the_teacher_sees_the_subject_alone_and_the_target_stays_whole(tmp_path: Path, background: Background) -> None:
    mask = with_mask(tmp_path)
    (one,) = read(tmp_path).pairs
    whole, encoder = load_image(one.image_path, one.bucket), Seeing()
    built((one,), background, encoder)
    (seen,) = encoder.seen
    assert torch.equal(seen, subject_alone(whole, load_mask(mask, one.image_path, one.bucket), background))
    assert [torch.equal(latent, whole) for latent in encoder.latents] == [True]
    assert torch.equal(seen_images((one,), 5, "own", background)[0], seen)


def test_the_reference_of_an_editing_teacher_is_masked_too(tmp_path: Path) -> None:
    with_mask(tmp_path)
    (one,) = read(tmp_path).pairs
    data = built((one,), "remove", view=EDIT)
    (reference,), target = data.pairs[0].teacher.reference_latents, data.pairs[0].target_latent
    assert target is not None and not torch.equal(reference, target)
    assert torch.equal(reference[:, :, 4:], torch.ones(CHANNELS, 8, 4))
    assert EDIT.with_background("remove").with_sentence("").sentence == EDIT.of_others
    assert EDIT.with_background("keep").with_sentence("").sentence == EDIT.sentence


def test_other_images_are_seen_with_their_own_masks(tmp_path: Path) -> None:
    with_mask(tmp_path, "a")
    with_mask(tmp_path, "b", box=(0, 0, 64, 32))
    pairs, encoder = read(tmp_path).pairs, Seeing()
    built(pairs, "grey", encoder, teacher_image="other")
    wanted = [seen_by_teacher(pairs[index], "grey").load() for index in (1, 0)]
    assert [torch.equal(*both) for both in zip(encoder.seen, wanted, strict=True)] == [True, True]


def test_what_is_seen_is_part_of_the_run_and_of_the_cache(tmp_path: Path) -> None:
    mask = with_mask(tmp_path / "data")
    pairs, cache = read(tmp_path / "data").pairs, ConditionCache(tmp_path / "cache")
    prints = {name: built(pairs, name, cache=cache).fingerprint() for name in ("keep", *BACKGROUNDS)}
    assert len(set(prints.values())) == 4
    mask_file(mask, box=(0, 0, 20, 64))
    assert built(pairs, "grey", cache=cache).fingerprint() != prints["grey"]
    assert built(pairs, "keep", cache=cache).fingerprint() == prints["keep"]
    mask.unlink()
    again = Seeing()
    assert built(read(tmp_path / "data").pairs, "keep", again, cache=cache).fingerprint() == prints["keep"]
    assert again.seen == [], "without masks nothing is encoded anew"


def test_a_mask_that_changes_while_it_is_read_is_named(tmp_path: Path) -> None:
    mask = with_mask(tmp_path)
    request = encode_request(read(tmp_path).pairs[0], "a", background="grey")
    assert request.shown is not None
    mask_file(mask, box=(0, 0, 20, 64))
    with pytest.raises(ValueError, match=r"a\.mask\.png was changed while the dataset was being encoded"):
        request.shown.load()


def test_what_is_not_used_is_named(tmp_path: Path) -> None:
    with_mask(tmp_path, "a")
    pair(tmp_path, "b.png", "a [V] emblem, b")
    report: DatasetReport = read(tmp_path)
    assert mask_remarks(report.pairs, "keep") == ["the masks of 1 images are not used: teacher_background is keep"]
    assert mask_remarks(report.pairs, "blur") == ["1 of 2 images have no mask: the teacher sees them whole"]
    assert mask_remarks(report.pairs[:1], "blur") == mask_remarks(report.pairs[1:], "keep") == []
    with pytest.raises(ValueError, match="teacher_background grey needs masks, and no image has one: put a.mask.png"):
        built(report.pairs[1:], "grey")


def test_the_wanted_result_of_an_edit_stays_whole() -> None:
    with pytest.raises(ValueError, match="sees the wanted result of an edit, whose background belongs to it"):
        EDIT_TARGET.with_background("blur")


def test_the_command_line_shows_what_the_teacher_sees(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with_mask(tmp_path / "data")
    words = ["teacher-preview", str(tmp_path / "data"), "--steps", "1"]
    heights = []
    for background in ("keep", "grey"):
        sheet = tmp_path / f"{background}.png"
        assert main([*words, "--teacher-background", background, "--output", str(sheet)]) == 0
        heights.append(Image.open(sheet).height)
    assert heights[1] - heights[0] > 200  # one more row
    assert "masks of 1 images are not used" in capsys.readouterr().out
    image_file(tmp_path / "bare" / "a.png")
    (tmp_path / "bare" / "a.txt").write_text("a [V]")
    assert main(["teacher-preview", str(tmp_path / "bare"), "--teacher-background", "blur"]) == 1
    assert "teacher_background blur needs masks" in capsys.readouterr().err
