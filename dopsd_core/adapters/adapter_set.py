"""LoRA on a frozen network: student and teacher weights share ONE copy of the base.

The mechanism is the same for every host: each Linear gets a `forward` as an instance attribute. No module is wrapped,
renamed or copied, so module paths and the state dict do not change; removing the attribute restores the network.

y = W x + (alpha / rank) * B (A x), A [rank, in], B [rows, rank]. A fused projection has one A and B per part; the As
are stacked, [parts * rank, in], for a single GEMM. Master weights are fp32, cast to the compute dtype in the forward.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, get_args

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from ..denoiser import LinearSite, SitePart
from ..teachers import TEACHERS, Teacher
from ..trainable import Mode, Role
from .frozen_linear import frozen_linear
from .lora import Lora

log = logging.getLogger("dopsd")

_OWNER = "_dopsd_adapter_set"


@dataclass(frozen=True, eq=False)
class _Weights:
    """A [parts * rank, in_features], stacked; B one [rows, rank] per part."""

    a: Tensor
    b: tuple[Tensor, ...]

    def tensors(self) -> list[Tensor]:
        return [self.a, *self.b]

    def detached(self) -> _Weights:
        return _Weights(self.a.detach(), tuple(b.detach() for b in self.b))


@dataclass(frozen=True, eq=False)
class _SiteAdapter:
    """The adapted parts of one site."""

    site: LinearSite
    parts: tuple[SitePart, ...]
    student: _Weights
    teacher: _Weights | None

    def apply(self, weights: _Weights, base: Tensor, x: Tensor, scale: float) -> Tensor:
        """base [..., out_features] plus the low-rank update of x [..., in_features]; W + BA is never formed."""
        base_2d = base.reshape(-1, base.shape[-1])
        hidden = F.linear(x.reshape(-1, x.shape[-1]), weights.a.to(x.dtype)).to(base.dtype)
        by_part = rearrange(hidden, "tokens (part rank) -> part tokens rank", part=len(self.parts))
        segments: list[Tensor] = []
        end = 0
        for part, h, b in zip(self.parts, by_part, weights.b, strict=True):
            if part.start > end:
                segments.append(base_2d[:, end : part.start])
            segments.append(torch.addmm(base_2d[:, part.rows], h, b.to(base.dtype).t(), alpha=scale))
            end = part.stop
        if end < base_2d.shape[1]:
            segments.append(base_2d[:, end:])
        out = segments[0] if len(segments) == 1 else torch.cat(segments, dim=1)
        return out.reshape(base.shape)


class AdapterSet:
    """The trainable LoRA of the student, the teacher's weights, and the switch between them, on one network.

    Example::

        adapters = AdapterSet(denoiser.sites(), Lora(targets=family.lora_targets), seed=0)
        with adapters.attached():
            with adapters.use("teacher"), torch.no_grad():
                target = denoiser.predict_x0(x, sigma, conditions)

    Initialization: A ~ N(0, 1/rank^2) (peft's "gaussian") and B = 0, so the student starts bit-identical to the base.
    Each part's A is a function of (seed, part name) only: fused and split hosts start from the same weights.

    Raises:
        ValueError: a target matches nothing, two sites share a module, or two parts share a name.
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
        self.teacher: Teacher = TEACHERS.validated(teacher)
        self._mode: Mode = "student"
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
        rank = self.config.rank
        rows = []
        for part in parts:
            generator = torch.Generator().manual_seed(part_seed(seed, part.name))
            rows.append(torch.randn(rank, site.in_features, generator=generator) / rank)
        a = torch.cat(rows).to(device)
        student = _Weights(
            nn.Parameter(a), tuple(nn.Parameter(torch.zeros(p.out_features, rank, device=device)) for p in parts)
        )
        teacher = None
        if self.has_teacher:
            teacher = _Weights(a.clone(), tuple(torch.zeros_like(b, requires_grad=False) for b in student.b))
        return _SiteAdapter(site, parts, student, teacher)

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
            owner = getattr(site.module.__dict__.get("forward"), _OWNER, None)
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

    @contextmanager
    def attached(self) -> Iterator[AdapterSet]:
        """Attaches inside the `with` block and detaches on exit, also after an exception."""
        self.attach()
        try:
            yield self
        finally:
            self.detach()

    def _make_override(self, site: LinearSite, adapter: _SiteAdapter | None) -> Callable[[Tensor], Tensor]:
        scale = self.config.scale

        def forward(x: Tensor) -> Tensor:
            if not self.is_attached:
                return site.forward(x)
            base = frozen_linear(x, site)
            weights = self._active(adapter) if adapter is not None else None
            return base if adapter is None or weights is None else adapter.apply(weights, base, x, scale)

        setattr(forward, _OWNER, self)
        return forward

    # -- student, teacher, off ----------------------------------------------------------------------------------------

    @property
    def mode(self) -> Mode:
        """Whose weights the next forward uses, for all sites: "student" (the default), "teacher" or "off"."""
        return self._mode

    @mode.setter
    def mode(self, mode: Mode) -> None:
        """Raises ValueError if the mode is unknown."""
        if mode not in get_args(Mode):
            raise ValueError(f"mode must be one of {', '.join(get_args(Mode))}; got {mode!r}")
        self._mode = mode

    @contextmanager
    def use(self, mode: Mode) -> Iterator[None]:
        """Uses the given mode inside the `with` block and restores the previous one on exit. Copies nothing."""
        previous = self._mode
        self.mode = mode
        try:
            yield
        finally:
            self._mode = previous

    def _active(self, adapter: _SiteAdapter) -> _Weights | None:
        if self._mode == "off" or (self._mode == "teacher" and self.teacher.weights == "base"):
            return None
        if self._mode == "teacher":
            return adapter.teacher or adapter.student.detached()
        return adapter.student

    # -- weights ------------------------------------------------------------------------------------------------------

    def parameters(self) -> list[nn.Parameter]:
        """The student's A [parts * rank, in] and B [rows, rank], fp32, in site order, for the optimizer."""
        return [t for adapter in self._adapters for t in adapter.student.tensors() if isinstance(t, nn.Parameter)]

    @torch.no_grad()
    def update_teacher(self) -> None:
        """Updates the teacher's weights from the student's; does nothing if the teacher has no weights of its own."""
        if self.has_teacher:
            teacher = [t for a in self._adapters if a.teacher is not None for t in a.teacher.tensors()]
            self.teacher.update(teacher, [p.data for p in self.parameters()])

    @property
    def has_teacher(self) -> bool:
        """Whether the teacher has weights of its own."""
        return self.teacher.weights == "copy"

    def part_names(self) -> list[str]:
        """The adapted parts, in site order."""
        return [part.name for adapter in self._adapters for part in adapter.parts]

    def state(self, which: Role = "student") -> dict[str, Tensor]:
        """Copies on the CPU, fp32: "<part>.lora_A.weight" [rank, in], "<part>.lora_B.weight" [rows, rank].

        alpha is NOT folded in. Empty for a teacher without weights of its own.
        """
        return {key: t.detach().cpu().clone() for key, t in self._views(which).items()}

    @torch.no_grad()
    def load_state(self, which: Role, tensors: Mapping[str, Tensor]) -> None:
        """Loads what `state` returned, in place, so that the optimizer's references stay valid.

        Raises:
            ValueError: keys are missing or unexpected, or a shape differs; nothing is loaded.
        """
        views = self._views(which)
        missing, unexpected = sorted(views.keys() - tensors.keys()), sorted(tensors.keys() - views.keys())
        if missing or unexpected:
            raise ValueError(
                f"LoRA weights of the {which} do not fit the targets: {len(missing)} missing {missing[:4]}, "
                f"{len(unexpected)} unexpected {unexpected[:4]}"
            )
        for key, view in views.items():
            if view.shape != tensors[key].shape:
                raise ValueError(f"{key}: expected shape {tuple(view.shape)}, got {tuple(tensors[key].shape)}")
        for key, view in views.items():
            view.copy_(tensors[key])

    def _views(self, which: Role) -> dict[str, Tensor]:
        if which not in get_args(Role):
            raise ValueError(f"which must be one of {', '.join(get_args(Role))}; got {which!r}")
        views: dict[str, Tensor] = {}
        for adapter in self._adapters:
            weights = adapter.student if which == "student" else adapter.teacher
            if weights is None:
                continue
            by_part = rearrange(weights.a, "(part rank) inputs -> part rank inputs", part=len(adapter.parts))
            for part, a, b in zip(adapter.parts, by_part, weights.b, strict=True):
                views[f"{part.name}.lora_A.weight"] = a
                views[f"{part.name}.lora_B.weight"] = b
        return views


def part_seed(seed: int, name: str) -> int:
    """A seed in 0..2^63-1 for one part, a function of (seed, name) only."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{name}".encode()).digest()[:8], "big") >> 1


def _check_distinct(sites: Sequence[LinearSite]) -> None:
    modules = {id(site.module) for site in sites}
    names = [part.name for site in sites for part in site.parts]
    if len(modules) != len(sites):
        raise ValueError("two sites share one module; list every Linear once")
    if len(set(names)) != len(names):
        twice = sorted({n for n in names if names.count(n) > 1})
        raise ValueError(f"part names must be distinct, these are not: {', '.join(twice[:5])}")
