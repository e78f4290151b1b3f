"""Cost of a D-OPSD step on Z-Image at its real size with random weights: time, peak memory, FLOPs.

    python -m benchmarks.zimage_cost                                            on CUDA: everything, about 7 minutes
    python -m benchmarks.zimage_cost --device meta                              counted at full size, without a GPU
    python -m benchmarks.zimage_cost --device cpu --layers 2 --heads 4 --encoder-layers 1 --rollout-steps 2 \
--resolutions 256 --steps 1                                                     reduced in size, a minute

What is measured and how: benchmarks/real_size.py.
"""

from __future__ import annotations

from benchmarks import networks, real_size
from benchmarks.real_step import Subject
from dopsd_core.families import Z_IMAGE

TARGETS = {
    ("none", 1024): "H200: <= 1.5 s",
    ("all", 1024): "H200: <= 2.0 s; steps/s >= 1.5 x the authors', peak <= half of theirs",
    ("24 GB", 1024): "< 20 GB",
    ("24 GB, offloading", 1024): "< 20 GB, repeated <= 10%, less time than 24 GB",
    ("16 GB, offloading", 1024): "< 15 GB, repeated <= 10%, less time than 16 GB",
    ("16 GB", 1024): "< 15 GB",
    ("12 GB", 768): "< 11.5 GB",
    ("8 GB", 512): "< 7.6 GB",
}
PRESETS = (("24 GB", 1024, 64, False), ("16 GB", 1024, 64, True), ("12 GB", 768, 32, True), ("8 GB", 512, 16, True))
STUDENT_TOKENS = 64


def vision_tokens(side: int) -> int:
    """One per 32 x 32 pixels of the image as the tower sees it."""
    return (min(max(side, 512), 768) // 32) ** 2


def subject(layers: int = 30, heads: int = 30) -> Subject:
    """Z-Image of so many main blocks and width 128 * `heads`."""

    def denoiser():
        from dopsd_core.standalone.hosts.z_image import z_image

        return z_image(layers, heads)

    return Subject(
        family=Z_IMAGE,
        size=f"Z-Image, {layers} layers of 30, width {128 * heads} of 3840",
        comfyui=networks.z_image(layers, heads),
        diffusers=denoiser,
        context=2560,
        texts=lambda side: (STUDENT_TOKENS, vision_tokens(side) + STUDENT_TOKENS + 6),
        vision=vision_tokens,
        encoder=2560,
        targets=TARGETS,
        presets=PRESETS,
    )


def main() -> None:
    """Measures the model that the arguments describe."""
    parser = real_size.parser(__doc__)
    parser.add_argument("--layers", type=int, default=30, help="main blocks; the real model has 30")
    parser.add_argument("--heads", type=int, default=30, help="of 128; the real model has 30")
    args = parser.parse_args()
    real_size.run(subject(args.layers, args.heads), args)


if __name__ == "__main__":
    main()
