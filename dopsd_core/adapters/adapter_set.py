"""Adapters on a frozen network: student and teacher weights share ONE copy of the base.

The mechanism is the same for every host: each Linear gets a `forward` as an instance attribute. No module is wrapped,
renamed or copied, so module paths and the state dict do not change; removing the attribute restores the network.
What an adapter computes on one Linear is in its `SiteWeights`: lora_weights.py, dora_weights.py, lokr_weights.py.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..denoiser import LinearSite, SitePart
from ..teachers import Teacher
from ..trainable import Role
from ..transfer import copies_on_host
from .casts import Casts, renew
from .frozen_linear import frozen_linear
from .lora import Lora
from .site_weights import DERIVED, SiteWeights
from .switched_weights import SwitchedWeights, checked_role

log = logging.getLogger("dopsd")

_OWNER = "_dopsd_adapter_set"


@dataclass(frozen=True, eq=False)
class _SiteAdapter:
    """The adapted parts of one site, with the weights of both roles."""

    site: LinearSite
    student: SiteWeights
    teacher: SiteWeights | None


class AdapterSet(SwitchedWeights):
    """The trainable weights of the student, the teacher's weights, and the switch between them, on one network.

    Example::

        adapters = AdapterSet(denoiser.sites(), Lora(targets=family.lora_targets), seed=0)
        with adapters.attached():
            with adapters.use("teacher"), torch.no_grad():
                target = denoiser.predict_x0(x, sigma, conditions)

    The student starts bit-identical to the base. The weights of each part are a function of (seed, part name) only:
    fused and split hosts start from the same weights.

    Raises:
        ValueError: the adapter does not work with a site, a target matches nothing, two sites share a module, or two
            parts share a name.
    """

    def __init__(
        self,
        sites: Sequence[LinearSite],
        config: Lora,
        *,
        seed: int = 0,
        device: torch.device | str = "cpu",
        teacher: Teacher | str = "ema",
    ) -> None:
        """teacher: whose weights teach; a name selects that choice with its defaults."""
        _check_distinct(sites)
        self.config = config
        super().__init__(teacher)
        self.strength = 1.0
        """Factor of the change that the adapter makes, for sampling; 1 in training."""
        self._sites = tuple(sites)
        chosen = config.chosen(sites)
        self._adapters = [
            self._new_adapter(site, tuple(p for p in site.parts if p.name in chosen), seed, torch.device(device))
            for site in sites
            if any(p.name in chosen for p in site.parts)
        ]
        self._previous: dict[nn.Module, Callable[..., Any] | None] = {}
        self._overrides: dict[nn.Module, Callable[..., Any]] = {}

    def _new_adapter(
        self, site: LinearSite, parts: tuple[SitePart, ...], seed: int, device: torch.device
    ) -> _SiteAdapter:
        student = self.config.site_weights(site, parts, seed, device)
        teacher = student.mapped(lambda tensor: tensor.detach().clone()) if self.has_teacher else None
        return _SiteAdapter(site, student, teacher)

    # -- attaching ----------------------------------------------------------------------------------------------------

    @property
    def is_attached(self) -> bool:
        """Whether the network currently runs through this set."""
        return bool(self._overrides)

    def attach(self) -> None:
        """Routes every site through this set: targets with LoRA, all others frozen.

        Raises:
            RuntimeError: this or another set is already attached to one of the modules; nothing is changed.
        """
        for site in self._sites:
            owner = owner_of(site.module)
            if owner is not None:
                whose = "this" if owner is self else "another"
                raise RuntimeError(f"{whose} adapter set is already attached to {site.name!r}; detach() it first")
        by_site = {id(a.site): a for a in self._adapters}
        try:
            for site in self._sites:
                override = self._make_override(site, by_site.get(id(site)))
                self._previous[site.module] = site.module.__dict__.get("forward")
                self._overrides[site.module] = override
                site.module.__dict__["forward"] = override
        except BaseException:
            self.detach()
            raise

    def detach(self) -> None:
        """Restores every module's forward from before `attach`; does nothing if not attached."""
        for module, override in self._overrides.items():
            if module.__dict__.get("forward") is not override:
                # Another override wraps ours. It stays; ours, inside it, passes through from now on.
                log.warning("a %s has another forward on top of the adapter's; it is kept", type(module).__name__)
                continue
            previous = self._previous[module]
            if previous is None:
                del module.__dict__["forward"]
            else:
                module.__dict__["forward"] = previous
        self._overrides.clear()
        self._previous.clear()

    def _make_override(self, site: LinearSite, adapter: _SiteAdapter | None) -> Callable[[Tensor], Tensor]:
        def forward(x: Tensor) -> Tensor:
            if not self.is_attached:
                return site.forward(x)
            base = frozen_linear(x, site)
            weights = self._active(adapter) if adapter is not None else None
            if weights is None:
                return base
            if self.strength == 1:
                return weights.apply(base, x)
            return base + self.strength * (weights.apply(base.clone(), x) - base)

        setattr(forward, _OWNER, self)
        return forward

    def _active(self, adapter: _SiteAdapter) -> SiteWeights | None:
        if self._mode == "off" or (self._mode == "teacher" and self.teacher.weights == "base"):
            return None
        if self._mode == "teacher" and adapter.teacher is not None:
            return adapter.teacher
        if self._mode == "teacher" and torch.is_grad_enabled():
            return adapter.student.mapped(Tensor.detach)
        return adapter.student

    # -- compute dtype ------------------------------------------------------------------------------------------------

    def keep_casts(self, keeps: bool) -> None:
        """Whether weights are cast to the compute dtype once per optimizer step, which takes the memory of the copies,
        or in each forward; once by default. The result is the same."""
        for casts in self._casts():
            casts.keeps = keeps
            if not keeps:
                casts.forget()

    def _casts(self) -> list[Casts]:
        both = ((adapter.student, adapter.teacher) for adapter in self._adapters)
        return [weights.casts for pair in both for weights in pair if weights is not None]

    # -- weights ------------------------------------------------------------------------------------------------------

    def parameters(self) -> list[nn.Parameter]:
        """The student's trained tensors, fp32, in site order, for the optimizer; all are matrices.

        For LoRA A [parts * rank, in] and B [rows, rank].
        """
        return [t for adapter in self._adapters for t in adapter.student.tensors() if isinstance(t, nn.Parameter)]

    @torch.no_grad()
    def update_teacher(self) -> None:
        """Updates the teacher's weights from the student's, if it has its own, and what is cast from both."""
        if self.has_teacher:
            teacher = [t for a in self._adapters if a.teacher is not None for t in a.teacher.tensors()]
            self.teacher.update(teacher, [p.data for p in self.parameters()])
        renew(self._casts())

    def part_names(self) -> list[str]:
        """The adapted parts, in site order."""
        return [part.name for adapter in self._adapters for part in adapter.student.parts]

    def state(self, which: Role = "student") -> dict[str, Tensor]:
        """Copies on the CPU, fp32. For LoRA "<part>.lora_A.weight" [rank, in], "<part>.lora_B.weight" [rows, rank].

        alpha is NOT folded in. The student's contains what files need besides (`SiteWeights.derived`). Empty for a
        teacher without weights of its own.
        """
        tensors = self._views(which) | (self._derived() if which == "student" else {})
        return copies_on_host(tensors)

    def load_state(self, which: Role, tensors: Mapping[str, Tensor]) -> None:
        """Loads what `state` returned, in place, so that the optimizer's references stay valid.

        Raises:
            ValueError: keys are missing or unexpected, or a shape differs; nothing is loaded.
        """
        self._load(which, tensors, f"LoRA weights of the {which} do not fit the targets", DERIVED)

    def _views(self, which: Role) -> dict[str, Tensor]:
        checked_role(which)
        views: dict[str, Tensor] = {}
        for adapter in self._adapters:
            weights = adapter.student if which == "student" else adapter.teacher
            if weights is not None:
                views |= weights.views()
        return views

    def _derived(self) -> dict[str, Tensor]:
        return {key: value for adapter in self._adapters for key, value in adapter.student.derived().items()}


def owner_of(module: nn.Module) -> AdapterSet | None:
    """The adapter set that is attached to the module, if there is one."""
    return getattr(module.__dict__.get("forward"), _OWNER, None)


def _check_distinct(sites: Sequence[LinearSite]) -> None:
    modules = {id(site.module) for site in sites}
    names = [part.name for site in sites for part in site.parts]
    if len(modules) != len(sites):
        raise ValueError("two sites share one module; list every Linear once")
    if len(set(names)) != len(names):
        twice = sorted({n for n in names if names.count(n) > 1})
        raise ValueError(f"part names must be distinct, these are not: {', '.join(twice[:5])}")
