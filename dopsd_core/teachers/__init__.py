"""The teacher's weights, one choice per module. A new one is a module here and an entry in `TEACHERS`.

What the teacher SEES, its view of the target, is defined in `conditioning/teachers.py`.
"""

from __future__ import annotations

from ..options import Registry
from .base import Teacher
from .ema import EmaTeacher
from .frozen import FrozenTeacher
from .same import SameTeacher

__all__ = ["TEACHERS", "EmaTeacher", "FrozenTeacher", "SameTeacher", "Teacher"]

TEACHERS: Registry[Teacher] = Registry("teacher", EmaTeacher, FrozenTeacher, SameTeacher)
