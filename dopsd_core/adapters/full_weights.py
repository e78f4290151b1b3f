"""The network's own weights as trainable weights of student and teacher.

Each weight has an fp32 master, the parameter that the optimizer sees. A network in fp32 computes with the masters; one
in 16 bits with copies that are cast from them once per optimizer step, whose gradients are added up in fp32. The
teacher's moving average is fp32 too. Which of them the network computes with is an entry in its modules: the original
tensors are never written, and are put back on detaching.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..options import ConfigError
from ..teachers import Teacher
from ..trainable import Mode, Role
from .adapter_set import owner_of
from .switched_weights import ExchangedWeights, checked_role

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True, eq=False)
class NetworkWeight:
    """A parameter of the network.

    Attributes:
        name: its path in the network, the first one if it has several.
        places: (module, key) of each of its paths.
        original: the network's own, of any shape.
    """

    name: str
    places: tuple[tuple[nn.Module, str], ...]
    original: nn.Parameter


@dataclass(frozen=True, eq=False)
class _Trained:
    """What the modes compute with instead of one weight, all of its shape.

    Attributes:
        weight: the weight.
        master: the student's, fp32.
        student: the student's in the network's dtype; the master itself in fp32.
        average: the teacher's, fp32; None for a teacher without weights of its own.
        teacher: the teacher's in the network's dtype; the average itself in fp32.
    """

    weight: NetworkWeight
    master: nn.Parameter
    student: nn.Parameter
    average: Tensor | None
    teacher: Tensor | None

    @classmethod
    def of(cls, weight: NetworkWeight, has_teacher: bool) -> _Trained:
        """Student and teacher start as the original, bit for bit."""
        original = weight.original.detach()
        master = nn.Parameter(original.to(torch.float32, copy=True))
        student = master
        if original.dtype != torch.float32:
            student = nn.Parameter(original.clone())
            student.register_post_accumulate_grad_hook(_adding_to(master))
        average = original.to(torch.float32, copy=True) if has_teacher else None
        is_cast = average is not None and original.dtype != torch.float32
        return cls(weight, master, student, average, original.clone() if is_cast else average)


class FullWeights(ExchangedWeights):
    """All weights of a network: the student's, the teacher's, and the switch between them and the original ones.

    Example::

        weights = FullWeights(denoiser.network(), teacher="ema")
        with weights.attached(), weights.use("teacher"), torch.no_grad():
            target = denoiser.predict_x0(x, sigma, conditions)

    Raises:
        ConfigError: a weight is quantised, or the network has none.
    """

    def __init__(self, network: nn.Module, teacher: Teacher | str = "ema") -> None:
        """teacher: whose weights teach; a name selects that choice with its defaults."""
        super().__init__(teacher)
        self._weights = [_Trained.of(weight, self.has_teacher) for weight in trained_parameters(network)]
        self._cast_from = self._master_versions()

    # -- attached: student, teacher, off ------------------------------------------------------------------------------

    def _require_original(self) -> None:
        for weight in (trained.weight for trained in self._weights):
            if any(module._parameters.get(key) is not weight.original for module, key in weight.places):
                raise RuntimeError(f"{weight.name} is not the network's own weight now; detach what replaced it first")
            if any(owner_of(module) is not None for module, _ in weight.places):
                raise RuntimeError(
                    f"an adapter set is already attached to the layer of {weight.name}; detach() it first"
                )

    def _switch(self, mode: Mode) -> None:
        if self._cast_from != self._master_versions():  # a schedule-free optimizer put other weights in place
            self._cast()
        super()._switch(mode)

    def _show(self, mode: Mode) -> None:
        for trained in self._weights:
            value = self._active(trained, mode)
            for module, key in trained.weight.places:
                module._parameters[key] = value  # type: ignore[assignment]  # torch only reads it

    def _active(self, trained: _Trained, mode: Mode) -> Tensor:
        if mode == "off" or (mode == "teacher" and self.teacher.weights == "base"):
            return trained.weight.original
        if mode == "teacher":
            return trained.student.detach() if trained.teacher is None else trained.teacher
        return trained.student

    # -- weights ------------------------------------------------------------------------------------------------------

    def parameters(self) -> list[nn.Parameter]:
        """The masters, fp32, in the network's order, of any shape."""
        return [trained.master for trained in self._weights]

    @torch.no_grad()
    def update_teacher(self) -> None:
        """Updates the teacher's weights from the student's, and what the network computes with from both."""
        if self.has_teacher:
            self.teacher.update(self._averages(), [master.data for master in self.parameters()])
        self._cast()

    def state(self, which: Role = "student") -> dict[str, Tensor]:
        """Copies on the CPU, fp32, by the names and in the shapes of the network's weights.

        Empty for a teacher without weights of its own.
        """
        return {name: value.detach().to("cpu", copy=True) for name, value in self._views(which).items()}

    def load_state(self, which: Role, tensors: Mapping[str, Tensor]) -> None:
        """Loads what `state` returned, of any shape, in place, so that the optimizer's references stay valid.

        Raises:
            ValueError: names are missing or unexpected, or a shape differs; nothing is loaded.
        """
        self._load(which, tensors, f"weights of the {which} do not fit the network")
        self._cast()

    def _views(self, which: Role) -> dict[str, Tensor]:
        values = self.parameters() if checked_role(which) == "student" else self._averages()
        return {trained.weight.name: value for trained, value in zip(self._weights, values, strict=False)}

    def _averages(self) -> list[Tensor]:
        return [trained.average for trained in self._weights if trained.average is not None]

    @torch.no_grad()
    def _cast(self) -> None:
        """Copies masters and averages to what a network in 16 bits computes with."""
        for trained in self._weights:
            if trained.student is not trained.master:
                trained.student.copy_(trained.master)
            if trained.teacher is not None and trained.teacher is not trained.average:
                trained.teacher.copy_(trained.average)  # type: ignore[arg-type]  # the two are set together
        self._cast_from = self._master_versions()

    def _master_versions(self) -> list[int]:
        return [trained.master._version for trained in self._weights]


def trained_parameters(network: nn.Module) -> list[NetworkWeight]:
    """The weights of the network, each once.

    Raises:
        ConfigError: one is quantised, or there are none.
    """
    places: dict[nn.Parameter, list[tuple[str, nn.Module, str]]] = {}
    for path, module in network.named_modules():
        for key, parameter in module._parameters.items():
            if parameter is not None:
                places.setdefault(parameter, []).append((f"{path}.{key}" if path else key, module, key))
    for parameter, ((name, *_), *_) in places.items():
        is_plain = type(parameter) is nn.Parameter and type(parameter.data) is Tensor
        if not is_plain or parameter.dtype not in _DTYPES:
            kind = str(parameter.dtype).removeprefix("torch.") if is_plain else type(parameter.data).__name__
            raise ConfigError((f"adapter full trains plain weights, and {name} is {kind}: leave out --quantise",))
    if not places:
        raise ConfigError(("adapter full needs a network with weights, and this one has none",))
    return [
        NetworkWeight(found[0][0], tuple((module, key) for _, module, key in found), parameter)
        for parameter, found in places.items()
    ]


def _adding_to(master: nn.Parameter) -> Callable[[Tensor], None]:
    """A hook that moves a parameter's gradient, of any shape, to its master, in fp32."""

    def hook(parameter: Tensor) -> None:
        gradient, parameter.grad = parameter.grad, None
        if gradient is None:
            return
        if master.grad is None:
            master.grad = gradient.float()
        else:
            master.grad.add_(gradient)

    return hook
