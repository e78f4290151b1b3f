"""All weights of a network, of which each rank holds a part (FSDP2, `torch.distributed.fsdp.fully_shard`).

The network's parameters become fp32 masters that all ranks share: each holds 1/W of every weight, gathers the weights
of one block at a time in the network's dtype to compute with, and gets its part of the summed gradients in fp32. The
teacher's average and the original weights are parts of the same kind. Student, teacher and original are switched by
exchanging the contents of these parts, so that no rank ever holds a second whole network.

Every forward and every state is a communication: all ranks have to do the same in the same order. `training/world.py`
orders the batches accordingly, and each switch checks it. A network that is sharded once stays so in its process.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from ..dtensors import divided, is_sharded, local, swap_parts, whole, with_parts
from ..options import ConfigError
from ..teachers import Teacher
from ..trainable import Mode, Role
from .full_weights import trained_parameters
from .switched_weights import ExchangedWeights, checked_role

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


class ShardedWeights(ExchangedWeights):
    """All weights of a network in parts: the student's, the teacher's, and the original ones.

    The network stays divided when they are detached.

    Raises:
        ConfigError: a weight is quantised, the weights have several dtypes, or the network has none.
    """

    is_sharded: ClassVar[bool] = True

    def __init__(
        self, network: nn.Module, blocks: Sequence[nn.Module], mesh: DeviceMesh, teacher: Teacher | str = "ema"
    ) -> None:
        """Divides the network, which stays divided.

        Args:
            network: whole and equal on every rank.
            blocks: its blocks, each of which is gathered and computed as one.
            mesh: all ranks in one row.
            teacher: whose weights teach; a name selects that choice with its defaults.
        """
        super().__init__(teacher)
        self._mesh = mesh
        self._names = [weight.name for weight in trained_parameters(network)]
        _shard(network, blocks, mesh)
        found = dict(network.named_parameters())
        self._parameters = [_as_parameter(found[name]) for name in self._names]
        in_network = [local(parameter.detach()) for parameter in self._parameters]
        self._in_network = in_network
        self._held = {"off": in_network, "student": [part.clone() for part in in_network]}
        if self.has_teacher:
            self._held["teacher"] = [part.clone() for part in in_network]

    def _require_original(self) -> None:
        if self._is_attached:
            raise RuntimeError("these weights are already attached to the network; detach() them first")

    def _switch(self, mode: Mode) -> None:
        if self._is_attached and mode != self._mode:
            self._require_agreement(mode)
        super()._switch(mode)

    def _switch_back(self, mode: Mode) -> None:
        super()._switch(mode)  # the other processes wait elsewhere: asking them would be for ever

    def _require_agreement(self, mode: Mode) -> None:
        """Ranks that compute with different weights would gather a mixture of them."""
        from torch.distributed.tensor import DTensor
        from torch.distributed.tensor.placement_types import Partial

        number = torch.full((1,), float(("student", "teacher", "off").index(mode)), device=self._in_network[0].device)
        highest: Any = DTensor.from_local(number, self._mesh, [Partial("max")], run_check=False)
        lowest: Any = DTensor.from_local(number, self._mesh, [Partial("min")], run_check=False)
        if not torch.equal(highest.full_tensor(), lowest.full_tensor()):
            raise RuntimeError("the processes compute with different weights at the same time; please report this")

    @torch.no_grad()
    def _show(self, mode: Mode) -> None:
        wanted = self._kind(mode)
        shown = next(kind for kind, parts in self._held.items() if parts is self._in_network)
        if wanted != shown:
            swap_parts(self._in_network, self._held[wanted])
            self._held[wanted], self._held[shown] = self._held[shown], self._held[wanted]

    def _kind(self, mode: Mode) -> str:
        if mode == "teacher" and not self.has_teacher:
            return "off" if self.teacher.weights == "base" else "student"
        return mode

    # -- weights ------------------------------------------------------------------------------------------------------

    def parameters(self) -> list[nn.Parameter]:
        """The masters, fp32, in parts, in the network's order, of any shape; the student's while it is attached."""
        return self._parameters

    @torch.no_grad()
    def update_teacher(self) -> None:
        """Updates the teacher's weights from the student's, each rank its part."""
        if self.has_teacher:
            self.teacher.update(self._held["teacher"], self._held["student"])

    def state(self, which: Role = "student") -> dict[str, Tensor]:
        """Copies on the CPU, fp32, by the names and in the shapes of the network's weights, on rank 0 alone.

        All ranks have to call this together; the others get an empty dictionary. Empty for a teacher without weights
        of its own.
        """
        gathered: dict[str, Tensor] = {}
        for name, parts in self.parts(which).items():
            tensor = whole(parts)
            if self._mesh.get_rank() == 0:
                gathered[name] = tensor.to("cpu", copy=True)
        return gathered

    def parts(self, which: Role) -> dict[str, Tensor]:
        """The weights of a role in parts, fp32, by name, of any shape; shared with this object."""
        return self._views(which)

    def load_state(self, which: Role, tensors: Mapping[str, Tensor]) -> None:
        """Loads weights of any shape, in parts or whole on every rank, in place.

        Raises:
            ValueError: names are missing or unexpected, or a shape differs; nothing is loaded.
        """
        views = self._views(checked_role(which))
        fitting = {
            n: divided(t, views[n]) if n in views and t.shape == views[n].shape else t for n, t in tensors.items()
        }
        self._load(which, fitting, f"weights of the {which} do not fit the network")

    def _views(self, which: Role) -> dict[str, Tensor]:
        if checked_role(which) == "teacher" and not self.has_teacher:
            return {}
        held = self._held[which]
        return {
            name: with_parts(part, parameter)
            for name, part, parameter in zip(self._names, held, self._parameters, strict=True)
        }


def _shard(network: nn.Module, blocks: Sequence[nn.Module], mesh: DeviceMesh) -> None:
    """Turns the weights into fp32 parts that are gathered in the network's dtype.

    Raises:
        ConfigError: the weights have several dtypes.
    """
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    dtypes = {parameter.dtype for parameter in network.parameters()}
    if len(dtypes) > 1:
        names = " and ".join(sorted(str(dtype).removeprefix("torch.") for dtype in dtypes))
        raise ConfigError((f"full weights on several processes need a network in one dtype, and this one has {names}",))
    (dtype,) = dtypes
    mixes = dtype != torch.float32
    policy = MixedPrecisionPolicy(
        param_dtype=dtype if mixes else None, reduce_dtype=torch.float32 if mixes else None, cast_forward_inputs=False
    )
    for module in (*blocks, network):  # block by block, so that no rank ever holds the whole network in fp32
        for parameter in module.parameters():
            if not is_sharded(parameter):
                parameter.data = parameter.data.float()
                parameter.requires_grad_(True)
        # the root would keep what it gathered by default, and the next forward may need other weights
        sharded: Any = fully_shard(module, mesh=mesh, mp_policy=policy, reshard_after_forward=True)
        sharded.set_gradient_divide_factor(1.0)  # losses are divided by the number of batches already
        sharded.set_force_sum_reduction_for_comms(True)  # gloo cannot scale while it sums


def _as_parameter(tensor: Tensor) -> nn.Parameter:
    assert isinstance(tensor, nn.Parameter)
    return tensor
