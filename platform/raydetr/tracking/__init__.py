"""Record the metrics of a run: in its history file and in its MLflow run."""
