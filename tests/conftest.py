"""What holds for all tests of the core."""

from __future__ import annotations

from hypothesis import settings

settings.register_profile("any machine", deadline=None)  # no test may depend on the speed of the machine
settings.load_profile("any machine")
