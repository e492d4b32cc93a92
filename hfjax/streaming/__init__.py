"""State of a stream, its transitions, and rollouts."""

from hfjax.streaming.stream import Stream

__all__ = ["Stream"]
