"""The options that choose a model on the command line, declared once for all commands. Imports nothing heavy."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

DEMO, UNDISTILLED = "demo", "demo-undistilled"

DTYPES = ("bf16", "fp16", "fp32")
QUANTISATIONS = ("none", "bnb-nf4", "bnb-int8", "torchao-int8", "quanto-int8")
"""none, or the backend of diffusers and what it stores."""

TRACKERS = ("auto", "none", "tensorboard", "wandb")

MODEL_HELP = (
    "demo, demo-undistilled (the demo model before its distillation, for training with the objective sft), or "
    "Z-Image-Turbo, FLUX.2-klein, Krea 2 Turbo or Qwen-Image 2.1 Turbo: a Hugging Face id such as "
    "Tongyi-MAI/Z-Image-Turbo, a local folder in diffusers' layout, or a single file as ComfyUI uses it (default: demo)"
)


@dataclass(frozen=True)
class ModelOptions:
    """Where a model comes from, and how it is loaded.

    Attributes:
        model: "demo", "demo-undistilled", a Hugging Face id, a folder or a file.
        base: folder or id for everything that `model` and the other files lack; "" for the family's own repository.
        text_encoder: single file of the text encoder; None for that of `base`.
        vae: single file of the VAE; None for that of `base`.
        vision: file, folder or id of Qwen3-VL, whose vision tower the teacher uses.
        dtype: of transformer, text encoder and vision tower, one of DTYPES; the VAE is always fp32.
        quantise: one of QUANTISATIONS, for the transformer.
        device: torch's name of the device, or "auto".
    """

    model: str = DEMO
    base: str = ""
    text_encoder: Path | None = None
    vae: Path | None = None
    vision: str = "Qwen/Qwen3-VL-4B-Instruct"
    dtype: str = "bf16"
    quantise: str = "none"
    device: str = "auto"

    @property
    def is_demo(self) -> bool:
        """Whether it is the embedded demo model, distilled or not."""
        return self.model in (DEMO, UNDISTILLED)

    @property
    def is_undistilled(self) -> bool:
        """Whether it is known to be undistilled."""
        return self.model == UNDISTILLED

    @classmethod
    def of(cls, args: argparse.Namespace) -> ModelOptions:
        """The options of parsed arguments."""
        return cls(**{name: getattr(args, name) for name in cls.__dataclass_fields__})


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options to a command."""
    defaults = ModelOptions()
    group = parser.add_argument_group("model")
    group.add_argument("--model", default=DEMO, metavar="MODEL", help=MODEL_HELP)
    group.add_argument(
        "--base", default="", metavar="MODEL",
        help="for a single file: folder or Hugging Face id that tokenizer, configurations and missing parts are "
        "loaded from (default: the family's own repository)",
    )  # fmt: skip
    group.add_argument("--text-encoder", type=Path, metavar="FILE", help="single file of the text encoder")
    group.add_argument("--vae", type=Path, metavar="FILE", help="single file of the VAE")
    group.add_argument(
        "--vision", default=defaults.vision, metavar="MODEL",
        help="file, folder or Hugging Face id of Qwen3-VL, whose vision tower the teacher vlm sees with, for "
        "Z-Image-Turbo and FLUX.2-klein 4B; its language weights are not used (default: %(default)s)",
    )  # fmt: skip
    group.add_argument(
        "--dtype", choices=DTYPES, default=defaults.dtype, help="dtype of the weights (default: %(default)s)"
    )
    group.add_argument(
        "--quantise", choices=QUANTISATIONS, default=defaults.quantise,
        help="quantise the transformer with this backend of diffusers; the LoRA stays in fp32 (default: %(default)s)",
    )  # fmt: skip
    group.add_argument(
        "--device", default=defaults.device, metavar="NAME",
        help="such as cuda, cuda:1 or cpu; auto is the process's GPU if there is one (default: %(default)s)",
    )  # fmt: skip
