"""The metrics of a run: its history file and its MLflow run."""
