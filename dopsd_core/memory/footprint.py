"""How much memory a training step needs, and how much disk a run, before either is used."""

from __future__ import annotations

from dataclasses import dataclass

from ..adapters import Adapter
from ..denoiser import Denoiser
from ..families import Family
from ..optimizers import AdamW, Optimizer
from ..teachers import EmaTeacher, Teacher
from .activation_checkpointing import BlockBytes, block_bytes, block_shapes, blocks_to_checkpoint, peak_bytes

_FORWARD, _BACKWARD, _OUTSIDE = 5.5, 3.0, 4
"""Elements per token. For a moment in a block, in units of its widest input: in a forward without a graph (counted:
Z-Image 4.8, klein 5.2), and in a backward beyond what was kept (2.2, 2.9). Kept outside the blocks, in units of the
width: 3 to 4 were counted."""

_HEADER, _HEADERS = 512, 2**16
"""Bytes on the disk: of names and shapes per tensor, of configuration and metadata."""


@dataclass(frozen=True)
class Footprint:
    """Bytes on the device while an optimizer step is made.

    With P the adapter's parameters (of a LoRA r * sum over the adapted parts of (inputs + outputs), r the rank);
    L tokens, D the network's width, I a block's widest input.

    Attributes:
        weights: of the base, in whatever form they were loaded.
        lora: 4 P, master weights in fp32.
        training: gradients 4 P, the optimizer's state (8 P for Adam's moments, 2 P in 8 bits), an ema teacher 4 P.
        working: what embedders and the output layer keep, 4 * batch * L * D * itemsize, and the largest weight in the
            compute dtype twice, where weights are cast or streamed.
        forward: 5.5 * batch * L * I * itemsize, for a moment; of the teacher, whose sequence may be the longer one.
        backward: 3 * batch * L * I * itemsize, for a moment.
        blocks: what each block keeps for its backward, `activation_checkpointing.block_bytes`.
    """

    weights: int
    lora: int
    training: int
    working: int
    forward: int
    backward: int
    blocks: tuple[BlockBytes, ...]

    def total(self, checkpoint_blocks: int) -> int:
        """The peak with so many blocks recomputing."""
        activations = peak_bytes(self.blocks, checkpoint_blocks, self.forward, self.backward)
        return self.weights + self.lora + self.training + self.working + activations

    def blocks_to_checkpoint(self, budget: int) -> int:
        """The fewest blocks to recompute for the peak to be within the budget; all where none will do."""
        activations = budget - (self.weights + self.lora + self.training + self.working)
        return blocks_to_checkpoint(self.blocks, activations, self.forward, self.backward)


def estimate(
    denoiser: Denoiser,
    family: Family,
    adapter: Adapter,
    student: tuple[int, int],
    teacher: tuple[int, int],
    weights: int,
    *,
    batch: int = 1,
    itemsize: int = 2,
    weights_of_teacher: Teacher | None = None,
    optimizer: Optimizer | None = None,
) -> Footprint:
    """The footprint of training on samples of at most so many (image, text) tokens, `Family.tokens`.

    weights: bytes of the base as loaded. itemsize: of the compute dtype. weights_of_teacher, optimizer: by default the
    moving average and AdamW. Memory of the framework and of other programs is not in it.
    """
    sites, blocks = denoiser.sites(), denoiser.blocks()
    _, elements = adapter.size(sites)
    moments = (optimizer or AdamW()).bytes_per_parameter
    average = 4 if (weights_of_teacher or EmaTeacher()).weights == "copy" else 0
    longer = (max(student[0], teacher[0]), max(student[1], teacher[1]))
    largest = max(site.in_features * site.out_features for site in sites)
    width = max(shape.tokens * shape.width for shape, _ in block_shapes(blocks, sites, family, *student))
    return Footprint(
        weights=weights,
        lora=4 * elements,
        training=(4 + moments + average) * elements,
        working=(_OUTSIDE * batch * width + 2 * largest) * itemsize,
        forward=int(_FORWARD * batch * _widest(denoiser, family, longer) * itemsize),
        backward=int(_BACKWARD * batch * _widest(denoiser, family, student) * itemsize),
        blocks=tuple(block_bytes(blocks, sites, family, adapter, *student, batch, itemsize)),
    )


@dataclass(frozen=True)
class SavedBytes:
    """Bytes on the disk, at most. With P the LoRA's elements:

    checkpoint: student 4 P, an ema teacher 4 P, Adam's two moments 8 P (2 P and their tables in 8 bits), and headers.
    lora: the LoRA file in bf16, 2 P.
    """

    checkpoint: int
    lora: int


def saved_bytes(elements: int, tensors: int, teacher: Teacher, optimizer: Optimizer) -> SavedBytes:
    """What a run with a LoRA of so many elements in so many tensors writes."""
    header = _HEADER * tensors + _HEADERS
    student, average = 4 * elements, 4 * elements if teacher.weights == "copy" else 0
    state = optimizer.saved_bytes(elements, tensors)
    return SavedBytes(checkpoint=student + average + state + 4 * header, lora=2 * elements + header)


def _widest(denoiser: Denoiser, family: Family, tokens: tuple[int, int]) -> int:
    """Elements of the widest input of a Linear in a block, for one sample."""
    shapes = block_shapes(denoiser.blocks(), denoiser.sites(), family, *tokens)
    return max(shape.tokens * max(site.in_features for site in inside) for shape, inside in shapes)
