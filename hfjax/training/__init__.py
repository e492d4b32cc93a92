"""How students are trained: config, updates, checkpoints, metrics."""
