"""The user's MODEL, CLIP and VAE after each of our nodes, however it ends: usable in every stock way, the same to the
bit, and each weight of the kind that it was.

Loader nodes make inference tensors. ComfyUI moves them between RAM and device whenever anything is loaded, and must do
that in inference mode: otherwise they come out as tensors that no operation takes any more, until the file is loaded
again. On a CPU nothing moves, so there the mode is looked at where it matters.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import stock_files
import torch
from bases import same
from gradient import held
from graphs import node_of, shipped, shrunk
from inprocess import ComfyUI
from loras import give_values, random_lora
from runs import Run
from torch import Tensor

Stock = Callable[..., None]
TEMPLATES = {"z_image": "z_image_turbo_train", "klein": "klein_train"}
ENDINGS = ("conditions", "look", "success", "error", "cancel", "out of memory")
OFTEN = ("look", "success", "cancel")
"""Those that run without `make test-all` too."""
"""Build Teacher Condition and Teacher Preview, and how D-OPSD Train LoRA ends."""


class Objects:
    """What the loader nodes of a template gave, and a LoRA for its MODEL."""

    def __init__(self, comfyui: ComfyUI, template: str) -> None:
        self.comfyui = comfyui
        graph = shipped(template)
        loaders = [key for key, node in graph.items() if node["class_type"] in LOADERS]
        shows = {f"show {key}": {"class_type": "PreviewAny", "inputs": {"source": [key, 0]}} for key in loaders}
        run = comfyui.execute({**{key: graph[key] for key in loaders}, **shows})
        assert run.status == "success", run.error
        self.values = {LOADERS[graph[key]["class_type"]]: run.value(key) for key in loaders}
        self.model, self.clip, self.vae = (self.values[kind] for kind in ("MODEL", "CLIP", "VAE"))
        self.networks = {
            "MODEL": self.model.model, "CLIP": self.clip.cond_stage_model, "VAE": self.vae.first_stage_model
        }  # fmt: skip
        self.lora = random_lora(comfyui, self.model, 0.5, 4, 0)

    def given(self, graph: dict[str, Any]) -> dict[str, Any]:
        """The graph with these objects in place of its loader nodes."""
        given = give_values(self.comfyui, tuple(self.values), list(self.values.values()))
        place = {
            key: list(self.values).index(LOADERS[node["class_type"]])
            for key, node in graph.items()
            if node["class_type"] in LOADERS
        }
        rest = {key: node for key, node in graph.items() if key not in place}
        for node in rest.values():
            for name, value in node["inputs"].items():
                if isinstance(value, list) and value[0] in place:
                    node["inputs"][name] = ["given", place[value[0]]]
        return {"given": given, **rest}

    def kinds(self) -> dict[str, dict[str, bool]]:
        """Of each network the parameters, and whether they are inference tensors."""
        return {
            kind: {name: parameter.is_inference() for name, parameter in network.named_parameters()}
            for kind, network in self.networks.items()
        }

    def bits(self) -> dict[str, dict[str, Tensor]]:
        return {kind: held(network) for kind, network in self.networks.items()}

    def used(self) -> dict[str, Tensor]:
        """What stock nodes make of them, called as the executor calls nodes."""
        import comfy.utils

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(comfy.utils, "PROGRESS_BAR_HOOK", None)  # no node runs
            return self.comfyui.call(torch.inference_mode()(self._used))

    def _used(self) -> dict[str, Tensor]:
        import comfy.sd

        nodes, image = self.comfyui.nodes, torch.rand(1, 64, 64, 3, generator=torch.Generator().manual_seed(1))
        family = self.comfyui.module("nodes.comfy_host.denoiser").family_of(self.model)
        blank = {"samples": torch.zeros(1, *family.latent_shape(64, 64))}
        (latent,) = nodes.VAEEncode().encode(self.vae, image)
        (tiled,) = nodes.VAEEncodeTiled().encode(self.vae, image, 512, 64)
        (text,) = nodes.CLIPTextEncode().encode(self.clip, "a badge")
        (drawn,) = nodes.common_ksampler(self.model, 3, 2, 1.0, "euler", "simple", text, text, blank)
        other, other_clip = comfy.sd.load_lora_for_models(self.model, self.clip, dict(self.lora), 1.0, 1.0)
        (other_text,) = nodes.CLIPTextEncode().encode(other_clip, "a badge")
        (changed,) = nodes.common_ksampler(other, 3, 2, 1.0, "euler", "simple", other_text, text, blank)
        values = {
            "encoded": latent["samples"],
            "encoded in tiles": tiled["samples"],
            "decoded": nodes.VAEDecode().decode(self.vae, drawn)[0],
            "decoded in tiles": nodes.VAEDecodeTiled().decode(self.vae, drawn, 512)[0],
            "text": text[0][0],
            "drawn": drawn["samples"],
            "drawn with a LoRA": changed["samples"],
        }
        return {name: value.cpu().clone() for name, value in values.items()}


LOADERS = {
    "UNETLoader": "MODEL", "CLIPLoader": "CLIP", "VAELoader": "VAE", "DOPSD_LoadTeacherVision": "DOPSD_VISION"
}  # fmt: skip


@pytest.fixture(scope="module", params=["z_image", pytest.param("klein", marks=pytest.mark.long)])
def objects(comfyui: ComfyUI, stock: Stock, request: pytest.FixtureRequest) -> Iterator[Any]:
    """The objects of a family, and what they were before any of our nodes."""
    stock()
    folder = f"users-{request.param}"
    if not (comfyui.input / folder).exists():
        stock_files.write_concept(comfyui.input / folder)
    loaded = Objects(comfyui, TEMPLATES[request.param])
    used = loaded.used()
    assert not torch.equal(used["drawn"], used["drawn with a LoRA"])
    before = SimpleNamespace(used=used, bits=loaded.bits(), kinds=loaded.kinds())
    yield SimpleNamespace(objects=loaded, before=before, template=TEMPLATES[request.param], folder=folder)


@pytest.fixture
def modes(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Fills with the places where ComfyUI moved weights outside of inference mode."""
    import comfy.model_management

    found: list[str] = []
    for name in ("load_models_gpu", "unload_all_models", "free_memory"):
        plain = getattr(comfy.model_management, name)

        def watched(*args: Any, plain: Any = plain, name: str = name, **kwargs: Any) -> Any:
            if not torch.is_inference_mode_enabled():
                found.append(name)
            return plain(*args, **kwargs)

        monkeypatch.setattr(comfy.model_management, name, watched)
    return found


