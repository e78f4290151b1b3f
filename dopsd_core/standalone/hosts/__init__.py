"""Hosts without ComfyUI, one per model."""
