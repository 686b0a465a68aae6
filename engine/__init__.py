"""The training engine: configuration, DeepSpeed, the training loop, checkpoints, metrics, inference and reports."""
