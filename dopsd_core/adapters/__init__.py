"""Adapters: what is trained on top of the frozen network, or all of its weights.

A new one is a module here and an entry in `ADAPTERS`.
"""

from __future__ import annotations

from ..options import Registry
from .base import Adapter
from .dora import Dora
from .full import Full
from .lokr import Lokr
from .lora import Lora

__all__ = ["ADAPTERS", "Adapter", "Dora", "Full", "Lokr", "Lora"]

ADAPTERS: Registry[Adapter] = Registry("adapter", Lora, Dora, Lokr, Full)
