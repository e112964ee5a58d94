"""MLflow: runs, curves, models."""
