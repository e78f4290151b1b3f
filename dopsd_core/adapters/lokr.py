"""LoKr: an update of each layer that is a Kronecker product (LyCORIS, arXiv 2309.14859)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar

from pydantic import Field

from ..options import Hint
from .lora import Lora

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from ..denoiser import LinearSite, SitePart
    from .lora_import import ImportedLora
    from .site_weights import SiteWeights


@dataclass(frozen=True)
class LokrShape:
    """The shapes of one part's factors.

    Attributes:
        w1: (o1, i1).
        w2: ((o2, i2),), or ((o2, rank), (rank, i2)) if w2 is a product.
    """

    w1: tuple[int, int]
    w2: tuple[tuple[int, int], ...]


class Lokr(Lora):
    """Factor, rank, alpha and targets of a LoKr; its output is scaled by alpha / rank."""

    name: ClassVar[str] = "lokr"
    summary: ClassVar[str] = "a Kronecker product as the update of each layer; at equal rank a much smaller file"

    tensors_per_part: ClassVar[int] = 3

    factor: Annotated[int, Hint(most=64)] = Field(
        default=8,
        ge=2,
        description="size of the first Kronecker factor; a larger one makes the second factor, the number of "
        "parameters and the file smaller. A rank of at least half of the second factor's size keeps that in one piece",
    )

    def shape(self, in_features: int, out_features: int) -> LokrShape:
        """The shapes of the factors of a part; as in peft, so that diffusers can load them."""
        o1, o2 = factorized(out_features, self.factor)
        i1, i2 = factorized(in_features, self.factor)
        is_product = self.rank < max(o2, i2) / 2
        return LokrShape((o1, i1), ((o2, self.rank), (self.rank, i2)) if is_product else ((o2, i2),))

    def part_parameters(self, in_features: int, out_features: int) -> int:
        """o1 * i1 + o2 * i2, or o1 * i1 + rank * (o2 + i2)."""
        shape = self.shape(in_features, out_features)
        return sum(rows * columns for rows, columns in (shape.w1, *shape.w2))

    def part_activations(self, in_features: int, out_features: int) -> int:
        """What comes between the factors."""
        shape = self.shape(in_features, out_features)
        (o1, i1), (o2, rank) = shape.w1, shape.w2[0]
        return (i1 + o1) * rank if len(shape.w2) == 2 else i1 * o2

    def site_weights(
        self, site: LinearSite, parts: tuple[SitePart, ...], seed: int, device: torch.device
    ) -> SiteWeights:
        """New weights of the parts of a site."""
        from .lokr_weights import LokrWeights

        shapes = tuple(self.shape(site.in_features, part.out_features) for part in parts)
        return LokrWeights.fresh(site, parts, shapes, self.scale, seed, device)

    def imported(self, tensors: Mapping[str, Tensor], sites: Sequence[LinearSite]) -> ImportedLora:
        """A LoKr file under our part names: w1 [o1, i1], w2 [o2, i2] or w2_a [o2, rank] and w2_b [rank, i2].

        Raises:
            ValueError: it is not a LoKr, belongs to another model, or changes nothing that is trained.
        """
        from .lokr_import import import_lokr

        return import_lokr(tensors, sites, self.targets)

    def check_start(self, initial: Mapping[str, Tensor]) -> None:
        """Raises ValueError if factors, such as w1 [o1, i1], do not fit those of the run; computes nothing."""
        given = {key: tensor.to("meta") for key, tensor in initial.items()}
        fresh: dict[str, Tensor] = {}
        for key, w1 in given.items():
            part, _, name = key.rpartition(".lokr_")
            if name != "w1":
                continue
            rows, columns = (
                given.get(f"{part}.lokr_{name}", given.get(f"{part}.lokr_w2")) for name in ("w2_a", "w2_b")
            )
            if rows is None or columns is None:
                continue
            shape = self.shape(w1.shape[1] * columns.shape[1], w1.shape[0] * rows.shape[0])
            names = ("w2_a", "w2_b") if len(shape.w2) == 2 else ("w2",)
            for name, size in zip(("w1", *names), (shape.w1, *shape.w2), strict=True):
                fresh[f"{part}.lokr_{name}"] = w1.new_empty(size)
        self.start_state(given, fresh)

    def start_state(self, initial: Mapping[str, Tensor], fresh: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Puts the factors of `initial` into `fresh`, with the keys and shapes of `LokrWeights.views`."""
        from .lokr_import import lokr_start_state

        return lokr_start_state(initial, fresh, self)


def factorized(size: int, factor: int) -> tuple[int, int]:
    """(first, second) with first * second = size: `factor` if it divides the size, else the largest divisor below it
    that is at most the square root."""
    if size % factor == 0:
        return factor, size // factor
    first = max(n for n in range(1, min(factor, int(size**0.5)) + 1) if size % n == 0)
    return first, size // first
