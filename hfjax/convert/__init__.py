"""Checkpoints of other projects to and from hfjax."""
