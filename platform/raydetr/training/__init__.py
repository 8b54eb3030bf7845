"""Train a detector: the loop, the optimizer, checkpoints. Imports neither Ray nor MLflow."""
