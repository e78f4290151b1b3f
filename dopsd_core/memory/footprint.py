"""Estimates the memory of a training step and the disk space of a run."""

from __future__ import annotations

from dataclasses import dataclass, replace

from ..adapters import Adapter
from ..denoiser import Denoiser
from ..families import Family
from ..optimizers import AdamW, Optimizer
from ..teachers import EmaTeacher, Teacher
from .activation_checkpointing import block_bytes, block_shapes, cast_bytes
from .checkpoint_plan import BlockBytes, Checkpointing, peak_bytes, plan_checkpointing

_FORWARD, _BACKWARD, _OUTSIDE = 5.0, 3.0, 4
"""Elements per token. Transient workspace per block in units of its widest input: in a forward without a graph
(counted: Z-Image 4.8, klein 4.7), and in a backward in addition to the saved activations (2.2, 2.7). Saved outside the
blocks, in units of the width: 3 to 4 were counted."""

_FLOPS_PER_BYTE = 6000
"""FLOPs that a GPU computes while a byte crosses the bus one way, at most: an RTX 4090 at 150 TFLOP/s and 25 GB/s over
PCIe 4.0 x16; others need fewer (docs/cost.md)."""

_HEADER, _HEADERS = 512, 2**16
"""Bytes on disk: names and shapes per tensor; configuration and metadata."""


@dataclass(frozen=True)
class Footprint:
    """Device memory of an optimizer step in bytes.

    P: number of trained parameters (for LoRA, r * sum over the adapted parts of (inputs + outputs), with rank r);
    L: tokens; D: width of the network; I: widest input in a block.

    Attributes:
        weights: the base, as loaded.
        lora: 4 P, fp32 master weights.
        training: gradients 4 P, optimizer state (8 P for Adam's moments, 2 P in 8 bits), EMA teacher 4 P, and with full
            weights in 16 bits the copies that the network computes with, 2 P of the student and 2 P of the teacher.
        working: activations of embedders and output layer, 4 * batch * L * D * itemsize, plus twice the largest weight
            in the compute dtype for weights that are cast or streamed.
        forward: transient workspace per block, 5.0 * batch * L * I * itemsize, for the longer of the two sequences.
        backward: transient workspace per block, 3 * batch * L * I * itemsize.
        blocks: saved activations of each block, `activation_checkpointing.block_bytes`.
        casts: copies of LoRA and EMA teacher in a compute dtype of 16 bits, 2 P each; 0 if they are cast in each
            forward instead.
        block_casts: what each block saves besides where they are cast in each forward.
    """

    weights: int
    lora: int
    training: int
    working: int
    forward: int
    backward: int
    blocks: tuple[BlockBytes, ...]
    casts: int = 0
    block_casts: tuple[int, ...] = ()

    @property
    def keeps_casts(self) -> bool:
        """Whether casts are kept between forwards."""
        return self.casts > 0

    def within(self, budget: int, ram: int = 0) -> Footprint:
        """The same, or one that casts in each forward if keeping the casts would cost more recomputation.

        A cast costs the time of reading and writing the weights, about 1 % of a recomputation of all blocks. ram: as in
        `checkpointing`.
        """
        each = self.casting_each_time()
        cheapest, own = each.checkpointing(budget, ram), self.checkpointing(budget, ram)
        allowed = cheapest.flops(self.blocks) + 0.01 * Checkpointing.full(len(self.blocks)).flops(self.blocks)
        fits = self.total(own) <= max(budget, each.total(cheapest))
        return self if fits and own.flops(self.blocks) <= allowed else each

    def casting_each_time(self) -> Footprint:
        """The same without casts that are kept."""
        sizes = self.block_casts or (0,) * len(self.blocks)
        blocks = (
            replace(block, kept=block.kept + size) if block.kept else block
            for block, size in zip(self.blocks, sizes, strict=True)
        )
        return replace(self, casts=0, block_casts=(), blocks=tuple(blocks))

    def total(self, checkpointing: Checkpointing | int) -> int:
        """Peak memory with this gradient checkpointing; a number is that of blocks that keep their inputs alone."""
        activations = peak_bytes(self.blocks, checkpointing, self.forward, self.backward)
        return self._resident + activations

    def checkpointing(self, budget: int, ram: int = 0) -> Checkpointing:
        """The one with the least recomputation and a peak within the budget; on all blocks if that is too much.

        ram: bytes of RAM that activations may take; it uses no more than can be copied while a forward computes.
        """
        hidden = int(Checkpointing.full(len(self.blocks)).flops(self.blocks) / _FLOPS_PER_BYTE)
        return plan_checkpointing(self.blocks, budget - self._resident, self.forward, self.backward, min(ram, hidden))

    @property
    def _resident(self) -> int:
        return self.weights + self.lora + self.training + self.casts + self.working

    def sentence(self, checkpointing: Checkpointing) -> str:
        """What it does, for the user."""
        share = checkpointing.share_kept(self.blocks)
        kept = f", with {share:.0%} of their products kept" if share else ""
        in_ram = checkpointing.ram_bytes(self.blocks)
        kept += f" and {in_ram / 10**9:.1f} GB of activations in RAM" if in_ram else ""
        return (
            f"gradient checkpointing on {checkpointing.count} of {len(self.blocks)} blocks{kept} (slower, same result)"
        )


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
    """Estimates the memory of training. Memory of the framework and of other programs is not included.

    Args:
        denoiser: the network.
        family: its family.
        adapter: what is trained.
        student: maximum (image, text) tokens of the student's samples, `Family.tokens`.
        teacher: the same for the teacher.
        weights: bytes of the base as loaded.
        batch: batch size.
        itemsize: bytes per element of the compute dtype.
        weights_of_teacher: EMA by default.
        optimizer: AdamW by default.
    """
    sites, blocks = denoiser.sites(), denoiser.blocks()
    _, elements = adapter.trained(denoiser)
    moments = (optimizer or AdamW()).bytes_per_parameter
    has_teacher = (weights_of_teacher or EmaTeacher()).weights == "copy"
    average, casts = 4 * has_teacher, adapter.cast_bytes(itemsize, has_teacher)
    always = casts if adapter.trains_network else 0
    longer = (max(student[0], teacher[0]), max(student[1], teacher[1]))
    largest = max(site.in_features * site.out_features for site in sites)
    width = max(shape.tokens * shape.width for shape, _ in block_shapes(blocks, sites, family, *student))
    return Footprint(
        weights=weights,
        lora=4 * elements,
        training=(4 + moments + average + always) * elements,
        working=(_OUTSIDE * batch * width + 2 * largest) * itemsize,
        forward=int(_FORWARD * batch * _widest(denoiser, family, longer) * itemsize),
        backward=int(_BACKWARD * batch * _widest(denoiser, family, student) * itemsize),
        blocks=tuple(block_bytes(blocks, sites, family, adapter, *student, batch, itemsize)),
        casts=(casts - always) * elements,
        block_casts=tuple(cast_bytes(blocks, sites, adapter, itemsize)),
    )


