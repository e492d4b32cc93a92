"""What is trained on: prompts, trajectories of teachers, and latents of videos."""
