"""A node pack for the measured ComfyUI server alone: looks at a MODEL, CLIP and VAE from inside, and does something to
the server at an exact moment of a training. Copied into the server's custom_nodes by `reliability_server`.

It imports nothing of this checkout: inside ComfyUI the pack has another name.
"""

from __future__ import annotations

import gc
import hashlib
import io
import json
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import comfy.model_management as management
import torch
from PIL import Image
from torch import nn

MOMENTS: dict[str, tuple[str, str]] = {
    "encoding": ("dopsd_core.conditioning.cache", "ConditionCache.load"),
    "before step 1": ("dopsd_core.training.run", "Run.open"),
    "within a step": ("dopsd_core.adapters.adapter_set", "AdapterSet.use"),
    "in a preview": ("nodes.comfy_host.previews", "PreviewPainter.draw"),
}
"""What is called at a moment: module of the pack and name in it."""

FILES = {
    "in a preview's save": "/previews/",
    "in a checkpoint's save": "/checkpoints/",
    "in the LoRA's save": "lora.safetensors",
}
"""Moments at which a file is flushed whose path holds this."""


# -- something at a moment ---------------------------------------------------------------------------------------------


def do_interrupt() -> None:
    """What the Cancel button does."""
    management.interrupt_current_processing(True)


def do_kill() -> None:
    """What the kernel does when memory runs out."""
    os.kill(os.getpid(), signal.SIGKILL)


def do_fail() -> None:
    """An error out of nowhere."""
    raise RuntimeError("an error out of nowhere")


def do_fill_disk() -> None:
    """Another program takes the rest of the disk that the output folder is on."""
    import folder_paths

    path = os.path.join(folder_paths.get_output_directory(), "filler")
    with open(path, "ab", buffering=0) as file:
        try:
            while True:
                file.write(b"\0" * 4096)
        except OSError:
            pass


ACTIONS: dict[str, Callable[[], None]] = {
    "interrupt": do_interrupt, "kill": do_kill, "fail": do_fail, "fill disk": do_fill_disk
}  # fmt: skip


class Trap:
    """Calls `action` once, at the n-th call of a function."""

    def __init__(self, owner: Any, name: str, action: Callable[[], None], number: int, is_it: Callable[..., bool]):
        self._owner, self._name, self._action, self._left, self._is_it = owner, name, action, number, is_it
        self._real = getattr(owner, name)
        setattr(owner, name, self._trapped())

    def _trapped(self) -> Callable[..., Any]:
        def trapped(*args: Any, **kwargs: Any) -> Any:
            if self._left and self._is_it(*args):
                self._left -= 1
                if not self._left:
                    self._action()
            return self._real(*args, **kwargs)

        return trapped

    def remove(self) -> None:
        """Puts the real function back."""
        self._left = 0
        setattr(self._owner, self._name, self._real)


armed: list[Trap] = []


def arm(moment: str, number: int, action: str) -> None:
    """Takes older traps away and lays one."""
    disarm()

    def act() -> None:
        disarm()
        ACTIONS[action]()

    if moment in FILES:
        place = FILES[moment]
        armed.append(Trap(os, "fsync", act, number, lambda file: place in _path_of(file)))
        armed.append(Trap(Image.Image, "save", act, number, lambda image, to, *_: _is_torn(image, to, place)))
        return
    module, dotted = MOMENTS[moment]
    owner, (*parents, name) = _pack_module(module), dotted.split(".")
    for parent in parents:
        owner = getattr(owner, parent)
    armed.append(Trap(owner, name, act, number, lambda *_: True))


def disarm() -> None:
    """Takes every trap away."""
    while armed:
        armed.pop().remove()


def _pack_module(name: str) -> Any:
    return next(module for key, module in sys.modules.items() if key.endswith(f"ComfyUI-DOPSD.{name}"))


def _path_of(file: Any) -> str:
    descriptor = file if isinstance(file, int) else file.fileno()
    return os.readlink(f"/proc/self/fd/{descriptor}")


