"""State of a stream, its transitions, and rollouts."""
