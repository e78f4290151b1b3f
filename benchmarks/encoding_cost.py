"""What encoding a large dataset costs for Z-Image-Turbo: FLOPs and bytes per image, and so for a million of them.

Counted on tensors without contents: Qwen3's language model and Qwen3-VL's tower of `authors_encoders`, and the VAE's
encoder in diffusers' own class. `python -m benchmarks.encoding_cost` writes the table of docs/scaling.md.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.authors_encoders import AuthorsEncoders
from benchmarks.counters import META
from benchmarks.report import write_scaling_table
from benchmarks.zimage_cost import STUDENT_TOKENS, vision_tokens
from dopsd_core.data.dataset import read_dataset
from dopsd_core.families import Z_IMAGE
from dopsd_core.training.shown_images import encode_request

SIDES = (512, 768, 1024)
WIDTH = 2560
BF16 = 0.4 * 790e12
"""Assumed FLOP/s of the encoders: a share of what an H200 reaches in bf16 with large products (docs/cost.md), because
images are encoded one at a time."""
FP32 = 80e12
"""Assumed FLOP/s of the VAE's convolutions, which are fp32 (in TF32, torch's default)."""
PHOTO = 1536
"""Side of the JPEG whose decoding is measured."""
IMAGES = 1_000_000


def flops_of_encoders(side: int) -> float:
    """The student's text, the image in the tower, and the teacher's text with its tokens."""
    vision = vision_tokens(side)
    encoders = AuthorsEncoders(WIDTH, True, META, torch.bfloat16)
    with FlopCounterMode(display=False) as counter:
        encoders(STUDENT_TOKENS, vision + STUDENT_TOKENS + 6, vision, WIDTH)
    return counter.get_total_flops()


def flops_of_vae(side: int) -> float:
    """The encoder of FLUX.1's VAE, which Z-Image uses."""
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

    shape: dict[str, Any] = {  # the constructor's annotations are of tuples of one
        "down_block_types": ("DownEncoderBlock2D",) * 4,
        "up_block_types": ("UpDecoderBlock2D",) * 4,
        "block_out_channels": (128, 256, 512, 512),
    }
    with torch.device(META):
        vae = AutoencoderKL(
            **shape, layers_per_block=2, latent_channels=16, use_quant_conv=False, use_post_quant_conv=False
        )
        image = torch.empty(1, 3, side, side)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        vae.encode(image)
    return counter.get_total_flops()


def bytes_of(side: int) -> int:
    """Both features in bf16, the latent in fp32."""
    latent = torch.Size(Z_IMAGE.latent_shape(side, side)).numel()
    tokens = STUDENT_TOKENS + vision_tokens(side) + STUDENT_TOKENS + 6
    return 2 * WIDTH * tokens + 4 * latent


def seconds_of_decoding(side: int, count: int = 4) -> float:
    """CPU seconds per image: checked, then loaded, as `encode` does in the process that encodes."""
    shades = np.linspace(0, 255, PHOTO, dtype=np.uint8)
    noise = np.random.default_rng(0).integers(0, 40, (PHOTO, PHOTO, 3), dtype=np.uint8)
    photo = Image.fromarray(noise + (shades[:, None, None] // 2))
    with tempfile.TemporaryDirectory() as place:
        for number in range(count):
            photo.rotate(number).save(Path(place) / f"{number}.jpg", quality=90)
            (Path(place) / f"{number}.txt").write_text("a photo", encoding="utf-8")
        began = time.process_time()
        for pair in read_dataset(place, pixel_budget=side**2, multiple=16).pairs:
            encode_request(pair, "").target.load()
        return (time.process_time() - began) / count


def table() -> str:
    """The costs as Markdown."""
    rows = []
    for side in SIDES:
        encoders, vae, size = flops_of_encoders(side), flops_of_vae(side), bytes_of(side)
        cpu, gpu = seconds_of_decoding(side), encoders / BF16 + vae / FP32
        hours = (cpu + gpu) * IMAGES / 3600
        rows.append(
            f"| {side} | {encoders / 1e12:.1f} | {vae / 1e12:.1f} | {1000 * gpu:.0f} | {1000 * cpu:.0f} | "
            f"{size / 1e6:.1f} MB | {size * IMAGES / 1e12:.1f} TB | {hours:.0f} h | {hours / 8:.0f} h |"
        )
    titles = "side", "encoders, TFLOP", "VAE, TFLOP", "GPU, ms", "decoding, ms", "an image", "1M images"
    head = f"| {' | '.join((*titles, 'on one H200', 'on eight'))} |"
    return "\n".join([head, "|---|---|---|---|---|---|---|---|---|", *rows])


def main() -> None:
    """Counts and writes the table."""
    argparse.ArgumentParser(description=__doc__).parse_args()
    write_scaling_table("encoding", table())


if __name__ == "__main__":
    main()
