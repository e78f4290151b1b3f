"""Where the core's tests compute: on the CPU, or where $DOPSD_TEST_DEVICE says."""

from __future__ import annotations

import os

import torch

DEVICE = torch.device(os.environ.get("DOPSD_TEST_DEVICE", "cpu"))
