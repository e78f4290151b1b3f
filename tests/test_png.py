"""What a PNG says besides its pixels does not keep it from being read, and never fills the memory."""

import struct
import threading
import tracemalloc
import zlib
from pathlib import Path

import pytest
from PIL import Image, ImageFile, PngImagePlugin

from dopsd_core.data import png
from dopsd_core.data.images import ImageError, decode, read_image

from .profiles import P3_D50, exif, in_srgb, rgb_profile

RED = (200, 60, 40)
LONG = "x" * (3 << 20)


def with_text(path: Path, write, **save: object) -> Path:
    info = PngImagePlugin.PngInfo()
    write(info)
    Image.new("RGB", (8, 4), RED).save(path, pnginfo=info, **save)  # type: ignore[arg-type]
    return path


def chunk(name: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))


def inserted(path: Path, *chunks: bytes, size: tuple[int, int] = (8, 4)) -> Path:
    """A PNG with further chunks right after its header."""
    Image.new("RGB", size, RED).save(path)
    data = path.read_bytes()
    path.write_bytes(data[:33] + b"".join(chunks) + data[33:])
    return path


@pytest.mark.parametrize(
    "write",
    [
        lambda info: info.add_text("workflow", LONG, zip=True),
        lambda info: info.add_text("workflow", LONG),
        lambda info: info.add_itxt("XML:com.adobe.xmp", LONG, zip=True),
        lambda info: info.add_itxt("XML:com.adobe.xmp", LONG),
        lambda info: [info.add_text(f"part {number}", "x" * 900_000, zip=True) for number in range(80)],
    ],
    ids=["zTXt", "tEXt", "iTXt deflated", "iTXt", "many"],
)
def test_long_text_is_left_out(tmp_path: Path, write) -> None:
    limits = PngImagePlugin.MAX_TEXT_CHUNK, PngImagePlugin.MAX_TEXT_MEMORY
    assert read_image(with_text(tmp_path / "a.png", write)).getpixel((7, 3)) == RED
    assert limits == (PngImagePlugin.MAX_TEXT_CHUNK, PngImagePlugin.MAX_TEXT_MEMORY)


def test_text_after_the_pixels_is_left_out(tmp_path: Path) -> None:
    Image.new("RGB", (8, 4), RED).save(tmp_path / "a.png")
    data = (tmp_path / "a.png").read_bytes()
    (tmp_path / "a.png").write_bytes(data[:-12] + chunk(b"zTXt", b"a\0\0" + zlib.compress(LONG.encode())) + data[-12:])
    assert read_image(tmp_path / "a.png").getpixel((7, 3)) == RED


@pytest.mark.parametrize("key", [b"zTXt", b"iTXt", b"iCCP"])
def test_what_inflates_to_far_more_is_never_inflated(tmp_path: Path, key: bytes) -> None:
    deflate = zlib.compressobj(1)
    bomb = b"".join(deflate.compress(bytes(1 << 20)) for _ in range(200)) + deflate.flush()
    names = {b"zTXt": b"a\0\0", b"iTXt": b"XML:com.adobe.xmp\0\1\0\0\0", b"iCCP": b"a\0\0"}
    path = inserted(tmp_path / "a.png", chunk(key, names[key] + bomb))
    tracemalloc.start()
    try:
        decoded = decode(path)
        assert tracemalloc.get_traced_memory()[1] < 3 * png.MAX_PROFILE
    finally:
        tracemalloc.stop()
    assert decoded.image.getpixel((7, 3)) == RED
    assert ("profile is damaged" in "".join(decoded.remarks)) == (key == b"iCCP")


