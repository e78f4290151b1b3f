"""The node Training Settings."""

from __future__ import annotations

from comfy_api.latest import io

from .comfy_host.checked_inputs import checked
from .comfy_host.settings import adapter_problem, optimizer_problem, settings_from, settings_inputs
from .comfy_host.sockets import CATEGORY, SettingsSocket


class TrainingSettings(io.ComfyNode):
    """Every training option at its real value."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Inputs, outputs and texts of the node."""
        return io.Schema(
            node_id="DOPSD_TrainingSettings",
            display_name="Training Settings",
            category=CATEGORY,
            description="All training options that D-OPSD Train LoRA does not show, at their real values. Choosing a "
            "preset fills them in; the training node lists what you change afterwards.",
            search_aliases=["d-opsd", "learning rate", "rank", "optimizer", "advanced"],
            inputs=settings_inputs(),
            outputs=[SettingsSocket.Output(display_name="settings", tooltip="For D-OPSD Train LoRA.")],
            hidden=[io.Hidden.prompt, io.Hidden.dynprompt],
        )

    @classmethod
    def validate_inputs(
        cls,
        adapter: str | None = None,
        optimizer: str | None = None,
        custom_path: str | None = None,
        custom_options: str | None = None,
        custom_lr: float | None = None,
    ) -> bool | str:
        """Checks the adapter and the optimizer, which may be in a package that is missing; None for a linked input."""
        problem = adapter_problem(adapter) if adapter is not None else None
        if problem is None and optimizer is not None:
            custom = {"path": custom_path, "options": custom_options, "lr": custom_lr}
            problem = optimizer_problem(optimizer, custom)
        return problem or True

    @classmethod
    @checked
    def execute(cls, model_family, preset, **widgets) -> io.NodeOutput:
        """The settings that the widgets show; `widgets` are the options by id."""
        return io.NodeOutput(settings_from(model_family, preset, widgets))
