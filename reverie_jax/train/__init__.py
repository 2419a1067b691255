"""Training: recipes, the loop, checkpoints, and plans of a step."""
