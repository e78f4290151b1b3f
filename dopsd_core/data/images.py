"""Pixels of one picture file: decoded whole, turned upright, converted to RGB, fitted to a bucket.

Legend: H, W rows and columns of the bucket in pixels; 3 channels, red, green, blue.
"""

from __future__ import annotations

import hashlib
import warnings
from pathlib import Path

import torch
from PIL import Image, ImageFile, ImageOps
from torch import Tensor

from .buckets import Bucket, cover_box

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
"""Picture files that are read, by the end of their names in lower case."""

FORMATS = ("PNG", "JPEG", "WEBP", "BMP")
"""Pillow's decoders for them; the content decides, not the name, and nothing else is ever tried."""

MAX_PIXELS = 150_000_000
"""The most pixels of a source picture. A file that claims more is a decompression bomb or a mistake."""

_SIXTEEN_BIT = 65535 / 255


class ImageError(ValueError):
    """A picture that cannot be used; the message says why, without the file's name."""


def read_image(path: Path) -> Image.Image:
    """A picture file as an upright RGB picture: EXIF rotation applied, alpha flattened on white, 8 bits a channel.

    Raises:
        ImageError: the file is no picture, is truncated or damaged, or claims more than MAX_PIXELS pixels.
    """
    return decode(path)[0]


def decode(path: Path) -> tuple[Image.Image, int]:
    """As `read_image`, with the number of frames of the file; the picture is the first one."""
    tolerant = ImageFile.LOAD_TRUNCATED_IMAGES
    ImageFile.LOAD_TRUNCATED_IMAGES = False  # other code of the process may switch it on: half a picture would pass
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # MAX_PIXELS is the limit here
            with Image.open(path, formats=FORMATS) as image:
                _check_claim(image)
                image.load()
                frames = 1 if image.format == "MPO" else getattr(image, "n_frames", 1)  # MPO: one photo and its depth
                return to_rgb(ImageOps.exif_transpose(image)), frames
    except ImageError:
        raise
    except Image.DecompressionBombError as error:
        raise ImageError(f"a decompression bomb, or make it smaller: {error}") from error
    except Image.UnidentifiedImageError as error:
        raise ImageError("not a PNG, JPEG, WebP or BMP picture, or its beginning is damaged") from error
    except Exception as error:  # Pillow's decoders raise nearly anything on damaged files
        raise ImageError(f"truncated or damaged: {error or type(error).__name__}") from error
    finally:
        ImageFile.LOAD_TRUNCATED_IMAGES = tolerant


def _check_claim(image: Image.Image) -> None:
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise ImageError(
            f"it claims {width}x{height} pixels, more than {MAX_PIXELS // 1_000_000} million: "
            "a decompression bomb, or make it smaller"
        )


def to_rgb(image: Image.Image) -> Image.Image:
    """A picture of any Pillow mode as RGB: transparency on white, 16-bit grey scaled to 8 bits rather than cut."""
    if image.mode.startswith("I"):
        return _scale_sixteen_bit(image).convert("RGB")
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        white = Image.new("RGBA", rgba.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, rgba).convert("RGB")
    return image.convert("RGB")


def load_image(path: Path, bucket: Bucket) -> Tensor:
    """A picture file fitted to its bucket, [3, H, W] fp32 in [0, 1].

    Raises:
        ImageError: as `read_image`.
    """
    return to_tensor(fit(read_image(path), bucket))


def fit(image: Image.Image, bucket: Bucket) -> Image.Image:
    """Cover-resize and centre crop to the bucket; a picture of its very size keeps every pixel."""
    size = (bucket.width, bucket.height)
    if image.size == size:
        return image
    return image.resize(size, Image.Resampling.BICUBIC, box=cover_box(image.width, image.height, bucket))


def to_tensor(image: Image.Image) -> Tensor:
    """An RGB picture as [3, H, W] fp32 in [0, 1]."""
    flat = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
    return flat.view(image.height, image.width, 3).permute(2, 0, 1).float().div(255)


def pixel_digest(image: Image.Image) -> str:
    """Equal for pictures of the same size and the same pixels, whatever file they came from."""
    return hashlib.sha256(f"{image.mode} {image.size}".encode() + image.tobytes()).hexdigest()


def _scale_sixteen_bit(image: Image.Image) -> Image.Image:
    """16-bit grey (Pillow's I;16 modes, or I in its older releases) as 8-bit grey, rounded to nearest."""
    wide = torch.frombuffer(bytearray(image.convert("I").tobytes()), dtype=torch.int32)
    narrow = wide.double().div(_SIXTEEN_BIT).round().clamp(0, 255).to(torch.uint8)
    return Image.frombytes("L", image.size, narrow.numpy().tobytes())
