"""D-OPSD: on-policy self-distillation for few-step diffusion models (arXiv 2605.05204).

    from dopsd_core import TrainConfig, build_training_set, read_dataset, train

Pure torch: nothing in this package imports ComfyUI, and only `standalone/` imports diffusers or transformers. The
names above are imported at their first use, so that the command line answers before torch is there.
"""

from __future__ import annotations

import logging
from importlib import import_module
from typing import TYPE_CHECKING, Any

from .text import make_printable

if TYPE_CHECKING:
    from .conditioning.encode import Encoder
    from .config import TrainConfig
    from .data.dataset import read_dataset
    from .denoiser import Denoiser
    from .training.trainer import Callbacks, train
    from .training.training_set import TrainingSet, build_training_set

__version__ = "0.2.0"
__all__ = [
    "Callbacks",
    "Denoiser",
    "Encoder",
    "TrainConfig",
    "TrainingSet",
    "build_training_set",
    "read_dataset",
    "train",
]

_PLACES = {
    "Callbacks": "training.trainer",
    "Denoiser": "denoiser",
    "Encoder": "conditioning.encode",
    "TrainConfig": "config",
    "TrainingSet": "training.training_set",
    "build_training_set": "training.training_set",
    "read_dataset": "data.dataset",
    "train": "training.trainer",
}


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_PLACES[name]}", __name__), name)


logging.getLogger("dopsd").addFilter(make_printable)
