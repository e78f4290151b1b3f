"""Repeats of an image per epoch: the maximum, and the count in a folder name."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path

from .problems import Problems

MAX_REPEATS = 1000
"""Maximum number of repeats that a folder name, a row or the user may each request."""

_COUNT = re.compile(r"([0-9]+)_")
_DATE = re.compile(
    r"(?:19|20)[0-9]{2}"  # 2024_, 20240512_
    r"|0[0-9]{3,}"  # 0512_
    r"|[0-9]{2}_(?:0[1-9]|1[0-2])_(?:[0-2][0-9]|3[01])(?![0-9])"  # 24_05_12
    r"|[0-9]{1,2}_[0-9]{1,2}_(?:19|20)[0-9]{2}(?![0-9])"  # 12_5_2024
)

_NUMBERING = re.compile(r"0|[0-9]{1,2}_[0-9]{1,4}(?:_|$)")
"""An ambiguous count that may also be an index or a month: 01_front, 3_4_view, 12_2024."""


@dataclass
class NamedRepeats:
    """Reads the repeat counts in the names of a dataset's subfolders, each once.

    Attributes:
        root: the folder of the dataset.
        problems: collects the problems.
        known: counts read so far, by folder.
    """

    root: Path
    problems: Problems
    known: dict[Path, int] = field(default_factory=dict)

    def of(self, image: Path) -> int:
        """The count of the nearest parent folder below the root whose name begins with one; else 1."""
        for folder in image.parents:
            if folder == self.root:
                break
            count = _COUNT.match(folder.name)
            if count is not None:
                if folder not in self.known:
                    self.known[folder] = self._read(folder, count[1])
                return self.known[folder]
        return 1

    def _read(self, folder: Path, digits: str) -> int:
        rename = f"rename the folder, to 1_{folder.name} for 1 repeat"
        if _DATE.match(folder.name):
            message = f"its name begins with {digits}, which looks like a date but would mean {digits} repeats"
            self.problems.error(folder, None, f"{message}: {rename}")
        elif not 1 <= int(digits) <= MAX_REPEATS:
            message = f"its name requests {digits} repeats; 1 to {MAX_REPEATS} are allowed"
            self.problems.error(folder, None, f"{message}: {rename}")
        else:
            if _NUMBERING.match(folder.name) and int(digits) > 1:
                self.problems.warning(
                    folder, None, f"its name is read as {int(digits)} repeats: {rename} if that is not meant"
                )
            return int(digits)
        return 1
