"""Whose weights teach, one module each. A new one is a module here and an entry in `TEACHERS`.

What the teacher is SHOWN, a view of the target, stands in `conditioning/teachers.py`.
"""

from __future__ import annotations

from ..options import Registry
from .base import Teacher
from .ema import EmaTeacher
from .frozen import FrozenTeacher
from .same import SameTeacher

__all__ = ["TEACHERS", "EmaTeacher", "FrozenTeacher", "SameTeacher", "Teacher"]

TEACHERS: Registry[Teacher] = Registry("teacher", EmaTeacher, FrozenTeacher, SameTeacher)
