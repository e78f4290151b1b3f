"""DoRA: a LoRA whose rows have a magnitude of their own (arXiv 2402.09353)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar

from .lora import Lora

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from ..denoiser import LinearSite, SitePart
    from .lora_import import ImportedLora
    from .site_weights import SiteWeights


class Dora(Lora):
    """Rank, alpha and targets as of a LoRA; each row of W + (alpha / rank) B A is scaled to a trained norm."""

    name: ClassVar[str] = "dora"
    summary: ClassVar[str] = (
        "a LoRA with a trained magnitude of each row; slower, saves an activation of each layer's size"
    )

    tensors_per_part: ClassVar[int] = 4

    def part_parameters(self, in_features: int, out_features: int) -> int:
        """rank * (in + out) and a magnitude per row."""
        return super().part_parameters(in_features, out_features) + out_features

    def derived_bytes(self, sites: Sequence[LinearSite]) -> int:
        """dora_scale in fp32, and in a LoRA file the magnitude in fp32 instead of bf16: 6 bytes a row."""
        chosen = self.chosen(sites)
        return 6 * sum(part.out_features for site in sites for part in site.parts if part.name in chosen)

    def part_activations(self, in_features: int, out_features: int) -> int:
        """A x, and the updated output."""
        return self.rank + out_features

    def require_sites(self, sites: Sequence[LinearSite]) -> None:
        """Raises ValueError if the host cannot provide the weight of a site that is trained."""
        chosen = self.chosen(sites)
        for site in sites:
            if site.weight is None and any(part.name in chosen for part in site.parts):
                raise no_weight(site)

    def site_weights(
        self, site: LinearSite, parts: tuple[SitePart, ...], seed: int, device: torch.device
    ) -> SiteWeights:
        """New weights of the parts of a site.

        Raises:
            ValueError: the host cannot provide the weight of the site.
        """
        from .dora_weights import DoraWeights

        return DoraWeights.fresh(site, parts, self.rank, self.scale, seed, device)

    def imported(self, tensors: Mapping[str, Tensor], sites: Sequence[LinearSite]) -> ImportedLora:
        """A DoRA file of D-OPSD, peft or diffusers under our part names: A [rank, in], B [rows, rank], m [rows].

        Raises:
            ValueError: it is not a DoRA, belongs to another model, or changes nothing that is trained.
        """
        from .dora_import import import_dora

        return import_dora(tensors, sites, self.targets)

    def start_state(self, initial: Mapping[str, Tensor], fresh: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """As for LoRA, with the magnitudes [rows] of `initial` in place of those of `fresh`."""
        from .lora_import import start_state

        is_magnitude = {key: key.endswith(".lora_magnitude_vector") for key in initial}
        state = start_state({key: t for key, t in initial.items() if not is_magnitude[key]}, fresh, self)
        return {**state, **{key: t.float() for key, t in initial.items() if is_magnitude[key]}}


def no_weight(site: LinearSite) -> ValueError:
    """The error for a site whose host cannot provide its weight."""
    return ValueError(
        f"adapter dora needs the weight of {site.name}, which this model does not give, for example because a LoRA "
        "beside it is not merged; set adapter to lora or lokr"
    )
