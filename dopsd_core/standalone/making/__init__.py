"""Scripts that made the demo model: vae -> judge -> pretrain -> distill -> gate -> export. See docs/demo-model.md."""
