"""The error that lists everything wrong with a configuration."""

from __future__ import annotations

from collections.abc import Sequence


class ConfigError(ValueError):
    """A configuration that cannot be run; the message lists everything wrong with it.

    Attributes:
        problems: one sentence each, naming the option and the remedy.
    """

    def __init__(self, problems: Sequence[str]) -> None:
        listing = "\n".join(f"- {problem}" for problem in problems)
        super().__init__(f"{len(problems)} problem{'s' * (len(problems) != 1)} in the configuration:\n{listing}")
        self.problems = tuple(problems)

    def __reduce__(self) -> tuple[type[ConfigError], tuple[tuple[str, ...]]]:
        return ConfigError, (self.problems,)  # so that it survives the way out of a worker process
