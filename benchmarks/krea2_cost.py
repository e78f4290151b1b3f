"""Cost of a D-OPSD step on Krea 2 Turbo at its real size with random weights: time, peak memory, FLOPs.

    python -m benchmarks.krea2_cost                                             on CUDA: everything
    python -m benchmarks.krea2_cost --device meta                               counted at full size, without a GPU
    python -m benchmarks.krea2_cost --device cpu --blocks 1 --heads 4 --encoder-layers 1 --rollout-steps 2 \
--resolutions 256 --steps 1                                                     reduced in size, a minute

The base is 25.6 GB in bf16 and 13.1 GB in fp8, as published: presets are for the fp8 file. What is measured and how:
benchmarks/real_size.py.
"""

from __future__ import annotations

from benchmarks import networks, real_size
from benchmarks.real_step import Subject
from benchmarks.zimage_cost import STUDENT_TOKENS, vision_tokens
from dopsd_core.families import KREA2
from dopsd_core.families.krea2 import TEXT_LAYERS

PRESETS = (("24 GB", 1024, 64, True), ("16 GB", 1024, 64, True), ("12 GB", 768, 32, True), ("8 GB", 512, 16, True))
TARGETS = {
    ("24 GB", 1024): "< 20 GB",
    ("16 GB", 1024): "< 15 GB",
    ("12 GB", 768): "< 11.5 GB",
    ("8 GB", 512): "< 7.6 GB",
}
ENCODER = 2560


def subject(blocks: int = 28, heads: int = 48) -> Subject:
    """Krea 2 of so many blocks and width 128 * `heads`, of which a quarter are heads of keys."""

    def denoiser():
        from dopsd_core.standalone.hosts.krea2 import krea2

        return krea2(blocks, heads)

    return Subject(
        family=KREA2,
        size=f"Krea 2, {blocks} blocks of 28, width {128 * heads} of 6144",
        comfyui=networks.krea2(blocks, heads, max(heads // 4, 1)),
        diffusers=denoiser,
        context=TEXT_LAYERS * ENCODER,
        texts=lambda side: (STUDENT_TOKENS, vision_tokens(side) + STUDENT_TOKENS + 2),
        vision=vision_tokens,
        encoder=ENCODER,
        targets=TARGETS,
        presets=PRESETS,
        wide=networks.KREA2_WIDE,
    )


def main() -> None:
    """Measures, or counts, what the command line asks for."""
    parser = real_size.parser(__doc__)
    parser.add_argument("--blocks", type=int, default=28, help="the real model has 28")
    parser.add_argument("--heads", type=int, default=48, help="of 128; the real model has 48")
    args = parser.parse_args()
    real_size.run(subject(args.blocks, args.heads), args)


if __name__ == "__main__":
    main()
