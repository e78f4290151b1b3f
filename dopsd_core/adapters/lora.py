"""LoRA: a low-rank update B A of each targeted Linear (arXiv 2106.09685)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from pydantic import Field, model_validator

from ..options import Hint
from .base import Adapter
from .targets import match_targets

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from typing_extensions import Self

    from ..denoiser import Denoiser, LinearSite, SitePart
    from ..families import Family
    from ..teachers import Teacher
    from .adapter_set import AdapterSet
    from .lora_import import ImportedLora
    from .site_weights import SiteWeights

_SCALE = 2.0  # alpha / rank where alpha is not given: the paper's, 128 / 64


class Lora(Adapter):
    """Rank, alpha and targets of a LoRA; its output is scaled by alpha / rank."""

    name: ClassVar[str] = "lora"
    summary: ClassVar[str] = "a low-rank update of each layer"

    targets: Annotated[tuple[str, ...], Hint(none="all attention and MLP layers of the blocks")] = Field(
        default=(), description="layers to train: names or patterns, such as layers.*.attention.*"
    )
    rank: int = Field(default=16, ge=1, le=1024, description="rank of the LoRA")
    alpha: Annotated[float, Hint(step=0.5, most=4096.0)] = Field(
        default=_SCALE * 16,
        gt=0,
        description="the LoRA is scaled by alpha / rank; setting rank alone keeps that scale, which is 2 in the paper",
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
        """Applies a user's options; a rank without an alpha keeps alpha / rank."""
        rank = changes.get("rank")
        if isinstance(rank, int) and "alpha" not in changes:
            changes["alpha"] = self.scale * rank
        return self.replace(**changes)

    def for_targets(self, targets: Sequence[str]) -> Self:
        """Fills in these targets if none are set."""
        return self if self.targets else self.replace(targets=tuple(targets))

    def chosen(self, sites: Sequence[LinearSite]) -> frozenset[str]:
        """The names of the parts that the targets select.

        Raises:
            ValueError: there are no targets, or one of them matches nothing.
        """
        if not self.targets:
            raise ValueError("targets are empty; pass the family's, families.FAMILIES[name].lora_targets")
        return match_targets([part.name for site in sites for part in site.parts], self.targets)

    def part_parameters(self, in_features: int, out_features: int) -> int:
        """rank * (in + out)."""
        return self.rank * (in_features + out_features)

    def part_activations(self, in_features: int, out_features: int) -> int:
        """A x has rank elements per token."""
        return self.rank

    def site_weights(
        self, site: LinearSite, parts: tuple[SitePart, ...], seed: int, device: torch.device
    ) -> SiteWeights:
        """New weights of the parts of a site."""
        from .lora_weights import LoraWeights

        return LoraWeights.fresh(site, parts, self.rank, self.scale, seed, device)

    def build(self, denoiser: Denoiser, teacher: Teacher, seed: int) -> AdapterSet:
        """The adapter set on all of the denoiser's sites."""
        from .adapter_set import AdapterSet

        return AdapterSet(denoiser.sites(), self, seed=seed, device=denoiser.device, teacher=teacher)

    def imported(self, tensors: Mapping[str, Tensor], sites: Sequence[LinearSite]) -> ImportedLora:
        """A plain LoRA of any trainer under our part names, A [rank, in] and B [rows, rank].

        Raises:
            ValueError: it is not a plain LoRA, belongs to another model, or changes nothing that is trained.
        """
        from .lora_import import import_lora

        return import_lora(tensors, sites, self.targets)

    def check_start(self, initial: Mapping[str, Tensor]) -> None:
        """Raises ValueError if an A [rank, in] has a larger rank than this one."""
        rank = max((tensor.shape[0] for key, tensor in initial.items() if ".lora_A." in key), default=0)
        if rank > self.rank:
            raise ValueError(
                f"the LoRA to start from has rank {rank}, the run has rank {self.rank}; set rank to {rank}"
            )

    def start_state(self, initial: Mapping[str, Tensor], fresh: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Replaces the first components of `fresh` by `initial` (folded, see `lora_import.py`).

        Keys "<part>.lora_A.weight" [rank, in] and "<part>.lora_B.weight" [rows, rank] in both.
        """
        from .lora_import import start_state

        return start_state(initial, fresh, self)

    def exported(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Folds alpha / rank into B [rows, rank], or into a factor of LoKr; the others, of any shape, are unchanged."""
        from .lora_file import fold_alpha

        return fold_alpha(state, self)

    def save(self, path: Path, state: Mapping[str, Tensor], family: Family, metadata: Mapping[str, str]) -> None:
        """Writes the state, such as A [rank, in] and B [rows, rank], for equal strength in ComfyUI and diffusers."""
        from .lora_file import save_lora

        save_lora(path, state, self, prefix=family.key_prefix, metadata=metadata)
