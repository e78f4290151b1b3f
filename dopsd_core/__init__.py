"""D-OPSD: few-step diffusion models learn a concept from their own image-conditioned selves (arXiv 2605.05204).

Pure torch: nothing in this package imports ComfyUI, and only `standalone/` imports diffusers or transformers.
"""

import logging

from .text import make_printable

__version__ = "0.2.0"

logging.getLogger("dopsd").addFilter(make_printable)
