"""ComfyUI as a host of the core: denoiser, encoder, memory, paths, previews; all code for ComfyUI but the nodes."""
