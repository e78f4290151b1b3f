"""D-OPSD: on-policy self-distillation for few-step diffusion models (arXiv 2605.05204).

Pure torch: nothing in this package imports ComfyUI, and only `standalone/` imports diffusers or transformers.
"""

__version__ = "0.2.0"
