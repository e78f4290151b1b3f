"""The host without ComfyUI: the demo, its evaluation, and the commands."""
