"""The node Training Settings."""

from __future__ import annotations

from comfy_api.latest import io

from .comfy_host.checked_inputs import checked
from .comfy_host.settings import settings_from, settings_inputs
from .comfy_host.sockets import CATEGORY, SettingsSocket


class TrainingSettings(io.ComfyNode):
    """Every option of a training at its real value."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DOPSD_TrainingSettings",
            display_name="Training Settings",
            category=CATEGORY,
            description="Every option of D-OPSD Train LoRA that it does not show itself, at its real value. A preset "
            "fills them in; what you change afterwards is named on the training node.",
            search_aliases=["d-opsd", "learning rate", "rank", "optimizer", "advanced"],
            inputs=settings_inputs(),
            outputs=[SettingsSocket.Output(display_name="settings", tooltip="For D-OPSD Train LoRA.")],
        )

    @classmethod
    @checked
    def execute(cls, model_family, preset, **widgets) -> io.NodeOutput:
        return io.NodeOutput(settings_from(model_family, preset, widgets))
