"""The training engine: configuration, data, the step, the training loop, checkpoints, metrics and inference."""
