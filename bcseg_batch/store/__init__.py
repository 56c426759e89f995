"""What is on disk: images, outputs and records."""
