"""Any torch optimizer of an installed package, by path."""

from __future__ import annotations

import importlib
import json
import logging
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from pydantic import Field, field_validator

from ..lazy import lazy
from ..options import ConfigError, Hint
from .base import Optimizer

if TYPE_CHECKING:
    import torch
else:
    torch = lazy("torch")

log = logging.getLogger("dopsd")

_PATH = re.compile(r"(?!\d)\w+(\.(?!\d)\w+)*:(?!\d)\w+")
_OURS = ("params", "lr")

_ABOUT_THE_DEVICE = re.compile(r"cuda|gpu|cpu|device|triton|backend", re.IGNORECASE)
"""In the text of an error that the training device may not raise."""


class Custom(Optimizer):
    """A class `package.module:Class` with the interface of torch.optim.Optimizer, and its keyword arguments."""

    name: ClassVar[str] = "custom"
    summary: ClassVar[str] = "any torch optimizer that is installed, by custom_path"
    prefix: ClassVar[str] = "custom_"
    bytes_per_parameter: ClassVar[int] = 16  # unknown; that of the largest optimizer here

    path: str = Field(
        default="",
        validate_default=True,
        description="the optimizer's class as package.module:Class, such as pytorch_optimizer:CAME",
    )
    options: str = Field(default="{}", description="its further keyword arguments as a JSON object, in braces")
    lr: Annotated[float, Hint(step=1e-6)] = Field(
        default=1e-4, gt=0, le=10, description="its learning rate; every optimizer has its own, see its documentation"
    )

    @field_validator("path")
    @classmethod
    def _is_a_path(cls, path: str) -> str:
        if not _PATH.fullmatch(path):
            raise ConfigError(
                (f"custom_path is {path!r}; write the optimizer's class as package.module:Class, without spaces",)
            )
        return path

    @field_validator("options")
    @classmethod
    def _are_keywords(cls, options: str) -> str:
        try:
            parsed = json.loads(options)
        except (ValueError, RecursionError) as error:
            raise ConfigError((f"custom_options is not JSON ({error}); write it as a JSON object, or {{}}",)) from error
        if not isinstance(parsed, dict):
            raise ConfigError((f"custom_options is {options}; write it as a JSON object, such as {{}}",))
        if taken := [name for name in _OURS if name in parsed]:
            raise ConfigError((f"custom_options contains {taken[0]}; remove it, and set the rate as custom_lr",))
        return json.dumps(parsed)  # spaces make no other run

    def require_packages(self) -> None:
        """Raises ConfigError if the class cannot be imported, or does not run with its options."""
        self._check(torch.device("cpu"), is_device=False)

    def build(self, parameters: Sequence[torch.nn.Parameter]) -> torch.optim.Optimizer:
        """An instance of the class on the parameters, of any shape; warns if it does not resume exactly.

        Raises:
            ConfigError: the class cannot be imported, does not run with its options, or its state cannot be saved.
        """
        self._check(parameters[0].device, is_device=True)
        return self._made(parameters)

    def _made(self, parameters: Sequence[torch.nn.Parameter]) -> torch.optim.Optimizer:
        keywords = {
            name: tuple(value) if isinstance(value, list) else value for name, value in json.loads(self.options).items()
        }
        found = self._imported()
        try:
            return found(parameters, lr=self.lr, **keywords)
        except (TypeError, ValueError, AssertionError) as error:
            raise ConfigError((f"{self.path} does not take lr and custom_options {self.options}: {error}",)) from error

    def _imported(self) -> Any:
        module, _, name = self.path.partition(":")
        try:
            found = getattr(importlib.import_module(module), name)
        except Exception as error:  # a module can fail in any way while it is imported
            raise ConfigError(
                (f"custom_path {self.path} cannot be imported ({error}); install its package, or correct it",)
            ) from error
        if not isinstance(found, type) or not issubclass(found, torch.optim.Optimizer):
            raise ConfigError((f"custom_path {self.path} is not a class of torch.optim.Optimizer; choose one",))
        return found

    def _check(self, device: torch.device, is_device: bool) -> None:
        """Tries the optimizer on two small matrices: on the training device, or on the CPU before any work on that."""
        from .state import UnsavableState, resumes_exactly

        try:
            is_exact = resumes_exactly(self._made, device)
        except ConfigError:
            raise
        except UnsavableState as error:
            raise ConfigError((f"{self.path} cannot be used: {error}; choose another optimizer",)) from error
        except Exception as error:
            if not is_device and _ABOUT_THE_DEVICE.search(str(error)):
                return  # it may need a GPU
            raise ConfigError(
                (
                    f"{self.path} with custom_options {self.options} fails in a trial step "
                    f"({type(error).__name__}: {error}); correct custom_options, or choose another custom_path",
                )
            ) from error
        if is_device and not is_exact:
            log.warning(
                "%s does not continue from its saved state exactly: a resumed run will differ from an uninterrupted "
                "one",
                self.path,
            )
