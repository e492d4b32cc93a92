"""Flow-matching schedule, multistep solvers, guidance, and the sampling of whole clips."""
