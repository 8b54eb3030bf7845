"""The training platform: shards, Ray Train workers, evaluation, search, MLflow."""
