"""The error for invalid configurations."""

from __future__ import annotations

from collections.abc import Sequence


class ConfigError(ValueError):
    """Raised if values of a configuration are invalid; the message lists all problems.

    Attributes:
        problems: one sentence each, with the option and what to do.
    """

    def __init__(self, problems: Sequence[str]) -> None:
        listing = "\n".join(f"- {problem}" for problem in problems)
        super().__init__(f"{len(problems)} problem{'s' * (len(problems) != 1)} in the configuration:\n{listing}")
        self.problems = tuple(problems)

    def __reduce__(self) -> tuple[type[ConfigError], tuple[tuple[str, ...]]]:
        return ConfigError, (self.problems,)  # so that it can be pickled by a worker process
