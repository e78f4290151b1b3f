"""Scripts that trained the demo model: vae -> judge -> pretrain -> distill -> export. See docs/demo-model.md."""
