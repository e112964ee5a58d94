"""What each stage does to its rows. Stages import neither each other nor the pipeline."""
