"""Scripts that made the demo model: vae -> judge -> pretrain -> distill -> sharpen -> gate -> export.

See docs/demo-model.md.
"""
