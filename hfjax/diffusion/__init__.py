"""Flow-matching schedule and multistep solvers."""
