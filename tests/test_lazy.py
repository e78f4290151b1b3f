"""A lazy module is the module, and imports it no earlier than its first use."""

import subprocess
import sys
from pathlib import Path

import pytest

from dopsd_core.lazy import lazy


def test_its_attributes_are_the_modules() -> None:
    import math

    stand_in = lazy("math")
    assert stand_in.pi is math.pi and stand_in.__name__ == "math"
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = stand_in.nothing


def test_it_is_imported_at_the_first_use_alone() -> None:
    code = (
        "import sys; from dopsd_core.lazy import lazy; dbm = lazy('dbm.dumb'); hasattr(dbm, '__path__'); "
        "before = 'dbm.dumb' in sys.modules; dbm.open; print(before, 'dbm.dumb' in sys.modules)"
    )
    root = Path(__file__).parent.parent
    result = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, timeout=60)
    assert result.stdout.split() == ["False", "True"], result.stderr