def test_a_large_profile_is_used(tmp_path: Path) -> None:
    profile = rgb_profile() + bytes(4 << 20)  # as large as a printer's, too large for Pillow
    path = inserted(tmp_path / "a.png", chunk(b"iCCP", b"P3\0\0" + zlib.compress(profile)))
    decoded = decode(path)
    assert decoded.remarks == () and decoded.image.getpixel((0, 0)) != RED
    red = in_srgb(RED, P3_D50, 2.2)
    assert max(abs(a - b) for a, b in zip(decoded.image.getpixel((0, 0)), red, strict=True)) <= 1  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "data", [b"", b"P3", b"P3\0", b"P3\0\1xx", b"P3\0\0no zlib", b"P3\0\0" + zlib.compress(b"x")[:-3]]
)
def test_a_broken_profile_is_remarked_on(tmp_path: Path, data: bytes) -> None:
    decoded = decode(inserted(tmp_path / "a.png", chunk(b"iCCP", data)))
    assert decoded.image.getpixel((0, 0)) == RED and "profile is damaged" in decoded.remarks[0]


def test_the_orientation_in_a_text_still_counts(tmp_path: Path) -> None:
    xmp = f'<x tiff:Orientation="6"/>{LONG}'
    for zip in (False, True):
        path = with_text(tmp_path / "a.png", lambda info, zip=zip: info.add_itxt("XML:com.adobe.xmp", xmp, zip=zip))
        assert read_image(path).size == (4, 8)
    raw = exif(orientation=6)[6:].hex()
    written = f"\nexif\n{len(raw) // 2:8}\n{raw}\n"
    for zip in (False, True):
        path = with_text(
            tmp_path / "a.png", lambda info, zip=zip: info.add_text("Raw profile type exif", written, zip=zip)
        )
        assert read_image(path).size == (4, 8)
    assert read_image(with_text(tmp_path / "a.png", lambda info: None, exif=exif(orientation=6))).size == (4, 8)


def test_animations_and_palettes_survive(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (8, 4), (shade, 0, 0)) for shade in (9, 90, 200)]
    info = PngImagePlugin.PngInfo()
    info.add_text("comment", LONG, zip=True)
    frames[0].save(tmp_path / "a.png", save_all=True, append_images=frames[1:], pnginfo=info)
    decoded = decode(tmp_path / "a.png")
    assert decoded.frames == 3 and decoded.image.getpixel((0, 0)) == (9, 0, 0)


def test_damage_is_still_found(tmp_path: Path) -> None:
    path = with_text(tmp_path / "a.png", lambda info: info.add_text("a", LONG, zip=True))
    Image.effect_noise((64, 64), 90).save(path)
    whole = path.read_bytes()
    for data in (whole[:40], whole[: len(whole) // 2], whole[:60] + b"\0" * 99 + whole[160:], png.SIGNATURE):
        path.write_bytes(data)
        with pytest.raises(ImageError):
            read_image(path)


def test_settings_of_the_process_stay_as_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = with_text(tmp_path / "a.png", lambda info: info.add_text("a", LONG, zip=True))
    truncated = tmp_path / "b.jpg"
    Image.effect_noise((200, 200), 90).convert("RGB").save(truncated)
    truncated.write_bytes(truncated.read_bytes()[:3000])
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    wrong: list[object] = []

    def read_both() -> None:
        for _ in range(10):
            try:
                wrong.append(read_image(truncated))
            except ImageError:
                read_image(path)

    threads = [threading.Thread(target=read_both) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong and ImageFile.LOAD_TRUNCATED_IMAGES is True


def test_what_other_formats_say_at_length(tmp_path: Path) -> None:
    noise = Image.effect_noise((64, 64), 9).convert("RGB")
    noise.save(tmp_path / "a.jpg", exif=exif(orientation=6) + bytes(60_000), comment=b"x" * 60_000, xmp=b"y" * 60_000)
    noise.save(tmp_path / "b.jpg", icc_profile=rgb_profile() + bytes(2 << 20))
    noise.save(tmp_path / "a.webp", exif=exif(orientation=6) + bytes(4 << 20), xmp=b"y" * (4 << 20))
    for name in ("a.jpg", "b.jpg", "a.webp"):
        assert decode(tmp_path / name).remarks == ()


def test_a_file_larger_than_any_image_is_not_read(tmp_path: Path) -> None:
    with (tmp_path / "a.png").open("wb") as file:
        file.truncate(50 << 30)  # takes no room on the disk
    with pytest.raises(ImageError, match="has 50.0 GB"):
        read_image(tmp_path / "a.png")
