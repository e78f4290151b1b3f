"""ComfyUI's entry: D-OPSD nodes (arXiv 2605.05204). ComfyUI imports this file from its custom_nodes folder."""

from .nodes import comfy_entrypoint

WEB_DIRECTORY = "./web"

__all__ = ["WEB_DIRECTORY", "comfy_entrypoint"]
