"""A model of the standalone host, whichever it is: what the commands need of it, and how one is loaded."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

from ...conditioning.encode import Encoder
from ...conditioning.teachers import TeacherView
from ...demo.settings import SAMPLE_STEPS
from ...demo.world import IMAGE_SIZE
from ...denoiser import Denoiser
from ...families import Z_IMAGE, Family, get_family
from ...files.atomic import replaced_folder
from ..accelerate_world import local_rank
from ..model_options import DEMO, UNDISTILLED, ModelOptions
from .demo import StandaloneDenoiser, load_demo_model, load_undistilled
from .diffusers_encoder import DiffusersEncoder
from .fit import empty_transformer, require_transformer
from .parts import ModelParts
from .source import find_family, find_files

if TYPE_CHECKING:
    from .krea2 import Krea2FileEncoder
    from .qwen_image21 import QwenImage21FileEncoder

_UNDISTILLED_STEPS = 32
"""Steps in which the demo model before its distillation draws class images."""


class Codec(Encoder, Protocol):
    """An encoder that also decodes."""

    def decode(self, latents: Tensor) -> Tensor:
        """latents [B, C, h, w] in the model's space -> images [B, 3, H, W] in [0, 1]."""
        ...


class HostModel(Protocol):
    """A model as the commands use it: it encodes first, then it denoises."""

    @property
    def family(self) -> Family:
        """The family."""
        ...

    @property
    def title(self) -> str:
        """What the user calls it."""
        ...

    @property
    def fingerprint(self) -> str:
        """Digest of the base's weights."""
        ...

    @property
    def side(self) -> int:
        """Images have about side x side pixels by default."""
        ...

    @property
    def sample_steps(self) -> int:
        """Number of steps that it was distilled for."""
        ...

    @property
    def teachers(self) -> Sequence[str]:
        """The teacher views that it supports, the default first."""
        ...

    @property
    def encoder(self) -> Codec:
        """Encodes before `denoiser` is asked for; decodes at any time."""
        ...

    @property
    def denoiser(self) -> Denoiser:
        """The network on its device; the encoders leave it."""
        ...

    @property
    def outline(self) -> Denoiser:
        """The network without values, for checks of names and sizes before anything is encoded; loads nothing."""
        ...

    def doubts(self, captions: Iterable[str]) -> Sequence[str]:
        """What the user should know about these captions, one line each."""
        ...

    def write_network(self, file: Path, folder: Path) -> bool:
        """Writes the whole network that a training left in `file` as a folder in the host's own layout.

        Returns False if the host has no such layout. An older folder is replaced when the new one is complete.

        Raises:
            ValueError: the file does not fit.
            OSError: the folder cannot be written.
        """
        ...


@dataclass(frozen=True, eq=False)
class DemoHostModel:
    """The embedded demo model.

    Attributes:
        device: where it runs.
        title: "demo" or "demo-undistilled".
    """

    device: str = "cpu"
    title: str = DEMO
    family = Z_IMAGE
    side = IMAGE_SIZE
    teachers = ("vlm",)

    @property
    def sample_steps(self) -> int:
        """Number of steps that it was distilled for; many before its distillation."""
        return _UNDISTILLED_STEPS if self.title == UNDISTILLED else SAMPLE_STEPS

    @cached_property
    def _undistilled(self) -> tuple[StandaloneDenoiser, str]:
        denoiser, fingerprint = load_undistilled()
        nn.Module.to(denoiser.transformer, self.device)
        return denoiser, fingerprint

    @cached_property
    def _model(self) -> Any:
        return load_demo_model(device=self.device)

    @property
    def fingerprint(self) -> str:
        """Digest of the transformer's file."""
        return self._undistilled[1] if self.title == UNDISTILLED else self._model.fingerprint

    @property
    def encoder(self) -> Codec:
        """Text encoder, vision tower and autoencoder."""
        return self._model.encoder

    @property
    def denoiser(self) -> Denoiser:
        """The transformer."""
        return self._undistilled[0] if self.title == UNDISTILLED else self._model.denoiser

    @property
    def outline(self) -> Denoiser:
        """The transformer itself, which is small."""
        return self.denoiser

    def doubts(self, captions: Iterable[str]) -> Sequence[str]:
        """The words that the model does not know."""
        unknown = self._model.encoder.unknown_words(captions)
        return [f"the demo model was not trained on these words: {', '.join(unknown)}"] if unknown else []

    def write_network(self, file: Path, folder: Path) -> bool:
        """False: the demo model is single files."""
        return False


@dataclass(frozen=True, eq=False)
class DiffusersFamily:
    """The classes of a family in diffusers.

    Attributes:
        transformer: class of the transformer.
        denoiser: makes a Denoiser of one.
        encoder: class of the encoder, made of the files, the device and whether images are read with captions.
    """

    transformer: Any
    denoiser: Callable[[Any], Denoiser]
    encoder: type[DiffusersEncoder | Krea2FileEncoder | QwenImage21FileEncoder]


def _z_image() -> DiffusersFamily:
    from diffusers.models.transformers.transformer_z_image import ZImageTransformer2DModel

    from .z_image import ZImageDenoiser
    from .z_image_encoder import ZImageEncoder

    return DiffusersFamily(ZImageTransformer2DModel, ZImageDenoiser, ZImageEncoder)


