"""How much memory a training step needs, before it is made."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .adapters import TeacherKind
from .checkpointing import BlockBytes, block_bytes, block_shapes, peak_bytes
from .families import Family
from .lora_config import LoraConfig, lora_size
from .model import Denoiser

_TRANSIENT = 5
"""So many tensors as wide as the block's widest input: gradients and RoPE in fp32. 3 to 4.5 were counted."""


@dataclass(frozen=True)
class Footprint:
    """Bytes on the device while an optimizer step is made.

    With P the LoRA's elements: P = r * sum over the adapted parts of (inputs + outputs), r the rank.

    weights: of the base, in whatever form they were loaded.
    lora: 4 P, master weights in fp32.
    training: gradients 4 P, Adam's two moments 8 P (2 P in 8 bits), and an ema teacher 4 P.
    working: 5 * batch * L * I * itemsize for what lives for a moment inside a block, I its widest input, and the
        largest weight in the compute dtype twice, where weights are cast or streamed.
    blocks: what each block keeps for its backward, `checkpointing.block_bytes`.
    """

    weights: int
    lora: int
    training: int
    working: int
    blocks: tuple[BlockBytes, ...]

    @property
    def resident(self) -> int:
        """All but weights and activations."""
        return self.lora + self.training + self.working

    def total(self, checkpoint_blocks: int) -> int:
        """The peak with so many blocks recomputing."""
        return self.weights + self.resident + peak_bytes(self.blocks, checkpoint_blocks)


def estimate(
    denoiser: Denoiser,
    family: Family,
    lora: LoraConfig,
    latent: Sequence[int],
    student_tokens: int,
    teacher_tokens: int,
    weights: int,
    *,
    batch: int = 1,
    itemsize: int = 2,
    teacher: TeacherKind = "ema",
    eight_bit: bool = False,
) -> Footprint:
    """The footprint of training on latents of shape `latent` [C, h, w].

    student_tokens, teacher_tokens: length of the longest text of each. weights: bytes of the base as loaded. itemsize:
    of the compute dtype. Memory of the framework and of other programs is not in it.
    """
    sites, blocks = denoiser.sites(), denoiser.blocks()
    image = family.image_tokens(*latent[-2:])
    _, elements = lora_size(sites, lora)
    moments, average = 2 if eight_bit else 8, 4 if teacher == "ema" else 0
    widest = max(
        shape.tokens * max(site.in_features for site in inside)
        for shape, inside in block_shapes(blocks, sites, family, image, max(student_tokens, teacher_tokens))
    )
    largest = max(site.in_features * site.out_features for site in sites)
    return Footprint(
        weights=weights,
        lora=4 * elements,
        training=(4 + moments + average) * elements,
        working=(_TRANSIENT * batch * widest + 2 * largest) * itemsize,
        blocks=tuple(block_bytes(blocks, sites, family, lora, image, student_tokens, batch, itemsize)),
    )
