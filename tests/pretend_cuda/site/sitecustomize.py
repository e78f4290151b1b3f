"""Python runs this at its start when this folder is on PYTHONPATH: the process gets the pretend CUDA device."""

import os
import sys

sys.path.append(os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__)))))

from pretend_cuda import device  # noqa: E402

device.load()
if os.environ["PRETEND_CUDA"] == "dynamic":
    from pretend_cuda import aimdo

    aimdo.install()