def _klein() -> DiffusersFamily:
    from diffusers.models.transformers.transformer_flux2 import Flux2Transformer2DModel

    from .klein import KleinDenoiser
    from .klein_encoder import KleinEncoder

    return DiffusersFamily(Flux2Transformer2DModel, KleinDenoiser, KleinEncoder)


def _krea2() -> DiffusersFamily:
    from diffusers.models.transformers.transformer_krea2 import Krea2Transformer2DModel

    from .krea2 import Krea2Denoiser, Krea2FileEncoder

    return DiffusersFamily(Krea2Transformer2DModel, Krea2Denoiser, Krea2FileEncoder)


def _qwen_image21() -> DiffusersFamily:
    from diffusers.models.transformers.transformer_qwenimage21 import QwenImage21Transformer2DModel

    from .qwen_image21 import QwenImage21Denoiser, QwenImage21FileEncoder

    return DiffusersFamily(QwenImage21Transformer2DModel, QwenImage21Denoiser, QwenImage21FileEncoder)


DIFFUSERS_FAMILIES: Mapping[str, Callable[[], DiffusersFamily]] = {
    "z_image": _z_image,
    "flux2_klein": _klein,
    "krea2": _krea2,
    "qwen_image21": _qwen_image21,
}
"""By the family's name; imported when needed."""


class DiffusersModel:
    """A model through diffusers.

    Args:
        parts: its files.
        device: where it runs.
        sees: whether the teacher needs the vision tower.

    Raises:
        ValueError: files are damaged, incomplete or of other models, or the quantisation is not installed.
    """

    def __init__(self, parts: ModelParts, device: torch.device, sees: bool) -> None:
        self._parts, self._device = parts, device
        self.family: Family = get_family(parts.files.known.family)
        self._classes = DIFFUSERS_FAMILIES[self.family.name]()
        parts.require_quantisation()
        require_transformer(parts.files, self._classes.transformer)
        self._encoder = self._classes.encoder(parts, device, sees)
        self.title = Path(parts.options.model).name if Path(parts.options.model).exists() else parts.options.model
        self.side = round(self.family.pixel_budget**0.5)
        self.sample_steps = self.family.sample_steps
        self.teachers = self.family.teachers

    @property
    def fingerprint(self) -> str:
        """Digest of the transformer's weights, and how they are quantised."""
        quantised = self._parts.options.quantise
        return self._parts.digest("transformer") + ("" if quantised == "none" else f"/{quantised}")

    @property
    def encoder(self) -> Codec:
        """Text encoder, vision tower and VAE, loaded when they are needed."""
        return self._encoder

    @property
    def denoiser(self) -> Denoiser:
        """The transformer on its device; the encoders leave it.

        Raises:
            ValueError: the weights do not fit, or the quantisation is not installed.
        """
        self._encoder.release()
        return self._denoiser

    @cached_property
    def _denoiser(self) -> Denoiser:
        transformer = self._parts.transformer(self._classes.transformer)
        if not self._parts.options.quantise.startswith("bnb"):  # bitsandbytes puts it on the current device
            transformer.to(self._device)
        return self._classes.denoiser(transformer)

    @property
    def outline(self) -> Denoiser:
        """The transformer of the configuration, on the device meta."""
        return self._classes.denoiser(empty_transformer(self._parts.files, self._classes.transformer))

    def doubts(self, captions: Iterable[str]) -> Sequence[str]:
        """That the model was not distilled, if its files say so. Nothing is known about words."""
        files = self._parts.files
        if not files.is_undistilled:
            return ()
        return [
            f"{self.title} was not distilled for few steps, by its model_index.json: train {files.known.hub_id}, or "
            "use --objective sft and the LoRA on the distilled model"
        ]

    def write_network(self, file: Path, folder: Path) -> bool:
        """Writes the network in diffusers' layout; raises ValueError or OSError."""
        is_single = self.family.single_file is not None
        transformer = self._parts.trained_transformer(self._classes.transformer, file, is_single)
        with replaced_folder(folder) as place:
            transformer.save_pretrained(place)
        return True


def load_model(options: ModelOptions, sees: bool) -> HostModel:
    """The model of the options; its weights are loaded when they are needed.

    sees: whether images will be read with captions, by the vision tower.

    Raises:
        ValueError: it is no model of a supported family, or the device does not exist.
        OSError: files are missing or cannot be downloaded.
    """
    device = device_of(options)
    if options.is_demo:
        return DemoHostModel(str(device) if options.device != "auto" else "cpu", options.model)
    _be_quiet()
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)  # where quantisation backends load to
    files = find_files(options, find_family(options))
    return DiffusersModel(ModelParts(files, options), device, sees)


def _be_quiet() -> None:
    """The libraries' own warnings and progress bars are about their internals; what is wrong here is an error."""
    import diffusers.utils.logging
    import transformers.utils.logging

    for library in (diffusers, transformers):
        library.utils.logging.set_verbosity_error()
        library.utils.logging.disable_progress_bar()


def sees_images(view: TeacherView) -> bool:
    """Whether this teacher reads images with captions."""
    return view.sees == "features"


def device_of(options: ModelOptions) -> torch.device:
    """The device that the options name; auto is the GPU of this process if there is one.

    Raises:
        ValueError: there is no such device.
    """
    if options.device == "auto":
        return torch.device("cuda", local_rank()) if torch.cuda.is_available() else torch.device("cpu")
    try:
        device = torch.device(options.device)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {options.device} cannot be used: {str(error).splitlines()[0]}") from error
    return device