def failing(comfyui: ComfyUI, monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    """The second step ends with this error."""
    objective = comfyui.core("objectives").DOPSD
    honest, steps = objective.backward, []

    def backward(self: Any, inputs: Any) -> Any:
        steps.append(True)
        if len(steps) > 1:
            raise error
        return honest(self, inputs)

    monkeypatch.setattr(objective, "backward", backward)


def run_until(comfyui: ComfyUI, made: Any, ending: str, monkeypatch: pytest.MonkeyPatch) -> Run:
    """The template's graph on the user's objects, up to a node, to an ending."""
    graph = shrunk(shipped(made.template), steps=3, probe_every=1, preview_every=1, rollout_steps=2)
    train, build = node_of(graph, "DOPSD_TrainLoRA"), node_of(graph, "DOPSD_BuildTeacherCondition")
    graph[node_of(graph, "DOPSD_LoadDataset")]["inputs"]["folder"] = made.folder
    # another sentence or prompt is encoded anew, not taken from the cache
    graph[build]["inputs"]["preview_prompts"] = f"a photo of [V] after {ending}"
    graph[train]["inputs"]["run_name"] = f"users {ending}"
    if ending in ("conditions", "look"):
        kept = {"DOPSD_TrainLoRA", "DOPSD_SaveLoRA", *(() if ending == "look" else ("DOPSD_TeacherPreview",))}
        graph = {key: node for key, node in graph.items() if node["class_type"] not in kept}
        graph["show"] = {"class_type": "PreviewAny", "inputs": {"source": [build, 0]}}
    if ending == "error":
        failing(comfyui, monkeypatch, RuntimeError("a kernel failed, say"))
    if ending == "out of memory":
        failing(comfyui, monkeypatch, torch.OutOfMemoryError("CUDA out of memory"))

    def interrupt(event: Any) -> None:
        if event.kind == "progress" and event.data.get("node") == train and event.data["value"] == 2:
            comfyui.interrupt()

    return comfyui.execute(made.objects.given(graph), on_event=interrupt if ending == "cancel" else None)


@pytest.mark.parametrize(
    "ending", [pytest.param(ending, marks=[pytest.mark.long] * (ending not in OFTEN)) for ending in ENDINGS]
)
def test_they_are_what_they_were_and_work(
    comfyui: ComfyUI, objects: Any, ending: str, modes: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        run = run_until(comfyui, objects, ending, patch)
    expected = {"cancel": "interrupted", "error": "error", "out of memory": "error"}
    assert run.status == expected.get(ending, "success"), run.error
    assert not modes, "weights were moved outside of inference mode"
    kinds, before = objects.objects.kinds(), objects.before
    assert kinds == before.kinds
    with torch.inference_mode():
        for network in objects.objects.networks.values():
            for parameter in network.parameters():
                parameter.view(-1)  # a weight that was moved in the wrong mode is refused here
    used = objects.objects.used()
    assert all(torch.equal(used[name], value) for name, value in before.used.items())
    bits = objects.objects.bits()
    assert all(same(bits[kind], before.bits[kind]) for kind in bits)


def test_a_second_training_on_them_is_the_first(comfyui: ComfyUI, objects: Any) -> None:
    loras = []
    for name in ("first", "second"):
        with pytest.MonkeyPatch.context() as patch:
            graph_run = run_until(comfyui, objects, "success", patch)
        assert graph_run.status == "success", f"{name}: {graph_run.error}"
        train = next(node for node in graph_run.values if isinstance(graph_run.values[node][0][0], dict))
        loras.append(graph_run.value(train))
    assert same(*loras)
