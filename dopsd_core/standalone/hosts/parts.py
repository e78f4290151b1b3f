"""Loads the parts of a model with diffusers and transformers, from a folder or from single files."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..model_options import ModelOptions
from .quantised import quantisation_config
from .source import ModelFiles
from .teacher_reader import TeacherReader, VisionFiles, find_vision
from .weight_files import digest_files, read_plain

Converted = Callable[[dict[str, Tensor], Any], dict[str, Tensor]]
"""(a single file's tensors [...], the configuration) -> diffusers' names, same shapes."""

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@dataclass(frozen=True, eq=False)
class ModelParts:
    """The parts of a model; nothing is loaded before it is asked for.

    Attributes:
        files: where they are.
        options: how they are loaded.
    """

    files: ModelFiles
    options: ModelOptions

    @property
    def dtype(self) -> torch.dtype:
        """dtype of transformer, text encoder and vision tower."""
        return DTYPES[self.options.dtype]

    def digest(self, *parts: str) -> str:
        """16 hex digits of the weights and configurations of "transformer", "text_encoder", "vae"."""
        digest = hashlib.sha256(self.options.dtype.encode())
        for part in parts:
            digest.update(digest_files(self.files.weights(part)).encode())
            digest.update((self.files.base / part / "config.json").read_bytes())
        return digest.hexdigest()[:16]

    def digest_tokenizer(self) -> str:
        """16 hex digits of the tokenizer's files, with its chat template."""
        digest = hashlib.sha256()
        for file in sorted((self.files.base / self.files.known.tokenizer).iterdir()):
            digest.update(file.name.encode() + file.read_bytes())
        return digest.hexdigest()[:16]

    def require_quantisation(self) -> Any:
        """diffusers' configuration of the quantisation; None if there is none.

        Raises:
            ValueError: the quantisation is not installed.
        """
        return quantisation_config(self.options.quantise, self.dtype, torch.cuda.is_available())

    def transformer(self, cls: Any) -> Any:
        """The transformer, of this class of diffusers, on the CPU, or where its quantisation needs it.

        Raises:
            ValueError: the weights do not fit, or the quantisation is not installed.
        """
        quantised = self.require_quantisation()
        extra = {} if quantised is None else {"quantization_config": quantised}
        file = self.files.transformer
        if file is None:
            folder = self.files.base / "transformer"
            return _loaded(folder, lambda: cls.from_pretrained(folder, torch_dtype=self.dtype, **extra))
        return self._from_single_file(cls, file, self.dtype, extra)

    def trained_transformer(self, cls: Any, file: Path, is_single: bool) -> Any:
        """A whole network that a training wrote, on the CPU in the file's dtype.

        is_single: whether it has the names of the original single file, or else diffusers'.

        Raises:
            ValueError: the weights do not fit.
        """
        state = read_plain([file], None)
        dtype = next(iter(state.values())).dtype
        if is_single:
            return self._from_single_file(cls, file, dtype, {})
        network = cls.from_config(cls.load_config(self.files.base, subfolder="transformer"))
        _assign(network, state, file)
        return network

    def _from_single_file(self, cls: Any, file: Path, dtype: torch.dtype, extra: Mapping[str, Any]) -> Any:
        state, base = read_plain([file], dtype), str(self.files.base)
        return _loaded(
            file,
            lambda: cls.from_single_file(
                state, config=base, subfolder="transformer", torch_dtype=dtype, local_files_only=True, **extra
            ),
        )

    def text_encoder(self) -> Any:
        """transformers' language model without its head.

        Raises:
            ValueError: the weights do not fit.
        """
        from accelerate import init_empty_weights
        from transformers import AutoConfig, AutoModel

        folder, file = self.files.base / "text_encoder", self.files.text_encoder
        if file is None:
            return _loaded(folder, lambda: _whole(folder, self.dtype)).requires_grad_(False)
        config = AutoConfig.from_pretrained(folder)
        with init_empty_weights():
            model = AutoModel.from_config(config)
        state = read_plain([file], self.dtype, lambda name: name.startswith("model."))
        _assign(model, {name.removeprefix("model."): value for name, value in state.items()}, file)
        return model.eval().requires_grad_(False)

    def tokenizer(self, needs_template: bool = False) -> Any:
        """transformers' tokenizer.

        Raises:
            ValueError: it cannot be loaded, or has no chat template though one is needed.
        """
        from transformers import AutoTokenizer

        folder = self.files.base / self.files.known.tokenizer
        tokenizer = _loaded(folder, lambda: AutoTokenizer.from_pretrained(folder), needs_weights=False)
        if needs_template and not tokenizer.chat_template:
            raise ValueError(f"{folder} has no chat template: download the model again")
        return tokenizer

    def vae(self, cls: Any, converted: Converted) -> Any:
        """The VAE in fp32; converted: for a single file.

        Raises:
            ValueError: the weights do not fit.
        """
        folder, file = self.files.base / "vae", self.files.vae
        if file is None:
            return _loaded(folder, lambda: cls.from_pretrained(folder, torch_dtype=torch.float32)).requires_grad_(False)
        model = cls.from_config(cls.load_config(folder))
        state = converted(read_plain([file], torch.float32), model.config)
        _assign(model, state, file)
        return model.eval().requires_grad_(False)

    def vision(self) -> VisionFiles:
        """The files of the teacher's vision tower.

        Raises:
            ValueError, OSError: as `teacher_reader.find_vision`.
        """
        return find_vision(self.options.vision)

    def reader(self, text_encoder: Any, vision: VisionFiles) -> TeacherReader:
        """Reads images with captions, with the weights of this text encoder."""
        return TeacherReader(text_encoder, vision, self.dtype)


def _assign(model: nn.Module, state: dict[str, Tensor], file: Path) -> None:
    names = model.state_dict().keys()
    missing = [name for name in names if name not in state and not name.endswith("num_batches_tracked")]
    if missing:
        raise ValueError(f"{file} lacks {len(missing)} tensors, such as {missing[0]}: it is of another model")
    try:
        known = {name: value for name, value in state.items() if name in names}
        model.load_state_dict(known, strict=False, assign=True)
    except RuntimeError as error:
        raise ValueError(f"{file} is of another model: {' '.join(str(error).split())[:300]}") from error


def _whole(folder: Path, dtype: torch.dtype) -> Any:
    """transformers' model of a folder, which fills in random numbers where the files have none."""
    from transformers import AutoModel

    model, found = AutoModel.from_pretrained(folder, dtype=dtype, output_loading_info=True)
    if missing := sorted(found["missing_keys"]):
        raise ValueError(f"it lacks {len(missing)} tensors, such as {missing[0]}; download it again")
    return model


def _loaded(place: Path, load: Callable[[], Any], needs_weights: bool = True) -> Any:
    try:
        model = load()
    except (RuntimeError, ValueError, OSError, KeyError, TypeError) as error:
        reason = " ".join(str(error).split()).partition(" If you want to instead")[0][:300]
        raise ValueError(f"{place} cannot be loaded, it is damaged or of another model: {reason}") from error
    if needs_weights:
        missing = [name for name, value in model.state_dict().items() if getattr(value, "is_meta", False)]
        if missing:
            raise ValueError(f"{place} lacks {len(missing)} tensors, such as {missing[0]}: download the model again")
        model.eval()
    return model
