"""Checkpoints of other projects to and from hfjax."""

from hfjax.convert.loading import Loaded, load, locate
from hfjax.convert.source import CheckpointError

__all__ = ["CheckpointError", "Loaded", "load", "locate"]
