"""Training: the loop, the optimizer, checkpoints. No Ray and no MLflow."""
