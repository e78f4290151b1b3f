"""All weights of the network, on hosts that hold them in plain tensors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field

from ..denoiser import WholeNetwork
from ..options import ConfigError, Hint
from .base import Adapter

if TYPE_CHECKING:
    from torch import Tensor, nn
    from torch.distributed.device_mesh import DeviceMesh

    from ..denoiser import Denoiser, LinearSite
    from ..families import Family
    from ..teachers import Teacher
    from .full_weights import FullWeights
    from .lora_import import ImportedLora
    from .sharded_weights import ShardedWeights

_RATE = 0.1
"""Learning rate relative to a LoRA's: every weight moves by about the rate in a step of Adam, and a LoRA's product only
by its scale times the small factors."""


class Full(Adapter):
    """Trains all floating-point weights of the network, with fp32 masters."""

    name: ClassVar[str] = "full"
    summary: ClassVar[str] = "all weights of the network, without ComfyUI; starts at a tenth of the learning rate"
    trains_network: ClassVar[bool] = True
    product: ClassVar[str] = "model"
    file_name: ClassVar[str] = "model.safetensors"
    memory_hint: ClassVar[str] = "a lower --resolution, --optimizer adamw8bit, --teacher frozen, or --adapter lora"

    saved_dtype: Annotated[Literal["bf16", "fp32"], Hint(may_change=True)] = Field(
        default="bf16", description="dtype of the final file; checkpoints are always in fp32"
    )

    def usual_rate(self, lora_rate: float) -> float:
        """A tenth of a LoRA's."""
        return _RATE * lora_rate

    def chosen(self, sites: Sequence[LinearSite]) -> frozenset[str]:
        """All parts."""
        return frozenset(part.name for site in sites for part in site.parts)

    def trained(self, denoiser: Denoiser) -> tuple[int, int]:
        """(number of weights, total number of elements), norms and embedders included."""
        sizes = [parameter.numel() for parameter in _network(denoiser).parameters()]
        return len(sizes), sum(sizes)

    def part_parameters(self, in_features: int, out_features: int) -> int:
        """in * out."""
        return in_features * out_features

    def part_casts(self, in_features: int, out_features: int) -> int:
        """0: they are always cast once per optimizer step."""
        return 0

    def file_bytes(self, parameters: int) -> int:
        """Size of the whole model."""
        return parameters * (2 if self.saved_dtype == "bf16" else 4)

    def part_activations(self, in_features: int, out_features: int) -> int:
        """0: the gradient of a weight needs the input alone."""
        return 0

    def require_host(self, denoiser: Denoiser) -> None:
        """Raises ConfigError if the host or its quantisation does not hold the weights in plain tensors."""
        from .full_weights import trained_parameters

        trained_parameters(_network(denoiser))

    def build(self, denoiser: Denoiser, teacher: Teacher, seed: int) -> FullWeights:
        """The network's weights; the seed has no effect.

        Raises:
            ConfigError: as in `require_host`.
        """
        from .full_weights import FullWeights

        return FullWeights(_network(denoiser), teacher)

    def build_sharded(self, denoiser: Denoiser, teacher: Teacher, seed: int, mesh: DeviceMesh) -> ShardedWeights:
        """The network's weights in parts, one per rank; the seed has no effect.

        Raises:
            ConfigError: as in `require_host`, or the weights have several dtypes.
        """
        from .sharded_weights import ShardedWeights

        return ShardedWeights(_network(denoiser), denoiser.blocks(), mesh, teacher)

    def imported(self, tensors: Mapping[str, Tensor], sites: Sequence[LinearSite]) -> ImportedLora:
        """Raises ConfigError: there is no LoRA, of tensors of any shape, to start from."""
        raise _no_lora()

    def start_state(self, initial: Mapping[str, Tensor], fresh: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Raises ConfigError: there is no LoRA, of tensors of any shape, to start from."""
        raise _no_lora()

    def exported(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The weights of any shape as they are, under diffusers' names."""
        return dict(state)

    def save(self, path: Path, state: Mapping[str, Tensor], family: Family, metadata: Mapping[str, str]) -> None:
        """Writes the whole model, weights of any shape, in the layout of the family's single file."""
        from .full_file import save_model

        save_model(path, state, family, metadata, self.saved_dtype)


def _network(denoiser: Denoiser) -> nn.Module:
    if isinstance(denoiser, WholeNetwork):
        return denoiser.network()
    raise ConfigError(
        (
            "adapter full trains the network's own weights, which ComfyUI may stream or quantise: choose lora, dora or "
            "lokr here, or train with python -m dopsd_core train --adapter full",
        )
    )


def _no_lora() -> ConfigError:
    return ConfigError(("adapter full trains the model itself and cannot start from a LoRA; choose adapter lora",))
