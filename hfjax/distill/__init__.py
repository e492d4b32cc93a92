"""What students are trained by: losses, teachers, and rollouts that carry gradients."""
