"""An image is trained on in the colours that viewers show, whatever its file says of them."""

import struct
from pathlib import Path

import pytest
from PIL import Image, ImageCms, PngImagePlugin

from dopsd_core.data import colour, icc
from dopsd_core.data.images import Decoded, decode, pixel_digest
from dopsd_core.image_grid import thumbnails

from .profiles import ADOBE_D50, P3_D50, SRGB_D50, cmyk_profile, exif, grey_profile, in_srgb, rgb_profile
from .written import only, pair, read

RED = (200, 60, 40)


def opened(path: Path, image: Image.Image, **save: object) -> Decoded:
    image.save(path, **save)  # type: ignore[arg-type]
    return decode(path)


def near(found: object, wanted: tuple[int, ...], by: int = 1) -> bool:
    return max(abs(a - b) for a, b in zip(found, wanted, strict=True)) <= by  # type: ignore[call-overload]


@pytest.mark.parametrize("primaries", [P3_D50, ADOBE_D50])
@pytest.mark.parametrize("save", [("a.png", {}), ("a.webp", {"lossless": True}), ("a.jpg", {"quality": 100})])
def test_wide_gamuts_become_srgb(tmp_path: Path, primaries: tuple, save: tuple) -> None:
    name, how = save
    decoded = opened(tmp_path / name, Image.new("RGB", (16, 16), RED), icc_profile=rgb_profile(primaries), **how)
    assert decoded.remarks == ()
    assert near(decoded.image.getpixel((8, 8)), in_srgb(RED, primaries, 2.2), 2)
    assert not near(decoded.image.getpixel((8, 8)), RED, 10)


def test_known_values_of_display_p3_and_adobe_rgb(tmp_path: Path) -> None:
    for primaries, wanted in ((P3_D50, (219, 37, 13)), (ADOBE_D50, (231, 57, 34))):
        decoded = opened(tmp_path / "a.png", Image.new("RGB", (4, 4), RED), icc_profile=rgb_profile(primaries))
        assert near(decoded.image.getpixel((0, 0)), wanted)


@pytest.mark.parametrize(
    "profile",
    [
        ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes(),
        icc.make_profile(icc.SRGB, icc.SRGB_CURVE),
    ],
)
def test_an_srgb_profile_changes_no_bit(tmp_path: Path, profile: bytes) -> None:
    noise = Image.merge("RGB", [Image.effect_noise((64, 64), 90) for _ in range(3)])
    decoded = opened(tmp_path / "a.png", noise, icc_profile=profile)
    assert pixel_digest(decoded.image) == pixel_digest(noise) and decoded.remarks == ()


def test_transparency_is_kept_apart_from_colours(tmp_path: Path) -> None:
    red = in_srgb(RED, P3_D50, 2.2)
    for alpha in (1, 128, 255):
        decoded = opened(tmp_path / "a.png", Image.new("RGBA", (4, 4), (*RED, alpha)), icc_profile=rgb_profile())
        wanted = tuple(round((c * alpha + 255 * (255 - alpha)) / 255) for c in red)
        assert near(decoded.image.getpixel((0, 0)), wanted, 2)
    keyed = Image.new("RGB", (2, 1), RED)
    keyed.putpixel((1, 0), (9, 8, 7))
    decoded = opened(tmp_path / "a.png", keyed, icc_profile=rgb_profile(), transparency=(9, 8, 7))
    assert near(decoded.image.getpixel((0, 0)), red) and decoded.image.getpixel((1, 0)) == (255, 255, 255)


def test_palettes_and_greys(tmp_path: Path) -> None:
    palette = Image.new("P", (4, 4))
    palette.putpalette(RED)
    decoded = opened(tmp_path / "a.png", palette, icc_profile=rgb_profile())
    assert near(decoded.image.getpixel((0, 0)), in_srgb(RED, P3_D50, 2.2))
    wanted = in_srgb((100,) * 3, SRGB_D50, 1.0)
    for mode, value in (("L", 100), ("I;16", 25700), ("LA", (100, 255))):
        decoded = opened(tmp_path / "a.png", Image.new(mode, (4, 4), value), icc_profile=grey_profile(1.0))
        assert near(decoded.image.getpixel((0, 0)), wanted) and decoded.remarks == (), mode
    decoded = opened(tmp_path / "a.png", Image.new("L", (4, 4), 100), icc_profile=rgb_profile(P3_D50, 1.0))
    assert near(decoded.image.getpixel((0, 0)), wanted)


