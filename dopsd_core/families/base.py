"""The description of a model family."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from ..adapters.lora import Lora
from ..denoiser import BlockShape, PartsOf, SitePart
from .single_file import SingleFile

if TYPE_CHECKING:
    from ..conditioning.encode import Condition


@dataclass(frozen=True, kw_only=True)
class Family:
    """Grid, geometry, targets, names and defaults of a model family.

    Attributes:
        name: identifier in configurations.
        title: display name.
        sigmas: (num_steps, width, height in pixels) -> the model's own few-step grid, num_steps + 1 values.
        latent_channels: C of a latent.
        downscale: image pixels per latent pixel, on each side.
        pixel_multiple: both sides of a training image are multiples of it.
        lora_targets: patterns over part names, for `Adapter.targets`.
        native_parts: (module path, rows) of a Linear in the original, fused network -> its parts as in diffusers.
        block_shape: (name of a Linear in a block, input width of each of the block's parts, image tokens of latent and
            references, text tokens) -> the block's activations.
        teachers: names in `conditioning.teachers.TEACHER_VIEWS` that the model supports, its default first.
        patch: latent pixels per image token, on each side.
        key_prefix: prefix of part names in LoRA files.
        rollout_steps: K in training.
        sample_steps: steps at inference.
        lora_rank: rank in the paper.
        lora_alpha: alpha in the paper.
        learning_rate: learning rate in the paper.
        paper_steps: optimizer steps in the paper.
        pixel_budget: default number of pixels of a training image.
        single_file: layout of the whole network in a file for ComfyUI; None if there is none.
        hub_models: a distilled model's file name, lower case, without punctuation and precision -> its repository on
            the Hub.
        unguided: argument of diffusers' pipeline that switches guidance off.
    """

    name: str
    title: str
    sigmas: Callable[[int, int, int], tuple[float, ...]]
    latent_channels: int
    downscale: int
    pixel_multiple: int
    lora_targets: tuple[str, ...]
    native_parts: PartsOf
    block_shape: Callable[[str, Mapping[str, int], int, int], BlockShape]
    teachers: tuple[str, ...]
    patch: int
    key_prefix: str = "transformer."
    rollout_steps: int = 4
    sample_steps: int = 4
    lora_rank: int = 64
    lora_alpha: float = 128.0
    learning_rate: float = 1e-4
    paper_steps: int = 2000
    pixel_budget: int = 1024 * 1024
    single_file: SingleFile | None = None
    hub_models: Mapping[str, str] = field(default_factory=dict)
    unguided: str = "guidance_scale=0.0"

    def latent_shape(self, width: int, height: int) -> tuple[int, int, int]:
        """(C, h, w) of an image of width x height pixels.

        Raises:
            ValueError: a side is not a positive multiple of `pixel_multiple`.
        """
        if min(width, height) < 1 or width % self.pixel_multiple or height % self.pixel_multiple:
            raise ValueError(
                f"{self.title} needs sides that are multiples of {self.pixel_multiple} pixels, got {width}x{height}"
            )
        return self.latent_channels, height // self.downscale, width // self.downscale

    def image_tokens(self, height: int, width: int) -> int:
        """Tokens of a latent of that size: one per patch."""
        return (height // self.patch) * (width // self.patch)

    def grid(self, num_steps: int, latent: Sequence[int]) -> tuple[float, ...]:
        """The few-step grid, num_steps + 1 sigmas, for a latent of shape (C, h, w)."""
        _, height, width = latent
        return self.sigmas(num_steps, width * self.downscale, height * self.downscale)

    def tokens(self, latent: Sequence[int], condition: Condition) -> tuple[int, int]:
        """(image, text) tokens of a forward on a latent [C, h, w]; references count as image tokens."""
        shapes = [latent, *(reference.shape for reference in condition.reference_latents)]
        return sum(self.image_tokens(*shape[-2:]) for shape in shapes), len(condition.features)

    def lora_config(self, rank: int | None = None, alpha: float | None = None) -> Lora:
        """A LoRA of the family's targets; rank defaults to the paper's, alpha to the paper's alpha / rank."""
        rank = self.lora_rank if rank is None else rank
        scale = self.lora_alpha / self.lora_rank
        return Lora(rank=rank, alpha=rank * scale if alpha is None else alpha, targets=self.lora_targets)


def split_rows(names: tuple[str, ...], out_features: int) -> tuple[SitePart, ...]:
    """Splits the rows of a fused projection into equal parts, one per name.

    Raises:
        ValueError: the rows do not divide evenly.
    """
    rows, rest = divmod(out_features, len(names))
    if rest:
        raise ValueError(f"{out_features} rows do not divide evenly among {', '.join(names)}")
    return tuple(SitePart(name, i * rows, (i + 1) * rows) for i, name in enumerate(names))
