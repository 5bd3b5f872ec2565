"""Training: the learning-rate schedule, the trainer and its checkpoints."""
