"""Selects the Linears to train.

A target is one of: a name or a dotted suffix of one ("attention.to_q", as in peft); a shell pattern over full names
("layers.*.attention.*"); a regular expression over full names after "re:" ("re:layers\\.[0-3]\\..*").
"""

from __future__ import annotations

import difflib
import fnmatch
import re
from collections import Counter
from collections.abc import Sequence

_WILDCARDS = re.compile(r"[*?\[]")
_BETWEEN_TARGETS = re.compile(r"[,\n](?![^{}\n]*\})")


def parse_targets(text: str) -> tuple[str, ...]:
    """Splits a text at commas and line breaks into targets; () for an empty text.

    Names contain no commas. A comma inside {m,n} of a regular expression does not split.
    """
    return tuple(target for piece in _BETWEEN_TARGETS.split(text) if (target := piece.strip()))


def match_targets(names: Sequence[str], targets: Sequence[str]) -> frozenset[str]:
    """The names that at least one target matches.

    Raises:
        ValueError: a target matches nothing; the message lists the available kinds of names and the closest ones.
    """
    chosen: set[str] = set()
    for target in targets:
        hits = [name for name in names if _selects(target, name)]
        if not hits:
            raise ValueError(_unmatched_message(target, names))
        chosen.update(hits)
    return frozenset(chosen)


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
    return f"{message} Available: {listing or 'none'}"
