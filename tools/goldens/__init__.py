"""Golden numbers of the published code, and what hfjax says to the same inputs."""