def test_inks_are_converted_by_their_profile(tmp_path: Path) -> None:
    def printed(*inks: int) -> object:
        image = Image.new("CMYK", (16, 16), inks)
        decoded = opened(tmp_path / "a.jpg", image, icc_profile=cmyk_profile(), quality=100)
        assert decoded.remarks == ()
        return decoded.image.getpixel((8, 8))

    assert near(printed(0, 0, 0, 0), (255,) * 3) and near(printed(0, 0, 0, 255), (0,) * 3)
    assert near(printed(255, 0, 0, 0), (162,) * 3, 3)  # L* of 66.7
    plain = opened(tmp_path / "a.jpg", Image.new("CMYK", (16, 16), (255, 0, 0, 0)))
    assert "CMYK without a colour profile" in plain.remarks[0]


@pytest.mark.parametrize(
    ("mode", "profile", "why"),
    [
        ("RGB", b"no profile at all" * 20, "is not used"),
        ("RGB", rgb_profile()[:200], "is not used"),
        ("RGB", grey_profile(1.0), "it is for GRAY images, this one is RGB"),
        ("RGB", cmyk_profile(), "it is for CMYK images, this one is RGB"),
        ("CMYK", rgb_profile(), "it is for RGB images, this one is CMYK"),
    ],
)
def test_a_profile_that_cannot_be_used_is_a_warning(tmp_path: Path, mode: str, profile: bytes, why: str) -> None:
    path = pair(tmp_path, "a.jpg", mode=mode, colour=(9, 9, 9) if mode == "RGB" else (9, 9, 9, 9))
    Image.new(mode, (64, 64), (9, 9, 9) if mode == "RGB" else (9, 9, 9, 9)).save(path, icc_profile=profile)
    report = read(tmp_path)
    only(report.problems, path, None, "its colour profile", why, "taken as sRGB")
    assert report.problems[0].severity == "warning" and len(report.pairs) == 1


def test_an_incomplete_profile_of_a_jpeg(tmp_path: Path) -> None:
    path = tmp_path / "a.jpg"
    Image.new("RGB", (16, 16), RED).save(path, icc_profile=rgb_profile() + bytes(70_000))  # two segments
    data = path.read_bytes()
    second = data.index(b"ICC_PROFILE\0\2")
    path.write_bytes(data[: second - 4] + data[second - 2 + int.from_bytes(data[second - 2 : second], "big") :])
    assert "its colour profile is damaged" in decode(path).remarks[0]


def test_numbers_instead_of_a_profile(tmp_path: Path) -> None:
    def with_chunks(**chunks: bytes) -> Decoded:
        info = PngImagePlugin.PngInfo()
        for name, data in chunks.items():
            info.add(name.encode(), data)
        return opened(tmp_path / "a.png", Image.new("RGB", (4, 4), RED), pnginfo=info)

    srgb = struct.pack(">8I", 31270, 32900, 64000, 33000, 30000, 60000, 15000, 6000)
    p3 = struct.pack(">8I", 31270, 32900, 68000, 32000, 26500, 69000, 15000, 6000)
    assert with_chunks(gAMA=struct.pack(">I", 45455), cHRM=srgb).image.getpixel((0, 0)) == RED
    assert with_chunks(gAMA=struct.pack(">I", 100000), sRGB=b"\0").image.getpixel((0, 0)) == RED
    linear = with_chunks(gAMA=struct.pack(">I", 100000))
    assert near(linear.image.getpixel((0, 0)), in_srgb(RED, SRGB_D50, 1.0)) and "gAMA" in linear.remarks[0]
    wide = with_chunks(gAMA=struct.pack(">I", 55556), cHRM=p3)
    assert near(wide.image.getpixel((0, 0)), in_srgb(RED, P3_D50, 1.8), 2)
    for senseless in (bytes(32), struct.pack(">8I", *[31270, 32900] * 4)):
        assert "make no sense" in with_chunks(cHRM=senseless).remarks[0]
    coded = with_chunks(cICP=bytes((12, 4, 0, 1)))
    assert near(coded.image.getpixel((0, 0)), in_srgb(RED, P3_D50, 2.2), 2) and coded.remarks == ()
    assert with_chunks(cICP=bytes((1, 13, 0, 1))).image.getpixel((0, 0)) == RED
    assert "12/16/0/1 (cICP), which is not read" in with_chunks(cICP=bytes((12, 16, 0, 1))).remarks[0]


