"""LoRA: a low-rank update B A of each chosen Linear (arXiv 2106.09685). Its options, and what a run asks of it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from pydantic import Field, model_validator

from ..options import Hint
from .base import Adapter

if TYPE_CHECKING:
    from torch import Tensor
    from typing_extensions import Self

    from ..denoiser import Denoiser
    from ..teachers import Teacher
    from .adapter_set import AdapterSet

_SCALE = 2.0  # alpha / rank where alpha is not given: the paper's, 128 / 64


class Lora(Adapter):
    """Size and targets of a LoRA; its output is scaled by alpha / rank."""

    name: ClassVar[str] = "lora"
    summary: ClassVar[str] = "a low-rank update of each layer"

    rank: int = Field(default=16, ge=1, le=1024, description="size of the LoRA")
    alpha: Annotated[float, Hint(step=0.5, most=4096.0)] = Field(
        default=_SCALE * 16,
        gt=0,
        description="the LoRA is scaled by alpha / rank; a rank given alone keeps that scale, which is 2 in the paper",
    )

    @model_validator(mode="before")
    @classmethod
    def _alpha_follows_rank(cls, values: dict[str, Any]) -> dict[str, Any]:
        rank = values.get("rank")
        if "alpha" in values or not isinstance(rank, int):
            return values
        return {**values, "alpha": _SCALE * rank}

    @property
    def scale(self) -> float:
        """alpha / rank."""
        return self.alpha / self.rank

    def with_options(self, **changes: Any) -> Self:
        """With a user's options: a rank without an alpha keeps alpha / rank."""
        rank = changes.get("rank")
        if isinstance(rank, int) and "alpha" not in changes:
            changes["alpha"] = self.scale * rank
        return self.replace(**changes)

    def part_parameters(self, in_features: int, out_features: int) -> int:
        """rank * (in + out)."""
        return self.rank * (in_features + out_features)

    def part_activations(self) -> int:
        """A x."""
        return self.rank

    def build(self, denoiser: Denoiser, teacher: Teacher, seed: int) -> AdapterSet:
        """The adapters over all of the denoiser's sites."""
        from .adapter_set import AdapterSet

        return AdapterSet(denoiser.sites(), self, seed=seed, device=denoiser.device, teacher=teacher)

    def start_state(self, initial: Mapping[str, Tensor], fresh: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """`initial` (folded, `lora_import.py`) in the place of the first components of `fresh`."""
        from .lora_import import start_state

        return start_state(initial, fresh, self)

    def exported(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """With alpha / rank folded into B."""
        from .lora_file import fold_alpha

        return fold_alpha(state, self)

    def save(self, path: Path, state: Mapping[str, Tensor], prefix: str, metadata: Mapping[str, str]) -> None:
        """A file that ComfyUI and diffusers load at equal strength (`lora_file.py`)."""
        from .lora_file import save_lora

        save_lora(path, state, self, prefix=prefix, metadata=metadata)