def _is_torn(image: Image.Image, to: Any, place: str) -> bool:
    """Whether Pillow is to write a file of this place; then half of it is there, as in the middle of writing."""
    if not isinstance(to, str | os.PathLike) or place not in str(to):
        return False
    data = io.BytesIO()
    image.save(data, "PNG")
    with open(to, "wb") as file:
        file.write(data.getvalue()[: data.tell() // 2])
    return True


class At:
    """Node: something happens at the n-th time of a moment, in whatever runs next."""

    CATEGORY, FUNCTION, RETURN_TYPES, OUTPUT_NODE = "probe", "run", (), True

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        """Moment, number and action."""
        moments, number = [*MOMENTS, *FILES], ("INT", {"default": 1, "min": 1, "max": 10**6})
        return {"required": {"moment": (moments,), "number": number, "action": (list(ACTIONS),)}}

    @classmethod
    def IS_CHANGED(cls, **_: Any) -> float:
        """Always: it runs every time."""
        return float("nan")

    def run(self, moment: str, number: int, action: str) -> dict[str, Any]:
        """Arms the moment."""
        arm(moment, number, action)
        return {"ui": {"text": ["armed"]}}


# -- what is there -----------------------------------------------------------------------------------------------------


def modules_of(model: Any, clip: Any, vae: Any) -> Iterator[nn.Module]:
    """Every module of the three."""
    for root in (model.model, clip.cond_stage_model, vae.first_stage_model):
        yield from root.modules()


def thread_names() -> list[str]:
    """The process's threads without asyncio's pool, whose threads are started when two requests meet."""
    return sorted(one.name for one in threading.enumerate() if not one.name.startswith("asyncio_"))


def state_of(model: Any, clip: Any, vae: Any) -> dict[str, Any]:
    """Everything that a training might leave behind, as numbers and digests."""
    gc.collect()
    objects = gc.get_objects()
    modules = list(modules_of(model, clip, vae))
    parameters = [value for module in modules for value in module._parameters.values() if value is not None]
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return {
        "rss": int(open("/proc/self/statm").read().split()[1]) * os.sysconf("SC_PAGE_SIZE"),  # noqa: SIM115
        "objects": len(objects),
        "tensors": sum(isinstance(one, torch.Tensor) for one in objects),
        "threads": thread_names(),
        "files": len(os.listdir("/proc/self/fd")),
        "forward overrides": sum("forward" in module.__dict__ for module in modules),
        "hooks": sum(len(getattr(module, name)) for module in modules for name in hooks),
        "weight functions": sum(len(getattr(module, "weight_function", ())) for module in modules),
        "trainable": sum(value.requires_grad for value in parameters),
        "gradients": sum(value.grad is not None for value in parameters),
        "inference": sum(value.is_inference() for value in parameters),
        "patches": len(model.patches) + len(clip.patcher.patches) + len(vae.patcher.patches),
        "object patches": len(model.object_patches) + len(model.object_patches_backup),
        "injections": len(model.injections),
        "loaded models": len(management.current_loaded_models),
        "pinned": len(getattr(management, "PINNED_MEMORY", ())),
        "in training": int(management.in_training),
        "weights": digest(parameters),
    }


def digest(tensors: list[Any]) -> str:
    """Of the bytes of all tensors in their order."""
    found = hashlib.sha256()
    for tensor in tensors:
        found.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()


class State:
    """Node: shows `state_of` as JSON."""

    CATEGORY, FUNCTION, RETURN_TYPES, OUTPUT_NODE = "probe", "run", (), True

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        """The three models."""
        return {"required": {"model": ("MODEL",), "clip": ("CLIP",), "vae": ("VAE",)}}

    @classmethod
    def IS_CHANGED(cls, **_: Any) -> float:
        """Always: it runs every time."""
        return float("nan")

    def run(self, model: Any, clip: Any, vae: Any) -> dict[str, Any]:
        """Shows the state."""
        return {"ui": {"text": [json.dumps(state_of(model, clip, vae))]}}


NODE_CLASS_MAPPINGS = {"Probe_At": At, "Probe_State": State}