@pytest.mark.parametrize(
    ("how", "converted", "remark"),
    [
        ({"space": 1}, False, ""),
        ({"space": 1, "index": "R98"}, False, ""),
        ({"space": 2}, True, "from Adobe RGB"),
        ({"space": 0xFFFF, "index": "R03", "orientation": 6}, True, "from Adobe RGB"),
        ({"space": 0xFFFF}, False, "not sRGB, and it has no colour profile"),
    ],
)
def test_what_exif_says_where_there_is_no_profile(tmp_path: Path, how: dict, converted: bool, remark: str) -> None:
    decoded = opened(tmp_path / "a.png", Image.new("RGB", (8, 4), RED), exif=exif(**how))
    assert near(decoded.image.getpixel((0, 0)), in_srgb(RED, ADOBE_D50, 2.2) if converted else RED, 2)
    assert remark in "".join(decoded.remarks) and bool(remark) == bool(decoded.remarks)
    assert decoded.image.size == ((4, 8) if "orientation" in how else (8, 4))
    profiled = opened(tmp_path / "a.png", Image.new("RGB", (8, 4), RED), exif=exif(**how), icc_profile=rgb_profile())
    assert near(profiled.image.getpixel((0, 0)), in_srgb(RED, P3_D50, 2.2)) and profiled.remarks == ()


def test_the_profile_of_a_bitmap(tmp_path: Path) -> None:
    Image.new("RGB", (4, 4), RED).save(tmp_path / "a.bmp")
    plain, profile = (tmp_path / "a.bmp").read_bytes(), rgb_profile()
    pixels = plain[54:]
    head = struct.pack("<I", 124) + plain[18:54] + bytes(16) + b"DEBM" + bytes(48)
    head += struct.pack("<IIII", 4, 124 + len(pixels), len(profile), 0)
    start = 14 + len(head)
    whole = b"BM" + struct.pack("<IHHI", start + len(pixels) + len(profile), 0, 0, start) + head + pixels + profile
    (tmp_path / "a.bmp").write_bytes(whole)
    assert near(decode(tmp_path / "a.bmp").image.getpixel((0, 0)), in_srgb(RED, P3_D50, 2.2))
    (tmp_path / "a.bmp").write_bytes(whole[:-9])
    assert "its colour profile is damaged" in decode(tmp_path / "a.bmp").remarks[0]


def test_thumbnails_have_the_same_colours(tmp_path: Path) -> None:
    Image.new("RGB", (64, 64), RED).save(tmp_path / "a.png", icc_profile=rgb_profile())
    colours = {value for _, value in thumbnails([(tmp_path / "a.png", "")], tile=64).getcolors(1 << 24) or ()}
    assert decode(tmp_path / "a.png").image.getpixel((0, 0)) in colours and RED not in colours


def test_written_profiles_mean_what_they_say() -> None:
    for primaries, corners in ((icc.DISPLAY_P3, P3_D50), (icc.ADOBE_RGB, ADOBE_D50), (icc.SRGB, SRGB_D50)):
        image = Image.new("RGB", (1, 1), RED)
        found = colour.to_srgb(image, icc.make_profile(primaries, 1.8)).getpixel((0, 0))
        assert near(found, in_srgb(RED, corners, 1.8))
