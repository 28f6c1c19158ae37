"""Training: metrics, checkpoints and the trainer."""
