"""The embedded demo model, shared by both hosts: world, concepts, autoencoder, files and settings."""
