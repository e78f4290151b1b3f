"""What an adapter is: options, and everything that a run asks of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from ..options import Hint, Variant
from .targets import match_targets

if TYPE_CHECKING:
    from torch import Tensor
    from typing_extensions import Self

    from ..denoiser import Denoiser, LinearSite
    from ..teachers import Teacher
    from ..trainable import Trainable


class Adapter(Variant):
    """How the network is changed by what is trained. In memory, "raw" tensors are those of `Trainable.state`."""

    targets: Annotated[tuple[str, ...], Hint(none="all attention and MLP layers of the blocks")] = Field(
        default=(), description="layers that are trained: names or patterns, such as layers.*.attention.*"
    )

    def for_targets(self, targets: Sequence[str]) -> Self:
        """With these targets, unless it has some of its own."""
        return self if self.targets else self.replace(targets=tuple(targets))

    def chosen(self, sites: Sequence[LinearSite]) -> frozenset[str]:
        """The names of the parts that are trained.

        Raises:
            ValueError: there are no targets, or one of them selects nothing.
        """
        if not self.targets:
            raise ValueError("targets are empty; pass the family's, families.FAMILIES[name].lora_targets")
        return match_targets([part.name for site in sites for part in site.parts], self.targets)

    def size(self, sites: Sequence[LinearSite]) -> tuple[int, int]:
        """How many parts are trained, which are modules of the unfused network, and how many parameters in all."""
        chosen = self.chosen(sites)
        parts = [(site.in_features, part.out_features) for site in sites for part in site.parts if part.name in chosen]
        return len(parts), sum(self.part_parameters(*part) for part in parts)

    def part_parameters(self, in_features: int, out_features: int) -> int:
        """Parameters of one part."""
        raise NotImplementedError

    def part_activations(self) -> int:
        """Elements per token that one part keeps for its backward, besides its input."""
        raise NotImplementedError

    def build(self, denoiser: Denoiser, teacher: Teacher, seed: int) -> Trainable:
        """The weights to train, on the denoiser's device, for its network; not attached yet."""
        raise NotImplementedError

    def start_state(self, initial: Mapping[str, Tensor], fresh: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """`fresh`, a raw state, with the imported tensors of `initial` in it; raw, the same keys.

        Raises:
            ValueError: `initial` does not fit.
        """
        raise NotImplementedError

    def exported(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """A raw state as the file has it: complete in itself, under the parts' names, in full precision."""
        raise NotImplementedError

    def save(self, path: Path, state: Mapping[str, Tensor], prefix: str, metadata: Mapping[str, str]) -> None:
        """Writes a raw state as the file that users keep, atomically.

        prefix: stands before the parts' names. metadata: facts for the header.

        Raises:
            ValueError: a tensor is not finite, or metadata that would change the strength.
            OSError: the folder cannot be written; an older file is untouched.
        """
        raise NotImplementedError
