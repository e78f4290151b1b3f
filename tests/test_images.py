"""Every kind of image becomes the RGB image that a viewer shows."""

from pathlib import Path

import pytest
import torch
from PIL import Image, ImageFile

from dopsd_core.data.buckets import Bucket
from dopsd_core.data.images import ImageError, decode, fit, load_image, pixel_digest, read_image, to_rgb, to_tensor


def saved(tmp_path: Path, image: Image.Image, name: str = "a.png", **save: object) -> Image.Image:
    image.save(tmp_path / name, **save)  # type: ignore[arg-type]
    return read_image(tmp_path / name)


@pytest.mark.parametrize(
    "value, expected", [(0, 0), (128, 0), (129, 1), (257, 1), (32896, 128), (40000, 156), (65535, 255)]
)
def test_sixteen_bits_are_scaled_not_cut(tmp_path: Path, value: int, expected: int) -> None:
    assert saved(tmp_path, Image.new("I;16", (3, 2), value)).getpixel((2, 1)) == (expected,) * 3


def test_the_older_mode_for_sixteen_bits() -> None:
    assert to_rgb(Image.new("I", (2, 2), 40000)).getpixel((0, 0)) == (156,) * 3


def test_transparency_lies_on_white(tmp_path: Path) -> None:
    half = Image.new("RGBA", (2, 2), (10, 20, 30, 0))
    half.putpixel((1, 0), (10, 20, 30, 255))
    image = saved(tmp_path, half)
    assert image.getpixel((0, 0)) == (255, 255, 255) and image.getpixel((1, 0)) == (10, 20, 30)
    assert saved(tmp_path, Image.new("LA", (2, 2), (0, 128))).getpixel((0, 0)) == (127, 127, 127)
    palette = Image.new("P", (2, 1))
    palette.putpalette([200, 0, 0, 0, 0, 200])
    palette.putpixel((1, 0), 1)
    image = saved(tmp_path, palette, transparency=0)
    assert image.getpixel((0, 0)) == (255, 255, 255) and image.getpixel((1, 0)) == (0, 0, 200)
    keyed = Image.new("RGB", (2, 2), (9, 8, 7))
    keyed.putpixel((1, 0), (9, 8, 6))
    image = saved(tmp_path, keyed, transparency=(9, 8, 7))
    assert image.getpixel((0, 0)) == (255, 255, 255) and image.getpixel((1, 0)) == (9, 8, 6)


def test_a_fully_transparent_image_is_refused(tmp_path: Path) -> None:
    keyed = tmp_path / "keyed.png"
    Image.new("RGB", (2, 2), (9, 8, 7)).save(keyed, transparency=(9, 8, 7))
    Image.new("RGBA", (2, 2)).save(tmp_path / "a.png")
    Image.new("LA", (2, 2)).save(tmp_path / "b.png")
    for path in (keyed, tmp_path / "a.png", tmp_path / "b.png"):
        with pytest.raises(ImageError, match="is fully transparent"):
            read_image(path)


def test_palette_grey_and_cmyk(tmp_path: Path) -> None:
    palette = Image.new("P", (2, 1))
    palette.putpalette([200, 0, 0, 0, 0, 200])
    assert saved(tmp_path, palette).getpixel((0, 0)) == (200, 0, 0)
    assert saved(tmp_path, Image.new("L", (2, 2), 77)).getpixel((0, 0)) == (77, 77, 77)
    assert saved(tmp_path, Image.new("1", (2, 2), 1)).getpixel((0, 0)) == (255, 255, 255)
    red, green, blue = saved(tmp_path, Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "a.jpg").getpixel((4, 4))  # type: ignore[misc]
    assert red > 240 and green < 15 and blue < 15


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_rotation(tmp_path: Path, orientation: int) -> None:
    upright = Image.new("RGB", (4, 2), (255, 255, 255))
    upright.putpixel((0, 0), (255, 0, 0))
    undo = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # Pillow's transpositions that the orientation asks to be undone
    stored = upright.transpose(Image.Transpose(undo[orientation])) if orientation > 1 else upright
    exif = Image.Exif()
    exif[0x0112] = orientation
    assert pixel_digest(saved(tmp_path, stored, exif=exif)) == pixel_digest(upright)


def test_truncation_is_never_hidden(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)  # as other code of a process may set it
    path = tmp_path / "a.jpg"
    Image.effect_noise((200, 200), 90).convert("RGB").save(path)
    path.write_bytes(path.read_bytes()[:3000])
    with pytest.raises(ImageError, match="truncated"):
        read_image(path)
    assert ImageFile.LOAD_TRUNCATED_IMAGES is True


def test_the_content_decides_not_the_name(tmp_path: Path) -> None:
    Image.new("RGB", (2, 2), (1, 2, 3)).save(tmp_path / "a.jpg", format="PNG")
    assert read_image(tmp_path / "a.jpg").getpixel((0, 0)) == (1, 2, 3)
    Image.new("RGB", (2, 2)).save(tmp_path / "b.png", format="TIFF")
    with pytest.raises(ImageError, match="not a PNG"):
        read_image(tmp_path / "b.png")


def test_tensors(tmp_path: Path) -> None:
    image = Image.new("RGB", (3, 2), (0, 51, 255))
    image.putpixel((2, 1), (255, 0, 0))
    tensor = to_tensor(image)
    assert tensor.shape == (3, 2, 3) and tensor.dtype == torch.float32
    torch.testing.assert_close(tensor[:, 0, 0], torch.tensor([0, 0.2, 1]))
    torch.testing.assert_close(tensor[:, 1, 2], torch.tensor([1.0, 0, 0]))
    image.save(tmp_path / "a.png")
    assert load_image(tmp_path / "a.png", Bucket(32, 16)).shape == (3, 16, 32)


def test_fitting_cuts_equally_and_keeps_an_exact_fit() -> None:
    wide = Image.new("RGB", (96, 32), (0, 0, 0))
    wide.paste((255, 255, 255), (32, 0, 64, 32))
    assert to_tensor(fit(wide, Bucket(32, 32))).min() == 1
    assert fit(wide, Bucket(96, 32)) is wide
    halved = to_tensor(fit(wide, Bucket(16, 16)))
    assert halved.shape == (3, 16, 16) and halved[:, :, 2:-2].min() == 1


def test_a_phone_image_with_a_second_one_inside(tmp_path: Path) -> None:
    first, second = Image.new("RGB", (8, 8), (250, 0, 0)), Image.new("RGB", (8, 8), (0, 0, 250))
    first.save(tmp_path / "a.jpg", format="MPO", save_all=True, append_images=[second])
    decoded = decode(tmp_path / "a.jpg")
    assert decoded.frames == 1 and decoded.image.getpixel((4, 4))[0] > 240  # type: ignore[index]
