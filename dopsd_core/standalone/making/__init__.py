"""How the demo model's weights were made: vae -> judge -> pretrain -> distill -> export. See docs/demo-model.md."""
