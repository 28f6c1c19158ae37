"""Training: the trainer, its checkpoints, validation and metrics."""
