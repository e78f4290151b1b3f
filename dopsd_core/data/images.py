"""Decodes image files: EXIF rotation, conversion to sRGB, resizing and cropping to a bucket.

Every image for training, for a teacher or for a thumbnail is opened here. Legend: H, W height and width of the bucket
in pixels; 3 channels, red, green, blue.
"""

from __future__ import annotations

import hashlib
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

import torch
from PIL import Image, ImageFile
from torch import Tensor

from . import png
from .buckets import Bucket, cover_box
from .colour import ColourError, Colours, colours_of, to_srgb

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
"""Suffixes of the image files that are read, in lower case."""

FORMATS = ("PNG", "JPEG", "WEBP", "BMP")
"""The Pillow decoders in use. The content determines the format, not the name; no other decoder is tried."""

MAX_PIXELS = 150_000_000
"""Maximum number of pixels of an image file. A file that claims more is a decompression bomb or a mistake."""

MAX_BYTES = 2 << 30
"""Maximum size of an image file in bytes, more than MAX_PIXELS need in any format."""

_SIXTEEN_BIT = 65535 / 255
_ORIENTATION = 0x0112
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""The inverse of each EXIF orientation."""


class ImageError(ValueError):
    """Raised for an invalid image file; the message gives the reason without the file name."""


@dataclass(frozen=True)
class Decoded:
    """A decoded image file.

    Attributes:
        image: the first frame, with EXIF rotation applied; RGB in sRGB, 8 bits per channel.
        frames: number of frames in the file.
        remarks: warnings about what could not be decoded exactly.
        alpha: the opacity as a grey image with EXIF rotation applied; None if the image is opaque everywhere.
    """

    image: Image.Image
    frames: int
    remarks: tuple[str, ...] = ()
    alpha: Image.Image | None = None


def read_image(path: Path) -> Image.Image:
    """Reads an image file as RGB in sRGB, 8 bits per channel: EXIF rotation applied, colour profile converted, alpha
    composited on white.

    Raises:
        ImageError: the file is not an image, is truncated or damaged, claims more than MAX_PIXELS pixels, or is fully
            transparent.
    """
    return decode(path).image


def decode(path: Path, draft: int | None = None) -> Decoded:
    """Like `read_image`, with the number of frames and warnings.

    draft: size of a thumbnail in pixels; a JPEG is decoded at about that size.
    """
    file = _read(path)
    try:
        parts = png.take_apart(file) if file.startswith(png.SIGNATURE) else None
        with _strict_pillow(), Image.open(BytesIO(parts.data if parts else file), formats=FORMATS) as image:
            _check_claim(image)
            if draft is not None:
                image.draft(None, (draft, draft))
            image.load()
            frames = 1 if image.format == "MPO" else getattr(image, "n_frames", 1)  # MPO: one photo and its depth
        profile = parts.profile if parts else _embedded_profile(image, file)
        colours = colours_of(image, profile, parts.coding if parts else None)
        upright, turned = _upright(image)
        rgb, converted = _converted(upright, colours)
        remarks = tuple(remark for remark in (colours.remark, converted, turned) if remark)
        alpha = _alpha(upright)
        if alpha is not None and alpha.getextrema() == (0, 0):
            raise ImageError("is fully transparent: it would be a white image; save it without transparency")
        return Decoded(rgb, frames, remarks, alpha)
    except ImageError:
        raise
    except Image.DecompressionBombError as error:
        raise ImageError(f"possibly a decompression bomb; if not, make it smaller: {error}") from error
    except Image.UnidentifiedImageError as error:
        raise ImageError("not a PNG, JPEG, WebP or BMP image, or its header is damaged") from error
    except Exception as error:  # Pillow's decoders raise nearly anything on damaged files
        raise ImageError(f"truncated or damaged: {error or type(error).__name__}") from error


def _read(path: Path) -> bytes:
    try:
        size = path.stat().st_size
        if size > MAX_BYTES:
            limit = f"more than an image of {MAX_PIXELS // 1_000_000} million pixels needs"
            raise ImageError(f"has {size / 2**30:.1f} GB, {limit}; make it smaller")
        return path.read_bytes()
    except OSError as error:
        raise ImageError(f"cannot be read: {error.strerror or error}") from error


_pillow = threading.Lock()


@contextmanager
def _strict_pillow() -> Iterator[None]:
    """Inside the `with` block, Pillow rejects truncated files and does not warn of large ones (MAX_PIXELS is checked).

    These settings are global: they are changed by one thread at a time, and only if other code has set them.
    """
    with _pillow, warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        tolerant = ImageFile.LOAD_TRUNCATED_IMAGES
        if tolerant:
            ImageFile.LOAD_TRUNCATED_IMAGES = False
        try:
            yield
        finally:
            if tolerant:
                ImageFile.LOAD_TRUNCATED_IMAGES = True


def _check_claim(image: Image.Image) -> None:
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise ImageError(
            f"claims {width}x{height} pixels, more than {MAX_PIXELS // 1_000_000} million: "
            "possibly a decompression bomb; if not, make it smaller"
        )


def _embedded_profile(image: Image.Image, file: bytes) -> bytes | None:
    """The colour profile of a file that is not a PNG; empty if it is incomplete."""
    if image.format == "BMP":
        return _bmp_profile(file)
    return (image.info["icc_profile"] or b"") if "icc_profile" in image.info else None


def _bmp_profile(file: bytes) -> bytes | None:
    """The profile of a BMP with a version 5 header: at offset 112, counted from the header."""
    start = 14
    if len(file) < start + 124 or int.from_bytes(file[14:18], "little") < 124 or file[70:74] not in (b"DEBM", b"KNIL"):
        return None
    place, size = (int.from_bytes(file[at : at + 4], "little") for at in (start + 112, start + 116))
    embedded = file[start + place : start + place + size]
    return embedded if file[70:74] == b"DEBM" and len(embedded) == size else b""


def _upright(image: Image.Image) -> tuple[Image.Image, str]:
    """(the image with EXIF rotation applied, a warning if EXIF cannot be read)."""
    try:
        method = _UPRIGHT.get(image.getexif().get(_ORIENTATION, 1))
    except Exception:  # damaged EXIF raises nearly anything
        return image, "its EXIF data is damaged: a rotation in it is not applied"
    return (image if method is None else image.transpose(method)), ""


def _alpha(image: Image.Image) -> Image.Image | None:
    if image.mode.startswith("I") or not image.has_transparency_data:
        return None
    alpha = image.convert("RGBA").getchannel("A")
    return None if alpha.getextrema() == (255, 255) else alpha


def _converted(image: Image.Image, colours: Colours) -> tuple[Image.Image, str]:
    """(RGB in sRGB, a warning if its profile cannot be applied)."""
    if colours.profile is not None:
        try:
            return to_rgb(image, colours.profile), ""
        except ColourError as error:
            return to_rgb(image), f"its colour profile is not used ({error}): its colours are taken as sRGB"
    return to_rgb(image), ""


def to_rgb(image: Image.Image, profile: bytes | None = None) -> Image.Image:
    """Converts an image of any Pillow mode to RGB: alpha composited on white, 16-bit grey scaled to 8 bits.

    profile: the ICC profile of its values; None for sRGB.

    Raises:
        ColourError: the profile cannot be applied.
    """
    if image.mode.startswith("I"):
        image = _scale_sixteen_bit(image)
    alpha = image.convert("RGBA").getchannel("A") if image.has_transparency_data else None
    if profile is None:
        rgb = image.convert("RGB")
    else:
        plain = image if image.mode == "CMYK" else image.convert("L" if image.mode in ("1", "L", "LA") else "RGB")
        rgb = to_srgb(plain, profile)
    if alpha is None:
        return rgb
    rgba = rgb.convert("RGBA")
    rgba.putalpha(alpha)
    white = Image.new("RGBA", rgba.size, (255, 255, 255, 255))
    return Image.alpha_composite(white, rgba).convert("RGB")


def load_image(path: Path, bucket: Bucket) -> Tensor:
    """Reads an image file, resized and cropped to its bucket: [3, H, W] fp32 in [0, 1].

    Raises:
        ImageError: as in `read_image`.
    """
    return to_tensor(fit(read_image(path), bucket))


def fit(image: Image.Image, bucket: Bucket) -> Image.Image:
    """Resizes an image to cover the bucket and center-crops it; an image of the bucket's size is unchanged."""
    size = (bucket.width, bucket.height)
    if image.size == size:
        return image
    return image.resize(size, Image.Resampling.BICUBIC, box=cover_box(image.width, image.height, bucket))


def to_tensor(image: Image.Image) -> Tensor:
    """Converts an RGB image to [3, H, W] fp32 in [0, 1]."""
    flat = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
    return flat.view(image.height, image.width, 3).permute(2, 0, 1).float().div(255)


def pixel_digest(image: Image.Image) -> str:
    """A digest that is equal for images of the same size and pixels, from any file."""
    return hashlib.sha256(f"{image.mode} {image.size}".encode() + image.tobytes()).hexdigest()


def _scale_sixteen_bit(image: Image.Image) -> Image.Image:
    """16-bit grey (Pillow's I;16 modes, or I in its older releases) as 8-bit grey, rounded to nearest."""
    wide = torch.frombuffer(bytearray(image.convert("I").tobytes()), dtype=torch.int32)
    narrow = wide.double().div(_SIXTEEN_BIT).round().clamp(0, 255).to(torch.uint8)
    return Image.frombytes("L", image.size, narrow.numpy().tobytes())
