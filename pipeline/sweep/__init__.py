"""Try a recipe with other settings: an ablation, a grid, a random search. `python -m pipeline.sweep`."""
