"""The interface of adapters: their options and the methods that a run calls."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from ..options import Variant

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from torch.distributed.device_mesh import DeviceMesh
    from typing_extensions import Self

    from ..denoiser import Denoiser, LinearSite, SitePart
    from ..families import Family
    from ..teachers import Teacher
    from ..trainable import Trainable
    from .lora_import import ImportedLora
    from .site_weights import SiteWeights


class Adapter(Variant):
    """How the trained weights change the network. In memory, "raw" tensors are those of `Trainable.state`."""

    tensors_per_part: ClassVar[int] = 2
    """Maximum number of tensors that a file has for each part."""

    trains_network: ClassVar[bool] = False
    """Whether the network's own weights are trained, for which a host needs all of them in plain tensors."""

    product: ClassVar[str] = "LoRA"
    """What is trained, in messages."""

    file_name: ClassVar[str] = "lora.safetensors"
    """The final file in the folder of a run."""

    memory_hint: ClassVar[str] = "a lower --resolution or --rank, or --quantise"
    """What needs less memory, in messages of the command line."""

    def for_targets(self, targets: Sequence[str]) -> Self:
        """Fills in these targets if the adapter has targets and none are set."""
        return self

    def usual_rate(self, lora_rate: float) -> float:
        """The learning rate to start with, where `lora_rate` is that of a LoRA."""
        return lora_rate

    def chosen(self, sites: Sequence[LinearSite]) -> frozenset[str]:
        """The names of the parts to train.

        Raises:
            ValueError: there are no targets, or one of them matches nothing.
        """
        raise NotImplementedError

    def trained(self, denoiser: Denoiser) -> tuple[int, int]:
        """(number of parts to train, total number of parameters) on the denoiser's network."""
        return self.size(denoiser.sites())

    def size(self, sites: Sequence[LinearSite]) -> tuple[int, int]:
        """(number of parts to train, total number of parameters); a part is a module of the unfused network."""
        chosen = self.chosen(sites)
        parts = [(site.in_features, part.out_features) for site in sites for part in site.parts if part.name in chosen]
        return len(parts), sum(self.part_parameters(*part) for part in parts)

    def part_parameters(self, in_features: int, out_features: int) -> int:
        """Number of parameters of one part."""
        raise NotImplementedError

    def part_casts(self, in_features: int, out_features: int) -> int:
        """Number of parameters of one part that are cast to the compute dtype, once or in each forward."""
        return self.part_parameters(in_features, out_features)

    def cast_bytes(self, itemsize: int, has_teacher: bool) -> int:
        """Bytes per parameter of copies in a compute dtype of this size, besides the fp32 weights: one of the student's
        and one of the teacher's own; none in fp32."""
        return itemsize * (1 + has_teacher) if itemsize < 4 else 0

    def derived_bytes(self, sites: Sequence[LinearSite]) -> int:
        """Maximum size in bytes of what a checkpoint or a LoRA file holds besides its parameters, in fp32 and bf16."""
        return 0

    def file_bytes(self, parameters: int) -> int:
        """Size in bytes of these parameters in the final file."""
        return 2 * parameters

    def part_activations(self, in_features: int, out_features: int) -> int:
        """Elements per token that one part saves for its backward, besides its input."""
        raise NotImplementedError

    def require_host(self, denoiser: Denoiser) -> None:
        """Checks before any work on the device that the adapter works with the network as the host has it.

        Raises:
            ValueError: it does not; the message names a site or a weight.
        """
        self.require_sites(denoiser.sites())

    def require_sites(self, sites: Sequence[LinearSite]) -> None:
        """Checks that the adapter works with the sites that it trains.

        Raises:
            ValueError: it does not; the message names a site.
        """

    def site_weights(
        self, site: LinearSite, parts: tuple[SitePart, ...], seed: int, device: torch.device
    ) -> SiteWeights:
        """New weights of the parts of a site, with which the network is the base bit for bit; for an `AdapterSet`.

        Raises:
            ValueError: the adapter does not work with this site.
        """
        raise NotImplementedError

    def build(self, denoiser: Denoiser, teacher: Teacher, seed: int) -> Trainable:
        """Builds the trainable weights for the denoiser's network, on its device; not attached yet."""
        raise NotImplementedError

    def build_sharded(self, denoiser: Denoiser, teacher: Teacher, seed: int, mesh: DeviceMesh) -> Trainable:
        """As `build`, of which each of the ranks in `mesh` may hold a part; by default each holds all."""
        return self.build(denoiser, teacher, seed)

    def imported(self, tensors: Mapping[str, Tensor], sites: Sequence[LinearSite]) -> ImportedLora:
        """A file of any trainer, tensors of any shape under its own names, for `start_state`.

        Raises:
            ValueError: it is of another kind or another model, or changes nothing that is trained.
        """
        raise NotImplementedError

    def start_state(self, initial: Mapping[str, Tensor], fresh: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Puts the imported tensors of `initial` into the raw state `fresh`; raw, with the same keys and shapes.

        Raises:
            ValueError: `initial` does not fit.
        """
        raise NotImplementedError

    def exported(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """A raw state in the form of the file: self-contained, under part names and in the same shapes, fp32."""
        raise NotImplementedError

    def save(self, path: Path, state: Mapping[str, Tensor], family: Family, metadata: Mapping[str, str]) -> None:
        """Writes a raw state as the final file, atomically.

        Args:
            path: the file.
            state: tensors in the shapes of `Trainable.state`.
            family: the model's, which has the names in files.
            metadata: facts for the header.

        Raises:
            ValueError: a tensor is not finite, or metadata would change the strength.
            OSError: the folder is not writable; an older file is untouched.
        """
        raise NotImplementedError
