"""Which Linears get a LoRA, and of what size."""

from __future__ import annotations

import difflib
import fnmatch
import hashlib
import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..denoiser import LinearSite

_WILDCARDS = re.compile(r"[*?\[]")
_BETWEEN_TARGETS = re.compile(r"[,\n](?![^{}\n]*\})")
_MAX_RANK = 1024


@dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """Size and targets of a LoRA; its output is scaled by alpha / rank.

    A target is one of: a name or the dotted tail of one ("attention.to_q", as peft reads it); a shell pattern over
    whole names ("layers.*.attention.*"); a regular expression over whole names after "re:"
    ("re:layers\\.[0-3]\\..*").
    """

    rank: int = 16
    alpha: float = 16.0
    targets: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not _is_number(self.rank, int) or not 1 <= self.rank <= _MAX_RANK:
            raise ValueError(f"LoRA rank must be within 1..{_MAX_RANK}, a whole number, got {self.rank!r}")
        if not _is_number(self.alpha, (int, float)) or not 0 < self.alpha < math.inf:
            raise ValueError(f"LoRA alpha must be positive, got {self.alpha!r}; use alpha = rank for a scale of 1")
        if not self.targets:
            raise ValueError("LoRA targets are empty; pass the family's, families.FAMILIES[name].lora_targets")
        if isinstance(self.targets, str) or not all(isinstance(target, str) for target in self.targets):
            raise ValueError(f"LoRA targets must be a list of names or patterns, got {self.targets!r}")

    @property
    def scale(self) -> float:
        """alpha / rank."""
        return self.alpha / self.rank


def parse_targets(text: str) -> tuple[str, ...]:
    """The targets of a text: separated by commas or lines, () for none.

    No name has a comma in it, so the only one that a regular expression needs is that of {m,n}: it separates nothing.
    """
    return tuple(target for piece in _BETWEEN_TARGETS.split(text) if (target := piece.strip()))


def match_targets(names: Sequence[str], targets: Sequence[str]) -> frozenset[str]:
    """The names that at least one target selects.

    Raises:
        ValueError: a target selects nothing; the message lists every kind of name there is, and the nearest ones.
    """
    chosen: set[str] = set()
    for target in targets:
        hits = [name for name in names if _selects(target, name)]
        if not hits:
            raise ValueError(_unmatched_message(target, names))
        chosen.update(hits)
    return frozenset(chosen)


def lora_size(sites: Sequence[LinearSite], config: LoraConfig) -> tuple[int, int]:
    """How many parts get a LoRA, which are modules of the unfused network, and how many parameters it has in all."""
    chosen = match_targets([part.name for site in sites for part in site.parts], config.targets)
    widths = [site.in_features + part.out_features for site in sites for part in site.parts if part.name in chosen]
    return len(widths), config.rank * sum(widths)


def part_seed(seed: int, name: str) -> int:
    """A seed in 0..2^63-1 for one part, a function of (seed, name) alone."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{name}".encode()).digest()[:8], "big") >> 1


def _is_number(value: object, kinds: type | tuple[type, ...]) -> bool:
    return isinstance(value, kinds) and not isinstance(value, bool)


def _selects(target: str, name: str) -> bool:
    if target.startswith("re:"):
        try:
            return re.fullmatch(target[3:], name) is not None
        except re.error as error:
            raise ValueError(f"target {target!r} is not a regular expression: {error}") from error
    if _WILDCARDS.search(target):
        return fnmatch.fnmatchcase(name, target)
    return name == target or name.endswith("." + target)


def _unmatched_message(target: str, names: Sequence[str]) -> str:
    kinds = Counter(re.sub(r"(^|\.)\d+(?=\.|$)", r"\1N", name) for name in names)
    listing = ", ".join(f"{kind} (x{count})" if count > 1 else kind for kind, count in sorted(kinds.items()))
    near = difflib.get_close_matches(target, kinds, n=3, cutoff=0.5)
    hint = f" Nearest: {', '.join(near)}." if near else ""
    message = f"LoRA target {target!r} matches none of the network's {len(names)} Linears.{hint}"
    return f"{message} There are: {listing or 'none'}"
