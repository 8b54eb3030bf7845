"""Record a run: in its events, and from them in its MLflow run."""
