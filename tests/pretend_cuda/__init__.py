"""A pretend CUDA device, so that the paths a GPU takes are run where there is none.

A small C++ library (device.cpp) puts the CPU's kernels behind torch's real CUDA dispatch key: device checks, device
guard, autograd's device thread, generators, allocator statistics, pinned memory. Freed memory holds NaN; waits of the
host and copies are counted, each with the place that caused it (watch.py). aimdo.py stands in for comfy-aimdo, so that
ComfyUI's dynamic VRAM runs too, with weights evicted at random. What runs on it is a fact about bytes, waits and order.
It says nothing about speed, about CUDA's own kernels or about their rounding.

    PYTHONPATH=tests python -m pretend_cuda dynamic tests/comfyui/test_bases.py     # pytest on the device, in a mode
    PYTHONPATH=tests python -m pretend_cuda classic --capability 7.5 tests/comfyui/test_bases.py

`modes.py` lists the modes. Each process that the tests start gets the device too (site/sitecustomize.py).
"""