@dataclass(frozen=True)
class SavedBytes:
    """Maximum size of the saved files in bytes, for a LoRA with P parameters.

    Attributes:
        checkpoint: student 4 P, EMA teacher 4 P, Adam's two moments 8 P (2 P and their tables in 8 bits), headers.
        lora: the LoRA file in bf16, 2 P, or the whole model.
    """

    checkpoint: int
    lora: int


def saved_bytes(
    elements: int, tensors: int, teacher: Teacher, optimizer: Optimizer, derived: int = 0, in_file: int | None = None
) -> SavedBytes:
    """Size of the files of a run whose LoRA has this many elements and tensors, and `Adapter.derived_bytes`.

    in_file: `Adapter.file_bytes`; by default 2 bytes per element.
    """
    header = _HEADER * tensors + _HEADERS
    student, average = 4 * elements, 4 * elements if teacher.weights == "copy" else 0
    state = optimizer.saved_bytes(elements, tensors)
    stored = 2 * elements if in_file is None else in_file
    return SavedBytes(checkpoint=student + average + state + derived + 4 * header, lora=stored + derived + header)


def _widest(denoiser: Denoiser, family: Family, tokens: tuple[int, int]) -> int:
    """Elements of the widest input of a Linear in any block, for one sample."""
    shapes = block_shapes(denoiser.blocks(), denoiser.sites(), family, *tokens)
    return max(shape.tokens * max(site.in_features for site in inside) for shape, inside in shapes)
